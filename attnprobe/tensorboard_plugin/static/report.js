// The way in for a report in one file: the data are in the page.

import { element } from "./dom.js";
import { Embedded } from "./embedded.js";
import { start } from "./page.js";

const data = JSON.parse(document.getElementById("attnprobe-data").textContent);

const link = {
  read: () => window.location.hash.slice(1),
  write: (text) => window.history.replaceState(null, "", `#${text}`),
  watch: (changed) => window.addEventListener("hashchange", changed),
};

// As the system has it, until the button is pressed.
function dark(changed) {
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  let on = system.matches;
  const tell = (value) => { on = value; changed(on); };
  system.addEventListener("change", () => tell(system.matches));
  window.addEventListener("beforeprint", () => changed(false));
  window.addEventListener("afterprint", () => changed(on));
  button.addEventListener("click", () => tell(!on));
  tell(on);
}

const button = element("button", { class: "theme", title: "light or dark", "aria-label": "light or dark" }, "◐");
const title = element("header", { class: "report" },
  element("h1", {}, data.title), element("p", { class: "quiet" }, data.note), button);
start(document.getElementById("attnprobe"), new Embedded(data), { link, live: false, dark, title });

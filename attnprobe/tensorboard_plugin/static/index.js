// The way in for TensorBoard, which shows this page in a frame of its own and calls `render`.
import { element } from "./dom.js";
import { start } from "./page.js";
import { Server } from "./server.js";

const PLUGIN = "attnprobe";
const here = (name) => new URL(name, import.meta.url).href;

export async function render() {
  for (const name of ["vendor/uPlot.min.css", "style.css"]) {
    document.head.append(element("link", { rel: "stylesheet", href: here(name) }));
  }
  await new Promise((done, failed) => {
    const script = element("script", { src: here("vendor/uPlot.iife.min.js") });
    script.onload = done;
    script.onerror = failed;
    document.head.append(script);
  });
  document.title = "Attention";
  const root = element("main", { id: "attnprobe" });
  document.body.append(root);
  await start(root, new Server(here("../")), { link: linkInParent(), live: true, dark: darkLikeParent });
}

// The tab's own part of TensorBoard's address: `#attnprobe&stat=entropy&...`.
function linkInParent() {
  const place = window.parent.location;
  return {
    read: () => {
      const hash = place.hash.slice(1);
      return hash.startsWith(PLUGIN) ? hash.slice(PLUGIN.length).replace(/^[&?]/, "") : "";
    },
    write: (text) => {
      // Only while this tab is open: others keep their own state there.
      if (!place.hash || place.hash.slice(1).startsWith(PLUGIN)) {
        const address = `${place.pathname}${place.search}#${PLUGIN}${text && "&"}${text}`;
        window.parent.history.replaceState(window.parent.history.state, "", address);
      }
    },
    watch: (changed) => window.parent.addEventListener("hashchange", changed),
  };
}

function darkLikeParent(changed) {
  const body = window.parent.document.body;
  const tell = () => changed(body.classList.contains("dark-mode"));
  new MutationObserver(tell).observe(body, { attributes: true, attributeFilter: ["class"] });
  tell();
}

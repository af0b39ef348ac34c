// Everything about one head: curves across runs, all its statistics, its alarms and pictures.

import { Curves } from "./curves.js";
import { dot, element, renew } from "./dom.js";
import { atStep, headList, number } from "./format.js";
import { Pictures } from "./pictures.js";

export class Head {
  constructor(root, model, tip) {
    Object.assign(this, { root, model, shown: "" });
    const part = (name, tag = "div") => element(tag, { class: name });
    const [main, maps, all] = [part("main"), part("maps"), part("small")];
    this.title = element("h2");
    this.alarms = part("own", "ul");
    this.none = element("p", { class: "quiet" });
    this.body = element("div", {}, this.alarms, main, maps, all);
    const close = element("button", { title: "close (escape)", "aria-label": "close", onclick: () => model.state.set({ layer: null, head: null }) }, "✕");
    root.append(element("header", {}, this.title, close), this.none, this.body);
    this.curves = new Curves(main, all, model);
    this.pictures = new Pictures(maps, model, tip);
  }

  draw() {
    const { model, root } = this;
    const { layer, head } = model.state;
    const hide = layer === null || head === null;
    // Whoever closed it from within goes on at the map.
    if (hide && root.contains(document.activeElement)) document.querySelector(".panel canvas")?.focus();
    root.hidden = hide;
    const shown = hide ? "" : `${layer} · head ${head}`;
    const other = shown !== this.shown;
    this.shown = shown;
    if (hide) return;
    this.title.textContent = shown;
    const runs = model.runs.filter((run) => head >= 0 && head < (run.heads[run.layers.indexOf(layer)] ?? 0));
    this.body.hidden = !runs.length;
    this.none.hidden = runs.length > 0;
    this.none.textContent = "The runs that are shown have no such head. Choose another one in the map, or other runs above.";
    if (runs.length) {
      const alarms = runs.flatMap((run) => concerning(run, layer, head).map((alarm) => ({ run, alarm })));
      renew(this.alarms, JSON.stringify(alarms.map(({ run, alarm }) => [run.name, alarm])), () => alarms.map(line));
      this.curves.draw(runs, layer, head, alarms);
      this.pictures.draw(runs, layer, head);
    }
    if (other) this.title.scrollIntoView({ block: "nearest" });
  }
}

function line({ run, alarm }) {
  const times = `${atStep(alarm.raised)} to ${alarm.last.toLocaleString("en")}${alarm.standing ? " (still active)" : ""}`;
  return element("li", {},
    dot(run),
    element("b", {}, alarm.name),
    ` ${headList(alarm.heads)}, ${times}: ${number(alarm.value)} against ${number(alarm.threshold)}. ${alarm.advice}`);
}

function concerning(run, layer, head) {
  return run.alarms.filter((alarm) => alarm.layer === layer && (!alarm.heads.length || alarm.heads.includes(head)));
}

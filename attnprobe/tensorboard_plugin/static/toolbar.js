// Which runs, which statistic, which layers, which colours.

import { dot, element, renew, replace } from "./dom.js";
import { count } from "./format.js";
import { bounded } from "./scales.js";

const BETTER = { high: "higher is better", low: "lower is better", "": "neither end is good in itself" };

export class Toolbar {
  constructor(root, model) {
    this.model = model;
    const { state } = model;
    this.stat = element("select", { id: "stat", onchange: () => state.set({ stat: this.stat.value, order: "" }) });
    this.layers = element("input", {
      type: "search", placeholder: "all layers", "aria-label": "filter of layers",
      title: "words of the layers' names; * stands for anything", oninput: () => state.set({ layers: this.layers.value }),
    });
    this.colours = element(
      "select",
      { "aria-label": "range of the colours", onchange: () => state.set({ colours: this.colours.value }) },
      ...[["runs", "all steps"], ["step", "this step"], ["range", "the definition's range"]].map(
        ([value, text]) => element("option", { value }, text),
      ),
    );
    this.log = element("input", { type: "checkbox", onchange: () => state.set({ log: this.log.checked }) });
    this.runs = element("div", { class: "runs", role: "group", "aria-label": "runs" });
    this.meaning = element("p", { class: "meaning" });
    replace(
      root,
      element("div", { class: "row" },
        element("label", {}, "statistic ", this.stat),
        element("label", {}, "layers ", this.layers),
        element("label", {}, "colours over ", this.colours),
        element("label", { class: "check" }, this.log, " logarithmic"),
      ),
      this.runs,
      this.meaning,
    );
  }

  draw() {
    const { model } = this;
    const { names, meaning, stat, state } = model;
    if (this.listed !== names.join("\n")) {
      this.listed = names.join("\n");
      const groups = [["head", "per head"], ["layer", "per layer"]].map(([level, label]) =>
        element("optgroup", { label }, ...names.filter((name) => model.overview.statistics[name].level === level)
          .map((name) => element("option", { value: name }, name))));
      replace(this.stat, ...groups.filter((group) => group.children.length));
    }
    this.stat.value = stat;
    if (document.activeElement !== this.layers) this.layers.value = state.layers;
    this.colours.value = state.colours;
    this.colours.disabled = state.base !== null;
    this.colours.lastChild.disabled = !bounded(meaning);
    this.drawRuns();
    const parts = [
      meaning.unit && `unit: ${meaning.unit}`,
      meaning.meaning && BETTER[meaning.better],
      meaning.formula && `definition: ${meaning.formula}`,
    ].filter(Boolean);
    renew(this.meaning, `${stat} ${parts}`, () => (
      [element("b", {}, stat), ` ${meaning.meaning ?? ""} `, element("span", { class: "quiet" }, parts.join(" · "))]));
  }

  drawScale(scale) {
    this.log.checked = scale.log;
    this.log.disabled = !scale.positive;
  }

  drawRuns() {
    const { model } = this;
    if (this.listedFor === model.now) return;
    this.listedFor = model.now;
    const shown = new Set(model.runs.map((run) => run.name));
    const active = (run) => run.alarms.filter((alarm) => alarm.standing && alarm.severity === "alarm").length;
    const key = JSON.stringify(model.overview.runs.map((run) => [run.name, run.steps.length, active(run), shown.has(run.name)]));
    renew(this.runs, key, () => model.overview.runs.map((run) => {
      const box = element("input", { type: "checkbox", "data-key": run.name, onchange: () => this.choose(run.name, box.checked) });
      box.checked = shown.has(run.name);
      return element("label", { class: "check", title: run.name }, box,
        dot(run), run.name,
        element("span", { class: "quiet" }, ` ${count(run.steps.length, "probe")}`),
        active(run) ? element("span", { class: "badge" }, count(active(run), "active alarm")) : null);
    }));
  }

  choose(name, wanted) {
    const shown = this.model.runs.map((run) => run.name).filter((one) => one !== name);
    if (wanted || shown.length) this.model.state.set({ runs: wanted ? [...shown, name] : shown });
    else {
      this.listedFor = this.runs.drawnFor = null; // one has to stay
      this.drawRuns();
    }
  }
}

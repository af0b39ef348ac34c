// Everything about one head: curves across runs, all its statistics, its alarms and pictures.

import { chart } from "./chart.js";
import { colourOf, element, replace } from "./dom.js";
import { headList, number } from "./format.js";
import { drawMaps, drawUsage } from "./maps.js";

const POINTS = 1000;
const SMALL = 400;

export class Head {
  constructor(root, model, tip) {
    Object.assign(this, { root, model, tip, plots: [], values: [], curves: [], loaded: "", pictured: "" });
    this.title = element("h2");
    this.close = element("button", { title: "close (escape)", onclick: () => model.state.set({ layer: null, head: null }) }, "✕");
    this.alarms = element("ul", { class: "own" });
    this.main = element("div", { class: "main" });
    this.maps = element("div", { class: "maps" });
    this.all = element("div", { class: "small" });
    replace(root, element("header", {}, this.title, this.close), this.alarms, this.main, this.maps, this.all);
  }

  draw() {
    const { layer, head } = this.model.state;
    this.root.hidden = layer === null || head === null;
    if (this.root.hidden) {
      this.loaded = this.pictured = "";
      return;
    }
    this.title.textContent = `${layer} · head ${head}`;
    this.drawAlarms(layer, head);
    const runs = this.model.runs.filter((run) => run.layers.includes(layer));
    // While a run grows its curves are fetched anew, but no more often than it is looked at.
    const key = JSON.stringify([layer, head, this.model.stat, this.model.dark, this.root.clientWidth, runs.map((run) => [run.name, run.revision])]);
    if (key !== this.loaded) {
      this.loaded = key;
      this.load(key, runs, layer, head);
    } else {
      for (const plot of this.plots) plot.redraw(false);
      this.drawValues();
    }
    this.drawPictures(runs, layer, head);
  }

  async load(key, runs, layer, head) {
    let found;
    try {
      const points = runs.length > 1 ? SMALL : POINTS;
      found = await Promise.all(runs.map((run) => this.model.source.head(run.name, layer, head, points)));
    } catch (error) {
      if (key === this.loaded) replace(this.main, element("p", { class: "problem" }, error.message));
      return;
    }
    if (key !== this.loaded) return;
    for (const plot of this.plots) plot.destroy();
    this.plots = [];
    this.curves = runs.map((run, index) => ({ run, curves: found[index] }));
    this.drawCurves(layer, head);
  }

  drawCurves(layer, head) {
    const { model } = this;
    const names = model.names.filter((name) => this.curves.some(({ curves }) => curves[name]));
    const options = (name) => ({
      curves: this.curves.filter(({ curves }) => curves[name]).map(({ run, curves }) => ({ label: run.name, colour: run.colour, ...curves[name] })),
      marker: () => model.step,
      picked: (step) => model.state.set({ step }),
    });
    const width = Math.max(280, this.main.clientWidth || this.root.clientWidth - 24);
    const spans = this.curves.flatMap(({ run }) => concerning(run, layer, head).map((alarm) => ({
      from: alarm.raised, to: alarm.last, colour: colourOf(alarm.severity === "alarm" ? "--alarm" : "--information"),
    })));
    replace(this.main, element("h3", {}, model.stat));
    if (names.includes(model.stat)) {
      this.plots.push(chart(this.main, { ...options(model.stat), width, height: 190, spans, log: model.log }));
    } else {
      const why = model.meaning.level === "layer" ? "is one number for the whole layer: see the map above" : "was not measured for this head";
      this.main.append(element("p", { class: "quiet" }, `${model.stat} ${why}.`));
    }
    replace(this.all, element("h3", {}, "All statistics of this head"));
    const grid = element("div", { class: "grid" });
    this.values = [];
    this.all.append(grid);
    for (const name of names) {
      const cell = element("div", { class: name === model.stat ? "one on" : "one" },
        element("button", { title: model.overview.statistics[name].meaning, onclick: () => model.state.set({ stat: name, order: "" }) }, name),
        element("span", { class: "values" }));
      this.values.push([name, cell.lastChild]);
      grid.append(cell);
      this.plots.push(chart(cell, { ...options(name), width: 226, height: 96, small: true }));
    }
    this.drawValues();
  }

  // Each statistic at the step that is shown, in the colours of the runs.
  drawValues() {
    for (const [name, root] of this.values) {
      replace(root, ...this.curves.filter(({ curves }) => curves[name]).map(({ run, curves }) => {
        const { steps, values } = curves[name];
        const index = steps.findLastIndex((step) => step <= this.model.step);
        return element("span", { style: `color:${run.colour}` }, index < 0 ? "" : number(values[index]));
      }));
    }
  }

  drawAlarms(layer, head) {
    const found = this.model.runs.flatMap((run) => concerning(run, layer, head).map((alarm) => ({ run, alarm })));
    replace(this.alarms, ...found.map(({ run, alarm }) => element("li", {},
      element("span", { class: "dot", style: `background:${run.colour}` }),
      element("b", {}, alarm.name),
      ` ${headList(alarm.heads)}, step ${alarm.raised} to ${alarm.last}${alarm.standing ? " (stands)" : ""}: `
        + `${number(alarm.value)} against ${number(alarm.threshold)}. ${alarm.advice}`)));
  }

  async drawPictures(runs, layer, head) {
    const { model } = this;
    const recorded = runs.filter((run) => run.maps.some(([one, number_]) => one === layer && number_ === head));
    const key = JSON.stringify([layer, head, model.step, model.dark, recorded.map((run) => [run.name, run.revision])]);
    if (key === this.pictured) return;
    this.pictured = key;
    const parts = await Promise.all(recorded.map(async (run) => {
      const [maps, usage] = [element("div"), element("div")];
      const draw = async (question, into, drawn) => {
        try {
          drawn(into, await question, this.tip);
        } catch (error) {
          replace(into, element("p", { class: "quiet" }, error.message));
        }
      };
      await Promise.all([
        draw(model.source.map(run.name, layer, head, model.step), maps, drawMaps),
        draw(model.source.usage(run.name, layer, head), usage, drawUsage),
      ]);
      const title = element("h3", {}, element("span", { class: "dot", style: `background:${run.colour}` }), `Maps, ${run.name}`);
      return element("section", {}, title, element("div", { class: "figures" }, maps, usage));
    }));
    if (key !== this.pictured) return;
    const none = element("p", { class: "quiet" }, "No maps of this head were recorded. To record them, name its layer: ",
      element("code", {}, `maps=${JSON.stringify([layer])}`), ".");
    replace(this.maps, ...(parts.length ? parts : [none]));
  }
}

function concerning(run, layer, head) {
  return run.alarms.filter((alarm) => alarm.layer === layer && (!alarm.heads.length || alarm.heads.includes(head)));
}

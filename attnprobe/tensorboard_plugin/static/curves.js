// The curves of one head: the chosen statistic, then all of them small, with their numbers at the step that is shown.

import { chart, feed, logarithmic, mark } from "./chart.js";
import { alarmColour, element, replace } from "./dom.js";
import { number } from "./format.js";
import { last } from "./model.js";

const [POINTS, SMALL] = [1000, 400];
const STILL = 200; // milliseconds that a step is looked at before its numbers are asked for

export class Curves {
  constructor(main, all, model) {
    Object.assign(this, { main, all, model, plots: [], readings: [], found: [], shape: "", step: null, since: 0 });
  }

  draw(runs, layer, head, alarms) {
    const { model } = this;
    const points = runs.length > 1 ? SMALL : POINTS;
    const found = runs.map((run) => ({ run, ...model.loader.get(
      JSON.stringify(["head", run.name, layer, head, points]), run.revision, `head ${run.name}`,
      // A map, since a statistic may be called like something that every object has.
      async () => new Map(Object.entries(await model.source.head(run.name, layer, head, points))),
    ) }));
    const waiting = found.some(({ value }) => !value);
    for (const part of [this.main, this.all]) part.classList.toggle("waiting", waiting);
    if (waiting) return;
    const names = model.names.filter((name) => found.some(({ value }) => value.has(name)));
    const log = model.log && logarithmic(this.of(found, model.stat));
    const width = Math.max(280, this.main.clientWidth);
    const shape = JSON.stringify([layer, head, model.stat, names, log, model.dark, width,
      found.map(({ run, value }) => [run.name, [...value.keys()]])]);
    const grown = found.some(({ value }, at) => value !== this.found[at]?.value);
    Object.assign(this, { found, alarms });
    if (shape !== this.shape) this.build(names, width, log);
    else if (grown) for (const [name, plot] of this.plots) feed(plot, this.of(found, name));
    this.shape = shape;
    for (const [, plot] of this.plots) mark(plot, model.step);
    this.read(layer, head);
  }

  of(found, name) {
    return found.filter(({ value }) => value.has(name)).map(({ run, value }) => ({ label: run.name, colour: run.colour, ...value.get(name) }));
  }

  build(names, width, log) {
    const { model } = this;
    for (const [, plot] of this.plots) plot.destroy();
    this.plots = [];
    const draw = (root, name, options) => this.plots.push([name, chart(root, {
      ...options, curves: this.of(this.found, name), picked: (step) => model.state.set({ step }),
    })]);
    replace(this.main, element("h3", {}, model.stat));
    if (names.includes(model.stat)) {
      const spans = () => this.alarms.map(({ alarm }) => ({
        from: alarm.raised, to: alarm.last, colour: alarmColour(alarm),
      }));
      draw(this.main, model.stat, { width, height: 190, spans, log });
    } else {
      const why = model.meaning.level === "layer" ? "is one number for the whole layer: see the map above" : "was not measured for this head";
      this.main.append(element("p", { class: "quiet" }, `${model.stat} ${why}.`));
    }
    this.readings = names.map((name) => [name, element("span", { class: "values" })]);
    const cells = this.readings.map(([name, reading]) => element("div", { class: name === model.stat ? "one on" : "one" },
      element("button", {
        "data-key": name, title: model.overview.statistics[name].meaning, onclick: () => model.state.set({ stat: name, order: "" }),
      }, name), reading));
    replace(this.all, element("h3", {}, "All statistics of this head"), element("div", { class: "grid" }, ...cells));
    names.forEach((name, at) => draw(cells[at], name, { width: 226, height: 96, small: true }));
  }

  // Each statistic at the step that is shown, in the colours of the runs.
  read(layer, head) {
    const { model } = this;
    if (model.step !== this.step) [this.step, this.since] = [model.step, performance.now()];
    const exact = this.found.map(({ run, value }) => this.exact(run, value, layer, head));
    for (const [name, root] of this.readings) {
      replace(root, ...this.found.map(({ run, value }, at) => (
        value.has(name) ? element("span", { style: `color:${run.colour}`, title: run.name }, exact[at](name)) : null)));
    }
  }

  // The curves leave points out, so a step between those of a curve is asked for.
  exact(run, curves, layer, head) {
    const { model } = this;
    const probe = model.probe(run);
    if (probe < 0) return () => "";
    const step = run.steps[probe];
    const places = new Map([...curves].map(([name, { steps }]) => [name, last(steps, step, -1)]));
    const absent = [...places].filter(([name, at]) => curves.get(name).steps[at] !== step).map(([name]) => name);
    const [row, width] = [run.layers.indexOf(layer), Math.max(...run.heads)];
    const still = performance.now() - this.since >= STILL;
    if (absent.length && !still) {
      clearTimeout(this.later);
      this.later = setTimeout(model.loader.arrived, STILL);
    }
    const asked = !absent.length || !still ? {} : model.loader.get(
      JSON.stringify(["numbers", run.name, layer, head, step]), run.revision, `numbers ${run.name}`,
      async () => new Map(await Promise.all(absent.map(async (name) => (
        [name, [(await model.source.frames(run.name, name, probe, probe + 1))[row * width + head]]])))),
    );
    return (name) => {
      if (!absent.includes(name)) return number(curves.get(name).values[places.get(name)]);
      return asked.value?.has(name) ? number(asked.value.get(name)[0]) : "…";
    };
  }
}

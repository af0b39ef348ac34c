// What the state means for the runs that there are.

import { LINES, Scale } from "./colours.js";
import { matcher, shortNames } from "./format.js";
import { AGAIN, Frames } from "./frames.js";

const FIRST = ["normalized_entropy", "entropy"];
const AT_ONCE = 4; // runs that are shown unless others are chosen

export class Model {
  constructor(source, state, redraw) {
    this.source = source;
    this.state = state;
    this.redraw = redraw;
    this.frames = new Frames(source);
    this.ranges = new Map();
    this.error = "";
    this.overview = { runs: [], statistics: {}, problems: [], complete: false };
  }

  // Whether anything is new.
  async load() {
    const answer = await this.source.runs(this.overview.revision ?? "");
    if (!answer.runs) return false;
    const colours = new Map((this.overview.runs ?? []).map((run) => [run.name, run.colour]));
    answer.runs.sort((a, b) => a.name.localeCompare(b.name, "en", { numeric: true }));
    for (const run of answer.runs) {
      run.short = shortNames(run.layers);
      run.colour = colours.get(run.name) ?? LINES[colours.size % LINES.length];
      colours.set(run.name, run.colour);
    }
    this.overview = answer;
    this.ranges.clear();
    return true;
  }

  get runs() {
    const { runs } = this.overview;
    const chosen = runs.filter((run) => this.state.runs.includes(run.name));
    return chosen.length ? chosen : runs.slice(0, AT_ONCE);
  }

  get names() {
    const there = new Set(this.runs.flatMap((run) => run.names));
    return Object.keys(this.overview.statistics).filter((name) => there.has(name));
  }

  get stat() {
    const { names } = this;
    return [this.state.stat, ...FIRST, names[0]].find((name) => names.includes(name)) ?? "";
  }

  get meaning() {
    return this.overview.statistics[this.stat] ?? {};
  }

  // Every step that a chosen run has a probe at.
  get steps() {
    return [...new Set(this.runs.flatMap((run) => run.steps))].sort((a, b) => a - b);
  }

  get step() {
    const { steps } = this;
    return this.state.step === null ? steps.at(-1) : steps[last(steps, this.state.step, 0)];
  }

  // Index of the run's probe that is shown at a step; -1 before its first.
  probe(run, step = this.step) {
    return last(run.steps, step, -1);
  }

  frame(run, step = this.step) {
    const probe = this.probe(run, step);
    if (probe < 0 || !run.names.includes(this.stat)) return null;
    return this.frames.get(run, this.stat, this.meaning.level, probe, (error) => this.arrived(error));
  }

  arrived(error) {
    if (error) this.error = error.message;
    this.redraw();
  }

  // One entry a run: the numbers that its map shows, and those it is compared with.
  views() {
    const keep = matcher(this.state.layers);
    return this.runs.map((run) => {
      const frame = this.frame(run);
      const base = this.state.base === null ? null : this.frame(run, this.state.base);
      const compared = this.state.base !== null;
      const rows = run.layers.map((name, row) => row).filter((row) => keep(run.layers[row]) || keep(run.short[row]));
      const width = frame?.width ?? (this.meaning.level === "layer" ? 1 : Math.max(0, ...run.heads));
      const now = (row, head) => frame?.values[row * width + head] ?? NaN;
      const then = (row, head) => base?.values[row * width + head] ?? NaN;
      return {
        run,
        rows,
        width,
        waiting: frame === undefined || base === undefined,
        there: frame !== null && (!compared || base !== null),
        heads: (row) => Math.min(width, run.heads[row]),
        now,
        then,
        shown: compared ? (row, head) => now(row, head) - then(row, head) : now,
        alarms: this.alarmsAt(run),
      };
    });
  }

  // Alarms that stand at the step that is shown.
  alarmsAt(run) {
    const step = run.steps[this.probe(run)];
    return run.alarms.filter((alarm) => alarm.raised <= step && (step <= alarm.last));
  }

  scale(views) {
    const { low, high } = this.meaning;
    if (this.state.base !== null) {
      const end = ends(views).reduce((most, value) => Math.max(most, Math.abs(value)), 0) || 1;
      return new Scale(-end, end, { diverging: true });
    }
    if (this.state.colours === "range" && typeof low === "number" && typeof high === "number") {
      return new Scale(low, high);
    }
    const range = this.state.colours === "step" ? spread(views) : this.range();
    if (!range) return new Scale(0, 1);
    // Magnitudes without a bound, over more than three decades, are only told apart by their logarithm.
    const wide = typeof high !== "number" && range.low >= 0 && range.positive > 0 && range.high / range.positive > 1000;
    const log = this.state.log ?? wide;
    const start = log && range.positive > 0 ? range.positive : range.low;
    return new Scale(start, range.high, { log });
  }

  // Over all probes of the runs, null until it is known.
  range() {
    const found = this.runs.filter((run) => run.names.includes(this.stat)).map((run) => {
      const key = JSON.stringify([run.name, this.stat]);
      if (!this.ranges.has(key)) {
        this.ranges.set(key, null);
        this.source.range(run.name, this.stat).then(
          (range) => { this.ranges.set(key, range); this.redraw(); },
          (error) => { setTimeout(() => this.ranges.delete(key), AGAIN); this.arrived(error); },
        );
      }
      return this.ranges.get(key);
    });
    const known = found.filter((range) => range && range.low !== null);
    if (!known.length) return null;
    const pick = (name, choose) => {
      const values = known.map((range) => range[name]).filter((value) => value !== null);
      return values.length ? choose(...values) : null;
    };
    return { low: pick("low", Math.min), high: pick("high", Math.max), positive: pick("positive", Math.min) };
  }

  // Every head that is shown, the ones that deserve a look first.
  ranking(views) {
    const order = this.order;
    const found = views.flatMap((view) => view.rows.flatMap((row) => {
      const numbers = Array.from({ length: view.heads(row) }, (_, head) => view.shown(row, head));
      return numbers.map((value, head) => ({ run: view.run, row, head, value, size: this.size(value) }));
    })).filter(({ value }) => !Number.isNaN(value));
    return found.sort((a, b) => (order === "low" ? a.size - b.size : b.size - a.size));
  }

  size(value) {
    return this.state.base === null ? value : Math.abs(value);
  }

  get order() {
    if (this.state.order) return this.state.order;
    return this.state.base !== null || this.meaning.better === "low" ? "high" : this.meaning.better ? "low" : "high";
  }
}

// Index of the last number that is no more than `limit` in an ascending list; `none` where all are more.
export function last(list, limit, none) {
  let [low, high] = [0, list.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (list[middle] <= limit) low = middle + 1;
    else high = middle;
  }
  return low ? low - 1 : none;
}

function ends(views) {
  return views.flatMap((view) => view.rows.flatMap((row) =>
    Array.from({ length: view.heads(row) }, (_, head) => view.shown(row, head)),
  )).filter(Number.isFinite);
}

function spread(views) {
  const values = ends(views);
  if (!values.length) return null;
  const positive = values.filter((value) => value > 0);
  const [low, high] = [values, values].map((list, at) => list.reduce((a, b) => (at ? Math.max : Math.min)(a, b)));
  return { low, high, positive: positive.length ? positive.reduce((a, b) => Math.min(a, b)) : null };
}

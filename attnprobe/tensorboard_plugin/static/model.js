// What the state means for the runs that there are.

import { LINES } from "./colours.js";
import { matcher, real, shortNames } from "./format.js";
import { frameOf, widthOf } from "./frames.js";
import { Loader } from "./loader.js";

const FIRST = ["normalized_entropy", "entropy"];
const AT_ONCE = 4; // runs that are shown unless others are chosen

export class Model {
  constructor(source, state, redraw) {
    this.source = source;
    this.state = state;
    this.loader = new Loader(redraw);
    this.colours = new Map(); // of the runs, also of one that is gone: it may come back
    this.error = "";
    this.overview = { runs: [], statistics: {}, problems: [], complete: false };
    this.shown = {};
  }

  // Whether anything is new.
  async load() {
    const answer = await this.source.runs(this.overview.revision ?? "");
    if (!answer.runs) return false;
    answer.runs.sort((a, b) => a.name.localeCompare(b.name, "en", { numeric: true }));
    for (const run of answer.runs) {
      run.short = shortNames(run.layers);
      if (!this.colours.has(run.name)) this.colours.set(run.name, LINES[this.colours.size % LINES.length]);
      run.colour = this.colours.get(run.name);
      run.loss = run.loss.map(real);
      for (const alarm of run.alarms) [alarm.value, alarm.threshold] = [real(alarm.value), real(alarm.threshold)];
    }
    this.overview = answer;
    return true;
  }

  // The runs that are shown, and every step that one of them has a probe at.
  get now() {
    const { overview, state, shown } = this;
    const wanted = state.runs.join("\n");
    if (shown.overview !== overview || shown.wanted !== wanted) {
      const chosen = overview.runs.filter((run) => state.runs.includes(run.name));
      const runs = chosen.length ? chosen : overview.runs.slice(0, AT_ONCE);
      const steps = [...new Set(runs.flatMap((run) => run.steps))].sort((a, b) => a - b);
      this.shown = { overview, wanted, runs, steps };
    }
    return this.shown;
  }

  get runs() {
    return this.now.runs;
  }

  get steps() {
    return this.now.steps;
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

  get step() {
    const { steps } = this;
    return this.state.step === null ? steps.at(-1) : steps[last(steps, this.state.step, 0)];
  }

  // Index of the run's probe that is shown at a step; -1 before its first.
  probe(run, step = this.step) {
    return last(run.steps, step, -1);
  }

  // What an address names that is not here.
  get missing() {
    const { state, overview } = this;
    if (overview.complete === false) return [];
    const gone = state.runs.filter((name) => !overview.runs.some((run) => run.name === name)).map((name) => `run ${name}`);
    if (state.stat && !this.names.includes(state.stat)) gone.push(`statistic ${state.stat} in these runs`);
    return gone.map((what) => `There is no ${what}.`);
  }

  // One entry a run: the numbers that its map shows, and those it is compared with.
  views() {
    const { state, stat, meaning, step } = this;
    const keep = matcher(state.layers);
    const compared = state.base !== null;
    return this.runs.map((run) => {
      const [probe, before] = [this.probe(run, step), compared ? this.probe(run, state.base) : -1];
      const frame = (at) => (at < 0 || !run.names.includes(stat) ? null : frameOf(this.loader, this.source, run, stat, meaning.level, at));
      const [shown, base] = [frame(probe), frame(before)];
      const rows = run.layers.map((name, row) => row).filter((row) => keep(run.layers[row]) || keep(run.short[row]));
      const width = widthOf(run, meaning.level);
      const now = (row, head) => (shown ? shown.values[row * width + head] : NaN);
      const then = (row, head) => (base ? base.values[row * width + head] : NaN);
      const at = run.steps[probe];
      return {
        run, rows, width, now, then, stat, meaning, compared,
        step: at,
        loss: run.loss[probe],
        base: run.steps[before],
        waiting: shown === undefined || base === undefined,
        heads: (row) => Math.min(width, run.heads[row]),
        shown: compared ? (row, head) => now(row, head) - then(row, head) : now,
        alarms: run.alarms.filter((alarm) => alarm.raised <= at && at <= alarm.last)
          .map((alarm) => ({ ...alarm, heads: headsAt(alarm, at) })),
      };
    });
  }

  // Every head that is shown, the ones that deserve a look first.
  ranking(views) {
    const sign = this.order === "low" ? 1 : -1;
    const found = [];
    for (const view of views) {
      for (const row of view.rows) {
        for (let head = 0; head < view.heads(row); head += 1) {
          const value = view.shown(row, head);
          if (!Number.isNaN(value)) found.push({ run: view.run, row, head, value, size: sign * (view.compared ? Math.abs(value) : value) });
        }
      }
    }
    return found.sort((a, b) => (a.size < b.size ? -1 : a.size > b.size ? 1 : 0));
  }

  get order() {
    if (this.state.order) return this.state.order;
    return this.state.base !== null || this.meaning.better !== "high" ? "high" : "low";
  }
}

// The heads that an alarm named at a step; all that it ever named where that is not known any more.
function headsAt(alarm, step) {
  return alarm.turns.findLast(([since]) => since <= step)?.[1] ?? alarm.heads;
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

// Which range of numbers the colours stand for.

import { Scale } from "./colours.js";

const DECADES = 1000; // from the smallest positive number to the largest

// Undefined until it is known.
export function scaleOf(model, views) {
  const { low, high } = model.meaning;
  const { base, colours } = model.state;
  if (base !== null) {
    const range = spread(views);
    const end = range ? Math.max(Math.abs(range.low), Math.abs(range.high)) : 0;
    return new Scale(-end || -1, end || 1, { diverging: true });
  }
  if (colours === "range" && bounded(model.meaning)) return new Scale(low, high);
  const range = colours === "step" ? spread(views) : whole(model, views);
  if (range === undefined) return undefined;
  if (!range) return new Scale(0, 1);
  // Magnitudes without a bound, over more than three decades, are only told apart by their logarithm.
  const possible = range.low >= 0 && range.positive > 0;
  const wide = typeof high !== "number" && possible && range.high / range.positive > DECADES;
  const log = possible && (model.state.log ?? wide);
  return new Scale(log ? range.positive : range.low, range.high, { log, positive: possible });
}

export function bounded({ low, high }) {
  return typeof low === "number" && typeof high === "number";
}

// Over all probes of the runs; null where there is no number.
function whole(model, views) {
  const asked = model.runs.filter((run) => run.names.includes(model.stat)).map((run) => model.loader.get(
    JSON.stringify(["range", run.name, model.stat]), run.revision, `range ${run.name}`,
    () => model.source.range(run.name, model.stat),
  ));
  if (asked.some(({ value, error }) => !value && !error)) return undefined;
  const known = asked.map(({ value }) => value).filter((range) => range && range.low !== null);
  if (asked.some(({ value }) => !value)) known.push(spread(views));
  return known.filter(Boolean).reduce((one, other) => (one ? {
    low: Math.min(one.low, other.low),
    high: Math.max(one.high, other.high),
    positive: Math.min(one.positive ?? Infinity, other.positive ?? Infinity),
  } : other), null);
}

// Of the numbers that are shown.
function spread(views) {
  let [low, high, positive] = [Infinity, -Infinity, Infinity];
  for (const view of views) {
    for (const row of view.rows) {
      for (let head = 0; head < view.heads(row); head += 1) {
        const value = view.shown(row, head);
        if (!Number.isFinite(value)) continue;
        if (value < low) low = value;
        if (value > high) high = value;
        if (value > 0 && value < positive) positive = value;
      }
    }
  }
  return low <= high ? { low, high, positive } : null;
}

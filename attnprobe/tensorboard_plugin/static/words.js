// What there is to say of a map, and of the head under the pointer.

import { atStep, headList, number, signed } from "./format.js";

export function words(view) {
  const { run, step, base } = view;
  if (!run.names.length) return `nothing could be measured in this run: ${run.invalid.at(-1)?.[1] ?? "no reason is known"}`;
  if (!run.names.includes(view.stat)) return `${view.stat} was not recorded in this run`;
  if (step === undefined) return `this run begins at ${atStep(run.steps[0])}`;
  if (!view.rows.length) return "no layer's name matches the filter";
  const invalid = run.invalid.find(([at]) => at === step);
  const parts = [atStep(step)];
  if (!Number.isNaN(view.loss)) parts.push(`loss ${number(view.loss)}`);
  if (view.compared) parts.push(base === undefined ? "nothing to compare with: this run begins later" : `compared with ${atStep(base)}`);
  if (invalid) parts.push(`not measured: ${invalid[1]}`);
  return parts.join(" · ");
}

export function lines(view, row, head) {
  const { run, now, then, meaning, stat } = view;
  const layer = run.layers[row];
  if (head < 0) return [layer];
  const found = [meaning.level === "layer" ? layer : `${layer} · head ${head}`];
  found.push(`${stat} ${number(now(row, head))}${meaning.unit ? ` ${meaning.unit}` : ""}`);
  if (view.compared && view.base !== undefined) {
    found.push(`${signed(now(row, head) - then(row, head))} since ${atStep(view.base)} (${number(then(row, head))})`);
  }
  for (const alarm of view.alarms) {
    if (alarm.layer === layer && (meaning.level === "layer" || !alarm.heads.length || alarm.heads.includes(head))) {
      found.push(`⚠ ${alarm.name}, ${headList(alarm.heads) || "layer"}, since ${atStep(alarm.since)}`);
    }
  }
  return found;
}

// Lists: the alarms and the heads in the order of the statistic, which lead to a head, and what the probe warned about.

import { dot, element, renew, replace } from "./dom.js";
import { atStep, count, headList, number, signed } from "./format.js";

const MOST = 200;

export function drawAlarms(root, model) {
  if (root.overview === model.now) return; // the list is the same at every step
  root.overview = model.now;
  const found = model.runs.flatMap((run) => run.alarms.map((alarm) => ({ run, alarm })));
  // Those that are active first, the newest of them on top.
  found.sort((a, b) => b.alarm.standing - a.alarm.standing || b.alarm.raised - a.alarm.raised);
  const shown = found.slice(0, MOST);
  const key = JSON.stringify([found.length, shown.map(({ run, alarm }) => [run.name, run.colour, alarm])]);
  const scrolled = root.querySelector("ul")?.scrollTop ?? 0;
  renew(root, key, () => [
    element("h2", {}, `Alarms (${found.length})`),
    found.length ? element("ul", {}, ...shown.map(({ run, alarm }) => element("li", {}, alarmButton(model, run, alarm))))
      : element("p", { class: "quiet" }, "No alarm was raised in these runs."),
    found.length > MOST ? element("p", { class: "quiet" }, `${found.length - MOST} older ones are not listed`) : null,
  ]);
  root.querySelector("ul")?.scrollTo(0, scrolled);
}

// It leads to its head at its step.
function alarmButton(model, run, alarm) {
  const where = [alarm.layer || "whole run", headList(alarm.heads)].filter(Boolean).join(" · ");
  const times = `raised at ${atStep(alarm.raised)}, ${alarm.standing ? "still active" : `cleared after ${alarm.last.toLocaleString("en")}`}`;
  const stat = alarm.reads.find((name) => run.names.includes(name));
  const jump = () => model.state.set({
    runs: model.runs.map((one) => one.name),
    step: alarm.raised,
    ...(alarm.layer ? { layer: alarm.layer, head: alarm.heads[0] ?? 0, layers: "" } : {}),
    ...(stat ? { stat, order: "" } : {}),
  });
  return element("button", {
    class: `alarm ${alarm.severity === "alarm" ? "" : "information"}`, onclick: jump, title: alarm.advice,
    "data-key": JSON.stringify([run.name, alarm.name, alarm.layer, alarm.heads, alarm.raised]),
  },
  dot(run),
  element("b", {}, alarm.name), ` ${where}`,
  element("small", {}, `${times} · ${number(alarm.value)} against ${number(alarm.threshold)}`),
  // That of a head is told beside its curves.
  alarm.layer ? null : element("small", {}, alarm.advice));
}

export function drawRanking(root, model, views, scale, top = 15) {
  const ranked = model.ranking(views);
  const { state, order, meaning } = model;
  const turn = () => state.set({ order: order === "high" ? "low" : "high" });
  const what = state.base === null ? model.stat : `change of ${model.stat}`;
  const title = element("h2", {}, meaning.level === "layer" ? "Layers by " : "Heads by ", what);
  const button = element("button", { onclick: turn, title: "turn the order round" },
    `${state.base === null ? { high: "highest", low: "lowest" }[order] : { high: "largest", low: "smallest" }[order]} first `
      + (order === "high" ? "↓" : "↑"));
  const largest = Math.abs(scale.high);
  const items = ranked.slice(0, top).map(({ run, row, head, value }) => {
    const chosen = state.layer === run.layers[row] && state.head === head;
    const name = meaning.level === "layer" ? run.short[row] : `${run.short[row]} · ${head}`;
    const share = state.base === null ? scale.place(value) : Math.min(1, Math.abs(value) / largest);
    return element("tr", {},
      element("td", {}, element("button", {
        class: chosen ? "head on" : "head", "aria-pressed": String(chosen), "data-key": JSON.stringify([run.name, row, head]), title: `${run.name}: ${run.layers[row]}`,
        onclick: () => state.set({ layer: run.layers[row], head }),
      }, dot(run), name)),
      element("td", { class: "bar" }, element("span", { style: `width:${(share * 100).toFixed(1)}%` })),
      element("td", { class: "value" }, state.base === null ? number(value) : signed(value)));
  });
  const rest = ranked.length > top ? element("p", { class: "quiet" }, `of ${count(ranked.length, meaning.level === "layer" ? "layer" : "head")}`) : null;
  const none = ranked.length || views.some((view) => view.waiting) ? null : element("p", { class: "quiet" }, "Nothing was measured at this step.");
  replace(root, title, button, element("table", {}, element("tbody", {}, ...items)), rest ?? none);
}

export function drawWarnings(root, model) {
  if (root.overview === model.now) return;
  root.overview = model.now;
  const lines = ["warnings", "notes"].map((kind) => [kind, model.runs.flatMap((run) => run[kind].map((text) => [run.name, text]))]);
  const open = new Set([...root.querySelectorAll("[open]")].map((each) => each.dataset.kind));
  renew(root, JSON.stringify(lines), () => lines.filter(([, found]) => found.length).map(([kind, found]) => (
    element("details", { "data-kind": kind, open: open.has(kind) },
      element("summary", {}, count(found.length, kind.slice(0, -1))),
      element("ul", {}, ...found.map(([name, text]) => element("li", {}, element("b", {}, name), ` ${text}`)))))));
}

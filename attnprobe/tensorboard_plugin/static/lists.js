// Lists: the alarms and the heads in the order of the statistic, which lead to a head, and what the probe warned about.

import { element, replace } from "./dom.js";
import { count, headList, number, signed } from "./format.js";

const MOST = 200;

export function drawAlarms(root, model) {
  // The list is the same at every step.
  const key = JSON.stringify(model.runs.map((run) => [run.name, run.revision]));
  if (key === root.dataset.drawn) return;
  root.dataset.drawn = key;
  const found = model.runs.flatMap((run) => run.alarms.map((alarm) => ({ run, alarm })));
  const title = element("h2", {}, `Alarms (${found.length})`);
  if (!found.length) {
    replace(root, title, element("p", { class: "quiet" }, "No alarm was raised in these runs."));
    return;
  }
  // Those that stand first, the newest of them on top.
  found.sort((a, b) => b.alarm.standing - a.alarm.standing || b.alarm.raised - a.alarm.raised);
  const items = found.slice(0, MOST).map(({ run, alarm }) => {
    const where = [alarm.layer || "whole run", headList(alarm.heads)].filter(Boolean).join(" · ");
    const times = `raised at step ${alarm.raised}${alarm.standing ? ", stands" : `, cleared after ${alarm.last}`}`;
    const jump = () => model.state.set({
      runs: model.runs.map((one) => one.name),
      step: alarm.raised,
      ...(alarm.layer ? { layer: alarm.layer, head: alarm.heads[0] ?? 0 } : {}),
      ...(alarm.reads.some((name) => run.names.includes(name))
        ? { stat: alarm.reads.find((name) => run.names.includes(name)), order: "" } : {}),
    });
    return element("li", {},
      element("button", { class: `alarm ${alarm.severity === "alarm" ? "" : "information"}`, onclick: jump, title: alarm.advice },
        element("span", { class: "dot", style: `background:${run.colour}` }),
        element("b", {}, alarm.name), ` ${where}`,
        element("small", {}, `${times} · ${number(alarm.value)} against ${number(alarm.threshold)}`)));
  });
  const more = found.length > MOST ? element("p", { class: "quiet" }, `${found.length - MOST} older ones are not listed`) : null;
  replace(root, title, element("ul", {}, ...items), more);
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
  const largest = Math.max(...ranked.map(({ value }) => Math.abs(value)).filter(Number.isFinite), 0) || 1;
  const items = ranked.slice(0, top).map(({ run, row, head, value }) => {
    const chosen = state.layer === run.layers[row] && state.head === head;
    const name = meaning.level === "layer" ? run.short[row] : `${run.short[row]} · ${head}`;
    const share = state.base === null ? scale.place(value) : Math.abs(value) / largest;
    return element("tr", {},
      element("td", {}, element("button", {
        class: chosen ? "head on" : "head", title: `${run.name}: ${run.layers[row]}`,
        onclick: () => state.set({ layer: run.layers[row], head }),
      }, element("span", { class: "dot", style: `background:${run.colour}` }), name)),
      element("td", { class: "bar" }, element("span", { style: `width:${(share * 100).toFixed(1)}%` })),
      element("td", { class: "value" }, state.base === null ? number(value) : signed(value)));
  });
  const rest = ranked.length > top ? element("p", { class: "quiet" }, `of ${count(ranked.length, "head")}`) : null;
  replace(root, title, button, element("table", {}, element("tbody", {}, ...items)), rest);
}

export function drawWarnings(root, model) {
  const key = JSON.stringify(model.runs.map((run) => [run.name, run.revision]));
  if (key === root.dataset.drawn) return;
  root.dataset.drawn = key;
  replace(root, ...["warnings", "notes"].map((kind) => {
    const lines = model.runs.flatMap((run) => run[kind].map((text) => element("li", {}, element("b", {}, run.name), ` ${text}`)));
    const title = element("summary", {}, count(lines.length, kind.slice(0, -1)));
    return lines.length ? element("details", {}, title, element("ul", {}, ...lines)) : null;
  }));
}

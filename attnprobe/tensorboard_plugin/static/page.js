// The page: puts the parts together and redraws them when something changed.

import { element, replace } from "./dom.js";
import { drawLegend, HeatMaps } from "./heatmap.js";
import { Head } from "./head.js";
import { drawAlarms, drawRanking, drawWarnings } from "./lists.js";
import { Loss } from "./loss.js";
import { Model } from "./model.js";
import { State } from "./state.js";
import { Timeline } from "./timeline.js";
import { Tip } from "./tip.js";
import { Toolbar } from "./toolbar.js";

const [SOON, LATER] = [250, 5000]; // milliseconds until the next look for new probes

export async function start(root, source, { link, live, dark, title = null }) {
  const state = new State(link);
  const part = (name, tag = "div") => element(tag, { class: name });
  const parts = {
    problems: part("problems"), toolbar: part("toolbar"), maps: part("heatmaps"), legend: part("legend"),
    timeline: part("timeline"), head: part("head-view", "section"), alarms: part("alarms", "section"),
    ranking: part("ranking", "section"), loss: part("loss", "section"), warnings: part("warnings"), empty: part("empty"),
  };
  const canvas = element("canvas", { role: "img", "aria-label": "colours and their numbers" });
  const labels = part("labels");
  parts.legend.append(canvas, labels);
  const tip = new Tip();
  const body = element("div", { class: "body" },
    element("div", { class: "left" }, parts.timeline, parts.maps, parts.legend, parts.loss, parts.head),
    element("aside", {}, parts.alarms, parts.ranking));

  let asked = false;
  const redraw = () => {
    if (!asked) {
      asked = true;
      requestAnimationFrame(() => { asked = false; draw(); });
    }
  };
  const model = new Model(source, state, redraw);
  const maps = new HeatMaps(parts.maps, model, tip);
  const toolbar = new Toolbar(parts.toolbar, model);
  const timeline = new Timeline(parts.timeline, model);
  const loss = new Loss(parts.loss, model);
  const head = new Head(parts.head, model, tip);
  replace(root, title, parts.problems, parts.toolbar, parts.warnings, body, parts.empty, tip.root);

  function draw() {
    const began = performance.now();
    const { overview } = model;
    const nothing = !overview.runs.length;
    const texts = [model.error, ...(overview.problems ?? []), ...overview.runs.flatMap((run) => run.problems.map((text) => `${run.name}: ${text}`))];
    replace(parts.problems, ...[...new Set(texts.filter(Boolean))].map((text) => element("p", { class: "problem" }, text)));
    body.hidden = parts.toolbar.hidden = parts.warnings.hidden = nothing;
    parts.empty.hidden = !nothing;
    if (nothing) {
      replace(parts.empty, ...emptyWords(overview));
      return;
    }
    const views = model.views();
    const scale = model.scale(views);
    model.log = scale.log;
    maps.draw(views, scale);
    loss.draw();
    drawWarnings(parts.warnings, model);
    drawLegend(canvas, labels, scale, views.some((view) => view.waiting));
    timeline.draw();
    toolbar.draw(scale);
    drawRanking(parts.ranking, model, views, scale);
    drawAlarms(parts.alarms, model);
    head.draw();
    if (!views.some((view) => view.waiting)) {
      performance.measure("attnprobe:redraw", { start: began, end: performance.now() });
    }
  }

  async function look() {
    let wait = LATER;
    try {
      const before = model.error;
      model.error = "";
      if (await model.load() || before) redraw();
      if (model.overview.complete === false) wait = SOON;
    } catch (error) {
      if (model.error !== error.message) redraw();
      model.error = error.message;
    }
    if (live) setTimeout(again, wait);
  }

  // Not while nobody sees it: the window is hidden, or another tab of TensorBoard is open.
  function again() {
    if (document.hidden || !root.getClientRects().length) setTimeout(again, SOON);
    else look();
  }

  dark((on) => {
    document.documentElement.classList.toggle("dark", on);
    model.dark = on;
    redraw();
  });
  state.listen(redraw);
  window.addEventListener("resize", redraw);
  window.addEventListener("keydown", (event) => keys(event, timeline, state));
  await look();
}

function keys(event, timeline, state) {
  if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
  const actions = {
    ArrowLeft: () => timeline.by(-1),
    ArrowRight: () => timeline.by(1),
    Home: () => timeline.go(0),
    End: () => timeline.go(null),
    " ": () => timeline.play(),
    d: () => timeline.compare(),
    Escape: () => state.set({ layer: null, head: null }),
  };
  if (actions[event.key] && !(event.key === " " && event.target.tagName === "BUTTON")) {
    event.preventDefault();
    actions[event.key]();
  }
}

function emptyWords({ complete, places }) {
  if (complete === false) return [element("p", {}, "Reading the event files …")];
  const code = 'probe = attnprobe.AttentionProbe(model, writers=[attnprobe.TensorBoardWriter("runs/a")])\n'
    + "# Lightning:     Trainer(callbacks=[attnprobe.lightning.AttentionMonitor()])\n"
    + "# Hugging Face:  Trainer(..., callbacks=[attnprobe.huggingface.AttentionMonitorCallback()])";
  return [
    element("h2", {}, "No attention was recorded here yet"),
    element("p", {}, "Attach attnprobe to a training; its heads appear here at the first probe:"),
    element("pre", {}, code),
    places?.length ? element("p", { class: "quiet" }, `Looked for event files in ${places.join(", ")} and beneath.`) : null,
  ];
}

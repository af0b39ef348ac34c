// The page: puts the parts together and redraws them when something changed.

import { element, renew, replace, setDark } from "./dom.js";
import { Head } from "./head.js";
import { HeatMaps } from "./heatmap.js";
import { Legend } from "./legend.js";
import { drawAlarms, drawRanking, drawWarnings } from "./lists.js";
import { Loss } from "./loss.js";
import { Model } from "./model.js";
import { scaleOf } from "./scales.js";
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
  parts.problems.setAttribute("role", "status");
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
  const legend = new Legend(parts.legend);
  const toolbar = new Toolbar(parts.toolbar, model);
  const timeline = new Timeline(parts.timeline, model);
  const loss = new Loss(parts.loss, model);
  const head = new Head(parts.head, model, tip);
  replace(root, title, parts.problems, parts.toolbar, parts.warnings, body, parts.empty, tip.root);

  function draw() {
    const began = performance.now();
    const { overview, loader } = model;
    const nothing = !overview.runs.length;
    body.hidden = parts.toolbar.hidden = parts.warnings.hidden = nothing;
    parts.empty.hidden = !nothing;
    loader.errors.clear();
    if (nothing) renew(parts.empty, JSON.stringify([overview.complete, overview.places]), () => emptyWords(overview));
    else drawRuns(began);
    const texts = [model.error, ...loader.errors, ...model.missing, ...(overview.problems ?? []),
      ...overview.runs.flatMap((run) => run.problems.map((text) => `${run.name}: ${text}`))];
    const told = [...new Set(texts.filter(Boolean))];
    renew(parts.problems, told.join("\n"), () => told.map((text) => element("p", { class: "problem" }, text)));
  }

  function drawRuns(began) {
    const views = model.views();
    const scale = scaleOf(model, views);
    // Until all numbers are there what was drawn last stays.
    model.waiting = !scale || views.some((view) => view.waiting);
    for (const each of [parts.maps, parts.legend, parts.ranking]) each.classList.toggle("waiting", model.waiting);
    timeline.draw();
    toolbar.draw();
    loss.draw();
    drawWarnings(parts.warnings, model);
    drawAlarms(parts.alarms, model);
    if (!model.waiting) {
      model.log = scale.log;
      toolbar.drawScale(scale);
      maps.draw(views, scale);
      legend.draw(scale);
      drawRanking(parts.ranking, model, views, scale);
    }
    head.draw();
    tip.tidy();
    if (!model.waiting) {
      // For measurements and tests; what is never cleared would fill the memory in the end.
      if (performance.getEntriesByName("attnprobe:redraw").length > 1000) performance.clearMeasures();
      performance.measure("attnprobe:redraw", { start: began, end: performance.now() });
    }
  }

  async function look() {
    let wait = LATER;
    try {
      if (await model.load() || model.error) redraw();
      model.error = "";
      if (model.overview.complete === false) wait = SOON;
    } catch (error) {
      model.error = error.message;
      redraw();
    }
    if (live) setTimeout(again, wait);
  }

  // Not while nobody sees it: the window is hidden, or another tab of TensorBoard is open.
  function again() {
    if (document.hidden || !root.getClientRects().length) setTimeout(again, SOON);
    else look();
  }

  dark((on) => {
    setDark(on);
    model.dark = on;
    draw(); // at once: a printer does not wait
  });
  state.listen(redraw);
  window.addEventListener("resize", redraw);
  window.addEventListener("keydown", (event) => keys(event, timeline, state));
  await look();
}

function keys(event, timeline, state) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("select, [type=search]")) return;
  const actions = {
    ArrowLeft: () => timeline.by(-1),
    ArrowRight: () => timeline.by(1),
    Home: () => timeline.go(0),
    End: () => timeline.go(null),
    " ": () => timeline.play(),
    d: () => timeline.compare(),
    Escape: () => state.set({ layer: null, head: null }),
  };
  // What a browser does itself with that key stays with it.
  const own = { " ": "button, summary, [type=checkbox]" }[event.key];
  if (!actions[event.key] || (own && event.target.matches(own))) return;
  event.preventDefault();
  actions[event.key]();
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

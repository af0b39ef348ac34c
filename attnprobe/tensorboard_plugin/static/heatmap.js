// Layers down, heads across: one picture a run, all with the same colours.

import { alarmColour, colourOf, dot, element, renew, replace, sharp } from "./dom.js";
import { lines, words } from "./words.js";

const LABEL = 92; // pixels for the layers' names
const TOP = 16; // and for the heads' numbers
const [LEAST, READABLE, MOST] = [7, 10, 34]; // pixels of a cell
const DEEP = 520; // pixels of all layers
const GAP = 28; // between two runs

export class HeatMaps {
  constructor(root, model, tip) {
    this.root = root;
    this.model = model;
    this.tip = tip;
    this.panels = new Map();
  }

  draw(views, scale) {
    const panels = views.map((view) => {
      const name = view.run.name;
      if (!this.panels.has(name)) this.panels.set(name, new Panel(this.model, this.tip));
      const panel = this.panels.get(name);
      panel.draw(view, scale, this.cell(views));
      return panel.root;
    });
    const there = [...this.root.children];
    if (there.length !== panels.length || panels.some((panel, at) => panel !== there[at])) replace(this.root, ...panels);
    for (const name of this.panels.keys()) if (!views.some((view) => view.run.name === name)) this.panels.delete(name);
  }

  // All panels have cells of one size: as many runs side by side as stay readable, and no deeper than a window.
  cell(views) {
    const rows = Math.max(1, ...views.map((view) => view.rows.length));
    const columns = Math.max(1, ...views.map((view) => view.width));
    const wide = (panels) => Math.floor((this.root.clientWidth / panels - LABEL - GAP) / columns);
    let panels = views.length;
    while (panels > 1 && wide(panels) < READABLE) panels -= 1;
    return Math.max(LEAST, Math.min(MOST, wide(panels), Math.floor(DEEP / rows)));
  }
}

class Panel {
  constructor(model, tip) {
    this.model = model;
    this.tip = tip;
    this.title = element("h3");
    this.note = element("p", { class: "quiet" });
    // An application: a screen reader leaves the arrow keys to it.
    this.canvas = element("canvas", { tabindex: 0, role: "application", "aria-roledescription": "heat map: arrow keys choose a head" });
    this.root = element("section", { class: "panel" }, this.title, element("div", { class: "wide" }, this.canvas), this.note);
    this.pointer = null;
    this.canvas.addEventListener("mousemove", (event) => this.hover(this.pointer = event));
    for (const gone of ["mouseleave", "blur"]) this.canvas.addEventListener(gone, () => { this.pointer = null; this.tip.hide(); });
    this.canvas.addEventListener("click", (event) => this.choose(this.at(event)));
    this.canvas.addEventListener("keydown", (event) => this.move(event));
  }

  draw(view, scale, cell) {
    Object.assign(this, { view, scale, cell });
    const { run, rows, width } = view;
    renew(this.title, run.name + run.colour, () => [dot(run), run.name]);
    this.title.title = run.name;
    const gap = cell > 9 ? 1 : 0;
    const context = sharp(this.canvas, LABEL + width * cell + 2, TOP + rows.length * cell + 2);
    const ink = colourOf("--ink");
    context.font = "11px system-ui, sans-serif";
    context.fillStyle = colourOf("--quiet");
    context.textBaseline = "middle";
    context.textAlign = "right";
    run.fitted ??= run.short.map((name) => fit(context, name, LABEL - 8));
    const every = Math.ceil(12 / cell);
    rows.forEach((row, line) => {
      if (line % every === 0) context.fillText(run.fitted[row], LABEL - 6, TOP + (line + 0.5) * cell);
    });
    context.fillText("layer ↓ head →", LABEL - 6, TOP / 2);
    context.textAlign = "center";
    for (let head = 0; head < width && view.meaning.level === "head"; head += Math.ceil(18 / cell)) {
      context.fillText(`${head}`, LABEL + (head + 0.5) * cell, TOP / 2);
    }
    const missing = colourOf("--missing");
    rows.forEach((row, line) => {
      for (let head = 0; head < view.heads(row); head += 1) {
        const value = view.shown(row, head);
        const [x, y] = [LABEL + head * cell, TOP + line * cell];
        context.fillStyle = Number.isNaN(value) ? missing : scale.colour(value);
        context.fillRect(x, y, cell - gap, cell - gap);
        if (Math.abs(value) === Infinity) mark(context, x, y, cell - gap, value > 0 && !view.compared ? "#000000" : "#ffffff");
      }
    });
    this.drawAlarms(context, view, cell - gap);
    this.drawChosen(context, view, ink);
    this.note.textContent = words(view);
    this.canvas.setAttribute("aria-label", `${view.stat} of ${run.name}: ${rows.length} layers, ${width} heads`);
    if (this.pointer) this.hover(this.pointer); // there is another number under it
  }

  // A corner of each head that an alarm names.
  drawAlarms(context, view, size) {
    const layerLevel = view.meaning.level === "layer";
    const lines = new Map(view.rows.map((row, line) => [row, line]));
    for (const alarm of view.alarms) {
      const line = lines.get(view.run.layers.indexOf(alarm.layer));
      if (line === undefined) continue;
      const named = layerLevel || !alarm.heads.length ? Array.from({ length: view.heads(view.rows[line]) }, (_, h) => h) : alarm.heads;
      context.fillStyle = alarmColour(alarm);
      context.strokeStyle = "#ffffff";
      for (const head of named) {
        const [x, y] = [LABEL + head * this.cell + size, TOP + line * this.cell];
        const edge = Math.max(5, size * 0.45);
        context.beginPath();
        context.moveTo(x - edge, y);
        context.lineTo(x, y);
        context.lineTo(x, y + edge);
        context.closePath();
        context.fill();
        if (size > READABLE) context.stroke(); // of a small corner it would leave nothing
      }
    }
  }

  drawChosen(context, view, ink) {
    const { layer, head } = this.model.state;
    const line = view.rows.indexOf(view.run.layers.indexOf(layer));
    if (line < 0 || head === null) return;
    const wide = view.meaning.level === "layer" ? 0 : head;
    context.lineWidth = 2;
    context.strokeStyle = ink;
    context.strokeRect(LABEL + wide * this.cell - 1, TOP + line * this.cell - 1, this.cell + 1, this.cell + 1);
    context.lineWidth = 1;
  }

  at(event) {
    const box = this.canvas.getBoundingClientRect();
    const line = Math.floor((event.clientY - box.top - TOP) / this.cell);
    const head = Math.floor((event.clientX - box.left - LABEL) / this.cell);
    const row = this.view.rows[line];
    if (row === undefined || (head >= 0 && head >= this.view.heads(row))) return null;
    return { row, head };
  }

  hover(event) {
    const found = this.at(event);
    if (found) this.tip.show(event, lines(this.view, found.row, found.head));
    else this.tip.hide();
  }

  choose(found) {
    if (!found || found.head < 0) return;
    this.canvas.focus({ preventScroll: true });
    this.model.state.set({ layer: this.view.run.layers[found.row], head: found.head });
  }

  move(event) {
    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!steps || !this.view.rows.length) return;
    event.preventDefault();
    event.stopPropagation();
    const { rows, run } = this.view;
    const line = rows.indexOf(run.layers.indexOf(this.model.state.layer));
    const next = Math.min(rows.length - 1, Math.max(0, line < 0 ? 0 : line + steps[0]));
    const head = (this.model.state.head ?? 0) + (line < 0 ? 0 : steps[1]);
    const found = { row: rows[next], head: Math.min(this.view.heads(rows[next]) - 1, Math.max(0, head)) };
    this.choose(found);
    const { left, top } = this.canvas.getBoundingClientRect();
    const place = { clientX: left + LABEL + (found.head + 1) * this.cell, clientY: top + TOP + (next + 1) * this.cell };
    this.tip.show({ ...place, target: this.canvas }, lines(this.view, found.row, found.head));
  }
}

// The end of a text that is too wide.
function fit(context, text, width) {
  if (context.measureText(text).width <= width) return text;
  let shown = text.slice(-100);
  while (shown.length > 1 && context.measureText(`…${shown}`).width > width) shown = shown.slice(1);
  return `…${shown}`;
}

// Infinite: a cross.
function mark(context, x, y, size, colour) {
  context.strokeStyle = colour;
  context.beginPath();
  context.moveTo(x, y);
  context.lineTo(x + size, y + size);
  context.moveTo(x + size, y);
  context.lineTo(x, y + size);
  context.stroke();
}

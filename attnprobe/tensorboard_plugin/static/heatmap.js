// Layers down, heads across: one picture a run, all with the same colours.

import { colourOf, element, replace, sharp } from "./dom.js";
import { headList, number, signed } from "./format.js";

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
    this.canvas = element("canvas", { tabindex: 0, role: "img" });
    this.root = element("section", { class: "panel" }, this.title, this.canvas, this.note);
    this.canvas.addEventListener("mousemove", (event) => this.hover(event));
    this.canvas.addEventListener("mouseleave", () => this.tip.hide());
    this.canvas.addEventListener("click", (event) => this.choose(this.at(event)));
    this.canvas.addEventListener("keydown", (event) => this.move(event));
  }

  draw(view, scale, cell) {
    Object.assign(this, { view, scale, cell });
    const { run, rows, width } = view;
    const step = run.steps[this.model.probe(run)];
    replace(this.title, element("span", { class: "dot", style: `background:${run.colour}` }), run.name);
    this.title.title = run.name;
    const gap = cell > 9 ? 1 : 0;
    const context = sharp(this.canvas, LABEL + width * cell + 2, TOP + rows.length * cell + 2);
    const ink = colourOf("--ink");
    context.font = "11px system-ui, sans-serif";
    context.fillStyle = colourOf("--quiet");
    context.textBaseline = "middle";
    context.textAlign = "right";
    const every = Math.ceil(12 / cell);
    rows.forEach((row, line) => {
      if (line % every === 0) context.fillText(fit(context, run.short[row], LABEL - 8), LABEL - 6, TOP + (line + 0.5) * cell);
    });
    context.fillText("layer ↓ head →", LABEL - 6, TOP / 2);
    context.textAlign = "center";
    for (let head = 0; head < width && this.model.meaning.level === "head"; head += Math.ceil(18 / cell)) {
      context.fillText(`${head}`, LABEL + (head + 0.5) * cell, TOP / 2);
    }
    const missing = colourOf("--missing");
    rows.forEach((row, line) => {
      for (let head = 0; head < view.heads(row); head += 1) {
        const value = view.shown(row, head);
        const [x, y] = [LABEL + head * cell, TOP + line * cell];
        context.fillStyle = Number.isNaN(value) ? missing : scale.colour(value);
        context.fillRect(x, y, cell - gap, cell - gap);
        if (Math.abs(value) === Infinity) mark(context, x, y, cell - gap, "#ffffff");
      }
    });
    this.drawAlarms(context, view, cell - gap);
    this.drawChosen(context, view, ink);
    this.note.textContent = this.words(view, step);
    this.canvas.setAttribute("aria-label", `${this.model.stat} of ${run.name}: ${rows.length} layers, ${width} heads`);
  }

  // A corner of each head that an alarm names.
  drawAlarms(context, view, size) {
    const layerLevel = this.model.meaning.level === "layer";
    const lines = new Map(view.rows.map((row, line) => [row, line]));
    for (const alarm of view.alarms) {
      const line = lines.get(view.run.layers.indexOf(alarm.layer));
      if (line === undefined) continue;
      const named = layerLevel || !alarm.heads.length ? Array.from({ length: view.heads(view.rows[line]) }, (_, h) => h) : alarm.heads;
      context.fillStyle = colourOf(alarm.severity === "alarm" ? "--alarm" : "--information");
      context.strokeStyle = "#ffffff";
      for (const head of named) {
        const [x, y] = [LABEL + head * this.cell + size, TOP + line * this.cell];
        const edge = Math.max(4, size * 0.45);
        context.beginPath();
        context.moveTo(x - edge, y);
        context.lineTo(x, y);
        context.lineTo(x, y + edge);
        context.closePath();
        context.fill();
        context.stroke();
      }
    }
  }

  drawChosen(context, view, ink) {
    const { layer, head } = this.model.state;
    const line = view.rows.indexOf(view.run.layers.indexOf(layer));
    if (line < 0 || head === null) return;
    const wide = this.model.meaning.level === "layer" ? 0 : head;
    context.lineWidth = 2;
    context.strokeStyle = ink;
    context.strokeRect(LABEL + wide * this.cell - 1, TOP + line * this.cell - 1, this.cell + 1, this.cell + 1);
    context.lineWidth = 1;
  }

  words(view, step) {
    const { run } = view;
    if (!run.names.length) return `nothing could be measured in this run: ${run.invalid.at(-1)?.[1] ?? "no reason is known"}`;
    if (!run.names.includes(this.model.stat)) return `${this.model.stat} was not recorded in this run`;
    if (step === undefined) return "this run begins later";
    if (!view.rows.length) return "no layer's name matches the filter";
    const invalid = run.invalid.find(([at]) => at === step);
    const parts = [`step ${step.toLocaleString("en")}`];
    const loss = run.loss[this.model.probe(run)];
    if (typeof loss === "number") parts.push(`loss ${number(loss)}`);
    if (this.model.state.base !== null && !view.there) parts.push("nothing to compare with at that step");
    if (invalid) parts.push(`not measured: ${invalid[1]}`);
    return parts.join(" · ");
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
    if (!found) {
      this.tip.hide();
      return;
    }
    const { run, now, then, alarms } = this.view;
    const { row, head } = found;
    const layer = run.layers[row];
    const level = this.model.meaning.level;
    const lines = [head < 0 || level === "layer" ? layer : `${layer} · head ${head}`];
    if (head >= 0) {
      const unit = this.model.meaning.unit;
      lines.push(`${this.model.stat} ${number(now(row, head))}${unit ? ` ${unit}` : ""}`);
      if (this.model.state.base !== null) {
        lines.push(`${signed(now(row, head) - then(row, head))} since step ${this.model.state.base} (${number(then(row, head))})`);
      }
      for (const alarm of alarms) {
        if (alarm.layer === layer && (!alarm.heads.length || alarm.heads.includes(head))) {
          lines.push(`⚠ ${alarm.name}, ${headList(alarm.heads) || "layer"}, since step ${alarm.since}`);
        }
      }
    }
    this.tip.show(event, lines);
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
    this.choose({ row: rows[next], head: Math.min(this.view.run.heads[rows[next]] - 1, Math.max(0, head)) });
  }
}

function fit(context, text, width) {
  let shown = text;
  while (shown.length > 1 && context.measureText(shown).width > width) shown = `…${shown.slice(shown[0] === "…" ? 2 : 1)}`;
  return shown;
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

// The colours and the numbers that they stand for.
export function drawLegend(canvas, labels, scale, waiting) {
  const width = 220;
  const context = sharp(canvas, width, 12);
  for (let x = 0; x < width; x += 1) {
    context.fillStyle = scale.colour(scale.value(x / (width - 1)));
    context.fillRect(x, 0, 1, 12);
  }
  const text = [scale.low, scale.value(0.5), scale.high].map(number);
  replace(labels, ...(waiting ? ["", "…", ""] : text).map((label) => element("span", {}, label)));
}

// Curves over steps, one a run, drawn by uPlot.

import { colourOf, element } from "./dom.js";
import { number } from "./format.js";

/* global uPlot */

// `curves`: [{label, colour, steps, values}]; `picked(step)`: a click; `spans()`: [{from, to, colour}] behind them.
export function chart(root, { curves, width, height, picked, log = false, small = false, spans = () => [] }) {
  const ink = colourOf("--quiet");
  const grid = { stroke: colourOf("--line"), width: 1 };
  const axis = { stroke: ink, grid, ticks: { show: false }, font: "10px system-ui, sans-serif" };
  const data = table(curves);
  const plot = new uPlot({
    width,
    height,
    legend: { show: false },
    cursor: { drag: { x: false, y: false }, points: { size: 5 }, y: false },
    scales: { x: { time: false }, y: { distr: log ? 3 : 1 } },
    axes: [
      { ...axis, size: 22, space: small ? 60 : 80, values: (_, ticks) => ticks.map((tick) => tick.toLocaleString("en")) },
      { ...axis, size: small ? 46 : 60, space: small ? 28 : 36, values: (_, ticks) => ticks.map((tick) => (tick == null ? "" : number(tick))) },
    ],
    series: [{}, ...curves.map((curve) => ({
      label: curve.label,
      stroke: curve.colour,
      width: small ? 1.25 : 1.75,
      points: { show: data[0].length < 3 ? true : undefined, size: 4 },
    }))],
    hooks: { drawClear: [(self) => spans().forEach(({ from, to, colour }) => shade(self, from, to, colour))], draw: [place] },
  }, data, root);
  plot.marker = plot.over.appendChild(element("div", { class: "marker", hidden: true }));
  plot.over.addEventListener("click", () => {
    const { idx } = plot.cursor;
    if (idx != null) picked(plot.data[0][idx]);
  });
  return plot;
}

// The curves have grown.
export function feed(plot, curves) {
  plot.setData(table(curves));
}

// The step that is shown: an element, so that the curves need not be drawn again.
export function mark(plot, step) {
  plot.marked = step;
  place(plot);
}

function place(plot) {
  if (!plot.marker) return;
  const at = plot.valToPos(plot.marked, "x");
  plot.marker.hidden = !(at >= 0 && at <= plot.bbox.width / uPlot.pxRatio);
  plot.marker.style.left = `${at}px`;
}

export function logarithmic(curves) {
  return curves.every(({ values }) => values.every((value) => !(value <= 0)));
}

function table(curves) {
  const steps = [...new Set(curves.flatMap((curve) => curve.steps))].sort((a, b) => a - b);
  const place = new Map(steps.map((step, index) => [step, index]));
  return [steps, ...curves.map((curve) => {
    const values = new Array(steps.length).fill(undefined); // undefined: another run's step; null: a gap
    curve.steps.forEach((step, index) => {
      const value = curve.values[index];
      values[place.get(step)] = Number.isFinite(value) ? value : null;
    });
    return values;
  })];
}

function shade(plot, from, to, colour) {
  const [left, right] = [from, to].map((step) => plot.valToPos(step, "x", true));
  const { top, height } = plot.bbox;
  plot.ctx.save();
  plot.ctx.globalAlpha = 0.12;
  plot.ctx.fillStyle = colour;
  plot.ctx.fillRect(left, top, Math.max(2, right - left), height);
  plot.ctx.restore();
}

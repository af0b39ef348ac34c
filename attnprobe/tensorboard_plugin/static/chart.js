// Curves over steps, one a run, drawn by uPlot.

import { colourOf } from "./dom.js";
import { number } from "./format.js";

/* global uPlot */

// `curves`: [{label, colour, steps, values}]; `marker()`: the step that is shown; `picked(step)`: a click.
export function chart(root, { curves, width, height, marker, picked, log = false, small = false, spans = [] }) {
  const steps = [...new Set(curves.flatMap((curve) => curve.steps))].sort((a, b) => a - b);
  const place = new Map(steps.map((step, index) => [step, index]));
  const positive = curves.every((curve) => curve.values.every((value) => !(value <= 0)));
  const data = [steps, ...curves.map((curve) => {
    const values = new Array(steps.length).fill(undefined); // undefined: another run's step; null: a gap
    curve.steps.forEach((step, index) => {
      const value = curve.values[index];
      values[place.get(step)] = Number.isFinite(value) ? value : null;
    });
    return values;
  })];
  const ink = colourOf("--quiet");
  const grid = { stroke: colourOf("--line"), width: 1 };
  const font = "10px system-ui, sans-serif";
  const axis = { stroke: ink, grid, ticks: { show: false }, font };
  const plot = new uPlot({
    width,
    height,
    legend: { show: false },
    cursor: { drag: { x: false, y: false }, points: { size: 5 }, y: false },
    scales: { x: { time: false }, y: { distr: log && positive ? 3 : 1 } },
    axes: [
      { ...axis, size: 22, space: small ? 60 : 80, values: (_, ticks) => ticks.map((tick) => tick.toLocaleString("en")) },
      { ...axis, size: small ? 46 : 60, space: small ? 28 : 36, values: (_, ticks) => ticks.map((tick) => (tick == null ? "" : number(tick))) },
    ],
    series: [{}, ...curves.map((curve) => ({
      label: curve.label,
      stroke: curve.colour,
      width: small ? 1.25 : 1.75,
      points: { show: steps.length < 3 ? true : undefined, size: 4 },
    }))],
    hooks: {
      drawClear: [(self) => spans.forEach(({ from, to, colour }) => shade(self, from, to, colour))],
      draw: [(self) => line(self, marker())],
    },
  }, data, root);
  plot.over.addEventListener("click", () => {
    const { idx } = plot.cursor;
    if (idx != null) picked(steps[idx]);
  });
  return plot;
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

function line(plot, step) {
  if (step === undefined) return;
  const x = Math.round(plot.valToPos(step, "x", true));
  const { top, height, left, width } = plot.bbox;
  if (x < left || x > left + width) return;
  plot.ctx.save();
  plot.ctx.strokeStyle = colourOf("--accent");
  plot.ctx.lineWidth = window.devicePixelRatio || 1;
  plot.ctx.beginPath();
  plot.ctx.moveTo(x, top);
  plot.ctx.lineTo(x, top + height);
  plot.ctx.stroke();
  plot.ctx.restore();
}

// Pictures of one head: attention, compatibility, advantage, and who is read over the steps.

import { Scale } from "./colours.js";
import { colourOf, element, replace } from "./dom.js";
import { number } from "./format.js";

const TITLES = ["attention α", "compatibility b = u·v", "advantage A = −(b − E[b])"];
const SIDE = 176;

export function drawMaps(root, { shape, values, step }, tip) {
  const [panels, rows, columns] = shape;
  const pictures = Array.from({ length: panels }, (_, panel) => {
    const numbers = values.subarray(panel * rows * columns, (panel + 1) * rows * columns);
    const finite = Array.from(numbers).filter(Number.isFinite);
    const end = finite.reduce((most, value) => Math.max(most, Math.abs(value)), 0) || 1;
    // Attention: the root tells the weights of long rows from zero. The others are signed.
    const scale = panel ? new Scale(-end, end, { diverging: true }) : new Scale(0, Math.sqrt(end));
    const shown = panel ? (value) => value : Math.sqrt;
    const canvas = picture(numbers, rows, columns, (value) => scale.colour(shown(value)), [SIDE, SIDE], TITLES[panel]);
    hover(canvas, rows, columns, tip, (row, column) => [
      `query block ${row}, key block ${column}`, number(numbers[row * columns + column]),
    ]);
    const range = panel ? `±${number(end)}` : `0 to ${number(end)}`;
    return element("figure", {}, element("figcaption", {}, TITLES[panel]), canvas, element("small", {}, range));
  });
  replace(root, element("p", { class: "quiet" },
    `First sequence of the batch at step ${step.toLocaleString("en")}: queries down, keys across, block means; grey is masked.`),
  element("div", { class: "figures" }, ...pictures));
}

export function drawUsage(root, { shape, values, steps }, tip) {
  const [rows, columns] = shape;
  const finite = Array.from(values).filter((value) => Number.isFinite(value) && value > 0);
  const high = finite.reduce((most, value) => Math.max(most, value), 1);
  // 1 is what uniform attention gives: white; below blue, above red, in doublings.
  const end = Math.max(1, Math.min(10, Math.log2(high)));
  const scale = new Scale(-end, end, { diverging: true });
  const colour = (value) => scale.colour(Math.log2(Math.max(value, 2 ** -end)));
  const canvas = picture(values, rows, columns, colour, [SIDE * 1.5, SIDE], "usage of the keys over steps");
  hover(canvas, rows, columns, tip, (row, column) => [
    `step ${steps[row].toLocaleString("en")}, key block ${column}`, `usage ${number(values[row * columns + column])}`,
  ]);
  replace(root,
    element("p", { class: "quiet" }, "Who is read, step by step."),
    element("figcaption", {}, "column usage"),
    canvas,
    element("small", {}, `steps ${steps[0].toLocaleString("en")} (top) to ${steps.at(-1).toLocaleString("en")}, keys across`),
    element("small", {}, "white: as uniform attention; red: more; blue: less"));
}

// One pixel a number, enlarged without smoothing.
function picture(values, rows, columns, colour, [width, height], label) {
  const small = element("canvas", { width: columns, height: rows });
  const context = small.getContext("2d");
  const missing = colourOf("--missing");
  for (let row = 0; row < rows; row += 1) {
    for (let column = 0; column < columns; column += 1) {
      const value = values[row * columns + column];
      context.fillStyle = Number.isNaN(value) ? missing : colour(value);
      context.fillRect(column, row, 1, 1);
    }
  }
  small.className = "pixels";
  small.style.width = `${width}px`;
  small.style.height = `${height}px`;
  small.setAttribute("role", "img");
  small.setAttribute("aria-label", label);
  return small;
}

function hover(canvas, rows, columns, tip, lines) {
  canvas.addEventListener("mousemove", (event) => {
    const box = canvas.getBoundingClientRect();
    const row = Math.min(rows - 1, Math.max(0, Math.floor(((event.clientY - box.top) / box.height) * rows)));
    const column = Math.min(columns - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * columns)));
    tip.show(event, lines(row, column));
  });
  canvas.addEventListener("mouseleave", () => tip.hide());
}

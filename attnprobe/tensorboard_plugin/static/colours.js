// Colours that colour-blind people can read too, and the scale that turns numbers into them.

const VIRIDIS = ["440154", "472d7b", "3b528b", "2c728e", "21918c", "28ae80", "5ec962", "addc30", "fde725"];
const DIVERGING = [
  "053061", "2166ac", "4393c3", "92c5de", "d1e5f0", "f7f7f7", "fddbc7", "f4a582", "d6604d", "b2182b", "67001f",
];
// Okabe and Ito's palette, for lines.
export const LINES = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#7f7f7f"];

const SIZE = 256;

function table(anchors) {
  const points = anchors.map((hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16)));
  return Array.from({ length: SIZE }, (_, index) => {
    const place = (index / (SIZE - 1)) * (points.length - 1);
    const low = Math.min(Math.floor(place), points.length - 2);
    const rgb = points[low].map((from, at) => Math.round(from + (points[low + 1][at] - from) * (place - low)));
    return `rgb(${rgb.join(",")})`;
  });
}

const TABLES = { viridis: table(VIRIDIS), diverging: table(DIVERGING) };

// From `low` to `high`; logarithmic where `log`, which is possible where all is `positive`; around zero where `diverging`.
export class Scale {
  constructor(low, high, { log = false, positive = log, diverging = false } = {}) {
    this.low = low;
    this.high = high > low ? high : low + (Math.abs(low) || 1);
    this.log = log && low > 0;
    this.positive = positive;
    this.colours = TABLES[diverging ? "diverging" : "viridis"];
  }

  // 0 to 1; a value outside has the colour of its end.
  place(value) {
    const [low, high] = [this.low, this.high];
    const at = this.log ? Math.log(Math.max(value, low) / low) / Math.log(high / low) : (value - low) / (high - low);
    return Math.min(1, Math.max(0, at));
  }

  colour(value) {
    return this.colours[Math.round(this.place(value) * (SIZE - 1))];
  }

  value(place) {
    return this.log ? this.low * (this.high / this.low) ** place : this.low + (this.high - this.low) * place;
  }
}

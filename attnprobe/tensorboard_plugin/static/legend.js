// What the colours and the marks of the maps stand for.

import { element, replace, sharp } from "./dom.js";
import { number } from "./format.js";

const [WIDTH, HEIGHT] = [220, 12];

export class Legend {
  constructor(root) {
    this.canvas = element("canvas", { role: "img", "aria-label": "colours and their numbers" });
    this.labels = element("div", { class: "labels" });
    const sign = (name, text) => [element("span", { class: `sign ${name}`, "aria-hidden": "true" }), `${text} `];
    root.append(element("div", { class: "colours" }, this.canvas, this.labels), element("small", {},
      ...sign("missing", "not measured"), ...sign("infinite", "infinite"), ...sign("corner", "active alarm")));
  }

  draw(scale) {
    const context = sharp(this.canvas, WIDTH, HEIGHT);
    for (let x = 0; x < WIDTH; x += 1) {
      context.fillStyle = scale.colour(scale.value(x / (WIDTH - 1)));
      context.fillRect(x, 0, 1, HEIGHT);
    }
    replace(this.labels, ...[scale.low, scale.value(0.5), scale.high].map((value) => element("span", {}, number(value))));
  }
}

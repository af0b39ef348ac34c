// The losses of the runs over their steps, as far as they are known.

import { chart, feed, mark } from "./chart.js";
import { element, replace } from "./dom.js";

export class Loss {
  constructor(root, model) {
    Object.assign(this, { root, model, plot: null, shape: "", overview: null });
  }

  draw() {
    const { model, root } = this;
    const known = model.runs.filter((run) => run.loss.some(Number.isFinite));
    root.hidden = !known.length;
    if (root.hidden) return;
    const curves = known.map((run) => ({ label: run.name, colour: run.colour, steps: run.steps, values: run.loss }));
    const width = Math.max(280, root.clientWidth);
    const shape = JSON.stringify([known.map((run) => run.name), width, model.dark]);
    if (shape !== this.shape) {
      this.plot?.destroy();
      replace(root, element("h3", {}, "Loss at the probed steps"));
      this.plot = chart(root, { curves, width, height: 120, picked: (step) => model.state.set({ step }) });
    } else if (model.overview !== this.overview) feed(this.plot, curves);
    Object.assign(this, { shape, overview: model.overview });
    mark(this.plot, model.step);
  }
}

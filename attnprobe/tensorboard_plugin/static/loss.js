// The losses of the runs over their steps, as far as they are known.

import { chart } from "./chart.js";
import { element, replace } from "./dom.js";

export class Loss {
  constructor(root, model) {
    Object.assign(this, { root, model, plot: null, drawn: "" });
  }

  draw() {
    const { model, root } = this;
    const known = model.runs.filter((run) => run.loss.some((value) => typeof value === "number"));
    root.hidden = !known.length;
    const key = JSON.stringify([known.map((run) => [run.name, run.revision]), root.clientWidth, model.dark]);
    if (root.hidden || key === this.drawn) {
      this.plot?.redraw(false);
      return;
    }
    this.drawn = key;
    this.plot?.destroy();
    replace(root, element("h3", {}, "Loss at the probed steps"));
    const curves = known.map((run) => ({ label: run.name, colour: run.colour, steps: run.steps, values: run.loss }));
    const picked = (step) => model.state.set({ step });
    this.plot = chart(root, { curves, width: Math.max(280, root.clientWidth), height: 120, marker: () => model.step, picked });
  }
}

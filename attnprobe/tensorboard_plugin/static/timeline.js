// The steps: a slider with a mark where an alarm was raised, and a button that plays them.

import { alarmColour, colourOf, element, replace, sharp } from "./dom.js";
import { atStep } from "./format.js";
import { last } from "./model.js";

const PACE = 120; // milliseconds a step

export class Timeline {
  constructor(root, model) {
    this.model = model;
    this.slider = element("input", { type: "range", min: 0, step: 1, "aria-label": "training step" });
    this.marks = element("canvas", { class: "marks", "aria-hidden": "true" });
    this.label = element("output", { class: "step" });
    this.playing = null;
    this.button = element("button", { title: "play the steps (space)", "aria-label": "play the steps", onclick: () => this.play() }, "▶");
    this.latest = element("button", { title: "go to the newest step and stay there", onclick: () => this.go(null) }, "latest");
    this.base = element("button", { class: "compare", onclick: () => this.compare() });
    this.slider.addEventListener("input", () => this.go(Number(this.slider.value)));
    const track = element("div", { class: "track" }, this.marks, this.slider);
    replace(root, this.button, track, this.label, this.latest, this.base);
  }

  draw() {
    const { steps, step, state } = this.model;
    this.steps = steps;
    this.slider.max = Math.max(0, steps.length - 1);
    this.slider.value = steps.indexOf(step);
    this.slider.disabled = steps.length < 2;
    const text = step === undefined ? "no probes" : atStep(step);
    this.label.textContent = text;
    this.slider.setAttribute("aria-valuetext", text);
    for (const [button, on] of [[this.latest, state.step === null], [this.base, state.base !== null]]) {
      button.classList.toggle("on", on);
      button.setAttribute("aria-pressed", on);
    }
    this.base.textContent = state.base === null ? "compare from here" : `changes since ${atStep(state.base)} ✕`;
    this.base.title = state.base === null ? "show the difference from this step on (d)" : "show the values again (d)";
    this.drawMarks(steps);
  }

  drawMarks(steps) {
    const width = this.slider.clientWidth || 300;
    const context = sharp(this.marks, width, 12);
    const thumb = 16; // the middle of the slider's thumb stays so far inside
    const place = (step) => (
      thumb / 2 + (last(steps, step, 0) / Math.max(1, steps.length - 1)) * (width - thumb)
    );
    const mark = (step, colour, height) => {
      context.fillStyle = colour;
      context.fillRect(place(step) - 1, 12 - height, 2, height);
    };
    for (const run of this.model.runs) {
      for (const [step] of run.invalid) mark(step, colourOf("--quiet"), 4);
      for (const alarm of run.alarms) {
        mark(alarm.raised, alarmColour(alarm), alarm.severity === "alarm" ? 12 : 8);
      }
    }
    if (this.model.state.base !== null) mark(this.model.state.base, colourOf("--accent"), 12);
  }

  // To the step with this index; null follows the newest.
  go(index) {
    this.model.state.set({ step: index === null ? null : this.steps[index] });
  }

  by(number) {
    const now = this.steps.indexOf(this.model.step);
    this.go(Math.min(this.steps.length - 1, Math.max(0, now + number)));
  }

  compare() {
    this.model.state.set({ base: this.model.state.base === null ? this.model.step : null });
  }

  play() {
    if (this.playing !== null) {
      this.stop();
      return;
    }
    if (this.model.step === this.steps.at(-1)) this.go(0);
    // A long run is played in half a minute.
    const stride = Math.max(1, Math.round(this.steps.length / 250));
    this.button.textContent = "⏸";
    this.playing = setInterval(() => {
      if (this.model.step === this.steps.at(-1)) this.stop();
      else if (!this.model.waiting) this.by(stride);
    }, PACE);
  }

  stop() {
    clearInterval(this.playing);
    this.playing = null;
    this.button.textContent = "▶";
  }
}

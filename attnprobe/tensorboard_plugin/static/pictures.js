// The pictures of one head that were recorded, run by run.

import { dot, element, replace } from "./dom.js";
import { drawMaps, drawUsage } from "./maps.js";
import { Refusal } from "./refusal.js";

export class Pictures {
  constructor(root, model, tip) {
    Object.assign(this, { root, model, tip, head: "", parts: new Map() });
  }

  draw(runs, layer, head) {
    const { model } = this;
    const recorded = runs.filter((run) => run.maps.some(([one, number]) => one === layer && number === head));
    const shown = JSON.stringify([layer, head, model.dark, recorded.map((run) => run.name)]);
    if (shown !== this.head) {
      this.head = shown;
      this.parts = new Map(recorded.map((run) => [run.name, part(run)]));
      const none = element("p", { class: "quiet" }, "There are no maps of this head here. To record them, name its layer: ",
        element("code", {}, `maps=${JSON.stringify([layer])}`), ".");
      replace(this.root, ...(recorded.length ? [...this.parts.values()].map(({ root }) => root) : [none]));
    }
    for (const run of recorded) {
      const step = run.steps[Math.max(0, model.probe(run))];
      const { maps, usage } = this.parts.get(run.name);
      this.put(maps, run, ["map", run.name, layer, head, step], () => model.source.map(run.name, layer, head, step), drawMaps);
      this.put(usage, run, ["usage", run.name, layer, head], () => model.source.usage(run.name, layer, head), drawUsage);
    }
  }

  put(part, run, key, ask, drawn) {
    const { value } = this.model.loader.get(JSON.stringify(key), run.revision, `${key[0]} ${run.name}`, () => ask().catch(refused));
    part.root.classList.toggle("waiting", !value);
    if (!value || value === part.value) return;
    part.value = value;
    if (value.refusal) replace(part.root, element("p", { class: "quiet" }, value.refusal));
    else drawn(part.root, value, this.tip);
  }
}

function part(run) {
  const [maps, usage] = [{ root: element("div") }, { root: element("div") }];
  const title = element("h3", {}, dot(run), `Maps, ${run.name}`);
  return { maps, usage, root: element("section", {}, title, element("div", { class: "figures" }, maps.root, usage.root)) };
}

// That there is none is an answer too.
function refused(error) {
  if (error instanceof Refusal) return { refusal: error.message };
  throw error;
}

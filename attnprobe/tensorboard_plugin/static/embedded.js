// Answers out of the page itself, see `view/html.py`: the same as the server's, for the probes that are in the file.

import { widthOf } from "./frames.js";
import { Refusal } from "./refusal.js";

export class Embedded {
  constructor(data) {
    this.data = data;
    this.decoded = new Map();
  }

  async runs() {
    return this.data.overview;
  }

  run(name) {
    return this.data.overview.runs.find((run) => run.name === name);
  }

  array(key) {
    if (!this.decoded.has(key)) this.decoded.set(key, unpack(this.data.arrays[key]));
    return this.decoded.get(key);
  }

  async whole(run, name) {
    return (await this.array(JSON.stringify([run, name])))?.values;
  }

  size(run, name) {
    const found = this.run(run);
    const width = widthOf(found, this.data.overview.statistics[name].level);
    return { width, frame: found.layers.length * width };
  }

  async frames(run, name, start, stop) {
    const { frame } = this.size(run, name);
    return (await this.whole(run, name)).subarray(start * frame, stop * frame);
  }

  async range(run, name) {
    let [low, high, positive] = [Infinity, -Infinity, Infinity];
    for (const value of await this.whole(run, name)) {
      if (!Number.isFinite(value)) continue;
      if (value < low) low = value;
      if (value > high) high = value;
      if (value > 0 && value < positive) positive = value;
    }
    const known = (value) => (Number.isFinite(value) ? value : null);
    return { low: known(low), high: known(high), positive: known(positive) };
  }

  async head(run, layer, head) {
    const { steps, layers, names } = this.run(run);
    const row = layers.indexOf(layer);
    const found = Object.create(null); // without the names that every object has
    for (const name of names) {
      if (this.data.overview.statistics[name].level !== "head" || row < 0) continue;
      const { width, frame } = this.size(run, name);
      const whole = await this.whole(run, name);
      const values = steps.map((_, index) => whole[index * frame + row * width + head]);
      if (values.some((value) => !Number.isNaN(value))) found[name] = { steps, values };
    }
    return found;
  }

  async map(run, layer, head, step) {
    const keys = this.data.maps[JSON.stringify([run, layer, head])] ?? [];
    if (!keys.length) throw new Refusal("no pictures of this head were recorded");
    const chosen = keys.filter((key) => key <= step).at(-1) ?? keys[0];
    return { step: chosen, ...(await this.array(JSON.stringify([run, "map", layer, head, chosen]))) };
  }

  async usage(run, layer, head) {
    const key = JSON.stringify([run, "usage", layer, head]);
    if (!this.data.arrays[key]) throw new Refusal("no usage of this head was recorded");
    return { steps: this.data.arrays[key].steps, ...(await this.array(key)) };
  }
}

// Float32 without its last eight bits, one plane after another of each byte, compressed.
async function unpack({ shape, data }) {
  const packed = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const planes = new Uint8Array(await new Response(stream).arrayBuffer());
  const size = planes.length / 3;
  const bytes = new Uint8Array(size * 4);
  for (let plane = 0; plane < 3; plane += 1) {
    for (let index = 0; index < size; index += 1) bytes[index * 4 + plane + 1] = planes[plane * size + index];
  }
  return { shape, values: new Float32Array(bytes.buffer) };
}

// One statistic of one run at one probe, loaded in stretches around it and kept while there is room.

const STRETCH = 2 ** 21; // bytes that are asked for at once
const ROOM = 2 ** 27; // bytes that are kept
export const AGAIN = 5000; // milliseconds until what failed is asked for again

export class Frames {
  constructor(source) {
    this.source = source;
    this.kept = new Map(); // in the order of last use
    this.bytes = 0;
  }

  // `{layers, width, values}` if it is there; else undefined, and `arrived` is called once it is.
  get(run, name, level, probe, arrived) {
    const width = level === "layer" ? 1 : Math.max(0, ...run.heads);
    const frame = run.layers.length * width;
    const stretch = Math.max(1, Math.floor(STRETCH / 4 / Math.max(1, frame)));
    const start = Math.floor(probe / stretch) * stretch;
    const stop = Math.min(start + stretch, run.steps.length);
    // A stretch that has grown since is another one.
    const key = JSON.stringify([run.name, run.revision, name, start, stop]);
    const found = this.kept.get(key);
    if (!found) {
      this.load(key, run, name, start, stop, arrived);
      return undefined;
    }
    this.kept.delete(key);
    this.kept.set(key, found);
    if (!found.values) return undefined;
    const at = (probe - start) * frame;
    return { width, values: found.values.subarray(at, at + frame) };
  }

  async load(key, run, name, start, stop, arrived) {
    const entry = { values: null };
    this.kept.set(key, entry);
    try {
      entry.values = await this.source.frames(run.name, name, start, stop);
    } catch (error) {
      setTimeout(() => this.kept.delete(key), AGAIN); // not at once: the server may be gone
      arrived(error);
      return;
    }
    this.bytes += entry.values.byteLength;
    for (const [old, { values }] of this.kept) {
      if (this.bytes <= ROOM || old === key) break;
      if (values) {
        this.bytes -= values.byteLength;
        this.kept.delete(old);
      }
    }
    arrived();
  }
}

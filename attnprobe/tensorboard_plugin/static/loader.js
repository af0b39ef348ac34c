// Answers that are kept. One whose run has changed is asked for again; until it comes the earlier one stands in.

const ROOM = 2 ** 27; // bytes that are kept
const AGAIN = 5000; // milliseconds until what failed is asked for again: the server may be gone

export class Loader {
  constructor(arrived) {
    this.arrived = arrived;
    this.kept = new Map(); // in the order of last use
    this.busy = new Set();
    this.bytes = 0;
    this.errors = new Set(); // of what was wanted since this was last cleared
  }

  // `{value, error}`, the value undefined until it is there. Of a `lane` one question is asked at a time, so that
  // a slider that is dragged leaves no queue behind it: `arrived` is to ask for what is wanted by then.
  get(key, revision, lane, ask) {
    const entry = this.kept.get(key) ?? { revision: null, value: undefined, bytes: 0, loading: false, error: "", again: 0 };
    this.kept.delete(key);
    this.kept.set(key, entry);
    if (entry.revision !== revision && !this.busy.has(lane) && performance.now() >= entry.again) {
      this.load(entry, revision, lane, ask);
    }
    if (entry.error) this.errors.add(entry.error);
    return entry;
  }

  async load(entry, revision, lane, ask) {
    entry.loading = true;
    this.busy.add(lane);
    try {
      const value = await ask();
      const bytes = size(value);
      this.bytes += bytes - entry.bytes;
      Object.assign(entry, { value, bytes, revision, error: "" });
    } catch (error) {
      Object.assign(entry, { error: error.message, again: performance.now() + AGAIN - 1 });
      setTimeout(this.arrived, AGAIN);
    }
    entry.loading = false;
    this.busy.delete(lane);
    this.trim(entry);
    this.arrived();
  }

  trim(newest) {
    for (const [key, entry] of this.kept) {
      if (this.bytes <= ROOM) break;
      if (entry === newest || entry.loading) continue;
      this.bytes -= entry.bytes;
      this.kept.delete(key);
    }
  }
}

function size(value) {
  if (ArrayBuffer.isView(value)) return value.byteLength;
  if (Array.isArray(value)) return 8 * value.length;
  if (value instanceof Map) return [...value.values()].reduce((sum, each) => sum + size(each), 100);
  return value && typeof value === "object" ? Object.values(value).reduce((sum, each) => sum + size(each), 100) : 100;
}

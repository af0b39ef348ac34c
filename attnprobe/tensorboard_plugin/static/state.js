// What is being looked at. Everything in it can be read from, and is written to, the page's address.

const DEFAULTS = {
  runs: [], // names; none: the first few
  stat: "", // name of the statistic
  step: null, // null: the latest
  base: null, // step that is compared with; null: no comparison
  colours: "runs", // "runs" | "step" | "range"
  log: null, // null: as it suits the numbers
  layers: "", // filter
  layer: null, // of the head that was chosen
  head: null,
  order: "", // "high" | "low"; "": the worse end first
};

const PAUSE = 300; // milliseconds

export class State {
  constructor(link) {
    this.link = link;
    this.listeners = [];
    this.read();
    link.watch(() => {
      const text = link.read();
      if (!text) this.write(); // back from another tab
      else if (text !== this.text) {
        this.read();
        this.tell();
      }
    });
  }

  read() {
    this.text = this.link.read();
    Object.assign(this, structuredClone(DEFAULTS));
    const query = new URLSearchParams(this.text);
    for (const name of ["stat", "colours", "layers", "layer", "order"]) {
      if (query.has(name)) this[name] = query.get(name);
    }
    for (const name of ["step", "base", "head"]) {
      if (/^-?\d{1,15}$/.test(query.get(name))) this[name] = Number(query.get(name));
    }
    for (const [name, known] of [["colours", ["runs", "step", "range"]], ["order", ["high", "low"]]]) {
      if (!known.includes(this[name])) this[name] = DEFAULTS[name];
    }
    if (query.has("log")) this.log = query.get("log") === "1";
    this.runs = query.getAll("run");
  }

  write() {
    const query = new URLSearchParams();
    for (const run of this.runs) query.append("run", run);
    for (const name of ["stat", "step", "base", "colours", "layers", "layer", "head", "order"]) {
      if (this[name] !== DEFAULTS[name]) query.set(name, this[name]);
    }
    if (this.log !== null) query.set("log", this.log ? "1" : "0");
    this.text = query.toString();
    // Browsers refuse an address that changes too often, as under a slider that is dragged.
    clearTimeout(this.writing);
    this.writing = setTimeout(() => this.link.write(this.text), PAUSE);
  }

  set(changes) {
    Object.assign(this, changes);
    this.write();
    this.tell();
  }

  listen(listener) {
    this.listeners.push(listener);
  }

  tell() {
    for (const listener of this.listeners) listener();
  }
}

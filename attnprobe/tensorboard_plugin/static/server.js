// Answers from TensorBoard's server, see `view/answers.py`.

import { real } from "./format.js";
import { Refusal } from "./refusal.js";

const PATIENCE = 60_000; // milliseconds

export class Server {
  constructor(base) {
    this.base = base;
  }

  async ask(question, query) {
    let response;
    try {
      // A connection that hangs, as after a laptop slept, must not be waited for for ever.
      response = await fetch(`${this.base}${question}?${new URLSearchParams(query)}`, { signal: AbortSignal.timeout(PATIENCE) });
    } catch {
      throw new Error("TensorBoard does not answer. Is it still running? This page goes on asking every few seconds.");
    }
    if (response.status === 404) throw new Refusal(await response.text());
    if (!response.ok) throw new Error(await response.text());
    return response;
  }

  async runs(known) {
    return (await this.ask("runs", { known })).json();
  }

  async frames(run, name, start, stop) {
    return (await numbers(await this.ask("frames", { run, name, start, stop }))).values;
  }

  async range(run, name) {
    return (await this.ask("range", { run, name })).json();
  }

  async head(run, layer, head, points) {
    const found = await (await this.ask("head", { run, layer, head, points })).json();
    for (const curve of Object.values(found)) curve.values = curve.values.map(real);
    return found;
  }

  async map(run, layer, head, step) {
    return numbers(await this.ask("map", { run, layer, head, step }));
  }

  async usage(run, layer, head) {
    return numbers(await this.ask("usage", { run, layer, head }));
  }
}

// A line of JSON with the shape, then float32.
async function numbers(response) {
  const bytes = new Uint8Array(await response.arrayBuffer());
  const end = bytes.indexOf(10);
  const header = JSON.parse(new TextDecoder().decode(bytes.subarray(0, end)));
  return { ...header, values: new Float32Array(bytes.slice(end + 1).buffer) };
}

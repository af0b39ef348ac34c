// What is under the pointer, beside it.

import { element, replace } from "./dom.js";

export class Tip {
  constructor() {
    this.root = element("div", { class: "tip", role: "status", hidden: true });
  }

  show(event, lines) {
    replace(this.root, ...lines.map((line) => element("div", {}, line)));
    this.root.hidden = false;
    const { offsetWidth, offsetHeight } = this.root;
    const left = event.clientX + 14 + offsetWidth > window.innerWidth ? event.clientX - offsetWidth - 10 : event.clientX + 14;
    const top = event.clientY + 14 + offsetHeight > window.innerHeight ? event.clientY - offsetHeight - 10 : event.clientY + 14;
    this.root.style.left = `${Math.max(0, left)}px`;
    this.root.style.top = `${Math.max(0, top)}px`;
  }

  hide() {
    this.root.hidden = true;
  }
}

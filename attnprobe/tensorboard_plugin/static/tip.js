// What is under the pointer, beside it.

import { element, replace } from "./dom.js";

export class Tip {
  constructor() {
    this.root = element("div", { class: "tip", role: "status", hidden: true });
    this.owner = null;
  }

  show({ clientX, clientY, target }, lines) {
    this.owner = target;
    replace(this.root, ...lines.map((line) => element("div", {}, line)));
    this.root.hidden = false;
    const { offsetWidth, offsetHeight } = this.root;
    const left = clientX + 14 + offsetWidth > window.innerWidth ? clientX - offsetWidth - 10 : clientX + 14;
    const top = clientY + 14 + offsetHeight > window.innerHeight ? clientY - offsetHeight - 10 : clientY + 14;
    this.root.style.left = `${Math.max(0, left)}px`;
    this.root.style.top = `${Math.max(0, top)}px`;
  }

  // What it is about may have gone from under the pointer, which tells nobody.
  tidy() {
    if (this.owner && !this.owner.getClientRects().length) this.hide();
  }

  hide() {
    this.root.hidden = true;
    this.owner = null;
  }
}

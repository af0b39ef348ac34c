// Elements. Everything that comes from a run's names goes through here as text, never as markup.

export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value != null) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child != null));
  return made;
}

const FOCUSABLE = "button, input, select, summary, canvas";

// The keyboard's focus stays where it was: on the same element, the one with the same `data-key`, or in its place.
export function replace(parent, ...children) {
  const focused = parent.contains(document.activeElement) ? document.activeElement : null;
  const at = focused ? [...parent.querySelectorAll(FOCUSABLE)].indexOf(focused) : -1;
  parent.replaceChildren(...children.filter((child) => child != null));
  if (at < 0) return;
  const there = [...parent.querySelectorAll(FOCUSABLE)];
  const same = there.find((one) => one === focused || (one.dataset.key && one.dataset.key === focused.dataset.key));
  (same ?? there[Math.min(at, there.length - 1)])?.focus({ preventScroll: true });
}

// Calls `build` and puts there what it returns, unless that was done for the same `key`.
export function renew(parent, key, build) {
  if (parent.drawnFor === key) return;
  parent.drawnFor = key;
  replace(parent, ...build());
}

// A canvas as sharp as the screen, and its context in CSS pixels.
export function sharp(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  const size = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== size[0] || canvas.height !== size[1]) [canvas.width, canvas.height] = size;
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}

const colours = new Map();

export function colourOf(name) {
  if (!colours.has(name)) colours.set(name, getComputedStyle(document.documentElement).getPropertyValue(name).trim());
  return colours.get(name);
}

export function alarmColour({ severity }) {
  return colourOf(severity === "alarm" ? "--alarm" : "--information");
}

// A run's mark, before its name or what is about it.
export function dot(run) {
  return element("span", { class: "dot", style: `background:${run.colour}` });
}

export function setDark(on) {
  document.documentElement.classList.toggle("dark", on);
  colours.clear();
}

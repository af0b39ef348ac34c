// Numbers and names as a person reads them.

export function number(value) {
  if (value == null || Number.isNaN(value)) return "not measured";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  if (value === 0) return "0";
  const size = Math.abs(value);
  const four = Number(value.toPrecision(4));
  const text = size >= 1e5 || size < 1e-3 ? four.toExponential() : String(four);
  return text.replace("-", "−").replace("e+", "e");
}

// A number out of the server's JSON, which has no word for some.
export function real(value) {
  return value === null ? NaN : { inf: Infinity, "-inf": -Infinity }[value] ?? value;
}

export function atStep(step) {
  return `step ${step.toLocaleString("en")}`;
}

export function signed(value) {
  return value > 0 ? `+${number(value)}` : number(value);
}

export function count(number_, what) {
  return `${number_.toLocaleString("en")} ${what}${number_ === 1 ? "" : "s"}`;
}

// What tells layers apart: without the parts that all names begin and end with.
export function shortNames(names) {
  const parts = names.map((name) => name.split("."));
  const least = Math.min(...parts.map((part) => part.length));
  const same = (at) => parts.every((part) => part.at(at) === parts[0].at(at));
  let first = 0;
  let last = 0;
  if (names.length > 1) {
    while (first < least - 1 && same(first)) first += 1;
    while (last < least - 1 - first && same(-1 - last)) last += 1;
  }
  return parts.map((part) => part.slice(first, part.length - last).join(".") || part.join("."));
}

// `*` stands for anything; words are looked for anywhere in a name.
export function matcher(text) {
  const words = text.trim().toLowerCase().split(/\s+/).filter(Boolean);
  return (name) => !words.length || words.some((word) => fits(name.toLowerCase(), word.split("*")));
}

// Without backtracking, which some patterns would keep busy for hours.
function fits(name, parts) {
  if (parts.length === 1) return name.includes(parts[0]);
  const [first, end] = [parts[0], parts.at(-1)];
  if (name.length < first.length + end.length || !name.startsWith(first) || !name.endsWith(end)) return false;
  let rest = name.slice(first.length, name.length - end.length);
  for (const part of parts.slice(1, -1)) {
    const at = rest.indexOf(part);
    if (at < 0) return false;
    rest = rest.slice(at + part.length);
  }
  return true;
}

export function headList(list) {
  if (!list.length) return "";
  const ranges = [];
  for (const head of list) {
    const last = ranges.at(-1);
    if (last && last[1] === head - 1) last[1] = head;
    else ranges.push([head, head]);
  }
  const text = ranges.map(([low, high]) => (low === high ? `${low}` : `${low}–${high}`)).join(", ");
  return `${list.length > 1 ? "heads" : "head"} ${text}`;
}

"""``python -m benchmarks.run``: measure everything, and write down what came out."""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from benchmarks import kernel, memory, scaling, step, tools
from benchmarks.machine import describe
from benchmarks.table import Section, prepare

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
PICTURE = "performance-scaling.png"
INTRODUCTION = """# Performance

What attnprobe costs, as `python -m benchmarks.run` measured it on the machine below; nothing on this page is written
by hand. Times are CPU seconds of one thread. All candidates of a table run in turn in every round, in an order drawn
anew, and ratios are taken within a round: their median is given with the quartiles over rounds. A median that misses
its target is shown as missed. The raw medians are in [{data}]({data}).
"""
Benchmark = Callable[[bool], Iterator[Section]]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description="What attnprobe costs.")
    names = ("kernel", "step", "memory", "tools", "scaling")
    parser.add_argument("--short", action="store_true", help="small sizes, 3 repeats; writes nothing without --out")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="parts to run")
    parser.add_argument("--out", type=Path, help="the page to write (docs/performance.md, unless --short or --only)")
    chosen = parser.parse_args()
    whole = not chosen.short and len(chosen.only) == len(names)
    page: Path | None = chosen.out or (PAGE if whole else None)
    picture = None if page is None else page.parent / "images" / PICTURE
    prepare()
    parts: Mapping[str, Benchmark] = {
        "kernel": kernel.benchmark,
        "step": step.benchmark,
        "memory": memory.benchmark,
        "tools": tools.benchmark,
        "scaling": partial(scaling.benchmark, picture=picture),
    }
    sections, broken = run({name: parts[name] for name in parts if name in chosen.only}, chosen.short)
    if page is not None:
        write(page, sections, broken)
    print(summary(sections, broken))
    return int(bool(broken))


def run(parts: Mapping[str, Benchmark], short: bool) -> tuple[list[Section], list[str]]:
    """The sections as they come, and the names of the parts that broke."""
    sections, broken = [], []
    for name, benchmark in parts.items():
        start = time.perf_counter()
        try:
            for section in benchmark(short):
                print(section.markdown(), flush=True)
                sections.append(section)
        except Exception:
            traceback.print_exc()
            broken.append(name)
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return sections, broken


def write(page: Path, sections: list[Section], broken: list[str]) -> None:
    """The page, and the raw medians beside it."""
    machine, data = describe(), page.with_suffix(".json")
    lines = [INTRODUCTION.format(data=data.name), "| measured on | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in machine.items()]
    lines += ["", summary(sections, broken), ""]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join(lines + [section.markdown() for section in sections]))
    found = {"machine": machine, "broken": broken, "sections": [section.data() for section in sections]}
    data.write_text(json.dumps(found, indent=1) + "\n")


def summary(sections: list[Section], broken: list[str]) -> str:
    """How many targets are met, and which parts broke."""
    judged = [row.met for section in sections for row in section.rows if row.met is not None]
    text = f"{sum(judged)} of {len(judged)} targets are met."
    return text + f" Not measured, because it broke: {', '.join(broken)}." * bool(broken)


if __name__ == "__main__":
    raise SystemExit(main())

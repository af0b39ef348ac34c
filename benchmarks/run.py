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
from typing import Any

from benchmarks import kernel, memory, scaling, step, tools
from benchmarks.machine import describe
from benchmarks.tab import measure as tab
from benchmarks.table import Section, prepare

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
PICTURE = "performance-scaling.png"
INTRODUCTION = """# Performance

What attnprobe costs, as `python -m benchmarks.run` measured it on the machine below; nothing on this page is written
by hand. Times are CPU seconds of one thread. All candidates of a table run in turn in every round, in an order drawn
anew, and ratios are taken within a round: their median is given with the quartiles over rounds. A median that misses
its target is shown as missed. The raw medians are in [{data}]({data}).
"""
PARTS = ("kernel", "step", "long-step", "memory", "tools", "scaling", "tab")
Benchmark = Callable[[bool], Iterator[Section]]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description="What attnprobe costs.")
    parser.add_argument("--short", action="store_true", help="small sizes, 3 repeats; writes nothing without --out")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run; the others stay")
    parser.add_argument("--out", type=Path, help="the page to write (docs/performance.md, unless --short)")
    chosen = parser.parse_args()
    page: Path | None = chosen.out or (None if chosen.short else PAGE)
    prepare()
    measured: dict[str, dict[str, Any]] = {}
    data = None if page is None else page.with_suffix(".json")
    if data is not None and data.exists():
        measured = json.loads(data.read_text())
    benchmarks: Mapping[str, Benchmark] = {
        "kernel": kernel.benchmark,
        "step": step.benchmark,
        "long-step": step.long_benchmark,
        "memory": memory.benchmark,
        "tools": tools.benchmark,
        "scaling": partial(scaling.benchmark, picture=None if page is None else page.parent / "images" / PICTURE),
        "tab": tab.benchmark,
    }
    for name in chosen.only:
        measured[name] = run(name, benchmarks[name], chosen.short)
        if page is not None and data is not None:  # after each part: the next one may take half an hour
            page.parent.mkdir(parents=True, exist_ok=True)
            data.write_text(json.dumps(measured, indent=1) + "\n")
            page.write_text(markdown(measured, data.name))
    print(summary(measured))
    return int(any(measured[name]["broken"] for name in chosen.only))


def run(name: str, benchmark: Benchmark, short: bool) -> dict[str, Any]:
    """What one part found, as plain values."""
    start, sections = time.perf_counter(), []
    found: dict[str, Any] = {"machine": describe(), "broken": False}
    try:
        for section in benchmark(short):
            print(section.markdown(), flush=True)
            sections.append(section)
    except Exception:
        traceback.print_exc()
        found["broken"] = True
    print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return found | {"sections": [section.data() | {"markdown": section.markdown()} for section in sections]}


def markdown(measured: Mapping[str, Mapping[str, Any]], data: str) -> str:
    """The page."""
    machines = {name: measured[name]["machine"] for name in PARTS if name in measured}
    lines = [INTRODUCTION.format(data=data), "| part | " + " | ".join(next(iter(machines.values()))) + " |"]
    lines += ["|---" * (1 + len(next(iter(machines.values())))) + "|"]
    lines += [f"| {name} | " + " | ".join(map(str, machine.values())) + " |" for name, machine in machines.items()]
    lines += ["", summary(measured), ""]
    lines += [section["markdown"] for name in machines for section in measured[name]["sections"]]
    return "\n".join(lines)


def summary(measured: Mapping[str, Mapping[str, Any]]) -> str:
    """How many targets are met, and which parts broke."""
    rows = [row for found in measured.values() for section in found["sections"] for row in section["rows"]]
    judged = [row["met"] for row in rows if row["met"] is not None]
    broken = [name for name, found in measured.items() if found["broken"]]
    text = f"{sum(judged)} of {len(judged)} targets are met."
    return text + f" Not measured to the end, because it broke: {', '.join(broken)}." * bool(broken)


if __name__ == "__main__":
    raise SystemExit(main())

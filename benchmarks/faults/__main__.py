"""``python -m benchmarks.faults``: how often the alarms are right, measured on runs that were never tuned on."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from attnprobe.alarms import ALL_ALARMS
from benchmarks.faults import page
from benchmarks.faults.cache import Cache
from benchmarks.faults.plots import draw
from benchmarks.faults.setup import HELD_OUT, TUNING, Setup, faulty, healthy
from benchmarks.faults.study import MAIN, Verdict, fill, verdicts
from benchmarks.faults.tables import comparison, confusion, false_alarms, misses, totals

#: Runs of every fault and severity, and healthy ones: on held-out seeds, to tune on, and in short.
SIZES = {"held-out": (10, 250), "tuning": (3, 120), "short": (1, 8)}
#: Faults of the short form.
SHORT = ("query/key growth", "dead columns", "future leak", "duplicated heads", "fully masked row")
CACHE = Path("build/faults")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description="How often alarms are right.")
    parser.add_argument("--set", choices=tuple(SIZES), default="held-out", help="seeds; only held-out writes the page")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where trained runs are kept")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    chosen = parser.parse_args()
    started = time.perf_counter()
    well, ill = plan(chosen.set)
    cache = Cache(chosen.cache)
    # Healthy runs first: every other one needs its twin.
    fill(cache, [*well, *ill], chosen.jobs)
    judged = verdicts(cache, [*well, *ill], chosen.jobs)
    good, bad = judged[: len(well)], judged[len(well) :]
    seeds = sorted({setup.seed for setup in [*well, *ill]})
    print(f"{len(well)} healthy and {len(ill)} faulty runs; seeds {seeds}")
    print(f"(tuning seeds {TUNING.start} to {TUNING.stop - 1}, held out {HELD_OUT.start} to {HELD_OUT.stop - 1})\n")
    for told in (false_alarms(good), totals(bad), misses(bad), confusion(bad), comparison(good, bad)):
        print(told, end="\n\n")
    for verdict in good:
        if verdict.alarms[MAIN] or not verdict.learned:
            print(f"healthy: {verdict.setup}: {verdict.alarms[MAIN]}{'' if verdict.learned else ', learned nothing'}")
    for verdict in bad:
        if verdict.counted and not verdict.accepted(MAIN):
            print(f"missed: {verdict.setup}: left {verdict.left}, alarms {verdict.alarms[MAIN]}")
    if chosen.set == "held-out":
        images = page.PAGE.parent / "images" / "alarms"
        examples = {rule.name: draw(cache, rule, good, bad, images) for rule in ALL_ALARMS}
        page.write(page.blocks(good, bad, examples))
    print(f"\n{time.perf_counter() - started:.0f} s")
    return int(chosen.set == "short" and not _sensible(good, bad))


def plan(name: str) -> tuple[list[Setup], list[Setup]]:
    """Healthy setups, the twins of the others among them, and faulty ones."""
    per_cell, runs = SIZES[name]
    seeds = HELD_OUT if name == "held-out" else TUNING
    ill = faulty(seeds, per_cell)
    if name == "short":
        ill = [setup for setup in ill if setup.fault in SHORT and setup.severity == "severe"]
    return list(dict.fromkeys([*(setup.twin for setup in ill), *healthy(seeds, runs)])), ill


def _sensible(good: list[Verdict], bad: list[Verdict]) -> bool:
    """What even the short form must show."""
    return not any(v.alarms[MAIN] for v in good) and all(v.accepted(MAIN) for v in bad if v.counted)


if __name__ == "__main__":
    raise SystemExit(main())

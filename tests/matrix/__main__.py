"""``python -m tests.matrix``: run the cells, say which fail, and write down what holds."""

from __future__ import annotations

import argparse
import fnmatch
import multiprocessing
import time
from pathlib import Path

from tests.matrix.cells import Cells, all_cells, quick_cells
from tests.matrix.check import Outcome
from tests.matrix.conditions import CONDITIONS
from tests.matrix.coverage import markdown
from tests.matrix.impossible import mistakes
from tests.matrix.work import outcome_of, prepare

ENOUGH = 10  # variants on which a condition has to hold
PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description="Models x conditions.")
    parser.add_argument("--quick", action="store_true", help="plain training of all variants, and a few more cells")
    parser.add_argument("--every", action="store_true", help="each condition on every variant that it applies to")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="of variants' names")
    parser.add_argument("--condition", default="*", metavar="PATTERN", help="of conditions' names")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--list", action="store_true", help="name the cells and stop")
    chosen = parser.parse_args()
    cells = [
        (variant, condition)
        for variant, condition in (quick_cells() if chosen.quick else all_cells(every=chosen.every))
        if fnmatch.fnmatchcase(variant.name, chosen.only) and fnmatch.fnmatchcase(condition.name, chosen.condition)
    ]
    if chosen.list:
        print("\n".join(f"{condition.name:22} {variant.name}" for variant, condition in cells))
        return 0
    results, failed = run(cells, chosen.jobs)
    whole = not chosen.quick and chosen.only == chosen.condition == "*"
    if whole:
        variants = list({variant.name: variant for variant, _ in cells}.values())
        PAGE.write_text(markdown(variants, CONDITIONS, results))
        for condition in CONDITIONS:
            held = sum(outcome.passed for (_, name), outcome in results.items() if name == condition.name)
            if held < ENOUGH:
                print(f"{condition.name} holds on {held} variants only, {ENOUGH} are wanted: raise its tried_on")
                failed += 1
    return int(failed > 0)


def run(cells: Cells, jobs: int = 1) -> tuple[dict[tuple[str, str], Outcome], int]:
    """The outcomes by name, and how many are not what they should be; those are printed."""
    results: dict[tuple[str, str], Outcome] = {}
    failed, start = 0, time.perf_counter()
    names = [(variant.name, condition.name) for variant, condition in cells]
    # A process for some hundred cells: compiled code is not given back.
    with multiprocessing.get_context("spawn").Pool(jobs, prepare, maxtasksperchild=100) as pool:
        for name, outcome in zip(names, pool.imap(outcome_of, names), strict=True):
            results[name] = outcome
            wrong = mistakes(*name, outcome)
            failed += bool(wrong)
            if wrong:
                print(f"{name[0]} under {name[1]}: {'; '.join(wrong)}", flush=True)
    held, seconds = sum(outcome.passed for outcome in results.values()), time.perf_counter() - start
    work = sum(outcome.seconds for outcome in results.values())
    print(f"{len(results)} cells in {seconds:.0f} s ({work:.0f} s of work): {held} hold, {failed} fail")
    return results, failed


if __name__ == "__main__":
    raise SystemExit(main())

"""``python -m tests.matrix``: run the cells, say which fail, and write down what holds."""

from __future__ import annotations

import argparse
import fnmatch
import logging
import time
from pathlib import Path

import torch

from tests.matrix.cells import Cells, all_cells, quick_cells
from tests.matrix.check import Outcome, check
from tests.matrix.conditions import CONDITIONS
from tests.matrix.coverage import markdown
from tests.matrix.impossible import mistakes

PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description="Models x conditions.")
    parser.add_argument("--quick", action="store_true", help="plain training of all variants, and a few more cells")
    parser.add_argument("--every", action="store_true", help="each condition on every variant that it applies to")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="of variants' names")
    parser.add_argument("--condition", default="*", metavar="PATTERN", help="of conditions' names")
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
    results, failed = run(cells)
    whole = not chosen.quick and chosen.only == chosen.condition == "*"
    if whole:
        variants = list({variant.name: variant for variant, _ in cells}.values())
        PAGE.write_text(markdown(variants, CONDITIONS, results))
    return int(failed > 0)


def run(cells: Cells) -> tuple[dict[tuple[str, str], Outcome], int]:
    """The outcomes by name, and how many are not what they should be; those are printed."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # libraries that comment on tiny models
    results: dict[tuple[str, str], Outcome] = {}
    failed, start = 0, time.perf_counter()
    for variant, condition in cells:
        outcome = results[variant.name, condition.name] = check(variant, condition)
        if condition.backend is not None:
            torch._dynamo.reset()  # compiled code of the cells before slows down and may not get too much
        wrong = mistakes(variant.name, condition.name, outcome)
        failed += bool(wrong)
        if wrong:
            print(f"{variant.name} under {condition.name}: {'; '.join(wrong)}", flush=True)
    for name in dict.fromkeys(condition.name for _, condition in cells):
        own = [outcome for (_, condition), outcome in results.items() if condition == name]
        held, work = sum(outcome.passed for outcome in own), sum(outcome.seconds for outcome in own)
        print(f"{name:22} {held:4} of {len(own):4} hold, {work:6.0f} s of processor time")
    print(f"{len(results)} cells in {time.perf_counter() - start:.0f} s: {failed} are not what they should be")
    return results, failed


if __name__ == "__main__":
    raise SystemExit(main())

"""The measured parts of ``docs/alarms.md``: what stands between its marks is written anew, the rest by hand."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from attnprobe.alarms import ALL_ALARMS
from benchmarks.faults.accepted import ACCEPTED
from benchmarks.faults.injections import FAULTS, SEVERITIES
from benchmarks.faults.study import INFORMATION, MAIN, Verdict
from benchmarks.faults.tables import (
    comparison,
    confusion,
    false_alarms,
    misses,
    rate,
    table,
    totals,
)  # fmt: skip

PAGE = Path(__file__).parents[2] / "docs" / "alarms.md"


def blocks(healthy: Sequence[Verdict], faulty: Sequence[Verdict], examples: Mapping[str, str]) -> dict[str, str]:
    """Name of the block -> Markdown."""
    found = {
        "false-alarms": false_alarms(healthy),
        "totals": totals(faulty),
        "faults": misses(faulty),
        "faults-50": misses(faulty, (50, True)),
        "confusion": confusion(faulty),
        "comparison": comparison(healthy, faulty),
        "accepted": accepted(),
        "seeds": seeds(healthy, faulty),
    }
    return found | {f"alarm-{rule.name}": of_alarm(rule.name, healthy, faulty, examples) for rule in ALL_ALARMS}


def accepted() -> str:
    rows = [
        (name, ", ".join(sorted(answer.alarms)) or "-", answer.counts, ", ".join(answer.severities))
        for name, answer in ACCEPTED.items()
    ]
    return table(("fault", "accepted alarms", "counts by", "at"), rows)


def seeds(healthy: Sequence[Verdict], faulty: Sequence[Verdict]) -> str:
    used = sorted({verdict.setup.seed for verdict in [*healthy, *faulty]})
    learned = sum(verdict.learned for verdict in healthy)
    return (
        f"{len(healthy)} healthy runs, of which {learned} ended below 98% of the uninformed loss, and {len(faulty)} "
        f"with a fault, over {len(used)} seeds from {used[0]} to {used[-1]}."
    )


def of_alarm(name: str, healthy: Sequence[Verdict], faulty: Sequence[Verdict], examples: Mapping[str, str]) -> str:
    """Where one alarm was right, and where it was not."""
    severe = [v for v in faulty if v.setup.severity == SEVERITIES[-1] and name in ACCEPTED[v.setup.fault].alarms]
    if name in INFORMATION:
        lines = [f"Measured: told on {sum(name in v.information for v in healthy)} of {len(healthy)} healthy runs."]
    else:
        lines = [f"Measured: false alarms on {rate(sum(name in v.alarms[MAIN] for v in healthy), len(healthy))}."]
    told = []
    for fault in FAULTS:
        cell = [v for v in severe if v.setup.fault == fault and v.counted]
        if cell:
            told.append(f"{fault} {sum(name in v.alarms[MAIN] for v in cell)} of {len(cell)}")
    if told:
        lines.append(f"Raised on severe faults that it is accepted for: {', '.join(told)}.")
    if caption := examples.get(name):
        picture = f"images/alarms/alarm-{name}.png"
        lines += ["", f"![{name}: what the rule reads in two runs]({picture})", "", f"*{caption}*"]
    return "\n".join(lines)


def write(found: Mapping[str, str], page: Path = PAGE) -> None:
    """Put the blocks between their marks."""
    text = page.read_text()
    for name, block in found.items():
        marked = re.compile(rf"(<!-- measured: {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = marked.sub(partial(_between, block), text)
    page.write_text(text)


def _between(block: str, match: re.Match[str]) -> str:
    return f"{match[1]}{block}\n{match[2]}"

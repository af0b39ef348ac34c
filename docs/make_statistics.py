"""Writes docs/statistics.md from the catalogue: ``make docs``."""

from __future__ import annotations

import math
from pathlib import Path

from attnprobe.catalog import STATISTICS, Statistic

PAGE = Path(__file__).with_name("statistics.md")
SETS = (
    ("The core set", "Measured by default; what the default alarms read.", lambda s: s.core),
    ("All the others", 'Measured with `statistics="all"` besides the core set.', lambda s: not s.core),
    ("On request", "Measured only where named.", lambda s: s.on_request),
)


def page() -> str:
    """The whole page as Markdown."""
    lines = [
        "# Statistics",
        "",
        "This page is made from the catalogue `attnprobe.STATISTICS` (`make docs`).",
        "",
        "Symbols: attention weight `alpha_ij`, score (logit) `s_ij`, error `u_i = dL/do_i` at the per-head context",
        "before the output projection, compatibility `b_ij = u_i . v_j`, its expectation `E_i = sum_j alpha_ij b_ij`,",
        "advantage `A_ij = -(b_ij - E_i)`, score gradient `dS_ij = alpha_ij (b_ij - E_i)`. `n_i` is the number of keys",
        "that query `i` sees; `R` are the queries that are not padding and see at least two keys.",
        "`usage_j = sum_i alpha_ij / sum over the rows that see j of 1/n_i` is 1 for uniform attention wherever",
        "`j` stands. Padding counts nowhere. What is not defined, or could not be measured, is NaN.",
        "",
        "`reduce` says how partial results of batch items and micro-batches combine: `mean` and `root` by sums and",
        "counts, `norm` by the sum of squares, `max` by the maximum; ratios are formed at the very end.",
    ]
    for title, text, chosen in SETS:
        entries = [s for s in STATISTICS.values() if chosen(s) and (s.on_request == (title == "On request"))]
        lines += ["", f"## {title}", "", text]
        for entry in entries:
            lines += _entry(entry)
    return "\n".join(lines) + "\n"


def _entry(entry: Statistic) -> list[str]:
    where = "in `report.layer`, per layer" if entry.level == "layer" else "per layer and head"
    facts = [where, f"range {_range(entry)}", f"reduce `{entry.reduce}`"]
    if entry.unit:
        facts.insert(1, f"unit: {entry.unit}")
    if entry.better:
        facts.append(f"better {entry.better}")
    facts.append(f"source: {entry.source}")
    return ["", f"### `{entry.name}`", "", entry.meaning, "", f"    {entry.formula}", "", "; ".join(facts) + "."]


def _range(entry: Statistic) -> str:
    low, high = ("unbounded" if math.isinf(x) else f"{x:g}" for x in (entry.low, entry.high))
    return "unbounded" if low == high == "unbounded" else f"{low} to {high}"


if __name__ == "__main__":
    PAGE.write_text(page())

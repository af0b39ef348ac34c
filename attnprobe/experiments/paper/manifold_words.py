"""The manifold experiment in words: a table for each task."""

from __future__ import annotations

from typing import Any

from attnprobe.experiments.markov.task import SYMBOLS
from attnprobe.experiments.paper.base import text

#: Which numbers are told, and how they are called; the rest is in the file.
ROWS = {
    "participation/values": "dimension of values (participation ratio)",
    "participation/outputs": "dimension of outputs",
    "components/values": "components with 90% of values' variance",
    "components/outputs": "components with 90% of outputs' variance",
    "ring/symbols": f"ring R2, symbols' values (chance {2 / (SYMBOLS - 1):.2f})",
    "ring/outputs": "ring R2, outputs",
    "ring/first": "  the same, from the values before training",
    "entropy/values/1": "entropy from PC1 of values, R2",
    "entropy/values/all": "entropy from the whole value, R2",
    "entropy/symbols/r": "entropy, PC1 of the 8 symbols' values, |r|",
    "entropy/outputs/1": "entropy from PC1 of outputs, R2",
    "entropy/outputs/r": "entropy, PC1 of outputs, |r|",
    "entropy/outputs/others": "  the same, without the commonest symbol",
    "prototypes/symbol": "a value's cluster tells its symbol",
    "prototypes/read by target": "the clusters that are read tell the target",
}
_TITLE, _FIRST, _ARM = 44, 8, 22


def describe(result: dict[str, Any]) -> list[str]:
    lines = []
    for name, found in result["tasks"].items():
        rows, undefined = found["entropy_of_symbols"], found["why_undefined"]
        runs = [run for run in result["runs"] if run["task"] == name]
        arms = "".join(f"{run['arm'].removeprefix('SGD, '):>{_ARM}}" for run in runs)
        lines += [
            f"{name}: given the present symbol, the next one has an entropy of {min(rows):.3f} to {max(rows):.3f} nats"
            + (": nothing to parametrise" if undefined else ""),
            f"  standard deviation of the best prediction's entropy {text(found['entropy_spread'])}; "
            f"the commonest symbol is there {found['most_frequent']['mean']:.0%} of the time",
            f"  components with 90% of the variance: {found['gaussian']:.1f} for Gaussian points, "
            f"{text(found['random_weights'], 1)} for values by random weights",
            f"{'':{_TITLE}}{'before':>{_FIRST}}{arms}",
            f"{'held-out loss':{_TITLE}}{runs[0]['held_out']['before']['mean']:{_FIRST}.3f}"
            + "".join(f"{run['held_out']['after']['mean']:{_ARM}.3f}" for run in runs),
        ]
        for key, title in ROWS.items():
            before = runs[0]["measures"][key]["before"]
            # Of an entropy that is the same after all symbols one number will do.
            if before["count"] and not (undefined and key.startswith("entropy") and not key.endswith("/1")):
                cells = "".join(f"{_cell(run['measures'][key]):>{_ARM}}" for run in runs)
                lines.append(f"{title:{_TITLE}}{before['mean']:{_FIRST}.2f}{cells}")
        lines.append("")
    return [
        *lines,
        "Means over seeds on held-out sequences; in brackets the change from before training with half its 95%",
        "interval, * where that leaves out 0 (about one in twenty does by chance). R2 of entropy is that on blocks of",
        f"targets left out of the fit, below 0 without any relation; outputs from position {result['first']} on.",
    ]


def _cell(found: dict[str, Any]) -> str:
    after, change = found["after"]["mean"], found["change"]
    if after is None:
        return "undefined"
    if change["low"] is None:
        return f"{after:.2f}"
    star = "*" if changed(change) else " "
    return f"{after:.2f} ({change['mean']:+.2f} +-{change['high'] - change['mean']:.2f}){star}"


def changed(change: dict[str, Any]) -> bool:
    """Whether the interval of a change over seeds leaves out 0."""
    return change["low"] is not None and not change["low"] <= 0 <= change["high"]

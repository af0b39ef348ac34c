"""How the experiments' pictures look."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

#: Okabe and Ito's set, safe for colour-blind readers.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#222222")


def plain_axes(axes: Any, title: str, x: str = "", y: str = "") -> None:
    """Title on the left, labels, a faint grid, no box."""
    axes.set_title(title, loc="left", fontsize=10.5)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def bars(
    axes: Any, labels: Iterable[str], found: Iterable[dict[str, Any]], colors: Iterable[str] | None = None
) -> None:
    """Horizontal bars of ``interval`` values, the first on top: the interval as a line, each seed as a dot."""
    labels = list(labels)
    for row, (interval, color) in enumerate(zip(found, colors or [COLORS[0]] * len(labels), strict=False)):
        if interval["mean"] is None:
            axes.text(0, row, " none", va="center", fontsize=8)
            continue
        axes.barh(row, interval["mean"], color=color, alpha=0.45, height=0.62)
        values = [value for value in interval["values"] if value is not None]
        axes.plot(values, [row] * len(values), ".", color=color, markersize=3.5, alpha=0.7)
        if interval["low"] is not None:
            axes.plot([interval["low"], interval["high"]], [row, row], color=color, linewidth=2.2)
    axes.set_yticks(range(len(labels)), labels, fontsize=8.5)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, axis="x")

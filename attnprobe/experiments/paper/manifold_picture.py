"""The picture of the manifold experiment."""

from __future__ import annotations

from typing import Any

from attnprobe.experiments.markov.task import SYMBOLS
from attnprobe.experiments.paper.base import text
from attnprobe.experiments.paper.style import COLORS, bars, plain_axes

#: One colour for each symbol, round the circle.
HUES = ("#E69F00", "#D55E00", "#CC79A7", "#7B4FA3", "#0072B2", "#56B4E9", "#009E73", "#8A8A00")
BARS = (
    ("participation/symbols", "dimension, symbols' values"),
    ("participation/outputs", "dimension, outputs"),
    ("ring/symbols", "ring R², symbols' values"),
    ("ring/outputs", "ring R², outputs"),
    ("entropy/values/1", "entropy, PC1 of values, R²"),
    ("entropy/outputs/1", "entropy, PC1 of outputs, R²"),
)


def draw(result: dict[str, Any], figure: Any) -> None:
    runs = {name: [run for run in result["runs"] if run["task"] == name] for name in result["tasks"]}
    columns = len(next(iter(runs.values())))
    figure.set_size_inches(15, 15.5)
    top, middle, bottom = figure.subfigures(3, 1, height_ratios=(6.6, 4.4, 3.2), hspace=0.03)
    top.suptitle("Where each symbol's mean value goes: from the small dot to the large one (first seed)", fontsize=12)
    grid = top.subplots(len(runs), columns)
    for row, (name, some) in zip(grid, runs.items(), strict=True):
        for axes, run in zip(row, some, strict=True):
            _trajectory(axes, f"{name}: {run['arm']}", run["trajectory"])
    top.legend(
        *grid.flat[0].get_legend_handles_labels(),
        title="symbol",
        ncols=SYMBOLS,
        frameon=False,
        loc="outside lower center",
    )
    middle.suptitle("Before training and after (means, 95% intervals, seeds)", fontsize=12)
    grid = middle.subplots(len(runs), len(BARS), sharex="col")
    for row, (name, some) in zip(grid, runs.items(), strict=True):
        _bars(row, name, some)
    bottom.suptitle(
        "Posterior entropy against the outputs' first principal component (varied, first seed)", fontsize=12
    )
    for axes, run in zip(bottom.subplots(1, columns, sharey=True), runs["varied"], strict=True):
        _scatter(axes, run)
    bottom.axes[0].set_ylabel("posterior entropy (nats)")


def _trajectory(axes: Any, title: str, found: dict[str, Any]) -> None:
    for symbol, color in enumerate(HUES):
        x, y = zip(*(snapshot[symbol] for snapshot in found["points"]), strict=True)
        axes.plot(x, y, color=color, linewidth=1.3, alpha=0.8)
        axes.plot(x[0], y[0], "o", color=color, markersize=3.5)
        axes.plot(x[-1], y[-1], "o", color=color, markersize=9, markeredgecolor="white", label=str(symbol))
    first, last = found["shares"][0], found["shares"][-1]
    plain_axes(
        axes, title, f"PC1   (the plane holds {first:.0%} of the variance\nat the start, {last:.0%} at the end)", "PC2"
    )
    axes.xaxis.label.set_fontsize(8)
    axes.yaxis.label.set_fontsize(8)
    axes.tick_params(labelsize=7.5)
    axes.margins(0.1)
    axes.set_aspect("equal", adjustable="datalim")


def _bars(row: Any, name: str, some: list[dict[str, Any]]) -> None:
    labels = ["before", *(run["arm"] for run in some)]
    for column, (axes, (key, title)) in enumerate(zip(row, BARS, strict=True)):
        found = [some[0]["measures"][key]["before"], *(run["measures"][key]["after"] for run in some)]
        bars(axes, labels, found, [COLORS[6], *COLORS])
        axes.set_title(title, loc="left", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.axvline(0, color="0.3", linewidth=0.8)
        if key.startswith("ring"):
            axes.axvline(2 / (SYMBOLS - 1), color="0.4", linestyle=":", linewidth=1)
        if column:
            axes.set_yticklabels([])
        else:
            axes.set_ylabel(name, fontsize=11)


def _scatter(axes: Any, run: dict[str, Any]) -> None:
    found = run["scatter"]
    axes.scatter(found["pc1"], found["entropy"], c=[HUES[z] for z in found["symbol"]], s=11, alpha=0.75, linewidths=0)
    r = run["measures"]["entropy/outputs/r"]
    plain_axes(
        axes,
        f"{run['arm']}: |r| {found['r']:.2f}",
        f"PC1   (all seeds: |r| {text(r['before'], 2)} before,\n{text(r['after'], 2)} after)",
    )
    axes.xaxis.label.set_fontsize(8.5)

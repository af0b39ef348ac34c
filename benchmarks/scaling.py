"""How the cost of the statistics grows with tokens, heads and batch, beside that of the attention itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from attnprobe.catalog import select
from attnprobe.statistics.streaming import measure
from benchmarks.attention import Attention
from benchmarks.options import described
from benchmarks.table import Row, Section
from benchmarks.timing import Spread, compare

OURS, SDPA = "measure(core)", "SDPA forward + backward"
LINEAR, QUADRATIC = 1.1, 2.0  # targets

ABOUT = f"""Exponents of the cost of `measure` with {described("core")} of causal attention, heads 64 wide, and of the
attention's own forward and backward pass: slopes of least-squares lines through the logarithms of median CPU times.
Linear growth is an exponent of 1; what is the same in every call makes it smaller, so the last
step stands beside it."""


@dataclass(frozen=True)
class Axis:
    """What is varied; where it is not, there are one sequence, one head and 512 tokens.

    Attributes:
        name: ``tokens``, ``heads`` or ``batch``.
        sizes: its values.
        target: largest exponent of the statistics' cost.
    """

    name: str
    sizes: Sequence[int]
    target: float

    def attention(self, size: int) -> Attention:
        shape = {"batch": 1, "heads": 1, "tokens": 512} | {self.name: size}
        return Attention(shape["batch"], shape["heads"], shape["tokens"])


AXES = (
    Axis("tokens", (256, 512, 1024, 2048, 4096, 8192), QUADRATIC),
    Axis("heads", (1, 2, 4, 8, 16), LINEAR),
    Axis("batch", (1, 2, 4, 8, 16), LINEAR),
)
SHORT_AXES = (
    Axis("tokens", (256, 1024), QUADRATIC),
    Axis("heads", (1, 4), LINEAR),
    Axis("batch", (1, 4), LINEAR),
)
Curves = Mapping[str, Sequence[float]]


def curves(axis: Axis, repeats: int) -> Curves:
    """Median CPU seconds per size, of the statistics and of the attention itself."""
    core = select("core")
    runs: dict[tuple[str, int], Any] = {}
    for size in axis.sizes:
        attention = axis.attention(size)
        runs[OURS, size] = partial(measure, attention.record(logsumexp=True), core)
        runs[SDPA, size] = attention.train
    compared = compare({f"{name} {size}": run for (name, size), run in runs.items()}, repeats)
    return {name: [compared.median(f"{name} {size}") for size in axis.sizes] for name in (OURS, SDPA)}


def exponent(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """Slope of the least-squares line through the logarithms."""
    x, y = torch.tensor(sizes).double().log(), torch.tensor(seconds).double().log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def draw(found: Mapping[Axis, Curves], path: Path) -> None:
    """One panel per axis."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

    matplotlib.use("agg")
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    panels = figure.subplots(1, len(found), sharey=True)
    for panel, (axis, both) in zip(panels, found.items(), strict=True):
        for (name, seconds), colour, marker in zip(both.items(), ("C0", "0.45"), "os", strict=True):
            slope = exponent(axis.sizes, seconds)
            label = f"{name}: {axis.name}$^{{{slope:.2f}}}$"
            panel.loglog(axis.sizes, [1e3 * second for second in seconds], color=colour, marker=marker, label=label)
        panel.set_xlabel(axis.name if axis.name == "tokens" else f"{axis.name} (512 tokens)")
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set_xticks(axis.sizes, [str(size) for size in axis.sizes])
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.grid(color="0.9")
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize=8, loc="upper left")
    panels[0].set_ylabel("CPU time of a call, ms")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def benchmark(short: bool, picture: Path | None = None) -> Iterator[Section]:
    """The exponents, and a picture of the curves if there is a place for it."""
    axes, repeats = (SHORT_AXES, 3) if short else (AXES, 5)
    found = {axis: curves(axis, repeats) for axis in axes}
    rows = []
    for axis, both in found.items():
        for name, seconds in both.items():
            slope = exponent(axis.sizes, seconds)
            target = axis.target if name == OURS and not short else None
            detail = described("core") if name == OURS else "none"
            label = f"{name}, {axis.name} {axis.sizes[0]} to {axis.sizes[-1]}"
            last = f"{exponent(axis.sizes[-2:], seconds[-2:]):.2f} from {axis.sizes[-2]} to {axis.sizes[-1]}"
            rows.append(Row(label, detail, Spread.of([slope]), "", target, note=last))
    if picture is not None:
        draw(found, picture)
    yield Section("Scaling", ABOUT, rows, images=[] if picture is None else [f"images/{picture.name}"])

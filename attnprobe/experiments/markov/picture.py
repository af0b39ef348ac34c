"""The picture of a set of Markov runs: losses, attention entropy, and the maps of the last probe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnprobe.experiments.markov.summary import NAMES
from attnprobe.experiments.markov.task import entropy_rate

if TYPE_CHECKING:
    from attnprobe.experiments.markov.run import Run

COLORS = {"sgd": "#0072B2", "em": "#D55E00"}


def draw(runs: list[Run], result: dict[str, Any], path: Path) -> Path | None:
    """Write a PNG to ``path``; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure: Any = Figure(figsize=(12, 7), layout="constrained")
    curves, maps = figure.subfigures(2, 1, height_ratios=(1, 1.1))
    _draw_curves(curves.subplots(1, 3), runs, result["protocol"])
    _draw_maps(maps, next((run for run in reversed(runs) if run.probes[-1].maps), runs[-1]))
    seeds = len(result["thresholds"])
    curves.suptitle(
        f"Sticky Markov task, {result['protocol']} protocol, T = {result['length']}, "
        f"{seeds} seed{'s' if seeds > 1 else ''}",
        x=0.01,
        ha="left",
        fontsize=13,
    )
    figure.savefig(path, dpi=110)
    return path


def _draw_curves(axes: Any, runs: list[Run], protocol: Any) -> None:
    loss, held_out, entropy = axes
    for run in runs:
        style = {"color": COLORS[run.schedule], "linewidth": 1.4, "alpha": 0.85}
        loss.plot(run.losses, label=NAMES[run.schedule] if run.seed == runs[0].seed else None, **style)
        held_out.plot(list(run.held_out), list(run.held_out.values()), **style)
        steps = [report.step for report in run.probes]
        entropy.plot(steps, [float(r["normalized_entropy"][0, 0]) for r in run.probes], marker=".", **style)
    titles = ("Training loss (nats)", "Held-out loss (nats)", "Attention entropy / ln n (1 = uniform)")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, loc="left", fontsize=11)
        axis.set_xlabel("step")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    lowest = entropy_rate(protocol)
    for axis in (loss, held_out):
        axis.axhline(lowest, color="0.4", linestyle=":", linewidth=1)
        axis.text(
            0.99, lowest, "lowest possible", transform=axis.get_yaxis_transform(), va="bottom", ha="right", size=8
        )
    loss.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 0.08), fontsize=9)


def _draw_maps(figure: Any, run: Run) -> None:
    """Attention relative to uniform, compatibility and advantage at the run's last probe."""
    from matplotlib.colors import LogNorm

    report = run.probes[-1]
    if not report.maps:
        return
    picture = report.maps[0]
    pixels = len(picture.attention)
    seen = (~picture.attention.isnan()).sum(1, keepdim=True)
    relative = picture.attention / (picture.attention.nan_to_num(0).sum(1, keepdim=True) / seen)
    axes = figure.subplots(1, 3)
    assert picture.compatibility is not None
    assert picture.advantage is not None
    panels = (relative, picture.compatibility, picture.advantage)
    titles = ("Attention / its row's mean", "Compatibility b", "Advantage A")
    for axis, title, values in zip(axes, titles, panels, strict=True):
        bound = float(values.abs().nan_to_num(0).max()) or 1.0
        if values is relative:
            bound = max(bound, float((1 / values).nan_to_num(0).max()), 1.01)
            scale: dict[str, Any] = {"norm": LogNorm(1 / bound, bound)}
        else:
            scale = {"vmin": -bound, "vmax": bound}
        image = axis.imshow(values.numpy(), cmap="PuOr_r", interpolation="nearest", **scale)
        axis.set_title(title, loc="left", fontsize=11)
        axis.set_xlabel("key")
        axis.set_ylabel("query")
        axis.set_xticks([0, pixels - 1], [])
        axis.set_yticks([0, pixels - 1], [])
        bar = figure.colorbar(image, ax=axis, shrink=0.9)
        if values is relative:
            bar.set_ticks([1 / bound, 1, bound], labels=[f"{1 / bound:.2g}", "1", f"{bound:.2g}"])
            bar.minorticks_off()
        else:
            bar.formatter.set_powerlimits((-2, 3))
    figure.suptitle(
        f"{NAMES[run.schedule]}, seed {run.seed}, step {report.step}: block means over the visible pairs",
        x=0.01,
        ha="left",
        fontsize=11,
    )

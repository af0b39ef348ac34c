"""The picture of a set of Markov runs: losses, attention entropy, and the maps of the last probe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attnprobe.experiments.ensemble.training import Course
from attnprobe.experiments.markov.task import entropy_rate
from attnprobe.report import HeadMap

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

#: So many arms can be told apart with their ranges.
FEW = 4


def draw(courses: list[Course], result: dict[str, Any], path: Path) -> Path | None:
    """Write a PNG to ``path``; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure: Any = Figure(figsize=(12, 7), layout="constrained")
    curves, maps = figure.subfigures(2, 1, height_ratios=(1, 1.1))
    axes = curves.subplots(1, 3)
    _draw_curves(axes, courses, result["protocol"])
    if len(courses) <= FEW:
        axes[0].legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 0.08), fontsize=9)
    else:
        handles = axes[0].get_legend_handles_labels()
        curves.legend(*handles, frameon=False, loc="outside lower center", ncols=5, fontsize=9)
    shown = next((course for course in courses if course.arm.name == "v10" and course.maps), courses[0])
    if shown.maps:
        where = f"{shown.arm.label}, seed {result['seeds'][0]}, step {shown.probe_steps[-1]:.0f}"
        _draw_maps(maps, shown.maps[0], where)
    seeds = len(result["seeds"])
    shown_of_seeds = "" if seeds == 1 else ": means, and the range over seeds" if len(courses) <= FEW else ": means"
    curves.suptitle(
        f"Sticky Markov task, {result['protocol']} protocol, T = {result['length']}, "
        f"{seeds} seed{'s' if seeds > 1 else ''}{shown_of_seeds}",
        x=0.01,
        ha="left",
        fontsize=13,
    )
    figure.savefig(path, dpi=110)
    return path


def _draw_curves(axes: Any, courses: list[Course], protocol: Any) -> None:
    loss, held_out, entropy = axes
    for index, course in enumerate(courses):
        style = {"color": COLORS[index % len(COLORS)], "linestyle": "-" if index < len(COLORS) else "--"}
        steps = range(len(course.losses))
        curves = (
            (loss, steps, course.losses),
            (held_out, course.held_steps, course.held_out),
            (entropy, course.probe_steps, course.statistics["normalized_entropy"][:, 0]),
        )
        for axis, x, values in curves:
            axis.plot(x, values.mean(1), linewidth=1.6, label=course.arm.label, **style)
            if len(courses) <= FEW:
                axis.fill_between(x, values.min(1), values.max(1), color=style["color"], alpha=0.15, linewidth=0)
    titles = ("Training loss (nats)", "Held-out loss (nats)", "Attention entropy / ln n (1 = uniform)")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, loc="left", fontsize=11)
        axis.set_xlabel("step")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    lowest = entropy_rate(protocol)
    for axis in (loss, held_out):
        bottom, top = axis.get_ylim()
        # What diverges or memorises leaves the picture.
        axis.set_ylim(max(min(bottom, lowest - 0.02), lowest - 0.15), min(top, 2.3))
        axis.axhline(lowest, color="0.4", linestyle=":", linewidth=1)
        axis.text(
            0.99, lowest, "lowest possible", transform=axis.get_yaxis_transform(), va="bottom", ha="right", size=8
        )


def _draw_maps(figure: Any, picture: HeadMap, where: str) -> None:
    """Attention relative to uniform, compatibility and advantage at the run's last probe."""
    from matplotlib.colors import LogNorm

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
            bound = max(bound, float((1 / values).nan_to_num(0, posinf=0).max()), 1.01)
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
    figure.suptitle(f"{where}: block means over the visible pairs", x=0.01, ha="left", fontsize=11)

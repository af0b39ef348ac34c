"""The picture of the toy: maps over time, the loss, and the paths of the values."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnprobe.errors import ConfigurationError
from attnprobe.experiments.toy_report import numbers, writing

if TYPE_CHECKING:
    from attnprobe.experiments.toy import Trajectory

#: Colours of the classes (Okabe and Ito's set, safe for colour-blind readers).
_CLASS_COLORS = ("#0072B2", "#D55E00", "#009E73")
_INK, _GREY = "#222222", "#8a8a8a"
_STYLE = {
    "font.size": 9.5,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "mathtext.fontset": "dejavusans",
    "axes.titlesize": 10.5,
    "axes.edgecolor": "#666666",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


def draw(result: Trajectory, path: Path) -> None:
    """Draw compatibility, advantage and attention over time, the loss and the paths of the values as one PNG.

    Raises:
        ConfigurationError: matplotlib is not installed.
        WriterError: ``path`` cannot be written.
    """
    try:
        import matplotlib.style
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigurationError(
            "drawing needs matplotlib, which is not installed: pip install 'attnprobe[plots]'"
        ) from error
    # Whatever style the user's session has, the picture looks the same.
    with matplotlib.style.context(["default", _STYLE]):
        figure: Any = Figure(figsize=(13, 2.65 * len(result.moments) + 1.9), layout="constrained")
        FigureCanvasAgg(figure)
        figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06)
        figure.suptitle(
            "Gradient descent on one attention head:  "
            r"$\partial L/\partial s_{ij}=-\alpha_{ij}A_{ij}$,   $\partial L/\partial v_j=\sum_i\alpha_{ij}u_i$",
            fontsize=13,
        )
        figure.supxlabel(
            "Queries: coloured by the class to predict.   Values: by the class that they argue for at the end.",
            fontsize=9,
            color="#555555",
        )
        maps, curves = figure.subfigures(1, 2, width_ratios=(1.7, 1), wspace=0.03)
        _draw_maps(maps, result)
        top, bottom = curves.subplots(2, 1, height_ratios=(1, 1.9))
        _draw_loss(top, result)
        _draw_values(bottom, result)
        with writing(path):
            figure.savefig(path, format="png", dpi=150, facecolor="white")


def _draw_maps(figure: Any, result: Trajectory) -> None:
    """Heat maps: a row for each moment, a column and one colour scale for each quantity."""
    columns = (
        (r"Compatibility  $b_{ij}=u_i\cdot v_j$", "< 0: reading $v_j$ lowers the loss", result.compatibility),
        (r"Advantage  $A_{ij}=E_i-b_{ij}$", "> 0: descent pushes $s_{ij}$ up", result.advantage),
        (r"Attention  $\alpha_{ij}$", "share of query $i$", result.attention),
    )
    tokens, last = range(len(result.targets)), len(result.moments) - 1
    grid = figure.subplots(len(result.moments), len(columns), squeeze=False)
    for column, (title, meaning, matrices) in enumerate(columns):
        bound = max(float(matrices[list(result.moments)].abs().max()), 1e-12)
        scale = {"cmap": "PuOr_r", "vmin": -bound, "vmax": bound}
        if matrices is result.attention:
            scale = {"cmap": "Blues", "vmin": 0, "vmax": 1}
        for row, index in enumerate(result.moments):
            axes = grid[row, column]
            image = axes.imshow(matrices[index].numpy(), **scale)
            _write_cells(axes, image, matrices[index])
            axes.set_xticks(tokens)
            axes.set_yticks(tokens)
            for label, target in zip(axes.get_yticklabels(), result.targets.tolist(), strict=True):
                label.set(color=_CLASS_COLORS[target], fontweight="bold")
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
            axes.set_title(title if row == 0 else "", pad=9)
            axes.set_xlabel("key $j$" if row == last else "")
            if column == 0:
                axes.set_ylabel("query $i$")
                header = {"xycoords": "axes fraction", "ha": "right", "va": "center", "rotation": 90}
                axes.annotate(_moment(result, index), (-0.22, 0.5), fontsize=10.5, fontweight="bold", **header)
        bar = figure.colorbar(image, ax=grid[:, column], location="bottom", aspect=28, pad=0.03, label=meaning)
        bar.outline.set_visible(False)
        bar.ax.locator_params(nbins=5)


def _moment(result: Trajectory, index: int) -> str:
    step = result.steps[index]
    if index == 0:
        return f"start (step {step})"
    return f"end (step {step})" if index == len(result.steps) - 1 else f"widest advantages (step {step})"


def _write_cells(axes: Any, image: Any, matrix: Tensor) -> None:
    """Each cell's value, in whichever of black and white stands out from its colour."""
    for i, row in enumerate(matrix.tolist()):
        for j, value in enumerate(row):
            red, green, blue, _ = image.cmap(image.norm(value))
            color = _INK if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"
            text = f"{value:.2f}" if abs(value) < 10 else f"{value:.3g}"
            text = "0.00" if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")
            axes.text(j, i, text, ha="center", va="center", fontsize=8.5, color=color)


def _draw_loss(axes: Any, result: Trajectory) -> None:
    axes.plot(range(len(result.loss)), result.loss.numpy(), color=_INK, linewidth=1.8)
    drawn = [result.steps[index] for index in result.moments]
    axes.plot(drawn, result.loss[drawn].numpy(), "o", color=_INK, markersize=6, clip_on=False)
    guess = numbers(result)["loss_of_class_frequencies"]
    axes.axhline(guess, color=_GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=0, label="class frequencies alone")
    axes.legend(loc="best")
    axes.set_ylim(0, 1.12 * float(result.loss.max()))
    axes.set_title("Loss, with the moments of the maps", pad=9)
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy (nats)")


def _draw_values(axes: Any, result: Trajectory) -> None:
    """Paths of the values in their plane, and the directions in which the readout finds the classes."""
    paths, readout = result.values, result.end.W_O
    radius = float(paths.norm(dim=2).max().clamp_min(1e-12))
    axes.axhline(0, color="#e4e4e4", linewidth=0.8, zorder=0)
    axes.axvline(0, color="#e4e4e4", linewidth=0.8, zorder=0)
    taken = [point / radius for point in paths[:: max(1, len(paths) // 50)].flatten(0, 1)]
    angles = torch.atan2(readout[1], readout[0]).tolist()
    for label, (angle, placed) in enumerate(zip(angles, _spread(angles, 0.25), strict=True)):
        color, tip = _CLASS_COLORS[label], 1.1 * torch.tensor([math.cos(angle), math.sin(angle)])
        body = {"width": 0.03 * radius, "head_width": 0.13 * radius, "length_includes_head": True}
        axes.arrow(0, 0, *(radius * tip).tolist(), color=color, alpha=0.3, linewidth=0, zorder=1, **body)
        name = torch.tensor([1.45 * math.cos(placed), 1.28 * math.sin(placed)])
        axes.text(*(radius * name).tolist(), f"class {label}", color=color, ha="center", va="center", weight="bold")
        taken += [tip * part / 8 for part in range(2, 9)] + [name]
    for j in range(paths.shape[1]):
        color = _CLASS_COLORS[int((paths[-1, j] @ readout).argmax())]
        axes.plot(*paths[:, j].T.numpy(), color=color, linewidth=1.6, zorder=2)
        axes.plot(*paths[0, j].tolist(), "o", markerfacecolor="white", color=color, markersize=5.5, zorder=3)
        axes.plot(*paths[-1, j].tolist(), "o", color=color, markersize=8, markeredgecolor="white", zorder=4)
        # The label goes where it keeps the largest distance from every path and every other label.
        turns = [2 * math.pi * turn / 16 for turn in range(16)]
        places = [paths[-1, j] / radius + 0.16 * torch.tensor([math.cos(turn), math.sin(turn)]) for turn in turns]
        place = max(places, key=lambda place: float((torch.stack(taken) - place).norm(dim=1).min()))
        axes.text(*(radius * place).tolist(), f"$v_{j}$", ha="center", va="center", fontsize=11, zorder=5)
        taken.append(place)
    axes.plot([], [], "o", markerfacecolor="white", color=_INK, markersize=5.5, label="start")
    axes.plot([], [], "o", color=_INK, markersize=7, label="end")
    axes.legend(loc="upper left", bbox_to_anchor=(0, 1.02), handletextpad=0.2, borderaxespad=0.2)
    axes.set(xlim=(-1.7 * radius, 1.7 * radius), ylim=(-1.6 * radius, 1.6 * radius), aspect="equal")
    axes.set_title("Values $v_j$ and the final readout directions of $W_O$", pad=9)
    axes.set_xlabel("value dimension 1")
    axes.set_ylabel("value dimension 2")


def _spread(angles: list[float], gap: float) -> list[float]:
    """``angles`` pushed apart until neighbours differ by at least ``gap``, as far as one sweep upwards does it."""
    placed = list(angles)
    order = sorted(range(len(angles)), key=angles.__getitem__)
    for below, above in itertools.pairwise(order):
        placed[above] = max(placed[above], placed[below] + gap)
    return placed

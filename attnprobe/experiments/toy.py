"""The paper's closed form on the smallest example: one head, five tokens, three classes, no autograd.

The gradients of cross-entropy through one softmax attention head (arXiv 2512.22473) are written out
by hand, so that the advantage-based routing law and the responsibility-weighted value update can be
read, trained with and drawn. Sizes: ``T`` tokens, ``N`` input width, ``D`` query and key width,
``E`` value width, ``C`` classes; vectors are rows, weight matrices are ``[in, out]``.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from attnprobe.errors import ConfigurationError, WriterError

#: The little task of ``train``: token ``i`` of five one-hot tokens is to be given this class.
TASK = (0, 0, 1, 1, 2)
CLASSES, KEY_WIDTH, VALUE_WIDTH = 3, 2, 2
#: Standard deviation of the initial weights.
INIT_STD = 0.5


@dataclass(frozen=True, eq=False)
class Parameters:
    """Input and weights of the head: ``q = x W_Q``, ``k = x W_K``, ``v = x W_V``, ``logits = o W_O``.

    Attributes:
        x: ``[T, N]``.
        W_Q, W_K: ``[N, D]``.
        W_V: ``[N, E]``.
        W_O: ``[E, C]``, the readout.
    """

    x: Tensor
    W_Q: Tensor
    W_K: Tensor
    W_V: Tensor
    W_O: Tensor

    def __post_init__(self) -> None:
        shapes = {name: tuple(tensor.shape) for name, tensor in vars(self).items()}
        fits = (
            all(len(shape) == 2 and 0 not in shape for shape in shapes.values())
            and self.x.shape[1] == self.W_Q.shape[0] == self.W_K.shape[0] == self.W_V.shape[0]
            and self.W_Q.shape[1] == self.W_K.shape[1]
            and self.W_V.shape[1] == self.W_O.shape[0]
        )
        if not fits:
            raise ConfigurationError(
                "shapes do not fit together: expected x [T, N], W_Q and W_K [N, D], W_V [N, E], W_O [E, C]; "
                f"got {', '.join(f'{name} {list(shape)}' for name, shape in shapes.items())}"
            )


@dataclass(frozen=True, eq=False)
class LossWeights:
    """How the positions add up to one loss; the same meanings as in ``torch.nn.functional.cross_entropy``.

    Attributes:
        reduction: ``"mean"`` over the targets that are not ignored (by class weight), or ``"sum"``.
        ignore_index: a target with this value has no loss.
        class_weights: ``[C]``, or None for equal weights.
        label_smoothing: share of every target that is spread evenly over the classes.
    """

    reduction: Literal["mean", "sum"] = "mean"
    ignore_index: int = -100
    class_weights: Tensor | None = None
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.reduction not in ("mean", "sum"):
            raise ConfigurationError(f"reduction must be 'mean' or 'sum', got {self.reduction!r}")
        if not 0 <= self.label_smoothing <= 1:
            raise ConfigurationError(f"label_smoothing must lie in [0, 1], got {self.label_smoothing}")

    def resolve(self, targets: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Target distributions ``[T, C]`` and loss weights ``w`` ``[T]`` for logits ``like`` ``[T, C]``.

        Raises:
            ConfigurationError: targets or class weights do not fit, or a mean has nothing to average over.
        """
        tokens, classes = like.shape
        if targets.shape != (tokens,) or targets.is_floating_point():
            raise ConfigurationError(
                f"targets must be one class index for each of the {tokens} tokens, shape [{tokens}]; "
                f"got shape {list(targets.shape)} of {targets.dtype}"
            )
        valid = targets != self.ignore_index
        if ((targets < 0) | (targets >= classes))[valid].any():
            raise ConfigurationError(
                f"targets must be 0 to {classes - 1} or ignore_index={self.ignore_index}, got {targets.tolist()}"
            )
        by_class = like.new_ones(classes) if self.class_weights is None else self.class_weights.to(like)
        if by_class.shape != (classes,) or not ((by_class >= 0) & by_class.isfinite()).all():
            raise ConfigurationError(
                f"class_weights must be {classes} finite numbers >= 0, one for each class, got {by_class.tolist()}"
            )
        hard = torch.nn.functional.one_hot(targets.where(valid, 0), classes).to(like) * valid[:, None]
        # Smoothing spreads before the class weights act, as in torch; the mean divides by the labels' weights only.
        smooth = valid[:, None].to(like) / classes
        mass = ((1 - self.label_smoothing) * hard + self.label_smoothing * smooth) * by_class
        if self.reduction == "mean":
            total = (hard * by_class).sum()
            if total == 0:
                raise ConfigurationError("the mean loss is undefined: every target is ignored or has class weight 0")
            mass = mass / total
        weights = mass.sum(1)
        return (mass / weights[:, None]).nan_to_num(0.0), weights


@dataclass(frozen=True, eq=False)
class Forward:
    """Everything that the forward pass computed.

    Attributes:
        query, key: ``[T, D]``.
        value: ``[T, E]``.
        scores: ``[T, T]``, ``scale * query @ key^T``; -inf where masked.
        attention: ``[T, T]``, alpha.
        output: ``[T, E]``, ``o = alpha v``.
        logits, probabilities: ``[T, C]``.
        target: ``[T, C]``, the distribution that each position should predict; zeros where ignored.
        weights: ``[T]``, the loss weight ``w_i`` of each position.
        loss: scalar, ``-sum_i w_i sum_c target_ic ln p_ic``.
        scale: ``1 / sqrt(D)``.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scores: Tensor
    attention: Tensor
    output: Tensor
    logits: Tensor
    probabilities: Tensor
    target: Tensor
    weights: Tensor
    loss: Tensor
    scale: float


def forward(
    params: Parameters, targets: Tensor, weights: LossWeights | None = None, *, causal: bool = False
) -> Forward:
    """One pass through the head with cross-entropy at every position.

    Args:
        params: input and weights.
        targets: ``[T]`` class indices.
        weights: how positions are weighted; None is the mean over all of them.
        causal: token ``i`` sees tokens ``j <= i`` only.
    """
    query, key, value = params.x @ params.W_Q, params.x @ params.W_K, params.x @ params.W_V
    scale = 1 / math.sqrt(query.shape[1])
    scores = scale * query @ key.T
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    # On so few numbers torch.softmax mostly waits for its threads.
    attention = (scores - scores.logsumexp(1, keepdim=True)).exp()
    output = attention @ value
    logits = output @ params.W_O
    target, loss_weights = (weights or LossWeights()).resolve(targets, logits)
    log_p = logits - logits.logsumexp(1, keepdim=True)
    loss = -(loss_weights[:, None] * target * log_p).sum()
    return Forward(
        query, key, value, scores, attention, output, logits, log_p.exp(), target, loss_weights, loss, scale
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Gradients:
    """Gradients of the loss, derived by hand, and what the routing law is made of.

    Attributes:
        error: ``[T, E]``, ``u_i = dL/do_i``.
        compatibility: ``[T, T]``, ``b_ij = u_i . v_j``.
        expected: ``[T]``, ``E_i = sum_j alpha_ij b_ij``.
        advantage: ``[T, T]``, ``A_ij = E_i - b_ij``: gradient descent raises ``s_ij`` where it is positive.
        scores: ``[T, T]``, ``dL/ds_ij = alpha_ij (b_ij - E_i)``; 0 where masked.
        query, key, value: like the tensors that they belong to; ``dL/dv_j = sum_i alpha_ij u_i``.
        W_Q, W_K, W_V, W_O, x: like the parameters.
    """

    error: Tensor
    compatibility: Tensor
    expected: Tensor
    advantage: Tensor
    scores: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    W_Q: Tensor
    W_K: Tensor
    W_V: Tensor
    W_O: Tensor
    x: Tensor


def gradients(params: Parameters, state: Forward) -> Gradients:
    """The gradients at ``state``, which ``forward`` computed from ``params``."""
    delta = state.weights[:, None] * (state.probabilities - state.target)
    error = delta @ params.W_O.T
    compatibility = error @ state.value.T
    expected = (state.attention * compatibility).sum(1)
    advantage = expected[:, None] - compatibility
    scores = -state.attention * advantage
    query = state.scale * scores @ state.key
    key = state.scale * scores.T @ state.query
    value = state.attention.T @ error
    return Gradients(
        error=error,
        compatibility=compatibility,
        expected=expected,
        advantage=advantage,
        scores=scores,
        query=query,
        key=key,
        value=value,
        W_Q=params.x.T @ query,
        W_K=params.x.T @ key,
        W_V=params.x.T @ value,
        W_O=state.output.T @ delta,
        x=query @ params.W_Q.T + key @ params.W_K.T + value @ params.W_V.T,
    )


@dataclass(frozen=True, eq=False)
class Trajectory:
    """A training run: ``n`` recorded steps, step ``k`` being the state after ``k`` updates.

    Attributes:
        lr, seed: what the run was started with.
        targets: ``[T]``.
        loss: ``[steps + 1]``, mean cross-entropy before each update and after the last, in nats.
        followed: ``[steps]``, share of the score entries whose change in that update has the sign of their advantage.
        steps: the recorded steps; the first and the last are always among them.
        attention, compatibility, advantage: ``[n, T, T]``.
        values: ``[n, T, E]``.
        error: ``[n, T, E]``.
        probabilities: ``[n, T, C]``.
        start, end: the parameters.
    """

    lr: float
    seed: int
    targets: Tensor
    loss: Tensor
    followed: Tensor
    steps: tuple[int, ...]
    attention: Tensor
    compatibility: Tensor
    advantage: Tensor
    values: Tensor
    error: Tensor
    probabilities: Tensor
    start: Parameters
    end: Parameters

    @property
    def advantage_std(self) -> Tensor:
        """``[n]``, spread of the advantages under attention: sqrt(mean_i sum_j alpha_ij A_ij^2)."""
        return (self.attention * self.advantage**2).sum(2).mean(1).sqrt()

    @property
    def normalized_entropy(self) -> Tensor:
        """``[n]``, mean entropy of the attention rows relative to uniform attention."""
        entropy: Tensor = torch.special.entr(self.attention).sum(2).mean(1)
        return entropy / math.log(self.attention.shape[2])

    @property
    def moments(self) -> tuple[int, ...]:
        """Indices of the first record, the one with the largest advantage spread and the last, without repeats."""
        return tuple(sorted({0, int(self.advantage_std.argmax()), len(self.steps) - 1}))


def train(steps: int = 200, lr: float = 0.5, seed: int = 0, *, every: int = 1) -> Trajectory:
    """Plain gradient descent with the hand-derived gradients on five one-hot tokens, in float64.

    Args:
        steps: number of updates.
        lr: learning rate of W_Q, W_K, W_V and W_O alike.
        seed: of the initial weights; the task is always the same, and torch's global generator is not touched.
        every: record each ``every``-th step; the first and the last always.

    Raises:
        ConfigurationError: an option that cannot work, or a learning rate at which the loss is no longer finite.
    """
    if steps < 1 or every < 1:
        raise ConfigurationError(f"steps and every must be at least 1, got steps={steps}, every={every}")
    if not (math.isfinite(lr) and lr > 0):
        raise ConfigurationError(f"lr must be positive and finite, got lr={lr}")
    targets = torch.tensor(TASK)
    tokens = len(TASK)
    generator = torch.Generator().manual_seed(seed)
    shapes = [(tokens, KEY_WIDTH), (tokens, KEY_WIDTH), (tokens, VALUE_WIDTH), (VALUE_WIDTH, CLASSES)]
    weights = [INIT_STD * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    start = params = Parameters(torch.eye(tokens, dtype=torch.float64), *weights)
    records: list[tuple[int, Parameters, Forward, Gradients]] = []
    loss, followed = [], []
    state = forward(params, targets)
    for step in range(steps + 1):
        gradient = gradients(params, state)
        loss.append(state.loss)
        if step % every == 0 or step == steps:
            records.append((step, params, state, gradient))
        if step == steps:
            break
        moved = {name: getattr(params, name) - lr * getattr(gradient, name) for name in ("W_Q", "W_K", "W_V", "W_O")}
        params = replace(params, **moved)
        before, state = state, forward(params, targets)
        if not state.loss.isfinite():
            raise ConfigurationError(f"the loss is {state.loss} after {step + 1} steps at lr={lr}: use a smaller lr")
        same_sign = (state.scores - before.scores).sign() == gradient.advantage.sign()
        followed.append(same_sign.double().mean())
    return Trajectory(
        lr=lr,
        seed=seed,
        targets=targets,
        loss=torch.stack(loss),
        followed=torch.stack(followed),
        steps=tuple(step for step, *_ in records),
        attention=torch.stack([state.attention for _, _, state, _ in records]),
        compatibility=torch.stack([gradient.compatibility for *_, gradient in records]),
        advantage=torch.stack([gradient.advantage for *_, gradient in records]),
        error=torch.stack([gradient.error for *_, gradient in records]),
        values=torch.stack([state.value for _, _, state, _ in records]),
        probabilities=torch.stack([state.probabilities for _, _, state, _ in records]),
        start=start,
        end=params,
    )


def _numbers(result: Trajectory) -> dict[str, Any]:
    """The scalars of summary and JSON; None where the error has vanished altogether."""
    spread, entropy = result.advantage_std, result.normalized_entropy
    correct = (result.probabilities.argmax(2) == result.targets).sum(1)
    share = result.targets.bincount().double() / len(result.targets)
    peak = int(spread.argmax())
    relative = spread / (result.error.square().sum(2).mean(1) * result.values.square().sum(2).mean(1)).sqrt()
    followed = result.followed
    return {
        "loss": [float(result.loss[0]), float(result.loss[-1])],
        "loss_of_class_frequencies": float(torch.special.entr(share).sum()),
        "correct": [int(correct[0]), int(correct[-1])],
        "normalized_entropy": [float(entropy[0]), float(entropy[-1])],
        "advantage_std": [float(spread[0]), float(spread[-1])],
        "advantage_std_largest": {"step": result.steps[peak], "value": float(spread[peak])},
        "relative_advantage_std": [value if math.isfinite(value) else None for value in relative[[0, -1]].tolist()],
        "score_changes_with_sign_of_advantage": {
            "first_step": float(followed[0]),
            "mean": float(followed.mean()),
            "min": float(followed.min()),
            "max": float(followed.max()),
        },
    }


def summary(result: Trajectory) -> str:
    """What was computed, as a few lines of text: arrows lead from the first to the last step."""
    found, tokens = _numbers(result), len(result.targets)

    def change(name: str) -> str:
        return " -> ".join("undefined" if value is None else f"{value:.4g}" for value in found[name])

    largest, follow = found["advantage_std_largest"], found["score_changes_with_sign_of_advantage"]
    guess = found["loss_of_class_frequencies"]
    lines = (
        f"One attention head, {tokens} tokens, gradients derived by hand: "
        f"{result.steps[-1]} steps at lr {result.lr:g}, seed {result.seed}",
        f"  loss                 {change('loss')} nats (class frequencies alone: {guess:.4g})",
        f"  correct tokens       {change('correct')} of {tokens}",
        f"  normalized entropy   {change('normalized_entropy')}",
        f"  advantage spread     {change('advantage_std')}, largest {largest['value']:.4g} at step {largest['step']}",
        f"  relative to |u| |v|  {change('relative_advantage_std')}",
        f"  score changes with the sign of their advantage: {follow['first_step']:.0%} in the first step, "
        f"{follow['mean']:.0%} on average ({follow['min']:.0%} to {follow['max']:.0%})",
        "  (the law is exact for free scores; here scores move together through W_Q and W_K)",
    )
    return "\n".join(lines)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise WriterError(
            f"cannot write {path}: {error.strerror or error}; choose a file in a writable folder"
        ) from error


def write_json(result: Trajectory, path: Path) -> None:
    """Write the numbers behind the picture: the summary, curves, and matrices at the drawn moments.

    Raises:
        WriterError: ``path`` cannot be written.
    """
    matrices = {name: getattr(result, name) for name in ("attention", "compatibility", "advantage", "values")}
    data = {
        "steps": result.steps[-1],
        "lr": result.lr,
        "seed": result.seed,
        "targets": result.targets.tolist(),
        "summary": _numbers(result),
        "loss": result.loss.tolist(),
        "score_changes_with_sign_of_advantage": result.followed.tolist(),
        "recorded_steps": list(result.steps),
        "advantage_std": result.advantage_std.tolist(),
        "normalized_entropy": result.normalized_entropy.tolist(),
        "moments": [
            {"step": result.steps[index]} | {name: tensor[index].tolist() for name, tensor in matrices.items()}
            for index in result.moments
        ],
        "readout": {"start": result.start.W_O.tolist(), "end": result.end.W_O.tolist()},
    }
    with _writing(path):
        path.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")


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
        with _writing(path):
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
    guess = _numbers(result)["loss_of_class_frequencies"]
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


def run(path: Path, *, steps: int = 200, lr: float = 0.5, seed: int = 0) -> str:
    """Train the toy, draw it to ``path`` (a .png), write its numbers beside it (.json), and return a summary."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ConfigurationError(f"the picture's path must end in .png, got {path}")
    result = train(steps, lr, seed)
    draw(result, path)
    write_json(result, path.with_suffix(".json"))
    return f"{summary(result)}\nwrote {path} and {path.with_suffix('.json')}"

"""The paper's closed form on the smallest example: one head, five tokens, three classes, no autograd.

The gradients of cross-entropy through one softmax attention head (arXiv 2512.22473) are written out
by hand, so that the advantage-based routing law and the responsibility-weighted value update can be
read, trained with and drawn. Sizes: ``T`` tokens, ``N`` input width, ``D`` query and key width,
``E`` value width, ``C`` classes; vectors are rows, weight matrices are ``[in, out]``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from attnprobe.errors import ConfigurationError
from attnprobe.experiments.toy_figure import draw
from attnprobe.experiments.toy_report import summary, write_json

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


def run(path: Path, *, steps: int = 200, lr: float = 0.5, seed: int = 0) -> str:
    """Train the toy, draw it to ``path`` (a .png), write its numbers beside it (.json), and return a summary."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ConfigurationError(f"the picture's path must end in .png, got {path}")
    result = train(steps, lr, seed)
    draw(result, path)
    write_json(result, path.with_suffix(".json"))
    return f"{summary(result)}\nwrote {path} and {path.with_suffix('.json')}"

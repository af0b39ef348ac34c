"""Cross-entropy and its gradient by hand: ``delta_i = w_i (p_i - target_i)``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from attnprobe.errors import ConfigurationError


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
        """Target distributions ``[..., T, C]`` and loss weights ``w`` ``[..., T]`` for logits ``like`` ``[..., T, C]``.

        Raises:
            ConfigurationError: targets or class weights do not fit, or a mean has nothing to average over.
        """
        *tokens, classes = like.shape
        if list(targets.shape) != tokens or targets.is_floating_point():
            raise ConfigurationError(
                f"targets must be one class index for each token, shape {tokens}; "
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
        valid_row = valid[..., None]
        hard = torch.nn.functional.one_hot(targets.where(valid, 0), classes).to(like) * valid_row
        # Smoothing spreads before the class weights act, as in torch; the mean divides by the labels' weights only.
        smooth = valid_row.to(like) / classes
        mass = ((1 - self.label_smoothing) * hard + self.label_smoothing * smooth) * by_class
        if self.reduction == "mean":
            total = (hard * by_class).sum()
            if total == 0:
                raise ConfigurationError("the mean loss is undefined: every target is ignored or has class weight 0")
            mass = mass / total
        weights = mass.sum(-1)
        return (mass / weights[..., None]).nan_to_num(0.0), weights


@dataclass(frozen=True, eq=False)
class CrossEntropy:
    """The loss and its gradient with respect to the logits.

    Attributes:
        loss: scalar, ``-sum_i w_i sum_c target_ic ln p_ic``.
        probabilities: ``[..., T, C]``.
        target: ``[..., T, C]``, the distribution that each position should predict; zeros where ignored.
        weights: ``[..., T]``, the loss weight ``w_i`` of each position.
        delta: ``[..., T, C]``, ``dL/dlogits``.
    """

    loss: Tensor
    probabilities: Tensor
    target: Tensor
    weights: Tensor
    delta: Tensor


def cross_entropy(logits: Tensor, targets: Tensor, weights: LossWeights | None = None) -> CrossEntropy:
    """Cross-entropy at every position.

    Args:
        logits: ``[..., T, C]``.
        targets: ``[..., T]`` class indices.
        weights: how positions are weighted; None is the mean over all of them.
    """
    target, position = (weights or LossWeights()).resolve(targets, logits)
    log_p = logits - logits.logsumexp(-1, keepdim=True)
    loss = -(position[..., None] * target * log_p).sum()
    probabilities = log_p.exp()
    return CrossEntropy(loss, probabilities, target, position, position[..., None] * (probabilities - target))

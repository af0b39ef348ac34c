"""One row of the matrix: a model, what to feed it, and which attention calls it makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Variant:
    """A model family in one attention implementation, small and with random weights.

    Attributes:
        name: ``"gpt2-sdpa"``; unique.
        library: ``"torch"``, ``"transformers"``, ``"timm"``, ``"torchvision"``, ``"x-transformers"``.
        kind: how attention is computed: ``"sdpa"``, ``"softmax"``, ``"flex"``, ``"multihead"``, ``"registered"``.
        make: builds the model in float32 and training mode; the argument is the attention dropout.
        batch: a batch made from a seed; floating-point inputs are cast to the model's dtype by whoever runs it.
        loss: runs the model on a batch and returns the scalar loss.
        layers: expected rows of the report, in order of first sight, with their number of heads.
        checkpoint: turns on activation checkpointing (``model, use_reentrant``), None where the model has no such
            thing; may replace submodules by wrappers.
        dropout: whether ``make`` obeys its argument.
        double: whether the model's own attention arithmetic is float64 after ``model.double()``.
        generate: runs inference (``generate()`` or the like) on a batch, None where the model has no such thing.
        padded: whether the batch holds padding that the model masks.
    """

    name: str
    library: str
    kind: str
    make: Callable[[float], nn.Module]
    batch: Callable[[int], Batch]
    loss: Callable[[nn.Module, Batch], Tensor]
    layers: Mapping[str, int]
    checkpoint: Callable[[nn.Module, bool], object] | None = None
    dropout: bool = True
    double: bool = True
    generate: Callable[[nn.Module, Batch], object] | None = None
    padded: bool = False

"""One column of the matrix: what is special about the model, its training or the probes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tests.matrix.variant import Variant

if TYPE_CHECKING:
    from attnprobe import AttentionRecord
    from tests.matrix.compiling import Backend
    from tests.matrix.spy import Spy
    from tests.matrix.training import Cell, History

#: Rows that a report must have, with their number of heads; 0 for a row that cannot be measured.
Rows = Mapping[str, int]


def _as_it_is(variant: Variant, model: nn.Module) -> nn.Module:
    return model


def _each_model(models: Sequence[nn.Module], rows: Rows) -> list[tuple[nn.Module, Rows]]:
    return [(model, rows) for model in models]


@dataclass(frozen=True)
class Condition:
    """How a cell differs from plain training in float32.

    Attributes:
        name: ``"checkpoint"``; unique.
        meaning: one sentence for the table.
        applies: to which variants.
        always: whether every variant has to pass it.
        tried_on: how many variants, one of every library and kind before a second; the time for more is missing.
        dtype: of the model.
        dropout: on the attention weights.
        autocast: whether the forward pass runs under bfloat16 autocast.
        micro_batches: how many make a step.
        number: how many models are trained at once.
        backend: what compiles the model; then the reference too runs eagerly on the probed steps.
        tapped: whether probed steps run compiled too, in both.
        prepare: changes a model after it was made; gives what is trained.
        late: changes a model after the probes were attached.
        rows: the expected rows.
        watched: what gets a probe, and the rows of its report.
        before: called at the beginning of every step, in every run.
        between: called between the forward and the backward pass, in every run.
        evaluate: whether every step begins with ``probe.evaluate`` on its batch.
        warns: regular expression of the warning that the probe must give.
        verify: what else must hold of the watched run and the records of its first step; gives what does not.
    """

    name: str
    meaning: str
    applies: Callable[[Variant], bool] = lambda variant: True
    always: bool = False
    tried_on: int = 16
    dtype: torch.dtype = torch.float32
    dropout: float = 0.0
    autocast: bool = False
    micro_batches: int = 1
    number: int = 1
    backend: Backend | None = None
    tapped: bool = False
    prepare: Callable[[Variant, nn.Module], nn.Module] = _as_it_is
    late: Callable[[nn.Module], nn.Module] = lambda model: model
    rows: Callable[[Variant], Rows] = lambda variant: variant.layers
    watched: Callable[[Sequence[nn.Module], Rows], list[tuple[nn.Module, Rows]]] = _each_model
    before: Callable[[Cell, Any, History], None] = lambda cell, batch, history: None
    between: Callable[[Cell, Any, History], None] = lambda cell, batch, history: None
    evaluate: bool = False
    warns: str = ""
    verify: Callable[[Cell, History, list[AttentionRecord], Spy], list[str]] = lambda cell, history, records, spy: []

"""A batch that stays the same: how far attention and values moved on it from one probe to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from attnprobe.capture.session import Seen, Session
from attnprobe.preserve import preserved
from attnprobe.record import AttentionRecord
from attnprobe.statistics.displacement import displacement
from attnprobe.statistics.reduce import Partial

#: What a reference batch serves.
REFERENCE_STATISTICS = ("attention_displacement", "value_displacement")


class Reference:
    """Runs the model on one batch, in evaluation mode, and compares with the last time.

    Args:
        model: the watched model; left as it was.
        batch: a tensor, a tuple or a mapping for ``model(...)``, or a function that runs the forward pass.
        layers: glob patterns of module names.
    """

    def __init__(self, model: nn.Module, batch: Any, layers: Iterable[str] = ("*",)) -> None:
        self.model, self.batch, self.layers = model, batch, tuple(layers)
        self._earlier: dict[str, AttentionRecord] = {}

    def look(self, by_layer: Callable[[list[Seen]], dict[str, list[Seen]]]) -> dict[str, Partial]:
        """Partial results of the displacements by layer; empty the first time.

        Args:
            by_layer: how calls are named as layers.
        """
        session = Session(self.model, _without_output, layers=self.layers, forward_only=True, strict=True)
        with preserved(self.model), torch.no_grad():
            self.model.eval()
            session.start()
            try:
                _run(self.model, self.batch)
            finally:
                session.stop()
        now = {layer: calls[0].result for layer, calls in by_layer(session.seen).items()}
        moved = {layer: displacement(now[layer], old) for layer, old in self._earlier.items() if layer in now}
        self._earlier = now
        return moved


def _without_output(module: str, record: AttentionRecord) -> AttentionRecord:
    return replace(record, output=None)


def _run(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Tensor):
        model(batch)
    elif isinstance(batch, Mapping):
        model(**batch)
    elif callable(batch):
        batch()
    else:
        model(*batch)

"""Which entries of a parameter make the values: all of them, or a stretch of every period along one axis.

With one period that is a block, the last third of ``c_attn`` or the last ``G * E`` rows of a grouped ``qkv_proj``; with
one period per head it is the interleaved ``[H, 3, E]`` of ``query_key_value``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from torch import Tensor, nn


@dataclass(frozen=True)
class Stretch:
    """``start`` to ``start + length`` of each of the equal ``periods`` into which ``axis`` is divided."""

    axis: int
    periods: int
    start: int
    length: int

    def view(self, tensor: Tensor) -> Tensor:
        """The entries, as a view."""
        if self.periods == 1:
            return tensor.narrow(self.axis, self.start, self.length)
        divided: Tensor = tensor.unflatten(self.axis, (self.periods, -1))
        return divided.narrow(self.axis + 1, self.start, self.length)

    def __str__(self) -> str:
        block = f"{self.start}:{self.start + self.length}"
        if self.periods == 1:
            return f"[{':, ' * self.axis}{block}]"
        return f".unflatten({self.axis}, ({self.periods}, -1))[{':, ' * (self.axis + 1)}{block}]"


@dataclass(frozen=True, eq=False)
class ValuePart:
    """The value entries of one parameter.

    Attributes:
        name: the parameter's full name.
        parameter: the parameter.
        stretch: where in it the entries are; None for all of it.
    """

    name: str
    parameter: nn.Parameter
    stretch: Stretch | None = None

    def view(self) -> Tensor:
        """The entries, as a view that an optimizer's step is seen through."""
        tensor: Tensor = self.parameter.detach()
        return tensor if self.stretch is None else self.stretch.view(tensor)

    def __str__(self) -> str:
        return self.name + ("" if self.stretch is None else str(self.stretch))


def stretch_of(marked: Sequence[bool], axis: int) -> Stretch | None:
    """The stretch that covers exactly the marked indices, None where they do not repeat evenly or there are none."""
    runs: list[tuple[int, int]] = []  # start and length
    at = 0
    for value, same in groupby(marked):
        length = sum(1 for _ in same)
        if value:
            runs.append((at, length))
        at += length
    if not runs or len(marked) % len(runs):
        return None
    period = len(marked) // len(runs)
    start, length = runs[0]
    if any(run != (i * period + start, length) for i, run in enumerate(runs)) or start + length > period:
        return None
    return Stretch(axis, len(runs), start, length)

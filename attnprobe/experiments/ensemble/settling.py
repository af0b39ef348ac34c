"""When attention and values settle: how far they still are from where they end."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Settling:
    """Snapshots of some tensors over a training, and when each was 90% of the way to its last one."""

    def __init__(self, look: Callable[[], dict[str, Tensor]]) -> None:
        """``look`` gives the tensors, of which the first dimension is the seeds'."""
        self.look = look
        self.steps: list[int] = []
        self._snapshots: dict[str, list[Tensor]] = {}

    @torch.no_grad()
    def snap(self, step: int) -> None:
        """Keep what is there now."""
        self.steps.append(step)
        for name, tensor in self.look().items():
            self._snapshots.setdefault(name, []).append(tensor.detach().clone())

    def remaining(self, name: str) -> NDArray[np.float64]:
        """``[n, S]``: distance to the last snapshot, relative to that of the first; 1 at the start, 0 at the end.

        NaN for a seed in which nothing moved.
        """
        snapshots = self._snapshots[name]
        last = snapshots[-1]
        distances = torch.stack([(snapshot - last).flatten(1).double().norm(dim=1) for snapshot in snapshots])
        return (distances / distances[0]).numpy()

    def settled(self, name: str, left: float = 0.1) -> list[float | None]:
        """For each seed the step from which on no more than so much of the way is left."""
        return [settled(self.steps, column, left) for column in self.remaining(name).T]


def settled(steps: Sequence[int], remaining: NDArray[np.float64], left: float = 0.1) -> float | None:
    """The first of ``steps`` from which on ``remaining`` stays at or below ``left``.

    None where it is NaN, and where it is there in the last snapshot only, which is at 0 by definition: still moving.
    """
    if not np.isfinite(remaining).all():
        return None
    above = np.flatnonzero(remaining > left)
    if above.size and above[-1] >= len(steps) - 2:
        return None
    return float(steps[above[-1] + 1]) if above.size else float(steps[0])

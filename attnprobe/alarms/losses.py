"""Is the loss getting anywhere? The losses of the probed steps, in bounded memory."""

from __future__ import annotations

import math
from collections import deque
from numbers import Real
from statistics import median
from typing import Any

from attnprobe.errors import ConfigurationError

#: Probed losses on either side of the trend's comparison.
WINDOW = 10
#: Losses without which the average says nothing.
ENOUGH = 5
#: Memory of the average.
DECAY = 0.9
#: An average below this share of the uninformed loss, or of the first losses where that is unknown, is progress.
INFORMED = 0.98
#: A fall of the mean loss counts from this many standard errors.
CLEAR = 3.0
#: A fall of the mean loss counts from this share of the first losses.
MATERIAL = 0.01
#: An average above this share of the first loss is that of a run that diverged.
DIVERGED = 2.0
#: Losses on either side of the short comparison.
LATELY = 5


class LossHistory:
    """Average, trend and progress of the loss; losses that are not finite are left out.

    Args:
        uninformed: loss of a model that knows nothing of the input, for example the entropy of
            the targets in nats; None where unknown.
    """

    def __init__(self, uninformed: float | None = None) -> None:
        if uninformed is not None and not (isinstance(uninformed, Real) and 0 < uninformed < math.inf):
            raise ConfigurationError(f"uninformed_loss must be a positive, finite number, not {uninformed!r}")
        self.uninformed = uninformed
        self.recent: deque[tuple[int, float]] = deque(maxlen=2 * WINDOW)
        self._first: list[float] = []
        self._sum = self._weight = 0.0

    def observe(self, step: int, loss: float) -> None:
        if not math.isfinite(loss):
            return
        self.recent.append((step, loss))
        self._sum = DECAY * self._sum + (1 - DECAY) * loss
        self._weight = DECAY * self._weight + (1 - DECAY)
        if len(self._first) < ENOUGH:
            self._first.append(loss)

    def average(self) -> float | None:
        """Exponential average, None while there are too few losses.

        Divided by the weights so far: a bad first loss would otherwise count for a third after ten probes.
        """
        return self._sum / self._weight if len(self.recent) >= ENOUGH else None

    def trend(self) -> float | None:
        """By how many standard errors the mean loss fell from one window to the next.

        Windows are halves of the last twenty losses, or of what there is of them; None while that is less than ten.
        A fall by less than a hundredth of the first losses is none, however clear.
        """
        losses = [loss for _, loss in self.recent]
        half = len(losses) // 2
        if half < ENOUGH:
            return None
        (before, error_before), (last, error_last) = map(_mean_and_error, (losses[:half], losses[half:]))
        fall, error = before - last, math.hypot(error_before, error_last)
        if 0 < fall < MATERIAL * abs(median(self._first)):
            return 0.0
        if error == 0:
            return math.copysign(math.inf, fall) if fall else 0.0
        return fall / error

    def falling(self) -> bool | None:
        """Whether the loss clearly falls, and not from where a run went that diverged; None while that is unknown."""
        average, trend = self.average(), self.trend()
        if average is None or trend is None:
            return None
        diverged = average > DIVERGED * self._first[0] > 0
        return trend >= CLEAR and not diverged

    def progress(self) -> bool | None:
        """Whether the loss shows that the model has learned or is learning; None while that is unknown."""
        average, falling = self.average(), self.falling()
        if self.uninformed is not None:
            return None if average is None else average < INFORMED * self.uninformed
        if average is None or falling is None:
            return None
        # A converged run is as flat as a stuck one: that it came any way at all tells them apart. Some come no further
        # than the frequencies of their targets, and only the uninformed loss can tell that.
        highest = max(self._first)
        return falling or average < highest - (1 - INFORMED) * abs(highest)

    def fall(self) -> float | None:
        """By which share of the first losses the last five are below the five before.

        None while there are fewer, and where the first losses are zero.
        """
        scale = abs(median(self._first)) if len(self.recent) >= 2 * LATELY else 0.0
        if scale == 0:
            return None
        losses = [loss for _, loss in self.recent][-2 * LATELY :]
        return (sum(losses[:LATELY]) - sum(losses[LATELY:])) / LATELY / scale

    def state_dict(self) -> dict[str, Any]:
        """Plain Python values."""
        recent = [[step, loss] for step, loss in self.recent]
        return {"recent": recent, "first": list(self._first), "sum": self._sum, "weight": self._weight}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.recent.clear()
        self.recent.extend((step, loss) for step, loss in state["recent"])
        self._first = list(state["first"])
        self._sum, self._weight = state["sum"], state["weight"]


def _mean_and_error(values: list[float]) -> tuple[float, float]:
    mean, count = sum(values) / len(values), len(values)
    return mean, math.sqrt(sum((value - mean) * (value - mean) for value in values) / (count - 1) / count)

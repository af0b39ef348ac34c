"""The alarms of two runs, matched by rule and layer."""

from __future__ import annotations

from typing import NamedTuple

from attnprobe.logs.logged import LoggedRun


class Raised(NamedTuple):
    """The alarms of one rule in one layer of a run: every head concerned, and whether one stands at the end."""

    heads: tuple[int, ...]
    standing: bool


class AlarmPair(NamedTuple):
    """What each run raised; None for the run that did not."""

    name: str
    layer: str
    a: Raised | None
    b: Raised | None

    @property
    def by(self) -> str:
        """``"a"``, ``"b"`` or ``"both"``."""
        return "both" if self.a and self.b else "a" if self.a else "b"


def alarm_pairs(a: LoggedRun, b: LoggedRun) -> tuple[AlarmPair, ...]:
    """Those that only ``a`` raised, only ``b``, and both; each in the order raised."""
    of_a, of_b = _raised(a), _raised(b)
    pairs = [AlarmPair(*key, of_a.get(key), of_b.get(key)) for key in {**of_a, **of_b}]
    return tuple(sorted(pairs, key=lambda pair: ("a", "b", "both").index(pair.by)))


def _raised(run: LoggedRun) -> dict[tuple[str, str], Raised]:
    found: dict[tuple[str, str], Raised] = {}
    for episode in run.alarms:
        key = (episode.last.name, episode.last.layer)
        heads, standing = found.get(key, ((), False))
        found[key] = Raised(tuple(sorted({*heads, *episode.heads})), standing or episode.standing)
    return found

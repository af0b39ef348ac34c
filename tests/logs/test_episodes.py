"""Alarms over time, against what each probe said."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from attnprobe.logs.episodes import TURNS, Episodes
from attnprobe.report import Alarm
from tests.reproducible import reproducible

HEADS = st.lists(st.integers(0, 3), max_size=3, unique=True).map(tuple)


def alarm(step: int, heads: tuple[int, ...]) -> Alarm:
    return Alarm("rule", "a", heads, step, 0, 2.0, 1.0, "")


@reproducible(100)
@given(st.lists(HEADS, min_size=1, max_size=20))
def test_which_heads_were_concerned_at_each_probe(found: list[tuple[int, ...]]) -> None:
    (episode,) = Episodes([alarm(10 * probe, heads)] for probe, heads in enumerate(found)).found
    for probe, heads in enumerate(found):
        assert [now for since, now in episode.turns if since <= 10 * probe][-1] == heads
    assert episode.heads == {head for heads in found for head in heads}
    changes = sum(one != other for one, other in itertools.pairwise(found))
    assert len(episode.turns) == 1 + changes


def test_of_many_turns_the_latest_are_kept() -> None:
    (episode,) = Episodes([alarm(step, (step % 2,))] for step in range(3 * TURNS)).found
    assert list(episode.turns) == [(step, (step % 2,)) for step in range(2 * TURNS, 3 * TURNS)]

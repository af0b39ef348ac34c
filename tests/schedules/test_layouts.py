"""A stretch covers what was marked, and nothing irregular passes for one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from attnprobe.schedules.layouts import Stretch, ValuePart, stretch_of


@given(st.integers(0, 2), st.integers(1, 5), st.data())
def test_what_is_marked_comes_back(axis: int, periods: int, data: st.DataObject) -> None:
    period = data.draw(st.integers(1, 6))
    start = data.draw(st.integers(0, period - 1))
    length = data.draw(st.integers(1, period - start))
    shape = [2, 3, 4]
    shape[axis] = periods * period
    tensor = torch.zeros(shape, dtype=torch.bool)
    Stretch(axis, periods, start, length).view(tensor).fill_(True)
    marked = tensor.movedim(axis, 0).flatten(1).any(1)
    assert torch.equal(tensor, marked.view([-1 if i == axis else 1 for i in range(3)]).expand(shape))
    found = stretch_of(marked.tolist(), axis)
    assert found is not None
    again = torch.zeros(shape, dtype=torch.bool)
    found.view(again).fill_(True)
    assert torch.equal(again, tensor)


@pytest.mark.parametrize("marked", ["", "000", "1011", "110010", "10100", "0110", "011001"])
def test_irregular_marks(marked: str) -> None:
    expected = Stretch(0, 1, 1, 2) if marked == "0110" else None
    assert stretch_of([mark == "1" for mark in marked], 0) == expected


def test_descriptions_are_expressions_of_torch() -> None:
    weight = nn.Parameter(torch.arange(24.0 * 6).view(24, 6))
    for stretch in (Stretch(0, 1, 16, 8), Stretch(0, 2, 8, 4), Stretch(1, 1, 4, 2), Stretch(1, 3, 1, 1)):
        part = ValuePart("weight", weight, stretch)
        assert torch.equal(eval(str(part), {"weight": weight}), part.view())
    assert str(ValuePart("a.v_proj.weight", weight)) == "a.v_proj.weight"

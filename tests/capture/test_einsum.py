"""Any order of the letters: what is captured is the attention, and the usual orders are captured."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from attnprobe.statistics.dense import dense_parts
from tests.capture.reference import session
from tests.reproducible import reproducible

SIZES = {"b": 2, "h": 3, "q": 4, "k": 5, "d": 6, "e": 7}


class Einsum(nn.Module):
    """Attention in two equations; the tensors are given in the order of their letters."""

    def __init__(self, query: str, key: str, scores: str, value: str, output: str, swapped: bool) -> None:
        super().__init__()
        self.letters = {"query": query, "key": key, "value": value}
        first, second = (key, query) if swapped else (query, key)
        self.order = ("key", "query") if swapped else ("query", "key")
        self.axis = scores.index("k")
        self.scores, self.output = f"{first},{second}->{scores}", f"{scores},{value}->{output}"

    def forward(self, **tensors: Tensor) -> Tensor:
        given = {name: arranged(tensor, CANONICAL[name], self.letters[name]) for name, tensor in tensors.items()}
        weights = torch.einsum(self.scores, *(given[name] for name in self.order)).softmax(self.axis)
        return torch.einsum(self.output, weights, given["value"])


CANONICAL = {"query": "bhqd", "key": "bhkd", "value": "bhke"}


def arranged(tensor: Tensor, letters: str, wanted: str) -> Tensor:
    return tensor.permute([letters.index(letter) for letter in wanted])


def orders(letters: str) -> st.SearchStrategy[str]:
    return st.permutations(letters).map("".join)


@reproducible(150)
@given(
    orders("bhqd"),
    orders("bhkd"),
    orders("bhqk"),
    orders("bhke"),
    orders("bhqe"),
    st.booleans(),
)
def test_any_order(query: str, key: str, scores: str, value: str, output: str, swapped: bool) -> None:
    torch.manual_seed(0)
    model = Einsum(query, key, scores, value, output, swapped)
    tensors = {
        name: torch.randn([SIZES[letter] for letter in letters], dtype=torch.float64, requires_grad=True)
        for name, letters in CANONICAL.items()
    }
    with session(model) as watching:
        o = model(**tensors)
        (o.sin() * o).sum().backward()
    assert len(watching.seen) == 1
    for call in watching.seen:
        lead = "".join(
            letter for letter in scores if letter in "bh"
        )  # the last of the leading letters is what the probe takes for the heads
        for name, tensor in tensors.items():
            wanted = arranged(tensor.detach(), CANONICAL[name], lead + CANONICAL[name][2:])
            assert torch.equal(getattr(call.result, name), wanted)
        parts = dense_parts(call.result)
        torch.testing.assert_close(parts.alpha @ parts.value, parts.output, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(parts.E, (parts.error * parts.output).sum(-1), rtol=1e-12, atol=1e-12)

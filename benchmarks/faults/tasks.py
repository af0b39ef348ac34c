"""What the laboratory's models learn: synthetic tasks, text and images, a batch at a time.

A batch is ``inputs`` ``[B, T]`` token numbers (or ``[B, T, F]`` vectors), ``targets`` ``[B, T]`` (-1 where no loss is
taken; ``[B]`` where the whole sequence has one label) and ``lengths`` ``[B]``.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Generator, Tensor

IGNORED = -1
SYMBOLS = 12
#: Of the Markov chain; the state stays with this probability.
STATES, STAY, VECTOR = 8, 0.3, 20


@dataclass(frozen=True)
class Batch:
    inputs: Tensor
    targets: Tensor
    lengths: Tensor


@dataclass(frozen=True)
class Task:
    """Where batches come from.

    Attributes:
        make: ``make(generator, batch, length)`` gives inputs and targets.
        classes: number of targets.
        causal: whether a token may see only what came before.
        symbols: size of the vocabulary; 0 where inputs are vectors, of size ``features``.
        uninformed: loss of a model that knows the targets' frequencies and nothing else, in nats.
        length: of a sequence, where nothing else is asked for; ``long`` where a long one is.
    """

    name: str
    make: Callable[[Generator, int, int], tuple[Tensor, Tensor]]
    classes: int
    causal: bool
    symbols: int
    uninformed: Callable[[], float]
    features: int = 0
    length: int = 24
    long: int = 96

    def batch(self, generator: Generator, size: int, length: int, *, padded: bool) -> Batch:
        """A batch; ``padded`` sequences have random lengths, of at least half, and noise behind their ends."""
        inputs, targets = self.make(generator, size, length)
        lengths = torch.full((size,), length)
        if padded:
            lengths = torch.randint(length // 2, length + 1, (size,), generator=generator)
            if targets.ndim == 2:
                targets = targets.masked_fill(torch.arange(length) >= lengths[:, None], IGNORED)
        return Batch(inputs, targets, lengths)


def _tokens(generator: Generator, *shape: int, high: int = SYMBOLS) -> Tensor:
    return torch.randint(high, shape, generator=generator)


def _previous(generator: Generator, size: int, length: int) -> tuple[Tensor, Tensor]:
    inputs = _tokens(generator, size, length)
    targets = inputs.roll(1, 1)
    targets[:, 0] = IGNORED
    return inputs, targets


def _first(generator: Generator, size: int, length: int) -> tuple[Tensor, Tensor]:
    inputs = _tokens(generator, size, length)
    targets = inputs[:, :1].expand(-1, length).clone()
    targets[:, 0] = IGNORED
    return inputs, targets


def _induction(generator: Generator, size: int, length: int) -> tuple[Tensor, Tensor]:
    """A random sequence twice: its second half can be foretold."""
    half = length // 2
    inputs = torch.stack([torch.randperm(max(half, SYMBOLS), generator=generator)[:half] for _ in range(size)])
    inputs = (inputs % SYMBOLS).repeat(1, 2)
    targets = inputs.roll(-1, 1)
    targets[:, : half - 1] = targets[:, -1] = IGNORED
    return inputs, targets


def _order(generator: Generator, size: int, length: int) -> tuple[Tensor, Tensor]:
    """The token before, around the circle, of a permutation: which tokens there are says nothing."""
    inputs = torch.stack([torch.randperm(length, generator=generator) for _ in range(size)])
    return inputs, inputs.roll(1, 1)


def _recall(generator: Generator, size: int, length: int) -> tuple[Tensor, Tensor]:
    """Tokens that hold a key and a value, then keys alone whose values are to be recalled."""
    keys, values = 4, 3
    pairs = length // 2
    key = torch.arange(pairs).remainder(keys).expand(size, -1)
    bound = _tokens(generator, size, keys, high=values)
    shown = key * values + bound.gather(1, key)
    asked = _tokens(generator, size, length - pairs, high=keys)
    targets = torch.full((size, length), IGNORED)
    targets[:, pairs:] = bound.gather(1, asked)
    return torch.cat([shown, keys * values + asked], 1), targets


def _majority(generator: Generator, size: int, length: int) -> tuple[Tensor, Tensor]:
    inputs = _tokens(generator, size, length, high=4)
    favourite = _tokens(generator, size, 1, high=4)
    inputs = torch.where(torch.rand(size, length, generator=generator) < 0.3, favourite, inputs)
    counts = torch.nn.functional.one_hot(inputs, 4).sum(1)
    return inputs, counts.argmax(-1)


@cache
def _means() -> Tensor:
    return torch.randn(STATES, VECTOR, generator=Generator().manual_seed(0))


def _markov(generator: Generator, size: int, length: int) -> tuple[Tensor, Tensor]:
    """The sticky chain of the paper: an input is a noisy picture of the state before, the target the state."""
    distance = (torch.arange(STATES)[:, None] - torch.arange(STATES)).abs()
    weight = 1 / torch.minimum(distance, STATES - distance).clamp(min=1).double()
    weight.fill_diagonal_(0)
    transition = (weight / weight.sum(1, keepdim=True) * (1 - STAY)).fill_diagonal_(STAY)
    states = [_tokens(generator, size, high=STATES)]
    for _ in range(length):
        states.append(torch.multinomial(transition[states[-1]], 1, generator=generator)[:, 0])
    path = torch.stack(states, 1)
    return _means()[path[:, :-1]] + torch.randn(size, length, VECTOR, generator=generator), path[:, 1:]


@cache
def _text() -> tuple[Tensor, int]:
    """The long English text that comes with Python, as numbers of its characters."""
    spec = importlib.util.find_spec("pydoc_data.topics")
    assert spec is not None
    assert spec.origin is not None
    words = Path(spec.origin).read_text(encoding="utf-8").replace("\\n", "\n").lower()
    letters = " ".join(re.findall("[a-z]+", words))
    known = {letter: number for number, letter in enumerate(sorted(set(letters)))}
    return torch.tensor([known[letter] for letter in letters]), len(known)


def _next_letter(generator: Generator, size: int, length: int) -> tuple[Tensor, Tensor]:
    text, _ = _text()
    start = _tokens(generator, size, high=len(text) - length - 1)
    window = text[start[:, None] + torch.arange(length + 1)]
    return window[:, :-1], window[:, 1:]


@cache
def _images() -> tuple[Tensor, Tensor]:
    """Digits as 16 patches of 2 x 2 pixels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.tensor(digits.images, dtype=torch.float32).div(8).sub(1)
    patches = pixels.unflatten(1, (4, 2)).unflatten(3, (4, 2)).permute(0, 1, 3, 2, 4).reshape(-1, 16, 4)
    return patches, torch.tensor(digits.target)


def _digits(generator: Generator, size: int, length: int) -> tuple[Tensor, Tensor]:
    patches, labels = _images()
    chosen = _tokens(generator, size, high=len(patches))
    return patches[chosen], labels[chosen]


def _entropy(targets: Tensor) -> float:
    share = targets.bincount().double()
    share = share[share > 0] / share.sum()
    return float(-(share * share.log()).sum())


def _of(classes: int) -> Callable[[], float]:
    return lambda: math.log(classes)


TASKS = {
    task.name: task
    for task in (
        Task("previous", _previous, SYMBOLS, True, SYMBOLS, _of(SYMBOLS)),
        Task("first", _first, SYMBOLS, True, SYMBOLS, _of(SYMBOLS)),
        Task("induction", _induction, SYMBOLS, True, SYMBOLS, _of(SYMBOLS)),
        # That no token comes before itself is known without looking anywhere.
        Task("order", _order, 16, False, 16, _of(15), length=16, long=16),
        Task("recall", _recall, 3, True, 16, _of(3)),
        Task("majority", _majority, 4, False, 4, lambda: _entropy(_majority(Generator().manual_seed(0), 4096, 24)[1])),
        Task("markov", _markov, STATES, True, 0, _of(STATES), features=VECTOR),
        Task("text", _next_letter, _text()[1], True, _text()[1], lambda: _entropy(_text()[0])),
        Task("digits", _digits, 10, False, 0, lambda: _entropy(_images()[1]), features=4, length=16, long=16),
    )
}

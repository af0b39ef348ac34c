"""Arms of a comparison: an optimizer, and which parts of the model learn how many times as fast."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from attnprobe.errors import ConfigurationError
from attnprobe.schedules import ValueLearningRate

RATE = 0.01
OPTIMIZERS: dict[str, tuple[str, Callable[..., Optimizer]]] = {
    "sgd": ("SGD", torch.optim.SGD),
    "momentum": ("momentum 0.9", lambda groups, lr: torch.optim.SGD(groups, lr=lr, momentum=0.9)),
    "adam": ("Adam", torch.optim.Adam),
    "adamw": ("AdamW", torch.optim.AdamW),
}
#: Name in an arm -> how it is called, and the weights that it stands for.
PARTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "v": ("V", ("W_V",)),
    "qk": ("Q,K", ("W_Q", "W_K")),
    "o": ("W_O", ("W_O",)),
    "all": ("everything", ("W_Q", "W_K", "W_V", "W_P", "W_O")),
}
_PART = re.compile(r"(v|qk|o|all)(\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class Arm:
    """One way to train: ``sgd``, ``v10``, ``qk10``, ``all3.16``, ``adam``, ``adam-v10``, ``tuned``, ``tuned-v10`` ...

    Attributes:
        name: as on the command line.
        optimizer: a key of ``OPTIMIZERS``.
        part, times: what learns how many times as fast; ``""`` and 1 for uniform rates.
        tuned: the base rate is the best one of a grid, on seeds that are not evaluated.
        rate: the base rate.
    """

    name: str
    optimizer: str = "sgd"
    part: str = ""
    times: float = 1.0
    tuned: bool = False
    rate: float = RATE

    @classmethod
    def of(cls, name: str) -> Arm:
        """The arm of a name.

        Raises:
            ConfigurationError: the name stands for no arm; the message shows the form.
        """
        words = name.split("-")
        tuned = words[0] == "tuned"
        rest = words[tuned:]
        optimizer = rest.pop(0) if rest and rest[0] in OPTIMIZERS else "sgd"
        found = _PART.fullmatch("-".join(rest))
        times = float(found[2]) if found else 1.0
        if not times or (rest and not found):
            raise ConfigurationError(
                f"no arm is called {name!r}. Arms are sgd, momentum, adam, adamw or tuned; v, qk, o or all with a "
                "factor above 0 (v10: the value weights learn ten times as fast); or both, as in adam-v10"
            )
        part = found[1] if found else ""
        parts = ("tuned" if tuned else "", optimizer if optimizer != "sgd" else "", found[0] if found else "")
        return cls("-".join(filter(None, parts)) or "sgd", optimizer, part, times, tuned)

    @property
    def label(self) -> str:
        """For people: ``SGD, V x10``."""
        base = OPTIMIZERS[self.optimizer][0] + (f", rate {self.rate:.3g}" if self.tuned else "")
        return f"{base}, {PARTS[self.part][0]} x{self.times:g}" if self.part else base

    def build(self, model: nn.Module) -> Optimizer:
        """The optimizer of this arm for ``model``, an ``Ensemble`` or what names its weights alike."""
        make: Any = OPTIMIZERS[self.optimizer][1]
        named = dict(model.named_parameters())
        if self.part == "v":
            optimizer: Optimizer = make(list(named.values()), lr=self.rate)
            ValueLearningRate(model, self.times, parameters="*W_V").attach(optimizer)
            return optimizer
        fast = set(PARTS[self.part][1]) if self.part else set()
        groups = [
            {"params": [parameter], "lr": self.rate * (self.times if name.rpartition(".")[2] in fast else 1)}
            for name, parameter in named.items()
        ]
        return make(groups, lr=self.rate)  # type: ignore[no-any-return]


def parse(names: str) -> list[Arm]:
    """Arms of a comma-separated list, each once, in order."""
    return list(dict.fromkeys(Arm.of(name.strip()) for name in names.split(",")))

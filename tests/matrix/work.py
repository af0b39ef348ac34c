"""One cell in a process of its own."""

from __future__ import annotations

import logging

import torch

from tests.matrix.cells import all_variants
from tests.matrix.check import Outcome, check
from tests.matrix.conditions import CONDITIONS


def prepare() -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # libraries that comment on tiny models


def outcome_of(name: tuple[str, str]) -> Outcome:
    variant = next(variant for variant in all_variants() if variant.name == name[0])
    condition = next(condition for condition in CONDITIONS if condition.name == name[1])
    outcome = check(variant, condition)
    if condition.backend is not None:
        torch._dynamo.reset()  # compiled code of the cells before slows down and may not get too much
    return outcome

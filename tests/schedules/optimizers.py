"""Every optimizer of the exact list, with its options and implementations, as parameters of a test."""

from __future__ import annotations

from typing import Any

import pytest
from torch import optim


def _modes(kind: type, lr: float, modes: str = "single", **options: Any) -> list[Any]:
    name = "-".join([kind.__name__, *(f"{k}={v}" for k, v in options.items())])
    flags = {"single": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
    return [pytest.param(kind, lr, options | flags[mode], id=f"{name}-{mode}") for mode in modes.split()]


EXACT = [
    *_modes(optim.SGD, 0.05, "single foreach fused"),
    *_modes(optim.SGD, 0.05, "single foreach fused", momentum=0.9, weight_decay=0.1),
    *_modes(optim.SGD, 0.05, momentum=0.9, nesterov=True),
    *_modes(optim.Adam, 0.005, "single foreach fused", weight_decay=0.1),
    *_modes(optim.Adam, 0.005, "foreach", amsgrad=True),
    *_modes(optim.AdamW, 0.005, "single foreach fused", weight_decay=0.3),
    *_modes(optim.NAdam, 0.005, weight_decay=0.3, decoupled_weight_decay=True),
    *_modes(optim.RAdam, 0.005, "foreach", weight_decay=0.3, decoupled_weight_decay=True),
    *_modes(optim.Adagrad, 0.01, "single fused", lr_decay=0.1),
    *_modes(optim.Adadelta, 0.5),
    *_modes(optim.Adamax, 0.005),
    *_modes(optim.RMSprop, 0.001, "single foreach", momentum=0.5, centered=True),
    *_modes(optim.RMSprop, 0.001),
]

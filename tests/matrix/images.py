"""What all image models here are fed, and their loss."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from tests.matrix.fresh import Draw
from tests.matrix.variant import Batch

SIDE, PATCH, CLASSES, SEQUENCES = 12, 4, 5, 2
DEPTH, HEADS, WIDTH = 2, 4, 32


def images(seed: int, side: int = SIDE) -> Batch:
    draw = Draw(seed)
    return {"images": draw.normal(SEQUENCES, 3, side, side), "labels": draw.classes(CLASSES, SEQUENCES)}


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch["images"]), batch["labels"])

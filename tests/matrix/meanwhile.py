"""What training loops do beside training: copies, inference."""

from __future__ import annotations

import copy
import io
import pickle
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tests.matrix.variant import Batch

if TYPE_CHECKING:
    from tests.matrix.training import Cell, History


def copy_and_save(cell: Cell, batch: Batch, history: History) -> None:
    """Copies are of the model alone, and what they compute is nobody's business."""
    (model,) = cell.models
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    twins[0].load_state_dict(torch.load(buffer))
    for twin in twins:
        loss = cell.loss([twin], batch)
        torch.autograd.backward(loss)
        history.note("loss of a copy", loss)


def infer(cell: Cell, batch: Batch, history: History) -> None:
    """``generate`` where the model has it, and an evaluation pass without gradients."""
    for model in cell.models:
        model.eval()
        with torch.no_grad():
            if cell.variant.generate is not None:
                for leaf in tree_leaves(cell.variant.generate(model, batch)):
                    if isinstance(leaf, Tensor):
                        history.note("generated", leaf)
            history.note("loss of evaluation", cell.loss([model], batch))
        with torch.inference_mode():
            history.note("loss of inference", cell.loss([model], batch))
        model.train()

"""Run something on a model and leave the model as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Gradients, buffers, training modes and torch's random state are afterwards what they were before."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    contents = [(buffer, buffer.clone()) for buffer in model.buffers()]
    modes = [(module, module.training) for module in model.modules()]
    # Named, because fork_rng warns before it forks the state of every GPU of a large machine.
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for table, before in buffers:
            table.clear()
            table.update(before)
        for buffer, content in contents:
            if not torch.equal(buffer, content):
                buffer.data.copy_(content)  # .data: a graph that saved the buffer sees it unchanged, as it is again
        for module, training in modes:
            module.training = training

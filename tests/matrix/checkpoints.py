"""Activation checkpointing for models that have none of their own."""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)


def checkpoint_blocks(block: type[nn.Module], model: nn.Module, use_reentrant: bool) -> None:
    """Torch's wrapper around every module that is a ``block``; it takes keyword arguments in both kinds."""
    kind = CheckpointImpl.REENTRANT if use_reentrant else CheckpointImpl.NO_REENTRANT
    wrap = partial(checkpoint_wrapper, checkpoint_impl=kind)
    apply_activation_checkpointing(model, checkpoint_wrapper_fn=wrap, check_fn=lambda part: isinstance(part, block))

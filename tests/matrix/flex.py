"""FlexAttention in training on a CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.attention.flex_attention as flex

from tests.matrix.variant import Variant


def _any_device(*tensors: Any) -> None:
    """In place of the check."""


def _uncompiled(self: Any) -> Callable[..., Any]:
    return flex.flex_attention


def _uncompiled_mask(*args: Any, **options: Any) -> flex.BlockMask:
    return flex.create_block_mask(*args, **{**options, "_compile": False})


@contextlib.contextmanager
def trainable_on_cpu(variant: Variant, *, traced: bool = True) -> Iterator[None]:
    """Torch refuses to, because its compiled CPU kernel has no backward pass; what it runs uncompiled has one.

    Dynamo traces it first, which takes a second each time; models of transformers compute the same without it.
    """
    if variant.kind != "flex":
        yield
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(flex, "_validate_device", _any_device))
        if variant.library == "transformers":
            from transformers import masking_utils
            from transformers.integrations.flex_attention import WrappedFlexAttention

            stack.enter_context(mock.patch.object(WrappedFlexAttention, "__call__", _uncompiled))
            stack.enter_context(mock.patch.object(masking_utils, "create_block_mask", _uncompiled_mask))
            if not traced:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield

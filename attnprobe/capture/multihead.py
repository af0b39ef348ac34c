"""``nn.MultiheadAttention`` and the backward pass: opaque functions whose inside must stay visible."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from attnprobe.capture.registry import around

if TYPE_CHECKING:
    from attnprobe.capture.session import Session


def _opened() -> Callable[..., Any]:
    """Torch's code of today, as a copy that does not hand itself over to the mode as one opaque call."""
    code = F.multi_head_attention_forward
    names = {**code.__globals__, "has_torch_function": lambda tensors: False}
    copy = types.FunctionType(code.__code__, names, code.__name__, code.__defaults__, code.__closure__)
    copy.__kwdefaults__ = code.__kwdefaults__
    return copy


@around("multi_head_attention_forward")
def _multihead(session: Session, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if function is not F.multi_head_attention_forward:
        return function(*args, **kwargs)
    given = dict(zip(F.multi_head_attention_forward.__code__.co_varnames, args, strict=False)) | kwargs
    query, key = given["query"], given["key"]
    # Layers often normalise, or add positions, once for the query and once for the key: then only the numbers tell.
    same = query is key or (query.shape == key.shape and bool(torch.equal(query, key)))
    with session.hint(heads=given["num_heads"], self_attention=same), session.mode:
        return _opened()(*args, **kwargs)


@around("backward", "grad")
def _backward(session: Session, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Torch has switched the mode off in here; recomputed modules switch it on again for themselves."""
    with session.watch.outside():
        return function(*args, **kwargs)

"""FlexAttention: the higher-order operator behind ``torch.nn.attention.flex_attention``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from attnprobe.capture.call import Call, Layout
from attnprobe.capture.registry import after

if TYPE_CHECKING:
    from attnprobe.capture.session import Session


@after("flex_attention")
def _observe(session: Session, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    session.observe(_call(result, *args, **kwargs))


def _call(
    result: tuple[Tensor, ...],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Tensor],
    block_mask: tuple[Any, ...],
    scale: float,
    kernel_options: Any,
    score_mod_other_buffers: tuple[Any, ...] = (),
    mask_mod_other_buffers: tuple[Any, ...] = (),
) -> Call:
    output, lse, *_ = result
    unit = 1.0 if dict(kernel_options or {}).get("BACKEND") == "FLASH" else math.log(2)
    facts = {
        "scale": scale,
        "score_mod": _bound(score_mod, score_mod_other_buffers, nothing="_identity"),
        "mask_mod": _bound(block_mask[-1], mask_mod_other_buffers, nothing="noop_mask"),
    }
    return Call(output, {"query": query, "key": key, "value": value}, Layout(facts, 4), lse=lse, lse_unit=unit)


def _bound(function: Callable[..., Tensor], buffers: tuple[Any, ...], nothing: str) -> Callable[..., Tensor] | None:
    """With the tensors that a traced function takes as further arguments; None for torch's default."""
    if getattr(function, "__name__", "") == nothing:
        return None
    return (lambda *args: function(*args, *buffers)) if buffers else function

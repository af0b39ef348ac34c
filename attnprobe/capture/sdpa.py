"""``F.scaled_dot_product_attention``: also where the model imported it before we came."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from attnprobe.capture.call import Call, Layout
from attnprobe.capture.registry import after

if TYPE_CHECKING:
    from attnprobe.capture.session import Session


@after("scaled_dot_product_attention")
def _observe(session: Session, output: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    session.observe(_call(output, *args, **kwargs))


def _call(
    output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Call:
    tensors = {"query": query, "key": key, "value": value}
    if attn_mask is not None:
        tensors["mask"] = attn_mask
    facts = {
        "scale": query.shape[-1] ** -0.5 if scale is None else float(scale),
        "causal": is_causal,
        "dropout": float(dropout_p),
    }
    return Call(output, tensors, Layout(facts, query.ndim))

"""``F.scaled_dot_product_attention``: also where the model imported it before we came."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnprobe.capture.call import Call, Layout
from attnprobe.capture.kernel_lse import keeps_lse
from attnprobe.capture.registry import around
from attnprobe.capture.unseen import NESTED

if TYPE_CHECKING:
    from attnprobe.capture.session import Session

#: Above so many weights they are not computed again for the sake of dropout: 256 MB in float32.
REPLAYED_WEIGHTS = 2**26


@around("scaled_dot_product_attention")
def _observe(session: Session, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    random = None
    with session.guarded():
        given = _given(*args, **kwargs)
        if given["dropout_p"]:
            random = _random_state(given["query"].device)
    output: Tensor = function(*args, **kwargs)
    with session.guarded():
        if output.is_nested:
            session.refuse(NESTED)
        else:
            session.observe(_call(output, random, **_given(*args, **kwargs)))
    return output


def _given(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> dict[str, Any]:
    return locals()


def _call(
    output: Tensor,
    random: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Call:
    tensors = {"query": query, "key": key, "value": value}
    if attn_mask is not None:
        tensors["mask"] = attn_mask
    facts = {
        "scale": query.shape[-1] ** -0.5 if scale is None else float(scale),
        "causal": is_causal,
        "dropout": float(dropout_p),
    }
    options = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    replay = None if random is None else _Replay(random, options)
    return Call(output, tensors, Layout(facts, query.ndim, replay=replay), leaves_lse=keeps_lse(output))


def _random_state(device: torch.device) -> Tensor:
    return torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)


def _forked(device: torch.device) -> contextlib.AbstractContextManager[None]:
    if device.type == "cpu":
        return torch.random.fork_rng([])
    return torch.random.fork_rng([device.index], device_type=device.type)


@dataclass(frozen=True)
class _Replay:
    """The same kernel with the same random numbers once more, with blocks of the identity as values.

    What comes out are the weights as dropped; they count only if they give the model's own output.
    """

    random: Tensor
    options: Mapping[str, Any]

    def __call__(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        output, query, keys = tensors.get("output"), tensors["query"], tensors["value"].shape[-2]
        if output is None or query[..., 0].numel() * keys > REPLAYED_WEIGHTS:
            return None
        query, key, value = (tensors[name].to(output.dtype) for name in ("query", "key", "value"))  # as autocast did
        mask = tensors.get("mask")
        mask = mask if mask is None or mask.dtype == torch.bool else mask.to(output.dtype)
        device, width = query.device, value.shape[-1]
        identity = F.pad(torch.eye(keys, dtype=value.dtype, device=device), (0, -keys % width))
        found = []
        with torch.autocast(device.type, enabled=False), _forked(device):
            for block in identity.split(width, -1):
                self._rewind(device)
                found.append(F.scaled_dot_product_attention(query, key, block.expand_as(value), mask, **self.options))
        weights = torch.cat(found, -1)[..., :keys]
        if value.ndim > 3:
            value = value.repeat_interleave(weights.shape[-3] // value.shape[-3], -3)
        same = torch.allclose(weights @ value, output, rtol=1e-2, atol=1e-2 * float(output.abs().amax()))
        return weights if same else None

    def _rewind(self, device: torch.device) -> None:
        if device.type == "cpu":
            torch.set_rng_state(self.random)
        else:
            torch.get_device_module(device).set_rng_state(self.random, device)

"""A stand-in for the flash-attn package: its classes, arguments and meaning, computed densely on any device."""

from __future__ import annotations

import inspect
import sys
import types
from typing import Any

import torch
from torch import Tensor

VERSIONS = ("2.8", "2.0", "3")
_INPUTS = {"": "q k v", "KVPacked": "q kv", "QKVPacked": "qkv"}
_LENGTHS = {
    "": "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k",
    "KVPacked": "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k",
    "QKVPacked": "cu_seqlens max_seqlen",
}
_USUAL = "dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic return_softmax"
_V3 = "window_size attention_chunk softcap num_splits pack_gqa deterministic sm_margin return_softmax"
_V3 = f"softmax_scale causal qv q_descale k_descale v_descale {_V3}"
DEFAULTS: dict[str, Any] = {
    "dropout_p": 0.0,
    "causal": False,
    "window_size": (-1, -1),
    "softcap": 0.0,
    "attention_chunk": 0,
    "deterministic": False,
    "return_softmax": False,
}


def signatures(version: str) -> dict[str, str]:
    """Arguments of every class's ``forward``, without the context."""
    table = {}
    for packed, inputs in _INPUTS.items():
        for lengths in ("", _LENGTHS[packed]):
            name = f"FlashAttn{'Varlen' if lengths else ''}{packed}Func"
            if version == "2.8":
                table[name] = (
                    f"{inputs} {lengths} {_USUAL} {'block_table' if lengths and not packed else ''} is_grad_enabled"
                )
            elif version == "2.0":
                table[name] = f"{inputs} {lengths} dropout_p softmax_scale causal return_softmax"
            elif not packed:
                used = lengths.replace("max_seqlen_q", "seqused_q seqused_k max_seqlen_q")
                table[name] = f"{inputs} {used} {_V3}"
    if version == "3":
        table["FlashAttnQKVPackedFunc"] = (
            "qkv softmax_scale causal q_descale k_descale v_descale window_size attention_chunk softcap deterministic "
            "num_heads_q sm_margin return_softmax"
        )
    return table


def package(version: str = "2.8") -> types.ModuleType:
    """The module with the classes, to be put into ``sys.modules`` under its ``__name__``."""
    module = types.ModuleType("flash_attn_interface" if version == "3" else "flash_attn.flash_attn_interface")
    for name, arguments in signatures(version).items():
        setattr(module, name, _kernel(name, arguments.split()))
    return module


def call(name: str, **options: Any) -> Any:
    """What ``flash_attn_func`` and its like do: hand everything to ``apply``, one after the other."""
    module = sys.modules.get("flash_attn.flash_attn_interface") or sys.modules["flash_attn_interface"]
    kernel = getattr(module, name)
    order = [*inspect.signature(kernel.forward).parameters][1:]
    assert options.keys() <= {*order}
    return kernel.apply(*(options.get(argument, DEFAULTS.get(argument)) for argument in order))


def _kernel(name: str, arguments: list[str]) -> Any:
    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *values: Any) -> Any:
            ctx.given = dict(zip(arguments, values, strict=True))
            o = _compute(ctx.given)
            return (o, o.new_zeros(3), o.new_zeros(2)) if ctx.given["return_softmax"] else o

        @staticmethod
        def backward(ctx: Any, u: Tensor, *others: Any) -> Any:
            again = {name: x for name, x in ctx.given.items() if name in ("q", "k", "v", "kv", "qkv")}
            again = {name: x.detach().requires_grad_() for name, x in again.items()}
            with torch.enable_grad():
                gradients = torch.autograd.grad(_compute({**ctx.given, **again}), [*again.values()], u)
            return *gradients, *[None] * (len(ctx.given) - len(again))

    parameters = [inspect.Parameter(each, inspect.Parameter.POSITIONAL_OR_KEYWORD) for each in ("ctx", *arguments)]
    Kernel.forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    Kernel.__name__ = Kernel.__qualname__ = name
    return Kernel


def _compute(given: dict[str, Any]) -> Tensor:
    sequences = split(given)
    outputs = [attention(*sequence, index, given)[0] for index, sequence in enumerate(sequences)]
    return (
        torch.cat(outputs) if given.get("max_seqlen", given.get("max_seqlen_q")) is not None else torch.stack(outputs)
    )


def split(given: dict[str, Any]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Queries, keys and values of each sequence, ``[T or S, H or G, D]``."""
    heads = given.get("num_heads_q")
    if heads:
        groups = (given["qkv"].shape[-2] - heads) // 2
        parts = given["qkv"].split([heads, groups, groups], -2)
    elif "qkv" in given:
        parts = given["qkv"].unbind(-3)
    else:
        parts = given["q"], *(given["kv"].unbind(-3) if "kv" in given else (given["k"], given["v"]))
    starts = [given.get(name, given.get("cu_seqlens")) for name in ("cu_seqlens_q", "cu_seqlens_k", "cu_seqlens_k")]
    if starts[0] is None:
        return [*zip(*parts, strict=True)]
    return [*zip(*(x.split(start.diff().tolist()) for x, start in zip(parts, starts, strict=True)), strict=True)]


def attention(q: Tensor, k: Tensor, v: Tensor, index: int, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Output ``[T, H, D]`` and weights ``[H, T, S]`` before dropout of the sequence ``index``, as documented."""
    (queries, heads, depth), keys = q.shape, k.shape[0]
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    scale, (left, right) = given.get("softmax_scale"), given.get("window_size", (-1, -1))
    scores = torch.einsum("thd,shd->hts", q, k) * (depth**-0.5 if scale is None else scale)
    if given.get("softcap", 0.0) > 0:
        scores = given["softcap"] * torch.tanh(scores / given["softcap"])
    visible = torch.ones(queries, keys, dtype=torch.bool)
    distance = torch.zeros(queries, keys, dtype=q.dtype)
    for i in range(queries):
        for j in range(keys):
            here = i + keys - queries
            distance[i, j] = abs(here - j)
            hidden = (given["causal"] and j > here) or 0 <= left < here - j or (0 <= right < j - here)
            visible[i, j] = not hidden
    slopes = given.get("alibi_slopes")
    if slopes is not None:
        scores = scores - (slopes if slopes.ndim == 1 else slopes[index])[:, None, None] * distance
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1).where(visible, 0)
    rate = given.get("dropout_p", 0.0)
    kept = torch.rand(weights.shape, generator=torch.Generator().manual_seed(index)) >= rate
    return torch.einsum("hts,shd->thd", weights * kept / (1 - rate), v), weights

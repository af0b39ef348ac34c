"""Models in pure torch, one for each way to write or to call attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

from tests.matrix import torch_attention as attention
from tests.matrix.fresh import Draw, fresh, lengths_mask
from tests.matrix.torch_modules import (
    BATCH,
    DEPTH,
    HEADS,
    MEMORY,
    OTHER,
    TOKENS,
    WIDTH,
    Attend,
    Attention,
    Blocks,
    Decoder,
    Encoder,
    Model,
    Multihead,
    NanoAttention,
    Whole,
)
from tests.matrix.variant import Batch, Variant


def text(seed: int, *, padded: bool = False, memory: tuple[int, int] | None = None) -> Batch:
    draw = Draw(seed)
    batch = {"tokens": draw.ids(BATCH, TOKENS), "labels": draw.ids(BATCH, TOKENS)}
    if padded:
        batch["attention_mask"] = lengths_mask((TOKENS, TOKENS - 3), TOKENS)
    if memory is not None:
        batch["memory"] = draw.normal(BATCH, *memory)
    return batch


def loss(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(**{name: tensor for name, tensor in batch.items() if name != "labels"})
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())


def checkpoint_blocks(model: nn.Module, use_reentrant: bool) -> None:
    kind = CheckpointImpl.REENTRANT if use_reentrant else CheckpointImpl.NO_REENTRANT
    for blocks in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
        for index, block in enumerate(blocks):
            blocks[index] = checkpoint_wrapper(block, kind)


def checkpoint_functions(model: nn.Module, use_reentrant: bool) -> None:
    for module in model.modules():
        if isinstance(module, Attention):
            module.reentrant = use_reentrant


def per_layer(*names: str, heads: int = HEADS) -> dict[str, int]:
    return {name.format(layer): heads for layer in range(DEPTH) for name in names}


def variant(
    name: str, kind: str, make: Callable[[float], nn.Module], layers: Mapping[str, int], **options: Any
) -> Variant:
    memory, padded = options.pop("memory", None), options.get("padded", False)
    batch = partial(text, padded=padded, memory=memory)
    return Variant(
        name,
        "torch",
        kind,
        lambda p: fresh(lambda: Model(make(p))),
        batch,
        loss,
        layers,
        **{"checkpoint": checkpoint_blocks, **options},
    )


def written(
    name: str,
    kind: str,
    attend: Attend,
    *,
    heads: int = HEADS,
    groups: int | None = None,
    calls: int = 1,
    **options: Any,
) -> Variant:
    """Attention by ``attend``; each block is called ``calls`` times in a row."""
    rows = per_layer("body.blocks.{}.attn", heads=heads)
    if calls > 1:
        rows = {f"{row}#{call}": heads for row, heads in rows.items() for call in range(calls)}

    def make(dropout: float) -> nn.Module:
        return Blocks(lambda: Attention(attend, dropout, heads=heads, groups=groups), calls=calls)

    return variant(name, kind, make, rows, **options)


def multihead(name: str, *, memory: tuple[int, int] | None = None, padded: bool = False, **options: Any) -> Variant:
    options = {"call": {"need_weights": False}, "batch_first": True, **options}

    def make(dropout: float) -> nn.Module:
        return Blocks(lambda: Multihead(dropout, **options))

    rows = per_layer("body.blocks.{}.attn.mha")
    return variant(f"mha-{name}", "multihead", make, rows, memory=memory, padded=padded)


SDPA = (
    variant(
        "nanogpt-sdpa", "sdpa", lambda p: Blocks(lambda: NanoAttention(p, flash=True)), per_layer("body.blocks.{}.attn")
    ),
    written("sdpa", "sdpa", attention.sdpa),
    written("sdpa-bound-before", "sdpa", attention.sdpa_bound_before),
    written("sdpa-bool-mask", "sdpa", attention.sdpa_bool_mask),
    written("sdpa-float-mask", "sdpa", attention.sdpa_float_mask),
    written("sdpa-causal-scale", "sdpa", partial(attention.sdpa, is_causal=True, scale=0.3)),
    written("sdpa-gqa", "sdpa", partial(attention.sdpa, enable_gqa=True, is_causal=True), heads=4, groups=2),
    written("sdpa-folded", "sdpa", attention.sdpa_folded, heads=4),  # as many as sequences could be either
    written("sdpa-cross", "sdpa", attention.sdpa, memory=(MEMORY, WIDTH)),
    written("sdpa-shared-module", "sdpa", attention.sdpa, calls=2),
    written("sdpa-function-checkpoint", "sdpa", attention.sdpa, checkpoint=checkpoint_functions),
)

FLEX = (
    written("flex-alibi", "flex", attention.flex_alibi, dropout=False),
    written("flex-causal", "flex", partial(attention.flex_masked, mask=attention.is_causal), dropout=False),
    written("flex-window", "flex", partial(attention.flex_masked, mask=attention.in_window), dropout=False),
    written(
        "flex-gqa",
        "flex",
        partial(attention.flex_masked, mask=attention.is_causal, enable_gqa=True),
        heads=4,
        groups=2,
        dropout=False,
    ),
)

SOFTMAX = (
    variant(
        "nanogpt-softmax",
        "softmax",
        lambda p: Blocks(lambda: NanoAttention(p, flash=False)),
        per_layer("body.blocks.{}.attn"),
    ),
    written("operators", "softmax", attention.operators),
    written("softcapped", "softmax", attention.softcapped),
    written("bmm", "softmax", attention.bmm),
    written("baddbmm", "softmax", attention.baddbmm),
    written("einsum", "softmax", attention.einsum),
    written("einsum-tokens-first", "softmax", attention.einsum_tokens_first),
    written("weights-right", "softmax", attention.weights_right),
    written("einsum-weights-right", "softmax", attention.einsum_weights_right),
    written("keys-first", "softmax", attention.keys_first),
    written("heads-last", "softmax", attention.heads_last),
    written("single-head", "softmax", attention.single_head, heads=1),
    written("softmax-cross", "softmax", attention.einsum, memory=(MEMORY, WIDTH)),
    written("softmax-function-checkpoint", "softmax", attention.operators, checkpoint=checkpoint_functions),
)

MULTIHEAD = (
    multihead("fused"),
    multihead("weights", call={}),
    multihead("weights-per-head", call={"average_attn_weights": False}),
    multihead("tokens-first", batch_first=False),
    multihead("causal", causal=True, call={"need_weights": False, "is_causal": True}),
    multihead("mask", causal=True, call={}),
    multihead("padded", padded=True),
    multihead("bias-kv", add_bias_kv=True),
    multihead("zero-attn", add_zero_attn=True, call={}),
    multihead("cross", memory=(MEMORY, OTHER), kdim=OTHER, vdim=OTHER),
    variant("encoder", "multihead", Encoder, per_layer("body.encoder.layers.{}.self_attn")),
    variant(
        "encoder-norm-first-padded",
        "multihead",
        partial(Encoder, norm_first=True),
        per_layer("body.encoder.layers.{}.self_attn"),
        padded=True,
    ),
    variant(
        "decoder",
        "multihead",
        Decoder,
        per_layer("body.decoder.layers.{}.self_attn", "body.decoder.layers.{}.multihead_attn"),
        memory=(MEMORY, WIDTH),
    ),
    variant(
        "transformer",
        "multihead",
        Whole,
        {
            **per_layer("body.transformer.encoder.layers.{}.self_attn"),
            **per_layer(
                "body.transformer.decoder.layers.{}.self_attn", "body.transformer.decoder.layers.{}.multihead_attn"
            ),
        },
        memory=(MEMORY, WIDTH),
    ),
)

VARIANTS: tuple[Variant, ...] = SDPA + FLEX + SOFTMAX + MULTIHEAD

"""Models of x-transformers, whose attention is computed in a module of its own."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.matrix.fresh import VOCABULARY, Draw, fresh, lengths_mask
from tests.matrix.variant import Batch, Variant

with warnings.catch_warnings():  # it scripts a function, which torch says is of the past
    warnings.simplefilter("ignore", FutureWarning)
    from x_transformers import AutoregressiveWrapper, Decoder, Encoder, TransformerWrapper, XTransformer

SEQUENCES, TOKENS, LENGTHS = 2, 10, (10, 6)
DEPTH, HEADS, WIDTH = 2, 4, 32
_SIZES = {"depth": DEPTH, "heads": HEADS, "attn_dim_head": WIDTH // HEADS}
_WORDS = {"num_tokens": VOCABULARY, "max_seq_len": 16}
_ROWS = {f"attn_layers.layers.{2 * block}.1.attend": HEADS for block in range(DEPTH)}  # attention, feed-forward, ...
_PAIR_ROWS = {f"encoder.{name}": heads for name, heads in _ROWS.items()} | {  # self, cross, feed-forward, ...
    f"decoder.net.attn_layers.layers.{3 * block + part}.1.attend": HEADS for block in range(DEPTH) for part in (0, 1)
}


def _make(layers: type[nn.Module], options: Mapping[str, Any], dropout: float) -> nn.Module:
    return fresh(
        lambda: TransformerWrapper(**_WORDS, attn_layers=layers(dim=WIDTH, **_SIZES, attn_dropout=dropout, **options))
    )


def _make_pair(flash: bool, dropout: float) -> nn.Module:
    options = {**_WORDS, **_SIZES, "attn_flash": flash, "attn_dropout": dropout}
    both = {f"{part}_{name}": value for part in ("enc", "dec") for name, value in options.items()}
    return fresh(lambda: XTransformer(dim=WIDTH, **both))


def _text(seed: int, *, padded: bool = False) -> Batch:
    draw = Draw(seed)
    batch = {"ids": draw.ids(SEQUENCES, TOKENS), "labels": draw.ids(SEQUENCES, TOKENS)}
    return {**batch, "mask": lengths_mask(LENGTHS, TOKENS).bool()} if padded else batch


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    mask = batch.get("mask")
    labels = batch["labels"] if mask is None else batch["labels"].masked_fill(~mask, -100)
    return F.cross_entropy(model(batch["ids"], mask=mask).transpose(1, 2), labels)


def _pair_loss(model: nn.Module, batch: Batch) -> Tensor:
    return model(batch["ids"], batch["labels"][:, :-2], mask=batch["mask"])


@torch.no_grad()
def _generate(model: nn.Module, batch: Batch) -> object:
    return AutoregressiveWrapper(model).generate(batch["ids"][:, :4], 3, temperature=0.0)


def _generate_pair(model: Any, batch: Batch) -> object:
    return model.generate(batch["ids"], batch["labels"][:, :1], 3, mask=batch["mask"], temperature=0.0)


def _variant(name: str, layers: type[nn.Module] = Decoder, **options: Any) -> Variant:
    flash, causal = options.get("attn_flash", False), layers is Decoder
    return Variant(
        name=f"x-{name}",
        library="x-transformers",
        kind="sdpa" if flash else "softmax",
        make=partial(_make, layers, options),
        batch=partial(_text, padded=not causal),
        loss=_loss,
        layers=_ROWS,
        double=bool(flash or options.get("attn_qk_norm")),  # else the softmax is float32
        generate=_generate if causal else None,
        padded=not causal,
    )


def _pair(name: str, *, flash: bool) -> Variant:
    return Variant(
        name=f"x-{name}",
        library="x-transformers",
        kind="sdpa" if flash else "softmax",
        make=partial(_make_pair, flash),
        batch=partial(_text, padded=True),
        loss=_pair_loss,
        layers=_PAIR_ROWS,
        double=flash,
        generate=_generate_pair,
        padded=True,
    )


VARIANTS: tuple[Variant, ...] = (
    _variant("decoder"),
    _variant("decoder-flash", attn_flash=True),
    _variant("encoder", Encoder),
    _variant("encoder-flash", Encoder, attn_flash=True),
    _variant("qk-norm", attn_qk_norm=True),
    _variant("qk-norm-flash", attn_qk_norm=True, attn_flash=True),
    _variant("grouped", attn_kv_heads=2),
    _variant("one-kv-head", attn_one_kv_head=True),
    _variant("one-kv-head-flash", attn_one_kv_head=True, attn_flash=True),
    _variant("alibi", alibi_pos_bias=True),
    _variant("alibi-flash", alibi_pos_bias=True, attn_flash=True),
    _variant("memory", attn_num_mem_kv=2),  # learned keys and values before those of the tokens
    _variant("softclamp", attn_softclamp_logits=True, attn_logit_softclamp_value=2.0),
    _variant("talking-heads", attn_pre_talking_heads=True),  # scores of all heads mixed before the softmax
    _variant("sink", attn_head_learned_sink=True),
    _pair("pair", flash=False),
    _pair("pair-flash", flash=True),
)

#: Heads are mixed after the softmax: no head's weights are a softmax, so they cannot be measured.
ALTERED: tuple[Variant, ...] = (_variant("talking-heads-after", attn_post_talking_heads=True),)

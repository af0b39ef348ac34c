"""Transformers models with an encoder: text, text to text, speech, images."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
)
from transformers.models.albert.modeling_albert import AlbertLayer

from tests.matrix.checkpoints import checkpoint_blocks
from tests.matrix.hf_family import (
    DEPTH,
    HEADS,
    IDS,
    SIZES,
    TOKENS,
    WIDTH,
    Family,
    decode,
    images,
    images_and_text,
    rows,
    speech,
    text,
    text_pairs,
)

_BERT = {**IDS, **SIZES, "max_position_embeddings": 16}
_BART = {
    **IDS,
    "decoder_start_token_id": 2,
    "d_model": WIDTH,
    **{f"{part}_layers": DEPTH for part in ("encoder", "decoder")},
    **{f"{part}_attention_heads": HEADS for part in ("encoder", "decoder")},
    **{f"{part}_ffn_dim": WIDTH for part in ("encoder", "decoder")},
}
_T5 = {
    **IDS,
    "decoder_start_token_id": 0,
    "d_model": WIDTH,
    "d_kv": WIDTH // HEADS,
    "d_ff": WIDTH,
    "num_layers": DEPTH,
    "num_heads": HEADS,
}
_IMAGE = {**SIZES, "image_size": 12, "patch_size": 4}


def _bert(name: str, layers: dict[str, int], config: dict[str, Any], **options: Any) -> Family:
    facts: dict[str, Any] = {"dropout": ["attention_probs_dropout_prob"], **options}
    batch = partial(text, padded=True)
    return Family(name, AutoModelForMaskedLM, name, {**_BERT, **config}, layers, batch, **facts)


def _pair(encoder: str, *decoder: str) -> dict[str, int]:
    return rows(encoder) | rows(*decoder)


def _attention_dropout_only(model: nn.Module) -> nn.Module:
    """T5 has one rate for all; its attention keeps it as a number."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


_BART_ROWS = _pair(
    "model.encoder.layers.{}.self_attn", "model.decoder.layers.{}.self_attn", "model.decoder.layers.{}.encoder_attn"
)

FAMILIES = (
    _bert("bert", rows("bert.encoder.layer.{}.attention.self"), {}),
    _bert(  # one layer's weights for all layers
        "albert",
        rows("albert.encoder.albert_layer_groups.0.albert_layers.0.attention#{}"),
        {"embedding_size": 16},
        checkpoint=partial(checkpoint_blocks, AlbertLayer),
    ),
    _bert(
        "deberta-v2",
        rows("deberta.encoder.layer.{}.attention.self"),
        {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 4},
        implementations=("eager",),
    ),
    Family(
        "t5",
        AutoModelForSeq2SeqLM,
        "t5",
        _T5,
        _pair(
            "encoder.block.{}.layer.0.SelfAttention",
            "decoder.block.{}.layer.0.SelfAttention",
            "decoder.block.{}.layer.1.EncDecAttention",
        ),
        partial(text_pairs, padded=True),
        implementations=("eager", "sdpa"),
        dropout=["dropout_rate"],
        after=_attention_dropout_only,
        generate=decode,
    ),
    Family("bart", AutoModelForSeq2SeqLM, "bart", _BART, _BART_ROWS, partial(text_pairs, padded=True), generate=decode),
    Family(
        "whisper",
        AutoModelForSpeechSeq2Seq,
        "whisper",
        {**_BART, "num_mel_bins": 8, "max_source_positions": TOKENS, "max_target_positions": 16},
        _BART_ROWS,
        speech,
        generate=decode,
    ),
    Family(
        "vit",
        AutoModelForImageClassification,
        "vit",
        _IMAGE,
        rows("vit.layers.{}.attention"),
        images,
        single=("eager",),
        dropout=["attention_probs_dropout_prob"],
    ),
    Family(
        "clip",
        AutoModel,
        "clip",
        {"text_config": _BERT, "vision_config": _IMAGE, "projection_dim": WIDTH},
        rows("vision_model.encoder.layers.{}.self_attn") | rows("text_model.encoder.layers.{}.self_attn"),
        images_and_text,
        single=("eager",),
        dropout=["text_config.attention_dropout", "vision_config.attention_dropout"],
        loss_options={"return_loss": True},
    ),
)

"""Decoder-only transformers models."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.matrix.hf_family import DEPTH, GROUPS, HEADS, IDS, SIZES, WIDTH, Family, continue_text, rows, text
from tests.matrix.variant import Batch

_padded: Callable[[int], Batch] = partial(text, padded=True)
_GPT2 = {"n_embd": WIDTH, "n_layer": DEPTH, "n_head": HEADS, "n_positions": 16}
_GROUPED = {**SIZES, "num_key_value_heads": GROUPS}
_HEAD = {"head_dim": WIDTH // HEADS}
_EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
_LATENT = {  # DeepSeek: keys and values from a latent, values narrower than keys
    **SIZES,
    "num_key_value_heads": HEADS,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}


def _decoder(name: str, layers: str, config: dict[str, Any], model_type: str = "", **options: Any) -> Family:
    """The usual eager attention casts its softmax to float32."""
    facts: dict[str, Any] = {"batch": text, "single": ("eager",), "generate": continue_text, **options}
    return Family(name, AutoModelForCausalLM, model_type or name, {**IDS, **config}, rows(layers), **facts)


def _adapted(model: PreTrainedModel) -> nn.Module:
    with warnings.catch_warnings():  # it asks transformers for something by an old name
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))


_LLAMA, _GPT = "model.layers.{}.self_attn", "transformer.h.{}.attn"

FAMILIES = (
    _decoder("gpt2", _GPT, _GPT2, single=(), dropout=["attn_pdrop"], implementations=("eager", "sdpa")),
    _decoder(
        "gpt2-upcast",
        _GPT,
        {**_GPT2, "reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True},
        "gpt2",
        batch=_padded,
        dropout=["attn_pdrop"],
        implementations=("eager",),
    ),
    _decoder("gptj", _GPT, {**_GPT2, "rotary_dim": 4}, dropout=["attn_pdrop"], implementations=("eager",)),
    _decoder("gpt_neox", "gpt_neox.layers.{}.attention", SIZES, batch=_padded),
    _decoder("llama", _LLAMA, _GROUPED),
    _decoder("llama-padded", _LLAMA, _GROUPED, "llama", batch=_padded),
    _decoder(  # frozen but for the adapters
        "llama-lora",
        f"base_model.model.{_LLAMA}",
        _GROUPED,
        "llama",
        after=_adapted,
    ),
    _decoder("mistral", _LLAMA, {**_GROUPED, **_HEAD, "sliding_window": 4}),
    _decoder("qwen3", _LLAMA, {**_GROUPED, **_HEAD}, batch=_padded),
    _decoder(
        "gemma2",
        _LLAMA,
        {**_GROUPED, **_HEAD, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0, "sliding_window": 4},
        implementations=("eager", "flex_attention"),
    ),
    _decoder(
        "gpt_oss",
        _LLAMA,
        {**_GROUPED, **_HEAD, **_EXPERTS, "sliding_window": 4, "initializer_range": 1.0},  # of the sinks
        single=(),
        implementations=("eager",),
    ),
    _decoder("mixtral", _LLAMA, {**_GROUPED, **_EXPERTS}),
    _decoder("deepseek_v3", _LLAMA, _LATENT),
    _decoder(
        "bloom",
        "transformer.h.{}.self_attention",
        {"hidden_size": WIDTH, "n_layer": DEPTH, "n_head": HEADS},
        batch=_padded,
        implementations=("eager",),
    ),
    _decoder(  # multi-query, rotary; applies no attention dropout
        "falcon",
        "transformer.h.{}.self_attention",
        SIZES,
        single=(),
        dropout=(),
        implementations=("eager", "sdpa"),
    ),
    _decoder(
        "falcon-alibi",
        "transformer.h.{}.self_attention",
        {**SIZES, "alibi": True, "multi_query": False},
        "falcon",
        batch=_padded,
        single=(),
        implementations=("eager", "sdpa"),
    ),
)

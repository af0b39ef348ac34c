"""Tiny models of transformers, and what the outputs of each fused projection are, read off their code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.schedules.fused import Roles

WRITTEN_OUT = ("BloomForCausalLM", "CodeGenForCausalLM")
SMALL = {
    "vocab_size": 24,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GPT2 = {"vocab_size": 24, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 4}
IDS = {"bos_token_id": 0, "eos_token_id": 0}
FOUR = torch.arange(48) // 4
#: Class -> options, and the roles of the outputs: 0 a query, 1 a key, 2 a value.
MODELS: dict[str, tuple[dict[str, Any], dict[str, Tensor]]] = {
    "GPT2LMHeadModel": (GPT2 | IDS, {"h.{}.attn.c_attn": torch.arange(48) // 16}),
    "GPTNeoXForCausalLM": (SMALL, {"layers.{}.attention.query_key_value": FOUR % 3}),
    "BloomForCausalLM": (GPT2 | {"hidden_size": 16} | IDS, {"h.{}.self_attention.query_key_value": FOUR % 3}),
    "Phi3ForCausalLM": (
        SMALL | {"num_key_value_heads": 2},
        {"layers.{}.self_attn.qkv_proj": torch.tensor([0] * 16 + [1] * 8 + [2] * 8)},
    ),
    "FalconForCausalLM": (
        SMALL | {"num_kv_heads": 2, "new_decoder_architecture": True},
        {"h.{}.self_attention.query_key_value": torch.tensor(([0] * 8 + [1] * 4 + [2] * 4) * 2)},
    ),
    # Four blocks of queries, values, keys: what no convention would have guessed.
    "CodeGenForCausalLM": (
        GPT2 | {"n_embd": 32, "n_head": 8, "rotary_dim": 4, "n_ctx": 32} | IDS,
        {"h.{}.attn.qkv_proj": torch.tensor(([0] * 8 + [2] * 8 + [1] * 8) * 4)},
    ),
    "LlamaForCausalLM": (SMALL | {"num_key_value_heads": 2}, {"layers.{}.self_attn.v_proj": torch.full((8,), 2)}),
    "BertModel": (SMALL, {"encoder.layer.{}.attention.self.value": torch.full((16,), 2)}),
}


def build(name: str, attention: str = "sdpa") -> tuple[Any, Roles]:
    """Always the same weights; skips the test where transformers is missing."""
    kind = getattr(pytest.importorskip("transformers"), name)
    options, projections = MODELS[name]
    torch.manual_seed(0)
    model = kind(kind.config_class(**options, attn_implementation=attention))
    roles = {}
    for parameter, p in model.named_parameters():
        for pattern, role in projections.items():
            if any(pattern.format(layer) + "." in parameter for layer in range(2)):
                roles[parameter] = (p.ndim - 1 if name.startswith("GPT2") else 0, role)
    assert len(roles) >= 2
    return model, roles

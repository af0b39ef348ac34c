"""Models of transformers, in each attention implementation that they have and that trains on a CPU."""

from __future__ import annotations

from dataclasses import replace

from transformers import AutoModelForCausalLM

from tests.matrix import hf_decoders, hf_encoders
from tests.matrix.hf_family import DEPTH, IDS, WIDTH, Family, continue_text, text, variants
from tests.matrix.variant import Variant

_FAMILIES = (*hf_decoders.FAMILIES, *hf_encoders.FAMILIES)

VARIANTS: tuple[Variant, ...] = variants(_FAMILIES, "eager", "sdpa")

#: FlexAttention, for a device that trains it, or with ``flex.trainable_on_cpu``. Torch differentiates a score function
#: like Gemma's softcap within a checkpoint that is not reentrant, and gets wrong gradients.
FLEX: tuple[Variant, ...] = tuple(
    replace(variant, checkpoint=None) if variant.name == "gemma2-flex" else variant
    for variant in variants(_FAMILIES, "flex_attention")
)

#: Models without softmax attention: the probe has to say that there is none.
WITHOUT_SOFTMAX: tuple[Variant, ...] = variants(
    [
        Family(
            "mamba",
            AutoModelForCausalLM,
            "mamba",
            {**IDS, "hidden_size": WIDTH, "num_hidden_layers": DEPTH, "state_size": 4},
            {},
            text,
            dropout=(),
            generate=continue_text,
        )
    ],
    "eager",
)

CANNOT: dict[str, str] = {
    **{
        variant.name: "FlexAttention does not support backward on CPU: torch raises, compiled or not"
        for variant in FLEX
    },
    "gpt_oss-flex": "transformers has no learned sinks with FlexAttention on CPU",
    "gpt_oss-sdpa": "transformers has no learned sinks with SDPA",
    "gemma2-sdpa": "transformers has no softcap with SDPA",
    "t5-flex": "transformers indexes T5's bias of positions, which has one sequence, by batch",
}

"""Which cells there are: the variants whose library is installed, under the conditions that apply to them."""

from __future__ import annotations

import importlib.util

from tests.matrix import torch_models
from tests.matrix.condition import Condition
from tests.matrix.conditions import CONDITIONS
from tests.matrix.variant import Variant

Cells = list[tuple[Variant, Condition]]

#: Of every kind one, for a quick look under the conditions that all have to pass.
QUICK = (
    "nanogpt-sdpa",
    "sdpa-gqa",
    "flex-causal",
    "bmm",
    "einsum-weights-right",
    "mha-padded",
    "llama-sdpa",
    "vit_b-torchvision",
)


def installed(*libraries: str) -> bool:
    return all(importlib.util.find_spec(library) for library in libraries)


def all_variants() -> tuple[Variant, ...]:
    found = torch_models.VARIANTS
    if installed("transformers"):
        from tests.matrix import hf_models

        found += hf_models.VARIANTS + hf_models.FLEX + hf_models.WITHOUT_SOFTMAX
    if installed("timm", "torchvision", "x_transformers"):
        from tests.matrix import vision_models, xtransformers_models

        found += vision_models.VARIANTS + xtransformers_models.ALTERED
    return found


def all_cells() -> Cells:
    variants = all_variants()
    return [
        (variant, condition)
        for condition in CONDITIONS
        for variant in variants
        if (variant.layers or condition.always) and condition.applies(variant)
    ]


def quick_cells() -> Cells:
    """Plain training of everything, and the conditions for all of some variants."""
    return [
        (variant, condition)
        for variant, condition in all_cells()
        if condition.name == "plain" or (condition.always and variant.name in QUICK)
    ]

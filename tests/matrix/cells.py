"""Which cells there are: the variants whose library is installed, under the conditions that apply to them."""

from __future__ import annotations

import importlib.util
import zlib
from collections.abc import Callable, Sequence

from tests.matrix import torch_models
from tests.matrix.condition import Condition
from tests.matrix.conditions import CONDITIONS
from tests.matrix.variant import Variant

Cells = list[tuple[Variant, Condition]]

#: Of every kind one, for a quick look under the conditions that all have to pass.
QUICK = (
    "nanogpt-sdpa",
    "sdpa-gqa",
    "bmm",
    "einsum-weights-right",
    "mha-padded",
    "llama-sdpa",
    "timm-vit-unfused",
    "sdpa-cross",
)
QUICK_FLEX = "flex-causal"


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


def all_cells(*, every: bool = False) -> Cells:
    """Each condition on as many variants as it says, or on ``every`` one that it applies to."""
    variants = all_variants()
    cells: Cells = []
    for condition in CONDITIONS:
        possible = [v for v in variants if (v.layers or condition.always) and condition.applies(v)]
        few = set() if every or condition.always else chosen(possible, condition)
        cells += [(variant, condition) for variant in possible if not few or variant.name in few]
    return cells


def chosen(variants: Sequence[Variant], condition: Condition) -> set[str]:
    """The same ones each time, others for each condition."""
    groups: dict[tuple[str, str], list[str]] = {}
    for variant in variants:
        groups.setdefault((variant.library, variant.kind), []).append(variant.name)
    turns = [
        (turn, _shuffled(condition)(name), name)
        for group in groups.values()
        for turn, name in enumerate(sorted(group, key=_shuffled(condition)))
    ]
    return {name for *_, name in sorted(turns)[: condition.tried_on]}


def _shuffled(condition: Condition) -> Callable[[str], int]:
    return lambda name: zlib.crc32(f"{name} {condition.name}".encode())


def quick_cells() -> Cells:
    """Plain training of all variants, and some more; of FlexAttention, which torch traces in every cell, only one."""
    return [
        (variant, condition)
        for variant, condition in all_cells()
        if (variant.kind != "flex" or variant.name == QUICK_FLEX)
        and (condition.name == "plain" or (condition.always and variant.name in QUICK))
    ]

"""Changes to a model before it is trained, and the rows that a report then has."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from tests.matrix.condition import Rows
from tests.matrix.variant import Variant

LORA_PREFIX = "base_model.model."


def module_of(row: str) -> str:
    return row.partition("#")[0]


def checkpointed(reentrant: bool) -> Any:
    def prepare(variant: Variant, model: nn.Module) -> nn.Module:
        assert variant.checkpoint is not None
        variant.checkpoint(model, reentrant)
        return model

    return prepare


# Frozen parameters


def can_freeze(variant: Variant) -> bool:
    """Where nothing is frozen yet."""
    return "lora" not in variant.name


def can_freeze_below(variant: Variant) -> bool:
    return can_freeze(variant) and len({*map(module_of, variant.layers)}) > 1


def freeze_first(variant: Variant, model: nn.Module) -> nn.Module:
    """The first attention; what lies below it is trained, so that an error still reaches it."""
    model.get_submodule(_with_parameters(model, next(iter(variant.layers)))).requires_grad_(False)
    return model


def freeze_below_last(variant: Variant, model: nn.Module) -> nn.Module:
    """Everything but the last attention: no error reaches the others."""
    model.requires_grad_(False)
    model.get_submodule(_with_parameters(model, [*variant.layers][-1])).requires_grad_(True)
    return model


def rows_frozen_below_last(variant: Variant) -> Rows:
    last = module_of([*variant.layers][-1])
    return {row: heads if module_of(row) == last else 0 for row, heads in variant.layers.items()}


def _with_parameters(model: nn.Module, row: str) -> str:
    """The module of a row, or the first around it that has parameters."""
    name = module_of(row)
    while not [*model.get_submodule(name).parameters()]:
        name = name.rpartition(".")[0]
    return name


# One module in all places


def can_share(variant: Variant) -> bool:
    """Where the blocks are one list, all alike."""
    numbers = {len(re.findall(r"\.\d+", row)) for row in variant.layers}
    return (
        numbers == {1}
        and not any("#" in row for row in variant.layers)
        and len(_families(variant)) < len(variant.layers)
    )


def share(variant: Variant, model: nn.Module) -> nn.Module:
    """The first block of each list in the place of all others."""
    for blocks in {row.partition(".0.")[0] for row in _families(variant)}:
        modules = model.get_submodule(blocks)
        assert isinstance(modules, nn.ModuleList | nn.Sequential)
        for index in range(1, len(modules)):
            modules[index] = modules[0]
    return model


def rows_shared(variant: Variant) -> Rows:
    return {
        row if calls == 1 else f"{row}#{call}": variant.layers[row]
        for row, calls in _families(variant).items()
        for call in range(calls)
    }


def _families(variant: Variant) -> dict[str, int]:
    """Rows of the first block, with the number of blocks that have the like."""
    families: dict[str, int] = {}
    for row in variant.layers:
        first = re.sub(r"\.\d+\.", ".0.", row, count=1)
        families[first] = families.get(first, 0) + 1
    return families


# Low-rank adapters


def can_adapt(variant: Variant) -> bool:
    """Where the modules that attend hold the projections, as linear layers of their own."""
    return variant.kind != "multihead" and variant.library != "x-transformers" and can_freeze(variant)


def adapt(variant: Variant, model: nn.Module) -> nn.Module:
    import peft

    config = peft.LoraConfig(r=2, target_modules=_adaptable(variant, model), init_lora_weights="gaussian")
    return peft.get_peft_model(model, config)


def rows_adapted(variant: Variant) -> Rows:
    return {LORA_PREFIX + row: heads for row, heads in variant.layers.items()}


def _adaptable(variant: Variant, model: nn.Module) -> list[str]:
    """The projections inside of the modules that attend."""
    kinds = ("Linear", "Conv1D")
    return [
        f"{row}.{name}"
        for row in map(module_of, variant.layers)
        for name, module in model.get_submodule(row).named_modules()
        if type(module).__name__ in kinds
    ]


# What a probe may be attached to


def model_and_part(models: Sequence[nn.Module], rows: Rows) -> list[tuple[nn.Module, Rows]]:
    """The model, and the block around its first attention."""
    (model,) = models
    part = part_of(rows)
    # A part that is called more than once is called once for each of its own forward passes.
    inside = {module_of(row).removeprefix(f"{part}."): n for row, n in rows.items() if row.startswith(f"{part}.")}
    return [(model, rows), (model.get_submodule(part), inside)]


def has_part(variant: Variant) -> bool:
    return bool(part_of(variant.layers))


def part_of(rows: Rows) -> str:
    return module_of(next(iter(rows))).rpartition(".")[0]

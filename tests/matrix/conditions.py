"""The columns of the matrix."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from tests.matrix import changes, identities
from tests.matrix.accumulation import combined
from tests.matrix.compiling import Backend
from tests.matrix.condition import Condition
from tests.matrix.faults import Trap
from tests.matrix.meanwhile import copy_and_save, infer
from tests.matrix.variant import Variant


def has_checkpointing(variant: Variant) -> bool:
    return variant.checkpoint is not None


def has_double(variant: Variant) -> bool:
    """Where queries, keys and values all have gradients too; next to adapters some have none."""
    return variant.double and changes.can_freeze(variant)


def has_peft(variant: Variant) -> bool:
    return importlib.util.find_spec("peft") is not None and changes.can_adapt(variant)


def _fault(name: str, error: type[BaseException], *, backward: bool) -> Condition:
    trap = Trap(error, backward=backward)
    where = "backward" if backward else "forward"
    return Condition(
        f"{name}-{where}",
        f"every step fails once with {error.__name__} in the {where} pass, and is tried again",
        prepare=trap.install,
        before=trap.spring,
    )


def _compiled(name: str, meaning: str, backend: Backend, **options: Any) -> Condition:
    options = {"tried_on": 12, **options}
    return Condition(name, f"torch.compile ({backend.name}), {meaning}", backend=backend, **options)


_AOT, _INDUCTOR = Backend("aot_eager"), Backend("inductor")

CONDITIONS: tuple[Condition, ...] = (
    Condition("plain", "float32", always=True),
    Condition("autocast", "the forward pass under bfloat16 autocast", always=True, autocast=True),
    Condition(
        "checkpoint", "activation checkpointing", has_checkpointing, always=True, prepare=changes.checkpointed(False)
    ),
    Condition(
        "checkpoint-reentrant",
        "activation checkpointing, reentrant",
        has_checkpointing,
        always=True,
        prepare=changes.checkpointed(True),
    ),
    _compiled("compile", "the whole model; a probed step runs eagerly", _AOT, always=True, prepare=_AOT.whole),
    Condition(
        "float64",
        "float64 all through; gradients of queries, keys, values and scores rebuilt from the record, to 1e-12",
        has_double,
        always=True,
        dtype=torch.float64,
        verify=identities.first_order,
    ),
    # Numbers
    Condition("bf16", "bfloat16 weights", dtype=torch.bfloat16),
    Condition("fp16", "float16 weights", dtype=torch.float16),
    Condition(
        "float64-dropout",
        "float64 with attention dropout 0.1, whose draws the record knows",
        lambda variant: has_double(variant) and variant.dropout,
        dtype=torch.float64,
        dropout=0.1,
        verify=identities.first_order,
    ),
    Condition(
        "accumulation",
        "three micro-batches in a step; statistics are those of one batch",
        micro_batches=3,
        verify=combined,
    ),
    Condition("dropout", "attention dropout 0.1", lambda variant: variant.dropout, dropout=0.1),
    Condition(
        "padding", "the batch says which tokens are padding", lambda variant: variant.padded, verify=identities.padding
    ),
    # Parameters and modules
    Condition(
        "frozen", "the first attention's parameters are frozen", changes.can_freeze, prepare=changes.freeze_first
    ),
    Condition(
        "frozen-below",
        "only the last attention's parameters are trained: the others get no error, and a warning says so",
        changes.can_freeze_below,
        prepare=changes.freeze_below_last,
        rows=changes.rows_frozen_below_last,
        warns="frozen",
    ),
    Condition(
        "lora",
        "peft's adapters on the projections of each attention",
        has_peft,
        prepare=changes.adapt,
        rows=changes.rows_adapted,
    ),
    Condition(
        "shared", "one block in the place of all", changes.can_share, prepare=changes.share, rows=changes.rows_shared
    ),
    # Probes
    Condition("several-models", "two models and their probes in one training step", number=2),
    Condition(
        "nested-probes",
        "a probe on the model and one on its first block",
        changes.has_part,
        watched=changes.model_and_part,
    ),
    Condition(
        "copies",
        "deepcopy, pickle and state_dict in the middle of each step; the copies compute gradients",
        between=copy_and_save,
    ),
    Condition("inference", "generate(), no_grad and inference_mode between the steps", before=infer),
    Condition("evaluate", "probe.evaluate between the steps", evaluate=True),
    # Errors
    _fault("exception", ValueError, backward=False),
    _fault("exception", ValueError, backward=True),
    _fault("interrupt", KeyboardInterrupt, backward=False),
    _fault("interrupt", KeyboardInterrupt, backward=True),
    # Ways to compile
    _compiled("compile-fullgraph", "in one graph", _AOT, prepare=_AOT.in_one_graph),
    _compiled("compile-in-place", "model.compile()", _AOT, prepare=_AOT.in_place),
    _compiled("compile-later", "after the probe was attached", _AOT, late=_AOT.later),
    _compiled("compile-blocks", "block by block", _AOT, prepare=_AOT.each_block),
    _compiled(
        "compile-inductor",
        "the whole model",
        _INDUCTOR,
        applies=lambda variant: variant.kind != "flex",  # its kernel for CPUs has no backward pass
        prepare=_INDUCTOR.whole,
    ),
    _compiled(
        "compile-tap",
        "the whole model; a probed step runs compiled too, and the graph hands out its attention",
        _INDUCTOR,
        applies=lambda variant: variant.kind == "sdpa",
        tried_on=14,
        tapped=True,
        prepare=_INDUCTOR.whole,
    ),
)

"""Parameters that are cut into shards or put into one: there a part of a weight is not where it seems to be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from attnprobe.errors import ScheduleError


def refuse_flat(named: Mapping[str, Tensor]) -> None:
    """Raise ScheduleError for parameters that are several in one."""
    for name, parameter in named.items():
        if _is_a(parameter, "FlatParameter"):
            raise ScheduleError(
                f"{name!r} is a FlatParameter of FSDP, which holds all weights of a module in one row. Use "
                "fully_shard(), or FullyShardedDataParallel(..., use_orig_params=True), with separate value weights."
            )


def refuse_sharded(model: nn.Module, named: Iterable[tuple[str, Tensor]]) -> None:
    """Raise ScheduleError where entries of one of these parameters may be missing in this process."""
    for name, reason in sharded(model, named).items():
        raise ScheduleError(f"{name!r} is {reason}")


def sharded(model: nn.Module, named: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Names of those parameters of which entries may be missing in this process, and why."""
    wrapped = any(_is_a(module, "FullyShardedDataParallel") for module in model.modules())
    kind = "sharded by FullyShardedDataParallel" if wrapped else "a DTensor"
    reason = (
        f"{kind}: its value entries may lie on other ranks, where neither confirm= nor a part of "
        "it works. Fused weights need unsharded parameters, as under DistributedDataParallel; separate value "
        "weights may be sharded, without confirm=."
    )
    return {name: reason for name, parameter in named if wrapped or _is_a(parameter, "DTensor")}


def _is_a(thing: object, kind: str) -> bool:
    """By name: torch.distributed need not be there, and importing it takes long."""
    return any(base.__name__ == kind for base in type(thing).__mro__)

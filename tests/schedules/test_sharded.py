"""Parts of weights that are cut into shards, or put into one, are refused; separate weights may be sharded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn, optim
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from attnprobe.errors import AttnProbeWarning, ScheduleError
from attnprobe.schedules import ValueLearningRate
from tests.schedules.fused import Last, Multihead, Separate, Stack, batch

if not dist.is_available():
    pytest.skip("this torch has no distributed package", allow_module_level=True)


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[object]:
    """Of this process alone."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def sharded(model: nn.Module, mesh: object) -> nn.Module:
    for module in model.modules():
        for name, p in [*module.named_parameters(recurse=False)]:
            setattr(module, name, nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])))
    return model


def test_shards(mesh: object) -> None:
    model = sharded(Stack(Last, Separate), mesh)
    with pytest.raises(ScheduleError, match=r"'layers\.0\.c_attn\.weight' is a DTensor.*other ranks"):
        ValueLearningRate(model, confirm=lambda: model(batch(0)[0]))
    model = sharded(Stack(Multihead), mesh)
    with pytest.raises(ScheduleError, match=r"in_proj_weight' is a DTensor"):
        ValueLearningRate(model).attach(optim.SGD(model.parameters(), lr=0.1))


def test_shards_in_a_group_that_is_added_later(mesh: object) -> None:
    model = sharded(Stack(Multihead), mesh)
    plain = nn.ModuleDict({"sharded": model, "whole": Stack(Multihead)})
    optimizer = optim.SGD(plain["whole"].parameters(), lr=0.1)
    ValueLearningRate(plain).attach(optimizer)
    optimizer.add_param_group({"params": [*model.parameters()]})
    old = [p.full_tensor().clone() for p in model.parameters()]
    for p in plain.parameters():
        p.grad = torch.ones_like(p)
    with pytest.warns(AttnProbeWarning, match=r"in_proj_weight', '.*in_proj_bias' from here on.*DTensor"):
        optimizer.step()
    for p, before in zip(model.parameters(), old, strict=True):
        torch.testing.assert_close(p.full_tensor(), before - 0.1)
    optimizer.step()  # warnings are errors here


def test_separate_weights_may_be_sharded(mesh: object) -> None:
    model, plain = sharded(Stack(Separate), mesh), Stack(Separate)
    for net in (model, plain):
        optimizer = optim.AdamW(net.parameters(), lr=0.1, foreach=False)
        ValueLearningRate(net, 3.0).attach(optimizer)
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert isinstance(p, DTensor)
        torch.testing.assert_close(p.full_tensor(), q)


def test_one_parameter_for_all() -> None:
    class FlatParameter(nn.Parameter):
        """Known by its name."""

    model = nn.Module()
    model._flat_param = FlatParameter(torch.zeros(4))
    with pytest.raises(ScheduleError, match=r"'_flat_param' is a FlatParameter of FSDP.*use_orig_params=True"):
        ValueLearningRate(model)

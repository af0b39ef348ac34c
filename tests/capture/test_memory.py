"""What is held lives as long as what the model's own backward pass holds, and where that is."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.capture.models import Attention, Model, bmm, einsum, explicit, explicit_in_place, loss_of, sdpa, tokens
from tests.capture.reference import names, session

ATTEND = {"sdpa": sdpa(), "matmul": explicit, "bmm": bmm, "einsum": einsum, "in place": explicit_in_place}
each_kind = pytest.mark.parametrize("attend", ATTEND.values(), ids=ATTEND.keys())


@pytest.fixture(autouse=True)
def no_garbage_collection() -> Iterator[None]:
    """Reference counts alone have to free everything."""
    gc.disable()
    yield
    gc.enable()


class Storages:
    """Which storages of the tensors given to an attention are still in memory."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        self.attend, self.seen = attend, []

    def __call__(self, module: Attention, *qkv: Tensor) -> Tensor:
        output = self.attend(module, *qkv)
        self.seen += [weakref.ref(tensor.untyped_storage()) for tensor in (*qkv, output)]
        return output

    def alive(self) -> int:
        return sum(storage() is not None for storage in self.seen)


class Checkpointed(nn.Module):
    def __init__(self, attend: Callable[..., Tensor], reentrant: bool) -> None:
        super().__init__()
        self.attn, self.reentrant = Attention(attend), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.attn, x, use_reentrant=self.reentrant)


@each_kind
def test_backward_frees_what_was_held(attend: Callable[..., Tensor]) -> None:
    storages = Storages(attend)
    model = Model(lambda: Attention(storages))
    with session(model) as watching:
        watching.receive = lambda module, record: 1
        loss = loss_of(model(*tokens()))
        assert storages.alive()
        loss.backward()
        assert storages.alive() == 0
    assert len(names(watching.seen)) == 2


@each_kind
def test_forward_that_is_not_followed_by_backward_frees_everything(attend: Callable[..., Tensor]) -> None:
    storages = Storages(attend)
    model = Model(lambda: Attention(storages))
    with session(model):
        loss = loss_of(model(*tokens()))
        assert storages.alive()
        del loss
        assert storages.alive() == 0


@pytest.mark.parametrize("reentrant", [True, False])
@each_kind
def test_checkpointing_frees_what_was_held(attend: Callable[..., Tensor], reentrant: bool) -> None:
    storages = Storages(attend)
    model = Model(lambda: Checkpointed(storages, reentrant))
    with session(model) as watching:
        loss = loss_of(model(*tokens()))
        assert storages.alive() == 0
        loss.backward()
    assert len(names(watching.seen)) == 2


def test_offloading_takes_what_was_held() -> None:
    packed: list[torch.Size] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor.shape)
        return tensor

    model = Model(lambda: Attention(sdpa()))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(*tokens())
        before = len(packed)
        with session(model):
            model(*tokens())
    assert len(packed) == 2 * before + 2 * 4  # query, key, value and output of two layers

"""Whatever ends a forward or backward pass, nothing stays behind and the next pass is measured as ever."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from attnprobe import AttentionProbe
from attnprobe.capture.session import SILENT
from tests.capture.models import Attention, Model, Multihead, bmm, loss_of, sdpa, tokens
from tests.capture.reference import names, session
from tests.global_state import global_state


class Interrupted(BaseException):
    """As KeyboardInterrupt: torch runs no hooks for it."""


class Trap(nn.Module):
    """Raises when it is armed, after its attention or ``early``, before it."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention
        self.error: BaseException | None = None
        self.early = False

    def forward(self, x: Tensor) -> Tensor:
        if self.error is not None and self.early:
            raise self.error
        x = self.attention(x)
        if self.error is not None:
            with torch.device("cpu"):
                raise self.error
        return x


def trapped(attention: Callable[[], nn.Module] = lambda: Attention(sdpa())) -> tuple[Model, Trap]:
    model = Model(lambda: Trap(attention()))
    trap = model.layers[1]
    assert isinstance(trap, Trap)
    return model, trap


ERRORS = [ValueError("no"), KeyboardInterrupt(), SystemExit(1), Interrupted()]
each_error = pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)


def fail(model: nn.Module, trap: Trap, error: BaseException) -> None:
    trap.error = error
    with pytest.raises(type(error)):
        model(*tokens())
    trap.error = None


@each_error
@pytest.mark.parametrize("attention", [lambda: Attention(bmm), lambda: Multihead(batch_first=True)])
def test_forward_that_raises(attention: Callable[[], nn.Module], error: BaseException) -> None:
    before = global_state()
    model, trap = trapped(attention)
    with session(model):
        fail(model, trap, error)
    assert global_state() == before
    probe = AttentionProbe(model)
    fail(model, trap, error)
    probe.close()
    assert global_state() == before


@each_error
def test_error_that_leaves_the_with_block(error: BaseException) -> None:
    before = global_state()
    model, trap = trapped()
    trap.error = error
    with pytest.raises(type(error)), AttentionProbe(model):
        model(*tokens())
    assert global_state() == before


@each_error
def test_next_forward_in_the_same_step_is_counted_anew(error: BaseException) -> None:
    model, trap = trapped()
    with session(model) as watching:
        fail(model, trap, error)
        fail(model, trap, error)
        loss_of(model(*tokens())).backward()
    measured = [call for call in watching.seen if call.reason != SILENT]
    assert names(measured) == ["layers.0.attention", "layers.1.attention"]
    assert {call.index for call in watching.seen} == {0}


@each_error
def test_mode_is_off_again_outside_of_the_model(error: BaseException) -> None:
    """An ordinary exception unwinds at once, an interrupt with the next forward pass or the step's end."""
    model, trap = trapped()
    with session(model) as watching:
        fail(model, trap, error)
        if isinstance(error, Exception):
            assert watching.mode not in _get_current_function_mode_stack()
        model(*tokens())
        assert watching.mode not in _get_current_function_mode_stack()


@each_error
def test_submodule_that_is_called_alone_after_an_interrupt(error: BaseException) -> None:
    model, trap = trapped()
    with session(model) as watching:
        fail(model, trap, error)
        watching.seen.clear()
        loss_of(model.layers[0](*tokens())).backward()
    assert names(watching.seen) == ["layers.0.attention"]


def test_exception_that_the_model_itself_catches() -> None:
    class Patient(Model):
        def forward(self, x: Tensor) -> Tensor:
            try:
                super().forward(x)
            except (ValueError, KeyboardInterrupt):
                trap.error = None
            return super().forward(x)

    for error in (ValueError("no"), KeyboardInterrupt()):
        model = Patient(lambda: Trap(Attention(sdpa())))
        trap = model.layers[0]
        trap.error = error
        with session(model) as watching:
            loss_of(model(*tokens())).backward()
        measured = [(call.module, call.index) for call in watching.seen if call.reason != SILENT]
        assert measured == [("layers.0.attention", 1), ("layers.1.attention", 0)]


@pytest.mark.parametrize("reentrant", [True, False])
@each_error
def test_recomputation_that_raises(error: BaseException, reentrant: bool) -> None:
    class Recomputed(Model):
        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            for layer in self.layers:
                x = x + checkpoint(layer, x, use_reentrant=reentrant)
            return x

    before = global_state()
    model = Recomputed(lambda: Trap(Attention(sdpa())))
    trap = model.layers[0]

    def train() -> None:
        with session(model):
            loss = loss_of(model(*tokens()))
            trap.error, trap.early = error, not reentrant  # the other kind stops where it knows enough
            loss.backward()

    with pytest.raises(type(error)):
        train()
    assert global_state() == before


def test_exception_in_the_backward_pass() -> None:
    before = global_state()
    model = Model(lambda: Attention(sdpa()))
    with session(model) as watching:
        output = model(*tokens())
        hook = output.register_hook(partial(raising, ValueError("no")))
        with pytest.raises(ValueError, match="no"):
            loss_of(output).backward()
        hook.remove()
    assert {call.reason for call in watching.seen} == {SILENT}
    assert global_state() == before


def raising(error: BaseException, gradient: Tensor) -> Tensor:
    raise error


def test_errors_that_arrive_after_the_end_are_ignored() -> None:
    model = Model(lambda: Attention(sdpa()))
    with session(model) as watching:
        loss = loss_of(model(*tokens()))
    loss.backward()
    assert {call.reason for call in watching.seen} == {SILENT}


def test_receiver_that_fails_switches_off_its_layer_only() -> None:
    def receive(module: str, record: object) -> object:
        if module == "layers.1":
            raise ValueError("broken")
        return record

    model = Model(lambda: Attention(sdpa()))
    with session(model, strict=False) as watching:
        watching.receive = receive
        loss_of(model(*tokens())).backward()
    assert {call.module: call.result is not None for call in watching.seen} == {"layers.0": True, "layers.1": False}
    assert repr(watching.problems["layers.1"]) == "ValueError('broken')"


def test_strict_session_raises() -> None:
    def receive(module: str, record: object) -> object:
        raise ValueError("broken")

    model = Model(lambda: Attention(sdpa()))
    with session(model) as watching:
        watching.receive = receive
        loss = loss_of(model(*tokens()))
        with pytest.raises(ValueError, match="broken"):
            loss.backward()

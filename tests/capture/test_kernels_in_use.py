"""When the ``apply`` of a registered kernel is another one, and training in ways that meet it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import attnprobe as ap
from attnprobe.errors import AttnProbeWarning
from tests.capture.models import DEPTH, WIDTH, Attention, Model, loss_of, tokens
from tests.capture.opaque import (
    CAUSAL,
    Case,
    Compute,
    causal,
    each_way,
    measured,
    opaque,
    registrations,  # noqa: F401
    told,
)
from tests.capture.reference import session
from tests.capture.training import assert_same_training

pytestmark = pytest.mark.usefixtures("registrations")


def kernel_and_model() -> tuple[Any, nn.Module]:
    kernel = ap.register_attention(CAUSAL.adapter)(opaque(causal))
    return kernel, CAUSAL.model(lambda *qkv: kernel.apply(*qkv))


def train(model: nn.Module, *probes: ap.AttentionProbe) -> list[Any]:
    loss_of(model(*CAUSAL.batch())).backward()
    return [probe.step() for probe in probes]


# When ``apply`` is another one


def test_while_a_step_is_probed_and_only_then() -> None:
    kernel, model = kernel_and_model()
    probe = ap.AttentionProbe(model, every_n_steps=2)
    for probed in (True, False, True, False):
        assert ("apply" in vars(kernel)) is probe.active is probed
        (report,) = train(model, probe)
        assert (report is not None) is probed
    probe.close()
    assert "apply" not in vars(kernel)


def test_not_after_a_pause_a_discarded_step_a_close_or_an_exception() -> None:
    kernel, model = kernel_and_model()
    probe = ap.AttentionProbe(model)
    with probe.paused():
        assert "apply" not in vars(kernel)
    assert "apply" in vars(kernel)
    probe.discard()
    assert "apply" not in vars(kernel)
    probe.begin()
    assert "apply" in vars(kernel)
    probe.close()
    assert "apply" not in vars(kernel)
    with pytest.raises(ZeroDivisionError), ap.AttentionProbe(model):
        loss_of(fails(model(*CAUSAL.batch())))
    assert "apply" not in vars(kernel)


def test_two_probes_share_it() -> None:
    kernel, model = kernel_and_model()
    with ap.AttentionProbe(model) as one, ap.AttentionProbe(model.layers) as other:
        reports = train(model, one, other)
    assert [report.layers for report in reports] == [("layers.0", "layers.1"), ("0", "1")]
    assert all(report["entropy"].isfinite().all() and not report.warnings for report in reports)
    with ap.AttentionProbe(model) as one:
        ap.AttentionProbe(model).close()
        assert "apply" in vars(kernel)
        (report,) = train(model, one)
    assert report["entropy"].isfinite().all()
    assert "apply" not in vars(kernel)


def test_a_kernel_registered_within_a_step_is_seen_from_the_next_one_on() -> None:
    kernel = opaque(causal)
    model = CAUSAL.model(lambda *qkv: kernel.apply(*qkv))
    with ap.AttentionProbe(model, every_n_steps=1) as probe, ap.AttentionProbe(model):
        ap.register_attention(CAUSAL.adapter)(kernel)
        with pytest.warns(AttnProbeWarning, match="Kernel"):
            train(model, probe)
        assert train(model, probe)[0].residual.max() < 1e-12
    assert "apply" not in vars(kernel)


def test_a_subclass_is_another_kernel_until_it_is_registered() -> None:
    kernel = opaque(causal)

    class Twice(kernel):
        @staticmethod
        def forward(ctx: Any, *qkv: Tensor) -> Any:
            return 2 * kernel.forward(ctx, *qkv)

        @staticmethod
        def backward(ctx: Any, u: Tensor) -> Any:
            return kernel.backward(ctx, 2 * u)

    ap.register_attention(CAUSAL.adapter)(kernel)
    model = CAUSAL.model(lambda *qkv: Twice.apply(*qkv))
    with pytest.warns(AttnProbeWarning, match=r"layers\.[01]: it runs the autograd.Function Twice"):
        assert not measured(model, *CAUSAL.batch()).valid
    ap.register_attention(lambda q, k, v: told(causal=True)(q, k, 2 * v))(Twice)
    report = measured(model, *CAUSAL.batch())
    assert report.residual.max() < 1e-12
    assert not report.warnings
    assert "apply" not in vars(Twice).keys() | vars(kernel).keys()


@pytest.mark.parametrize("kind", [classmethod, staticmethod])
def test_a_class_with_its_own_apply(kind: Any) -> None:
    kernel = opaque(causal)

    def apply(*args: Any) -> Any:
        *_, query, keys_and_values = args
        return super(kernel, kernel).apply(query, *keys_and_values)

    kernel.apply = kind(apply)
    own = vars(kernel)["apply"]
    ap.register_attention(lambda q, kv: told(causal=True)(q, *kv))(kernel)
    model = CAUSAL.model(lambda q, k, v: kernel.apply(q, (k, v)))
    assert measured(model, *CAUSAL.batch()).residual.max() < 1e-12
    assert vars(kernel)["apply"] is own


def test_a_name_for_apply_from_before_the_probe() -> None:
    """Torch's own method cannot be replaced there, but it can be registered as any function."""
    kernel = ap.register_attention(CAUSAL.adapter)(opaque(causal))
    with pytest.warns(
        AttnProbeWarning, match=r"layers\.[01]: it runs the registered autograd.Function Kernel through a name"
    ):
        assert not measured(CAUSAL.model(kernel.apply), *CAUSAL.batch()).valid
    attend = ap.register_attention(CAUSAL.adapter)(kernel.apply)
    assert measured(CAUSAL.model(attend), *CAUSAL.batch()).residual.max() < 1e-12


def test_a_name_for_apply_from_within_a_probed_step_goes_on_working() -> None:
    kernel, model = kernel_and_model()
    with ap.AttentionProbe(model):
        attend = kernel.apply
    other = CAUSAL.model(attend)
    assert torch.equal(model(*CAUSAL.batch()), other(*CAUSAL.batch()))
    assert measured(other, *CAUSAL.batch()).residual.max() < 1e-12


def fails(*args: Any) -> Any:
    raise ZeroDivisionError


@each_way
def test_without_a_probe_nobody_is_asked(register: Callable[[Case], Compute]) -> None:
    model = CAUSAL.model(register(Case(causal, fails)))
    with ap.AttentionProbe(model, strict=True) as probe:
        probe.discard()
        train(model)


class Noting(TorchFunctionMode):
    """A mode of the user's own."""

    def __init__(self) -> None:
        self.called: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


@each_way
def test_modes_of_others_see_what_they_always_saw(register: Callable[[Case], Compute]) -> None:
    kernel, called = opaque(causal), []
    registered = CAUSAL.model(register(CAUSAL))
    for model, probed in (
        (CAUSAL.model(lambda *qkv: kernel.apply(*qkv)), False),
        (registered, False),
        (registered, True),
    ):
        with ap.AttentionProbe(model) as probe, Noting() as noting:
            if not probed:
                probe.discard()
            model(*CAUSAL.batch())
        called.append(Counter(noting.called))
    assert called[0]["scaled_dot_product_attention"] == 2
    assert called[0] == called[1]
    assert called[0] <= called[2]  # what the probe itself does they see too


@each_way
@pytest.mark.parametrize("probed", [False, True])
def test_the_default_device_is_that_of_the_user(register: Callable[[Case], Compute], probed: bool) -> None:
    """Kernels make room for their output, on which device a mode decides."""
    devices = []

    def allocating(*qkv: Tensor) -> Tensor:
        devices.append(torch.empty(1).device.type)
        return causal(*qkv)

    model, batch = CAUSAL.model(register(Case(allocating, CAUSAL.adapter))), CAUSAL.batch()
    with ap.AttentionProbe(model) as probe, torch.device("meta"):
        if not probed:
            probe.discard()
        model(*batch)
    assert devices == ["meta", "meta"]


# Training in unusual ways


class Region(nn.Module):
    """The kernel under activation checkpointing, as a bare function or with its module."""

    def __init__(self, attend: Compute, *, bare: bool, reentrant: bool) -> None:
        super().__init__()
        again = partial(checkpoint, use_reentrant=reentrant)
        self.attention = Attention(lambda _, *qkv: again(attend, *qkv) if bare else attend(*qkv))
        self.run = self.attention if bare else partial(again, self.attention)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("bare", [True, False], ids=["function", "module"])
@each_way
def test_checkpointing(register: Callable[[Case], Compute], bare: bool, reentrant: bool) -> None:
    attend = register(CAUSAL)

    def build() -> nn.Module:
        torch.manual_seed(3)
        return Model(lambda: Region(attend, bare=bare, reentrant=reentrant)).double()

    assert_same_training(build, CAUSAL.batch())
    report = measured(build(), *CAUSAL.batch())
    assert report.layers == ("layers.0.attention", "layers.1.attention")
    assert report.residual.max() < 1e-12
    assert not report.warnings
    model = build()
    with session(model):
        loss = loss_of(model(*CAUSAL.batch()))
    loss.backward()  # stopped in between: checkpointing finds as many tensors as before


@each_way
def test_autocast(register: Callable[[Case], Compute]) -> None:
    def forward(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float()

    attend, batch = register(CAUSAL), tokens()
    assert_same_training(lambda: CAUSAL.model(attend).float(), batch, forward=forward)
    with ap.AttentionProbe(model := CAUSAL.model(attend).float()) as probe:
        loss_of(forward(model, *batch)).backward()
        report = probe.step()
    assert report["entropy"].isfinite().all()
    assert 0 < report.residual.max() < 0.05


@each_way
def test_another_mode(register: Callable[[Case], Compute]) -> None:
    def forward(model: nn.Module, x: Tensor) -> Tensor:
        with torch.device("cpu"):
            return model(x)

    attend = register(CAUSAL)
    assert_same_training(lambda: CAUSAL.model(attend), CAUSAL.batch(), forward=forward)
    with torch.device("cpu"):
        assert measured(CAUSAL.model(attend), *CAUSAL.batch()).residual.max() < 1e-12


class Formula(torch.autograd.Function):
    """Written so that torch.compile sees through it."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.mT * DEPTH**-0.5).softmax(-1)
        ctx.save_for_backward(q, k, v, weights)
        return weights @ v

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> Any:
        q, k, v, weights = ctx.saved_tensors
        b = u @ v.mT
        scores = weights * (b - (weights * b).sum(-1, keepdim=True)) * DEPTH**-0.5
        return scores @ k, scores.mT @ q, weights.mT @ u


def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return Formula.apply(q, k, v)


class Straight(nn.Module):
    def __init__(self, attend: Compute) -> None:
        super().__init__()
        self.project, self.attend = nn.Linear(WIDTH, 3 * WIDTH), attend

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(*self.project(x).unflatten(-1, (2, -1)).transpose(1, 2).chunk(3, -1))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own compiler does
@pytest.mark.parametrize("kind", ["function", "class"])
def test_compiled(kind: str) -> None:
    """One graph as long as no step is probed, and the same one after it; a probed step runs eagerly."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter, register = CompileCounter(), ap.register_attention(told())
    attend = register(formula) if kind == "function" else formula
    if kind == "class":
        register(Formula)
    torch.manual_seed(0)
    model = Straight(attend)
    compiled, (x,) = torch.compile(model, backend=counter, fullgraph=True), tokens()
    loss_of(compiled(x)).backward()
    assert counter.frame_count == 1
    with ap.AttentionProbe(compiled, every_n_steps=2) as probe:
        for probed in (True, False, True, False):
            loss = loss_of(compiled(x))
            loss.backward()
            report = probe.step()
            assert (report is not None) is probed
            assert report is None or report.residual.max() < 1e-5
    assert counter.frame_count == 1
    torch._dynamo.reset()

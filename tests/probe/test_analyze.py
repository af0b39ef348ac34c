"""analyze: one batch, and no trace of it on the model."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import attnprobe as ap
from tests.probe.models import SDPA, Net, batch, loss_of, net

X = batch()


def returned(model):
    return loss_of(model, X)


def called(model):
    loss_of(model, X).backward()


def called_and_returned(model):
    loss = loss_of(model, X)
    loss.backward()
    return loss


def graph_kept(model):
    loss = loss_of(model, X)
    loss.backward(retain_graph=True)
    return loss


def grad_only(model):
    loss = loss_of(model, X)
    torch.autograd.grad(loss, [*model.parameters()])
    return loss


def called_and_non_scalar_returned(model):
    output = model(X)
    output.square().sum().backward()
    return output


@pytest.mark.parametrize(
    "closure", [returned, called, called_and_returned, graph_kept, grad_only, called_and_non_scalar_returned]
)
@pytest.mark.parametrize("grad", [True, False])
def test_the_closure_returns_the_loss_or_calls_backward(closure, grad):
    model = net()
    with torch.set_grad_enabled(grad):
        report = ap.analyze(model, lambda: closure(model))
    expected = ap.analyze(model, lambda: returned(model))
    assert report.layers == ("layers.0", "layers.1")
    assert torch.equal(report["score_grad_norm"], expected["score_grad_norm"])
    has_loss = closure in (returned, called_and_returned, graph_kept, grad_only)
    assert report.loss == (loss_of(model, X).item() if has_loss else pytest.approx(math.nan, nan_ok=True))


def bits(tensor):
    return None if tensor is None else tensor.detach().clone().numpy().tobytes()


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    class Checkpointed(Net):
        def forward(self, x):
            for layer in self.layers:
                x = x + checkpoint(layer, x, use_reentrant=reentrant)
            return self.head(self.norm(x.mean(1)))

    torch.manual_seed(0)
    model, x = Checkpointed(), X.clone().requires_grad_()
    report = ap.analyze(model, lambda: loss_of(model, x))
    plain = net()
    expected = ap.analyze(plain, lambda: returned(plain))
    assert report.layers == expected.layers
    torch.testing.assert_close(report["score_grad_norm"], expected["score_grad_norm"], rtol=1e-5, atol=0)


def full_state(model):
    return {
        "gradients": [(id(p.grad), bits(p.grad)) for p in model.parameters()],
        "parameters": [bits(p) for p in model.parameters()],
        "buffers": [
            (name, id(buffer), bits(buffer)) for module in model.modules() for name, buffer in module._buffers.items()
        ],
        "training": [module.training for module in model.modules()],
        "random": bits(torch.get_rng_state()),
    }


class Replaces(Net):
    """Buffers of every habit: replaced, made on first use, written through ``.data``, expanded, not finite."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register_buffer("average", torch.zeros(16))
        self.register_buffer("cache", None)
        self.register_buffer("codes", torch.zeros(3))
        self.register_buffer("mask", torch.ones(6).bool().expand(4, 6))
        self.register_buffer("nothing", torch.full((2,), math.nan))

    def forward(self, x):
        self.average = 0.9 * self.average + 0.1 * x.detach().mean((0, 1))
        self.cache = torch.ones(3)
        self.codes.data.add_(1)
        self.nothing += 1
        if "late" not in self._buffers:
            self.register_buffer("late", torch.ones(1))
        return super().forward(x * self.mask[..., None])


def raises(model):
    returned(model).backward()
    raise ZeroDivisionError


def output_only(model):
    return model(X)


@pytest.mark.parametrize(
    ("closure", "error"),
    [(returned, None), (graph_kept, None), (raises, ZeroDivisionError), (output_only, ap.InvalidStepError)],
)
@pytest.mark.parametrize("make", [Net, Replaces])
def test_the_model_is_afterwards_as_before(make, closure, error):
    torch.manual_seed(0)
    model = make(dropout=0.3)
    if make is Net:  # some gradients are there before, some are not
        returned(model).backward()
        next(model.parameters()).grad = None
    model.layers[1].eval()

    def everything():
        torch.randn(3)
        return closure(model.train())

    before = full_state(model)
    with pytest.raises(error) if error else nullcontext():
        assert ap.analyze(model, everything).valid
    assert full_state(model) == before


def test_a_graph_that_is_alive_can_still_go_backward():
    """The batch norm's buffers are saved in it: restoring them must not count as a change."""
    model = net()
    loss = loss_of(model, X)
    ap.analyze(model, lambda: returned(model))
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def no_attention():
    return nn.Linear(16, 2)


@pytest.mark.parametrize("closure", [returned, called, called_and_returned, lambda model: None])
def test_a_model_without_attention(closure):
    model = no_attention()
    with pytest.raises(ap.NoAttentionError) as raised:
        ap.analyze(model, lambda: closure(model))
    kinds = "F.scaled_dot_product_attention", "softmax(query @ key^T) @ value", "nn.MultiheadAttention"
    for sought in (*kinds, "Linear"):
        assert sought in str(raised.value)


@pytest.mark.parametrize(
    ("closure", "message"),
    [
        (
            lambda model: {"loss": loss_of(model, X)},
            "to call backward itself, it returned dict",
        ),
        (lambda model: loss_of(model, X).item(), "it returned float"),
        (lambda model: model(X), r"must return a scalar loss, got shape \[4, 3\]"),
        (
            lambda model: loss_of(model.requires_grad_(False), X),
            "layers.0: no gradient reaches it",
        ),
        (lambda model: [graph_kept(model).backward()], "backward ran more than once"),
    ],
)
def test_what_cannot_be_measured_is_an_error_with_the_reason(closure, message):
    model = net()
    with pytest.raises(ap.InvalidStepError, match=message):
        ap.analyze(model, lambda: closure(model))


def test_errors_inside_own_statistics_and_rules_are_raised():
    def measure(record):
        raise ZeroDivisionError

    model = net()
    with pytest.raises(ZeroDivisionError):
        ap.analyze(model, lambda: returned(model), statistics=ap.Statistic("mine", "", measure=measure))


def test_alarms_and_a_single_module():
    model = SDPA()
    with torch.no_grad():
        model.qkv.weight *= 300
    report = ap.analyze(model, lambda: returned(model), alarms=["nonfinite"])
    assert report.layers == ("SDPA",)
    assert report.alarms == ()
    with torch.no_grad():
        model.qkv.weight[0, 0] = math.inf
    (alarm,) = ap.analyze(model, lambda: returned(model), alarms="nonfinite").alarms
    assert alarm.layer == "SDPA"

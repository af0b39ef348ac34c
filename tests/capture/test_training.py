"""Training under a session or a probe is bit by bit the training without."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from attnprobe import AttentionProbe
from attnprobe.capture.session import REPEATED
from tests.capture.models import VARIANTS, Attention, Model, Multihead, Variant, bmm, explicit, loss_of, sdpa, tokens
from tests.capture.reference import names, session
from tests.capture.training import assert_same_training, by_probe

ATTENTION: dict[str, Callable[[], nn.Module]] = {
    "sdpa": lambda: Attention(sdpa(is_causal=True)),
    "matmul": lambda: Attention(explicit, dropout=0.2),
    "bmm": lambda: Attention(bmm),
    "multihead": lambda: Multihead(call={"need_weights": False}, batch_first=True, dropout=0.2),
    "multihead weights": lambda: Multihead(batch_first=True),
}
each_kind = pytest.mark.parametrize("attention", ATTENTION.values(), ids=ATTENTION.keys())


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_every_variant(variant: Variant) -> None:
    assert_same_training(lambda: variant.model(torch.float32), variant.batch(torch.float32))


@each_kind
def test_bfloat16_weights(attention: Callable[[], nn.Module]) -> None:
    (x,) = tokens()
    assert_same_training(lambda: Model(attention).bfloat16(), (x.bfloat16(),))


@each_kind
def test_autocast(attention: Callable[[], nn.Module]) -> None:
    def forward(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float()

    assert_same_training(lambda: Model(attention), tokens(), forward=forward)


@each_kind
def test_gradient_accumulation(attention: Callable[[], nn.Module]) -> None:
    assert_same_training(lambda: Model(attention), tokens(), micro_batches=3)


def test_micro_batches_of_a_step_are_one_layer() -> None:
    model, batch = Model(ATTENTION["sdpa"]), tokens()
    with session(model) as watching:
        for _ in range(2):
            loss_of(model(*batch)).backward()
    assert names(watching.seen) == ["layers.0", "layers.0", "layers.1", "layers.1"]
    with by_probe(model) as probe:
        for _ in range(2):
            loss_of(model(*batch)).backward()
        report = probe.step()
    assert report is not None
    assert report.layers == ("layers.0", "layers.1")


@each_kind
def test_autocast_of_single_precision_vectors(attention: Callable[[], nn.Module]) -> None:
    """Under autocast q, k and v may come in single precision; what is measured is what was computed."""

    class Upcast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = attention()
            if isinstance(self.attn, Attention):
                inner = self.attn.attend
                self.attn.attend = lambda module, q, k, v: inner(module, q.float(), k.float(), v.float())

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.attn(x).float()

    assert_same_training(Upcast, tokens())


@each_kind
def test_inside_device_and_default_dtype_contexts(attention: Callable[[], nn.Module]) -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Model(attention)

        def forward(self, x: Tensor) -> Tensor:
            with torch.device("cpu"):
                return self.model(x) + torch.zeros(())

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        with torch.device("meta"), torch.device("cpu"):
            return model(x)

    with torch.device("cpu"):
        assert_same_training(Inner, tokens(), forward=forward)


def test_a_new_device_inside_of_the_session() -> None:
    """Contexts opened before and closed while the probe is there: each finds its own way out."""
    model, batch = Model(ATTENTION["sdpa"]), tokens()
    with AttentionProbe(model, every_n_steps=1) as probe:
        with torch.device("cpu"):
            loss = loss_of(model(*batch))
        loss.backward()
        report = probe.step()
    assert report is not None
    assert report.layers == ("layers.0", "layers.1")


def test_autograd_grad_instead_of_backward() -> None:
    model, batch = Model(ATTENTION["sdpa"]), tokens()
    plain = torch.autograd.grad(loss_of(model(*batch)), [*model.parameters()], allow_unused=True)
    with session(model) as watching:
        watched = torch.autograd.grad(loss_of(model(*batch)), [*model.parameters()], allow_unused=True)
    assert names(watching.seen) == ["layers.0", "layers.1"]
    assert all(a is None if b is None else torch.equal(a, b) for a, b in zip(watched, plain, strict=True))


def test_backward_inside_of_forward() -> None:
    """A gradient penalty: the model differentiates itself, under the mode."""

    class Penalised(Model):
        def forward(self, x: Tensor) -> Tensor:
            x = x.requires_grad_()
            output = super().forward(x)
            (gradient,) = torch.autograd.grad(output.sum(), x, create_graph=True)
            return output + gradient.square().mean()

    model, batch = Penalised(ATTENTION["bmm"]), tokens()
    with session(model) as watching:
        loss_of(model(*batch)).backward()
    assert {call.reason for call in watching.seen} == {REPEATED}
    assert_same_gradients(model, batch)


def assert_same_gradients(model: nn.Module, batch: tuple[Tensor, ...]) -> None:
    def gradients() -> list[Tensor]:
        model.zero_grad()
        loss_of(model(*batch)).backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    plain = gradients()
    with session(model):
        watched = gradients()
    assert all(torch.equal(a, b) for a, b in zip(watched, plain, strict=True))

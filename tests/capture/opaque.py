"""Attention in kernels that nothing can look into, and adapters that tell what they compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnprobe as ap
from attnprobe.capture.registry import KERNELS
from tests.capture.models import DEPTH, TOKENS, Attention, Model, loss_of, tokens, tokens_and_memory

Compute = Callable[..., Any]


@pytest.fixture
def registrations() -> Iterator[None]:
    """Registrations are for good; those of a test are not."""
    before = dict(KERNELS)
    yield
    KERNELS.clear()
    KERNELS.update(before)


def opaque(compute: Compute) -> Any:
    """``compute`` as a kernel: nothing of what it does is in the graph."""

    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *tensors: Tensor) -> Any:
            ctx.save_for_backward(*tensors)
            return compute(*tensors)

        @staticmethod
        def backward(ctx: Any, u: Tensor, *others: Any) -> Any:
            inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            with torch.enable_grad():
                output = first(compute(*inputs))
            return torch.autograd.grad(output, inputs, u)

    return Kernel


def first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def turned(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.transpose(1, 2) for tensor in tensors)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def banded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    visible = band(None, None, torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2]))
    return F.scaled_dot_product_attention(q, k, v, visible, scale=0.3, enable_gqa=True)


def band(b: Any, h: Any, i: Tensor, j: Tensor) -> Tensor:
    return (i - j).abs() < 5


def sunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A softcap on the scores, and a learned sink."""
    scores = 2 * torch.tanh(q @ k.mT * DEPTH**-0.5 / 2)
    return torch.cat([scores, SINK.expand(*scores.shape[:-1], 1)], -1).softmax(-1)[..., :-1] @ v


SINK = torch.linspace(-1, 1, 4, dtype=torch.float64)[:, None, None]


def _sink_told(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Any]:
    sink = SINK.expand(*q.shape[:3], 1)
    return told(score_mod=lambda score, b, h, i, j: 2 * torch.tanh(score / 2), sink=sink)(q, k, v)


def told(**facts: Any) -> Callable[..., dict[str, Any]]:
    return lambda q, k, v: {"query": q, "key": k, "value": v, **facts}


@dataclass(frozen=True)
class Case:
    """A kernel, its adapter, and ``plain``, what it computes of ``[B, H, T, D]``."""

    kernel: Compute
    adapter: Callable[..., Any]
    plain: Compute = causal
    layout: str = "bhtd"
    to_kernel: Callable[..., tuple[Tensor, ...]] = lambda q, k, v: (q, k, v)
    from_kernel: Callable[[Tensor], Tensor] = lambda o: o
    groups: int | None = None
    memory: bool = False

    def model(self, attend: Compute) -> nn.Module:
        """Two layers around the kernel, ``attend``."""

        def through_kernel(attention: Attention, *qkv: Tensor) -> Tensor:
            o = first(attend(*self.to_kernel(*qkv)))
            attention.note(o, self.from_kernel, value=qkv[2])
            return self.from_kernel(o)

        return self.build(through_kernel)

    def build(self, attend: Callable[..., Tensor]) -> nn.Module:
        torch.manual_seed(3)
        return Model(lambda: Attention(attend, heads=4, groups=self.groups)).double()

    def batch(self) -> tuple[Tensor, ...]:
        torch.manual_seed(5)
        return tuple(x.double() for x in (tokens_and_memory() if self.memory else tokens()))


def _merged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return causal(q, k, v).transpose(1, 2).flatten(2)


def _split(o: Tensor) -> Tensor:
    return o.unflatten(-1, (-1, DEPTH)).transpose(1, 2)


def _causal_bthd(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return causal(*turned(q, k, v)).transpose(1, 2)


def _band_told(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Any]:
    places = torch.arange(TOKENS)
    return told(mask=band(None, None, places[:, None], places), scale=0.3)(q, k, v)


_BTHD: dict[str, Any] = {
    "kernel": _causal_bthd,
    "adapter": told(causal=True),
    "layout": "bthd",
    "to_kernel": turned,
    "from_kernel": lambda o: o.transpose(1, 2),
}
CAUSAL = Case(causal, told(causal=True))
CASES = {
    "bhtd": CAUSAL,
    "bthd": Case(**_BTHD),
    "several outputs": Case(lambda *qkv: (causal(*qkv), torch.zeros(2)), told(causal=True)),
    "grouped": Case(causal, told(causal=True), groups=2),
    "grouped bthd": Case(**_BTHD, groups=2),
    "mask": Case(banded, _band_told, banded),
    "mask_mod": Case(banded, told(mask_mod=band, scale=0.3), banded, memory=True),
    "sink and score_mod": Case(sunk, _sink_told, sunk),
    "arranged": Case(_merged, told(causal=True, arrange=_split), from_kernel=_split),
}


def function(case: Case) -> Compute:
    kernel = opaque(case.kernel)

    @ap.register_attention(case.adapter, layout=case.layout)
    def attend(*qkv: Tensor) -> Any:
        return kernel.apply(*qkv)

    return attend


def decorated_class(case: Case) -> Compute:
    kernel = ap.register_attention(case.adapter, layout=case.layout)(opaque(case.kernel))
    return lambda *qkv: kernel.apply(*qkv)


def class_of_others(case: Case) -> Compute:
    kernel = opaque(case.kernel)

    def attend(*qkv: Tensor) -> Any:
        return kernel.apply(*qkv)

    assert ap.register_attention(case.adapter, layout=case.layout)(kernel) is kernel
    return attend


WAYS = (function, decorated_class, class_of_others)
each_way = pytest.mark.parametrize("register", WAYS, ids=lambda way: way.__name__)
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def reported(model: nn.Module, *batch: Tensor, steps: int = 1, **options: Any) -> list[ap.StepReport]:
    """The reports of some steps."""
    options = {"every_n_steps": 1, "statistics": "all", "alarms": (), **options}
    reports = []
    with ap.AttentionProbe(model, **options) as probe:
        for _ in range(steps):
            loss_of(model(*batch)).backward()
            reports.append(probe.step())
    return reports


def measured(model: nn.Module, *batch: Tensor) -> ap.StepReport:
    return reported(model, *batch)[0]

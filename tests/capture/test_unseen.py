"""What cannot be captured: one warning that names module and reason, while the layer beside it is measured."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import attnprobe as ap
from attnprobe.capture import session as sessions
from attnprobe.errors import AttnProbeWarning
from tests.capture.models import DEPTH, TOKENS, WIDTH, Attention, explicit, sdpa, tokens
from tests.capture.opaque import causal, opaque, reported
from tests.capture.training import assert_same_training

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage"),
]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class Pair(nn.Module):
    """A layer that is captured and one that is not."""

    def __init__(self, other: Callable[[], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Attention(sdpa()), other()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def check(other: Callable[[], nn.Module], reason: str, name: str = "layers.1", **options: Any) -> list[ap.StepReport]:
    """One warning in three probed steps, the other layer measured, training as without the probe."""
    (x,) = tokens()
    model = Pair(other)
    with pytest.warns(AttnProbeWarning) as said:
        reports = reported(model, x, steps=3, **options)
    messages = [str(warning.message) for warning in said if warning.category is AttnProbeWarning]
    assert messages == [f"attnprobe: {name}: {reason}"]
    for report in reports:
        assert report.valid
        assert {*report.layers} == {"layers.0", name}
        assert report["entropy"].isfinite().all(1).tolist() == [row == "layers.0" for row in report.layers]
    probe = partial(ap.AttentionProbe, every_n_steps=1, **options)
    with pytest.warns(AttnProbeWarning):
        assert_same_training(lambda: Pair(other), (x,), watches={"probe": probe})
    return reports


class Fused(nn.Module):
    """Projections around a function of queries, keys and values, ``[B, H, T, D]`` or without heads."""

    def __init__(self, attend: Callable[..., Tensor], heads: int = 2) -> None:
        super().__init__()
        self.qkv, self.attend, self.heads = nn.Linear(WIDTH, 3 * WIDTH), attend, heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.attend(q, k, v).transpose(1, 2).flatten(2)


# TorchScript


class Scriptable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)


class ScriptableSDPA(Scriptable):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v)


class ScriptableMatmul(Scriptable):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return F.softmax(torch.matmul(q, k.transpose(1, 2)), dim=-1) @ v


class ScriptableBmm(Scriptable):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)


def traced(module: type[nn.Module]) -> nn.Module:
    return torch.jit.trace(module(), tokens())


@pytest.mark.parametrize("compiled", [lambda module: torch.jit.script(module()), traced], ids=["script", "trace"])
@pytest.mark.parametrize("module", [ScriptableSDPA, ScriptableMatmul, ScriptableBmm])
def test_torchscript(module: type[nn.Module], compiled: Callable[[type[nn.Module]], nn.Module]) -> None:
    reason = "it is TorchScript, which runs outside of Python: probe the model before it is scripted or traced"
    check(lambda: compiled(module), reason)


# torch.func


def mapped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.vmap(F.scaled_dot_product_attention)(q, k, v)


def differentiated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.func.grad(lambda q: ((q @ k.mT).softmax(-1) @ v).square().sum())(q)


class Around(nn.Module):
    """A module that runs inside of a transform."""

    def __init__(self, transformed: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.transformed = Attention(explicit), transformed

    def forward(self, x: Tensor) -> Tensor:
        return self.transformed(self.inner, x)


def module_mapped(module: nn.Module, x: Tensor) -> Tensor:
    return torch.vmap(lambda x: module(x[None])[0])(x)


def module_differentiated(module: nn.Module, x: Tensor) -> Tensor:
    return torch.func.grad(lambda x: module(x).square().sum())(x)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # torch, of vmap
@pytest.mark.parametrize("inside", [mapped, differentiated, module_mapped, module_differentiated])
def test_torch_func(inside: Callable[..., Tensor]) -> None:
    reason = "it ran inside a torch.func transform (grad, vmap ...), which has no backward pass to hook into"
    if inside in (mapped, differentiated):
        check(lambda: Fused(inside), reason)
    else:
        check(lambda: Around(inside), reason, "layers.1.inner")


# Nested tensors


def nested(layout: torch.layout, attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The second sequence is shorter."""

    def ragged(x: Tensor) -> Tensor:
        parts = [x[0], x[1, :, :5]]
        if layout == torch.strided:
            return torch.nested.as_nested_tensor(parts)
        return torch.nested.as_nested_tensor([x.transpose(0, 1) for x in parts], layout=layout).transpose(1, 2)

    def attention(*qkv: Tensor) -> Tensor:
        whole, part = attend(*(ragged(x) for x in qkv)).unbind()
        return torch.stack([whole, F.pad(part, (0, 0, 0, TOKENS - 5))])

    return attention


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout((q @ k.transpose(-1, -2)).softmax(-1), 0.1) @ v


@pytest.mark.parametrize(
    ("layout", "attend"),
    [
        (torch.strided, F.scaled_dot_product_attention),
        (torch.strided, written_out),
        (torch.jagged, F.scaled_dot_product_attention),
    ],
)
def test_nested_tensors(layout: torch.layout, attend: Callable[..., Tensor]) -> None:
    check(lambda: Fused(nested(layout, attend)), "its inputs are nested tensors, which have no common length")


# Kernels


KERNEL = (
    "it runs the autograd.Function Kernel, which nothing can look into: if that is softmax attention, "
    "attnprobe.register_attention tells what it computes"
)


def packed(qkv: Tensor) -> Tensor:
    """``[B, T, 3, H, D]``, as flash-attn takes it."""
    return causal(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2)


def packed_varlen(qkv: Tensor) -> Tensor:
    """``[tokens, 3, H, D]``."""
    return causal(*qkv.permute(1, 2, 0, 3)[:, None])[0].transpose(0, 1)


def kernel_of_three(kernel: Any) -> Callable[..., Tensor]:
    return lambda q, k, v: kernel.apply(q, k, v)


def kernel_of_one(kernel: Any) -> Callable[..., Tensor]:
    return lambda *qkv: kernel.apply(torch.stack(qkv, 2).transpose(1, 3)).transpose(1, 2)


def kernel_without_batch(kernel: Any) -> Callable[..., Tensor]:
    def attend(*qkv: Tensor) -> Tensor:
        tokens = torch.stack(qkv, 2).transpose(1, 3).flatten(0, 1)
        return kernel.apply(tokens).unflatten(0, (-1, TOKENS)).transpose(1, 2)

    return attend


KERNELS: dict[str, Callable[[], Callable[..., Tensor]]] = {
    "bhtd": lambda: kernel_of_three(opaque(causal)),
    "several outputs": lambda: lambda *qkv: opaque(lambda *qkv: (causal(*qkv), torch.zeros(2, 2, 9))).apply(*qkv)[0],
    "written with matmul": lambda: kernel_of_three(opaque(written_out_twice)),
    "packed": lambda: kernel_of_one(opaque(packed)),
    "packed sequences": lambda: kernel_without_batch(opaque(packed_varlen)),
}


def written_out_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS.keys())
def test_kernels(kernel: Callable[[], Callable[..., Tensor]]) -> None:
    check(lambda: Fused(kernel()), KERNEL)


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module, *, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_kernels_under_checkpointing(reentrant: bool) -> None:
    check(lambda: Checkpointed(Fused(kernel_of_three(opaque(causal))), reentrant=reentrant), KERNEL, "layers.1.inner")


def test_a_kernel_in_a_bare_function_under_checkpointing() -> None:
    attend = partial(checkpoint, kernel_of_three(opaque(causal)), use_reentrant=False)
    check(lambda: Fused(attend), KERNEL)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointing_itself_is_no_kernel(reentrant: bool) -> None:
    """Although queries, keys and values go in and a context comes out."""
    attend = partial(checkpoint, F.scaled_dot_product_attention, use_reentrant=reentrant)
    assert quiet(Fused(attend)).layers == ("layers.0", "layers.1")


# Weights that are no softmax


def unnormalised(function: Callable[[Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return function(q @ k.mT * DEPTH**-0.5) @ v


def exp_and_sum(scores: Tensor) -> Tensor:
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return weights / weights.sum(-1, keepdim=True)


def exp_and_sum_of_methods(scores: Tensor) -> Tensor:
    weights = scores.exp()
    return F.dropout(weights.div(weights.sum(dim=-1, keepdim=True)), 0.1)


def exp_of_log(scores: Tensor) -> Tensor:
    return scores.log_softmax(-1).exp()


def masked_sigmoid(scores: Tensor) -> Tensor:
    hidden = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    return torch.sigmoid(scores.masked_fill(hidden, -torch.inf) - 2.0)


def relu_squared(scores: Tensor) -> Tensor:
    return F.relu(scores).square() / TOKENS


OTHERS = {exp_and_sum: "exp", exp_and_sum_of_methods: "exp", exp_of_log: "log_softmax"}
OTHERS |= {masked_sigmoid: "sigmoid", torch.sigmoid: "sigmoid", relu_squared: "relu"}


@pytest.mark.parametrize(("function", "name"), OTHERS.items(), ids=lambda x: getattr(x, "__name__", x))
def test_weights_that_are_no_softmax(function: Callable[[Tensor], Tensor], name: str) -> None:
    reason = f"its weights are made of the scores by {name}(), not by softmax()"
    check(lambda: Fused(partial(unnormalised, function)), reason)


class TalkingHeads(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner, self.kind = Fused(self.attend), kind
        self.linear, self.conv = nn.Linear(2, 2), nn.Conv2d(2, 2, 1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.mT).softmax(-1)
        if self.kind == "linear":
            weights = self.linear(weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        elif self.kind == "matmul":
            weights = (weights.permute(0, 2, 3, 1) @ self.linear.weight).permute(0, 3, 1, 2)
        elif self.kind == "einsum":
            weights = torch.einsum("bhts,hg->bgts", weights, self.linear.weight)
        else:
            weights = self.conv(weights)
        return weights @ v

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.parametrize("kind", ["linear", "matmul", "einsum", "conv"])
def test_talking_heads(kind: str) -> None:
    reason = "its weights are mixed after the softmax (talking heads): they are no softmax of any scores"
    check(lambda: TalkingHeads(kind), reason, "layers.1.inner")


# No gradients


class Frozen(nn.Module):
    """Attends to something that no parameter made."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = Attention(sdpa()).requires_grad_(False), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("fixed", torch.randn(2, TOKENS, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.inner(self.fixed))


def test_frozen_inputs() -> None:
    reason = "no gradient reaches it: its inputs and weights are frozen (include_frozen=True measures its routing)"
    check(Frozen, reason, "layers.1.inner")


def test_frozen_inputs_may_be_included() -> None:
    report = quiet(Frozen(), include_frozen=True)
    row = report.layers.index("layers.1.inner")
    assert report["entropy"].isfinite().all()
    assert report["score_grad_norm"].isfinite().all(1).tolist() == [i != row for i in range(2)]
    assert any("no error signal" in note for note in report.notes)
    (x,) = tokens()
    probe = partial(ap.AttentionProbe, every_n_steps=1, include_frozen=True)
    assert_same_training(lambda: Pair(Frozen), (x,), watches={"probe": probe})


def test_no_grad() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            o = F.scaled_dot_product_attention(q, k, v)
        return v - o

    check(lambda: Fused(attend), "no gradient was recorded: it runs under no_grad")


# CUDA graphs and replicas


def test_cuda_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    capturing = []
    monkeypatch.setattr(sessions, "in_cuda_graph", lambda: bool(capturing))

    def attend(*qkv: Tensor) -> Tensor:
        capturing.append(True)
        o = F.scaled_dot_product_attention(*qkv)
        capturing.clear()
        return o

    reason = "it is being captured into a CUDA graph, whose replays run no Python: probe it uncaptured"
    check(lambda: Fused(attend), reason)


class Replicated(nn.Module):
    """What nn.DataParallel does: each replica runs in a thread of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3 * WIDTH, WIDTH))
        self.child = Replica()

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.run(part) for part in x.chunk(2)])

    def run(self, x: Tensor) -> Tensor:
        replica = self.child._replicate_for_data_parallel()
        replica.weight = self.weight * 1
        with ThreadPoolExecutor(1) as threads:
            return threads.submit(replica, x).result()


class Replica(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*F.linear(x, self.weight).chunk(3, -1))


def test_replicas() -> None:
    reason = "it runs as replicas of nn.DataParallel, copies in threads of their own: use DistributedDataParallel"
    check(Replicated, reason, "Pair")


# No attention at all


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.qkv = nn.GRU(WIDTH, WIDTH, batch_first=True), nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.gru(x)[0]).chunk(3, -1)
        return F.elu(q + 1) @ (F.elu(k + 1).mT @ v)


def test_recurrent_layers_and_linear_attention() -> None:
    with pytest.warns(AttnProbeWarning) as said:
        reports = reported(Recurrent(), *tokens(), steps=3)
    assert len(said) == 1
    assert all(report.invalid.startswith("no softmax attention was seen. Looked for") for report in reports)
    assert "linear-attention layers have no attention weights" in str(said[0].message)


def function(compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A harmless ``autograd.Function``; what it is called with may be a parameter."""
    kernel = opaque(compute)
    return lambda *inputs: kernel.apply(*inputs)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt() * weight


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x @ weight.mT + bias


class Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        return tuple(x * cos + x.flip(-1) * sin for x in (q, k))

    @staticmethod
    def backward(ctx: Any, *errors: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return *(u * cos + (u * sin).flip(-1) for u in errors), None, None


class Reversal(torch.autograd.Function):
    """Hands three tensors through, as hooks on modules and gradient reversal do."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.clone() for x in inputs)

    @staticmethod
    def backward(ctx: Any, *errors: Tensor) -> tuple[Tensor, ...]:
        return tuple(-error for error in errors)


class Parts(nn.Module):
    """Does something that is no attention with its parameters."""

    def __init__(self, run: Callable[[Parts, Tensor], Tensor]) -> None:
        super().__init__()
        self.run = run
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.scale, self.codes = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.gate = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def squeeze_and_excite(self: Parts, x: Tensor) -> Tensor:
    return x * torch.sigmoid(self.two(F.relu(self.one(x.mean(1, keepdim=True)))))


def router(self: Parts, x: Tensor) -> Tensor:
    experts = torch.stack([self.one(x), self.two(x)], -2)
    return (self.gate(x).softmax(-1).unsqueeze(-2) @ experts).squeeze(-2)


def covariance(self: Parts, x: Tensor) -> Tensor:
    centred = x - x.mean(1, keepdim=True)
    return self.one(x) + (centred.mT @ centred / TOKENS).mean(1, keepdim=True)


def contrast(self: Parts, x: Tensor) -> Tensor:
    """A loss with ``exp``."""
    similar = torch.exp(self.one(x) @ self.two(x).mT)
    return x * torch.log(similar.sum(-1, keepdim=True))


def rotary(self: Parts, x: Tensor) -> Tensor:
    q, k = Rotary.apply(self.one(x)[:, None], self.two(x)[:, None], self.scale.cos(), self.scale.sin())
    return (q + k)[:, 0]


def reversal(self: Parts, x: Tensor) -> Tensor:
    return sum(Reversal.apply(self.one(x), self.two(x), x))


HARMLESS: dict[str, Callable[[Parts, Tensor], Tensor]] = {
    "classifier": lambda self, x: self.one(x).softmax(-1),
    "router": router,
    "contrastive loss": contrast,
    "covariance": covariance,
    "squeeze and excite": squeeze_and_excite,
    "codebook": lambda self, x: (x @ self.codes.mT).softmax(-1) @ self.codes,
    "log_softmax": lambda self, x: self.one(x).log_softmax(-1),
    "fused norm": lambda self, x: function(rms_norm)(self.one(x), self.scale),
    "fused SwiGLU": lambda self, x: function(swiglu)(self.one(x), self.two(x)),
    "fused linear": lambda self, x: function(linear)(self.one(x), self.codes, self.scale),
    "fused rotary embedding": rotary,
    "gradient reversal": reversal,
}


def quiet(other: nn.Module, **options: Any) -> ap.StepReport:
    """The report of a step in which nothing is to be said: a warning is an error."""
    *_, report = reported(Pair(lambda: other), *tokens(), steps=2, **options)
    assert not report.warnings
    return report


@pytest.mark.parametrize("run", HARMLESS.values(), ids=HARMLESS.keys())
def test_no_false_alarm(run: Callable[[Parts, Tensor], Tensor]) -> None:
    assert quiet(Parts(run)).layers == ("layers.0",)


def test_hooks_on_modules_are_no_kernels() -> None:
    """Torch's full backward hooks put an ``autograd.Function`` around all inputs."""

    class Cross(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return q + k * v

    class Outer(Parts):
        def __init__(self) -> None:
            super().__init__(lambda self, x: self.cross(self.one(x), self.two(x), x))
            self.cross = Cross()
            self.cross.register_full_backward_hook(lambda module, grads, errors: None)

    assert quiet(Outer()).layers == ("layers.0",)

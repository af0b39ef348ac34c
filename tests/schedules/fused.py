"""Attention with fused projections, and the same model with each of them split into three parameters."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn, optim
from torch.func import functional_call

WIDTH, HEADS, HEAD = 8, 2, 4

#: Parameter name -> axis of the outputs, and what each of them is: 0 a query, 1 a key, 2 a value. Written by hand.
Roles = Mapping[str, tuple[int, Tensor]]
THIRDS = torch.arange(24) // 8
PER_HEAD = torch.arange(24) // 4 % 3
GROUPED = torch.tensor([0] * 8 + [1] * 4 + [2] * 4)
HALVES = 1 + torch.arange(16) // 8


class Conv1D(nn.Module):
    """As in GPT-2: a linear layer whose weight is ``[inputs, outputs]``."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) * 0.3)
        self.bias = nn.Parameter(torch.randn(outputs) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``[B, T, H, D]`` each; keys and values may have fewer heads."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    mixed = nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    return mixed.transpose(1, 2).flatten(2)


class Last(nn.Module):
    """GPT-2: the values are the last third of the columns."""

    roles: ClassVar[Roles] = {"c_attn.weight": (1, THIRDS), "c_attn.bias": (0, THIRDS)}

    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = Conv1D(3 * WIDTH, WIDTH), Conv1D(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(attend(*(part.unflatten(-1, (HEADS, HEAD)) for part in self.c_attn(x).chunk(3, -1))))


class PerHead(nn.Module):
    """GPT-NeoX: rows ``[H, 3, D]``."""

    roles: ClassVar[Roles] = {"query_key_value.weight": (0, PER_HEAD), "query_key_value.bias": (0, PER_HEAD)}

    def __init__(self) -> None:
        super().__init__()
        self.query_key_value, self.dense = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(attend(*self.query_key_value(x).unflatten(-1, (HEADS, 3, HEAD)).unbind(-2)))


class Grouped(nn.Module):
    """Phi-3: rows ``H + G + G`` heads, here with one key head."""

    roles: ClassVar[Roles] = {"qkv_proj.weight": (0, GROUPED)}

    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj, self.o_proj = nn.Linear(WIDTH, 4 * HEAD, bias=False), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.o_proj(attend(*self.qkv_proj(x).unflatten(-1, (-1, HEAD)).split([HEADS, 1, 1], -2)))


class KeysAndValues(nn.Module):
    """Queries apart, keys and values together; the values are normalised, the queries and keys turned."""

    roles: ClassVar[Roles] = {"to_kv.weight": (0, HALVES), "to_kv.bias": (0, HALVES)}

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_kv, self.to_out = (nn.Linear(WIDTH, n * WIDTH) for n in (1, 2, 1))
        self.norm = nn.LayerNorm(HEAD)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, HEAD)) for part in (self.to_q(x), *self.to_kv(x).chunk(2, -1)))
        return self.to_out(attend(q.roll(1, -1), k.roll(1, -1), self.norm(v)))


class Multihead(nn.Module):
    """Torch's own."""

    roles: ClassVar[Roles] = {"attention.in_proj_weight": (0, THIRDS), "attention.in_proj_bias": (0, THIRDS)}

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class MultiheadOfOtherWidths(nn.Module):
    """Torch's own with separate weights, beside which the biases are still one."""

    roles: ClassVar[Roles] = {
        "attention.v_proj_weight": (0, torch.full((8,), 2)),
        "attention.in_proj_bias": (0, THIRDS),
    }

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, kdim=6, vdim=5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x[..., :6], x[..., :5], need_weights=False)[0]


class Separate(nn.Module):
    """Llama."""

    roles: ClassVar[Roles] = {"v_proj.weight": (0, torch.full((8,), 2)), "v_proj.bias": (0, torch.full((8,), 2))}

    def __init__(self) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.add_module(name, nn.Linear(WIDTH, WIDTH, bias=name != "k_proj"))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (project(x).unflatten(-1, (HEADS, HEAD)) for project in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(attend(q, k, v))


LAYOUTS: tuple[type[Any], ...] = (
    *(Multihead, MultiheadOfOtherWidths, Last, PerHead, Grouped, KeysAndValues, Separate),
)


class Stack(nn.Module):
    """One layer of each kind, by default of all, and a head."""

    def __init__(self, *kinds: type[Any], dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(kind() for kind in kinds or LAYOUTS)
        self.head = nn.Linear(WIDTH, 3)
        self.to(dtype)

    @property
    def roles(self) -> Roles:
        return {f"layers.{i}.{name}": role for i, layer in enumerate(self.layers) for name, role in layer.roles.items()}

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x.mean(1))


class Split(nn.Module):
    """A model in which queries, keys and values of every fused weight are parameters of their own."""

    def __init__(self, model: nn.Module, roles: Roles) -> None:
        super().__init__()
        self.model, self.roles = copy.deepcopy(model), roles
        self.separate: dict[str, list[nn.Parameter]] = {}
        for name, (axis, role) in roles.items():
            whole = self.model.get_parameter(name).detach()
            self.separate[name] = [
                nn.Parameter(whole.index_select(axis, (role == kind).nonzero()[:, 0])) for kind in range(3)
            ]
        self.parts = nn.ParameterList(part for parts in self.separate.values() for part in parts)
        fused = {id(self.model.get_parameter(name)) for name in roles}
        self.rest = [p for p in self.model.parameters() if id(p) not in fused]

    def groups(self, lr: float, multiplier: float) -> list[dict[str, Any]]:
        others = [part for parts in self.separate.values() for part in parts[:2] if part.numel()]
        values = [parts[2] for parts in self.separate.values()]
        return [{"params": self.rest + others, "lr": lr}, {"params": values, "lr": lr * multiplier}]

    def whole(self, name: str) -> Tensor:
        axis, role = self.roles[name]
        order = torch.cat([(role == kind).nonzero()[:, 0] for kind in range(3)]).argsort()
        return torch.cat(self.separate[name], axis).index_select(axis, order)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.model, {name: self.whole(name) for name in self.roles}, args, kwargs)

    def distances(self, other: nn.Module) -> dict[str, float]:
        """Of every parameter of the fused model to what it is here, key biases excepted.

        A softmax does not depend on them: their gradient is rounding error, which Adam and its kin blow up.
        """
        mine = dict(self.model.named_parameters()) | {name: self.whole(name) for name in self.roles}
        found = {}
        for name, p in other.named_parameters():
            apart = (p - mine[name]).abs()
            found[name] = (
                (apart[self.roles[name][1] != 1] if apart.ndim == 1 and name in self.roles else apart).max().item()
            )
        return found


def batch(step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(6, 5, WIDTH, generator=generator, dtype=dtype)
    return x, (x[:, 0, :3]).argmax(-1)


def loss_of(model: nn.Module, step: int) -> Tensor:
    x, target = batch(step, next(model.parameters()).dtype)
    return nn.functional.cross_entropy(model(x), target)


def warmup_cosine(step: int) -> float:
    return min(1.0, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * step / 60))


def train(
    model: nn.Module,
    optimizer: optim.Optimizer,
    steps: int = 60,
    *,
    scheduler: Any = None,
    loss: Callable[[nn.Module, int], Tensor] = loss_of,
    accumulate: int = 1,
) -> None:
    """With gradient clipping and a scheduler."""
    scheduler = scheduler or optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(steps):
        optimizer.zero_grad()
        for part in range(accumulate):
            (loss(model, step * accumulate + part) / accumulate).backward()
        nn.utils.clip_grad_norm_(trained, 0.5)
        optimizer.step()
        scheduler.step()

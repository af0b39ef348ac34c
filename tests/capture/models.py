"""A zoo of attention written in many ways, each of which can say itself what it computed.

Every variant is a small model around one way to write attention. Told to keep notes, its attention hands out the
tensors that it used, in its own graph, so that autograd alone gives the reference for what the probe captures.
Shapes: ``[B, H, T, X]``; a note's ``arrange`` brings the model's own layout there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as bound_before

from attnprobe.record import AttentionRecord

BATCH, TOKENS, MEMORY, WIDTH, HEADS, DEPTH = 2, 9, 6, 8, 2, 4
VISIBLE = 0.7  # share of the pairs that random masks leave


def same(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(eq=False)
class Note:
    """What an attention call was, in the model's own words: tensors of its graph."""

    output: Tensor
    arrange: Callable[[Tensor], Tensor]
    parts: dict[str, Any]

    def record(self) -> AttentionRecord:
        """The call written down by hand, after backward."""
        assert self.output.grad is not None
        tensors = {"output": self.output, "error": self.output.grad}
        tensors |= {name: part for name, part in self.parts.items() if isinstance(part, Tensor)}
        arranged = {
            name: (tensor if name == "mask" else self.arrange(tensor)).detach() for name, tensor in tensors.items()
        }
        return AttentionRecord(**(self.parts | arranged))

    def value_gradient(self) -> Tensor:
        return self.arrange(self.parts["value"].grad)


class Attention(nn.Module):
    """Projections around ``attend(self, q, k, v)``, which takes and gives ``[B, H, T, D]``."""

    def __init__(
        self,
        attend: Callable[[Attention, Tensor, Tensor, Tensor], Tensor],
        *,
        heads: int = HEADS,
        groups: int | None = None,
        value_depth: int = DEPTH,
        memory_width: int = WIDTH,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.attend, self.heads, self.groups = attend, heads, groups or heads
        self.q = nn.Linear(WIDTH, heads * DEPTH)
        self.k = nn.Linear(memory_width, self.groups * DEPTH)
        self.v = nn.Linear(memory_width, self.groups * value_depth)
        self.out = nn.Linear(heads * value_depth, WIDTH)
        self.softmax, self.dropout, self.p = nn.Softmax(dim=-1), nn.Dropout(dropout), dropout
        self.bias = nn.Parameter(torch.randn(heads, 1, 1))
        self.notes: list[Note] | None = None

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        source = x if memory is None else memory
        q, k, v = (
            projected.unflatten(-1, (heads, -1)).transpose(-3, -2)
            for projected, heads in (
                (self.q(x), self.heads),
                (self.k(source), self.groups),
                (self.v(source), self.groups),
            )
        )
        return self.out(self.attend(self, q, k, v).transpose(-3, -2).flatten(-2))

    def note(self, output: Tensor, arrange: Callable[[Tensor], Tensor] = same, **parts: Any) -> None:
        if self.notes is not None:
            keep(self.notes, output, arrange, parts)


def keep(notes: list[Note], output: Tensor, arrange: Callable[[Tensor], Tensor], parts: dict[str, Any]) -> None:
    output.retain_grad()
    parts["value"].retain_grad()
    notes.append(Note(output, arrange, parts))


class Model(nn.Module):
    """Two layers with residuals and a readout; the second attends to the first one's output, or to a memory."""

    def __init__(self, attention: Callable[[], nn.Module], layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(attention() for _ in range(layers))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, *memory: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = x + layer(x, *memory)
        return self.head(x).tanh()


@dataclass(frozen=True)
class Variant:
    """A model, its inputs and what a probe must find in it."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    layers: tuple[str, ...] = ("layers.0", "layers.1")
    self_attention: bool | tuple[bool, ...] | None = True
    dropout: float = 0.0
    #: Whether the value's gradient is ``alpha^T u`` of one sequence: not where the batch shares it.
    owns_value: bool = True

    def model(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        torch.manual_seed(3)
        return self.build().to(dtype)

    def batch(self, dtype: torch.dtype = torch.float64, seed: int = 5) -> tuple[Tensor, ...]:
        torch.manual_seed(seed)
        return tuple(tensor.to(dtype) for tensor in self.inputs())


def loss_of(output: Tensor) -> Tensor:
    weights = torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype).view_as(output)
    return (weights * (output - 0.3).square()).mean()


def tokens() -> tuple[Tensor, ...]:
    return (torch.randn(BATCH, TOKENS, WIDTH),)


def three_sequences() -> tuple[Tensor, ...]:
    """More than heads, so that the two can be told apart."""
    return (torch.randn(3, TOKENS, WIDTH),)


def tokens_and_memory(length: int = MEMORY, width: int = WIDTH) -> tuple[Tensor, ...]:
    return torch.randn(BATCH, TOKENS, WIDTH), torch.randn(BATCH, length, width)


def random_mask(*shape: int, additive: bool = False, like: Tensor | None = None) -> Tensor:
    """A fixed random mask in which every query sees the first key."""
    generator = torch.Generator().manual_seed(11)
    visible = torch.rand(shape, generator=generator) < VISIBLE
    visible[..., 0] = True
    if not additive:
        return visible
    bias = torch.randn(shape, generator=generator)
    return bias.masked_fill(~visible, -torch.inf).to(torch.float32 if like is None else like.dtype)


# F.scaled_dot_product_attention


def sdpa(mask: Callable[[Tensor], Tensor] | None = None, **options: Any) -> Callable[..., Tensor]:
    def attend(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        given = None if mask is None else mask(q)
        o = F.scaled_dot_product_attention(q, k, v, given, dropout_p=self.p if self.training else 0.0, **options)
        facts = {
            "scale": options.get("scale", q.shape[-1] ** -0.5),
            "causal": options.get("is_causal", False),
            "dropout": self.p if self.training else 0.0,
        }
        self.note(o, query=q, key=k, value=v, **({} if given is None else {"mask": given}), **facts)
        return o

    return attend


def sdpa_repeated(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(self.heads // self.groups, dim=1) for x in (k, v))
    o = F.scaled_dot_product_attention(query=q, key=k, value=v, is_causal=True)
    self.note(o, query=q, key=k, value=v, scale=DEPTH**-0.5, causal=True)
    return o


def sdpa_bound_before(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    o = bound_before(q, k, v, None, 0.0, False)
    self.note(o, query=q, key=k, value=v, scale=DEPTH**-0.5)
    return o


def sdpa_folded(mask: Tensor | None = None) -> Callable[..., Tensor]:
    """Heads folded into the batch: the module says how many there are."""

    def attend(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch = q.shape[:2]
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        o = F.scaled_dot_product_attention(q, k, v, mask)
        facts = {} if mask is None else {"mask": mask.expand(len(q), -1, -1).unflatten(0, batch)}
        self.note(o, lambda x: x.unflatten(0, batch), query=q, key=k, value=v, scale=DEPTH**-0.5, **facts)
        return o.unflatten(0, batch)

    return attend


def sdpa_of_one_sequence(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One head, one sequence: two dimensions."""
    q, k, v = (x[0, 0] for x in (q, k, v))
    mask = random_mask(TOKENS, TOKENS)
    o = F.scaled_dot_product_attention(q, k, v, mask)
    self.note(o, lambda x: x[None, None], query=q, key=k, value=v, scale=DEPTH**-0.5, mask=mask[None, None])
    return o[None, None]


def sdpa_windows(mask_shape: tuple[int, ...] | None) -> Callable[..., Tensor]:
    """Five dimensions: windows of three tokens beside the batch."""

    def attend(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(2, (-1, 3)).transpose(1, 2) for x in (q, k, v))  # [B, W, H, 3, D]
        mask = None if mask_shape is None else random_mask(*mask_shape)
        o = F.scaled_dot_product_attention(q, k, v, mask)
        facts = {}
        if mask is not None:
            mask = mask.reshape((1,) * (5 - mask.ndim) + mask.shape)
            facts["mask"] = mask.expand(BATCH, 3, *mask.shape[2:]).flatten(0, 1)
        self.note(o, lambda x: x.flatten(0, 1), query=q, key=k, value=v, scale=DEPTH**-0.5, **facts)
        return o.transpose(1, 2).flatten(2, 3)

    return attend


def sdpa_one_memory(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All sequences of the batch read the keys of the first."""
    k, v = k[:1], v[:1]
    o = F.scaled_dot_product_attention(q, k, v)
    self.note(o, lambda x: x.expand(BATCH, -1, -1, -1), query=q, key=k, value=v, scale=DEPTH**-0.5)
    return o


# softmax written out


def _mask_of(q: Tensor, k: Tensor) -> Tensor:
    return random_mask(BATCH, 1, q.shape[-2], k.shape[-2])


def explicit(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(DEPTH)
    o = torch.matmul(self.dropout(F.softmax(logits, dim=-1)), v)
    self.note(o, query=q, key=k, value=v, logits=logits, dropout=self.p if self.training else 0.0)
    return o


def explicit_operators(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = _mask_of(q, k)
    logits = DEPTH**-0.5 * (q @ k.mT)
    logits = logits.masked_fill(~mask, float("-inf"))
    o = self.softmax(logits) @ v
    self.note(o, query=q, key=k, value=v, logits=logits, mask=mask)
    return o


def explicit_in_place(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = _mask_of(q, k)
    scores = q @ k.mT
    scores *= DEPTH**-0.5
    scores += self.bias
    scores.masked_fill_(mask.logical_not(), -1e9)
    self.note(o := scores.softmax(-1) @ v, query=q, key=k, value=v, logits=scores, mask=mask)
    return o


def explicit_output_in_place(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = q @ k.mT
    o = logits.softmax(-1) @ v
    self.note(o, query=q, key=k, value=v, logits=logits)
    return o.add_(q) if self.notes is None else o.add(q)  # a retained gradient would follow the in-place operation


def explicit_added_mask(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = random_mask(1, HEADS, q.shape[-2], k.shape[-2], additive=True, like=q)
    logits = torch.add((q * DEPTH**-0.5) @ k.mT, mask)
    o = torch.softmax(logits, dim=3) @ v
    self.note(o, query=q * DEPTH**-0.5, key=k, value=v, logits=logits, mask=mask)
    return o


def explicit_subtracted_mask(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = _mask_of(q, k)
    logits = q @ k.mT - 1e9 * (1 - mask.to(q.dtype))
    o = logits.softmax(dim=-1) @ v
    self.note(o, query=q, key=k, value=v, logits=logits, mask=mask)
    return o


def explicit_where(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As GPT-2 does: the fill value is a tensor."""
    mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()[None, None]
    scores = torch.matmul(q, k.mT)
    scores = scores / torch.full([], DEPTH**0.5, dtype=q.dtype)
    logits = torch.where(mask, scores, torch.full([], torch.finfo(q.dtype).min, dtype=q.dtype))
    o = torch.matmul(F.softmax(logits, dim=-1).type_as(v), v)
    self.note(o, query=q, key=k, value=v, logits=logits, mask=mask)
    return o


def explicit_where_hidden(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = ~_mask_of(q, k)
    logits = torch.where(hidden, -1e9, q @ k.mT)
    o = logits.softmax(-1) @ v
    self.note(o, query=q, key=k, value=v, logits=logits, mask=~hidden)
    return o


def explicit_where_method(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = _mask_of(q, k)
    logits = torch.baddbmm(q.new_zeros(1, 1, 1), q.flatten(0, 1), k.flatten(0, 1).mT).unflatten(0, q.shape[:2])
    logits = logits.where(mask, torch.finfo(q.dtype).min)
    o = torch.linalg.matmul(logits.softmax(-1), v)
    self.note(o, query=q, key=k, value=v, logits=logits, mask=mask)
    return o


def explicit_softcap(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = 2.0 * torch.tanh(q @ k.mT / 2.0)
    o = F.softmax(logits, dim=-1, dtype=torch.float64).to(q.dtype) @ v
    self.note(o, query=q, key=k, value=v, logits=logits)
    return o


def explicit_multi_query(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = q @ k.mT
    o = logits.softmax(-1) @ v
    self.note(o, query=q, key=k, value=v, logits=logits)
    return o


def explicit_repeated(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x[:, :, None].expand(-1, -1, self.heads // self.groups, -1, -1).flatten(1, 2) for x in (k, v))
    return explicit(self, q, k, v)


def explicit_grouped(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Five dimensions: query heads of one group side by side."""
    mask = random_mask(BATCH, 1, 1, TOKENS, TOKENS)
    q, k, v = q.unflatten(1, (self.groups, -1)), k.unsqueeze(2), v.unsqueeze(2)
    logits = (q @ k.mT).masked_fill(~mask, -torch.inf)
    o = logits.softmax(-1) @ v

    def arrange(x: Tensor) -> Tensor:
        return x.flatten(1, 2)

    self.note(o, arrange, query=q, key=k, value=v, logits=logits, mask=mask[:, 0])
    return o.flatten(1, 2)


def bmm(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As BART does: masked in four dimensions, multiplied in three."""
    batch, mask = q.shape[:2], _mask_of(q, k)
    q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)).view(*batch, q.shape[1], k.shape[1])
    scores = scores + torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, torch.finfo(q.dtype).min)
    logits = scores.view(-1, *scores.shape[2:])
    weights = F.softmax(logits, dim=-1)
    o = torch.bmm(F.dropout(weights, p=self.p, training=self.training), v)

    def arrange(x: Tensor) -> Tensor:
        return x.unflatten(0, batch)

    p = self.p if self.training else 0.0
    self.note(o, arrange, query=q, key=k, value=v, logits=logits, mask=mask, dropout=p)
    return o.unflatten(0, batch)


def product_from_the_right(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``o^T = v^T alpha^T``."""
    logits, values = q @ k.mT, v.mT
    o = values @ logits.softmax(-1).transpose(-2, -1)
    self.note(o, lambda x: x.mT, query=q.mT, key=k.mT, value=values, logits=logits.mT)
    return o.mT


def keys_in_rows(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores ``[S, T]``, softmax over the rows."""
    mask = random_mask(BATCH, 1, q.shape[-2], k.shape[-2])
    logits = (k @ q.mT).masked_fill(~mask.mT, -torch.inf)
    o = logits.softmax(dim=-2).permute(0, 1, 3, 2) @ v
    self.note(o, query=q, key=k, value=v, logits=logits.mT, mask=mask)
    return o


def heads_last(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores ``[B, T, S, H]``, values on the left."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = random_mask(BATCH, 1, q.shape[1], k.shape[1])
    logits = torch.einsum("bthd,bshd->btsh", q, k).masked_fill(~mask[:, 0, :, :, None], -torch.inf)
    o = torch.einsum("bshe,btsh->bthe", v, self.dropout(F.softmax(logits, 2)))
    p = self.p if self.training else 0.0
    self.note(o, lambda x: x.transpose(1, 2), query=q, key=k, value=v, logits=logits.mT, mask=mask, dropout=p)
    return o.transpose(1, 2)


def learned_sink(first: bool) -> Callable[..., Tensor]:
    """One more logit per head, whose weight goes nowhere; the maximum is taken off, as gpt-oss does."""

    def attend(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = random_mask(1, 1, q.shape[-2], k.shape[-2])
        scores = (q @ k.mT * 0.5).masked_fill(~mask, torch.finfo(q.dtype).min)
        sink = self.bias.reshape(1, -1, 1, 1).expand(len(q), -1, q.shape[-2], -1)
        parts = torch.cat([sink, scores] if first else [scores, sink], dim=-1)
        top = parts.max(dim=-1, keepdim=True).values
        shifted = parts - top
        weights = F.softmax(shifted, dim=-1)
        weights = weights[..., 1:] if first else weights[..., :-1]
        o = self.dropout(weights) @ v
        logits = (shifted[..., 1:] if first else shifted[..., :-1]) + top
        sink = (shifted[..., :1] if first else shifted[..., -1:]) + top
        p = self.p if self.training else 0.0
        self.note(o, query=q, key=k, value=v, logits=logits, sink=sink[..., 0], mask=mask, dropout=p)
        return o

    return attend


def bmm_folded(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The heads are in the batch from the start: the module and its inputs tell them apart."""
    batch = q.shape[:2]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    logits = torch.bmm(q, k.mT) * 0.5
    o = torch.bmm(logits.softmax(-1), v)
    self.note(o, lambda x: x.unflatten(0, batch), query=q, key=k, value=v, logits=logits)
    return o.unflatten(0, batch)


def baddbmm(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As GPT-NeoX does: the first operand is uninitialised and multiplied by 0; softmax in four dimensions."""
    batch = q.shape[:2]
    flat_q, flat_k = q.flatten(0, 1), k.flatten(0, 1)
    scores = torch.zeros(flat_q.shape[0], q.shape[2], k.shape[2], dtype=q.dtype)
    scores = torch.baddbmm(scores, flat_q, flat_k.mT, beta=0, alpha=DEPTH**-0.5)
    logits = scores.view(*batch, *scores.shape[1:])
    o = logits.softmax(-1) @ v
    self.note(o, query=q, key=k, value=v, logits=logits)
    return o


def baddbmm_alibi(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As BLOOM does: a bias of positions is the first operand."""
    batch, mask = q.shape[:2], _mask_of(q, k)
    alibi = (torch.arange(k.shape[2]) * 0.1).to(q.dtype).expand(batch.numel(), 1, -1)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    scores = alibi.baddbmm(batch1=q, batch2=k.mT, beta=1.0, alpha=DEPTH**-0.5)
    logits = torch.masked_fill(scores.view(*batch, *scores.shape[1:]), ~mask, torch.finfo(q.dtype).min)
    weights = logits.softmax(-1).view(-1, *scores.shape[1:])
    o = torch.bmm(weights, v)

    def arrange(x: Tensor) -> Tensor:
        return x.view(*batch, *x.shape[-2:])

    self.note(o, arrange, query=q, key=k, value=v, logits=logits, mask=mask)
    return arrange(o)


def mm(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One head of one sequence."""
    q, k, v = (x[0, 0] for x in (q, k, v))
    logits = torch.mm(q, k.t())
    o = torch.mm(logits.softmax(1), v)
    self.note(o, lambda x: x[None, None], query=q, key=k, value=v, logits=logits)
    return o[None, None]


def einsum(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = torch.einsum("bhqd,bhkd->bhqk", q, k) * DEPTH**-0.5
    o = torch.einsum("bhqk,bhkd->bhqd", self.dropout(logits.softmax(-1)), v)
    self.note(o, query=q, key=k, value=v, logits=logits, dropout=self.p if self.training else 0.0)
    return o


def einsum_tokens_first(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads beside the width; keys named first; operands in a list."""
    mask = random_mask(q.shape[2], k.shape[2])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    logits = torch.einsum("bshd, bthd -> bhts", [k, q]).masked_fill(~mask, -torch.inf)
    o = torch.einsum("bhts,bshd->bthd", logits.softmax(-1), v)
    arranged = {"logits": logits.transpose(1, 2)}
    self.note(o, lambda x: x.transpose(1, 2), query=q, key=k, value=v, mask=mask[None, None], **arranged)
    return o.transpose(1, 2)


def einsum_ellipsis(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = torch.einsum("... i d, ... j d -> ... i j", q, k)
    o = torch.einsum("... i j, ... j d -> ... i d", logits.softmax(-1), v)
    self.note(o, query=q, key=k, value=v, logits=logits)
    return o


def einsum_multi_query(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = torch.einsum("bhqd,bkd->bhqk", q, k[:, 0])
    o = torch.einsum("bhqk,bkd->bhqd", logits.softmax(-1), v[:, 0])
    self.note(o, query=q, key=k, value=v, logits=logits)
    return o


def einsum_grouped(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.unflatten(1, (self.groups, -1))
    logits = torch.einsum("bgrtd,bgsd->bgrts", q, k)
    o = torch.einsum("bgrts,bgsd->bgrtd", logits.softmax(-1), v)

    def arrange(x: Tensor) -> Tensor:
        return x.flatten(1, 2) if x.ndim == 5 else x

    self.note(o, arrange, query=q, key=k, value=v, logits=logits)
    return o.flatten(1, 2)


def swin_windows(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As Swin does: windows in the batch, taken apart only to add a mask of ``[1, windows, 1, T, S]``."""
    q, k, v = (x.unflatten(2, (-1, 3)).transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # [B * W, H, 3, D]
    windows = random_mask(3, 3, 3)
    scores = q @ k.mT + self.bias.unsqueeze(0)
    hidden = torch.zeros(windows.shape, dtype=q.dtype).masked_fill(~windows, -100.0)
    scores = scores.view(BATCH, 3, *scores.shape[1:]) + hidden.unsqueeze(1).unsqueeze(0)
    logits = scores.view(-1, *scores.shape[2:])
    o = logits.softmax(dim=-1) @ v
    self.note(o, query=q, key=k, value=v, logits=logits, mask=windows.repeat(BATCH, 1, 1)[:, None])
    return o.unflatten(0, (BATCH, 3)).transpose(1, 2).flatten(2, 3)


def two_masks(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A causal mask filled in, then padding added."""
    causal, padding = torch.ones(TOKENS, TOKENS).tril().bool(), right_padding(q)
    scores = (q @ k.mT).masked_fill(~causal, -torch.inf)
    logits = scores + torch.zeros(padding.shape, dtype=q.dtype).masked_fill(~padding, -1e9)
    o = logits.softmax(-1) @ v
    self.note(o, query=q, key=k, value=v, logits=logits, mask=causal & padding)
    return o


def unknown_scores(self: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores that are no product: the queries and keys stay unknown."""
    logits = -torch.cdist(q, k)
    o = logits.softmax(-1) @ v
    self.note(o, value=v, logits=logits)
    return o


def right_padding(q: Tensor) -> Tensor:
    lengths = torch.tensor([TOKENS, TOKENS - 4])
    return (torch.arange(TOKENS) < lengths[:, None])[:, None, None]


def left_padding(q: Tensor) -> Tensor:
    return right_padding(q).flip(-1)


# nn.MultiheadAttention and the layers made of it: opaque, so that the reference spies on torch


class Multihead(nn.Module):
    """``nn.MultiheadAttention`` called with fixed options."""

    def __init__(self, call: dict[str, Any] | None = None, names: bool = False, **options: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, **options)
        self.call, self.by_name = call or {}, names

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        source = x if memory is None else memory
        call = {
            name: value.to(x.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in self.call.items()
        }
        if self.by_name:
            return self.attn(query=x, key=source, value=source, **call)[0]
        return self.attn(x, source, source, **call)[0]


class Encoder(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, batch_first=True, **options)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.padding = left_padding(torch.empty(0))[:, 0, 0].logical_not()

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x, src_key_padding_mask=self.padding)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 16, dropout=0.0, batch_first=True, norm_first=True)
        self.decoder = nn.TransformerDecoder(layer, 2)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        return self.decoder(x, memory, tgt_mask=causal, tgt_is_causal=True)


# The table


def _variant(name: str, attend: Callable[..., Tensor], *, inputs: Any = tokens, **options: Any) -> Variant:
    facts = {key: options.pop(key) for key in ("self_attention", "owns_value") if key in options}
    dropout = options.get("dropout", 0.0)
    return Variant(name, lambda: Model(lambda: Attention(attend, **options)), inputs, dropout=dropout, **facts)


def _multihead(name: str, *, inputs: Any = tokens, **options: Any) -> Variant:
    names = ("layers.0.attn", "layers.1.attn")
    facts = {key: options.pop(key) for key in ("self_attention",) if key in options}
    dropout = options.get("dropout", 0.0)
    return Variant(name, lambda: Model(lambda: Multihead(**options)), inputs, names, dropout=dropout, **facts)


def _shaped(*shape: int, additive: bool = False) -> Callable[..., Tensor]:
    return sdpa(lambda q: random_mask(*shape, additive=additive, like=q))


def _one_sequence() -> tuple[Tensor, ...]:
    return (torch.randn(TOKENS, WIDTH),)


def _time_first() -> tuple[Tensor, ...]:
    return (torch.randn(TOKENS, BATCH, WIDTH),)


def _memories() -> tuple[Tensor, ...]:
    return torch.randn(BATCH, TOKENS, WIDTH), torch.randn(BATCH, MEMORY, 6)


_T, _S = TOKENS, MEMORY
_CAUSAL = torch.ones(_T, _T).tril().logical_not()  # True = hidden, as nn.MultiheadAttention has it
_PADDING = right_padding(torch.empty(0))[:, 0, 0].logical_not()

SDPA = [
    _variant("sdpa", sdpa()),
    _variant("sdpa bound before", sdpa_bound_before),
    _variant("sdpa causal", sdpa(is_causal=True)),
    _variant("sdpa scale", sdpa(scale=0.3)),
    _variant("sdpa wide values", sdpa(), value_depth=6),
    _variant("sdpa gqa", sdpa(enable_gqa=True, is_causal=True), heads=4, groups=2),
    _variant("sdpa gqa repeated", sdpa_repeated, heads=4, groups=2),
    _variant("sdpa mqa", sdpa(enable_gqa=True), heads=4, groups=1),
    _variant("sdpa dropout", sdpa(), dropout=0.3),
    *(
        _variant(f"sdpa {kind} mask {list(shape)}", _shaped(*shape, additive=kind == "float"))
        for kind in ("bool", "float")
        for shape in [
            (_T, _T),
            (1, _T),
            (BATCH, 1, _T, _T),
            (BATCH, 1, 1, _T),
            (1, HEADS, _T, _T),
            (BATCH, HEADS, _T, _T),
            (HEADS, _T, _T),
        ]
    ),
    _variant("sdpa right padding", sdpa(right_padding)),
    _variant("sdpa left padding", sdpa(left_padding)),
    _variant("sdpa cross", sdpa(), inputs=tokens_and_memory, self_attention=False),
    _variant("sdpa cross mask", _shaped(BATCH, 1, _T, _S), inputs=tokens_and_memory, self_attention=False),
    _variant("sdpa cross same length", sdpa(), inputs=lambda: tokens_and_memory(_T), self_attention=None),
    _variant(
        "sdpa cross other width", sdpa(), inputs=lambda: tokens_and_memory(_T, 6), memory_width=6, self_attention=None
    ),
    _variant("sdpa 3-D", sdpa_folded(), inputs=three_sequences),
    _variant("sdpa 3-D mask [T, S]", sdpa_folded(random_mask(_T, _T)), inputs=three_sequences),
    _variant("sdpa 3-D mask [N, T, S]", sdpa_folded(random_mask(3 * HEADS, _T, _T)), inputs=three_sequences),
    _variant("sdpa 2-D", sdpa_of_one_sequence, inputs=lambda: (torch.randn(1, _T, WIDTH),), heads=1),
    _variant("sdpa 5-D", sdpa_windows(None)),
    _variant("sdpa 5-D mask [W, 1, T, S]", sdpa_windows((3, 1, 3, 3))),
    _variant("sdpa 5-D mask [B, 1, H, T, S]", sdpa_windows((BATCH, 1, HEADS, 3, 3))),
    _variant("sdpa one memory", sdpa_one_memory, owns_value=False),
]

EXPLICIT = [
    _variant("matmul", explicit),
    _variant("matmul cross", explicit, inputs=tokens_and_memory, self_attention=False),
    _variant("matmul dropout", explicit, dropout=0.3),
    _variant("operators", explicit_operators),
    _variant("in place", explicit_in_place),
    _variant("added mask", explicit_added_mask),
    _variant("subtracted mask", explicit_subtracted_mask),
    _variant("where", explicit_where),
    _variant("where hidden", explicit_where_hidden),
    _variant("output in place", explicit_output_in_place),
    _variant("where method", explicit_where_method),
    _variant("softcap", explicit_softcap),
    _variant("two masks", two_masks),
    _variant("multi-query", explicit_multi_query, heads=4, groups=1),
    _variant("gqa repeated", explicit_repeated, heads=4, groups=2),
    _variant("gqa grouped", explicit_grouped, heads=4, groups=2),
    _variant("bmm", bmm),
    _variant("bmm dropout", bmm, dropout=0.3),
    _variant("bmm folded", bmm_folded, inputs=three_sequences),
    _variant("product from the right", product_from_the_right),
    _variant("keys in rows", keys_in_rows),
    _variant("heads last", heads_last),
    _variant("heads last dropout", heads_last, dropout=0.3),
    _variant("learned sink first", learned_sink(True)),
    _variant("learned sink last", learned_sink(False)),
    _variant("learned sink dropout", learned_sink(False), dropout=0.3),
    _variant("baddbmm", baddbmm),
    _variant("baddbmm alibi", baddbmm_alibi),
    _variant("mm", mm, inputs=lambda: (torch.randn(1, _T, WIDTH),), heads=1),
    _variant("einsum", einsum),
    _variant("einsum dropout", einsum, dropout=0.3),
    _variant("einsum tokens first", einsum_tokens_first),
    _variant("einsum ellipsis", einsum_ellipsis),
    _variant("einsum multi-query", einsum_multi_query, heads=4, groups=1),
    _variant("einsum grouped", einsum_grouped, heads=4, groups=2),
    _variant("windows", swin_windows),
    _variant("unknown scores", unknown_scores),
]

MULTIHEAD = [
    variant
    for weights in (False, True)
    for note in ["weights" if weights else "no weights"]
    for call in [{"need_weights": weights}]
    for variant in [
        _multihead(f"multihead {note}", call=call, batch_first=True),
        _multihead(f"multihead {note}, by name", call=call, batch_first=True, names=True),
        _multihead(f"multihead {note}, time first", call=call, inputs=_time_first),
        _multihead(f"multihead {note}, unbatched", call=call, inputs=_one_sequence),
        _multihead(f"multihead {note}, padding", call=call | {"key_padding_mask": _PADDING}, batch_first=True),
        _multihead(f"multihead {note}, bool mask", call=call | {"attn_mask": _CAUSAL}, batch_first=True),
        _multihead(f"multihead {note}, bool mask unbatched", call=call | {"attn_mask": _CAUSAL}, inputs=_one_sequence),
        _multihead(
            f"multihead {note}, float mask",
            call=call | {"attn_mask": random_mask(_T, _T, additive=True)},
            batch_first=True,
        ),
        _multihead(
            f"multihead {note}, mask per head and padding",
            call=call | {"attn_mask": ~random_mask(BATCH * HEADS, _T, _T), "key_padding_mask": _PADDING},
            batch_first=True,
        ),
        _multihead(
            f"multihead {note}, causal", call=call | {"attn_mask": _CAUSAL, "is_causal": True}, batch_first=True
        ),
        _multihead(
            f"multihead {note}, cross",
            call=call,
            batch_first=True,
            kdim=6,
            vdim=6,
            inputs=_memories,
            self_attention=False,
        ),
        _multihead(f"multihead {note}, bias_kv", call=call, batch_first=True, add_bias_kv=True),
        _multihead(f"multihead {note}, zero_attn", call=call, batch_first=True, add_zero_attn=True),
        _multihead(f"multihead {note}, no bias", call=call, batch_first=True, bias=False),
        _multihead(f"multihead {note}, dropout", call=call, batch_first=True, dropout=0.3),
    ]
] + [
    _multihead("multihead weights per head", call={"average_attn_weights": False}, batch_first=True),
    Variant(
        "encoder", lambda: Encoder(dropout=0.0), tokens, ("encoder.layers.0.self_attn", "encoder.layers.1.self_attn")
    ),
    Variant(
        "encoder dropout",
        lambda: Encoder(dropout=0.2, norm_first=True),
        tokens,
        ("encoder.layers.0.self_attn", "encoder.layers.1.self_attn"),
        dropout=0.2,
    ),
    Variant(
        "decoder",
        Decoder,
        tokens_and_memory,
        tuple(f"decoder.layers.{i}.{kind}" for i in range(2) for kind in ("self_attn", "multihead_attn")),
        self_attention=(True, False, True, False),
    ),
]

VARIANTS = SDPA + EXPLICIT + MULTIHEAD

"""Small modules in pure torch around a way to write or to call attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.matrix import torch_attention as attention
from tests.matrix.fresh import VOCABULARY

BATCH, TOKENS, MEMORY, WIDTH, HEADS, DEPTH, OTHER = 2, 8, 6, 16, 2, 2, 12
Attend = Callable[..., Tensor]


class Attention(nn.Module):
    """Projections around a way to attend; ``reentrant`` says how that alone is checkpointed, None for not at all."""

    def __init__(self, attend: Attend, dropout: float, *, heads: int = HEADS, groups: int | None = None) -> None:
        super().__init__()
        self.attend, self.p, self.heads, self.groups = attend, dropout, heads, groups or heads
        self.q, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = (nn.Linear(WIDTH, WIDTH // heads * self.groups) for _ in range(2))
        self.reentrant: bool | None = None

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        source = x if memory is None else memory
        q, k, v = self.q(x), self.k(source), self.v(source)
        if self.heads > 1:
            q, k, v = (x.unflatten(-1, (-1, WIDTH // self.heads)).transpose(1, 2) for x in (q, k, v))
        if self.reentrant is None:
            o = self._context(q, k, v)
        else:
            o = checkpoint(self._context, q, k, v, use_reentrant=self.reentrant)
        return self.out(o.transpose(1, 2).flatten(2) if self.heads > 1 else o)

    def _context(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attend(q, k, v, self.p if self.training else 0.0)


class NanoAttention(nn.Module):
    """``CausalSelfAttention`` of nanoGPT."""

    def __init__(self, dropout: float, *, flash: bool) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.attn_dropout, self.flash = nn.Dropout(dropout), flash
        if not flash:
            self.register_buffer("bias", torch.tril(torch.ones(TOKENS, TOKENS)).view(1, 1, TOKENS, TOKENS))

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = (part.view(B, T, HEADS, C // HEADS).transpose(1, 2) for part in self.c_attn(x).split(C, dim=2))
        if self.flash:
            p = self.attn_dropout.p if self.training else 0
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=p, is_causal=True)
        else:
            att = (q @ k.transpose(-2, -1)) * (1.0 / k.size(-1) ** 0.5)
            att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
            y = self.attn_dropout(F.softmax(att, dim=-1)) @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))


class Multihead(nn.Module):
    """``nn.MultiheadAttention``, called with ``call`` and the given masks."""

    def __init__(self, dropout: float, *, call: Mapping[str, Any], causal: bool = False, **options: Any) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(WIDTH, HEADS, dropout, **options)
        self.call, self.causal = call, causal

    def forward(self, x: Tensor, memory: Tensor | None = None, padding: Tensor | None = None) -> Tensor:
        source = x if memory is None else memory
        masks = {"attn_mask": ~attention.causal_mask(x, source)} if self.causal else {}
        if padding is not None:
            masks["key_padding_mask"] = padding
        if not self.mha.batch_first:
            x, source = x.transpose(0, 1), source.transpose(0, 1)
        o = self.mha(x, source, source, **masks, **self.call)[0]
        return o if self.mha.batch_first else o.transpose(0, 1)


class Block(nn.Module):
    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.norm, self.attn, self.mlp = nn.LayerNorm(WIDTH), attn, nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x), *others)
        return x + F.gelu(self.mlp(x))


class Model(nn.Module):
    """Tokens in, logits out; what else the batch holds goes to every block."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(TOKENS, WIDTH)
        self.body, self.head = body, nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor, **others: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return self.head(self.body(x, **others))


class Blocks(nn.Module):
    def __init__(self, attn: Callable[[], nn.Module], *, calls: int = 1) -> None:
        super().__init__()
        self.blocks, self.calls = nn.ModuleList(Block(attn()) for _ in range(DEPTH)), calls

    def forward(self, x: Tensor, memory: Tensor | None = None, attention_mask: Tensor | None = None) -> Tensor:
        others = () if memory is None and attention_mask is None else (memory,)
        others += () if attention_mask is None else (attention_mask == 0,)
        for block in self.blocks:
            for _ in range(self.calls):
                x = block(x, *others)
        return x


class Encoder(nn.Module):
    def __init__(self, dropout: float, **options: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, WIDTH, dropout, batch_first=True, **options)
        self.encoder = nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.encoder(x, src_key_padding_mask=None if attention_mask is None else attention_mask == 0)


class Decoder(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(WIDTH, HEADS, WIDTH, dropout, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, DEPTH)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        return self.decoder(x, memory, tgt_mask=causal, tgt_is_causal=True)


class Whole(nn.Module):
    """``nn.Transformer``."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.source = nn.Linear(WIDTH, WIDTH)
        self.transformer = nn.Transformer(WIDTH, HEADS, DEPTH, DEPTH, WIDTH, dropout, batch_first=True)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.transformer(self.source(memory), x)

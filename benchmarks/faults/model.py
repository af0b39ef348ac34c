"""The transformer that is trained, with handles by which faults get in.

Shapes: ``B`` batch, ``H`` heads, ``T`` tokens, ``C`` width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention through SDPA.

    Attributes:
        temperature: scores are divided by it.
        bias: added to the scores, broadcastable to ``[B, H, T, T]``; None for nothing.
        causal: ``[H]``, which heads see only what came before.
        ahead: ``[H]``, how many later tokens a causal head sees by mistake.
        sees_padding: whether the token mask is ignored.
        explicit: compute the softmax in Python.
    """

    def __init__(self, width: int, heads: int, *, causal: bool, norm_keys: bool = False) -> None:
        super().__init__()
        self.heads, self.norm_keys = heads, norm_keys
        self.inputs, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.temperature, self.sees_padding, self.explicit = 1.0, False, False
        self.bias: Tensor | None = None
        self.causal = torch.full((heads,), causal)
        self.ahead = torch.zeros(heads, dtype=torch.long)

    def forward(self, x: Tensor, tokens: Tensor | None) -> Tensor:
        query, key, value = self.inputs(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        if self.norm_keys:
            query, key = (8 * F.normalize(each, dim=-1) for each in (query, key))
        mask = self._mask(x, tokens)
        scale = query.shape[-1] ** -0.5 / self.temperature
        if self.explicit:
            scores = query @ key.mT * scale
            scores = scores if mask is None else scores + mask
            context = scores.softmax(-1) @ value
        elif mask is None:
            plain_causal = bool(self.causal.all())
            context = F.scaled_dot_product_attention(query, key, value, is_causal=plain_causal, scale=scale)
        else:
            context = F.scaled_dot_product_attention(query, key, value, mask.to(query.dtype), scale=scale)
        result: Tensor = self.output(context.transpose(1, 2).flatten(2))
        return result

    def rows(self, name: str) -> slice:
        """The rows of ``inputs`` that make ``"query"``, ``"key"`` or ``"value"``."""
        number, width = ("query", "key", "value").index(name), self.inputs.in_features
        return slice(number * width, (number + 1) * width)

    def _mask(self, x: Tensor, tokens: Tensor | None) -> Tensor | None:
        """What is added to the scores; None where the kernel's own causal mask, or none, is enough."""
        hidden = None if tokens is None or self.sees_padding else ~tokens[:, None, None]
        uneven = not (self.causal == self.causal[0]).all() or bool(self.ahead.any())
        if hidden is None and self.bias is None and not uneven and not self.explicit:
            return None
        place = torch.arange(x.shape[1])
        limit = torch.where(self.causal, self.ahead, x.shape[1])[:, None, None]
        later = (place - place[:, None]) > limit
        blocked = later[None] if hidden is None else later | hidden
        mask = torch.zeros(blocked.shape, dtype=x.dtype).masked_fill(blocked, -torch.inf)
        return mask if self.bias is None else mask + self.bias


class Block(nn.Module):
    """Attention and an MLP on a residual stream; ``skip`` scales the stream, ``post`` puts the norms behind, ``bare`` leaves the MLP out."""

    def __init__(self, width: int, heads: int, *, causal: bool, post: bool, norm_keys: bool) -> None:
        super().__init__()
        self.attention = Attention(width, heads, causal=causal, norm_keys=norm_keys)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.post, self.skip, self.bare = post, 1.0, False

    def forward(self, x: Tensor, tokens: Tensor | None) -> Tensor:
        if self.bare:
            x = self.skip * x + self.attention(self.norm_1(x), tokens)
        elif self.post:
            x = self.norm_1(self.skip * x + self.attention(x, tokens))
            x = self.norm_2(self.skip * x + self.mlp(x))
        else:
            x = self.skip * x + self.attention(self.norm_1(x), tokens)
            x = self.skip * x + self.mlp(self.norm_2(x))
        return x


class Transformer(nn.Module):
    """Predictions ``[B, T, classes]``, or ``[B, classes]`` where sequences have one label.

    Attributes:
        position_scale: what position embeddings are multiplied by.
    """

    def __init__(
        self,
        *,
        symbols: int,
        features: int,
        classes: int,
        length: int,
        layers: int,
        heads: int,
        width: int,
        causal: bool,
        pooled: bool,
        post: bool = False,
        norm_keys: bool = False,
        spread: float = 0.02,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, width) if symbols else nn.Linear(features, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(
            Block(width, heads, causal=causal, post=post, norm_keys=norm_keys) for _ in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)
        self.pooled, self.position_scale = pooled, 1.0
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=spread)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    @property
    def attentions(self) -> list[Attention]:
        return [module for module in self.modules() if isinstance(module, Attention)]

    def forward(self, inputs: Tensor, tokens: Tensor | None = None) -> Tensor:
        x = self.embedding(inputs) + self.position_scale * self.positions.weight[: inputs.shape[1]]
        for block in self.blocks:
            x = block(x, tokens)
        x = self.norm(x)
        if self.pooled:
            real = torch.ones(inputs.shape[:2]) if tokens is None else tokens.to(x.dtype)
            x = (x * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        predictions: Tensor = self.head(x)
        return predictions

"""Linear attention and a selective state-space layer to train, once for each seed.

Parameters have a leading dimension ``[S, ...]`` of seeds, drawn from the seed's generator alone, and nothing joins two
seeds. The input is ``[..., S, T, N]``, or ``[T, N]`` for all of them; the output is ``[..., S, T, E]``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from attnprobe.experiments.mixing.linear import Features, LinearMixing, linear_mixing
from attnprobe.experiments.mixing.selective import SelectiveMixing, selective_mixing

INITIAL_SCALE = 0.1

Generators = torch.Generator | Sequence[torch.Generator]


class LinearAttention(nn.Module):
    """Causal linear attention, ``M_ij = phi(q_i) . phi(k_j) / Z_i``, or times ``scale`` where nothing is normalised.

    Args:
        scale: None is ``1 / sqrt(K)``; outputs then grow with the number of tokens, and ``1 / T`` trains more calmly.
    """

    def __init__(
        self,
        generators: Generators,
        width: int,
        key_width: int,
        value_width: int,
        *,
        normalised: bool = True,
        features: Features = "elu",
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.normalised, self.features = normalised, features
        # A normalisation cancels it.
        self.scale = 1.0 if normalised else 1 / math.sqrt(key_width) if scale is None else scale
        shapes = [(width, key_width), (width, key_width), (width, value_width)]
        self.W_Q, self.W_K, self.W_V = initial_weights(generators, shapes)

    def mix(self, x: Tensor) -> LinearMixing:
        """The forward pass with all that it computed, ready for ``observe``."""
        query, key, value = x @ self.W_Q, x @ self.W_K, x @ self.W_V
        return linear_mixing(query, key, value, normalised=self.normalised, features=self.features, scale=self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., S, T, N]`` -> ``[..., S, T, E]``."""
        return self.mix(x).output


class SelectiveSSM(nn.Module):
    """The state-space layer of ``selective``; its steps depend on the input, ``z_t = x_t . W_Z + b_Z``.

    Args:
        initial_step, initial_rate: ``d`` and ``r`` where ``x . W_Z = 0``: the memory is ``1 / (d r)`` tokens long.
    """

    def __init__(
        self,
        generators: Generators,
        width: int,
        key_width: int,
        value_width: int,
        *,
        initial_step: float = 0.1,
        initial_rate: float = 1.0,
    ) -> None:
        super().__init__()
        shapes = [(width, key_width), (width, key_width), (width, value_width), (width,)]
        self.W_C, self.W_B, self.W_V, self.W_Z = initial_weights(generators, shapes)
        seeds = self.W_C.shape[0]
        self.b_Z = nn.Parameter(torch.full((seeds,), math.log(math.expm1(initial_step))))
        self.rate = nn.Parameter(torch.full((seeds,), math.log(math.expm1(initial_rate))))

    def mix(self, x: Tensor) -> SelectiveMixing:
        """The forward pass with all that it computed, ready for ``observe``."""
        step_input = (x @ self.W_Z[..., None]).squeeze(-1) + self.b_Z[:, None]
        return selective_mixing(x @ self.W_C, x @ self.W_B, x @ self.W_V, step_input, self.rate)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., S, T, N]`` -> ``[..., S, T, E]``."""
        return self.mix(x).output


def initial_weights(generators: Generators, shapes: Sequence[tuple[int, ...]]) -> list[nn.Parameter]:
    """One parameter for each shape, with seeds in front; each generator draws its seed's in this order."""
    each = [generators] if isinstance(generators, torch.Generator) else generators
    drawn = [[INITIAL_SCALE * torch.randn(shape, generator=random) for shape in shapes] for random in each]
    return [nn.Parameter(torch.stack(same)) for same in zip(*drawn, strict=True)]

"""The paper's single-head model with another layer in place of softmax attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from attnprobe.experiments.ensemble.model import Architecture, Ensemble, weight_generators
from attnprobe.experiments.mixing.layers import LinearAttention, SelectiveSSM
from attnprobe.experiments.mixing.softmax import SoftmaxAttention

Layer = SoftmaxAttention | LinearAttention | SelectiveSSM

#: Name -> what is said of it.
MECHANISMS = {
    "softmax": "softmax",
    "normalised": "linear, normalised",
    "unnormalised": "linear, unnormalised",
    "selective": "selective state space",
}


class MixingModel(nn.Module):
    """A mixing layer and a readout, once for each seed; all mechanisms start from the weights of ``Ensemble``.

    Args:
        mechanism: a key of ``MECHANISMS``.
        form: sizes.
        seeds: of the weights.
        length: tokens; without a normalisation, weights are ``phi(q) . phi(k) / length``. At the default scale outputs
            grow with the length, and training starts by exploding.
    """

    def __init__(self, mechanism: str, form: Architecture, seeds: Sequence[int], length: int) -> None:
        super().__init__()
        generators = weight_generators(seeds)
        sizes = form.width, form.key_width, form.value_width
        made: dict[str, Callable[[], Layer]] = {
            "softmax": lambda: SoftmaxAttention(generators, *sizes),
            "normalised": lambda: LinearAttention(generators, *sizes),
            "unnormalised": lambda: LinearAttention(generators, *sizes, normalised=False, scale=1 / length),
            "selective": lambda: SelectiveSSM(generators, *sizes),
        }
        self.layer = made[mechanism]()
        self.W_O = nn.Parameter(Ensemble(form, seeds).W_O.detach())

    def forward(self, x: Tensor) -> Tensor:
        """``[B, S, T, N]`` to logits ``[B, S, T, C]``."""
        output: Tensor = self.layer(x)
        return output @ self.W_O

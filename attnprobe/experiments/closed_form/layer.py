"""A whole attention layer by hand: projections, softmax attention, output projection, and the gradient of each."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attnprobe.errors import ConfigurationError
from attnprobe.experiments.closed_form.attention import Routing, RoutingGradients, attend, attention_gradients


@dataclass(frozen=True, eq=False)
class Parameters:
    """Input and weights: ``q = x W_Q + b_Q``, ``k`` and ``v`` likewise, ``output = sum_h o_h W_O[h] + b_O``.

    Attributes:
        x: ``[..., T, N]``.
        W_Q, W_K, W_V: ``[N, D]``, ``[N, D]``, ``[N, E]``, with many heads ``[H, N, D]``, ``[G, N, D]``, ``[G, N, E]``.
        W_O: ``[E, C]`` or ``[H, E, C]``: the output projection, or the readout whose output is the logits.
        b_Q, b_K, b_V, b_O: ``[D]``, ``[D]``, ``[E]``, with many heads ``[H, D]``, ``[G, D]``, ``[G, E]``; ``[C]``.
    """

    x: Tensor
    W_Q: Tensor
    W_K: Tensor
    W_V: Tensor
    W_O: Tensor
    b_Q: Tensor | None = None
    b_K: Tensor | None = None
    b_V: Tensor | None = None
    b_O: Tensor | None = None

    def __post_init__(self) -> None:
        shapes = {name: tuple(tensor.shape) for name, tensor in vars(self).items() if tensor is not None}
        q, k, v, o = (shapes[name] for name in ("W_Q", "W_K", "W_V", "W_O"))
        fits = all(0 not in shape for shape in shapes.values()) and len(shapes["x"]) >= 2
        fits = fits and len(q) == len(k) == len(v) == len(o) and len(q) in (2, 3)
        fits = fits and shapes["x"][-1] == q[-2] == k[-2] == v[-2] and q[-1] == k[-1] and v[-1] == o[-2]
        fits = fits and (len(q) == 2 or (q[0] == o[0] and k[0] == v[0] and q[0] % k[0] == 0))
        biases = {"b_Q": (*q[:-2], q[-1]), "b_K": (*k[:-2], k[-1]), "b_V": (*v[:-2], v[-1]), "b_O": o[-1:]}
        fits = fits and all(shapes.get(name, shape) == shape for name, shape in biases.items())
        if not fits:
            raise ConfigurationError(
                "shapes do not fit together: expected x [..., T, N], W_Q and W_K [N, D], W_V [N, E], W_O [E, C], "
                "all four with heads in front or none, and biases without N; "
                f"got {', '.join(f'{name} {list(shape)}' for name, shape in shapes.items())}"
            )

    @property
    def heads(self) -> bool:
        """Whether the weights have a dimension of heads."""
        return self.W_Q.ndim == 3


@dataclass(frozen=True, eq=False)
class Forward:
    """The forward pass: what the heads did, and ``output`` ``[..., T, C]``."""

    routing: Routing
    output: Tensor


@dataclass(frozen=True, eq=False)
class Gradients:
    """What the heads' errors did (``routing``), and a gradient like each parameter; None where there is no bias."""

    routing: RoutingGradients
    x: Tensor
    W_Q: Tensor
    W_K: Tensor
    W_V: Tensor
    W_O: Tensor
    b_Q: Tensor | None
    b_K: Tensor | None
    b_V: Tensor | None
    b_O: Tensor | None


def forward(
    params: Parameters, *, visible: Tensor | None = None, kept: Tensor | None = None, dropout: float = 0.0
) -> Forward:
    """One pass through the layer; masks as in ``attend``, for scores ``[..., T, T]`` or ``[..., H, T, T]``."""
    x = params.x.unsqueeze(-3) if params.heads else params.x
    query, key, value = (
        x @ weight if bias is None else x @ weight + bias.unsqueeze(-2)
        for weight, bias in ((params.W_Q, params.b_Q), (params.W_K, params.b_K), (params.W_V, params.b_V))
    )
    routing = attend(query, key, value, visible=visible, kept=kept, dropout=dropout)
    output = routing.output @ params.W_O
    if params.heads:
        output = output.sum(-3)
    return Forward(routing, output if params.b_O is None else output + params.b_O)


def gradients(params: Parameters, state: Forward, delta: Tensor) -> Gradients:
    """The gradients at ``state``, which ``forward`` computed from ``params``.

    Args:
        delta: ``dL/doutput`` ``[..., T, C]``; with a readout that of ``cross_entropy``.
    """
    x, upstream = params.x, delta
    if params.heads:
        x, upstream = x.unsqueeze(-3), delta.unsqueeze(-3)
    routing = attention_gradients(state.routing, upstream @ params.W_O.mT)
    # Whatever the forward pass broadcast (the input over heads, a weight over the batch), the gradient sums.
    moved = routing.query @ params.W_Q.mT, routing.key @ params.W_K.mT, routing.value @ params.W_V.mT
    return Gradients(
        routing=routing,
        x=sum((part.sum_to_size(x.shape) for part in moved[1:]), moved[0].sum_to_size(x.shape)).view_as(params.x),
        W_Q=(x.mT @ routing.query).sum_to_size(params.W_Q.shape),
        W_K=(x.mT @ routing.key).sum_to_size(params.W_K.shape),
        W_V=(x.mT @ routing.value).sum_to_size(params.W_V.shape),
        W_O=(state.routing.output.mT @ upstream).sum_to_size(params.W_O.shape),
        b_Q=None if params.b_Q is None else routing.query.sum(-2).sum_to_size(params.b_Q.shape),
        # A common shift of the keys shifts a row of scores by a constant: softmax, hence the loss, ignores it.
        b_K=None if params.b_K is None else params.b_K.new_zeros(params.b_K.shape),
        b_V=None if params.b_V is None else routing.value.sum(-2).sum_to_size(params.b_V.shape),
        b_O=None if params.b_O is None else delta.sum(-2).sum_to_size(params.b_O.shape),
    )

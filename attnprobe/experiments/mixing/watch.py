"""Watch the routing of a mixing model while it trains: what each step did, next to what the advantage asked for."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attnprobe.experiments.ensemble.model import seed_losses
from attnprobe.experiments.ensemble.training import Task
from attnprobe.experiments.mixing.layers import SelectiveSSM
from attnprobe.experiments.mixing.model import Layer, MixingModel
from attnprobe.experiments.mixing.observe import Observation, followed, followed_retention, observe
from attnprobe.experiments.mixing.selective import SelectiveMixing


class Watch:
    """Give ``observe`` to ``train``; each moment is one real step of the training, looked at in float64.

    Attributes:
        steps: of the moments.
        found: name -> ``[S]`` of each moment:
            ``entropy``, ``spread``: ``Observation.normalized_entropy`` and ``relative_advantage_std``.
            ``common``: the part of the advantage's square that all tokens of a row share; 0 under a baseline.
            ``followed``: share of the weights that the step moved as their advantage asks.
            ``by_chance``: that share if the signs of changes and advantages, as often as they are, were independent.
            ``push_followed``: the share weighted by the size of the weights' gradients.
            ``mixing_followed``: the share of the entries of ``M``.
            ``retention_followed``, ``retention_by_chance``, ``retention_push_followed``: of a state-space layer, whose
            log retention should move against the flow of compatibility.
            ``error``: largest deviation of the gradients by hand from autograd's, relative to the largest entry.
    """

    def __init__(self, task: Task, moments: Sequence[int]) -> None:
        self.task, self.moments = task, frozenset(moments)
        self.steps: list[int] = []
        self.found: dict[str, list[Tensor]] = {}
        self._pending: tuple[Tensor, Any, Observation] | None = None
        self._start: tuple[Tensor, Tensor] | None = None  # mixing and advantage on the first sequence
        self._last: nn.Module | None = None

    def observe(self, step: int, model: nn.Module) -> None:
        """Before each step and after the last one."""
        if self._pending is not None:
            x, before, found = self._pending
            self._after(before, _exact(model).layer.mix(x), found)
            self._pending = None
        if step in self.moments:
            self.steps.append(step)
            self._before(step, _exact(model))
        self._last = model

    def _before(self, step: int, model: MixingModel) -> None:
        x, y = self.task.at(step)
        x = x.double()
        state = model.layer.mix(x)
        state.output.retain_grad()
        seed_losses(state.output @ model.W_O, y).sum().backward()
        assert state.output.grad is not None
        found = observe(state, state.output.grad)
        self._keep("entropy", found.normalized_entropy)
        self._keep("spread", found.relative_advantage_std)
        self._keep("common", 1 - (found.advantage_std / found.advantage_rms) ** 2)
        self._keep("error", gradient_error(model.layer, x, found.gradients)[None])
        if self._start is None:
            self._start = state.mixing.detach(), found.gradients.advantage.detach()
        self._pending = x, state, found

    @torch.no_grad()
    def _after(self, before: Any, after: Any, found: Observation) -> None:
        gradients = found.gradients
        advantage = gradients.advantage
        change = _pairs(after.weights - before.weights)
        # The gradient of what the advantage moves: scores, linear attention's weights, or the entries of M.
        names = ("scores", "weights", "compatibility")
        push = _pairs(-next(getattr(gradients, name) for name in names if hasattr(gradients, name)))
        self._keep("followed", followed(before, after, advantage))
        self._keep("by_chance", _by_chance(change, _pairs(advantage)))
        self._keep("push_followed", _weighted(change, push))
        moved = _pairs(after.mixing - before.mixing).sign() == _pairs(advantage).sign()
        self._keep("mixing_followed", moved.double().mean(-1))
        if isinstance(before, SelectiveMixing):
            flow, retention = gradients.retention, (before.log_retention, after.log_retention)
            change, push = (retention[1] - retention[0])[..., 1:], -flow[..., 1:]
            self._keep("retention_followed", followed_retention(*retention, flow))
            self._keep("retention_by_chance", _by_chance(change, push))
            self._keep("retention_push_followed", _weighted(change, push))

    def _keep(self, name: str, found: Tensor) -> None:
        self.found.setdefault(name, []).append(found.detach().mean(0))

    @torch.no_grad()
    def foretold(self) -> dict[str, Tensor]:
        """``[S]``: correlation over pairs of the first advantage with the change of ``ln M`` over the whole training.

        ``all`` is over all pairs, ``rows`` without the rows' means: what a query prefers. Where ``M`` has either sign,
        of the change of ``M`` itself. Both are of the first step's sequence.
        """
        assert self._start is not None
        assert self._last is not None
        mixing, advantage = self._start
        last = _exact(self._last).layer.mix(self.task.at(0)[0].double()).mixing
        signed = bool((_pairs(mixing) <= 0).any())
        visible = torch.ones_like(mixing).tril()
        change = last - mixing if signed else (last.log() - mixing.log()).where(visible > 0, 0)
        count = visible.sum(-1, keepdim=True)
        centred = [t - (t * visible).sum(-1, keepdim=True) / count for t in (advantage, change)]
        return {
            "all": _correlation(_pairs(advantage), _pairs(change)).mean(0),
            "rows": _correlation(*(_pairs(t) for t in centred)).mean(0),
        }


@torch.no_grad()
def gradient_error(layer: Layer, x: Tensor, gradients: Any) -> Tensor:
    """``[S]``: how far the parameters' gradients by hand are from ``.grad``, relative to the largest entry of each."""
    if isinstance(layer, SelectiveSSM):
        steps = gradients.step_input
        found = {"W_C": gradients.read, "W_B": gradients.write, "W_V": gradients.value, "W_Z": steps[..., None]}
        found = {name: x.mT @ each for name, each in found.items()}
        found |= {"W_Z": found["W_Z"].squeeze(-1), "b_Z": steps.sum(-1), "rate": gradients.rate}
    else:
        found = {"W_Q": gradients.query, "W_K": gradients.key, "W_V": gradients.value}
        found = {name: x.mT @ each for name, each in found.items()}
    errors = []
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None
        expected = parameter.grad.reshape(len(parameter), -1)
        off = found[name].sum(0).reshape(expected.shape) - expected
        errors.append(off.abs().amax(1) / expected.abs().amax(1))
    return torch.stack(errors).amax(0)


def _exact(model: nn.Module) -> MixingModel:
    """A copy in float64: a step can change a weight by less than float32 resolves."""
    assert isinstance(model, MixingModel)
    return copy.deepcopy(model).double()


def _pairs(matrix: Tensor) -> Tensor:
    """``[..., T, T]`` -> ``[..., n]``: visible pairs from the second row on, as ``followed`` counts them."""
    pairs = torch.ones_like(matrix[(0,) * (matrix.ndim - 2)], dtype=torch.bool).tril()
    pairs[0] = False
    return matrix[..., pairs]


def _weighted(change: Tensor, push: Tensor) -> Tensor:
    """Share of equal signs, each counted with the size of the push."""
    return ((change.sign() == push.sign()) * push.abs()).sum(-1) / push.abs().sum(-1)


def _by_chance(change: Tensor, push: Tensor) -> Tensor:
    up, asked = ((t > 0).double().mean(-1) for t in (change, push))
    return up * asked + (1 - up) * (1 - asked)


def _correlation(left: Tensor, right: Tensor) -> Tensor:
    a, b = (t - t.mean(-1, keepdim=True) for t in (left, right))
    return (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt()

"""What is done to a run: one class a fault, three severities each."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Generator, nn

from benchmarks.faults.model import Attention, Block, Transformer
from benchmarks.faults.tasks import Batch

SEVERITIES = ("mild", "medium", "severe")


class Fault:
    """A run as it is; subclasses change something.

    Attributes:
        name: in tables.
        levels: how much, for each severity.
        start: the step of the injection.
        tasks, variant, heads, layers: which runs it fits: all tasks where none is named, at least so many heads.
    """

    name: ClassVar[str] = ""
    levels: ClassVar[tuple[float, ...]] = ()
    start: ClassVar[int] = 0
    tasks: ClassVar[tuple[str, ...]] = ()
    variant: ClassVar[str] = "plain"
    heads: ClassVar[int] = 1
    layers: ClassVar[int] = 1

    def prepare(self, model: Transformer, level: float) -> None:
        """Change the model before the optimizer sees it."""

    def schedule(self, rate: float, warm_up: int, level: float) -> tuple[float, int]:
        """The learning rate at its height, and the steps to get there."""
        return rate, warm_up

    def inject(self, model: Transformer, level: float) -> None:
        """Change the model once, at ``start``."""

    def spoil(self, batch: Batch, level: float, step: int, noise: Generator) -> Batch:
        """Change a batch, from ``start`` on."""
        return batch

    def precision(self, step: int) -> contextlib.AbstractContextManager[Any]:
        """In which numbers the model computes."""
        return contextlib.nullcontext()

    def each_step(self, model: Transformer, level: float) -> None:
        """Change the model after every optimizer step, from ``start`` on."""


class HighRate(Fault):
    """The learning rate is a multiple of what it should be."""

    name = "high learning rate"
    levels = (10, 30, 300)

    def schedule(self, rate: float, warm_up: int, level: float) -> tuple[float, int]:
        return rate * level, warm_up


class NoWarmUp(Fault):
    """Norms behind the blocks, three layers, a high rate, and no time to get there."""

    name = "no warm-up"
    levels = (2, 5, 30)
    variant = "post"

    def schedule(self, rate: float, warm_up: int, level: float) -> tuple[float, int]:
        return rate * level, 0


class KeyGrowth(Fault):
    """Query and key weights grow by a constant factor every step."""

    name = "query/key growth"
    levels = (0.003, 0.01, 0.03)
    start = 100

    def each_step(self, model: Transformer, level: float) -> None:
        for attention in model.attentions:
            _scale(attention, 1 + level, "query", "key")


class Overflow(Fault):
    """Training goes on in bfloat16, and query and key weights leap until scores overflow."""

    name = "bf16 overflow"
    levels = (1e2, 1e8, 1e22)
    start = 100

    def inject(self, model: Transformer, level: float) -> None:
        for attention in model.attentions:
            _scale(attention, level, "query", "key")

    def precision(self, step: int) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16, enabled=step >= self.start)


class ValueGrowth(Fault):
    """Value weights grow by a constant factor every step."""

    name = "value growth"
    levels = (0.003, 0.03, 0.06)
    start = 100

    def each_step(self, model: Transformer, level: float) -> None:
        for attention in model.attentions:
            _scale(attention, 1 + level, "value")


class DeadColumns(Fault):
    """A bias as of a mask, but not as large as one, hides every n-th key in all heads."""

    name = "dead columns"
    levels = (0.1, 0.3, 0.7)
    tasks = ("previous", "induction", "recall", "text", "digits", "majority")

    def prepare(self, model: Transformer, level: float) -> None:
        for attention in model.attentions:
            length = model.positions.num_embeddings
            place = torch.arange(length)
            hidden = (place + 1).mul(level).floor() > place.mul(level).floor()
            attention.bias = -30.0 * hidden.float()


class FutureLeak(Fault):
    """The causal mask lets later tokens through."""

    name = "future leak"
    levels = (1, 2, 3)
    tasks = ("previous", "first", "induction", "markov", "text")

    def prepare(self, model: Transformer, level: float) -> None:
        if level == 1:
            model.attentions[-1].ahead[0] = 1
        for attention in model.attentions[-1:] if level == 2 else model.attentions if level == 3 else ():
            attention.causal = torch.zeros_like(attention.causal)


class PaddingSeen(Fault):
    """The token mask is ignored: in the last layer, in all, and in all with padding that is like nothing else."""

    name = "padding attended"
    levels = (1, 2, 3)
    tasks = ("majority",)
    variant = "padded"

    def prepare(self, model: Transformer, level: float) -> None:
        for attention in model.attentions[-1:] if level == 1 else model.attentions:
            attention.sees_padding = True

    def spoil(self, batch: Batch, level: float, step: int, noise: Generator) -> Batch:
        if level < 3:
            return batch
        padding = torch.arange(batch.inputs.shape[1]) >= batch.lengths[:, None]
        return replace(batch, inputs=batch.inputs.masked_fill(padding, 0))


class NoInformation(Fault):
    """A share of the sequences is exchanged for others: inputs that say nothing of the targets."""

    name = "uninformative inputs"
    levels = (0.3, 0.8, 1.0)

    def spoil(self, batch: Batch, level: float, step: int, noise: Generator) -> Batch:
        other = batch.inputs[torch.randperm(len(batch.inputs), generator=noise)]
        chosen = torch.rand(len(other), generator=noise) < level
        return replace(batch, inputs=torch.where(chosen.view(-1, *[1] * (other.ndim - 1)), other, batch.inputs))


class Temperature(Fault):
    """Scores are divided by a number that nobody wanted."""

    name = "temperature"
    levels = (5, 1e3, 1e5)
    tasks = ("previous", "first", "recall")

    def prepare(self, model: Transformer, level: float) -> None:
        for attention in model.attentions:
            attention.temperature = level


class NoPositions(Fault):
    """Positions are shrunk, or left out, in a task in which the bag of earlier tokens says nothing."""

    name = "missing positions"
    levels = (0.3, 0.1, 0.0)
    tasks = ("order",)

    def prepare(self, model: Transformer, level: float) -> None:
        model.position_scale = level


class StuckPositions(Fault):
    """From some place on the position does not advance: the last quarter of a sequence, the last half, all of it."""

    name = "stuck positions"
    levels = (0.25, 0.5, 1.0)
    tasks = ("order",)

    def prepare(self, model: Transformer, level: float) -> None:
        self._stuck = int((1 - level) * model.positions.num_embeddings)
        self.each_step(model, level)

    @torch.no_grad()
    def each_step(self, model: Transformer, level: float) -> None:
        model.positions.weight[self._stuck :] = model.positions.weight[self._stuck].clone()


class Collapse(Fault):
    """Queries and keys start so large that attention is one-hot."""

    name = "attention collapse"
    levels = (5, 20, 100)

    def prepare(self, model: Transformer, level: float) -> None:
        for attention in model.attentions:
            _scale(attention, level, "query", "key")


class RankCollapse(Fault):
    """The residual stream is damped; cut; or cut, with the MLPs left out and scores that are all alike.

    What is left averages the tokens away.
    """

    name = "rank collapse"
    levels = (1, 2, 3)
    layers = 3

    def prepare(self, model: Transformer, level: float) -> None:
        for block in model.blocks:
            assert isinstance(block, Block)
            block.skip = 0.3 if level == 1 else 0.0
            block.bare = level == 3
            block.attention.temperature = 1e6 if level == 3 else 1.0


class DuplicatedHeads(Fault):
    """Heads are kept equal: two, half of each layer, all."""

    name = "duplicated heads"
    levels = (0.0, 0.5, 1.0)
    heads = 4

    def prepare(self, model: Transformer, level: float) -> None:
        self.each_step(model, level)

    @torch.no_grad()
    def each_step(self, model: Transformer, level: float) -> None:
        for attention in model.attentions[:1] if level == 0 else model.attentions:
            number = max(2, int(level * attention.heads))
            for parameter in attention.inputs.parameters():
                by_head = parameter.unflatten(0, (3, attention.heads, -1))
                by_head[:, 1:number] = by_head[:, :1]


class ZeroOutput(Fault):
    """What heads say is lost on the way out: of one head, of a layer, of all."""

    name = "zeroed output projection"
    levels = (1, 2, 3)
    start = 100

    def inject(self, model: Transformer, level: float) -> None:
        self.each_step(model, level)

    @torch.no_grad()
    def each_step(self, model: Transformer, level: float) -> None:
        for attention in model.attentions if level == 3 else model.attentions[:1]:
            weight = attention.output.weight
            weight[:, : weight.shape[1] // attention.heads if level == 1 else None] = 0


class Frozen(Fault):
    """Layers do not learn: the last one's attention; the embedding and the first; everything but the head."""

    name = "frozen by accident"
    levels = (1, 2, 3)
    layers = 2

    def prepare(self, model: Transformer, level: float) -> None:
        frozen: list[nn.Module] = [model.attentions[-1]]
        if level == 2:
            frozen = [model.embedding, model.positions, model.blocks[0]]
        if level == 3:
            frozen = [model.embedding, model.positions, model.blocks]
        self._kept = [(p, p.detach().clone()) for module in frozen for p in module.parameters()]

    @torch.no_grad()
    def each_step(self, model: Transformer, level: float) -> None:
        for parameter, kept in self._kept:
            parameter.copy_(kept)


class MaskedRow(Fault):
    """From some step on one sequence's rows see no key: in SDPA, in a softmax in Python, in all sequences."""

    name = "fully masked row"
    levels = (1, 2, 3)
    start = 100

    def inject(self, model: Transformer, level: float) -> None:
        for attention in model.attentions:
            length = model.positions.num_embeddings
            attention.explicit = level > 1
            hidden = torch.zeros(length, length)
            hidden[1 : 2 if level < 3 else None] = -torch.inf
            attention.bias = hidden


class LabelNoise(Fault):
    """A share of the targets is drawn by chance."""

    name = "label noise"
    levels = (0.1, 0.4, 1.0)

    def spoil(self, batch: Batch, level: float, step: int, noise: Generator) -> Batch:
        other = batch.targets.flatten()[torch.randperm(batch.targets.numel(), generator=noise)].view_as(batch.targets)
        chosen = (torch.rand(other.shape, generator=noise) < level) & (other >= 0) & (batch.targets >= 0)
        return replace(batch, targets=torch.where(chosen, other, batch.targets))


class BadBatches(Fault):
    """Some batches in a row whose targets are wrong."""

    name = "bad batches"
    levels = (1, 5, 20)
    start = 100

    def spoil(self, batch: Batch, level: float, step: int, noise: Generator) -> Batch:
        if step >= self.start + level:
            return batch
        return replace(batch, targets=torch.where(batch.targets >= 0, 0, batch.targets))


@torch.no_grad()
def _scale(attention: Attention, factor: float, *names: str) -> None:
    for name in names:
        for parameter in attention.inputs.parameters():
            parameter[attention.rows(name)] *= factor


FAULTS: dict[str, Fault] = {
    fault.name: fault
    for fault in (
        HighRate(), NoWarmUp(), KeyGrowth(), Overflow(), ValueGrowth(), DeadColumns(), FutureLeak(), PaddingSeen(),
        NoInformation(), Temperature(), NoPositions(), StuckPositions(), Collapse(), RankCollapse(), DuplicatedHeads(),
        ZeroOutput(), Frozen(), MaskedRow(), LabelNoise(), BadBatches(),
    )
}  # fmt: skip

"""Some steps of training in a cell of the matrix, from the same state each time, with whoever watches."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attnprobe import AttentionProbe, StepReport
from attnprobe.errors import AttnProbeWarning
from tests.global_state import global_state
from tests.matrix.condition import Condition, Rows
from tests.matrix.flex import trainable_on_cpu
from tests.matrix.spy import Sentry, Spy
from tests.matrix.state import differences, stance, whole_state
from tests.matrix.variant import Batch, Variant

SEED, STEPS, EVERY = 7, 3, 2  # the first and the last step are probed
LEARNING_RATE = 1e-2
Watch = Callable[[nn.Module], contextlib.AbstractContextManager[Any]]


@dataclass
class History:
    """What a run computed, and what was found on the way.

    Attributes:
        tensors: losses, gradients, parameters, random state, in order.
        watchers: those who watched, with the rows that they have to report.
        reports: of each of them, one for each probed step.
        evaluated: reports of ``probe.evaluate``, with the rows.
        warned: warnings of attnprobe.
        others: all other warnings.
        problems: what must not be.
    """

    tensors: list[tuple[str, Tensor]] = field(default_factory=list)
    watchers: list[tuple[Any, Rows]] = field(default_factory=list)
    reports: list[list[StepReport]] = field(default_factory=list)
    evaluated: list[tuple[StepReport, Rows]] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)
    others: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)

    def note(self, label: str, tensor: Tensor) -> None:
        self.tensors.append((label, tensor.detach().clone()))


class Cell:
    """A variant under a condition: the models, which every run begins in the same state."""

    def __init__(self, variant: Variant, condition: Condition) -> None:
        self.variant, self.condition = variant, condition
        self.rows = condition.rows(variant)
        with trainable_on_cpu(variant):
            made = [variant.make(condition.dropout).to(condition.dtype) for _ in range(condition.number)]
            self.models = [condition.prepare(variant, model) for model in made]
        tensors = [tensor for model in self.models for tensor in (*model.parameters(), *model.buffers())]
        self.step = 0
        self._state = [(tensor, tensor.detach().clone()) for tensor in tensors]

    @property
    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [
            (f"model {number} {name}", parameter)
            for number, model in enumerate(self.models)
            for name, parameter in model.named_parameters()
        ]

    def batch(self, seed: int) -> Batch:
        batch, dtype = self.variant.batch(seed), self.condition.dtype
        return {name: x.to(dtype) if x.is_floating_point() else x for name, x in batch.items()}

    def loss(self, models: list[nn.Module], batch: Batch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.condition.autocast):
            return sum(self.variant.loss(model, batch) for model in models)

    def run(self, watch: Watch | None = None, *, steps: int = STEPS, spy: Spy | None = None) -> History:
        """Train ``steps`` steps; without anyone who watches, compiled models too run the probed ones eagerly."""
        self._restore()
        history = History()
        with contextlib.ExitStack() as stack:
            caught = stack.enter_context(warnings.catch_warnings(record=True))
            warnings.simplefilter("always")
            stack.enter_context(trainable_on_cpu(self.variant, traced=self.condition.backend is not None))
            quiet = global_state(), stance()
            before = whole_state(self.models) if watch is not None else {}
            with contextlib.ExitStack() as watching:
                if watch is not None:
                    watched = self.condition.watched(self.models, self.rows)
                    history.watchers = [(watching.enter_context(watch(model)), rows) for model, rows in watched]
                self._train(history, steps, spy, quiet)
            changed = differences(before, whole_state(self.models)) if before else []
            if changed:
                history.problems.append(f"not as before the probe: {', '.join(changed[:5])}")
        for warning in caught:
            if issubclass(warning.category, AttnProbeWarning):
                history.warned.append(str(warning.message))
            else:
                history.others.add(f"{warning.category.__name__}: {warning.message}")
        return history

    def _restore(self) -> None:
        with torch.no_grad():
            for tensor, beginning in self._state:
                tensor.copy_(beginning)
                tensor.grad = None
        torch.manual_seed(SEED)

    def _train(self, history: History, steps: int, spy: Spy | None, quiet: tuple[dict[str, Any], Any]) -> None:
        models = [self.condition.late(model) for model in self.models]
        parameters = self.parameters
        # Adam's epsilon is 0 in fp16.
        kind = torch.optim.AdamW if self.condition.dtype.itemsize > 2 else torch.optim.SGD
        optimizer = kind([parameter for _, parameter in parameters], lr=LEARNING_RATE)
        probes = [(probe, rows) for probe, rows in history.watchers if isinstance(probe, AttentionProbe)]
        history.reports = [[] for _ in probes]
        for step in range(steps):
            self.step, probed = step, step % EVERY == 0
            eager = self.condition.backend is not None and self._eager(probed) and not history.watchers
            with torch.compiler.set_stance("force_eager") if eager else contextlib.nullcontext():
                for probe, rows in probes if self.condition.evaluate else ():
                    report = probe.evaluate(partial(self.loss, models, self.batch(100 * step)))
                    history.evaluated.append((report, rows))
                with spy or contextlib.nullcontext():
                    loss = self._passes(models, probed, history, quiet[0])
                for name, parameter in parameters:
                    if parameter.grad is not None:
                        history.note(f"gradient of {name} in step {step}", parameter.grad)
                optimizer.step()
                optimizer.zero_grad()
            if not probed and (global_state(), stance()) != quiet:
                history.problems.append("something of the probe was there in a step that is not probed")
            for (probe, _), reports in zip(probes, history.reports, strict=True):
                report = probe.step(loss)
                if (report is not None) != probed:
                    history.problems.append(f"step {step} was {'not ' if probed else ''}probed")
                reports += [report] if report is not None else []
        for name, parameter in parameters:
            history.note(f"final {name}", parameter)
        history.note("torch's random state", torch.get_rng_state())

    def _eager(self, probed: bool) -> bool:
        """Whether a step of a compiled model must not run what was compiled."""
        return probed and not self.condition.tapped

    def _passes(self, models: list[nn.Module], probed: bool, history: History, state: dict[str, Any]) -> Tensor:
        """The forward and backward passes of a step, with whatever the condition does around them."""
        batches = [self.batch(100 * self.step + micro) for micro in range(self.condition.micro_batches)]
        self.condition.before(self, batches[0], history)
        for batch in batches:
            with self._looked_at(probed, state, history):
                loss = self.loss(models, batch)
            self.condition.between(self, batch, history)
            torch.autograd.backward(loss)
            history.note(f"loss of step {self.step}", loss)
        return loss

    @contextlib.contextmanager
    def _looked_at(self, probed: bool, state: dict[str, Any], history: History) -> Iterator[None]:
        """Around a forward pass: nothing foreign is active in it, unless it is probed, and what was compiled runs."""
        backend = self.condition.backend
        if backend is not None:
            runs = backend.runs
            yield
            ran = backend.runs > runs
            if ran == self._eager(probed):
                history.problems.append(f"compiled code {'ran' if ran else 'did not run'}")
        elif probed:
            yield
        else:
            with Sentry(state) as sentry:
                yield
            if sentry.alarms or not sentry.looks:
                history.problems.append("something of the probe was active in a forward pass that is not probed")

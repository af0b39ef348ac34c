"""Whether a cell of the matrix holds: the probe finds every call, its numbers are right, and nothing else changes."""

from __future__ import annotations

import dataclasses
import re
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from attnprobe import AttentionProbe, AttentionRecord, Statistic, StepReport
from attnprobe.collect import EAGERLY
from attnprobe.statistics.dense import dense_parts
from tests.matrix.condition import Condition, Rows
from tests.matrix.spy import Spy
from tests.matrix.training import EVERY, STEPS, Cell, History
from tests.matrix.variant import Variant

MakeProbe = Callable[..., AttentionProbe]


@dataclass
class Outcome:
    """What became of a cell.

    Attributes:
        captured, expected: number of rows of all reports of a probed step.
        calls: how many errors ``u`` were compared with autograd's.
        difference: the largest between them.
        harm: what the probe changed.
        missed: what it did not find, or found wrong.
        fails: the error with which the model fails without any probe.
        seconds: of processor time.
    """

    captured: int = 0
    expected: int = 0
    calls: int = 0
    difference: float = 0.0
    harm: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    fails: str = ""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return not self.problems and not self.fails

    @property
    def problems(self) -> list[str]:
        return [*self.harm, *self.missed]


def check(variant: Variant, condition: Condition, make_probe: MakeProbe = AttentionProbe) -> Outcome:
    """Train without a probe, with one, and under a spy that asks autograd alone."""
    outcome, start = Outcome(), time.process_time()
    try:
        cell = Cell(variant, condition)
        outcome.expected = sum(
            heads > 0 for _, rows in condition.watched(cell.models, cell.rows) for heads in rows.values()
        )
        # Some models set themselves up in their first pass, and some are compiled in more than one.
        cell.run(steps=1 if condition.backend is None else STEPS)
        plain = cell.run()
    except Exception as error:
        outcome.fails = said(error)
        return outcome
    try:
        _compare(outcome, cell, plain, make_probe)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        outcome.harm.append(f"with the probe: {said(error)} (line {last.lineno} of {last.name})")
    outcome.seconds = time.process_time() - start
    return outcome


def _compare(outcome: Outcome, cell: Cell, plain: History, make_probe: MakeProbe) -> None:
    condition, backend = cell.condition, cell.condition.backend
    graphs = backend.graphs if backend else 0
    records: list[AttentionRecord] = []

    def keep(record: AttentionRecord) -> tuple[Tensor, Tensor]:
        if cell.step == 0 and record.error is not None:  # evaluation has no errors
            parts = {name: part.clone() for name, part in vars(record).items() if isinstance(part, Tensor)}
            records.append(dataclasses.replace(record, **parts))
        return torch.zeros(record.shape[1]), torch.ones(record.shape[1])

    def watch(model: nn.Module, compiled: str) -> AttentionProbe:
        statistics = ("all", Statistic("records", "Keeps the records of the first step.", measure=keep))
        return make_probe(model, every_n_steps=EVERY, statistics=statistics, action="record", compiled=compiled)

    if condition.tapped:
        torch._dynamo.reset()  # what is compiled from now on has taps
    watched = cell.run(partial(watch, compiled="tap" if condition.tapped else "eager"))
    if any(EAGERLY in text for text in watched.warned):  # and there is nothing to compare that with
        outcome.harm += different(_first_step(plain), _first_step(watched))
    else:
        outcome.harm += [*plain.problems, *watched.problems, *different(plain, watched)]
    if backend and backend.graphs > graphs and not condition.tapped:
        outcome.harm.append("the probe made torch compile the model again")
    outcome.missed += _warnings(condition.warns, plain, watched)
    for reports, (_, rows) in zip(watched.reports, watched.watchers, strict=True):
        outcome.captured += min([rows_found(report, rows, outcome.missed) for report in reports], default=0)
    for report, rows in watched.evaluated:
        rows_found(report, rows, outcome.missed, evaluated=True)

    if condition.tapped:
        ours, records[:] = [*records], []
        cell.run(partial(watch, compiled="eager"), steps=1)
        outcome.missed += unlike(ours, records)
    else:
        outcome.missed += _against_autograd(outcome, cell, plain, watched, records)
    outcome.harm, outcome.missed = ([*dict.fromkeys(texts)] for texts in (outcome.harm, outcome.missed))


def _against_autograd(
    outcome: Outcome, cell: Cell, plain: History, watched: History, records: list[AttentionRecord]
) -> list[str]:
    spied = cell.run(spy=(spy := Spy()), steps=1)
    missed = [f"spied: {problem}" for problem in different(_first_step(plain), _first_step(spied))]
    outcome.calls = len(records)
    outcome.difference = max([_error_difference(spy, record) for record in records], default=0.0)
    if outcome.difference or len(records) < outcome.captured:
        missed.append(f"u of {len(records)} calls differs from autograd's by {outcome.difference:.2g}")
    return missed + cell.condition.verify(cell, watched, records, spy)


def unlike(ours: list[AttentionRecord], eager: list[AttentionRecord], tolerance: float = 1e-3) -> list[str]:
    """Which records are those of no eager call up to rounding; other conditions compare those with autograd's."""
    wrong = [] if len(ours) == len(eager) else [f"{len(ours)} records instead of {len(eager)}"]
    references = [dense_parts(record) for record in eager]
    for record in ours:
        parts, distances = dense_parts(record), [torch.inf]
        for reference in references:
            if parts.alpha.shape == reference.alpha.shape:
                pairs = ((parts.alpha, reference.alpha), (parts.b, reference.b), (parts.output, reference.output))
                distances.append(max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs))
        if not min(distances) <= tolerance:
            wrong.append(f"weights and errors are {min(distances):.2g} off from those of the eager step")
    return wrong


def rows_found(report: StepReport, rows: Rows, problems: list[str], *, evaluated: bool = False) -> int:
    """How many of the rows were measured; what is wrong with the report goes to ``problems``.

    Evaluation has no errors, with which the residual could be had.
    """
    if report.invalid:
        problems.append(f"invalid: {report.invalid}")
    if [*report.layers] != [*rows]:
        problems.append(f"rows {', '.join(report.layers) or 'none'} instead of {', '.join(rows)}")
    found = 0
    for index, (layer, heads) in enumerate(zip(report.layers, report.heads, strict=False)):
        assert report.residual is not None
        wanted, checked = rows.get(layer), report["entropy"] if evaluated else report.residual
        if wanted != heads:
            problems.append(f"{layer} has {heads} heads instead of {wanted}")
        elif not checked[index, :heads].isfinite().all():
            problems.append(f"{layer} was not measured")
        else:
            found += wanted > 0
    return found


def different(one: History | list[tuple[str, Tensor]], other: History | list[tuple[str, Tensor]]) -> list[str]:
    """The first of the tensors that are not the same bit for bit."""
    here, there = (h.tensors if isinstance(h, History) else h for h in (one, other))
    if [label for label, _ in here] != [label for label, _ in there]:
        return [f"{len(here)} numbers noted without the probe, {len(there)} with it"]
    wrong = [label for (label, a), (_, b) in zip(here, there, strict=True) if not same_bits(a, b)]
    return [f"{wrong[0]} differs, as do {len(wrong) - 1} other tensors"] if wrong else []


def same_bits(a: Tensor, b: Tensor) -> bool:
    same = a.dtype == b.dtype and a.shape == b.shape
    return same and torch.equal(*(x.contiguous().flatten().view(torch.uint8) for x in (a, b)))


def said(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"


def _first_step(history: History) -> list[tuple[str, Tensor]]:
    return [(label, tensor) for label, tensor in history.tensors if label.endswith("step 0")]


def _error_difference(spy: Spy, record: AttentionRecord) -> float:
    assert record.error is not None
    if record.output is None:  # it was changed in place
        return spy.difference_of(record.error)
    return spy.difference(record.output, record.error)


def _warnings(expected: str, plain: History, watched: History) -> list[str]:
    """Warnings that the probe must not give, or must and does not."""
    told = [text for text in dict.fromkeys(watched.warned) if not (expected and re.search(expected, text))]
    told += sorted(watched.others - plain.others)
    if expected and not any(re.search(expected, text) for text in watched.warned):
        told.append(f"no warning says {expected!r}")
    return [f"warning: {text[:200]}" for text in told]

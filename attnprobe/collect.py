"""One probed step from the first attention call to its report: capture and statistics joined."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from attnprobe.assemble import Assembly, Measured
from attnprobe.capture.session import CHANGED, FROZEN, REPEATED, SILENT, UNRECORDED, Seen, Session, forgetful
from attnprobe.catalog import Statistic
from attnprobe.errors import ConfigurationError
from attnprobe.extent import Extent
from attnprobe.record import AttentionRecord
from attnprobe.reference import Reference
from attnprobe.report import StepReport
from attnprobe.statistics.maps import head_map
from attnprobe.statistics.reduce import Partial
from attnprobe.statistics.streaming import measure

NOTHING = (
    "no softmax attention was seen. Looked for F.scaled_dot_product_attention, FlexAttention, "
    "softmax(query @ key^T) @ value written out, nn.MultiheadAttention and kernels given to "
    "attnprobe.register_attention, in forward passes that run as calls of {model} or of its modules with gradients "
    "enabled. Recurrent, state-space and linear-attention layers have no attention weights; TorchScript, unregistered "
    "kernels and functions called outside any module are not visible{only}"
)
EMPTY = "its input was empty"
EVERYTHING = Extent()
#: Why a call may be missing beside others of its module: a teacher pass, a micro-batch without a loss.
_HARMLESS = {"", SILENT, FROZEN, UNRECORDED, REPEATED, CHANGED}
EAGERLY = "Probed steps run eagerly from now on"
ALL_OFF = "every attention layer that was called is switched off after an error"


class Collector:
    """Makes reports; remembers between steps which layers there are.

    Args:
        model: the watched model.
        statistics: what to measure.
        layers: glob patterns of module names.
        maps: glob patterns of layers, or ``layer:head``, whose pictures go into the report.
        grad_scaler: its ``get_scale()`` is what errors arrive multiplied by.
        forward_only: measure without a backward pass.
        include_frozen: measure calls that no gradient will reach without one.
        extent: how much of each call to measure.
        tapped: let compiled graphs hand out their tensors, for as long as that works.
        strict: let exceptions of the probe itself through.
    """

    def __init__(
        self,
        model: nn.Module,
        statistics: Sequence[Statistic],
        layers: Iterable[str] = ("*",),
        maps: Iterable[str] = (),
        *,
        grad_scaler: Any = None,
        reference: Reference | None = None,
        forward_only: bool = False,
        include_frozen: bool = False,
        extent: Extent = EVERYTHING,
        tapped: bool = False,
        strict: bool = False,
    ) -> None:
        self.model, self.layers, self.maps = model, tuple(layers), tuple(maps)
        self.builtin = [statistic for statistic in statistics if statistic.measure is None]
        self.own = [statistic for statistic in statistics if statistic.measure is not None]
        for own in self.own:
            if own.level != "head" or own.reduce not in ("mean", "root", "norm"):
                raise ConfigurationError(
                    f"own statistic {own.name!r} is a sum and a count per head: it needs level='head' and "
                    f"reduce='mean', 'root' or 'norm', got {own.level!r} and {own.reduce!r}"
                )
        self.grad_scaler, self.strict = grad_scaler, strict
        self.forward_only, self.include_frozen, self.tapped = forward_only, include_frozen, tapped
        self.reference, self.extent = reference, extent
        self._generators: dict[torch.device, torch.Generator] = {}  # never torch's own, which is the training's
        self.rows: list[str] = []  # layers in order of first sight
        self.repeated: set[str] = set()  # modules that were called more than once in a forward pass
        self.problems: dict[str, Exception] = {}
        self.broken: dict[str, Exception] = {}  # own statistics that raised
        self.pictured: set[str] = set()  # patterns of maps that matched a head
        self.session: Session | None = None
        self._scale: float | None = None  # of this step's loss, once an error has arrived
        self._paused = False

    def start(self) -> None:
        """Begin to watch."""
        self._scale = None
        options: Any = {"layers": self.layers, "include_frozen": self.include_frozen, "strict": self.strict}
        if self.tapped:
            from attnprobe.capture.tap import TapSession  # loads inductor

            self.session = TapSession(self.model, self._receive, **options)
        else:
            self.session = Session(self.model, self._receive, forward_only=self.forward_only, **options)
        self.session.problems = self.problems
        self.session.start()
        _at_work.add(self)

    def discard(self) -> None:
        """Forget the step under way."""
        if self.session is not None:
            self.session.stop()
            self.session.seen = []  # a session is part of reference cycles and may live on for long
            self.session = None
            _at_work.discard(self)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is captured inside; what was captured before in this step stays. May be nested."""
        session = self.session
        if session is None or self._paused:
            yield
            return
        session.pause()
        self._paused = True
        try:
            yield
        finally:
            self._paused = False
            if session is self.session:
                session.resume()

    @property
    def skipped(self) -> bool:
        """Whether the GradScaler has lowered its scale since the errors arrived: the optimizer made no step."""
        return self._scale is not None and bool(self.grad_scaler.get_scale() < self._scale)

    def finish(self, step: int, loss: float = torch.nan) -> StepReport:
        """The report of what was captured since ``start``."""
        assert self.session is not None
        session, seen = self.session, self.session.seen
        self.discard()
        if session.trouble:
            self.tapped = False
            return StepReport(step, loss=loss, invalid=f"{session.trouble}. {EAGERLY}")
        calls = self._by_layer(seen)
        moved = self._look_at_reference()
        warnings = [f"{name or 'capture'}: switched off after {_cause(error)}" for name, error in self.problems.items()]
        warnings += [f"statistic {name!r}: switched off after {_cause(error)}" for name, error in self.broken.items()]
        if not calls:
            return StepReport(step, loss=loss, invalid=self._nothing(), warnings=tuple(warnings))

        measured: dict[str, list[Measured]] = {}
        reasons: dict[str, str] = {}
        for layer, same in calls.items():
            if same[0].module in self.problems:
                continue  # told already, with the cause
            results = [call.result for call in same if call.result is not None]
            besides = {call.reason for call in same} - _HARMLESS if results else ()
            warnings += [f"{layer}: of its calls one is not measured: {reason}" for reason in sorted(besides)]
            reasons[layer] = _reason(same) or ("" if results else self._empty())
            if not reasons[layer]:
                measured[layer] = results
        warnings += [f"{layer}: {reason}" for layer, reason in reasons.items() if reason]
        invalid = REPEATED if REPEATED in reasons.values() else "" if measured else _none_measured(reasons)
        if measured:
            warnings += [
                f"maps pattern {pattern!r} names no attention head; layers: {', '.join(self.rows)}"
                for pattern in self.maps
                if pattern not in self.pictured
            ]
        report = Assembly(self.rows, [*self.builtin, *self.own], measured, moved)
        return StepReport(
            step,
            tuple(self.rows),
            report.heads,
            report.statistics,
            report.layer,
            report.standard_errors,
            report.residual,
            report.nonfinite,
            loss,
            invalid,
            tuple(warnings + report.warnings),
            report.notes,
            report.maps,
        )

    def _receive(self, module: str, record: AttentionRecord) -> Measured | None:
        if 0 in record.shape:
            return None
        if record.error is not None and self.grad_scaler is not None:
            if self._scale is None:  # not at the step's start, which may come before scaler.update()
                self._scale = float(self.grad_scaler.get_scale())
            record = _rescaled(record, 1 / self._scale)
        part, extent = self.extent.part(record), self.extent
        if 0 in part.shape:
            return None
        device = record.value.device
        generator = self._generators.setdefault(device, torch.Generator(device))
        partial = measure(part, self.builtin, rows=extent.rows, exact_routing=extent.exact_routing, generator=generator)
        result = Measured.of(record, partial, extent)
        tokens = self.session.tokens if self.session is not None else None
        if tokens is not None and record.query_tokens is None and record.key_tokens is None:
            batch, _, _, queries, keys = record.shape
            fits = f"[{batch}, {queries}]" + ("" if keys == queries else f" or [{batch}, {keys}]")
            result.warnings.append(f"token_mask has shape {[*tokens.shape]}, which is not {fits}: it is not used")
        for statistic in self.own:
            self._measure_own(statistic, part, result.partial)
        result.partial = extent.whole(result.partial, record.shape[1])
        for head in range(record.shape[1]):
            names = (module, f"{module}:{head}")
            matching = [p for p in self.maps if any(fnmatch.fnmatchcase(name, p) for name in names)]
            if matching:
                self.pictured.update(matching)
                result.maps.append(head_map(module, head, record))
        return result

    def _measure_own(self, statistic: Statistic, record: AttentionRecord, partial: Partial) -> None:
        assert statistic.measure is not None
        if statistic.name in self.broken:
            return
        try:
            total, count = (torch.as_tensor(x, dtype=torch.float64) for x in statistic.measure(record))
            if total.shape != (record.shape[1],) or count.shape != total.shape:
                raise ValueError(f"expected (sum, count) of shape [{record.shape[1]}] each, got {[*total.shape]}")
        except Exception as error:
            if self.strict:
                raise
            self.broken[statistic.name] = forgetful(error)
            return
        partial |= {f"{statistic.name}.sum": total, f"{statistic.name}.count": count}

    def _look_at_reference(self) -> dict[str, Partial]:
        """How far each layer moved on the reference batch since the last probe."""
        if self.reference is None:
            return {}
        try:
            return self.reference.look(self._by_layer)
        except Exception as error:
            if self.strict:
                raise
            self.broken["displacement on the reference batch"] = forgetful(error)
            self.reference = None
            return {}

    def _empty(self) -> str:
        heads = self.extent.heads
        return EMPTY if heads is None else f"{EMPTY}, or it has none of the heads {', '.join(map(str, heads))}"

    def _nothing(self) -> str:
        """Why there was no call to measure."""
        if self.problems:
            return ALL_OFF
        only = "" if "*" in self.layers else f"; layers other than {', '.join(map(repr, self.layers))} are not watched"
        return NOTHING.format(model=type(self.model).__name__, only=only)

    def _by_layer(self, seen: list[Seen]) -> dict[str, list[Seen]]:
        """Calls by layer, ``module`` or ``module#index``; new layers are appended in order of first sight."""
        self.repeated |= {call.module for call in seen if call.index}
        layers: dict[str, list[Seen]] = {}
        for call in sorted(seen, key=lambda call: (call.rank, call.index)):
            layer = f"{call.module}#{call.index}" if call.module in self.repeated else call.module
            layers.setdefault(layer, []).append(call)
        self.rows += [layer for layer in layers if layer not in self.rows]
        return layers


_at_work: WeakSet[Collector] = WeakSet()


@contextlib.contextmanager
def apart(model: nn.Module) -> Iterator[None]:
    """What happens inside gets into no report of anyone who watches the model, a part of it or what it is part of."""
    modules = set(model.modules())
    with contextlib.ExitStack() as stack:
        for collector in [*_at_work]:
            if not modules.isdisjoint(collector.model.modules()):
                stack.enter_context(collector.paused())
        yield


def _reason(calls: list[Seen]) -> str:
    """Why a layer was not measured; one measured call is enough, one that cannot be trusted spoils it."""
    reasons = [call.reason for call in calls]
    for spoiled in (REPEATED, CHANGED):
        if spoiled in reasons:
            return spoiled
    return "" if "" in reasons else reasons[0]


def _none_measured(reasons: Mapping[str, str]) -> str:
    """Why no call was measured; ``reasons`` are those of the layers that are not switched off."""
    if SILENT in reasons.values():
        return "no backward reached any attention call before the step ended"
    return next((f"nothing was measured; {layer}: {reason}" for layer, reason in reasons.items()), ALL_OFF)


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _rescaled(record: AttentionRecord, factor: float) -> AttentionRecord:
    def rescaled(error: Tensor) -> Tensor:
        return error.to(torch.promote_types(error.dtype, torch.float32)) * factor

    assert record.error is not None
    through = None if record.lse_error is None else rescaled(record.lse_error)
    return replace(record, error=rescaled(record.error), lse_error=through)

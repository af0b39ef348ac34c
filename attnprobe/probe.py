"""AttentionProbe and analyze: the only place that joins capture, statistics, alarms and writers."""

from __future__ import annotations

import contextlib
import fnmatch
import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attnprobe.alarms import ALL_ALARMS, DEFAULT_ALARMS, AlarmEngine, AlarmRule, resolve
from attnprobe.capture.modules import module_names
from attnprobe.capture.session import SILENT
from attnprobe.catalog import STATISTICS, Statistic, select
from attnprobe.collect import EAGERLY, Collector, apart
from attnprobe.errors import (
    AttnProbeWarning,
    ConfigurationError,
    InvalidStepError,
    NoAttentionError,
    UnknownNameError,
)
from attnprobe.extent import Extent
from attnprobe.preserve import preserved
from attnprobe.reference import REFERENCE_STATISTICS, Reference
from attnprobe.report import StepReport
from attnprobe.writers.base import Writer

Names = str | Iterable[str]
#: The first probes come every 10 steps, so that the alarms' baselines are those of the run's beginning.
EARLY_PROBES, EARLY_INTERVAL = 5, 10
SKIPPED = "the GradScaler skipped this step"


class AttentionProbe:
    """Watches every attention head of a model while it trains.

    Between two calls of ``step`` lies one training step. The first one is probed, four more follow at
    most 10 steps apart, then one every ``every_n_steps``. On all others nothing of the probe is active.

    Args:
        model: any ``nn.Module``; nothing is installed on it.
        every_n_steps: distance between probes.
        layers: glob pattern(s) of module names to watch.
        statistics: ``"core"``, ``"all"``, names from ``STATISTICS``, own ``Statistic`` objects, or a mix.
        maps: glob pattern(s) of layers, or ``"layer:head"``, whose attention, compatibility and advantage
            maps go into the report.
        writers: where reports go.
        alarms: rules, names of rules, ``"default"`` or ``"all"``; what rules of your choice read is measured too.
        action: what a new alarm does: ``"record"`` it, ``"warn"``, or ask to ``"stop"`` (see ``should_stop``).
        grad_scaler: the GradScaler in use, if any; errors are divided by its scale, and a step that it skips
            makes an invalid report instead of an alarm. ``step`` then comes after ``scaler.update()``.
        uninformed_loss: loss of a model that knows nothing of the input (the entropy of the targets).
        reference_batch: a batch on which every probe runs the model again, in evaluation mode, to measure
            ``attention_displacement`` and ``value_displacement`` since the probe before: a tensor, tuple or
            mapping for ``model(...)``, or a function that runs the forward pass.
        include_frozen: measure the routing of layers that no gradient reaches; the rest is NaN there.
        rows: measure so many queries of each sequence, drawn by chance, where it has more: the cost then grows with
            the length of a sequence, not with its square, and ``report.standard_errors`` says how far estimates may
            be off.
        exact_routing: with ``rows``, take all queries for the statistics that need no error signal.
        heads: measure only the heads of these numbers, in every layer.
        sequences: measure only so many sequences of a batch, from the first.
        compiled: how a compiled model is watched: ``"eager"`` runs probed steps without compiled code, ``"tap"`` lets
            what is compiled from now on hand out its tensors, so that it trains bit for bit as without a probe. Where
            that does not work, a warning says why, and probed steps run eagerly.
        strict: raise errors, and why a step cannot be measured, instead of warning once.

    Raises:
        ConfigurationError: an option that cannot work. UnknownNameError: a name that stands for nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every_n_steps: int = 50,
        layers: Names = "*",
        statistics: str | Statistic | Iterable[str | Statistic] = "core",
        maps: Names = (),
        writers: Writer | Iterable[Writer] = (),
        alarms: AlarmRule | str | Iterable[AlarmRule | str] = DEFAULT_ALARMS,
        action: Literal["record", "warn", "stop"] = "warn",
        grad_scaler: Any = None,
        uninformed_loss: float | None = None,
        reference_batch: Any = None,
        include_frozen: bool = False,
        rows: int | None = None,
        exact_routing: bool = False,
        heads: Iterable[int] | None = None,
        sequences: int | None = None,
        compiled: Literal["eager", "tap"] = "eager",
        strict: bool = False,
    ) -> None:
        check_options(every_n_steps, action)
        if compiled not in ("eager", "tap"):
            raise ConfigurationError(f"compiled must be 'eager' or 'tap', got {compiled!r}")
        if grad_scaler is not None and not callable(getattr(grad_scaler, "get_scale", None)):
            raise ConfigurationError(f"grad_scaler needs get_scale(), as torch.amp.GradScaler has; got {grad_scaler!r}")
        self.model, self.every_n_steps, self.action, self.strict = model, every_n_steps, action, strict
        self.writers = writer_list(writers)
        self._working = [*self.writers]  # those that never failed
        rules = runnable(alarms, reference_batch)
        self.engine = AlarmEngine(rules, uninformed_loss=uninformed_loss, strict=strict)
        self.should_stop = False
        chosen, watched = with_needs(select(statistics), rules), patterns(model, "layers", layers)
        displacements = [STATISTICS[name] for name in REFERENCE_STATISTICS]
        if reference_batch is not None:
            chosen = tuple(dict.fromkeys([*chosen, *displacements]))
        elif set(displacements) & set(chosen):
            raise ConfigurationError(
                f"{' and '.join(REFERENCE_STATISTICS)}, and the alarm stalled_layer that reads them, need a "
                "reference_batch="
            )
        self._collector = Collector(
            model,
            chosen,
            watched,
            patterns(model, "maps", maps),
            grad_scaler=grad_scaler,
            reference=None if reference_batch is None else Reference(model, reference_batch, watched),
            include_frozen=include_frozen,
            extent=Extent.of(rows, exact_routing, heads, sequences),
            tapped=compiled == "tap",
            strict=strict,
        )
        self._remove_taps: Callable[[], None] = lambda: None
        self._count, self._next, self._probes = 0, 0, 0  # steps done, step to probe next, probes done
        self._step = 0  # the training loop's own count of the step under way
        self._said: set[str] = set()
        if compiled == "tap":
            self._install_taps()
        self._closed = False
        weakref.finalize(self, self._collector.discard)  # a probe that nobody closed must not watch for ever
        self.begin()

    def step(self, loss: Tensor | float | None = None) -> StepReport | None:
        """End a training step: after ``backward``, before the next forward pass.

        Args:
            loss: the step's loss, for the alarms that look at progress. Read on probed steps only.

        Returns:
            The report of a probed step, None on all others.
        """
        try:
            return self._finish(loss) if self.active else None
        finally:
            self._count += 1
            self.begin(self._step + 1)

    def begin(self, step: int | None = None) -> None:
        """Start the training step number ``step``. Integrations call it; in a plain loop ``step()`` does."""
        self._step = self._step if step is None else step
        self._collector.discard()
        if not self._closed and self._count >= self._next:
            self._collector.start()

    @property
    def active(self) -> bool:
        """Whether the step under way is being probed."""
        return self._collector.session is not None

    def discard(self) -> None:
        """Forget the step under way; nothing of the probe is active until ``begin``."""
        self._collector.discard()

    def token_mask(self, mask: Tensor | None) -> None:
        """Say which tokens of the coming forward pass are real.

        Args:
            mask: ``[B, T]``, true or non-zero for real tokens; None to derive it from the attention masks again.
        """
        if self._collector.session is not None:
            self._collector.session.tokens = None if mask is None else mask.detach().bool()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is captured inside; what was captured before in this step stays."""
        with self._collector.paused():
            yield

    def evaluate(self, closure: Callable[[], Any]) -> StepReport:
        """Forward-only statistics of what ``closure`` runs, without gradients and apart from training.

        Gradients, buffers, random state and training mode are as before afterwards.

        Raises:
            NoAttentionError: no softmax attention was seen.
            InvalidStepError: attention was seen, but could not be measured; the message says why.
        """
        training = self._collector
        statistics = [*training.builtin, *training.own]
        collector = Collector(
            self.model, statistics, training.layers, training.maps, extent=training.extent, forward_only=True
        )
        with apart(self.model), preserved(self.model), _capturing(collector), torch.no_grad():
            self._collector = collector  # for token_mask() and paused() inside the closure
            try:
                closure()
            finally:
                self._collector = training
            return _measured(collector.finish(self._step))

    def snooze(self, name: str = "*", *, layers: str = "*", steps: int) -> None:
        """Keep alarms quiet for the next ``steps`` training steps: neither warned about, nor a reason to stop.

        They stand in the reports all the same, marked as snoozed, and are new again if they outlast it. What is not
        finite is never snoozed.

        Args:
            name, layers: glob patterns of the alarms' names and layers.

        Raises:
            UnknownNameError: no rule has such a name. ConfigurationError: it is the one for non-finite numbers.
        """
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ConfigurationError(f"steps must be a whole number of at least 1, got {steps!r}")
        self.engine.snooze(name, layers, until=self._step + steps)

    def close(self) -> None:
        """End the probe: discard an unfinished step, close the writers. May be called more than once."""
        self._closed = True
        self._collector.discard()
        self._remove_taps()
        for writer in self.writers:
            with self._guard(f"closing {type(writer).__name__}"):
                writer.close()

    def __enter__(self) -> AttentionProbe:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """Sampling phase, known layers and alarm history, as plain Python values."""
        return {
            "step": self._step,
            "count": self._count,
            "next": self._next,
            "probes": self._probes,
            "layers": list(self._collector.rows),
            "repeated": sorted(self._collector.repeated),
            "alarms": self.engine.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken."""
        self._count, self._next, self._probes = state["count"], state["next"], state["probes"]
        self._collector.rows[:] = state["layers"]
        self._collector.repeated = set(state["repeated"])
        self.engine.load_state_dict(state["alarms"])
        self.begin(state["step"])

    def _install_taps(self) -> None:
        try:
            from attnprobe.capture import tap_pass  # loads inductor

            self._remove_taps = tap_pass.install()
            weakref.finalize(self, self._remove_taps)
        except (ImportError, AttributeError, OSError) as error:  # internals of torch, which come and go
            self._collector.tapped = False
            self._say(f"compiled='tap' does not work with torch {torch.__version__}: {error}. {EAGERLY}")

    def _finish(self, loss: Tensor | float | None) -> StepReport:
        self._probes += 1
        interval = self.every_n_steps
        if self._probes < EARLY_PROBES:
            interval = min(interval, EARLY_INTERVAL)
        self._next = self._count + interval
        value, problem = _scalar(loss)
        if isinstance(loss, Tensor) and self._collector.session is not None:
            with self._guard("the look at the loss"):
                self._collector.session.examine(loss.grad_fn)
        report = self._collect(value)
        if problem:
            report = replace(report, invalid=report.invalid or problem)
        if report.invalid and report.invalid != SKIPPED:
            if self.strict:
                raise InvalidStepError(report.invalid)
            self._say(f"probe not valid: {report.invalid}")
        for warning in report.warnings:
            self._say(warning)
        judged = report
        if math.isnan(value) and loss is not None and not problem:  # the rules cannot know otherwise that it was given
            judged = replace(report, nonfinite={**report.nonfinite, "loss": torch.ones(1, dtype=torch.float64)})
        with self._guard("the alarms"):
            report = replace(report, alarms=self.engine.update(judged))
        for rule, error in self.engine.failures:
            self._say(f"alarm {rule!r}: switched off after {type(error).__name__}: {error}")
        self.engine.failures.clear()
        self._act(report)
        for writer in [*self._working]:
            try:
                writer.write(report)
            except Exception as error:
                self._working.remove(writer)
                if self.strict:
                    raise
                self._say(f"error in {type(writer).__name__}, which is switched off: {type(error).__name__}: {error}")
        return report

    def _collect(self, loss: float) -> StepReport:
        try:
            report = self._collector.finish(self._step, loss)
            if not self._collector.skipped:
                return report
        except Exception as error:
            if self.strict:
                raise
            return StepReport(self._step, loss=loss, invalid=f"error in the probe: {type(error).__name__}: {error}")
        # Everyday life in fp16: that errors are infinite is no finding; that inputs are still is one.
        inputs = {kind: counts for kind, counts in report.nonfinite.items() if kind != "error"}
        return replace(report, invalid=report.invalid or SKIPPED, nonfinite=inputs)

    def _act(self, report: StepReport) -> None:
        for alarm in report.alarms:
            if alarm.new and alarm.severity == "alarm":
                if self.action != "record":
                    warnings.warn(str(alarm), AttnProbeWarning, stacklevel=4)
                self.should_stop |= self.action == "stop"

    def _say(self, message: str, stacklevel: int = 4) -> None:
        """Warn once per run, at the line that called ``step``."""
        if message not in self._said:
            self._said.add(message)
            warnings.warn(f"attnprobe: {message}", AttnProbeWarning, stacklevel=stacklevel)

    @contextlib.contextmanager
    def _guard(self, what: str) -> Iterator[None]:
        """An exception becomes one warning; training goes on."""
        try:
            yield
        except Exception as error:
            if self.strict:
                raise
            self._say(f"error in {what}: {type(error).__name__}: {error}", stacklevel=6)


def analyze(
    model: nn.Module,
    closure: Callable[[], Any],
    *,
    layers: Names = "*",
    statistics: str | Statistic | Iterable[str | Statistic] = "all",
    maps: Names = (),
    alarms: AlarmRule | str | Iterable[AlarmRule | str] = (),
    rows: int | None = None,
    exact_routing: bool = False,
    heads: Iterable[int] | None = None,
    sequences: int | None = None,
) -> StepReport:
    """Every head's statistics on one batch; afterwards the model is as it was.

    Args:
        model: the model that the closure runs.
        closure: runs the forward pass and either returns the loss or calls ``backward`` itself.
        layers, statistics, maps, alarms, rows, exact_routing, heads, sequences: as for ``AttentionProbe``.

    Returns:
        The report; the model's gradients and buffers, torch's random state and the training mode are as before.
        What else the closure reaches (gradients of other tensors, an optimizer inside backward) is not restored.

    Raises:
        NoAttentionError: no softmax attention was seen.
        InvalidStepError: attention was seen, but could not be measured; the message says why.
    """
    extent = Extent.of(rows, exact_routing, heads, sequences)
    watched, pictured = patterns(model, "layers", layers), patterns(model, "maps", maps)
    rules = runnable(alarms, None)
    collector = Collector(model, with_needs(select(statistics), rules), watched, pictured, extent=extent, strict=True)
    engine = AlarmEngine(rules, strict=True)
    with apart(model), preserved(model), _capturing(collector) as session, torch.enable_grad():
        loss = closure()
        # The gradients were set aside: where there are some again, the closure has called backward itself.
        done = any(p.grad is not None for p in model.parameters()) or any(call.result for call in session.seen)
        if not done and isinstance(loss, Tensor) and loss.requires_grad:
            # Also where nothing was seen yet: reentrant checkpointing runs the model without gradients first.
            if loss.numel() != 1:
                raise InvalidStepError(f"the closure must return a scalar loss, got shape {[*loss.shape]}")
            torch.autograd.backward(loss)
        elif not done and any(call.reason == SILENT for call in session.seen):
            raise InvalidStepError(
                "no backward reached any attention call: the closure has to return the loss or to call backward "
                f"itself, it returned {type(loss).__name__}"
            )
        value, _ = _scalar(loss if isinstance(loss, Tensor | float) else None)
        report = _measured(collector.finish(0, value))
    return replace(report, alarms=engine.update(report))


def _measured(report: StepReport) -> StepReport:
    if not report.layers:
        raise NoAttentionError(report.invalid)
    if report.invalid:
        raise InvalidStepError(report.invalid)
    return report


@contextlib.contextmanager
def _capturing(collector: Collector) -> Iterator[Any]:
    collector.start()
    try:
        yield collector.session
    finally:
        collector.discard()


def runnable(alarms: AlarmRule | str | Iterable[AlarmRule | str], reference_batch: Any) -> tuple[AlarmRule, ...]:
    """The rules; ``"all"`` are those that need no reference batch where there is none."""
    items = [alarms] if isinstance(alarms, AlarmRule | str) else list(alarms)
    rules = resolve(items)
    if reference_batch is not None or not ("all" in items or tuple(items) == ALL_ALARMS):
        return rules
    asked = {item if isinstance(item, str) else item.name for item in items} if "all" in items else ()
    return tuple(rule for rule in rules if rule.name in asked or not set(rule.needs) & set(REFERENCE_STATISTICS))


def with_needs(statistics: Iterable[Statistic], rules: tuple[AlarmRule, ...]) -> tuple[Statistic, ...]:
    """``statistics``, and what rules that somebody chose read besides; the default rules make do with what there is."""
    needs = () if rules == DEFAULT_ALARMS else (name for rule in rules for name in rule.needs if name in STATISTICS)
    return tuple(dict.fromkeys([*statistics, *(STATISTICS[name] for name in needs)]))


def check_options(every_n_steps: object, action: object) -> None:
    """Raise ConfigurationError unless ``every_n_steps`` is a whole number of at least 1 and ``action`` is known."""
    if isinstance(every_n_steps, bool) or not isinstance(every_n_steps, int) or every_n_steps < 1:
        raise ConfigurationError(f"every_n_steps must be a whole number of at least 1, got {every_n_steps!r}")
    if action not in ("record", "warn", "stop"):
        raise ConfigurationError(f"action must be 'record', 'warn' or 'stop', got {action!r}")


def writer_list(given: Any) -> list[Writer]:
    """``given``, one writer or several, as a list.

    Raises:
        ConfigurationError: something else is among them.
    """
    chosen = list(given) if isinstance(given, Iterable) and not isinstance(given, str | Writer) else [given]
    for writer in chosen:
        if isinstance(writer, type) or not isinstance(writer, Writer):
            raise ConfigurationError(
                "a writer is an object with write(report) and close(), such as TensorBoardWriter('runs/a'); "
                f"got {writer!r}"
            )
    return chosen


def patterns(model: nn.Module, option: str, given: Names) -> tuple[str, ...]:
    """``given`` as a tuple of glob patterns, each of which names a module of the model.

    Raises:
        ConfigurationError: the model is no module, or a pattern no string.
        UnknownNameError: a pattern names nothing; the message lists what there is.
    """
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"model must be an nn.Module, got {type(model).__name__}")
    chosen = tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else (given,)
    if not all(isinstance(pattern, str) for pattern in chosen):
        raise ConfigurationError(f"{option} takes glob patterns of module names, got {given!r}")
    names = list(module_names(model).values())
    for pattern in chosen:
        base = pattern.rpartition(":")[0] if option == "maps" and ":" in pattern else pattern
        if not any(fnmatch.fnmatchcase(name, base) for name in names):
            raise UnknownNameError.among(f"{option} pattern", pattern, names)
    return chosen


def _scalar(loss: Tensor | float | None) -> tuple[float, str]:
    """The loss as a number, and what is wrong with it."""
    if loss is None:
        return math.nan, ""
    if isinstance(loss, Tensor) and loss.numel() != 1:
        return math.nan, f"the loss given to step() has shape {[*loss.shape]} instead of being a scalar"
    try:
        return float(loss.detach() if isinstance(loss, Tensor) else loss), ""
    except (TypeError, ValueError, RuntimeError):
        return math.nan, f"the loss given to step() is {type(loss).__name__} instead of a number"

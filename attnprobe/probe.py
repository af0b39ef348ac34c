"""AttentionProbe and analyze: the only place that joins capture, statistics, alarms and writers."""

from __future__ import annotations

import contextlib
import fnmatch
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attnprobe.alarms import DEFAULT_ALARMS, AlarmEngine, AlarmRule, resolve
from attnprobe.capture.modules import module_names
from attnprobe.catalog import Statistic, select
from attnprobe.collect import Collector
from attnprobe.errors import (
    AttnProbeWarning,
    ConfigurationError,
    InvalidStepError,
    NoAttentionError,
    UnknownNameError,
)
from attnprobe.preserve import preserved
from attnprobe.report import StepReport
from attnprobe.writers.base import Writer

Names = str | Iterable[str]
#: The first probes come every 10 steps, so that the alarms' baselines are those of the run's beginning.
EARLY_PROBES, EARLY_INTERVAL = 5, 10


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
        alarms: rules, or names of default rules.
        action: what a new alarm does: ``"record"`` it, ``"warn"``, or ask to ``"stop"`` (see ``should_stop``).
        grad_scaler: the GradScaler in use, if any; errors are divided by its scale.
        uninformed_loss: loss of a model that knows nothing of the input (the entropy of the targets).
        strict: raise what would otherwise be one warning.

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
        strict: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ConfigurationError(f"model must be an nn.Module, got {type(model).__name__}")
        check_interval(every_n_steps)
        if action not in ("record", "warn", "stop"):
            raise ConfigurationError(f"action must be 'record', 'warn' or 'stop', got {action!r}")
        self.model, self.every_n_steps, self.action, self.strict = model, every_n_steps, action, strict
        self.writers = [writers] if isinstance(writers, Writer) else list(writers)
        for writer in self.writers:
            if not isinstance(writer, Writer):
                raise ConfigurationError(f"a writer has write(report) and close(), {type(writer).__name__} has not")
        self.engine = AlarmEngine(resolve(alarms), uninformed_loss=uninformed_loss, strict=strict)
        self.should_stop = False
        self._grad_scaler = grad_scaler
        self._collector = Collector(
            model, select(statistics), patterns(model, "layers", layers), patterns(model, "maps", maps), strict=strict
        )
        self._count, self._next, self._probes = 0, 0, 0  # steps done, step to probe next, probes done
        self._step = 0  # the training loop's own count of the step under way
        self._said: set[str] = set()
        self._closed = False
        self.begin()

    def step(self, loss: Tensor | float | None = None) -> StepReport | None:
        """End a training step: after ``backward``, before the next forward pass.

        Args:
            loss: the step's loss, for the alarms that look at progress. Read on probed steps only.

        Returns:
            The report of a probed step, None on all others.
        """
        report = None
        if self._collector.session is not None:
            report = self._finish(loss)
        self._count += 1
        self.begin(self._step + 1)
        return report

    def begin(self, step: int | None = None) -> None:
        """Start the training step number ``step``. Integrations call it; in a plain loop ``step()`` does."""
        self._step = self._step if step is None else step
        self._collector.discard()
        if not self._closed and self._count >= self._next:
            scale = 1.0 if self._grad_scaler is None else float(self._grad_scaler.get_scale())
            self._collector.start(scale)

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
        session = self._collector.session
        if session is not None:
            session.watch.stop()
        try:
            yield
        finally:
            if session is not None and session is self._collector.session:
                session.watch.start()

    def evaluate(self, closure: Callable[[], Any]) -> StepReport:
        """Forward-only statistics of what ``closure`` runs, without gradients and apart from training.

        Raises:
            NoAttentionError: no attention call was seen.
        """
        collector = Collector(
            self.model, self._collector.builtin, self._collector.layers, self._collector.maps, forward_only=True
        )
        with self.paused(), _capturing(collector), torch.no_grad():
            closure()
            report = collector.finish(self._step)
        if report.invalid:
            raise NoAttentionError(report.invalid)
        return report

    def close(self) -> None:
        """End the probe: discard an unfinished step, close the writers. May be called more than once."""
        self._closed = True
        self._collector.discard()
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
        self.begin()

    def _finish(self, loss: Tensor | float | None) -> StepReport:
        value, problem = _scalar(loss)
        report = self._collector.finish(self._step, value)
        self._probes += 1
        interval = self.every_n_steps
        if self._probes < EARLY_PROBES:
            interval = min(interval, EARLY_INTERVAL)
        self._next = self._count + interval
        if problem:
            report = replace(report, invalid=report.invalid or problem)
        if math.isnan(value) and loss is not None and not problem:
            report = replace(report, nonfinite={**report.nonfinite, "loss": torch.ones(1, dtype=torch.float64)})
        if report.invalid:
            if self.strict:
                raise InvalidStepError(report.invalid)
            self._say(f"probe not valid: {report.invalid}")
        for warning in report.warnings:
            self._say(warning)
        with self._guard("the alarms"):
            report = replace(report, alarms=self.engine.update(report))
        for rule, error in self.engine.failures:
            self._say(f"alarm {rule!r}: switched off after {type(error).__name__}: {error}")
        self.engine.failures.clear()
        self._act(report)
        for writer in [*self.writers]:
            with self._guard(f"{type(writer).__name__}, which is switched off", lambda w=writer: self.writers.remove(w)):
                writer.write(report)
        return report

    def _act(self, report: StepReport) -> None:
        for alarm in report.alarms:
            if alarm.new and self.action != "record":
                warnings.warn(str(alarm), AttnProbeWarning, stacklevel=4)
        self.should_stop |= self.action == "stop" and bool(report.alarms)

    def _say(self, message: str) -> None:
        """Warn once per run."""
        if message not in self._said:
            self._said.add(message)
            warnings.warn(f"attnprobe: {message}", AttnProbeWarning, stacklevel=4)

    @contextlib.contextmanager
    def _guard(self, what: str, afterwards: Callable[[], None] = lambda: None) -> Iterator[None]:
        """An exception becomes one warning; training goes on."""
        try:
            yield
        except Exception as error:
            afterwards()
            if self.strict:
                raise
            self._say(f"error in {what}: {type(error).__name__}: {error}")


def analyze(
    model: nn.Module,
    closure: Callable[[], Any],
    *,
    layers: Names = "*",
    statistics: str | Statistic | Iterable[str | Statistic] = "all",
    maps: Names = (),
    alarms: AlarmRule | str | Iterable[AlarmRule | str] = (),
) -> StepReport:
    """Every head's statistics on one batch, leaving no trace on the model.

    Args:
        model: the model that the closure runs.
        closure: runs the forward pass and either returns the loss or calls ``backward`` itself.
        layers, statistics, maps, alarms: as for ``AttentionProbe``.

    Returns:
        The report; gradients, buffers, random state and training mode are as before.

    Raises:
        NoAttentionError: no attention call was seen.
        InvalidStepError: attention was seen, but could not be measured; the message says why.
    """
    collector = Collector(
        model, select(statistics), patterns(model, "layers", layers), patterns(model, "maps", maps), strict=True
    )
    engine = AlarmEngine(resolve(alarms), strict=True)
    with preserved(model), _capturing(collector) as session:
        loss = closure()
        if isinstance(loss, Tensor) and loss.requires_grad and not any(call.result for call in session.seen):
            if loss.numel() != 1:
                raise InvalidStepError(f"the closure must return a scalar loss, got shape {[*loss.shape]}")
            loss.backward()  # type: ignore[no-untyped-call]
        value, _ = _scalar(loss if isinstance(loss, Tensor | float) else None)
        report = collector.finish(0, value)
    if not report.layers:
        raise NoAttentionError(report.invalid)
    if report.invalid:
        raise InvalidStepError(report.invalid)
    return replace(report, alarms=engine.update(report))


@contextlib.contextmanager
def _capturing(collector: Collector) -> Iterator[Any]:
    collector.start()
    try:
        yield collector.session
    finally:
        collector.discard()


def check_interval(every_n_steps: object) -> None:
    """Raise ConfigurationError unless ``every_n_steps`` is a whole number of at least 1."""
    if isinstance(every_n_steps, bool) or not isinstance(every_n_steps, int) or every_n_steps < 1:
        raise ConfigurationError(f"every_n_steps must be a whole number of at least 1, got {every_n_steps!r}")


def patterns(model: nn.Module, option: str, given: Names) -> tuple[str, ...]:
    """``given`` as a tuple of glob patterns, each of which names a module of the model.

    Raises:
        UnknownNameError: a pattern names nothing; the message lists what there is.
    """
    chosen = (given,) if isinstance(given, str) else tuple(given)
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
    if isinstance(loss, Tensor):
        if loss.numel() != 1:
            return math.nan, f"the loss given to step() has shape {[*loss.shape]} instead of being a scalar"
        return float(loss.detach()), ""
    try:
        return float(loss), ""
    except (TypeError, ValueError):
        return math.nan, f"the loss given to step() is {type(loss).__name__} instead of a number"

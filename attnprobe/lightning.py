"""AttentionMonitor and ValueSchedule: callbacks for ``lightning`` and ``pytorch_lightning`` alike."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from attnprobe.alarms import DEFAULT_ALARMS, AlarmRule
from attnprobe.catalog import Statistic, select
from attnprobe.extent import Extent
from attnprobe.probe import AttentionProbe, Names, check_options, runnable, writer_list
from attnprobe.report import StepReport
from attnprobe.schedules.handle import ScheduleHandle
from attnprobe.schedules.value_rate import ValueLearningRate, check_schedule
from attnprobe.writers.aggregates import aggregates
from attnprobe.writers.base import Writer


def _callback_classes() -> tuple[type, ...]:
    """Each package has its own ``Callback``, and its ``Trainer`` takes only that: derive from whichever are there."""
    found = []
    for package in ("lightning.pytorch", "pytorch_lightning"):
        try:
            found.append(importlib.import_module(package).Callback)
        except ImportError:
            continue
    if not found:
        raise ImportError("attnprobe.lightning needs pytorch-lightning or lightning: pip install pytorch-lightning")
    return tuple(dict.fromkeys(found))


class LoggerWriter:
    """About fifty scalars per probe through any Lightning logger's ``log_metrics``."""

    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def write(self, report: StepReport) -> None:
        if report.valid:
            self.logger.log_metrics(aggregates(report), step=report.step)

    def close(self) -> None:
        """The logger is the trainer's."""


class AttentionMonitor(*_callback_classes()):  # type: ignore[misc]
    """Watches every attention head of a ``LightningModule`` during ``fit`` and writes to the trainer's loggers.

    TensorBoardLogger gets everything, in the event file that it writes anyway, other loggers get about fifty
    scalars. Steps are the trainer's ``global_step``; with gradient accumulation the micro-batches of a step are
    combined.

    Args:
        every_n_steps: distance between probes, in optimizer steps.
        layers, statistics, maps, alarms, uninformed_loss, reference_batch, include_frozen, rows, exact_routing, heads,
            sequences, compiled, strict: as for ``AttentionProbe``.
        writers: further writers, besides the trainer's loggers.
        action: what a new alarm does: ``"record"`` it, ``"warn"``, or ``"stop"`` the training cleanly.

    Attributes:
        probe: the ``AttentionProbe`` at work, None before ``fit``.

    Raises:
        ConfigurationError: an option that cannot work. UnknownNameError: a name that stands for nothing.
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        *,
        layers: Names = "*",
        statistics: str | Statistic | Iterable[str | Statistic] = "core",
        maps: Names = (),
        writers: Writer | Iterable[Writer] = (),
        alarms: AlarmRule | str | Iterable[AlarmRule | str] = DEFAULT_ALARMS,
        action: Literal["record", "warn", "stop"] = "warn",
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
        super().__init__()
        check_options(every_n_steps, action)
        extent = Extent.of(rows, exact_routing, heads, sequences)
        self.writers = writer_list(writers)
        self._options: dict[str, Any] = {
            "every_n_steps": every_n_steps,
            "layers": layers,
            "statistics": select(statistics),
            "maps": maps,
            "alarms": runnable(alarms, reference_batch),
            "action": action,
            "uninformed_loss": uninformed_loss,
            "reference_batch": reference_batch,
            "include_frozen": include_frozen,
            "rows": rows,
            "exact_routing": exact_routing,
            "heads": extent.heads,
            "sequences": sequences,
            "compiled": compiled,
            "strict": strict,
        }
        self.probe: AttentionProbe | None = None
        self._state: Mapping[str, Any] | None = None  # of a checkpoint or an earlier fit, until training starts
        self._start: int | None = None  # global step at the start of the accumulation window under way
        self._losses: list[Tensor] = []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        writers = [*self.writers, *_logger_writers(trainer)] if trainer.is_global_zero else []
        if self._state is None and self.probe is not None and self.probe.model is pl_module and trainer.global_step:
            self._state = self.probe.state_dict()  # the same training goes on in a second fit
        self.probe = AttentionProbe(pl_module, writers=writers, grad_scaler=scaler, **self._options)
        self.probe.discard()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        # Not earlier: some strategies restore a checkpoint only after on_fit_start.
        if self.probe is not None and self._state is not None:
            self.probe.load_state_dict(self._state)
            self.probe.discard()
            self._state = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.probe is not None and self._start is None:
            self._start = int(trainer.global_step)
            self._losses = []
            self.probe.begin(self._start)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.probe is None or self._start is None:
            return
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and self.probe.active:
            self._losses.append(loss.detach())
        if trainer.global_step <= self._start:
            return  # the optimizer has not stepped: the accumulation window goes on
        report = self.probe.step(self._loss(trainer, pl_module))
        self.probe.discard()  # until the next batch: validation and checkpoints come in between
        self._start = None
        if report is not None and trainer.strategy.reduce_boolean_decision(self.probe.should_stop, all=False):
            trainer.should_stop = True

    def _loss(self, trainer: Any, pl_module: Any) -> Tensor | None:
        """The mean loss of the accumulation window's micro-batches."""
        if not self._losses:
            return None
        # In automatic optimization Lightning has divided each by the number of micro-batches.
        divided = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
        return torch.stack(self._losses).mean() * divided

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._end()

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self._end()

    def _end(self) -> None:
        self._start = None
        if self.probe is not None:
            self.probe.close()

    def state_dict(self) -> dict[str, Any]:
        if self._state is not None or self.probe is None:
            return dict(self._state or {})
        return self.probe.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = state_dict or None


class ValueSchedule(*_callback_classes()):  # type: ignore[misc]
    """Lets the value projection learn ``multiplier`` times as fast as the rest, from the first batch of ``fit`` on.

    See ``attnprobe.schedules.ValueLearningRate``, which it attaches to every optimizer that holds value weights, and
    takes out of them when training ends. A checkpoint remembers multiplier and names: a fit that resumes with others
    warns, and goes on with its own.

    Args:
        multiplier, parameters: as for ``ValueLearningRate``.
        confirm: runs a forward pass of the module on a batch, ``lambda module, batch: module(batch[0])``; called once,
            with the first batch. Fused weights need it.

    Attributes:
        schedule: the ``ValueLearningRate`` at work, None before the first batch.

    Raises:
        ConfigurationError: an argument that cannot work.
        ScheduleError: in ``fit``, where the schedule would not be exact.
    """

    def __init__(
        self,
        multiplier: float = 10.0,
        *,
        parameters: str | Iterable[str] | None = None,
        confirm: Callable[[Any, Any], object] | None = None,
    ) -> None:
        super().__init__()
        check_schedule(multiplier, confirm, "lambda module, batch: module(batch[0])")
        self.multiplier, self.parameters, self.confirm = multiplier, parameters, confirm
        self.schedule: ValueLearningRate | None = None
        self._handles: list[ScheduleHandle] = []
        self._state: dict[str, Any] = {}  # of a checkpoint, until training starts

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self._handles:
            return
        confirm = self.confirm
        with trainer.precision_plugin.forward_context():
            self.schedule = ValueLearningRate(
                pl_module,
                self.multiplier,
                parameters=self.parameters,
                confirm=None if confirm is None else lambda: confirm(pl_module, batch),
            )
        holding = [optimizer for optimizer in trainer.optimizers if self.schedule.members(optimizer)]
        for optimizer in holding or trainer.optimizers:
            self._handles.append(self.schedule.attach(optimizer))
        self.schedule.load_state_dict(self._state)
        self._state = {}

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._end()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._end()

    def _end(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def state_dict(self) -> dict[str, Any]:
        return dict(self._state) if self._state or self.schedule is None else self.schedule.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = state_dict


def _logger_writers(trainer: Any) -> list[Writer]:
    """A writer for each of the trainer's loggers; a shared event file where it is TensorBoard's."""
    from torch.utils.tensorboard import SummaryWriter

    from attnprobe.writers import TensorBoardWriter

    writers: list[Writer] = []
    for logger in trainer.loggers:
        experiment = getattr(logger, "experiment", None)
        writers.append(TensorBoardWriter(experiment) if isinstance(experiment, SummaryWriter) else LoggerWriter(logger))
    return writers

"""AttentionMonitorCallback and ValueScheduleCallback: callbacks of the Hugging Face ``Trainer``."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor

from attnprobe.alarms import DEFAULT_ALARMS, AlarmRule
from attnprobe.catalog import Statistic, select
from attnprobe.errors import ConfigurationError, ScheduleError
from attnprobe.extent import Extent
from attnprobe.probe import AttentionProbe, Names, check_options, runnable, writer_list
from attnprobe.report import StepReport
from attnprobe.schedules.finding import needs_confirmation
from attnprobe.schedules.handle import ScheduleHandle
from attnprobe.schedules.value_rate import ValueLearningRate, check_schedule
from attnprobe.writers.aggregates import aggregates
from attnprobe.writers.base import Writer

try:
    from transformers import Trainer, TrainerCallback
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, TensorBoardCallback
except ImportError as error:
    raise ImportError("attnprobe.huggingface needs transformers: pip install attnprobe[hf]") from error

#: Where the trainer's state, and with it ``trainer_state.json`` of every checkpoint, holds the probe's.
STATE = "attnprobe"
SCHEDULE_STATE = "attnprobe.value_schedule"


class AttentionMonitorCallback(TrainerCallback):  # type: ignore[misc]
    """Watches every attention head of the model during ``Trainer.train()`` and writes where the trainer reports to.

    With ``report_to="tensorboard"`` everything goes into the trainer's own event file; other integrations get about
    fifty scalars. Steps are those of the trainer's logs, the first optimizer step is 1; with gradient accumulation
    the micro-batches of a step are combined. The loss is what ``training_step`` returned, as the trainer logs it.

    Args:
        every_n_steps: distance between probes, in optimizer steps.
        layers, statistics, maps, alarms, uninformed_loss, reference_batch, include_frozen, rows, exact_routing, heads,
            sequences, compiled, strict: as for ``AttentionProbe``.
        writers: further writers, besides what the trainer reports to.
        action: what a new alarm does: ``"record"`` it, ``"warn"``, or ``"stop"`` the training cleanly.

    Attributes:
        probe: the ``AttentionProbe`` at work, None before ``train``.

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
        self._trainer: Any = None  # while it trains
        self._losses: list[Tensor] = []  # of the probed step's micro-batches
        self._waiting = contextlib.ExitStack()  # what is undone when the next micro-batch begins

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._end()  # a training that raised had no other end
        trainer = _calling_trainer()
        callbacks = trainer.callback_handler.callbacks
        if sum(isinstance(callback, AttentionMonitorCallback) for callback in callbacks) > 1:
            raise ConfigurationError("a trainer takes one AttentionMonitorCallback; layers= takes several patterns")
        writers = []
        if state.is_world_process_zero:
            writers = [*self.writers, *_reporters(callbacks, (args, state, control), model)]
        scaler = trainer.accelerator.scaler
        self.probe = AttentionProbe(model, writers=writers, grad_scaler=scaler, **self._options)
        if STATE in state.stateful_callbacks:
            saved = json.loads(state.stateful_callbacks[STATE])
            now = state.global_step + 1  # since it was saved only steps were counted
            self.probe.load_state_dict({**saved, "step": now, "count": saved["count"] + now - saved["step"]})
        self.probe.discard()
        self._trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.probe is None:  # added while a training was under way
            return
        self._waiting.close()  # a dataset that ended early leaves a window of micro-batches open
        self._losses = []
        self.probe.begin(state.global_step + 1)
        if self.probe.active:
            self._waiting.enter_context(self.probe.paused())
            self._waiting.enter_context(_replaced(self._trainer, self._training_step))

    def _training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own, watched.

        There is no event for an exception: whatever raises, here or elsewhere, must find nothing of the probe active.
        """
        assert self.probe is not None
        self._waiting.close()
        try:
            loss = self._trainer.training_step(*args, **kwargs)
        except BaseException:
            self.probe.discard()
            raise
        self._waiting.enter_context(self.probe.paused())
        self._losses.append(loss)
        return loss

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.probe is not None and self.probe.active:
            self._waiting.enter_context(_replaced(self._trainer, self._training_step))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self.probe is None:
            return control
        self._waiting.close()
        try:
            report = self.probe.step(self._loss())
        finally:
            self.probe.discard()  # until the next step: evaluation and checkpoints come in between
        if report is None:
            return control
        # As text: the trainer sorts the keys of what it saves. Not as an ExportableState: the trainer would restore
        # that into a new callback without our options, and could not save it after resuming without it.
        state.stateful_callbacks[STATE] = json.dumps(self.probe.state_dict())
        if self.probe.action == "stop":
            # All ranks or none: one that trains on alone waits for the others for ever.
            stop = torch.tensor([self.probe.should_stop], device=args.device)
            control.should_training_stop |= bool(self._trainer.accelerator.gather(stop).any())
        return control

    def _loss(self) -> Tensor | None:
        """Of the step, as the trainer logs it; None where it is not probed."""
        if not self._losses:
            return None
        # Each is divided already, by the number of micro-batches or by that of the step's tokens.
        mean: Tensor = self._trainer.accelerator.gather(sum(self._losses)).mean()
        return mean

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._end()

    def _end(self) -> None:
        self._waiting.close()
        self._trainer = None
        if self.probe is not None:
            self.probe.close()


class ValueScheduleCallback(TrainerCallback):  # type: ignore[misc]
    """Lets the value projection learn ``multiplier`` times as fast as the rest during ``Trainer.train()``.

    See ``attnprobe.schedules.ValueLearningRate``, which it attaches to the optimizer that the trainer made, and takes
    out of it when training ends. A checkpoint remembers multiplier and names: a training that resumes with others
    warns, and goes on with its own.

    Args:
        multiplier, parameters: as for ``ValueLearningRate``.
        confirm: runs a forward pass of the model that it is given, ``lambda model: model(**batch)``; called once,
            before the first step. None takes the model's own ``dummy_inputs`` where fused weights need it.

    Attributes:
        schedule: the ``ValueLearningRate`` at work, None before ``train``.

    Raises:
        ConfigurationError: an argument that cannot work.
        ScheduleError: in ``train``, where the schedule would not be exact.
    """

    def __init__(
        self,
        multiplier: float = 10.0,
        *,
        parameters: str | Iterable[str] | None = None,
        confirm: Callable[[Any], object] | None = None,
    ) -> None:
        super().__init__()
        check_schedule(multiplier, confirm, "lambda model: model(**batch)")
        self.multiplier, self.parameters, self.confirm = multiplier, parameters, confirm
        self.schedule: ValueLearningRate | None = None
        self._handle: ScheduleHandle | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        self._end()  # a training that raised had no other end
        confirm = self.confirm
        if confirm is None and needs_confirmation(model, self.parameters):
            confirm = _run_dummy
        self.schedule = ValueLearningRate(
            model,
            self.multiplier,
            parameters=self.parameters,
            confirm=None if confirm is None else lambda: confirm(model),
        )
        self._handle = self.schedule.attach(optimizer)
        # As text, for the reason that AttentionMonitorCallback has.
        self.schedule.load_state_dict(json.loads(state.stateful_callbacks.get(SCHEDULE_STATE, "{}")))
        state.stateful_callbacks[SCHEDULE_STATE] = json.dumps(self.schedule.state_dict())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._end()

    def _end(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


def _run_dummy(model: Any) -> None:
    """A forward pass on what transformers itself runs a model on, for want of a batch."""
    try:
        inputs = model.dummy_inputs
        model(**{name: x.to(model.device) if isinstance(x, Tensor) else x for name, x in inputs.items()})
    except Exception as error:
        raise ScheduleError(
            f"{type(model).__name__} does not run on its own dummy_inputs ({type(error).__name__}: {error}). Pass "
            "confirm=, a function that runs one forward pass of the model, such as lambda model: model(**batch)."
        ) from error


class SharedEventsWriter:
    """Writes into the event file of the trainer's ``TensorBoardCallback``, which has none before training begins."""

    def __init__(self, callback: Any) -> None:
        self.callback = callback
        self.writer: Writer | None = None

    def write(self, report: StepReport) -> None:
        from attnprobe.writers import TensorBoardWriter

        if self.writer is None:
            self.writer = TensorBoardWriter(self.callback.tb_writer)
        self.writer.write(report)

    def close(self) -> None:
        """The file is the callback's."""


class IntegrationWriter:
    """About fifty scalars per probe through the ``on_log`` of wandb, trackio, MLflow ..."""

    def __init__(self, callback: Any, event: tuple[Any, Any, Any], model: Any) -> None:
        self.callback, self.event, self.model = callback, event, model

    def write(self, report: StepReport) -> None:
        if report.valid:
            self.callback.on_log(*self.event, logs=aggregates(report), model=self.model)

    def close(self) -> None:
        """The integration is the trainer's."""


def _reporters(callbacks: Iterable[Any], event: tuple[Any, Any, Any], model: Any) -> list[Writer]:
    """A writer for each integration that the trainer reports to.

    Not by ``Trainer.log``, which would also print the scalars and keep them in every checkpoint.
    """
    found: list[Writer] = []
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback):
            found.append(SharedEventsWriter(callback))
        elif isinstance(callback, tuple(INTEGRATION_TO_CALLBACK.values())):
            found.append(IntegrationWriter(callback, event, model))
    return found


def _calling_trainer() -> Any:
    """The trainer that runs the event: callbacks are given its parts, but not the trainer."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer):
            return owner
        frame = frame.f_back
    raise ConfigurationError("AttentionMonitorCallback is a callback for transformers.Trainer and its subclasses only")


@contextlib.contextmanager
def _replaced(trainer: Any, training_step: Any) -> Iterator[None]:
    """``training_step`` in place of the trainer's own."""
    before = vars(trainer).get("training_step")
    trainer.training_step = training_step
    try:
        yield
    finally:
        if before is None:
            del trainer.training_step
        else:
            trainer.training_step = before

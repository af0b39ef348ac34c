"""From the first step to the last: stopping, restarting, failing, fitting again."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from importlib import import_module

import pytest
import torch
from torch.utils.data import DataLoader

import attnprobe as ap
from attnprobe.alarms import MaskViolation, above, head_values
from attnprobe.lightning import AttentionMonitor
from tests.global_state import global_state
from tests.lightning.training import Run, loader, module_class, said
from tests.probe.models import batch


@dataclass(frozen=True, kw_only=True)
class Sharp(ap.AlarmRule):
    """Fires from the third probe on."""

    name = "sharp"
    advice = "Look."
    patience: int = 3

    def readings(self, report, history):
        for layer, values in head_values(report, report["entropy"]):
            yield above(layer, values, 0.1)


def test_the_monitor_is_a_callback_of_both_packages():
    import lightning.pytorch
    import pytorch_lightning

    monitor = AttentionMonitor()
    assert isinstance(monitor, lightning.pytorch.Callback)
    assert isinstance(monitor, pytorch_lightning.Callback)


@pytest.mark.parametrize(
    "options",
    [
        {"every_n_steps": 0},
        {"action": "halt"},
        {"statistics": "entropi"},
        {"alarms": "nonsense"},
        {"writers": "runs"},
        {"writers": ap.MemoryWriter},
    ],
)
def test_options_are_checked_when_the_monitor_is_made(options):
    with pytest.raises(ap.ConfigurationError):
        AttentionMonitor(**options)


def test_layers_are_checked_before_training(package):
    run = Run(package, monitor={"layers": "encoder"})
    with pytest.raises(ap.UnknownNameError, match="unknown layers pattern 'encoder'"):
        run.fit()
    assert run.module.losses == []


def test_a_model_without_attention_is_one_warning(package):
    class Module(module_class(package)):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(16, 1)

    with pytest.warns(ap.AttnProbeWarning, match="no softmax attention was seen") as told:
        run = Run(package, Module()).fit()
    assert len(said(told)) == 1
    assert run.trainer.global_step == 8


def test_fast_dev_run(package, tmp_path):
    logger = import_module(f"{package.__name__}.loggers").TensorBoardLogger(tmp_path)
    run = Run(package, fast_dev_run=True, validation=loader(2), logger=logger).fit()
    assert run.steps == [0]
    assert not [*tmp_path.rglob("events*")]


def test_an_epoch_that_the_module_cuts_short(package):
    class Module(module_class(package)):
        def on_train_batch_start(self, batch, index):
            return -1 if index == 3 else None

    run = Run(package, Module(), max_epochs=3, validation=loader(1)).fit()
    assert run.steps == [*range(9)]
    assert all(report.valid for report in run.reports)


def test_max_steps_in_the_middle_of_an_epoch(package):
    run = Run(package, max_epochs=-1, max_steps=11).fit()
    assert run.steps == [*range(11)]
    assert not run.monitor.probe.active


@pytest.mark.parametrize(("action", "steps"), [("stop", 3), ("record", 8)])
def test_an_alarm_stops_the_training_if_asked_to(package, action, steps):
    run = Run(package, monitor={"alarms": Sharp(), "action": action, "layers": "net.layers.0"})
    if action == "stop":
        with pytest.warns(ap.AttnProbeWarning, match="sharp: net.layers.0") as told:
            run.fit()
        assert len(said(told)) == 1
    else:
        run.fit()
    assert run.trainer.global_step == steps
    assert run.monitor.probe.should_stop == (action == "stop")


@dataclass(frozen=True, kw_only=True)
class Known(Sharp):
    """The same, but nothing to act on."""

    name = "known"
    severity = "information"


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_training_that_an_alarm_stops_ends_like_any_other(package, tmp_path, accumulate):
    ended = []

    class Watching(package.Callback):
        def on_train_end(self, trainer, module):
            ended.append("train")

        def on_fit_end(self, trainer, module):
            ended.append("fit")

    logger = import_module(f"{package.__name__}.loggers").CSVLogger(tmp_path / "logs")
    run = Run(
        package,
        every=2,
        data=loader(40),
        validation=loader(1),
        logger=logger,
        log_every_n_steps=1,
        max_epochs=3,
        accumulate_grad_batches=accumulate,
        callbacks=[Watching(), saving(package, tmp_path / "saved", 1)],
        enable_checkpointing=True,
        monitor={"alarms": Sharp(), "action": "stop", "layers": "net.layers.0"},
    )
    before = global_state()
    with pytest.warns(ap.AttnProbeWarning, match="sharp: net.layers.0"):
        run.fit()
    assert global_state() == before
    assert ended == ["train", "fit"]
    assert (run.trainer.state.status.value, run.trainer.interrupted) == ("finished", False)
    assert (run.trainer.global_step, run.steps) == (5, [0, 2, 4])  # the step of the alarm is the last
    assert len(run.module.losses) == 5 * accumulate
    assert [len(report.alarms) for report in run.reports] == [0, 0, 1]
    assert not run.monitor.probe.active
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [f"step={step}.ckpt" for step in range(1, 6)]
    assert torch.load(tmp_path / "saved" / "step=5.ckpt", weights_only=True)["global_step"] == 5
    (file,) = tmp_path.rglob("metrics.csv")
    with file.open() as lines:
        rows = [row for row in csv.DictReader(lines) if row["attention/alarms"]]
    assert [(row["step"], float(row["attention/alarms"])) for row in rows] == [("0", 0), ("2", 0), ("4", 1)]


def test_information_does_not_stop_the_training(package):
    run = Run(package, monitor={"alarms": Known(), "action": "stop"}).fit()  # a warning would be an error
    assert run.trainer.global_step == 8
    assert [len(report.alarms) for report in run.reports] == [0, 0] + [2] * 6


def test_a_snoozed_alarm_stops_the_training_when_it_outlasts_the_snooze(package):
    class Snoozing(package.Callback):
        def on_train_start(self, trainer, module):
            run.monitor.probe.snooze("sharp", steps=6)

    run = Run(package, monitor={"alarms": Sharp(), "action": "stop", "layers": "net.layers.0"})
    run.trainer.callbacks.append(Snoozing())
    with pytest.warns(ap.AttnProbeWarning, match="sharp: net.layers.0") as told:
        run.fit()
    assert len(said(told)) == 1
    assert run.trainer.global_step == 7  # the snooze covers steps 0 to 5
    assert [alarm.snoozed for report in run.reports for alarm in report.alarms] == [True] * 4 + [False]


@pytest.mark.parametrize("there", [False, True])
def test_all_alarms_with_and_without_a_reference_batch(package, there):
    module = module_class(package)()
    reference = (lambda: module.net(batch())) if there else None
    alarms = ["all", MaskViolation(causal=True)]
    run = Run(package, module, monitor={"alarms": alarms, "action": "record", "reference_batch": reference}).fit()
    assert ("stalled_layer" in [rule.name for rule in run.monitor.probe.engine.rules]) == there
    assert all("head_similarity" in report for report in run.reports)
    assert all(("attention_displacement" in report) == there for report in run.reports)
    # Nothing is hidden in this model: as a causal one it is wrong.
    assert {alarm.name for alarm in run.reports[-1].alarms} == {"mask_violation"}


class Failure(Exception):
    pass


@pytest.mark.parametrize("where", ["forward", "training_step", "on_after_backward", "validation_step"])
@pytest.mark.parametrize("error", [Failure, KeyboardInterrupt])
def test_an_exception_leaves_nothing_behind(package, where, error):
    def fail(*_, **__):
        if run.reports:  # the second step is probed too
            raise error

    class Module(module_class(package)):
        def training_step(self, batch, index):
            loss = super().training_step(batch, index)
            return fail() if where == "training_step" and run.reports else loss

    run = Run(package, Module(), validation=loader(2), val_check_interval=1, num_sanity_val_steps=0)
    if where == "forward":
        run.module.net.layers[1].out.register_forward_hook(fail)
    elif where != "training_step":
        setattr(run.module, where, fail)
    before = global_state()
    with pytest.raises(SystemExit if error is KeyboardInterrupt else Failure):
        run.fit()
    assert global_state() == before
    assert run.steps == [0]
    assert not run.monitor.probe.active


def saving(package, directory, every):
    callbacks = import_module(f"{package.__name__}.callbacks")
    return callbacks.ModelCheckpoint(directory, every_n_train_steps=every, save_top_k=-1, filename="{step}")


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used")
@pytest.mark.parametrize("cut", [4, 8, 13])
@pytest.mark.parametrize("weights_only", [True, False])
def test_a_resumed_run_goes_on_where_it_was(package, tmp_path, cut, weights_only):
    same = DataLoader(batch().repeat(8, 1, 1), batch_size=4)  # Lightning repeats batches when it resumes an epoch
    options = {"every": 3, "max_epochs": 3, "monitor": {"alarms": Sharp(), "action": "record"}, "data": same}
    checkpoint = saving(package, tmp_path, cut)
    whole = Run(package, callbacks=[checkpoint], enable_checkpointing=True, **options).fit()
    path = tmp_path / f"step={cut}.ckpt"
    second = Run(package, fit={"ckpt_path": path, "weights_only": weights_only}, **options).fit()
    assert whole.steps == [*range(0, 24, 3)]
    assert second.steps == [step for step in whole.steps if step >= cut]
    for a, b in zip(whole.reports[-len(second.reports) :], second.reports, strict=True):
        assert a.layers == b.layers
        assert a.alarms == b.alarms  # raised at the third probe, new only there
        assert torch.equal(a["entropy"], b["entropy"])
    assert second.monitor.state_dict() == whole.monitor.state_dict()


def test_checkpoints_hold_plain_values(package, tmp_path):
    Run(package, every=2, callbacks=[saving(package, tmp_path, 3)], enable_checkpointing=True).fit()
    for steps in (3, 6):
        state = torch.load(tmp_path / f"step={steps}.ckpt", weights_only=True)["callbacks"]["AttentionMonitor"]
        assert (state["step"], state["count"], state["next"]) == (steps, steps, steps + steps % 2)


def test_a_second_fit_of_the_same_training_goes_on(package):
    run = Run(package, every=3).fit()
    run.trainer.fit_loop.max_epochs = 3
    run.fit()
    assert run.steps == [*range(0, 24, 3)]


def test_a_monitor_may_watch_another_model_next(package):
    run = Run(package, every=3).fit()
    other = module_class(package)("softmax")
    again = Run(package, other, every=3)
    again.trainer.callbacks = [run.monitor]
    again.fit()
    assert run.steps == [0, 3, 6] * 2
    assert run.monitor.probe.model is other


def test_a_state_that_arrives_after_the_start_of_fit_counts(package):
    """Sharded strategies restore callbacks only then."""
    state = Run(package, every=5).fit().monitor.state_dict()

    class Late(package.Callback):
        def on_fit_start(self, trainer, module):
            run.monitor.load_state_dict(state)

    run = Run(package, every=5)
    run.trainer.callbacks.append(Late())
    run.fit()
    assert run.steps == [2, 7]  # steps 0 and 5 of 8 were probed, the next is 10


def test_no_trace_of_evaluation(package):
    run = Run(package).fit()
    run.trainer.validate(run.module, loader(2), verbose=False)
    assert run.steps == [*range(8)]

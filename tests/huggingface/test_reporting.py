"""Reports go where the trainer reports to."""

from __future__ import annotations

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter
from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback, integration_utils

import attnprobe as ap
from tests.huggingface.training import Run, said


def events(directory):
    (file,) = directory.rglob("events.out.tfevents.*")  # a second file would stop the trainer's curves from updating
    return EventAccumulator(str(file), {"tensors": 0, "scalars": 0}).Reload()


def check(found, run):
    losses = {event.step: event.value for event in found.Scalars("train/loss")}
    assert losses == pytest.approx(run.logged, rel=1e-6)
    assert [*losses] == [*range(1, 9)]
    heads = found.Tensors("attnprobe/entropy")
    assert [event.step for event in heads] == run.steps == [1, 4, 7]
    assert [d.size for d in heads[0].tensor_proto.tensor_shape.dim] == [2, 2]
    lowest = [event.value for event in found.Scalars("attention/entropy/min")]
    assert lowest == pytest.approx([report["entropy"].min().item() for report in run.reports], rel=1e-6)


def test_everything_is_in_the_trainers_own_event_file(tmp_path):
    run = Run(tmp_path, every=3, report_to="tensorboard", monitor={"maps": "*:0"}).train()
    found = events(tmp_path)
    check(found, run)
    assert "eval/loss" not in found.Tags()["scalars"]
    assert "train/train_runtime" in found.Tags()["scalars"]  # logged after the last probe


def test_a_tensorboard_callback_that_comes_after_the_monitor(tmp_path):
    given = TensorBoardCallback(SummaryWriter(tmp_path / "given"))
    run = Run(tmp_path, every=3, callbacks=[given]).train()
    check(events(tmp_path), run)


def test_a_second_training_stays_in_the_same_directory(tmp_path):
    run = Run(tmp_path, max_steps=2, report_to="tensorboard").train().train()
    first, second = sorted(tmp_path.rglob("events.out.tfevents.*"))  # the trainer itself opens one for each
    assert first.parent == second.parent
    for file in (first, second):
        found = EventAccumulator(str(file), {"tensors": 0, "scalars": 0}).Reload()
        assert [event.step for event in found.Tensors("attnprobe/entropy")] == [1, 2]
        assert [event.step for event in found.Scalars("train/loss")] == [1, 2]
    assert run.steps == [1, 2, 1, 2]


def test_without_an_integration_own_writers_get_everything(tmp_path):
    memory = ap.MemoryWriter()
    Run(tmp_path / "run", every=3, monitor={"writers": [ap.JSONLWriter(tmp_path / "own"), memory]}).train()
    assert [report.step for report in memory.reports] == [1, 4, 7]
    assert len((tmp_path / "own" / "attention.jsonl").read_text().splitlines()) == 3
    assert not [*tmp_path.rglob("events*")]


class Own(TrainerCallback):
    """An integration as wandb's or trackio's: it sends ``logs`` away as of ``state.global_step``."""

    fails = False

    def __init__(self):
        self.sent = []

    def on_log(self, args, state, control, model=None, logs=None, **kwargs):
        if self.fails and "attention/alarms" in logs:
            raise OSError("no network")
        self.sent.append((state.global_step, logs))


def other_integration(monkeypatch, fails=False):
    own = type("OwnCallback", (Own,), {"fails": fails})
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "own", own)
    return own


def sent(run, kind):
    (callback,) = (callback for callback in run.trainer.callback_handler.callbacks if isinstance(callback, kind))
    probes = {step: logs for step, logs in callback.sent if "attention/alarms" in logs}
    return probes, [step for step, logs in callback.sent if "loss" in logs]


def test_other_integrations_get_the_aggregates(tmp_path, monkeypatch, capsys):
    kind = other_integration(monkeypatch)
    run = Run(tmp_path, every=3, report_to=["own", "tensorboard"]).train()
    probes, logged = sent(run, kind)
    assert [*probes] == run.steps == [1, 4, 7]
    assert 40 <= len(probes[1]) <= 60
    assert all(type(value) is float for value in probes[1].values())
    assert probes[4]["attention/error_norm/max"] == pytest.approx(run.reports[1]["error_norm"].max().item())
    assert logged == [*range(1, 9)]
    check(events(tmp_path), run)
    assert "attention/" not in capsys.readouterr().out  # what the trainer logs, it prints
    assert not any("attention/alarms" in entry for entry in run.trainer.state.log_history)


def test_an_integration_that_fails_is_switched_off(tmp_path, monkeypatch):
    kind = other_integration(monkeypatch, fails=True)
    with pytest.warns(ap.AttnProbeWarning, match="which is switched off: OSError: no network") as told:
        run = Run(tmp_path, report_to=["own"], max_steps=4).train()
    assert len(said(told)) == 1
    assert sent(run, kind) == ({}, [1, 2, 3, 4])
    assert run.steps == [1, 2, 3, 4]


def test_other_ranks_write_nothing(tmp_path):
    class SecondRank(Trainer):
        def is_world_process_zero(self):
            return False

    run = Run(tmp_path, trainer=SecondRank, report_to="tensorboard", max_steps=2).train()
    assert run.monitor.probe.state_dict()["probes"] == 2
    assert run.steps == []
    assert not [*tmp_path.rglob("events*")]

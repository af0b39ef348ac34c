"""Reports go to the trainer's own loggers."""

from __future__ import annotations

import csv
from importlib import import_module

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import attnprobe as ap
from tests.lightning.training import Run, module_class, said


def loggers(package):
    return import_module(f"{package.__name__}.loggers")


def events(directory):
    (file,) = directory.rglob("events.out.tfevents.*")  # a second file would stop Lightning's curves from updating
    return EventAccumulator(str(file), {"tensors": 0, "scalars": 0}).Reload()


def rows(directory):
    (file,) = directory.rglob("metrics.csv")
    with file.open() as lines:
        return [*csv.DictReader(lines)]


def check_tensorboard(directory, run):
    found = events(directory)
    assert [e.step for e in found.Scalars("loss")] == [*range(8)]
    assert [e.value for e in found.Scalars("loss")] == pytest.approx(run.module.losses, rel=1e-6)
    heads = found.Tensors("attnprobe/entropy")
    assert [e.step for e in heads] == run.steps == [0, 3, 6]
    assert [d.size for d in heads[0].tensor_proto.tensor_shape.dim] == [2, 2]
    lowest = [e.value for e in found.Scalars("attention/entropy/min")]
    assert lowest == pytest.approx([r["entropy"].min().item() for r in run.reports], rel=1e-6)


def check_csv(directory, run):
    table = rows(directory)
    losses = [float(row["loss"]) for row in table if row["loss"]]
    assert losses == pytest.approx(run.module.losses, rel=1e-6)
    probes = [row for row in table if row["attention/entropy/min"]]
    assert [int(row["step"]) for row in probes] == run.steps == [0, 3, 6]
    lowest = [float(row["attention/entropy/min"]) for row in probes]
    assert lowest == pytest.approx([r["entropy"].min().item() for r in run.reports], rel=1e-6)
    assert [float(row["attention/alarms"]) for row in probes] == [0, 0, 0]


CHECKS = {"TensorBoardLogger": check_tensorboard, "CSVLogger": check_csv}


@pytest.mark.parametrize("names", [["TensorBoardLogger"], ["CSVLogger"], ["TensorBoardLogger", "CSVLogger"]])
def test_everything_is_in_the_loggers_own_files(package, tmp_path, names):
    chosen = [getattr(loggers(package), name)(tmp_path / name) for name in names]
    run = Run(package, every=3, logger=chosen, log_every_n_steps=1).fit()
    for name in names:
        CHECKS[name](tmp_path / name, run)


def test_a_second_fit_stays_in_the_same_log(package, tmp_path):
    run = Run(package, every=3, logger=loggers(package).TensorBoardLogger(tmp_path), log_every_n_steps=1).fit()
    run.trainer.fit_loop.max_epochs = 2
    run.fit()
    steps = set()
    for file in tmp_path.rglob("events.out.tfevents.*"):
        steps |= {e.step for e in EventAccumulator(str(file), {"tensors": 0}).Reload().Tensors("attnprobe/entropy")}
    assert sorted(steps) == run.steps == [*range(0, 16, 3)]


def own_logger(package, fails=False):
    class Own(loggers(package).Logger):
        name = "own"
        version = 0

        def __init__(self):
            super().__init__()
            self.metrics = []

        def log_metrics(self, metrics, step=None):
            if fails and "attention/alarms" in metrics:
                raise OSError("disk full")
            self.metrics.append((step, {**metrics}))

        def log_hyperparams(self, *args, **kwargs):
            pass

    return Own()


def test_a_logger_that_only_has_log_metrics(package):
    own = own_logger(package)
    run = Run(package, every=3, logger=own, log_every_n_steps=1).fit()
    probes = {step: metrics for step, metrics in own.metrics if "attention/alarms" in metrics}
    assert [*probes] == run.steps == [0, 3, 6]
    assert 40 <= len(probes[0]) <= 60
    assert all(type(value) is float for value in probes[0].values())
    assert probes[3]["attention/error_norm/max"] == pytest.approx(run.reports[1]["error_norm"].max().item())
    assert len([m for _, m in own.metrics if "loss" in m]) == 8


def test_a_logger_that_fails_is_switched_off(package):
    own, good = own_logger(package, fails=True), own_logger(package)
    with pytest.warns(ap.AttnProbeWarning, match="LoggerWriter, which is switched off: OSError: disk full") as told:
        run = Run(package, logger=[own, good], log_every_n_steps=1).fit()
    assert len(said(told)) == 1
    assert len([m for _, m in good.metrics if "attention/alarms" in m]) == len(run.reports) == 8
    assert len([m for _, m in own.metrics if "loss" in m]) == 8  # what Lightning logs still arrives


def test_without_a_logger_own_writers_get_everything(package, tmp_path):
    memory = ap.MemoryWriter()
    Run(package, logger=False, monitor={"writers": [ap.JSONLWriter(tmp_path), memory]}).fit()
    assert len((tmp_path / "attention.jsonl").read_text().splitlines()) == len(memory.reports) == 8


def test_an_invalid_probe_writes_no_numbers(package):
    class Module(module_class(package)):
        automatic_optimization = False

        def training_step(self, batch, index):
            loss = super().training_step(batch, index)
            for _ in range(2):
                self.manual_backward(loss, retain_graph=True)
            self.optimizers().step()

    own = own_logger(package)
    with pytest.warns(ap.AttnProbeWarning, match="backward ran more than once"):
        run = Run(package, Module(), logger=own).fit()
    assert [report.valid for report in run.reports] == [False] * 8
    assert not any("attention/alarms" in metrics for _, metrics in own.metrics)

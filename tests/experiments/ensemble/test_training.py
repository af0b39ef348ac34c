"""Intervals, settling times, processes, and what a training writes down."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from attnprobe.errors import ConfigurationError
from attnprobe.experiments.ensemble.arms import Arm
from attnprobe.experiments.ensemble.intervals import Interval, first_below
from attnprobe.experiments.ensemble.model import Architecture, Ensemble
from attnprobe.experiments.ensemble.parallel import each
from attnprobe.experiments.ensemble.settling import Settling, settled
from attnprobe.experiments.ensemble.training import Task, train
from attnprobe.experiments.markov.model import fit
from attnprobe.experiments.markov.task import task


def test_intervals_are_students():
    values = [3.0, 5.0, 4.0, 8.0, 2.5]
    found = Interval.over([*values, None, math.nan])
    low, high = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    assert (found.mean, found.low, found.high) == pytest.approx((np.mean(values), low, high))
    assert found.std == pytest.approx(np.std(values, ddof=1))
    assert found.text(1) == f"4.5 [{low:.1f}, {high:.1f}] (5 of 7)"


def test_intervals_of_one_seed_and_of_none():
    one, none = Interval.over([2.0]), Interval.over([None, None])
    assert math.isnan(one.low)
    assert one.text(1) == "2.0"
    assert none.text() == "none of 2"
    assert none.to_dict() == {"mean": None, "std": None, "low": None, "high": None, "count": 0, "of": 2}


def test_first_below():
    assert first_below([3.0, 2.0, 1.0, 2.0], 2.0) == 2
    assert first_below([3.0, math.nan], 2.0) is None


def test_settled_is_from_where_on_it_stays():
    assert settled([0, 10, 20, 30, 40], np.array([1.0, 0.05, 0.2, 0.1, 0.0])) == 30
    assert settled([0, 10, 20, 30], np.array([1.0, 0.05, 0.2, 0.0])) is None  # the last is 0 whatever happened
    assert settled([0, 10, 20, 30], np.array([1.0, 0.5, 0.1, 0.0])) == 20
    assert settled([0, 10], np.array([math.nan, math.nan])) is None


def test_settling_of_a_known_decay():
    state = torch.zeros(2, 3)
    settling = Settling(lambda: {"x": state})
    for step in range(101):
        state = torch.stack([torch.full((3,), math.exp(-step / 10)), torch.full((3,), 1 - step / 100)]).double()
        settling.snap(step)
    first, second = settling.settled("x")
    assert first == math.ceil(10 * math.log(10 / (1 + 9 * math.exp(-10))))
    assert second in (90, 91)  # rounding decides
    assert settling.remaining("x")[[0, -1]].tolist() == [[1, 1], [0, 0]]


def test_processes_give_what_one_process_gives():
    items = [16.0, 4.0, 9.0]
    assert each(math.sqrt, items, jobs=1) == each(math.sqrt, items, jobs=2) == [4, 2, 3]
    with pytest.raises(ConfigurationError, match="jobs must be at least 1"):
        each(math.sqrt, items, jobs=0)
    with pytest.raises(ValueError, match="math domain"):
        each(math.sqrt, [1.0, -1.0, 4.0], jobs=2)


def test_threads_are_put_back():
    before = torch.get_num_threads()
    assert each(lambda _: torch.get_num_threads(), [0, 1], jobs=1) == [1, 1]
    assert torch.get_num_threads() == before


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("arm", ["sgd", "v10", "adam"])
def test_lightning_and_the_loop_train_alike(arm, tmp_path):
    """Bit for bit, watched or not."""
    seeds = (0, 1)
    data = task("clean", 50, seeds)
    lightning = fit(Arm.of(arm), data, seeds, steps=25, directory=tmp_path)
    loop = train(Ensemble(Architecture(20, 8), seeds), data, Arm.of(arm), 25)
    assert (lightning.losses == loop.losses).all()
    assert (lightning.held_out == loop.held_out).all()
    assert lightning.held_steps.tolist() == loop.held_steps.tolist() == [0, 10, 20, 25]
    assert lightning.probe_steps.tolist() == [0, 10, 20]


def test_events(tmp_path):
    data = task("clean", 30, (0, 1))
    course = train(
        Ensemble(Architecture(20, 8), (0, 1)), data, Arm.of("sgd"), 21, probe={"every_n_steps": 10}, events=tmp_path
    )
    events = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0, "scalars": 0}).Reload()
    held = [(event.step, event.value) for event in events.Scalars("loss/held_out")]
    assert held == [(step, pytest.approx(value)) for step, value in
                    zip([0, 10, 20, 21], course.held_out.mean(1).tolist(), strict=True)]  # fmt: skip
    assert len(events.Tensors("attnprobe/entropy")) == 3


def test_batches_come_in_turn():
    x = torch.arange(6.0).view(6, 1, 1, 1)
    y = torch.zeros(6, 1, 1, dtype=torch.long)
    turns = Task(x, y, x, y, batch=2)
    assert [turns.at(step)[0].flatten().tolist() for step in range(4)] == [[0, 1], [2, 3], [4, 5], [0, 1]]
    assert torch.equal(Task(x, y, x, y).at(3)[0], x)

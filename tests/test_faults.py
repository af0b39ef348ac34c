"""The fault laboratory judges as it says: bands, bookkeeping, seeds, and the page it writes."""

import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch

from attnprobe.alarms import ALL_ALARMS
from attnprobe.report import StepReport
from benchmarks.faults import page, study, tables
from benchmarks.faults.__main__ import plan
from benchmarks.faults.accepted import ACCEPTED, REPORTED
from benchmarks.faults.cache import Cache, key
from benchmarks.faults.injections import FAULTS, SEVERITIES
from benchmarks.faults.judge import judge, thinned
from benchmarks.faults.naive import NAIVE
from benchmarks.faults.outcome import ends_above, leaves_band
from benchmarks.faults.setup import HELD_OUT, OPTIMIZERS, TUNING, VARIANTS, Setup
from benchmarks.faults.study import Verdict
from benchmarks.faults.tasks import IGNORED, TASKS
from benchmarks.faults.train import Run, build, train

NAMES = {rule.name for rule in ALL_ALARMS}


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("padded", [False, True])
def test_tasks_make_what_they_promise(name, padded):
    task = TASKS[name]
    batch = task.batch(torch.Generator().manual_seed(0), 8, task.length, padded=padded)
    again = task.batch(torch.Generator().manual_seed(0), 8, task.length, padded=padded)
    assert torch.equal(batch.inputs, again.inputs)
    assert torch.equal(batch.targets, again.targets)
    assert batch.inputs.shape[:2] == (8, task.length)
    known = batch.targets[batch.targets != IGNORED]
    assert 0 <= known.min() <= known.max() < task.classes
    assert 0 < task.uninformed() <= math.log(task.classes) + 1e-9
    if padded and batch.targets.ndim == 2:
        assert (batch.targets[torch.arange(task.length) >= batch.lengths[:, None]] == IGNORED).all()


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("previous", lambda x: x.roll(1, 1)),
        ("first", lambda x: x[:, :1].expand_as(x)),
        ("induction", lambda x: x.roll(-1, 1)),
    ],
)
def test_targets_are_what_the_task_says(name, answer):
    batch = TASKS[name].batch(torch.Generator().manual_seed(1), 16, 24, padded=False)
    asked = batch.targets != IGNORED
    assert asked.any()
    assert torch.equal(batch.targets[asked], answer(batch.inputs)[asked])


def test_held_out_runs_are_enough_and_never_tuned_on():
    well, ill = plan("held-out")
    assert set(TUNING).isdisjoint(HELD_OUT)
    assert {setup.seed for setup in [*well, *ill]} <= set(HELD_OUT)
    assert {setup.seed for setups in plan("tuning") for setup in setups} <= set(TUNING)
    assert len(well) == len(set(well)) >= 300
    for field, values in (("task", TASKS), ("optimizer", OPTIMIZERS), ("variant", VARIANTS)):
        assert {getattr(setup, field) for setup in well} == set(values)
    assert {setup.twin for setup in ill} <= set(well)
    for fault in FAULTS:
        for severity in SEVERITIES:
            cell = {setup.seed for setup in ill if (setup.fault, setup.severity) == (fault, severity)}
            assert len(cell) >= 10, (fault, severity)


def test_every_fault_has_accepted_alarms_or_is_only_reported():
    assert ACCEPTED.keys() == FAULTS.keys()
    for answer in ACCEPTED.values():
        assert answer.alarms <= NAMES
        assert bool(answer.alarms) == (answer.counts != REPORTED)


@pytest.mark.parametrize("name", FAULTS)
def test_a_run_is_its_twin_up_to_the_injection(name):
    fault = FAULTS[name]
    task = (fault.tasks or ("previous",))[0]
    setup = Setup(task, "adamw", fault.variant, fault.layers, fault.heads, 0, fault.start + 12, name, "severe")
    run, twin = train(setup), train(setup.twin)
    assert run.losses[: fault.start] == twin.losses[: fault.start]
    assert [report.step for report in run.reports] == [report.step for report in twin.reports]
    if name != "frozen by accident":  # at a warm-up's first steps nothing has moved yet
        assert run.losses[fault.start :] != twin.losses[fault.start :]


def test_a_future_leak_reaches_attention():
    leak = Setup("text", "adamw", "plain", 1, 2, 0, 1, "future leak", "severe")
    model = build(leak)
    FAULTS["future leak"].prepare(model, 3)
    tokens = torch.zeros(1, 24, dtype=torch.long)
    other = tokens.clone()
    other[0, -1] = 1
    assert not torch.equal(model(tokens)[0, 0], model(other)[0, 0])
    healthy = build(leak)
    assert torch.equal(healthy(tokens)[0, 0], healthy(other)[0, 0])


def test_bands():
    twin = [1.0] * 300
    assert leaves_band(twin, twin) is None
    assert not ends_above(twin, twin)
    worse = [1.0] * 100 + [3.0] * 200
    assert leaves_band(worse, twin, 100) == 100
    assert ends_above(worse, twin)
    better = [1.0] * 100 + [0.1] * 200
    assert leaves_band(better, twin, 100) == 100
    assert not ends_above(better, twin)
    spike = [1.0] * 100 + [3.0] + [1.0] * 199
    assert leaves_band(spike, twin, 100) is None
    assert ends_above([1.0] * 299 + [math.nan], twin)
    assert leaves_band([1.0] * 200 + [math.inf] * 100, twin) == 200
    assert leaves_band([1.0] * 261 + [3.0] * 39, twin) == 261
    assert leaves_band([1.0] * 290 + [3.0] * 10, twin) is None  # not for long enough


def test_thinned_reports_are_those_of_a_rarer_probe():
    reports = [StepReport(step) for step in range(0, 300, 10)]
    assert thinned(reports, 10) == reports
    assert [report.step for report in thinned(reports, 50)] == [0, 10, 20, 30, 40, 90, 140, 190, 240, 290]


def test_naive_rules():
    quiet = Run(None, [1.0] * 50, [1.0] * 50, [])
    assert not any(rule(quiet) for rule in NAIVE.values())
    entropy = {"normalized_entropy": torch.tensor([[0.05, 0.95]], dtype=torch.float64)}
    loud = Run(None, [1.0] * 40 + [9.0], [1.0] * 30 + [11.0, math.nan], [StepReport(7, statistics=entropy)])
    assert {name: rule(loud) for name, rule in NAIVE.items()} == {
        "entropy < 0.1": [7],
        "entropy > 0.9": [7],
        "gradient > 10 x median": [30, 31],
        "loss spike": [40],
    }


def test_a_run_comes_back_from_the_cache(tmp_path):
    cache, setup = Cache(tmp_path), Setup("previous", "sgd", "plain", 1, 2, 3, 30, "fully masked row", "severe")
    assert cache.missing([setup, setup]) == [setup]
    cache.fill(setup)
    assert cache.missing([setup]) == []
    run, read = train(setup), cache.read(setup)
    assert read.losses == pytest.approx(run.losses, rel=1e-8)
    assert [report.step for report in read.reports] == [report.step for report in run.reports]
    for ours, theirs in zip(run.reports, read.reports, strict=True):
        for name, values in ours.statistics.items():
            torch.testing.assert_close(theirs[name], values, rtol=1e-8, atol=0, equal_nan=True)
    assert judge(read, informed=True) == judge(run, informed=True)


def test_a_key_tells_runs_apart():
    setup = Setup("previous", "sgd", "plain", 1, 2, 3)
    others = [dataclasses.replace(setup, **change) for change in ({"seed": 4}, {"fault": "label noise"}, {"steps": 9})]
    assert len({key(each) for each in [setup, *others]}) == 4
    assert key(setup) == key(dataclasses.replace(setup))


def verdict(fault="", severity="", left=None, disturbed=False, alarms=(), start=0, naive=()):
    found = {protocol: dict(alarms) for protocol in study.PROTOCOLS}
    setup = Setup("previous", "sgd", "plain", 1, 2, 3, fault=fault, severity=severity)
    return Verdict(setup, start, left, disturbed, found, dict(naive), True)


def test_what_counts_and_what_is_accepted():
    missed = verdict("attention collapse", "severe", 5, True, {"stalled_layer": 10})
    assert missed.counted
    assert not missed.accepted(study.MAIN)
    assert not verdict("attention collapse", "severe", 5, False).counted
    assert verdict("future leak", "mild").counted
    assert not verdict("label noise", "severe", 5, True).counted
    found = verdict("dead columns", "severe", 70, True, {"stalled_layer": 10, "dead_values": 50})
    assert found.accepted(study.MAIN) == {"dead_values": 50}
    told = tables.misses([missed, found])
    assert "| dead columns | severe | 1 | 1 | 1 | 0 of 1 | 50 | +20 (1 left) |" in told
    assert "| attention collapse | severe | 1 | 1 | 1 | 1 of 1 | - | - |" in told
    assert "1 of 2" in tables.totals([missed, found])
    assert "0 of 2 (0%)" in tables.totals([missed, found])  # neither named the right one first
    assert "**1**" not in tables.confusion([missed, found])


def test_information_is_told_of_and_no_alarm():
    healthy = [dataclasses.replace(verdict(), information={"sink_formation": 9} if told else {}) for told in (1, 0, 0)]
    assert page.of_alarm("sink_formation", healthy, [], {}) == "Measured: told on 1 of 3 healthy runs."
    assert page.of_alarm("dead_values", healthy, [], {}).startswith("Measured: false alarms on 0 of 3 ")


def test_a_run_that_stays_in_the_band_bounds_the_lead():
    def lead(*left):
        runs = [verdict("dead columns", "severe", step, True, {"dead_values": 100}) for step in left]
        (row,) = tables.misses(runs).splitlines()[2:]
        return row.split(" | ")[-1].removesuffix(" |")

    assert lead(90, 130, 150) == "+30 (3 left)"
    assert lead(90, 130, None) == "+30 (2 left)"  # stays in for 200 steps at least: the middle is known
    assert lead(90, None, None) == "≥ +200 (1 left)"
    assert lead(None) == "≥ +200 (0 left)"


def test_rates_have_the_interval_of_clopper_and_pearson():
    assert tables.rate(0, 300) == "0 of 300 (at most 1.2%)"  # 1 - 0.025 ** (1 / 300)
    assert tables.rate(3, 3) == "3 of 3 (at most 100%)"
    assert tables.rate(0, 0) == "-"


def test_blocks_of_the_page_are_written_between_their_marks(tmp_path):
    place = tmp_path / "page.md"
    place.write_text("before\n<!-- measured: a -->\nold\n<!-- end -->\nbetween\n<!-- measured: b -->\n<!-- end -->\n")
    page.write({"a": r"new \1", "b": "x"}, place)
    written = place.read_text()
    assert written == (
        "before\n<!-- measured: a -->\nnew \\1\n<!-- end -->\nbetween\n<!-- measured: b -->\nx\n<!-- end -->\n"
    )
    page.write({"a": r"new \1", "b": "x"}, place)
    assert place.read_text() == written


def test_the_alarms_page_has_every_rule_with_its_thresholds_and_measured_rates():
    text = page.PAGE.read_text()
    sections = dict(re.findall(r"^## `(\w+)`\n(.*?)(?=^## )", text, re.MULTILINE | re.DOTALL))
    assert sections.keys() == NAMES
    for rule in ALL_ALARMS:
        section = sections[rule.name]
        assert all(title in section for title in ("**Rule.**", "**What to do.**", "Measured: "))
        assert f"](images/alarms/alarm-{rule.name}.png)" in section
        for field in dataclasses.fields(rule):
            value = getattr(rule, field.name)
            if field.name in ("threshold", "always", "stalled", "spread", "floor", "alike", "hidden"):
                assert f"{value:g}" in section or f"{value:.0%}" in section, (rule.name, field.name)
    for block in re.findall(r"<!-- measured: [\w-]+ -->\n(.*?)<!-- end -->", text, re.DOTALL):
        assert block.strip()
    for picture in re.findall(r"\]\((images/alarms/[^)]+)\)", text):
        assert (Path(page.PAGE).parent / picture).is_file()

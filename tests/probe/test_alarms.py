"""What alarms do in a training loop."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

import attnprobe as ap
from attnprobe.alarms import (
    ALL_ALARMS,
    InactiveHead,
    LogitExplosion,
    MaskViolation,
    RedundantHeads,
    StalledLayer,
    above,
    head_values,
)
from attnprobe.alarms.losses import ENOUGH
from attnprobe.reference import REFERENCE_STATISTICS
from tests.probe.models import WIDTH, batch, batches, loss_of, net, run


@dataclass(frozen=True, kw_only=True)
class Sharp(ap.AlarmRule):
    """Fires from the third probe on, for every layer."""

    name = "sharp"
    advice = "Look."
    patience: int = 3

    def readings(self, report, history):
        for layer, values in head_values(report, report["entropy"]):
            yield above(layer, values, 0.1)


@dataclass(frozen=True, kw_only=True)
class NoProgress(ap.AlarmRule):
    name = "no_progress"

    def readings(self, report, history):
        yield above("", {0: float(history.loss.progress() is False)}, 0.5)


@pytest.mark.parametrize("action", ["record", "warn", "stop"])
def test_what_a_new_alarm_does(action):
    model = net()
    with ap.AttentionProbe(model, every_n_steps=2, alarms=Sharp(), action=action) as probe:
        run(probe, model, 4)
        assert not probe.should_stop
        if action == "record":
            (report,) = run(probe, model)
        else:
            with pytest.warns(ap.AttnProbeWarning, match="sharp: layers") as told:
                (report,) = run(probe, model)
            assert [str(w.message) for w in told] == [str(alarm) for alarm in report.alarms]
            assert told[0].filename == run.__code__.co_filename
        assert [(alarm.layer, alarm.step, alarm.since) for alarm in report.alarms] == [
            ("layers.0", 4, 0),
            ("layers.1", 4, 0),
        ]
        assert probe.should_stop == (action == "stop")
        later = [report for report in run(probe, model, 5) if report]  # said once, though it stands
        assert all(len(report.alarms) == 2 and not any(alarm.new for alarm in report.alarms) for report in later)


def test_an_alarm_that_stood_before_a_restart_does_not_stop_it_again():
    model, options = net(), {"every_n_steps": 1, "alarms": Sharp(), "action": "stop"}
    with ap.AttentionProbe(model, **options) as probe, pytest.warns(ap.AttnProbeWarning):
        run(probe, model, 3)
    assert probe.should_stop
    with ap.AttentionProbe(model, **options) as resumed:
        resumed.load_state_dict(probe.state_dict())
        assert len(run(resumed, model)[0].alarms) == 2
        assert not resumed.should_stop


@pytest.mark.parametrize(("uninformed", "alarmed"), [(None, False), (1.0, True), (100.0, False)])
def test_uninformed_loss_reaches_the_rules(uninformed, alarmed):
    model = net()
    with ap.AttentionProbe(
        model, every_n_steps=1, alarms=NoProgress(), uninformed_loss=uninformed, action="record"
    ) as probe:
        for _ in range(2 * ENOUGH - 1):  # without it, one more would tell
            run(probe, model)
    state = probe.engine.state_dict()
    assert bool(state["streaks"]["no_progress"]) == alarmed


@dataclass(frozen=True, kw_only=True)
class Known(Sharp):
    """The same, but nothing to act on."""

    name = "known"
    severity = "information"


@pytest.mark.parametrize("action", ["record", "warn", "stop"])
def test_information_neither_warns_nor_stops_but_is_told_by_every_writer(action, tmp_path):
    model, memory, printed = net(), ap.MemoryWriter(), io.StringIO()
    writers = [memory, ap.JSONLWriter(tmp_path), ap.ConsoleWriter(printed)]
    with ap.AttentionProbe(model, every_n_steps=1, alarms=Known(), action=action, writers=writers) as probe:
        run(probe, model, 4)  # a warning would be an error
        assert not probe.should_stop
    found = [[(alarm.new, alarm.severity, alarm.layer) for alarm in report.alarms] for report in memory.reports]
    raised, standing = ([(new, "information", f"layers.{index}") for index in range(2)] for new in (True, False))
    assert found == [[], [], raised, standing]
    lines = [json.loads(line) for line in (tmp_path / "attention.jsonl").read_text().splitlines()]
    assert [[alarm["severity"] for alarm in line["alarms"]] for line in lines] == [[], [], *[["information"] * 2] * 2]
    said = printed.getvalue().splitlines()
    assert [line.partition(", step 2 ")[0] for line in said] == [
        "attnprobe: step 2: alarm known: layers.0 heads 0, 1",
        "attnprobe: step 2: alarm known: layers.1 heads 0, 1",
    ]


def test_action_stop_ends_a_plain_loop():
    model, done = net(), []
    with ap.AttentionProbe(model, every_n_steps=2, alarms=Sharp(), action="stop") as probe:

        def loop():
            for step in range(50):
                run(probe, model)
                done.append(step)
                if probe.should_stop:
                    break

        with pytest.warns(ap.AttnProbeWarning, match="sharp"):
            loop()
    assert done == [0, 1, 2, 3, 4]  # that of the third probe is the last


def test_a_snoozed_alarm_neither_warns_nor_stops_until_it_outlasts_the_snooze():
    model = net()
    with ap.AttentionProbe(model, every_n_steps=1, alarms=Sharp(patience=1), action="stop") as probe:
        probe.snooze("sharp", layers="layers.1", steps=100)
        probe.snooze("sha*", steps=3)
        reports = run(probe, model, 3)  # a warning would be an error
        assert not probe.should_stop
        assert [[(alarm.new, alarm.snoozed) for alarm in report.alarms] for report in reports] == [
            [(False, True)] * 2
        ] * 3
        with pytest.warns(ap.AttnProbeWarning, match=r"sharp: layers\.0") as told:
            (report,) = run(probe, model)
        assert len(told) == 1
        assert [(alarm.layer, alarm.new, alarm.snoozed) for alarm in report.alarms] == [
            ("layers.0", True, False),
            ("layers.1", False, True),
        ]
        assert probe.should_stop


def test_snoozing_counts_from_the_step_under_way_and_silences_what_was_told():
    model = net()
    with ap.AttentionProbe(model, every_n_steps=1, alarms=Sharp(patience=1)) as probe:
        with pytest.warns(ap.AttnProbeWarning):
            run(probe, model, 2)
        probe.snooze(steps=2)  # steps 2 and 3
        snoozed = [report.alarms[0].snoozed for report in run(probe, model, 2)]
        with pytest.warns(ap.AttnProbeWarning, match="sharp: layers") as told:
            (report,) = run(probe, model)
    assert snoozed == [True, True]
    assert len(told) == 2  # once per layer, a second time
    assert [(alarm.new, alarm.step, alarm.since) for alarm in report.alarms] == [(True, 4, 0)] * 2


def test_a_snooze_survives_a_restart():
    model, options = net(), {"every_n_steps": 1, "alarms": Sharp(patience=1), "action": "stop"}
    with ap.AttentionProbe(model, **options) as probe:
        probe.snooze(steps=3)
        run(probe, model, 2)
    with ap.AttentionProbe(model, **options) as resumed:
        resumed.load_state_dict(json.loads(json.dumps(probe.state_dict())))
        assert [alarm.snoozed for alarm in run(resumed, model)[0].alarms] == [True, True]
        assert not resumed.should_stop
        with pytest.warns(ap.AttnProbeWarning, match="sharp"):
            run(resumed, model)
        assert resumed.should_stop


def test_non_finite_numbers_are_told_whatever_is_snoozed():
    model = net()
    with ap.AttentionProbe(model, every_n_steps=1, action="stop") as probe:
        probe.snooze(steps=100)
        with pytest.warns(ap.AttnProbeWarning, match="nonfinite: layers"):
            run(probe, model, x=torch.full_like(batch(), torch.nan))
        assert probe.should_stop


@pytest.mark.parametrize("steps", [0, -1, 2.0, True, None])
def test_steps_to_snooze_are_a_whole_number(steps):
    with ap.AttentionProbe(net()) as probe, pytest.raises(ap.ConfigurationError, match="whole number of at least 1"):
        probe.snooze(steps=steps)


def test_what_cannot_be_snoozed_is_refused():
    with ap.AttentionProbe(net()) as probe:
        with pytest.raises(ap.UnknownNameError, match=r"Did you mean 'logit_explosion'\?"):
            probe.snooze("logit_explosions", steps=5)
        with pytest.raises(ap.ConfigurationError, match="'nonfinite', the only alarm"):
            probe.snooze("nonfinite", steps=5)


def rules_and_statistics(**options):
    """Names of the rules that run, and of what the first probe measured."""
    model = net()
    with ap.AttentionProbe(model, action="record", **options) as probe:
        (report,) = run(probe, model)
        return {rule.name for rule in probe.engine.rules}, {*report.statistics, *report.layer}


ALL = {rule.name for rule in ALL_ALARMS}
NEEDS = {name for rule in ALL_ALARMS for name in rule.needs}
CORE = {name for name, entry in ap.STATISTICS.items() if entry.core}


@pytest.mark.parametrize(
    "alarms",
    ["all", ["all"], ALL_ALARMS, ["all", MaskViolation(causal=True)], (each for each in ["all"])],
    ids=["name", "list", "rules", "one replaced", "iterator"],
)
def test_all_alarms_measure_what_they_read_and_need_no_reference_batch(alarms):
    rules, statistics = rules_and_statistics(alarms=alarms)
    assert rules == ALL - {"stalled_layer"}
    assert statistics == (CORE | NEEDS) - {*REFERENCE_STATISTICS}


@pytest.mark.parametrize("alarms", ["all", ["all", MaskViolation(causal=True)], ["default", "stalled_layer"]])
def test_with_a_reference_batch_layers_that_stand_still_are_looked_for(alarms):
    rules, statistics = rules_and_statistics(alarms=alarms, reference_batch=batch())
    assert "stalled_layer" in rules
    assert {*REFERENCE_STATISTICS} <= statistics


@pytest.mark.parametrize(
    "alarms",
    ["stalled_layer", ["all", "stalled_layer"], ["default", StalledLayer()], ["all", StalledLayer(patience=5)]],
    ids=["name", "all and name", "rule", "all and rule"],
)
def test_who_asks_for_stalled_layers_needs_a_reference_batch(alarms):
    with pytest.raises(ap.ConfigurationError, match="need a reference_batch="):
        ap.AttentionProbe(net(), alarms=alarms)


def test_the_default_alarms_measure_nothing_more_and_chosen_ones_what_they_read():
    assert rules_and_statistics()[1] == CORE
    assert rules_and_statistics(statistics="entropy")[1] == {"entropy"}
    assert rules_and_statistics(statistics="entropy", alarms=LogitExplosion())[1] == {"entropy", "logit_spread"}
    assert rules_and_statistics(alarms=["default", "redundant_heads"])[1] == CORE | {"head_similarity"}


def test_analyze_measures_what_its_alarms_read():
    model = net()
    report = ap.analyze(model, lambda: loss_of(model, batch()), statistics="core", alarms=["all"])
    assert {*report.statistics, *report.layer} == (CORE | NEEDS) - {*REFERENCE_STATISTICS}


# Real faults, from the model to the alarm.


def train(model, *, steps=60, rate=1e-3, **options):
    """The reports of a short training with a probe at every step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    memory = ap.MemoryWriter()
    with ap.AttentionProbe(model, every_n_steps=1, action="record", writers=memory, **options) as probe:
        for x in batches(steps):
            optimizer.zero_grad()
            run(probe, model, x=x)
            optimizer.step()
    assert all(report.valid for report in memory.reports)
    return memory.reports


def found(reports):
    return {(alarm.name, alarm.layer, alarm.heads) for report in reports for alarm in report.alarms}


def test_a_healthy_model_raises_none_of_all_the_alarms():
    assert found(train(net(), alarms="all", reference_batch=batch())) == set()


def masked(mask):
    """A model whose last layer, in good faith, uses this mask; the first is causal."""
    model = net()
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    for layer, chosen in zip(model.layers, (causal, mask), strict=True):
        layer.attend = lambda query, key, value, chosen=chosen: F.scaled_dot_product_attention(
            query, key, value, chosen
        )
    return model


def test_a_mask_that_lets_the_future_in_is_a_violation():
    off_by_one = torch.ones(6, 6, dtype=torch.bool).tril(1)
    rule = MaskViolation(causal=True)
    wrong = train(masked(off_by_one), steps=rule.patience, alarms=["all", rule])
    assert found(wrong) == {("mask_violation", "layers.1", (0, 1))}
    (alarm,) = wrong[-1].alarms
    assert alarm.value == pytest.approx(wrong[-1]["future_mass"][1].max().item())
    assert "Queries read keys that come after them." in alarm.advice
    right = torch.ones(6, 6, dtype=torch.bool).tril()
    assert found(train(masked(right), steps=rule.patience, alarms=["all", rule])) == set()


@pytest.mark.parametrize("inverted", [False, True])
def test_a_padding_mask_the_wrong_way_round_is_a_violation(inverted):
    real = torch.ones(4, 6, dtype=torch.bool)
    real[:, 3:] = False
    model, rule = net(), MaskViolation()
    seen = (~real if inverted else real)[:, None, None]
    for layer in model.layers:
        layer.attend = lambda query, key, value: F.scaled_dot_product_attention(query, key, value, seen)
    memory = ap.MemoryWriter()
    with ap.AttentionProbe(model, every_n_steps=1, alarms=rule, action="record", writers=memory) as probe:
        for x in batches(rule.patience):
            probe.token_mask(real)
            run(probe, model, x=x)
    expected = {("mask_violation", layer, (0, 1)) for layer in ("layers.0", "layers.1")}
    assert found(memory.reports) == (expected if inverted else set())


def test_an_output_projection_that_ignores_a_head_makes_it_inactive():
    model = net()
    with torch.no_grad():
        model.layers[1].out.weight[:, WIDTH // 2 :] = 0  # the second head of two
    model.layers[1].out.weight.requires_grad_(False)
    reports = train(model, steps=InactiveHead().patience + 1)
    assert found(reports) == {("inactive_head", "layers.1", (1,))}
    assert [len(report.alarms) for report in reports][-3:] == [0, 1, 1]


def test_an_output_projection_of_zero_makes_every_head_inactive():
    model = net()
    torch.nn.init.zeros_(model.layers[0].out.weight).requires_grad_(False)
    assert found(train(model, steps=InactiveHead().patience)) == {("inactive_head", "layers.0", (0, 1))}


def test_one_that_starts_at_zero_and_learns_is_no_finding():
    model = net()
    for layer in model.layers:
        torch.nn.init.zeros_(layer.out.weight)
    reports = train(model, alarms="inactive_head")
    assert (reports[0]["error_norm"] == 0).all()  # there would be something to find
    assert found(reports) == set()


def test_values_of_zero_make_a_head_inactive():
    model = net()
    with torch.no_grad():
        for parameter in model.layers[0].qkv.parameters():
            parameter[2 * WIDTH : 2 * WIDTH + WIDTH // 2] = 0  # the first head's
    reports = train(model, steps=InactiveHead().patience, rate=0.0)
    assert found(reports) == {("inactive_head", "layers.0", (0,))}


def test_heads_with_the_same_weights_are_redundant():
    model, rule = net(heads=(4, 4)), RedundantHeads(min_step=0)
    with torch.no_grad():
        for parameter in model.layers[1].qkv.parameters():
            for part in parameter.chunk(3):
                heads = part.view(4, WIDTH // 4, -1)
                heads[3] = heads[1]
    model.layers[1].requires_grad_(False)
    assert found(train(model, steps=rule.patience, alarms=["all", rule])) == {("redundant_heads", "layers.1", (1, 3))}


@pytest.mark.parametrize("how", ["frozen", "rate"])
def test_a_model_whose_layers_do_not_learn_stands_still_on_the_reference_batch(how):
    rule, model = StalledLayer(), net()
    if how == "frozen":
        model.layers.requires_grad_(False)
    options = {"rate": 0.0 if how == "rate" else 1e-3, "reference_batch": batch(), "include_frozen": how == "frozen"}
    # The first probe has nothing to compare with.
    reports = train(model, steps=rule.patience + 1, alarms=["all", rule], **options)
    assert [len(report.alarms) for report in reports] == [0] * rule.patience + [2]
    assert found(reports) == {("stalled_layer", "layers.0", ()), ("stalled_layer", "layers.1", ())}


def test_layers_that_are_frozen_up_to_the_input_stand_still_and_the_others_do_not():
    options = {"steps": 20, "alarms": "all", "reference_batch": batch(), "include_frozen": True}
    model = net()
    model.layers[0].requires_grad_(False)
    assert found(train(model, **options)) == {("stalled_layer", "layers.0", ())}
    model = net()
    model.layers[1].requires_grad_(False)  # what it is given moves
    assert found(train(model, **options)) == set()

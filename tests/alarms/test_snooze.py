"""Alarms that somebody has seen and wants to hear no more of for a while."""

import json

import pytest

from attnprobe.alarms import AlarmEngine, LogitExplosion, NonFinite, ValueExplosion
from attnprobe.errors import ConfigurationError, UnknownNameError
from tests.alarms.reports import Script, make_report

EXPLOSION = LogitExplosion(patience=1, min_step=0)
HIGH = 2 * EXPLOSION.threshold
LAYERS = ("h.0.attn", "h.1.attn")


def outcome(text, *snoozes, **options):
    """``N`` new, ``s`` stands, ``z`` stands snoozed, ``Z`` snoozed and new (which must not be), ``.`` nothing."""
    engine = AlarmEngine([Script(text=text, **options)])
    for until in snoozes:
        engine.snooze(until=until)
    letters = []
    for step in range(len(text)):
        alarms = engine.update(make_report(step))
        assert engine.failures == []
        kinds = {(True, False): "N", (False, False): "s", (False, True): "z", (True, True): "Z"}
        letters.append(kinds[alarms[0].new, alarms[0].snoozed] if alarms else ".")
    return "".join(letters)


@pytest.mark.parametrize(
    ("text", "until", "expected"),
    [
        ("FFFFF", 0, ".Nsss"),
        ("FFFFF", 1, ".Nsss"),
        ("FFFFF", 2, ".zNss"),
        ("FFFFF", 4, ".zzzN"),
        ("FFFFF", 99, ".zzzz"),
        ("FF..FF", 4, ".zz..N"),  # it did not outlast the snooze
        ("FFHHH", 4, ".zzzN"),
        ("FF---", 4, ".zzzN"),  # outlasted it without another reading
    ],
)
def test_a_snoozed_alarm_stands_marked_and_is_new_when_it_outlasts_the_snooze(text, until, expected):
    assert outcome(text, until) == expected


def test_the_longest_of_several_snoozes_counts():
    assert outcome("FFFFF", 4, 2) == outcome("FFFFF", 2, 4) == ".zzzN"


def test_an_alarm_that_was_told_already_is_new_again_after_the_snooze():
    engine = AlarmEngine([Script(text="F" * 8, patience=1)])
    found = []
    for step in range(8):
        if step == 3:
            engine.snooze("script", until=5)
        found += [(alarm.new, alarm.snoozed) for alarm in engine.update(make_report(step))]
    quiet, snoozed, new = (False, False), (False, True), (True, False)
    assert found == [new, quiet, quiet, snoozed, snoozed, new, quiet, quiet]


def test_a_snoozed_alarm_tells_all_the_rest():
    loud, quiet = AlarmEngine([EXPLOSION]), AlarmEngine([EXPLOSION])
    quiet.snooze(until=100)
    report = make_report(7, logit_spread=[[HIGH, 5]])
    (told,), (kept,) = loud.update(report), quiet.update(report)
    assert (told.new, told.snoozed, kept.new, kept.snoozed) == (True, False, False, True)
    assert told.to_dict() == kept.to_dict() | {"new": True, "snoozed": False}


def quiet_ones(name="*", layers="*"):
    """Which alarms of two rules in two layers keep quiet."""
    rules = [EXPLOSION, ValueExplosion(patience=1, min_step=0)]
    engine = AlarmEngine(rules)
    engine.snooze(name, layers, until=10**6)
    for step in range(6):
        size = 1.0 if step < 5 else 2 * rules[1].threshold
        spread, sizes = [[HIGH, 5]] * 2, [[size, 1.0]] * 2
        alarms = engine.update(make_report(step, layers=LAYERS, logit_spread=spread, value_rms=sizes))
    assert len(alarms) == 4
    return {(alarm.name, alarm.layer) for alarm in alarms if alarm.snoozed}


def test_names_and_layers_are_patterns():
    everything = {(name, layer) for name in ("logit_explosion", "value_explosion") for layer in LAYERS}
    assert quiet_ones() == everything
    assert quiet_ones("*_explosion") == everything
    assert quiet_ones("logit*") == {("logit_explosion", layer) for layer in LAYERS}
    assert quiet_ones("value_explosion", "h.1.*") == {("value_explosion", "h.1.attn")}
    assert quiet_ones("*", "h.[1-9].attn") == {(name, "h.1.attn") for name, _ in everything}
    assert quiet_ones("*", "h.2.*") == set()
    assert quiet_ones("*", "H.1.*") == set()


@pytest.mark.parametrize("name", ["*", "[ln]o*", "*i*"])
def test_what_is_not_finite_is_told_all_the_same(name):
    engine = AlarmEngine([NonFinite(), EXPLOSION])
    engine.snooze(name, until=10**6)
    report = make_report(0, logit_spread=[[HIGH, 5]], nonfinite={"value": [[1, 0]]})
    found = {alarm.name: (alarm.new, alarm.snoozed) for alarm in engine.update(report)}
    assert found == {"nonfinite": (True, False), "logit_explosion": (False, True)}


def test_a_snooze_is_forgotten_when_it_is_over():
    engine = AlarmEngine([EXPLOSION])
    engine.snooze(until=2)
    remembered = []
    for step in range(4):
        engine.update(make_report(step))
        remembered.append(len(engine.state_dict()["snoozes"]))
    assert remembered == [1, 1, 0, 0]


def test_what_cannot_be_snoozed_is_refused():
    engine = AlarmEngine([NonFinite(), EXPLOSION])
    for name in ("nonfinite", "non*"):
        with pytest.raises(ConfigurationError, match=r"'nonfinite', the only alarm.* cannot be snoozed"):
            engine.snooze(name, until=5)
    with pytest.raises(UnknownNameError, match=r"Did you mean 'logit_explosion'\?"):
        engine.snooze("logit_explosions", until=5)
    with pytest.raises(UnknownNameError, match="rank_collapse"):
        engine.snooze("rank_collapse", until=5)  # it exists, but does not run here
    assert engine.snoozes == []


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_a_snooze_survives_a_restart(cut):
    def engine():
        return AlarmEngine([Script(text="F" * 8, patience=1)])

    def alarms(engine, steps):
        return [engine.update(make_report(step)) for step in steps]

    whole, first, second = engine(), engine(), engine()
    whole.snooze("scr*", "a", until=4)
    first.snooze("scr*", "a", until=4)
    begun = alarms(first, range(cut))
    state = first.state_dict()
    assert json.loads(json.dumps(state)) == state
    second.load_state_dict(json.loads(json.dumps(state)))
    assert second.snoozes == first.snoozes
    found = begun + alarms(second, range(cut, 8))
    assert found == alarms(whole, range(8))
    assert [alarm.snoozed for (alarm,) in found] == [True] * 4 + [False] * 4

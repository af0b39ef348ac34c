"""Thresholds from healthy runs: known critical values, each run judged by the others, the file, the command."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from scipy.stats import binomtest

import attnprobe as ap
from attnprobe.alarms import ALL_ALARMS, DEFAULT_ALARMS, AlarmRule, DeadValues, LogitExplosion, RedundantHeads
from attnprobe.calibrate import Calibration, calibrate, load_alarms, read_runs, summarize
from attnprobe.calibrate.rate import upper_bound
from attnprobe.cli import main
from attnprobe.errors import AttnProbeWarning, ConfigurationError, UnknownNameError, WriterError
from attnprobe.report import Alarm, StepReport
from attnprobe.writers import JSONLWriter, TensorBoardWriter
from tests.alarms.reports import NAN, make_report
from tests.probe.models import net, run

SPREAD = ("logit_explosion", "threshold")
DEFAULT = LogitExplosion().threshold


def spreads(*values: float) -> list[StepReport]:
    return [make_report(10 * step, logit_spread=[[value, 1.0]]) for step, value in enumerate(values)]


def flat(maximum: float, probes: int = 5) -> list[StepReport]:
    return spreads(*[maximum] * probes)


def measured(
    statistic: str, values: Iterable[float], loss: Callable[[int], float] = lambda _: math.nan
) -> list[StepReport]:
    """One layer of two heads that both have the value."""
    return [
        dataclasses.replace(
            make_report(10 * step, loss=loss(step)), statistics={statistic: torch.full((1, 2), value).double()}
        )
        for step, value in enumerate(values)
    ]


def critical(found: Calibration, rule: str, field: str, name: str = "run") -> float | None:
    return found.critical[name][rule][field]


def test_the_critical_value_is_the_maximum() -> None:
    found = calibrate({"run": spreads(5, 37, 37, 12)}, ["logit_explosion"])
    assert critical(found, *SPREAD) == pytest.approx(37, rel=0.01)
    assert found.thresholds["logit_explosion"]["threshold"] == pytest.approx(74, rel=0.01)
    tight = calibrate({"run": spreads(5, 37, 37, 12)}, ["logit_explosion"], margin=1)
    assert tight.thresholds["logit_explosion"]["threshold"] >= 37  # the quiet side


def test_spikes_shorter_than_the_patience_do_not_matter() -> None:
    found = calibrate({"run": spreads(5, 900, 5, 37, 37, 5, 900)}, ["logit_explosion"])
    assert critical(found, *SPREAD) == pytest.approx(37, rel=0.01)


def test_what_is_small_counts_from_below_and_is_loosened_downwards() -> None:
    moved = measured("attention_displacement", [0.02] * 6, loss=float)
    reports = [
        dataclasses.replace(
            each, statistics={**each.statistics, "value_displacement": torch.full((1, 2), 1e-3).double()}
        )
        for each in moved
    ]
    rule = dataclasses.replace(next(rule for rule in ALL_ALARMS if rule.name == "stalled_layer"), threshold=1e-3)
    found = calibrate({"run": reports}, rule)
    assert critical(found, "stalled_layer", "threshold") == pytest.approx(0.02, rel=0.01)
    assert found.thresholds["stalled_layer"]["threshold"] == pytest.approx(0.01, rel=0.01)


def test_a_share_near_one_keeps_below_one() -> None:
    found = calibrate({"run": measured("head_similarity", [0.999] * 12)}, ["redundant_heads"])
    assert critical(found, "redundant_heads", "threshold") == pytest.approx(0.999, abs=1e-5)
    # Twice as far from copies: half the distance to 1.
    assert found.thresholds["redundant_heads"]["threshold"] == pytest.approx(0.9995, abs=1e-5)


def test_a_small_share_is_loosened_as_a_number() -> None:
    """The share of dead keys judged by ``always``; its other threshold, which the reports exceed, is left out of it."""
    reports = [make_report(10 * step, shared_dead_columns=[0.01], loss=2.0) for step in range(30)]
    found = calibrate({"run": reports}, DeadValues(stalled=0.005))
    assert critical(found, "dead_values", "always") == pytest.approx(0.01, rel=0.01)
    assert found.thresholds["dead_values"]["always"] == pytest.approx(0.02, rel=0.02)
    assert critical(found, "dead_values", "stalled") == pytest.approx(0.01, rel=0.01)


def test_a_stable_rank_stays_above_one() -> None:
    reports = measured("output_stable_rank", [1.5] * 60, loss=lambda _: 2.0)
    found = calibrate({"run": reports}, ["rank_collapse"])
    assert critical(found, "rank_collapse", "threshold") == pytest.approx(1.5, rel=0.01)
    assert found.thresholds["rank_collapse"]["threshold"] == pytest.approx(1.25, rel=0.01)


def test_scores_that_do_not_grow_say_nothing_about_growth() -> None:
    reports = [make_report(10 * step, logit_spread=[[50.0, 50.0]], loss=2.0) for step in range(30)]
    found = calibrate({"run": reports}, ["logit_growth"])
    assert critical(found, "logit_growth", "threshold") is None
    assert found.thresholds == {}


def test_what_less_than_half_of_the_runs_say_tightens_nothing() -> None:
    silent = [make_report(10 * step, logit_spread=[[NAN, NAN]], loss=2.0) for step in range(30)]
    runs = {"a": flat(10), "b": silent, "c": silent}
    assert calibrate(runs, ["logit_explosion"]).thresholds == {}
    assert calibrate({"a": flat(10), "b": silent}, ["logit_explosion"]).thresholds["logit_explosion"]
    loud = {"a": flat(2 * DEFAULT), "b": silent, "c": silent}
    assert calibrate(loud, ["logit_explosion"]).thresholds["logit_explosion"]["threshold"] > 2 * DEFAULT


def test_the_loosest_run_decides_and_each_is_judged_by_the_others() -> None:
    """Without c the others allow 2 x 12, and it has more; every other run is judged by c's."""
    runs = {"a": flat(10), "b": flat(12), "c": flat(0.8 * DEFAULT), "d": flat(11)}
    found = calibrate(runs, ["logit_explosion"])
    assert found.thresholds["logit_explosion"]["threshold"] == pytest.approx(1.6 * DEFAULT, rel=0.01)
    assert found.left_out == {"a": (), "b": (), "c": ("logit_explosion",), "d": ()}
    assert (found.runs, found.false_alarms, found.default_false_alarms) == (4, 1, 0)
    assert found.rate_bound == pytest.approx(binomtest(1, 4).proportion_ci(0.95, method="exact").high)
    change = f"{found.thresholds['logit_explosion']['threshold']:.4g} instead of {DEFAULT:.4g}"
    assert any(f"looser than the default, {change}" in note for note in found.notes)


def test_false_alarms_of_the_default_thresholds() -> None:
    found = calibrate({"a": flat(1.5 * DEFAULT), "b": flat(1.6 * DEFAULT), "c": flat(5)})
    assert (found.false_alarms, found.default_false_alarms) == (0, 2)
    assert found.by_default["a"] == ("logit_explosion",)


def test_one_run_gives_no_rate() -> None:
    found = calibrate({"a": flat(10)})
    assert (found.false_alarms, found.rate_bound, found.runs) == (None, None, 1)
    assert "no rate can be given" in summarize(found)


@pytest.mark.parametrize(("count", "of"), [(0, 1), (0, 12), (3, 12), (12, 12)])
def test_the_bound_is_clopper_and_pearsons(count: int, of: int) -> None:
    expected = binomtest(count, of).proportion_ci(0.95, method="exact").high
    assert upper_bound(count, of) == pytest.approx(expected)


def test_runs_that_may_not_be_healthy_are_named() -> None:
    broken = [make_report(0), make_report(10, nonfinite={"query": [[3.0, 0.0]]})]
    found = calibrate({"good": flat(10), "broken": broken, "wild": flat(1e12)}, ["nonfinite", "logit_explosion"])
    assert any(note.startswith("broken: nonfinite") for note in found.notes)
    assert any(note.startswith("wild: logit_explosion raises an alarm at every threshold") for note in found.notes)
    assert critical(found, *SPREAD, "wild") == math.inf
    assert found.thresholds["logit_explosion"]["threshold"] == pytest.approx(20, rel=0.01)
    assert found.left_out is not None
    assert found.left_out["wild"] == ("logit_explosion",)
    assert found.left_out["broken"] == ("nonfinite",)


def test_a_loss_that_was_nan_in_training_is_named() -> None:
    alarm = Alarm("nonfinite", "", (), 30, 30, 1.0, 0.0, "")
    reports = [*flat(10)[:3], dataclasses.replace(flat(10)[3], loss=NAN, alarms=(alarm,))]
    found = calibrate({"run": reports})
    assert found.default_false_alarms == 0
    assert "run: nonfinite raises an alarm and has no threshold to set; the run may not be healthy" in found.notes


def test_a_threshold_tightened_on_the_word_of_a_few_runs_is_named() -> None:
    silent = measured("value_rms", [1.0] * 5)
    (note,) = calibrate({"a": flat(10), "silent": silent}, ["logit_explosion"]).notes
    assert "is tighter than the default, 20" in note
    assert note.endswith("only 1 of 2 runs speak for it")
    assert calibrate({"a": flat(10), "b": flat(11)}, ["logit_explosion"]).notes == ()


def test_information_is_no_false_alarm() -> None:
    mass = [0.01] * 6 + [0.9] * 6
    found = calibrate({"a": measured("sink_mass", mass), "b": measured("sink_mass", mass)})
    assert (found.false_alarms, found.default_false_alarms) == (0, 0)
    assert found.notes == ()


def test_runs_without_valid_probes_do_not_count() -> None:
    found = calibrate({"a": flat(10), "empty": [], "b": [make_report(0, invalid="no backward")]})
    assert found.probes == {"a": 5}
    assert [note.split(":")[0] for note in found.notes] == ["empty", "b"]
    with pytest.raises(ConfigurationError, match="none of the 1 runs"):
        calibrate({"empty": []})


@pytest.mark.parametrize("margin", [0.5, math.inf, math.nan])
def test_margins_that_cannot_work(margin: float) -> None:
    with pytest.raises(ConfigurationError, match="margin"):
        calibrate({"a": flat(10)}, margin=margin)


def test_a_default_outside_its_bounds() -> None:
    with pytest.raises(ConfigurationError, match=r"threshold=1\.0 must lie between 0 and 1"):
        calibrate({"a": flat(10)}, RedundantHeads(threshold=1.0))


def test_the_file_gives_the_rules_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "alarms.json"
    found = calibrate({"a": flat(10), "b": flat(20)})
    found.save(path)
    rules = load_alarms(path)
    assert [rule.name for rule in rules] == [rule.name for rule in DEFAULT_ALARMS]
    for rule, default in zip(rules, DEFAULT_ALARMS, strict=True):
        changed = found.thresholds.get(rule.name, {})
        assert {field: getattr(rule, field) for field in changed} == pytest.approx(dict(changed))
        assert dataclasses.replace(rule, **{field: getattr(default, field) for field in changed}) == default
    assert len(load_alarms(path, "all")) == len(ALL_ALARMS)
    assert load_alarms(path, ["diffuse_routing"])[0].name == "diffuse_routing"
    data = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert (data["schema"], data["runs"], data["false_alarms"]) == (1, ["a", "b"], 0)
    assert ap.AttentionProbe(net(), alarms=rules).engine.rules == rules


def test_a_rule_of_your_own(tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Mine(LogitExplosion):
        name = "mine"

    calibrate({"a": flat(10)}, Mine()).save(tmp_path / "mine.json")
    (rule,) = load_alarms(tmp_path / "mine.json", Mine())
    assert isinstance(rule, Mine)
    assert rule.threshold == pytest.approx(20, rel=0.01)
    with pytest.raises(UnknownNameError, match="mine"):
        load_alarms(tmp_path / "mine.json")


def test_files_that_cannot_be_loaded(tmp_path: Path) -> None:
    path = tmp_path / "alarms.json"
    with pytest.raises(ConfigurationError, match="cannot read"):
        load_alarms(path)
    for text in ("", "[]", "{}", '{"kind":"thresholds"}', "\ud800".encode("utf-8", "surrogatepass"), "[" * 100_000):
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ConfigurationError, match="not a file of 'attnprobe calibrate'"):
            load_alarms(path)


@pytest.mark.parametrize(
    ("thresholds", "said"),
    [
        ('{"logit_explosio":{}}', "Did you mean 'logit_explosion'"),
        ('{"logit_explosion":{"treshold":1}}', "Did you mean 'threshold'"),
        ('{"logit_explosion":{"patience":1}}', "unknown threshold of logit_explosion 'patience'"),
        ('{"logit_explosion":1}', "thresholds by name"),
        (
            '{"logit_explosion":{"threshold":-1}}',
            "alarms.json: logit_explosion: threshold must be a number from 0",
        ),
        ('{"inactive_head":{"threshold":5}}', "threshold must be a number from 0 to 1, not 5"),
        *(
            (f'{{"logit_explosion":{{"threshold":{value}}}}}', "finite number")
            for value in ("NaN", "Infinity", "null", "true", '"1"', "1" + "0" * 400)
        ),
    ],
)
def test_thresholds_that_cannot_work(thresholds: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "alarms.json"
    path.write_text(f'{{"schema":1,"kind":"thresholds","thresholds":{thresholds}}}')
    with pytest.raises(ConfigurationError, match=said):
        load_alarms(path)


def test_a_file_of_another_version(tmp_path: Path) -> None:
    path = tmp_path / "alarms.json"
    path.write_text('{"schema":2,"kind":"thresholds","thresholds":{}}')
    with pytest.raises(ConfigurationError, match="calibrate again"):
        load_alarms(path)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "alarms.json"):
        with pytest.raises(WriterError, match="cannot write"):
            calibrate({"a": flat(10)}).save(path)


def test_a_log_that_two_places_lead_to_is_one_run(tmp_path: Path) -> None:
    write(tmp_path / "a", flat(10))
    write(tmp_path / "b.jsonl", flat(11))
    runs = read_runs([tmp_path, tmp_path / "a", tmp_path / "b.jsonl"])
    assert [*runs] == [(tmp_path / name).as_posix() for name in ("a/attention.jsonl", "b.jsonl")]


def test_a_run_that_was_logged_twice_is_one_run(tmp_path: Path) -> None:
    for seed in range(2):
        model, place = net(seed=seed), tmp_path / f"run{seed}"
        writers = [JSONLWriter(place), *([TensorBoardWriter(place / "tb")] if seed == 0 else [])]
        with ap.AttentionProbe(model, every_n_steps=1, writers=writers) as probe:
            run(probe, model, steps=6)
    with pytest.warns(AttnProbeWarning, match=r"run0/tb holds the same numbers as .*run0/attention\.jsonl"):
        runs = read_runs([tmp_path])
    assert [Path(name).parent.name for name in runs] == ["run0", "run1"]


def write(path: Path, reports: Sequence[StepReport]) -> None:
    writer = JSONLWriter(path)
    for report in reports:
        writer.write(report)


def test_text_from_logs_cannot_move_the_cursor() -> None:
    text = summarize(calibrate({"a\x1b[31m": flat(500), "b\n": []}))
    assert "\\x1b" in text
    assert "\x1b" not in text
    assert "note: b\\n: no valid probe" in text


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(3):
        model = net(seed=seed)
        with ap.AttentionProbe(model, every_n_steps=1, writers=JSONLWriter(tmp_path / f"run{seed}")) as probe:
            run(probe, model, steps=8)
    out = tmp_path / "alarms.json"
    places = [str(tmp_path / f"run{seed}") for seed in range(3)]
    assert main(["calibrate", *places, "--out", str(out), "--uninformed-loss", "5"]) == 0
    text = capsys.readouterr().out
    for said in (
        "3 runs said to be healthy, 8 probes each",
        "of 3 healthy runs, each judged by thresholds from the others; with 95% confidence at most",
        "By the default thresholds: 0 of 3.",
        f"alarms=load_alarms({str(out)!r}), uninformed_loss=5.0)",
    ):
        assert said in text
    rows = {tuple(line.split()[:2]): line.split() for line in text.splitlines()}
    reports = [report for reports in read_runs(places).values() for report in reports]
    largest = max(report["logit_spread"].max().item() for report in reports)
    _, _, default, tightest, calibrated, runs = rows[SPREAD]
    assert (default, runs) == (f"{DEFAULT:.4g}", "3")
    assert 0 < float(tightest) <= largest * 1.01
    assert float(calibrated) == pytest.approx(2 * float(tightest), rel=1e-3)
    rules: dict[str, AlarmRule] = {rule.name: rule for rule in load_alarms(out)}
    assert rules["logit_explosion"].threshold == pytest.approx(float(calibrated), rel=1e-3)  # type: ignore[attr-defined]


def test_the_command_without_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", str(tmp_path / "missing"), "--out", str(tmp_path / "alarms.json")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert not (tmp_path / "alarms.json").exists()

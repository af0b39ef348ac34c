"""rows=, exact_routing=, heads= and sequences=: less is measured, and the report says so."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext

import pytest
import torch

import attnprobe as ap
from attnprobe.catalog import STATISTICS
from attnprobe.huggingface import AttentionMonitorCallback
from attnprobe.lightning import AttentionMonitor
from tests.probe.models import KINDS, batch, batches, loss_of, net, run

LENGTH = 64
X = batch(3, LENGTH)
COLUMNS = ("dead_column_fraction", "column_gini", "top_column_share")


def analyze(model=None, x=X, **options):
    model = net(heads=(2, 4)) if model is None else model
    return ap.analyze(model, lambda: loss_of(model, x), **{"statistics": "all", **options})


def same(actual, expected, **tolerance):
    torch.testing.assert_close(actual, expected, equal_nan=True, **{"rtol": 1e-5, "atol": 1e-7, **tolerance})


# heads= and sequences=


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [[1], [0, 1], (1, 0, 1), range(4), 1])
def test_the_chosen_heads_are_as_without_the_option(kind, heads):
    model = net(kind, heads=(2, 4))
    whole, part = analyze(model), analyze(model, heads=heads)
    chosen = [heads] if isinstance(heads, int) else sorted(set(heads))
    assert part.layers == whole.layers
    assert part.heads == whole.heads
    assert part.standard_errors == {}
    others = [head for head in range(4) if head not in chosen]
    for name in whole.statistics:
        same(part[name][:, chosen], whole[name][:, chosen])
        assert part[name][:, others].isnan().all(), name
    same(part.residual[:, chosen].isnan(), whole.residual[:, chosen].isnan())
    assert part.residual[:, others].isnan().all()
    for kind, counts in part.nonfinite.items():
        same(counts[:, chosen], whole.nonfinite[kind][:, chosen])
        assert counts[:, others].isnan().all()


def test_nothing_is_said_of_a_layer_from_some_of_its_heads():
    model = net(heads=(2, 4))
    one, every = analyze(model, heads=[1]), analyze(model, heads=range(4))
    same(every.layer["entropy_8"], analyze(model).layer["entropy_8"])
    assert all(values.isnan().all() for values in one.layer.values())


def test_similarity_and_rank_are_of_the_chosen_heads_alone():
    model, names = net(heads=(4, 4)), ["head_similarity", "output_stable_rank", "output_variation"]
    whole, part, pair = (analyze(model, statistics=names, heads=h) for h in (None, [0, 2], [0, 2, 3]))
    for name in names[1:]:
        same(part[name][:, [0, 2]], whole[name][:, [0, 2]])
        assert part[name][:, [1, 3]].isnan().all()
    similarity = part["head_similarity"]
    same(similarity[:, 0], similarity[:, 2])  # of two heads, each is the other's most similar
    assert similarity[:, [1, 3]].isnan().all()
    assert (pair["head_similarity"][:, [0, 2]] >= similarity[:, [0, 2]] - 1e-9).all()
    assert (whole["head_similarity"][:, [0, 2]] >= similarity[:, [0, 2]] - 1e-9).all()


def test_a_layer_without_any_of_the_heads_is_named_and_the_rest_is_measured():
    report = analyze(heads=[3])
    assert report.valid
    assert any("layers.0" in w and "none of the heads 3" in w for w in report.warnings)
    assert report["entropy"].isfinite().tolist() == [[False] * 4, [False, False, False, True]]
    report = analyze(heads=[1, 3])
    assert report.warnings == ()
    assert report["entropy"].isfinite().tolist() == [[False, True, False, False], [False, True, False, True]]


def test_when_no_layer_has_the_heads_the_report_says_so():
    with pytest.raises(ap.InvalidStepError, match="none of the heads 7, 9"):
        analyze(heads=[9, 7])
    model = net()
    with (
        pytest.warns(ap.AttnProbeWarning, match="none of the heads 9"),
        ap.AttentionProbe(model, every_n_steps=1, heads=[9]) as probe,
    ):
        reports = run(probe, model, 2)
    assert not any(report.valid for report in reports)
    assert "none of the heads 9" in reports[1].invalid


@pytest.mark.parametrize("sequences", [1, 2, 3, 99])
def test_the_first_sequences_are_a_batch_of_their_own(sequences):
    model = net(heads=(2, 4)).eval()  # so that they do not know of each other
    part, alone = analyze(model, sequences=sequences), analyze(model, x=X[:sequences])
    for name in alone.statistics:
        same(part[name], alone[name], rtol=1e-4, atol=1e-6)  # kernels sum in another order in batches of another size
    told = [note for note in part.notes if "sequences measured" in note]
    assert told == [f"layers.{i}: the first {sequences} of 3 sequences measured" for i in (0, 1) if sequences < 3]


def test_all_at_once_and_in_micro_batches():
    model = net(heads=(2, 4)).eval()
    options = {"heads": [1], "sequences": 1, "statistics": "all"}
    with ap.AttentionProbe(model, every_n_steps=1, **options) as probe:
        for x in X:
            loss_of(model, x[None]).backward()
        report = probe.step()
    whole = analyze(model)
    for name in whole.statistics:
        same(report[name][:, 1], whole[name][:, 1], rtol=1e-4)
    assert report["entropy"][:, [0, 2, 3]].isnan().all()


def test_an_own_statistic_is_told_of_the_chosen_part_only():
    def mine(record):
        shapes.append(record.shape)
        return record.error.square().sum((0, 2, 3)), torch.full((record.shape[1],), record.shape[0] * LENGTH)

    shapes, own = [], ap.Statistic("mine", "u^2", measure=mine)
    report = analyze(statistics=["error_norm", own], heads=[1, 3], sequences=2)
    assert sorted(shapes) == [(2, 1, 1, LENGTH, LENGTH), (2, 2, 2, LENGTH, LENGTH)]
    same(report["mine"], report["error_norm"].square())
    assert report["mine"].isfinite().tolist() == [[False, True, False, False], [False, True, False, True]]


def test_pictures_are_of_any_head():
    whole, part = (analyze(maps=["layers.1:0", "layers.1:3"], heads=heads) for heads in (None, [3]))
    assert [(m.layer, m.head) for m in part.maps] == [("layers.1", 0), ("layers.1", 3)]
    for found, expected in zip(part.maps, whole.maps, strict=True):
        same(found.attention, expected.attention)
        same(found.advantage, expected.advantage)


# rows=


def test_a_sample_has_standard_errors():
    model = net(heads=(2, 4))
    whole, part = analyze(model), analyze(model, rows=32)
    estimated = {
        *("entropy", "normalized_entropy", "effective_keys", "max_weight", "concentration", "mean_distance"),
        *("advantage_std", "relative_advantage_std", "advantage_alignment", "score_grad_norm", "entropy_8"),
    }
    maxima = {name for name, statistic in STATISTICS.items() if statistic.reduce == "max"}
    assert part.standard_errors.keys() == estimated | maxima  # sink_mass, self_mass: with the kernel's log-sum-exp
    assert whole.standard_errors == {}
    for name, errors in part.standard_errors.items():
        found, exact = (report.layer[name] if name == "entropy_8" else report[name] for report in (part, whole))
        assert errors.shape == found.shape == ((2,) if name == "entropy_8" else (2, 4))
        assert errors.dtype == torch.float64
        if name in maxima:
            assert errors.isnan().all()
            assert (found <= exact + 1e-6)[~exact.isnan()].all()
        else:
            assert torch.equal(errors.isnan(), exact.isnan())
            assert (errors > 0)[~exact.isnan()].all()
            assert ((found - exact).abs() <= 5 * errors)[~exact.isnan()].all(), name
    for name in whole.statistics.keys() - part.standard_errors.keys() - {*COLUMNS, "value_grad_norm"}:
        same(part[name], whole[name])
    for name in (*COLUMNS, "value_grad_norm"):
        assert part[name].isnan().all(), name
    assert part.layer["shared_dead_columns"].isnan().all()
    (note,) = {n.partition(": ")[2] for n in part.notes if "32 of 64 queries sampled" in n}
    assert "standard_errors" in note
    assert "statistics of columns are NaN" in note


def test_exact_routing_leaves_estimates_of_what_holds_errors():
    model = net(heads=(2, 4))
    whole, part = analyze(model), analyze(model, rows=32, exact_routing=True)
    gradients = {"advantage_std", "relative_advantage_std", "advantage_alignment", "score_grad_norm", "advantage_max"}
    assert part.standard_errors.keys() == gradients
    for name in whole.statistics.keys() - gradients - {"value_grad_norm"}:
        same(part[name], whole[name])
    for name in whole.layer:
        same(part.layer[name], whole.layer[name])
    assert any("routing statistics are exact" in note for note in part.notes)


@pytest.mark.parametrize("rows", [LENGTH, 1000])
def test_as_many_rows_as_there_are(rows):
    whole, part = analyze(), analyze(rows=rows, exact_routing=True)
    assert all(torch.equal(part[n].nan_to_num(-1), whole[n].nan_to_num(-1)) for n in whole.statistics)
    assert part.notes == whole.notes
    assert part.standard_errors == {}


def test_every_probe_draws_anew_and_a_run_draws_the_same_again():
    def entropies():
        model = net()
        with ap.AttentionProbe(model, every_n_steps=1, rows=16) as probe:
            return [report["entropy"] for report in run(probe, model, 2, x=X)]

    (one, other), again = entropies(), entropies()
    assert not torch.equal(one, other)
    assert torch.equal(one, again[0])
    assert torch.equal(other, again[1])


def test_alarms_know_that_what_is_not_measured_is_no_finding():
    model = net(heads=(2, 4))
    with ap.AttentionProbe(model, every_n_steps=1, rows=16, heads=[1], sequences=1) as probe:
        for report in run(probe, model, 3, x=X):
            assert report.alarms == ()


def test_a_model_in_double_precision():
    model = net().double()
    with ap.AttentionProbe(model, rows=16, strict=True) as probe:
        (report,) = run(probe, model, x=X.double())
    assert report["advantage_std"].isfinite().all()


@pytest.mark.parametrize("options", [{"rows": 16}, {"rows": 16, "exact_routing": True}, {"heads": [1]}], ids=str)
def test_evaluate_honours_them(options):
    model = net(heads=(2, 4))
    with ap.AttentionProbe(model, statistics="all", **options) as probe:
        report = probe.evaluate(lambda: model(X))
    whole = analyze(model)
    for name in ("advantage_std", "score_grad_norm", "advantage_max", "relative_advantage_std", "error_norm"):
        assert report[name].isnan().all(), name
    if "heads" in options:
        same(report["entropy"][:, 1], whole["entropy"][:, 1])
        assert report["entropy"][:, [0, 2, 3]].isnan().all()
    elif "exact_routing" in options:
        same(report["entropy"], whole["entropy"])
    else:
        errors = report.standard_errors["entropy"]
        known = ~whole["entropy"].isnan()
        assert ((report["entropy"] - whole["entropy"]).abs()[known] > 0).all()
        assert ((report["entropy"] - whole["entropy"]).abs() <= 5 * errors)[known].all()


def train(rows, **options):
    """Losses, gradients and parameters of ten steps, and torch's random state at their end."""
    model, trace = net(dropout=0.1), []
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    probe = ap.AttentionProbe(model, every_n_steps=1, statistics="all", rows=rows, **options) if rows else None
    with probe or nullcontext():
        for x in batches(10, length=40):
            loss = model(x).square().mean()
            loss.backward()
            trace += [loss.detach(), *(p.grad.clone() for p in model.parameters())]
            optimizer.step()
            optimizer.zero_grad()
            if probe:
                assert probe.step(loss).standard_errors["advantage_std"][:, 1].isfinite().all()
    return [*trace, *(p.detach() for p in model.parameters()), torch.get_rng_state()]


@pytest.mark.parametrize("options", [{}, {"exact_routing": True, "heads": [1], "sequences": 2}], ids=str)
def test_training_is_bit_for_bit_the_same(options):
    plain, probed = train(0), train(16, **options)
    assert len(plain) == len(probed)
    assert all(map(torch.equal, plain, probed))


# Writers


def test_writers_take_such_a_report(tmp_path):
    model = net(heads=(2, 4))
    writers = [ap.JSONLWriter(tmp_path), ap.TensorBoardWriter(tmp_path / "tb"), ap.ConsoleWriter()]
    options = {"rows": 16, "heads": [0, 1, 3], "statistics": "all", "maps": "*", "strict": True}
    with ap.AttentionProbe(model, every_n_steps=1, writers=writers, **options) as probe:
        (report,) = run(probe, model, x=X)
        assert len(probe.writers) == 3
    (line,) = map(json.loads, (tmp_path / "attention.jsonl").read_text().splitlines())
    errors = line["standard_errors"]
    assert errors.keys() == report.standard_errors.keys()
    assert [len(row) for row in errors["entropy"]] == [2, 4]
    assert errors["entropy"][1][3] == pytest.approx(float(report.standard_errors["entropy"][1, 3]))
    assert errors["entropy"][1][2] is None
    assert errors["advantage_max"] == [[None] * 2, [None] * 4]
    first, second = errors["entropy_8"]  # the second layer was measured in part
    assert first == pytest.approx(float(report.standard_errors["entropy_8"][0]))
    assert second is None
    assert line["statistics"]["column_gini"][0] == [None, None]
    assert list((tmp_path / "tb").rglob("events*"))


# Options


BAD = {
    "rows 0": ({"rows": 0}, "rows must be None or a whole number of at least 16, got 0"),
    "rows 5": ({"rows": 5}, "rows must be None or a whole number of at least 16, got 5"),
    "rows -64": ({"rows": -64}, "rows must be .* got -64"),
    "rows True": ({"rows": True}, "rows must be .* got True"),
    "rows a": ({"rows": "a"}, "rows must be .* got 'a'"),
    "rows 64.5": ({"rows": 64.5}, r"rows must be .* got 64\.5"),
    "rows nan": ({"rows": math.nan}, "rows must be .* got nan"),
    "sequences 0": ({"sequences": 0}, "sequences must be None or a whole number of at least 1, got 0"),
    "sequences True": ({"sequences": True}, "sequences must be .* got True"),
    "no heads": ({"heads": []}, r"heads must be numbers of heads, from 0, got \[\]"),
    "head -1": ({"heads": [-1]}, r"heads must be numbers of heads, from 0, got \[-1\]"),
    "head x": ({"heads": ["x"]}, r"heads must be numbers of heads, from 0, got \['x'\]"),
    "head in words": ({"heads": "01"}, "heads must be numbers of heads, from 0, got '01'"),
    "head True": ({"heads": [True]}, r"heads must be .* got \[True\]"),
    "head 1.5": ({"heads": [0, 1.5]}, r"heads must be .* got \[0, 1\.5\]"),
    "exact_routing": ({"exact_routing": True}, "it needs rows="),
}
TAKERS = {
    "probe": lambda **options: ap.AttentionProbe(net(), **options),
    "analyze": lambda **options: analyze(net(), **options),
    "lightning": AttentionMonitor,
    "huggingface": AttentionMonitorCallback,
}


@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize("case", BAD)
def test_an_option_that_cannot_work_is_named(case, taker):
    options, message = BAD[case]
    with pytest.raises(ap.ConfigurationError, match=message):
        TAKERS[taker](**options)


@pytest.mark.parametrize("heads", [list, tuple, set, iter], ids=lambda make: make.__name__)
@pytest.mark.parametrize("taker", ["lightning", "huggingface"])
def test_what_a_callback_was_given_reaches_its_probe(taker, heads):
    callback = TAKERS[taker](rows=16, exact_routing=True, heads=heads([0, 1]), sequences=2)
    with ap.AttentionProbe(net(), **callback._options) as probe:
        extent = probe._collector.extent
    assert (extent.rows, extent.exact_routing, extent.heads, extent.sequences) == (16, True, (0, 1), 2)

"""paused(), evaluate() and token_mask()."""

from __future__ import annotations

import pytest
import torch

import attnprobe as ap
from attnprobe.catalog import STATISTICS
from tests.global_state import global_state
from tests.probe.models import KINDS, batch, loss_of, net, run

GRADIENT = [
    "advantage_std", "relative_advantage_std", "advantage_max", "advantage_alignment", "score_grad_norm",
    "value_grad_norm", "error_norm", "error_diversity", "head_importance",
]  # fmt: skip
X = batch()


def same(a: ap.StepReport, b: ap.StepReport, names=None) -> bool:
    names = [*a.statistics] if names is None else names
    return a.layers == b.layers and all(torch.allclose(a[n], b[n], 1e-5, 1e-7, equal_nan=True) for n in names)


def test_nothing_is_captured_in_a_pause():
    model = net()
    with ap.AttentionProbe(model, every_n_steps=1) as probe:
        (alone,) = run(probe, model, x=X)
        before = global_state()
        with probe.paused():
            assert not any(hooks for name, hooks in global_state().items() if "hooks" in name)
            loss_of(model, batch(2)).backward()
            with probe.paused():  # a pause in a pause ends with the outer one
                pass
            loss_of(model, batch(2)).backward()
        assert global_state() != before  # watching again, with hooks of its own
        (with_pause,) = run(probe, model, x=X)
        assert same(alone, with_pause)


def test_what_was_captured_before_a_pause_stays():
    model = net()
    with ap.AttentionProbe(model, every_n_steps=1) as probe:
        (alone,) = run(probe, model, x=X)
        loss = loss_of(model, X)
        with probe.paused():
            loss_of(model, batch(2)).backward()
        loss.backward()
        with probe.paused(), pytest.raises(ZeroDivisionError):
            _ = 1 / 0
        assert same(alone, probe.step())


def test_two_probes_on_one_model_see_the_same():
    model = net()
    with ap.AttentionProbe(model, every_n_steps=1) as one, ap.AttentionProbe(model.layers, every_n_steps=2) as other:
        for step in range(4):
            before = global_state()["modes"]
            loss_of(model, X).backward()
            assert global_state()["modes"] == before
            first, second = one.step(), other.step()
            assert (second is None) == (step % 2)
            if second:
                assert second.layers == ("0", "1")
                assert torch.equal(first["error_norm"], second["error_norm"])


@pytest.mark.parametrize("part", [lambda model: model, lambda model: model.layers[0]])
def test_analyze_gets_into_no_probe(part):
    model = net()
    with ap.AttentionProbe(model, every_n_steps=1) as probe, ap.AttentionProbe(model.layers, every_n_steps=1) as other:
        (alone,) = run(probe, model, x=X)
        other.step()
        loss = loss_of(model, X)
        assert ap.analyze(part(model), lambda: loss_of(model, batch(2))).valid
        loss.backward()
        assert same(alone, probe.step())
        assert torch.equal(other.step()["error_norm"], alone["error_norm"])


def test_a_pause_on_an_unprobed_step_does_nothing():
    model, before = net(), global_state()
    with ap.AttentionProbe(model, every_n_steps=3) as probe:
        run(probe, model)
        with probe.paused():
            assert global_state() == before
        assert global_state() == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("probed", [True, False])
def test_evaluate_routes_as_analyze_and_has_no_gradients(kind, probed):
    model = net(kind, heads=(2, 4))
    full = ap.analyze(model, lambda: loss_of(model, X))
    with ap.AttentionProbe(model, every_n_steps=2, statistics="all", maps="layers.0:1") as probe:
        if not probed:
            run(probe, model)
        outputs = []
        report = probe.evaluate(lambda: outputs.append(model(X)))
    assert not outputs[0].requires_grad
    assert report.valid
    assert report.warnings == ()
    routing = [name for name in report.statistics if name not in GRADIENT]
    assert same(report, full, routing)
    assert len(routing) > 15
    for name in GRADIENT:
        assert report[name].isnan().all()
        assert not full[name].isnan().all()
    assert [(m.layer, m.head, m.advantage) for m in report.maps] == [("layers.0", 1, None)]
    assert {*report.statistics, *report.layer} == {name for name, s in STATISTICS.items() if not s.on_request}


def test_evaluate_leaves_the_step_and_the_model_alone():
    def state():
        gradients = [p.grad for p in model.parameters()]
        return gradients, [b.clone() for b in model.buffers()], torch.get_rng_state(), model.training

    model = net(dropout=0.5)
    with ap.AttentionProbe(model, every_n_steps=1) as probe:
        torch.manual_seed(3)
        (alone,) = run(probe, model, x=X)
        torch.manual_seed(3)
        loss = loss_of(model, X)
        loss.backward()
        before = state()
        probe.evaluate(lambda: model.eval()(batch(2)))
        for a, b in zip(before, state(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
        assert same(alone, probe.step(loss))


def test_evaluate_without_attention_and_with_an_error():
    model, before = net(), global_state()
    with ap.AttentionProbe(model, every_n_steps=2) as probe:
        with pytest.raises(ap.NoAttentionError, match="Looked for"):
            probe.evaluate(lambda: model.head(torch.randn(2, 16)))
        with pytest.raises(ZeroDivisionError):
            probe.evaluate(lambda: 1 / 0)
        assert run(probe, model)[0].valid  # the step under way goes on
        with pytest.raises(ZeroDivisionError):
            probe.evaluate(lambda: 1 / 0)
        assert global_state() == before


def test_own_statistics_are_evaluated_too():
    length = ap.Statistic("length", "", measure=lambda r: (r.output.norm(dim=-1).sum((0, 2)), [4 * 6] * 2))
    error = ap.Statistic("error", "", measure=lambda r: (r.error.sum((0, 2, 3)), [1, 1]))
    model = net()
    with ap.AttentionProbe(model, statistics=["output_norm", length, error]) as probe:
        report = probe.evaluate(lambda: model(X))
        torch.testing.assert_close(report["length"], report["output_norm"], rtol=1e-6, atol=0)
        assert report["error"].isnan().all()
        assert "statistic 'error'" in report.warnings[0]
        (report,) = run(probe, model)  # it is only missing where there is no error
        assert report["error"].isfinite().all()


MASK = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 5 + [0], [1, 1] + [0] * 4])


def test_token_mask_leaves_padding_out():
    model = net()
    with ap.AttentionProbe(model, every_n_steps=1, statistics="all") as probe:
        (unknown,) = run(probe, model, x=X)
        probe.token_mask(MASK)
        (known,) = run(probe, model, x=X)
        (again,) = run(probe, model, x=X)
        probe.token_mask(MASK)
        probe.token_mask(None)
        (derived,) = run(probe, model, x=X)
    assert any("padding unknown" in note for note in unknown.notes)
    assert not any("padding unknown" in note for note in known.notes)
    assert same(unknown, again)  # a mask is good for one step
    assert same(unknown, derived)

    # Independent reference: the rows of the first layer that are real tokens.
    query, key, _ = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in model.layers[0].qkv(X).chunk(3, -1))
    weights = (query @ key.mT / 8**0.5).softmax(-1)
    entropy = -(weights * weights.log()).sum(-1)[MASK.bool()[:, None].expand(-1, 2, -1)]
    rows = MASK.sum()
    by_head = torch.stack([e.sum() for e in entropy.split([n for n in MASK.sum(1).tolist() for _ in range(2)])])
    expected = by_head.view(4, 2).sum(0) / rows
    torch.testing.assert_close(known["entropy"][0].float(), expected, rtol=1e-5, atol=0)


def test_token_mask_inside_evaluate_belongs_to_it():
    model = net()

    def masked():
        probe.token_mask(MASK)
        model(X)

    with ap.AttentionProbe(model, every_n_steps=1) as probe:
        plain, inside = probe.evaluate(lambda: model(X)), probe.evaluate(masked)
        (training,) = run(probe, model, x=X)
    assert not same(plain, inside, ["entropy"])
    assert same(plain, training, ["entropy"])


def test_token_mask_on_an_unprobed_step_is_ignored():
    model = net()
    with ap.AttentionProbe(model, every_n_steps=2) as probe:
        run(probe, model)
        probe.token_mask(MASK)
        run(probe, model)
        assert any("padding unknown" in note for note in run(probe, model)[0].notes)

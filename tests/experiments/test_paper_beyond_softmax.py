"""Softmax as a mixing layer, mixing models under the common training loop, and what is watched of them."""

import dataclasses
import json
from dataclasses import replace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from attnprobe.experiments.ensemble.arms import Arm
from attnprobe.experiments.ensemble.model import Architecture, Ensemble, seed_losses
from attnprobe.experiments.ensemble.pairs import pairs
from attnprobe.experiments.ensemble.training import train
from attnprobe.experiments.markov.task import SYMBOLS, WIDTH, task
from attnprobe.experiments.mixing.model import MECHANISMS, MixingModel
from attnprobe.experiments.mixing.observe import observe
from attnprobe.experiments.mixing.watch import Watch, gradient_error
from attnprobe.experiments.paper import beyond_softmax
from attnprobe.experiments.paper.base import Setting

LENGTH, SEEDS, FORM = 25, (0, 3), Architecture(WIDTH, SYMBOLS)


@pytest.fixture
def data():
    made = task("clean", LENGTH, SEEDS)
    return dataclasses.replace(made, x=made.x.double(), held_x=made.held_x.double())


@pytest.fixture(params=MECHANISMS)
def mechanism(request):
    return request.param


def test_softmax_is_the_ensemble(data):
    ensemble, model = Ensemble(FORM, SEEDS).double(), MixingModel("softmax", FORM, SEEDS, LENGTH).double()
    expected = pairs(ensemble, data.x, data.y)
    state = model.layer.mix(data.x)
    state.output.retain_grad()
    loss = seed_losses(state.output @ model.W_O, data.y)
    assert torch.allclose(model(data.x), ensemble(data.x), rtol=0, atol=1e-14)
    assert torch.allclose(loss, seed_losses(ensemble(data.x), data.y), rtol=1e-13)
    loss.sum().backward()
    gradients = observe(state, state.output.grad).gradients
    visible = expected.scores.isfinite()
    assert torch.allclose(state.weights[visible], expected.scores[visible], rtol=0, atol=1e-14)
    assert torch.allclose(state.mixing, expected.attention, rtol=0, atol=1e-15)
    for name in ("compatibility", "advantage"):
        scale = float(getattr(expected, name).abs().max())
        assert torch.allclose(getattr(gradients, name), getattr(expected, name), rtol=0, atol=1e-13 * scale), name


def test_mechanisms_start_from_the_same_weights():
    models = {name: MixingModel(name, FORM, SEEDS, LENGTH) for name in MECHANISMS}
    for model in models.values():
        assert torch.equal(model.layer.W_V, models["softmax"].layer.W_V)
        assert torch.equal(model.W_O, Ensemble(FORM, SEEDS).W_O)


def test_gradients_by_hand_equal_those_of_the_parameters(mechanism, data):
    model = MixingModel(mechanism, FORM, SEEDS, LENGTH).double()
    state = model.layer.mix(data.x)
    state.output.retain_grad()
    seed_losses(state.output @ model.W_O, data.y).sum().backward()
    assert float(gradient_error(model.layer, data.x, state.gradients(state.output.grad)).max()) < 1e-12
    wrong = gradient_error(model.layer, data.x, state.gradients(2 * state.output.grad))
    assert torch.allclose(wrong, torch.ones(2, dtype=torch.float64))


def test_it_learns_and_shares_are_shares(mechanism, data):
    watch = Watch(data, [0, 1, 9])
    model = MixingModel(mechanism, FORM, SEEDS, LENGTH).double()
    course = train(model, data, Arm("adam", "adam", rate=0.01), 25, observe=watch.observe)
    assert (course.losses[-1] < course.losses[0] - 0.05).all()
    assert watch.steps == [0, 1, 9]
    retention = {"retention_followed", "retention_by_chance", "retention_push_followed"}
    assert retention.issubset(watch.found) == (mechanism == "selective")
    for name, moments in watch.found.items():
        assert [len(moment) for moment in moments] == [2, 2, 2], name
        if name not in ("spread", "error"):
            assert all(((moment >= -1e-9) & (moment <= 1 + 1e-9)).all() for moment in moments), name
    assert all((moment < 1e-12).all() for moment in watch.found["error"])
    common = torch.stack(watch.found["common"])
    assert bool((common.abs() < 1e-9).all()) == (mechanism in ("softmax", "normalised"))


def test_weighted_by_their_gradients_steps_follow_the_advantage(mechanism, data):
    """More than half of them: pushes times changes add up to a fall of the loss, to first order."""
    watch = Watch(data, [0])
    model = MixingModel(mechanism, FORM, SEEDS, LENGTH).double()
    train(model, data, Arm("sgd", rate=1e-3), 1, observe=watch.observe)
    assert (watch.found["push_followed"][0] > 0.5).all()


def test_the_foretold_is_a_plain_correlation(data):
    """Of the advantage with a change that is made by hand."""
    model = MixingModel("normalised", FORM, SEEDS, LENGTH).double()
    watch = Watch(data, [0])
    watch.observe(0, model)
    before = model.layer.mix(data.x)
    error = torch.autograd.grad(seed_losses(before.output @ model.W_O, data.y).sum(), before.output)[0]
    advantage = before.gradients(error).advantage.detach()
    with torch.no_grad():
        model.layer.W_Q *= 1.5
    watch.observe(1, model)
    change = (model.layer.mix(data.x).mixing.log() - before.mixing.log()).detach()
    inside = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    inside[0] = False
    for seed, found in enumerate(watch.foretold()["all"]):
        both = torch.stack([advantage[0, seed][inside], change[0, seed][inside]])
        assert float(found) == pytest.approx(float(torch.corrcoef(both)[0, 1]), abs=1e-12)


def test_the_experiment(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    monkeypatch.setattr(beyond_softmax, "LENGTH", 20)
    few = {name: replace(regime, sequences=min(3, regime.sequences)) for name, regime in beyond_softmax.REGIMES.items()}
    monkeypatch.setattr(beyond_softmax, "REGIMES", few)
    result = beyond_softmax.measure(Setting((0, 1), 6, 1, tmp_path))
    result = json.loads(json.dumps(result, allow_nan=False))
    lines = beyond_softmax.describe(result)
    assert len(lines) == 2 + 2 * (1 + 4 * 6 + 3)
    figure = Figure(layout="constrained")
    beyond_softmax.draw(result, figure)
    figure.savefig(tmp_path / "figure.png")
    for regime in ("paper", "fresh"):
        for mechanism in MECHANISMS:
            events = EventAccumulator(str(tmp_path / f"{regime}-{mechanism}" / "routing"))
            events.Reload()
            assert {"routing/followed", "routing/entropy"} <= set(events.Tags()["scalars"])


def test_verdicts_are_by_intervals():
    def run(*bounds):
        return {"moments": [0, 5], "above_chance": [{"low": low, "high": high} for low, high in bounds]}

    assert beyond_softmax.verdict(run((0.1, 0.2), (-0.1, 0.2)), [0, 5]) == "more at 1 of 2 moments"
    assert beyond_softmax.verdict(run((0.1, 0.2), (-0.2, -0.1)), [0, 5]) == "more at 1 of 2 moments, fewer at 1"
    assert beyond_softmax.verdict(run((None, None), (0.1, 0.2)), [0, 5]) == "too few seeds to tell"

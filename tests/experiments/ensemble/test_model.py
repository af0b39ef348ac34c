"""One model for each seed: as if each were alone, and what the formulas say."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from attnprobe.experiments.ensemble.arms import Arm
from attnprobe.experiments.ensemble.model import IGNORED, Architecture, Ensemble, seed_losses
from attnprobe.experiments.ensemble.pairs import pairs
from attnprobe.experiments.ensemble.training import Task, train
from attnprobe.experiments.markov.task import task

FORM = Architecture(width=6, classes=4, key_width=3, value_width=5, initial_scale=0.5)
FORMS = {
    "paper": FORM,
    "heads": dataclasses.replace(FORM, heads=3),
    "all visible": dataclasses.replace(FORM, causal=False),
    "wide keys": dataclasses.replace(FORM, key_width=7),
    "value norm": dataclasses.replace(FORM, value_norm=True),
    "deep": dataclasses.replace(FORM, heads=2, layers=3, residual=True, value_norm=True),
    "deep, no residual": dataclasses.replace(FORM, layers=2),
}


def ensemble(form, seeds=(3, 5)):
    return Ensemble(form, seeds).double()


def data(seeds=2, sequences=3, tokens=7, seed=0):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(sequences, seeds, tokens, FORM.width, generator=random, dtype=torch.float64)
    y = torch.randint(FORM.classes, x.shape[:3], generator=random)
    y[:, :, 2] = IGNORED
    return x, y


def reference(model, seed, x):
    """One seed's logits by the formulas, ``[B, T, N]`` to ``[B, T, C]``."""
    form = model.form
    hidden = x
    for layer in model.attention:
        outputs = []
        for head in range(form.heads):
            query, key, value = (hidden @ weight[seed, head] for weight in (layer.W_Q, layer.W_K, layer.W_V))
            if form.value_norm:
                value = (value - value.mean(-1, keepdim=True)) / (
                    value.var(-1, correction=0, keepdim=True) + 1e-5
                ).sqrt()
            scores = query @ key.mT / math.sqrt(form.key_width)
            if form.causal:
                scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -math.inf)
            outputs.append(scores.softmax(-1) @ value)
        made = torch.cat(outputs, -1)
        if layer.W_P is not None:
            made = made @ layer.W_P[seed]
        hidden = hidden + made if form.residual else made
    return hidden @ model.W_O[seed]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_each_seed_computes_what_the_formulas_say(form):
    model, (x, y) = ensemble(form), data()
    logits = model(x)
    losses = seed_losses(logits, y)
    for seed in range(2):
        expected = reference(model, seed, x[:, seed])
        torch.testing.assert_close(logits[:, seed], expected, atol=1e-12, rtol=1e-12)
        loss = F.cross_entropy(expected.flatten(0, 1), y[:, seed].flatten(), ignore_index=IGNORED)
        torch.testing.assert_close(losses[seed], loss, atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_pairs_equal_autograd(form):
    """``dL/ds = -alpha A`` for free scores of any layer, to 1e-12."""
    model, (x, y) = ensemble(form), data()
    for index, layer in enumerate(model.attention):
        hidden = x
        for before in model.attention[:index]:
            hidden = model.add(hidden, before(hidden))
        scores = layer.scores(hidden).detach().requires_grad_()
        hidden = model.add(hidden, layer.join(scores.softmax(-1) @ layer.project(hidden)[2]))
        for after in model.attention[index + 1 :]:
            hidden = model.add(hidden, after(hidden))
        (expected,) = torch.autograd.grad(seed_losses(hidden @ model.W_O, y).sum(), scores)
        found = pairs(model, x, y, index)
        assert float((-found.attention * found.advantage - expected).abs().max()) < 1e-12 * float(expected.abs().max())
        assert torch.equal(found.scores, scores.detach())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("arm", ["sgd", "momentum", "adam", "adamw", "v10", "all3", "adam-qk5"])
def test_a_seed_trains_as_it_would_alone(arm):
    seeds, form = (3, 5, 11), FORMS["heads"]
    x, y = data(seeds=3)
    together = train(ensemble(form, seeds), Task(x, y, x, y), Arm.of(arm), 30)
    for index, seed in enumerate(seeds):
        x1, y1 = x[:, index : index + 1], y[:, index : index + 1]
        alone = train(ensemble(form, (seed,)), Task(x1, y1, x1, y1), Arm.of(arm), 30)
        assert abs(together.losses[:, index] - alone.losses[:, 0]).max() < 1e-12
        assert abs(together.held_out[:, index] - alone.held_out[:, 0]).max() < 1e-12


def test_the_weights_are_those_of_the_seed():
    one, two = ensemble(FORM, (1, 2)), ensemble(FORM, (2, 7))
    assert torch.equal(one.W_O[1], two.W_O[0])
    assert not torch.equal(one.W_O[0], one.W_O[1])
    assert float(one.attention[0].W_V.detach().std()) == pytest.approx(FORM.initial_scale, rel=0.3)


def test_the_probe_sees_each_seed_as_a_head_and_changes_nothing():
    data = task("clean", 40, (0, 1, 2))
    form = Architecture(20, 8)
    plain = train(Ensemble(form, (0, 1, 2)), data, Arm.of("sgd"), 30)
    watched = train(Ensemble(form, (0, 1, 2)), data, Arm.of("sgd"), 30, probe={"every_n_steps": 10})
    assert (plain.losses == watched.losses).all()
    assert watched.probe_steps.tolist() == [0, 10, 20]
    assert watched.statistics["entropy"].shape == (3, 1, 3)
    model = Ensemble(form, (0, 1, 2))
    attention = model.attention[0].scores(data.x).softmax(-1)[0, :, 1:]  # the first row sees one key only
    visible = torch.arange(2, 41).log()
    expected = (torch.special.entr(attention).sum(-1) / visible).mean(1)
    assert watched.statistics["normalized_entropy"][0, 0] == pytest.approx(expected.tolist(), rel=1e-5)

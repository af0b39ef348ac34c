"""Trainable mixing layers against the recurrences and against hand-derived gradients, and what is observed of them."""

import math

import pytest
import torch

from attnprobe.experiments.markov.task import sequences
from attnprobe.experiments.mixing.layers import LinearAttention, SelectiveSSM
from attnprobe.experiments.mixing.linear import linear_mixing
from attnprobe.experiments.mixing.observe import followed, followed_retention, observe
from tests.experiments import recurrences

TOKENS, WIDTH, KEY, VALUE, SEEDS = 30, 20, 10, 15, (3, 5, 8)
LAYERS = {
    "normalised": lambda random: LinearAttention(random, WIDTH, KEY, VALUE),
    "unnormalised": lambda random: LinearAttention(random, WIDTH, KEY, VALUE, normalised=False),
    "signed": lambda random: LinearAttention(random, WIDTH, KEY, VALUE, normalised=False, features="identity"),
    "scaled": lambda random: LinearAttention(random, WIDTH, KEY, VALUE, normalised=False, scale=0.01),
    "selective": lambda random: SelectiveSSM(random, WIDTH, KEY, VALUE),
}


def generators(seeds=SEEDS):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture
def x():
    """``[S, T, N]``: the Markov task's observations."""
    return torch.stack([sequences("clean", TOKENS, seed)[0].x for seed in SEEDS]).double()


@pytest.fixture(params=LAYERS)
def layer(request):
    return LAYERS[request.param](generators()).double()


def by_recurrence(layer, x):
    if isinstance(layer, SelectiveSSM):
        step_input = torch.einsum("stn,sn->st", x, layer.W_Z) + layer.b_Z[:, None]
        inputs = (torch.einsum("stn,snk->stk", x, weight) for weight in (layer.W_C, layer.W_B, layer.W_V))
        return recurrences.state_space(*inputs, *recurrences.gates(step_input, layer.rate))
    inputs = (torch.einsum("stn,snk->stk", x, weight) for weight in (layer.W_Q, layer.W_K, layer.W_V))
    scale = 0.01 if layer.scale == 0.01 else KEY**-0.5
    return recurrences.linear_attention(*inputs, normalised=layer.normalised, features=layer.features, scale=scale)


def assert_equal(found, expected):
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= 1e-12 * float(expected.abs().max())


def target(output):
    return torch.randn(output.shape, generator=torch.Generator().manual_seed(0), dtype=output.dtype)


def test_layers_equal_the_recurrence(layer, x):
    output, expected = layer(x), by_recurrence(layer, x)
    assert_equal(output.detach(), expected.detach())
    found = torch.autograd.grad((output - target(output)).square().sum(), list(layer.parameters()))
    wanted = torch.autograd.grad((expected - target(output)).square().sum(), list(layer.parameters()))
    for part, gradient in zip(found, wanted, strict=True):
        assert_equal(part, gradient)


@pytest.mark.parametrize("name", LAYERS)
def test_every_seed_trains_as_it_would_alone(name, x):
    together, alone = LAYERS[name](generators()).double(), LAYERS[name](generators(SEEDS[1:2])[0]).double()
    assert {parameter.shape[0] for parameter in alone.parameters()} == {1}
    batch = torch.stack([x, x.flip(-2)])  # a dimension in front: two sequences of each seed
    for model, inputs in ((together, batch), (alone, batch[:, 1:2])):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            model(inputs).square().sum().backward()
            optimizer.step()
    for (key, one), many in zip(alone.named_parameters(), together.parameters(), strict=True):
        assert torch.allclose(one[0], many[1], rtol=1e-12, atol=1e-15), key


@pytest.mark.parametrize("name", LAYERS)
def test_weights_come_from_the_seed_alone(name):
    before = torch.get_rng_state()
    first, again, other = (LAYERS[name](generators(seeds)) for seeds in ((3, 5), (5,), (4,)))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.W_V[1], again.W_V[0])
    assert not torch.equal(other.W_V, again.W_V)
    assert float(first.W_V.detach().std()) == pytest.approx(0.1, rel=0.1)


def test_a_new_selective_layer_remembers_ten_tokens():
    state = SelectiveSSM(generators(), WIDTH, KEY, VALUE).double().mix(torch.zeros(7, WIDTH, dtype=torch.float64))
    assert torch.allclose(state.log_retention, torch.tensor(-0.1, dtype=torch.float64), rtol=1e-6)
    other = SelectiveSSM(generators(), WIDTH, KEY, VALUE, initial_step=0.5, initial_rate=0.1)
    assert torch.allclose(other.mix(torch.zeros(7, WIDTH)).log_retention, torch.tensor(-0.05), rtol=1e-5)


def observed(layer, x):
    state = layer.mix(x)
    state.output.retain_grad()
    (state.output - target(state.output)).square().mean().backward()
    return state, observe(state, state.output.grad)


def test_observations_equal_plain_loops(layer, x):
    state, found = observed(layer, x)
    advantage, mixing = found.gradients.advantage, state.mixing.detach()
    assert_equal(found.gradients.compatibility, torch.einsum("sie,sje->sij", state.output.grad, state.value.detach()))
    for seed in range(len(SEEDS)):
        entropy, variance, square = [], [], []
        for i in range(1, TOKENS):
            share = mixing[seed, i, : i + 1].abs() / mixing[seed, i, : i + 1].abs().sum()
            row = advantage[seed, i, : i + 1]
            entropy.append(-(share * share.log()).sum() / math.log(i + 1))
            variance.append((share * row**2).sum() - (share * row).sum() ** 2)
            square.append((share * row**2).sum())
        assert_equal(found.normalized_entropy[seed], torch.stack(entropy).mean())
        assert torch.allclose(found.advantage_std[seed], torch.stack(variance).mean().sqrt(), rtol=1e-9)
        assert_equal(found.advantage_rms[seed], torch.stack(square).mean().sqrt())
        u, v = state.output.grad[seed], state.value[seed].detach()
        norms = (u.norm(dim=1).square().mean() * v.norm(dim=1).square().mean()).sqrt()
        assert torch.allclose(found.relative_advantage_std[seed], found.advantage_std[seed] / norms, rtol=1e-12)
    centred = torch.allclose(found.advantage_std, found.advantage_rms, rtol=1e-9)
    assert centred == (getattr(layer, "normalised", False) is True)


def test_a_real_step_follows_the_advantage_in_part(layer, x):
    state, found = observed(layer, x)
    torch.optim.SGD(layer.parameters(), lr=1e-3).step()
    after, advantage = layer.mix(x), found.gradients.advantage
    share = followed(state, after, advantage)
    change = (after.weights - state.weights).detach()
    for seed in range(len(SEEDS)):
        agree = [bool(change[seed, i, j] * advantage[seed, i, j] > 0) for i in range(1, TOKENS) for j in range(i + 1)]
        assert float(share[seed]) == pytest.approx(sum(agree) / len(agree), abs=1e-3)
    assert (share > 0.4).all()
    if isinstance(layer, SelectiveSSM):
        share = followed_retention(state.log_retention, after.log_retention, found.gradients.retention)
        assert ((share >= 0) & (share <= 1)).all()


@pytest.mark.parametrize("normalised", [True, False])
def test_a_step_on_free_weights_follows_the_advantage_everywhere(normalised):
    random = torch.Generator().manual_seed(0)
    query, key, value, error = (torch.randn(2, 9, 3, generator=random, dtype=torch.float64) for _ in range(4))
    before = linear_mixing(query, key, value, normalised=normalised)
    gradients = before.gradients(error)
    after = type("Moved", (), {"weights": before.weights - 1e-3 * gradients.weights})
    assert followed(before, after, gradients.advantage).tolist() == [1.0, 1.0]
    assert followed(after, before, gradients.advantage).tolist() == [0.0, 0.0]
    after.weights[1, 4, 2] = torch.nan
    assert followed(before, after, gradients.advantage).isnan().tolist() == [False, True]
    flow = torch.tensor([[0.0, 1.0, -1.0, 2.0]])
    assert followed_retention(torch.zeros(1, 4), -flow, flow).tolist() == [1.0]
    assert followed_retention(torch.zeros(1, 4), flow, flow).tolist() == [0.0]


def test_nothing_mixed_is_nan():
    zero = linear_mixing(torch.zeros(5, 2), torch.zeros(5, 2), torch.ones(5, 2), normalised=False, features="identity")
    found = observe(zero, torch.ones(5, 2))
    assert found.normalized_entropy.isnan()
    assert found.advantage_std.isnan()


@pytest.mark.parametrize("name", LAYERS)
def test_long_sequences_stay_finite_in_float32(name):
    layer = LAYERS[name](generators())
    x = 5 * torch.randn(len(SEEDS), 512, WIDTH, generator=torch.Generator().manual_seed(0))
    output = layer(x)
    output.square().mean().backward()
    assert output.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())

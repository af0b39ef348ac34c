"""Gradients and routing laws beyond softmax, derived by hand, against autograd through the recurrences, in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnprobe.errors import ConfigurationError
from attnprobe.experiments.closed_form.attention import attend, attention_gradients
from attnprobe.experiments.mixing.linear import linear_mixing
from attnprobe.experiments.mixing.selective import selective_mixing, softplus
from tests.experiments import recurrences
from tests.reproducible import reproducible

KINDS = {
    "normalised": {"normalised": True, "features": "elu"},
    "unnormalised": {"normalised": False, "features": "elu", "scale": 0.3},
    "signed": {"normalised": False, "features": "identity", "scale": 0.5},
}


def assert_equal(found, expected, floor=0.0):
    """To 1e-12 of the largest entry, or of ``floor`` where that vanishes."""
    assert found.shape == expected.shape
    error, size = float((found - expected).abs().max()), float(expected.abs().max())
    assert error <= 1e-12 * max(size, floor), f"off by {error:.1e} of {size:.1e}"


def tensors(seed, std, *shapes):
    random = torch.Generator().manual_seed(seed)
    return [(std * torch.randn(shape, generator=random, dtype=torch.float64)).requires_grad_() for shape in shapes]


def detached(leaves):
    return [leaf.detach() for leaf in leaves]


def check_linear(seed, lead, tokens, d_k, d_v, std, kind):
    leaves = tensors(seed, std, (*lead, tokens, d_k), (*lead, tokens, d_k), (*lead, tokens, d_v))
    output = recurrences.linear_attention(*leaves, **KINDS[kind])
    (error,) = detached(tensors(seed + 1, 1.0, output.shape))
    expected = torch.autograd.grad(output, leaves, error)
    state = linear_mixing(*detached(leaves), **KINDS[kind])
    assert_equal(state.output, output.detach())
    found = state.gradients(error)
    floor = 1e-2 * max(float(gradient.abs().max()) for gradient in expected)
    for name, gradient in zip(("query", "key", "value"), expected, strict=True):
        assert_equal(getattr(found, name), gradient, floor)
    return state, found


def selective_problem(seed, lead, tokens, d_k, d_v, std):
    shapes = (tokens, d_k), (tokens, d_k), (tokens, d_v), (tokens,), ()
    return tensors(seed, std, *((*lead, *shape) for shape in shapes))


def check_selective(seed, lead, tokens, d_k, d_v, std):
    """Gradients of the inputs and parameters, and those of gates and retention as free numbers."""
    leaves = selective_problem(seed, lead, tokens, d_k, d_v, std)
    step, log_retention = recurrences.gates(*leaves[3:])
    output = recurrences.state_space(*leaves[:3], step, log_retention)
    (error,) = detached(tensors(seed + 1, 1.0, output.shape))
    wanted = {"read": leaves[0], "write": leaves[1], "value": leaves[2], "step_input": leaves[3], "rate": leaves[4]}
    expected = dict(zip(wanted, torch.autograd.grad(output, list(wanted.values()), error), strict=True))
    free = [tensor.detach().requires_grad_() for tensor in (step, log_retention)]
    again = recurrences.state_space(*detached(leaves[:3]), *free)
    expected["gate"], expected["retention"] = torch.autograd.grad(again, free, error)
    state = selective_mixing(*detached(leaves))
    assert_equal(state.output, output.detach())
    found = state.gradients(error)
    floor = 1e-2 * max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        assert_equal(getattr(found, name), gradient, floor)
    return state, found


@pytest.mark.parametrize("kind", KINDS)
def test_linear_gradients_equal_the_recurrence(kind):
    for seed in range(5):
        check_linear(seed, (), 20, 4, 6, 1.0, kind)
        check_linear(seed, (2, 3), 7, 5, 2, 0.5, kind)


def test_selective_gradients_equal_the_recurrence():
    for seed in range(5):
        check_selective(seed, (), 20, 4, 6, 1.0)
        check_selective(seed, (2, 3), 7, 5, 2, 0.5)


shapes = {
    "seed": st.integers(0, 2**31),
    "lead": st.sampled_from([(), (3,), (2, 2)]),
    "tokens": st.integers(1, 24),
    "d_k": st.integers(1, 5),
    "d_v": st.integers(1, 5),
    "std": st.sampled_from([0.1, 0.5, 1.0, 2.0]),
}


@reproducible(80)
@given(kind=st.sampled_from(sorted(KINDS)), **shapes)
def test_any_linear_attention(kind, **problem):
    check_linear(**problem, kind=kind)


@reproducible(60)
@given(**shapes)
def test_any_selective_layer(**problem):
    check_selective(**problem)


@pytest.fixture(params=range(5))
def linear(request):
    """Every kind at one random problem, with an upstream gradient of its own."""
    query, key, value, error = detached(tensors(request.param, 1.0, (12, 4), (12, 4), (12, 5), (12, 5)))
    return {kind: linear_mixing(query, key, value, **options) for kind, options in KINDS.items()}, error


@pytest.fixture(params=range(5))
def selective(request):
    state = selective_mixing(*detached(selective_problem(request.param, (), 12, 4, 5, 1.0)))
    return state, detached(tensors(100 + request.param, 1.0, (12, 5)))[0]


PAIRS = torch.ones(12, 12, dtype=torch.bool).tril()


def same_sign(change, push):
    return torch.equal(change.sign(), push.sign())


def test_normalised_weights_are_pushed_by_the_advantage_alone(linear):
    """dL/dw_ij = -A_ij / Z_i: the push on a weight does not depend on the weight, as it does under softmax."""
    states, error = linear
    state, found = states["normalised"], states["normalised"].gradients(error)
    weights = state.weights.clone().requires_grad_()
    loss = (weights / weights.sum(-1, keepdim=True) @ state.value * error).sum()
    (expected,) = torch.autograd.grad(loss, weights)
    assert_equal(found.weights, expected.tril())
    change = -1e-3 * expected
    assert_equal((change * state.total[:, None]).tril(), 1e-3 * found.advantage.tril())
    visible = PAIRS.clone()
    visible[0] = False  # one visible token is everything: no advantage, up to rounding
    assert same_sign(change[visible], found.advantage[visible])


def test_normalised_log_weights_follow_the_softmax_law(linear):
    """dL/dln w_ij = -M_ij A_ij, and the rows sum to zero: softmax's scores are log weights."""
    states, error = linear
    state, found = states["normalised"], states["normalised"].gradients(error)
    scores = state.weights.log().clone().requires_grad_()
    (expected,) = torch.autograd.grad((scores.softmax(-1) @ state.value * error).sum(), scores)
    assert_equal(-state.mixing * found.advantage, expected)
    assert float(expected.sum(-1).abs().max()) < 1e-13
    # The same mixing by softmax has the same compatibility and advantage.
    tokens = torch.eye(12, dtype=torch.float64)
    softmax = attend(state.weights.where(PAIRS, 1).log(), tokens, state.value, visible=PAIRS, scale=1.0)
    assert_equal(softmax.attention, state.mixing)
    routing = attention_gradients(softmax, error)
    assert_equal(found.advantage, routing.advantage)
    assert_equal(found.value, routing.value)


@pytest.mark.parametrize("kind", ["unnormalised", "signed"])
def test_without_normalisation_there_is_no_baseline(linear, kind):
    """dL/dM_ij = b_ij: descent raises what lowers the loss by itself, not what does so more than the average."""
    states, error = linear
    state, found = states[kind], states[kind].gradients(error)
    mixing = state.mixing.clone().requires_grad_()
    (expected,) = torch.autograd.grad((mixing @ state.value * error).sum(), mixing)
    assert_equal(found.weights, expected.tril())
    assert torch.equal(found.advantage, -found.compatibility)
    assert same_sign((-1e-3 * expected)[PAIRS], found.advantage[PAIRS])
    assert float(found.weights.sum(-1).abs().min()) > 1e-3  # the rows do not sum to zero


@pytest.mark.parametrize("kind", KINDS)
def test_what_all_values_share_moves_only_routing_without_a_baseline(linear, kind):
    states, error = linear
    state = states[kind]
    shifted = linear_mixing(state.query, state.key, state.value + 7.0, **KINDS[kind])
    moved = (shifted.gradients(error).weights - state.gradients(error).weights).abs().max()
    assert float(moved) < 1e-12 if kind == "normalised" else float(moved) > 1


def test_the_first_token_is_routing_only_without_a_baseline(linear):
    """A row with one visible token has nothing to route if it is normalised; else its size is learned."""
    states, error = linear
    assert abs(float(states["normalised"].gradients(error).advantage[0, 0])) < 1e-14
    assert abs(float(states["signed"].gradients(error).advantage[0, 0])) > 1e-3


def test_selective_mixing_has_no_baseline(selective):
    state, error = selective
    found = state.gradients(error)
    mixing = state.mixing.clone().requires_grad_()
    (expected,) = torch.autograd.grad((mixing @ state.value * error).sum(), mixing)
    assert_equal(-found.advantage, expected)
    assert same_sign((-1e-3 * expected)[PAIRS], found.advantage[PAIRS])


def test_retention_follows_the_flow_of_compatibility(selective):
    """One step on free ln a: retention rises exactly where the flow over its boundary is negative."""
    state, error = selective
    found = state.gradients(error)
    flow = torch.zeros(12, dtype=torch.float64)
    for k in range(12):
        for i in range(k, 12):
            for j in range(k):
                flow[k] += state.mixing[i, j] * (error[i] @ state.value[j])
    assert_equal(found.retention, flow)
    assert found.retention[0] == 0
    log_retention = state.log_retention - 1e-6 * found.retention
    assert same_sign((log_retention - state.log_retention)[1:], -flow[1:])

    # What that does: everything that crosses the boundary k is multiplied, nothing else changes.
    k, factor = 5, 1.25
    changed = state.log_retention.clone()
    changed[k] += torch.tensor(factor).double().log()
    identity = torch.eye(12, dtype=torch.float64)
    mixing = recurrences.state_space(state.read, state.write, identity, state.step, changed)
    crosses = torch.zeros(12, 12, dtype=torch.bool)
    crosses[k:, :k] = True
    assert_equal(mixing, state.mixing * torch.where(crosses, factor, 1.0).double())


def test_retention_is_the_state_against_its_error(selective):
    """The same flow, seen from the recurrence: dL/dln a_k = a_k (dL/dh_k . h_(k-1))."""
    state, error = selective
    hidden, states = torch.zeros(4, 5, dtype=torch.float64), []
    loss = torch.zeros((), dtype=torch.float64)
    for t in range(12):
        new = state.step[t] * state.write[t, :, None] * state.value[t]
        hidden = (state.log_retention[t].exp() * hidden + new).requires_grad_()
        states.append(hidden)
        loss = loss + (state.read[t] @ hidden * error[t]).sum()
    pulls = torch.autograd.grad(loss, states)
    for k in range(1, 12):
        flow = state.log_retention[k].exp() * (pulls[k] * states[k - 1]).sum()
        assert_equal(state.gradients(error).retention[k], flow.detach(), floor=1.0)


def test_the_write_gate_follows_its_column(selective):
    """One step on free write gates: a token is written more exactly where its column of M b is negative."""
    state, error = selective
    found = state.gradients(error)
    column = (state.mixing * found.compatibility).sum(0)
    assert_equal(found.gate * state.step, column)
    assert same_sign(-1e-3 * found.gate, -column)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_against_the_gradient_lowers_the_loss_as_predicted(linear, kind):
    states, error = linear
    state, found = states[kind], states[kind].gradients(error)
    step = 1e-7 * float(state.weights.abs().max()) / float(found.weights.abs().max())

    def loss(weights):
        mixing = weights / weights.sum(-1, keepdim=True) if state.normalised else weights
        return (mixing @ state.value * error).sum()

    fall = loss(state.weights) - loss(state.weights - step * found.weights)
    assert float(fall) == pytest.approx(step * float(found.weights.square().sum()), rel=1e-4)


def test_only_positive_weights_are_normalised():
    with pytest.raises(ConfigurationError, match="only positive weights"):
        linear_mixing(torch.ones(2, 1), torch.ones(2, 1), torch.ones(2, 1), features="identity")
    with pytest.raises(ConfigurationError, match="'elu' or 'identity', got 'relu'"):
        linear_mixing(torch.ones(2, 1), torch.ones(2, 1), torch.ones(2, 1), features="relu")


def test_softplus_is_exact_where_torch_rounds():
    assert float(softplus(torch.tensor(21.0, dtype=torch.float64)) - 21) == pytest.approx(7.58256042e-10, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [-1e4, 1e4, 60.0])
def test_extreme_gates_stay_finite(size, dtype):
    random = torch.Generator().manual_seed(0)
    read, write, value, error = (torch.randn(512, 3, generator=random, dtype=dtype) for _ in range(4))
    step_input = size * torch.rand(512, generator=random, dtype=dtype)
    inputs = [tensor.requires_grad_() for tensor in (read, write, value, step_input, torch.tensor(5.0, dtype=dtype))]
    output = selective_mixing(*inputs).output
    assert output.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(output, inputs, error))
    found = selective_mixing(*detached(inputs)).gradients(error)
    assert all(tensor.isfinite().all() for tensor in vars(found).values())

"""Gradients derived by hand against autograd through torch's own attention and cross-entropy, in float64."""

import re
from dataclasses import dataclass, fields, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from attnprobe.errors import ConfigurationError
from attnprobe.experiments.closed_form.attention import attend, attention_gradients
from attnprobe.experiments.closed_form.layer import Parameters, forward, gradients
from attnprobe.experiments.closed_form.loss import LossWeights, cross_entropy
from attnprobe.experiments.markov.task import SYMBOLS, sequences
from tests.reproducible import reproducible

CLASSES = 4
WEIGHTINGS = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "ignore": {"ignore_index": 1},
    "ignore negative, sum": {"ignore_index": -100, "reduction": "sum"},
    "class weights": {"class_weights": (0.5, 2.0, 0.0, 3.0)},
    "class weights, sum": {"class_weights": (0.5, 2.0, 0.1, 3.0), "reduction": "sum"},
    "smoothing": {"label_smoothing": 0.2},
    "everything": {"ignore_index": 2, "class_weights": (0.5, 2.0, 1.0, 3.0), "label_smoothing": 0.1},
    "everything, sum": {"class_weights": (0.5, 0.0, 1.0, 3.0), "label_smoothing": 0.3, "reduction": "sum"},
}


@dataclass(frozen=True)
class Size:
    """``heads`` 0: weights without a dimension of heads; ``batch`` None: input without one of sequences."""

    tokens: int
    width: int
    d_k: int
    d_v: int
    heads: int = 0
    groups: int = 0
    batch: int | None = None
    bias: bool = False


TOY, WIDE = Size(5, 5, 2, 2), Size(9, 3, 4, 6)
SIZES = {
    "toy": TOY,
    "wide": WIDE,
    "one token": Size(1, 2, 1, 1),
    "batch": Size(6, 3, 4, 2, batch=3),
    "multi-head": Size(7, 6, 3, 4, heads=4, groups=4, batch=2, bias=True),
    "grouped": Size(7, 6, 3, 4, heads=6, groups=2, batch=2, bias=True),
    "multi-query": Size(7, 6, 3, 4, heads=3, groups=1),
}


def problem(seed, size, std=1.0):
    """Random parameters and targets, the first target being class 0 so that no weighting is left with nothing."""
    generator = torch.Generator().manual_seed(seed)
    queries, keys = ((size.heads,), (size.groups,)) if size.heads else ((), ())
    tokens = (size.tokens,) if size.batch is None else (size.batch, size.tokens)
    shapes = {
        "x": (*tokens, size.width),
        "W_Q": (*queries, size.width, size.d_k),
        "W_K": (*keys, size.width, size.d_k),
        "W_V": (*keys, size.width, size.d_v),
        "W_O": (*queries, size.d_v, CLASSES),
    }
    if size.bias:
        shapes |= {"b_Q": (*queries, size.d_k), "b_K": (*keys, size.d_k), "b_V": (*keys, size.d_v), "b_O": (CLASSES,)}
    drawn = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    targets = torch.randint(CLASSES, tokens, generator=generator)
    targets[..., 0] = 0
    return Parameters(**{name: std * tensor for name, tensor in drawn.items()}), targets


def settings(weighting):
    """The same weighting for the closed form and for ``F.cross_entropy``."""
    options = dict(WEIGHTINGS[weighting])
    options["class_weights"] = torch.tensor(options["class_weights"]) if "class_weights" in options else None
    reference = {key: value for key, value in options.items() if key != "class_weights"}
    if options["class_weights"] is not None:
        reference["weight"] = options["class_weights"].double()
    return LossWeights(**options), reference


def by_autograd(params, targets, reference, visible=None, kept=None, dropout=0.0):
    """Loss and gradients of ``F.cross_entropy`` over ``F.scaled_dot_product_attention``.

    With dropout attention is written out: torch's kernel does not take a known mask.
    """
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in vars(params).items() if tensor is not None}
    if not params.heads:  # the reference always has a dimension of heads
        visible, kept = (None if mask is None else mask.unsqueeze(-3) for mask in (visible, kept))
    x = leaves["x"] if params.x.ndim == 3 else leaves["x"][None]

    def project(name):
        weight, bias = leaves[f"W_{name}"], leaves.get(f"b_{name}", torch.zeros(()))
        if not params.heads:
            weight, bias = weight[None], bias[None]
        return torch.einsum("btn,hnd->bhtd", x, weight) + bias.unsqueeze(-2 if bias.ndim > 1 else -1)

    query, key, value = project("Q"), project("K"), project("V")
    if kept is None:
        error = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, enable_gqa=True)
    else:
        shared = query.shape[1] // key.shape[1]
        scores = torch.einsum("bhtd,bhsd->bhts", query, key.repeat_interleave(shared, 1)) / query.shape[-1] ** 0.5
        if visible is not None:
            scores = scores.masked_fill(~visible, -torch.inf)
        weights = scores.softmax(-1) * kept / (1 - dropout)
        error = torch.einsum("bhts,bhse->bhte", weights, value.repeat_interleave(shared, 1))
    readout = leaves["W_O"] if params.heads else leaves["W_O"][None]
    logits = torch.einsum("bhte,hec->btc", error, readout) + leaves.get("b_O", 0)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), **reference)
    inner = {"query": query, "key": key, "value": value, "error": error}
    wanted = {**leaves, **inner}
    found = dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))
    return loss.detach(), found


def check(params, targets, weighting="mean", **masks):
    """Every gradient to 1e-12 of its largest entry; one that vanishes, of the largest of the whole problem."""
    weights, reference = settings(weighting)
    loss, expected = by_autograd(params, targets, reference, **masks)
    state = forward(params, **masks)
    result = cross_entropy(state.output, targets, weights)
    found = gradients(params, state, result.delta)
    assert_equal(result.loss, loss)
    floor = 1e-2 * max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        part = getattr(found if name in ("x",) or name[1] == "_" else found.routing, name)
        assert_equal(part, gradient.view_as(part), floor)
    return state, found


def assert_equal(found, expected, floor=1.0):
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= 1e-12 * max(floor, float(expected.abs().max()))


def causal(tokens):
    return torch.ones(tokens, tokens, dtype=torch.bool).tril()


@pytest.mark.parametrize("triangle", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_gradients_equal_autograd(weighting, size, triangle):
    for seed in range(4):
        params, targets = problem(seed, size)
        if weighting == "ignore negative, sum":
            targets[..., -1] = -100
        check(params, targets, weighting, visible=causal(size.tokens) if triangle else None)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("std", [0.1, 1.0], ids=["as it begins", "sharp"])
def test_the_markov_task(seed, std):
    tokens, d_k, d_v = 80, 10, 15
    sequence = sequences("clean", tokens, seed)[0]
    generator = torch.Generator().manual_seed(seed)
    width = sequence.x.shape[1]
    shapes = (width, d_k), (width, d_k), (width, d_v), (d_v, SYMBOLS)
    weights = [std * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    check(Parameters(sequence.x.double(), *weights), sequence.y, visible=causal(tokens))


def padding(size, batch):
    """Sequence ``b`` has ``b`` fewer tokens: nobody sees the others, and their targets are ignored."""
    real = torch.arange(size.tokens) < size.tokens - torch.arange(batch)[:, None]
    return real[:, None, None] & causal(size.tokens), real


@pytest.mark.parametrize("size", [SIZES["multi-head"], SIZES["grouped"]], ids=["multi-head", "grouped"])
def test_padding_gets_no_gradient(size):
    params, targets = problem(0, replace(size, batch=4))
    visible, real = padding(size, 4)
    state, found = check(params, targets.where(real, -100), visible=visible)
    assert (found.x[~real] == 0).all()
    assert (state.routing.attention[(~visible).expand_as(state.routing.attention)] == 0).all()


def test_a_query_that_sees_nothing_outputs_nothing():
    params, targets = problem(1, SIZES["multi-head"])
    visible = torch.ones(7, 7, dtype=torch.bool)
    visible[2] = False
    state, _ = check(params, targets, visible=visible)
    assert (state.routing.output[:, :, 2] == 0).all()


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("size", [TOY, SIZES["grouped"]], ids=["toy", "grouped"])
def test_known_dropout(size, p):
    params, targets = problem(2, size)
    shape = forward(params).routing.attention.shape
    kept = torch.rand(shape, generator=torch.Generator().manual_seed(0)) >= p
    state, found = check(params, targets, kept=kept, dropout=p, visible=causal(size.tokens))
    routing = found.routing
    assert_equal(routing.expected, (routing.error * state.routing.output).sum(-1))
    assert_equal(routing.scores.sum(-1), torch.zeros_like(routing.expected))


@st.composite
def problems(draw):
    groups = draw(st.integers(0, 3))
    size = Size(
        tokens=draw(st.integers(1, 9)),
        width=draw(st.integers(1, 6)),
        d_k=draw(st.integers(1, 5)),
        d_v=draw(st.integers(1, 5)),
        heads=groups * draw(st.integers(1, 3)),
        groups=groups,
        batch=draw(st.one_of(st.none(), st.integers(1, 3))),
        bias=draw(st.booleans()),
    )
    seed = draw(st.integers(0, 2**31))
    params, targets = problem(seed, size, draw(st.sampled_from([0.1, 0.5, 1.0])))
    random = torch.Generator().manual_seed(seed)
    masks, shape = {}, forward(params).routing.attention.shape
    # Every query sees its own token, so that the mask itself leaves no row empty.
    itself = torch.eye(size.tokens, dtype=torch.bool)
    kind = draw(st.sampled_from(["full", "causal", "random", "padding"]))
    if kind == "causal":
        masks["visible"] = causal(size.tokens)
    elif kind == "random":
        masks["visible"] = (torch.rand(shape, generator=random) < 0.5) | itself
    elif kind == "padding":
        real = torch.rand(targets.shape, generator=random) < 0.7
        real[..., 0] = True
        columns = real[..., None, :] | itself
        masks["visible"] = columns.unsqueeze(-3) if size.heads else columns
        targets = targets.where(real, -100)
    if draw(st.booleans()):
        masks["dropout"] = draw(st.sampled_from([0.0, 0.1, 0.5]))
        masks["kept"] = torch.rand(shape, generator=random) >= masks["dropout"]
    # Padded targets are -100: leave the weightings that ignore another class to the other masks.
    weightings = [
        name for name in WEIGHTINGS if kind != "padding" or WEIGHTINGS[name].get("ignore_index", -100) == -100
    ]
    return params, targets, draw(st.sampled_from(weightings)), masks


@reproducible(150)
@given(problems())
def test_every_combination_equals_autograd(example):
    params, targets, weighting, masks = example
    check(params, targets, weighting, **masks)


@pytest.mark.parametrize("triangle", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_identities(seed, triangle):
    params, targets = problem(seed, WIDE)
    state, found = check(params, targets, visible=causal(9) if triangle else None)
    routing, grads = state.routing, found.routing
    assert float(grads.scores.sum(1).abs().max()) < 1e-14
    assert_equal(grads.expected, (grads.error * routing.output).sum(1))
    assert_equal((routing.attention * grads.advantage).sum(1), torch.zeros_like(grads.expected))
    visible = routing.scores.isfinite()
    assert (grads.scores[~visible] == 0).all()

    # The routing law is exact where scores are free: descent raises the score of every pair with an advantage.
    change = -0.1 * grads.scores[visible]
    if not triangle:
        assert torch.equal(change > 0, grads.advantage[visible] > 0)
    moved = routing.scores - 1e-3 * grads.scores
    assert F.cross_entropy(moved.softmax(1) @ routing.value @ params.W_O, targets) < F.cross_entropy(
        state.output, targets
    )


def test_the_key_bias_has_no_gradient():
    params, targets = problem(0, SIZES["grouped"])
    _, found = check(params, targets)
    assert (found.b_K == 0).all()
    assert float(found.routing.key.sum(-2).abs().max()) < 1e-14


def test_cross_attention():
    """Queries and keys of different numbers, with a scale of one's own."""
    random = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, tokens, width, generator=random, dtype=torch.float64, requires_grad=True)
        for heads, tokens, width in ((4, 5, 3), (2, 8, 3), (2, 8, 6))
    )
    output = F.scaled_dot_product_attention(query, key, value, scale=0.7, enable_gqa=True)
    error = torch.randn(output.shape, generator=random, dtype=torch.float64)
    expected = torch.autograd.grad(output, (query, key, value), error)
    routing = attend(query.detach(), key.detach(), value.detach(), scale=0.7)
    assert_equal(routing.output, output.detach())
    found = attention_gradients(routing, error)
    for part, gradient in zip((found.query, found.key, found.value), expected, strict=True):
        assert_equal(part, gradient)


def test_ignored_positions_send_no_error():
    params, targets = problem(3, TOY)
    targets[2] = -100
    _, found = check(params, targets)
    assert (found.routing.error[2] == 0).all()
    assert (found.routing.scores[2] == 0).all()


def test_float32_stays_float32():
    params, targets = problem(0, SIZES["grouped"])
    single = Parameters(**{name: tensor.float() for name, tensor in vars(params).items()})
    state = forward(single)
    found = gradients(single, state, cross_entropy(state.output, targets, LossWeights(label_smoothing=0.1)).delta)
    tensors = [getattr(part, field.name) for part in (found, found.routing) for field in fields(part)]
    assert {tensor.dtype for tensor in tensors if isinstance(tensor, torch.Tensor)} == {torch.float32}


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.zeros(4, dtype=torch.long), r"for each token, shape \[5\]; got shape \[4\]"),
        (torch.zeros(5), "float32"),
        (torch.full((5,), 4), "0 to 3 or ignore_index=-100"),
        (torch.full((5,), -100), "every target is ignored"),
    ],
)
def test_targets_that_cannot_work(targets, message):
    with pytest.raises(ConfigurationError, match=message):
        cross_entropy(torch.zeros(5, CLASSES), targets)


@pytest.mark.parametrize("weights", [torch.ones(3), torch.tensor([1.0, -1.0, 1.0, 1.0])])
def test_class_weights_that_cannot_work(weights):
    with pytest.raises(ConfigurationError, match="class_weights must be 4 finite numbers"):
        cross_entropy(torch.zeros(5, CLASSES), torch.zeros(5, dtype=torch.long), LossWeights(class_weights=weights))


@pytest.mark.parametrize(
    ("options", "message"), [({"reduction": "none"}, "'mean' or 'sum'"), ({"label_smoothing": 1.5}, "label_smoothing")]
)
def test_loss_weights_that_cannot_work(options, message):
    with pytest.raises(ConfigurationError, match=message):
        LossWeights(**options)


@pytest.mark.parametrize(
    "change",
    [
        {"W_O": torch.ones(3, 4)},
        {"W_Q": torch.ones(1, 5, 2)},
        {"b_K": torch.ones(3)},
        {"x": torch.ones(5)},
        {"x": torch.ones(0, 5)},
    ],
)
def test_shapes_that_do_not_fit(change):
    (name, tensor), *_ = change.items()
    with pytest.raises(ConfigurationError, match=r"W_O \[E, C\].*" + re.escape(f"{name} {list(tensor.shape)}")):
        replace(problem(0, TOY)[0], **change)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"visible": torch.ones(3, 3)}, "visible must be boolean"),
        ({"kept": torch.ones(3, 3)}, "kept must be boolean"),
        ({"dropout": 0.1}, "the weights it kept"),
        ({"kept": torch.ones(3, 3, dtype=torch.bool), "dropout": 1.0}, r"\[0, 1\)"),
    ],
)
def test_masks_that_cannot_work(options, message):
    with pytest.raises(ConfigurationError, match=message):
        attend(torch.ones(3, 2), torch.ones(3, 2), torch.ones(3, 2), **options)


def test_heads_that_cannot_share():
    with pytest.raises(ConfigurationError, match="3 query heads cannot share 2"):
        attend(torch.ones(3, 4, 2), torch.ones(2, 4, 2), torch.ones(2, 4, 2))

"""Hand-derived gradients against autograd, the routing law's identities, training, and what run() writes."""

import json
import subprocess
import sys
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F

from attnprobe.errors import ConfigurationError, WriterError
from attnprobe.experiments.toy import TASK, LossWeights, Parameters, forward, gradients, run, train
from attnprobe.experiments.toy_figure import draw
from attnprobe.experiments.toy_report import write_json

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
SIZES = {"paper": (5, 5, 2, 2), "wide": (9, 3, 4, 6), "one token": (1, 2, 1, 1)}  # T, N, D, E


def problem(seed, size=(5, 5, 2, 2), std=1.0):
    """Random parameters and targets, the first target being class 0 so that no weighting is left with nothing."""
    tokens, width, d_k, d_v = size
    generator = torch.Generator().manual_seed(seed)
    shapes = [(tokens, width), (width, d_k), (width, d_k), (width, d_v), (d_v, CLASSES)]
    params = Parameters(*(std * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes))
    targets = torch.randint(CLASSES, (tokens,), generator=generator)
    targets[0] = 0
    return params, targets


def settings(name):
    """The same weighting for the toy and for ``cross_entropy``."""
    options = dict(WEIGHTINGS[name])
    options["class_weights"] = torch.tensor(options["class_weights"]) if "class_weights" in options else None
    reference = {key: value for key, value in options.items() if key != "class_weights"}
    if options["class_weights"] is not None:
        reference["weight"] = options["class_weights"].double()
    return LossWeights(**options), reference


def assert_equal(found, expected):
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= 1e-12 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_gradients_equal_autograd(weighting, size, causal):
    weights, reference = settings(weighting)
    for seed in range(12):
        params, targets = problem(seed, size)
        if weighting == "ignore negative, sum":
            targets[-1] = -100
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in vars(params).items()}
        inner = {name: leaves["x"] @ leaves[f"W_{name[0].upper()}"] for name in ("query", "key", "value")}
        inner["scores"] = inner["query"] @ inner["key"].T / size[2] ** 0.5
        hidden = torch.full(inner["scores"].shape, -torch.inf, dtype=torch.float64).triu(1) if causal else 0
        inner["error"] = (inner["scores"] + hidden).softmax(1) @ inner["value"]
        loss = F.cross_entropy(inner["error"] @ leaves["W_O"], targets, **reference)
        wanted = {**leaves, **inner}
        expected = dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))

        state = forward(params, targets, weights, causal=causal)
        found = gradients(params, state)
        assert_equal(state.loss, loss.detach())
        for name, gradient in expected.items():
            assert_equal(getattr(found, name), gradient)


@pytest.mark.parametrize("causal", [False, True])
def test_forward_equals_scaled_dot_product_attention(causal):
    params, targets = problem(0, SIZES["wide"])
    state = forward(params, targets, causal=causal)
    output = F.scaled_dot_product_attention(state.query[None], state.key[None], state.value[None], is_causal=causal)[0]
    assert_equal(state.output, output)
    assert_equal(state.probabilities, (output @ params.W_O).softmax(1))
    assert_equal(state.weights.sum(), torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_identities(seed, causal):
    params, targets = problem(seed, SIZES["wide"])
    state = forward(params, targets, causal=causal)
    found = gradients(params, state)
    assert float(found.scores.sum(1).abs().max()) < 1e-14
    assert_equal(found.expected, (found.error * state.output).sum(1))
    assert_equal(found.compatibility, torch.einsum("ie,je->ij", found.error, state.value))
    assert_equal(found.value, torch.einsum("ij,ie->je", state.attention, found.error))
    assert_equal((state.attention * found.advantage).sum(1), torch.zeros_like(found.expected))
    visible = state.scores.isfinite()
    assert (found.scores[~visible] == 0).all()

    # The routing law is exact where scores are free: descent raises the score of every pair with an advantage.
    change = -0.1 * found.scores[visible]
    if not causal:
        assert torch.equal(change > 0, found.advantage[visible] > 0)
    moved = state.scores - 1e-3 * found.scores
    loss = F.cross_entropy(moved.softmax(1) @ state.value @ params.W_O, targets)
    assert loss < state.loss


def test_ignored_positions_send_no_error():
    params, targets = problem(3)
    targets[2] = -100
    found = gradients(params, forward(params, targets))
    assert (found.error[2] == 0).all()
    assert (found.scores[2] == 0).all()


def test_float32_stays_float32():
    params, targets = problem(0)
    single = Parameters(*(tensor.float() for tensor in vars(params).values()))
    found = gradients(single, forward(single, targets, LossWeights(label_smoothing=0.1)))
    assert {getattr(found, field.name).dtype for field in fields(found)} == {torch.float32}


def test_training_is_deterministic_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    first, second, other = train(20, seed=1), train(20, seed=1), train(20, seed=2)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.loss, second.loss)
    assert torch.equal(first.advantage, second.advantage)
    assert not torch.equal(first.loss, other.loss)


@pytest.mark.parametrize("seed", range(5))
def test_training_solves_the_task(seed):
    result = train(300, seed=seed)
    assert float(result.loss[-1]) < 0.2 * float(result.loss[0])
    assert result.probabilities[-1].argmax(1).tolist() == list(TASK)
    assert ((result.followed >= 0) & (result.followed <= 1)).all()


def test_training_equals_torch_sgd():
    result = train(50, lr=0.3, seed=0)
    weights = [tensor.clone().requires_grad_() for name, tensor in vars(result.start).items() if name != "x"]
    optimizer, losses, scores = torch.optim.SGD(weights, lr=0.3), [], []
    for _ in range(51):
        query, key, value = (result.start.x @ weight for weight in weights[:3])
        scores.append((query @ key.T / 2**0.5).detach())
        loss = F.cross_entropy(scores_to_output(query, key, value) @ weights[3], result.targets)
        losses.append(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert_equal(result.loss, torch.stack(losses))
    for found, step in zip(result.attention, scores, strict=True):
        assert_equal(found, step.softmax(1))
    agree = [((scores[k + 1] - scores[k]) * result.advantage[k] > 0).double().mean() for k in range(50)]
    assert_equal(result.followed, torch.stack(agree))


def scores_to_output(query, key, value):
    return F.scaled_dot_product_attention(query[None], key[None], value[None])[0]


def test_chosen_steps_are_the_same_as_all_steps():
    every, some = train(25, seed=3), train(25, seed=3, every=10)
    assert some.steps == (0, 10, 20, 25)
    assert torch.equal(some.loss, every.loss)
    for name in ("attention", "compatibility", "advantage", "values", "error", "probabilities"):
        assert torch.equal(getattr(some, name), getattr(every, name)[list(some.steps)])


def test_run_writes_picture_and_numbers(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    path = tmp_path / "new folder" / "toy.png"
    text = run(path, steps=60, seed=4)
    pixels = image.imread(path)
    assert min(pixels.shape[:2]) > 800
    assert len({tuple(pixel) for pixel in pixels[::7, ::7].reshape(-1, pixels.shape[2]).tolist()}) > 50

    data, result = json.loads(path.with_suffix(".json").read_text(encoding="utf-8")), train(60, seed=4)
    assert data["loss"] == result.loss.tolist()
    assert data["moments"][0]["advantage"] == result.advantage[0].tolist()
    assert data["moments"][-1]["values"] == result.values[-1].tolist()
    assert [moment["step"] for moment in data["moments"]] == [result.steps[index] for index in result.moments]
    found = data["summary"]
    assert found["advantage_std_largest"]["value"] == max(data["advantage_std"])
    assert found["score_changes_with_sign_of_advantage"]["mean"] == pytest.approx(float(result.followed.mean()))
    assert f"{found['loss'][0]:.4g} -> {found['loss'][1]:.4g}" in text
    assert f"{found['score_changes_with_sign_of_advantage']['first_step']:.0%} in the first step" in text
    assert str(path) in text


def test_drawing_leaves_the_users_matplotlib_style_alone(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    with matplotlib.rc_context({"font.size": 23.0}):
        before = dict(matplotlib.rcParams)
        draw(train(1), tmp_path / "toy.png")
        assert dict(matplotlib.rcParams) == before


def test_a_vanished_error_is_no_number(tmp_path):
    result = train(1)
    write_json(
        replace(result, error=torch.zeros_like(result.error), advantage=0 * result.advantage), tmp_path / "a.json"
    )
    assert json.loads((tmp_path / "a.json").read_text())["summary"]["relative_advantage_std"] == [None, None]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.zeros(4, dtype=torch.long), r"each of the 5 tokens, shape \[5\]; got shape \[4\]"),
        (torch.zeros(5), "float32"),
        (torch.full((5,), 4), "0 to 3 or ignore_index=-100"),
        (torch.full((5,), -100), "every target is ignored"),
    ],
)
def test_targets_that_cannot_work(targets, message):
    with pytest.raises(ConfigurationError, match=message):
        forward(problem(0)[0], targets)


@pytest.mark.parametrize("weights", [torch.ones(3), torch.tensor([1.0, -1.0, 1.0, 1.0])])
def test_class_weights_that_cannot_work(weights):
    params, targets = problem(0)
    with pytest.raises(ConfigurationError, match="class_weights must be 4 finite numbers"):
        forward(params, targets, LossWeights(class_weights=weights))


@pytest.mark.parametrize(
    ("options", "message"), [({"reduction": "none"}, "'mean' or 'sum'"), ({"label_smoothing": 1.5}, "label_smoothing")]
)
def test_loss_weights_that_cannot_work(options, message):
    with pytest.raises(ConfigurationError, match=message):
        LossWeights(**options)


def test_shapes_that_do_not_fit():
    with pytest.raises(ConfigurationError, match=r"W_O \[E, C\]; got .*W_O \[3, 4\]"):
        replace(problem(0)[0], W_O=torch.ones(3, 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -1}, "steps=-1"),
        ({"steps": 0}, "at least 1"),
        ({"every": 0}, "every=0"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"lr": 1e200}, "use a smaller lr"),
    ],
)
def test_training_options_that_cannot_work(options, message):
    with pytest.raises(ConfigurationError, match=message):
        train(**{"steps": 5, **options})


def test_places_that_cannot_be_written(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder.png").mkdir()
    result = train(1)
    for write, path in [
        (draw, tmp_path / "file" / "toy.png"),
        (draw, tmp_path / "folder.png"),
        (write_json, tmp_path / "file" / "toy.json"),
    ]:
        with pytest.raises(WriterError, match=r"cannot write .*writable folder"):
            write(result, path)
    with pytest.raises(ConfigurationError, match=r"must end in \.png"):
        run(tmp_path / "toy.json")


def test_missing_matplotlib_is_explained(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigurationError, match=r"attnprobe\[plots\]"):
        draw(train(1), tmp_path / "toy.png")


def test_importing_and_training_load_no_matplotlib():
    code = "import sys; from attnprobe.experiments import toy; toy.train(1); assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

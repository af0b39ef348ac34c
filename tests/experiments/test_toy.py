"""Training with hand-derived gradients, and what run() writes; the gradients themselves: ``test_closed_form``."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from attnprobe.errors import ConfigurationError, WriterError
from attnprobe.experiments.toy import TASK, run, train
from attnprobe.experiments.toy_figure import draw
from attnprobe.experiments.toy_report import write_json


def assert_equal(found, expected):
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= 1e-12 * max(1.0, float(expected.abs().max()))


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
    weights = [getattr(result.start, name).clone().requires_grad_() for name in ("W_Q", "W_K", "W_V", "W_O")]
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

    run(path, steps=60, seed=4)  # once more: still one run in TensorBoard
    assert len(list((tmp_path / "new folder" / "toy").iterdir())) == 1
    events = EventAccumulator(str(path.with_suffix("")), size_guidance={"scalars": 0, "images": 0}).Reload()
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(result.loss.tolist())
    spread = [event.value for event in events.Scalars("attention/advantage_std")]
    assert spread == pytest.approx(result.advantage_std.tolist())
    for name in ("attention", "compatibility", "advantage"):
        assert [event.step for event in events.Images(name)] == [result.steps[index] for index in result.moments]


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

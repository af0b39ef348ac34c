"""Arms: their names, and that a factor makes the part move so many times as far."""

import pytest
import torch

from attnprobe.errors import ConfigurationError
from attnprobe.experiments.ensemble.arms import RATE, Arm, parse
from attnprobe.experiments.ensemble.model import Architecture, Ensemble


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("sgd", "SGD"),
        ("v10", "SGD, V x10"),
        ("v5", "SGD, V x5"),
        ("qk10", "SGD, Q,K x10"),
        ("o10", "SGD, W_O x10"),
        ("all3.16", "SGD, everything x3.16"),
        ("momentum", "momentum 0.9"),
        ("adam", "Adam"),
        ("adamw-v10", "AdamW, V x10"),
        ("tuned", "SGD, rate 0.01"),
        ("tuned-adam-v10", "Adam, rate 0.01, V x10"),
    ],
)
def test_names(name, label):
    arm = Arm.of(name)
    assert arm.label == label
    assert arm.tuned == name.startswith("tuned")
    assert arm.rate == RATE


@pytest.mark.parametrize(
    "name",
    ["", "-", "v", "v0", "x10", "v10x", "v1.2.3", "lion", "v10-adam", "v-10", "sgd-", "sgdv10", "tuned-", "adam-sgd"],
)
def test_names_that_stand_for_nothing(name):
    with pytest.raises(ConfigurationError, match="no arm is called"):
        Arm.of(name)


def test_a_list():
    assert [arm.name for arm in parse("sgd, v10,sgd, sgd-v10,tuned-sgd")] == ["sgd", "v10", "tuned"]


@pytest.mark.parametrize(
    ("name", "fast"),
    [("v10", {"W_V"}), ("qk10", {"W_Q", "W_K"}), ("o10", {"W_O"}), ("all10", {"W_Q", "W_K", "W_V", "W_P", "W_O"})],
)
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "adamw"])
def test_a_factor_multiplies_the_steps_of_its_part(optimizer, name, fast):
    form = Architecture(4, 3, residual=True, layers=2)

    def moved(arm):
        model = Ensemble(form, (0,)).double()
        start = {key: value.clone() for key, value in model.named_parameters()}
        optimizer = arm.build(model)
        for seed in range(3):
            random = torch.Generator().manual_seed(seed)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=random, dtype=torch.float64)
            optimizer.step()
        return {key: (value - start[key]).detach() for key, value in model.named_parameters()}

    plain, multiplied = moved(Arm.of(optimizer)), moved(Arm.of(f"{optimizer}-{name}"))
    for key, step in plain.items():
        factor = 10 if key.rpartition(".")[2] in fast else 1
        # AdamW's weight decay acts on weights that have moved farther.
        tolerance = 1e-2 if optimizer == "adamw" else 1e-12
        torch.testing.assert_close(multiplied[key], factor * step, atol=tolerance * float(step.abs().max()), rtol=0)

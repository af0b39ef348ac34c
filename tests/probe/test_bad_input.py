"""What cannot work is an error that says so at once; what goes wrong in the loop is one warning."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import attnprobe as ap
from tests.probe.models import batch, loss_of, net, run

MINE = {"measure": lambda record: None}
OPTIONS = {
    "interval 0": ({"every_n_steps": 0}, "whole number of at least 1, got 0"),
    "interval True": ({"every_n_steps": True}, "whole number of at least 1, got True"),
    "interval 1.5": ({"every_n_steps": 1.5}, r"whole number of at least 1, got 1\.5"),
    "action": ({"action": "halt"}, "'record', 'warn' or 'stop', got 'halt'"),
    "statistic": ({"statistics": "entropi"}, "unknown statistic 'entropi'. Did you mean 'entropy'?"),
    "no statistic": ({"statistics": []}, "no statistic chosen"),
    "own without measure": ({"statistics": ap.Statistic("mine", "")}, "'mine' needs a measure= function"),
    "own per layer": ({"statistics": ap.Statistic("mine", "", level="layer", **MINE)}, "needs level='head'"),
    "own maximum": ({"statistics": ap.Statistic("mine", "", reduce="max", **MINE)}, "reduce='mean', 'root' or 'norm'"),
    "layers": ({"layers": "layer.0"}, "unknown layers pattern 'layer.0'. Did you mean 'layers.0'?"),
    "second layer": ({"layers": ["layers.*", "encoder"]}, "unknown layers pattern 'encoder'"),
    "layers number": ({"layers": 3}, "layers takes glob patterns of module names, got 3"),
    "layers numbers": ({"layers": [0, 1]}, "layers takes glob patterns"),
    "maps": ({"maps": "layers.7:0"}, "unknown maps pattern 'layers.7:0'"),
    "alarm": ({"alarms": "logit_explosions"}, "Did you mean 'logit_explosion'?"),
    "writer path": ({"writers": "runs/a"}, r"such as TensorBoardWriter\('runs/a'\); got 'runs/a'"),
    "writer Path": ({"writers": Path("runs")}, "write\\(report\\) and close\\(\\)"),
    "writer class": ({"writers": ap.MemoryWriter}, "a writer is an object"),
    "one of the writers": ({"writers": [ap.MemoryWriter(), None]}, "got None"),
    "scaler": ({"grad_scaler": 65536.0}, "grad_scaler needs get_scale"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_an_option_that_cannot_work_is_named(case):
    options, message = OPTIONS[case]
    with pytest.raises(ap.ConfigurationError, match=message):
        ap.AttentionProbe(net(), **options)


@pytest.mark.parametrize("case", ["statistic", "layers", "layers number", "maps", "alarm", "own per layer"])
def test_analyze_names_it_too(case):
    options, message = OPTIONS[case]
    with pytest.raises(ap.ConfigurationError, match=message):
        ap.analyze(net(), lambda: None, **options)


def test_a_model_is_a_module():
    for use in (ap.AttentionProbe, lambda model: ap.analyze(model, lambda: None)):
        with pytest.raises(ap.ConfigurationError, match=r"model must be an nn\.Module, got function"):
            use(loss_of)


@pytest.mark.parametrize("writer", [ap.JSONLWriter, ap.TensorBoardWriter])
def test_a_path_that_cannot_be_written(writer, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ap.WriterError, match="file is a file; pass another directory"):
        writer(tmp_path / "file" / "run")


def no_attention():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 4), nn.ReLU())


def missing_backward(probe, model):
    loss = loss_of(model, batch())
    return probe.step(loss)


def two_backwards(probe, model):
    loss = loss_of(model, batch())
    loss.backward(retain_graph=True)
    loss.backward()
    return probe.step(loss)


def loss_per_item(probe, model):
    loss = model(batch()).square().sum(1)
    loss.sum().backward()
    return probe.step(loss)


def loss_in_words(probe, model):
    loss_of(model, batch()).backward()
    return probe.step({"loss": 1.0})


def complex_loss(probe, model):
    loss_of(model, batch()).backward()
    return probe.step(torch.tensor(1 + 1j))


def empty_batch(probe, model):
    model.norm = nn.Identity()
    return run(probe, model, x=batch()[:0])[0]


def whole_step(probe, model):
    return run(probe, model)[0]


def partly_frozen():
    model = net()
    for parameter in model.layers[0].parameters():
        parameter.requires_grad_(False)
    return model


def frozen():
    return net().requires_grad_(False)


def frozen_step(probe, model):
    model(batch())
    return probe.step()


#: model, step -> why the report is not valid
STEPS = {
    "no attention": (
        no_attention,
        whole_step,
        "no softmax attention was seen. Looked for F.scaled_dot_product_attention",
    ),
    "no backward": (net, missing_backward, "no backward reached any attention call"),
    "no backward, partly frozen": (partly_frozen, missing_backward, "no backward reached any attention call"),
    "two backwards": (net, two_backwards, "backward ran more than once through the same forward pass"),
    "shape": (net, loss_per_item, r"the loss given to step() has shape [4] instead of being a scalar"),
    "words": (net, loss_in_words, "the loss given to step() is dict instead of a number"),
    "complex": (net, complex_loss, "the loss given to step() is Tensor instead of a number"),
    "empty": (net, empty_batch, "nothing was measured; layers.0: its input was empty"),
    "frozen": (frozen, frozen_step, "nothing was measured; layers.0: no gradient reaches it"),
}


@pytest.mark.parametrize("case", STEPS)
@pytest.mark.filterwarnings("ignore:attnprobe. layers:attnprobe.AttnProbeWarning")  # the layers' own reasons
def test_a_step_that_cannot_be_measured_is_one_warning(case):
    make, step, reason = STEPS[case]
    model, memory = make(), ap.MemoryWriter()
    with ap.AttentionProbe(model, every_n_steps=1, writers=memory) as probe:
        with pytest.warns(ap.AttnProbeWarning) as told:
            reports = [step(probe, model) for _ in range(3)]
        assert len([w for w in told if "probe not valid" in str(w.message)]) == 1
        assert len({str(w.message) for w in told}) == len(told)  # none is said twice
    for report in (*reports, *memory.reports):
        assert not report.valid
        assert reason in report.invalid


@pytest.mark.parametrize("case", STEPS)
def test_strict_raises_it(case):
    make, step, reason = STEPS[case]
    model = make()
    with (
        ap.AttentionProbe(model, strict=True) as probe,
        pytest.raises(ap.InvalidStepError) as raised,
    ):
        step(probe, model)
    assert reason in str(raised.value)


def test_after_an_invalid_step_the_next_is_measured():
    model = net()
    with ap.AttentionProbe(model, every_n_steps=1) as probe:
        with pytest.warns(ap.AttnProbeWarning):
            two_backwards(probe, model)
        assert whole_step(probe, model).valid


def test_layers_without_attention_are_told_apart_from_models_without():
    model = net()
    with pytest.raises(ap.NoAttentionError, match=r"layers other than 'layers\.0\.qkv' are not watched"):
        ap.analyze(model, lambda: loss_of(model, batch()), layers="layers.0.qkv")


def test_maps_that_name_no_head_are_told():
    model = net()
    report = ap.analyze(model, lambda: loss_of(model, batch()), maps=["layers.0.qkv", "layers.1:5", "layers.1:1"])
    assert [(m.layer, m.head) for m in report.maps] == [("layers.1", 1)]
    assert report.warnings == (
        "maps pattern 'layers.0.qkv' names no attention head; layers: layers.0, layers.1",
        "maps pattern 'layers.1:5' names no attention head; layers: layers.0, layers.1",
    )

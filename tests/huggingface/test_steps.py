"""What a step is, and which loss is its own: accumulation, custom losses, evaluation, precision, compiled models."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import Trainer, TrainerCallback

import attnprobe as ap
from tests.global_state import global_state
from tests.huggingface.training import LAYERS, Run, gpt2, sequences


def test_steps_and_losses_are_those_of_the_trainers_log(tmp_path):
    run = Run(tmp_path, max_steps=10).train()  # more than an epoch of 8
    assert run.steps == [*range(1, 11)]
    assert {report.step: report.loss for report in run.reports} == run.logged
    assert all(report.valid and report.layers == LAYERS for report in run.reports)


class KeepsOrder(Trainer):
    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


@pytest.mark.parametrize("per_token", [True, False])
def test_micro_batches_are_one_step(tmp_path, per_token):
    """Either all tokens of a step weigh the same, or all micro-batches do: what the optimizer sees."""

    class Weighing(KeepsOrder):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.model_accepts_loss_kwargs = per_token

    model, data = gpt2(), sequences(28)
    parts = [{k: torch.stack([s[k] for s in data[i : i + 4]]) for k in data[0]} for i in (0, 4, 8)]
    parts[0]["labels"][:, 5:] = -100
    for sequence, labels in zip(data, parts[0]["labels"], strict=False):
        sequence["labels"] = labels
    counts = [int((part["labels"][:, 1:] != -100).sum()) for part in parts]
    assert len({*counts}) > 1
    weights = [count / sum(counts) for count in counts] if per_token else [1 / 3] * 3
    expected = ap.analyze(
        model, lambda: sum(weight * model(**part).loss for weight, part in zip(weights, parts, strict=True))
    )
    run = Run(
        tmp_path,
        model=model,
        data=data,
        trainer=Weighing,
        gradient_accumulation_steps=3,
        max_steps=6,
        monitor={"statistics": "all"},
    ).train()
    assert run.steps == [*range(1, 7)]  # windows of 3, 3 and 1 batches, twice
    assert run.reports[0].loss == pytest.approx(expected.loss, rel=1e-6)
    for name, values in run.reports[0].statistics.items():
        torch.testing.assert_close(values, expected[name], rtol=1e-4, atol=1e-6, equal_nan=True, msg=name)
    assert {report.step: report.loss for report in run.reports} == run.logged


@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_n_counts_optimizer_steps(tmp_path, accumulate):
    run = Run(tmp_path, every=3, gradient_accumulation_steps=accumulate).train()
    assert run.steps == [1, 4, 7]


class Doubled(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(**inputs)
        return (2 * outputs.loss, outputs) if return_outputs else 2 * outputs.loss


def summed(outputs, labels, num_items_in_batch=None):
    logits = outputs["logits"][:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    "how",
    [{"label_smoothing_factor": 0.2}, {"trainer": Doubled}, {"options": {"compute_loss_func": summed}}],
    ids=["label smoothing", "compute_loss", "compute_loss_func"],
)
def test_the_loss_is_the_one_that_is_trained_on(tmp_path, how, accumulate):
    run = Run(tmp_path, gradient_accumulation_steps=accumulate, max_steps=4, **how).train()
    assert len(run.reports) == 4
    assert {report.step: report.loss for report in run.reports} == run.logged
    assert all(report.valid for report in run.reports)


def test_a_loss_that_is_nan_is_reported_as_such(tmp_path):
    class Broken(Trainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs) * (math.nan if self.state.global_step == 2 else 1)

    run = Run(tmp_path, trainer=Broken, max_steps=3, monitor={"action": "record"}).train()
    assert [math.isnan(report.loss) for report in run.reports] == [False, False, True]
    assert not math.isnan(run.logged[3])  # the trainer logs an average in its place
    assert "nonfinite" in {alarm.name for alarm in run.reports[2].alarms}


class Looking(TrainerCallback):
    """Whether something of the probe is active when an event comes."""

    def __init__(self):
        self.before = global_state()
        self.quiet = {"on_prediction_step": [], "on_step_begin": []}

    def on_prediction_step(self, args, state, control, **kwargs):
        self.quiet["on_prediction_step"].append(global_state() == self.before)

    def on_step_begin(self, args, state, control, **kwargs):
        self.quiet["on_step_begin"].append(global_state() == self.before)


def test_evaluation_and_checkpoints_in_between_change_nothing(tmp_path):
    between = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True, "save_strategy": "steps"}
    looking = Looking()
    plain = Run(tmp_path / "plain").train()
    mixed = Run(
        tmp_path / "mixed",
        callbacks=[looking],
        options={"eval_dataset": sequences(10)},
        save_steps=2,
        gradient_checkpointing=True,
        **between,
    ).train()
    assert looking.quiet == {"on_prediction_step": [True] * (2 * 5), "on_step_begin": [True] * 8}
    assert sum("eval_loss" in entry for entry in mixed.trainer.state.log_history) == 5
    assert plain.steps == mixed.steps == [*range(1, 9)]
    for a, b in zip(plain.reports, mixed.reports, strict=True):
        assert a.loss == b.loss
        torch.testing.assert_close(a["entropy"], b["entropy"], rtol=1e-6, atol=0)
        assert torch.equal(a["error_norm"], b["error_norm"])


def test_an_evaluation_inside_of_a_step_is_not_captured(tmp_path):
    class Curious(TrainerCallback):
        def on_substep_end(self, args, state, control, model=None, **kwargs):
            model(**batch).loss.backward()  # gradients of its own, on purpose
            states.append(global_state())

    batch, before, states = {k: v[None] for k, v in sequences(1)[0].items()}, global_state(), []
    plain = Run(tmp_path, gradient_accumulation_steps=2, max_steps=1).train()
    run = Run(tmp_path, gradient_accumulation_steps=2, max_steps=1, callbacks=[Curious()]).train()
    assert states == [before]
    assert run.reports[0].valid
    assert torch.equal(run.reports[0]["error_norm"], plain.reports[0]["error_norm"])


def test_a_dataset_that_ends_in_the_middle_of_a_step(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(sequences(12))

    looking = Looking()  # a callback after the monitor
    run = Run(tmp_path, data=Stream(), gradient_accumulation_steps=2, max_steps=3, callbacks=[looking]).train()
    assert run.steps == [1, 2, 3]
    assert all(report.valid for report in run.reports)
    assert looking.quiet["on_step_begin"] == [True] * 5  # two of them in vain
    assert run.reports[0].loss == run.logged[1]


def test_bf16(tmp_path):
    mixed, exact = (Run(tmp_path, bf16=bf16, monitor={"statistics": "all"}).train() for bf16 in (True, False))
    for a, b in zip(mixed.reports, exact.reports, strict=True):
        assert a.valid
        torch.testing.assert_close(a["entropy"], b["entropy"], rtol=0.01, atol=0)
        torch.testing.assert_close(a["error_norm"], b["error_norm"], rtol=0.05, atol=0)
    assert not torch.equal(mixed.reports[0]["error_norm"], exact.reports[0]["error_norm"])


def scaled(scale):
    """The Trainer makes a GradScaler on a GPU only."""

    class Scaling(Trainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, backoff_factor=1 / scale)

    return Scaling


def test_loss_scaling(tmp_path):
    # Without clipping, which accelerate would apply to gradients that it takes for unscaled outside of fp16.
    scaling, exact = (
        Run(tmp_path, trainer=trainer, max_grad_norm=0.0).train() for trainer in (scaled(2.0**10), Trainer)
    )
    assert scaling.trainer.accelerator.scaler.get_scale() == 2.0**10
    assert len(scaling.reports) == 8
    for a, b in zip(scaling.reports, exact.reports, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-6)
        torch.testing.assert_close(a["error_norm"], b["error_norm"], rtol=1e-4, atol=0)


def test_a_step_that_the_scaler_skips(tmp_path):
    run = Run(tmp_path, trainer=scaled(2.0**127), monitor={"strict": True}, max_grad_norm=0.0)
    run.trainer.compute_loss_func = lambda *args, **kwargs: 16 * summed(*args, **kwargs)  # overflows
    run.train()
    assert [report.invalid for report in run.reports] == ["the GradScaler skipped this step"] + [""] * 7
    assert not any(report.alarms for report in run.reports)


@pytest.mark.filterwarnings("ignore:Using `torch.compile\\(module\\)` when there are global hooks:UserWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo's own
def test_a_compiled_model_is_watched(tmp_path):
    torch._dynamo.reset()
    model, steps = gpt2(n_layer=1), {"every": 2, "max_steps": 4}
    run = Run(tmp_path, model=model, torch_compile=True, torch_compile_backend="aot_eager", **steps).train()
    counted = torch._dynamo.utils.counters["stats"]["calls_captured"]
    assert counted > 0  # the steps in between were compiled
    eager = Run(tmp_path, model=gpt2(n_layer=1), **steps).train()
    assert run.steps == eager.steps == [1, 3]
    for a, b in zip(run.reports, eager.reports, strict=True):
        assert a.layers == LAYERS[:1]
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
        torch.testing.assert_close(a["error_norm"], b["error_norm"], rtol=1e-3, atol=0)

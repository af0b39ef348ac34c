"""From the first step to the last: stopping, failing, resuming, training again."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import attnprobe as ap
from attnprobe.alarms import MaskViolation
from attnprobe.huggingface import AttentionMonitorCallback
from tests.global_state import global_state
from tests.huggingface.training import Run, Sharp, gpt2, said


def test_without_transformers_the_import_says_what_to_install():
    code = "import sys; sys.modules['transformers'] = None\nimport attnprobe.huggingface"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: attnprobe.huggingface needs transformers: pip install attnprobe[hf]" in done.stderr


@pytest.mark.parametrize(
    "options",
    [
        {"every_n_steps": 0},
        {"action": "halt"},
        {"statistics": "entropi"},
        {"alarms": "nonsense"},
        {"writers": "runs"},
        {"writers": ap.MemoryWriter},
    ],
)
def test_options_are_checked_when_the_monitor_is_made(options):
    with pytest.raises(ap.ConfigurationError):
        AttentionMonitorCallback(**options)


def test_layers_are_checked_before_training(tmp_path):
    run = Run(tmp_path, monitor={"layers": "encoder"})
    with pytest.raises(ap.UnknownNameError, match="unknown layers pattern 'encoder'"):
        run.train()
    assert run.trainer.state.global_step == 0


def test_a_trainer_takes_one_monitor(tmp_path):
    run = Run(tmp_path, callbacks=[AttentionMonitorCallback()])
    with pytest.raises(ap.ConfigurationError, match="takes one AttentionMonitorCallback"):
        run.train()


def test_events_of_something_else_are_refused(tmp_path):
    events = TrainingArguments(output_dir=str(tmp_path), use_cpu=True), TrainerState(), TrainerControl()
    with pytest.raises(ap.ConfigurationError, match=r"for transformers\.Trainer and its subclasses only"):
        AttentionMonitorCallback().on_train_begin(*events, model=gpt2())


def test_a_monitor_that_comes_in_late_waits_for_the_next_training(tmp_path):
    class Adding(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                run.trainer.add_callback(run.monitor)

    run = Run(tmp_path, watched=False, callbacks=[adding := Adding()], max_steps=3)
    run.train()
    assert run.steps == []
    run.trainer.remove_callback(adding)
    assert run.train().steps == [1, 2, 3]


class WithoutAttention(GPT2LMHeadModel):
    def forward(self, input_ids, labels=None, **kwargs):
        logits = self.lm_head(self.transformer.wte(input_ids))
        return {"loss": self.loss_function(logits, labels, self.config.vocab_size, **kwargs), "logits": logits}


def test_a_model_without_attention_is_one_warning(tmp_path):
    with pytest.warns(ap.AttnProbeWarning, match="no softmax attention was seen") as told:
        run = Run(tmp_path, model=WithoutAttention(gpt2().config)).train()
    assert len(said(told)) == 1
    assert run.trainer.state.global_step == 8
    assert {report.step: report.loss for report in run.reports} == run.logged


def test_strict_raises_instead(tmp_path):
    run = Run(tmp_path, model=WithoutAttention(gpt2().config), monitor={"strict": True})
    before = global_state()
    with pytest.raises(ap.InvalidStepError, match="no softmax attention was seen"):
        run.train()
    assert global_state() == before


@pytest.mark.parametrize(("action", "steps"), [("stop", 3), ("record", 8)])
def test_an_alarm_stops_the_training_if_asked_to(tmp_path, action, steps):
    run = Run(tmp_path, monitor={"alarms": Sharp(), "action": action, "layers": "transformer.h.0.attn"})
    if action == "stop":
        with pytest.warns(ap.AttnProbeWarning, match=r"sharp: transformer\.h\.0\.attn") as told:
            run.train()
        assert len(said(told)) == 1
    else:
        run.train()
    assert run.trainer.state.global_step == steps
    assert run.monitor.probe.should_stop == (action == "stop")


class Known(Sharp):
    """The same, but nothing to act on."""

    name = "known"
    severity = "information"


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_training_that_an_alarm_stops_ends_like_any_other(tmp_path, accumulate):
    ended = []

    class Watching(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            ended.append(state.global_step)

    run = Run(
        tmp_path / "run",
        every=2,
        max_steps=20,
        gradient_accumulation_steps=accumulate,
        callbacks=[Watching()],
        monitor={
            "alarms": Sharp(),
            "action": "stop",
            "layers": "transformer.h.0.attn",
            "writers": ap.JSONLWriter(tmp_path),
        },
        save_strategy="steps",
        save_steps=1,
    )
    before, methods = global_state(), {*vars(run.trainer)}
    with pytest.warns(ap.AttnProbeWarning, match=r"sharp: transformer\.h\.0\.attn"):
        output = run.trainer.train()
    assert global_state() == before
    assert "training_step" not in {*vars(run.trainer)} - methods
    assert ended == [5]
    assert output.global_step == run.trainer.state.global_step == 5  # the step of the alarm is the last
    assert sorted(run.logged) == [1, 2, 3, 4, 5]
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == [
        f"checkpoint-{step}" for step in range(1, 6)
    ]
    records = [json.loads(line) for line in (tmp_path / "attention.jsonl").read_text().splitlines()]
    assert [(record["step"], len(record["alarms"])) for record in records] == [(1, 0), (3, 0), (5, 1)]
    state = json.loads((tmp_path / "run" / "checkpoint-5" / "trainer_state.json").read_text())
    assert json.loads(state["stateful_callbacks"]["attnprobe"])["alarms"]["streaks"]["sharp"]
    assert not run.monitor.probe.active


def test_information_does_not_stop_the_training(tmp_path):
    run = Run(tmp_path, monitor={"alarms": Known(), "action": "stop"}).train()  # a warning would be an error
    assert run.trainer.state.global_step == 8
    assert [len(report.alarms) for report in run.reports] == [0, 0] + [2] * 6


def test_a_snoozed_alarm_stops_the_training_when_it_outlasts_the_snooze(tmp_path):
    class Snoozing(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 0:
                run.monitor.probe.snooze("sharp", steps=6)

    run = Run(
        tmp_path,
        monitor={"alarms": Sharp(), "action": "stop", "layers": "transformer.h.0.attn"},
        callbacks=[Snoozing()],
    )
    with pytest.warns(ap.AttnProbeWarning, match=r"sharp: transformer\.h\.0\.attn") as told:
        run.train()
    assert len(said(told)) == 1
    assert run.trainer.state.global_step == 7  # the snooze covers steps 1 to 6
    assert [alarm.snoozed for report in run.reports for alarm in report.alarms] == [True] * 4 + [False]


def test_all_alarms_of_a_causal_model(tmp_path):
    run = Run(tmp_path, monitor={"alarms": ["all", MaskViolation(causal=True)], "action": "record"}).train()
    assert "stalled_layer" not in [rule.name for rule in run.monitor.probe.engine.rules]
    assert all((report["future_mass"] == 0).all() for report in run.reports)
    assert all("head_similarity" in report for report in run.reports)
    assert not any(report.alarms for report in run.reports)


class Failure(Exception):
    pass


def make_fail(run, where, error):
    """Have the second step, which is probed too, raise until what is returned is called."""
    failing = [error]

    def fail(*args, **kwargs):
        if run.trainer.state.global_step == 1 and failing:
            raise failing[0]

    def compute_loss(*args, **kwargs):
        loss = type(run.trainer).compute_loss(run.trainer, *args, **kwargs)
        fail()
        return loss

    if where.startswith("on_"):
        run.trainer.add_callback(type("Failing", (TrainerCallback,), {where: fail}))
    elif where == "forward":
        run.model.transformer.h[1].mlp.register_forward_hook(fail)
    elif where == "backward":
        run.model.transformer.h[1].mlp.c_fc.weight.register_hook(fail)
    elif where == "optimizer":
        run.trainer.create_optimizer()
        run.trainer.optimizer.register_step_pre_hook(fail)
    else:
        run.trainer.compute_loss = compute_loss
    return failing.clear


@pytest.mark.parametrize("error", [Failure, KeyboardInterrupt])
@pytest.mark.parametrize(
    "where",
    ["on_step_begin", "forward", "compute_loss", "backward", "on_substep_end", "optimizer", "on_step_end"],
)
def test_an_exception_leaves_nothing_behind(tmp_path, where, error):
    run = Run(tmp_path, gradient_accumulation_steps=2, max_steps=3)
    repair = make_fail(run, where, error)
    before, methods = global_state(), {*vars(run.trainer)}
    with pytest.raises(error):
        run.train()
    assert global_state() == before
    assert run.steps == [1]
    first = run.monitor.probe
    repair()
    assert run.train().steps == [1, 1, 2, 3]  # afresh
    assert {report.step: report.loss for report in run.reports[1:]} == run.logged
    assert global_state() == before
    assert "training_step" not in {*vars(run.trainer)} - methods
    assert run.monitor.probe is not first


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_an_exception_under_activation_checkpointing(tmp_path, where, use_reentrant):
    kwargs = {"use_reentrant": use_reentrant}
    run = Run(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs)
    make_fail(run, where, Failure)
    before = global_state()
    with pytest.raises(Failure):
        run.train()
    assert global_state() == before
    assert run.steps == [1]


def test_a_smaller_batch_is_a_new_start(tmp_path):
    run = Run(tmp_path, auto_find_batch_size=True, max_steps=3)
    repair = make_fail(run, "on_pre_optimizer_step", RuntimeError("CUDA out of memory."))
    run.monitor.on_epoch_begin = lambda *args, **kwargs: repair() if run.steps else None
    assert run.train().steps == [1, 1, 2, 3]
    assert {report.step: report.loss for report in run.reports[1:]} == run.logged


def test_a_second_training_starts_afresh(tmp_path):
    run = Run(tmp_path, max_steps=4, monitor={"alarms": Sharp(), "action": "record"}).train()
    first = run.monitor.probe
    assert run.train().steps == [1, 2, 3, 4] * 2
    assert run.monitor.probe is not first
    new = [[alarm.new for alarm in report.alarms] for report in run.reports]
    assert new == [[], [], [True, True], [False, False]] * 2


SAVING = {"save_strategy": "steps", "save_steps": 4}
RESUMED = {"every": 3, "max_steps": 11, "monitor": {"alarms": Sharp(), "action": "record"}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("whole"), model=gpt2(dropout=0.1), **RESUMED, **SAVING).train()


@pytest.mark.parametrize("cut", [4, 8])
@pytest.mark.parametrize("restore", [False, True])
def test_a_resumed_run_goes_on_where_it_was(tmp_path, whole, cut, restore):
    start = f"{whole.trainer.args.output_dir}/checkpoint-{cut}"
    second = Run(tmp_path, model=gpt2(dropout=0.1), **RESUMED, restore_callback_states_from_checkpoint=restore).train(
        resume_from_checkpoint=start
    )
    assert whole.steps == [1, 4, 7, 10]
    assert second.steps == [step for step in whole.steps if step > cut]
    for a, b in zip(whole.reports[-len(second.reports) :], second.reports, strict=True):
        assert a.loss == b.loss
        assert a.layers == b.layers
        assert a.alarms == b.alarms  # raised at the third probe, new only there
        assert torch.equal(a["entropy"], b["entropy"])
    assert [len(report.alarms) for report in whole.reports] == [0, 0, 2, 2]
    assert second.monitor in second.trainer.callback_handler.callbacks
    assert second.monitor.probe.state_dict() == whole.monitor.probe.state_dict()


def test_checkpoints_hold_plain_values(whole):
    for steps, probed in ((4, 4), (8, 7)):
        text = Path(whole.trainer.args.output_dir, f"checkpoint-{steps}", "trainer_state.json").read_text()
        state = json.loads(json.loads(text)["stateful_callbacks"]["attnprobe"])
        assert (state["step"], state["count"], state["next"]) == (probed + 1, probed, probed + 2)


def test_a_checkpoint_without_the_monitor_resumes_with_it_and_the_other_way_round(tmp_path):
    def go_on(name, start, stop, watched):
        run = Run(tmp_path / name, every=3, max_steps=stop, watched=watched, **SAVING)
        return run.train(resume_from_checkpoint=start and str(tmp_path / start))

    assert go_on("without", None, 4, watched=False).steps == []
    begun = go_on("begun", "without/checkpoint-4", 8, watched=True)
    assert begun.steps == [5, 8]
    assert go_on("ended", "begun/checkpoint-8", 12, watched=False).steps == []
    assert go_on("again", "ended/checkpoint-12", 15, watched=True).steps == [13]  # 11 was missed


def test_nothing_holds_on_to_a_training_that_has_ended(tmp_path):
    run = Run(tmp_path, max_steps=2).train()
    assert run.monitor._trainer is None
    trainer, model = weakref.ref(run.trainer), weakref.ref(run.model)
    del run
    gc.collect()
    assert (trainer(), model()) == (None, None)

"""ValueScheduleCallback: the optimizer that the Trainer makes gets the schedule, and a resumed training the same."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn, optim
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from attnprobe.errors import AttnProbeWarning, ConfigurationError, ScheduleError
from attnprobe.huggingface import AttentionMonitorCallback, ValueScheduleCallback
from tests.huggingface.training import QUIET, TOKENS, VOCABULARY, gpt2, sequences
from tests.schedules.fused import Split

THIRDS = torch.arange(48) // 16
LEAVES = (("weight", 1), ("bias", 0))
ROLES = {f"transformer.h.{i}.attn.c_attn.{leaf}": (axis, THIRDS) for i in (0, 1) for leaf, axis in LEAVES}


def trainer_of(directory: Path, model: Any, *callbacks: Any, options: Any = None, **arguments: Any) -> Trainer:
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(directory), **QUIET | arguments),
        train_dataset=sequences(),
        callbacks=[*callbacks],
        **options or {},
    )


def equal(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def test_equal_to_split_weights(tmp_path: Path) -> None:
    model = gpt2().double()
    split = Split(model, ROLES)
    settings = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "lr_scheduler_type": "cosine"}
    settings |= {"warmup_steps": 2, "remove_unused_columns": False}
    callback = ValueScheduleCallback()  # on the model's own dummy inputs
    trainer = trainer_of(tmp_path, model, callback, **settings)
    trainer.train()
    assert callback.schedule.names == tuple(ROLES)
    assert not trainer.optimizer.optimizer._optimizer_step_pre_hooks
    other = optim.AdamW(split.groups(1e-3, 10.0), lr=1e-3, weight_decay=0.0)
    trainer_of(tmp_path, split, options={"optimizers": (other, None)}, **settings).train()
    assert max(split.distances(model).values()) < 1e-12


def test_a_confirmation_of_ones_own_and_separate_weights(tmp_path: Path) -> None:
    asked = []

    def confirm(model: Any) -> Any:
        asked.append(model)
        return model(input_ids=sequences(1)[0]["input_ids"][None])

    one, other = gpt2(0.1), gpt2(0.1)
    trainer_of(tmp_path, one, ValueScheduleCallback(4.0, confirm=confirm)).train()
    trainer_of(tmp_path, other, ValueScheduleCallback(4.0)).train()
    assert asked == [one]
    assert equal(one, other)
    size = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = LlamaForCausalLM(
        LlamaConfig(**size, intermediate_size=16, max_position_embeddings=TOKENS, bos_token_id=0, eos_token_id=0)
    )
    callback = ValueScheduleCallback()
    trainer_of(tmp_path, llama, callback, max_steps=1).train()
    assert callback.schedule.names == ("model.layers.0.self_attn.v_proj.weight",)


def test_resumed(tmp_path: Path) -> None:
    straight, second = gpt2(0.1), gpt2(0.1)
    saving = {"save_strategy": "steps", "save_steps": 4}
    trainer_of(tmp_path, straight, ValueScheduleCallback(), **saving).train()
    half = str(tmp_path / "checkpoint-4")
    trainer_of(tmp_path / "b", second, ValueScheduleCallback()).train(resume_from_checkpoint=half)
    assert equal(straight, second)
    with pytest.warns(AttnProbeWarning, match=r"multiplier 10\.0; from here on 3\.0 is in force"):
        trainer_of(tmp_path / "c", gpt2(), ValueScheduleCallback(3.0)).train(resume_from_checkpoint=half)
    only = ValueScheduleCallback(parameters="*.h.0.attn.c_attn.*")
    with pytest.warns(AttnProbeWarning, match="other value weights"):
        trainer_of(tmp_path / "d", gpt2(), only).train(resume_from_checkpoint=half)
    trainer_of(tmp_path / "e", gpt2()).train(resume_from_checkpoint=half)  # without the callback


def test_a_checkpoint_without_a_schedule_and_a_monitor(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 4}
    trainer_of(tmp_path, gpt2(), **saving).train()
    half = str(tmp_path / "checkpoint-4")
    one, other = gpt2(), gpt2()
    trainer_of(tmp_path / "b", one, ValueScheduleCallback()).train(resume_from_checkpoint=half)
    callbacks = (AttentionMonitorCallback(1, action="record"), ValueScheduleCallback())
    trainer_of(tmp_path / "c", other, *callbacks).train(resume_from_checkpoint=half)
    assert equal(one, other)


def test_trained_twice_in_one_process(tmp_path: Path) -> None:
    class Fails(ValueScheduleCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2 and not hasattr(self, "failed"):
                self.failed = True
                raise RuntimeError("stop")

    callback = Fails()
    trainer = trainer_of(tmp_path, gpt2(), callback, max_steps=4)
    with pytest.raises(RuntimeError, match="stop"):
        trainer.train()
    trainer.train()
    assert not trainer.optimizer.optimizer._optimizer_step_pre_hooks


def test_refusals(tmp_path: Path) -> None:
    model = copy.deepcopy(gpt2())
    type(model).dummy_inputs, kept = property(lambda self: {"pixel_values": torch.ones(1)}), type(model).dummy_inputs
    try:
        with pytest.raises(ScheduleError, match=r"GPT2LMHeadModel does not run on its own dummy_inputs.*Pass confirm="):
            trainer_of(tmp_path, model, ValueScheduleCallback()).train()
    finally:
        type(model).dummy_inputs = kept
    with pytest.raises(ConfigurationError, match="multiplier"):
        ValueScheduleCallback(-1.0)
    with pytest.raises(ScheduleError, match="Adafactor is not supported"):
        trainer_of(tmp_path, gpt2(), ValueScheduleCallback(), optim="adafactor").train()

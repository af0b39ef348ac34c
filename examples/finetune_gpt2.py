"""A small GPT-2 with random weights learns the text of Python's own help pages, trained with the Hugging Face Trainer.

    python examples/finetune_gpt2.py
    tensorboard --logdir runs/finetune_gpt2

Statistics of all heads go into the trainer's own TensorBoard event file. At the end: what became of each head.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from attnprobe import MemoryWriter, StepReport
from attnprobe.huggingface import AttentionMonitorCallback
from attnprobe.writers.console import table

CONTEXT, WIDTH, HEADS, LAYERS = 64, 64, 4, 2
COLUMNS = ("normalized_entropy", "max_weight", "self_mass", "sink_mass", "mean_distance")


class Windows(Dataset[dict[str, Tensor]]):
    """Pieces of a text; neighbours begin ``stride`` characters apart."""

    def __init__(self, text: Tensor, stride: int) -> None:
        self.pieces = text.unfold(0, CONTEXT, stride)

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.pieces[index], "labels": self.pieces[index]}


def unigram_entropy(text: Tensor) -> float:
    """Nats per character: no model that ignores the context can have a lower loss on this text."""
    share = text.bincount().double() / len(text)
    return -float(torch.special.xlogy(share, share).sum())


def describe(first: StepReport, last: StepReport) -> str:
    """The head whose attention became sharpest: where it looked, and where it looks now."""
    change = last["normalized_entropy"] - first["normalized_entropy"]
    layer, head = divmod(int(change.argmin()), HEADS)
    lines = [f"{last.layers[layer]} head {head}"]
    # Attention spread evenly over the characters so far, the present one included.
    even = {"self_mass": sum(1 / n for n in range(1, CONTEXT + 1)) / CONTEXT, "mean_distance": (CONTEXT - 1) / 4}
    meanings = {
        "normalized_entropy": "normalised entropy, 1 if spread evenly",
        "max_weight": "largest weight of a character, on average",
        "self_mass": f"attention to the character itself, {even['self_mass']:.2g} if spread evenly",
        "mean_distance": f"distance of what it reads, in characters, {even['mean_distance']:.3g} if spread evenly",
    }
    for name, meaning in meanings.items():
        before, now = (float(report[name][layer, head]) for report in (first, last))
        lines.append(f"  {before:5.2f} -> {now:5.2f}  {meaning}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help="training steps (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="pieces of text per step (default: %(default)s)")
    parser.add_argument("--logdir", type=Path, default=Path("runs/finetune_gpt2"), help="default: %(default)s")
    options = parser.parse_args(argv)
    if options.steps < 1:
        parser.error("--steps must be at least 1")
    set_seed(0)

    text = "\n".join(topics.values())
    alphabet = {character: index for index, character in enumerate(sorted(set(text)))}
    encoded = torch.tensor([alphabet[character] for character in text])
    training, held_out = encoded[: len(text) * 9 // 10], encoded[len(text) * 9 // 10 :]

    config = GPT2Config(
        vocab_size=len(alphabet),
        n_positions=CONTEXT,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        initializer_range=0.1,  # GPT-2's 0.02 is meant for a width of 768
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )
    reports = MemoryWriter()
    monitor = AttentionMonitorCallback(
        every_n_steps=25,
        statistics=["core", "self_mass", "mean_distance"],
        maps="transformer.h.*",
        writers=reports,
        uninformed_loss=unigram_entropy(training),
    )
    trainer = Trainer(
        model=GPT2LMHeadModel(config),
        args=TrainingArguments(
            output_dir=str(options.logdir),
            report_to="tensorboard",
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=64,
            learning_rate=6e-3,
            warmup_steps=options.steps // 20,
            logging_steps=50,
            eval_strategy="steps",  # an evaluation after the training would open a second event file
            eval_steps=max(1, options.steps // 3),
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=Windows(training, stride=7),
        eval_dataset=Windows(held_out, stride=CONTEXT),
        callbacks=[monitor],
    )
    trainer.train()

    first, last = reports.reports[0], reports.reports[-1]
    held_out_loss = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry][-1]
    print(f"\nEvery head at step {first.step} -> step {last.step}:\n{table(first, last, COLUMNS)}")
    print(f"\nThe head whose attention sharpened most: {describe(first, last)}")
    bits = 1 / math.log(2)
    print(f"\nLoss in bits per character, of {len(alphabet)} different ones:")
    print(f"  {first.loss * bits:.2f} -> {last.loss * bits:.2f}  training batch")
    print(f"  {held_out_loss * bits:.2f}  held-out text")
    print(f"  {unigram_entropy(held_out) * bits:.2f}  unigram entropy of the held-out text: the least without context")
    print(f"\nWritten to {options.logdir}. To look at it:\n  tensorboard --logdir {options.logdir}")


if __name__ == "__main__":
    main()

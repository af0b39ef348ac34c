"""A character-level transformer on the text of Python's own help pages, trained with Lightning, watched by head.

    python examples/lightning_text.py
    tensorboard --logdir runs/lightning_text

Statistics of all heads go to the trainer's TensorBoardLogger and, one line per probe, to ``attention.jsonl``.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from attnprobe import AttentionRecord, JSONLWriter, MemoryWriter, Statistic, StepReport
from attnprobe.lightning import AttentionMonitor
from attnprobe.writers.console import table

CONTEXT, WIDTH, HEADS, LAYERS = 128, 64, 4, 2


class CausalSelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, width]`` -> ``[B, T, width]``."""
        query, key, value = self.qkv(x).unflatten(-1, (3, HEADS, WIDTH // HEADS)).permute(2, 0, 3, 1, 4)
        context = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(context.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(WIDTH), CausalSelfAttention()
        self.mlp_norm = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class CharacterModel(pl.LightningModule):
    """Predicts each character from the ones before it."""

    def __init__(self, characters: int, learning_rate: float = 5e-3) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.tokens = nn.Embedding(characters, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.2)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, characters)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[B, T]`` -> logits ``[B, T, characters]``."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self._loss("train_loss", batch)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self._loss("val_loss", batch)

    def _loss(self, name: str, batch: Tensor) -> Tensor:
        loss = F.cross_entropy(self(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        self.log(name, loss, prog_bar=True, batch_size=len(batch))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


class Windows(Dataset[Tensor]):
    """Pieces of a text, one character longer than the context; neighbours begin ``stride`` characters apart."""

    def __init__(self, text: Tensor, stride: int) -> None:
        self.pieces = text.unfold(0, CONTEXT + 1, stride)

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> Tensor:
        return self.pieces[index]


def unigram_entropy(text: Tensor) -> float:
    """Nats per character: no model that ignores the context can have a lower loss on this text."""
    share = text.bincount().double() / len(text)
    return -float(torch.special.xlogy(share, share).sum())


def previous_share(record: AttentionRecord) -> tuple[Tensor, Tensor]:
    """A statistic of our own, from queries and keys ``[B, H, T, D]``: attention to the character just before."""
    scores = record.scale * record.query @ record.key.mT
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    weights = scores.masked_fill(future, -math.inf).softmax(-1)
    previous = weights.diagonal(-1, dim1=-2, dim2=-1).movedim(1, 0).flatten(1)  # [H, B * (T - 1)]
    return previous.sum(1), torch.full((len(previous),), previous.shape[1])


COLUMNS = ("normalized_entropy", "previous_share", "self_mass", "sink_mass", "mean_distance")


def describe(report: StepReport) -> str:
    """Which heads stand out, next to what attention spread evenly over all characters so far would give."""
    position = torch.arange(1, CONTEXT)  # without the first character, which has nothing to choose from
    share, distance = float((1 / (position + 1)).mean()), float((position / 2).mean())
    meanings = {
        "previous_share": ("attention to the previous character", share),
        "self_mass": ("attention to the character itself", share),
        "sink_mass": ("attention to the first character", share),
        "mean_distance": ("distance of what is read, in characters", distance),
    }
    lines = []
    for name, (meaning, even) in meanings.items():
        ranked = sorted((row[name], f"{row['layer']} head {row['head']}") for row in report.rows())
        (low, lowest), (high, highest) = ranked[0], ranked[-1]
        lines.append(f"  {meaning}: {low:.3g} ({lowest}) to {high:.3g} ({highest}), {even:.3g} if spread evenly")
    heads = [f"{row['layer']} head {row['head']}" for row in report.rows() if row["previous_share"] > 0.5]
    lines.append(f"  previous-character heads (more than half of their attention): {', '.join(heads) or 'none'}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="training steps (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="pieces of text per step (default: %(default)s)")
    parser.add_argument("--logdir", type=Path, default=Path("runs/lightning_text"), help="default: %(default)s")
    options = parser.parse_args(argv)
    if options.steps < 1:
        parser.error("--steps must be at least 1")
    pl.seed_everything(0, verbose=False)

    text = "\n".join(topics.values())
    alphabet = {character: index for index, character in enumerate(sorted(set(text)))}
    encoded = torch.tensor([alphabet[character] for character in text])
    training, held_out = encoded[: len(text) * 9 // 10], encoded[len(text) * 9 // 10 :]
    batches = DataLoader(Windows(training, stride=1), options.batch_size, shuffle=True)
    checks = DataLoader(Windows(held_out, stride=CONTEXT), batch_size=64)

    logger = TensorBoardLogger(options.logdir, name="")  # every run in a directory of its own, version_0, 1, ...
    reports = MemoryWriter()
    monitor = AttentionMonitor(
        every_n_steps=25,
        statistics=[
            "core",
            "self_mass",
            "mean_distance",
            Statistic("previous_share", "Attention to the token just before.", unit="share", measure=previous_share),
        ],
        maps="blocks.*",
        writers=[reports, JSONLWriter(logger.log_dir)],
        uninformed_loss=unigram_entropy(training),
    )
    trainer = pl.Trainer(
        max_steps=options.steps,
        val_check_interval=max(1, options.steps // 3),
        check_val_every_n_epoch=None,
        log_every_n_steps=10,
        accelerator="cpu",
        logger=logger,
        callbacks=[monitor],
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    model = CharacterModel(len(alphabet))
    trainer.fit(model, batches, checks)

    first, last = reports.reports[0], reports.reports[-1]
    print(f"\nEvery head at step {first.step} -> step {last.step}:\n{table(first, last, COLUMNS)}")
    print(f"\nHow the heads differ at step {last.step}:\n{describe(last)}")
    bits = 1 / math.log(2)
    print(f"\nLoss in bits per character, of {len(alphabet)} different ones:")
    print(f"  {last.loss * bits:.2f}  training batch of step {last.step}")
    print(f"  {trainer.callback_metrics['val_loss'] * bits:.2f}  held-out text")
    print(f"  {unigram_entropy(held_out) * bits:.2f}  unigram entropy of the held-out text: the least without context")
    print(f"\nWritten to {logger.log_dir}. To look at it:\n  tensorboard --logdir {options.logdir}")


if __name__ == "__main__":
    main()

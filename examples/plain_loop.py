"""A small vision transformer on scikit-learn's handwritten digits, in a plain PyTorch loop with an AttentionProbe.

    python examples/plain_loop.py
    tensorboard --logdir runs/plain_loop

The heads are those of ``nn.TransformerEncoder``, the loop's own curves and the probe's share one event file.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split
from torch.utils.tensorboard import SummaryWriter

from attnprobe import AttentionProbe, ConsoleWriter, TensorBoardWriter

WIDTH, HEADS, LAYERS, CLASSES = 32, 4, 2, 10


class VisionTransformer(nn.Module):
    """Classifies images of 8 x 8 pixels from their 16 patches of 2 x 2."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Linear(4, WIDTH)
        self.positions = nn.Parameter(0.1 * torch.randn(16, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, LAYERS, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.classes = nn.Linear(WIDTH, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """``[B, 8, 8]`` -> logits ``[B, 10]``."""
        patches = images.unfold(1, 2, 2).unfold(2, 2, 2).reshape(-1, 16, 4)
        return self.classes(self.encoder(self.patches(patches) + self.positions).mean(1))


@torch.no_grad()
def accuracy(model: nn.Module, loader: DataLoader[tuple[Tensor, ...]]) -> float:
    model.eval()
    right = [model(images).argmax(1) == labels for images, labels in loader]
    model.train()
    return float(torch.cat(right).double().mean())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20, help="passes over the training images (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="images per step (default: %(default)s)")
    parser.add_argument(
        "--logdir", type=Path, default=Path("runs/plain_loop"), help="a new one for every run (default: %(default)s)"
    )
    options = parser.parse_args(argv)
    if options.epochs < 1:
        parser.error("--epochs must be at least 1")
    torch.manual_seed(0)

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / 16
    dataset = TensorDataset(images, torch.tensor(digits.target))
    training, held_out = random_split(dataset, [0.8, 0.2])
    batches = DataLoader(training, options.batch_size, shuffle=True)
    checks = DataLoader(held_out, batch_size=512)

    model = VisionTransformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    step = 0
    with (
        SummaryWriter(options.logdir) as events,
        AttentionProbe(
            model,
            every_n_steps=50,
            maps="encoder.layers.1.self_attn:0",
            writers=[TensorBoardWriter(events), ConsoleWriter(sys.stdout, table=True, every=6)],
            action="record",  # the ConsoleWriter prints new alarms: no need to warn as well
            uninformed_loss=math.log(CLASSES),
        ) as probe,
    ):
        for epoch in range(options.epochs):
            for batch, labels in batches:
                loss = F.cross_entropy(model(batch), labels)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                probe.step(loss)
                events.add_scalar("train/loss", loss.detach(), step)
                step += 1
            share = accuracy(model, checks)  # without gradients: the probe takes no notice
            events.add_scalar("held_out/accuracy", share, step - 1)
            if epoch % 5 == 4 or epoch + 1 == options.epochs:
                print(f"epoch {epoch + 1}: accuracy {share:.1%} on {len(held_out)} held-out digits")

    print(f"\nWritten to {options.logdir}. To look at it:\n  tensorboard --logdir {options.logdir}")


if __name__ == "__main__":
    main()

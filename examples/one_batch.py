"""Every head of a model on one batch, as in a notebook: ``attnprobe.analyze``.

    python examples/one_batch.py

The model writes its attention out by hand, softmax and all. It learns, unwatched, to repeat a random sequence, and
is stopped half way; then one call shows how its heads do that, and a picture shows the head that matters most.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnprobe
from attnprobe.report import HeadMap
from attnprobe.writers.console import table

SYMBOLS, LENGTH, WIDTH, HEADS, LAYERS = 16, 16, 64, 4, 2


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, width]`` -> ``[B, T, width]``."""
        split = (HEADS, WIDTH // HEADS)
        query, key, value = (f(x).unflatten(-1, split).transpose(1, 2) for f in (self.query, self.key, self.value))
        scores = query @ key.transpose(-1, -2) / math.sqrt(split[1])
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(future, -math.inf).softmax(-1)
        return self.out((weights @ value).transpose(1, 2).flatten(2))


class Repeater(nn.Module):
    """Attention only: two residual layers between embedding and readout."""

    def __init__(self) -> None:
        super().__init__()
        self.symbols = nn.Embedding(SYMBOLS, WIDTH)
        self.positions = nn.Embedding(2 * LENGTH, WIDTH)
        self.layers = nn.ModuleList(Attention() for _ in range(LAYERS))
        self.readout = nn.Linear(WIDTH, SYMBOLS)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[B, T]`` -> logits ``[B, T, symbols]``."""
        x = self.symbols(tokens) + self.positions.weight[: tokens.shape[1]]
        for layer in self.layers:
            x = x + layer(x)
        return self.readout(x)


def repeated_sequences(batch: int) -> Tensor:
    """``[B, 2 * LENGTH]``: random symbols, and the same ones again."""
    return torch.randint(SYMBOLS, (batch, LENGTH)).repeat(1, 2)


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Cross-entropy of the second half, the part that can be known."""
    logits = model(tokens[:, :-1])[:, LENGTH - 1 :]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, LENGTH:].flatten())


def draw(picture: HeadMap, path: Path) -> None:
    """The three maps of a head side by side; needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    figure.suptitle(f"{picture.layer}, head {picture.head}, on the first sequence of the batch")
    maps = {"attention": picture.attention, "compatibility b": picture.compatibility, "advantage A": picture.advantage}
    for axes, (title, values) in zip(figure.subplots(1, 3), maps.items(), strict=True):
        if title == "attention":
            image = axes.imshow(values, cmap="viridis", vmin=0)
        else:  # signed: zero is white
            limit = float(values.nan_to_num(0).abs().max())
            image = axes.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit)
        axes.set(title=title, xlabel="key", ylabel="query")
        figure.colorbar(image, ax=axes, shrink=0.8)
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="training steps beforehand (default: %(default)s)")
    parser.add_argument("--logdir", type=Path, default=Path("runs/one_batch"), help="default: %(default)s")
    options = parser.parse_args(argv)
    torch.manual_seed(0)

    model = Repeater()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(options.steps):
        loss_of(model, repeated_sequences(64)).backward()
        optimizer.step()
        optimizer.zero_grad()

    tokens = repeated_sequences(64)
    report = attnprobe.analyze(model, lambda: loss_of(model, tokens), maps="*")
    left = sum(parameter.grad is not None for parameter in model.parameters())
    print(f"loss {report.loss:.3f} (knowing nothing: {math.log(SYMBOLS):.3f}); gradients left on the model: {left}")

    frame = report.to_frame()
    if isinstance(frame, list):  # without pandas
        print(table(None, report, ("normalized_entropy", "max_weight", "mean_distance", "head_importance")))
    else:
        print(frame.drop(columns="step").set_index(["layer", "head"]).T.to_string(float_format="{:.3g}".format))

    best = max(report.rows(), key=lambda row: row["head_importance"])
    [picture] = [m for m in report.maps if (m.layer, m.head) == (best["layer"], best["head"])]
    weight = float(picture.attention[LENGTH - 1 :].diagonal().mean())  # [queries, keys], up to 64 of each unpooled
    print(f"\nmost important: {picture.layer} head {picture.head}. To repeat a symbol, a query has to read the key")
    print(f"{LENGTH - 1} before it: in the first sequence these get {weight:.0%} of that head's attention on average")
    path = options.logdir / "head.png"
    options.logdir.mkdir(parents=True, exist_ok=True)
    try:
        draw(picture, path)
    except ImportError:
        print("no picture: it needs matplotlib")
    else:
        print(f"its maps: {path}")


if __name__ == "__main__":
    main()

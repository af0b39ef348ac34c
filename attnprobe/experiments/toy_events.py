"""The toy's curves and maps in TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from attnprobe.experiments.toy_report import writing

if TYPE_CHECKING:
    from attnprobe.experiments.toy import Trajectory

#: Tells the toy's files from those of others.
SUFFIX = ".toy"
#: Pixels of a matrix entry.
ZOOM = 32


def write_events(result: Trajectory, directory: Path) -> None:
    """Scalars of every recorded step, and the maps at the moments that the picture shows, as one event file.

    Raises:
        WriterError: ``directory`` cannot be written.
    """
    with writing(directory / "events"):
        for old in directory.glob(
            f"events.out.tfevents.*{SUFFIX}"
        ):  # of the run that is being replaced, as the picture
            old.unlink()
        board = SummaryWriter(str(directory), filename_suffix=SUFFIX)
    with board:
        curves = {"advantage_std": result.advantage_std, "normalized_entropy": result.normalized_entropy}
        for index, step in enumerate(result.steps):
            board.add_scalar("loss", float(result.loss[step]), step)
            for name, values in curves.items():
                board.add_scalar(f"attention/{name}", float(values[index]), step)
        for name in ("attention", "compatibility", "advantage"):
            matrices = getattr(result, name)
            largest = matrices[list(result.moments)].abs().max().clamp_min(1e-12)
            for index in result.moments:
                board.add_image(name, _picture(matrices[index] / largest), result.steps[index])


def _picture(matrix: Tensor) -> Tensor:
    """``[3, rows, columns]`` of values in [-1, 1]: orange above 0, violet below, white at 0."""
    strength = matrix.abs()[None]
    above, below = (torch.tensor(color)[:, None, None] for color in ((0.70, 0.35, 0.02), (0.33, 0.15, 0.53)))
    picture = 1 - strength * (1 - torch.where(matrix[None] > 0, above, below))
    return picture.repeat_interleave(ZOOM, 1).repeat_interleave(ZOOM, 2).float()

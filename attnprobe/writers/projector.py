"""Value vectors for TensorBoard's embedding projector."""

from __future__ import annotations

import hashlib
import importlib
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from attnprobe.report import HeadMap

# Protobuf ships no type information, and not every checker has stubs for it.
text_format: Any = importlib.import_module("google.protobuf.text_format")

_CONFIG = "projector_config.pbtxt"


def write_values(summary_writer: Any, picture: HeadMap, step: int) -> None:
    """Add the head's value vectors, labelled with their positions; vectors that hold NaN or Inf are left out.

    Args:
        summary_writer: a ``torch.utils.tensorboard.SummaryWriter`` with a local log directory.
    """
    values = picture.values.double().numpy()
    finite = np.isfinite(values).all(axis=1)
    if not finite.any():
        return
    directory = Path(summary_writer.get_logdir())
    before = _read(directory / _CONFIG)
    summary_writer.add_embedding(
        _short(values[finite]),
        metadata=[str(position) for position, keep in zip(picture.positions, finite, strict=True) if keep],
        tag=_free_tag(directory / f"{step:05d}", f"{picture.layer}.head{picture.head}"),
        global_step=step,
    )
    # A SummaryWriter writes the whole index anew and knows only its own entries: put back those of an earlier run.
    after = _read(directory / _CONFIG)
    lost = [entry for entry in before.embeddings if entry not in after.embeddings]
    if lost:
        with (directory / _CONFIG).open("a", encoding="utf-8") as file:
            file.write(text_format.MessageToString(ProjectorConfig(embeddings=lost)))


def _free_tag(directory: Path, name: str) -> str:
    """A directory name that stands for ``name`` and is not taken: a resumed run may come to the same step again."""
    safe = re.sub(r"[^A-Za-z0-9_.-]", "_", name)
    if safe != name or len(safe) > 120:
        safe = f"{safe[-100:]}-{hashlib.sha256(name.encode('utf-8', 'backslashreplace')).hexdigest()[:8]}"
    tag, count = safe, 1
    while (directory / tag).exists():
        count += 1
        tag = f"{safe}-{count}"
    return tag


def _short(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Five digits of the largest value: the files are text, and the eye needs no more."""
    largest = float(np.abs(values).max(initial=0.0))
    return np.round(values, 4 - math.floor(math.log10(largest))) if largest > 1e-300 else values


def _read(config: Path) -> Any:
    text = config.read_text(encoding="utf-8") if config.exists() else ""
    return text_format.Parse(text, ProjectorConfig(), allow_unknown_field=True)

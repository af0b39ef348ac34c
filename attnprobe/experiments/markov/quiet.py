"""Lightning without its remarks on hardware and workers, and with a bar that names the run."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

from pytorch_lightning.callbacks import TQDMProgressBar

from attnprobe.errors import AttnProbeWarning


class Progress(TQDMProgressBar):  # type: ignore[misc]
    """Lightning's bar, with the arm's name in front."""

    def __init__(self, name: str) -> None:
        super().__init__(refresh_rate=50)
        self.name = name

    def on_train_epoch_start(self, trainer: Any, *_: Any) -> None:
        super().on_train_epoch_start(trainer)
        self.train_progress_bar.set_description(self.name)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing below an error is logged, and only attnprobe warns."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", AttnProbeWarning)
        try:
            yield
        finally:
            logging.disable(disabled)

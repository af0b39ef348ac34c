"""Where an experiment's results go."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attnprobe.errors import ConfigurationError
from attnprobe.writers.base import writable_directory
from attnprobe.writers.strict_json import plain


def new_directory(logdir: Path) -> Path:
    """The first free ``run-001``, ``run-002`` ... in ``logdir``, created.

    Raises:
        WriterError: ``logdir`` cannot be written.
    """
    parent = writable_directory(logdir)
    for number in range(1, 100_000):
        with contextlib.suppress(FileExistsError):
            (parent / f"run-{number:03d}").mkdir()
            return parent / f"run-{number:03d}"
    raise ConfigurationError(f"{parent} is full of runs; choose another --logdir")


def write_result(path: Path, result: Mapping[str, Any]) -> dict[str, Any]:
    """Write numbers as JSON, NaN as null, and return what the file holds: texts and pictures are made of that."""
    text = json.dumps(plain(result), indent=1, allow_nan=False) + "\n"
    path.write_text(text, encoding="utf-8")
    return json.loads(text)  # type: ignore[no-any-return]

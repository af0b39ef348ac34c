"""What a writer is, and the check that it can write where it was told to."""

from __future__ import annotations

import tempfile
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from attnprobe.errors import ConfigurationError, WriterError

if TYPE_CHECKING:
    from attnprobe.report import StepReport


@runtime_checkable
class Writer(Protocol):
    """Anything that takes reports: the only part of attnprobe that does input or output.

    A writer raises what goes wrong and leaves it to the probe to say so. ``close`` may be called more than once.
    """

    def write(self, report: StepReport) -> None:
        """Put down one probed step, completely, before returning."""

    def close(self) -> None:
        """Release what the writer opened itself."""


def writable_directory(path: str | PathLike[str]) -> Path:
    """``path`` as a directory that can be written, created together with its parents where missing.

    Raises:
        WriterError: something else stands in its place, or nothing can be created in it.
    """
    directory = Path(fspath(path)).expanduser()
    for place in (directory, *directory.parents):
        if place.exists() and not place.is_dir():
            raise WriterError(
                f"cannot write to {directory}: {place} is a file; pass another directory or move that file"
            )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # Permission bits do not tell about read-only mounts, quotas or root: only a file that was created does.
        with tempfile.TemporaryFile(dir=directory):
            pass
    except (OSError, ValueError) as error:
        raise WriterError(
            f"cannot write to {directory}: {error}; pass a directory in which this process may create files"
        ) from error
    return directory


def positive(name: str, value: int) -> int:
    """``value`` where it is a count of at least one.

    Raises:
        ConfigurationError: it is not; the message names the option.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"{name} must be a whole number of at least 1, got {value!r}")
    return value

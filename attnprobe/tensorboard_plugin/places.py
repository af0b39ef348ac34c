"""Where the runs are: TensorBoard's options, and the directories beneath."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_URI = re.compile(r"[a-zA-Z][0-9a-zA-Z.]*://")


def places(logdir: str, flags: Any) -> tuple[dict[Path, str], list[str]]:
    """Directory -> prefix of its runs' names, as ``--logdir`` or ``--logdir_spec`` says; and what cannot be read."""
    spec = getattr(flags, "logdir_spec", "") or ""
    named = {logdir: ""} if logdir else dict(map(_named, filter(None, spec.split(","))))
    remote = [path for path in named if "://" in path]
    problem = f"the Attention tab reads local directories only, not {', '.join(remote)}: copy the runs"
    local = {
        Path(os.path.abspath(os.path.expanduser(path))): name for path, name in named.items() if path not in remote
    }
    return local, [problem] if remote else []


def _named(spec: str) -> tuple[str, str]:
    """Path and name of ``name:path`` or ``path``, told apart as TensorBoard does."""
    if ":" not in spec or spec.startswith("/") or _URI.match(spec) or os.path.splitdrive(spec)[0]:
        return spec, ""
    name, _, path = spec.partition(":")
    return path, name


def run_directories(root: Path, prefix: str, problems: list[str]) -> Iterator[tuple[str, Path] | None]:
    """(name, directory) for every directory with an event file, named as TensorBoard does; None for one without.

    Links are followed, but none that leads back, and of a directory that was met before no link in it.

    Args:
        root: may be missing.
        problems: what cannot be read is added.
    """

    def unreadable(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            problems.append(f"cannot read {error.filename}: {error.strerror}")

    met: set[str] = set()
    for place, inside, files in os.walk(root, onerror=unreadable, followlinks=True):
        real, above = os.path.realpath(place), os.path.realpath(os.path.dirname(place))
        if met and os.path.commonpath([real, above]) == real:
            inside.clear()
            yield None
            continue
        links = {name for name in inside if os.path.islink(os.path.join(place, name))}
        inside[:] = sorted(set(inside) - links) + sorted(links if real not in met else ())
        met.add(real)
        if any("tfevents" in name for name in files):
            relative = os.path.relpath(place, root)
            yield _text(os.path.join(prefix, relative) if prefix else relative), Path(place)
        else:
            yield None


def _text(name: str) -> str:
    """A file's name as text: one that is not UTF-8 could not be asked for."""
    return os.fsencode(name).decode("utf-8", "replace")

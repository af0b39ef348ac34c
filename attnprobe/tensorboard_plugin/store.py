"""The runs beneath TensorBoard's log directory, as they are found and grow."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path

from attnprobe.logs.events import EventSource
from attnprobe.logs.logged import LoggedRun
from attnprobe.tensorboard_plugin.places import run_directories

#: A look at the files is no longer than this, so that a page that waits is told how far it is.
SECONDS = 0.4
#: Of which one run takes no more than this before the next one's turn.
TURN = 0.1
#: After everything was looked at it is not looked at again for so many seconds.
REST = 0.5
#: A look at the tree of directories is repeated after so many seconds, or so many times as long as it took.
PAUSE, TIMES = 3.0, 20.0


class Store:
    """The runs of some log directories. Not for two threads at once: hold ``lock``.

    Args:
        places: directory -> prefix of the runs' names, "" for none.

    Attributes:
        runs: by the name that TensorBoard gives them; only those with a probe.
        complete: whether all that was there was read.
        revision: another text whenever anything of this has changed, also after a restart.
    """

    def __init__(self, places: Mapping[Path, str]) -> None:
        self.lock = threading.RLock()
        self.runs: dict[str, LoggedRun] = {}
        self.complete = False
        self._places = places
        self._sources: dict[str, EventSource] = {}
        self._missing: list[str] = []  # places that cannot be read
        self._failed: dict[str, str] = {}  # runs that cannot be read
        self._look: Iterator[None] | None = None  # what is left of the one that was begun
        self._deadline = self._walk_again = self._look_again = -math.inf
        self._born, self._changes = time.time_ns(), 0
        self._last: object = None

    @property
    def problems(self) -> list[str]:
        """What could not be read."""
        return [*self._missing, *self._failed.values()]

    @property
    def revision(self) -> str:
        return f"{self._born}.{self._changes}"

    def revision_of(self, name: str) -> str:
        """Likewise of one run."""
        return f"{self._born}.{self._sources[name].revision}"

    def refresh(self) -> None:
        """Look for new runs and new probes, from where the last call stopped; nothing if all was just looked at."""
        now = time.monotonic()
        if now < self._look_again:
            return
        look, self._look = self._look or self._everything(), None
        self._deadline = now + SECONDS
        self.complete = True
        for _ in look:
            if time.monotonic() > self._deadline:
                self.complete, self._look = False, look
                break
        else:
            self._look_again = time.monotonic() + REST
        seen = self.complete, self.problems, [(name, self._sources[name].revision) for name in self.runs]
        if seen != self._last:
            self._last = seen
            self._changes += 1

    def _everything(self) -> Iterator[None]:
        """One look, in pieces."""
        if time.monotonic() >= self._walk_again:
            took = yield from self._walk()
            self._walk_again = time.monotonic() + max(PAUSE, TIMES * took)
        waiting = [*self._sources]
        while waiting:
            unfinished = []
            for name in waiting:
                if not self._read(name):
                    unfinished.append(name)
                yield
            waiting = unfinished

    def _walk(self) -> Generator[None, None, float]:
        """Find new runs; returns the seconds that it took without the pauses."""
        took, problems = 0.0, list[str]()
        for root, prefix in self._places.items():
            directories = run_directories(root, prefix, problems)
            while True:
                began = time.monotonic()
                found = next(directories, ())
                took += time.monotonic() - began
                if found == ():
                    break
                if found:
                    self._sources.setdefault(found[0], EventSource(found[1]))
                yield
        self._missing = problems
        return took

    def _read(self, name: str) -> bool:
        """Whether the run was read to its end."""
        source = self._sources[name]
        complete = True
        self._failed.pop(name, None)
        try:
            complete = source.refresh(min(self._deadline, time.monotonic() + TURN))
        except (FileNotFoundError, NotADirectoryError):  # it was removed
            del self._sources[name]
            self.runs.pop(name, None)
            return True
        except Exception as error:  # whatever is in one directory, the others are shown
            self._failed[name] = f"{name}: {error}"
        if source.probes:
            self.runs.setdefault(name, LoggedRun(name, source))
        else:
            self.runs.pop(name, None)
        return complete

"""A run out of the TensorBoard event files of one directory."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from attnprobe.logs.episodes import Episode, Episodes
from attnprobe.logs.event_file import EventFile, numbers
from attnprobe.logs.probe_event import MALFORMED, Place, ProbeEvent, alarms_of
from attnprobe.logs.source import PICTURES, Layout, Numbers, Probe, not_superseded
from attnprobe.report import Alarm

_Found = tuple[EventFile, ProbeEvent]

_REVISIONS = itertools.count(1)


class EventSource:
    """The probes in the event files of one directory, found anew with ``refresh``. See ``source.Source``.

    Args:
        directory: where the files are; files of other programs among them do not matter.
        verify: see ``EventFile``.

    Attributes:
        revision: another number whenever anything has changed, in no other source the same; 0 before.
        refusals: those of the problems that are probes which do not hold what they should.
    """

    def __init__(self, directory: Path, *, verify: bool = False) -> None:
        self.directory = directory
        self.verify = verify
        self.revision = 0
        self.problems: list[str] = []
        self.refusals: list[str] = []
        self._files: dict[str, EventFile] = {}
        self._clear()

    def _clear(self) -> None:
        self._found: list[_Found] = []  # all that was written
        self._kept: list[_Found] = []  # without what was superseded
        self._episodes = Episodes()
        self.probes: list[Probe] = []
        self.layouts: list[Layout] = []
        self.warnings: dict[str, None] = {}
        self.notes: dict[str, None] = {}
        self.dimensions: dict[str, int] = {}

    @property
    def episodes(self) -> Sequence[Episode]:
        return self._episodes.found

    def refresh(self, deadline: float = math.inf) -> bool:
        """Read what was written since the last call, until ``deadline`` (``time.monotonic()``).

        What is wrong with one file goes to ``problems``.

        Returns:
            Whether everything that is there was read.

        Raises:
            OSError: the directory cannot be read, or a file was exchanged meanwhile; a later call starts anew.
        """
        names = sorted(name for name in os.listdir(self.directory) if "tfevents" in name)
        known = self._files
        self._files = {name: known.get(name) or EventFile(self.directory / name, verify=self.verify) for name in names}
        complete, unreadable = True, []
        for file in self._files.values():
            try:
                # Opening a pipe would wait for whoever writes to it.
                if complete and file.path.is_file():
                    complete = file.scan(deadline)
            except OSError as error:
                unreadable.append(f"cannot read {file.path}: {error}")
        files = sorted(self._files.values(), key=lambda file: (file.began, file.path.name))
        self.refusals = [file.refusal for file in files if file.refusal]
        problems = [*unreadable, *(file.damage for file in files if file.damage), *self.refusals]
        if problems != self.problems:
            self.problems, self.revision = problems, next(_REVISIONS)
        self._assemble([(file, event) for file in files for event in file.events])
        return complete

    def _assemble(self, found: list[_Found]) -> None:
        """Put the probes in one row: only the new ones, where they come behind those that are known."""
        known = len(self._found)
        if len(found) == known and found == self._found:
            return
        self.revision = next(_REVISIONS)
        last = self.probes[-1].step if self.probes else -math.inf
        if found[:known] != self._found or any(event.step <= last for _, event in found[known:]):
            self._clear()  # superseded probes may have raised alarms
        added = found[len(self._found) :]
        try:
            self._append(not_superseded(added, lambda one: one[1].step))
        except (OSError, *MALFORMED) as error:
            self._clear()
            raise OSError(f"the event files in {self.directory} were changed while they were read: {error}") from error
        for _, event in added:  # written only where they change: what was superseded counts
            self.warnings.update(dict.fromkeys(event.warnings))
            self.notes.update(dict.fromkeys(event.notes))
        self._found = found

    def _append(self, kept: list[_Found]) -> None:
        for (file, event), alarms in zip(kept, self._alarms(kept), strict=True):
            self._episodes.add(alarms)
            if event.layout not in self.layouts:
                self.layouts.append(event.layout)
            for name, place in event.arrays.items():
                self.dimensions.setdefault(name, len(place.shape or ()))
            self.probes.append(Probe(event.step, self.layouts.index(event.layout), event.loss, event.invalid))
            self._kept.append((file, event))

    def _alarms(self, kept: Iterable[_Found]) -> Iterator[list[Alarm]]:
        kept = list(kept)
        texts = _bytes((file, event.alarms) for file, event in kept if event.alarms)
        for _, event in kept:
            yield alarms_of(next(texts)) if event.alarms else []

    def _place(self, event: ProbeEvent, name: str) -> Place | None:
        """None too where the array has not as many dimensions as the first of its name."""
        place = event.arrays.get(name)
        return place if place and len(place.shape or ()) == self.dimensions[name] else None

    def holds(self, name: str) -> list[int]:
        return [index for index, (_, event) in enumerate(self._kept) if self._place(event, name)]

    def arrays(self, name: str, probes: Iterable[int]) -> Iterator[Numbers | None]:
        chosen = [(file, self._place(event, name)) for file, event in map(self._kept.__getitem__, probes)]
        found = _bytes((file, place) for file, place in chosen if place)
        for _, place in chosen:
            yield numbers(next(found), place) if place else None

    def curve(self, name: str, layer: str, head: int) -> Numbers:
        rows = [layout.layers.index(layer) if layer in layout.layers else None for layout in self.layouts]
        found: list[tuple[EventFile, Place]] = []
        where = []
        for index, (probe, (file, event)) in enumerate(zip(self.probes, self._kept, strict=True)):
            row, place = rows[probe.layout], self._place(event, name)
            if row is not None and place and place.shape and 0 <= head < place.shape[1]:
                start = place.start + 4 * (row * place.shape[1] + head)
                found.append((file, Place(start, start + 4, ())))
                where.append(index)
        values = np.full(len(self.probes), np.nan, np.float32)
        values[where] = np.frombuffer(b"".join(_bytes(found)), "<f4")
        return values

    def records(self) -> Iterator[dict[str, Any]]:
        """Every probe as ``jsonl.to_dict`` has it."""
        for (file, event), alarms in zip(self._kept, self._alarms(self._kept), strict=True):
            record: dict[str, Any] = {
                "step": event.step,
                "loss": event.loss,
                "layers": event.layout.layers,
                "heads": event.layout.heads,
                "invalid": event.invalid,
                "warnings": event.warnings,
                "notes": event.notes,
                "alarms": [alarm.to_dict() for alarm in alarms],
                "statistics": {},
                "layer_statistics": {},
                "nonfinite": {},
            }
            arrays = {name: place for name, place in event.arrays.items() if not name.startswith(PICTURES)}
            for (name, place), data in zip(arrays.items(), file.read(arrays.values()), strict=True):
                values = numbers(data, place).tolist()
                if name == "residual":
                    record[name] = values
                elif name.startswith("nonfinite/"):
                    record["nonfinite"][name.removeprefix("nonfinite/")] = values
                else:
                    record["statistics" if len(place.shape or ()) == 2 else "layer_statistics"][name] = values
            yield record


def _bytes(places: Iterable[tuple[EventFile, Place]]) -> Iterator[bytes]:
    for file, group in itertools.groupby(places, itemgetter(0)):
        yield from file.read(place for _, place in group)

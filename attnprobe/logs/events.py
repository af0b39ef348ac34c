"""A run out of the TensorBoard event files of one directory; see the table of tags in ``writers.summaries``."""

from __future__ import annotations

import html
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from attnprobe.errors import LogError
from attnprobe.logs.episodes import Episode, Episodes
from attnprobe.logs.event_file import PREFIX, TEXTS, Event, EventFile, Place, numbers
from attnprobe.logs.plain import alarm_of
from attnprobe.logs.source import Layout, Numbers, Probe

NOT_MEASURED, WARNINGS, NOTES = TEXTS


class _Kept(NamedTuple):
    file: EventFile
    event: Event


class EventSource:
    """The probes in the event files of one directory, found anew with ``refresh``.

    Args:
        directory: where the files are; files of other programs among them do not matter.
        verify: see ``EventFile.scan``.
    """

    def __init__(self, directory: Path, *, verify: bool = False) -> None:
        self.directory = directory
        self.verify = verify
        self.revision = 0
        self._files: dict[str, EventFile] = {}
        self._read: list[tuple[EventFile, int]] = []
        self._clear()

    def _clear(self) -> None:
        self._kept: list[_Kept] = []
        self._episodes = Episodes()
        self.probes: list[Probe] = []
        self.layouts: list[Layout] = []
        self.warnings: dict[str, None] = {}
        self.notes: dict[str, None] = {}
        self.dimensions: dict[str, int] = {}
        self.problems: list[str] = []
        self._layout = Layout()

    @property
    def episodes(self) -> Sequence[Episode]:
        return self._episodes.found

    def refresh(self, deadline: float = math.inf) -> bool:
        """Read what was written since the last call, until ``deadline`` (``time.monotonic()``).

        Returns:
            Whether everything that is there was read.
        """
        complete = True
        names = sorted(name for name in os.listdir(self.directory) if "tfevents" in name)
        for name in [name for name in self._files if name not in names]:
            del self._files[name]
        problems = []
        for name in names:
            file = self._files.setdefault(name, EventFile(self.directory / name))
            try:
                complete &= file.scan(deadline, verify=self.verify)
            except OSError as error:
                problems.append(f"cannot read {file.path}: {error}")
            if file.damage:
                problems.append(file.damage)
        self._collect(problems)
        return complete

    def _collect(self, problems: list[str]) -> None:
        """Put the probes of all files in one row; only what is new, where the rest stayed as it was."""
        files = sorted((file for file in self._files.values() if file.events), key=lambda file: file.began)
        now = [(file, len(file.events)) for file in files]
        if now == self._read and problems == self.problems:
            return
        self.revision += 1
        skip = dict(self._read)
        added = [_Kept(file, event) for file in files for event in file.events[skip.get(file, 0) :]]
        # The last file that was read may have grown; the ones before it are as they were.
        before, after = self._read[:-1], self._read[-1:]
        same = now[: len(before)] == before and all(
            len(now) > len(before) and now[len(before)][0] is file and now[len(before)][1] >= count
            for file, count in after
        )
        again = bool(self._kept) and any(kept.event.step <= self._kept[-1].event.step for kept in added)
        if not same or again:  # superseded probes may have raised alarms
            self._clear()
            added = [_Kept(file, event) for file in files for event in file.events]
        self._read, self.problems = now, problems
        self._append(_not_superseded(added))

    def _append(self, added: list[_Kept]) -> None:
        for kept, texts in zip(added, self._texts(added), strict=True):
            try:
                self._add(kept, texts)
            except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
                raise LogError(f"{kept.file.path}, step {kept.event.step}: {error}") from error

    def _texts(self, kept: Sequence[_Kept]) -> Iterator[dict[str, bytes]]:
        """The small values of each probe: all but its arrays."""
        wanted = [[(tag, place) for tag, place in one.event.places.items() if not place.shape] for one in kept]
        data = self._bytes((one.file, place) for one, found in zip(kept, wanted, strict=True) for _, place in found)
        for found in wanted:
            yield {tag: next(data) for tag, _ in found}

    def _bytes(self, places: Iterable[tuple[EventFile, Place]]) -> Iterator[bytes]:
        with ExitStack() as open_files:
            files: dict[EventFile, int] = {}
            for file, place in places:
                if file not in files:
                    files[file] = open_files.enter_context(file.path.open("rb")).fileno()
                data = os.pread(files[file], place.stop - place.start, place.start)
                if len(data) != place.stop - place.start:
                    raise LogError(f"{file.path} is shorter than it was")
                yield data

    def _add(self, kept: _Kept, texts: dict[str, bytes]) -> None:
        step = kept.event.step
        alarms = json.loads(texts.get(PREFIX + "alarms", b"[]"))
        if PREFIX + "layout" in texts:
            layout = json.loads(texts[PREFIX + "layout"])
            self._layout = Layout(tuple(map(str, layout["layers"])), tuple(map(int, layout["heads"])))
        layout = Layout() if NOT_MEASURED in texts else self._layout
        if layout not in self.layouts:
            self.layouts.append(layout)
        loss = float(np.frombuffer(texts[PREFIX + "loss"], "<f4")[0]) if PREFIX + "loss" in texts else math.nan
        invalid = _lines(texts[NOT_MEASURED], f"step {step}: ")[0] if NOT_MEASURED in texts else ""
        for tag, known in ((WARNINGS, self.warnings), (NOTES, self.notes)):
            if tag in texts:
                known.update(dict.fromkeys(_lines(texts[tag], f"{tag.split('/')[1].removesuffix('s')}: ")))
        for tag, place in kept.event.places.items():
            if tag.startswith(PREFIX) and place.shape:
                self.dimensions.setdefault(tag.removeprefix(PREFIX), len(place.shape))
        self._episodes.add(map(alarm_of, alarms))
        self.probes.append(Probe(step, self.layouts.index(layout), loss, invalid))
        self._kept.append(kept)

    def holds(self, name: str) -> list[int]:
        tag = PREFIX + name
        return [index for index, kept in enumerate(self._kept) if tag in kept.event.places]

    def arrays(self, name: str, probes: Iterable[int]) -> Iterator[Numbers | None]:
        tag = PREFIX + name
        chosen = [(self._kept[index], self._kept[index].event.places.get(tag)) for index in probes]
        data = self._bytes((kept.file, place) for kept, place in chosen if place)
        for _, place in chosen:
            yield numbers(next(data), place) if place else None

    def curve(self, name: str, layer: str, head: int) -> Numbers:
        tag = PREFIX + name
        rows = [layout.layers.index(layer) if layer in layout.layers else -1 for layout in self.layouts]
        found: list[tuple[EventFile, Place]] = []
        where = []
        for index, (probe, kept) in enumerate(zip(self.probes, self._kept, strict=True)):
            row, place = rows[probe.layout], kept.event.places.get(tag)
            if place and row >= 0 and place.shape and row < place.shape[0] and head < place.shape[1]:
                start = place.start + 4 * (row * place.shape[1] + head)
                found.append((kept.file, Place(start, start + 4, ())))
                where.append(index)
        values = np.full(len(self.probes), np.nan, np.float32)
        values[where] = np.frombuffer(b"".join(self._bytes(found)), "<f4")
        return values

    def records(self) -> Iterator[dict[str, Any]]:
        """Every probe as ``jsonl.to_dict`` has it."""
        for index, (probe, kept, texts) in enumerate(
            zip(self.probes, self._kept, self._texts(self._kept), strict=True)
        ):
            layout = self.layouts[probe.layout]
            record: dict[str, Any] = {
                "step": probe.step,
                "layers": layout.layers,
                "heads": layout.heads,
                "invalid": probe.invalid,
                "alarms": json.loads(texts.get(PREFIX + "alarms", b"[]")),
                "statistics": {},
                "layer_statistics": {},
                "nonfinite": {},
            }
            if not math.isnan(probe.loss):
                record["loss"] = probe.loss
            for kind, tag in (("warnings", WARNINGS), ("notes", NOTES)):
                if tag in texts:
                    record[kind] = _lines(texts[tag], f"{kind.removesuffix('s')}: ")
            for tag, place in kept.event.places.items():
                name = tag.removeprefix(PREFIX)
                if place.shape and name.split("/")[0] not in ("map", "usage"):
                    (values,) = self.arrays(name, [index])
                    assert values is not None
                    if name == "residual":
                        record[name] = values.tolist()
                    elif name.startswith("nonfinite/"):
                        record["nonfinite"][name.removeprefix("nonfinite/")] = values.tolist()
                    else:
                        record["statistics" if values.ndim == 2 else "layer_statistics"][name] = values.tolist()
            yield record


def _not_superseded(found: Iterable[_Kept]) -> list[_Kept]:
    """Without the steps that a run, resumed from an earlier checkpoint, took again."""
    kept: list[_Kept] = []
    for one in found:
        while kept and kept[-1].event.step >= one.event.step:
            kept.pop()
        kept.append(one)
    return kept


@lru_cache(maxsize=64)
def _lines(text: bytes, prefix: str) -> tuple[str, ...]:
    """The items of a Markdown list of ``summaries.text``, as they were before ``markdown``."""
    return tuple(html.unescape(line.removeprefix(f"- {prefix}")) for line in text.decode().split("\n"))

"""One TensorBoard event file that may still grow: where each probe's values lie in it, and these bytes on demand.

A long run of a large model leaves gigabytes. Reading the file once tells where everything is; after that a picture of
one statistic, or the curve of one head, reads just its own bytes.
"""

from __future__ import annotations

import math
import os
import struct
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tensorboard.compat.proto.types_pb2 import DT_FLOAT, DT_STRING
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

from attnprobe.logs.wire import fields, varint

#: A record's length and its checksum, and how many bytes stand around it: these, and the checksum of the record.
HEAD = struct.Struct("<QI")
FRAME = HEAD.size + 4
#: Longer records are not ours: they are another program's pictures or embeddings.
LONGEST = 1 << 28

PREFIX = "attnprobe/"
TEXTS = ("attention/not_measured", "attention/warnings", "attention/notes")


class Place(NamedTuple):
    """Bytes of a file: float32 numbers of ``shape``, or text where that is None."""

    start: int
    stop: int
    shape: tuple[int, ...] | None


class Event(NamedTuple):
    """One probe: its step, and the place of each of its tags."""

    step: int
    places: dict[str, Place]


class EventFile:
    """The probes in one event file.

    Attributes:
        began: when the file was begun, in Unix seconds; infinite while nothing is in it. Its name does not tell: of
            two in one second number 10 sorts before 9.
        events: the probes found so far, in the order written.
        damage: what is wrong with the file's bytes, and from where on it is not read; empty where nothing is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._names: dict[str, str] = {}  # one object for each tag, however many probes
        self._clear()

    def _clear(self) -> None:
        self.began = math.inf
        self.events: list[Event] = []
        self.damage = ""
        self._end = 0

    def scan(self, deadline: float = math.inf, *, verify: bool = False) -> bool:
        """Find what was written since the last call; a torn end is left for the next.

        Args:
            deadline: stop at this ``time.monotonic()``, in the middle of the file.
            verify: compare the checksum of every record, which is slow; those of their lengths are always compared.

        Returns:
            Whether the end of the file was reached.

        Raises:
            OSError: the file cannot be read.
        """
        with self.path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < self._end:  # another file of the same name
                self._clear()
            while not self.damage and self._end + FRAME <= size:
                if time.monotonic() > deadline:
                    return False
                length, checksum = HEAD.unpack(os.pread(file.fileno(), HEAD.size, self._end))
                whole = self._end + FRAME + length <= size
                if masked_crc32c(struct.pack("<Q", length)) != checksum:
                    self._damaged()
                elif not whole:
                    break
                else:
                    self._record(file.fileno(), length, verify)
        return True

    def _damaged(self) -> None:
        self.damage = f"{self.path} is damaged from byte {self._end} on; what follows is not read"

    def _record(self, file: int, length: int, verify: bool) -> None:
        start = self._end + HEAD.size
        data = os.pread(file, length + 4, start) if length <= LONGEST else b""
        if data and verify and masked_crc32c(data[:-4]) != int.from_bytes(data[-4:], "little"):
            return self._damaged()
        try:
            self._event(data[:-4], start)
        except ValueError:
            return self._damaged()
        self._end = start + length + 4

    def _event(self, data: bytes, start: int) -> None:
        step, places = 0, {}
        for number, at, stop in fields(data, 0, len(data)):
            if number == 1 and self.began == math.inf:
                self.began = struct.unpack_from("<d", data, at)[0]
            elif number == 2:
                step, _ = varint(data, at, stop)
            elif number == 5:
                for _, first, last in fields(data, at, stop):
                    if found := self._value(data, first, last, start):
                        places[found[0]] = found[1]
        if PREFIX + "alarms" in places or TEXTS[0] in places:
            self.events.append(Event(step, places))

    def _value(self, data: bytes, at: int, stop: int, start: int) -> tuple[str, Place] | None:
        """Tag and place of one ``Summary.Value``; None for what is not a probe's."""
        tag = ""
        for number, first, last in fields(data, at, stop):
            if number == 1:
                tag = data[first:last].decode("utf-8", "replace")
                if not tag.startswith(PREFIX) and tag not in TEXTS:
                    return None
                tag = self._names.setdefault(tag, tag)
            elif number == 8 and tag and (place := _tensor(data, first, last, start)):
                return tag, place
        return None

    def read(self, places: Iterable[Place]) -> Iterator[bytes]:
        """The bytes at each place.

        Raises:
            OSError: the file is gone or cannot be read.
        """
        with self.path.open("rb") as file:
            for place in places:
                data = os.pread(file.fileno(), place.stop - place.start, place.start)
                if len(data) != place.stop - place.start:
                    raise OSError(f"{self.path} is shorter than it was")
                yield data


def _tensor(data: bytes, at: int, stop: int, start: int) -> Place | None:
    """Where a ``TensorProto`` has its numbers or its text; None where it is not as our writer leaves it."""
    kind, shape = 0, []
    for number, first, last in fields(data, at, stop):
        if number == 1:
            kind, _ = varint(data, first, last)
        elif number == 2:
            shape = [size for _, low, high in fields(data, first, last) for size in _sizes(data, low, high)]
        elif number == 4 and kind == DT_FLOAT and last - first == 4 * math.prod(shape):
            return Place(start + first, start + last, tuple(shape))
        elif number == 8 and kind == DT_STRING:
            return Place(start + first, start + last, None)
    return None


def _sizes(data: bytes, at: int, stop: int) -> Iterator[int]:
    """The size of one ``TensorShapeProto.Dim``; a size of 0 is not written."""
    yield next((varint(data, first, last)[0] for number, first, last in fields(data, at, stop) if number == 1), 0)


def numbers(data: bytes, place: Place) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """The numbers that ``EventFile.read`` found at ``place``, read-only."""
    return np.frombuffer(data, "<f4").reshape(place.shape or ())

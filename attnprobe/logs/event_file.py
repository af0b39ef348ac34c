"""One TensorBoard event file that may still grow: the probes in it, and the bytes of their arrays on demand.

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

import numpy as np
from numpy.typing import NDArray

from attnprobe.errors import LogError
from attnprobe.logs.checksum import masked_crc32c
from attnprobe.logs.probe_event import Place, ProbeEvent, probe_of, wall_time
from attnprobe.logs.source import Layout

#: Before a record: its length and the checksum of that. Behind it: its own checksum.
HEAD, CHECKSUM = struct.Struct("<QI"), struct.Struct("<I")
#: Longer records are not ours: they are another program's pictures or embeddings.
LONGEST = 1 << 28


class EventFile:
    """The probes in one event file.

    Args:
        path: the file.
        verify: compare the checksum of every record; those of their lengths are always compared.

    Attributes:
        began: when the file was begun, in Unix seconds; infinite while nothing is in it. Its name does not tell: of
            two in one second number 10 sorts before 9.
        events: the probes found so far, in the order written.
        damage: which bytes are wrong; empty where none are. What follows them is not read.
        refusal: likewise which probe is not what a probe should be.
    """

    def __init__(self, path: Path, *, verify: bool = False) -> None:
        self.path = path
        self.verify = verify
        self._clear()

    def _clear(self) -> None:
        self.began = math.inf
        self.events: list[ProbeEvent] = []
        self.damage = self.refusal = ""
        self._layout = Layout()
        self._names: dict[str, str] = {}
        self._end = 0
        self._last = b""  # the bytes before the end: while they stand there it is the same file

    def scan(self, deadline: float = math.inf) -> bool:
        """Find what was written since the last call. A torn end is left for the next, and what is wrong tried again.

        Args:
            deadline: stop behind the first record that is read after this ``time.monotonic()``.

        Returns:
            Whether the end of the file was reached.

        Raises:
            OSError: the file cannot be read.
        """
        with self.path.open("rb") as opened:
            file = opened.fileno()
            if not self._same(file):
                self._clear()
            self.damage = self.refusal = ""
            size = os.fstat(file).st_size
            while self._record(file, size):
                if time.monotonic() > deadline:
                    return False
        return True

    def _same(self, file: int) -> bool:
        return os.pread(file, len(self._last), self._end - len(self._last)) == self._last

    def _record(self, file: int, size: int) -> bool:
        """Whether there was another record, all of it and sound."""
        head = os.pread(file, HEAD.size, self._end)
        if len(head) < HEAD.size:
            return False
        length, checksum = HEAD.unpack(head)
        if masked_crc32c(head[:8]) != checksum:
            return self._damaged()
        start, stop = self._end + HEAD.size, self._end + HEAD.size + length + CHECKSUM.size
        if stop > size:
            return False
        first = start if length <= LONGEST else stop - CHECKSUM.size
        data = os.pread(file, stop - first, first)
        if len(data) < stop - first:
            return False
        if first == start:
            if self.verify and masked_crc32c(data[:length]) != CHECKSUM.unpack_from(data, length)[0]:
                return self._damaged()
            try:
                self._event(data, length, start)
            except LogError as error:
                self.refusal = f"{self.path}, {error}; what follows in this file is not read"
                return False
            except ValueError:
                return self._damaged()
        self._end, self._last = stop, data[-16:]
        return True

    def _damaged(self) -> bool:
        self.damage = f"{self.path} is damaged from byte {self._end} on; what follows is not read"
        return False

    def _event(self, data: bytes, length: int, start: int) -> None:
        if self.began == math.inf:
            began = wall_time(data, length)
            self.began = began if math.isfinite(began) else 0.0
        if event := probe_of(data, length, start, self._layout, self._names):
            self.events.append(event)
            self._layout = self._layout if event.invalid else event.layout

    def read(self, places: Iterable[Place]) -> Iterator[bytes]:
        """The bytes at each place.

        Raises:
            OSError: the file is gone, cannot be read, or is another one now.
        """
        with self.path.open("rb") as opened:
            file = opened.fileno()
            if not self._same(file):
                raise OSError(f"{self.path} is not the file that it was")
            for start, stop, _ in places:
                data = os.pread(file, stop - start, start)
                if len(data) != stop - start:
                    raise OSError(f"{self.path} is shorter than it was")
                yield data


def numbers(data: bytes, place: Place) -> NDArray[np.float32]:
    """The numbers that ``EventFile.read`` found at ``place``, read-only."""
    return np.frombuffer(data, "<f4").reshape(place.shape or ())

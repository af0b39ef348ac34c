"""Event files made record by record, with what their writers never leave."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import torch
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

from attnprobe.report import Alarm, StepReport
from attnprobe.writers import summaries
from attnprobe.writers.entry import Entry, floats

NAME = "events.out.tfevents.1700000000.host.1.0"


def frame(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    checksums = (struct.pack("<I", masked_crc32c(part)) for part in (length, data))
    return length + next(checksums) + data + next(checksums)


def began(time: float = 1.0) -> bytes:
    """The first record of a file."""
    return frame(Event(wall_time=time, file_version="brain.Event:2").SerializeToString())


def event(step: int, *entries: Entry) -> bytes:
    summary = Summary(value=[entry.value(with_metadata=True) for entry in entries])
    return frame(Event(wall_time=2.0, step=step, summary=summary).SerializeToString())


def array(name: str, values: Any) -> Entry:
    return Entry(f"attnprobe/{name}", "attnprobe", floats(values), lambda: "An array.")


def probe(step: int, value: float = 0.0, *, layout: bool = False, alarms: tuple[str, ...] = ()) -> bytes:
    """A record of one layer with two heads, of which ``value`` is the first one's entropy."""
    report = StepReport(
        step,
        ("a",),
        (2,),
        {"entropy": torch.tensor([[value, float(step)]])},
        alarms=tuple(Alarm(name, "a", (0,), step, step, value, 1.0, "Advice.") for name in alarms),
    )
    entries = [summaries.alarms(report), *summaries.heads(report)]
    return event(step, *([summaries.layout(report)] if layout else []), *entries)


def write(directory: Path, *records: bytes, name: str = NAME) -> Path:
    path = directory / name
    path.write_bytes(b"".join(records))
    return path

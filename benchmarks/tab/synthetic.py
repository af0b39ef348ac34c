"""A run of any size as an event file: random numbers in the tags of TensorBoardWriter, without its scalars."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

from attnprobe.catalog import STATISTICS
from attnprobe.report import Alarm
from attnprobe.writers.entry import Entry, floats, string
from attnprobe.writers.strict_json import dumps


def names(number: int) -> list[str]:
    """So many statistics of the catalogue with a number per head."""
    return [name for name, entry in STATISTICS.items() if entry.level == "head"][:number]


def write_run(directory: Path, heads: Sequence[int], statistics: int, probes: int, seed: int = 0) -> Path:
    """Write ``probes`` probes of layers with so many ``heads`` each, at steps 0, 10, 20 ...; returns the file.

    The records have no checksum: in Python it takes longer than everything else, and the readers measured do not ask.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"events.out.tfevents.1700000000.synthetic.{seed}.0"
    with path.open("wb") as file:
        for event in _events(heads, statistics, probes, seed):
            record = event.SerializeToString()
            length = struct.pack("<Q", len(record))
            file.write(length + struct.pack("<I", masked_crc32c(length)) + record + bytes(4))
    return path


def _events(heads: Sequence[int], statistics: int, probes: int, seed: int) -> Iterator[Event]:
    random = np.random.default_rng(seed)
    layers = [f"transformer.h.{layer}.attn" for layer in range(len(heads))]
    missing = np.arange(max(heads)) >= np.array(heads)[:, None]
    walk = random.uniform(0.2, 0.8, (statistics, *missing.shape)).astype(np.float32)
    yield Event(wall_time=1.7e9 + seed, file_version="brain.Event:2")
    for probe in range(probes):
        walk = np.clip(walk + random.normal(0, 0.01, walk.shape).astype(np.float32), 0.0, 1.0)
        walk[:, missing] = np.nan
        step = 10 * probe
        standing = [_alarm(layers[0], step)] if probe > probes // 2 else []
        entries = [
            _entry("alarms", string(dumps([alarm.to_dict() for alarm in standing]))),
            _entry("loss", floats(3.0)),
        ]
        if not probe:
            entries.append(_entry("layout", string(dumps({"layers": layers, "heads": list(heads)}))))
        entries += [_entry(name, floats(values)) for name, values in zip(names(statistics), walk, strict=True)]
        values = [entry.value(with_metadata=not probe) for entry in entries]
        yield Event(wall_time=1.7e9 + seed + probe, step=step, summary=Summary(value=values))


def _entry(name: str, payload: dict[str, object]) -> Entry:
    return Entry(f"attnprobe/{name}", "attnprobe", payload, lambda: name, name)


def _alarm(layer: str, step: int) -> Alarm:
    return Alarm("logit_explosion", layer, (1, 2), step, 0, 300.0, 250.0, "Lower the rate.", reads=("logit_spread",))

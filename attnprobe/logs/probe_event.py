"""One event of ``TensorBoardWriter``: what is small of a probe, and where in the file its arrays lie.

The table of tags is in ``writers.summaries``.
"""

from __future__ import annotations

import html
import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from tensorboard.compat.proto.types_pb2 import DT_FLOAT, DT_STRING

from attnprobe.errors import LogError
from attnprobe.logs.plain import alarm_of
from attnprobe.logs.source import PICTURES, Layout
from attnprobe.logs.wire import BYTES, FIXED64, VARINT, fields, key, signed, varint
from attnprobe.report import Alarm

PREFIX = "attnprobe/"
NOT_MEASURED, WARNINGS, NOTES = "attention/not_measured", "attention/warnings", "attention/notes"
ALARMS, LAYOUT, LOSS = (PREFIX + name for name in ("alarms", "layout", "loss"))
TEXTS = {NOT_MEASURED, WARNINGS, NOTES, ALARMS, LAYOUT}

#: A layout with more heads in a layer is no model's.
MOST_HEADS = 1 << 16

#: What a value of the wrong kind raises where it is used.
MALFORMED = (AttributeError, IndexError, KeyError, OverflowError, RecursionError, TypeError, ValueError)

# Numbers of fields in TensorFlow's event.proto, summary.proto, tensor.proto and tensor_shape.proto.
_WALL_TIME, _STEP, _SUMMARY = key(1, FIXED64), key(2, VARINT), key(5, BYTES)
_VALUE = key(1, BYTES)
_TAG, _TENSOR = key(1, BYTES), key(8, BYTES)
_DTYPE, _SHAPE, _CONTENT, _STRING = key(1, VARINT), key(2, BYTES), key(4, BYTES), key(8, BYTES)
_DIMENSION, _SIZE = key(2, BYTES), key(1, VARINT)


class Place(NamedTuple):
    """Bytes of a file: float32 numbers of ``shape``, or text where that is None."""

    start: int
    stop: int
    shape: tuple[int, ...] | None


@dataclass(frozen=True, eq=False)
class ProbeEvent:
    """One probe.

    Attributes:
        layout: of the arrays; empty where nothing was measured.
        warnings, notes: only where they changed.
        alarms: where their JSON is, which ``alarms_of`` reads; None where nothing was written.
        arrays: name -> place.
    """

    step: int
    layout: Layout
    loss: float
    invalid: str
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    alarms: Place | None
    arrays: Mapping[str, Place]


def wall_time(data: bytes, stop: int) -> float:
    """When the event of ``data[:stop]`` was written, in Unix seconds.

    Raises:
        ValueError: these bytes are no event.
    """
    found = [at for found, at, _ in fields(data, 0, stop) if found == _WALL_TIME]
    return float(struct.unpack_from("<d", data, found[-1])[0]) if found else 0.0


def probe_of(data: bytes, stop: int, start: int, layout: Layout, names: dict[str, str]) -> ProbeEvent | None:
    """The probe in the event ``data[:stop]``; None where it is another program's.

    Args:
        data, stop: one event.
        start: where in its file the data begin.
        layout: of the probe before it; it is written only where it changes.
        names: one object for every array's tag that was met, which is added to.

    Raises:
        LogError: it is a probe's, and does not hold what it should.
        ValueError: these bytes are no event.
    """
    step = 0
    places: dict[str, Place] = {}
    for found, at, end in fields(data, 0, stop):
        if found == _STEP:
            step = signed(varint(data, at, end)[0])
        elif found == _SUMMARY:
            values = [_value(data, first, last, start) for each, first, last in fields(data, at, end) if each == _VALUE]
            places.update(value for value in values if value)
    if ALARMS not in places and NOT_MEASURED not in places:
        return None
    try:
        small = {tag: data[p.start - start : p.stop - start] for tag, p in places.items() if not p.shape}
        arrays = {names.setdefault(tag, tag[len(PREFIX) :]): place for tag, place in places.items() if place.shape}
        return _probe(step, small, arrays, places.get(ALARMS), layout)
    except MALFORMED as error:
        raise LogError(f"step {step}: {type(error).__name__}: {error}") from error


def _probe(
    step: int, small: Mapping[str, bytes], arrays: Mapping[str, Place], alarms: Place | None, layout: Layout
) -> ProbeEvent:
    def lines(tag: str, prefix: str) -> tuple[str, ...]:
        return _lines(small[tag], prefix) if tag in small else ()

    if LAYOUT in small:
        layout = _layout(small[LAYOUT])
    invalid = ""
    if NOT_MEASURED in small:
        layout, invalid = Layout(), lines(NOT_MEASURED, f"step {step}: ")[0] or "no reason is given"
    for name, place in arrays.items():
        _check(name, place.shape or (), layout)
    alarms_of(small.get(ALARMS, b"[]"))
    return ProbeEvent(
        step=step,
        layout=layout,
        loss=float(struct.unpack("<f", small[LOSS])[0]) if LOSS in small else math.nan,
        invalid=invalid,
        warnings=lines(WARNINGS, "warning: "),
        notes=lines(NOTES, "note: "),
        alarms=alarms,
        arrays=arrays,
    )


def alarms_of(text: bytes) -> list[Alarm]:
    """The alarms in the JSON of one event.

    Raises:
        One of MALFORMED: it is not what our writer writes.
    """
    return [alarm_of(alarm) for alarm in json.loads(text)]


def _layout(text: bytes) -> Layout:
    data = json.loads(text)
    layout = Layout(tuple(map(str, data["layers"])), tuple(map(int, data["heads"])))
    if len(layout.layers) != len(layout.heads) or not all(0 <= heads <= MOST_HEADS for heads in layout.heads):
        raise ValueError(f"{len(layout.layers)} layers, and {list(layout.heads)} as their numbers of heads")
    return layout


def _check(name: str, shape: tuple[int, ...], layout: Layout) -> None:
    whole = (len(layout.layers), max(layout.heads, default=0))
    if name.startswith(PICTURES):
        good = len(shape) == (3 if name.startswith("map/") else 1)
    else:
        good = shape in (whole, whole[:1])
    if not good:
        raise ValueError(f"{name} has shape {list(shape)}, with {list(layout.heads)} heads")


def _lines(text: bytes, prefix: str) -> tuple[str, ...]:
    """The items of a Markdown list of ``summaries.text``, as they were before ``markdown``."""
    return tuple(html.unescape(line.removeprefix(f"- {prefix}")) for line in text.decode().split("\n"))


def _value(data: bytes, at: int, stop: int, start: int) -> tuple[str, Place] | None:
    """Tag and place of one ``Summary.Value``; None for what is not a probe's."""
    tag = ""
    for found, first, last in fields(data, at, stop):
        if found == _TAG:
            tag = data[first:last].decode("utf-8", "replace")
            if not tag.startswith(PREFIX) and tag not in TEXTS:
                return None
        elif found == _TENSOR and tag and (place := _tensor(data, first, last, start)):
            wanted = place.shape is None if tag in TEXTS else place.shape == () if tag == LOSS else bool(place.shape)
            return (tag, place) if wanted else None
    return None


def _tensor(data: bytes, at: int, stop: int, start: int) -> Place | None:
    """Where a ``TensorProto`` has its numbers or its text; None where it is not as our writer leaves it."""
    kind = 0
    shape: tuple[int, ...] = ()
    for found, first, last in fields(data, at, stop):
        if found == _DTYPE:
            kind, _ = varint(data, first, last)
        elif found == _SHAPE:
            shape = tuple(_sizes(data, first, last))
        elif found == _CONTENT and kind == DT_FLOAT and last - first == 4 * math.prod(shape):
            return Place(start + first, start + last, shape)
        elif found == _STRING and kind == DT_STRING:
            return Place(start + first, start + last, None)
    # No content is not written.
    return Place(start + at, start + at, shape) if kind == DT_FLOAT and not math.prod(shape) else None


def _sizes(data: bytes, at: int, stop: int) -> Iterator[int]:
    """The sizes in a ``TensorShapeProto``; one of 0 is not written."""
    for dimension, first, last in fields(data, at, stop):
        if dimension == _DIMENSION:
            sizes = [varint(data, low, high)[0] for size, low, high in fields(data, first, last) if size == _SIZE]
            yield sizes[-1] if sizes else 0

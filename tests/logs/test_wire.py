"""Where fields lie, against Google's own library; checksums against TensorBoard's."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.tensorflow_stub import pywrap_tensorflow

from attnprobe.logs.checksum import BLOCK, masked_crc32c
from attnprobe.logs.wire import BYTES, FIXED32, FIXED64, VARINT, fields, signed, varint
from tests.reproducible import reproducible

INTEGERS = st.integers(-(2**63), 2**63 - 1)
SHAPES = st.builds(
    TensorShapeProto,
    dim=st.lists(st.builds(TensorShapeProto.Dim, size=INTEGERS, name=st.text(max_size=3)), max_size=3),
    unknown_rank=st.booleans(),
)
TENSORS = st.builds(
    TensorProto,
    dtype=st.integers(0, 23),
    tensor_shape=SHAPES,
    tensor_content=st.binary(max_size=300),
    float_val=st.lists(st.floats(width=32), max_size=3),
    string_val=st.lists(st.binary(max_size=3), max_size=3),
)
VALUES = st.builds(Summary.Value, tag=st.text(), tensor=TENSORS) | st.builds(
    Summary.Value, tag=st.text(), simple_value=st.floats(width=32)
)
EVENTS = st.builds(
    Event, wall_time=st.floats(), step=INTEGERS, summary=st.builds(Summary, value=st.lists(VALUES, max_size=3))
)


def payloads(message: Any) -> list[bytes | int]:
    """Of every field that was set, as Google's library has it; numbers of variable length as numbers."""
    found: list[bytes | int] = []
    for field, value in message.ListFields():
        several = list(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value]
        if field.type == field.TYPE_FLOAT:  # repeated ones lie behind each other in one field
            found.append(struct.pack(f"<{len(several)}f", *several))
        elif field.type == field.TYPE_DOUBLE:
            found.append(struct.pack("<d", value))
        elif field.type == field.TYPE_MESSAGE:
            found += [each.SerializeToString() for each in several]
        else:
            found += [each.encode() if isinstance(each, str) else each for each in several]
    return found


def messages(message: Any) -> list[Any]:
    """The messages directly within one."""
    inner = [(field, value) for field, value in message.ListFields() if field.type == field.TYPE_MESSAGE]
    return [each for _, value in inner for each in (value if isinstance(value, Sequence) else [value])]


def assert_fields_of(message: Any, data: bytes, at: int, stop: int) -> None:
    found = list(fields(data, at, stop))
    assert payloads(message) == [
        signed(varint(data, first, last)[0]) if key & 7 == VARINT else data[first:last] for key, first, last in found
    ]
    inner = {field.number for field, _ in message.ListFields() if field.type == field.TYPE_MESSAGE}
    places = [(first, last) for key, first, last in found if key >> 3 in inner]
    for each, (first, last) in zip(messages(message), places, strict=True):
        assert_fields_of(each, data, first, last)


@given(EVENTS)
@reproducible(150)
def test_positions_are_those_of_the_payload(message: Any) -> None:
    data = b"before" + message.SerializeToString() + b"behind"
    assert_fields_of(message, data, 6, len(data) - 6)


@given(st.binary(max_size=60))
@reproducible(300)
def test_bytes_that_are_no_message_are_a_value_error(data: bytes) -> None:
    try:
        found = list(fields(data, 0, len(data)))
    except ValueError:
        return
    assert all(
        0 <= first <= last <= len(data) and key & 7 in (VARINT, FIXED32, FIXED64, BYTES) for key, first, last in found
    )


def test_groups_are_passed_over() -> None:
    inside = bytes([4 << 3 | 3, 1 << 3, 7, 5 << 3 | 3, 5 << 3 | 4, 4 << 3 | 4])
    assert list(fields(inside + bytes([2 << 3, 9]), 0, 8)) == [(16, 7, 8)]
    for torn in (inside[:-1], inside[-1:]):
        with pytest.raises(ValueError, match=r"no field begins|a group without an end"):
            list(fields(torn, 0, len(torn)))


@given(st.binary(max_size=40), st.integers(0, 3 * BLOCK))
@reproducible(60)
def test_checksums(data: bytes, size: int) -> None:
    data = (data or b"x") * (size // max(1, len(data)) + 1)
    assert masked_crc32c(data) == pywrap_tensorflow.masked_crc32c(data)


@pytest.mark.parametrize("size", [0, BLOCK - 1, BLOCK, BLOCK + 1, BLOCK + 3, 2 * BLOCK])
def test_checksums_about_a_block(size: int) -> None:
    data = bytes((31 * index + 7) % 251 for index in range(size))
    assert masked_crc32c(data) == pywrap_tensorflow.masked_crc32c(data)

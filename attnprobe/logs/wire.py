"""The fields of a protocol buffer's message: where each lies, without decoding what is in it.

Public libraries decode a whole message. A probe of a large model is 300 kB, of which a page needs four bytes.
"""

from __future__ import annotations

from collections.abc import Iterator

#: Kinds of a field on the wire.
VARINT, FIXED64, BYTES, GROUP, END_GROUP, FIXED32 = range(6)
_SIZE = {FIXED64: 8, FIXED32: 4}


def key(number: int, kind: int) -> int:
    """What stands before a field on the wire. A known number with another kind is an unknown field."""
    return number << 3 | kind


def fields(data: bytes, at: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(key, start, stop) of the payload of every field between ``at`` and ``stop``, in the order written.

    Groups, which TensorBoard's messages have none of, are passed over.

    Raises:
        ValueError: these bytes are no message.
    """
    depth = 0
    while at < stop:
        found, at = varint(data, at, stop)
        kind = found & 7
        end = at
        if kind == BYTES:
            size, at = varint(data, at, stop)
            end = at + size
        elif kind == VARINT:
            _, end = varint(data, at, stop)
        elif kind in _SIZE:
            end = at + _SIZE[kind]
        elif kind in (GROUP, END_GROUP):
            depth += 1 if kind == GROUP else -1
        if found < 8 or kind > FIXED32 or depth < 0:
            raise ValueError(f"no field begins with {found}")
        if end > stop:
            raise ValueError(f"a field that ends {end - stop} bytes behind its message")
        if not depth and kind != END_GROUP:
            yield found, at, end
        at = end
    if depth:
        raise ValueError("a group without an end")


def varint(data: bytes, at: int, stop: int) -> tuple[int, int]:
    """The unsigned number of 64 bits at ``at``, and where it ends.

    Raises:
        ValueError: it does not end before ``stop``.
    """
    value = shift = 0
    while at < stop and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & 0xFFFFFFFFFFFFFFFF, at
        shift += 7
    raise ValueError("a number without an end")


def signed(value: int) -> int:
    """An ``int64`` as protocol buffers write it: in two's complement."""
    return value - (1 << 64) if value >> 63 else value

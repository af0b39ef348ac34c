"""The fields of a protocol buffer's message: where each lies, without decoding what is in it.

Public libraries decode a whole message. A probe of a large model is 300 kB, of which a page needs four bytes.
"""

from __future__ import annotations

from collections.abc import Iterator

_FIXED = {1: 8, 5: 4}


def fields(data: bytes, at: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(number, start, stop) of the payload of every field between ``at`` and ``stop``, in the order written.

    Raises:
        ValueError: these bytes are no message.
    """
    while at < stop:
        key, at = varint(data, at, stop)
        kind = key & 7
        if kind == 2:
            size, at = varint(data, at, stop)
            end = at + size
        elif kind == 0:
            _, end = varint(data, at, stop)
        elif kind in _FIXED:
            end = at + _FIXED[kind]
        else:
            raise ValueError(f"no field is of kind {kind}")
        if end > stop:
            raise ValueError(f"a field that ends {end - stop} bytes behind its message")
        yield key >> 3, at, end
        at = end


def varint(data: bytes, at: int, stop: int) -> tuple[int, int]:
    """The whole number at ``at``, and where it ends.

    Raises:
        ValueError: it does not end before ``stop``.
    """
    value = shift = 0
    while at < stop and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    raise ValueError("a number without an end")

"""Numbers as text that is short, for a page that holds its own data; ``embedded.js`` reads them."""

from __future__ import annotations

import base64
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnprobe.logs.source import Numbers

#: Bytes of a number before compression.
BYTES = 3

# Bits of a float32: all but the sign, and those of infinity.
_SIZE, _INFINITE = 0x7FFFFFFF, 0x7F800000


def packed(values: Numbers) -> dict[str, Any]:
    """Float32 rounded to 16 bits behind the sign and exponent: five digits, and no number of any size becomes zero.

    The three bytes of all numbers stand in planes, which compress better, as zlib and base64.
    """
    with np.errstate(over="ignore"):  # JSONL may hold larger ones
        bits = np.where(np.isnan(values), np.nan, values).astype("<f4").view("<u4").ravel()
    rounded = (bits + np.uint32(0x80)) & np.uint32(0xFFFFFF00)
    # What is not finite stays as it is, and so does what rounding would make infinite.
    keep = (bits & _SIZE >= _INFINITE) | (rounded & _SIZE >= _INFINITE)
    rounded[keep] = bits[keep]
    rounded[(rounded & _SIZE == 0) & (bits & _SIZE > 0)] |= 0x100
    planes: NDArray[np.uint8] = rounded.astype("<u4").view(np.uint8).reshape(-1, BYTES + 1)[:, 1:].T
    return {"shape": values.shape, "data": base64.b64encode(zlib.compress(planes.tobytes(), 9)).decode()}

"""Heat maps as PNG bytes, from a colour table and a few glyphs: no plotting library, a few milliseconds.

Every panel has its scale below it. Magnitudes use viridis, signed values blue-white-red around zero; both can be read
by colour-blind people. Grey is NaN: nothing is visible there, or nothing was measured.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from attnprobe.report import HeadMap

#: Length of the longer side of a panel; an enlarged pixel is a whole number of pixels, so it can be a little less.
SIDE = 256
_GAP = 12
_NAN = (176, 176, 176)
_INK = (64, 64, 64)

_VIRIDIS = ("440154", "472d7b", "3b528b", "2c728e", "21918c", "28ae80", "5ec962", "addc30", "fde725")
_DIVERGING = (
    "053061",
    "2166ac",
    "4393c3",
    "92c5de",
    "d1e5f0",
    "f7f7f7",
    "fddbc7",
    "f4a582",
    "d6604d",
    "b2182b",
    "67001f",
)

# Five rows of three pixels, one octal digit a row.
_GLYPHS = {
    "0": "75557", "1": "26227", "2": "71747", "3": "71717", "4": "55711", "5": "74717", "6": "74757", "7": "71111",
    "8": "75757", "9": "75717", "-": "00700", "+": "02720", ".": "00002", "e": "07747", " ": "00000",
    "A": "25755", "b": "44757", "a": "06357",
}  # fmt: skip


def head_picture(picture: HeadMap) -> NDArray[np.uint8]:
    """``[height, width, 3]``: attention, compatibility b and advantage A, or only attention in forward-only use."""
    # A causal map's first row is always 1: only the root keeps the weights of long rows apart from zero.
    panels = [panel(picture.attention.double().numpy(), "a", root=True)]
    if picture.compatibility is not None and picture.advantage is not None:
        panels.append(panel(picture.compatibility.double().numpy(), "b", diverging=True))
        panels.append(panel(picture.advantage.double().numpy(), "A", diverging=True))
    return beside(panels)


def panel(
    values: NDArray[Any], title: str = "", *, diverging: bool = False, root: bool = False, high: float = 0.0
) -> NDArray[np.uint8]:
    """One map with a colour bar: the ends of its range, and ``title`` between them.

    Args:
        values: ``[rows, columns]``.
        title: one of the few letters that there are glyphs for.
        diverging: the range is centred at zero; otherwise it starts there.
        root: the colour follows the square root of the value.
        high: end of the range; by default the largest finite magnitude.
    """
    finite = np.abs(values[np.isfinite(values)])
    high = high or float(finite.max(initial=0.0)) or 1.0
    scaled = np.clip(values / high, -1 if diverging else 0, 1)
    scaled = (scaled + 1) / 2 if diverging else np.sqrt(scaled) if root else scaled
    colours = colourize(scaled, _DIVERGING if diverging else _VIRIDIS)
    factor = max(1, SIDE // max(1, *values.shape))
    body = colours.repeat(factor, axis=0).repeat(factor, axis=1)
    ramp = colourize(np.linspace(0, 1, SIDE)[None], _DIVERGING if diverging else _VIRIDIS).repeat(8, axis=0)
    height, width = body.shape[0] + 8 + 8 + 4 + 10, max(SIDE, body.shape[1])
    image = np.full((height, width, 3), 255, np.uint8)
    image[: body.shape[0], : body.shape[1]] = body
    image[body.shape[0] + 8 : body.shape[0] + 16, :SIDE] = ramp
    top = height - 10
    low, middle, end = (glyphs(text) for text in (f"{-high:.3g}" if diverging else "0", title or " ", f"{high:.3g}"))
    for start, mask in ((0, low), ((SIDE - middle.shape[1]) // 2, middle), (SIDE - end.shape[1], end)):
        image[top:, start : start + mask.shape[1]][mask] = _INK
    return image


def beside(panels: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """The panels, equally high, in one row with a white margin."""
    gap = np.full((panels[0].shape[0], _GAP, 3), 255, np.uint8)
    row = np.concatenate([part for image in panels for part in (gap, image)] + [gap], axis=1)
    return np.pad(row, ((_GAP, _GAP), (0, 0), (0, 0)), constant_values=255)


def colourize(values: NDArray[Any], anchors: Sequence[str]) -> NDArray[np.uint8]:
    """``[...]`` in 0..1 -> ``[..., 3]``, linear between the anchor colours; NaN is grey."""
    points = np.array([list(bytes.fromhex(anchor)) for anchor in anchors], float)
    table = np.stack([np.interp(np.linspace(0, len(anchors) - 1, 256), range(len(anchors)), c) for c in points.T], -1)
    known = ~np.isnan(values)
    index = np.where(known, np.clip(values, 0, 1) * 255, 0).round().astype(np.intp)
    colours = np.where(known[..., None], table[index], np.array(_NAN)).round()
    return np.asarray(colours, np.uint8)


def glyphs(text: str) -> NDArray[np.bool_]:
    """``text`` as a mask, ten pixels high."""
    columns = [np.array([[int(row) >> bit & 1 for bit in (2, 1, 0, 3)] for row in _GLYPHS[c]], bool) for c in text]
    return np.concatenate(columns, axis=1)[:, :-1].repeat(2, axis=0).repeat(2, axis=1)


def png(image: NDArray[np.uint8]) -> bytes:
    """``[height, width, 3]`` as a PNG file."""
    height, width = image.shape[:2]
    rows = np.concatenate([np.zeros((height, 1), np.uint8), image.reshape(height, -1)], axis=1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    packed = zlib.compress(rows.tobytes(), 6)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")

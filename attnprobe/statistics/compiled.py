"""The sums of ``pair_sums`` as one pass over a tile in C: compiled when first used, if there is a compiler.

It takes a third of the time of the same in torch operations. The library lives in memory only: nothing is written
that another run, or another machine, could load. ``ATTNPROBE_COMPILED=0`` in the environment does without it.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from attnprobe.statistics.pair_sums import PairSums, Tile

SOURCE = Path(__file__).with_name("tile.c")
COMPILERS = ("cc", "gcc", "clang")
# -ffast-math would lose NaN.
FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fopenmp-simd", "-shared", "-fPIC")
NATIVE = (("-march=native", "-mprefer-vector-width=512"), ("-mcpu=native",), ())
ERROR, EXTENDED, MASKED = 1, 2, 4


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="attnprobe")


class CompiledTile:
    """Adds a tile of float32 pairs on the CPU to ``PairSums``."""

    def __init__(self, function: Any) -> None:
        self._function = function

    def __call__(self, sums: PairSums, tile: Tile) -> Tensor:
        """Add the tile; the weights, if ``sums`` are extended."""
        if not tile.scores.is_contiguous():  # the model's own, where it laid them out in another way
            tile = replace(tile, scores=tile.scores.contiguous())
        items, rows, columns = tile.scores.shape
        threads = torch.get_num_threads()
        if threads == 1:
            self._add(sums, tile, slice(0, items), slice(0, rows), sums.usage[tile.index, tile.columns])
            return tile.scores
        # A share of the rows, and with it usage of its own, for each thread.
        step = max(1, -(-rows * items // threads))
        parts = [(n, slice(i, min(i + step, rows))) for n in range(items) for i in range(0, rows, step)]
        usages = sums.usage.new_zeros(len(parts), 1, columns)
        work = zip(parts, usages, strict=True)
        for done in [_threads().submit(self._add, sums, tile, slice(n, n + 1), i, u) for (n, i), u in work]:
            done.result()
        for (n, _), usage in zip(parts, usages, strict=True):
            sums.usage[tile.index.start + n, tile.columns] += usage[0]
        return tile.scores

    def _add(self, sums: PairSums, tile: Tile, items: slice, rows: slice, usage: Tensor) -> None:
        scores, compatibilities = tile.scores, tile.compatibilities
        first = tile.index.start + items.start
        whole = scores.shape[1]
        skipped = 4 * (items.start * whole + rows.start) * scores.shape[2]
        length = sums.share.shape[1]
        row = first * length + tile.rows.start + rows.start
        what = (EXTENDED if sums.extended else 0) | (MASKED if tile.visible is not None else 0)
        self._function(
            _address(scores, skipped),
            None if compatibilities is None else _address(compatibilities, skipped),
            items.stop - items.start,
            rows.stop - rows.start,
            scores.shape[2],
            tile.columns.start,
            _address(sums.limit, 4 * row),
            *(_address(vector, 4 * row) for vector in (sums.shift, sums.centre, sums.share, sums.place)),
            length,
            _address(sums.sums, 4 * row),
            sums.share.numel(),
            _address(usage),
            usage.stride(0),
            what | (0 if compatibilities is None else ERROR),
        )


def _address(tensor: Tensor, offset: int = 0) -> int:
    return tensor.data_ptr() + offset


def compiled_tile(device: torch.device, dtype: torch.dtype) -> CompiledTile | None:
    """The compiled pass, where it can be used."""
    if device.type != "cpu" or dtype != torch.float32 or os.environ.get("ATTNPROBE_COMPILED") == "0":
        return None
    return load()[0]


def uncompiled(device: torch.device, dtype: torch.dtype) -> str:
    """Why the pass is not compiled where it could be, empty if it is or never can be."""
    if device.type != "cpu" or dtype == torch.float64:
        return ""
    return "ATTNPROBE_COMPILED=0 says so" if os.environ.get("ATTNPROBE_COMPILED") == "0" else load()[1]


@functools.cache
def load() -> tuple[CompiledTile | None, str]:
    """The function, or None and why there is none."""
    compiler = next(filter(None, map(shutil.which, (*filter(None, [os.environ.get("CC")]), *COMPILERS))), None)
    if compiler is None:
        return None, "no C compiler was found"
    try:
        tile = CompiledTile(_compile(compiler).attnprobe_tile)
        wrong = _differs(tile)
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        return None, f"{compiler} could not be used: {error}"
    return (None, f"what {compiler} makes gives other numbers") if wrong else (tile, "")


def _compile(compiler: str) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory(prefix="attnprobe-") as folder:
        path = Path(folder) / "tile.so"
        for native in NATIVE:
            command = [compiler, *FLAGS, *native, str(SOURCE), "-o", str(path), "-lm"]
            result = subprocess.run(command, capture_output=True, timeout=60, text=True, check=False)
            if result.returncode == 0:
                break
        else:
            raise OSError(result.stderr.strip().splitlines()[-1:] or result.returncode)
        library = ctypes.CDLL(str(path))
    pointer, number = ctypes.c_void_p, ctypes.c_long
    library.attnprobe_tile.restype = None
    library.attnprobe_tile.argtypes = (
        *(pointer, pointer, number, number, number, number),
        *(pointer, pointer, pointer, pointer, pointer, number, pointer, number, pointer, number, number),
    )
    return library


def _differs(tile: CompiledTile) -> bool:
    """Whether the compiled pass and torch disagree on a tile of everything."""
    from attnprobe.statistics.pair_sums import PairSums, Tile

    wave = torch.arange(2 * 5 * 67, dtype=torch.float32).view(2, 5, 67).sin()
    limit = torch.tensor([[67, 1, 0, 40, 67]] * 2, dtype=torch.int32)
    results = []
    for compiled in (tile, None):
        shift = limit.clamp(min=1).log2()
        vectors = {"limit": limit, "shift": shift, "centre": shift.sin(), "place": limit.float()}
        sums = PairSums(**vectors, share=(-shift).exp2(), keys=67, extended=True, compiled=compiled)
        index, rows, columns = slice(0, 2), slice(0, 5), slice(0, 67)
        sums.add(Tile(index, rows, columns, 4 * wave, wave.roll(1), None, limited=True))
        results.append((sums.sums, sums.usage))
    return not all(torch.allclose(a, b, 1e-5, 1e-5) for a, b in zip(*results, strict=True))

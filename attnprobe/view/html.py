"""A report in one file: the page of the Attention tab with its data inside, to be opened from a disk or sent on."""

from __future__ import annotations

import base64
import html
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from attnprobe import __version__
from attnprobe.errors import WriterError
from attnprobe.logs.logged import LoggedRun
from attnprobe.logs.source import Numbers, picture_name
from attnprobe.view import answers
from attnprobe.view.bundle import STATIC, bundle
from attnprobe.view.thinning import evenly
from attnprobe.writers.strict_json import dumps

#: Probes of a run that are embedded, if they fit; those of alarms and extremes are added, if they fit as well.
PROBES, FEWEST = 200, 20
#: Bytes of statistics, and of pictures, before compression.
STATISTICS, PICTURES = 16 << 20, 8 << 20
#: Bytes of a number, see ``_packed``.
BYTES = 3
#: Alarms whose probes are embedded in any case.
ALARMS = 100

# Bits of a float32: all but the sign, and those of infinity.
_SIZE, _INFINITE = 0x7FFFFFFF, 0x7F800000

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main id="attnprobe"></main>
<noscript>This report needs JavaScript, which runs in the page and loads nothing.</noscript>
<script type="application/json" id="attnprobe-data">{data}</script>
<script>{chart}</script>
<script>{script}</script>
</body>
</html>
"""


def write_page(runs: Mapping[str, LoggedRun], path: str | PathLike[str], title: str = "") -> None:
    """Write the report of some runs, which the page shows side by side.

    Args:
        runs: the names that they have on the page -> the runs.
        path: the file.
        title: of the page; the runs' names where empty.

    Raises:
        WriterError: the file cannot be written.
    """
    text = page(runs, title)
    try:
        # Half a surrogate pair, as in names of files that are no text, cannot be written.
        Path(os.path.expanduser(path)).write_text(text, "utf-8", "replace")
    except (OSError, ValueError) as error:
        raise WriterError(f"cannot write {path}: {error}; pass a file that may be written") from error


def page(runs: Mapping[str, LoggedRun], title: str = "") -> str:
    """The text of that file: a few megabytes, or tens with thousands of heads, whatever the run's length."""
    title = title or "Attention: " + ", ".join(runs)
    data = dumps({"title": title} | _data(runs)).replace("<", "\\u003c")
    return _PAGE.format(
        title=html.escape(title),
        style=_static("vendor/uPlot.min.css") + _static("style.css"),
        data=data,
        chart=_static("vendor/uPlot.iife.min.js"),
        script=bundle("report.js"),
    )


def _static(name: str) -> str:
    return (STATIC / name).read_text("utf-8")


def _data(runs: Mapping[str, LoggedRun]) -> dict[str, Any]:
    """What ``embedded.js`` answers from; arrays are found by the JSON of their run's and their own names."""
    overview = answers.overview(runs.values())
    arrays: dict[str, Any] = {}
    maps: dict[str, list[int]] = {}
    notes = []
    for (name, run), about in zip(runs.items(), overview["runs"], strict=True):
        chosen = probes(run, STATISTICS // len(runs))
        pictured = _pictured(run, PICTURES // len(runs))
        about |= {"name": name, "steps": run.steps[chosen], "loss": run.loss[chosen], "maps": [*pictured]}
        for statistic in about["names"]:
            arrays[_key(name, statistic)] = _packed(_frames(run, statistic, chosen))
        for (layer, head), most in pictured.items():
            for step, values in _pictures(run, layer, head, most):
                arrays[_key(name, "map", layer, head, step)] = _packed(values)
                maps.setdefault(_key(name, layer, head), []).append(step)
            if found := answers.usage(run, layer, head):
                arrays[_key(name, "usage", layer, head)] = _packed(found[1]) | {"steps": found[0]}
        notes.append(f"{name}: {_of(len(chosen), len(run))} probes")
        if len(pictured) < len(run.maps):
            notes.append(f"maps of {_of(len(pictured), len(run.maps))} heads")
    note = f"attnprobe {__version__} · {'; '.join(notes)} · numbers have five digits"
    return {"overview": overview, "arrays": arrays, "maps": maps, "note": note}


def _of(some: int, number: int) -> str:
    return f"{some} of {number}" if some < number else f"{number}"


def _key(*parts: Any) -> str:
    """As ``JSON.stringify`` writes it."""
    return json.dumps(parts, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "backslashreplace").decode()


def probes(run: LoggedRun, room: int) -> list[int]:
    """Ascending indices of the probes to embed: evenly spaced, where alarms changed, and each statistic's extremes.

    Args:
        room: bytes that the evenly spaced ones may fill, and again the others.
    """
    layers, heads = run.layout
    size = BYTES * len(layers) * max(heads, default=1) * max(1, len(run.statistics))
    fitting = max(FEWEST, room // max(1, size))
    most = min(PROBES, fitting)
    if len(run) <= most:
        return list(range(len(run)))
    alarms = run.alarms[:ALARMS]
    raised, last = ([getattr(alarm, end).step for alarm in alarms] for end in ("first", "last"))
    turns = [np.searchsorted(run.steps, steps).tolist() for steps in (raised, last)]
    needed = dict.fromkeys(index for index in (*turns[0], *_extremes(run), *turns[1]) if index < len(run))
    return evenly(len(run), most, [*needed][:fitting])


def _extremes(run: LoggedRun) -> Iterator[int]:
    """The probes at which a statistic's largest or smallest finite number of the run is."""
    for name in (*run.statistics, *run.layer_statistics):
        ends = []
        for start in range(0, len(run), answers.BLOCK):
            values = answers.frames(run, name, start, start + answers.BLOCK)
            values = np.where(np.isfinite(values), values, np.nan).reshape(len(values), -1)
            low = np.fmin.reduce(values, axis=1, initial=np.inf)
            ends.append(np.stack([low, np.fmax.reduce(values, axis=1, initial=-np.inf)]))
        low, high = np.concatenate(ends, axis=1)
        yield from (int(low.argmin()), int(high.argmax()))


def _frames(run: LoggedRun, name: str, chosen: list[int]) -> Numbers:
    """``[chosen, layers, heads]``."""
    frames = [answers.frames(run, name, index, index + 1) for index in chosen] or [np.empty((0, 0, 0), np.float32)]
    return cast("Numbers", np.concatenate(frames))


def _pictured(run: LoggedRun, room: int) -> dict[tuple[str, int], int]:
    """(layer, head) -> at how many steps its pictures are embedded: of all heads, those of alarms first, that fit."""
    alarming = {(alarm.first.layer, head) for alarm in run.alarms for head in alarm.heads}
    order = sorted(run.maps, key=lambda where: where not in alarming)
    sizes = {}
    for layer, head in order:
        found = answers.pictures(run, layer, head, np.inf)
        usage = answers.usage(run, layer, head)
        if found:
            sizes[layer, head] = BYTES * found[1].size, BYTES * usage[1].size if usage else 0
            room -= sum(sizes[layer, head])
            if room < 0:
                del sizes[layer, head]
                break
    spare = max(0, room) // max(1, sum(size for size, _ in sizes.values()))
    return {where: 1 + min(11, spare) for where in sizes}


def _pictures(run: LoggedRun, layer: str, head: int, most: int) -> Iterator[tuple[int, Numbers]]:
    """(step, pictures) at so many steps, the last one always."""
    name = picture_name("map", layer, head)
    held = run.source.holds(name)
    chosen = [held[index] for index in evenly(len(held), most)] if most > 1 else held[-1:]
    for probe, values in zip(chosen, run.source.arrays(name, chosen), strict=True):
        if values is not None:
            yield run.source.probes[probe].step, values


def _packed(values: Numbers) -> dict[str, Any]:
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

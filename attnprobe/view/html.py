"""A report in one file: the page of the Attention tab with its data inside, to be opened from a disk or sent on."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, cast

import numpy as np

from attnprobe import __version__
from attnprobe.errors import WriterError
from attnprobe.logs.logged import LoggedRun
from attnprobe.logs.source import Numbers
from attnprobe.view import answers
from attnprobe.view.bundle import STATIC, bundle
from attnprobe.view.packing import packed
from attnprobe.view.selection import pictured, pictures, probes
from attnprobe.writers.strict_json import dumps

#: Bytes of statistics, and of pictures, before compression.
STATISTICS, PICTURES = 16 << 20, 8 << 20

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
        shown = pictured(run, PICTURES // len(runs))
        about |= {"name": name, "steps": run.steps[chosen], "loss": run.loss[chosen], "maps": [*shown]}
        for statistic in about["names"]:
            arrays[_key(name, statistic)] = packed(_frames(run, statistic, chosen))
        for (layer, head), most in shown.items():
            for step, values in pictures(run, layer, head, most):
                arrays[_key(name, "map", layer, head, step)] = packed(values)
                maps.setdefault(_key(name, layer, head), []).append(step)
            if found := answers.usage(run, layer, head):
                arrays[_key(name, "usage", layer, head)] = packed(found[1]) | {"steps": found[0]}
        notes.append(f"{name}: {_of(len(chosen), len(run))} probes")
        if len(shown) < len(run.maps):
            notes.append(f"maps of {_of(len(shown), len(run.maps))} heads")
    note = f"attnprobe {__version__} · {'; '.join(notes)} · numbers have five digits"
    return {"overview": overview, "arrays": arrays, "maps": maps, "note": note}


def _of(some: int, number: int) -> str:
    return f"{some} of {number}" if some < number else f"{number}"


def _key(*parts: Any) -> str:
    """As ``JSON.stringify`` writes it."""
    return json.dumps(parts, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "backslashreplace").decode()


def _frames(run: LoggedRun, name: str, chosen: list[int]) -> Numbers:
    """``[chosen, layers, heads]``."""
    frames = [answers.frames(run, name, index, index + 1) for index in chosen] or [np.empty((0, 0, 0), np.float32)]
    return cast("Numbers", np.concatenate(frames))

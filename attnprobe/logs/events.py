"""Probes out of TensorBoard event files; see the table of tags in ``writers.summaries``."""

from __future__ import annotations

import html
import json
import math
import os
import struct
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.util.tensor_util import make_ndarray

from attnprobe.errors import AttnProbeWarning, LogError
from attnprobe.logs.record import report_of
from attnprobe.report import StepReport

#: A record's length and its checksum, and how many bytes stand around it: these, and the checksum of the record.
HEAD = struct.Struct("<QI")
FRAME = HEAD.size + 4


def read_events(paths: Iterable[Path]) -> list[StepReport]:
    """The reports in the event files of one directory, in the order written; none where another program wrote them.

    Raises:
        LogError: an event has the tags of a probe and is none.
    """
    reports: list[StepReport] = []
    layout: dict[str, Any] = {}  # is written where it changes
    for path in sorted(paths, key=_start):
        for event in _load(path):
            tensors = {value.tag: value.tensor for value in event.summary.value if value.HasField("tensor")}
            try:
                if "attnprobe/layout" in tensors:
                    layout = json.loads(_text(tensors["attnprobe/layout"]))
                if {"attnprobe/alarms", "attention/not_measured"} & set(tensors):
                    reports.append(report_of(_record(event.step, tensors, layout)))
            except (IndexError, TypeError, ValueError) as error:
                raise LogError(f"{path}, step {event.step}: {error}") from error
    return reports


def _load(path: Path) -> Iterator[Any]:
    """Every event; a torn end is left out, and what follows damage, with a warning."""
    # Raw is without the conversions of old summaries: ours need none, and TensorBoard would do it to all.
    end = 0
    for record in RawEventFileLoader(str(path)).Load():
        end += FRAME + len(record)
        yield Event.FromString(record)
    if _damaged(path, end):
        warnings.warn(f"{path} is damaged from byte {end} on; what follows is not read", AttnProbeWarning, stacklevel=2)


def _damaged(path: Path, end: int) -> bool:
    """Whether what follows the last record that could be read is more than a record that was not written to its end."""
    with path.open("rb") as file:
        file.seek(end)
        head = file.read(HEAD.size)
        if len(head) < HEAD.size:
            return False
        length, checksum = HEAD.unpack(head)
        return bool(masked_crc32c(head[:8]) != checksum) or end + FRAME + length <= file.seek(0, os.SEEK_END)


def _start(path: Path) -> float:
    """When the file was begun. Its name does not tell: of two in one second number 10 sorts before 9."""
    return next((event.wall_time for event in _load(path)), math.inf)


def _record(step: int, tensors: Mapping[str, Any], layout: Mapping[str, Any]) -> dict[str, Any]:
    """The values of one event as ``jsonl.to_dict`` has them."""
    record: dict[str, Any] = {"step": step, "statistics": {}, "layer_statistics": {}, "nonfinite": {}}
    if "attention/not_measured" in tensors:
        record["invalid"] = _lines(tensors["attention/not_measured"], f"step {step}: ")[0]
    else:
        record |= layout
    for kind in ("warning", "note"):
        if f"attention/{kind}s" in tensors:
            record[f"{kind}s"] = _lines(tensors[f"attention/{kind}s"], f"{kind}: ")
    for tag, tensor in tensors.items():
        name = tag.removeprefix("attnprobe/")
        if name == "alarms":
            record["alarms"] = json.loads(_text(tensor))
        elif name not in (tag, "layout"):
            values = make_ndarray(tensor)
            if name in ("loss", "residual"):
                record[name] = values.tolist()
            elif name.startswith("nonfinite/"):
                record["nonfinite"][name.removeprefix("nonfinite/")] = values.tolist()
            else:
                record["statistics" if values.ndim == 2 else "layer_statistics"][name] = values.tolist()
    return record


def _lines(tensor: Any, prefix: str) -> list[str]:
    """The items of a Markdown list of ``summaries.text``, as they were before ``markdown``."""
    return [html.unescape(line.removeprefix(f"- {prefix}")) for line in _text(tensor).split("\n")]


def _text(tensor: Any) -> str:
    return str(tensor.string_val[0].decode())

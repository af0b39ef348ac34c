"""A report as values of one TensorBoard summary: pure functions, no file.

==========================================  ==============  =========================================================
tag                                         plugin          value
==========================================  ==============  =========================================================
``attnprobe/<statistic>``                   ``attnprobe``   float32 ``[layers, heads]``, or ``[layers]``
``attnprobe/residual``                      ``attnprobe``   float32 ``[layers, heads]``
``attnprobe/nonfinite/<kind>``              ``attnprobe``   float32 ``[layers, heads]``, only with a count above zero
``attnprobe/loss``                          ``attnprobe``   float32 ``[]``, only where known
``attnprobe/layout``                        ``attnprobe``   JSON of layers and heads; when they change
``attnprobe/alarms``                        ``attnprobe``   JSON list of the alarms that stand
``attention/<statistic>/min|mean|max``      ``scalars``     see ``aggregates``
``attention/alarms``                        ``scalars``     number of alarms that stand
``attention/alarm_messages``                ``text``        the new alarms
``attention/warnings``, ``attention/notes`` ``text``        when they change
``attention/not_measured``                  ``text``        why a probe is invalid
``attention_maps/<layer>/head<h>``          ``images``      attention, compatibility, advantage
``attnprobe/map/<layer>/head<h>``           ``attnprobe``   the same as float32 ``[panels, rows, columns]``
``attnprobe/usage/<layer>/head<h>``         ``attnprobe``   float32 ``[columns]``
``attention_maps/overview/<statistic>``     ``images``      layers x heads
==========================================  ==============  =========================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from attnprobe.writers import describe
from attnprobe.writers.aggregates import PREFIX, aggregates
from attnprobe.writers.entry import Entry, floats, image, scalar, string
from attnprobe.writers.heatmap import beside, head_picture, panel
from attnprobe.writers.strict_json import dumps
from attnprobe.writers.text import markdown, printable

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from attnprobe.report import HeadMap, StepReport

PLUGIN = "attnprobe"
SCHEMA = 1


def heads(report: StepReport) -> Iterator[Entry]:
    """Everything that there is per head or per layer, for the plugin's own tab."""

    def entry(name: str, values: ArrayLike, kind: str, level: str, meaning: Callable[[], str]) -> Entry:
        content = {"schema": SCHEMA, "kind": kind, "level": level, "layers": report.layers, "heads": report.heads}
        return Entry(f"{PLUGIN}/{name}", PLUGIN, floats(values), meaning, name, content)

    for level, found in (("head", report.statistics), ("layer", report.layer)):
        for name, tensor in found.items():
            yield entry(printable(name), tensor.numpy(), "statistic", level, partial(describe.statistic, name))
    if report.residual is not None:
        yield entry("residual", report.residual.numpy(), "diagnostic", "head", lambda: describe.RESIDUAL)
    for kind, tensor in report.nonfinite.items():
        if ((counts := tensor.numpy()) > 0).any():  # NaN, where a layer has fewer heads, is no count
            name = f"nonfinite/{printable(kind)}"
            yield entry(name, counts, "diagnostic", "head", partial(describe.nonfinite, kind))
    if not np.isnan(report.loss):
        yield entry("loss", report.loss, "diagnostic", "run", lambda: describe.LOSS)


def layout(report: StepReport) -> Entry:
    """Which row is which layer: layers may be added during a run, and metadata is only read once."""
    return _json("layout", {"schema": SCHEMA, "layers": report.layers, "heads": report.heads}, describe.LAYOUT)


def alarms(report: StepReport) -> Entry:
    return _json("alarms", [alarm.to_dict() for alarm in report.alarms], describe.STANDING)


def scalars(report: StepReport) -> Iterator[Entry]:
    for tag, value in aggregates(report).items():
        yield Entry(tag, "scalars", scalar(value), partial(describe.scalar, tag))


def text(name: str, lines: Iterable[str], meaning: str) -> Entry:
    """A list in the Text tab; ``lines`` are Markdown."""
    return Entry(f"{PREFIX}/{name}", "text", string("\n".join(f"- {line}" for line in lines)), lambda: meaning)


def alarm_lines(report: StepReport) -> list[str]:
    """The new alarms in Markdown."""
    return [
        f"**{markdown(alarm.name)}**{markdown(str(alarm).removeprefix(alarm.name))}"
        for alarm in report.alarms
        if alarm.new
    ]


def head_map(picture: HeadMap) -> Iterator[Entry]:
    where = f"{printable(picture.layer)}/head{picture.head}"
    yield Entry(f"attention_maps/{where}", "images", image(head_picture(picture)), lambda: describe.HEAD_MAP)
    content = {"schema": SCHEMA, "kind": "map", "level": "head", "layer": picture.layer, "head": picture.head}
    numbers: dict[str, ArrayLike] = {"map": [panel.float().numpy() for panel in picture.panels()]}
    if picture.usage is not None:
        numbers["usage"] = picture.usage.float().numpy()
    for name, values in numbers.items():
        tag = f"{name}/{where}"
        yield Entry(f"{PLUGIN}/{tag}", PLUGIN, floats(values), partial(getattr, describe, name.upper()), tag, content)


def overview(report: StepReport) -> Iterator[Entry]:
    """All heads in one picture, for whoever has only the stock tabs."""
    name = "normalized_entropy"
    if name in report and sum(report.heads) > 1:
        pixels = beside([panel(report[name].numpy(), high=1.0)])
        yield Entry(f"attention_maps/overview/{name}", "images", image(pixels), partial(describe.overview, name))


def _json(name: str, data: object, meaning: str) -> Entry:
    content = {"schema": SCHEMA, "kind": name, "level": "run"}
    return Entry(f"{PLUGIN}/{name}", PLUGIN, string(dumps(data)), lambda: meaning, name, content)

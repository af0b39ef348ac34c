"""A report as HTML for a notebook: the finding first, then heat maps of layers x heads, then every number.

Notebooks strip scripts, and a style sheet would reach the cells around: styles are inline, pictures are PNGs within the
text, and text and lines have the colours of the theme. Each part shows a bounded number of things and says where the
others are, so that a saved notebook stays small.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from attnprobe.catalog import STATISTICS
from attnprobe.writers import describe
from attnprobe.writers.columns import number
from attnprobe.writers.console import COLUMNS
from attnprobe.writers.heatmap import beside, head_picture, panel, png
from attnprobe.writers.text import plural, printable

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from attnprobe.report import Alarm, HeadMap, StepReport

#: Alarms, and lines of warnings and notes, that are shown.
LINES = 30
#: Statistics that get a heat map, and recorded head maps.
PICTURES, MAPS = 9, 6
#: Rows of a table.
ROWS = 200

# Orange and sky blue are told apart by colour-blind people, on white and on black; the word stands there as well.
_EDGE = {"alarm": "#d55e00", "information": "#56b4e9"}
_LINE = "1px solid rgba(128,128,128,.4)"


def render(report: StepReport) -> str:
    """HTML without scripts, style sheets and external resources.

    What cannot be drawn, such as a report put together by hand from tables of other shapes, is shown as text with the
    reason: a cell's result never hides behind a traceback of this module.
    """
    try:
        body = "".join(_parts(report))
    except Exception as error:
        lines = [f"This report cannot be drawn: {type(error).__name__}: {error}", *repr(report).splitlines()]
        body = "<br>".join(map(_text, lines))
    # The classes keep the dollar signs of a module's name from being typeset as formulas.
    return f'<div class="tex2jax_ignore mathjax_ignore" style="overflow-wrap:anywhere">{body}</div>'


def _parts(report: StepReport) -> Iterator[str]:
    yield _summary(report)
    alarms = sorted(report.alarms, key=lambda alarm: alarm.severity != "alarm")
    yield from map(_alarm, alarms[:LINES])
    yield _more(alarms, LINES, "report.alarms")
    counts = {kind: np.nansum(tensor.double().numpy()) for kind, tensor in report.nonfinite.items()}
    broken = [f"{count:.0f} elements of {kind} were NaN or infinite" for kind, count in counts.items() if count > 0]
    yield _listed("warnings", (*broken, *report.warnings))
    yield _listed("notes", report.notes)
    pictured = _pictured(report)
    if pictured:
        yield _quiet("One row per layer, one column per head; grey: not measured, or the layer has fewer heads.")
        yield _gallery(_statistic(report, name) for name in pictured)
    if report.statistics and any(report.heads):
        yield _folded("all heads", _heads(report), opened=not pictured)
    if report.layers:
        yield _folded("all layers", _layers(report))
    if report.maps:
        body = _quiet(describe.HEAD_MAP.replace("`", "")) + _gallery(map(_map, report.maps[:MAPS]))
        more = _more(report.maps, MAPS, "report.maps")
        yield _folded(f"maps of {plural(len(report.maps), 'head')}", body + more, opened=True)


def _summary(report: StepReport) -> str:
    sizes = f"{plural(len(report.layers), 'layer')}, {plural(sum(report.heads), 'head')}"
    state = "valid" if report.valid else f"<b>not measured: {_text(report.invalid)}</b>"
    return f"<p><b>attnprobe, step {report.step}</b>: {sizes}, loss {number(report.loss)}, {state}</p>"


def _alarm(alarm: Alarm) -> str:
    kind = f"{alarm.severity}, snoozed" if alarm.snoozed else alarm.severity
    finding = str(alarm).removeprefix(alarm.name).removesuffix(alarm.advice)
    edge = f"border-left:4px solid {_EDGE.get(alarm.severity, 'gray')};padding-left:8px;margin:6px 0"
    return f'<div style="{edge}"><b>{_text(kind)}: {_text(alarm.name)}</b>{_text(finding)}{_quiet(alarm.advice)}</div>'


def _listed(title: str, lines: Sequence[str]) -> str:
    if not lines:
        return ""
    items = "".join(f"<li>{_text(line)}</li>" for line in lines[:LINES])
    return _folded(f"{title} ({len(lines)})", f"<ul>{items}</ul>{_more(lines, LINES, f'report.{title}')}")


def _pictured(report: StepReport) -> list[str]:
    """What the alarms look at, the usual columns and the user's own; of a report without these, its first statistics.

    One head has no picture: there is nothing to compare it with.
    """
    if sum(report.heads) < 2:
        return []
    read = (name for alarm in report.alarms for name in alarm.reads[:1])
    own = (name for name in report.statistics if name not in STATISTICS)
    wanted = [name for name in dict.fromkeys((*read, *COLUMNS, *own)) if name in report]
    return (wanted or list(report.statistics))[:PICTURES]


def _statistic(report: StepReport, name: str) -> str:
    values = report[name].double().numpy()
    places = np.argwhere(~np.isnan(values))
    found = values[tuple(places.T)]
    ends = []
    for end, index in (("highest", found.argmax()), ("lowest", found.argmin())) if found.size else ():
        layer, head = places[index]
        ends.append(f"{end} {number(found[index])}: {_text(report.layers[layer])} head {head}")
    pixels = beside([panel(values, diverging=bool((found < 0).any()))])
    caption = f"<b>{_text(name)}</b>{_quiet(_meaning(name))}"
    return _figure(pixels, name, caption + ("<br>".join(ends) or "not measured"))


def _map(picture: HeadMap) -> str:
    where = f"{picture.layer} head {picture.head}"
    return _figure(head_picture(picture), where, f"<b>{_text(where)}</b>")


def _gallery(figures: Iterable[str]) -> str:
    return f'<div style="display:flex;flex-wrap:wrap;gap:16px;margin:8px 0">{"".join(figures)}</div>'


def _figure(pixels: NDArray[np.uint8], title: str, caption: str) -> str:
    data = base64.b64encode(png(pixels)).decode("ascii")
    return (
        f'<figure style="margin:0;width:{pixels.shape[1]}px;max-width:100%">'
        f'<img src="data:image/png;base64,{data}" alt="{_text(title)}" style="max-width:100%;outline:{_LINE}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _heads(report: StepReport) -> str:
    places = [(layer, head) for layer, count in enumerate(report.heads) for head in range(count)]
    columns = [tensor.tolist() for tensor in report.statistics.values()]
    rows = (
        (report.layers[layer], str(head), *(number(values[layer][head]) for values in columns))
        for layer, head in places
    )
    return _table("head", report.statistics, rows) + _more(places, ROWS, "report.to_frame()")


def _layers(report: StepReport) -> str:
    columns = [map(number, tensor.tolist()) for tensor in report.layer.values()]
    rows = zip(report.layers, map(str, report.heads), *columns, strict=True)
    return _table("heads", report.layer, rows) + _more(report.layers, ROWS, "report.layer")


def _table(second: str, names: Iterable[str], rows: Iterable[tuple[str, ...]]) -> str:
    """Each row is a layer's name, what ``second`` says, and the numbers ``names``."""
    header = "".join(f'<th title="{_text(_meaning(name))}">{_text(name)}</th>' for name in names)
    lines = "".join(
        # The title says which row it is where the first columns are scrolled away.
        f'<tr title="{_text(f"{layer} {second} {count}")}"><th style="text-align:left">{_text(layer)}</th>'
        + f"<td>{count}</td>"
        + "".join(f"<td>{cell}</td>" for cell in cells)
        + "</tr>"
        for layer, count, *cells in islice(rows, ROWS)
    )
    style = "border-collapse:collapse;text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums"
    return (
        f'<div style="overflow:auto;max-height:30em;border:{_LINE}"><table cellpadding="4" style="{style}">'
        f'<thead><tr><th style="text-align:left">layer</th><th>{second}</th>{header}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def _folded(title: str, body: str, *, opened: bool = False) -> str:
    return f"<details{' open' if opened else ''}><summary>{title}</summary>{body}</details>"


def _quiet(text: str) -> str:
    return f'<div style="opacity:.75;margin:4px 0">{_text(text)}</div>'


def _more(things: Sequence[Any], most: int, where: str) -> str:
    return f"<p>{len(things) - most} more: see <code>{where}</code></p>" if len(things) > most else ""


def _meaning(name: str) -> str:
    return STATISTICS[name].meaning if name in STATISTICS else ""


def _text(text: str) -> str:
    return html.escape(printable(text))

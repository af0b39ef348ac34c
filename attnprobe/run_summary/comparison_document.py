"""The JSON of ``attnprobe report --compare A B --json``: plain values for ``writers.strict_json.dumps``.

The notation is that of ``report_document``. The keys (schema 1) are ``schema``, ``kind`` (``"comparison"``) and

- ``a``, ``b`` {directory, log, probes, steps, loss, invalid}, the last four as in ``report_document``;
- ``alarms`` [{name, layer, in (``"a"``, ``"b"`` or ``"both"``), a, b}] with {heads, standing} of each run, or null;
- ``layers`` {only_a, only_b, resized}: names, and [{layer, a, b}] where the numbers of heads differ;
- ``compared_at`` {a, b, same_step}: the steps at which the heads are compared, null where one run measured nothing;
- ``medians``: statistic -> {a, b}: of all heads of each run there;
- ``not_compared``: statistics that only one of the runs has there;
- ``differences``, every head that differs, the most different first: [{layer, head, statistic, a, b, difference}].
"""

from __future__ import annotations

from typing import Any

from attnprobe.run_summary.alarm_pairs import Raised
from attnprobe.run_summary.comparison import Comparison
from attnprobe.run_summary.report_document import SCHEMA, course_document


def comparison_document(found: Comparison, names: tuple[str, str]) -> dict[str, Any]:
    """What ``compare`` found of two runs that are called ``names``."""
    runs = (found.a, found.b)
    compared = None
    if found.probes:
        steps = [run.steps[probe] for run, probe in zip(runs, found.probes, strict=True)]
        compared = {"a": steps[0], "b": steps[1], "same_step": found.same_step}
    sides = [
        {"directory": name, "log": run.name, **course_document(run)} for name, run in zip(names, runs, strict=True)
    ]
    return {
        "schema": SCHEMA,
        "kind": "comparison",
        "a": sides[0],
        "b": sides[1],
        "alarms": [
            {"name": pair.name, "layer": pair.layer, "in": pair.by, "a": _raised(pair.a), "b": _raised(pair.b)}
            for pair in found.alarms
        ],
        "layers": {
            "only_a": found.only_a,
            "only_b": found.only_b,
            "resized": [{"layer": layer, "a": a, "b": b} for layer, (a, b) in found.resized.items()],
        },
        "compared_at": compared,
        "medians": {name: {"a": a, "b": b} for name, (a, b) in found.medians.items()},
        "not_compared": found.alone,
        "differences": [
            {
                "layer": one.place.layer,
                "head": one.place.head,
                "statistic": one.statistic,
                "a": one.a,
                "b": one.b,
                "difference": one.distance,
            }
            for one in found.differences
        ],
    }


def _raised(raised: Raised | None) -> dict[str, Any] | None:
    return raised and raised._asdict()

"""The matrix as a page of the documentation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata

from tests.matrix import impossible
from tests.matrix.check import Outcome
from tests.matrix.condition import Condition
from tests.matrix.variant import Variant

Results = Mapping[tuple[str, str], Outcome]

LIBRARIES = ("torch", "transformers", "timm", "torchvision", "x-transformers", "peft")
HOLDS, CANNOT, FAILS = "✓", "–", "✗"

INTRODUCTION = """# What it was tried on

`python -m tests.matrix` trains small models with random weights, each under many conditions, once without and once with
a probe, and writes this page. A cell holds ({holds}) if

- the report has exactly the expected rows (captured/expected) with the expected heads, the residual of each was
  checked, nothing is marked invalid and nothing unexpected is warned of;
- losses, gradients, final parameters and torch's random state are bit for bit those without the probe;
- every error `u` is, with a difference of 0, the gradient that autograd hands to a hook on the model's own tensor, in a
  third run in which no code of the probe takes part;
- in a step that is not probed no hook, mode or wrapper is there, seen from inside of the forward pass;
- afterwards the model, its classes, torch's functions and torch's global state are what they were.

An empty cell was not tried, in the first table because the condition does not apply: there is nothing to checkpoint, or
the model rounds its own attention to float32. {cannot} is a cell that cannot hold, with the reason below.
"""


def markdown(variants: Sequence[Variant], conditions: Sequence[Condition], results: Results) -> str:
    always = [condition for condition in conditions if condition.always]
    others = [condition for condition in conditions if not condition.always]
    parts = [
        INTRODUCTION.format(holds=HOLDS, cannot=CANNOT),
        _versions(),
        _totals(variants, conditions, results),
        "## Every variant has to pass these",
        _table(
            ["variant", "kind", *(c.name for c in always), "u = autograd", "other conditions"],
            (
                [v.name, v.kind, *_cells(v, always, results), _errors(v, results), _count(v, others, results)]
                for v in variants
            ),
        ),
        "## The other conditions",
        _table(["variant", *(c.name for c in others)], ([v.name, *_cells(v, others, results)] for v in variants)),
        "## What cannot hold",
        _impossible(results),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _versions() -> str:
    found = []
    for library in LIBRARIES:
        try:
            found.append(f"{library} {metadata.version(library)}")
        except metadata.PackageNotFoundError:
            continue
    return f"Run with {', '.join(found)}, on CPU."


def _totals(variants: Sequence[Variant], conditions: Sequence[Condition], results: Results) -> str:
    rows = []
    for condition in conditions:
        outcomes = {v.name: results[v.name, condition.name] for v in variants if (v.name, condition.name) in results}
        marks = [_mark(name, condition.name, outcome) for name, outcome in outcomes.items()]
        rows.append(
            [condition.name, condition.meaning, str(len(marks)), *(str(marks.count(m)) for m in (HOLDS, CANNOT, FAILS))]
        )
    total = f"{len(variants)} variants under {len(conditions)} conditions, {len(results)} cells."
    return f"{total}\n\n" + _table(["condition", "meaning", "tried", "hold", "cannot", "fail"], rows)


def _cells(variant: Variant, conditions: Iterable[Condition], results: Results) -> list[str]:
    found = [(condition.name, results.get((variant.name, condition.name))) for condition in conditions]
    return [
        "" if outcome is None else f"{outcome.captured}/{outcome.expected} {_mark(variant.name, name, outcome)}"
        for name, outcome in found
    ]


def _mark(variant: str, condition: str, outcome: Outcome) -> str:
    if impossible.mistakes(variant, condition, outcome):
        return FAILS
    return HOLDS if outcome.passed else CANNOT


def _errors(variant: Variant, results: Results) -> str:
    """Over all conditions that hold."""
    own = [outcome for (name, _), outcome in results.items() if name == variant.name and outcome.passed]
    calls, difference = sum(outcome.calls for outcome in own), max((outcome.difference for outcome in own), default=0)
    return f"{calls} calls, difference {difference:g}" if calls else ""


def _count(variant: Variant, conditions: Sequence[Condition], results: Results) -> str:
    own = [results[variant.name, c.name] for c in conditions if (variant.name, c.name) in results]
    return f"{sum(outcome.passed for outcome in own)} of {len(own)}"


def _impossible(results: Results) -> str:
    rows = []
    for patterns, why in impossible.IMPOSSIBLE.items():
        found = {
            cell: outcome
            for cell, outcome in results.items()
            if impossible.covers(patterns, *cell) and impossible.reason(*cell) == why
        }
        errors = {outcome.fails for outcome in found.values()}
        without = "trains" if errors == {""} else "; ".join(sorted(f"`{error}`" for error in errors if error))
        if found:
            rows.append([*(f"`{pattern}`" for pattern in patterns), str(len(found)), why, without])
    return _table(["variant", "condition", "cells", "reason", "the model without the probe"], rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(text.replace('|', '/') for text in line)} |" for line in lines)

"""Cells that cannot hold, each with the reason; whoever makes one work takes it off the list."""

from __future__ import annotations

from fnmatch import fnmatchcase

from tests.matrix.check import Outcome

#: Patterns of a variant's and a condition's name -> why.
IMPOSSIBLE: dict[tuple[str, str], str] = {}


def covers(patterns: tuple[str, str], variant: str, condition: str) -> bool:
    return fnmatchcase(variant, patterns[0]) and fnmatchcase(condition, patterns[1])


def reason(variant: str, condition: str) -> str:
    """Why a cell cannot hold, ``""`` where it has to."""
    return next((why for patterns, why in IMPOSSIBLE.items() if covers(patterns, variant, condition)), "")


def mistakes(variant: str, condition: str, outcome: Outcome) -> list[str]:
    """What is wrong with a cell, given what is known of it; nothing where all is as it should be."""
    known = reason(variant, condition)
    if outcome.passed:
        return [f"passes: take it off the list of the impossible ({known})"] if known else []
    if not known:
        return [f"the model fails without the probe: {outcome.fails}"] if outcome.fails else outcome.problems
    return outcome.harm  # where nothing can be measured, nothing may be changed either

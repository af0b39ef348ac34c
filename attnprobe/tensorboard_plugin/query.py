"""The arguments of a request."""

from __future__ import annotations

import math
from collections.abc import Mapping

from attnprobe.logs.logged import LoggedRun


class QueryError(ValueError):
    """An argument is missing or is not what it should be."""


class Query:
    """Arguments by name, each read as what it should be.

    Args:
        arguments: of the address, decoded.
    """

    def __init__(self, arguments: Mapping[str, str]) -> None:
        self._arguments = arguments

    def text(self, name: str, default: str | None = None) -> str:
        found = self._arguments.get(name, default)
        if found is None:
            raise QueryError(f"the argument {name!r} is missing")
        return found

    def whole(self, name: str, default: str | None = None) -> int:
        text = self.text(name, default)
        try:
            return int(text)
        except ValueError as error:
            raise QueryError(f"{name} must be a whole number: {error}") from error

    def number(self, name: str) -> float:
        text = self.text(name)
        try:
            value = float(text)
        except ValueError as error:
            raise QueryError(f"{name} must be a number: {error}") from error
        if math.isnan(value):
            raise QueryError(f"{name} must be a number, not NaN")
        return value

    def layer(self, run: LoggedRun) -> str:
        """The layer of ``run``, as no browser writes a half of a surrogate pair; else what was asked for."""
        asked = self.text("layer")
        return asked if asked in run.layers else next((layer for layer in run.layers if _whole(layer) == asked), asked)


def _whole(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

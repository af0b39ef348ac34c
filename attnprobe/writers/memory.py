"""Reports kept in a list, for notebooks and tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnprobe.writers.base import positive

if TYPE_CHECKING:
    from attnprobe.report import StepReport


class MemoryWriter:
    """Keeps the reports.

    Args:
        limit: how many of the latest reports to keep; all by default, about 40 kB each at 12 x 12 heads.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = None if limit is None else positive("limit", limit)
        self.reports: list[StepReport] = []

    def write(self, report: StepReport) -> None:
        self.reports.append(report)
        if self.limit is not None:
            del self.reports[: -self.limit]

    def close(self) -> None:
        """Nothing to release; the reports stay."""

"""Logged runs back into reports: what ``JSONLWriter`` and ``TensorBoardWriter`` wrote, as ``StepReport`` again."""

from attnprobe.logs.record import report_of
from attnprobe.logs.run import read_run

__all__ = ["read_run", "report_of"]

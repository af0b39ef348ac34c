"""attnprobe: what every attention head does while a model trains.

Importing the package loads nothing heavy: each public name is loaded at first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "AlarmRule": "attnprobe.alarms",
    "Alarm": "attnprobe.report",
    "AttentionProbe": "attnprobe.probe",
    "AttentionRecord": "attnprobe.record",
    "AttnProbeError": "attnprobe.errors",
    "AttnProbeWarning": "attnprobe.errors",
    "ConfigurationError": "attnprobe.errors",
    "ConsoleWriter": "attnprobe.writers",
    "DEFAULT_ALARMS": "attnprobe.alarms",
    "InvalidStepError": "attnprobe.errors",
    "JSONLWriter": "attnprobe.writers",
    "LogError": "attnprobe.errors",
    "LoggedRun": "attnprobe.logs",
    "MemoryWriter": "attnprobe.writers",
    "NoAttentionError": "attnprobe.errors",
    "STATISTICS": "attnprobe.catalog",
    "ScheduleError": "attnprobe.errors",
    "Statistic": "attnprobe.catalog",
    "StepReport": "attnprobe.report",
    "TensorBoardWriter": "attnprobe.writers",
    "UnknownNameError": "attnprobe.errors",
    "Writer": "attnprobe.writers",
    "WriterError": "attnprobe.errors",
    "analyze": "attnprobe.probe",
    "load": "attnprobe.logs",
    "register_attention": "attnprobe.capture.kernels",
}

__all__ = [*_HOME, "__version__"]

if TYPE_CHECKING:
    from attnprobe.alarms import DEFAULT_ALARMS as DEFAULT_ALARMS
    from attnprobe.alarms import AlarmRule as AlarmRule
    from attnprobe.capture.kernels import register_attention as register_attention
    from attnprobe.catalog import STATISTICS as STATISTICS
    from attnprobe.catalog import Statistic as Statistic
    from attnprobe.errors import AttnProbeError as AttnProbeError
    from attnprobe.errors import AttnProbeWarning as AttnProbeWarning
    from attnprobe.errors import ConfigurationError as ConfigurationError
    from attnprobe.errors import InvalidStepError as InvalidStepError
    from attnprobe.errors import LogError as LogError
    from attnprobe.errors import NoAttentionError as NoAttentionError
    from attnprobe.errors import ScheduleError as ScheduleError
    from attnprobe.errors import UnknownNameError as UnknownNameError
    from attnprobe.errors import WriterError as WriterError
    from attnprobe.logs import LoggedRun as LoggedRun
    from attnprobe.logs import load as load
    from attnprobe.probe import AttentionProbe as AttentionProbe
    from attnprobe.probe import analyze as analyze
    from attnprobe.record import AttentionRecord as AttentionRecord
    from attnprobe.report import Alarm as Alarm
    from attnprobe.report import StepReport as StepReport
    from attnprobe.writers import ConsoleWriter as ConsoleWriter
    from attnprobe.writers import JSONLWriter as JSONLWriter
    from attnprobe.writers import MemoryWriter as MemoryWriter
    from attnprobe.writers import TensorBoardWriter as TensorBoardWriter
    from attnprobe.writers import Writer as Writer


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'attnprobe' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

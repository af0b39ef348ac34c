"""Every error and warning that attnprobe raises by name.

- AttnProbeError
  - ConfigurationError   an option that cannot work (also a ValueError)
    - UnknownNameError   a statistic, layer pattern or rule that does not exist
  - NoAttentionError     nothing was captured, with what was looked for
  - InvalidStepError     a training step that cannot be measured (only with ``strict=True``)
  - WriterError          a place that cannot be written (also an OSError)
  - LogError             a logged run that cannot be read back
  - ScheduleError        a learning-rate schedule that would not be exact here
- AttnProbeWarning       what the probe found out during a run, said once
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AttnProbeError(Exception):
    """Base class of all errors raised by attnprobe."""


class ConfigurationError(AttnProbeError, ValueError):
    """An option has a value that cannot work."""


class UnknownNameError(ConfigurationError):
    """A name was given that stands for nothing; the message lists what there is."""

    @classmethod
    def among(cls, kind: str, name: str, known: Iterable[str]) -> UnknownNameError:
        names = sorted(known)
        close = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        return cls(f"unknown {kind} {name!r}.{hint} Known: {', '.join(names)}")


class NoAttentionError(AttnProbeError):
    """No attention call could be measured."""


class InvalidStepError(AttnProbeError):
    """A training step cannot be measured, for example because no backward ran."""


class WriterError(AttnProbeError, OSError):
    """The place that a writer was given cannot be written."""


class LogError(AttnProbeError, ValueError):
    """No logged run is there, or a log does not hold what it should."""


class ScheduleError(AttnProbeError, ValueError):
    """A learning-rate schedule would not do here what it says."""


class AttnProbeWarning(UserWarning):
    """What the probe noticed during a run and reports once."""

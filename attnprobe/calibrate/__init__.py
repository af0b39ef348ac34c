"""Thresholds of the alarms from a user's own healthy runs, and the false-alarm rate that they imply.

``attnprobe calibrate RUN_DIR... --out alarms.json`` measures them, ``alarms=load_alarms("alarms.json")`` uses them.
"""

from attnprobe.calibrate.calibration import Calibration, calibrate
from attnprobe.calibrate.file import load_alarms
from attnprobe.calibrate.runs import read_runs
from attnprobe.calibrate.summary import summarize

__all__ = ["Calibration", "calibrate", "load_alarms", "read_runs", "summarize"]

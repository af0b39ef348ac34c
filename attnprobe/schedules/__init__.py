"""Learning-rate schedules: the value projection learns faster than the rest of the model."""

from attnprobe.schedules.handle import ScheduleHandle
from attnprobe.schedules.value_rate import ValueLearningRate

__all__ = ["ScheduleHandle", "ValueLearningRate"]

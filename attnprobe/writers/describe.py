"""What TensorBoard says about each tag, in Markdown."""

from __future__ import annotations

from attnprobe.catalog import STATISTICS, Statistic
from attnprobe.writers.aggregates import ALARMS, PREFIX
from attnprobe.writers.text import markdown

RESIDUAL = (
    "What the capture did not understand: rms of `sum_j alpha_ij b_ij - u_i . o_i` relative to rms|u| rms|v|; "
    "0 where attention was captured exactly."
)
LOSS = "Loss of the probed step."
LAYOUT = "Names of the layers (rows) and their numbers of heads."
STANDING = "The alarms that stand at this step."
HEAD_MAP = (
    "First sequence of the batch, queries down, keys across, block means. Left to right: attention `a` (colour follows "
    "the square root), compatibility `b` = u.v and advantage `A` (blue negative, red positive: gradient descent wants "
    "more attention where A is red). Grey: masked."
)
MAP = "Attention, compatibility and advantage of one head: queries down, keys across, block means."
USAGE = "How much attention each key receives, relative to uniform attention."

_KIND = {"min": "Smallest", "mean": "Mean", "max": "Largest"}


def statistic(name: str) -> str:
    """Meaning, formula and unit."""
    entry = STATISTICS.get(name, Statistic(name, f"{markdown(name)}: a statistic of the user's own."))
    formula = f" Formula: `{entry.formula}`." if entry.formula else ""
    unit = f" Unit: {entry.unit}." if entry.unit else ""
    return entry.meaning + formula + unit


def nonfinite(kind: str) -> str:
    return f"How many elements of {markdown(kind)} were NaN or infinite; absent where none was."


def scalar(tag: str) -> str:
    """The description of one of the ``aggregates``."""
    if tag == ALARMS:
        return "Number of alarms that stand; what they say is in the Text tab."
    name, _, kind = tag.removeprefix(f"{PREFIX}/").rpartition("/")
    over = "layers" if name in STATISTICS and STATISTICS[name].level == "layer" else "heads of all layers"
    return f"{_KIND[kind]} over the {over}. {statistic(name)}"


def overview(name: str) -> str:
    return f"One row per layer, one column per head, from 0 (dark) to 1 (light); grey: not measured. {statistic(name)}"

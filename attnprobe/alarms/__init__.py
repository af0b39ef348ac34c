"""Alarms: one rule a file, an engine that counts, a history that remembers.

``AlarmEngine(resolve(rules)).update(report)`` gives the alarms that stand after each report.
"""

from __future__ import annotations

from collections.abc import Iterable

from attnprobe.alarms.attention_collapse import AttentionCollapse
from attnprobe.alarms.base import AlarmRule, Reading, Tunable, above, head_values, layer_values
from attnprobe.alarms.dead_values import DeadValues
from attnprobe.alarms.diffuse_routing import DiffuseRouting
from attnprobe.alarms.engine import AlarmEngine
from attnprobe.alarms.history import History
from attnprobe.alarms.inactive_head import InactiveHead
from attnprobe.alarms.logit_explosion import LogitExplosion
from attnprobe.alarms.logit_growth import LogitGrowth
from attnprobe.alarms.mask_violation import MaskViolation
from attnprobe.alarms.nonfinite import NonFinite
from attnprobe.alarms.rank_collapse import RankCollapse
from attnprobe.alarms.redundant_heads import RedundantHeads
from attnprobe.alarms.sink_formation import SinkFormation
from attnprobe.alarms.stalled_layer import StalledLayer
from attnprobe.alarms.value_explosion import ValueExplosion
from attnprobe.errors import ConfigurationError, UnknownNameError

__all__ = [
    "ALL_ALARMS",
    "DEFAULT_ALARMS",
    "AlarmEngine",
    "AlarmRule",
    "AttentionCollapse",
    "DeadValues",
    "DiffuseRouting",
    "History",
    "InactiveHead",
    "LogitExplosion",
    "LogitGrowth",
    "MaskViolation",
    "NonFinite",
    "RankCollapse",
    "Reading",
    "RedundantHeads",
    "SinkFormation",
    "StalledLayer",
    "Tunable",
    "ValueExplosion",
    "above",
    "head_values",
    "layer_values",
    "resolve",
]

#: The rules that run by default, the gravest first.
DEFAULT_ALARMS: tuple[AlarmRule, ...] = (
    NonFinite(),
    LogitExplosion(),
    LogitGrowth(),
    ValueExplosion(),
    AttentionCollapse(),
    DeadValues(),
    InactiveHead(),
    DiffuseRouting(),
    SinkFormation(),
)
#: These, and the rules that read statistics beyond the core set, which a probe with such a rule measures too.
ALL_ALARMS: tuple[AlarmRule, ...] = (
    *DEFAULT_ALARMS,
    MaskViolation(),
    RedundantHeads(),
    RankCollapse(),
    StalledLayer(),
)
#: What else ``resolve`` takes by name.
SETS: dict[str, tuple[AlarmRule, ...]] = {"default": DEFAULT_ALARMS, "all": ALL_ALARMS}


def resolve(alarms: AlarmRule | str | Iterable[AlarmRule | str]) -> tuple[AlarmRule, ...]:
    """Rules out of rules and names of rules; ``"default"`` and ``"all"`` are the names of ``DEFAULT_ALARMS`` and of
    ``ALL_ALARMS``, among which a rule of the same name that is given too takes the place of theirs.

    Raises:
        UnknownNameError: no rule has that name; the message lists them.
        ConfigurationError: two rules of one name, or something that is neither a rule nor a name.
    """
    known = {rule.name: rule for rule in ALL_ALARMS}
    items = [alarms] if isinstance(alarms, AlarmRule | str) else list(alarms)
    sets = [rule for item in items if isinstance(item, str) for rule in SETS.get(item, ())]
    chosen: dict[str, AlarmRule] = {}
    for item in items:
        if isinstance(item, str) and item in SETS:
            continue
        if isinstance(item, str) and item not in known:
            raise UnknownNameError.among("alarm", item, [*known, *SETS])
        rule = known[item] if isinstance(item, str) else item
        if not isinstance(rule, AlarmRule):
            hint = f"; pass an instance, {item.__name__}()" if isinstance(item, type) else ""
            raise ConfigurationError(f"an alarm is a rule or the name of one, not {item!r}{hint}")
        if not rule.name:
            raise ConfigurationError(f"{type(rule).__name__} needs a name")
        if rule.name in chosen:
            raise ConfigurationError(f"two alarms are named {rule.name!r}; give a subclass of one a name of its own")
        chosen[rule.name] = rule
    # Where the set has it: the gravest come first.
    of_sets = {rule.name: chosen.pop(rule.name, rule) for rule in sets}
    return (*of_sets.values(), *chosen.values())

"""Alarms: one rule a file, an engine that counts, a history that remembers.

``AlarmEngine(resolve(rules)).update(report)`` gives the alarms that stand after each report.
"""

from __future__ import annotations

from collections.abc import Iterable

from attnprobe.alarms.attention_collapse import AttentionCollapse
from attnprobe.alarms.base import AlarmRule, Reading, above, head_values, layer_values
from attnprobe.alarms.dead_values import DeadValues
from attnprobe.alarms.diffuse_routing import DiffuseRouting
from attnprobe.alarms.engine import AlarmEngine
from attnprobe.alarms.history import History
from attnprobe.alarms.logit_explosion import LogitExplosion
from attnprobe.alarms.nonfinite import NonFinite
from attnprobe.alarms.value_explosion import ValueExplosion
from attnprobe.errors import ConfigurationError, UnknownNameError

__all__ = [
    "DEFAULT_ALARMS",
    "AlarmEngine",
    "AlarmRule",
    "AttentionCollapse",
    "DeadValues",
    "DiffuseRouting",
    "History",
    "LogitExplosion",
    "NonFinite",
    "Reading",
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
    ValueExplosion(),
    AttentionCollapse(),
    DeadValues(),
    DiffuseRouting(),
)


def resolve(alarms: AlarmRule | str | Iterable[AlarmRule | str]) -> tuple[AlarmRule, ...]:
    """Rules out of rules and names of default rules.

    Raises:
        UnknownNameError: no default rule has that name; the message lists them.
        ConfigurationError: two rules of one name, or something that is neither a rule nor a name.
    """
    known = {rule.name: rule for rule in DEFAULT_ALARMS}
    chosen: dict[str, AlarmRule] = {}
    for item in (alarms,) if isinstance(alarms, AlarmRule | str) else alarms:
        if isinstance(item, str) and item not in known:
            raise UnknownNameError.among("alarm", item, known)
        rule = known[item] if isinstance(item, str) else item
        if not isinstance(rule, AlarmRule):
            hint = f"; pass an instance, {item.__name__}()" if isinstance(item, type) else ""
            raise ConfigurationError(f"an alarm is a rule or the name of one, not {item!r}{hint}")
        if not rule.name:
            raise ConfigurationError(f"{type(rule).__name__} needs a name")
        if rule.name in chosen:
            raise ConfigurationError(f"two alarms are named {rule.name!r}; give a subclass of one a name of its own")
        chosen[rule.name] = rule
    return tuple(chosen.values())

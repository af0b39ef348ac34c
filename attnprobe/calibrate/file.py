"""The file between ``attnprobe calibrate`` and ``AttentionProbe(alarms=)``.

Strict JSON: ``schema`` (1), ``kind`` (``"thresholds"``), ``thresholds`` (rule -> field -> number), ``runs`` (names),
``false_alarms`` and ``false_alarms_by_default`` (how many of them), ``rate_bound`` (null for one run, as is
``false_alarms``). Loading reads the first three.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from attnprobe.alarms import ALL_ALARMS, AlarmRule, resolve
from attnprobe.errors import ConfigurationError, UnknownNameError, WriterError
from attnprobe.writers.base import writable_directory
from attnprobe.writers.strict_json import dumps

SCHEMA = 1
KIND = "thresholds"
#: Rule -> field -> value.
Thresholds = Mapping[str, Mapping[str, float]]


def save(path: str | PathLike[str], thresholds: Thresholds, about: Mapping[str, Any]) -> None:
    """Write the file, in the place of one that is there.

    Raises:
        WriterError: it cannot be written.
    """
    file = Path(path).expanduser()
    writable_directory(file.parent)
    try:
        file.write_text(dumps({"schema": SCHEMA, "kind": KIND, "thresholds": thresholds, **about}) + "\n")
    except OSError as error:
        raise WriterError(f"cannot write to {file}: {error}; pass a file that may be written") from error


def load_alarms(
    path: str | PathLike[str], rules: AlarmRule | str | Iterable[AlarmRule | str] = "default"
) -> tuple[AlarmRule, ...]:
    """Rules with the thresholds of a file, for ``AttentionProbe(alarms=)``.

    Args:
        path: written by ``attnprobe calibrate`` or ``Calibration.save``.
        rules: which rules, as for ``AttentionProbe(alarms=)``; the file's thresholds of others are not used.

    Raises:
        UnknownNameError: the file names a rule, or a threshold of a rule, that there is not.
        ConfigurationError: there is no such file, or it is another one, or a threshold is not a finite number.
    """
    chosen = resolve(rules)
    known = {rule.name: rule for rule in (*ALL_ALARMS, *chosen)}
    thresholds = _read(Path(path).expanduser())
    for name, fields in thresholds.items():
        if name not in known:
            raise UnknownNameError.among("alarm", name, known)
        if not isinstance(fields, dict):
            raise ConfigurationError(f"{path}: {name} must have thresholds by name, not {fields!r}")
        for field, value in fields.items():
            tunable = [each.field for each in known[name].tunable]
            if field not in tunable:
                raise UnknownNameError.among(f"threshold of {name}", field, tunable)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not -sys.float_info.max <= value <= sys.float_info.max:
                raise ConfigurationError(f"{path}: {name}.{field} must be a finite number, not {value!r}")
    try:
        return with_thresholds(chosen, thresholds)
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error}") from error


def with_thresholds(rules: Iterable[AlarmRule], thresholds: Thresholds) -> tuple[AlarmRule, ...]:
    """The rules, those that ``thresholds`` names with its values."""
    return tuple(
        dataclasses.replace(rule, **thresholds[rule.name]) if rule.name in thresholds else rule  # type: ignore[type-var]
        for rule in rules
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_bytes())
    except OSError as error:
        raise ConfigurationError(f"cannot read {file}: {error}; 'attnprobe calibrate' writes such a file") from error
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{file} is not a file of 'attnprobe calibrate': {error}") from error
    if not isinstance(data, dict) or data.get("kind") != KIND or not isinstance(data.get("thresholds"), dict):
        raise ConfigurationError(f"{file} is not a file of 'attnprobe calibrate': it holds no thresholds")
    if data.get("schema") != SCHEMA:
        raise ConfigurationError(
            f"{file} has schema {data.get('schema')!r}, and this version of attnprobe reads {SCHEMA}; calibrate again"
        )
    return data["thresholds"]  # type: ignore[no-any-return]

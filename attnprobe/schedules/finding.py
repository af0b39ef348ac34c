"""Value weights by name, and those of ``nn.MultiheadAttention``, whose layout torch defines."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

from torch import nn

from attnprobe.errors import ConfigurationError, ScheduleError
from attnprobe.schedules.layouts import Stretch

# A name counts only beside its query and key: RWKV's feed-forward has a `value`, an actor-critic has one too.
_TRIOS = (
    ("q", "k", "v"),
    ("Q", "K", "V"),
    ("qs", "ks", "vs"),
    ("query", "key", "value"),
    ("queries", "keys", "values"),
)
_FORMS = (
    *("{}", "{}_proj", "proj_{}", "to_{}", "to{}", "{}_lin", "lin_{}", "{}_linear", "linear_{}", "{}_layer", "fc_{}"),
    *("w{}", "W{}", "w_{}", "W_{}", "b_{}", "add_{}_proj", "{}_proj_weight"),
)
_SIBLINGS = {form.format(v): (form.format(q), form.format(k)) for form in _FORMS for q, k, v in _TRIOS}
_FUSED = {form.format(x) for form in _FORMS for x in ("qkv", "kv", "QKV", "KV", "query_key_value", "key_value")}
_FUSED |= {"in_proj_weight", "in_proj_bias", "c_attn", "att_proj", "attn_qkv", "kv_b_proj", "wkv_b", "W_pack"}

ASK = (
    "Pass confirm=, a function that runs one forward pass of the model on any batch, such as "
    "confirm=lambda: model(**batch): it shows which entries make the values"
)


def multihead(model: nn.Module) -> dict[str, Stretch | None]:
    """The value entries of every ``nn.MultiheadAttention``, by the full name of their parameter; None for all."""
    found: dict[str, Stretch | None] = {}
    for owner, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, nn.MultiheadAttention) or type(module).forward is not nn.MultiheadAttention.forward:
            continue
        last = Stretch(0, 1, 2 * module.embed_dim, module.embed_dim)
        known = {"in_proj_weight": last, "v_proj_weight": None, "in_proj_bias": last}
        prefix = f"{owner}." if owner else ""
        found |= {prefix + part: known[part] for part in known if module._parameters.get(part) is not None}
    return found


def is_fused(name: str) -> bool:
    """Whether a parameter of this name holds keys, or queries and keys, beside the values."""
    return _split(name)[1] in _FUSED


def needs_confirmation(model: nn.Module, parameters: str | Iterable[str] | None = None) -> bool:
    """Whether only a forward pass tells which entries of the value weights, or of those named, make the values."""
    names, certain = [name for name, _ in model.named_parameters(remove_duplicate=False)], multihead(model)
    if parameters is not None:
        names = matching(names, parameters, certain, confirming=True)
    return any(is_fused(name) and name not in certain for name in names)


def conventional(names: list[str], certain: Collection[str], *, confirming: bool) -> list[str]:
    """Names of value parameters.

    Args:
        names: all parameters of the model.
        certain: those that are known to hold values.
        confirming: whether a forward pass will tell what a fused weight holds, and what a lone one is.

    Raises:
        ScheduleError: there are none, or names alone do not tell.
    """
    present = {_split(name) for name in names}
    found: list[str] = []
    fused: list[str] = []
    alone: list[str] = []
    for name in names:
        owner, part = _split(name)
        if name in certain:
            found.append(name)
        elif part in _FUSED:
            fused.append(name)
        elif part in _SIBLINGS:
            complete = all((owner, sibling) in present for sibling in _SIBLINGS[part])
            (found if complete else alone).append(name)
    if fused and not confirming:
        more = f" Or name the others in parameters= to act on these alone: {listed(found)}." if found else ""
        raise ScheduleError(
            f"the values are a part of fused weights, and names do not tell which part: {listed(fused)}. {ASK}.{more}"
        )
    if alone and not confirming:
        raise ScheduleError(
            f"cannot tell whether these are value projections, for no query and key stand beside them: "
            f"{listed(alone)}. Certain: {listed(found)}. {ASK}; or pass parameters= with names or glob patterns."
        )
    chosen = {*found, *fused, *alone}
    if not chosen:
        raise ScheduleError(
            "no value projection found. Looked for v_proj, value, v, W_V, to_v, v_lin and the like, beside a query and "
            "a key of the same form, and for fused weights such as c_attn, qkv_proj, query_key_value. Pass parameters= "
            f"with names or glob patterns. {_candidates(names)}"
        )
    return [name for name in names if name in chosen]


def matching(
    names: list[str], patterns: str | Iterable[str], certain: Collection[str], *, confirming: bool
) -> list[str]:
    """Names that match any of the patterns, each of which must match something."""
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns:
        raise ConfigurationError("parameters= is empty; leave it out to find the value weights by name")
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ScheduleError(f"no parameter matches {pattern!r}. {_candidates(names)}")
    found = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
    fused = [name for name in found if is_fused(name) and name not in certain]
    if fused and not confirming:
        raise ScheduleError(f"these fused weights hold more than values: {listed(fused)}. {ASK}.")
    return found


def listed(names: Iterable[object], limit: int = 8) -> str:
    """The names, quoted, at most ``limit`` of them."""
    texts = [repr(str(name)) for name in names]
    more = f" and {len(texts) - limit} more" if len(texts) > limit else ""
    return (", ".join(texts[:limit]) or "none") + more


def _split(name: str) -> tuple[str, str]:
    """Owner and conventional part: ``a.v_proj.bias`` -> ``("a", "v_proj")``, ``a.W_V`` -> ``("a", "W_V")``."""
    owner, _, part = re.sub(r"\.(weight|bias)$", "", name).rpartition(".")
    return owner, part.lstrip("_")


def _candidates(names: list[str]) -> str:
    likely = [name for name in names if re.search(r"att|val|kv|(?<![a-z])v(?![a-z])", name, re.IGNORECASE)]
    return f"Candidates: {listed(likely)}." if likely else f"Parameters: {listed(names)}."

"""Value weights by name, and those of ``nn.MultiheadAttention``, whose layout torch defines."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

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
    *("w{}", "W{}", "w_{}", "W_{}", "b_{}", "add_{}_proj", "{}_proj_weight", "{}_bias"),
)
_SIBLINGS = {form.format(v): (form.format(q), form.format(k)) for form in _FORMS for q, k, v in _TRIOS}
_FUSED = {form.format(x) for form in _FORMS for x in ("qkv", "kv", "QKV", "KV", "query_key_value", "key_value")}
_FUSED |= {
    "in_proj",
    "in_proj_weight",
    "in_proj_bias",
    "c_attn",
    "att_proj",
    "attn_qkv",
    "kv_b_proj",
    "wkv_b",
    "W_pack",
}

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


def made(model: nn.Module) -> dict[str, tuple[str, str]]:
    """Parameters that a weight is computed from, by their full name: the name of that weight, and what computes it."""
    found: dict[str, tuple[str, str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, ParametrizationList):
            weight = re.sub(r"(^|\.)parametrizations\.([^.]+)$", r"\1\2", path)
            kind = ", ".join(type(step).__name__.lstrip("_") for step in module)
            found |= {f"{path}.{name}": (weight, kind) for name, _ in module.named_parameters(remove_duplicate=False)}
        prefix = f"{path}." if path else ""
        for hook in module._forward_pre_hooks.values():  # the older weight and spectral norm, and pruning
            part = getattr(hook, "name", None) or getattr(hook, "_tensor_name", None)
            for name in (f"{part}_g", f"{part}_v", f"{part}_orig"):
                if module._parameters.get(name) is not None:
                    found[prefix + name] = (f"{prefix}{part}", type(hook).__name__)
    return found


def needs_confirmation(model: nn.Module, parameters: str | Iterable[str] | None = None) -> bool:
    """Whether only a forward pass tells which entries of the value weights, or of those named, make the values."""
    names, certain = [name for name, _ in model.named_parameters(remove_duplicate=False)], multihead(model)
    pieces = made(model)
    if parameters is None:
        return bool(_sorted(names, certain, pieces)[1])
    return any(_fused(matching(names, parameters, certain, pieces, confirming=True), names, certain, pieces))


def conventional(
    names: list[str], certain: Collection[str], pieces: Mapping[str, tuple[str, str]], *, confirming: bool
) -> list[str]:
    """Names of value parameters.

    Args:
        names: all parameters of the model.
        certain: those that are known to hold values.
        pieces: those that weights are computed from, see ``made``.
        confirming: whether a forward pass will tell what a fused weight holds, and what a lone one is.

    Raises:
        ScheduleError: there are none, or names alone do not tell.
    """
    found, fused, alone = _sorted(names, certain, pieces)
    chosen = {*found, *fused, *alone}
    _refuse_pieces([name for name in names if name in chosen and name in pieces], pieces)
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
    if not chosen:
        raise ScheduleError(
            "no value projection found. Looked for v_proj, value, v, W_V, to_v, v_lin and the like, beside a query and "
            "a key of the same form, and for fused weights such as c_attn, qkv_proj, query_key_value. Pass parameters= "
            f"with names or glob patterns. {_candidates(names)}"
        )
    return [name for name in names if name in chosen]


def matching(
    names: list[str],
    patterns: str | Iterable[str],
    certain: Collection[str],
    pieces: Mapping[str, tuple[str, str]],
    *,
    confirming: bool,
) -> list[str]:
    """Names that match any of the patterns, each of which must match something."""
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns:
        raise ConfigurationError("parameters= is empty; leave it out to find the value weights by name")
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ScheduleError(f"no parameter matches {pattern!r}. {_candidates(names)}")
    found = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
    fused = _fused(found, names, certain, pieces)
    if fused and not confirming:
        raise ScheduleError(f"these fused weights hold more than values: {listed(fused)}. {ASK}.")
    biased = {re.sub("bias$", "weight", name) for name in found if name.endswith("bias")}
    _refuse_pieces(
        [name for name in names if name not in found and name in pieces and pieces[name][0] in biased], pieces
    )
    return found


def listed(names: Iterable[object], limit: int = 8) -> str:
    """The names, quoted, at most ``limit`` of them."""
    texts = [repr(str(name)) for name in names]
    more = f" and {len(texts) - limit} more" if len(texts) > limit else ""
    return (", ".join(texts[:limit]) or "none") + more


def _sorted(
    names: list[str], certain: Collection[str], pieces: Mapping[str, tuple[str, str]]
) -> tuple[list[str], list[str], list[str]]:
    """Names that hold values, those that hold more than values, and those of which that is not known."""
    fused = _fused(names, names, certain, pieces)
    beside = {_split(_whole(name, pieces))[0] for name in fused}
    found: list[str] = []
    alone: list[str] = []
    present = _present(names, pieces)
    for name in names:
        owner, part = _split(_whole(name, pieces))
        if name in certain:
            found.append(name)
        elif part in _SIBLINGS and name not in fused:
            biased = part.endswith("_bias") and owner in beside  # of a fused weight
            (found if biased or _complete(owner, part, present) else alone).append(name)
    # An MLP and a state space have an in_proj too.
    vague = [name for name in fused if "in_proj" in name.split(".") and not re.search("att", name, re.IGNORECASE)]
    if found or len(vague) < len(fused):
        fused = [name for name in fused if name not in vague]
    return found, fused, alone


def _fused(
    some: list[str], names: list[str], certain: Collection[str], pieces: Mapping[str, tuple[str, str]]
) -> list[str]:
    """Those that hold keys, or queries and keys, beside the values, as far as any part of their name says so."""
    present, found = _present(names, pieces), []
    apart = {owner for owner, part in present if part in _SIBLINGS and _complete(owner, part, present)}
    for name in some:
        owner, part = _split(_whole(name, pieces))
        inside = owner not in apart and any(each.lstrip("_") in _FUSED for each in owner.split("."))
        if name not in certain and (part in _FUSED or inside):
            found.append(name)
    return found


def _complete(owner: str, part: str, present: Collection[tuple[str, str]]) -> bool:
    """Whether query and key stand beside a value; a bias of the keys changes nothing and is often left out."""
    query, key = _SIBLINGS[part]
    return (owner, query) in present and (part.endswith("_bias") or (owner, key) in present)


def _present(names: list[str], pieces: Mapping[str, tuple[str, str]]) -> set[tuple[str, str]]:
    return {_split(_whole(name, pieces)) for name in names}


def _whole(name: str, pieces: Mapping[str, tuple[str, str]]) -> str:
    """The name of the weight that a parameter is, or is a piece of."""
    return pieces[name][0] if name in pieces else name


def _refuse_pieces(names: list[str], pieces: Mapping[str, tuple[str, str]]) -> None:
    """Raise ScheduleError for value weights that are no parameters: their biases alone would learn faster."""
    if names:
        weights = listed(dict.fromkeys(pieces[name][0] for name in names))
        kinds = ", ".join(dict.fromkeys(pieces[name][1] for name in names))
        raise ScheduleError(
            f"these value weights are no parameters, but computed by a parametrization ({kinds}): {weights}. Take it "
            f"off, or name in parameters= what they are computed from, beside the other value weights: {listed(names)}."
        )


def _split(name: str) -> tuple[str, str]:
    """Owner and conventional part: ``a.v_proj.bias`` -> ``("a", "v_proj")``, ``a.W_V`` -> ``("a", "W_V")``."""
    owner, _, part = re.sub(r"\.(weight|bias)$", "", name).rpartition(".")
    return owner, part.lstrip("_")


def _candidates(names: list[str]) -> str:
    likely = [name for name in names if re.search(r"att|val|kv|(?<![a-z])v(?![a-z])", name, re.IGNORECASE)]
    return f"Candidates: {listed(likely)}." if likely else f"Parameters: {listed(names)}."

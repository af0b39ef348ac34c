"""Attention written out: query @ key^T, softmax over the keys, weights @ value.

Tags follow the scores to the softmax and the weights from there to the product with the values.
They hang on the tensors weakly and die with them. What an operation in between does to the
weights need not be understood: it shows in the residual ``sum alpha b - u . o``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attnprobe.capture.call import Call, Layout
from attnprobe.capture.einsum import score_operands, value_operands
from attnprobe.capture.hold import version_of
from attnprobe.capture.registry import after

if TYPE_CHECKING:
    from attnprobe.capture.session import Session

_SHAPE = ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "contiguous", "clone")
_CAST = ("to", "type_as", "float", "half", "bfloat16", "double", "nan_to_num")
_SCALE = ("mul", "mul_", "multiply", "div", "div_", "divide", "true_divide", "tanh", "clamp", "clip")
#: A fill value from here down hides a pair.
_HIDES = -50.0


@dataclass(frozen=True)
class Scores:
    """Tag of ``query @ key^T`` and of what was made of it: the operands and what hides pairs.

    Each mask comes with the shape that the scores had then.
    """

    query: Tensor
    key: Tensor
    masks: tuple[tuple[Tensor, torch.Size], ...] = ()
    heads: int | None = None


@dataclass(frozen=True)
class Projection:
    """Tag of a tensor whose last axis a parameter made: its softmax is a gate or a class, it attends to nothing."""


@dataclass(frozen=True)
class Weights:
    """Tag of a softmax over keys and of what was made of it."""

    logits: Tensor
    version: int  # of the logits, as the softmax saw them
    scores: Scores | None
    dropout: float = 0.0
    heads: int | None = None


@after("matmul", "linalg_matmul", "mm", "bmm", "addmm", "baddbmm", "einsum")
def _product(session: Session, result: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    equation = args[0] if args and isinstance(args[0], str) else None
    named = [value for name, value in kwargs.items() if name != "out"]
    flat = args[1] if equation and isinstance(args[1], list | tuple) else (*args, *named)
    tensors = [x for x in flat if isinstance(x, Tensor)]
    mask = tensors.pop(0) if len(tensors) == 3 and equation is None else None  # addmm, baddbmm
    if len(tensors) != 2 or min(x.ndim for x in (*tensors, result)) < 2:
        return
    left, right = tensors
    tag = session.tags.get(left)
    if isinstance(tag, Weights):
        _contract(session, tag, left, right, result, equation)
        return
    pair = score_operands(equation, left, right) if equation else (left, right.mT)
    if pair is None:
        return
    query, key = pair
    if _fixed(key):
        _project(session, result)
    elif not isinstance(query, nn.Parameter):
        masks = () if mask is None or kwargs.get("beta") == 0 else ((mask.detach(), result.shape),)
        session.tags[result] = Scores(query.detach(), key.detach(), masks, _heads(None, result))


@after("linear")
def _linear(session: Session, result: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _project(session, result)


def _project(session: Session, result: Tensor) -> None:
    if result.ndim and result.shape[-1] > 1:  # one number per pair is a score
        session.tags[result] = Projection()


def _fixed(tensor: Tensor) -> bool:
    """A parameter, or a view of one."""
    return isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)


def _contract(
    session: Session, tag: Weights, weights: Tensor, value: Tensor, output: Tensor, equation: str | None
) -> None:
    """Weights @ value: the attention call is complete."""
    if _fixed(value):
        return  # a fixed dictionary
    if tag.scores is None and (weights.shape[-2] == 1 or isinstance(session.tags.get(value), Scores)):
        return  # a soft gate over experts; linear attention, which multiplies keys and values first
    layout = Layout({"dropout": tag.dropout}, weights.ndim, session.hinted_heads or tag.heads)
    if equation is not None:
        found = value_operands(equation, weights, value)
        if found is None:
            return
        value, arrange = found
        layout = replace(layout, arrange=arrange)
    tensors = {"value": value, "logits": _fit(tag.logits, weights.shape)}
    if tag.scores is not None:
        for name, tensor in (("query", tag.scores.query), ("key", tag.scores.key)):
            lead, wanted = tensor.shape[:-2], weights.shape[:-2]
            if len(lead) != len(wanted) and math.prod(lead) == math.prod(wanted):
                tensor = tensor.reshape(*wanted, *tensor.shape[-2:])
            if tensor.ndim <= weights.ndim:  # else it stays unknown
                tensors[name] = tensor
        mask = _one_mask(
            mask if len(shape) == weights.ndim else _fit(mask.expand(shape), weights.shape)
            for mask, shape in tag.scores.masks
        )
        if mask is not None:
            tensors["mask"] = mask
    session.observe(Call(output, tensors, layout, intact=version_of(tag.logits) == tag.version))


def _fit(tensor: Tensor, shape: torch.Size) -> Tensor:
    return tensor.reshape(shape) if tensor.numel() == shape.numel() else tensor.expand(shape)


def _one_mask(masks: Iterable[Tensor]) -> Tensor | None:
    every = list(masks)
    if len(every) < 2:
        return every[0] if every else None
    return reduce(torch.logical_and, (mask if mask.dtype == torch.bool else mask > _hides(mask) for mask in every))


def _hides(mask: Tensor) -> Tensor:
    """From which value down an additive mask hides: a mask of 0 and one low value means it, a bias may be that low."""
    low = mask.amin()
    return torch.where(((mask == 0) | (mask == low)).all() & (low <= _HIDES), low, -1e4)


def _heads(known: int | None, tensor: Tensor) -> int | None:
    return tensor.shape[-3] if tensor.ndim == 4 else known


@after("softmax", "special_softmax")
def _softmax(session: Session, result: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    logits = args[0] if args else kwargs["input"]
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    if result.ndim >= 2 and dim in (-1, result.ndim - 1):
        tag = session.tags.get(logits)
        if not isinstance(tag, Projection):
            scores = tag if isinstance(tag, Scores) else None
            heads = _heads(scores.heads if scores else None, result)
            session.tags[result] = Weights(logits.detach(), version_of(logits), scores, heads=heads)


@after(*_SHAPE, *_CAST, *_SCALE)
def _follow(session: Session, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _pass_on(session, result, args)


@after("dropout")
def _dropout(session: Session, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = dict(zip(("input", "p", "training"), args, strict=False)) | kwargs
    active = given.get("training", given.get("train", True))
    _pass_on(session, result, (given["input"],), dropout=float(given.get("p", 0.5)) if active else 0.0)


@after("add", "add_")
def _add(session: Session, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    terms = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    _pass_on(session, result, terms, masks=_added(session, terms, kwargs.get("alpha", 1)))


def _added(session: Session, terms: list[Tensor], factor: float) -> tuple[Tensor, ...]:
    """What was added to the scores, as masks; a single number hides nobody."""
    others = [x.detach() for x in terms if x.ndim and x not in session.tags]
    return tuple(others if factor == 1 else [x * factor for x in others])


@after("sub", "sub_", "subtract")
def _subtract(session: Session, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    scores, *others = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    if scores in session.tags:
        _pass_on(session, result, (scores,), masks=_added(session, others, -kwargs.get("alpha", 1)))


@after("masked_fill", "masked_fill_")
def _fill(session: Session, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = dict(zip(("input", "mask", "value"), args, strict=False)) | kwargs
    if given["input"] in session.tags:
        _pass_on(session, result, (given["input"],), masks=_visible(given["mask"], given["value"]))


@after("where")
def _where(session: Session, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = dict(zip(("condition", "input", "other"), args, strict=False)) | kwargs
    condition, here, there = given["condition"], given.get("input"), given.get("other")
    if isinstance(here, Tensor) and here.dtype == torch.bool:  # scores.where(condition, other)
        condition, here = here, condition
    if isinstance(here, Tensor) and here in session.tags:
        _pass_on(session, result, (here,), masks=_visible(condition.logical_not(), there))
    elif isinstance(there, Tensor) and there in session.tags:
        _pass_on(session, result, (there,), masks=_visible(condition, here))


def _visible(hidden: Tensor, fill: Any) -> tuple[Tensor, ...]:
    """The mask that filling scores amounts to; a fill value that is a tensor stays on its device."""
    visible = hidden.logical_not()
    if isinstance(fill, Tensor):
        return (visible | (fill.detach() > _HIDES),)
    return (visible,) if fill <= _HIDES else ()


def _pass_on(
    session: Session, result: Any, args: Iterable[Any], *, masks: tuple[Tensor, ...] = (), dropout: float = 0.0
) -> None:
    """Hand the tag of the first tagged argument on, where the last two dimensions stay what they are."""
    tagged = [x for x in args if isinstance(x, Tensor) and x in session.tags]
    if not tagged or not isinstance(result, Tensor):
        return
    # Scores may be added to a projection (a learned bias), not the other way round.
    source = next((x for x in tagged if not isinstance(session.tags[x], Projection)), tagged[0])
    tag = session.tags[source]
    if isinstance(tag, Projection):
        if result.ndim and result.stride(-1) == source.stride(-1):  # its last axis is still the last
            _project(session, result)
        return
    if result.shape[-2:] != source.shape[-2:]:
        return
    if isinstance(tag, Scores):
        tag = replace(tag, masks=tag.masks + tuple((mask, result.shape) for mask in masks))
    elif dropout:
        tag = replace(tag, dropout=dropout)
    session.tags[result] = replace(tag, heads=_heads(tag.heads, result))

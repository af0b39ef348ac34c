"""Scores: the product of queries and keys, and what a model does to it in front of the softmax.

Tags follow the scores. What an operation in between does to them need not be understood: the softmax's input is
what counts, and whether weights and values belong together shows in the residual ``sum alpha b - u . o``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attnprobe.capture.registry import after, around
from attnprobe.capture.tags import Altered, Projection, Scores, Weights, order_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from attnprobe.capture.session import Session

_SHAPE = ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "contiguous", "clone")
_CAST = ("to", "type", "type_as", "float", "half", "bfloat16", "double", "nan_to_num")
_SCALE = ("mul", "mul_", "multiply", "div", "div_", "divide", "true_divide", "tanh", "clamp", "clip")
_TURN = ("transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "t", "adjoint", "T", "mT", "H", "mH")
_OTHER = ("exp", "exp_", "exp2", "log_softmax", "sigmoid", "relu", "relu_", "elu", "softplus", "square")
UNNORMALISED = "its weights are made of the scores by {}(), not by softmax()"
MIXED = "its weights are mixed after the softmax (talking heads): they are no softmax of any scores"
#: A fill value from here down hides a pair.
_HIDES = -50.0


def fixed(tensor: Tensor) -> bool:
    """A parameter, or a view of one."""
    return isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)


def heads_of(known: int | None, tensor: Tensor) -> int | None:
    return tensor.shape[-3] if tensor.ndim == 4 else known


@after("linear")
def _linear(session: Session, result: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    tag = session.tags.get(args[0] if args else kwargs["input"])
    if isinstance(tag, Weights):
        mix(session, result, tag)
    elif not isinstance(tag, Scores):  # mixed scores of several heads are scores of unknown queries and keys
        project(session, result)


@after("conv1d", "conv2d", "layer_norm")
def _mix(session: Session, result: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    tag = session.tags.get(args[0] if args else kwargs["input"])
    if isinstance(tag, Weights):
        mix(session, result, tag)


def mix(session: Session, result: Tensor, weights: Weights) -> None:
    """``result`` is made of the weights of several heads."""
    session.tags[result] = Altered(MIXED)
    session.unmet.pop(weights.softmax, None)


def project(session: Session, result: Tensor) -> None:
    if result.ndim and result.shape[-1] > 1:  # one number per pair is a score
        session.tags[result] = Projection()


@after(*_SHAPE, *_CAST, *_SCALE)
def _follow(session: Session, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    pass_on(session, result, args)


@around(*_TURN)
def _turn(session: Session, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    result = function(*args, **kwargs)
    source = args[0] if args else kwargs.get("input")
    if isinstance(source, Tensor) and (tag := session.tags.get(source)) is not None:
        with session.guarded():
            if isinstance(tag, Scores | Weights):
                tag = tag.moved(order_of(function, source, args[1:], kwargs))
                if tag is not None:
                    session.tags[result] = tag
            else:
                pass_on(session, result, (source,))
    return result


@after("dropout")
def _dropout(session: Session, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = dict(zip(("input", "p", "training"), args, strict=False)) | kwargs
    active = given.get("training", given.get("train", True))
    pass_on(session, result, (given["input"],), dropout=float(given.get("p", 0.5)) if active else 0.0)


@after("add", "add_")
def _add(session: Session, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    terms = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    pass_on(session, result, terms, added=_untagged(session, terms, kwargs.get("alpha", 1)))


@after("sub", "sub_", "subtract")
def _subtract(session: Session, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    scores, *others = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    tag = session.tags.get(scores)
    if tag is None:
        return
    if isinstance(tag, Scores) and others and others[0].shape[-1:] in ((), (1,)) and tag.depth == 2:
        off = others[0].detach().expand(*result.shape[:-1], 1)  # the row's maximum, as a rule: it hides nobody
        session.tags[scores] = tag = replace(tag, shift=(*tag.shift, off))
        others = []
    pass_on(session, result, (scores,), added=_untagged(session, others, -kwargs.get("alpha", 1)))


def _untagged(session: Session, terms: list[Tensor], factor: float) -> tuple[Tensor, ...]:
    """What was added to the scores; a single number hides nobody."""
    others = [x.detach() for x in terms if x.ndim and x not in session.tags]
    return tuple(others if factor == 1 else [x * factor for x in others])


@after("masked_fill", "masked_fill_")
def _fill(session: Session, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = dict(zip(("input", "mask", "value"), args, strict=False)) | kwargs
    if given["input"] in session.tags:
        pass_on(session, result, (given["input"],), added=_visible(given["mask"], given["value"]))


@after("__setitem__")
def _set(session: Session, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    scores, index, fill = args
    if isinstance(tag := session.tags.get(scores), Scores):
        hidden = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
        hidden[index] = True
        session.tags[scores] = _with(tag, scores.shape, _visible(hidden, fill))


@after("where")
def _where(session: Session, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = dict(zip(("condition", "input", "other"), args, strict=False)) | kwargs
    condition, here, there = given["condition"], given.get("input"), given.get("other")
    if isinstance(here, Tensor) and here.dtype == torch.bool:  # scores.where(condition, other)
        condition, here = here, condition
    if isinstance(here, Tensor) and here in session.tags:
        pass_on(session, result, (here,), added=_visible(condition.logical_not(), there))
    elif isinstance(there, Tensor) and there in session.tags:
        pass_on(session, result, (there,), added=_visible(condition, here))


def _visible(hidden: Tensor, fill: Any) -> tuple[Tensor, ...]:
    """The mask that filling scores amounts to; a fill value that is a tensor stays on its device."""
    visible = hidden.logical_not()
    if isinstance(fill, Tensor):
        return (visible | (fill.detach() > _HIDES),)
    return (visible,) if fill <= _HIDES else ()


@after("cat", "concat", "concatenate")
def _append(session: Session, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Learned sinks: more columns beside the scores."""
    given = dict(zip(("tensors", "dim"), args, strict=False)) | kwargs
    parts, dim = given["tensors"], given.get("dim", 0)
    tagged = [i for i, x in enumerate(parts) if isinstance(session.tags.get(x), Scores)]
    if len(parts) != 2 or len(tagged) != 1 or dim not in (-1, result.ndim - 1):
        return
    scores, others = parts[tagged[0]], parts[1 - tagged[0]]
    session.tags[result] = replace(session.tags[scores], extra=(others.shape[-1], tagged[0] == 1))


@around(*_OTHER)
def _other(session: Session, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    result = function(*args, **kwargs)
    with session.guarded():
        tag = session.tags.get(args[0]) if args else None
        if isinstance(tag, Scores):
            session.tags[result] = Altered(UNNORMALISED.format(function.__name__.strip("_")))
        elif isinstance(tag, Altered):
            session.tags[result] = tag
    return result


def pass_on(
    session: Session, result: Any, args: Iterable[Any], *, added: tuple[Tensor, ...] = (), dropout: float = 0.0
) -> None:
    """Hand the tag of the first tagged argument on, where the axes of queries and keys stay what they are."""
    tagged = [x for x in args if isinstance(x, Tensor) and x in session.tags]
    if not tagged or not isinstance(result, Tensor):
        return
    # Scores may be added to a projection (a learned bias), not the other way round.
    source = next((x for x in tagged if not isinstance(session.tags[x], Projection)), tagged[0])
    tag = session.tags[source]
    if isinstance(tag, Altered):
        session.tags[result] = tag
    elif isinstance(tag, Projection):
        if result.ndim and result.stride(-1) == source.stride(-1):  # its last axis is still the last
            project(session, result)
    elif result.shape[-tag.depth :] == source.shape[-tag.depth :]:
        if isinstance(tag, Scores):
            tag = _with(tag, result.shape, added)
        elif dropout:
            tag = replace(tag, dropout=dropout, drops=() if result is source else (source.detach(), result.detach()))
        session.tags[result] = replace(tag, heads=heads_of(tag.heads, result))


def _with(tag: Scores, shape: torch.Size, added: tuple[Tensor, ...]) -> Scores:
    """The tag of scores to which masks were added; what is added to columns that are no keys hides none."""
    masks = () if tag.extra[0] else tuple(mask.expand(shape) for mask in added)
    return replace(tag, masks=tag.masks + masks)

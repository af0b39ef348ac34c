"""Attention written out: query @ key^T, softmax over the keys, weights @ value.

Tags follow the scores to the softmax and the weights from there to the product with the values.
They hang on the tensors weakly and die with them. What an operation in between does to the
weights need not be understood: it shows in the residual ``sum alpha b - u . o``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attnprobe.capture.call import Call, Layout
from attnprobe.capture.einsum import score_operands, value_operands
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
    """Tag of ``query @ key^T`` and of what was made of it: the operands and what hides pairs."""

    query: Tensor
    key: Tensor
    masks: tuple[Tensor, ...] = ()
    heads: int | None = None


@dataclass(frozen=True)
class Weights:
    """Tag of a softmax over keys and of what was made of it."""

    logits: Tensor
    scores: Scores | None
    dropout: float = 0.0
    heads: int | None = None


@after("matmul", "__matmul__", "bmm", "baddbmm", "einsum")
def _product(session: Session, result: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    equation = args[0] if args and isinstance(args[0], str) else None
    flat = args[1] if equation and len(args) == 2 else (*args, *kwargs.values())
    tensors = [x for x in flat if isinstance(x, Tensor)]
    mask = tensors.pop(0) if len(tensors) == 3 and equation is None else None  # baddbmm
    if len(tensors) != 2 or min(x.ndim for x in (*tensors, result)) < 2:
        return
    left, right = tensors
    tag = session.tags.get(left)
    if isinstance(tag, Weights):
        _contract(session, tag, left, right, result, equation)
    elif not isinstance(left, nn.Parameter) and not isinstance(right, nn.Parameter):
        pair = score_operands(equation, left, right) if equation else (left, right.mT)
        if pair is not None:
            masks = () if mask is None or kwargs.get("beta") == 0 else (mask.detach(),)
            session.tags[result] = Scores(pair[0].detach(), pair[1].detach(), masks, _heads(None, result))


def _contract(
    session: Session, tag: Weights, weights: Tensor, value: Tensor, output: Tensor, equation: str | None
) -> None:
    """Weights @ value: the attention call is complete."""
    if isinstance(value, nn.Parameter) or (tag.scores is None and weights.shape[-2] == 1):
        return  # a fixed dictionary, or a soft gate over experts
    layout = Layout({"dropout": tag.dropout}, weights.ndim, session.hinted_heads or tag.heads)
    if equation is not None:
        found = value_operands(equation, value)
        if found is None:
            return
        value, arrange = found
        layout = replace(layout, arrange=arrange)
    lead = weights.shape[:-2]
    tensors = {"value": value, "logits": tag.logits.reshape(weights.shape)}
    if tag.scores is not None:
        for name, tensor in (("query", tag.scores.query), ("key", tag.scores.key)):
            tensors[name] = tensor if tensor.ndim == weights.ndim else tensor.reshape(*lead, *tensor.shape[-2:])
        mask = _one_mask(tag.scores.masks)
        if mask is not None:
            same = tag.logits.ndim == weights.ndim
            tensors["mask"] = mask if same else mask.expand(tag.logits.shape).reshape(weights.shape)
    session.observe(Call(output, tensors, layout))


def _one_mask(masks: tuple[Tensor, ...]) -> Tensor | None:
    if len(masks) < 2:
        return masks[0] if masks else None
    visible = [mask if mask.dtype == torch.bool else mask > -1e4 for mask in masks]
    together = visible[0]
    for mask in visible[1:]:
        together = together & mask
    return together


def _heads(known: int | None, tensor: Tensor) -> int | None:
    return tensor.shape[-3] if tensor.ndim == 4 else known


@after("softmax", "special_softmax")
def _softmax(session: Session, result: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    logits = args[0] if args else kwargs["input"]
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    if result.ndim >= 2 and dim in (-1, result.ndim - 1):
        scores = session.tags.get(logits)
        scores = scores if isinstance(scores, Scores) else None
        heads = _heads(scores.heads if scores else None, result)
        session.tags[result] = Weights(logits.detach(), scores, heads=heads)


@after(*_SHAPE, *_CAST, *_SCALE)
def _follow(session: Session, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _pass_on(session, result, args)


@after("dropout")
def _dropout(session: Session, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = dict(zip(("input", "p", "training"), args, strict=False)) | kwargs
    active = given.get("training", given.get("train", True))
    _pass_on(session, result, (given["input"],), dropout=float(given.get("p", 0.5)) if active else 0.0)


@after("add", "add_", "__iadd__", "sub", "sub_", "subtract")
def _add(session: Session, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    others = [x.detach() for x in args if isinstance(x, Tensor) and x.ndim >= 2 and x not in session.tags]
    _pass_on(session, result, args, masks=tuple(others))


@after("masked_fill", "masked_fill_", "where")
def _fill(session: Session, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    parts = [*args, *kwargs.values()]
    if len(parts) != 3:
        return
    scores_first = parts[0] in session.tags if isinstance(parts[0], Tensor) else False
    if scores_first:  # masked_fill(scores, hidden, value)
        hidden, fill = parts[1], parts[2]
    elif isinstance(parts[1], Tensor) and parts[1] in session.tags:  # where(visible, scores, value)
        hidden, fill = ~parts[0], parts[2]
    else:
        hidden, fill = parts[0], parts[1]
    low = fill.max().item() if isinstance(fill, Tensor) else fill
    _pass_on(session, result, args, masks=(~hidden.detach(),) if low <= _HIDES else ())


def _pass_on(
    session: Session, result: Any, args: tuple[Any, ...], *, masks: tuple[Tensor, ...] = (), dropout: float = 0.0
) -> None:
    """Hand the tag of the first tagged argument on, where the last two dimensions stay what they are."""
    tagged = next((x for x in args if isinstance(x, Tensor) and x in session.tags), None)
    if tagged is None or not isinstance(result, Tensor) or result.shape[-2:] != tagged.shape[-2:]:
        return
    tag = session.tags[tagged]
    if isinstance(tag, Scores):
        tag = replace(tag, masks=tag.masks + masks)
    elif dropout:
        tag = replace(tag, dropout=dropout)
    session.tags[result] = replace(tag, heads=_heads(tag.heads, result))

"""Attention written out: query @ key^T, softmax over the keys, weights @ value.

Tags follow the scores to the softmax (``scores.py``) and the weights from there to the product with the values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnprobe.capture.call import Call, Layout
from attnprobe.capture.einsum import contracts, score_operands, value_operands
from attnprobe.capture.hold import version_of
from attnprobe.capture.registry import after
from attnprobe.capture.scores import fixed, heads_of, mix, project
from attnprobe.capture.tags import Altered, Projection, Scores, Weights, fitted, shrunk
from attnprobe.capture.unseen import NESTED

if TYPE_CHECKING:
    from attnprobe.capture.session import Session

#: An additive mask that holds 0 and one value from here down hides what has the latter.
_HIDES = -50.0


@after("matmul", "linalg_matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "__rmatmul__")
def _product(session: Session, result: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    equation = args[0] if args and isinstance(args[0], str) else None
    named = [value for name, value in kwargs.items() if name != "out"]
    flat = args[1] if equation and isinstance(args[1], list | tuple) else (*args, *named)
    tensors = [x for x in flat if isinstance(x, Tensor)]
    mask = tensors.pop(0) if len(tensors) == 3 and equation is None else None  # addmm, baddbmm
    if len(tensors) != 2 or min(x.ndim for x in (*tensors, result)) < 2:
        return
    left, right = tensors
    if left.is_nested or right.is_nested:
        if isinstance(session.tags.get(left), Altered):
            session.refuse(NESTED)
        return
    for weights, value in ((left, right), (right, left)):
        tag = session.tags.get(weights)
        if isinstance(tag, Altered) and not fixed(value):
            session.refuse(tag.how)
            return
        if isinstance(tag, Weights) and (weights is left or tag.scores is not None):
            _contract(session, tag, weights, value, result, equation, swapped=weights is right)
            return
    found: tuple[Tensor, Tensor, tuple[int, int]] | None
    if equation is None and result.shape[-2:] == (left.shape[-2], right.shape[-1]):
        found = left.unsqueeze(-2), right.mT.unsqueeze(-3), (-2, -1)
    else:
        found = score_operands(equation, left, right) if equation else None
    if found is None:
        return
    first, second = found[2]
    if any(isinstance(session.tags.get(x), Scores) for x in tensors):
        return  # mixed scores of several heads are scores of unknown queries and keys
    if (fixed(right) and second == -1) or (fixed(left) and first == -1):
        project(session, result)
    elif not (fixed(left) or fixed(right)):
        masks = () if mask is None or kwargs.get("beta") == 0 else (mask.detach().expand(result.shape),)
        one, two = (x.detach().reshape((1,) * (result.ndim + 1 - x.ndim) + x.shape) for x in found[:2])
        session.tags[result] = Scores(one, two, found[2], masks, heads=heads_of(None, result))


def _contract(
    session: Session,
    tag: Weights,
    weights: Tensor,
    value: Tensor,
    output: Tensor,
    equation: str | None,
    *,
    swapped: bool,
) -> None:
    """Weights and values meet: the attention call is complete."""
    if fixed(value):  # a fixed dictionary, or a projection that leaves the keys what they are
        if tag.scores is not None and not contracts(equation, weights, tag.axis, swapped=swapped):
            mix(session, output, tag)
        return
    if tag.scores is None and (weights.shape[-2] == 1 or isinstance(session.tags.get(value), Scores)):
        return  # a soft gate over experts; linear attention, which multiplies keys and values first
    order = list(range(weights.ndim))
    arrange: Callable[[Tensor], Tensor] = _same
    if equation is not None:
        found = value_operands(equation, weights, tag.axis, value, swapped=swapped)
        if found is None:
            return
        value, arrange, order = found
    elif swapped:
        order[-2:] = order[:-3:-1]
        value, arrange = value.mT, _transposed
    if order[-1] != tag.axis + weights.ndim:
        return  # a product over the queries
    session.unmet.pop(tag.softmax, None)
    tensors = _operands(tag, weights, order)
    heads = session.hinted_heads or heads_of(tag.heads, tensors["logits"])
    layout = Layout({"dropout": tag.dropout}, weights.ndim, heads, arrange)
    intact = version_of(tag.logits) == tag.version
    session.observe(Call(output, tensors | {"value": value}, layout, intact=intact))


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.mT


def _operands(tag: Weights, weights: Tensor, order: list[int]) -> dict[str, Tensor]:
    """Everything that the tag knows, in the order ``[..., T, S]``; what cannot be brought there stays unknown."""
    kept = tag.depth
    lead = weights.shape[: weights.ndim - kept]

    def brought(tensor: Tensor, width: int = 0) -> Tensor | None:
        fit = fitted(tensor, lead, kept + width)
        return None if fit is None else fit.permute([*order, *range(len(order), len(order) + width)])

    logits = brought(tag.logits)
    assert logits is not None
    found: dict[str, Tensor | None] = {"logits": logits}
    if tag.drops:
        found |= {name: brought(x) for name, x in zip(("undropped", "dropped"), tag.drops, strict=True)}
    if tag.sink is not None and (sink := brought(tag.sink)) is not None:
        found["sink"] = sink.logsumexp(-1, keepdim=True)
    if tag.scores is not None and tag.scores.extra[0] in (0, 0 if tag.sink is None else tag.sink.shape[tag.axis]):
        left, right = (brought(x, 1) for x in (tag.scores.left, tag.scores.right))
        if tag.scores.own[0] == tag.axis:
            left, right = right, left
        found["query"] = None if left is None else left.select(-2, 0)
        found["key"] = None if right is None else right.select(-3, 0)
        masks = [brought(mask) for mask in tag.scores.masks]
        found["mask"] = _one_mask(shrunk(mask) for mask in masks if mask is not None)
        off = [shift for part in tag.scores.shift if (shift := brought(part)) is not None]
        found["shift"] = torch.stack(off).sum(0) if off else None
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _one_mask(masks: Iterable[Tensor]) -> Tensor | None:
    every = list(masks)
    if len(every) < 2:
        return every[0] if every else None
    return reduce(torch.logical_and, (mask if mask.dtype == torch.bool else mask > _hides(mask) for mask in every))


def _hides(mask: Tensor) -> Tensor:
    """From which value down an additive mask hides: below a gap; a bias without one may be as low."""
    low = mask.amin()
    gap = ((mask <= 1.5 * _HIDES) | (mask >= 0.5 * _HIDES)).all() | ((mask == 0) | (mask == low)).all()
    return torch.where(gap & (low <= _HIDES) & (mask.amax() >= 0.5 * _HIDES), _HIDES, -1e4)


@after("softmax", "special_softmax")
def _softmax(session: Session, result: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    logits = args[0] if args else kwargs["input"]
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    tag = session.tags.get(logits)
    if result.is_nested:
        session.tags[result] = Altered(NESTED)
        return
    if result.ndim < 2 or not isinstance(dim, int) or isinstance(tag, Projection):
        return
    axis = dim if dim < 0 else dim - result.ndim
    scores = tag if isinstance(tag, Scores) else None
    if axis == -1 or (scores is not None and axis in scores.own):
        heads = heads_of(scores.heads if scores else None, result)
        number = session.softmax() if scores is not None else 0
        session.tags[result] = Weights(logits.detach(), version_of(logits), axis, scores, heads=heads, softmax=number)


@after("__getitem__", "narrow")
def _cut(session: Session, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Learned sinks: their columns are cut off after the softmax."""
    tag = session.tags.get(args[0])
    if not isinstance(tag, Weights) or tag.scores is None or tag.axis != -1 or not isinstance(result, Tensor):
        return
    (extra, first), whole = tag.scores.extra, args[0]
    keys = whole.shape[-1] - extra
    start = extra if first else 0
    begins = whole.storage_offset() + start * whole.stride(-1) == result.storage_offset()
    if extra and tag.sink is None and not tag.dropout and begins and result.shape == (*whole.shape[:-1], keys):
        logits, sink = tag.logits.narrow(-1, start, keys), tag.logits.narrow(-1, 0 if first else keys, extra)
        session.tags[result] = replace(tag, logits=logits, sink=sink)

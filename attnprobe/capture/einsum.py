"""Two-operand einsum equations read as attention: which letter is the query, the key, the width."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def _letters(equation: str, dims: int) -> tuple[str, str, str] | None:
    """Operand and output letters, or None for what we do not read (repeated letters, no arrow, other arity).

    An ellipsis becomes digits, as many as the first operand of ``dims`` dimensions has there.
    """
    equation = equation.replace(" ", "")
    first = equation.partition(",")[0]
    hidden = "".join(map(str, range(dims - len(first.replace("...", "")))))
    left, arrow, output = equation.replace("...", hidden).partition("->")
    operands = left.split(",")
    if not arrow or len(operands) != 2:
        return None
    if any(len(set(part)) != len(part) for part in (*operands, output)):
        return None
    return operands[0], operands[1], output


def _bring(tensor: Tensor, letters: str, wanted: str) -> Tensor:
    """Permute ``letters`` to ``wanted``; a wanted letter that is missing becomes a dimension of size 1."""
    tensor = tensor.permute([letters.index(c) for c in wanted if c in letters])
    for position, letter in enumerate(wanted):
        if letter not in letters:
            tensor = tensor.unsqueeze(position)
    return tensor


def score_operands(equation: str, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor] | None:
    """Query ``[..., T, D]`` and key ``[..., S, D]`` of an equation that makes scores ``[..., t, s]``."""
    letters = _letters(equation, left.ndim)
    if letters is None or len(letters[2]) < 2 or left.ndim != len(letters[0]) or right.ndim != len(letters[1]):
        return None
    one, two, output = letters
    t, s, lead = output[-2], output[-1], output[:-2]
    width = (set(one) & set(two)) - set(output)
    if len(width) != 1 or (t in one) == (t in two) or (s in one) == (s in two) or (t in one) == (s in one):
        return None
    (d,) = width
    if {*one, *two} - {*lead, t, s, d}:
        return None
    query, key = ((left, one), (right, two)) if t in one else ((right, two), (left, one))
    return _bring(*query, lead + t + d), _bring(*key, lead + s + d)


def value_operands(equation: str, left: Tensor, value: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]] | None:
    """Value ``[..., S, E]`` and how the output becomes ``[..., T, E]``, for weights ``[..., t, s]`` on the left."""
    letters = _letters(equation, left.ndim)
    if letters is None or len(letters[0]) < 2 or value.ndim != len(letters[1]):
        return None
    weights, values, output = letters
    lead, t, s = weights[:-2], weights[-2], weights[-1]
    width = [c for c in values if c in output and c not in weights]
    if len(width) != 1 or s not in values or s in output or t in values or t not in output:
        return None
    if {*values} - {*lead, s, *width} or {*output} != {*lead, t, *width}:
        return None
    return _bring(value, values, lead + s + width[0]), lambda tensor: _bring(tensor, output, lead + t + width[0])

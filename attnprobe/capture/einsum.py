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


def score_operands(equation: str, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]] | None:
    """The operands in the dimensions of the scores, their width last, and each one's own axis of the scores.

    A product makes scores if each operand has an axis of its own and they share one that the result has not. Of two
    own axes the last is taken: the other is the heads of queries that read one key head.
    """
    letters = _letters(equation, left.ndim)
    if letters is None or left.ndim != len(letters[0]) or right.ndim != len(letters[1]):
        return None
    one, two, output = letters
    width = (set(one) & set(two)) - set(output)
    first, second = ([c for c in output if c in part and c not in other] for part, other in ((one, two), (two, one)))
    if len(width) != 1 or not first or not second or {*one, *two} - {*output, *width}:
        return None
    (d,) = width
    own = (output.index(first[-1]) - len(output), output.index(second[-1]) - len(output))
    return _bring(left, one, output + d), _bring(right, two, output + d), own


def contracts(equation: str | None, weights: Tensor, axis: int, *, swapped: bool) -> bool:
    """Whether a product, by ``equation`` or ``@``, sums over an axis of one operand, the second if ``swapped``."""
    if equation is None:
        return axis == (-2 if swapped else -1)
    operands, _, output = equation.replace(" ", "").partition("->")
    return operands.split(",")[swapped][axis] not in output


def value_operands(
    equation: str, weights: Tensor, axis: int, value: Tensor, *, swapped: bool
) -> tuple[Tensor, Callable[[Tensor], Tensor], list[int]] | None:
    """How weights, softmaxed over ``axis``, meet values.

    Returns:
        value ``[..., S, E]``; how the output becomes ``[..., T, E]``; the permutation that brings the weights to
        ``[..., T, S]``. None if the equation does something else.
    """
    letters = _letters(equation, (value if swapped else weights).ndim)
    if letters is None:
        return None
    one, two, output = letters
    given, values = (two, one) if swapped else (one, two)
    if len(given) != weights.ndim or len(values) != value.ndim:
        return None
    s = given[axis]
    rows = [c for c in given if c in output and c not in values]
    width = [c for c in values if c in output and c not in given]
    if len(width) != 1 or not rows or s not in values or s in output:
        return None
    t = rows[-1]  # the others are dimensions that the values do not have: one key head for several query heads
    lead = "".join(c for c in given if c not in (s, t))
    if {*values} - {*lead, s, *width} or {*output} != {*lead, t, *width}:
        return None
    order = [given.index(c) for c in lead + t + s]
    return _bring(value, values, lead + s + width[0]), lambda tensor: _bring(tensor, output, lead + t + width[0]), order

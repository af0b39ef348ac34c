"""The sums of both passes in one kernel launch each, for CUDA; no ``T x S`` tensor reaches memory.

Verified in Triton's interpreter (``TRITON_INTERPRET=1``) only: no GPU has run these kernels yet.

Import this module only where tensors are on CUDA, because it needs Triton. Shapes: ``query [N, T, D]``, ``key
[M, S, D]``, ``error [N, T, E]``, ``value [M, S, E]``, where ``N`` is a multiple of ``M`` and item ``n`` reads key
item ``n // (N // M)``; everything about rows is ``[N, T]``. The query is already multiplied by ``scale * log2(e)``.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (the arguments of a kernel are typed by what it is launched with)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, WIDTH = 64, 64, 16  # of a tile, and how much of D or E is multiplied at once
WARPS = 8

ALWAYS = ("mass", "plogp", "square", "logs", "max_log")
WITH_ERROR = ("pc", "ppc", "pcc", "ppcc", "min_c")
EXTENDED = ("distance",)
EXTENDED_WITH_ERROR = ("ee", "ec", "c", "cc")


def log_sum_exp(query: Tensor, key: Tensor, limit: Tensor) -> Tensor:
    """``log2 sum_j 2^(query_i . key_j)`` over ``j < limit_i``, float32 ``[N, T]``; -inf where ``limit`` is 0."""
    query, key, limit = query.contiguous(), key.contiguous(), limit.contiguous()
    result = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
    with torch.cuda.device_of(query):
        arguments = (query, key, limit, result, *_sizes(query, key), ROWS, COLUMNS, WIDTH)
        _log_sum_exp[_grid(query)](*arguments, num_warps=WARPS)
    return result


def pair_sums(
    query: Tensor,
    key: Tensor,
    shift: Tensor,
    limit: Tensor,
    position: Tensor,
    share: Tensor,
    *,
    error: Tensor | None = None,
    value: Tensor | None = None,
    centre: Tensor | None = None,
    extended: bool = False,
) -> tuple[dict[str, Tensor], Tensor]:
    """Sums over the keys ``j < limit_i`` that row ``i`` sees, of ``p = 2^x`` with ``x = query_i . key_j - shift_i``.

    Args:
        query, key: float32, bfloat16 or float16, multiplied in float32.
        shift: float32; a row whose shift is 1e30 has ``p = 0``.
        limit, position: int32; how many keys the row sees, and which key has distance 0 from it.
        share: float32; the weight of a key under uniform attention.
        error, value, centre: all or none; they give ``c = error_i . value_j - centre_i``.
        extended: whether to sum distances and ``e = p - share`` too.

    Returns:
        float32 ``[N, T]`` by name: ``mass`` p, ``plogp`` px, ``square`` p², ``logs`` x, ``max_log`` the largest x
        (-1e30 where nothing is visible); with an error ``pc`` pc, ``ppc`` p²c, ``pcc`` pc², ``ppcc`` p²c², ``min_c``
        the smallest c (1e30 where nothing is visible); extended ``distance`` p|position - j| and, with an error,
        ``ee`` e², ``ec`` ec, ``c`` c, ``cc`` c². And ``usage``, ``[N, S]``: the sum of p over rows.
    """
    names = ALWAYS + (WITH_ERROR if error is not None else ()) + (EXTENDED if extended else ())
    names += EXTENDED_WITH_ERROR if extended and error is not None else ()
    query, key = query.contiguous(), key.contiguous()
    others = (shift, limit, position, share, error, value, centre)
    items, queries, keys = query.shape[0], query.shape[1], key.shape[1]
    sums = torch.empty(items, len(names), queries, dtype=torch.float32, device=query.device)
    usage = torch.zeros(items, keys, dtype=torch.float32, device=query.device)
    with torch.cuda.device_of(query):
        _pair_sums[_grid(query)](
            *(query, key, *(None if tensor is None else tensor.contiguous() for tensor in others), sums, usage),
            *(*_sizes(query, key), 1 if error is None else error.shape[-1]),
            *(len(names), error is not None, extended, ROWS, COLUMNS, WIDTH),
            num_warps=WARPS,
        )
    return dict(zip(names, sums.unbind(1), strict=True)), usage


def _grid(query: Tensor) -> tuple[int]:
    return (query.shape[0] * triton.cdiv(query.shape[1], ROWS),)  # the other axes end at 65535


def _sizes(query: Tensor, key: Tensor) -> tuple[int, int, int, int]:
    """Query items to a key item, and ``T``, ``S``, ``D``."""
    return query.shape[0] // max(1, key.shape[0]), query.shape[1], key.shape[1], query.shape[2]


@triton.jit
def _block(queries, ROWS: tl.constexpr):
    """This program's item, 64 bits wide as offsets grow with it, and its rows."""
    blocks = tl.cdiv(queries, ROWS)
    return (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)


@triton.jit
def _products(
    left, right, rows, columns, queries, keys, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr
):
    """``[ROWS, COLUMNS]`` of ``left @ right.T``, a few features at a time so that any width fits."""
    result = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, width, WIDTH):
        features = start + tl.arange(0, WIDTH)
        known = features < width
        at_rows = left + rows[:, None] * width + features[None, :]
        at_columns = right + columns[None, :] * width + features[:, None]
        a = tl.load(at_rows, (rows < queries)[:, None] & known[None, :], 0.0)
        b = tl.load(at_columns, (columns < keys)[None, :] & known[:, None], 0.0)
        result = tl.dot(a.to(tl.float32), b.to(tl.float32), result, input_precision="ieee")
    return result


@triton.jit
def _log_sum_exp(
    query, key, limit, result, repeats, queries, keys, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    item, rows = _block(queries, ROWS)
    query, key = query + item * queries * width, key + item // repeats * keys * width
    row = item * queries + rows
    seen = tl.minimum(tl.load(limit + row, rows < queries, 0), keys)
    largest, total = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    for start in range(0, tl.max(seen, 0), COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        x = _products(query, key, rows, columns, queries, keys, width, ROWS, COLUMNS, WIDTH)
        x = tl.where(columns[None, :] < seen[:, None], x, float("-inf"))
        higher = tl.maximum(largest, tl.max(x, 1))
        higher = tl.where(tl.abs(higher) == float("inf"), 0.0, higher)  # inf - inf would be NaN
        total = total * tl.exp2(largest - higher) + tl.sum(tl.exp2(x - higher[:, None]), 1)
        largest = higher
    tl.store(result + row, largest + tl.log2(total), rows < queries)


@triton.jit
def _pair_sums(
    query, key, shift, limit, position, share, error, value, centre, sums, usage,
    repeats, queries, keys, width, value_width,
    NAMES: tl.constexpr, ERROR: tl.constexpr, EXTENDED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    item, rows = _block(queries, ROWS)
    inside = rows < queries
    row = item * queries + rows
    query, key = query + item * queries * width, key + item // repeats * keys * width
    seen = tl.minimum(tl.load(limit + row, inside, 0), keys)
    shifts = tl.load(shift + row, inside, 0.0)
    zero = tl.zeros([ROWS], tl.float32)
    mass, plogp, square, logs, max_log = zero, zero, zero, zero, zero - 1e30
    if ERROR:
        error, value = error + item * queries * value_width, value + item // repeats * keys * value_width
        centres = tl.load(centre + row, inside, 0.0)
        pc, ppc, pcc, ppcc, min_c, nan = zero, zero, zero, zero, zero + 1e30, zero
        sum_ee, sum_ec, sum_c, sum_cc = zero, zero, zero, zero
    if EXTENDED:
        positions = tl.load(position + row, inside, 0)
        uniform = tl.load(share + row, inside, 0.0)
        distance = zero

    for start in range(0, tl.max(seen, 0), COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        visible = columns[None, :] < seen[:, None]
        x = _products(query, key, rows, columns, queries, keys, width, ROWS, COLUMNS, WIDTH)
        x = tl.where(visible, x - shifts[:, None], -1e30)
        p = tl.where(shifts[:, None] < 1e30, tl.exp2(x), 0.0)  # whatever a row holds that does not count
        mass += tl.sum(p, 1)
        plogp += tl.sum(tl.where(p == 0.0, 0.0, p * x), 1)
        square += tl.sum(p * p, 1)
        logs += tl.sum(tl.where(visible, x, 0.0), 1)
        max_log = tl.maximum(max_log, tl.max(x, 1))
        tl.atomic_add(usage + item * keys + columns, tl.sum(p, 0), columns < keys, sem="relaxed")
        if EXTENDED:
            distance += tl.sum(p * tl.abs(positions[:, None] - columns[None, :]).to(tl.float32), 1)
        if ERROR:
            c = _products(error, value, rows, columns, queries, keys, value_width, ROWS, COLUMNS, WIDTH)
            c = tl.where(visible, c - centres[:, None], 0.0)
            q = p * c
            pc += tl.sum(q, 1)
            ppc += tl.sum(p * q, 1)
            pcc += tl.sum(q * c, 1)
            ppcc += tl.sum(q * q, 1)
            min_c = tl.minimum(min_c, tl.min(tl.where(visible, c, 1e30), 1))
            nan += tl.sum(tl.where(c == c, 0.0, c), 1)
            if EXTENDED:
                e = tl.where(visible, p - uniform[:, None], 0.0)
                sum_ee += tl.sum(e * e, 1)
                sum_ec += tl.sum(e * c, 1)
                sum_c += tl.sum(c, 1)
                sum_cc += tl.sum(c * c, 1)

    at = sums + item * NAMES * queries + rows
    tl.store(at, mass, inside)
    tl.store(at + queries, plogp, inside)
    tl.store(at + 2 * queries, square, inside)
    tl.store(at + 3 * queries, logs, inside)
    # The largest and the smallest pass over NaN, sums do not; and p is NaN exactly where x is.
    tl.store(at + 4 * queries, tl.where(mass == mass, max_log, mass), inside)
    at += 5 * queries
    if ERROR:
        tl.store(at, pc, inside)
        tl.store(at + queries, ppc, inside)
        tl.store(at + 2 * queries, pcc, inside)
        tl.store(at + 3 * queries, ppcc, inside)
        tl.store(at + 4 * queries, min_c + nan, inside)
        at += 5 * queries
    if EXTENDED:
        tl.store(at, distance, inside)
        if ERROR:
            tl.store(at + queries, sum_ee, inside)
            tl.store(at + 2 * queries, sum_ec, inside)
            tl.store(at + 3 * queries, sum_c, inside)
            tl.store(at + 4 * queries, sum_cc, inside)

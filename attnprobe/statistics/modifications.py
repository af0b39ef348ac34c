"""FlexAttention's ``score_mod`` and ``mask_mod``: functions of one pair, evaluated on tiles of pairs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

PairFunction = Callable[..., Tensor]


class Modification:
    """``function([score,] b, h, q_idx, kv_idx)``, which is written for scalars, on the tiles of a record.

    FlexAttention maps it over every index with ``torch.vmap``. One call with index tensors that broadcast is
    several times faster, and gives the same where all that the function does is elementwise or a lookup: then
    everything that a call with scalars computes is a scalar. A sum over features of the query, say, is not.

    Args:
        function: from the record.
        sizes: ``(B, H, T, S)``.
        device: of the record.
        dtype: of the scores; None for a ``mask_mod``, which takes none.
    """

    def __init__(
        self,
        function: PairFunction,
        sizes: tuple[int, int, int, int],
        device: torch.device,
        dtype: torch.dtype | None = None,
    ) -> None:
        batch, heads, queries, keys = sizes
        ends = ([0, batch - 1], [0, heads - 1], [0, queries // 2, queries - 1], [0, keys // 2, keys - 1])
        few = [torch.tensor(index, device=device) for index in ends]
        scores = () if dtype is None else (torch.linspace(-3, 3, 18, device=device, dtype=dtype).view(2, 3, 3),)
        self._function, self._evaluate = function, _broadcast if _broadcasts(function, few, *scores) else _map

    def __call__(self, batch: Tensor, head: Tensor, rows: slice, columns: slice, *scores: Tensor) -> Tensor:
        """``[N, I, J]`` for items of sequences and heads ``[N]`` and a tile's rows and columns."""
        positions = (torch.arange(s.start, s.stop, device=batch.device) for s in (rows, columns))
        return self._evaluate(self._function, [batch, head, *positions], *scores)


def tensors_as_indices() -> AbstractContextManager[Any]:
    """In which ``table[index]`` works under ``torch.vmap``, where torch would make ``index`` a number otherwise."""
    try:
        from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
    except ImportError:  # it is private
        return nullcontext()
    return TransformGetItemToIndex()


class _Scalars(TorchFunctionMode):
    """Sees whether all that is computed is scalars."""

    everything = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.ndim > 0:
            self.everything = False  # raising would make a traced function print where it was
        return result


def _broadcasts(function: PairFunction, few: list[Tensor], *scores: Tensor) -> bool:
    """Whether one call for all pairs of some indices is as good as a call for each."""
    b, h, q_idx, kv_idx = few
    pairs = [
        (*(score[n, i, j].clone() for score in scores), b[n], h[n], q_idx[i], kv_idx[j])
        for n, i, j in torch.cartesian_prod(*(torch.arange(len(index)) for index in few[1:])).tolist()
    ]
    try:
        with _Scalars() as scalars:
            one_by_one = [function(*pair) for pair in pairs]
        if not scalars.everything:
            return False
        at_once = _broadcast(function, few, *scores)
    except Exception:  # whatever the function cannot do with tensors of indices
        return False
    return torch.allclose(at_once.flatten().float(), torch.stack(one_by_one).float(), 1e-4, 1e-6, equal_nan=True)


def _broadcast(function: PairFunction, indices: list[Tensor], *scores: Tensor) -> Tensor:
    b, h, q_idx, kv_idx = indices
    result = function(*scores, b[:, None, None], h[:, None, None], q_idx[None, :, None], kv_idx[None, None])
    return result.expand(len(b), len(q_idx), len(kv_idx))


def _map(function: PairFunction, indices: list[Tensor], *scores: Tensor) -> Tensor:
    for mapped in ((None, None, None, 0), (None, None, 0, None), (0, 0, None, None)):
        function = torch.vmap(function, in_dims=(*(0 for _ in scores), *mapped))
    with tensors_as_indices():
        return function(*scores, *indices)

"""The pass over all weights in C, from queries and keys to sums, where nothing but masks changes the scores."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnprobe.statistics.compiled import ERROR, EXTENDED, MASKED, library, together
from attnprobe.statistics.compiler import usable
from attnprobe.statistics.pair_sums import PairSums
from attnprobe.statistics.scores import LN2, Items, Scores
from attnprobe.statistics.scores import MASKED as HIDDEN
from attnprobe.statistics.sums import Sums
from attnprobe.statistics.sweep_call import DTYPES, VECTORS, Call, Heads, readable


class Sweep:
    """Passes over one record in float32 on the CPU."""

    def __init__(self, scores: Scores, functions: Any) -> None:
        self.scores, self.record, self._functions = scores, scores.record, functions
        mask = self.record.mask
        self._mask = None if mask is None else mask.expand(scores.batch, scores.heads, scores.queries, scores.keys)
        tensors = {name: getattr(self.record, name) for name in VECTORS}
        self._tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        self._as_they_are = all(x.dtype == torch.float32 and x.stride(-1) == 1 for x in self._tensors.values())

    def add(self, pairs: PairSums, sums: Sums, *, lengths: bool, value_gradient: bool) -> None:
        """Fill ``pairs``, and what ``sums`` and its vectors hold of each row, column and item."""
        row = sums.row
        outputs = {
            **self._of_vectors(sums, lengths=lengths),
            **{"limit": pairs.limit, "shift": pairs.shift, "share": pairs.share, "place": pairs.place},
            **{"first_key": sums.first_key, "sink_score": row["sink_score"], "usage": pairs.usage},
            **{"centre": pairs.centre, "sums": pairs.sums[0]},
        }
        if pairs.extended and sums.self_attention:
            outputs["self_score"] = row["self_score"]
        if self._mask is not None:
            outputs |= {"readers": sums.column["rows"], "uniform": sums.column["uniform"]}
        if value_gradient and self.record.error is not None:
            outputs["value_gradient"] = sums.value_gradient
        what = (EXTENDED if pairs.extended else 0) | (0 if self.record.error is None else ERROR)
        self._run(self._functions.attnprobe_sweep, outputs, what)

    def describe(self, sums: Sums) -> None:
        """Fill in what the vectors of ``sums`` hold of each row, column and item."""
        self._run(self._functions.attnprobe_describe, self._of_vectors(sums, lengths=True), 0)

    def find_landmarks(self, sums: Sums) -> None:
        """The scores of the first key, and of each row's own."""
        place = self.scores.positions.float().repeat_interleave(self.scores.heads, 0)
        outputs = {"limit": self.scores.limit, "place": place, "first_key": sums.first_key}
        names = ("sink_score", "self_score") if sums.self_attention else ("sink_score",)
        outputs |= {name: sums.row[name] for name in names}
        self._run(self._functions.attnprobe_landmarks, outputs, 0)

    @staticmethod
    def _of_vectors(sums: Sums, *, lengths: bool) -> dict[str, Tensor]:
        vectors = sums.vectors
        outputs = {f"{name}_length": vectors.length[name] for name in (VECTORS if lengths else ("error",))}
        outputs |= {name: getattr(vectors, name) for name in ("centre", "largest", "direction", "unit")}
        return outputs | {"rows": sums.rows}

    def exponentials(self) -> tuple[Tensor, Tensor]:
        """The largest score of each row ``[N, T]``, and the sum of 2 to the power of the scores less that."""
        scores = self.scores
        top = torch.full((scores.count, scores.queries), HIDDEN, dtype=torch.float32, device=scores.device)
        total = torch.zeros_like(top)
        outputs = {"limit": scores.limit, "top": top, "total": total}
        self._run(self._functions.attnprobe_log_sum_exp, outputs, 0)
        return top, total

    def _run(self, function: Any, outputs: dict[str, Tensor], what: int) -> None:
        what |= 0 if self._mask is None else MASKED
        for items in [self.scores.everything] if self._as_they_are else self.scores.bare_chunks():
            call, kept = self._call(items, outputs)
            number = items.index.stop - items.index.start
            room = self._functions.attnprobe_room(ctypes.addressof(call))
            parts = [*_parts(number, torch.get_num_threads())]
            rooms = torch.empty(len(parts), room, dtype=torch.float32, device="cpu")
            # Work holds what it reads and writes: whoever waits for it may be interrupted.
            work = [
                partial(_work, function, call, (kept, outputs), part, rooms[i], what) for i, part in enumerate(parts)
            ]
            together(work)

    def _call(self, items: Items, outputs: dict[str, Tensor]) -> tuple[Call, list[Tensor]]:
        """The call, and what has to live as long."""
        scores, record = self.scores, self.record
        call = Call(heads=items.number, queries=scores.queries, keys=scores.keys, factor=record.scale / LN2)
        kept = []
        for name, tensor in self._tensors.items():
            if not self._as_they_are:
                tensor = scores.select(tensor, items).to(torch.float32).contiguous()
            kept.append(tensor)
            setattr(call, name, Heads(tensor.data_ptr(), *tensor.stride()[:3], tensor.shape[1]))
        call.depth, call.width = kept[0].shape[-1], record.value.shape[-1]
        if self._mask is not None:
            mask = self._mask[items.batches, items.heads]
            kept.append(mask)
            call.mask_batch, call.mask_head, call.mask_row = mask.stride()[:3]
            call.threshold = scores.threshold
            setattr(call, "visible" if mask.dtype == torch.bool else "bias", mask.data_ptr())
        for name, tensor in outputs.items():
            assert tensor.dtype == DTYPES.get(name, torch.float32), name
            assert tensor.is_contiguous(), name
            setattr(call, name, tensor[items.index].data_ptr())
        call.stride = scores.count * scores.queries
        return call, kept


def _work(function: Any, call: Call, kept: object, part: tuple[int, int], room: Tensor, what: int) -> None:
    function(ctypes.addressof(call), *part, room.data_ptr(), what)


def _parts(number: int, threads: int) -> Iterator[tuple[int, int]]:
    """Items for each thread."""
    step = max(1, -(-number // threads))
    return ((first, min(first + step, number)) for first in range(0, number, step))


def sweep_for(scores: Scores) -> Sweep | None:
    """The pass, where a record can have it."""
    changed = scores.masked_by_scores or scores.mask_mod or scores.record.kept is not None
    if changed or not usable(scores.device, scores.dtype) or not readable(scores):
        return None
    return Sweep(scores, library())

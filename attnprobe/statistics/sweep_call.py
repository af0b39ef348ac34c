"""An attention call as the pass in C takes it: the same fields as in ``c/call.h``, in the same order."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from attnprobe.statistics.scores import Scores

VECTORS = ("query", "key", "value", "output", "error")
_Address, _Number = ctypes.c_void_p, ctypes.c_long


#: Of what is handed over besides; float32 where nothing is said.
DTYPES = {
    **{"limit": torch.int32, "first_key": torch.int64, "rows": torch.bool},
    **dict.fromkeys(("unit", "value_gradient"), torch.float64),
}


class Heads(ctypes.Structure):
    """Vectors of some heads; strides count elements."""

    _fields_ = (("data", _Address), *((name, _Number) for name in ("batch", "head", "row", "heads")))


class Call(ctypes.Structure):
    """What an attention call consists of; ``call.h`` says what each field is."""

    _fields_ = (
        *((name, _Number) for name in ("heads", "queries", "keys", "depth", "width")),
        *((name, Heads) for name in VECTORS),
        ("factor", ctypes.c_double),
        *((name, _Address) for name in ("visible", "bias")),
        *((name, _Number) for name in ("mask_batch", "mask_head", "mask_row")),
        ("threshold", ctypes.c_double),
        *((name, _Address) for name in ("limit", "rows", "shift", "share", "place", "first_key")),
        *((f"{name}_length", _Address) for name in ("query", "output", "error")),
        *((name, _Address) for name in ("centre", "sink_score", "self_score", "key_length", "value_length")),
        *((name, _Address) for name in ("usage", "readers", "uniform", "largest", "direction")),
        *((name, _Address) for name in ("unit", "value_gradient", "sums")),
        ("stride", _Number),
        *((name, _Address) for name in ("top", "total")),
    )


def readable(scores: Scores) -> bool:
    """Whether C finds everything where it looks; torch says what is wrong where it is not."""
    record, mask = scores.record, scores.record.mask
    tensors = {name: tensor for name in VECTORS if (tensor := getattr(record, name)) is not None}
    if not {"query", "key", "output"} <= tensors.keys() or not all(map(_plain, tensors.values())):
        return False
    batch, rows, keys = scores.batch, (scores.heads, scores.queries), scores.keys
    depth, width = tensors["query"].shape[-1], record.value.shape[-1]
    shapes = {"query": (*rows, depth), "output": (*rows, width), "error": (*rows, width)}
    shapes |= {name: (tensors[name].shape[1], keys, size) for name, size in (("key", depth), ("value", width))}
    fits = all(tensor.shape == (batch, *shapes[name]) for name, tensor in tensors.items())
    if mask is None or not fits:
        return fits
    one_by_one = mask.shape[-1:] == (keys,) and mask.stride(-1) == 1
    return one_by_one and _plain(mask) and mask.dtype in (torch.bool, torch.float32)


def _plain(tensor: Tensor) -> bool:
    """Whether its memory holds its numbers."""
    known = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
    here = known and tensor.device.type == "cpu" and tensor.numel() > 0
    return here and not (tensor.is_neg() or tensor._is_zerotensor())

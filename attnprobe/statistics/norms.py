"""Statistics of queries, keys, values, outputs and errors by themselves."""

from __future__ import annotations

import torch

from attnprobe.statistics.averages import Averages, by_head
from attnprobe.statistics.reduce import Partial
from attnprobe.statistics.sums import Sums


def add_norms(averages: Averages, sums: Sums) -> None:
    """Means of lengths, and of what errors and outputs say of each other."""
    record, vectors, nowhere = sums.record, sums.vectors, torch.zeros_like(sums.rows)
    keys = sums.key_tokens.repeat_interleave(sums.scores.heads, 0)
    for name, where in (("query", sums.rows), ("output", sums.rows), ("key", keys), ("value", keys)):
        length = vectors.length[name]
        averages.mean(f"{name}_norm", length, where if getattr(record, name) is not None else where & False)
        averages.mean(f"{name}_square", length.double().square(), where)
    rows = sums.rows if record.error is not None else nowhere
    averages.mean("error_norm", vectors.length["error"].square(), rows, 2)
    averages.mean("head_importance", vectors.centre.abs(), rows, 1)


def of_vectors(sums: Sums, partial: Partial) -> Partial:
    """What is no mean over rows; ``partial`` are those that are."""
    vectors, heads = sums.vectors, (sums.scores.batch, sums.scores.heads)
    rows = sums.rows & (vectors.length["error"] > 0)
    return {
        "value_rms.sum": partial["value_square.sum"],
        "value_rms.count": partial["value_square.count"] * sums.record.value.shape[-1],
        "error_diversity.vector": vectors.direction.double().unflatten(0, heads).sum(0),
        "error_diversity.count": by_head(rows.sum(-1, dtype=torch.float64), heads[1]),
    }


def output_gram(sums: Sums) -> Partial:
    """Second moments of all heads' outputs over the rows that count in every head."""
    record, heads = sums.record, sums.scores.heads
    assert record.output is not None
    rows = sums.rows.unflatten(0, (sums.scores.batch, heads)).all(1)[..., None, None]
    output = torch.where(rows, record.output.transpose(1, 2), 0).double().flatten(0, 1)  # [B * T, H, E]
    flat = output.flatten(1)
    gram = (flat.mT @ flat).view(heads, output.shape[-1], heads, output.shape[-1]).transpose(1, 2)
    count = rows.sum(dtype=torch.float64).expand(heads)
    return {"output.gram": gram, "output.vector": output.sum(0), "output.count": count}


def nonfinite(sums: Sums) -> Partial:
    """Elements that are NaN or Inf, counted where the length of a vector says that there are some."""
    record, vectors, heads = sums.record, sums.vectors, sums.scores.heads
    tensors = {
        "query": record.query if record.query is not None else record.logits,
        "key": record.key,
        "value": record.value,
        "error": record.error,
    }
    result: Partial = {}
    for kind, tensor in tensors.items():
        if tensor is None:
            continue
        size = vectors.largest if kind == "error" else vectors.length[kind]
        asked = tensor.device.type == "cpu" and tensor is not record.logits  # where an answer costs nothing
        if asked and bool(size.sum().isfinite()):
            result[f"nonfinite.{kind}"] = torch.zeros(heads, dtype=torch.float64, device=tensor.device)
        else:
            bad = (~tensor.isfinite()).sum((0, 2, 3), dtype=torch.float64)
            result[f"nonfinite.{kind}"] = bad.repeat_interleave(heads // tensor.shape[1])
    return result

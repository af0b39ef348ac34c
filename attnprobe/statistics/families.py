"""From sums over rows and columns to each statistic's partial result."""

from __future__ import annotations

import torch
from torch import Tensor

from attnprobe.statistics.reduce import Partial
from attnprobe.statistics.scores import LN2
from attnprobe.statistics.sums import Sums

DEAD, SEEN_BY, CHOICE, SPREAD = 0.02, 8, 8, 1e-3


def partial(sums: Sums, names: set[str]) -> Partial:
    """The partial results of the named statistics and of what validity needs."""
    choosing = sums.rows & (sums.visible_keys >= 2)
    result: Partial = {"masked_rows.sum": (sums.visible_keys == 0).sum()[None].double()}
    result |= _norms(sums) | _routing(sums, choosing) | _columns(sums) | _gradients(sums, choosing) | _nonfinite(sums)
    if names & {"head_similarity", "output_stable_rank"}:
        result |= _output_gram(sums)
    wanted = {
        *names,
        "residual",
        "masked_rows",
        "error_norm",
        "advantage_std",
        "value_square",
        "output_square",
        "output",
    }
    return {key: value for key, value in result.items() if key.partition(".")[0] in wanted or key[:9] == "nonfinite"}


def heads_sum(sums: Sums, values: Tensor) -> Tensor:
    """``[N, ...]`` -> ``[H]``: the sum over sequences and everything else, in float64."""
    per_item = values.flatten(1).sum(-1, dtype=torch.float64)
    by_head: Tensor = per_item.unflatten(0, (sums.scores.batch, sums.scores.heads))
    return by_head.sum(0)


def _mean(sums: Sums, name: str, values: Tensor, where: Tensor) -> Partial:
    """Sum and count of ``values`` over the rows ``where``, both ``[N, ...]``."""
    return {
        f"{name}.sum": heads_sum(sums, torch.where(where, values, 0)),
        f"{name}.count": heads_sum(sums, where),
    }


def _largest(sums: Sums, name: str, values: Tensor, where: Tensor) -> Partial:
    per_item = torch.where(where, values, -torch.inf).flatten(1).amax(-1).double()
    return {f"{name}.max": per_item.unflatten(0, (sums.scores.batch, sums.scores.heads)).amax(0)}


def _per_head(sums: Sums, tensor: Tensor) -> Tensor:
    """``[B, H or G, T or S, X]`` -> ``[N, T or S, X]``, groups repeated for their query heads."""
    repeated = tensor.repeat_interleave(sums.scores.heads // tensor.shape[1], 1)
    return repeated.flatten(0, 1).to(sums.scores.dtype)


def _norms(sums: Sums) -> Partial:
    record, rows = sums.record, sums.rows
    keys = sums.key_tokens.repeat_interleave(sums.scores.heads, 0)
    result: Partial = {}
    for name, tensor, where in (
        ("query_norm", record.query, rows),
        ("key_norm", record.key, keys),
        ("value_norm", record.value, keys),
        ("output_norm", record.output, rows),
    ):
        if tensor is None:
            result |= _mean(sums, name, where, torch.zeros_like(where))
            continue
        lengths = torch.linalg.vector_norm(tensor.to(sums.scores.dtype), dim=-1)
        lengths = lengths.repeat_interleave(sums.scores.heads // tensor.shape[1], 1).flatten(0, 1)
        result |= _mean(sums, name, lengths, where)
        if name in ("value_norm", "output_norm"):
            result |= _mean(sums, name.replace("norm", "square"), lengths.double().square(), where)
    result["value_rms.sum"] = result["value_square.sum"]
    result["value_rms.count"] = result["value_square.count"] * record.value.shape[-1]
    return result


def _routing(sums: Sums, choosing: Tensor) -> Partial:
    """Statistics of where each query looks; ``choosing`` are the rows R with at least two visible keys."""
    rows, row, visible_keys = sums.rows, sums.row, sums.visible_keys
    entropy = row["entropy"] * LN2
    relative = entropy / visible_keys.log()
    nowhere = torch.zeros_like(rows)
    result = (
        _mean(sums, "entropy", entropy, choosing)
        | _mean(sums, "normalized_entropy", relative, choosing)
        | _mean(sums, "effective_keys", entropy.exp(), choosing)
        | _mean(sums, "max_weight", (sums.max_logit - sums.logsumexp).exp2(), choosing)
        | _mean(sums, "concentration", row["concentration"], choosing)
        | _mean(sums, "self_mass", row["self_mass"], choosing if sums.self_attention else nowhere)
        | _mean(sums, "mean_distance", row["distance"], choosing if sums.self_attention else nowhere)
        | _largest(sums, "max_logit", sums.max_logit * LN2, rows)
        | _largest(sums, "logit_spread", (sums.max_logit - sums.mean_logit) * LN2, rows)
    )
    wide = _mean(sums, "entropy_8", relative, rows & (visible_keys >= CHOICE))
    result |= {key: value.sum()[None] for key, value in wide.items()}
    sees = rows & (row["sees_sink"] > 0)
    if sums.record.self_attention:
        own = torch.arange(sums.scores.queries, device=rows.device) == sums.first_key[:, None]
        sees = sees & ~own
    known = sums.record.self_attention is not None
    has_tokens = sums.key_tokens.any(-1).repeat_interleave(sums.scores.heads)[:, None]
    return result | _mean(sums, "sink_mass", row["sink_mass"], sees & has_tokens if known else nowhere)


def _columns(sums: Sums) -> Partial:
    """Statistics of how much each key is read, per sequence."""
    scores, mass = sums.scores, sums.column["mass"]
    tokens = sums.key_tokens.repeat_interleave(scores.heads, 0)
    seen_by, usage = sums.column["rows"], mass / sums.column["uniform"]
    judged, read = tokens & (seen_by >= SEEN_BY), tokens & (seen_by > 0)
    dead = judged & (usage < DEAD)
    result = _mean(sums, "dead_column_fraction", *_share(dead, judged))

    by_head = (scores.batch, scores.heads)
    judged_by_all = judged.unflatten(0, by_head).all(1)
    shared, where = _share(dead.unflatten(0, by_head).all(1), judged_by_all)
    result |= {
        "shared_dead_columns.sum": torch.where(where, shared, 0).sum(dtype=torch.float64)[None],
        "shared_dead_columns.count": where.sum(dtype=torch.float64)[None],
    }
    if "top_column_share" in sums.names:
        counted = torch.where(tokens, mass, 0).double()
        total = counted.sum(-1)
        result |= _mean(sums, "top_column_share", (counted.amax(-1) / total)[:, None], (total > 0)[:, None])
    if "column_gini" in sums.names:
        ascending = torch.where(read, usage, -1).double().sort(-1).values  # columns that do not count come first
        number = read.sum(-1, keepdim=True)
        rank = torch.arange(1, scores.keys + 1, device=mass.device) - (scores.keys - number)
        ascending = torch.where(rank > 0, ascending, 0)
        total = ascending.sum(-1, keepdim=True)
        gini = ((2 * rank - number - 1) * ascending).sum(-1, keepdim=True) / (number * total)
        result |= _mean(sums, "column_gini", gini, total > 0)
    return result


def _share(part: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """Share of true entries per row, ``[*, 1]``, and where there is a whole."""
    number = whole.sum(-1, keepdim=True, dtype=torch.float64)
    return part.sum(-1, keepdim=True) / number, number > 0


def _gradients(sums: Sums, choosing: Tensor) -> Partial:
    record, rows, row = sums.record, sums.rows, sums.row
    if record.error is None:
        rows = choosing = torch.zeros_like(rows)
    error = torch.zeros_like(record.value[:, :1, :0]) if record.error is None else record.error
    lengths = torch.linalg.vector_norm(error.to(sums.scores.dtype), dim=-1)
    lengths = lengths.flatten(0, 1) if record.error is not None else torch.zeros_like(row["u.o"])
    drift = row["pc"]  # E = u.o + drift
    g = torch.zeros_like(drift) if record.lse_error is None else record.lse_error.flatten(0, 1).to(drift.dtype)
    shift = drift - g  # A = shift - c
    square = (row["pcc"] - drift.square()).clamp(min=0) + g.square()
    score_gradient = row["ppcc"] - 2 * shift * row["ppc"] + shift.square() * row["concentration"]
    result = (
        _mean(sums, "advantage_std", square, choosing)
        | _largest(sums, "advantage_max", shift - row["advantage_min"], rows)
        | _mean(sums, "score_grad_norm", score_gradient.clamp(min=0), rows)
        | _mean(sums, "error_norm", lengths.square(), rows)
        | _mean(sums, "head_importance", row["u.o"].abs(), rows)
        | _mean(sums, "residual", drift.square(), rows)
    )
    if "advantage_alignment" in sums.names:
        result |= _alignment(sums, rows)
    if "value_grad_norm" in sums.names:
        squares = rows.to(sums.scores.dtype) if sums.value_gradient is None else sums.value_gradient.square()
        result |= {"value_grad_norm.sum": heads_sum(sums, squares), "value_grad_norm.count": heads_sum(sums, rows)}
    if "error_diversity" in sums.names:
        result |= _diversity(sums, rows, lengths)
    return result


def _alignment(sums: Sums, rows: Tensor) -> Partial:
    """Correlation over visible keys of weight and advantage, which is minus that of weight and compatibility."""
    row, number = sums.row, sums.visible_keys
    spread = row["cc"] - row["c"].square() / number
    mean_square = (row["cc"] + 2 * row["u.o"] * row["c"] + number * row["u.o"].square()) / number
    correlation = -row["ec"] / (row["ee"] * spread).sqrt()
    varied = (row["ee"] * number > SPREAD**2) & (spread / number > SPREAD**2 * mean_square)
    return _mean(sums, "advantage_alignment", correlation.clamp(-1, 1), rows & (number >= 3) & varied)


def _diversity(sums: Sums, rows: Tensor, lengths: Tensor) -> Partial:
    record, where = sums.record, rows & (lengths > 0)
    heads = (sums.scores.batch, sums.scores.heads)
    if record.error is None:
        vector = torch.zeros(sums.scores.heads, record.value.shape[-1], dtype=torch.float64, device=rows.device)
    else:
        unit = _per_head(sums, record.error) / lengths[..., None]
        vector = torch.where(where[..., None], unit, 0).sum(1, dtype=torch.float64).unflatten(0, heads).sum(0)
    return {"error_diversity.vector": vector, "error_diversity.count": heads_sum(sums, where)}


def _output_gram(sums: Sums) -> Partial:
    """Second moments of all heads' outputs over the rows that count in every head."""
    record, heads = sums.record, sums.scores.heads
    assert record.output is not None
    rows = sums.rows.unflatten(0, (sums.scores.batch, heads)).all(1)
    output = record.output.transpose(1, 2)[rows].double()  # [rows, H, E]
    flat = output.flatten(1)
    gram = (flat.mT @ flat).view(heads, output.shape[-1], heads, output.shape[-1]).transpose(1, 2)
    count = rows.sum(dtype=torch.float64).expand(heads)
    return {"output.gram": gram, "output.vector": output.sum(0), "output.count": count}


def _nonfinite(sums: Sums) -> Partial:
    record = sums.record
    result: Partial = {}
    kinds: dict[str, Tensor | None] = {
        "query": record.query if record.query is not None else record.logits,
        "key": record.key,
        "value": record.value,
        "error": record.error,
    }
    for kind, tensor in kinds.items():
        if tensor is not None:
            bad = (~tensor.isfinite()).sum((0, 2, 3), dtype=torch.float64)
            result[f"nonfinite.{kind}"] = bad.repeat_interleave(sums.scores.heads // tensor.shape[1])
    return result

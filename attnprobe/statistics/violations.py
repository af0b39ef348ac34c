"""Whether queries read what they should not, and cannot read what they should: what masks do, not what they say.

A pass of its own in torch over the tiles, only where it is asked for and something can be found. Weights of pairs
that are not visible are left out rather than trusted to vanish: what no mask lets through is exactly 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnprobe.statistics.averages import Averages
from attnprobe.statistics.row_pass import tile_log_sum_exp
from attnprobe.statistics.scores import Items
from attnprobe.statistics.sums import Sums


def add_masses(averages: Averages, sums: Sums) -> None:
    """Attention to later tokens and to declared padding, means over rows."""
    wanted = averages.wanted & {"future_mass", "padding_mass"}
    if not wanted:
        return
    declared, nowhere = sums.declared_keys, torch.zeros_like(sums.rows)
    mass = _masses(sums, wanted)
    averages.mean("future_mass", mass["future_mass"], sums.choosing if sums.self_attention else nowhere)
    averages.mean("padding_mass", mass["padding_mass"], nowhere if declared is None else sums.rows)


def add_hidden(averages: Averages, sums: Sums) -> None:
    """Share of the declared tokens that no other real token sees, but for the last: after it nobody comes."""
    if "hidden_tokens" not in averages.wanted:
        return
    scores, tokens = sums.scores, sums.declared_keys
    if tokens is None or not sums.self_attention:
        hidden = torch.zeros(scores.count, scores.keys, dtype=torch.bool, device=scores.device)
        averages.mean("hidden_tokens", hidden, hidden)
        return
    followed = tokens.flip(-1).cumsum(-1).flip(-1) > 1
    averages.mean("hidden_tokens", ~_read_by_others(sums), (tokens & followed).repeat_interleave(scores.heads, 0))


def _masses(sums: Sums, wanted: set[str]) -> dict[str, Tensor]:
    """By name ``[N, T]``: the weight of each row on the keys that are not for it."""
    scores, declared = sums.scores, sums.declared_keys
    mass = {name: torch.zeros_like(sums.rows, dtype=scores.dtype) for name in ("future_mass", "padding_mass")}
    future = "future_mass" in wanted and sums.self_attention and not scores.causal
    padding = None if declared is None or "padding_mass" not in wanted or bool(declared.all()) else ~declared
    if not future and padding is None:
        return mass
    logsumexp = tile_log_sum_exp(scores)
    for items in scores.chunks():
        for rows, columns in scores.tiles():
            forbidden: dict[str, Tensor] = {}
            if future and (sums.record.positions is not None or columns.stop - 1 > rows.start):
                query, key = _places(sums, items, rows, columns)
                forbidden["future_mass"] = key > query
            if padding is not None:
                forbidden["padding_mass"] = padding[items.batches, columns].repeat_interleave(items.number, 0)[:, None]
            if not forbidden:
                continue
            tile, visible = scores.tile(items, rows, columns)
            weights = (tile - logsumexp[items.index, rows, None]).exp2_()
            for name, keys in forbidden.items():
                seen = keys if visible is None else keys & visible
                mass[name][items.index, rows] += torch.where(seen, weights, 0).sum(-1)
    return mass


def _read_by_others(sums: Sums) -> Tensor:
    """``[N, S]``: whether a row that counts, and is not the key's own, sees it."""
    scores = sums.scores
    read = torch.zeros(scores.count, scores.keys, dtype=torch.bool, device=scores.device)
    for items in scores.chunks():
        for rows, columns in scores.tiles():
            query, key = _places(sums, items, rows, columns)
            others = (query != key) & sums.rows[items.index, rows, None]
            if scores.masked_by_scores:
                _, visible = scores.tile(items, rows, columns)
            else:
                visible = scores.visible(items, rows, columns)
            read[items.index, columns] |= (others if visible is None else others & visible).any(1)
    return read


def _places(sums: Sums, items: Items, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
    """Where the queries ``[n or 1, I, 1]`` and the keys ``[J]`` of a tile stand."""
    scores = sums.scores
    keys = torch.arange(columns.start, columns.stop, device=scores.device)
    if sums.record.positions is None:
        return torch.arange(rows.start, rows.stop, device=scores.device)[None, :, None], keys
    return scores.positions[items.batches, rows].repeat_interleave(items.number, 0)[..., None], keys

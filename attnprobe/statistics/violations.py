"""Whether queries read what they should not, and cannot read what they should: what masks do, not what they say.

A pass of its own in torch over the tiles, only where it is asked for and something can be found. Weights of pairs
that are not visible are left out rather than trusted to vanish: what no mask lets through is exactly 0.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from attnprobe.statistics.averages import Averages
from attnprobe.statistics.row_pass import tile_log_sum_exp
from attnprobe.statistics.scores import Items, Scores
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
    scores = sums.scores
    mass = {name: torch.zeros_like(sums.rows, dtype=scores.dtype) for name in ("future_mass", "padding_mass")}
    tiles = _leaking(sums, wanted)
    if not tiles:
        return mass
    logsumexp = tile_log_sum_exp(scores)
    for items in scores.chunks():
        for rows, columns in tiles:
            tile, visible = scores.tile(items, rows, columns)
            weights = (tile - logsumexp[items.index, rows, None]).exp2_()
            for name, keys in _forbidden(sums, wanted, items, rows, columns).items():
                seen = keys if visible is None else keys & visible
                mass[name][items.index, rows] += torch.where(seen, weights, 0).sum(-1)
    return mass


def _leaking(sums: Sums, wanted: set[str]) -> list[tuple[slice, slice]]:
    """The tiles in which a query may see a key that is not for it: none under masks that do their work."""
    scores = sums.scores
    grid = [*scores.tiles()]
    some = torch.zeros(len(grid), dtype=torch.bool, device=scores.device)
    for items in _masks(scores):
        for number, (rows, columns) in enumerate(grid):
            forbidden = _forbidden(sums, wanted, items, rows, columns)
            visible = scores.visible(items, rows, columns) if forbidden and not scores.masked_by_scores else None
            for keys in forbidden.values():
                some[number] |= (keys if visible is None else keys & visible).any()
    return [where for where, leaks in zip(grid, some.tolist(), strict=True) if leaks]


def _forbidden(sums: Sums, wanted: set[str], items: Items, rows: slice, columns: slice) -> dict[str, Tensor]:
    """By name, the pairs ``[n or 1, I or 1, J]`` of a tile that are to have no weight, where there may be some."""
    scores, declared, forbidden = sums.scores, sums.declared_keys, dict[str, Tensor]()
    ahead = sums.record.positions is not None or columns.stop - 1 > rows.start
    if "future_mass" in wanted and sums.self_attention and ahead and not scores.causal:
        query, key = _places(sums, items, rows, columns)
        forbidden["future_mass"] = key > query
    if "padding_mass" in wanted and declared is not None:
        padding = ~declared[items.batches, columns]
        forbidden["padding_mass"] = padding.repeat_interleave(items.number, 0)[:, None]
    return forbidden


def _read_by_others(sums: Sums) -> Tensor:
    """``[N, S]``: whether a row that counts, and is not the key's own, sees it."""
    scores = sums.scores
    read = torch.zeros(scores.count, scores.keys, dtype=torch.bool, device=scores.device)
    for items in scores.chunks() if scores.masked_by_scores else _masks(scores):
        for rows, columns in scores.tiles():
            if scores.masked_by_scores:
                _, visible = scores.tile(items, rows, columns)
            else:
                visible = scores.visible(items, rows, columns)
            query, key = _places(sums, items, rows, columns)
            others = (query != key) & sums.rows[items.index, rows, None]
            read[items.index, columns] |= (others if visible is None else others & visible).any(1)
    if scores.masked_by_scores or scores.masks_differ:
        return read
    return read[:: scores.heads].repeat_interleave(scores.heads, 0)


def _masks(scores: Scores) -> Iterator[Items]:
    """One item for each mask that there may be: a sequence's first head speaks for all, unless theirs differ."""
    for index in range(0, scores.count, 1 if scores.masks_differ else scores.heads):
        b, h = divmod(index, scores.heads)
        yield Items(slice(index, index + 1), slice(b, b + 1), slice(h, h + 1))


def _places(sums: Sums, items: Items, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
    """Where the queries ``[n or 1, I, 1]`` and the keys ``[J]`` of a tile stand."""
    scores = sums.scores
    keys = torch.arange(columns.start, columns.stop, device=scores.device)
    if sums.record.positions is None:
        return torch.arange(rows.start, rows.stop, device=scores.device)[None, :, None], keys
    return scores.positions[items.batches, rows].repeat_interleave(items.number, 0)[..., None], keys

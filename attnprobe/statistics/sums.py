"""What one record adds up to: vectors over rows ``[N, T]`` and over columns ``[N, S]``, ``N = B * H``.

Scores, entropies and logarithms are in units of ln 2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from attnprobe.statistics.pair_sums import LARGEST, PairSums
from attnprobe.statistics.scores import Items, Scores
from attnprobe.statistics.vectors import Vectors
from attnprobe.statistics.visibility import Visibility

if TYPE_CHECKING:
    from attnprobe.statistics.sweep import Sweep

#: One, in whole numbers.
FIXED = 2.0**40


class _Vectors(dict[str, Tensor]):
    """Zeros for a name at its first use; without a closure, whose cycle would keep the record alive."""

    def __init__(self, zeros: Tensor) -> None:
        self._zeros = zeros

    def __missing__(self, name: str) -> Tensor:
        self[name] = vector = torch.zeros_like(self._zeros)
        return vector


class Sums:
    """Rows and keys that count, and what the passes over the tiles found.

    Attributes:
        visible_keys: ``[N, T]``, n_i, with the learned sink where there is one.
        rows: ``[N, T]``, queries that count.
        choosing: ``[N, T]``, rows R that see at least two keys.
        key_tokens, query_tokens: ``[B, S]``, ``[B, T]``, what is not padding.
        declared_keys: ``key_tokens`` where the user gave them, None where they were derived.
        complete: whether every row is known to count.
        first_key: ``[N]``, the first key that is not padding.
        shares: ``[N, T]``, 1 / n_i of the rows that count, 0 of the others.
        kernel_lse: whether the log-sum-exp that the kernel left proved right.
        row: by name ``[N, T]``; after ``finish``, sums over the weights.
        value_gradient: ``[N]``, its squared Frobenius norm.
        column: by name ``[N, S]``: ``mass`` sum of weights, ``rows`` that see the key, ``uniform`` sum of 1 / n_i.
    """

    def __init__(self, scores: Scores, visibility: Visibility) -> None:
        self.scores, self.record, self.kernel_lse = scores, scores.record, False
        self.visible_keys = self._pairs = visibility.number
        if self.record.sink is not None:
            self.visible_keys = self.visible_keys + (self.visible_keys > 0)
        self._find_padding(visibility)
        self.start()

    def start(self) -> None:
        """Forget what was added up."""
        scores = self.scores
        self.row, self.column = (
            _Vectors(torch.zeros(scores.count, size, dtype=scores.dtype, device=scores.device))
            for size in (scores.queries, scores.keys)
        )
        self.row["sink_score"].fill_(-LARGEST)
        self.row["self_score"].fill_(-LARGEST)
        self.value_gradient = torch.zeros(scores.count, dtype=torch.float64, device=scores.device)
        self.vectors = Vectors(scores, self.rows, self.keys_seen, complete=self.complete)

    @property
    def self_attention(self) -> bool:
        return self.record.self_attention is True and self.record.whole_queries == self.scores.keys

    def _find_padding(self, visibility: Visibility) -> None:
        scores, record = self.scores, self.record
        self.keys_seen = visibility.seen
        keys, queries = record.key_tokens, record.query_tokens
        derived = keys is None and queries is None
        if self.self_attention and record.positions is None:
            keys, queries = (queries if keys is None else keys), (keys if queries is None else queries)
        self.declared_keys = None if keys is None else keys.to(scores.device, torch.bool)
        self.key_tokens = self.keys_seen if self.declared_keys is None else self.declared_keys
        if queries is not None:
            self.query_tokens = queries.to(scores.device, torch.bool)
        elif self.self_attention and record.positions is None:
            self.query_tokens = self.key_tokens
        else:
            self.query_tokens = torch.ones(scores.batch, scores.queries, dtype=torch.bool, device=scores.device)
        self.rows = self.query_tokens.repeat_interleave(scores.heads, 0) & (self.visible_keys > 0)
        # Without masks every row of self-attention counts, and known without asking the device.
        self.complete = derived and scores.plain and not (scores.causal and scores.keys > scores.queries)
        self.first_key = self.key_tokens.int().argmax(-1).repeat_interleave(scores.heads)
        self.choosing = self.rows & (self.visible_keys >= 2)
        self.shares = torch.where(self.rows, 1 / self.visible_keys, 0)

    def look_up(self, items: Items, *, own: bool) -> Items:
        """The first key's score of each row, and its ``own``, of a record without masks: no tile is needed.

        The items come back with their queries and keys.
        """
        first = self.first_key[items.index]
        items, found = self.vectors.scores_of(items, first)
        seen = self.scores.limit[items.index] > first[:, None]
        self.row["sink_score"][items.index] = torch.where(seen, found, -LARGEST)
        query, key = items.query, items.key
        if own and self.self_attention and query is not None and key is not None:
            if self.record.positions is not None:
                here = self.scores.positions[items.batches].repeat_interleave(items.number, 0)
                key = key.gather(1, here[..., None].expand(-1, -1, key.shape[-1]))
            self.row["self_score"][items.index] = (query * key).sum(-1)
        return items

    def find_landmarks(self, logsumexp: Tensor, sweep: Sweep | None) -> None:
        """The weights of these scores, for the whole record."""
        if sweep is not None:
            sweep.find_landmarks(self)
        for items in self.scores.bare_chunks() if sweep is None else ():
            self.look_up(items, own=True)
        for name in ("sink", "self"):
            self.row[f"{name}_mass"] = (self.row[f"{name}_score"] - logsumexp).exp2()

    def count_readers(self) -> None:
        """Which rows could read each column, of a record without masks, where later rows see no less."""
        scores, alike = self.scores, slice(0, 1) if self.complete else slice(None)
        keys = torch.arange(scores.keys, dtype=torch.int32, device=scores.device)
        limit = scores.limit[alike].contiguous()
        first = torch.searchsorted(limit, keys.expand(len(limit), -1).contiguous(), right=True)
        for name, each in (("rows", self.rows[alike]), ("uniform", self.shares[alike])):
            # In whole numbers: the sum is exact, and the same on every device.
            fixed = F.pad((each.double() * FIXED).long(), (0, 1))
            read = fixed.flip(1).cumsum(1).flip(1).gather(1, first)
            self.column[name] = (read.double() / FIXED).to(scores.dtype).expand(scores.count, -1)

    def finish(self, pairs: PairSums) -> None:
        """Turn sums over ``p = 2^(s - shift)`` into sums over the weights ``p / sum p``, and c into what sums to 0.

        What the log-sum-exp missed is made good here, and what ``u . o`` misses of E is kept as ``drift``.
        """
        pair, mass, shift = pairs.row, pairs.row["mass"], pairs.shift
        if pairs.extended:
            off = 1 - 1 / mass
            pair["ee"] += off * (off * pair["square"] - 2 * (pair["square"] - pairs.share * mass))
            pair["ec"] -= off * pair["pc"]
            pair["distance"] /= mass
        for name in ("plogp", "pc", "pcc"):
            pair[name] /= mass
        for name in ("square", "ppc", "ppcc"):
            pair[name] /= mass.square()
        self.column["mass"] = pairs.usage
        self.row |= pair
        self.row |= {
            "entropy": mass.log2() - pair["plogp"],
            "concentration": pair["square"],
            "max_weight": (pair["max_score"] - shift).exp2() / mass,
            "max_logit": pair["max_score"],
            "logit_spread": pair["max_score"] - pair["scores"] / self._pairs,
            "drift": pair["pc"],
            "self_mass": (self.row["self_score"] - shift).exp2() / mass,
            "sink_mass": (self.row["sink_score"] - shift).exp2() / mass,
        }

"""Where each query looks: statistics of the rows of weights."""

from __future__ import annotations

import torch

from attnprobe.statistics.averages import Averages
from attnprobe.statistics.pair_sums import LARGEST
from attnprobe.statistics.scores import LN2
from attnprobe.statistics.sums import Sums

CHOICE = 8


def add_routing(averages: Averages, sums: Sums) -> None:
    rows, row, visible_keys, choosing = sums.rows, sums.row, sums.visible_keys, sums.choosing
    entropy = row["entropy"] * LN2
    relative = entropy / visible_keys.log()
    averages.mean("entropy", entropy, choosing)
    averages.mean("normalized_entropy", relative, choosing)
    averages.mean("effective_keys", entropy.exp(), choosing)
    averages.mean("max_weight", row["max_weight"], choosing)
    averages.mean("concentration", row["concentration"], choosing)
    averages.largest("max_logit", row["max_logit"] * LN2, rows)
    averages.largest("logit_spread", row["logit_spread"] * LN2, rows)
    self_attending = choosing if sums.self_attention else torch.zeros_like(rows)
    averages.mean("mean_distance", row["distance"], self_attending)
    averages.mean("entropy_8", relative, rows & (visible_keys >= CHOICE), of_layer=True)
    add_landmarks(averages, sums)


def add_landmarks(averages: Averages, sums: Sums) -> None:
    """Weights on two keys that can be looked up: the row's own and the first."""
    rows, row = sums.rows, sums.row
    averages.mean("self_mass", row["self_mass"], sums.choosing if sums.self_attention else torch.zeros_like(rows))
    sees = rows & ~(row["sink_score"] <= -LARGEST / 10)  # a NaN is seen
    sees &= sums.key_tokens.any(-1).repeat_interleave(sums.scores.heads)[:, None]
    if sums.record.self_attention:
        positions = sums.scores.positions.repeat_interleave(sums.scores.heads, 0)
        sees &= positions != sums.first_key[:, None]
    averages.mean("sink_mass", row["sink_mass"], sees & (sums.record.self_attention is not None))

"""The reference: every statistic straight from its formula, in float64, holding the ``T x S`` tensors.

Slow and large on purpose: this is what the streaming implementation is tested against, and a text
in which to read what a number means. Shapes are those of ``AttentionRecord``; key and value heads
are repeated, so that everything here has one entry per query head. What a record does not know
(the error of a forward-only record, the queries behind bare logits) is NaN, and so is every
statistic that needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attnprobe.catalog import STATISTICS
from attnprobe.errors import ConfigurationError, UnknownNameError
from attnprobe.record import AttentionRecord
from attnprobe.statistics.modifications import tensors_as_indices

MASKED_BELOW = -1e4  # a score this low, or an additive mask value, means "not visible"
TWO_LEVEL_MASKED_BELOW = -50.0  # ... and so does m in a mask that holds exactly {0, m}
GAP = (-75.0, -25.0)  # ... and so does everything below a gap: a bias to which {0, -100} was added
DEAD_USAGE = 0.02
JUDGED_ROWS = 8  # a column is called dead only if this many rows could have read it
MIN_SPREAD = 1e-3  # below this relative spread a correlation is rounding noise


@dataclass(frozen=True, eq=False)
class DenseParts:
    """The tensors behind the statistics of one record, in float64.

    Attributes:
        query, key, value, output, error: ``[B, H, T or S, width]``, one per query head.
        scores: ``[B, H, T, S]``, -inf where masked.
        visible: ``[B, H, T, S]``, True where query ``i`` may read key ``j``.
        alpha: ``[B, H, T, S]``, attention weights before dropout; 0 in a fully masked row.
        sink: ``[B, H, T, 1]``, weight of a learned sink; ``[B, H, T, 0]`` where there is none.
        count: ``[B, H, T]``, ``n_i``, how many keys the query sees, a learned sink included.
        rows: ``[B, H, T]``, queries that are not padding and see a key.
        keys: ``[B, S]``, keys that are not padding.
        declared: whether the user said so.
        dropout: ``[B, H, T, S]``, ``M_ij``, what dropout multiplied the weight by; 1 where that is unknown.
        b: ``[B, H, T, S]``, compatibility ``M_ij u_i . v_j``.
        E: ``[B, H, T]``, ``sum_j alpha_ij b_ij``.
        g: ``[B, H, T]``, gradient at the log-sum-exp.
        advantage: ``[B, H, T, S]``, ``-(b_ij - E_i + g_i)``; it has a meaning where ``visible``.
        dS: ``[B, H, T, S]``, gradient at the scores, 0 outside of ``rows``.
        dV: ``[B, H, S, E]``, ``sum_i alpha_ij M_ij u_i`` over ``rows``.
        seen: ``[B, H, S]``, how many of ``rows`` see the key.
        reads: ``[B, H, S]``, ``sum_i alpha_ij`` over ``rows``.
        usage: ``[B, H, S]``, ``reads`` relative to uniform attention; NaN where no row sees the key.
        self_attention: as in the record.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    error: Tensor
    scores: Tensor
    visible: Tensor
    alpha: Tensor
    sink: Tensor
    count: Tensor
    rows: Tensor
    keys: Tensor
    declared: bool
    dropout: Tensor
    b: Tensor
    E: Tensor
    g: Tensor
    advantage: Tensor
    dS: Tensor
    dV: Tensor
    seen: Tensor
    reads: Tensor
    usage: Tensor
    self_attention: bool | None

    @property
    def choosing(self) -> Tensor:
        """``R``: the rows that have a choice, ``n_i >= 2``, ``[B, H, T]``."""
        return self.rows & (self.count >= 2)

    @property
    def token_keys(self) -> Tensor:
        """``keys`` once per head, ``[B, H, S]``."""
        return self.keys[:, None].expand(-1, self.alpha.shape[1], -1)

    # With a column more where there is a learned sink: a key that every row sees, with a value of 0.

    @property
    def weights(self) -> Tensor:
        """``alpha`` and the sink's weight."""
        return torch.cat([self.alpha, self.sink], -1)

    @property
    def choices(self) -> Tensor:
        """``visible`` and True for the sink."""
        return torch.cat([self.visible, torch.ones_like(self.sink, dtype=torch.bool)], -1)

    @property
    def compatibilities(self) -> Tensor:
        """``b`` and 0 for the sink."""
        return torch.cat([self.b, torch.zeros_like(self.sink)], -1)

    @property
    def advantages(self) -> Tensor:
        """``advantage`` and ``E_i - g_i`` for the sink."""
        return -(self.compatibilities - self.E[..., None] + self.g[..., None])

    @property
    def entropies(self) -> Tensor:
        """``H_i`` in nats, ``[B, H, T]``."""
        entropies: Tensor = torch.special.entr(self.weights).sum(-1)
        return entropies


def dense(record: AttentionRecord, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """The statistics of one record: name -> ``[H]`` float64 (``[1]`` at layer level), NaN where undefined.

    Args:
        record: one attention call.
        names: names of the catalogue; all that can be had from one record if None.

    Raises:
        UnknownNameError: a name is not in the catalogue.
        ConfigurationError: a displacement, which needs two records (see ``dense_displacement``).
    """
    return from_parts(dense_parts(record), names)


def from_parts(parts: DenseParts, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """The same, where the parts are known already."""
    return {name: _formula(name)(parts) for name in (_FORMULAS if names is None else names)}


def dense_displacement(record: AttentionRecord, earlier: AttentionRecord) -> tuple[Tensor, Tensor]:
    """``attention_displacement`` and ``value_displacement`` since ``earlier`` saw the same inputs, each ``[H]``."""
    new, old = dense_parts(record), dense_parts(earlier)
    attention = _mean((new.weights - old.weights).abs().sum(-1) / 2, new.rows)
    real = new.token_keys[..., None]
    value = _frobenius((new.value - old.value).where(real, 0)) / _frobenius(old.value.where(real, 0))
    return attention, value


def dense_parts(record: AttentionRecord) -> DenseParts:
    """Everything that the formulas are made of."""
    batch, heads, _, queries, keys = record.shape

    value = _per_query_head(record.value, heads)
    query = _unknown(batch, heads, queries) if record.query is None else record.query.double()
    key = _unknown(batch, heads, keys) if record.key is None else _per_query_head(record.key, heads)
    error = torch.full_like(query[..., :1], torch.nan).expand(*query.shape[:3], value.shape[-1])
    if record.error is not None:
        error = record.error.double()

    scores, visible = _scores(record)
    sink = scores[..., :0] if record.sink is None else record.sink.double()[..., None]
    sees = visible.any(-1, keepdim=True)
    weights = torch.cat([scores, sink], -1).softmax(-1)
    # A row that sees no key attends to nothing, not to the sink either.
    alpha, sink = weights[..., :keys].where(visible, 0), weights[..., keys:].where(sees, 0)
    count = visible.sum(-1) + sees[..., 0] * sink.shape[-1]
    real_queries, real_keys, declared = _tokens(record, visible)
    rows = real_queries[:, None] & (count >= 1)

    dropout = torch.ones_like(alpha) if record.kept is None else record.kept.double() * record.survivor_factor
    b = dropout * (error @ value.mT)
    expected = (alpha * b).sum(-1)
    g = torch.zeros_like(expected) if record.lse_error is None else record.lse_error.double()
    advantage = -(b - expected[..., None] + g[..., None])
    counted = rows[..., None]
    reads = alpha.where(counted, 0).sum(2)
    uniform = (visible.double() / count.clamp(min=1)[..., None]).where(counted, 0).sum(2)
    return DenseParts(
        query=query,
        key=key,
        value=value,
        output=(dropout * alpha) @ value if record.output is None else record.output.double(),
        error=error,
        scores=scores,
        visible=visible,
        alpha=alpha,
        sink=sink,
        count=count,
        rows=rows,
        keys=real_keys,
        declared=declared,
        dropout=dropout,
        b=b,
        E=expected,
        g=g,
        advantage=advantage,
        dS=(-alpha * advantage).where(counted, 0),
        dV=(dropout * alpha).mT @ error.where(counted, 0),
        seen=(visible & counted).sum(2),
        reads=reads,
        usage=reads / uniform,
        self_attention=record.self_attention,
    )


def _unknown(*shape: int) -> Tensor:
    return torch.full((*shape, 1), torch.nan, dtype=torch.float64)


def _per_query_head(x: Tensor, heads: int) -> Tensor:
    """``[B, G, S, width]`` to ``[B, H, S, width]``: query head ``h`` reads group ``h // (H / G)``."""
    return x.double().repeat_interleave(heads // x.shape[1], dim=1)


def _scores(record: AttentionRecord) -> tuple[Tensor, Tensor]:
    """The softmax's input with -inf where masked, and which pairs are visible, each ``[B, H, T, S]``."""
    batch, heads, _, queries, keys = record.shape
    visible = torch.ones(batch, heads, queries, keys, dtype=torch.bool)
    if record.mask is not None:
        visible = visible & ~_masked(record.mask)

    if record.logits is not None:
        scores = record.logits.double()
        visible = visible & (scores > MASKED_BELOW) & (scores > torch.finfo(record.logits.dtype).min / 2)
    else:
        assert record.query is not None
        assert record.key is not None
        scores = record.scale * (record.query.double() @ _per_query_head(record.key, heads).mT)
        indices = [torch.arange(size) for size in (batch, heads, queries, keys)]
        if record.score_mod is not None:
            scores = _for_each_pair(record.score_mod, indices, scores)
            visible = visible & (scores > MASKED_BELOW)
        if record.mask_mod is not None:
            visible = visible & _for_each_pair(record.mask_mod, indices)
        if record.mask is not None and record.mask.dtype != torch.bool:
            scores = scores + record.mask.double()
        if record.causal:
            visible = visible & torch.ones(queries, keys, dtype=torch.bool).tril()
    return scores.masked_fill(~visible, -torch.inf), visible


def _for_each_pair(function: Callable[..., Tensor], indices: list[Tensor], *scores: Tensor) -> Tensor:
    """``[B, H, T, S]``: a ``score_mod`` or ``mask_mod`` called with the scalars of every pair."""
    for dim in reversed(range(4)):
        function = torch.vmap(function, in_dims=(*(0 for _ in scores), *(0 if dim == i else None for i in range(4))))
    with tensors_as_indices():
        return function(*scores, *indices)


def _masked(mask: Tensor) -> Tensor:
    """Which entries of an attention mask hide their pair."""
    if mask.dtype == torch.bool:
        return ~mask
    masked = mask.double() <= MASKED_BELOW
    lowest, zero = mask.min(), mask == 0
    if lowest <= TWO_LEVEL_MASKED_BELOW and zero.any() and (zero | (mask == lowest)).all():
        masked = masked | (mask == lowest)
    if lowest <= GAP[0] and mask.max() >= GAP[1] and not ((mask > GAP[0]) & (mask < GAP[1])).any():
        masked = masked | (mask <= GAP[0])
    return masked


def _tokens(record: AttentionRecord, visible: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Which queries ``[B, T]`` and which keys ``[B, S]`` are not padding, and whether the keys were given."""
    batch, _, queries, keys = visible.shape
    same_tokens = record.self_attention is True and queries == keys
    real_queries, real_keys = record.query_tokens, record.key_tokens
    if same_tokens:
        real_queries = record.key_tokens if real_queries is None else real_queries
        real_keys = record.query_tokens if real_keys is None else real_keys
    declared = real_keys is not None
    if real_keys is None:
        real_keys = visible.any(dim=2).any(dim=1)
    if real_queries is None:
        real_queries = real_keys if same_tokens else torch.ones(batch, queries, dtype=torch.bool)
    return real_queries, real_keys, declared


# How the statistics run over a batch: ``[B, H, ...]`` to ``[H]``, NaN where nothing is counted.


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    return values.where(counted, 0).sum((0, 2)) / counted.sum((0, 2))


def _root_mean(squares: Tensor, counted: Tensor) -> Tensor:
    return _mean(squares, counted).sqrt()


def _max(values: Tensor, counted: Tensor) -> Tensor:
    by_head, counted = values.transpose(0, 1).flatten(1), counted.transpose(0, 1).flatten(1)
    return by_head.masked_fill(~counted, -torch.inf).amax(1).where(counted.any(1), torch.nan)


def _frobenius(values: Tensor) -> Tensor:
    return values.square().sum((0, 2, 3)).sqrt()


def _over_sequences(values: Tensor) -> Tensor:
    """Mean of ``[B, H]`` over the sequences in which the value is defined (not NaN)."""
    return values.nanmean(0)


# The formulas, in the order of the catalogue. Each takes the parts of one record and gives ``[H]``.


def _normalized_entropies(parts: DenseParts) -> Tensor:
    return parts.entropies / parts.count.double().log()


def _max_logit(parts: DenseParts) -> Tensor:
    return _max(parts.scores, parts.visible & parts.rows[..., None])


def _logit_spread(parts: DenseParts) -> Tensor:
    mean = parts.scores.where(parts.visible, 0).sum(-1) / parts.visible.sum(-1)
    return _max(parts.scores.amax(-1) - mean, parts.rows)


def _sink_mass(parts: DenseParts) -> Tensor:
    _, heads, queries, _ = parts.alpha.shape
    if parts.self_attention is None:
        return torch.full((heads,), torch.nan, dtype=torch.float64)
    first = parts.keys.int().argmax(-1)
    here = first[:, None, None, None].expand(-1, heads, queries, 1)
    weight, sees = parts.alpha.gather(-1, here)[..., 0], parts.visible.gather(-1, here)[..., 0]
    counted = parts.rows & sees & parts.keys.any(-1)[:, None, None]
    if parts.self_attention:
        counted = counted & (torch.arange(queries) != first[:, None])[:, None]
    return _mean(weight, counted)


def _distance_mean(parts: DenseParts, weigh: Callable[[Tensor], Tensor]) -> Tensor:
    """Mean over R of ``sum_j alpha_ij weigh(i - j)``, where queries and keys are the same tokens."""
    _, heads, queries, keys = parts.alpha.shape
    if parts.self_attention is not True or queries != keys:
        return torch.full((heads,), torch.nan, dtype=torch.float64)
    offset = torch.arange(queries)[:, None] - torch.arange(keys)
    return _mean((parts.alpha * weigh(offset)).sum(-1), parts.choosing)


def _dead_columns(parts: DenseParts) -> tuple[Tensor, Tensor]:
    """Which columns are dead, and which were judged at all, each ``[B, H, S]``."""
    judged = parts.token_keys & (parts.seen >= JUDGED_ROWS)
    return judged & (parts.usage < DEAD_USAGE), judged


def _dead_column_fraction(parts: DenseParts) -> Tensor:
    dead, judged = _dead_columns(parts)
    return _over_sequences(dead.double().sum(-1) / judged.sum(-1))


def _column_gini(parts: DenseParts) -> Tensor:
    batch, heads, _ = parts.usage.shape
    gini = torch.full((batch, heads), torch.nan, dtype=torch.float64)
    for item in range(batch):
        for head in range(heads):
            x = parts.usage[item, head][parts.keys[item] & (parts.seen[item, head] > 0)].sort().values
            n = len(x)
            j = torch.arange(1, n + 1)
            gini[item, head] = ((2 * j - n - 1) * x).sum() / (n * x.sum())
    return _over_sequences(gini)


def _top_column_share(parts: DenseParts) -> Tensor:
    reads = parts.reads.where(parts.token_keys, 0)
    return _over_sequences(reads.amax(-1) / reads.sum(-1))


def _value_rms(parts: DenseParts) -> Tensor:
    return _root_mean(parts.value.square().mean(-1), parts.token_keys)


def _advantage_std(parts: DenseParts) -> Tensor:
    return _root_mean((parts.weights * parts.advantages.square()).sum(-1), parts.choosing)


def _relative_advantage_std(parts: DenseParts) -> Tensor:
    value_scale = _root_mean(parts.value.square().sum(-1), parts.token_keys)
    return _advantage_std(parts) / (_error_norm(parts) * value_scale)


def _advantage_max(parts: DenseParts) -> Tensor:
    return _max(parts.advantages, parts.choices & parts.rows[..., None])


def _advantage_alignment(parts: DenseParts) -> Tensor:
    def over_keys(x: Tensor) -> Tensor:
        return x.where(parts.choices, 0).sum(-1, keepdim=True) / parts.count[..., None]

    def deviation(x: Tensor) -> tuple[Tensor, Tensor]:
        centred = x - over_keys(x)
        return centred, over_keys(centred.square()).sqrt()

    alpha, alpha_std = deviation(parts.weights)
    advantage, advantage_std = deviation(parts.advantages)
    correlation = over_keys(alpha * advantage) / (alpha_std * advantage_std)
    # b and A differ by a sign and a constant, so that their standard deviations are the same.
    varied = (alpha_std / over_keys(parts.weights) > MIN_SPREAD) & (
        advantage_std / over_keys(parts.compatibilities.square()).sqrt() > MIN_SPREAD
    )
    return _mean(correlation[..., 0], parts.rows & (parts.count >= 3) & varied[..., 0])


def _gradient_norm(parts: DenseParts, gradient: Tensor) -> Tensor:
    return _frobenius(gradient).where(parts.rows.any(2).any(0), torch.nan)


def _error_norm(parts: DenseParts) -> Tensor:
    return _root_mean(parts.error.square().sum(-1), parts.rows)


def _error_diversity(parts: DenseParts) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(parts.error, dim=-1)
    counted = parts.rows & (length != 0)
    n = counted.sum((0, 2))
    resultant = (parts.error / length[..., None]).where(counted[..., None], 0).sum((0, 2))
    diversity = 1 - (resultant.square().sum(-1) - n) / (n * (n - 1))
    return diversity.where(n >= 2, torch.nan)


def _head_importance(parts: DenseParts) -> Tensor:
    return _mean((parts.error * parts.output).sum(-1).abs(), parts.rows)


def _shared_dead_columns(parts: DenseParts) -> Tensor:
    dead, judged = (columns.all(dim=1, keepdim=True) for columns in _dead_columns(parts))
    return _over_sequences(dead.double().sum(-1) / judged.sum(-1))


def _entropy_8(parts: DenseParts) -> Tensor:
    rows = (parts.rows & (parts.count >= JUDGED_ROWS)).flatten(1)[:, None]
    return _mean(_normalized_entropies(parts).flatten(1)[:, None], rows)


def _centred_output(parts: DenseParts) -> Tensor:
    """Outputs of the rows that count in every head, minus their mean, ``[H, N, E]``."""
    output = parts.output.transpose(1, 2)[parts.rows.all(dim=1)].transpose(0, 1)
    return output - output.mean(dim=1, keepdim=True)


def _head_similarity(parts: DenseParts) -> Tensor:
    output = _centred_output(parts)
    heads = len(output)
    similarity = torch.full((heads, heads), -torch.inf, dtype=torch.float64)
    for h in range(heads):
        for other in set(range(heads)) - {h}:
            cross = (output[h].mT @ output[other]).norm().square()
            similarity[h, other] = cross / (
                (output[h].mT @ output[h]).norm() * (output[other].mT @ output[other]).norm()
            )
    return similarity.amax(1) if heads > 1 else torch.full((1,), torch.nan, dtype=torch.float64)


def _output_stable_rank(parts: DenseParts) -> Tensor:
    output = _centred_output(parts)
    if output.shape[1] == 0:
        return torch.full((len(output),), torch.nan, dtype=torch.float64)
    spectral: Tensor = torch.linalg.matrix_norm(output, ord=2)
    return output.square().sum((1, 2)) / spectral.square()


def _output_variation(parts: DenseParts) -> Tensor:
    output = parts.output.transpose(1, 2)[parts.rows.all(dim=1)].transpose(0, 1)
    return _centred_output(parts).square().sum((1, 2)) / output.square().sum((1, 2))


def _masses(parts: DenseParts, forbidden: Tensor) -> Tensor:
    """``[B, H, T]``, weight on the keys that are ``forbidden``, ``[..., T, S]``."""
    return parts.alpha.where(forbidden & parts.visible, 0).sum(-1)


def _same_tokens(parts: DenseParts) -> bool:
    return parts.self_attention is True and parts.alpha.shape[2] == parts.alpha.shape[3]


def _future_mass(parts: DenseParts) -> Tensor:
    queries, keys = parts.alpha.shape[2:]
    later = torch.arange(keys) > torch.arange(queries)[:, None]
    return _mean(_masses(parts, later), parts.choosing & _same_tokens(parts))


def _padding_mass(parts: DenseParts) -> Tensor:
    return _mean(_masses(parts, ~parts.keys[:, None, None]), parts.rows & parts.declared)


def _hidden_tokens(parts: DenseParts) -> Tensor:
    queries, keys = parts.alpha.shape[2:]
    others = torch.arange(keys) != torch.arange(queries)[:, None]
    read = (parts.visible & parts.rows[..., None] & others).any(2)
    followed = parts.token_keys.flip(-1).cumsum(-1).flip(-1) > 1  # a real token comes after it
    return _mean((~read).double(), parts.token_keys & followed & (parts.declared and _same_tokens(parts)))


_FORMULAS: Mapping[str, Callable[[DenseParts], Tensor]] = {
    "entropy": lambda p: _mean(p.entropies, p.choosing),
    "normalized_entropy": lambda p: _mean(_normalized_entropies(p), p.choosing),
    "effective_keys": lambda p: _mean(p.entropies.exp(), p.choosing),
    "max_weight": lambda p: _mean(p.alpha.amax(-1), p.choosing),
    "concentration": lambda p: _mean(p.weights.square().sum(-1), p.choosing),
    "max_logit": _max_logit,
    "logit_spread": _logit_spread,
    "sink_mass": _sink_mass,
    "self_mass": lambda p: _distance_mean(p, lambda offset: offset == 0),
    "mean_distance": lambda p: _distance_mean(p, torch.abs),
    "dead_column_fraction": _dead_column_fraction,
    "column_gini": _column_gini,
    "top_column_share": _top_column_share,
    "query_norm": lambda p: _mean(p.query.norm(dim=-1), p.rows),
    "key_norm": lambda p: _mean(p.key.norm(dim=-1), p.token_keys),
    "value_norm": lambda p: _mean(p.value.norm(dim=-1), p.token_keys),
    "output_norm": lambda p: _mean(p.output.norm(dim=-1), p.rows),
    "value_rms": _value_rms,
    "advantage_std": _advantage_std,
    "relative_advantage_std": _relative_advantage_std,
    "advantage_max": _advantage_max,
    "advantage_alignment": _advantage_alignment,
    "score_grad_norm": lambda p: _gradient_norm(p, (p.weights * p.advantages).where(p.rows[..., None], 0)),
    "value_grad_norm": lambda p: _gradient_norm(p, p.dV),
    "error_norm": _error_norm,
    "error_diversity": _error_diversity,
    "head_importance": _head_importance,
    "shared_dead_columns": _shared_dead_columns,
    "entropy_8": _entropy_8,
    "head_similarity": _head_similarity,
    "output_stable_rank": _output_stable_rank,
    "output_variation": _output_variation,
    "future_mass": _future_mass,
    "padding_mass": _padding_mass,
    "hidden_tokens": _hidden_tokens,
}


def _formula(name: str) -> Callable[[DenseParts], Tensor]:
    if name in _FORMULAS:
        return _FORMULAS[name]
    if name in STATISTICS:
        raise ConfigurationError(f"{name} compares two records: use dense_displacement(record, earlier)")
    raise UnknownNameError.among("statistic", name, _FORMULAS)

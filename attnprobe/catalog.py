"""STATISTICS: the single source of what every number is called, means, and how it combines.

Code, documentation, TensorBoard descriptions and tests read this table. Conventions:

- ``alpha_ij`` attention weight, ``s_ij`` score (logit), ``u_i = dL/do_i`` error at the per-head
  context, ``b_ij = u_i . v_j`` compatibility, ``E_i = sum_j alpha_ij b_ij``,
  ``A_ij = -(b_ij - E_i)`` advantage, ``dS_ij = alpha_ij (b_ij - E_i)`` score gradient.
- ``n_i`` is the number of keys visible to query ``i``; ``R`` are the rows (queries) that are not
  padding and have ``n_i >= 2``. Padding counts nowhere.
- Where it is known which weights survived dropout with probability p, ``b_ij = M_ij u_i . v_j`` with
  ``M_ij = kept_ij / (1 - p)``, and the value gradient is that of ``alpha_ij M_ij``; all else is about the
  weights before dropout.
- A learned sink is one more visible key with ``b = 0``, which has no position and no column.
- Where the model used the log-sum-exp of the scores, its gradient ``g_i`` is added to ``b_ij - E_i``.
- ``usage_j = sum_i alpha_ij / sum_{i sees j} 1/n_i``: 1 for uniform attention wherever ``j`` stands.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from attnprobe.errors import ConfigurationError, UnknownNameError

if TYPE_CHECKING:
    from attnprobe.record import AttentionRecord

#: How partial results combine over batch items, micro-batches and ranks: see ``statistics.reduce``.
Reduce = Literal["mean", "root", "norm", "max", "ratio", "diversity", "gram"]
#: What an absolute rounding error of the statistic is measured against: see ``Statistic.scale``.
Scale = Literal["one", "log_keys", "keys", "logit", "norm", "compatibility", "gradient", "own"]

PAPER = "arXiv 2512.22473"


@dataclass(frozen=True)
class Statistic:
    """One per-head (or per-layer) number of a probe.

    Attributes:
        name: key in ``report[name]``.
        meaning: one sentence for a person.
        formula: definition in plain text.
        unit: ``"nats"``, ``"keys"``, ``"share"``, ``"score"`` ... or ``""`` where dimensionless.
        low, high: range that a finite value lies in.
        better: ``"high"``, ``"low"`` or ``""`` where neither is good in itself.
        reduce: rule by which partial results combine.
        scale: numerical scale of the tolerance ``|x - ref| <= 5e-6 max(|ref|, scale)``:
            ``one`` 1, ``log_keys`` ln S, ``keys`` S, ``logit`` rms of the scores, ``norm`` rms norm
            of the vectors, ``compatibility`` rms|u| rms|v|, ``gradient`` that times sqrt(T), ``own`` 0.
        source: where the definition comes from.
        core: part of the default set, which the default alarms need.
        level: ``"head"``, or ``"layer"`` for one number per layer in ``report.layer``.
        on_request: in neither set; only computed where named.
        measure: for a statistic of the user's own: ``measure(record) -> (sum, count)``, each ``[H]``;
            the report holds ``sum / count`` over everything in the probed step.
    """

    name: str
    meaning: str
    formula: str = ""
    unit: str = ""
    low: float = -math.inf
    high: float = math.inf
    better: Literal["high", "low", ""] = ""
    reduce: Reduce = "mean"
    scale: Scale = "one"
    source: str = PAPER
    core: bool = False
    level: Literal["head", "layer"] = "head"
    on_request: bool = False
    measure: Callable[[AttentionRecord], tuple[Any, Any]] | None = None


_SINK = "Xiao et al., arXiv 2309.17453"
_ENTROPY = "Zhai et al., arXiv 2303.06296"
_IMPORTANCE = "Michel et al., arXiv 1905.10650"
_COLLAPSE = "Dong et al., arXiv 2103.03404"
_OWN = "attnprobe"

_ENTRIES = (
    Statistic("entropy", "How widely a query spreads its attention.",
              "mean over R of H_i = -sum_j alpha_ij ln alpha_ij",
              "nats", 0, math.inf, scale="log_keys", source=_ENTROPY, core=True),
    Statistic("normalized_entropy", "Entropy relative to uniform attention over what the query can see: 1 is uniform.",
              "mean over R of H_i / ln n_i", "", 0, 1, source=_ENTROPY, core=True),
    Statistic("effective_keys", "Number of keys that a query effectively reads.", "mean over R of exp(H_i)",
              "keys", 1, math.inf, scale="keys", source=_ENTROPY),
    Statistic("max_weight", "Weight of a query's favourite key.", "mean over R of max_j alpha_ij",
              "share", 0, 1, core=True),
    Statistic("concentration", "Chance that two draws from a query's attention hit the same key.",
              "mean over R of sum_j alpha_ij^2", "share", 0, 1, core=True),
    Statistic("max_logit", "Largest score before the softmax.", "max over visible pairs of s_ij",
              "score", reduce="max", scale="logit", source="Kimi K2, arXiv 2507.20534", core=True),
    Statistic("logit_spread", "How far a query's largest score stands above the mean of its scores.",
              "max over rows of (max_j s_ij - mean_j s_ij), visible keys", "score", 0, math.inf, "low",
              reduce="max", scale="logit", source="Kimi K2, arXiv 2507.20534", core=True),
    Statistic("sink_mass", "Attention that falls on the sequence's first token.",
              "mean of alpha_ij on the first non-padding key over the rows that see it, in self-attention without "
              "that key's own row", "share", 0, 1, source=_SINK, core=True),
    Statistic("self_mass", "Attention of a token to itself.", "mean over R of alpha_ii (self-attention)", "share", 0,
              1),
    Statistic("mean_distance", "How far away the keys are that a query reads.",
              "mean over R of sum_j alpha_ij |i - j| (self-attention)", "tokens", 0, math.inf, scale="keys"),
    Statistic("dead_column_fraction", "Share of keys that practically no query reads.",
              "per sequence: share of columns with usage_j < 0.02 among the columns that at least 8 rows see",
              "share", 0, 1, "low", core=True),
    Statistic("column_gini", "Inequality of the keys' usage: 0 is even, 1 is one key for all.",
              "per sequence: sum_j (2j - n - 1) x_(j) / (n sum x), x = usage of the columns seen by a row, ascending",
              "", 0, 1),
    Statistic("top_column_share", "Share of all attention that the most used key receives.",
              "per sequence: max_j / sum_j of sum_i alpha_ij", "share", 0, 1),
    Statistic("query_norm", "Length of the queries.", "mean over rows of |q_i|", "norm", 0, math.inf, scale="norm",
              core=True),
    Statistic("key_norm", "Length of the keys.", "mean over non-padding keys of |k_j|", "norm", 0, math.inf,
              scale="norm", core=True),
    Statistic("value_norm", "Length of the values.", "mean over non-padding keys of |v_j|", "norm", 0, math.inf,
              scale="norm", core=True),
    Statistic("output_norm", "Length of the head's output; a silent head has a small one.", "mean over rows of |o_i|",
              "norm", 0, math.inf, scale="norm", core=True),
    Statistic("value_rms", "Root mean square of the elements of the values.",
              "sqrt(mean over keys and elements of v_je^2)",
              "", 0, math.inf, reduce="root", scale="norm", core=True),
    Statistic("advantage_std", "Spread of the advantages that the gradient acts on.",
              "sqrt(mean over R of sum_j alpha_ij (b_ij - E_i)^2)", "loss", 0, math.inf, reduce="root",
              scale="compatibility", core=True),
    Statistic("relative_advantage_std",
              "Spread of the advantages relative to error and values: comparable between runs.",
              "advantage_std / (error_norm * sqrt(mean over keys of |v_j|^2))", "", 0, math.inf, reduce="ratio",
              core=True),
    Statistic("advantage_max",
              "Largest advantage: the pair whose score gradient descent wants to raise most per weight.",
              "max over visible pairs of A_ij", "loss", reduce="max", scale="compatibility", core=True),
    Statistic("advantage_alignment", "Whether attention already sits where the advantage is.",
              "mean over rows with n_i >= 3 and relative spread of alpha_i and b_i above 1e-3 "
              "of the correlation over the visible keys of alpha_ij and A_ij", "", -1, 1, "high"),
    Statistic("score_grad_norm", "Size of the gradient at the scores.", "Frobenius norm of dS", "loss", 0, math.inf,
              reduce="norm", scale="gradient", core=True),
    Statistic("value_grad_norm", "Size of the responsibility-weighted value gradient of this query head.",
              "Frobenius norm of alpha^T u", "loss", 0, math.inf, reduce="norm", scale="gradient"),
    Statistic("error_norm", "Size of the error signal that reaches the head.", "root mean square over rows of |u_i|",
              "loss", 0, math.inf, reduce="root", scale="own", core=True),
    Statistic("error_diversity", "Whether the queries pull in different directions: 0 is all alike.",
              "1 - (|sum_i u_i/|u_i||^2 - N) / (N (N - 1)) over the N rows with u_i != 0", "", 0, 2, "high",
              reduce="diversity"),
    Statistic("head_importance", "First-order estimate of what removing the head would do to the loss.",
              "mean over rows of |u_i . o_i|", "loss", 0, math.inf, scale="compatibility", source=_IMPORTANCE,
              core=True),
    Statistic("shared_dead_columns", "Share of keys that no head of the layer reads.",
              "per sequence: share of columns, among those that at least 8 rows see, with usage_j < 0.02 in every head",
              "share", 0, 1, "low", core=True, level="layer"),
    Statistic("entropy_8", "Normalised entropy over the queries that have a choice.",
              "mean over heads of H_i / ln n_i over rows with n_i >= 8", "", 0, 1, source=_ENTROPY, core=True,
              level="layer"),
    Statistic("head_similarity", "Similarity to the most similar other head of the layer: 1 is a copy.",
              "max over other heads h' of the linear CKA of o_h and o_h' over rows", "", 0, 1, "low", reduce="gram",
              source="Kornblith et al., arXiv 1905.00414", on_request=True),
    Statistic("output_stable_rank", "Number of directions that the head's output really uses.",
              "|o - mean|_F^2 / |o - mean|_2^2 over rows", "directions", 1, math.inf, "high", reduce="gram",
              source=_COLLAPSE, on_request=True),
    Statistic("output_variation", "How much the head's output differs between queries: 0 is the same output for all.",
              "|o - mean|_F^2 / |o|_F^2 over rows", "", 0, 1, "high", reduce="gram", source=_COLLAPSE, on_request=True),
    Statistic("future_mass", "Attention to later tokens: exactly 0 where masks let no query see one.",
              "mean over R of sum_{j > i} alpha_ij (self-attention)", "share", 0, 1, source=_OWN, on_request=True),
    Statistic("padding_mass", "Attention to keys that the token mask declares as padding.",
              "mean over rows of sum of alpha_ij over the declared padding", "share", 0, 1, "low", source=_OWN,
              on_request=True),
    Statistic("hidden_tokens", "Share of real tokens that no other real token may read.",
              "share of the keys that the token mask declares as real, without the last of each sequence, which no row "
              "i != j that is not padding sees (self-attention)", "share", 0, 1, "low", source=_OWN, on_request=True),
    Statistic("attention_displacement", "How far attention moved since the last probe, on the reference batch.",
              "mean over rows of 1/2 sum_j |alpha_ij - alpha'_ij|", "share", 0, 1, on_request=True),
    Statistic("value_displacement", "How far the values moved since the last probe, on the reference batch.",
              "|v - v'|_F / |v'|_F over the non-padding keys", "", 0, math.inf, reduce="root", on_request=True),
)  # fmt: skip

#: name -> Statistic, in the order in which they are shown.
STATISTICS: Mapping[str, Statistic] = {entry.name: entry for entry in _ENTRIES}


# Columns of a table and tags of a log that are no statistics.
_RESERVED = {"step", "layer", "layers", "head", "heads", "loss", "layout", "alarms", "residual", "nonfinite"}


def select(wanted: str | Statistic | Iterable[str | Statistic]) -> tuple[Statistic, ...]:
    """The statistics that ``wanted`` names: ``"core"``, ``"all"``, names, own ``Statistic`` objects, or a mix.

    Raises:
        UnknownNameError: a name is not in the catalogue.
        ConfigurationError: an own statistic has no ``measure`` or takes a name of the catalogue.
    """
    chosen: dict[str, Statistic] = {}
    for item in (wanted,) if isinstance(wanted, str | Statistic) else wanted:
        if isinstance(item, Statistic):
            taken = item.name in STATISTICS or item.name in _RESERVED
            if item is not STATISTICS.get(item.name) and (item.measure is None or taken):
                raise ConfigurationError(
                    f"own statistic {item.name!r} needs a measure= function and a name that attnprobe does not use"
                )
            chosen[item.name] = item
        elif item in ("core", "all"):
            chosen |= {s.name: s for s in _ENTRIES if s.core or (item == "all" and not s.on_request)}
        elif item in STATISTICS:
            chosen[item] = STATISTICS[item]
        else:
            raise UnknownNameError.among("statistic", str(item), [*STATISTICS, "core", "all"])
    if not chosen:
        raise ConfigurationError("no statistic chosen: pass 'core', 'all' or a list of names")
    return tuple(chosen.values())

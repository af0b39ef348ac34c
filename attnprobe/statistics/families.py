"""From sums over rows and columns to the statistics' partial results."""

from __future__ import annotations

from attnprobe.statistics import columns, gradients, norms, routing, violations
from attnprobe.statistics.averages import Averages, Draws
from attnprobe.statistics.reduce import Partial
from attnprobe.statistics.sums import Sums

#: What ratios and validity are made of.
_VECTORS = {"error_norm", "value_square", "output_square"}
_PAIRS = {"advantage_std", "residual"}


def of_vectors(sums: Sums, names: set[str]) -> Partial:
    """What needs no weights: norms, counts of what is not finite."""
    averages = Averages(sums.scores.heads, names | _VECTORS, sums.vectors.unit)
    norms.add_norms(averages, sums)
    result = averages.partial()
    result |= norms.of_vectors(sums, result) | norms.nonfinite(sums)
    result["masked_rows.sum"] = (sums.visible_keys == 0).sum()[None].double()
    if names & {"head_similarity", "output_stable_rank", "output_variation"}:
        result |= norms.output_gram(sums)
    return result


def of_weights(sums: Sums, names: set[str], draws: Draws | None = None) -> Partial:
    """What does; ``draws`` say how the rows were chosen, if they were."""
    averages = Averages(sums.scores.heads, names | _PAIRS, sums.vectors.unit, draws)
    routing.add_routing(averages, sums)
    gradients.add_gradients(averages, sums)
    violations.add_masses(averages, sums)
    result = averages.partial()
    if "value_grad_norm" in names:
        result |= gradients.value_gradient(sums)
    return result


def of_landmarks(sums: Sums, names: set[str]) -> Partial:
    """The two weights of each row that can be looked up."""
    averages = Averages(sums.scores.heads, names, sums.vectors.unit)
    routing.add_landmarks(averages, sums)
    return averages.partial()


def of_columns(sums: Sums, names: set[str]) -> Partial:
    """What needs the weights of all rows."""
    averages = Averages(sums.scores.heads, names, sums.vectors.unit)
    columns.add_columns(averages, sums)
    violations.add_hidden(averages, sums)
    return averages.partial() | columns.shared(sums)

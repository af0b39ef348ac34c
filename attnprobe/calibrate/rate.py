"""What a count of false alarms says about their rate."""

from __future__ import annotations


def upper_bound(count: int, of: int, confidence: float = 0.95) -> float:
    """Upper end of the two-sided Clopper-Pearson interval of a rate, after ``count`` of ``of`` independent cases."""
    from scipy.special import betaincinv  # comes with scikit-learn, and takes a moment to load

    return 1.0 if count == of else float(betaincinv(count + 1, of - count, (1 + confidence) / 2))

"""How partial results become statistics.

A ``Partial`` holds, per statistic, sums that can be added (or maxima) over batch items,
micro-batches and ranks; ratios and roots are formed once, at the end. Keys and shapes:

- ``mean``: ``{name}.sum``, ``{name}.count``            -> sum / count
- ``root``: ``{name}.sum`` (of squares), ``{name}.count`` -> sqrt(sum / count)
- ``norm``: ``{name}.sum`` (of squares), ``{name}.count`` (rows) -> sqrt(sum), NaN without rows
- ``max``: ``{name}.max`` (-inf where there was nothing)  -> NaN without anything
- ``ratio``: from the sums of its parts
- of a sample also ``{name}.yy``, ``.yc``, ``.cc``: variances and covariance of sum and count; for a maximum ``.bound``
- ``diversity``: ``{name}.vector`` ``[H, E]``, ``{name}.count``
- ``gram``: ``output.gram`` ``[H, H, E, E]``, ``output.vector`` ``[H, E]``, ``output.count``

All others are ``[H]``, or ``[1]`` for the layer level. Every tensor is float64 on the host.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from attnprobe.catalog import Statistic

Partial = dict[str, Tensor]
#: Variance of a head's outputs, relative to their mean square, below which they are all the same.
_ALIKE = 1e-11


def combine(partials: Iterable[Partial]) -> Partial:
    """Partial results of several calls as those of one."""
    total: Partial = {}
    for partial in partials:
        for key, value in partial.items():
            if key not in total:
                total[key] = value
            elif key.endswith(".max"):
                total[key] = torch.maximum(total[key], value)
            else:
                total[key] = total[key] + value
    return total


def to_host(partials: Sequence[Partial]) -> list[Partial]:
    """The same as float64 on the CPU, in one transfer."""
    flat = [value.flatten() for partial in partials for value in partial.values()]
    if not flat:
        return []
    device = next((value.device for value in flat if value.device.type != "cpu"), flat[0].device)
    pieces = iter(torch.cat([value.to(device) for value in flat]).cpu().double().split([len(value) for value in flat]))
    return [{key: next(pieces).view(value.shape) for key, value in partial.items()} for partial in partials]


def finish_residual(partial: Partial) -> Tensor:
    """rms of ``sum alpha b - u.o`` relative to rms|u| rms|o|, ``[H]``, NaN where it could not be checked.

    Not relative to the values: they cancel in a context that many of them make, and with them what is wrong. Where
    nothing but rounding is left of it, a thousandth of them counts instead.
    """
    error = _mean(partial, "error_norm")
    if "residual.sum" not in partial:
        return torch.full_like(error, torch.nan)
    size = _mean(partial, "output_square") + 1e-6 * _mean(partial, "value_square")
    return (_mean(partial, "residual") / (error * size)).sqrt()


def finish(statistic: Statistic, partial: Partial) -> Tensor:
    """The statistic's value, ``[H]`` (``[1]`` at layer level), NaN where it is not defined."""
    name = statistic.name
    if not any(key.startswith(f"{name}.") for key in partial) and statistic.reduce not in ("ratio", "gram"):
        nothing = torch.full_like(_mean(partial, "error_norm"), torch.nan)  # switched off, or not for this call
        return nothing if statistic.level == "head" else nothing[:1]
    if statistic.reduce == "ratio":
        error = _mean(partial, "error_norm").sqrt()
        return _mean(partial, "advantage_std").sqrt() / (error * _mean(partial, "value_square").sqrt())
    if statistic.reduce == "gram":
        return _gram_values(name, partial)
    if statistic.reduce == "max":
        value = partial[f"{name}.max"]
        return torch.where(value == -torch.inf, torch.nan, value)
    if statistic.reduce == "norm":
        value = partial[f"{name}.sum"].sqrt()
        return torch.where(partial[f"{name}.count"] > 0, value, torch.nan)
    if statistic.reduce == "diversity":
        count = partial[f"{name}.count"]
        resultant = partial[f"{name}.vector"].square().sum(-1)
        return torch.where(count >= 2, 1 - (resultant - count) / (count * (count - 1)), torch.nan)
    value = _mean(partial, name)
    return value.sqrt() if statistic.reduce == "root" else value


def finish_error(statistic: Statistic, partial: Partial) -> Tensor | None:
    """Standard error of ``finish``: NaN for the maximum over a sample, a lower bound; None where all was measured."""
    name = "advantage_std" if statistic.reduce == "ratio" else statistic.name
    if f"{name}.bound" in partial:
        return torch.full_like(partial[f"{name}.bound"], torch.nan)
    if f"{name}.yy" not in partial:
        return None
    if statistic.reduce == "ratio":
        root = _mean(partial, name).sqrt()
        return finish(statistic, partial) / root * _root_error(partial, name, root)
    if statistic.reduce == "norm":
        return partial[f"{name}.yy"].sqrt() / (2 * partial[f"{name}.sum"].sqrt())
    if statistic.reduce == "root":
        return _root_error(partial, name, _mean(partial, name).sqrt())
    return _mean_error(partial, name)


def _root_error(partial: Partial, name: str, root: Tensor) -> Tensor:
    return _mean_error(partial, name) / (2 * root)


def _mean_error(partial: Partial, name: str) -> Tensor:
    """Of a ratio of two sums, linearised."""
    mean = _mean(partial, name)
    yy, yc, cc = (partial[f"{name}.{moment}"] for moment in ("yy", "yc", "cc"))
    return (yy - 2 * mean * yc + mean.square() * cc).clamp(min=0).sqrt() / partial[f"{name}.count"]


def _mean(partial: Partial, name: str) -> Tensor:
    return partial[f"{name}.sum"] / partial[f"{name}.count"]  # 0 / 0 is NaN: nothing was there


def _gram_values(name: str, partial: Partial) -> Tensor:
    """Head similarity, stable rank or variation from the second moments of the outputs, ``[H]``."""
    count, absent = partial["output.count"].amax(), partial["output.count"] == 0
    mean = partial["output.vector"] / count
    moments = partial["output.gram"] / count
    covariance = moments - torch.einsum("he,gf->hgef", mean, mean)
    own, raw = (each.diagonal(dim1=0, dim2=1).permute(2, 0, 1) for each in (covariance, moments))
    total, size = (each.diagonal(dim1=1, dim2=2).sum(-1) for each in (own, raw))
    alike = total <= _ALIKE * size  # what is left is rounding
    if name == "output_variation":
        share = torch.where(alike, 0, total / size)
        return torch.where((size > 0) & size.isfinite(), share, torch.nan)
    if name == "output_stable_rank":
        known = own.isfinite().all((1, 2), keepdim=True)  # the decomposition refuses NaN instead of handing it on
        largest: Tensor = torch.linalg.matrix_norm(torch.where(known, own, 0), ord=2)
        return torch.where(alike, torch.nan, total / largest)
    cross = covariance.square().sum((-1, -2))
    norms = cross.diagonal().sqrt()
    similarity = torch.where(alike[:, None] | alike, torch.nan, cross / (norms[:, None] * norms))
    if len(similarity) < 2:
        return torch.full_like(norms, torch.nan)
    others: Tensor = similarity.fill_diagonal_(-torch.inf)
    others[:, absent] = -torch.inf  # heads that were not measured
    most = others.amax(-1)
    return torch.where(absent | (most == -torch.inf), torch.nan, most)

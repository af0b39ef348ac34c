"""Extra peak memory of a probed attention call at 8192 tokens, beside that of attention that hands out its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnprobe import AttentionProbe
from attnprobe.catalog import select
from attnprobe.statistics.streaming import measure
from benchmarks.attention import WIDTH, Attention
from benchmarks.options import SAMPLED_ROWS, described, silent_probe
from benchmarks.table import Row, Section
from benchmarks.timing import Spread
from benchmarks.worker import Worker, available

HEADS, TARGET = 12, 32
EAGER_COPIES = 5  # of the weights, for the decision whether all heads fit

ABOUT = f"""One causal attention call, forward and backward, {HEADS} heads 64 wide, float32. Each number is a fresh
process's highest resident set during the step above what it held before; *extra* is that of the probed step less that
of the step without a probe, and small where the backward pass needs more later than the statistics did. *Alone*: the
statistics above their inputs. *Written out*: scores, softmax and product in torch, the weights kept with their
gradient, as `output_attentions=True` and `retain_grad()` do."""


Make = Callable[[], Callable[[], object]]


class FusedAttention(nn.Module):
    """A module for the probe to watch."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def sdpa(tokens: int, options: dict[str, object] | None) -> Callable[[], None]:
    """One step, probed if there are options for the probe."""
    model = FusedAttention()
    probe = None if options is None else silent_probe(model, **options)
    fused_step(model, probe, Attention(1, HEADS, 256))  # loads what is loaded at first use
    return partial(fused_step, model, probe, Attention(1, HEADS, tokens))


def fused_step(model: nn.Module, probe: AttentionProbe | None, attention: Attention) -> None:
    for tensor in attention.inputs:
        tensor.grad = None
    if probe is not None:
        probe.begin()
    model(*attention.inputs).backward(attention.upstream)
    if probe is not None:
        report = probe.step()
        assert report is not None
        assert not report.invalid, report.invalid
        probe.discard()


def alone(tokens: int, statistics: str) -> Callable[[], object]:
    """The statistics without the step around them, whose own peak may come at another time."""
    chosen = select(statistics)
    small, large = (Attention(1, HEADS, size).record(logsumexp=True) for size in (256, tokens))
    measure(small, chosen)
    return partial(measure, large, chosen)


def eager(tokens: int, heads: int) -> Callable[[], None]:
    """One step that keeps all weights and their gradients."""
    hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu_(1)
    attention = Attention(1, heads, tokens)
    return partial(eager_step, attention, hidden)


def eager_step(attention: Attention, hidden: Tensor) -> None:
    for tensor in attention.inputs:
        tensor.grad = None
    query, key, value = attention.inputs
    scores = query @ key.mT * WIDTH**-0.5
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    del scores
    weights.retain_grad()
    (weights @ value).backward(attention.upstream)
    assert weights.grad is not None


def peaks(makes: Mapping[str, Make], repeats: int) -> dict[str, list[float]]:
    """Peak MiB of the first step, each in a fresh process."""
    found: dict[str, list[float]] = {name: [] for name in makes}
    for _ in range(repeats):
        with ExitStack() as stack:
            workers = {name: stack.enter_context(Worker(make, exact=True)) for name, make in makes.items()}
            for name, worker in workers.items():
                found[name].append(worker.run().peak)
    return found


def benchmark(short: bool) -> Iterator[Section]:
    tokens, repeats = (1024, 1) if short else (8192, 3)
    target = None if short else TARGET
    makes: dict[str, Make] = {"none": partial(sdpa, tokens, None)}
    tight: dict[str, Make] = {described(name): partial(alone, tokens, name) for name in ("core", "all")}
    makes |= {described(name): partial(sdpa, tokens, {"statistics": name}) for name in ("core", "all")}
    makes[f"{described('core')} of {SAMPLED_ROWS} rows"] = partial(sdpa, tokens, {"rows": SAMPLED_ROWS})
    found = peaks(makes, repeats)
    plain = found.pop("none")
    rows = [Row(f"T = {tokens}: SDPA without a probe", "none", Spread.of(plain), "MiB")]
    for detail, values in found.items():
        extra = Spread.of([mine - base for mine, base in zip(values, plain, strict=True)])
        rows.append(Row(f"T = {tokens}: extra of a probed step", detail, extra, "MiB", target=target))
    for detail, values in peaks(tight, repeats).items():
        rows.append(Row(f"T = {tokens}: the statistics alone", detail, Spread.of(values), "MiB", target=target))
    need = EAGER_COPIES * HEADS * tokens * tokens * 4 / 2**20
    heads = HEADS if need < 0.8 * available() else 2
    factor, note = HEADS / heads, "" if heads == HEADS else f"measured with {heads} heads, times {HEADS // heads}"
    written = peaks({"eager": partial(eager, tokens, heads)}, 1)["eager"]
    value = Spread.of(written).scaled(factor)
    rows.append(Row(f"T = {tokens}: attention written out", "weights and their gradients", value, "MiB", note=note))
    yield Section("Memory", ABOUT, rows)

"""The statistics of one attention call, relative to the forward and backward pass of torch's own kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from attnprobe.catalog import select
from attnprobe.statistics.streaming import measure
from benchmarks.attention import Attention
from benchmarks.floor import Floor
from benchmarks.options import SAMPLED_ROWS, compiled_available, described, without_compiler
from benchmarks.table import Row, Section
from benchmarks.timing import Spread, compare

#: Tokens -> (batch, heads).
SIZES = {256: (8, 12), 1024: (2, 12), 4096: (1, 4), 8192: (1, 2)}
SHORT_SIZES = {256: (1, 12)}
TARGETS = {"core": 0.45, "all": 0.80}
MOONSHOT = 0.32  # for the compiled kernel and core

ABOUT = """Baseline (1.00) is the forward and backward pass of `F.scaled_dot_product_attention` with a given upstream
gradient, float32, heads 64 wide. *lse*: the log-sum-exp that the model's kernel saved is handed over, as a probe does,
instead of computed again. *torch*: torch operations only; *compiled*: with the compiled kernel. *Physical floor*: two
matrix products of [256, 64] by [64, 512] tiles and one exp2 per pair, in torch, times one half where causal."""


@dataclass(frozen=True)
class Candidate:
    """One way to call ``measure``.

    Attributes:
        name: what it is called in the table.
        statistics: which are computed.
        run: computes them.
        aim: key of its target, if it has one.
    """

    name: str
    statistics: str
    run: Callable[[], object]
    aim: str = ""


def candidates(attention: Attention) -> Iterator[Candidate]:
    """Every set of statistics, with and without the log-sum-exp. Targets are for what a probe does."""
    core, whole = select("core"), select("all")
    for given in (True, False):
        record, suffix = attention.record(logsumexp=given), ", lse" * given
        yield Candidate(f"core{suffix}", described("core"), partial(measure, record, core), "core" * given)
        yield Candidate(f"all{suffix}", described("all"), partial(measure, record, whole), "all" * given)
        unerring = replace(record, error=None)
        yield Candidate(f"forward only{suffix}", "core, those of the routing", partial(measure, unerring, core))
        rows = partial(measure, record, core, rows=SAMPLED_ROWS)
        yield Candidate(f"rows={SAMPLED_ROWS}{suffix}", f"{described('core')} of {SAMPLED_ROWS} rows", rows)


def uncompiled(run: Callable[[], object]) -> object:
    """Call it with the compiled kernel switched off."""
    with without_compiler():
        return run()


def rows_of(attention: Attention, repeats: int) -> Iterator[Row]:
    """Every candidate in torch operations and, where there is a compiler, with the compiled kernel."""
    kind, part = ("causal", 0.5) if attention.causal else ("full", 1.0)
    floor, chosen = Floor(attention), [*candidates(attention)]
    runs: dict[str, Callable[[], object]] = {"SDPA": attention.train, "floor": floor.run}
    rows = {}
    for candidate in chosen:
        settings = [("torch", partial(uncompiled, candidate.run))]
        if compiled_available():
            settings.append(("compiled", partial(candidate.run)))
        for setting, run in settings:
            name = f"{candidate.name}, {setting}"
            runs[name], rows[name] = run, Row(name, candidate.statistics, target=TARGETS.get(candidate.aim))
    compared = compare(runs, repeats)
    yield Row(f"{kind}: SDPA forward + backward", "none", Spread(1, 1, 1), seconds=compared.median("SDPA"))
    for name, row in rows.items():
        ratio, note = compared.ratio(name), ""
        if row.target == TARGETS["core"] and name.endswith("compiled"):
            note = f"moonshot ≤ {MOONSHOT}: {'yes' if ratio.median <= MOONSHOT else 'no'}"
        yield replace(row, name=f"{kind}: {name}", value=ratio, seconds=compared.median(name), note=note)
    bound = compared.ratio("floor").scaled(part)
    yield Row(f"{kind}: physical floor", "none", bound, seconds=compared.median("floor") * part)


def rates(attention: Attention, repeats: int) -> Iterator[Row]:
    """How fast this machine multiplies and exponentiates tiles."""
    floor = Floor(attention)
    work = {
        "products": ("matrix products", floor.flops, "GFLOP/s"),
        "exponentials": ("exp2", floor.elements, "Gelem/s"),
    }
    runs = {
        "products": partial(floor.run, exponentials=False),
        "exponentials": partial(floor.run, products=False),
    }
    compared = compare(runs, repeats)
    for key, (name, amount, unit) in work.items():
        speeds = [amount / seconds / 1e9 for seconds in compared.seconds[key]]
        yield Row(f"{name} of tiles", "none", Spread.of(speeds), unit, seconds=compared.median(key))


def benchmark(short: bool) -> Iterator[Section]:
    repeats, about = 3 if short else 7, ABOUT
    for tokens, (batch, heads) in (SHORT_SIZES if short else SIZES).items():
        causal, full = (Attention(batch, heads, tokens, causal) for causal in (True, False))
        rows = [*rows_of(causal, repeats), *rows_of(full, repeats), *rates(full, repeats)]
        yield Section(f"Kernel: T = {tokens}, batch {batch}, {heads} heads", about, rows)
        about = ""

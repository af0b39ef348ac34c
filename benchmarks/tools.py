"""A training step in view of attnprobe and of other tools: time and peak memory, each in a process of its own."""

from __future__ import annotations

import importlib.metadata
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from benchmarks import observers
from benchmarks.gpt2 import Sizes
from benchmarks.observers import Observed, Observer
from benchmarks.options import described
from benchmarks.table import Row, Section
from benchmarks.timing import Comparison, Spread, compare
from benchmarks.worker import Run, Worker, WorkerError, available

SIZES = Sizes(heads=4, layers=4, vocabulary=1000)
#: Tokens -> rounds.
LENGTHS, SHORT_LENGTHS = {256: 9, 1024: 5, 4096: 3, 8192: 1}, {256: 3}
BASELINE, OURS, EAGER = "plain training, SDPA", "attnprobe, core", "eager, output_attentions"
TARGET_TOKENS, EAGER_TARGET = 4096, 3.0
ENOUGH = 0.7  # share of the available memory that a step may be expected to need
PER_HEAD = "every head's weights, entropy and gradient at its output"

ABOUT = f"""GPT-2 with random weights, {SIZES}: forward pass, loss, backward pass and AdamW step on one
sequence, float32, every step observed, relative to the same step without an observer in the same rounds. Each tool
runs in a process of its own and is asked for every head's entropy and the size of the gradient at its output, the way
its documentation shows; what came out is compared with attnprobe's numbers. *speed-up*: a tool's time over attnprobe's
(core)."""
ABOUT_MEMORY = """Highest resident set of a training step above that of the process before its first step; gradients and
the optimizer's state are in every number."""


@dataclass(frozen=True)
class Tool:
    """Something to observe a training step with.

    Attributes:
        make: builds the step.
        gives: what a user gets out of it.
        package: what has to be installed.
    """

    make: Callable[[Sizes, int], Observer]
    gives: str
    package: str = "torch"

    def version(self) -> str | None:
        """None if it is not installed."""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None

    def shown_version(self) -> str:
        """Of the tools that are not in the description of the machine."""
        return "" if self.package in ("torch", "transformers") else self.version() or ""


TOOLS: Mapping[str, Tool] = {
    BASELINE: Tool(observers.plain, "nothing"),
    OURS: Tool(partial(observers.attnprobe, statistics="core"), described("core")),
    "attnprobe, all": Tool(partial(observers.attnprobe, statistics="all"), described("all")),
    EAGER: Tool(observers.eager, f"{PER_HEAD}; the weights' gradient", "transformers"),
    "nnsight": Tool(observers.nnsight, PER_HEAD, "nnsight"),
    "torchlens": Tool(observers.torchlens, PER_HEAD, "torchlens"),
    "TransformerLens": Tool(observers.transformer_lens, f"{PER_HEAD}; the weights' gradient", "transformer-lens"),
    "torch-module-monitor": Tool(
        observers.module_monitor,
        "every head's entropy; the gradient at its output by a hook of one's own",
        "torch-module-monitor",
    ),
}


@dataclass
class Cell:
    """One tool at one length: its process, and what came of it."""

    tool: Tool
    worker: Worker | None = None
    first: Run | None = None
    note: str = ""
    peaks: list[float] = field(default_factory=list)

    def warm_up(self) -> None:
        """The first step, if it can be done."""
        if self.worker is not None:
            try:
                self.first = self.worker.run()
            except WorkerError as error:
                self.note = f"failed: {error}"

    def seconds(self) -> float:
        """CPU time of one more step; its peak memory is kept."""
        assert self.worker is not None
        run = self.worker.run()
        self.peaks.append(run.peak)
        return run.seconds


def start(tool: Tool, tokens: int, expected: float, stack: ExitStack) -> Cell:
    """A process, or the reason why there is none."""
    if tool.version() is None:
        return Cell(tool, note="not installed")
    if expected > ENOUGH * available():
        return Cell(tool, note=f"not run: about {expected / 1024:.0f} GiB expected, {available() / 1024:.0f} available")
    return Cell(tool, stack.enter_context(Worker(partial(tool.make, SIZES, tokens))))


def measured(
    tools: Mapping[str, Tool], tokens: int, repeats: int, peaks: dict[str, tuple[int, float]]
) -> tuple[list[Row], list[Row]]:
    """Rows of time and of memory at one length; ``peaks`` remembers the last length's, to see what will not fit."""
    with ExitStack() as stack:
        cells: dict[str, Cell] = {}
        for name, tool in tools.items():
            length, peak = peaks.get(name, (tokens, 0.0))
            cells[name] = start(tool, tokens, peak * (tokens / length) ** 2, stack)
        for cell in cells.values():
            cell.warm_up()
        for name in (BASELINE, OURS):
            if cells[name].first is None:
                raise WorkerError(f"{name}: {cells[name].note}")
        running = {name: cell for name, cell in cells.items() if cell.first is not None}
        compared = compare(running, repeats, warmup=0, clock=Cell.seconds)
    reference = cells[OURS].first
    times, memory = [], []
    for name, cell in cells.items():
        row = Row(f"T = {tokens}: {name} {cell.tool.shown_version()}".rstrip(), cell.tool.gives, note=cell.note)
        if cell.first is None:
            times.append(row)
            memory.append(row)
            continue
        peaks[name] = tokens, statistics.median(cell.peaks)
        note = agreement(cell.first.value, reference.value) if reference and name not in (BASELINE, OURS) else ""
        times.append(replace(row, value=compared.ratio(name), seconds=compared.median(name), note=note))
        memory.append(replace(row, value=Spread.of(cell.peaks), unit="MiB"))
    return [*times, *verdicts(tokens, compared)], memory


def agreement(theirs: Observed, ours: Observed) -> str:
    """How far a tool's numbers of the first step are from attnprobe's, relative to these."""
    differences = []
    for name, mine, other in zip(("entropy", "gradient"), ours, theirs, strict=True):
        if mine is None or other is None:
            differences.append(f"no {name}")
        else:
            error = (torch.tensor(other) / torch.tensor(mine) - 1).abs().max()
            differences.append(f"{name} within {error:.0e}")
    return "; ".join(differences)


def verdicts(tokens: int, compared: Comparison) -> Iterator[Row]:
    """The others relative to attnprobe core."""
    others = [name for name in compared.seconds if name not in (BASELINE, OURS, "attnprobe, all")]
    for name in others:
        target = EAGER_TARGET if name == EAGER and tokens == TARGET_TOKENS else 1.0
        yield Row(f"T = {tokens}: speed-up over {name}", "", compared.ratio(name, OURS), target=target, at_least=True)


def benchmark(short: bool) -> Iterator[Section]:
    peaks: dict[str, tuple[int, float]] = {}
    times, memory = [], []
    tools = {name: TOOLS[name] for name in (BASELINE, OURS, EAGER)} if short else TOOLS
    for tokens, repeats in (SHORT_LENGTHS if short else LENGTHS).items():
        slower, larger = measured(tools, tokens, repeats, peaks)
        times += slower
        memory += larger
    header = ("what ran", "what it gave", "median", "quartiles", "CPU time", "target", "met", "remark")
    yield Section("Tools: time", ABOUT, times, header)
    yield Section("Tools: peak memory", ABOUT_MEMORY, memory, header)

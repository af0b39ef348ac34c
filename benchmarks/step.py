"""Whole training steps of a GPT-2, probed, not probed and without any probe, relative to the loop without one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from attnprobe import AttentionProbe
from benchmarks.gpt2 import Sizes, Trainer
from benchmarks.inactive import Counter, functions
from benchmarks.options import SAMPLED_ROWS, described, postpone, silent_probe
from benchmarks.table import Row, Section
from benchmarks.timing import Spread, compare

EVERY, AMORTISED = 50, 1.01
GPT2, SMALL = Sizes(), Sizes(heads=2, layers=2, vocabulary=1000)


@dataclass(frozen=True)
class Setting:
    """A length, and how much of it is measured."""

    tokens: int
    repeats: int
    targets: dict[str, float]
    warmup: int = 1


SETTING = Setting(1024, 9, {"core": 1.10, "all": 1.20, "rows": 1.03})
LONG_SETTING = Setting(8192, 2, {"core": 1.25, "rows": 1.02}, warmup=0)  # a round takes minutes
SHORT_SETTING, SHORT_LONG_SETTING = Setting(256, 3, {}), Setting(512, 1, {})

ABOUT = f"""Forward pass, loss, backward pass and AdamW step on one sequence, float32; 1.00 is the loop without any
probe in the same rounds. *Amortised* is the cost at one probe in {EVERY} steps: once computed from the ratio of a
probed step, once measured over {EVERY} steps of which one is probed."""


class Probed:
    """A trainer's step with a probe; nothing of the probe is active between two calls."""

    def __init__(self, trainer: Trainer, probe: AttentionProbe, *, due: bool = True) -> None:
        self.trainer, self.probe, self.due = trainer, probe, due

    def __call__(self) -> None:
        if self.due:
            self.probe.begin()
        report = self.probe.step(self.trainer.step())
        assert (report is not None) == self.due
        if report is not None:
            assert not report.invalid, report.invalid
            self.probe.discard()


def variants(trainer: Trainer) -> dict[str, tuple[str, Callable[[], object]]]:
    """Kind -> (statistics, step), the loop without a probe first."""
    options: dict[str, tuple[str, dict[str, object]]] = {
        "core": (described("core"), {"statistics": "core"}),
        "all": (described("all"), {"statistics": "all"}),
        "rows": (f"{described('core')} of {SAMPLED_ROWS} rows", {"rows": SAMPLED_ROWS}),
    }
    idle = postpone(silent_probe(trainer.model), 10**9)
    found: dict[str, tuple[str, Callable[[], object]]] = {
        "bare": ("no probe", trainer.step),
        "idle": ("none: the probe is not due", Probed(trainer, idle, due=False)),
    }
    for kind, (detail, chosen) in options.items():
        found[kind] = (detail, Probed(trainer, silent_probe(trainer.model, **chosen)))
    return found


def steps(sizes: Sizes, setting: Setting) -> Iterator[Row]:
    """One step of every kind."""
    chosen = variants(Trainer(sizes, setting.tokens))
    runs = {kind: run for kind, (_, run) in chosen.items()}
    compared = compare(runs, setting.repeats, warmup=setting.warmup)
    names = {"bare": "step without a probe", "idle": "step that is not probed"}
    for kind, (detail, _) in chosen.items():
        ratio = Spread(1, 1, 1) if kind == "bare" else compared.ratio(kind)
        name = f"T = {setting.tokens}: {names.get(kind, 'probed step')}"
        yield Row(name, detail, ratio, seconds=compared.median(kind), target=setting.targets.get(kind))
    core = compared.ratio("core")
    spread = Spread(*(1 + (ratio - 1) / EVERY for ratio in (core.median, core.lower, core.upper)))
    target = AMORTISED if setting.targets else None
    name = f"T = {setting.tokens}: amortised over {EVERY} steps, computed"
    yield Row(name, described("core"), spread, target=target)


def amortised(sizes: Sizes, tokens: int, repeats: int) -> Row:
    """So many steps of which one is probed, against as many without a probe."""
    trainer = Trainer(sizes, tokens)
    probe = silent_probe(trainer.model, every_n_steps=EVERY)
    runs = {"bare": partial(bare_run, trainer), "probed": partial(probed_run, trainer, probe)}
    compared = compare(runs, repeats)
    name = f"T = {tokens}: {EVERY} steps, one of them probed ({sizes})"
    return Row(name, described("core"), compared.ratio("probed"), seconds=compared.median("probed"))


def bare_run(trainer: Trainer) -> None:
    for _ in range(EVERY):
        trainer.step()


def probed_run(trainer: Trainer, probe: AttentionProbe) -> None:
    postpone(probe, EVERY // 2)
    reports = 0
    for _ in range(EVERY):
        reports += probe.step(trainer.step()) is not None
    assert reports == 1


def inactive() -> Iterator[Row]:
    """What is active in a step that is not probed, between two probed ones."""
    before = functions()
    trainer = Trainer(SMALL, 32)
    with silent_probe(trainer.model, every_n_steps=2) as probe:
        postpone(probe, 0)
        counts = []
        for due in (True, False, True):
            with Counter(trainer.model, before) as counter:
                assert probe.active == due
                loss = trainer.forward().loss
                loss.backward()
                counter.look()
                trainer.update()
            counter.look()
            counts.append(counter)
            probe.step(loss)
    probed, idle, _ = counts
    assert any(probed.most.values()), "a probed step would show"
    for kind, count in idle.most.items() | {("replaced functions", idle.replaced())}:
        yield Row(f"step that is not probed: {kind}", "none", Spread(count, count, count), "active", target=0)


def benchmark(short: bool) -> Iterator[Section]:
    sizes = SMALL if short else GPT2
    rows = [*steps(sizes, SHORT_SETTING if short else SETTING)]
    if short:
        rows.append(amortised(SMALL, 128, 2))
    else:
        smaller = replace(GPT2, layers=1, vocabulary=1000)
        rows.append(replace(amortised(smaller, 1024, 3), target=AMORTISED))
    yield Section(f"Training step: GPT-2, {sizes}", ABOUT, rows)
    about = "Largest number seen at any torch function of the step, its backward pass and between steps."
    yield Section("A step that is not probed", about, sorted(inactive(), key=lambda row: row.name))


def long_benchmark(short: bool) -> Iterator[Section]:
    """The same of a long sequence."""
    sizes, setting = (SMALL, SHORT_LONG_SETTING) if short else (GPT2, LONG_SETTING)
    yield Section(f"Training step on a long sequence: GPT-2, {sizes}", "", [*steps(sizes, setting)])

"""The compiled passes against the same in torch operations, and what happens where they cannot be had."""

from __future__ import annotations

import functools
import itertools
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attnprobe as ap
from attnprobe.catalog import select
from attnprobe.statistics import compiler
from attnprobe.statistics.compiled import CompiledTile, compiled_tile
from attnprobe.statistics.pair_sums import LARGEST, ROW_SUMS, PairSums, Tile
from attnprobe.statistics.streaming import measure
from tests.probe.models import batch, loss_of, net
from tests.statistics.test_streaming import finished, long_record

EPS = 2e-6
EXTENDED_ONLY, OF_ERRORS = ROW_SUMS[10:], ROW_SUMS[5:14]


@pytest.fixture
def tile() -> CompiledTile:
    function = compiled_tile(torch.device("cpu"), torch.float32)
    if function is None:
        reason = compiler.load()[1]
        assert reason == "no C compiler was found", reason
        pytest.skip(reason)
    return function


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled yet, and what will be need not be fast."""
    monkeypatch.setattr(compiler, "_load", functools.cache(compiler._load.__wrapped__))
    monkeypatch.setattr(compiler, "FLAGS", [flag for flag in compiler.FLAGS if flag != "-O3"])


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def sums_of(
    function: CompiledTile | None,
    *,
    items: int = 2,
    rows: int = 9,
    columns: int = 67,
    error: bool = True,
    extended: bool = True,
    hiding: str = "nothing",
    change: Any = None,
    place: tuple[int, int, int] = (1, 3, 5),
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Row sums, usage and weights of a random tile, which stands at ``place`` in something larger."""
    generator = torch.Generator().manual_seed(columns)
    whole = (items + place[0] + 1, rows + place[1] + 2)
    keys = columns + place[2] + 3
    index, at, across = (slice(i, i + n) for i, n in zip(place, (items, rows, columns), strict=True))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    scores, compatibilities = 4 * normal(items, rows, columns), normal(items, rows, columns) + 2
    visible, limit = None, torch.full(whole, keys, dtype=torch.int32)
    if hiding == "mask":
        visible = normal(items, rows, columns) > 0
        visible[0, 0] = False
        scores = torch.where(visible, scores, -LARGEST)
    if hiding == "limit":
        limit = torch.randint(0, keys + 1, whole, generator=generator, dtype=torch.int32)
        limit[index, at][0, :3] = torch.tensor([0, place[2], place[2] + 1], dtype=torch.int32)[:rows]
    shift = (scores * math.log(2)).logsumexp(-1) / math.log(2) + normal(items, rows).abs()
    if change is not None:
        change(scores, compatibilities)
    shifts = torch.zeros(whole)
    shifts[index, at] = torch.where(shift > -LARGEST / 10, shift, LARGEST)  # a row that sees nothing does not count
    centre, share = normal(*whole), torch.rand(*whole, generator=generator) / columns
    places = torch.arange(whole[1]).float().expand(whole)
    given = {"limit": limit, "shift": shifts, "centre": centre, "place": places, "share": share}
    sums = PairSums(**given, keys=keys, extended=extended, compiled=function)

    def tile() -> Tile:
        b = compatibilities.clone() if error else None
        return Tile(index, at, across, scores.clone(), b, visible, hiding == "limit")

    weights = sums.add(tile())
    row = {name: value.clone() for name, value in sums.row.items()}
    sums.add(tile())
    assert torch.allclose(sums.row["mass"], 2 * row["mass"], equal_nan=True)  # what is there stays
    return row, sums.usage / 2, weights.clone() if extended else torch.zeros(())


def assert_same(actual: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    """To 2e-6 of the largest number of each kind that adds up, NaN where the other is."""
    pairs = [(name, actual[0][name], expected[0][name]) for name in expected[0]]
    for name, found, wanted in [*pairs, ("usage", *(x[1] for x in (actual, expected)))]:
        known = wanted[wanted.isfinite() & (wanted.abs() < LARGEST)].abs()
        scale = max(float(known.max()), 1.0) if len(known) else 1.0
        torch.testing.assert_close(found, wanted, rtol=0, atol=EPS * scale, equal_nan=True, msg=name)
    torch.testing.assert_close(actual[2], expected[2], rtol=0, atol=EPS, equal_nan=True)


FLAGS = [*itertools.product([True, False], [True, False], ["nothing", "mask", "limit"])]


@pytest.mark.parametrize("columns", [1, 16, 67, 1024, 1025, 2500])
@pytest.mark.parametrize(("error", "extended", "hiding"), FLAGS)
def test_compiled_and_torch_agree(tile: CompiledTile, error: bool, extended: bool, hiding: str, columns: int) -> None:
    options: dict[str, Any] = {"error": error, "extended": extended, "hiding": hiding, "columns": columns}
    found, wanted = sums_of(tile, **options), sums_of(None, **options)
    assert_same(found, wanted)
    for names, used in ((EXTENDED_ONLY, extended), (("pc", "ppc", "pcc", "ppcc"), error)):
        assert any(name in found[0] and bool(found[0][name].any()) for name in names) == used


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize(("items", "rows"), [(1, 1), (1, 7), (2, 9), (7, 1), (5, 64)])
@pytest.mark.parametrize("hiding", ["mask", "limit"])
def test_threads_share_the_rows(tile: CompiledTile, items: int, rows: int, hiding: str) -> None:
    options: dict[str, Any] = {"items": items, "rows": rows, "hiding": hiding, "columns": 130}
    assert_same(sums_of(tile, **options), sums_of(None, **options))


@pytest.mark.usefixtures("three_threads")
def test_threads_measure_the_same(tile: CompiledTile) -> None:
    record = long_record(600, 600, 3, causal=True, self_attention=True)
    several = finished(measure(record, select("all")), ("entropy", "column_gini", "value_grad_norm", "mean_distance"))
    torch.set_num_threads(1)
    for name, value in finished(measure(record, select("all")), tuple(several)).items():
        torch.testing.assert_close(several[name], value, rtol=1e-5, atol=0)


@pytest.mark.parametrize("function", ["compiled", "torch"])
def test_what_is_hidden_weighs_nothing_at_all(tile: CompiledTile, function: str) -> None:
    def hide(scores: Tensor, compatibilities: Tensor) -> None:
        scores[:, :, 10:] = -LARGEST

    row, usage, weights = sums_of(tile if function == "compiled" else None, change=hide)
    assert not weights[:, :, 10:].any()
    assert not usage[:, 5 + 10 :].any()
    assert usage[1:3, 5 : 5 + 10].all()
    assert row["plogp"].isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["score", "compatibility"])
@pytest.mark.parametrize("column", [0, 30, 66])
def test_what_is_not_finite_stays_in_its_row(tile: CompiledTile, where: str, bad: float, column: int) -> None:
    def spoil(scores: Tensor, compatibilities: Tensor) -> None:
        (scores if where == "score" else compatibilities)[1, 4, column] = bad

    here = (2, 7)  # of item 1, row 4
    clean = sums_of(tile)[0]
    for function in (tile, None):
        row, usage, _ = sums_of(function, change=spoil)
        for name, value in row.items():
            others = torch.ones_like(value, dtype=torch.bool)
            others[here] = False
            assert value[others].isfinite().all(), name
            torch.testing.assert_close(value[others], clean[name][others], rtol=EPS, atol=EPS, msg=name)
        reached = set(OF_ERRORS) - {"ee"} if where == "compatibility" else {*ROW_SUMS} - {"min_c", "c", "cc"}
        if math.isinf(bad) and where == "compatibility":
            reached -= {"min_c"}  # the largest of all is not the smallest
        assert {name for name in reached if row[name][here].isfinite()} == set()
        unread = torch.ones(usage.shape[1], dtype=torch.bool)
        unread[5 + column] = False
        assert usage[:, unread].isfinite().all()


@pytest.mark.parametrize("column", [0, 30, 66])
def test_nan_is_neither_maximum_nor_minimum_but_nan(tile: CompiledTile, column: int) -> None:
    def spoil(scores: Tensor, compatibilities: Tensor) -> None:
        scores[0, 0, column] = compatibilities[0, 1, column] = math.nan

    for function in (tile, None):
        row = sums_of(function, change=spoil)[0]
        assert row["max_score"][1, 3].isnan()
        assert row["min_c"][1, 4].isnan()
        assert row["max_score"][1, 4].isfinite()


def test_a_tile_that_the_model_laid_out_in_another_way(tile: CompiledTile) -> None:
    def sums(scores: Tensor) -> Tensor:
        shape = (1, 6)
        vectors = {name: torch.zeros(shape) for name in ("shift", "centre", "place", "share")}
        pairs = PairSums(limit=torch.full(shape, 8).int(), keys=8, extended=True, compiled=tile, **vectors)
        weights = pairs.add(Tile(slice(0, 1), slice(0, 6), slice(0, 8), scores, None, None, False))
        return torch.cat([weights[0], pairs.row["mass"].mT], -1)

    scores = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sums(scores.mT.contiguous().mT), sums(scores.clone()))


# Without a compiler


def report_of(model: Any) -> ap.StepReport:
    return ap.analyze(model, lambda: loss_of(model, batch()), statistics="all")


def assert_refused(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    """``load`` says why, nothing fails, and the report has the same numbers and says it too."""
    model = net()
    with monkeypatch.context() as at_work:
        at_work.setenv("ATTNPROBE_COMPILED", "0")
        expected = report_of(model)
    function, said = compiler.load()
    assert function is None
    assert reason in said
    report = report_of(model)
    assert all(torch.equal(report[name].nan_to_num(), expected[name].nan_to_num()) for name in expected.statistics)
    told = [note for note in report.notes if "in torch operations" in note]
    assert len(told) == 2
    assert all(reason in note for note in told)


@pytest.mark.usefixtures("fresh")
def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert_refused(monkeypatch, "no C compiler was found")


def use(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    """A compiler of our own, the only one there is."""
    compiler = folder / "cc"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setattr("attnprobe.statistics.compiler.COMPILERS", ())  # or the next one would be tried


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'cannot find math.h' >&2; exit 1", "cannot find math.h"),
        ("exit 3", "could not be used: 3"),
        ("exit 0", "could not be used"),
        ("while [ $1 != -o ]; do shift; done; echo nonsense > $2", "could not be used"),
    ],
    ids=["fails", "fails in silence", "makes nothing", "makes nonsense"],
)
def test_a_compiler_that_does_not_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, reason: str
) -> None:
    use(monkeypatch, tmp_path, script)
    assert_refused(monkeypatch, reason)


def load_changed(monkeypatch: pytest.MonkeyPatch, folder: Path, old: str, new: str) -> str:
    """Why a changed source is not used."""
    sources = shutil.copytree(compiler.SOURCES, folder / "c")
    changed = [source for source in sources.iterdir() if old in source.read_text()]
    assert changed
    for source in changed:
        source.write_text(source.read_text().replace(old, new))
    monkeypatch.setattr(compiler, "SOURCES", sources)
    function, reason = compiler.load()
    if reason == "no C compiler was found":
        pytest.skip(reason)
    assert function is None
    return reason


@pytest.mark.usefixtures("fresh")
def test_another_function_than_expected(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "could not be used" in load_changed(monkeypatch, tmp_path, "attnprobe_tile", "something_else")


WRONG = {
    "square += p * p;": "square += p;",
    "far += p * fabsf(place - (float)j);": "far += p;",
    "usage[j] += p;": "usage[j] = p;",
    "ppcc += w * w;": "ppcc += w * c;",
    "low = lowest < low ? lowest : low;": "low = lowest;",
    "width < 0 || shift[i] >= LARGEST ? 0 : width < whole ? width : whole;": "whole;",
    "float score = s[j],": "float score = what & MASKED ? 0 : s[j],",
    "products += u * output[k];": "products += output[k];",
    "top = bits > top ? bits : top;": "top = bits;",
    "panels + c * depth": "panels",
    "n % heads * x->heads / heads": "0",
    "isfinite(top)": "0",
    "direction[k] += share * (error[k] * unit);": "direction[k] += error[k];",
    "(float)call->unit[n], room->error": "1, room->error",
    "counts(call, n * call->queries + top + i)": "1",
    "!call->rows || call->rows[row]": "1",
    "call->sink_score[at] = s[sink];": "call->sink_score[at] = s[0];",
    "call->self_score[at] = s[place];": ";",
    "room->uniform[j] += seen * call->share[at];": "room->uniform[j] += call->share[at];",
    "bias <= call->threshold ||": "",
    "bias * 1.44269504f": "bias",
    "call->value_gradient[n] += squares;": "call->value_gradient[n] = squares;",
    "memset(s + width, 0,": "memset(s + width, 0, 0 *",
    "bad |= score != score;": "",
    "score_of(query, keys + first * call->key.row": "score_of(query, keys",
    "score_of(query, keys + own * call->key.row": "score_of(query, keys",
    "sizeof(Call)": "8",
    "*total = *total * power(between(-127.0f, *top - most, 128.0f)) + sum;": "*total += sum;",
}


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("right", WRONG)
def test_wrong_numbers_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, right: str) -> None:
    assert "gives other numbers" in load_changed(monkeypatch, tmp_path, right, WRONG[right])


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks there for processes")
@pytest.mark.usefixtures("fresh")
def test_a_compiler_that_never_ends_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started = tmp_path / "started"
    use(monkeypatch, tmp_path, f"sleep 1000 & echo $! > {started}; wait")
    monkeypatch.setattr(compiler, "TIMEOUT", 0.5)
    library, reason = compiler.load()
    assert library is None
    assert "timed out" in reason
    child = Path(f"/proc/{started.read_text().strip()}")
    deadline = time.monotonic() + 5
    while child.exists() and "Z" not in (child / "stat").read_text().split()[2] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert time.monotonic() < deadline  # neither is what it has started


@pytest.mark.usefixtures("fresh")
def test_the_next_compiler_is_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    others = compiler.COMPILERS
    use(monkeypatch, tmp_path, "printf '\\377' >&2; exit 1")  # and what it says is no text
    monkeypatch.setattr(compiler, "COMPILERS", others)
    library, reason = compiler.load()
    assert (library is None) == (reason != "")
    if library is None:
        pytest.skip(reason)


DEFAULTS = """
import torch
from attnprobe.catalog import select
from attnprobe.record import AttentionRecord
from attnprobe.statistics.reduce import finish
from attnprobe.statistics.streaming import measure

def entropy():
    x = torch.arange(4096.0, dtype=torch.float32, device="cpu").view(1, 2, 64, 32).sin()
    record = AttentionRecord(value=x, query=x, key=x, error=x, causal=True)
    return finish(select("entropy")[0], measure(record, select("all")))

if {early}:
    entropy()
{change}
found = entropy()
torch.set_default_dtype(torch.float32)
torch.set_default_device("cpu")
assert torch.equal(found, entropy()), found
"""


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize(
    "change", ["dtype(torch.bfloat16)", "dtype(torch.float16)", "dtype(torch.float64)", "device('meta')"]
)
def test_the_user_s_defaults_do_not_matter(early: bool, change: str) -> None:
    program = DEFAULTS.format(early=early, change=f"torch.set_default_{change}")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(model: Any, x: Tensor) -> list[str]:
        return [note for note in ap.analyze(model, lambda: loss_of(model, x)).notes if "in torch operations" in note]

    monkeypatch.setenv("ATTNPROBE_COMPILED", "0")
    assert all("ATTNPROBE_COMPILED=0" in note for note in told(net(), batch()))
    assert len(told(net(), batch())) == 2
    assert told(net().double(), batch().double()) == []  # float64 is never compiled
    monkeypatch.delenv("ATTNPROBE_COMPILED")
    assert bool(told(net(), batch())) == (compiler.load()[0] is None)


def test_it_is_compiled_once(tile: CompiledTile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "_compile", lambda compiler: pytest.fail("compiled again"))
    assert compiler.load()[0] is not None
    measure(long_record(20, 20), select("all"))

"""The pass in C against the same in torch operations, for everything that a record may bring along."""

from __future__ import annotations

import dataclasses
import itertools
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from attnprobe.catalog import select
from attnprobe.record import AttentionRecord
from attnprobe.statistics import compiler, sweep
from attnprobe.statistics.scores import Scores
from attnprobe.statistics.streaming import context, measure, weighed
from attnprobe.statistics.subset import some_rows
from attnprobe.statistics.sweep import sweep_for

pytestmark = pytest.mark.usefixtures("at_hand")


@pytest.fixture
def at_hand() -> None:
    if compiler.load()[0] is None:
        assert compiler.load()[1] == "no C compiler was found"
        pytest.skip("no C compiler was found")


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def example(
    queries: int = 40,
    keys: int | None = None,
    *,
    batch: int = 2,
    heads: int = 4,
    groups: int = 4,
    widths: tuple[int, int] = (16, 16),
    **changes: Any,
) -> AttentionRecord:
    generator = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    length, (depth, width) = queries if keys is None else keys, widths
    record = AttentionRecord(
        query=some(batch, heads, queries, depth),
        key=some(batch, groups, length, depth),
        value=some(batch, groups, length, width),
        error=some(batch, heads, queries, width),
        scale=0.7,
        self_attention=keys is None,
    )
    record = dataclasses.replace(record, **changes)
    return record if record.output is not None else dataclasses.replace(record, output=context(record))


def assert_same(record: AttentionRecord, tolerance: float = 2e-5, **options: Any) -> None:
    """In C, which has to serve it, and in torch in double precision."""
    assert sweep_for(Scores(record)) is not None
    found = measure(record, select("all"), **options)
    changes = {
        field.name: value.double()
        for field in dataclasses.fields(record)
        if isinstance(value := getattr(record, field.name), Tensor) and value.is_floating_point()
    }
    expected = measure(dataclasses.replace(record, **changes), select("all"), **options)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(
            value,
            expected[name],
            rtol=tolerance,
            atol=tolerance,
            equal_nan=True,
            msg=lambda text, n=name: f"{n}: {text}",
        )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("queries", [1, 7, 8, 9, 33, 520])
@pytest.mark.parametrize("keys", [None, 1, 16, 31, 32, 33, 511, 512, 513, 1025])
def test_lengths(queries: int, keys: int | None, causal: bool) -> None:
    assert_same(example(queries, keys, heads=1, groups=1, causal=causal))


@pytest.mark.parametrize("width", [1, 3, 4, 8, 15, 17, 64, 100, 256])
@pytest.mark.parametrize("depth", [1, 5, 16, 33, 128])
def test_widths(depth: int, width: int) -> None:
    assert_same(example(35, heads=2, groups=2, batch=1, widths=(depth, width), causal=True))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("batch", "heads", "groups"), [(1, 1, 1), (1, 6, 2), (3, 4, 1), (2, 5, 5), (7, 1, 1)])
def test_sequences_heads_and_threads(batch: int, heads: int, groups: int) -> None:
    assert_same(example(batch=batch, heads=heads, groups=groups, causal=True))


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same numbers in memory in other ways."""
    return {
        "tokens first": x.transpose(1, 2).contiguous().transpose(1, 2),
        "heads first": x.transpose(0, 1).contiguous().transpose(0, 1),
        "part of a wider one": torch.cat([x, x * torch.nan], -1)[..., : x.shape[-1]],
        "columns first": x.mT.contiguous().mT,
        "every other row": x.repeat_interleave(2, 2)[:, :, ::2],
        "the same for all sequences": x[:1].expand_as(x),
    }


@pytest.mark.parametrize("layout", layouts(torch.zeros(1, 1, 1, 1)))
def test_layouts(layout: str) -> None:
    record = example(causal=True)
    names = ("query", "key", "value", "error")
    assert_same(dataclasses.replace(record, **{name: layouts(getattr(record, name))[layout] for name in names}))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2)])
@pytest.mark.parametrize("queries", [40, 700])
def test_other_precisions_come_in_pieces(
    dtype: torch.dtype, heads: int, groups: int, queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attnprobe.statistics.scores.VECTORS", 2048)
    record = example(queries, heads=heads, groups=groups, causal=True)
    names = ("query", "key", "value", "error")
    names = (*names, "output")
    record = dataclasses.replace(record, **{name: getattr(record, name).to(dtype) for name in names})
    assert_same(record)
    shown = torch.rand(2, heads, queries, queries, generator=torch.Generator().manual_seed(3)) < 0.7
    assert_same(dataclasses.replace(record, mask=shown))
    assert_same(dataclasses.replace(record, mask=torch.where(shown, 0.5, -torch.inf)[:, :1]))


def masks(batch: int, heads: int, queries: int, keys: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    full = torch.rand(batch, heads, queries, keys, generator=generator) < 0.6
    full[0, :, 3] = False  # a row that sees nothing
    full[..., 5] = False  # and a key that nobody sees
    position = torch.arange(queries)[:, None]
    window = (position - torch.arange(keys)).abs() < 9
    padding = torch.arange(keys) < torch.tensor([keys, keys // 2])[:, None]
    added = torch.randn(full.shape, generator=generator)
    return {
        "each pair": full,
        "two dimensions": full[1, 0],
        "of sequences": full[:, :1],
        "of heads": full[:1],
        "window": window,
        "padding": padding[:, None, None],
        "left padding": ~padding[:, None, None],
        "everything": torch.ones_like(full),
        "tokens first": full.transpose(1, 2).contiguous().transpose(1, 2),
        "added": added,
        "added and hidden": torch.where(full, added, -torch.inf),
        "added padding": torch.where(padding, 0.0, torch.finfo(torch.float32).min)[:, None, None],
        "added for each head": -0.1
        * (position - torch.arange(keys)).abs()
        * torch.tensor([1.0, 0.5, 2, 0]).view(1, -1, 1, 1),
    }


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("keys", [None, 530])
@pytest.mark.parametrize("name", masks(2, 4, 9, 9))
def test_masks(name: str, keys: int | None, causal: bool) -> None:
    record = example(40, keys, mask=masks(2, 4, 40, keys or 40)[name], causal=causal)
    assert_same(record)
    positions = torch.tensor([[0, 3, 3, 17, 30, 39], [1, 2, 4, 8, 16, 32]])
    part = some_rows(record, positions)
    assert sweep_for(Scores(part)) is not None
    assert_same(part)
    assert_same(record, rows=30, exact_routing=True)


@pytest.mark.parametrize("name", ["key", "value", "query", "error"])
def test_padding_may_hold_anything(name: str) -> None:
    padding = torch.arange(40) < torch.tensor([40, 23])[:, None]
    record = example(mask=padding[:, None, None], query_tokens=padding, causal=True)
    clean = measure(record, select("all"))
    tensor = getattr(record, name).masked_fill(~padding[:, None, :, None], torch.nan)
    found = measure(dataclasses.replace(record, **{name: tensor}), select("all"))
    for key in found.keys() - {f"nonfinite.{name}"}:
        torch.testing.assert_close(found[key], clean[key], rtol=1e-6, atol=1e-6, equal_nan=True, msg=key)


def test_a_sink() -> None:
    assert_same(example(sink=torch.randn(2, 4, 40, generator=torch.Generator().manual_seed(2)), causal=True))


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e30, 3e38])
def test_errors_of_any_size(size: float) -> None:
    record = example(causal=True)
    assert record.error is not None
    found = measure(dataclasses.replace(record, error=record.error / record.error.abs().max() * size), select("all"))
    double = dataclasses.replace(record, error=record.error / record.error.abs().max())
    expected = measure(double, select("all"))
    for name, power in (("advantage_std", 2), ("advantage_max", 1), ("value_grad_norm", 2), ("head_importance", 1)):
        key = f"{name}.max" if name == "advantage_max" else f"{name}.sum"
        torch.testing.assert_close(found[key] / size**power, expected[key], rtol=1e-4, atol=0, msg=name)


def test_the_log_sum_exp_is_that_of_its_own_scores() -> None:
    """However large they are, or the weights of a row would not add up to 1."""
    record = example(200, widths=(64, 16), scale=1e4, causal=True)
    found = sweep_for(Scores(record))
    assert found is not None
    top, total = found.exponentials()
    expected = torch.where(
        torch.ones(200, 200).tril().bool(), record.query @ record.key.mT * 1e4 / 0.6931471805599453, -torch.inf
    )
    torch.testing.assert_close(top.view(2, 4, 200), expected.amax(-1), rtol=1e-6, atol=0.02)
    assert (total >= 1).all()
    assert_same(dataclasses.replace(record, scale=10.0), 1e-3)


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_the_log_sum_exp_that_a_kernel_left(shift: float) -> None:
    """Believed where it is right, else found anew."""
    record = example(70, causal=True)
    visible = torch.ones(70, 70).tril().bool()
    scores = torch.where(visible, record.query @ record.key.mT * record.scale, -torch.inf)
    given = dataclasses.replace(record, logsumexp=scores.logsumexp(-1) + shift)
    assert weighed(given, {"value_grad_norm"}).kernel_lse == (shift == 0)
    assert_same(given)
    found = measure(given, select("all"), rows=40)
    exact = measure(record, select("all"))
    if not shift:
        for name in ("sink_mass", "self_mass"):
            torch.testing.assert_close(found[f"{name}.sum"], exact[f"{name}.sum"], rtol=1e-5, atol=1e-6)


def test_tokens_that_a_mask_does_not_tell() -> None:
    tokens = torch.arange(40) < torch.tensor([40, 23])[:, None]
    record = example(causal=True, query_tokens=tokens, key_tokens=tokens)
    assert_same(record)
    assert_same(record, rows=20)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_user_s_default_dtype_does_not_matter(dtype: torch.dtype) -> None:
    tokens = torch.arange(200) < torch.tensor([200, 120])[:, None]
    record = example(200, causal=True, query_tokens=tokens, key_tokens=tokens)
    expected = measure(record, select("all"), rows=60)
    torch.set_default_dtype(dtype)
    try:
        found = measure(record, select("all"), rows=60)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(value.nan_to_num(-1), expected[name].nan_to_num(-1)) for name, value in found.items())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["query", "key", "value", "error", "output"])
def test_what_is_not_finite_is_what_torch_says(name: str, bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    for mask in (None, masks(2, 4, 40, 40)["each pair"], masks(2, 4, 40, 40)["added and hidden"]):
        record = example(mask=mask, causal=True)
        tensor = getattr(record, name).clone()
        tensor[1, 2, 20, 3] = bad
        record = dataclasses.replace(record, **{name: tensor})
        found = measure(record, select("all"))
        with monkeypatch.context() as without:
            without.setenv("ATTNPROBE_COMPILED", "0")
            expected = measure(record, select("all"))
        for key, value in found.items():
            close = torch.isclose(value, expected[key], 2e-5, 2e-5, equal_nan=True)
            if key == "advantage_max.max":  # the lowest of what is not a number
                close |= value.isnan() | expected[key].isnan()
            elif key.startswith("advantage_alignment") and mask is not None and name == "key":
                continue  # a score of -inf counts as masked, or as seen
            assert close.all(), (key, value, expected[key])


def smaller(x: Tensor) -> dict[str, Tensor]:
    return {"sequences": x[:1], "rows": x[:, :, :20], "columns": x[..., :8], "heads": x[:, :3]}


FITTING = {("key", "heads"), ("value", "heads")}  # three for four heads: torch takes them


@pytest.mark.parametrize(
    ("name", "how"),
    sorted(
        {*itertools.product(("query", "key", "value", "output", "error"), smaller(torch.zeros(1, 1, 1, 1)))} - FITTING
    ),
)
def test_tensors_that_do_not_fit_together_are_left_to_torch(name: str, how: str) -> None:
    record = example()
    record = dataclasses.replace(record, **{name: smaller(getattr(record, name))[how]})
    assert sweep_for(Scores(record)) is None


def test_memory_that_does_not_hold_the_numbers() -> None:
    class Other(Tensor):
        pass

    record = example()
    negative = torch.complex(record.query, record.query).conj().imag
    assert negative.is_neg()
    for query in (negative, record.query.as_subclass(Other), torch._efficientzerotensor((2, 4, 40, 16))):
        assert sweep_for(Scores(dataclasses.replace(record, query=query))) is None


INTERRUPTED = """
import signal, torch
from attnprobe.catalog import select
from attnprobe.record import AttentionRecord
from attnprobe.statistics.streaming import measure

def interrupt(*_):
    raise KeyboardInterrupt

def record(length):
    x = torch.randn(2, 2, length, 64)
    return AttentionRecord(value=x, query=x, key=x, output=x, error=x, scale=0.1)

torch.set_num_threads(2)
measure(record(64), select("core"))
large = record(4096)
signal.signal(signal.SIGALRM, interrupt)
for _ in range(3):
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        measure(large, select("core"))
    except KeyboardInterrupt:
        print("interrupted", flush=True)
measure(record(64), select("core"))
"""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timer that interrupts")
def test_an_interrupted_pass_reads_and_writes_nothing_that_is_gone() -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("interrupted") == 3


def test_what_it_does_not_serve() -> None:
    record = example()
    changes: list[dict[str, Any]] = [
        {"logits": torch.randn(2, 4, 40, 40), "query": None, "key": None},
        {"score_mod": lambda score, b, h, q, k: score},
        {"mask_mod": lambda b, h, q, k: q >= k},
        {"kept": torch.rand(2, 4, 40, 40) > 0.1, "dropout": 0.1},
        {"mask": torch.zeros(40, 40, dtype=torch.bfloat16)},
        {"mask": torch.zeros(40, 40).mT.contiguous().mT},
        {"mask": torch.ones(2, 4, 40, 1, dtype=torch.bool)},
        {"value": record.value.double()},
        {"value": torch.empty(2, 4, 40, 0), "output": torch.empty(2, 4, 40, 0), "error": None},
    ]
    assert sweep_for(Scores(record)) is not None
    for change in changes:
        assert sweep_for(Scores(dataclasses.replace(record, **change))) is None, change.keys()


def test_every_thread_has_its_share() -> None:
    for number in (1, 2, 7, 12, 13):
        for threads in (1, 2, 5, 64):
            parts = [*sweep._parts(number, threads)]
            assert [i for part in parts for i in range(*part)] == [*range(number)]
            assert len(parts) <= threads

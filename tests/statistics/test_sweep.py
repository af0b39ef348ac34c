"""The pass in C against the same in torch operations, for everything that a record may bring along."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from attnprobe.catalog import select
from attnprobe.record import AttentionRecord
from attnprobe.statistics import compiler, sweep
from attnprobe.statistics.scores import Scores
from attnprobe.statistics.streaming import measure
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
    return dataclasses.replace(record, **changes)


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
    record = dataclasses.replace(record, **{name: getattr(record, name).to(dtype) for name in names})
    assert_same(dataclasses.replace(record, output=record.error * 0.1))


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
        "added for each head": torch.where(window, -0.1 * (position - torch.arange(keys)).abs(), -1e4)
        * torch.tensor([1.0, 1, 1, 1]).view(1, -1, 1, 1),
    }


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("keys", [None, 530])
@pytest.mark.parametrize("name", masks(2, 4, 9, 9))
def test_masks(name: str, keys: int | None, causal: bool) -> None:
    record = example(40, keys, mask=masks(2, 4, 40, keys or 40)[name], causal=causal)
    assert_same(record)
    assert_same(record, rows=30, exact_routing=True)


@pytest.mark.parametrize("name", ["key", "value", "query", "error"])
def test_padding_may_hold_anything(name: str) -> None:
    padding = torch.arange(40) < torch.tensor([40, 23])[:, None]
    record = example(mask=padding[:, None, None], query_tokens=padding, causal=True)
    record = dataclasses.replace(record, output=record.query)
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

"""The Triton kernels, in Triton's interpreter, against the formulas in float64."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from attnprobe.record import AttentionRecord
from attnprobe.statistics import triton_path
from tests.statistics import compare
from tests.statistics.compare import NAMES
from tests.statistics.test_streaming import measured

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

#: Triton reads this when it is first imported, its own library included, and never again.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LIMITS: dict[str, Callable[[int, int, int], Tensor]] = {
    "causal": lambda items, queries, keys: torch.arange(1, queries + 1).clamp(max=keys).expand(items, -1),
    "full": lambda items, queries, keys: torch.full((items, queries), keys),
    # ... and the last row, which may be all of its tile, sees nothing
    "partial": lambda items, queries, keys: (
        torch.randint(keys + 1, (items, queries)) * (torch.arange(-queries, 0) < -1)
    ),
}


@pytest.mark.skipif(INTERPRETED, reason="is what this process was started for")
def test_in_a_process_of_its_own() -> None:
    """Whoever imported Triton before, for torch.compile say, has imported it without its interpreter."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@dataclass(frozen=True)
class Case:
    """Numbers of items, key items, queries and keys, both widths, and what is visible."""

    items: int
    key_items: int
    queries: int
    keys: int
    width: int
    value_width: int
    limit: str

    def __str__(self) -> str:
        return "-".join(map(str, vars(self).values()))

    def arguments(self, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """Everything that ``pair_sums`` takes, with an error, and shifts that make masses about 1."""
        torch.manual_seed(0)
        rows = (self.items, self.queries)
        limit = LIMITS[self.limit](*rows, self.keys).int()
        return {
            "query": (torch.randn(*rows, self.width) * self.width**-0.5).to(dtype),
            "key": torch.randn(self.key_items, self.keys, self.width).to(dtype),
            "shift": limit.clamp(min=1).log2() + torch.rand(rows),
            "limit": limit,
            "position": torch.randint(0, self.keys, rows, dtype=torch.int32),
            "share": torch.rand(rows),
            "error": (torch.randn(*rows, self.value_width) * self.value_width**-0.5).to(dtype),
            "value": (torch.randn(self.key_items, self.keys, self.value_width) + 0.3).to(dtype),
            "centre": torch.randn(rows),
        }


#: Tiles are 64 x 64: smaller ones, larger ones, whole ones; several of which one has no more visible columns.
CASES = (
    Case(2, 1, 70, 70, 16, 16, "causal"),
    Case(1, 1, 70, 90, 64, 80, "full"),
    Case(1, 1, 65, 130, 80, 1, "partial"),
    Case(1, 1, 64, 128, 16, 64, "causal"),
    Case(6, 2, 40, 5, 1, 64, "partial"),
    Case(1, 1, 3, 70, 17, 3, "full"),
)
CAUSAL, PARTIAL = CASES[0], CASES[2]
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}
ALL_DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
ALL_CASES = pytest.mark.parametrize("case", CASES, ids=str)


def formulas(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Every sum in float64, from ``T x S`` tensors; ``usage`` and ``log_sum_exp`` too."""
    repeats = len(arguments["query"]) // len(arguments["key"])
    wide = {name: tensor.double() for name, tensor in arguments.items() if isinstance(tensor, Tensor)}
    key, value = (wide[name].repeat_interleave(repeats, 0) for name in ("key", "value"))
    columns = torch.arange(key.shape[1])
    visible = columns < arguments["limit"][..., None]
    logits = wide["query"] @ key.mT
    x = logits - wide["shift"][..., None]
    p = torch.where(visible, x.exp2(), 0)
    c = torch.where(visible, wide["error"] @ value.mT - wide["centre"][..., None], 0)
    e = torch.where(visible, p - wide["share"][..., None], 0)
    pairs = {
        "mass": p,
        "plogp": torch.where(p == 0, 0, p * x),
        "square": p**2,
        "logs": torch.where(visible, x, 0),
        "pc": p * c,
        "ppc": p**2 * c,
        "pcc": p * c**2,
        "ppcc": p**2 * c**2,
        "distance": p * (wide["position"][..., None] - columns).abs(),
        "ee": e**2,
        "ec": e * c,
        "c": c,
        "cc": c**2,
    }
    return {name: terms.sum(-1) for name, terms in pairs.items()} | {
        "max_log": torch.where(visible, x, -1e30).amax(-1),
        "min_c": torch.where(visible, c, 1e30).amin(-1),
        "usage": p.sum(-2),
        "log_sum_exp": torch.where(visible, logits, -torch.inf).mul(math.log(2)).logsumexp(-1) / math.log(2),
    }


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, name: str) -> None:
    """Relative to the largest number but the infinite, which are the same."""
    assert actual.dtype == torch.float32, name
    assert actual.shape == expected.shape, name
    finite = expected.abs() < 1e29
    scale = expected[finite].abs().amax().item() if finite.any() else 1.0
    torch.testing.assert_close(actual[finite].double(), expected[finite], rtol=0, atol=tolerance * scale, msg=name)
    assert torch.equal(actual[~finite], expected[~finite].float()), name


def kernel() -> Any:
    return importlib.import_module("attnprobe.statistics.triton_kernel")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about NaN and the logarithm of 0
class TestInterpreted:
    __test__ = INTERPRETED

    @ALL_CASES
    @ALL_DTYPES
    def test_log_sum_exp(self, case: Case, dtype: torch.dtype) -> None:
        arguments = case.arguments(dtype)
        actual = kernel().log_sum_exp(*(arguments[name] for name in ("query", "key", "limit")))
        assert_close(actual, formulas(arguments)["log_sum_exp"], TOLERANCE[dtype], "log_sum_exp")

    @ALL_CASES
    @ALL_DTYPES
    def test_all_sums(self, case: Case, dtype: torch.dtype) -> None:
        arguments = case.arguments(dtype)
        expected = formulas(arguments)
        sums, usage = kernel().pair_sums(**arguments, extended=True)
        for name, actual in (sums | {"usage": usage}).items():
            assert_close(actual, expected[name], TOLERANCE[dtype], name)

    @pytest.mark.parametrize("error", [False, True], ids=["forward", "error"])
    @pytest.mark.parametrize("extended", [False, True], ids=["usual", "extended"])
    def test_only_what_is_asked_for(self, error: bool, extended: bool) -> None:
        arguments = CAUSAL.arguments()
        expected = formulas(arguments)
        names = {"mass", "plogp", "square", "logs", "max_log"} | ({"distance"} if extended else set())
        if error:
            names |= {"pc", "ppc", "pcc", "ppcc", "min_c"} | ({"ee", "ec", "c", "cc"} if extended else set())
        else:
            del arguments["error"], arguments["value"], arguments["centre"]
        sums, usage = kernel().pair_sums(**arguments, extended=extended)
        assert sums.keys() == names
        for name, actual in (sums | {"usage": usage}).items():
            assert_close(actual, expected[name], 5e-6, name)

    def test_views(self) -> None:
        """Any strides: tensors as a model holds them, and rows that share one number."""
        arguments = CAUSAL.arguments()
        arguments["shift"] = torch.tensor(3.0).expand_as(arguments["shift"])
        expected = formulas(arguments)
        strided = {name: t.transpose(0, 1).contiguous().transpose(0, 1) for name, t in arguments.items()}
        strided["shift"] = arguments["shift"]
        sums, usage = kernel().pair_sums(**strided, extended=True)
        for name, actual in (sums | {"usage": usage}).items():
            assert_close(actual, expected[name], 5e-6, name)
        actual = kernel().log_sum_exp(strided["query"], strided["key"], strided["limit"])
        assert_close(actual, expected["log_sum_exp"], 5e-6, "log_sum_exp")

    def test_large_logits(self) -> None:
        """What 2^x cannot hold: log-sum-exps, and logits of keys that are not visible. Whole numbers are exact."""
        arguments = CAUSAL.arguments()
        arguments["query"], arguments["key"] = (arguments["query"] * 1000).round(), (arguments["key"] * 4).round()
        actual = kernel().log_sum_exp(arguments["query"], arguments["key"], arguments["limit"])
        assert_close(actual, formulas(arguments)["log_sum_exp"], 5e-6, "log_sum_exp")
        arguments["shift"] = actual.round()
        expected = formulas(arguments)
        sums, usage = kernel().pair_sums(**arguments, extended=True)
        for name, sums_or_usage in (sums | {"usage": usage}).items():
            assert_close(sums_or_usage, expected[name], 5e-6, name)

    @pytest.mark.parametrize("sign", [1, -1])
    def test_infinite_logits(self, sign: int) -> None:
        """One of 65 logits is infinite: downwards it weighs nothing, upwards everything."""
        query, key = torch.full((1, 1, 1), 1e30), torch.zeros(1, 65, 1)
        key[0, 3] = sign * 1e30
        row = torch.full((1, 1), 65, dtype=torch.int32)
        actual = kernel().log_sum_exp(query, key, row)
        assert actual.item() == (torch.inf if sign > 0 else pytest.approx(6))
        sums, usage = kernel().pair_sums(query, key, torch.ones(1, 1), row, row, torch.ones(1, 1))
        if sign < 0:
            assert (sums["mass"].item(), sums["plogp"].item(), sums["max_log"].item()) == (32, -32, -1)
        assert usage[0, 3].item() == (torch.inf if sign > 0 else 0)

    @pytest.mark.parametrize("case", [CAUSAL, PARTIAL], ids=str)
    def test_rows_that_do_not_count(self, case: Case) -> None:
        arguments = case.arguments()
        arguments["shift"][:, ::3] = 1e30
        expected = formulas(arguments)
        sums, usage = kernel().pair_sums(**arguments, extended=True)
        sums.pop("logs")  # of rows that count nothing is read off it
        for name, actual in (sums | {"usage": usage}).items():
            assert_close(actual, expected[name], 5e-6, name)
        for name in ("mass", "plogp", "square", "pc", "ppc", "pcc", "ppcc", "distance"):
            assert (sums[name][:, ::3] == 0).all(), name

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    def test_keys_that_nobody_sees(self, bad: float) -> None:
        arguments = replace(CAUSAL, limit="partial").arguments()
        arguments["limit"].clamp_(max=40)
        expected = formulas(arguments)
        arguments["key"][:, 40:], arguments["value"][:, 40:] = bad, -bad
        sums, usage = kernel().pair_sums(**arguments, extended=True)
        for name, actual in (sums | {"usage": usage}).items():
            assert_close(actual, expected[name], 5e-6, name)
        actual = kernel().log_sum_exp(arguments["query"], arguments["key"], arguments["limit"])
        assert_close(actual, expected["log_sum_exp"], 5e-6, "log_sum_exp")

    def test_broken_rows(self) -> None:
        """NaN in a query and Inf in an error stay in their rows, and no sum of these hides them."""
        arguments = CAUSAL.arguments()
        expected = formulas(arguments)
        item, query, error = 1, 20, 66
        arguments["query"][item, query, 3] = torch.nan
        arguments["error"][item, error, 5] = torch.inf
        sums, usage = kernel().pair_sums(**arguments, extended=True)
        of_weights = {"mass", "plogp", "square", "logs", "max_log", "distance"}
        of_both = {"pc", "ppc", "pcc", "ppcc", "ec"}
        for name, actual in sums.items():
            broken = torch.zeros_like(actual, dtype=torch.bool)
            broken[item, query] = name in of_weights | of_both | {"ee"}
            broken[item, error] = name in of_both | {"min_c", "c", "cc"}
            assert actual[item, query].isnan() == broken[item, query], name
            assert not actual[broken].isfinite().any(), name
            assert_close(torch.where(broken, 0, actual), torch.where(broken, 0, expected[name]), 5e-6, name)
        assert usage[item, : query + 1].isnan().all()
        usage[item, : query + 1] = expected["usage"][item, : query + 1].float()
        assert_close(usage, expected["usage"], 5e-6, "usage")
        logsumexp = kernel().log_sum_exp(arguments["query"], arguments["key"], arguments["limit"])
        assert logsumexp[item, query].isnan()
        logsumexp[item, query] = expected["log_sum_exp"][item, query]
        assert_close(logsumexp, expected["log_sum_exp"], 5e-6, "log_sum_exp")

    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("given", [False, True], ids=["two passes", "one pass"])
    def test_whole_statistics(self, causal: bool, given: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """The path that a CUDA record takes, every statistic but the one that needs the weights themselves."""
        path = triton_path.TritonPath(kernel())
        assert triton_path.agrees(path, torch.device("cpu"))
        monkeypatch.setattr(triton_path, "triton_path", lambda device: path)
        monkeypatch.setattr(path, "add", Mock(wraps=path.add))
        torch.manual_seed(0)
        record = AttentionRecord(
            value=torch.randn(2, 1, 70, 5),
            query=torch.randn(2, 2, 70, 8),
            key=torch.randn(2, 1, 70, 8),
            error=torch.randn(2, 2, 70, 5),
            causal=causal,
            self_attention=True,
            query_tokens=torch.arange(70).expand(2, -1) < torch.tensor([[60], [70]]),
        )
        if given:
            scores = (record.query @ record.key.mT).masked_fill(~torch.ones(70, 70).tril().bool() & causal, -torch.inf)
            record = replace(record, logsumexp=scores.logsumexp(-1))
        names = tuple(name for name in NAMES if name != "value_grad_norm")
        compare.assert_close(measured(record, names), record, 5e-6)
        assert path.add.call_count

    def test_kernels_that_differ_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        path = triton_path.TritonPath(kernel())
        monkeypatch.setattr(path._kernels, "log_sum_exp", lambda *args: torch.zeros(4, 70))
        assert not triton_path.agrees(path, torch.device("cpu"))

    def test_broken_errors(self) -> None:
        """The smallest of numbers of which some are NaN is NaN, as in torch."""
        arguments = CAUSAL.arguments()
        arguments["value"][0, 10] = torch.nan
        sums, _ = kernel().pair_sums(**arguments)
        assert torch.equal(sums["min_c"].isnan(), formulas(arguments)["min_c"].isnan())
        arguments["key"][0, 10] = torch.nan
        sums, _ = kernel().pair_sums(**arguments)
        assert torch.equal(sums["max_log"].isnan(), formulas(arguments)["max_log"].isnan())

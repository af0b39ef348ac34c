"""``register_attention``: what an adapter tells of a kernel is measured, and checked."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnprobe as ap
from attnprobe.errors import AttnProbeWarning, ConfigurationError
from attnprobe.statistics.dense import dense, dense_parts
from tests.capture.models import loss_of
from tests.capture.opaque import (
    CAUSAL,
    Case,
    Compute,
    causal,
    each_case,
    each_way,
    measured,
    registrations,  # noqa: F401
    reported,
    told,
    turned,
)
from tests.capture.reference import names, noted, session
from tests.capture.training import assert_same_training

pytestmark = pytest.mark.usefixtures("registrations")
EXACT = {"rtol": 1e-12, "atol": 1e-12, "equal_nan": True}


@each_way
@each_case
def test_training_is_the_same(case: Case, register: Callable[[Case], Compute]) -> None:
    attend = register(case)
    assert_same_training(lambda: case.model(attend), case.batch())


@each_way
@each_case
def test_numbers_are_those_of_torchs_own_attention(case: Case, register: Callable[[Case], Compute]) -> None:
    model, plain = case.model(register(case)), case.build(lambda attention, *qkv: case.plain(*qkv))
    with session(model) as watching, noted(model) as notes:
        loss_of(model(*case.batch())).backward()
    with session(plain) as reference:
        loss_of(plain(*case.batch())).backward()
    assert names(watching.seen) == names(reference.seen) == ["layers.0", "layers.1"]
    records = [sorted(seen.seen, key=lambda call: call.rank) for seen in (watching, reference)]
    for call, other, note in zip(*records, notes, strict=True):
        assert torch.equal(call.result.error, case.from_kernel(note.output.grad))
        assert call.result.self_attention == other.result.self_attention
        torch.testing.assert_close(dense(call.result), dense(other.result), **EXACT)
        parts = dense_parts(call.result)
        torch.testing.assert_close(parts.alpha @ parts.value, parts.output, **EXACT)
    reports = [measured(each, *case.batch()) for each in (model, plain)]
    assert reports[0].residual.max() < 1e-12
    assert not reports[0].warnings
    for name, values in reports[1].statistics.items():
        torch.testing.assert_close(reports[0][name], values, rtol=1e-9, atol=1e-9, equal_nan=True)


@each_way
def test_a_lie_is_exposed_by_the_residual(register: Callable[[Case], Compute]) -> None:
    model = CAUSAL.model(register(Case(causal, told(causal=True, scale=1.5))))
    with pytest.warns(AttnProbeWarning, match=r"layers\.[01]: not measured, because sum alpha b misses u\.o"):
        report = measured(model, *CAUSAL.batch())
    assert report.residual.min() > 1e-3
    assert report["entropy"].isnan().all()


def fails(*args: Tensor) -> Any:
    raise ZeroDivisionError("in the adapter")


NONSENSE: dict[str, tuple[Callable[..., Any], type[Exception], str]] = {
    "raises": (fails, ZeroDivisionError, "in the adapter"),
    "nothing": (lambda q, k, v: None, TypeError, "'NoneType' object is not iterable"),
    "empty": (lambda q, k, v: {}, ConfigurationError, "an attention adapter returns query, key and value"),
    "unknown": (told(softcap=3.0), ConfigurationError, "an attention adapter .* got query, key, value, softcap"),
    "arguments": (lambda q, k: {}, TypeError, "takes 2 positional arguments but 3 were given"),
    "number": (lambda q, k, v: told()(1, k, v), AttributeError, "'int' object has no attribute"),
    "layout": (
        lambda *qkv: told()(*turned(*qkv)),
        ConfigurationError,
        r"query \[2, 9, 4, 4\], .* output \[2, 4, 9, 4\]",
    ),
    "keys": (lambda q, k, v: told()(q, k[:, :, 1:], v), ConfigurationError, r"key \[2, 4, 8, 4\]"),
    "groups": (lambda q, k, v: told()(q, k[:, :3], v[:, :3]), ConfigurationError, r"key \[2, 3, 9, 4\]"),
    "width": (lambda q, k, v: told()(q[..., 1:], k, v), ConfigurationError, r"query \[2, 4, 9, 3\]"),
    "mask": (told(mask=torch.ones(5, 3, dtype=torch.bool)), RuntimeError, "must match the existing size"),
    "mask_mod": (told(mask_mod=fails), ZeroDivisionError, "in the adapter"),
}


@each_way
@pytest.mark.parametrize(("adapter", "error", "message"), NONSENSE.values(), ids=NONSENSE.keys())
def test_nonsense_is_one_warning(
    adapter: Any, error: type[Exception], message: str, register: Callable[[Case], Compute]
) -> None:
    attend = register(Case(causal, adapter))
    model = CAUSAL.build(lambda attention, *qkv: (attend if attention is model.layers[0] else causal)(*qkv))
    with pytest.warns(AttnProbeWarning) as said:
        reports = reported(model, *CAUSAL.batch(), steps=3)
    for report in reports:
        assert report.valid
        assert report["entropy"].isfinite().all(1).tolist() == [layer == "layers.1" for layer in report.layers]
    assert len(said) == 1
    assert re.search(rf"layers\.0: switched off after {error.__name__}: .*{message}", str(said[0].message))
    with pytest.raises(error, match=message), ap.AttentionProbe(model, strict=True):
        loss_of(model(*CAUSAL.batch())).backward()


def test_what_cannot_be_registered() -> None:
    with pytest.raises(ConfigurationError, match="layout must be one of 'bhtd', 'bthd', got 'thd'"):
        ap.register_attention(told(), layout="thd")
    for nothing in (nn.Linear, 3):
        with pytest.raises(ConfigurationError, match=r"a function or a subclass of torch\.autograd\.Function, got"):
            ap.register_attention(told())(nothing)

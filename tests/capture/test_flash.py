"""The adapters for the flash-attn package, against a stand-in with its signatures."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnprobe as ap
from attnprobe.capture import flash
from attnprobe.capture.registry import KERNELS
from attnprobe.catalog import STATISTICS
from attnprobe.errors import AttnProbeWarning
from attnprobe.record import AttentionRecord
from attnprobe.statistics.dense import dense_parts
from attnprobe.statistics.reduce import Partial, combine, finish
from attnprobe.statistics.streaming import measure
from tests.capture import flash_standin
from tests.capture.flash_standin import attention, call, signatures, split
from tests.capture.models import Attention, Model, loss_of, tokens
from tests.capture.opaque import measured, registrations, reported  # noqa: F401
from tests.capture.reference import session
from tests.capture.training import assert_same_training
from tests.statistics.compare import NAMES, assert_close

pytestmark = pytest.mark.usefixtures("registrations")
BATCH, HEADS, GROUPS, DEPTH, SHORT, LONG = 3, 4, 2, 5, 6, 9
CLOSE = {"rtol": 1e-11, "atol": 1e-12}
SLOPES = torch.tensor([0.5, 0.25, 0.1, 0.0])
MEASURED = [STATISTICS[name] for name in NAMES]
#: Sequences to pack: their queries and keys.
LENGTHS = (4, 6, 1), (5, 3, 7)


@pytest.fixture
def v2(monkeypatch: pytest.MonkeyPatch) -> str:
    return install("2.8", monkeypatch)


def install(version: str, monkeypatch: pytest.MonkeyPatch) -> str:
    module = flash_standin.package(version)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return version


class Calling(nn.Module):
    """One call of the package, with the tensors themselves as parameters."""

    def __init__(self, name: str, options: dict[str, Any], inputs: dict[str, Tensor]) -> None:
        super().__init__()
        self.name, self.options = name, options
        self.inputs = nn.ParameterDict(inputs)

    @property
    def given(self) -> dict[str, Any]:
        return {**flash_standin.DEFAULTS, **self.options, **self.inputs}

    def forward(self) -> Tensor:
        result = call(self.name, **self.options, **self.inputs)
        self.output = result[0] if self.options.get("return_softmax") else result
        self.output.retain_grad()
        return self.output


def inputs(packed: str, queries: tuple[int, ...], keys: tuple[int, ...], groups: int) -> dict[str, Tensor]:
    """Queries, keys and values, of the shapes in front of the heads, packed or not."""
    torch.manual_seed(1)
    q, k, v = (
        torch.randn(*shape, heads, DEPTH, dtype=torch.float64)
        for shape, heads in ((queries, HEADS), (keys, groups), (keys, groups))
    )
    if packed == "QKVPacked":
        return {"qkv": torch.stack([q, k, v], -3)}
    return {"q": q, "kv": torch.stack([k, v], -3)} if packed else {"q": q, "k": k, "v": v}


def starts(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def model(kind: str, packed: str, options: dict[str, Any]) -> Calling:
    """One whose queries and keys are equally many or not, as the options have it and packing allows."""
    options, packed_together = dict(options), packed == "QKVPacked"
    queries, keys = options.pop("lengths", LENGTHS if kind == "Varlen" else (SHORT, LONG))
    if packed_together:
        keys = queries
    groups = HEADS if packed_together else GROUPS
    name = f"FlashAttn{kind}{packed}Func"
    if kind != "Varlen":
        return Calling(name, options, inputs(packed, (BATCH, queries), (BATCH, keys), groups))
    if packed_together:
        options |= {"cu_seqlens": starts(queries), "max_seqlen": max(queries)}
    else:
        options |= {"cu_seqlens_q": starts(queries), "max_seqlen_q": max(queries)}
        options |= {"cu_seqlens_k": starts(keys), "max_seqlen_k": max(keys)}
    return Calling(name, options, inputs(packed, (sum(queries),), (sum(keys),), groups))


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"softmax_scale": 0.3},
    "causal": {"causal": True},
    "several outputs": {"return_softmax": True, "causal": True},
    "window": {"window_size": (2, 1)},
    "window to the left": {"window_size": (2, -1)},
    "window to the right": {"window_size": (-1, 1)},
    "causal window": {"window_size": (3, 2), "causal": True},
    "softcap": {"softcap": 0.7},
    "alibi": {"alibi_slopes": SLOPES},
    "alibi of each sequence": {"alibi_slopes": torch.stack([SLOPES, SLOPES.flip(0), 2 * SLOPES]), "causal": True},
    "everything": {"window_size": (4, 0), "softcap": 0.9, "alibi_slopes": SLOPES, "softmax_scale": 0.8, "causal": True},
}
MORE_QUERIES = {"causal, more queries": {"causal": True, "lengths": (LONG, SHORT)}}
MORE_QUERIES |= {"window, more queries": {"window_size": (1, 1), "lengths": (LONG, SHORT)}}
PACKED_ONLY = {
    "causal, an empty sequence": {"causal": True, "lengths": ((4, 0, 2), (4, 0, 5))},
    "equally long": {"causal": True, "lengths": ((4, 3, 2), (4, 3, 2))},
}


def record_of(module: Calling, loss: Callable[[Tensor], Tensor] = loss_of) -> AttentionRecord:
    with session(module) as watching:
        loss(module()).backward()
    (seen,) = watching.seen
    assert seen.reason == ""
    record: AttentionRecord = seen.result
    return record


def calls(kind: str, table: dict[str, dict[str, Any]]) -> Any:
    """Every version, packing and options that go together."""
    cases = [
        pytest.param(version, packed, options, id=f"{version} {packed or 'separate'} {name}")
        for version in flash_standin.VERSIONS
        for packed in ("", "KVPacked", "QKVPacked")
        for name, options in table.items()
        if possible(options, signatures(version).get(f"FlashAttn{kind}{packed}Func"))
    ]
    return pytest.mark.parametrize(("version", "packed", "options"), cases)


def possible(options: dict[str, Any], arguments: str | None) -> bool:
    return arguments is not None and {*options} - {"lengths"} <= {*arguments.split()}


@calls("", OPTIONS | MORE_QUERIES)
def test_batches(version: str, packed: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    install(version, monkeypatch)
    check(model("", packed, options))


@calls("Varlen", OPTIONS | PACKED_ONLY)
def test_packed_sequences(version: str, packed: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    install(version, monkeypatch)
    check(model("Varlen", packed, options))


def test_a_longest_sequence_that_is_not_there(v2: str) -> None:
    module = model("Varlen", "", {"causal": True})
    module.options |= {"max_seqlen_q": 8, "max_seqlen_k": 12}
    check(module)


def test_grouped_heads_packed_with_their_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    install("3", monkeypatch)
    qkv = torch.randn(BATCH, SHORT, HEADS + 2 * GROUPS, DEPTH, dtype=torch.float64)
    check(Calling("FlashAttnQKVPackedFunc", {"num_heads_q": HEADS}, {"qkv": qkv}))


def test_packed_sequences_are_kept_as_they_are(v2: str) -> None:
    """Padded they might not fit into the memory of all layers."""
    kept = []
    module = model("Varlen", "", {"causal": True})
    with session(module), torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        module()
    assert len(kept) == 4  # beside what the kernel keeps by itself
    own = {x.data_ptr() for x in (*module.parameters(), module.output)}
    assert {x.data_ptr() for x in kept} == own


def check(module: Calling) -> None:
    """A record against what the kernel's definition and autograd say."""
    record = record_of(module)
    given, parts = module.given, dense_parts(record)
    assert module.output.grad is not None
    sequences = split(given)
    outputs, errors = (
        x if x.ndim == 4 else x.split([len(q) for q, _, _ in sequences]) for x in (module.output, module.output.grad)
    )
    gradients = split({**given, **{name: x.grad for name, x in module.inputs.items()}})
    score_gradient = parts.dS
    if given["softcap"] > 0:
        score_gradient = parts.dS * (1 - (record.scale * parts.query @ parts.key.mT / given["softcap"]).tanh().square())
    for b, (q, k, v) in enumerate(sequences):
        queries, keys = len(q), len(k)
        here = (b, slice(None), slice(0, queries), slice(0, keys))
        _, alpha = attention(q, k, v, b, given)
        torch.testing.assert_close(parts.alpha[here], alpha, **CLOSE)
        assert torch.equal(record.error[b, :, :queries], errors[b].transpose(0, 1))
        assert torch.equal(record.output[b, :, :queries], outputs[b].transpose(0, 1))
        assert not record.error[b, :, queries:].any()
        dq, dk, dv = gradients[b]
        to_q = record.scale * torch.einsum("hts,hsd->thd", score_gradient[here], parts.key[b, :, :keys])
        to_k = record.scale * torch.einsum("hts,htd->shd", score_gradient[here], parts.query[b, :, :queries])
        torch.testing.assert_close(to_q, dq, **CLOSE)
        torch.testing.assert_close(grouped(to_k, k.shape[1]), dk, **CLOSE)
        torch.testing.assert_close(grouped(parts.dV[b, :, :keys].transpose(0, 1), k.shape[1]), dv, **CLOSE)
        assert parts.rows[b, 0].tolist() == (parts.alpha[b, 0].sum(-1) > 0).tolist()
        assert not parts.alpha[b, :, queries:].any()
        assert not parts.alpha[b, :, :, keys:].any()
    torch.testing.assert_close(parts.alpha @ parts.value, parts.output, **CLOSE)
    torch.testing.assert_close(parts.E, (parts.error * parts.output).sum(-1), **CLOSE)
    check_self_attention(record, given)
    module.zero_grad()
    report = measured(module)
    assert report.residual.max() < 1e-12
    assert not report.warnings


def grouped(x: Tensor, groups: int) -> Tensor:
    return x.unflatten(1, (groups, -1)).sum(2)


def finished(partials: list[Partial]) -> dict[str, Tensor]:
    total = combine(partials)
    return {statistic.name: finish(statistic, total) for statistic in MEASURED}


def check_self_attention(record: AttentionRecord, given: dict[str, Any]) -> None:
    same = "qkv" in given or [len(q) for q, _, _ in split(given)] == [len(k) for _, k, _ in split(given)]
    wanted: bool | None = same
    if same and "qkv" not in given and not given["causal"]:
        wanted = None
    assert record.self_attention is wanted
    packed = "cu_seqlens" in given or "cu_seqlens_q" in given
    assert (record.query_tokens is not None) is (record.key_tokens is not None) is packed


@pytest.mark.parametrize("kind", ["", "Varlen"])
def test_streamed_statistics_are_those_of_the_formulas(kind: str, v2: str) -> None:
    record = record_of(model(kind, "", OPTIONS["everything"]))
    assert_close(finished([measure(record, MEASURED)]), record, 1e-9)


def squares(output: Tensor) -> Tensor:
    return output.square().sum()


def test_packed_sequences_are_told_apart(v2: str) -> None:
    """Each statistic of the batch is made of its sequences by the statistic's own rule."""
    module = model("Varlen", "", {"causal": True, "lengths": ((4, 6, 2), (4, 6, 2))})
    alone = [
        Calling("FlashAttnFunc", {"causal": True}, {name: x[None].detach() for name, x in zip("qkv", qkv, strict=True)})
        for qkv in split(module.given)
    ]
    records = [record_of(each, squares) for each in alone]
    # The lengths of a packed batch say which tokens are real.
    told = [replace(r, key_tokens=torch.ones(1, r.shape[4], dtype=torch.bool)) for r in records]
    partials = [measure(record, MEASURED) for record in told]
    together, apart = finished([measure(record_of(module, squares), MEASURED)]), finished(partials)
    torch.testing.assert_close(together, apart, rtol=1e-9, atol=1e-12, equal_nan=True)


def test_the_same_lengths_for_queries_and_keys_are_the_same_tokens(v2: str) -> None:
    module = model("Varlen", "", {"lengths": ((4, 6, 2), (4, 6, 2))})
    assert record_of(module).self_attention is None
    module.options["cu_seqlens_k"] = module.options["cu_seqlens_q"]
    assert record_of(module).self_attention is True


# In training


def flashing(**options: Any) -> Callable[[], nn.Module]:
    def attend(attention: Attention, *qkv: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in qkv)
        rate = attention.p if attention.training else 0.0
        return call("FlashAttnFunc", q=q, k=k, v=v, dropout_p=rate, causal=True).transpose(1, 2)

    return lambda: Model(lambda: Attention(attend, heads=HEADS, groups=GROUPS, **options)).double()


def packing(attention: Attention, *qkv: Tensor) -> Tensor:
    """Every second sequence is two tokens shorter."""
    real = torch.ones(qkv[0].shape[0], qkv[0].shape[2], dtype=torch.bool)
    real[::2, -2:] = False
    q, k, v = (x.transpose(1, 2)[real] for x in qkv)
    cu = starts(tuple(real.sum(1).tolist()))
    longest = {"max_seqlen_q": int(cu.diff().max()), "max_seqlen_k": int(cu.diff().max())}
    o = call("FlashAttnVarlenFunc", q=q, k=k, v=v, cu_seqlens_q=cu, cu_seqlens_k=cu, causal=True, **longest)
    return torch.zeros_like(qkv[0].transpose(1, 2)).masked_scatter(real[..., None, None], o).transpose(1, 2)


BUILDS = {
    "batch": flashing(),
    "dropout": flashing(dropout=0.3),
    "packed": lambda: Model(lambda: Attention(packing, heads=HEADS, groups=GROUPS)).double(),
}


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS.keys())
def test_training_is_the_same(build: Callable[[], nn.Module], v2: str) -> None:
    assert_same_training(build, (tokens()[0].double(),))


def test_padding_is_known_of_packed_sequences(v2: str) -> None:
    torch.manual_seed(0)
    report = measured(BUILDS["packed"](), tokens()[0].double())
    assert not any("padding unknown" in note for note in report.notes)
    assert not report.warnings


def test_dropout_is_hidden_and_the_statistics_are_those_without_it(v2: str) -> None:
    torch.manual_seed(0)
    dropping, x = flashing(dropout=0.3)(), tokens()[0].double()
    plain = flashing()()
    plain.load_state_dict(dropping.state_dict())
    reports = [measured(each, x) for each in (dropping, plain)]
    assert "layers.0: attention dropout 0.3: statistics are those of the weights before dropout" in reports[0].notes
    assert not reports[0].warnings
    assert reports[0].residual.isnan().all()  # sum alpha b and u.o have nothing to say about each other
    torch.testing.assert_close(reports[0]["entropy"][0], reports[1]["entropy"][0], **CLOSE)
    assert reports[0]["score_grad_norm"].isfinite().all()


# What is registered, and when


@pytest.mark.parametrize("option", ["block_table", "seqused_k", "attention_chunk"])
def test_what_it_cannot_read_is_named(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install("2.8" if option == "block_table" else "3", monkeypatch)
    module = model("Varlen", "", {option: 1 if option == "attention_chunk" else torch.ones(3, 1)})
    with pytest.warns(
        AttnProbeWarning, match=f"Calling: switched off after NotImplementedError: flash-attn with {option}|"
    ):
        reports = reported(module, steps=2)
    assert not any(report.valid for report in reports)


def test_only_what_is_loaded_is_registered_and_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any(name.startswith("flash_attn") for name in sys.modules)
    before = dict(KERNELS)
    flash.register()
    assert before == KERNELS
    install("2.8", monkeypatch)
    flash.register()
    added = dict(KERNELS)
    assert sorted(kernel.__name__ for kernel in added.keys() - before.keys()) == sorted(signatures("2.8"))
    flash.register()
    assert added == KERNELS


def test_it_may_be_loaded_in_the_middle_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    (x,) = tokens()
    network = flashing()()
    with ap.AttentionProbe(network, every_n_steps=1) as probe:
        install("2.8", monkeypatch)
        with pytest.warns(AttnProbeWarning, match="FlashAttnFunc"):
            probe_step(probe, x)
        assert probe_step(probe, x).residual.max() < 1e-12


def probe_step(probe: ap.AttentionProbe, x: Tensor) -> Any:
    loss_of(probe.model(x.double())).backward()
    return probe.step()


def test_what_the_user_registered_stays(v2: str) -> None:
    module = sys.modules["flash_attn.flash_attn_interface"]
    asked = []

    def own(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> dict[str, Any]:
        asked.append(options)
        return {"query": q, "key": k, "value": v, "causal": True}

    ap.register_attention(own, layout="bthd")(module.FlashAttnFunc)
    assert measured(flashing()(), tokens()[0].double()).residual.max() < 1e-12
    assert len(asked) == 2

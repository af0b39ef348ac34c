"""Compiled models that hand out their attention: same training bit for bit, same statistics, and a word where not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnprobe as ap
from attnprobe.report import StepReport

WIDTH, HEADS, TOKENS = 16, 2, 12

pytestmark = pytest.mark.filterwarnings("ignore")  # of the compiler's own


class Attention(nn.Module):
    def __init__(self, *, written: bool = False, biased: bool = False, folded: bool = False) -> None:
        super().__init__()
        self.inputs, self.output = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.written, self.biased, self.folded = written, biased, folded
        self.num_heads = HEADS

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.inputs(x).chunk(3, -1))
        if self.written:
            out = (query @ key.transpose(-1, -2)).softmax(-1) @ value
        elif self.biased:  # three dimensions, which no fused kernel on CPU takes
            bias = torch.arange(TOKENS, dtype=x.dtype).expand(HEADS, TOKENS, TOKENS)
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        elif self.folded:
            parts = (part.flatten(0, 1) for part in (query, key, value))
            out = F.scaled_dot_product_attention(*parts).unflatten(0, query.shape[:2])
        else:
            out = F.scaled_dot_product_attention(query, key, value)
        return self.output(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), Attention(**options)
        self.mixing = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.mixing(x)


class Net(nn.Module):
    def __init__(self, blocks: int = 2, *, rounds: int = 1, **options: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(**options) for _ in range(blocks))
        self.rounds = rounds

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.rounds):
            for block in self.blocks:
                x = block(x)
        return x.square().mean()


def whole(net: Net) -> Callable[[Tensor], Tensor]:
    return torch.compile(net, fullgraph=True)


def by_block(net: Net) -> Callable[[Tensor], Tensor]:
    for block in net.blocks:
        block.compile()
    return net


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def train(
    compile: Callable[[Net], Callable[[Tensor], Tensor]], mode: str | None, *, steps: int = 4, **options: Any
) -> tuple[list[Tensor], list[StepReport]]:
    """All that training computes, and the reports of every second step."""
    torch.compiler.reset()
    torch.manual_seed(0)
    net, memory = Net(**options), ap.MemoryWriter()
    run, optimizer = compile(net), torch.optim.AdamW(net.parameters(), lr=1e-2)
    choice: Any = {"every_n_steps": 2, "writers": memory, "alarms": (), "statistics": "all"}
    probe = None if mode is None else ap.AttentionProbe(net, compiled=mode, **choice)  # type: ignore[arg-type]
    numbers: list[Tensor] = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = run(torch.randn(2, TOKENS, WIDTH))
        loss.backward()
        numbers += [loss.detach(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)]
        optimizer.step()
        if probe is not None:
            probe.step(loss)
    if probe is not None:
        probe.close()
    return [*numbers, *(p.detach() for p in net.parameters()), torch.get_rng_state()], memory.reports


def assert_same_bits(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def assert_close(ours: StepReport, theirs: StepReport) -> None:
    assert ours.valid
    assert (ours.layers, ours.notes, ours.warnings) == (theirs.layers, theirs.notes, theirs.warnings)
    for name, wanted in theirs.statistics.items():
        size = float(wanted.abs().nan_to_num().max())
        torch.testing.assert_close(ours.statistics[name], wanted, rtol=1e-5, atol=1e-5 * size, equal_nan=True, msg=name)


@pytest.mark.parametrize("compile", [whole, by_block])
def test_training_is_the_same_bit_for_bit(compile: Any, recwarn: pytest.WarningsRecorder) -> None:
    plain, _ = train(compile, None)
    ours, reports = train(compile, "tap")
    assert_same_bits(ours, plain)
    assert [report.step for report in reports] == [0, 2]
    assert all(report.valid and not report.warnings for report in reports)
    assert not any("attnprobe" in str(warning.message) for warning in recwarn)
    assert reports[0].layers == ("blocks.0.attention", "blocks.1.attention")


@pytest.mark.parametrize("options", [{}, {"blocks": 1, "rounds": 2}], ids=["two blocks", "one block used twice"])
@pytest.mark.parametrize("compile", [whole, by_block])
def test_statistics_are_those_of_the_eager_step(compile: Any, options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: x)  # compiled dropout has random numbers of its own
    (_, ours), (_, theirs) = (train(compile, mode, steps=1, **options) for mode in ("tap", "eager"))
    assert_close(ours[0], theirs[0])


def _after_the_first_call(net: Net) -> Callable[[Tensor], Tensor]:
    run = torch.compile(net)
    run(torch.randn(2, TOKENS, WIDTH)).backward()
    net.zero_grad()
    return run


def _last_block_only(net: Net) -> Callable[[Tensor], Tensor]:
    net.blocks[-1].compile()
    return net


def _first_block_only(net: Net) -> Callable[[Tensor], Tensor]:
    net.blocks[0].compile()
    return net


@pytest.mark.parametrize(
    ("compile", "options", "reason"),
    [
        (_after_the_first_call, {}, "showed itself"),
        (lambda net: torch.compile(net, backend="aot_eager"), {}, "showed itself"),
        (lambda net: net, {}, "not compiled"),
        (whole, {"written": True}, "blocks.0.attention: attention is compiled from single operations"),
        (whole, {"biased": True}, "blocks.0.attention: attention is compiled from single operations"),
        (whole, {"folded": True}, "in one dimension|from single operations"),  # by torch version
        (_last_block_only, {}, "outside of the compiled code"),
        (_first_block_only, {}, "outside of the compiled code"),
    ],
    ids=[
        "compiled before",
        "other backend",
        "not compiled",
        "written out",
        "no kernel",
        "folded",
        "last block only",
        "first block only",
    ],
)
def test_what_cannot_be_seen_is_said_and_probed_eagerly(compile: Any, options: Any, reason: str) -> None:
    with pytest.warns(ap.AttnProbeWarning, match=reason) as said:
        _, reports = train(compile, "tap", **options)
    assert sum("attnprobe" in str(warning.message) for warning in said) == 1
    first, second = reports
    assert not first.valid
    assert not first.statistics
    assert "eagerly from now on" in first.invalid
    assert second.valid
    assert second.layers == ("blocks.0.attention", "blocks.1.attention")


def test_a_closed_probe_leaves_no_trace_but_operators_that_do_nothing() -> None:
    from torch._inductor import config

    from attnprobe.capture.tap_pass import LISTENERS

    before = config.joint_custom_post_pass
    net = Net()
    run = torch.compile(net)
    first, second = (ap.AttentionProbe(net, compiled="tap") for _ in range(2))
    run(torch.randn(2, TOKENS, WIDTH)).backward()
    assert len(LISTENERS) == 2
    first.close()
    assert config.joint_custom_post_pass is not before
    second.close()
    assert config.joint_custom_post_pass is before
    assert not LISTENERS
    run(torch.randn(2, TOKENS, WIDTH)).backward()

    heard: list[str] = []
    LISTENERS.append(lambda name, *arguments: heard.append(name))
    try:
        run(torch.randn(2, TOKENS, WIDTH)).backward()
    finally:
        LISTENERS.clear()
    assert heard == ["region", "tap", "tap"]


def test_the_cache_on_disk_keeps_graphs_with_taps_apart(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.utils import counters

    from attnprobe.capture.tap_pass import LISTENERS

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    train(whole, "tap", steps=1)
    heard: list[str] = []
    LISTENERS.append(lambda name, *arguments: heard.append(name))
    try:
        train(whole, None, steps=1)
    finally:
        LISTENERS.clear()
    assert heard == []
    counters.clear()
    _, reports = train(whole, "tap", steps=1)
    assert counters["inductor"]["fxgraph_cache_hit"] or counters["aot_autograd"]["autograd_cache_hit"]
    assert reports[0].valid
    assert reports[0].layers == ("blocks.0.attention", "blocks.1.attention")


def test_a_wrong_choice_is_refused() -> None:
    with pytest.raises(ap.errors.ConfigurationError, match="'eager' or 'tap'"):
        ap.AttentionProbe(Net(), compiled="taps")  # type: ignore[arg-type]

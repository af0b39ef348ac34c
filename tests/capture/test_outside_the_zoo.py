"""Ways of writing attention, and of running it, that misled earlier versions."""

import gc
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnprobe as ap
from attnprobe.statistics.dense import dense

NAMES = ["entropy", "normalized_entropy", "logit_spread", "sink_mass", "output_norm", "dead_column_fraction"]


class WrittenOut(nn.Module):
    """One head; how the mask reaches the scores is the variant."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.how = nn.Linear(8, 24), how

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, -1)
        scores = query @ key.mT / 8**0.5
        hidden = 1 - real[0].float() if self.how == "one dimension" else 1 - real[:, None].float()
        if self.how == "alpha":
            scores = scores.add(hidden, alpha=-10000)
        elif self.how == "subtracted alpha":
            scores = scores.sub(hidden, alpha=10000)
        else:
            scores = scores + hidden * -1e4
        return scores.softmax(-1) @ value


@pytest.mark.parametrize("how", ["one dimension", "alpha", "subtracted alpha", "plain"])
def test_masks_that_leave_large_logits(how: str) -> None:
    x, real = torch.randn(2, 16, 8), (torch.arange(16) < 11).expand(2, 16)
    model = WrittenOut(how)
    report = ap.analyze(model, lambda: model(x, real).square().sum(), statistics=NAMES)
    query, key, value = model.qkv(x).detach()[:, None].chunk(3, -1)
    record = ap.AttentionRecord(
        value=value, query=query, key=key, scale=8**-0.5, mask=real[:, None, None], self_attention=True
    )
    for name in NAMES:
        torch.testing.assert_close(report[name][0], dense(record)[name], rtol=1e-4, atol=1e-5)
    assert report["logit_spread"].item() < 10


class Normed(nn.Module):
    def __init__(self, *, batch_first: bool, positions: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.positions = nn.LayerNorm(8), positions
        self.mha = nn.MultiheadAttention(8, 2, batch_first=batch_first)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        if self.positions:
            return self.mha(x + 1, x + 1, x, key_padding_mask=padding)[0]
        return self.mha(self.norm(x), self.norm(x), self.norm(x), key_padding_mask=padding)[0]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("positions", [True, False])
def test_self_attention_of_equal_tensors_is_self_attention(batch_first: bool, positions: bool) -> None:
    x = torch.randn((3, 10, 8) if batch_first else (10, 3, 8))
    padding = torch.arange(10).expand(3, 10) >= torch.tensor([[10], [7], [4]])
    model = Normed(batch_first=batch_first, positions=positions)
    full = ap.analyze(model, lambda: model(x, padding).square().sum())
    assert full["self_mass"].isfinite().all()
    # The same without the third sequence's padding rows: they must not have counted.
    shown = x.clone()
    where = padding if batch_first else padding.T
    shown[where] = 100.0
    again = ap.analyze(model, lambda: model(shown, padding)[~where].square().sum(), statistics=["entropy"])
    torch.testing.assert_close(again["entropy"], full["entropy"], rtol=1e-4, atol=1e-5)


class Projected(nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value)


def test_projected_inputs_do_not_tell_self_from_cross() -> None:
    inner, weights = Projected(), [torch.randn(8, 8, requires_grad=True) for _ in range(3)]
    x = torch.randn(2, 6, 8)
    report = ap.analyze(inner, lambda: inner(*(x @ w for w in weights)).square().sum())
    assert report["self_mass"].isnan().all()
    assert any("unknown" in note for note in report.notes)
    assert any("padding unknown" in note for note in report.notes)


def test_a_token_mask_of_the_wrong_shape_is_said() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with ap.AttentionProbe(model) as probe:
        probe.token_mask(torch.ones(2, 7))
        model(torch.randn(2, 6, 8)).sum().backward()
        with pytest.warns(ap.AttnProbeWarning, match=r"token_mask has shape \[2, 7\], which is not \[2, 6\]"):
            probe.step()


@pytest.mark.parametrize("factor", [1e-25, 1e-15, 1e15])
def test_tiny_and_huge_errors_neither_vanish_nor_overflow(factor: float) -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double()
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    names = ["score_grad_norm", "error_norm", "advantage_std", "head_importance", "advantage_max", "value_grad_norm"]
    plain = ap.analyze(model, lambda: model(x).cos().sum(), statistics=[*names, "relative_advantage_std"])
    model.float()
    scaled = ap.analyze(
        model, lambda: model(x.float()).cos().sum() * factor, statistics=[*names, "relative_advantage_std"]
    )
    for name in names:
        torch.testing.assert_close(scaled[name] / factor, plain[name], rtol=1e-3, atol=0)
    torch.testing.assert_close(scaled["relative_advantage_std"], plain["relative_advantage_std"], rtol=1e-3, atol=0)


def test_a_functional_transform_does_not_switch_the_layer_off() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    x, memory = torch.randn(2, 6, 8), ap.MemoryWriter()
    with ap.AttentionProbe(model, every_n_steps=1, writers=memory) as probe, warnings.catch_warnings():
        warnings.simplefilter("ignore", ap.AttnProbeWarning)
        for step in range(4):
            if step == 1:
                torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).sum())(parameters)
            model(x).square().sum().backward()
            probe.step()
    assert [report.valid for report in memory.reports] == [True] * 4


def test_a_trace_and_a_graph_are_possible_while_armed() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x = torch.randn(2, 6, 8)
    with ap.AttentionProbe(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, x)
        assert torch.allclose(traced(x), model(x), atol=1e-6)


def test_a_probe_that_nobody_closed_stops_watching() -> None:
    hooks = torch.nn.modules.module._global_forward_pre_hooks
    before = len(hooks)
    probe = ap.AttentionProbe(nn.TransformerEncoderLayer(8, 2, 16))
    assert len(hooks) == before + 1
    del probe
    gc.collect()
    assert len(hooks) == before


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_compiled_model_is_watched_eagerly_and_compiled_once(fullgraph: bool) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(8, 24), _Split(), nn.Linear(8, 8))
    compiled = torch.compile(model, backend=backend, fullgraph=fullgraph)
    x, memory = torch.randn(2, 6, 8), ap.MemoryWriter()
    with ap.AttentionProbe(model, every_n_steps=2, writers=memory, strict=True) as probe:
        for _ in range(5):
            compiled(x).square().sum().backward()
            probe.step()
    compiled(x)
    assert all(report.valid for report in memory.reports)
    assert memory.reports[0].layers == ("1",)
    assert len(memory.reports) == 3
    assert len(graphs) == 1

    first, second = ap.AttentionProbe(model), ap.AttentionProbe(model)
    for probe in (first, second):  # closed in the order in which they were made
        assert torch._dynamo.eval_frame._stance.stance == "force_eager"
        probe.close()
    assert torch._dynamo.eval_frame._stance.stance == "default"
    torch.compiler.reset()


class _Split(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (part.unsqueeze(1) for part in x.chunk(3, -1))
        return F.scaled_dot_product_attention(query, key, value, is_causal=True).squeeze(1)

"""Values of real models against their own projections, and the model as it was."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attnprobe as ap
from attnprobe import geometry
from attnprobe.errors import AttnProbeWarning, ConfigurationError, NoAttentionError, UnknownNameError


def _encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def test_multihead_attention() -> None:
    torch.manual_seed(0)
    attention, x = nn.MultiheadAttention(16, 4, batch_first=True), torch.randn(3, 9, 16)
    found = geometry.values_of(attention, lambda: attention(x, x, x, need_weights=False))
    assert [*found] == [f"MultiheadAttention:{i}" for i in range(4)]
    value = F.linear(x, *(p.chunk(3)[2] for p in (attention.in_proj_weight, attention.in_proj_bias)))
    weights = attention(x, x, x, average_attn_weights=False)[1]
    labels = torch.arange(27).view(3, 9) % 4
    for i, head in enumerate(found.values()):
        assert head.heads == (i,)
        torch.testing.assert_close(head.values, value[..., 4 * i : 4 * i + 4].flatten(0, 1).detach())
        assert head.positions.tolist() == [*range(9)] * 3
        assert head.sequences.tolist() == [b for b in range(3) for _ in range(9)]
        expected = weights[:, i] @ F.one_hot(labels).float()
        torch.testing.assert_close(geometry.who_uses(head.record, labels)[:, 0], expected)
        geometry.prototypes(head.values)


@pytest.mark.parametrize("eager", [False, True])
def test_padded_llama_with_grouped_heads(eager: bool) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=30,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="eager" if eager else "sdpa",
    )
    model = transformers.LlamaForCausalLM(config).eval()
    batch = {"input_ids": torch.randint(0, 30, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    batch["attention_mask"][1, 5:] = 0
    found = geometry.values_of(model, lambda: model(**batch), layers="*0.self_attn", token_mask=batch["attention_mask"])
    assert [*found] == ["model.layers.0.self_attn:0-1", "model.layers.0.self_attn:2-3"]
    hidden = []
    attention = model.model.layers[0].self_attn
    attention.v_proj.register_forward_hook(lambda module, args, output: hidden.append(output.detach()))
    model.config._attn_implementation = "eager"
    weights = model(**batch, output_attentions=True).attentions[0]
    real = batch["attention_mask"].bool()
    labels = torch.randint(0, 3, (2, 7))
    for group, head in enumerate(found.values()):
        assert head.heads == (2 * group, 2 * group + 1)
        assert torch.equal(head.tokens, real)
        torch.testing.assert_close(head.values, hidden[0].view(2, 7, 2, 8)[:, :, group][real])
        assert head.record.shape == (2, 2, 1, 7, 7)
        shares = geometry.who_uses(head.record, labels)
        expected = weights[:, 2 * group : 2 * group + 2] @ F.one_hot(labels)[:, None].float()
        counted = real[:, None].expand(-1, 2, -1)
        torch.testing.assert_close(shares[counted], expected[counted].detach())
        assert shares[~counted].isnan().all()


def test_gpt2_and_its_backward_leave_everything_as_it_was() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=30, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    torch.manual_seed(0)
    model, ids = transformers.GPT2LMHeadModel(config).train(), torch.randint(0, 30, (2, 9))
    model(ids, labels=ids).loss.backward()
    before = [p.grad.clone() for p in model.parameters()]
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()

    def closure() -> None:
        model.transformer.h[0].eval()
        model(ids, labels=ids).loss.backward()

    found = geometry.values_of(model, closure)
    assert [*found] == [f"transformer.h.{layer}.attn:{head}" for layer in range(2) for head in range(2)]
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(model.parameters(), before, strict=True))
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in model.modules())


class _Repeated(nn.Module):
    """Attention of six query heads whose values, or keys as well, were repeated."""

    def forward(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(torch.ones(1, 6, 4, 3), k, v)


def test_only_what_is_repeated_is_shared() -> None:
    model, three, two = _Repeated(), torch.randn(1, 3, 4, 3), torch.randn(1, 2, 4, 3)
    whole = torch.randn(1, 6, 4, 3)

    def names(k: torch.Tensor, v: torch.Tensor) -> list[str]:
        return [name.partition(":")[2] for name in geometry.values_of(model, lambda: model(k, v))]

    each = [*"012345"]
    assert names(three.repeat_interleave(2, 1), three.repeat_interleave(2, 1)) == ["0-1", "2-3", "4-5"]
    assert names(two.repeat_interleave(3, 1), two.repeat_interleave(3, 1)) == ["0-2", "3-5"]
    assert names(whole[:, :1].expand(1, 6, 4, 3), whole[:, :1].expand(1, 6, 4, 3)) == ["0-5"]
    assert names(whole, three.repeat_interleave(2, 1)) == each
    uneven = torch.cat([whole[:, :1], whole[:, :5]], 1)
    assert names(uneven, uneven) == each
    assert names(torch.zeros(1, 6, 4, 3), torch.zeros(1, 6, 4, 3)) == each


def test_agrees_with_the_pictures_of_analyze() -> None:
    model, x = _encoder(), torch.randn(1, 40, 16)
    report = ap.analyze(model, lambda: model(x).square().mean(), maps="*")
    found = geometry.values_of(model.eval(), lambda: model(x))
    assert len(report.maps) == len(found) == 8
    for picture in report.maps:
        head = found[f"{picture.layer}:{picture.head}"]
        assert tuple(head.positions.tolist()) == picture.positions
        torch.testing.assert_close(head.values, picture.values)


def test_no_more_than_the_limit_and_half_precision() -> None:
    model, x = _encoder().bfloat16(), torch.randn(2, 30, 16).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = geometry.values_of(model, lambda: model(x), layers="layers.1.*", limit=7)
    assert len(found) == 4
    for head in found.values():
        assert head.values.shape == (7, 4)
        assert head.values.dtype == torch.float32
        where = 30 * head.sequences + head.positions
        assert where.tolist() == np.linspace(0, 59, 7).round().tolist()
        assert geometry.who_uses(head.record, torch.zeros(2, 30, dtype=torch.long)).shape == (2, 1, 30, 1)


class _Written(nn.Module):
    """Writes over what its attention was computed from, and is called twice."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.view(1, 2, 5, 4).clone() for _ in range(3))
        out = F.scaled_dot_product_attention(q, k, v)
        for tensor in (q, k, v):
            tensor.zero_()
        return out + F.scaled_dot_product_attention(2 * x.view(1, 2, 5, 4), k, k)


def test_calls_of_one_module_and_values_that_are_written_over() -> None:
    model, x = _Written(), torch.randn(40)
    found = geometry.values_of(model, lambda: [model(x), model(-x)])
    assert [*found] == [f"_Written#{call}:{head}" for call in range(2) for head in range(2)]
    torch.testing.assert_close(found["_Written#0:1"].values, x.view(2, 5, 4)[1])
    assert found["_Written#0:0"].record.query.abs().sum() > 0
    assert not found["_Written#1:0"].values.any()


def test_a_running_probe_sees_nothing_of_it() -> None:
    model, x, memory = _encoder(), torch.randn(2, 6, 16), ap.MemoryWriter()
    with ap.AttentionProbe(model, every_n_steps=1, writers=memory) as probe:
        loss = model(x).square().mean()
        geometry.values_of(model, lambda: model(torch.randn(2, 11, 16)))
        loss.backward()
        probe.step(loss)
    assert memory.reports[0].valid
    assert not memory.reports[0].warnings


def test_errors() -> None:
    model, x = _encoder(), torch.randn(2, 6, 16)
    with pytest.raises(UnknownNameError, match="layers pattern"):
        geometry.values_of(model, lambda: model(x), layers="nothing")
    with pytest.raises(ConfigurationError, match="limit"):
        geometry.values_of(model, lambda: model(x), limit=0)
    with pytest.raises(ConfigurationError, match=r"token_mask has shape \[2, 5\]"):
        geometry.values_of(model, lambda: model(x), token_mask=torch.ones(2, 5))
    with pytest.raises(NoAttentionError, match="no softmax attention was seen"):
        geometry.values_of(model, lambda: None)
    with pytest.raises(ZeroDivisionError):
        geometry.values_of(model, lambda: 1 / 0)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of torch, about vmap
def test_what_cannot_be_looked_into_is_named() -> None:
    model, x = _encoder(), torch.randn(2, 6, 16)
    model.lost = _Transformed()
    with pytest.warns(AttnProbeWarning, match=r"lost: it ran inside a torch\.func transform"):
        found = geometry.values_of(model, lambda: (model(x), model.lost(x)))
    assert len(found) == 8
    with pytest.raises(NoAttentionError, match="lost: it ran inside"):
        geometry.values_of(model, lambda: model.lost(x))


class _Transformed(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.func.vmap(lambda y: F.scaled_dot_product_attention(y[None], y[None], y[None]))(x)

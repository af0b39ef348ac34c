"""Attention to later tokens and to padding, and hidden tokens, of a model with a token mask."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import attnprobe as ap
from tests.probe.models import WIDTH, batch, loss_of, net
from tests.probe.test_scopes import MASK

NAMES = ["future_mass", "padding_mass", "hidden_tokens", "output_variation"]
X = batch()
LENGTH = X.shape[1]
REAL = MASK.bool()
CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
ONE_HIDDEN = CAUSAL & (torch.arange(LENGTH) != 1) | torch.eye(LENGTH).bool()
#: What the model hands to the kernel, and who sees whom by it.
CALLS = {
    "no mask": ({}, CAUSAL | True),
    "is_causal": ({"is_causal": True}, CAUSAL),
    "padding hidden": ({"attn_mask": REAL[:, None, None]}, REAL[:, None, None]),
    "padding hidden, causal": ({"attn_mask": REAL[:, None, None] & CAUSAL}, REAL[:, None, None] & CAUSAL),
    "padding added, causal": (
        {"attn_mask": torch.zeros(4, 1, LENGTH, LENGTH).masked_fill(~(REAL[:, None, None] & CAUSAL), -1e9)},
        REAL[:, None, None] & CAUSAL,
    ),
    "a token hidden": ({"attn_mask": ONE_HIDDEN}, ONE_HIDDEN),
}


def attending(options):
    """A model whose layers call SDPA with the options."""
    model = net()
    for layer in model.layers:
        layer.attend = lambda query, key, value: F.scaled_dot_product_attention(query, key, value, **options)
    return model


def expected(layer, visible):
    """Pair by pair, of the layer's two heads on X, from its weights."""
    query, key, value = (t.double().unflatten(-1, (2, -1)).transpose(1, 2) for t in layer.qkv(X).chunk(3, -1))
    visible = visible.expand(4, 2, LENGTH, LENGTH)
    alpha = (query @ key.mT / (WIDTH // 2) ** 0.5).masked_fill(~visible, -torch.inf).softmax(-1)
    rows, i = REAL[:, None].expand(4, 2, -1), torch.arange(LENGTH)
    choosing = rows & (visible.sum(-1) >= 2)
    found = {name: [] for name in NAMES}
    for h in range(2):
        found["future_mass"].append(alpha.triu(1).sum(-1)[:, h][choosing[:, h]].mean())
        found["padding_mass"].append((alpha * ~REAL[:, None, None]).sum(-1)[:, h][rows[:, h]].mean())
        readers = (visible[:, h] & REAL[:, :, None] & (i[:, None] != i)).any(1)
        counted = REAL & (i < REAL.sum(1, keepdim=True) - 1)
        found["hidden_tokens"].append((~readers)[counted].double().mean())
        output = (alpha @ value)[:, h][REAL]
        found["output_variation"].append((output - output.mean(0)).square().sum() / output.square().sum())
    return {name: torch.stack(values) for name, values in found.items()}


def report_of(model, mask=MASK, forward_only=False, **options):
    with ap.AttentionProbe(model, every_n_steps=1, statistics=["core", *NAMES], **options) as probe:
        if forward_only:
            return probe.evaluate(lambda: (probe.token_mask(mask), model(X)))
        probe.token_mask(mask)
        loss = loss_of(model, X)
        loss.backward()
        return probe.step(loss)


@pytest.mark.parametrize("forward_only", [False, True])
@pytest.mark.parametrize("call", CALLS)
@torch.no_grad()
def test_what_the_model_s_masks_let_through(call, forward_only):
    options, visible = CALLS[call]
    model = attending(options)
    with torch.enable_grad():
        report = report_of(model, forward_only=forward_only)
    assert report.valid
    for name, values in expected(model.layers[0], visible).items():
        torch.testing.assert_close(report[name][0], values, rtol=1e-5, atol=1e-7, msg=name)
        assert torch.equal(report[name][0] == 0, values == 0), name
    assert bool((report["future_mass"] == 0).all()) == (call not in ("no mask", "padding hidden"))
    assert bool((report["padding_mass"] == 0).all()) == (call != "no mask")  # padding comes last
    assert bool((report["hidden_tokens"] > 0).all()) == (call == "a token hidden")


def test_without_a_token_mask_only_later_tokens_are_known():
    report = report_of(net(), mask=None)
    assert (report["future_mass"] > 0).all()
    assert report["padding_mass"].isnan().all()
    assert report["hidden_tokens"].isnan().all()


def test_of_some_heads_and_sequences():
    whole, heads = report_of(net()), report_of(net(), heads=[1])
    first = report_of(net(), sequences=1)
    for name in NAMES:
        torch.testing.assert_close(heads[name][:, 1], whole[name][:, 1])
        assert heads[name][:, 0].isnan().all()
    assert (first["padding_mass"] == 0).all()  # the first sequence has none
    assert (whole["padding_mass"] > 0).all()

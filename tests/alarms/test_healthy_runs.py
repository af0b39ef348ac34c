"""Patterns that look alarming and are not: fresh models, sharp heads, sinks."""

from dataclasses import replace

import pytest
import torch

from attnprobe.alarms import AlarmEngine, MaskViolation, resolve
from attnprobe.report import StepReport
from tests.alarms.reports import HEALTHY, NAN, feed

RULES = resolve(["all", MaskViolation(causal=True)])

T = 64
ROWS, COLUMNS = torch.arange(T)[:, None], torch.arange(T)[None, :]


def run(scores, losses):
    """Reports every 10 steps of a model with these causal scores ``[L, H, T, T]``, by dense formulas."""
    visible = ROWS >= COLUMNS
    keys = visible.sum(-1).double()
    alpha = scores.double().masked_fill(~visible, -torch.inf).softmax(-1)
    mean = scores.double().masked_fill(~visible, 0).sum(-1) / keys
    spread = scores.double().masked_fill(~visible, -torch.inf).amax(-1) - mean
    entropy = torch.special.entr(alpha).sum(-1) / keys.log()
    usage = alpha.sum(-2) / (visible / keys[:, None]).sum(0)
    dead = (usage < 0.02).all(1)[:, visible.sum(0) >= 8]
    layers, heads = scores.shape[:2]
    report = StepReport(
        step=0,
        layers=tuple(f"h.{index}" for index in range(layers)),
        heads=(heads,) * layers,
        statistics={name: torch.full((layers, heads), value).double() for name, value in HEALTHY.items()}
        | {
            "logit_spread": spread.amax(-1),
            "concentration": alpha.square().sum(-1)[..., 1:].mean(-1),
            "sink_mass": alpha[..., 1:, 0].mean(-1),
            "future_mass": (alpha * (COLUMNS > ROWS)).sum(-1).mean(-1),
        },
        layer={"shared_dead_columns": dead.double().mean(-1), "entropy_8": entropy[..., 7:].mean((1, 2))},
    )
    return [replace(report, step=10 * index, loss=loss) for index, loss in enumerate(losses)]


def noise(scale):
    return scale * torch.randn(2, 2, T, T, generator=torch.Generator().manual_seed(0))


def previous_token():
    return noise(0.5) + 30.0 * (COLUMNS == ROWS - 1)


def first_token_copy():
    return noise(0.5) + torch.tensor([0.0, 30.0])[None, :, None, None] * (COLUMNS == 0)


def sinks_everywhere():
    return noise(0.5) + 5.0 * (COLUMNS == 0)


PATTERNS = {
    "fresh": lambda: noise(0.1),
    "previous token": previous_token,
    "first-token copy": first_token_copy,
    "sinks": sinks_everywhere,
    "mixed": lambda: torch.stack([previous_token()[0], noise(0.1)[0]]),
}


def losses(kind, probes):
    rng = torch.Generator().manual_seed(1)
    jitter = 0.02 * torch.randn(probes, generator=rng)
    progress = torch.linspace(0, 8, probes)
    curve = {"learning": 0.3 + 2 * torch.exp(-progress / 4), "converged": 0.3 + 2 * torch.exp(-2 * progress)}
    return [NAN] * probes if kind == "unknown" else (curve[kind] + jitter).tolist()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("loss", ["learning", "converged", "unknown"])
@pytest.mark.parametrize("uninformed", [None, 2.0])
def test_healthy_runs_raise_no_alarm(pattern, loss, uninformed):
    engine = AlarmEngine(RULES, uninformed_loss=uninformed)
    reports = run(PATTERNS[pattern](), losses(loss, 40))
    assert [alarms for alarms in feed(engine, reports) if alarms] == []


def test_near_uniform_attention_is_silent_before_the_warm_up_is_over():
    engine = AlarmEngine(RULES, uninformed_loss=2.0)
    reports = run(noise(0.1), [2.3] * 20)
    assert [alarms for alarms in feed(engine, reports) if alarms] == []


def test_the_same_sharp_heads_with_a_stuck_loss_are_a_collapse():
    engine = AlarmEngine(RULES, uninformed_loss=2.0)
    reports = run(previous_token(), [2.3] * 20)
    assert {alarm.name for alarms in feed(engine, reports) for alarm in alarms} == {"attention_collapse"}

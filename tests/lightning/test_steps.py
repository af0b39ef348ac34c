"""What a step is: accumulation, several optimizers, validation, skipped steps, precision."""

from __future__ import annotations

import math
from importlib import import_module

import pytest
import torch

import attnprobe as ap
from tests.global_state import global_state
from tests.lightning.training import Run, loader, module_class
from tests.probe.models import batches, net


def test_the_axis_is_the_global_step_and_the_loss_that_of_the_step(package):
    run = Run(package, max_epochs=2).fit()
    assert run.steps == [*range(16)] == [*range(run.trainer.global_step)]
    assert [report.loss for report in run.reports] == pytest.approx(run.module.losses, rel=1e-6)
    assert run.reports[0].layers == ("net.layers.0", "net.layers.1")
    assert all(report.valid and not report.warnings for report in run.reports)


def test_micro_batches_are_one_step(package):
    run = Run(package, accumulate_grad_batches=3, max_epochs=2, monitor={"statistics": "all"})
    torch.manual_seed(1)
    run.module.net.norm = torch.nn.Identity()  # mixes the sequences of a micro-batch
    parts = [*batches(3)]
    expected = ap.analyze(run.module, lambda: sum(run.module.net(x).square().mean() for x in parts) / 3)
    run.fit()
    assert run.steps == [*range(6)]  # windows of 3, 3 and 2 batches, twice
    for name, values in run.reports[0].statistics.items():
        torch.testing.assert_close(values, expected[name], rtol=1e-4, atol=1e-6, equal_nan=True, msg=name)
    losses = run.module.losses
    windows = [losses[i:j] for i, j in [(0, 3), (3, 6), (6, 8), (8, 11), (11, 14), (14, 16)]]
    assert [report.loss for report in run.reports] == pytest.approx([sum(w) / len(w) for w in windows], rel=1e-6)


@pytest.mark.parametrize("every", [1, 3])
def test_every_n_counts_optimizer_steps(package, every):
    run = Run(package, every=every, accumulate_grad_batches=2, max_epochs=3).fit()
    assert run.steps == [*range(0, 12, every)]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_validation_in_between_changes_nothing(package, accumulate):
    class Module(module_class(package)):
        def validation_step(self, batch, index):
            states.append(global_state())
            super().validation_step(batch, index)

    def fit(module, **options):
        torch.manual_seed(0)
        return Run(package, module(), accumulate_grad_batches=accumulate, **options).fit().reports

    before, states = global_state(), []
    plain = fit(module_class(package))
    validated = fit(Module, validation=loader(2), val_check_interval=2, num_sanity_val_steps=2)
    assert len(states) == 2 + 4 * 2
    assert all(state["modes"] == before["modes"] for state in states)
    if accumulate == 1:  # with accumulation the step under way goes on afterwards
        assert all({**state, "grad": True} == before for state in states)
    assert [r.step for r in plain] == [r.step for r in validated]
    for a, b in zip(plain, validated, strict=True):
        assert torch.equal(a["error_norm"], b["error_norm"])
        assert a.loss == b.loss


def two_optimizers(package):
    class Module(module_class(package)):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.critic = net("softmax", seed=1)

        def training_step(self, batch, index):
            for optimizer, part in zip(self.optimizers(), (self.net, self.critic), strict=True):
                optimizer.zero_grad()
                loss = part(batch).square().mean()
                self.manual_backward(loss)
                optimizer.step()
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return [torch.optim.SGD(part.parameters(), 0.01) for part in (self.net, self.critic)]

    return Module()


@pytest.mark.parametrize("every", [1, 3])
def test_two_optimizers_make_one_step_of_a_batch(package, every):
    run = Run(package, two_optimizers(package), every=every).fit()
    assert run.steps == [*range(0, 16, 2 * every)]
    names = [f"{part}.layers.{index}" for part in ("net", "critic") for index in range(2)]
    for report in run.reports:
        assert report.valid
        assert report.layers == tuple(names)
        assert report["error_norm"].isfinite().all()
    assert [r.loss for r in run.reports] == pytest.approx(run.module.losses[::every], rel=1e-6)


def test_accumulation_by_hand(package):
    class Module(module_class(package)):
        automatic_optimization = False

        def training_step(self, batch, index):
            loss = self.net(batch).square().mean()
            self.losses.append(loss.item())
            self.manual_backward(loss)
            if index % 4 == 3:
                self.optimizers().step()
                self.optimizers().zero_grad()
            return {"loss": loss, "more": 1}

    run = Run(package, Module()).fit()
    assert run.steps == [0, 1]
    losses = run.module.losses
    assert [r.loss for r in run.reports] == pytest.approx([sum(losses[:4]) / 4, sum(losses[4:]) / 4], rel=1e-6)


def test_a_training_step_may_return_a_dict(package):
    class Module(module_class(package)):
        def training_step(self, batch, index):
            return {"loss": super().training_step(batch, index), "extra": "text"}

    run = Run(package, Module()).fit()
    assert [r.loss for r in run.reports] == pytest.approx(run.module.losses, rel=1e-6)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_training_step_may_return_none(package):
    class Module(module_class(package)):
        def training_step(self, batch, index):
            loss = super().training_step(batch, index)
            return None if index in (2, 3) else loss

    run = Run(package, Module())
    with pytest.warns(ap.AttnProbeWarning) as told:
        run.fit()
    assert len([w for w in told if "no backward reached any attention call" in str(w.message)]) == 1
    assert [report.valid for report in run.reports] == [index not in (2, 3) for index in range(8)]
    assert all(math.isnan(report.loss) != report.valid for report in run.reports)


def test_bf16_mixed(package):
    run = Run(package, precision="bf16-mixed", monitor={"statistics": "all"}).fit()
    exact = Run(package, monitor={"statistics": "all"}).fit()
    for mixed, full in zip(run.reports, exact.reports, strict=True):
        assert mixed.valid
        assert not mixed.warnings
        torch.testing.assert_close(mixed["entropy"], full["entropy"], rtol=0.01, atol=0)
        torch.testing.assert_close(mixed["error_norm"], full["error_norm"], rtol=0.05, atol=0)


def half_precision(package, scaler):
    plugins = import_module(f"{package.__name__}.plugins")
    return {"plugins": [plugins.MixedPrecision("16-mixed", "cpu", scaler)]}


def test_loss_scaling(package):
    scaled = Run(package, **half_precision(package, torch.amp.GradScaler("cpu", init_scale=2.0**10))).fit()
    exact = Run(package).fit()
    assert all(report.valid for report in scaled.reports)
    for a, b in zip(scaled.reports, exact.reports, strict=True):
        torch.testing.assert_close(a["error_norm"], b["error_norm"], rtol=0.02, atol=0)


def test_a_step_that_the_scaler_skips(package):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100, backoff_factor=2.0**-90)
    run = Run(package, **half_precision(package, scaler), monitor={"strict": True}).fit()
    assert [report.invalid for report in run.reports] == ["the GradScaler skipped this step"] + [""] * 7
    assert not any(report.alarms for report in run.reports)

"""ValueSchedule: attached from the first batch on, gone in the end, and known again when training resumes."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader, TensorDataset

from attnprobe.errors import AttnProbeWarning, ConfigurationError, ScheduleError
from attnprobe.lightning import AttentionMonitor, ValueSchedule
from tests.lightning.training import QUIET
from tests.schedules.fused import Last, Multihead, PerHead, Split, Stack, batch


def confirm(module: Any, data: Any) -> Tensor:
    return module(data[0])


@cache
def module_class(package: ModuleType) -> Any:
    class Module(package.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self, *kinds: type, split: bool = False, manual: bool = False, two: bool = False) -> None:
            super().__init__()
            self.net: Any = Stack(*kinds)
            self.separate, self.automatic_optimization = split, not manual
            self.two = two
            if split:
                self.net = Split(self.net, self.net.roles)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, data: list[Tensor], index: int) -> Tensor:
            loss = nn.functional.cross_entropy(self(data[0]), data[1])
            if not self.automatic_optimization:
                every = self.optimizers()
                every = every if isinstance(every, list) else [every]
                for each in every:
                    each.zero_grad()
                self.manual_backward(loss)
                for each in every:
                    each.step()
            return loss

        def configure_optimizers(self) -> Any:
            groups = self.net.groups(0.01, 10.0) if self.separate else self.parameters()
            if self.two:
                return [optim.SGD(self.net.layers.parameters(), 0.01), optim.SGD(self.net.head.parameters(), 0.01)]
            optimizer = optim.AdamW(groups, lr=0.01)
            return [optimizer], [optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]

    return Module


def data() -> Any:
    return DataLoader(TensorDataset(*batch(0)), batch_size=2)


def fit(package: ModuleType, module: Any, *callbacks: Any, checkpoint: Any = None, **options: Any) -> Any:
    trainer = package.Trainer(callbacks=[*callbacks], log_every_n_steps=1, **QUIET | {"max_epochs": 5} | options)
    trainer.fit(module, data(), **({"ckpt_path": checkpoint, "weights_only": False} if checkpoint else {}))
    return trainer


@pytest.mark.parametrize("manual", [False, True])
def test_equal_to_split_weights(package: ModuleType, manual: bool) -> None:
    fused, split = (module_class(package)(Last, PerHead, split=split, manual=manual) for split in (False, True))
    options = {} if manual else {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2}
    callback = ValueSchedule(confirm=confirm)
    trainer = fit(package, fused, callback, **options)
    fit(package, split, **options)
    assert max(split.net.distances(fused.net).values()) < 1e-12
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks
    assert len(callback.schedule.names) == 4


def test_resumed(package: ModuleType, tmp_path: Path) -> None:
    kinds = (Last, PerHead)
    straight = module_class(package)(*kinds)
    fit(package, straight, ValueSchedule(confirm=confirm), max_epochs=4)
    first = module_class(package)(*kinds)
    path = tmp_path / "half.ckpt"
    fit(package, first, ValueSchedule(confirm=confirm), max_epochs=2).save_checkpoint(path)
    second = module_class(package)(*kinds)
    fit(package, second, ValueSchedule(confirm=confirm), checkpoint=path, max_epochs=4)
    assert all(torch.equal(p, q) for p, q in zip(second.parameters(), straight.parameters(), strict=True))
    with pytest.warns(AttnProbeWarning, match=r"multiplier 10\.0; from here on 3\.0 is in force"):
        fit(package, module_class(package)(*kinds), ValueSchedule(3.0, confirm=confirm), checkpoint=path, max_epochs=3)
    only = ValueSchedule(confirm=confirm, parameters="*.c_attn.*")
    with pytest.warns(AttnProbeWarning, match="other value weights"):
        fit(package, module_class(package)(*kinds), only, checkpoint=path, max_epochs=3)


def test_a_checkpoint_without_a_schedule(package: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "plain.ckpt"
    fit(package, module_class(package)(Multihead), max_epochs=1).save_checkpoint(path)
    callback = ValueSchedule()  # torch's own needs no confirmation
    fit(package, module_class(package)(Multihead), callback, checkpoint=path, max_epochs=2)
    assert callback.state_dict()["names"] == [
        "net.layers.0.attention.in_proj_weight[16:24]",
        "net.layers.0.attention.in_proj_bias[16:24]",
    ]


def test_of_two_optimizers_the_one_with_values(package: ModuleType) -> None:
    fast, plain, start = (module_class(package)(Last, manual=True, two=True) for _ in range(3))
    fit(package, fast, ValueSchedule(confirm=confirm), max_steps=2)  # one of each optimizer
    fit(package, plain, max_steps=2)
    old, slow = (dict(module.named_parameters()) for module in (start, plain))
    for name, p in fast.named_parameters():
        values = slice(16, 24) if "c_attn" in name else slice(0)
        others = torch.ones(p.shape[-1], dtype=torch.bool)
        others[values] = False
        assert torch.equal(p[..., others], slow[name][..., others])
        step, plain_step = ((new - old[name])[..., values] for new in (p, slow[name]))
        torch.testing.assert_close(step, 10 * plain_step, rtol=1e-9, atol=1e-15)
        assert "c_attn" not in name or plain_step.abs().max() > 1e-6


def test_beside_a_monitor(package: ModuleType) -> None:
    modules = [module_class(package)(Last) for _ in range(2)]
    fit(package, modules[0], AttentionMonitor(1, action="record"), ValueSchedule(confirm=confirm))
    fit(package, modules[1], ValueSchedule(confirm=confirm))
    assert all(torch.equal(p, q) for p, q in zip(modules[0].parameters(), modules[1].parameters(), strict=True))


def test_refusals_leave_nothing_behind(package: ModuleType) -> None:
    module = module_class(package)(Last)
    with pytest.raises(ScheduleError, match="Pass confirm="):
        fit(package, module, ValueSchedule())
    with pytest.raises(ConfigurationError, match="multiplier"):
        ValueSchedule(0)
    with pytest.raises(ConfigurationError, match=r"confirm must be a function.*module\(batch\[0\]\)"):
        ValueSchedule(confirm=batch(0))  # type: ignore[arg-type]

    class Fails(package.Callback):  # type: ignore[name-defined,misc]
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            self.optimizer = trainer.optimizers[0]
            assert self.optimizer._optimizer_step_pre_hooks
            raise RuntimeError("stop")

    fails = Fails()
    with pytest.raises(RuntimeError, match="stop"):
        fit(package, module, ValueSchedule(confirm=confirm), fails)
    assert not fails.optimizer._optimizer_step_pre_hooks

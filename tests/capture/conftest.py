"""Settings of the capture's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn.modules import module
from torch.overrides import _get_current_function_mode_stack


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Thousands of small operations: on a busy machine threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def torch_state() -> tuple[object, ...]:
    """Everything global that a probe touches while it watches."""
    hooks = (
        module._global_forward_hooks,
        module._global_forward_pre_hooks,
        module._global_forward_hooks_always_called,
        module._global_forward_hooks_with_kwargs,
        module._global_backward_hooks,
        module._global_backward_pre_hooks,
    )
    return (*map(dict, hooks), _get_current_function_mode_stack())


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    before = torch_state()
    yield
    assert torch_state() == before

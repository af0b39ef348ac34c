"""What of torch's global state a probe could leave behind."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.modules import module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


def global_state() -> dict[str, Any]:
    """Hooks by their numbers, which are never used twice, modes by their identity, and the gradient mode."""
    tables = {name: table for name, table in vars(module).items() if name.startswith("_global_")}
    hooks = {name: list(table) for name, table in tables.items() if "hooks" in name}
    modes = [*map(id, _get_current_function_mode_stack())], [*map(id, _get_current_dispatch_mode_stack())]
    return hooks | {"modes": modes, "grad": torch.is_grad_enabled()}

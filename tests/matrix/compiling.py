"""Models under torch.compile, with a backend that counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._dynamo.backends.registry import lookup_backend
from torch._inductor import config as inductor

from tests.matrix.variant import Variant


class Backend:
    """One of torch's backends; knows how many graphs it compiled and how often they ran."""

    def __init__(self, name: str) -> None:
        self.name, self.graphs, self.runs = name, 0, 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any], **options: Any) -> Callable[..., Any]:
        self.graphs += 1
        with inductor.patch(compile_threads=1):  # its pool of processes is not for several models in one
            compiled = lookup_backend(self.name)(graph, inputs, **options)

        def run(*args: Any) -> Any:
            self.runs += 1
            return compiled(*args)

        return run

    def whole(self, variant: Variant, model: nn.Module) -> Any:
        return torch.compile(model, backend=self)

    def in_one_graph(self, variant: Variant, model: nn.Module) -> Any:
        return torch.compile(model, backend=self, fullgraph=True)

    def in_place(self, variant: Variant, model: nn.Module) -> nn.Module:
        model.compile(backend=self)
        return model

    def each_block(self, variant: Variant, model: nn.Module) -> nn.Module:
        """Every module that is called of the outermost lists of modules."""
        done: set[nn.Module] = set()
        for blocks in [module for module in model.modules() if isinstance(module, nn.ModuleList | nn.Sequential)]:
            for block in blocks:
                if block not in done and not isinstance(block, nn.ModuleList | None):  # which nobody calls
                    block.compile(backend=self)
                    done.update(block.modules())
        return model

    def later(self, model: nn.Module) -> Any:
        return torch.compile(model, backend=self)

"""Which module's attention a compiled backward pass is in, and what else there is in the autograd graph.

A graph names modules as seen from where it was compiled, and blocks that were compiled one by one share a graph. The
parameters that the backward pass, as a node of the autograd graph, leads to tell them apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from attnprobe.capture.modules import module_names

_WRAPPERS = {"_modules", "_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_ROOT = re.compile(r"^[LG]\[['\"]\w+['\"]\]")
_ITEM = re.compile(r"\[['\"]?([^\]'\"]*)['\"]?\]")
_NEAR = 6  # nodes between the softmax and the product with values: casts, dropout, reshapes


class Names:
    """The modules of a watched model by what a graph says about them."""

    def __init__(self, model: nn.Module) -> None:
        names = module_names(model)
        self.root = names[id(model)]
        self.modules = {"" if module is model else names[id(module)]: module for module in model.modules()}
        self.known = {id(parameter) for parameter in model.parameters()}
        self._below = {
            name: {id(parameter) for parameter in module.parameters() if parameter.requires_grad}
            for name, module in self.modules.items()
        }

    def resolve(self, site: str, reached: set[int]) -> tuple[str, bool] | None:
        """Name of the module, and whether the compiled function got the whole model; None where several come into
        question.

        Args:
            site: ``class:path`` as the graph has it.
            reached: ids of the parameters that the backward pass leads to.
        """
        kind, _, path = site.partition(":")
        parts = [part for part in _ITEM.sub(r".\1", _ROOT.sub("", path)).split(".") if part and part not in _WRAPPERS]
        for start in range(len(parts) + 1):  # the path may begin with how the function got at the model
            ending = parts[start:]
            found = [name for name in self.modules if self._fits(name, kind, ending) and self._near(name) & reached]
            if len(found) == 1:
                return found[0] or self.root, start == 0 and _parts(found[0]) == parts
            if found:
                break
        return None

    def _fits(self, name: str, kind: str, ending: list[str]) -> bool:
        of = type(self.modules[name])
        parts = _parts(name)
        return f"{of.__module__}.{of.__qualname__}" == kind and parts[len(parts) - len(ending) :] == ending

    def _near(self, name: str) -> set[int]:
        """The trainable parameters of a module, or of the closest one around it that has any."""
        while name and not self._below[name]:
            name = name.rpartition(".")[0]
        return self._below[name]


def _parts(name: str) -> list[str]:
    return name.split(".") if name else []


def reached_by(node: Any) -> set[int]:
    """Ids of the parameters that a node of the autograd graph hands its gradients to."""
    leaves = (getattr(other, "variable", None) for other in _next(node))
    return {id(leaf) for leaf in leaves if isinstance(leaf, nn.Parameter)}


def survey(node: Any) -> tuple[set[int], bool]:
    """The compiled backward passes from here on, by sequence number, and whether attention runs outside of them."""
    compiled, attention = set(), False
    todo, seen = [node], {node}
    while todo:
        current = todo.pop()
        name = current.name()
        if name == "CompiledFunctionBackward":
            compiled.add(current._sequence_nr())
        attention |= name.startswith("ScaledDotProduct")
        attention |= name.startswith(("Bmm", "Baddbmm")) and _leads_to_softmax(current)
        new = [other for other in _next(current) if other not in seen]
        seen.update(new)
        todo += new
    return compiled, attention


def _leads_to_softmax(node: Any) -> bool:
    layer = {node}
    for _ in range(_NEAR):
        layer = {other for current in layer for other in _next(current)}
        if any(other.name().startswith(("SoftmaxBackward", "SafeSoftmaxBackward")) for other in layer):
            return True
    return False


def _next(node: Any) -> Iterator[Any]:
    return (other for other, _ in node.next_functions if other is not None)

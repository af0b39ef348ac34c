"""What a graph of aten operators says about the attention in it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch.fx import Node

_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
_SAME_VALUES = {"view", "reshape", "_unsafe_view", "permute", "transpose", "clone", "expand", "alias"}
_SAME_VALUES |= {"convert_element_type", "_to_copy"}


def name(node: Node) -> str:
    """The operator's name without namespace and overload, empty for what is no operator."""
    return node.target._schema.name.partition("::")[2] if isinstance(node.target, torch._ops.OpOverload) else ""


def arguments(node: Node) -> dict[str, Any]:
    """By the names of the operator's schema."""
    assert isinstance(node.target, torch._ops.OpOverload)
    schema = node.target._schema.arguments
    given = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    return given | {argument.name: value for argument, value in zip(schema, node.args, strict=False)} | node.kwargs


def site(node: Node | None) -> str:
    """``class:path`` of the module that called it, the path as it is written in the compiled function."""
    meta = {} if node is None else node.meta
    stack = meta.get("fwd_nn_module_stack") or meta.get("nn_module_stack")
    if not stack:
        return ""
    path, kind = list(stack.values())[-1]
    return f"{kind if isinstance(kind, str) else f'{kind.__module__}.{kind.__qualname__}'}:{path}"


def site_before(node: Node) -> str:
    """The same, or that of the nearest operator before it that has one: operators that replaced others have none."""
    return next(filter(None, map(site, _upstream(node, until=()))), "")


def same_tokens(query: Node, key: Node) -> bool | None:
    """Whether queries and keys are projections of the same activations; None where that is not plain to see."""
    sources = _sources(query)
    return True if sources and sources == _sources(key) else None


def is_written_out(node: Node) -> bool:
    """Whether it is attention without an SDPA kernel, so the product of values with a softmax of products."""
    if str(node.target) == "flex_attention":
        return True
    if name(node) not in ("bmm", "mm") or not isinstance(node.args[0], Node):
        return False
    softmax = next((x for x in _upstream(node.args[0]) if _is_softmax(x)), None)
    return softmax is not None and any(name(x) in ("bmm", "baddbmm") for x in _upstream(softmax))


def is_folded(kernel: Node) -> bool:
    """Whether the model gave an SDPA kernel ``[N, T, D]``, and torch put the batch of 1 in front that it wants."""
    query = arguments(kernel)["query"]
    return name(query) == "unsqueeze" and arguments(query)["dim"] == 0


def _is_softmax(node: Node) -> bool:
    if name(node) in ("_softmax", "_safe_softmax"):
        return True
    if name(node) != "div" or len(node.all_input_nodes) < 2:
        return False
    exp, total = node.all_input_nodes
    return name(exp) == "exp" and name(total) == "sum" and total.args[0] is exp


def _sources(node: Node) -> set[Any]:
    """The activations whose projections it is made of."""
    found = set()
    for product in _upstream(node):
        if name(product) in _PRODUCTS:
            source = product.args[1 if "add" in name(product) else 0]
            while isinstance(source, Node) and name(source) in _SAME_VALUES:
                source = source.args[0]
            found.add(source)
    return found


def _upstream(node: Node, until: Collection[str] = _PRODUCTS) -> Iterator[Node]:
    """What a value is computed from, the nearest first, back to and including the operators ``until``."""
    todo, seen = [node], {node}
    for current in todo:
        yield current
        if name(current) not in until:
            new = [other for other in current.all_input_nodes if other not in seen]
            todo += new
            seen.update(new)

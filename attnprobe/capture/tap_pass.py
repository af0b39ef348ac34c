"""Compiled graphs hand out the inputs of every attention's backward kernel: two operators, and who inserts them.

The operators compute nothing and have no outputs, so the numbers of a graph stay what they are. They are
inserted into the joint graph of forward and backward pass, which inductor's cache looks at, and carry the names of
modules as constants, because no pass runs over a graph that comes out of the cache.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph

from attnprobe.capture import tap_graph
from attnprobe.capture.tap_graph import arguments, name, same_tokens, site, site_before
from attnprobe.errors import AttnProbeWarning

#: Who listens: called with the operator's name and its arguments. Empty on all steps that are not probed.
LISTENERS: list[Callable[..., None]] = []
SEPARATOR = "|"
NOWHERE = "some module"

_library = torch.library.Library("attnprobe", "DEF")


def _define(name: str, parameters: str) -> Any:
    def tell(*arguments: Any) -> None:
        for listener in [*LISTENERS]:
            listener(name, *arguments)

    # In whatever layout the tensors are: a copy would be one for nothing.
    _library.define(f"{name}({parameters}) -> ()", tags=(torch.Tag.flexible_layout,))
    _library.impl(name, tell, "CompositeExplicitAutograd")
    torch.library.register_fake(f"attnprobe::{name}", lambda *arguments: None, lib=_library)
    op = getattr(torch.ops.attnprobe, name).default
    torch.fx.node.has_side_effect(op)  # or it would be removed, as nobody uses its result
    return op


TAP = _define(
    "tap",
    "Tensor error, Tensor query, Tensor key, Tensor value, Tensor output, Tensor? mask, float dropout, bool causal, "
    "float? scale, bool? same_tokens, str site, int order",
)
REGION = _define("region", "Tensor tangent, str frozen, str written, str folded")


def insert_taps(graph: Graph) -> None:
    """A ``tap`` behind every SDPA backward kernel of a joint graph, and one ``region`` for its backward pass.

    Behind, so that it is the kernel that decides on the layout of its inputs, as it does without us.
    """
    tangents = [node for node in graph.nodes if node.op == "placeholder" and node.name.startswith("tangents")]
    if not tangents:
        return
    backward = set(tangents)
    for node in graph.nodes:
        if not backward.isdisjoint(node.all_input_nodes):
            backward.add(node)
    kernels = [node for node in graph.nodes if name(node).startswith("_scaled_dot_product_")]
    forward = [node for node in kernels if node not in backward]
    written = {
        site_before(node) or NOWHERE for node in graph.nodes if node not in backward and tap_graph.is_written_out(node)
    }
    tapped = set()
    for node in kernels:
        if not name(node).endswith("_backward"):
            continue
        given = {key.rstrip("_"): value for key, value in arguments(node).items()}
        output = given["out"]
        source = output.args[0] if output.target is operator.getitem else None
        tapped.add(source)
        with graph.inserting_after(node):
            handed_out = (
                *(given[key] for key in ("grad_out", "query", "key", "value", "out")),
                given.get("attn_mask", given.get("attn_bias")),
                *(given[key] for key in ("dropout_p", "is_causal", "scale")),
                same_tokens(given["query"], given["key"]),
                site(node) or site(source),
                forward.index(source) if source in forward else len(forward),
            )
            graph.call_function(TAP, handed_out).meta["val"] = None
    folded = sorted({site_before(node) or NOWHERE for node in forward if tap_graph.is_folded(node)})
    frozen = [site(node) for node in forward if node not in tapped]
    with graph.inserting_after(tangents[-1]):
        reasons = SEPARATOR.join(frozen), SEPARATOR.join(sorted(written)), SEPARATOR.join(folded)
        graph.call_function(REGION, (tangents[0], *reasons)).meta["val"] = None


class TapPass(CustomGraphPass):
    """``insert_taps`` after whatever pass there was before."""

    def __init__(self, before: Any) -> None:
        self.before = before
        self.others = [*before] if isinstance(before, list | tuple) else [before] if before else []
        self.version = get_hash_for_files((__file__, tap_graph.__file__))

    def __call__(self, graph: Graph) -> None:
        for other in self.others:
            other(graph)
        try:
            insert_taps(graph)
        except Exception as error:
            cause = f"{type(error).__name__}: {error}"
            warnings.warn(f"attnprobe: a compiled graph got no taps: {cause}", AttnProbeWarning, stacklevel=2)

    def uuid(self) -> Any:
        """Part of the key in inductor's cache: a process without a probe must not find a graph with taps there."""
        keys = [other.uuid() if isinstance(other, CustomGraphPass) else None for other in self.others]
        return None if None in keys else ("attnprobe", self.version, *keys)


_tokens: set[object] = set()


def install() -> Callable[[], None]:
    """What is compiled from now on has taps; what is returned ends that, and may be called more than once."""
    token = object()
    _tokens.add(token)
    if not isinstance(config.joint_custom_post_pass, TapPass):
        config.joint_custom_post_pass = TapPass(config.joint_custom_post_pass)

    def remove() -> None:
        _tokens.discard(token)
        current = config.joint_custom_post_pass
        if not _tokens and isinstance(current, TapPass):
            config.joint_custom_post_pass = current.before

    return remove

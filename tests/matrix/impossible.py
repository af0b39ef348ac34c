"""Cells that cannot hold, each with the reason; whoever makes one work takes it off the list."""

from __future__ import annotations

from fnmatch import fnmatchcase

from tests.matrix.check import Outcome

_SINGLE = "where it hides padding its output becomes float32, which its next layer refuses"
_BYPASSED = "it multiplies by its projection's weight without calling it, so that the adapter takes no part"
_DECOMPOSED = "torch compiles its attention from single operations; a warning says so, and probed steps run eagerly"
_FOLDED = "heads and sequences share a dimension of its kernel; a warning says so, and probed steps run eagerly"

#: Patterns of a variant's and a condition's name -> why.
IMPOSSIBLE: dict[tuple[str, str], str] = {
    ("mamba-*", "*"): "a state space model: there is no softmax, and the report says so",
    ("x-talking-heads-after", "*"): "heads are mixed after the softmax: no head's weights are a softmax",
    ("x-encoder*", "[bf]*16"): _SINGLE,
    ("x-pair*", "[bf]*16"): _SINGLE,
    ("x-*flash", "copies"): "it holds an enumeration of torch that cannot be pickled",
    ("gpt2-upcast-eager", "compile-fullgraph"): "it logs a warning in its forward pass, which breaks the graph",
    ("deepseek_v3-flex", "compile-fullgraph"): "dynamo fails on a size that depends on data, without the probe as well",
    ("sdpa-float-mask", "compile-tap"): _DECOMPOSED,
    ("sdpa-folded", "compile-tap"): _FOLDED,
    ("t5-sdpa", "compile-tap"): _DECOMPOSED,
    ("deepseek_v3-sdpa", "compile-tap"): _DECOMPOSED,
    ("timm-beit-fused", "compile-tap"): _DECOMPOSED,
    ("timm-nest-fused", "compile-tap"): _DECOMPOSED,
    ("timm-swin-fused", "compile-tap"): _DECOMPOSED,
    ("timm-twins-fused", "compile-tap"): _DECOMPOSED,
    ("torchvision-swin", "lora"): _BYPASSED,
    ("timm-beit-*", "lora"): _BYPASSED,
}


def covers(patterns: tuple[str, str], variant: str, condition: str) -> bool:
    return fnmatchcase(variant, patterns[0]) and fnmatchcase(condition, patterns[1])


def reason(variant: str, condition: str) -> str:
    """Why a cell cannot hold, ``""`` where it has to."""
    return next((why for patterns, why in IMPOSSIBLE.items() if covers(patterns, variant, condition)), "")


def mistakes(variant: str, condition: str, outcome: Outcome) -> list[str]:
    """What is wrong with a cell, given what is known of it; nothing where all is as it should be."""
    known = reason(variant, condition)
    if outcome.passed:
        return [f"passes: take it off the list of the impossible ({known})"] if known else []
    if not known:
        return [f"the model fails without the probe: {outcome.fails}"] if outcome.fails else outcome.problems
    return outcome.harm  # where nothing can be measured, nothing may be changed either

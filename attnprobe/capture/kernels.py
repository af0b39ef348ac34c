"""``register_attention``: what a kernel that nobody can look into computes, told by who knows.

A registered function tells whoever watches of its calls. Of a registered
``torch.autograd.Function`` the ``apply`` is replaced while a step is probed, which reaches whoever looks it up then.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from attnprobe.capture.call import Call, Layout
from attnprobe.capture.nodes import sequence_number
from attnprobe.capture.registry import KERNELS, After
from attnprobe.errors import ConfigurationError

if TYPE_CHECKING:
    from attnprobe.capture.modules import Watch
    from attnprobe.capture.session import Session

_Kernel = TypeVar("_Kernel", bound=Callable[..., Any])
Adapter = Callable[..., Mapping[str, Any]]

_TENSORS = {"query", "key", "value", "mask", "sink"}
_FACTS = {"scale", "causal", "dropout", "score_mod", "mask_mod", "self_attention", "query_tokens", "key_tokens"}
_FUNCTIONS = {"arrange", "unpack"}
_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "bhtd": lambda tensor: tensor,
    "bthd": lambda tensor: tensor.transpose(1, 2),
}

_watches: dict[int, Watch] = {}
_before: dict[Any, Any] = {}  # those whose apply is replaced -> the one that they had themselves


def register_attention(adapter: Adapter, *, layout: str = "bhtd") -> Callable[[_Kernel], _Kernel]:
    """Decorator for a function or ``torch.autograd.Function`` that computes softmax attention in a kernel of its own.

    Args:
        adapter: called with the kernel's arguments after it ran, returns what it computed as a mapping: ``query``
            ``[B, H, T, D]``, ``key`` ``[B, G, S, D]`` and ``value`` ``[B, G, S, E]``; and, where they apply,
            ``scale`` (default ``D ** -0.5``), ``causal``, ``mask`` (boolean, True = visible, or additive),
            ``score_mod`` and ``mask_mod`` (as for FlexAttention), ``sink`` (learned logits ``[B, H, T, 1]``),
            ``dropout`` (the probability), ``self_attention``, ``query_tokens`` ``[B, T]`` and ``key_tokens``
            ``[B, S]`` (boolean, True = no padding). Head ``h`` reads key head ``h // (H // G)``.
            ``arrange`` brings the kernel's output, and its gradient, to ``[B, H, T, E]`` where ``layout`` cannot;
            ``unpack(name, tensor)`` does so with query, key and value if that means to copy them, which is then
            put off until their numbers are computed.
        layout: of query, key, value and the kernel's output, the first one if it returns several:
            ``"bhtd"`` or ``"bthd"``.

    Returns:
        The decorator. A function has to be called through what it returns. A class is returned as it is, so that
        ``register_attention(adapter)(library.Kernel)`` serves for the code of others; whoever looks up
        ``Kernel.apply`` when he calls it is seen. ``attend = Kernel.apply`` is a function, to be registered itself.

    Raises:
        ConfigurationError: an unknown layout, or something that is neither a function nor such a class.

    Whether the adapter tells the truth shows in the report's ``residual``, as for every other call.
    """
    if layout not in _LAYOUTS:
        raise ConfigurationError(f"layout must be one of {', '.join(map(repr, _LAYOUTS))}, got {layout!r}")
    arrange = _LAYOUTS[layout]

    def observe(session: Session, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with torch.no_grad():
            call = _call(result if isinstance(result, Tensor) else result[0], adapter(*args, **kwargs), arrange)
        session.observe(call)

    def register(kernel: _Kernel) -> _Kernel:
        if isinstance(kernel, type) and issubclass(kernel, torch.autograd.Function):
            KERNELS[kernel] = observe
            return kernel
        if isinstance(kernel, type) or not callable(kernel):
            raise ConfigurationError(
                f"register_attention takes a function or a subclass of torch.autograd.Function, got {kernel!r}"
            )
        visible: Any = functools.wraps(kernel)(lambda *args, **kwargs: _run(kernel, observe, args, kwargs))
        return visible  # type: ignore[no-any-return]

    return register


def _call(output: Tensor, told: Mapping[str, Any], arrange: Callable[[Tensor], Tensor]) -> Call:
    given = dict(told)
    optional = _TENSORS | _FACTS | _FUNCTIONS
    if given.keys() - optional or not {"query", "key", "value"} <= given.keys():
        raise ConfigurationError(
            f"an attention adapter returns query, key and value, and if need be "
            f"{', '.join(sorted(optional - {'query', 'key', 'value'}))}; got {', '.join(map(str, given)) or 'nothing'}"
        )
    own, unpack = given.pop("arrange", None), given.pop("unpack", None)
    tensors = {name: given.pop(name) for name in _TENSORS & given.keys() if given[name] is not None}
    if own is None:
        tensors |= {name: arrange(tensors[name]) for name in ("query", "key", "value")}
    if unpack is None:
        _check(tensors["query"], tensors["key"], tensors["value"], (own or arrange)(output))
    if given.get("scale") is None:
        given["scale"] = tensors["query"].shape[-1] ** -0.5
    return Call(output, tensors, Layout(given, 4, arrange=own or arrange, unpack=unpack))


def _check(query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> None:
    """That an adapter's tensors are those of one attention call."""
    fit = all(x.ndim == 4 for x in (query, key, value, output))
    fit = fit and key.shape[:3] == value.shape[:3] and query.shape[0] == key.shape[0]
    fit = fit and query.shape[3] == key.shape[3] and query.shape[1] % key.shape[1] == 0
    if not fit or output.shape != (*query.shape[:3], value.shape[3]):
        shapes = ", ".join(
            f"{name} {[*x.shape]}" for name, x in {"query": query, "key": key, "value": value, "output": output}.items()
        )
        raise ConfigurationError(
            f"query [B, H, T, D], key [B, G, S, D], value [B, G, S, E] and output [B, H, T, E] are expected from an "
            f"attention adapter and its kernel, got {shapes}"
        )


def _run(kernel: Callable[..., Any], observe: After, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``kernel(*args, **kwargs)``: whoever watches is told of one call and sees nothing of what is inside."""
    if torch.compiler.is_compiling() or not _watches:
        return kernel(*args, **kwargs)
    watching = [watch for watch in [*_watches.values()] if watch.running.on and not watch.running.aside]
    number = sequence_number()
    with contextlib.ExitStack() as stack:
        for watch in watching:
            stack.enter_context(watch.aside())
        result = kernel(*args, **kwargs)
        inside = range(number, sequence_number())
        for watch in watching:
            watch.told(observe, inside, result, args, kwargs)
    return result


def install(watch: Watch) -> None:
    """Make registered kernels visible until ``remove``."""
    _watches[id(watch)] = watch
    for function in KERNELS.keys() - _before.keys():
        _before[function] = own = function.__dict__.get("apply")
        function.apply = classmethod(_apply(function, own))


def remove(watch: Watch) -> None:
    """Undo ``install``; what somebody else still needs stays."""
    _watches.pop(id(watch), None)
    while _before and not _watches:
        function, own = _before.popitem()
        if own is None:
            del function.apply
        else:
            function.apply = own


def _apply(function: Any, own: Any) -> Callable[..., Any]:
    """What stands for the ``apply`` of a registered class; a subclass is somebody else's."""

    def apply(used: Any, *args: Any, **kwargs: Any) -> Any:
        inner = super(function, used).apply if own is None else own.__get__(None, used)
        return _run(inner, KERNELS[function], args, kwargs) if used is function else inner(*args, **kwargs)

    return apply

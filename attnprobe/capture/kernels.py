"""``register_attention``: what a kernel that nobody can look into computes, told by who knows.

A registered function hands itself over to the interception mode as torch's own functions do. Of a registered
``torch.autograd.Function`` the ``apply`` is replaced while a step is probed, which reaches every caller.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from attnprobe.capture.call import Call, Layout
from attnprobe.capture.registry import KERNELS
from attnprobe.errors import ConfigurationError

if TYPE_CHECKING:
    from attnprobe.capture.session import Session

_Kernel = TypeVar("_Kernel", bound=Callable[..., Any])
Adapter = Callable[..., Mapping[str, Any]]

_TENSORS = {"query", "key", "value", "mask", "sink"}
_FACTS = {"scale", "causal", "dropout", "score_mod", "mask_mod", "self_attention"}
_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "bhtd": lambda tensor: tensor,
    "bthd": lambda tensor: tensor.transpose(1, 2),
}

_sessions: set[int] = set()
_callers: dict[Any, Callable[..., Any]] = {}  # registered torch.autograd.Function -> what calls its apply
_before: dict[Any, Any] = {}  # those whose apply is replaced -> the one that they had themselves


def register_attention(adapter: Adapter, *, layout: str = "bhtd") -> Callable[[_Kernel], _Kernel]:
    """Decorator for a function or ``torch.autograd.Function`` that computes softmax attention in a kernel of its own.

    Args:
        adapter: called with the kernel's arguments after it ran, returns what it computed as a mapping: ``query``
            ``[B, H, T, D]``, ``key`` ``[B, G, S, D]`` and ``value`` ``[B, G, S, E]``; and, where they apply,
            ``scale`` (default ``D ** -0.5``), ``causal``, ``mask`` (boolean, True = visible, or additive),
            ``score_mod`` and ``mask_mod`` (as for FlexAttention), ``sink`` (learned logits ``[B, H, T, 1]``),
            ``dropout`` (the probability) and ``self_attention``. Head ``h`` reads key head ``h // (H // G)``.
            ``arrange`` brings the kernel's output, and its gradient, to ``[B, H, T, E]`` where ``layout`` cannot.
        layout: of query, key, value and the kernel's output, the first one if it returns several:
            ``"bhtd"`` or ``"bthd"``.

    Returns:
        The decorator. A function has to be called through what it returns; a class is returned as it is, so that
        ``register_attention(adapter)(library.Kernel)`` serves for the code of others.

    Raises:
        ConfigurationError: an unknown layout, or something that is neither a function nor such a class.

    Whether the adapter tells the truth shows in the report's ``residual``, as for every other call.
    """
    if layout not in _LAYOUTS:
        raise ConfigurationError(f"layout must be one of {', '.join(map(repr, _LAYOUTS))}, got {layout!r}")
    arrange = _LAYOUTS[layout]

    def observe(session: Session, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        output = result if isinstance(result, Tensor) else result[0]
        session.observe(_call(output, dict(adapter(*args, **kwargs)), arrange))

    def register(kernel: _Kernel) -> _Kernel:
        if isinstance(kernel, type) and issubclass(kernel, torch.autograd.Function):
            _callers[kernel] = caller = _caller(kernel)
            KERNELS[caller] = observe
            return kernel
        if isinstance(kernel, type) or not callable(kernel):
            raise ConfigurationError(
                f"register_attention takes a function or a subclass of torch.autograd.Function, got {kernel!r}"
            )
        visible: Any = functools.wraps(kernel)(lambda *args, **kwargs: _hand_over(visible, kernel, args, kwargs))
        KERNELS[visible] = observe
        return visible  # type: ignore[no-any-return]

    return register


def _call(output: Tensor, given: dict[str, Any], arrange: Callable[[Tensor], Tensor]) -> Call:
    unknown = given.keys() - _TENSORS - _FACTS - {"arrange"}
    if unknown or not {"query", "key", "value"} <= given.keys():
        raise ConfigurationError(
            f"an attention adapter returns query, key and value, and if need be arrange, "
            f"{', '.join(sorted((_TENSORS | _FACTS) - {'query', 'key', 'value'}))}; got {', '.join(map(str, given))}"
        )
    own = given.pop("arrange", None)
    tensors = {name: given.pop(name) for name in _TENSORS & given.keys() if given[name] is not None}
    if own is None:
        tensors |= {name: arrange(tensors[name]) for name in ("query", "key", "value")}
    given.setdefault("scale", tensors["query"].shape[-1] ** -0.5)
    return Call(output, tensors, Layout(given, 4, arrange=own or arrange))


def _hand_over(visible: Any, kernel: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Through the modes on the stack, if there are any."""
    if torch.compiler.is_compiling() or not torch._C._is_torch_function_mode_enabled():
        return kernel(*args, **kwargs)
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    return handle_torch_function(visible, tensors, *args, **kwargs)


def _caller(function: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: function.apply(*args, **kwargs)


def install(session: object) -> None:
    """Make the registered ``autograd.Function`` classes visible while a session lasts."""
    if not _sessions:
        for function in _callers:
            _before[function] = function.__dict__.get("apply")
            function.apply = classmethod(functools.partial(_apply, function))
    _sessions.add(id(session))


def remove(session: object) -> None:
    """Undo ``install``, unless another session still needs it."""
    _sessions.discard(id(session))
    while _before and not _sessions:
        function, own = _before.popitem()
        if own is None:
            del function.apply
        else:
            function.apply = own


def _apply(function: Any, used: Any, *args: Any, **kwargs: Any) -> Any:
    """``used.apply``, where ``used`` is the registered ``function`` or a subclass, which is somebody else's."""
    own = _before.get(function)
    apply = super(function, used).apply if own is None else own.__get__(None, used)
    return _hand_over(_callers[function], apply, args, kwargs) if used is function else apply(*args, **kwargs)

"""Which torch functions are intercepted, by name.

A kind of attention is a file that registers handlers: ``after`` sees a function's result,
``around`` runs it. Names stand for all spellings: ``bmm`` is ``torch.bmm`` and ``Tensor.bmm``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from attnprobe.capture.session import Session

After = Callable[["Session", Any, tuple[Any, ...], dict[str, Any]], None]
Around = Callable[["Session", Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
_Handler = TypeVar("_Handler", bound=Callable[..., Any])

AFTER: dict[str, After] = {}
AROUND: dict[str, Around] = {}
#: ``torch.autograd.Function`` classes given to ``register_attention``.
KERNELS: dict[Any, After] = {}


def after(*names: str) -> Callable[[_Handler], _Handler]:
    """Register ``handler(session, result, args, kwargs)``; its exceptions never reach the model."""
    return _register(AFTER, names)


def around(*names: str) -> Callable[[_Handler], _Handler]:
    """Register ``handler(session, function, args, kwargs)``, which has to run the function itself."""
    return _register(AROUND, names)


def _register(table: dict[str, Any], names: tuple[str, ...]) -> Callable[[_Handler], _Handler]:
    def add(handler: _Handler) -> _Handler:
        for name in names:
            if name in AFTER or name in AROUND:
                raise ValueError(f"{name!r} has a handler already")
            table[name] = handler
        return handler

    return add

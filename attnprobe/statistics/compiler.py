"""The functions of ``c``: compiled when first used, if there is a compiler.

The library lives in memory only: nothing is written that another run, or another machine, could load.
``ATTNPROBE_COMPILED=0`` in the environment does without it.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch

SOURCES = Path(__file__).with_name("c")
COMPILERS = ("cc", "gcc", "clang")
TIMEOUT = 30  # seconds
# -ffast-math would lose NaN.
FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fopenmp-simd", "-shared", "-fPIC")
NATIVE = (("-march=native", "-mprefer-vector-width=512"), ("-mcpu=native",), ())
_lock, _state = threading.RLock(), threading.local()
_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_long
_ARGUMENTS = {
    "attnprobe_tile": "pp nnnn ppppp n p n p nn",
    "attnprobe_size": "",
    "attnprobe_room": "p",
    **{f"attnprobe_{name}": "p nn p n" for name in ("sweep", "log_sum_exp", "describe", "landmarks")},
}


def usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the functions serve such tensors, and are there."""
    return _serve(device, dtype) and not getattr(_state, "checking", False) and load()[0] is not None


def uncompiled(device: torch.device, dtype: torch.dtype) -> str:
    """Why the functions are not used where they could be, empty if they are or never can be."""
    if device.type != "cpu" or dtype == torch.float64:
        return ""
    return load()[1] if _serve(device, torch.float32) else "ATTNPROBE_COMPILED=0 says so"


def _serve(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cpu" and dtype == torch.float32 and os.environ.get("ATTNPROBE_COMPILED") != "0"


def load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why there is none."""
    with _lock:
        return _load()


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    reasons = []
    for compiler in dict.fromkeys(filter(None, map(shutil.which, (os.environ.get("CC", ""), *COMPILERS)))):
        try:
            library = _compile(compiler)
            if not _differs(library):
                return library, ""
            reasons.append(f"what {compiler} makes gives other numbers")
        except Exception as error:  # whatever a compiler, or what it made, may do
            reasons.append(f"{compiler} could not be used: {error}")
    return None, "; ".join(reasons) or "no C compiler was found"


def _differs(library: ctypes.CDLL) -> bool:
    """Whether its functions and torch disagree; meanwhile torch does the work."""
    from attnprobe.statistics import self_check

    _state.checking = True
    try:
        return self_check.differs(library)
    finally:
        _state.checking = False


def _compile(compiler: str) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory(prefix="attnprobe-") as folder:
        path = Path(folder) / "attnprobe.so"
        sources = [str(source) for source in sorted(SOURCES.glob("*.c"))]
        for native in NATIVE:
            command = [compiler, *FLAGS, *native, *sources, "-o", str(path), "-lm"]
            code, said = _run(command)
            if code == 0:
                break
        else:
            raise OSError(said.strip().splitlines()[-1:] or code)
        library = ctypes.CDLL(str(path))
    for name, arguments in _ARGUMENTS.items():
        function = getattr(library, name)
        function.restype = _NUMBER if name in ("attnprobe_size", "attnprobe_room") else None
        function.argtypes = [_POINTER if kind == "p" else _NUMBER for kind in arguments.replace(" ", "")]
    return library


def _run(command: list[str]) -> tuple[int, str]:
    """Exit code and errors; a compiler that hangs is killed with all that it started."""
    options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, start_new_session=True, **options) as process:
        try:
            errors = process.communicate(timeout=TIMEOUT)[1]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode, errors.decode(errors="replace")

"""A step in a fresh process of its own, which reads its own CPU time and peak memory."""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import resource
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Step = Callable[[], Any]
ROOT = Path(__file__).parents[1]
#: glibc gives every block of 64 KiB or more back to the system at once, so that the resident set is what is in use.
EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536"}


class WorkerError(RuntimeError):
    """What ended a worker."""


@dataclass(frozen=True)
class Run:
    """One step.

    Attributes:
        seconds: its CPU time.
        peak: MiB of its highest resident set above that before the first step.
        value: what it returned.
    """

    seconds: float
    peak: float
    value: Any


class Worker:
    """Steps on demand; the process is started at once and used from the first ``run`` on.

    Args:
        make: builds the step inside the process; a function of a module, or a ``partial`` of one.
        exact: let freed memory leave the resident set at once, which costs time.
    """

    def __init__(self, make: Callable[[], Step], *, exact: bool = False) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from benchmarks.worker import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, **(EXACT if exact else {})},
        )
        self._send(make)

    def run(self) -> Run:
        """One more step.

        Raises:
            WorkerError: it cannot be built, it failed, or the process was ended, as happens where memory runs out.
        """
        self._send(True)
        assert self._process.stdout is not None
        try:
            answer = pickle.load(self._process.stdout)
        except EOFError:
            raise WorkerError(f"the process was ended (exit code {self._process.wait()})") from None
        if isinstance(answer, str):
            raise WorkerError(answer)
        assert isinstance(answer, Run)
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _send(self, message: object) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # what ended it is read afterwards
            pickle.dump(message, self._process.stdin)
            self._process.stdin.flush()


def serve() -> None:
    """Inside the process: build the step, then run it as often as asked."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer

    def answer(message: object) -> None:
        pickle.dump(message, answers)
        answers.flush()

    try:
        make = pickle.load(sys.stdin.buffer)
        from benchmarks.table import prepare

        prepare()
        step = make()
        gc.collect()
        gc.freeze()
        resting = resident("VmRSS")
        while pickle.load(sys.stdin.buffer):
            answer(timed(step, resting))
    except EOFError:
        return
    except Exception as error:
        traceback.print_exc()
        answer(f"{type(error).__name__}: {error}".splitlines()[0][:120])


def timed(step: Step, resting: float) -> Run:
    """Run it, and say what it took."""
    gc.collect()
    with contextlib.suppress(OSError):  # begins a new peak
        Path("/proc/self/clear_refs").write_text("5")
    start = time.process_time()
    value = step()
    seconds = time.process_time() - start
    return Run(seconds, resident("VmHWM") - resting, value)


def resident(field: str) -> float:
    """The process's resident set in MiB: ``VmRSS`` now, ``VmHWM`` at its peak.

    Not ``ru_maxrss`` where it can be helped: a process inherits that from the one that started it.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
    return float(status.read_text().split(f"{field}:")[1].split()[0]) / 2**10


def available() -> float:
    """MiB that processes can still have; infinite where the system does not say."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return float("inf")
    return float(meminfo.read_text().split("MemAvailable:")[1].split()[0]) / 2**10

"""A TensorBoard in a process of its own, as a user starts it, for tests and measurements."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import psutil


@contextmanager
def tensorboard(logdir: Path, *options: str, path: str = "") -> Iterator[str]:
    """The address of a TensorBoard over ``logdir``, until the end of the block; ``path`` stands before its modules."""
    with running(logdir, *options, path=path) as (address, _):
        yield address


@contextmanager
def running(logdir: Path, *options: str, path: str = "") -> Iterator[tuple[str, psutil.Process]]:
    """The same, and its process."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--host", "127.0.0.1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} | ({"PYTHONPATH": path} if path else {})
    # Not in the project's directory: a build's leftovers there would stand in for the installed package.
    with tempfile.TemporaryFile("w+") as log, tempfile.TemporaryDirectory() as elsewhere:
        process = subprocess.Popen(
            [*command, "--port", str(port), "--reload_interval", "1", *options],
            cwd=elsewhere, env=environment, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        address = f"http://127.0.0.1:{port}"
        try:
            _wait(process, f"{address}/data/plugins_listing", log)
            yield address, psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait(20)


def _wait(process: subprocess.Popen[bytes], address: str, log: IO[str]) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(address, timeout=5).close()
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)
        else:
            return
    log.seek(0)
    raise AssertionError(f"TensorBoard did not start: {log.read()}")

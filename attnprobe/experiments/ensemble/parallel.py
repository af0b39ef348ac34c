"""Independent trainings, each in a process of its own and on one thread: the same numbers on any number of cores."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from attnprobe.errors import ConfigurationError

Given = TypeVar("Given")
Made = TypeVar("Made")


def cores() -> int:
    """How many processes can run at once here."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def each(work: Callable[[Given], Made], items: Sequence[Given], *, jobs: int) -> list[Made]:
    """``work`` of every item, in order.

    Args:
        work: a function at the top of a module.
        items: what it is called with.
        jobs: processes; with one, all happens in this process.
    """
    if jobs < 1:
        raise ConfigurationError(f"jobs must be at least 1, got {jobs}")
    if (jobs := min(jobs, len(items))) == 1:
        with one_thread():
            return [work(item) for item in items]
    # A forked child would inherit the locks of torch's thread pool.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            return list(pool.map(work, items))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@contextmanager
def one_thread() -> Iterator[None]:
    """At these sizes more threads wait for each other longer than they compute, and sum up in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

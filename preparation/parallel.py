"""Doing the same thing to many files at once, ending early when one of them fails or the person interrupts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def for_each(items: Iterable[Item], work: Callable[[Item], Result], *, jobs: int) -> list[Result]:
    """`work` of every item, in the items' order, on at most `jobs` threads.

    Raises what the first failing `work` raised, after those that had begun are done; nothing more is begun.
    """
    pool = ThreadPoolExecutor(max_workers=max(1, jobs))
    try:
        futures = [pool.submit(work, item) for item in items]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in futures:
            if future in done and (error := future.exception()):
                raise error
        return [future.result() for future in futures]
    finally:
        pool.shutdown(cancel_futures=True)

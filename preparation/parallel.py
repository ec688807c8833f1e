"""Doing the same thing to many files at once, ending early when one of them fails or the person interrupts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_PARTING_SECONDS = (
    1.0  # after an interruption; a thread that still hears of bytes ends well within it
)


def for_each(items: Iterable[Item], work: Callable[[Item], Result], *, jobs: int) -> list[Result]:
    """`work` of every item, in the items' order, on at most `jobs` threads.

    Raises what the first failing `work` raised, after those that had begun are done; nothing more is begun. An
    interruption is raised without waiting for them: a thread in a stalled connection may never end.
    """
    pool = ThreadPoolExecutor(max_workers=max(1, jobs))
    futures: list[Future[Result]] = []
    try:
        futures += [pool.submit(work, item) for item in items]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in futures:
            if future in done and (error := future.exception()):
                raise error
        return [future.result() for future in futures]
    except KeyboardInterrupt:
        pool.shutdown(wait=False, cancel_futures=True)
        wait(futures, timeout=_PARTING_SECONDS)
        raise
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise
    finally:
        pool.shutdown(wait=False)

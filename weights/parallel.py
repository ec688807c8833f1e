"""Many small tasks on a few threads: the one place of this room that decides what a failure does to the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")


def run_all(
    tasks: Iterable[Callable[[], Result]],
    threads: int,
    *,
    name: str,
    on_failure: Callable[[], None] | None = None,
) -> list[Result]:
    """Run the tasks, `threads` at once, and return their results in order.

    After the first failure no further task is begun, `on_failure` is called, those under way are waited for, and the
    failure is raised. Only an interrupt (Ctrl-C) does not wait: a thread may be stuck on a server that says nothing.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
    try:
        futures = [pool.submit(task) for task in tasks]
        results = [future.result() for future in futures]
    except BaseException as error:
        if on_failure:
            on_failure()
        pool.shutdown(wait=not isinstance(error, KeyboardInterrupt), cancel_futures=True)
        raise
    pool.shutdown()
    return results

"""Who is next: requests in the order they came, an image of each in turn. Decides only; imports no torch.

Images that can go through the denoiser together are of one group. A request for several images is at the end of the
line again after each of them, so that others get theirs in between.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from threading import Event
from typing import Any, Generic, TypeVar

Detail = TypeVar("Detail")


@dataclass(eq=False)
class Job(Generic[Detail]):
    """One request on its way, with a future for each of its images.

    `begun` counts the images that were taken out of the line, `open` those that have no outcome yet. `asked` is when
    it began to wait for its next image. `detail` is what it is about. Its caller has gone when `cancelled`, which is
    the caller's own, is set, or `gone`.
    """

    group: Hashable
    images: tuple[Future[Any], ...]
    cancelled: Event
    detail: Detail
    asked: float = field(default_factory=time.perf_counter)
    begun: int = 0
    gone: bool = False

    @property
    def open(self) -> int:
        return sum(not image.done() for image in self.images)

    @property
    def left(self) -> bool:
        """Whether its caller has gone, by a word or by letting go of a future."""
        return (
            self.gone or self.cancelled.is_set() or any(image.cancelled() for image in self.images)
        )

    def settle(self, index: int, outcome: Any) -> None:
        """Give image `index` its outcome, unless it was cancelled or failed meanwhile."""
        try:
            if isinstance(outcome, BaseException):
                self.images[index].set_exception(outcome)
            else:
                self.images[index].set_result(outcome)
        except InvalidStateError:
            pass

    def fail(self, error: BaseException) -> None:
        """End all that is open with the same error."""
        for index in range(len(self.images)):
            self.settle(index, error)

    def drop(self) -> None:
        """Nobody waits any more: no image that is open will come."""
        for image in self.images:
            image.cancel()


class Line(Generic[Detail]):
    """The requests that wait. Not safe for threads: whoever uses it holds a lock."""

    def __init__(self) -> None:
        self._jobs: deque[Job[Detail]] = deque()

    def __iter__(self) -> Iterator[Job[Detail]]:
        return iter(self._jobs)

    def add(self, job: Job[Detail]) -> None:
        self._jobs.append(job)

    def keep(self, wanted: Callable[[Job[Detail]], bool]) -> None:
        """Let all others go; those that stay keep their places."""
        self._jobs = deque(filter(wanted, self._jobs))

    def take(
        self,
        room: int,
        joining: Hashable | None = None,
        eligible: Callable[[Job[Detail]], bool] = lambda _: True,
    ) -> list[tuple[Job[Detail], int]]:
        """Up to `room` images of one group, as jobs and which of their images.

        Args:
            joining: the group that is on the device already. Only those may join it that are ahead of everybody of
                another group, or those others could wait for ever.
            eligible: whose turn it can be; others keep their places.
        """
        taken: list[tuple[Job[Detail], int]] = []
        group = joining
        while len(taken) < room and (job := self._next(group, joining, eligible)) is not None:
            group = job.group
            taken.append((job, job.begun))
            job.begun += 1
            self._jobs.remove(job)
            if job.begun < len(job.images):
                self._jobs.append(job)
        return taken

    def _next(
        self,
        group: Hashable | None,
        joining: Hashable | None,
        eligible: Callable[[Job[Detail]], bool],
    ) -> Job[Detail] | None:
        for job in filter(eligible, self._jobs):
            if group is None or job.group == group:
                return job
            if joining is not None:
                return None
        return None

    def seconds_for_company(
        self,
        room: int,
        patience: float,
        eligible: Callable[[Job[Detail]], bool] = lambda _: True,
    ) -> float:
        """How long the first whose turn it is may still wait for others of its group to fill the `room` there is."""
        first = next(filter(eligible, self._jobs), None)
        if first is None:
            return 0.0
        there = sum(len(job.images) - job.begun for job in self._jobs if job.group == first.group)
        if there >= room:
            return 0.0
        return max(0.0, first.asked + patience - time.perf_counter())

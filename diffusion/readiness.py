"""Sizes made ready before anybody asks for them: graphs recorded, and compiled code taken up, beside requests."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import CancelledError, Future, wait
from functools import partial

import torch

from diffusion.compiled import Compiling, first_line
from diffusion.device import ran_out_of_memory
from diffusion.device_loop import DeviceLoop
from diffusion.graphs import one_records_or_loads
from diffusion.refresh import one_refresh_at_a_time
from diffusion.rehearsal import Call, Rehearsal
from diffusion.request import GenerationRequest, Plan
from diffusion.sizes import ASPECT_RATIOS, size_for
from diffusion.speed import Speed

logger = logging.getLogger(__name__)

What = tuple[int, int, int]
"""Width, height, and how many images together."""

Later = Mapping[What, Future[None]]
"""What is made ready later, and whoever waits for it."""

# One region of a model is read in a second or two.
SECONDS_TO_STOP = 30.0


class Readiness:
    """What of one engine's sizes and batches is ready, and will be.

    On a card every usual size gets a graph, and what is to run compiled is read on a thread of its own, before graphs
    of other sizes than the native one are recorded. On a CPU only what runs compiled is made ready, by the device's
    thread: a second one that computes would take its cores.
    """

    def __init__(
        self,
        loop: DeviceLoop,
        speed: Speed,
        compiling: Compiling,
        most: int,
        device: torch.device,
    ) -> None:
        self._loop = loop
        self._speed = speed
        self._compiling = compiling
        self._most = most
        self._device = device
        self._rehearses = device.type == "cuda"
        self._learned: set[What] = set()
        self._waiting: list[Future[None]] = []
        self._stop_rehearsing = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def getting_ready(self) -> tuple[Future[None], ...]:
        """What is left for later and not done yet: one for each size and batch."""
        return tuple(self._waiting)

    @property
    def compiled(self) -> frozenset[tuple[int, int]]:
        """Those of the sizes to be compiled that are: in every batch."""
        return frozenset(
            size
            for size in self._compiling.sizes
            if self._learned.issuperset(self._in_batches([size]))
        )

    def begin(self) -> None:
        """Make the native size ready, and all that is to be compiled here; the rest later, beside requests."""
        started = time.perf_counter()
        sizes = self._sizes()
        native = self._native_size
        compiles_here = not self._compiling.only_from_artifacts
        at_once = [(native, native, 1)] if sizes else []
        if compiles_here:
            at_once += self._in_batches(sorted(self._compiling.sizes))
        at_once = list(dict.fromkeys(at_once))
        for number, what in enumerate(at_once, 1):
            self._chore(what, learn=compiles_here or not self._rehearses).exception()
            if compiles_here:
                logger.info(
                    "Compiling: done with %d of %d sizes and batches after %.0f s.",
                    number,
                    len(at_once),
                    time.perf_counter() - started,
                )
        rest = self._later(what for what in self._in_batches(sizes) if what not in at_once)
        if self._rehearses and not compiles_here:
            self._take_up(before={}, then=rest)
        else:
            self._begin_with(rest)

    def begin_again(self) -> None:
        """Other parts have taken the model's place: what was ready of the ones before is of no use. Never waits."""
        self._stop_rehearsing.set()
        self._learned.clear()
        whats, native = self._in_batches(self._sizes()), (self._native_size, self._native_size, 1)
        # Most requests are for this one, and it is some seconds until compiled code takes over.
        first = self._later(what for what in whats if what == native)
        rest = self._later(what for what in whats if what != native)
        if self._rehearses:
            self._take_up(before=first, then=rest)
        else:
            self._begin_with({**first, **rest})

    def stop(self) -> None:
        """End the thread that reads code after what it is at, and wait for that.

        At the interpreter's end too: a thread that is inside torch then would take the process down with it.
        """
        self._stop_rehearsing.set()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(SECONDS_TO_STOP)

    @property
    def _native_size(self) -> int:
        return self._loop.models[self._loop.default].recipe.native_size

    def _sizes(self) -> list[tuple[int, int]]:
        """Those that are made ready before anybody asks for them."""
        native = self._native_size
        on_card = self._device.type == "cuda"
        usual = [size_for(ratio, native) for ratio in ASPECT_RATIOS] if on_card else []
        return list(dict.fromkeys(usual + sorted(self._compiling.sizes)))

    def _in_batches(self, sizes: Iterable[tuple[int, int]]) -> list[What]:
        return [(*size, together) for size in sizes for together in range(1, self._most + 1)]

    def _later(self, whats: Iterable[What]) -> Later:
        """For `_begin_with`; they can be waited for from now on."""
        later = {what: Future[None]() for what in whats}
        for waiting in later.values():
            self._waiting.append(waiting)
            # Nobody asks for what is done.
            waiting.add_done_callback(self._waiting.remove)
        return later

    def _begin_with(self, later: Later, *, soon: bool = False) -> None:
        for what, waiting in later.items():
            chore = self._chore(what, learn=not self._rehearses, soon=soon)
            chore.add_done_callback(partial(_pass_on, waiting))

    def _chore(self, what: What, *, learn: bool, soon: bool = False) -> Future[None]:
        """Have it made ready, compiled where it is to be or as it is: once there is no request, or before the next."""
        add = self._loop.soon if soon else self._loop.when_idle
        done = add(partial(self._make_ready, what, learn=learn))
        done.add_done_callback(partial(_log_failure, what))
        return done

    def _make_ready(self, what: What, *, learn: bool) -> None:
        """Raises RequestError for a size that another version has taken out of reach."""
        plan, together = self._plan(what), what[2]
        (self._learn if learn else self._loop.record)(plan, together)

    def _plan(self, what: What) -> Plan:
        width, height, _ = what
        request = GenerationRequest(prompt="warm-up", width=width, height=height, seed=0)
        return self._loop.models[self._loop.default].plan(request)

    def _learn(self, plan: Plan, together: int) -> None:
        with self._speed.learning((plan.width, plan.height)) as lesson:
            self._loop.record(plan, together, anew=True)
        if lesson.learned:
            self._learned.add((plan.width, plan.height, together))

    # Compiled code, on a card

    def _take_up(self, *, before: Later, then: Later) -> None:
        """Have compiled code read on a thread of its own, and used from then on.

        Nothing can be recorded while something is read: so some is `before` that, and the rest after it.
        """
        sizes = sorted(self._compiling.sizes)
        if not sizes:
            self._begin_with({**before, **then})
            return
        self._begin_with(before, soon=True)
        self._stop_rehearsing = threading.Event()
        self._thread = threading.Thread(
            target=self._rehearse_all,
            args=(before, self._later(self._in_batches(sizes)), then, self._stop_rehearsing),
            name="rehearsal",
            daemon=True,
        )
        self._thread.start()

    def _rehearse_all(
        self, before: Later, these: Later, then: Later, stopped: threading.Event
    ) -> None:
        wait(before.values())
        for what, waiting in these.items():
            if stopped.is_set() or not waiting.set_running_or_notify_cancel():
                waiting.cancel()
                continue
            began = time.perf_counter()
            try:
                self._rehearse(what, stopped)
            except CancelledError:  # the device's thread has ended
                logger.info("Compiled code was not taken up for %d of %dx%d.", *_told(what))
            except Exception as error:  # noqa: BLE001 - it is only about speed
                _log_reason(what, str(error))
            if what in self._learned:
                seconds = time.perf_counter() - began
                logger.info(
                    "Compiled code took over for %d of %dx%d, %.1f s after it was begun with.",
                    *_told(what),
                    seconds,
                )
            waiting.set_result(None)
        if not stopped.is_set():
            self._begin_with(then)
            return
        for waiting in then.values():
            waiting.cancel()

    def _rehearse(self, what: What, stopped: threading.Event) -> None:
        plan, together = self._plan(what), what[2]
        found: list[Rehearsal] = []
        self._loop.soon(lambda: found.append(self._observed(plan, together))).result()
        calls = found[0].calls
        failures: list[str] = []
        for call in calls:
            if stopped.is_set():
                return
            if (failure := self._read(call)) is not None:
                failures.append(failure)
        if failures:
            logger.info(
                "%d of %d kinds of parts of %d of %dx%d could not be read beside requests (%s).",
                len(failures),
                len(calls),
                *_told(what),
                failures[0],
            )
        if not stopped.is_set():
            # What could not be read is refused there, part by part, with the reason.
            self._loop.soon(partial(self._learn, plan, together)).result()

    def _observed(self, plan: Plan, together: int) -> Rehearsal:
        with self._speed.observing() as rehearsal:
            self._loop.run_plainly(plan, together)
        return rehearsal

    def _read(self, call: Call) -> str | None:
        """Beside requests where there is memory for both, and between them where there is not; returns what failed."""
        if self._has_room_for_two():
            failure: str | None = None
            full = False
            try:
                # Building a pipeline patches torch for all threads; neither may see the other half done.
                with one_refresh_at_a_time:
                    call.make()
            except Exception as error:  # noqa: BLE001 - it is only about speed, and the caller tells
                failure = first_line(error)
                full = isinstance(error, RuntimeError) and ran_out_of_memory(error)
            if not full:
                return failure
            with one_records_or_loads:
                torch.cuda.empty_cache()
        refused = self._loop.soon(call.make).exception()
        return None if refused is None else first_line(refused)

    def _has_room_for_two(self) -> bool:
        """Whether there is memory for what an image took at most, twice."""
        if self._device.type != "cuda":
            return True
        allocated = torch.cuda.memory_allocated(self._device)
        working = torch.cuda.max_memory_allocated(self._device) - allocated
        free, _ = torch.cuda.mem_get_info(self._device)
        return free + torch.cuda.memory_reserved(self._device) - allocated >= 2 * working


def _told(what: What) -> tuple[int, int, int]:
    width, height, together = what
    return together, width, height


def _log_reason(what: What, reason: str) -> None:
    reason = reason.partition("\n")[0]
    logger.info(
        "Not made ready, and slower the first time: %d of %dx%d (%s).", *_told(what), reason
    )


def _pass_on(waiting: Future[None], done: Future[None]) -> None:
    """Whatever became of it, whoever waits need not any more."""
    if done.cancelled() or not waiting.set_running_or_notify_cancel():
        waiting.cancel()
    elif (error := done.exception()) is not None:
        waiting.set_exception(error)
    else:
        waiting.set_result(None)


def _log_failure(what: What, done: Future[None]) -> None:
    if not done.cancelled() and (error := done.exception()) is not None:
        _log_reason(what, str(error))

"""The one thread that uses the device: from the line, step by step, to pictures.

It never waits for anything but work: encoding and storing pictures are their callers' business, and where the device is
a card its results are waited for on another thread, so that the next image is on its way by then.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch

from diffusion.clock import Clock, Mark, Spent
from diffusion.company import Company
from diffusion.decoding import Decoded, decode
from diffusion.denoising import Denoising, predictions
from diffusion.device import ran_out_of_memory
from diffusion.errors import BusyError, DeviceError, OutOfMemoryError
from diffusion.graphs import Graphs
from diffusion.line import Job, Line
from diffusion.model import Model
from diffusion.request import Plan
from diffusion.shelf import Shelf
from diffusion.under_way import GeneratedImage, UnderWay, Wish
from diffusion.watching import Watching

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Chore = tuple[Callable[[], None], Future[None]]

# A turn of one model lasts so many times what it takes to switch, if others wait for another one; in seconds, at least.
SWITCHES_IN_A_TURN = 10
SHORTEST_TURN = 1.0

# A step on a CPU may take this long; a thread that hangs is left behind.
SECONDS_TO_STOP = 30.0

# How many steps the host may be ahead of a card: one keeps it busy, more would make those who left run on.
STEPS_AHEAD = 1


class DeviceLoop:
    """Serves the line, from its first job until `stop`.

    `models` make the requests that have not begun, by their names; the first one's is `default`. They may be changed
    while one has the device alone (`paused`).

    Args:
        company_seconds: how long the first of the line waits for others to share its passes.
        weights_changed: called when models have taken turns, before the next pass.
        graphs: of the denoiser's passes, for this thread alone while it is not paused.
        forget_graphs: called as the thread ends, for these and all others that it has recorded.
    """

    def __init__(
        self,
        model: Model,
        company: Company,
        company_seconds: float,
        weights_changed: Callable[[], None],
        graphs: Graphs,
        forget_graphs: Callable[[], None],
    ) -> None:
        self.models = {model.name: model}
        self.default = model.name
        # Whose weights lie on the device.
        self.shelf = Shelf(model, weights_changed)
        self._device = model.device
        self._clock = Clock(model.device)
        self._company = company
        self._company_seconds = company_seconds
        # Guards the line, what is under way, and who has begun; the device's work is done without it.
        self._changed = threading.Condition()
        self._line: Line[Wish] = Line()
        self._images: list[UnderWay] = []
        self._begun: set[Job[Wish]] = set()
        self._graphs = graphs
        self._forget_graphs = forget_graphs
        self._chores: deque[Chore] = deque()
        self._soon: deque[Chore] = deque()
        self._at_a_chore = False
        self._pausing = False
        self._stopped = False
        self._thread: threading.Thread | None = None
        self._steps: deque[Mark] = deque()
        # Waits for a card's results; as long as the thread that uses the card.
        self._pictures: ThreadPoolExecutor | None = None

    @property
    def pausing(self) -> bool:
        """Whether somebody has the device alone, or waits for what has begun to end."""
        return self._pausing

    def add(self, job: Job[Wish]) -> None:
        """Put a job at the end of the line."""
        with self._changed:
            self._line.add(job)
            self._wake()

    def when_idle(self, chore: Callable[[], None]) -> Future[None]:
        """Have something done on the device's thread once there is no request; one that comes waits for it to end."""
        return self._add_chore(chore, self._chores)

    def soon(self, chore: Callable[[], None]) -> Future[None]:
        """Have something short done there as soon as the images under way are done, before others begin."""
        return self._add_chore(chore, self._soon)

    def _add_chore(self, chore: Callable[[], None], line: deque[Chore]) -> Future[None]:
        done: Future[None] = Future()
        with self._changed:
            if self._stopped:
                done.cancel()
                return done
            line.append((chore, done))
            self._wake()
        return done

    def record(self, plan: Plan, together: int = 1, *, anew: bool = False) -> None:
        """A chore: have a graph ready for `together` images of a plan's size, and the decoder's kernels chosen.

        Args:
            anew: also where there is a graph, since passes of that size compute in another way by now.
        """
        with self._graphs.recording(anew=anew):
            self._pass(plan, together, self._graphs)

    def run_plainly(self, plan: Plan, together: int = 1) -> None:
        """A chore: one pass, and a picture of it, without any graph."""
        self._pass(plan, together, Graphs(self._device))

    def _pass(self, plan: Plan, together: int, graphs: Graphs) -> None:
        model = self.models.get(self.shelf.loaded) or self.models[self.default]
        self.shelf.bring(model.name)
        embeddings = model.prompts.encode(plan)
        images = [
            Denoising(
                model.pipeline, model.recipe.architecture, plan, seed, embeddings, self._device
            )
            for seed in range(together)
        ]
        predictions(model.denoiser, images, self._company, graphs)
        decode(model.pipeline.vae, images[0].latents)

    def _wake(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="device", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def cancel(self, job: Job[Wish]) -> None:
        """Have a job leave after the step it is in."""
        with self._changed:
            job.gone = True
            self._changed.notify_all()

    def stop(self) -> None:
        """End the thread after the step it is in, and wait for that. What is open is cancelled.

        At the interpreter's end too: a thread that is inside torch then would take the process down with it.
        """
        with self._changed:
            self._stopped = True
            thread = self._thread
            self._changed.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join(SECONDS_TO_STOP)

    @contextmanager
    def paused(self, patience: float) -> Iterator[None]:
        """Have the device alone, once the requests that have begun have ended. Those that come later wait.

        Raises `BusyError`, and lets them go on, when that takes more than `patience` seconds.
        """
        deadline = time.monotonic() + patience
        with self._changed:
            self._pausing = True
            try:
                while self._begun or self._at_a_chore:
                    remaining = deadline - time.monotonic()
                    if remaining <= 0:
                        raise BusyError(
                            f"{len(self._begun)} request(s) under way kept the model for too long for it to be "
                            "replaced. It goes on serving; try again when there is less to do."
                        )
                    self._changed.wait(remaining)
            except BaseException:
                self._pausing = False
                self._changed.notify_all()
                raise
        try:
            yield
        finally:
            with self._changed:
                self._pausing = False
                self._changed.notify_all()

    # What the thread does

    def _run(self) -> None:
        failure: str | None = None
        try:
            with torch.inference_mode():
                while (newcomers := self._await_work()) is not None:
                    if not newcomers and not self._images:
                        self._do_a_chore()
                        continue
                    for job, index in newcomers:
                        self._begin(job, index)
                    self._keep_pace()
                    self._take_steps()
                    self._decode_those_done()
        except Exception as error:
            logger.exception("the device %s failed", self._device)
            failure = _first_line(error)
        self._end(failure)

    def _end(self, failure: str | None) -> None:
        """Nobody may wait for a thread that is gone: all that is open ends with it. The next job begins another one."""
        with self._changed:
            jobs = self._begun.union(self._line)
            chores = [*self._soon, *self._chores]
            self._line.keep(lambda _: False)
            self._images, self._begun, self._at_a_chore = [], set(), False
            self._soon.clear()
            self._chores.clear()
            self._steps.clear()
            self._thread = None
            pictures, self._pictures = self._pictures, None
            self._changed.notify_all()
        for job in jobs:
            if failure is None:
                job.drop()
            else:
                job.fail(
                    DeviceError(
                        f"The device {self._device} failed ({failure}). Try again; if it goes on failing, start the "
                        "server anew, on another card if there is one."
                    )
                )
        for _, done in chores:
            done.cancel()
        # Libraries keep by thread what they have built for recorded kernels.
        self._forget_graphs()
        if pictures is not None:
            pictures.shutdown(wait=False)

    def _await_work(self) -> list[tuple[Job[Wish], int]] | None:
        """Wait until there is something to do; returns whose turn it is now. None is the end.

        Nobody new, and nobody under way, leaves time for a chore.
        """
        with self._changed:
            while not self._stopped:
                self._let_leave()
                room = self._company.most - len(self._images)
                wait = 0.0
                if self._soon and not self._pausing:
                    self._at_a_chore = not self._images
                    return []
                if self._images:
                    newcomers = self._line.take(room, self._images[0].job.group, self._may_begin)
                else:
                    eligible = self._whose_turn()
                    if not self._pausing:
                        wait = self._line.seconds_for_company(room, self._company_seconds, eligible)
                    newcomers = [] if wait else self._line.take(room, eligible=eligible)
                self._begun.update(job for job, _ in newcomers)
                if newcomers or self._images:
                    return newcomers
                if self._chores and not self._pausing and not wait:
                    self._at_a_chore = True
                    return []
                self._changed.wait(wait or None)
            return None

    def _do_a_chore(self) -> None:
        chore, done = (self._soon or self._chores).popleft()
        failure: str | None = None
        try:
            chore()
        except Exception as error:  # noqa: BLE001 - whoever wanted it done is told
            failure = f"{type(error).__name__}: {_first_line(error)}"
        # Not the error itself, whose frames would keep what it had on the device for as long as anybody keeps it.
        if failure is None:
            done.set_result(None)
        else:
            self._free()
            done.set_exception(RuntimeError(failure))
        with self._changed:
            self._at_a_chore = False
            self._changed.notify_all()

    def _whose_turn(self) -> Callable[[Job[Wish]], bool]:
        """Who may be taken next: everybody, or while its turn lasts those of the model that is on the device."""
        turn = max(SHORTEST_TURN, SWITCHES_IN_A_TURN * self.shelf.seconds)
        if self.shelf.shared and time.perf_counter() - self.shelf.since < turn:

            def stays(job: Job[Wish]) -> bool:
                return self._may_begin(job) and job.detail.model.name == self.shelf.loaded

            if any(map(stays, self._line)):
                return stays
        return self._may_begin

    def _may_begin(self, job: Job[Wish]) -> bool:
        return not self._pausing or job in self._begun

    def _let_leave(self) -> None:
        """Let go of what nobody waits for any more, on the device and in the line."""
        leaving: dict[Job[Wish], str] = {}
        for image in self._images:
            if image.job.left:
                leaving.setdefault(
                    image.job, f"seed {image.seed} ended after {image.denoising.state}"
                )
        for job in self._line:
            if job.left:
                leaving.setdefault(job, f"seed {job.detail.plan.seeds[job.begun]} was not begun")
        for job, state in leaving.items():
            logger.info("Cancelled: %s.", state)
            job.drop()
        # Of some, another image has failed.
        self._images = [image for image in self._images if image.job.open]
        self._line.keep(lambda job: job.open > 0)
        if any(not job.open for job in self._begun):
            self._begun = {job for job in self._begun if job.open}
            self._changed.notify_all()

    def _keep_pace(self) -> None:
        while len(self._steps) > STEPS_AHEAD:
            self._clock.wait(self._steps.popleft())

    def _begin(self, job: Job[Wish], index: int) -> None:
        waited = time.perf_counter() - job.asked
        job.asked = time.perf_counter()
        image = self._attempt(partial(self._noise, job, index, waited), job)
        if image is not None:
            with self._changed:
                self._images.append(image)

    def _noise(self, job: Job[Wish], index: int, waited: float) -> UnderWay:
        """The prompt read, where it has not been, and the noise that the image begins with."""
        wish, spent = job.detail, Spent()
        begun = self._clock.mark()
        if self.shelf.shared:
            self.shelf.bring(wish.model.name)
            begun = spent.add("switch", begun, self._clock.mark())
        if wish.embeddings is None:
            latest = self.models[wish.model.name]
            if wish.model is not latest:
                wish.plan = latest.plan(wish.request)
                wish.model = latest
            wish.embeddings = wish.model.prompts.encode(wish.plan)
            begun = spent.add("prompt", begun, self._clock.mark())
        denoising = Denoising(
            wish.model.pipeline,
            wish.model.recipe.architecture,
            wish.plan,
            wish.plan.seeds[index],
            wish.embeddings,
            self._device,
        )
        spent.add("denoise", begun, self._clock.mark())
        watching = None
        if wish.watch is not None:
            pictures = wish.model.previews if wish.previews else None
            watching = Watching(wish.watch, wish.plan.seeds[index], pictures)
            watching.attach(denoising.scheduler)
        return UnderWay(job, index, denoising, waited, spent, watching)

    def _take_steps(self) -> None:
        alike: dict[object, list[UnderWay]] = {}
        for image in self._images:
            alike.setdefault(image.denoising.shape, []).append(image)
        for images in alike.values():
            self._take_step(images)
        self._steps.append(self._clock.mark())

    def _take_step(self, images: list[UnderWay]) -> None:
        """One pass of the denoiser for images of equal shape, and each one's own step after it."""
        begun = self._clock.mark()
        found = self._attempt(
            partial(
                predictions,
                images[0].job.detail.model.denoiser,
                [image.denoising for image in images],
                self._company,
                self._graphs,
            ),
            images[0].job if len(images) == 1 else None,
        )
        if found is None:
            # Company takes memory too, and whoever fails must not take others along: each tries alone.
            if len(images) > 1:
                self._company.limit(len(images) // 2)
                for image in images:
                    self._take_step([image])
            return
        for image, prediction in zip(images, found, strict=True):
            self._attempt(partial(image.denoising.advance, prediction), image.job)
        ended = self._clock.mark()
        for image in images:
            image.spent.add("denoise", begun, ended, len(images))
        for image in images:
            image.tell()

    def _decode_those_done(self) -> None:
        for image in [image for image in self._images if image.denoising.done]:
            # Whoever left in the last step gets no picture; `_let_leave` says so.
            if image.job.left:
                continue
            vae = image.job.detail.model.pipeline.vae
            begun = self._clock.mark()
            decoded = self._attempt(partial(decode, vae, image.denoising.latents), image.job)
            if decoded is None:
                continue
            ended = image.spent.add("decode", begun, self._clock.mark())
            with self._changed:
                self._images.remove(image)
            if self._device.type != "cuda":
                self._hand_out(image, decoded, ended)
            else:
                self._pictures = self._pictures or ThreadPoolExecutor(1, "pictures")
                self._pictures.submit(self._hand_out, image, decoded, ended)

    def _hand_out(self, image: UnderWay, decoded: Decoded, ended: Mark) -> None:
        """Make a picture of what the device has made, once it has; on a card, on a thread beside the device's."""
        job = image.job

        def picture() -> GeneratedImage:
            self._clock.wait(ended)
            return image.picture(decoded)

        made = self._attempt(picture, job)
        if made is None:
            return
        job.asked = time.perf_counter()
        with self._changed:
            # Before anybody has the last one, since many a caller then wants the device for something else.
            if job.open == 1:
                self._begun.discard(job)
                self._changed.notify_all()
        job.settle(image.index, made)

    def _attempt(self, work: Callable[[], Result], job: Job[Wish] | None) -> Result | None:
        """Do it; whatever goes wrong, `job` hears of it, if there is one, and the device serves the next."""
        failure: Exception | None = None
        full: str | None = None
        try:
            return work()
        except Exception as error:  # noqa: BLE001 - it is its caller's, and is raised there
            if isinstance(error, RuntimeError) and ran_out_of_memory(error):
                full = _first_line(error)
            else:
                failure = error
        # Only here, with the exception gone, are its frames and their tensors gone too, and their memory to be had.
        if full is not None:
            self._free()
        try:
            if job is None:
                logger.warning(
                    "a pass of several images failed, and each tries alone: %s", full or failure
                )
            else:
                if full is not None:
                    plan = job.detail.plan
                    failure = OutOfMemoryError(
                        f"The device {self._device} ran out of memory on one image of {plan.width}x{plan.height} "
                        f"({full}). Ask for a smaller size, or give the model a card with more memory."
                    )
                assert failure is not None  # noqa: S101 - one of the two has happened
                self._fail(job, failure)
        finally:
            del failure  # or it would keep this frame, and this frame it
        return None

    def _fail(self, job: Job[Wish], failure: Exception) -> None:
        with self._changed:
            self._line.keep(lambda other: other is not job)
            if threading.current_thread() is self._thread:
                self._images = [image for image in self._images if image.job is not job]
                self._begun.discard(job)
            self._changed.notify_all()
        job.fail(failure)

    def _free(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]

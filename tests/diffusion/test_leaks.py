"""A thousand requests that end badly: each the next one's business no more than the last one's."""

import dataclasses
import gc
import sys
import threading
from collections import Counter

import psutil
import pytest
import torch

from diffusion.engine import Engine, GenerationRequest
from diffusion.errors import NonFiniteError, OutOfMemoryError
from tests.diffusion.support import LIGHTNING, build

REQUEST = GenerationRequest(prompt="a small red boat", width=64, height=64, steps=1, seed=0)
WAIT = 120
MIB = 2**20
BEFORE_MEASURING = 100  # caches and allocators have their size by then
REQUESTS = 1000


@dataclasses.dataclass(frozen=True)
class Held:
    """What a process holds that a leak would add to."""

    resident: int
    descriptors: int
    threads: int
    tensors: int

    @classmethod
    def now(cls, engine: Engine) -> "Held":
        # By then its thread has let go of the request that was the last.
        engine._loop.when_idle(lambda: None).result(WAIT)
        gc.collect()
        return cls(
            psutil.Process().memory_info().rss,
            psutil.Process().num_fds(),
            threading.active_count(),
            sum(type(thing) is torch.Tensor for thing in gc.get_objects()),
        )


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform == "win32", reason="counts file descriptors")
def test_nothing_leaks_over_a_thousand_requests_that_end_badly(model):
    pipeline = build(model)
    engine = Engine(pipeline, LIGHTNING)
    ends: Counter[str] = Counter()
    broken: list[BaseException | float] = []

    def break_down(_: object, __: object, output: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        if not broken:
            return output
        if isinstance(broken[0], BaseException):
            raise type(broken[0])(*broken[0].args)
        return (output[0] * broken[0],)

    pipeline.unet.register_forward_hook(break_down)

    def out_of_memory(request: GenerationRequest) -> None:
        broken[:] = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")]
        with pytest.raises(OutOfMemoryError):
            list(engine.generate(request))

    def not_a_number(request: GenerationRequest) -> None:
        broken[:] = [float("nan")]
        with pytest.raises(NonFiniteError):
            list(engine.generate(request))

    def cancelled(request: GenerationRequest) -> None:
        generation = engine.submit(dataclasses.replace(request, num_outputs=2))
        generation.cancel()

    def caller_gone(request: GenerationRequest) -> None:
        images = engine.generate(dataclasses.replace(request, num_outputs=3))
        next(images)
        del images

    def served(request: GenerationRequest) -> None:
        (made,) = engine.generate(request)
        assert made.seed == request.seed

    ways = (out_of_memory, served, not_a_number, served, cancelled, caller_gone)
    for number in range(REQUESTS):
        if number == BEFORE_MEASURING:
            before = Held.now(engine)
        way = ways[number % len(ways)]
        broken.clear()
        way(dataclasses.replace(REQUEST, seed=number, prompt=f"boat {number % 50}"))
        ends[way.__name__] += 1
    broken.clear()
    served(REQUEST)
    after = Held.now(engine)

    assert ends.total() == REQUESTS
    assert after.descriptors == before.descriptors
    assert after.threads == before.threads
    assert after.tensors <= before.tensors + 5  # of the request that was the last
    assert after.resident - before.resident < 16 * MIB

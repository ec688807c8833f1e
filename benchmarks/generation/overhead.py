"""What a request takes beyond its generation: the real Cog server and the demo's S3 on loopback, one request at a time.

The model is the demo's small one whatever else is measured, told that its native size is the one asked for: HTTP, PNG,
upload and signing do not depend on who painted.
"""

from __future__ import annotations

import json
import tempfile
import time
import urllib.request
import uuid
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.wire.measure import progress

WARM_UPS = 2


def run(size: int, requests: int) -> dict[str, Any]:
    """Each request's seconds from outside, and what the server says of them. Without its parts, says why."""
    try:
        from demo import stages
        from demo.processes import DemoError, Signals
        from demo.s3 import EmbeddedS3, EmbeddedS3Error
        from demo.small_sdxl import write_small_sdxl
    except ImportError as error:
        return {"skipped": str(error)}
    found: list[dict[str, float]] = []
    try:
        with ExitStack() as exits:
            folder = Path(exits.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
            place = stages.Workplace(folder, Signals(), exits)
            s3 = exits.enter_context(EmbeddedS3())
            stages.create_buckets(s3)
            model = write_small_sdxl(folder / "small-sdxl", native_size=size)
            stages.publish(place, s3, stages.create_keypair(s3, "model-publisher"), model)
            cog = stages.serve(place, s3, stages.create_keypair(s3, "model-runner"))
            for number in range(WARM_UPS + requests):
                one = _request(cog.address, number)
                if number >= WARM_UPS:
                    found.append(one)
                    progress(f"[request {number - WARM_UPS + 1} of {requests}] {_said(one)}")
    except (DemoError, EmbeddedS3Error) as error:
        return {"skipped": str(error).strip().splitlines()[0]}
    return {"size": size, "found": found}


def _request(address: str, number: int) -> dict[str, float]:
    from demo.processes import DemoError
    from demo.tutorial import fetch

    wanted = {"prompt": f"a lighthouse in a storm, number {number}", "seed": number}
    request = urllib.request.Request(  # noqa: S310 - loopback
        f"{address}/predictions/{uuid.uuid4()}",
        method="PUT",
        data=json.dumps({"input": wanted}).encode(),
        headers={"Content-Type": "application/json"},
    )
    started = time.perf_counter()
    _, body, _ = fetch(request)
    seconds = time.perf_counter() - started
    answer = json.loads(body)
    if answer.get("status") != "succeeded":
        raise DemoError(f"The prediction did not succeed: {answer.get('error') or answer}")
    timings: dict[str, float] = answer["metrics"]["timings"]
    generation = sum(timings[stage] for stage in ("prompt", "denoise", "decode"))
    return {"seconds": seconds, "overhead": seconds - generation, **timings}


def _said(one: dict[str, float]) -> str:
    return f"{one['seconds']:.3f} s, {one['overhead'] * 1000:.0f} ms of it beyond the generation"

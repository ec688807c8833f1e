"""Compiled code on its way from the bucket into torch's caches, beside the weights: a part of `loading`.

What is fetched is code: see docs/compiling.md for whom that trusts. Whatever fails here is a line in the log, and the
engine serves without.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import TYPE_CHECKING, Any

from diffusion.recipe import Recipe
from weights import Bucket
from weights.artifacts import fetch_artifacts
from weights.waterfall import ColdStart

if TYPE_CHECKING:
    import torch

    from diffusion.compiled import Compiling
    from settings import RunnerSettings

BLOB_NAME = "cache.tar.gz"
# Beside gigabytes of weights, megabytes of code have had time enough.
PATIENCE = 5.0  # seconds, after the weights are there

logger = logging.getLogger("loading")


class CompiledCode:
    """What the settings, the machine and the bucket say of compiled code. Begins to fetch at once, where it may."""

    def __init__(
        self,
        settings: RunnerSettings,
        bucket: Bucket | None,
        version: str,
        device: torch.device,
        dtype: torch.dtype,
        cold_start: ColdStart,
    ) -> None:
        mode = settings.compile_mode
        self._may_compile = mode == "on"
        self._cold_start = cold_start
        self._found: Future[frozenset[tuple[int, int]] | None] = Future()
        # On a CPU the pixels are stock's unless somebody asks for something else.
        if mode == "off" or bucket is None or (mode == "auto" and device.type == "cpu"):
            self._found.set_result(None)
            return
        from diffusion.compiled import artifact_key

        key = artifact_key(device, dtype, float8=settings.float8 == "on")
        threading.Thread(
            target=self._fetch,
            args=(bucket, settings.model_path, version, key, settings.compiled_sha256),
            name="compiled",
            daemon=True,
        ).start()

    def result(self, recipe: Recipe) -> Compiling | None:
        """What the engine is to have compiled; None for nothing. Waits a little for what is on its way."""
        from diffusion.compiled import Compiling

        sizes = None
        try:
            sizes = self._found.result(PATIENCE)
        except FutureTimeoutError:
            logger.warning(
                "compiled code is not used: it had not come %.0f s after the weights", PATIENCE
            )
        if sizes:
            return Compiling(sizes, only_from_artifacts=True)
        if not self._may_compile:
            return None
        logger.info(
            "compiling at the start, which takes a while: COMPILE is on, and there is nothing to use for this machine"
        )
        return Compiling(
            frozenset({(recipe.native_size, recipe.native_size)}), only_from_artifacts=False
        )

    def _fetch(
        self, bucket: Bucket, model_path: str, version: str, key: str, only: tuple[str, ...] | None
    ) -> None:
        sizes = None
        began = time.monotonic()
        size = 0
        try:
            artifacts = fetch_artifacts(bucket, model_path, version, key, only=only)
            if artifacts is not None:
                size = artifacts.total_bytes
                sizes = _sizes(artifacts.about)
                _load(artifacts.blobs)
        except Exception as error:  # noqa: BLE001 - it is only about speed
            sizes = None
            logger.warning("compiled code is not used: %s", error)
        finally:
            self._cold_start.add(
                "compiled",
                began,
                time.monotonic(),
                after=("imports",),
                bytes=size,
                found=sizes is not None,
            )
            self._found.set_result(sizes)


def _load(blobs: Mapping[str, bytes]) -> None:
    from diffusion.compiled import load_artifacts

    load_artifacts(blobs[BLOB_NAME])


def _sizes(about: Mapping[str, Any]) -> frozenset[tuple[int, int]]:
    return frozenset((int(width), int(height)) for width, height in about["sizes"])

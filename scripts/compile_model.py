"""Compiles a published model for machines of this one's kind, and publishes the result beside it.

Only the command line lives here; the work is in `loading` and the rooms. What it is for is in docs/compiling.md.

    python scripts/compile_model.py ByteDance/SDXL-Lightning model-storage
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # the rooms, from wherever this is run

from checks import check_bucket_name, check_model_path
from compiling import BLOB_NAME
from diffusion.errors import CompileError, DiffusionError
from diffusion.recipe import Recipe
from diffusion.sizes import ASPECT_RATIOS, size_for
from loading import load
from settings import (
    RunnerSettings,
    SettingsError,
    load_runner_settings,
)
from weights import Bucket, Manifest, ModelNotFoundError, WeightsError, read_latest, read_manifest
from weights.artifacts import AGAIN, publish_artifacts, read_artifacts
from weights.manifest import is_version
from weights.waterfall import ColdStart

FAILED, USAGE, INTERRUPTED = 1, 2, 130
# Of a server's own variables, those that what it compiles depends on; and those that say who we are to the bucket.
# Weights may lie in a folder here as they do there: with the pinned version in it nothing else is read.
OF_A_SERVER = ("DEVICE", "DTYPE", "FLOAT8", "BATCH_SIZE", "MODEL_FOLDER")

Size = tuple[int, int]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    for room in ("loading", "weights", "diffusion"):
        logging.getLogger(room).setLevel(logging.INFO)
    try:
        settings = _settings(options)
        with tempfile.TemporaryDirectory(prefix="compiled-") as folder:
            # Before torch is there to read it: what is saved is all of one cache, so it has to be this run's own.
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
            document = _run(settings, options)
    except KeyboardInterrupt:
        print("interrupted; nothing was published", file=sys.stderr)
        return INTERRUPTED
    except (SettingsError, WeightsError, DiffusionError) as error:
        print(f"compile_model: {error}", file=sys.stderr)
        if options.json:
            print(json.dumps({"error": str(error)}))
        return USAGE if isinstance(error, SettingsError) else FAILED
    if options.json:
        print(json.dumps(document, indent=1))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="compile_model.py",
        description="Compile a published model for machines of this one's kind, and publish the result beside it. Run "
        "it where the servers run: same card, same image, same DEVICE, DTYPE, FLOAT8 and BATCH_SIZE.",
        epilog="The bucket's keys, endpoint and region come from the environment, as for prepare_model.py.",
    )
    parser.add_argument("model_path", metavar="MODEL_PATH", type=_checked(check_model_path))
    parser.add_argument("bucket", metavar="BUCKET", type=_checked(check_bucket_name))
    parser.add_argument("--version", help="a version (default: the one latest.json names)")
    parser.add_argument(
        "--sizes",
        metavar="all|RATIO,...",
        type=_ratios,
        default=("1:1",),
        help="aspect ratios to compile, such as 1:1,16:9, or all of them (default: 1:1, which is always among them)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="say what would be compiled and where it would go; compile nothing and write nothing",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document instead of text"
    )
    return parser


def _checked(check: Any) -> Any:
    def checked(text: str) -> str:
        try:
            return str(check(text))
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} {error}") from None

    return checked


def _ratios(text: str) -> tuple[str, ...]:
    if text == "all":
        return ASPECT_RATIOS
    ratios = tuple(text.split(","))
    for ratio in ratios:
        if ratio not in ASPECT_RATIOS:
            raise argparse.ArgumentTypeError(
                f"{ratio!r} is none of {', '.join(ASPECT_RATIOS)} or all"
            )
    return ("1:1", *ratios)


def _settings(options: argparse.Namespace) -> RunnerSettings:
    """As a server would have them that serves this model; it makes no images, so the bucket for those is any."""
    ours = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(("AWS_", "S3_")) or name in OF_A_SERVER
    }
    named = {
        "MODEL_PATH": options.model_path,
        "MODEL_BUCKET_NAME": options.bucket,
        "PUBLIC_BUCKET_NAME": options.bucket,
    }
    settings = load_runner_settings(ours | named)
    bucket = Bucket(settings, options.bucket)
    version = options.version or read_latest(bucket, options.model_path)
    if version is None or not is_version(version):
        raise ModelNotFoundError(
            f"there is no version {options.version or ''} of {options.model_path} in bucket {options.bucket} to "
            "compile. Publish one with scripts/prepare_model.py; `python -m weights ls` lists what there is"
        )
    # Pinned, so that what is compiled and where it is published are one, whatever is published meanwhile.
    return load_runner_settings(ours | named | {"MODEL_VERSION": version})


def _run(settings: RunnerSettings, options: argparse.Namespace) -> dict[str, Any]:
    say = (lambda _text: None) if options.json else print
    bucket = Bucket(settings, options.bucket)
    version = str(settings.model_version)
    manifest = read_manifest(bucket, options.model_path, version)
    sizes = _sizes(manifest, options.sizes)
    key = _key(settings)
    place = f"{bucket.url(options.model_path)}/{version}"
    document: dict[str, Any] = {
        "model": options.model_path,
        "version": version,
        "key": key,
        "sizes": [_named([size]) for size in sizes],
    }
    say(f"{place}\nfor {key}\nsizes: {_named(sizes)}")
    if options.dry_run:
        there = _is_there(bucket, options.model_path, version, key)
        say(
            f"Dry run: nothing was compiled or written; it would be {'replaced' if there else 'new'} there."
        )
        return document | {"dry_run": True, "replaces": there}
    started = time.monotonic()
    data = _compile(settings, sizes)
    compiled = time.monotonic() - started
    published = publish_artifacts(
        bucket,
        options.model_path,
        version,
        key,
        {BLOB_NAME: data},
        {
            "sizes": [list(size) for size in sizes],
            "compiled_in_s": round(compiled, 1),
            "made": datetime.now(UTC).isoformat(timespec="seconds"),
            "tools": {name: metadata.version(name) for name in ("torch", "diffusers")},
        },
    )
    seconds = time.monotonic() - started
    sha256 = published.files[0].sha256
    say(f"Compiled in {compiled:.0f} s, {published.total_bytes / 1e6:.1f} MB published.")
    say(
        "Servers on machines of this kind use it from their next start on. To allow this and nothing else:"
    )
    say(f"COMPILED_SHA256={sha256}")
    return document | {
        "dry_run": False,
        "bytes": published.total_bytes,
        "sha256": sha256,
        "seconds": round(seconds, 1),
    }


def _compile(settings: RunnerSettings, sizes: list[Size]) -> bytes:
    """Load the model as a server does, have every size run once, and take what came of it.

    Raises CompileError when a size did not compile: what is published is all of what it says, and what may be there
    already could be more.
    """
    from diffusion.compiled import Compiling, save_artifacts

    print("compiling, which takes a minute or more for each size", file=sys.stderr)
    wanted = Compiling(frozenset(sizes), only_from_artifacts=False)
    engine = load(settings, ColdStart(), lambda: None, compiling=lambda _recipe: wanted)
    failed = [size for size in sizes if size not in engine.compiled]
    if failed:
        raise CompileError(
            f"{_named(failed)} did not compile, and nothing was published. The lines above say why. Leave what fails "
            f"out of --sizes to publish the others ({_named(sorted(engine.compiled)) or 'none'})."
        )
    return save_artifacts()


def _named(sizes: Iterable[Size]) -> str:
    return ", ".join(f"{width}x{height}" for width, height in sizes)


def _sizes(manifest: Manifest, ratios: tuple[str, ...]) -> list[Size]:
    native = Recipe.model_validate(manifest.recipe).native_size
    return list(dict.fromkeys(size_for(ratio, native) for ratio in ratios))


def _key(settings: RunnerSettings) -> str:
    from diffusion.compiled import artifact_key
    from diffusion.device import choose_device, choose_dtype

    device = choose_device(settings.device)
    dtype = choose_dtype(device, settings.dtype)
    return artifact_key(device, dtype, float8=settings.float8 == "on")


def _is_there(bucket: Bucket, model_path: str, version: str, key: str) -> bool:
    try:
        return read_artifacts(bucket, model_path, version, key) is not None
    except WeightsError as error:
        print(f"what is there cannot be used: {str(error).removesuffix(AGAIN)}", file=sys.stderr)
        return True


if __name__ == "__main__":
    sys.exit(main())

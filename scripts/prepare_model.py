"""Brings a model from the Hugging Face Hub, a local folder or another bucket into a bucket, ready to be served.

Only the command line lives here; the work is in the preparation and weights rooms.

    python scripts/prepare_model.py ByteDance/SDXL-Lightning model-storage
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # the rooms, from wherever this is run

import preparation
from preparation import Progress, Request
from preparation.assemble import Prepared
from preparation.patterns import Patterns
from preparation.plan import Plan
from preparation.report import (
    describe_download,
    describe_folder,
    describe_outcome,
    describe_publication,
    describe_source,
    environment_block,
)
from preparation.truss import plan_truss, read_truss
from settings import StorageSettings, load_source_settings
from weights import Bucket


def main() -> int:
    """Run the command line; returns the exit code."""
    arguments = _parse()
    progress = Progress()
    try:
        with progress.stopping_on_signals():
            _run(arguments, progress)
    except KeyboardInterrupt:
        preparation.end_interrupted()
    except preparation.EXPECTED_ERRORS as error:
        sys.stderr.write(f"prepare_model: {error}\n")
        return preparation.exit_code(error)
    return 0


def _run(arguments: argparse.Namespace, progress: Progress) -> None:
    settings = load_source_settings()
    request = Request(
        source=arguments.source,
        name=arguments.name,
        revision=arguments.revision,
        folder=arguments.destdir,
        jobs=arguments.jobs,
        repair=arguments.repair,
        options=preparation.Options(
            loras=tuple(arguments.lora),
            lightning_steps=arguments.lightning_steps,
            vae=arguments.vae,
            dtype=arguments.dtype,
            max_shard_size=arguments.max_shard_size,
        ),
        access=settings,
        patterns=Patterns(tuple(arguments.allow), tuple(arguments.ignore)),
    )
    if not arguments.from_truss:
        _carry_out(request, preparation.make_plan(request), settings, arguments, progress)
        return
    config = Path(arguments.source)
    requests = read_truss(config, request)
    plans = plan_truss(config, requests)
    for number, (request, plan) in enumerate(zip(requests, plans, strict=True), start=1):
        print(f"\n{request.source} ({number} of {len(plans)})\n", flush=True)
        _carry_out(request, plan, settings, arguments, progress)


def _carry_out(
    request: Request,
    plan: Plan,
    settings: StorageSettings,
    arguments: argparse.Namespace,
    progress: Progress,
) -> None:
    if arguments.dry_run:
        _show(request, plan, settings, arguments.bucket, progress)
        return
    bucket = Bucket(settings, arguments.bucket, connections=2 * request.jobs)
    preparation.check_bucket(bucket, request.model_path)
    with preparation.alone(request):
        prepared = preparation.prepare(request, plan, progress)
        publication = preparation.compare(request, prepared, bucket, progress)
        preparation.upload(request, publication, progress)
    print(describe_outcome(publication))
    if made_of := describe_source(prepared.recipe.source):
        print(made_of)
    print("\nThe environment of a deployment:\n")
    print(environment_block(settings, arguments.bucket, request.model_path))


def _show(
    request: Request, plan: Plan, settings: StorageSettings, bucket: str, progress: Progress
) -> None:
    """The dry run: with everything on this disk, down to what the bucket lacks; else what would be downloaded."""
    if preparation.needs_no_network(plan):
        with preparation.alone(request):
            prepared = preparation.prepare(request, plan, progress)
            _show_publication(request, prepared, settings, bucket, progress)
        print("Dry run: nothing was written to the bucket.")
        print(f"The model was prepared in {prepared.folder}, where it is kept for the real run.")
        return
    print(describe_download(plan))
    if found := preparation.find_already_prepared(request, plan):
        _show_publication(request, found, settings, bucket, progress)
    else:
        print(describe_folder(plan))
    print("Dry run: nothing was written to the bucket.")


def _show_publication(
    request: Request, prepared: Prepared, settings: StorageSettings, bucket: str, progress: Progress
) -> None:
    target = Bucket(settings, bucket, connections=request.jobs)
    print(describe_publication(preparation.compare(request, prepared, target, progress)))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="prepare_model.py",
        description="Bring a model from the Hugging Face Hub, a local folder or another bucket into a bucket.",
        epilog="The bucket's keys, endpoint and region come from the environment (AWS_ACCESS_KEY_ID, "
        "AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL_S3, AWS_REGION); those of an s3:// source are the same, or what "
        "SOURCE_AWS_ACCESS_KEY_ID and so on say, of a gs:// source what "
        "GOOGLE_APPLICATION_CREDENTIALS says; the Hub is reached as HF_ENDPOINT, HF_TOKEN, HF_HOME and "
        "HF_HUB_OFFLINE say.",
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a Hub repo (OWNER/NAME), a local diffusers folder or one in a bucket (s3://BUCKET/FOLDER, "
        "gs://BUCKET/FOLDER); "
        "ByteDance/SDXL-Lightning is joined with SDXL base",
    )
    parser.add_argument("bucket", metavar="BUCKET", help="the bucket to publish to")
    parser.add_argument(
        "--name",
        metavar="MODEL_PATH",
        help="what to call the model in the bucket; the repo's own name by default, needed for anything else",
    )
    parser.add_argument(
        "--revision",
        metavar="REV",
        help="branch, tag or commit of the Hub repo (default: its main branch)",
    )
    _add_conversions(parser)
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="PATTERN",
        help="take only files of the source that match this shell pattern, or another --allow",
    )
    parser.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="PATTERN",
        help="take no file of the source that matches, such as '*.fp16.*' for the full precision; repeatable",
    )
    parser.add_argument(
        "--from-truss",
        action="store_true",
        help="SOURCE is a Truss config: publish every entry of its model_cache, each as a model of its own",
    )
    parser.add_argument(
        "--destdir",
        type=Path,
        default=preparation.DEFAULT_FOLDER,
        metavar="DIR",
        help="where the prepared folder is kept (default: %(default)s)",
    )
    parser.add_argument(
        "-j",
        "--jobs",
        type=_positive,
        default=preparation.DEFAULT_JOBS,
        metavar="N",
        help="downloads, digests or uploads at once (default: %(default)s)",
    )
    parser.add_argument(
        "--repair",
        action="store_true",
        help="send every file again, also those the bucket seems to have: mends objects that were damaged there",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="show what would move, and write nothing to the bucket; of a repo only small config files are "
        "downloaded, a folder is prepared in --destdir and kept there",
    )
    arguments = parser.parse_args()
    if arguments.from_truss:
        for option in ("name", "revision", "allow", "ignore"):
            if getattr(arguments, option):
                parser.error(f"--from-truss: every entry says that itself; leave out --{option}")
    return arguments


def _add_conversions(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("conversion")
    group.add_argument(
        "--lora",
        action="append",
        default=[],
        type=_lora,
        metavar="REPO[:FILE][@WEIGHT]",
        help="merge a LoRA in, from a repo or a .safetensors file on this disk; may be repeated",
    )
    group.add_argument(
        "--lightning-steps",
        type=int,
        choices=(1, 2, 4, 8),
        help="make it a few-step model: any SDXL finetune with SDXL-Lightning's LoRA (2, 4 or 8); for "
        "ByteDance/SDXL-Lightning itself, which of its UNets (default: 4)",
    )
    group.add_argument(
        "--vae",
        metavar="REPO",
        help="another VAE, from a repo or a folder; madebyollin/sdxl-vae-fp16-fix does not overflow in float16",
    )
    group.add_argument("--dtype", choices=preparation.DTYPES, help="cast all weights to this")
    group.add_argument(
        "--max-shard-size",
        type=_size,
        default=preparation.Options().max_shard_size,
        metavar="SIZE",
        help="split weight files over this size (default: 960MB, which caches in front of S3 keep)",
    )


def _lora(text: str) -> preparation.LoraName:
    try:
        return preparation.LoraName.parse(text)
    except preparation.UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _size(text: str) -> int:
    try:
        return preparation.parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _positive(text: str) -> int:
    number = int(text)
    if not 1 <= number <= 256:
        raise argparse.ArgumentTypeError(f"{text} is not between 1 and 256")
    return number


if __name__ == "__main__":
    sys.exit(main())

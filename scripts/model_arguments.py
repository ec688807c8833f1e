"""What a person may write after prepare_model.py, and how it is read."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import NoReturn

import preparation
from weights.manifest import is_version


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """As ever; a program that asked for JSON gets the error as such, too."""
        if "--json" in sys.argv[1:]:
            print(json.dumps({"error": message}))
        super().error(message)


def parse() -> argparse.Namespace:
    """The command line of prepare_model.py; ends the process for one that cannot be understood."""
    parser = _Parser(
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
        "gs://BUCKET/FOLDER), or a single-file checkpoint (FILE.safetensors, OWNER/NAME:FILE.safetensors); "
        "ByteDance/SDXL-Lightning is joined with SDXL base",
    )
    parser.add_argument("bucket", metavar="BUCKET", nargs="?", help="the bucket to publish to")
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
    parser.add_argument(
        "--base",
        metavar="REPO",
        help="of a single-file checkpoint: the repo or folder to take configs and tokenizers from (default: its own, "
        "where that is a whole model, else the one its family is known by)",
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
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--prune",
        type=_positive,
        metavar="KEEP",
        help="afterwards, delete all but the KEEP newest versions, never the one published or the one being served; "
        "needs s3:DeleteObject",
    )
    instead.add_argument(
        "--activate",
        type=_version,
        metavar="VERSION",
        help="instead of publishing, serve a version that is in the bucket; SOURCE is not looked at, and can be left "
        "out where --name is given",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON document on standard output instead of text",
    )
    # Intermixed, or a BUCKET that comes after an option would not be seen.
    arguments = parser.parse_intermixed_args()
    if arguments.bucket is None:
        if arguments.activate is None or not arguments.name:
            parser.error("the following arguments are required: BUCKET")
        arguments.source, arguments.bucket = arguments.name, arguments.source
    if arguments.from_truss:
        if arguments.activate is not None:
            parser.error(
                "--from-truss publishes several models; --activate is of one: name it instead"
            )
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
    group.add_argument(
        "--preview-vae",
        metavar="REPO",
        help="publish a tiny VAE beside the model, for previews of images under way: from a repo or a folder, or auto "
        "for the one that its family is known by (default: none; previews are an eighth of the image's size then)",
    )
    group.add_argument("--dtype", choices=preparation.DTYPES, help="cast all weights to this")
    group.add_argument(
        "--max-shard-size",
        type=_size,
        metavar="SIZE",
        help="split weight files over this size (default: 960MB, which caches in front of S3 keep; a published model's "
        "stay as they are)",
    )


def _lora(text: str) -> preparation.LoraName:
    try:
        return preparation.LoraName.parse(text)
    except preparation.UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _version(text: str) -> str:
    if not is_version(text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a version's name (32 hexadecimal digits)"
        )
    return text


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

"""`python -m weights`: look at, load, pull, verify, roll back and prune the models of a bucket."""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from checks import check_bucket_name, check_model_path
from settings import (
    SettingsError,
    load_command_settings,
)
from weights.activation import activate
from weights.artifacts import verify_artifacts
from weights.bucket import Bucket
from weights.digests import Progress
from weights.errors import WeightsError
from weights.listing import VersionInfo, list_models, list_versions
from weights.options import ReadOptions
from weights.prune import plan_pruning, prune
from weights.pull import DEFAULT_CONNECTIONS, pull, verify
from weights.snapshot import Snapshot, find_snapshot
from weights.stream import ModelStream

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status: 0 done, 1 failed, 2 a wrong command line, 130 interrupted."""
    options = _parser().parse_args(arguments)
    try:
        settings = load_command_settings()
        name = options.bucket or settings.model_bucket
        if not name:
            raise SettingsError(
                "no bucket given: name it with --bucket, or set MODEL_BUCKET_NAME. Example: --bucket model-storage"
            )
        bucket = Bucket(settings, name, connections=options.connections)
        result: int = options.command(bucket, options)
    except SettingsError as error:
        return _fail(options, error, USAGE)
    except WeightsError as error:
        return _fail(options, error, FAILED)
    except KeyboardInterrupt:
        left = (
            "run it again to finish: a version may be half deleted"
            if options.command is _prune
            else "nothing was left half done"
        )
        print(f"interrupted; {left}", file=sys.stderr)
        return INTERRUPTED
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m weights",
        description="Look at, load, pull, verify, roll back and prune the models of a bucket. The bucket's server and "
        "keys come from AWS_ENDPOINT_URL_S3, AWS_REGION, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.",
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--bucket",
        type=_bucket_name,
        help="the bucket that holds the models (default: MODEL_BUCKET_NAME)",
    )
    common.add_argument(
        "--json", action="store_true", help="print one JSON document instead of text"
    )
    common.add_argument(
        "-c",
        "--connections",
        type=_count,
        default=DEFAULT_CONNECTIONS,
        help="reads at once (default: %(default)s)",
    )
    one_version = argparse.ArgumentParser(add_help=False)
    one_version.add_argument("model_path", metavar="MODEL_PATH", type=_model_path)
    one_version.add_argument("--version", help="a version (default: the one latest.json names)")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Any, parents: list[argparse.ArgumentParser], help: str) -> Any:
        added = commands.add_parser(name, parents=parents, help=help, description=help)
        added.set_defaults(command=command)
        return added

    ls = add("ls", _ls, [common], "list the models of the bucket, or the versions of one")
    ls.add_argument("model_path", metavar="MODEL_PATH", type=_model_path, nargs="?")
    add(
        "load",
        _load,
        [common, one_version],
        "read a whole model into memory, verify it, report the rate",
    )
    to_folder = add(
        "pull", _pull, [common, one_version], "write a model to a plain diffusers folder"
    )
    to_folder.add_argument("--to", metavar="DIR", type=Path, required=True)
    add(
        "verify",
        _verify,
        [common, one_version],
        "compare every byte in the bucket with the manifest",
    )
    roll = add("activate", _activate, [common], "make a version the one readers get: the roll-back")
    roll.add_argument("model_path", metavar="MODEL_PATH", type=_model_path)
    roll.add_argument("version", metavar="VERSION")
    old = add("prune", _prune, [common], "delete old versions of a model, never the active one")
    old.add_argument("model_path", metavar="MODEL_PATH", type=_model_path)
    old.add_argument(
        "--keep",
        metavar="N",
        type=_keep,
        required=True,
        help="how many of the newest versions stay",
    )
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 256:
        raise argparse.ArgumentTypeError("must be a number from 1 to 256")
    return int(text)


def _keep(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(
            "must be a number from 1 on: the newest version always stays"
        )
    return int(text)


def _bucket_name(text: str) -> str:
    return _checked(check_bucket_name, text)


def _model_path(text: str) -> str:
    return _checked(check_model_path, text)


def _checked(check: Callable[[str], str], text: str) -> str:
    try:
        return check(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} {error}") from None


def _ls(bucket: Bucket, options: argparse.Namespace) -> int:
    if options.model_path is None:
        models = list_models(bucket)
        lines = models or [f"no published model in bucket {bucket.name}"]
        return _report(options, {"bucket": bucket.name, "models": models}, lines)
    versions = list_versions(bucket, options.model_path)
    lines = []
    for found in versions:
        lines.append(
            f"{'*' if found.active else ' '} {found.version}  {found.published:%Y-%m-%d %H:%M}  "
            f"{_size(found.bytes):>9}  {found.problem or _origin(found)}"
        )
        lines += [f"    compiled for {key}" for key in found.compiled]
    document = [vars(found) | {"published": found.published.isoformat()} for found in versions]
    return _report(options, {"bucket": bucket.name, "versions": document}, lines)


def _load(bucket: Bucket, options: argparse.Namespace) -> int:
    snapshot = _snapshot(bucket, options)
    tensors = 0
    with ModelStream(
        bucket, snapshot, options=ReadOptions(connections=options.connections)
    ) as stream:
        stream.configs()
        with _progress(options, "load", snapshot.total_bytes) as on_bytes:
            seen = 0
            held = []  # the whole model stays in memory, as it would in a server
            for tensor in stream.tensors():
                held.append(tensor)
                tensors += 1
                on_bytes(stream.bytes_read - seen)
                seen = stream.bytes_read
    seconds = stream.seconds or 0.0
    rate = snapshot.total_bytes / seconds / 1e9 if seconds else 0.0
    document = _about(snapshot) | {
        "tensors": tensors,
        "seconds": round(seconds, 4),
        "gigabytes_per_second": round(rate, 4),
        "verified": snapshot.verifiable,
    }
    how = "every byte verified" if snapshot.verifiable else "sizes and ETags compared, no digests"
    return _report(
        options,
        document,
        [
            f"{snapshot.model_path} {snapshot.version}",
            f"{_size(snapshot.total_bytes)} in {seconds:.2f} s, {rate:.2f} GB/s, {tensors} tensors; {how}",
        ],
    )


def _pull(bucket: Bucket, options: argparse.Namespace) -> int:
    snapshot = _snapshot(bucket, options)
    with _progress(options, "pull", snapshot.total_bytes) as on_bytes:
        pull(bucket, snapshot, options.to, connections=options.connections, on_bytes=on_bytes)
    return _report(
        options,
        _about(snapshot) | {"folder": str(options.to), "verified": snapshot.verifiable},
        [
            f"{snapshot.model_path} {snapshot.version}: {_size(snapshot.total_bytes)} in {options.to}"
        ],
    )


def _verify(bucket: Bucket, options: argparse.Namespace) -> int:
    snapshot = _snapshot(bucket, options)
    with _progress(options, "verify", snapshot.total_bytes) as on_bytes:
        report = verify(bucket, snapshot, connections=options.connections, on_bytes=on_bytes)
    compiled, spoilt = verify_artifacts(bucket, snapshot.model_path, snapshot.version)
    wrong = len(report.problems)
    beside = f", and compiled code for {compiled} kind(s) of machine" if compiled else ""
    verdict = (
        f"{wrong} of {len(snapshot.files)} files are not what was published"
        if wrong
        else f"{len(snapshot.files)} files, {_size(snapshot.total_bytes)}{beside}: every byte is what was published"
    )
    if spoilt and not wrong:
        verdict = f"the model is what was published, its compiled code is not ({len(spoilt)} of {compiled})"
    problems = [*report.problems, *spoilt]
    return _report(
        options,
        _about(snapshot) | {"verified": not problems, "problems": problems},
        [*problems, f"{snapshot.model_path} {snapshot.version}: {verdict}"],
        FAILED if problems else OK,
    )


def _activate(bucket: Bucket, options: argparse.Namespace) -> int:
    model_path = options.model_path
    activate(bucket, model_path, options.version)
    return _report(
        options,
        {"model": model_path, "version": options.version, "active": True},
        [f"{model_path} now serves {options.version}"],
    )


def _prune(bucket: Bucket, options: argparse.Namespace) -> int:
    pruning = plan_pruning(bucket, options.model_path, options.keep)
    deleted = prune(pruning, jobs=options.connections)
    lines = [f"deleted {found.version}  {_size(found.bytes):>9}" for found in deleted]
    freed = sum(found.bytes for found in deleted)
    summary = (
        f"{len(deleted)} versions deleted ({_size(freed)})" if deleted else "nothing to delete"
    )
    lines.append(f"{options.model_path}: {summary}, {len(pruning.kept)} kept")
    document = {
        "bucket": bucket.name,
        "model": options.model_path,
        "deleted": [{"version": found.version, "bytes": found.bytes} for found in deleted],
        "kept": pruning.kept,
    }
    return _report(options, document, lines)


def _snapshot(bucket: Bucket, options: argparse.Namespace) -> Snapshot:
    return find_snapshot(bucket, options.model_path, options.version)


def _about(snapshot: Snapshot) -> dict[str, Any]:
    return {
        "model": snapshot.model_path,
        "version": snapshot.version,
        "bytes": snapshot.total_bytes,
        "files": len(snapshot.files),
    }


@contextmanager
def _progress(options: argparse.Namespace, what: str, total: int) -> Iterator[Progress]:
    """A bar on standard error while it is a terminal, so that standard output stays the result alone."""
    quiet = options.json or not sys.stderr.isatty()
    with tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=quiet, leave=False) as bar:
        lock = threading.Lock()

        def on_bytes(count: int) -> None:
            with lock:
                bar.update(count)

        yield on_bytes


def _report(
    options: argparse.Namespace, document: dict[str, Any], lines: list[str], status: int = OK
) -> int:
    print(json.dumps(document, indent=1) if options.json else "\n".join(lines))
    return status


def _fail(options: argparse.Namespace, error: Exception, status: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    if options.json:
        print(json.dumps({"error": str(error)}))
    return status


def _size(count: int | None) -> str:
    if count is None:
        return "?"
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _origin(found: VersionInfo) -> str:
    """Where it came from, under which licence, and with which options it was prepared that are not as always."""
    source, made = found.source or {}, found.provenance or {}
    known = [str(source[name]) for name in ("repo", "revision", "licence") if source.get(name)]
    options = made.get("options")
    if isinstance(options, dict):
        known += [
            f"{name}={_plain(value)}"
            for name, value in sorted(options.items())
            if value not in known
        ]
    return "  ".join(known)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


if __name__ == "__main__":
    status = main()
    if status == INTERRUPTED:
        # The interpreter's own exit would wait for threads that are stuck on a server that says nothing.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)

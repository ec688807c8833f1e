"""Brings a model from the Hugging Face Hub, a local folder or another bucket into a bucket, ready to be served.

Only the command line lives here; the work is in the preparation and weights rooms.

    python scripts/prepare_model.py ByteDance/SDXL-Lightning model-storage
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # the rooms, from wherever this is run

import preparation
from preparation import Progress, Request
from preparation.assemble import Prepared
from preparation.document import plan_document, pruning_document, publication_document
from preparation.patterns import Patterns
from preparation.plan import Plan
from preparation.progress import INTERRUPTED
from preparation.report import (
    describe_difference,
    describe_download,
    describe_folder,
    describe_outcome,
    describe_pruning,
    describe_publication,
    describe_source,
    environment,
    environment_block,
)
from preparation.truss import plan_truss, read_truss
from scripts.model_arguments import parse
from settings import StorageSettings, load_source_settings
from weights import Bucket, Publication, activate, read_manifest
from weights.prune import plan_pruning


def main() -> int:
    """Run the command line; returns the exit code."""
    arguments = parse()
    progress = Progress()
    try:
        with progress.stopping_on_signals():
            document = _run(arguments, progress)
    except KeyboardInterrupt:
        if arguments.json:
            print(json.dumps({"error": INTERRUPTED}))
        preparation.end_interrupted()
    except preparation.EXPECTED_ERRORS as error:
        sys.stderr.write(f"prepare_model: {error}\n")
        if arguments.json:
            print(json.dumps({"error": str(error)}))
        return preparation.exit_code(error)
    if arguments.json:
        print(json.dumps(document, indent=1))
    return 0


def _run(arguments: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Do what was asked, and tell a person of it unless it is a program that asks: returns the document for that."""
    settings = load_source_settings()
    request = Request(
        source=arguments.source,
        name=arguments.name,
        revision=arguments.revision,
        folder=arguments.destdir,
        jobs=arguments.jobs,
        repair=arguments.repair,
        base=arguments.base,
        options=preparation.Options(
            loras=tuple(arguments.lora),
            lightning_steps=arguments.lightning_steps,
            vae=arguments.vae,
            preview_vae=arguments.preview_vae,
            dtype=arguments.dtype,
            max_shard_size=arguments.max_shard_size,
        ),
        access=settings,
        patterns=Patterns(tuple(arguments.allow), tuple(arguments.ignore)),
    )
    if arguments.activate is not None:
        return _activate(arguments, request, settings)
    if not arguments.from_truss:
        plan = preparation.make_plan(request)
        return _carry_out(request, [plan], settings, arguments, progress)
    config = Path(arguments.source)
    requests = read_truss(config, request)
    plans = plan_truss(config, requests)
    documents = []
    for number, request in enumerate(requests):
        _teller(arguments)(f"\n{request.source} ({number + 1} of {len(plans)})\n")
        documents.append(_carry_out(request, plans[number:], settings, arguments, progress))
    return {"models": documents}


def _carry_out(
    request: Request,
    plans: Sequence[Plan],
    settings: StorageSettings,
    arguments: argparse.Namespace,
    progress: Progress,
) -> dict[str, Any]:
    """Carry out the first of the plans; the others are of the models that come after it."""
    plan = plans[0]
    if arguments.dry_run:
        return _show(arguments, request, plan, settings, progress)
    say = _teller(arguments)
    bucket = Bucket(settings, arguments.bucket, connections=2 * request.jobs)
    preparation.check_bucket(bucket, request.model_path)
    stages, *later = map(preparation.stages_to_come, plans)
    with preparation.alone(request), progress.over(stages, later):
        prepared = preparation.prepare(request, plan, progress)
        publication = preparation.compare(request, prepared, bucket, progress)
        preparation.upload(request, publication, progress)
    say(describe_outcome(publication))
    if not publication.unchanged:
        say(describe_difference(publication))
    if made_of := describe_source(prepared.recipe.source):
        say(made_of)
    document = _document(publication, settings, dry_run=False)
    if arguments.prune:
        pruning, deleted = preparation.delete_old(request, publication, arguments.prune)
        say(describe_pruning(pruning, deleted))
        document |= pruning_document(pruning, deleted)
    say("\nThe environment of a deployment:\n")
    say(environment_block(settings, arguments.bucket, request.model_path))
    return document


def _activate(
    arguments: argparse.Namespace, request: Request, settings: StorageSettings
) -> dict[str, Any]:
    """Re-point latest.json. The source is not looked at: it only says, as ever, what the model is called."""
    bucket = Bucket(settings, arguments.bucket)
    previous = preparation.check_bucket(bucket, request.model_path)
    read_manifest(bucket, request.model_path, arguments.activate)
    if not arguments.dry_run:
        activate(bucket, request.model_path, arguments.activate)
    serves = "would serve" if arguments.dry_run else "now serves"
    where = f"s3://{arguments.bucket}/{request.model_path}"
    before = f" (before: {previous})" if previous else ""
    _teller(arguments)(f"{where} {serves} version {arguments.activate}{before}.")
    return {
        "dry_run": arguments.dry_run,
        "bucket": arguments.bucket,
        "model": request.model_path,
        "version": arguments.activate,
        "previous_version": previous,
        "active": not arguments.dry_run or previous == arguments.activate,
    }


def _show(
    arguments: argparse.Namespace,
    request: Request,
    plan: Plan,
    settings: StorageSettings,
    progress: Progress,
) -> dict[str, Any]:
    """The dry run: with everything on this disk, down to what the bucket lacks; else what would be downloaded."""
    say = _teller(arguments)
    if preparation.needs_no_network(plan):
        with preparation.alone(request):
            prepared = preparation.prepare(request, plan, progress)
            document = _show_publication(arguments, request, prepared, settings, progress)
        say("Dry run: nothing was written to the bucket.")
        say(f"The model was prepared in {prepared.folder}, where it is kept for the real run.")
        return document
    say(describe_download(plan))
    if found := preparation.find_already_prepared(request, plan):
        document = _show_publication(arguments, request, found, settings, progress)
    else:
        say(describe_folder(plan))
        if arguments.prune:
            say("Which versions --prune would delete is known once the model has been prepared.")
        variables = environment(settings, arguments.bucket, request.model_path)
        document = plan_document(plan, arguments.bucket, request.model_path, variables)
    say("Dry run: nothing was written to the bucket.")
    return document


def _show_publication(
    arguments: argparse.Namespace,
    request: Request,
    prepared: Prepared,
    settings: StorageSettings,
    progress: Progress,
) -> dict[str, Any]:
    bucket = Bucket(settings, arguments.bucket, connections=request.jobs)
    publication = preparation.compare(request, prepared, bucket, progress)
    say = _teller(arguments)
    say(describe_publication(publication))
    say(describe_difference(publication))
    document = _document(publication, settings, dry_run=True)
    if arguments.prune:
        pruning = plan_pruning(
            bucket, request.model_path, arguments.prune, also=[publication.version]
        )
        say(describe_pruning(pruning, pruning.deleted, dry_run=True))
        document |= pruning_document(pruning, pruning.deleted)
    return document


def _document(
    publication: Publication, settings: StorageSettings, *, dry_run: bool
) -> dict[str, Any]:
    variables = environment(settings, publication.bucket.name, publication.model_path)
    return publication_document(publication, variables, dry_run=dry_run)


def _teller(arguments: argparse.Namespace) -> Callable[[str], None]:
    """`print`, unless standard output is kept for the one JSON document."""
    return (lambda _text: None) if arguments.json else print


if __name__ == "__main__":
    sys.exit(main())

"""The whole journey of a model's owner: source → plan → folder → bucket. What the command line calls.

Each step is another module's; this one knows their order, and which failures are the caller's to correct.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path

from botocore.exceptions import NoCredentialsError, PartialCredentialsError

from diffusion.errors import DiffusionError, ModelError
from diffusion.recipe import Recipe, Source
from preparation.assemble import Prepared, assemble, digests_of, find_prepared
from preparation.bucket_origin import BucketOrigin
from preparation.checkpoint import open_checkpoint
from preparation.errors import PreparationError, UsageError
from preparation.folder import LocalFolder
from preparation.gcs_origin import open_gcs
from preparation.hub import Hub
from preparation.lightning import STEPS, is_lightning, plan_lightning
from preparation.lock import claim
from preparation.lora import on_this_disk
from preparation.options import Options, altered, open_place
from preparation.patterns import EVERYTHING, Patterns
from preparation.plan import Plan, as_split, plan_mirror
from preparation.progress import Progress
from preparation.provenance import asked_of, tools
from preparation.s3_origin import open_s3
from preparation.single_file import find_base, plan_single_file
from preparation.source import SourceKind, SourceName, parse_source
from settings import SettingsError, SourceSettings
from weights import (
    Bucket,
    BucketError,
    Publication,
    WeightsError,
    plan_publication,
    publish,
    read_latest,
)
from weights.manifest import check_path
from weights.prune import Pruning, StoredVersion, plan_pruning, prune

DEFAULT_FOLDER = Path("~/.cache/lightning-in-a-bucket")
DEFAULT_JOBS = 8
_FILES = (SourceKind.HUB_FILE, SourceKind.FILE)
CACHE_NAME = "sources"  # beside the prepared folders: what was downloaded from buckets

# Everything that preparing a model may raise on purpose.
EXPECTED_ERRORS = (PreparationError, WeightsError, DiffusionError, SettingsError)

_CALLERS_MISTAKES = frozenset(
    {
        "AccessDenied",
        "AuthorizationHeaderMalformed",
        "ExpiredToken",
        "InvalidAccessKeyId",
        "InvalidBucketName",
        "InvalidToken",
        "NoSuchBucket",
        "PermanentRedirect",
        "SignatureDoesNotMatch",
    }
)


@dataclass(frozen=True)
class Request:
    """What a person asked for, checked before anything else happens."""

    source: str
    name: str | None = None
    revision: str | None = None
    folder: Path = DEFAULT_FOLDER
    jobs: int = DEFAULT_JOBS
    repair: bool = False
    base: str | None = None
    options: Options = field(default_factory=Options)
    patterns: Patterns = EVERYTHING
    access: SourceSettings = field(default_factory=SourceSettings, repr=False)
    hub: Hub = field(default_factory=Hub)

    @property
    def place(self) -> SourceName:
        """What `source` names. Raises UsageError."""
        return parse_source(self.source, named=self.name is not None)

    @property
    def model_path(self) -> str:
        """What the model will be called in the bucket, and what MODEL_PATH will be.

        Raises:
            UsageError: a folder or bucket without a name, or a name that is no plain path.
        """
        place = self.place
        if self.name is None and place.kind not in (SourceKind.HUB, SourceKind.HUB_FILE):
            raise UsageError(
                f"A model from {place.kind.value} needs a name: add --name, for example --name {place.suggested_name}."
            )
        name = self.name if self.name is not None else place.repo or self.source
        try:
            return check_path(name)
        except ValueError as error:
            raise UsageError(
                f"--name {name!r} cannot be a model's path in the bucket: {error}."
            ) from error

    @property
    def prepared_folder(self) -> Path:
        """Flat, so that one model's folder never lies inside another's."""
        return self.folder.expanduser() / self.model_path.replace("/", "--")


def make_plan(request: Request) -> Plan:
    """Decide what will be published; reads listings and small config files only.

    Raises:
        UsageError: the source cannot be published as it is, or not be made what is asked for; the message says why.
        PreparationError: the Hub cannot be reached.
    """
    _ = request.model_path  # refused before anything is looked up
    options = request.options
    if request.base and request.place.kind not in _FILES:
        raise UsageError(
            f"--base is for single-file checkpoints; {request.source} is {request.place.kind.value}, which has its "
            "own configs."
        )
    if request.place.kind is SourceKind.HUB and is_lightning(request.source):
        plan = plan_lightning(
            request.hub,
            request.revision,
            request.jobs,
            request.patterns,
            options.lightning_steps or STEPS,
        )
        return altered(plan, replace(options, lightning_steps=None), request.hub)
    return altered(_plan_source(request), options, request.hub)


def _plan_source(request: Request) -> Plan:
    place = request.place
    if request.revision and place.kind not in (SourceKind.HUB, SourceKind.HUB_FILE):
        raise UsageError(
            f"--revision is of a Hub repo. {request.source} is {place.kind.value}, which has one state: it is taken as "
            "it is now. (A version that this script published has a folder of its own, which can be given.)"
        )
    if place.kind in _FILES:
        return _plan_single_file(request)
    if place.kind is SourceKind.FOLDER:
        folder = LocalFolder.open(Path(request.source).expanduser())
        return plan_mirror(folder, None, request.jobs, request.patterns)
    if place.bucket:
        opened = open_s3 if place.kind is SourceKind.S3 else open_gcs
        cache = request.folder.expanduser() / CACHE_NAME
        origin = opened(place, request.access, cache=cache, jobs=request.jobs)
        return _plan_from_bucket(origin, request)
    try:
        repo = request.hub.open(request.source, request.revision)
    except UsageError as error:
        if not Path(request.source).is_dir():
            raise
        raise UsageError(f"{error} If the local folder is meant, add --name.") from error
    source = Source(repo=repo.repo_id, revision=repo.commit, licence=repo.licence)
    return plan_mirror(repo, source, request.jobs, request.patterns)


def _plan_single_file(request: Request) -> Plan:
    place = request.place
    if request.patterns:
        raise UsageError(f"--allow and --ignore choose among files; {request.source} is one.")
    if place.kind is SourceKind.HUB_FILE:
        checkpoint = open_checkpoint(request.hub.open(place.repo, request.revision), place.file)
    else:
        file = on_this_disk(request.source)
        if not file.is_file():
            raise UsageError(
                f"There is no file {file}. Give a single-file checkpoint, or OWNER/NAME:FILE of one on the Hub."
            )
        checkpoint = open_checkpoint(LocalFolder.of_file(file), file.name)
    named = open_place(request.base, request.hub) if request.base else None
    return plan_single_file(checkpoint, named or find_base(checkpoint, request.hub), request.jobs)


def _plan_from_bucket(origin: BucketOrigin, request: Request) -> Plan:
    """A published model keeps its recipe and where it once came from: the same files are then the same version."""
    if not origin.recipe:
        source = Source(repo=origin.label)
        return plan_mirror(origin, source, request.jobs, request.patterns)
    try:
        recipe = Recipe.model_validate(origin.recipe)
    except ModelError as error:
        raise UsageError(f"{origin.label}: {error}") from error
    return as_split(plan_mirror(origin, recipe.source, request.jobs, request.patterns, recipe))


def check_bucket(bucket: Bucket, model_path: str) -> str | None:
    """Ask the bucket one thing, so that wrong keys or a wrong name show before gigabytes move.

    Returns the version it serves now, if any can be told. Raises `weights.BucketError`.
    """
    try:
        return read_latest(bucket, model_path)
    except BucketError:
        raise
    except WeightsError:
        return None  # a latest.json that cannot be read is mended by publishing


def needs_no_network(plan: Plan) -> bool:
    """Whether every file of the plan is on this disk already, outside any cache."""
    return all(origin.is_local for origin, _ in plan.fetched())


def alone(request: Request) -> AbstractContextManager[None]:
    """To be entered around `prepare` and all that reads what it made: a second run of the same model is refused.

    Raises `PreparationError`.
    """
    return claim(request.prepared_folder)


def prepare(request: Request, plan: Plan, progress: Progress) -> Prepared:
    """Download, check and convert. Raises `PreparationError`."""
    return assemble(plan, request.prepared_folder, jobs=request.jobs, progress=progress)


def find_already_prepared(request: Request, plan: Plan) -> Prepared | None:
    """What an earlier run left, if it still is what the plan would give."""
    return find_prepared(plan, request.prepared_folder)


def compare(
    request: Request, prepared: Prepared, bucket: Bucket, progress: Progress
) -> Publication:
    """Hash the folder and find what the bucket lacks; writes nothing."""
    folder = prepared.folder
    size = sum(file.stat().st_size for file in _published_files(folder))
    recipe = prepared.recipe.model_dump(mode="json")
    with progress.stage("Hash", size) as stage:
        return plan_publication(
            folder,
            bucket,
            request.model_path,
            recipe,
            provenance={
                "options": asked_of(request),
                "tools": tools(),
            },
            remembered=digests_of(folder),
            repair=request.repair,
            jobs=request.jobs,
            on_bytes=stage.advance,
        )


def upload(request: Request, publication: Publication, progress: Progress) -> None:
    """Make the bucket serve it."""
    with progress.stage("Upload", publication.upload_bytes) as stage:
        publish(publication, jobs=request.jobs, on_bytes=stage.advance)


def delete_old(
    request: Request, publication: Publication, keep: int
) -> tuple[Pruning, tuple[StoredVersion, ...]]:
    """After publishing, delete all but the `keep` newest versions, and tell which went.

    Raises `weights.BucketError`, which says that the publication itself has succeeded.
    """
    bucket, model_path = publication.bucket, publication.model_path
    try:
        pruning = plan_pruning(bucket, model_path, keep, also=[publication.version])
        return pruning, prune(pruning, jobs=request.jobs)
    except BucketError as error:
        raise BucketError(
            f"Version {publication.version} is published and served, but older ones could not all be deleted: {error}",
            error.code,
        ) from error


def exit_code(error: Exception) -> int:
    """2 where the caller can correct the command, the environment or the model; 1 for what failed on its own."""
    if isinstance(error, PreparationError):
        return error.exit_code
    if isinstance(error, BucketError):
        no_keys = isinstance(error.__cause__, (NoCredentialsError, PartialCredentialsError))
        return 2 if no_keys or error.code in _CALLERS_MISTAKES else 1
    return 2 if isinstance(error, (SettingsError, DiffusionError)) else 1


def _published_files(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file() and not file.name.startswith(".")]

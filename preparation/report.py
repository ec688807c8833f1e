"""What a preparation would move or has moved, as text for a person. Decides nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from diffusion.recipe import Source
from preparation.amounts import human_size
from preparation.assemble import is_rewritten
from preparation.convert import TORCH_NAMES, shard_name
from preparation.plan import Component, Plan
from settings import StorageSettings
from weights import Publication
from weights.difference import total_bytes
from weights.manifest import FileEntry
from weights.prune import Pruning, StoredVersion


def describe_download(plan: Plan) -> str:
    """A table of the files a plan needs, which of them are here already, and the sum of the rest."""
    rows: list[tuple[str, str, str]] = []
    missing_bytes = 0
    for origin, paths in plan.fetched():
        missing = frozenset(origin.missing(paths))
        missing_bytes += sum(origin.files[path] for path in missing)
        for path in sorted(paths):
            state = "download" if path in missing else "on disk"
            rows.append((state, human_size(origin.files[path]), f"{origin.label}: {path}"))
    return f"Files needed ({human_size(missing_bytes)} to download):\n{_table(rows)}"


def describe_folder(plan: Plan) -> str:
    """A table of what would be published, as far as listings tell: nothing is hashed or compared."""
    sizes = {path: len(data) for path, data in plan.texts.items()}
    sizes |= {copy.target: copy.origin.files[copy.path] for copy in plan.copies}
    rows = [("", human_size(size), f"{path}{_note(path, plan)}") for path, size in sizes.items()]
    for component in plan.components:
        rows += _component_rows(component, plan)
    rows.sort(key=lambda row: row[2])
    return f"Files to publish (before comparing with the bucket):\n{_table(rows)}"


def _note(path: str, plan: Plan) -> str:
    """What may yet be changed in a text: it takes the VAE's weights to tell, which need not be here."""
    marked = path == "vae/config.json" and plan.recipe.architecture.upcasts_vae
    return " (with force_upcast set, should the VAE overflow float16)" if marked else ""


def _component_rows(component: Component, plan: Plan) -> Iterable[tuple[str, str, str]]:
    total = sum(component.sizes)
    if is_rewritten(component, plan):
        cast = f" as {TORCH_NAMES[component.dtype]}" if component.dtype else ""
        limit = plan.shard_limit
        split = f", in shards of at most {human_size(limit)}" if total > limit else ""
        name = f"{component.name}/{component.stem}*.safetensors"
        return [("", f"<= {human_size(total)}", f"{name}{cast}{split}")]
    count = len(component.files)
    return [
        ("", human_size(size), f"{component.name}/{shard_name(component.stem, number, count)}")
        for number, size in enumerate(component.sizes, start=1)
    ]


def describe_publication(publication: Publication) -> str:
    """A table of what publishing would do with each file, and the sum of what it would send."""
    uploads = {entry.path for entry in publication.uploads}
    copies = {entry.path for entry, _ in publication.copies}
    rows = [
        (
            "upload" if entry.path in uploads else "copy" if entry.path in copies else "there",
            human_size(entry.size),
            entry.path,
        )
        for entry in publication.files
    ]
    head = (
        f"Version {publication.version} of {publication.model_path} "
        f"({human_size(publication.upload_bytes)} of {human_size(publication.total_bytes)} to upload):"
    )
    return f"{head}\n{_table(rows)}"


def describe_outcome(publication: Publication) -> str:
    """One line on what was published."""
    where = f"s3://{publication.bucket.name}/{publication.model_path}"
    if publication.unchanged:
        return f"Unchanged: {where} already serves version {publication.version}; nothing was uploaded."
    copied = f", {len(publication.copies)} copied inside the bucket" if publication.copies else ""
    return (
        f"Published {where} version {publication.version}: {len(publication.files)} files, "
        f"{human_size(publication.total_bytes)} ({len(publication.uploads)} uploaded, "
        f"{human_size(publication.upload_bytes)}{copied})."
    )


def describe_difference(publication: Publication) -> str:
    """How the version differs from the one before, in files and bytes."""
    found = publication.difference
    if found is None:
        before = publication.previous_version
        return (
            f"Version {before}, served before, cannot be read to compare with."
            if before
            else "It is the first version of this model to be served."
        )

    def counted(what: str, entries: Sequence[FileEntry]) -> str:
        return f"{len(entries)} {what} ({human_size(total_bytes(entries))})"

    parts = [
        counted(what, entries)
        for what, entries in (
            ("added", found.added),
            ("changed", found.changed),
            ("removed", found.removed),
            ("the same", found.same),
        )
        if entries
    ]
    recipe = "; the recipe is another" if found.recipe_changed else ""
    return f"Files, compared with version {found.since}: {', '.join(parts)}{recipe}."


def describe_pruning(
    pruning: Pruning, deleted: Sequence[StoredVersion], *, dry_run: bool = False
) -> str:
    """Which versions went, or would go."""
    doing = "Would delete" if dry_run else "Deleted"
    lines = [
        f"{doing} version {found.version} ({human_size(found.bytes)}"
        f"{'' if found.published else ', never published whole'})."
        for found in deleted
    ]
    count = len(pruning.kept)
    lines.append(
        f"{count} version{'s' if count != 1 else ''} of {pruning.model_path} "
        f"{'would stay' if dry_run else 'kept'}{'' if deleted else '; there is none to delete'}."
    )
    return "\n".join(lines)


def describe_source(source: Source | None) -> str | None:
    """What the model was made of, as its manifest records it; None for a folder that says nothing of it."""
    if source is None or source.repo is None:
        return None
    at = f"@{source.revision}" if source.revision else ""
    parts = source.parts or (f"{source.repo}{at}",)
    return "\n".join(["Made of:", *(f"  {part}" for part in parts)])


def environment(settings: StorageSettings, bucket: str, model_path: str) -> dict[str, str]:
    """The variables of a deployment, less its keypair: that is the workload's own, and no publisher's.

    Publishing knows nothing of the bucket for images; for its name there is a placeholder.
    """
    endpoint = {"AWS_ENDPOINT_URL_S3": settings.endpoint_url} if settings.endpoint_url else {}
    return {
        **endpoint,
        "AWS_REGION": settings.region or ("auto" if endpoint else "<region of the buckets>"),
        "MODEL_PATH": model_path,
        "MODEL_BUCKET_NAME": bucket,
        "PUBLIC_BUCKET_NAME": "<your image bucket>",
    }


def environment_block(settings: StorageSettings, bucket: str, model_path: str) -> str:
    """All of the variables, as lines; for the keypair there are placeholders."""
    variables = {
        "AWS_ACCESS_KEY_ID": "<access key ID of the workload keypair>",
        "AWS_SECRET_ACCESS_KEY": "<secret access key of the workload keypair>",
        **environment(settings, bucket, model_path),
    }
    return "\n".join(f"{name}={value}" for name, value in variables.items())


def _table(rows: Sequence[tuple[str, str, str]]) -> str:
    widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
    return "\n".join(
        f"  {state:<{widths[0]}}  {size:>{widths[1]}}  {path}".rstrip()
        for state, size, path in rows
    )

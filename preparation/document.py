"""What a preparation would do or has done, as one JSON document for a program. Decides nothing, and holds no secret."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from diffusion.recipe import Source
from preparation.plan import Plan
from weights import Publication
from weights.difference import Difference, total_bytes
from weights.manifest import FileEntry
from weights.prune import Pruning, StoredVersion


def publication_document(
    publication: Publication, environment: Mapping[str, str], *, dry_run: bool
) -> dict[str, Any]:
    """Of a dry run the same, with the states that files would have afterwards."""
    uploads = {entry.path for entry in publication.uploads}
    copies = {entry.path for entry, _ in publication.copies}

    def state(path: str) -> str:
        return "uploaded" if path in uploads else "copied" if path in copies else "there"

    made = publication.provenance or {}
    return {
        "dry_run": dry_run,
        "bucket": publication.bucket.name,
        "model": publication.model_path,
        "version": publication.version,
        "previous_version": publication.previous_version,
        "unchanged": publication.unchanged,
        "files": [
            {
                "path": entry.path,
                "size": entry.size,
                "sha256": entry.sha256,
                "state": state(entry.path),
            }
            for entry in publication.files
        ],
        "bytes": publication.total_bytes,
        "uploaded_bytes": publication.upload_bytes,
        "difference": _difference(publication.difference),
        **_origin(publication.manifest.recipe.get("source")),
        "options": made.get("options"),
        "tools": made.get("tools"),
        "environment": dict(environment),
    }


def plan_document(
    plan: Plan, bucket: str, model_path: str, environment: Mapping[str, str]
) -> dict[str, Any]:
    """What a dry run knows before anything is downloaded: no version, and no comparison with the bucket."""
    files = []
    for origin, paths in plan.fetched():
        missing = frozenset(origin.missing(paths))
        files += [
            {
                "origin": origin.label,
                "path": path,
                "size": origin.files[path],
                "state": "to download" if path in missing else "on disk",
            }
            for path in sorted(paths)
        ]
    return {
        "dry_run": True,
        "bucket": bucket,
        "model": model_path,
        "version": None,
        "needed_files": files,
        "download_bytes": sum(file["size"] for file in files if file["state"] == "to download"),
        **_origin(plan.recipe.source),
        "environment": dict(environment),
    }


def pruning_document(pruning: Pruning, deleted: Iterable[StoredVersion]) -> dict[str, Any]:
    """To be added to the publication's."""
    return {
        "deleted": [{"version": found.version, "bytes": found.bytes} for found in deleted],
        "kept": list(pruning.kept),
    }


def _difference(found: Difference | None) -> dict[str, Any] | None:
    if found is None:
        return None

    def group(entries: tuple[FileEntry, ...]) -> dict[str, Any]:
        return {
            "files": len(entries),
            "bytes": total_bytes(entries),
            "paths": [entry.path for entry in entries],
        }

    return {
        "since": found.since,
        "added": group(found.added),
        "changed": group(found.changed),
        "removed": group(found.removed),
        "same": group(found.same),
        "recipe_changed": found.recipe_changed,
    }


def _origin(source: Source | Mapping[str, Any] | None) -> dict[str, Any]:
    known = source.model_dump(mode="json") if isinstance(source, Source) else dict(source or {})
    return {"source": known or None, "licence": known.get("licence")}

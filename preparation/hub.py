"""What lies in a Hugging Face Hub repo, and fetching it, through huggingface_hub alone.

So HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE mean here what they mean everywhere, and files already in a
person's cache are used from there. Knows nothing of which files a pipeline needs.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx2
import yaml
from huggingface_hub import (
    HfApi,
    constants,
    get_cached_repo_tree,
    get_token,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub import errors as hub_errors
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.repocard import metadata_load
from tqdm.auto import tqdm

from preparation.errors import PreparationError, UsageError
from preparation.origin import OnBytes
from preparation.parallel import for_each
from weights.remembered import Remembered

E = TypeVar("E", bound=BaseException)

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Written into the cache together with the listing, so that a later run can work offline.
QUIET_S = 0.3
MOST_S = 3.0  # whoever pressed Ctrl-C is waiting

_ALWAYS = ["README.md", "model_index.json"]


def is_repo_id(text: str) -> bool:
    """Whether `text` has the form OWNER/NAME."""
    return _REPO_ID.fullmatch(text) is not None


@dataclass(frozen=True)
class Hub:
    """A Hub, and the cache on this disk. What is None comes from huggingface_hub's own environment variables."""

    endpoint: str | None = None
    cache_dir: Path | None = None
    token: str | None = None

    @property
    def url(self) -> str:
        return (self.endpoint or constants.ENDPOINT).rstrip("/")

    @property
    def cache(self) -> Path:
        return self.cache_dir or Path(constants.HF_HUB_CACHE)

    def open(self, repo_id: str, revision: str | None = None) -> HubRepo:
        """Resolve the revision (a branch, tag or commit; the default branch where None) and list what it holds.

        Without a network, or with HF_HUB_OFFLINE=1, what the cache knows is used.

        Raises:
            UsageError: no such repo or revision, or no access to it.
            PreparationError: the Hub cannot be reached and the cache does not know the repo.
        """
        api = HfApi(endpoint=self.endpoint, token=self.token)
        with self.explained("looking up", repo_id, revision):
            resolved = api.resolve_revision(repo_id, revision=revision, cache_dir=self.cache_dir)
            snapshot = snapshot_download(
                repo_id,
                revision=resolved,
                allow_patterns=_ALWAYS,
                endpoint=self.endpoint,
                cache_dir=self.cache_dir,
                token=self.token,
                tqdm_class=_NoBar,
            )
            tree = get_cached_repo_tree(repo_id, revision=resolved, cache_dir=self.cache_dir)
        return HubRepo(
            hub=self,
            repo_id=repo_id,
            commit=resolved.resolved,
            files={file.path: file.size for file in tree},
            licence=_licence(Path(snapshot) / "README.md"),
        )

    @contextmanager
    def explained(self, doing: str, repo_id: str, revision: str | None = None) -> Iterator[None]:
        try:
            yield
        except PreparationError:
            raise
        except Exception as error:
            explained = self._explain(error, doing, repo_id, revision)
            if explained is None:
                raise
            raise explained from error

    def _explain(
        self, error: Exception, doing: str, repo_id: str, revision: str | None
    ) -> PreparationError | None:
        """The error in words a person can act on; None for one that is no fault of the Hub, the disk or the caller."""
        where = f"{repo_id} on {self.url}"
        hidden = _find(error, hub_errors.HfHubHTTPError)
        if isinstance(hidden, hub_errors.GatedRepoError):
            return UsageError(
                f"{repo_id} is gated: its owner wants a licence accepted first. Accept it at {self.url}/{repo_id}, "
                f"then set HF_TOKEN to a token of that account ({self._token_state()})."
            )
        if isinstance(hidden, hub_errors.RevisionNotFoundError):
            return UsageError(
                f"{repo_id} has no revision {revision or 'main'!r}. {self.url}/{repo_id}/tree/main lists its branches "
                "and tags; --revision also takes a commit."
            )
        if isinstance(hidden, hub_errors.RepositoryNotFoundError):
            return UsageError(
                f"There is no model repo {where}, or it is private. Check the spelling; for a private repo set "
                f"HF_TOKEN to a token that may read it ({self._token_state()})."
            )
        if hidden is not None:
            return self._explain_status(hidden, doing, where)
        if isinstance(error, hub_errors.HFValidationError):
            return UsageError(
                f"{repo_id!r} is not the name of a Hub repo, which looks like OWNER/NAME."
            )
        if constants.is_offline_mode():
            return PreparationError(
                f"{doing.capitalize()} {repo_id}: offline mode is on (HF_HUB_OFFLINE) and the cache in {self.cache} "
                "does not have all of it. Run once with a network, or unset HF_HUB_OFFLINE."
            )
        unreachable = (
            httpx2.HTTPError,
            hub_errors.LocalEntryNotFoundError,
            hub_errors.RevisionResolutionError,
            hub_errors.CachedRepoTreeNotFoundError,
        )
        if isinstance(error, unreachable):
            cause = _find(error, httpx2.HTTPError)
            reason = f" ({type(cause).__name__})" if cause else ""
            return PreparationError(
                f"{doing.capitalize()} {where}: the Hub could not be reached{reason}. Check the network, "
                "HF_ENDPOINT and any proxy, then run the same command again; finished files are kept."
            )
        if isinstance(error, OSError):
            return PreparationError(
                f"{doing.capitalize()} {where} into {self.cache}: {error.strerror or error}. "
                "Check its permissions and free space, or set HF_HOME to another folder."
            )
        return None

    def _explain_status(
        self, error: hub_errors.HfHubHTTPError, doing: str, where: str
    ) -> PreparationError:
        status = error.response.status_code
        if status in (401, 403):
            return UsageError(
                f"{doing.capitalize()} {where}: access was refused (HTTP {status}). Set HF_TOKEN to a valid token "
                f"with read access ({self._token_state()})."
            )
        return PreparationError(
            f"{doing.capitalize()} {where}: the Hub answered HTTP {status}. Run the same command again later; "
            "finished files are kept."
        )

    def _token_state(self) -> str:
        return (
            "one is set, but it does not suffice"
            if self.token or get_token()
            else "none is set now"
        )


@dataclass(frozen=True)
class HubRepo:
    """One commit of a Hub repo: an `Origin`."""

    hub: Hub
    repo_id: str
    commit: str
    files: Mapping[str, int] = field(repr=False)
    licence: str | None

    @property
    def label(self) -> str:
        return self.repo_id

    @property
    def home(self) -> Path:
        return self.hub.cache

    @property
    def is_local(self) -> bool:
        return False

    def read(self, path: str) -> bytes:
        return self._download(path).read_bytes()

    def missing(self, paths: Iterable[str]) -> list[str]:
        return [path for path in paths if self._cached(path) is None]

    def fetch(self, paths: Iterable[str], *, jobs: int, on_bytes: OnBytes) -> dict[str, Path]:
        bar = type("Bar", (_ForwardingBar,), {"on_bytes": staticmethod(on_bytes)})
        wanted = sorted(paths, key=lambda path: -self.files[path])
        try:
            fetched = for_each(wanted, lambda path: self._download(path, bar), jobs=jobs)
        except KeyboardInterrupt:
            self._remove_incomplete()
            raise
        return dict(zip(wanted, fetched, strict=True))

    def check(
        self, paths: Mapping[str, Path], *, jobs: int, on_bytes: OnBytes, remembered: Remembered
    ) -> None:
        """The cache names each file after the digest that the Hub gave for it; the Hub's client checks sizes only."""
        for_each(paths.items(), lambda item: self._check(*item, on_bytes, remembered), jobs=jobs)

    def fingerprint(self, path: str) -> str:
        return f"{self.repo_id}@{self.commit}/{path}"

    def _cached(self, path: str) -> Path | None:
        found = try_to_load_from_cache(
            self.repo_id, path, cache_dir=self.hub.cache_dir, revision=self.commit
        )
        return Path(found) if isinstance(found, str) else None

    def _download(self, path: str, bar: Any = None) -> Path:
        with self.hub.explained(f"downloading {path} of", self.repo_id, self.commit):
            return Path(
                hf_hub_download(
                    self.repo_id,
                    path,
                    revision=self.commit,
                    endpoint=self.hub.endpoint,
                    cache_dir=self.hub.cache_dir,
                    token=self.hub.token,
                    tqdm_class=bar or _NoBar,
                )
            )

    def _remove_incomplete(self) -> None:
        """Remove what threads of ours that are stuck had begun to write: nothing would ever take it up again.

        Until none appears for a moment: a thread may just be about to begin its file.
        """
        until = time.monotonic() + QUIET_S
        latest = time.monotonic() + MOST_S
        while time.monotonic() < min(until, latest):
            if self._remove_open():
                until = time.monotonic() + QUIET_S
            time.sleep(QUIET_S / 10)

    def _remove_open(self) -> bool:
        """Whether there was any.

        What another program is downloading into the same cache stays: only files that this process has open are ours.
        """
        ours = set()
        for descriptor in os.listdir("/dev/fd"):  # noqa: PTH208 - no paths, but numbers
            with suppress(OSError):
                ours.add(_identity(os.fstat(int(descriptor))))
        folder = self.hub.cache / repo_folder_name(repo_id=self.repo_id, repo_type="model")
        removed = False
        for file in folder.glob("blobs/*.incomplete"):
            with suppress(OSError):
                if _identity(file.stat()) in ours:
                    file.unlink()
                    removed = True
        return removed

    def _check(self, path: str, pointer: Path, on_bytes: OnBytes, remembered: Remembered) -> None:
        expected = pointer.readlink().name if pointer.is_symlink() else ""
        if re.fullmatch(r"[0-9a-f]{64}", expected):
            digest = remembered.read(pointer, on_bytes).sha256
        elif re.fullmatch(r"[0-9a-f]{40}", expected):
            content = pointer.read_bytes()  # small: what is large has a SHA-256
            digest = hashlib.sha1(
                f"blob {len(content)}\0".encode() + content, usedforsecurity=False
            ).hexdigest()  # as git names a file
            on_bytes(len(content))
        else:  # a cache without links (Windows) has lost the digest
            on_bytes(pointer.stat().st_size)
            return
        if digest != expected:
            raise PreparationError(
                f"{path} of {self.repo_id} is damaged on this disk: its digest is {digest}, the Hub gives "
                f"{expected}. Delete {pointer.resolve()} and run the same command again."
            )


class _ForwardingBar:
    """What huggingface_hub drives instead of a tqdm bar: it hands every byte on.

    Bytes that arrive from the network and bytes written to disk are counted separately by the Hub's newer storage;
    what counts here is what lies on disk.
    """

    on_bytes: OnBytes  # set by a subclass: the Hub's client takes a class, and looks for its methods on it

    def __init__(self, *_values: object, **_options: object) -> None:
        """Whatever a display would need is not needed."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        return None

    def update(self, size: float | None = 1) -> None:
        self.on_bytes(int(size or 0))

    def update_transfer(self, size: float | None = 1) -> None:
        """Bytes off the wire: not what is counted."""

    def set_postfix_str(self, *_text: object, **_options: object) -> None:
        """A rate for a display that is not this one."""

    def set_transfer_postfix_str(self, *_text: object, **_options: object) -> None:
        """A rate for a display that is not this one."""

    def close(self) -> None:
        """Nothing to put away."""


class _NoBar(tqdm):  # type: ignore[type-arg]  # not subscriptable at run time
    """For the few kilobytes that are fetched while planning."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "disable": True})


def _licence(card: Path) -> str | None:
    """The licence as the repo's card states it: the same data that the Hub's pages show, and it is there offline."""
    if not card.is_file():
        return None
    try:
        data = metadata_load(card) or {}
    except (ValueError, yaml.YAMLError):
        return None  # a card that is not as it should be is no reason to refuse the model
    licence = data.get("license")
    if licence == "other":
        licence = data.get("license_name") or licence
    if isinstance(licence, list):
        return ", ".join(str(one) for one in licence) or None
    return str(licence) if licence else None


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _find(error: BaseException, kind: type[E]) -> E | None:
    """The error itself, or what it was raised from, when that is of this kind."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, kind):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None

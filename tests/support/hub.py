"""A small Hugging Face Hub on loopback, for tests: real HTTP, driven by the real huggingface_hub client.

It stands in for huggingface.co, which tests must not depend on. It serves repos from folders and speaks the part of
the protocol that reading needs: model info, tree and paths-info, resolve with HEAD, ranges, ETags and the redirect of
large files to their storage (another port, as the Hub's is another host), gated and private repos with the same status
codes and X-Error-Code headers, and branch names that move. It is not the Hub: there is no Xet storage (large files
travel as plain LFS), no git, no upload, no rate limit, and no search.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

# What a repo's default .gitattributes sends to large file storage.
LFS_SUFFIXES = (
    *(".bin", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data"),
    *(".pickle", ".pkl", ".pt", ".pth", ".safetensors"),
)
PAGE_SIZE = 50  # entries of a listing; small, so that its pagination is used


@dataclass(frozen=True)
class HubFile:
    """One file at one commit."""

    path: str
    place: Path
    size: int
    sha256: str
    git_id: str

    @property
    def is_lfs(self) -> bool:
        return self.path.endswith(LFS_SUFFIXES)

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.git_id

    def listing(self) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "type": "file",
            "path": self.path,
            "size": self.size,
            "oid": self.git_id,
        }
        if self.is_lfs:
            entry["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": 134}
        return entry


@dataclass
class HubRepository:
    """A repo: what each commit holds, and which commit each branch is at."""

    repo_id: str
    gated: bool = False
    private: bool = False
    accepted_by: tuple[str, ...] | None = (
        None  # tokens of who accepted its licence; None: everyone with one
    )
    commits: dict[str, dict[str, HubFile]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LoggedRequest:
    """What a client asked for, in the order of arrival."""

    method: str
    path: str
    range: str | None
    authorised: bool

    @property
    def resolved_file(self) -> str | None:
        """`OWNER/NAME/path` when this asked for a file of a repo."""
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", self.path)
        return f"{match[1]}/{match[2]}" if match else None


class LoopbackHub:
    """The server. Repos may be added while it runs; `accepted_tokens` may read gated and private ones."""

    def __init__(self, *, accepted_tokens: tuple[str, ...] = ("hf_reader",)) -> None:
        self.accepted_tokens = accepted_tokens
        self.repositories: dict[str, HubRepository] = {}
        self.requests: list[LoggedRequest] = []
        self.failures: dict[str, int] = {}
        self.cut_short: dict[str, int] = {}
        self.held_fragment = ""
        self._holding = threading.Event()
        self._released = threading.Event()
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
        self._threads = [
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
            for server in self._servers
        ]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._servers[0].server_port}"

    @property
    def storage_url(self) -> str:
        """Where large files lie: another origin, which must never see a token."""
        return f"http://127.0.0.1:{self._servers[1].server_port}"

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        for server, thread in zip(self._servers, self._threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()

    def add(
        self,
        repo_id: str,
        folder: Path,
        *,
        branch: str = "main",
        gated: bool = False,
        private: bool = False,
    ) -> str:
        """Commit the folder's present files to a branch of the repo, made if there is none; returns the commit.

        The files themselves stay where they are and must not change afterwards.
        """
        repository = self.repositories.setdefault(repo_id, HubRepository(repo_id))
        repository.gated, repository.private = gated, private
        files = {file.path: file for file in _files(folder)}
        content = json.dumps([repo_id, *((file.path, file.sha256) for file in files.values())])
        commit = hashlib.sha1(content.encode(), usedforsecurity=False).hexdigest()
        repository.commits[commit] = files
        repository.branches[branch] = commit
        return commit

    def fail(self, fragment: str, status: int) -> None:
        """Answer with `status` whatever path contains `fragment`, from now on."""
        self.failures[fragment] = status

    def cut(self, fragment: str, size: int) -> None:
        """Close the connection after `size` bytes of the next body whose path contains `fragment`."""
        self.cut_short[fragment] = size

    def hold(self, fragment: str) -> None:
        """Answer nothing whose path contains `fragment` until `release`."""
        self.held_fragment = fragment
        self._released.clear()

    def wait_until_held(self) -> None:
        """Return once a request is waiting."""
        if not self._holding.wait(60):
            raise TimeoutError("no request came to be held")

    def release(self) -> None:
        self._released.set()

    def pass_or_wait(self, path: str) -> None:
        """Called for every request, before it is answered."""
        if self.held_fragment and self.held_fragment in path:
            self._holding.set()
            self._released.wait(60)

    def requested_files(self) -> set[str]:
        """`OWNER/NAME/path` of every file asked for; of large ones clients only ask HEAD here, then go to storage."""
        return {request.resolved_file for request in self.requests if request.resolved_file}

    def forget(self) -> None:
        """Empty the request log."""
        with self._lock:
            self.requests.clear()

    def log(self, request: LoggedRequest) -> None:
        with self._lock:
            self.requests.append(request)

    def stored(self, sha256: str) -> HubFile | None:
        """A file by its digest, as large file storage finds it."""
        for repository in self.repositories.values():
            for files in repository.commits.values():
                for file in files.values():
                    if file.sha256 == sha256:
                        return file
        return None

    def take_cut(self, path: str) -> int | None:
        """After how many bytes this answer is to break off, once; None for a whole one."""
        with self._lock:
            for fragment in list(self.cut_short):
                if fragment in path:
                    return self.cut_short.pop(fragment)
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_POST(self) -> None:
        self._answer(with_body=True)

    def log_message(self, *_values: object) -> None:
        """The log is `LoopbackHub.requests`."""

    def _answer(self, *, with_body: bool) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self._form = self.rfile.read(length)
        self._with_body = with_body
        path = unquote(urlsplit(self.path).path)
        self._token = token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self._authorised = token in self.hub.accepted_tokens
        self.hub.log(LoggedRequest(self.command, path, self.headers.get("Range"), self._authorised))
        self.hub.pass_or_wait(path)
        for fragment, status in self.hub.failures.items():
            if fragment in path:
                self._json({"error": "made to fail"}, HTTPStatus(status))
                return
        if token and not self._authorised:
            message = "Invalid credentials in Authorization header"
            self._json({"error": message}, HTTPStatus.UNAUTHORIZED, {"X-Error-Message": message})
            return
        routes = (
            (r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", self._info),
            (r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", self._tree),
            (r"/api/models/([^/]+/[^/]+)/paths-info/([^/]+)", self._paths_info),
            (r"/([^/]+/[^/]+)/resolve/(refs/pr/\d+|[^/]+)/(.+)", self._resolve),
        )
        if match := re.fullmatch(r"/lfs/([0-9a-f]{64})", path):
            self._lfs(match[1])
            return
        for pattern, route in routes:
            if match := re.fullmatch(pattern, path):
                route(*match.groups())
                return
        self._error(HTTPStatus.NOT_FOUND, "RepoNotFound", "Not found")

    def _info(self, repo_id: str, revision: str | None) -> None:
        found = self._commit(repo_id, revision or "main")
        if found is None:
            return
        repository, commit = found
        files = repository.commits[commit]
        self._json(
            {
                "id": repo_id,
                "modelId": repo_id,
                "sha": commit,
                "private": repository.private,
                "gated": "manual" if repository.gated else False,
                "disabled": False,
                "tags": [],
                "cardData": _card(files),
                "siblings": [{"rfilename": path} for path in files],
            }
        )

    def _tree(self, repo_id: str, revision: str) -> None:
        found = self._commit(repo_id, revision)
        if found is None:
            return
        repository, commit = found
        query = parse_qs(urlsplit(self.path).query)
        start = int(query.get("cursor", ["0"])[0])
        files = sorted(repository.commits[commit].values(), key=lambda file: file.path)
        headers = {}
        if start + PAGE_SIZE < len(files):
            next_page = f"{self.hub.url}/api/models/{repo_id}/tree/{revision}?recursive=True&cursor={start + PAGE_SIZE}"
            headers["Link"] = f'<{next_page}>; rel="next"'
        self._json([file.listing() for file in files[start : start + PAGE_SIZE]], headers=headers)

    def _paths_info(self, repo_id: str, revision: str) -> None:
        found = self._commit(repo_id, revision)
        if found is None:
            return
        repository, commit = found
        wanted = parse_qs(self._form.decode()).get("paths", [])
        files = repository.commits[commit]
        self._json([files[path].listing() for path in wanted if path in files])

    def _resolve(self, repo_id: str, revision: str, path: str) -> None:
        found = self._commit(repo_id, revision)
        if found is None:
            return
        repository, commit = found
        if repository.gated and not self._authorised:
            self._error(
                HTTPStatus.UNAUTHORIZED,
                "GatedRepo",
                f"Access to model {repo_id} is restricted. You must have access to it and be authenticated.",
            )
            return
        if repository.gated and self._token not in (repository.accepted_by or (self._token,)):
            self._error(
                HTTPStatus.FORBIDDEN,
                "GatedRepo",
                f"Access to model {repo_id} is restricted and you are not in the authorized list.",
            )
            return
        file = repository.commits[commit].get(path)
        headers = {"X-Repo-Commit": commit}
        if file is None:
            self._error(HTTPStatus.NOT_FOUND, "EntryNotFound", "Entry not found", headers)
        elif file.is_lfs:
            headers |= {
                "X-Linked-Size": str(file.size),
                "X-Linked-ETag": f'"{file.sha256}"',
                "Location": f"{self.hub.storage_url}/lfs/{file.sha256}?X-Signature=of-{commit[:8]}",
            }
            self._json({"moved": "to large file storage"}, HTTPStatus.FOUND, headers)
        else:
            self._bytes(file, {**headers, "ETag": f'"{file.git_id}"'})

    def _lfs(self, sha256: str) -> None:
        file = self.hub.stored(sha256)
        if file is None:
            self._error(HTTPStatus.NOT_FOUND, "EntryNotFound", "No such object")
        else:
            self._bytes(file, {"ETag": f'"{sha256}"'})

    def _commit(self, repo_id: str, revision: str) -> tuple[HubRepository, str] | None:
        """The repo and commit, or None after having answered as the Hub does for what is absent or hidden."""
        repository = self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and not self._authorised):
            if self._authorised:
                self._error(HTTPStatus.NOT_FOUND, "RepoNotFound", "Repository not found")
            else:  # anonymous callers cannot tell a private repo from none
                self._error(
                    HTTPStatus.UNAUTHORIZED, "RepoNotFound", "Invalid username or password."
                )
            return None
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            self._error(HTTPStatus.NOT_FOUND, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repository, commit

    def _bytes(self, file: HubFile, headers: Mapping[str, str]) -> None:
        first, last, status = 0, file.size - 1, HTTPStatus.OK
        headers = {**headers, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first = int(match[1])
            last = min(int(match[2] or last), last)
            if first > last:
                self._error(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, "Range", "No such range")
                return
            status = HTTPStatus.PARTIAL_CONTENT
            headers["Content-Range"] = f"bytes {first}-{last}/{file.size}"
        with file.place.open("rb") as content:
            content.seek(first)
            body = content.read(last - first + 1)
        self._send(status, body, headers)

    def _json(
        self,
        value: Any,
        status: HTTPStatus = HTTPStatus.OK,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        merged = {"Content-Type": "application/json", **(headers or {})}
        self._send(status, json.dumps(value).encode(), merged)

    def _error(
        self, status: HTTPStatus, code: str, message: str, headers: Mapping[str, str] | None = None
    ) -> None:
        merged = {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})}
        self._json({"error": message}, status, merged)

    def _send(self, status: HTTPStatus, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if not self._with_body:
            return
        cut = (
            self.hub.take_cut(urlsplit(self.path).path)
            if status < HTTPStatus.MULTIPLE_CHOICES
            else None
        )
        try:
            self.wfile.write(body if cut is None else body[:cut])
        except OSError:  # the client left, as an interrupted download does
            self.close_connection = True
        if cut is not None:
            self.close_connection = True


def _files(folder: Path) -> Iterator[HubFile]:
    for place in sorted(folder.rglob("*")):
        if place.is_file():
            data = place.read_bytes()
            yield HubFile(
                path=place.relative_to(folder).as_posix(),
                place=place,
                size=len(data),
                sha256=hashlib.sha256(data).hexdigest(),
                git_id=hashlib.sha1(
                    b"blob %d\0" % len(data) + data, usedforsecurity=False
                ).hexdigest(),
            )


def _card(files: Mapping[str, HubFile]) -> dict[str, Any]:
    """The metadata block at the top of README.md; nothing where it is malformed, which git lets anyone push."""
    readme = files.get("README.md")
    text = readme.place.read_text(encoding="utf-8", errors="replace") if readme else ""
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    try:
        card = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        card = None
    return card if isinstance(card, dict) else {}

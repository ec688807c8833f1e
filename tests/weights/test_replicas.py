"""Replicas on one node that load at once ask the bucket for every byte once, and end whole whoever of them dies."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from tests.support.fault_proxy import FaultProxy, ProxyRequest, scripted
from tests.support.faults import Fault, FaultKind
from tests.support.object_server import ObjectServer
from tests.weights.folder_bucket import MODEL, PublishedFolder, write_published
from tests.weights.replica import digest_of
from weights.cache_entry import LANDED
from weights.chunks import CHUNK_SIZE

REPOSITORY = Path(__file__).resolve().parents[2]
DEADLINE = 100  # seconds; only ever waited out by a test that fails
CHUNKS = 6
UNET = "unet/diffusion_pytorch_model.safetensors"
READERS = ["thread", "process"]


class Replica:
    """A process that is ready to load, and one that has loaded."""

    def __init__(
        self, endpoint_url: str, cache: Path, reader: str, *, limit: int | None = None
    ) -> None:
        arguments = [endpoint_url, str(cache), reader, *([] if limit is None else [str(limit)])]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.weights.replica", *arguments],
            cwd=REPOSITORY,
            env={"PATH": os.defpath, "PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def wait_until_ready(self) -> None:
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], DEADLINE)[0], "it never gets ready"
        assert self.process.stdout.readline() == b"ready\n", self.process.communicate()

    def begin(self) -> Self:
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()
        return self

    def result(self) -> dict[str, Any]:
        output, log = self.process.communicate(timeout=DEADLINE)
        assert self.process.returncode == 0, log.decode()
        found: dict[str, Any] = json.loads(output)
        return found | {"log": log.decode()}

    def kill(self) -> None:
        """kill -9 to it and to the process that reads for it, as when a container is out of memory."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(DEADLINE)

    def close(self) -> None:
        self.kill()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


StartReplicas = Callable[..., list[Replica]]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> PublishedFolder:
    return write_published(tmp_path_factory.mktemp("bucket"), chunks=CHUNKS)


@pytest.fixture
def server(published: PublishedFolder) -> Iterator[ObjectServer]:
    with ObjectServer(published.root) as server:
        yield server


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def start(server: ObjectServer, cache: Path) -> Iterator[StartReplicas]:
    """Starts replicas, and returns when all of them are ready to begin."""
    started: list[Replica] = []

    def start(
        *readers: str, endpoint_url: str = server.endpoint_url, limit: int | None = None
    ) -> list[Replica]:
        fresh = [Replica(endpoint_url, cache, reader, limit=limit) for reader in readers]
        started.extend(fresh)
        for replica in fresh:
            replica.wait_until_ready()
        return fresh

    yield start
    for replica in started:
        replica.close()


def sizes(published: PublishedFolder) -> dict[str, int]:
    """The size of every file of the model that is loaded, by its path."""
    return {
        path.relative_to(published.folder).as_posix(): path.stat().st_size
        for path in published.folder.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }


def bytes_sent(server: ObjectServer, published: PublishedFolder) -> dict[str, int]:
    """What the server has sent of every file of the model, by its path."""
    prefix = f"{MODEL}/{published.version}"
    return {path: server.bytes_sent(f"{prefix}/{path}") for path in sizes(published)}


def assert_whole(result: dict[str, Any], published: PublishedFolder) -> None:
    assert result["tensors"] == digest_of(published.tensors.items()), result["log"]
    assert result["configs"] == {path: data.decode() for path, data in published.configs.items()}


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)  # another process does it: it can only be polled


@pytest.mark.parametrize(
    "readers",
    [["thread"] * 3, ["process"] * 3, ["thread", "process", "thread", "process"]],
    ids=["threads", "processes", "both"],
)
def test_replicas_that_load_at_once_ask_for_every_byte_once(server, published, start, readers):
    replicas = start(*readers)

    results = [replica.result() for replica in [replica.begin() for replica in replicas]]

    for result in results:
        assert_whole(result, published)
    counters = [result["counters"] for result in results]
    assert bytes_sent(server, published) == sizes(published), counters
    total = sum(sizes(published).values())
    assert sum(found["network_bytes"] for found in counters) == total
    assert all(found["network_bytes"] + found["cache_bytes"] == total for found in counters)


@pytest.mark.parametrize("reader", READERS)
def test_a_later_load_asks_for_no_byte_of_the_model(server, published, start, reader):
    (first,) = start("thread")
    assert_whole(first.begin().result(), published)
    server.forget_requests()

    (second,) = start(reader)
    result = second.begin().result()

    assert_whole(result, published)
    assert set(bytes_sent(server, published).values()) == {0}
    assert result["counters"]["cache_bytes"] == sum(sizes(published).values())
    assert result["counters"]["network_bytes"] == 0


@pytest.mark.parametrize("reader", READERS)
def test_replicas_go_on_when_the_one_that_fills_the_cache_is_killed(
    server, published, start, reader
):
    manifest = f"{MODEL}/{published.version}/manifest.json"
    # The first replica gets some way into a chunk, and then nothing more: it has the claim to it until it dies.
    stall = Fault(FaultKind.STALL, at=CHUNK_SIZE // 2)
    decide = scripted([(f"*/{UNET}", stall, None, 2)])
    with FaultProxy(server.endpoint_url, decide) as proxy:
        (victim,) = start(reader, endpoint_url=proxy.endpoint_url)
        victim.begin()
        until(
            lambda: any(record.fault for record in proxy.requests), "the first replica never stalls"
        )
        others = start("thread", "process")
        before = len(server.requests(manifest))
        for replica in others:
            replica.begin()
        until(lambda: len(server.requests(manifest)) == before + 2, "the others do not begin")
        # What its owner has claimed they do not get while it lives.
        assert all(replica.process.poll() is None for replica in others)
        victim.kill()

        results = [replica.result() for replica in others]

    for result in results:
        assert_whole(result, published)
        assert result["counters"]["cache_bytes"] > 0
    # Every byte once, but for those that died with the one who had asked for them: of the UNet part, and of another
    # file what the first replica was just about to store.
    sent, owed = bytes_sent(server, published), sizes(published)
    assert owed[UNET] < sent[UNET] < 2 * owed[UNET]
    assert sent.keys() == owed.keys()
    assert all(sent[name] in (size, 2 * size) for name, size in owed.items() if name != UNET)


def test_a_replica_that_was_killed_leaves_what_it_had_filled(server, published, start, cache):
    def decide(request: ProxyRequest) -> Fault | None:
        """Of the large file the first chunk comes through, whichever is asked for first."""
        later = request.path.endswith(UNET) and not (request.range or "").startswith("bytes=0-")
        return Fault(FaultKind.STALL, at=1) if later else None

    with FaultProxy(server.endpoint_url, decide) as proxy:
        (victim,) = start("thread", endpoint_url=proxy.endpoint_url)
        victim.begin()
        until(lambda: any(record.fault for record in proxy.requests), "the replica never stalls")
        until(
            lambda: any(
                len(state) > 1 and state[0] == LANDED[0]
                for state in (path.read_bytes() for path in (cache / "v1").glob("*.state"))
            ),
            "the large file's first chunk never lands",
        )
        victim.kill()
    server.forget_requests()

    (replica,) = start("thread")
    result = replica.begin().result()

    assert_whole(result, published)
    assert (
        result["counters"]["cache_bytes"] >= CHUNK_SIZE
    )  # the first chunk, which says what follows
    total = sum(sizes(published).values())
    assert result["counters"]["cache_bytes"] + result["counters"]["network_bytes"] == total


@pytest.mark.parametrize("reader", READERS)
def test_a_damaged_chunk_of_the_cache_is_fetched_again_and_nothing_else(
    server, published, start, cache, reader
):
    (first,) = start("thread")
    first.begin().result()
    (entry,) = (
        path for path in (cache / "v1").glob("*.data") if path.stat().st_size > CHUNKS * CHUNK_SIZE
    )
    with entry.open("r+b") as data:
        data.seek(2 * CHUNK_SIZE + 4711)
        byte = data.read(1)[0]
        data.seek(-1, os.SEEK_CUR)
        data.write(bytes([byte ^ 1]))
    server.forget_requests()

    (second,) = start(reader)
    result = second.begin().result()

    assert_whole(result, published)
    assert "damaged" in result["log"]
    sent = bytes_sent(server, published)
    assert sent.pop(UNET) == CHUNK_SIZE
    assert set(sent.values()) == {0}
    server.forget_requests()
    (third,) = start("thread")
    assert_whole(third.begin().result(), published)
    assert set(bytes_sent(server, published).values()) == {0}


def test_a_cache_too_small_for_the_model_costs_requests_and_no_load(server, published, start):
    replicas = start(*READERS, limit=CHUNK_SIZE)
    for result in [replica.result() for replica in [replica.begin() for replica in replicas]]:
        assert_whole(result, published)
        assert "does not fit" in result["log"]


def test_a_cache_folder_that_cannot_be_used_is_said_before_anything_is_read(server, start, cache):
    cache.write_bytes(b"no folder")
    for replica in start(*READERS):
        _, log = replica.begin().process.communicate(timeout=DEADLINE)
        assert replica.process.returncode != 0
        assert f"FolderError: cannot keep weights in the node cache {cache}" in log.decode()
    assert not [request for request in server.requests() if request.key.endswith(".safetensors")]

"""What is asked for next: nobody waits for a header that is slow in coming, and the end is shared out evenly."""

from __future__ import annotations

import threading
from itertools import pairwise
from pathlib import Path

import pytest

from tests.support.object_server import Head, ObjectServer
from tests.weights.folder_bucket import (
    MODEL,
    PublishedFolder,
    assert_whole,
    bucket_at,
    write_published,
)
from weights import ReadOptions, open_model
from weights.chunks import CHUNK_SIZE
from weights.fetch import AHEAD, AHEAD_OF_A_CARD, REQUEST_CHUNKS
from weights.transport import Patience

CHUNKS = AHEAD_OF_A_CARD + 7  # of tensors; with the header, the file has one more
FILE = "unet/diffusion_pytorch_model.safetensors"
DEADLINE = 10.0  # seconds


class HoldingServer(ObjectServer):
    """Keeps the answer with the large file's first bytes until `enough` other ranges of it were asked for.

    Ranges are counted once: on a slow machine a second try may come for any.
    """

    def __init__(self, folder: Path, enough: int) -> None:
        self._enough = enough
        self._others: set[str] = set()
        self._asked = threading.Condition()
        self._released = threading.Event()
        self.asked_before_the_header = 0
        super().__init__(folder)

    def _answer(self, client, request: Head) -> None:
        wanted = request.get("range") or ""
        if FILE in request.start and not wanted.startswith("bytes=0-"):
            with self._asked:
                self._others.add(wanted)
                self._asked.notify_all()
        elif FILE in request.start and not self._released.is_set():
            with self._asked:
                self._asked.wait_for(lambda: len(self._others) >= self._enough, DEADLINE)
                # For who would ask for more.
                self._asked.wait_for(lambda: len(self._others) > self._enough, 0.3)
                self.asked_before_the_header = self.asked_before_the_header or len(self._others)
                self._released.set()
        return super()._answer(client, request)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> PublishedFolder:
    return write_published(tmp_path_factory.mktemp("bucket"), chunks=CHUNKS)


@pytest.mark.parametrize(
    ("reader", "ahead"), [("thread", min(AHEAD, CHUNKS)), ("process", AHEAD_OF_A_CARD)]
)
@pytest.mark.parametrize("connections", [4, 12])
def test_a_few_chunks_are_read_before_it_is_known_where_they_belong(
    published, reader, ahead, connections
):
    with HoldingServer(published.root, enough=ahead) as server:
        bucket = bucket_at(server.endpoint_url, patience=Patience())
        options = ReadOptions(reader=reader, connections=connections)
        with open_model(bucket, MODEL, options=options) as stream:
            assert_whole(stream, published)
        assert server.asked_before_the_header == ahead


def test_requests_are_large_and_at_the_end_small_enough_for_everybody(published):
    connections = 2
    with ObjectServer(published.root) as server:
        bucket = bucket_at(server.endpoint_url, patience=Patience())
        options = ReadOptions(reader="thread", connections=connections)
        with open_model(bucket, MODEL, options=options) as stream:
            assert_whole(stream, published)
        asked = [
            tuple(map(int, request.range.removeprefix("bytes=").split("-")))
            for request in server.requests(f"{MODEL}/{published.version}/{FILE}")
        ]
    sizes = [last - first + 1 for first, last in asked]
    assert max(sizes) == REQUEST_CHUNKS * CHUNK_SIZE
    # The last but one and the last: no two chunks in one hand while another has none.
    assert all(size <= CHUNK_SIZE for size in sizes[-connections:])
    covered = sorted(asked)
    assert covered[0][0] == 0
    assert all(first == before + 1 for (_, before), (first, _) in pairwise(covered))

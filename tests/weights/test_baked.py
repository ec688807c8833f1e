"""A model that was pulled to a folder is read from there, every byte verified, and from the bucket where that is wrong.

Both ways of reading, threads and a process with a ring, have to do all of it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.fault_proxy import FaultProxy, scripted
from tests.support.faults import Fault, FaultKind
from tests.support.object_server import ObjectServer
from tests.weights.folder_bucket import (
    BUCKET,
    MODEL,
    PublishedFolder,
    assert_whole,
    bucket_at,
    write_published,
)
from weights import (
    Bucket,
    BucketError,
    FolderError,
    ModelStream,
    ReadOptions,
    find_snapshot,
    open_model,
    plan_publication,
)
from weights.cache import NodeCache
from weights.chunks import CHUNK_SIZE
from weights.manifest import dump_manifest, make_manifest, parse_manifest
from weights.memory import HostMemory
from weights.pull import pull
from weights.pulled import NOTE_NAME, pulled_snapshot
from weights.reading_process import ReadingProcess
from weights.transport import Patience

REPOSITORY = Path(__file__).resolve().parents[2]
DEADLINE = 60  # seconds; only ever waited out by a test that fails
CHUNKS = 3
UNET = "unet/diffusion_pytorch_model.safetensors"
NOWHERE = "http://127.0.0.1:9"
READERS = ["thread", "process"]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> PublishedFolder:
    return write_published(tmp_path_factory.mktemp("bucket"), chunks=CHUNKS)


@pytest.fixture
def server(published: PublishedFolder) -> Iterator[ObjectServer]:
    with ObjectServer(published.root) as server:
        yield server


@pytest.fixture(scope="module")
def pulled(published: PublishedFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as `pull` writes it; read only."""
    folder = tmp_path_factory.mktemp("image") / "model"
    with ObjectServer(published.root) as server:
        bucket = patient(server)
        pull(bucket, find_snapshot(bucket, MODEL), folder)
    return folder


@pytest.fixture
def own(pulled: Path, tmp_path: Path) -> Path:
    """A copy of it that the test may change."""
    return shutil.copytree(pulled, tmp_path / "model")


def patient(server: ObjectServer) -> Bucket:
    """The server's bucket, for whom a busy machine is no reason to ask twice."""
    return bucket_at(server.endpoint_url, patience=Patience())


def flip(file: Path, position: int) -> None:
    with file.open("r+b") as data:
        data.seek(position)
        byte = data.read(1)[0]
        data.seek(position)
        data.write(bytes([byte ^ 1]))


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)  # others do it: it can only be polled


def open_snapshot(bucket, snapshot, reader: str) -> ModelStream:
    options = ReadOptions(reader=reader)
    process = ReadingProcess(options.ring_bytes) if reader == "process" else None
    return ModelStream(bucket, snapshot, options=options, process=process)


def weights_asked_for(server: ObjectServer, published: PublishedFolder) -> list[str]:
    """The files of the model that the bucket was asked for, but for its manifest."""
    prefix = f"{MODEL}/{published.version}/"
    paths = [request.key.removeprefix(prefix) for request in server.requests()]
    return [path for path in paths if not path.endswith(("manifest.json", "latest.json"))]


# Reading from it


@pytest.mark.parametrize("reader", READERS)
def test_the_model_is_read_from_the_folder_and_the_bucket_is_asked_for_nothing(
    server, published, pulled, reader
):
    options = ReadOptions(reader=reader, folder=pulled)
    with open_model(patient(server), MODEL, options=options) as stream:
        assert_whole(stream, published)
        counters = stream.counters()

    assert server.requests() == []
    assert stream.version == published.version
    assert stream.source == str(pulled)
    assert counters["folder_bytes"] == counters["landed_bytes"] == counters["total_bytes"]
    assert counters["network_bytes"] == counters["cache_bytes"] == counters["requests"] == 0
    assert counters["hash_seconds"] > 0


@pytest.mark.parametrize("reader", READERS)
def test_neither_a_bucket_nor_its_server_need_be_there(published, pulled, reader):
    for bucket in (None, bucket_at(NOWHERE)):
        options = ReadOptions(reader=reader, folder=pulled)
        with open_model(bucket, MODEL, options=options) as stream:
            assert_whole(stream, published)


def test_for_a_card_the_bytes_wait_in_the_ring_until_it_is_known_where_they_go(published, pulled):
    options = ReadOptions(folder=pulled)
    with open_model(None, MODEL, options=options, wait_for_destination=True) as stream:
        assert stream.waits_for_destination
        assert stream.ring_memory is not None
        stream.deliver_to(HostMemory())
        assert_whole(stream, published)
        assert stream.counters()["folder_bytes"] == stream.total_bytes


def test_for_a_card_that_is_small_some_folders_stay_on_the_host(published, pulled):
    class Card(HostMemory):
        def __init__(self) -> None:
            self.paths: list[str] = []

        def reserve(self, path, places):
            self.paths.append(path)
            return super().reserve(path, places)

    card, options = Card(), ReadOptions(folder=pulled)
    with open_model(None, MODEL, options=options, wait_for_destination=True) as stream:
        weights = {file.path for file in stream.snapshot.files if file.is_weights}
        folders = {path.rpartition("/")[0] for path in weights}
        kept = min(folders)
        stream.deliver_to(card, on_host={kept})
        assert_whole(stream, published)

    assert len(folders) > 1
    assert set(card.paths) == {path for path in weights if path.rpartition("/")[0] != kept}


def test_the_node_s_cache_is_left_alone_where_the_folder_has_everything(
    server, published, pulled, tmp_path
):
    cache = tmp_path / "cache"
    options = ReadOptions(reader="thread", folder=pulled, cache_folder=cache)
    with open_model(patient(server), MODEL, options=options) as stream:
        assert_whole(stream, published)

    assert not list(cache.rglob("*.data"))


def test_a_pinned_version_is_read_from_the_folder_that_holds_it(server, published, pulled):
    bucket = patient(server)
    options = ReadOptions(folder=pulled)
    with open_model(bucket, MODEL, published.version, options=options) as stream:
        assert_whole(stream, published)
    assert server.requests() == []


def test_nothing_of_aws_is_imported_to_read_a_folder(pulled):
    # Without an endpoint it is boto3 that knows the host names, and a second of imports.
    code = (
        "import sys; from pathlib import Path\n"
        "from settings import StorageSettings; from weights import Bucket, ReadOptions, open_model\n"
        "bucket = Bucket(StorageSettings(), 'models')\n"
        "options = ReadOptions(folder=Path(sys.argv[2]), busy=True)\n"
        "with open_model(bucket, sys.argv[1], options=options) as stream: list(stream.tensors())\n"
        "assert stream.counters()['folder_bytes'] == stream.total_bytes\n"
        "print([name for name in ('boto3', 'botocore') if name in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, MODEL, str(pulled)],
        cwd=REPOSITORY,
        env={"PATH": os.defpath},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == "[]"


# Damage within it


@pytest.mark.parametrize("reader", READERS)
def test_a_damaged_chunk_is_read_from_the_bucket_and_nothing_else_is(
    server, published, own, reader, caplog
):
    flip(own / UNET, 2 * CHUNK_SIZE + 4711)
    options = ReadOptions(reader=reader, folder=own)

    with open_model(patient(server), MODEL, options=options) as stream:
        assert_whole(stream, published)
        counters = stream.counters()

    assert f"chunk 2 of {own / UNET} is damaged" in caplog.text
    assert [request.key for request in server.requests()] == [f"{MODEL}/{published.version}/{UNET}"]
    assert server.bytes_sent() == counters["network_bytes"] == CHUNK_SIZE
    assert counters["folder_bytes"] == stream.total_bytes - CHUNK_SIZE


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("size", [0, 1000, CHUNK_SIZE + 1000])
def test_what_a_file_lost_since_it_was_looked_at_is_read_from_the_bucket(
    server, published, own, reader, size
):
    bucket = patient(server)
    snapshot = pulled_snapshot(own, MODEL)
    os.truncate(own / UNET, size)

    with open_snapshot(bucket, snapshot, reader) as stream:
        assert_whole(stream, published)

    lost = published.folder.joinpath(UNET).stat().st_size - size // CHUNK_SIZE * CHUNK_SIZE
    assert stream.counters()["network_bytes"] == lost


@pytest.mark.parametrize("reader", READERS)
def test_a_file_that_is_gone_since_it_was_looked_at_is_read_from_the_bucket(
    server, published, own, reader, caplog
):
    snapshot = pulled_snapshot(own, MODEL)
    (own / UNET).unlink()

    with open_snapshot(patient(server), snapshot, reader) as stream:
        assert_whole(stream, published)

    assert set(weights_asked_for(server, published)) == {UNET}
    assert caplog.text.count(f"cannot read {own / UNET}: No such file or directory") == 1


@pytest.mark.parametrize("reader", READERS)
def test_a_damaged_chunk_and_no_bucket_is_an_error_that_says_what_to_do(own, reader, caplog):
    flip(own / UNET, 4711)
    options = ReadOptions(reader=reader, folder=own)
    with (
        pytest.raises(FolderError, match=f"the model in {own} is damaged, and no bucket is named"),
        open_model(None, MODEL, options=options) as stream,
    ):
        list(stream.tensors())
    assert f"chunk 0 of {own / UNET} is damaged" in caplog.text


@pytest.mark.parametrize("reader", READERS)
def test_a_damaged_chunk_and_a_bucket_out_of_reach_is_an_error(own, reader, caplog):
    flip(own / UNET, 4711)
    options = ReadOptions(reader=reader, folder=own)
    with (
        pytest.raises(BucketError, match=f"s3://{BUCKET}/.*could not be reached"),
        open_model(bucket_at(NOWHERE), MODEL, options=options) as stream,
    ):
        list(stream.tensors())
    assert f"chunk 0 of {own / UNET} is damaged" in caplog.text


def test_a_damaged_chunk_comes_through_the_node_s_cache_where_there_is_one(
    server, published, own, tmp_path
):
    flip(own / UNET, 4711)
    options = ReadOptions(reader="thread", folder=own, cache_folder=tmp_path / "cache")
    for from_cache in (0, CHUNK_SIZE):
        with open_model(patient(server), MODEL, options=options) as stream:
            assert_whole(stream, published)
        assert stream.counters()["cache_bytes"] == from_cache
        assert stream.counters()["network_bytes"] == CHUNK_SIZE - from_cache


def test_a_damaged_chunk_that_another_process_fetches_is_looked_at_here_once(
    server, published, own, tmp_path, caplog
):
    file = next(file for file in pulled_snapshot(own, MODEL).files if file.path == UNET)
    assert file.content is not None
    assert file.digests is not None
    other = NodeCache(tmp_path / "cache", None).open(file.content, file.size, file.digests)
    assert other is not None
    assert other.claim(2)
    flip(own / UNET, 2 * CHUNK_SIZE + 4711)
    options = ReadOptions(reader="thread", folder=own, cache_folder=tmp_path / "cache")

    with open_model(patient(server), MODEL, options=options) as stream:
        until(lambda: stream.bytes_read == stream.total_bytes - CHUNK_SIZE, "the others never land")
        whole = (published.folder / UNET).read_bytes()
        other.write_at(2, 0, memoryview(whole)[2 * CHUNK_SIZE : 3 * CHUNK_SIZE])
        assert other.complete(2)
        assert_whole(stream, published)

    other.close()
    assert caplog.text.count("is damaged") == 1
    assert server.requests() == []


# Folders that are not the one


def without_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def with_half_a_manifest(folder: Path) -> None:
    file = folder / "manifest.json"
    file.write_bytes(file.read_bytes()[:-100])


def with_a_manifest_somebody_altered(folder: Path) -> None:
    file = folder / "manifest.json"
    manifest = json.loads(file.read_bytes())
    manifest["recipe"]["steps"] = [1]
    file.write_text(json.dumps(manifest))


def with_another_version_s_manifest(folder: Path) -> None:
    file = folder / "manifest.json"
    manifest = parse_manifest(file.read_bytes(), "")
    file.write_bytes(dump_manifest(make_manifest(manifest.files, {"steps": [1]})))


def without_a_note(folder: Path) -> None:
    (folder / NOTE_NAME).unlink()


def with_a_note_that_is_none(folder: Path) -> None:
    (folder / NOTE_NAME).write_text('["demo"]')


def with_a_note_of_a_later_format(folder: Path) -> None:
    note = json.loads((folder / NOTE_NAME).read_text())
    (folder / NOTE_NAME).write_text(json.dumps(note | {"format": "lightning-in-a-bucket/pulled/2"}))


def with_a_file_missing(folder: Path) -> None:
    (folder / "unet/config.json").unlink()


def with_a_file_cut_short(folder: Path) -> None:
    os.truncate(folder / UNET, CHUNK_SIZE)


def with_a_file_grown(folder: Path) -> None:
    with (folder / UNET).open("ab") as file:
        file.write(b"\0")


def with_a_pipe_for_a_file(folder: Path) -> None:
    (folder / UNET).unlink()
    os.mkfifo(folder / UNET)


def with_a_file_for_a_folder(folder: Path) -> None:
    shutil.rmtree(folder / "unet")
    (folder / "unet").write_bytes(b"")


def gone(folder: Path) -> None:
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (gone, "there is no folder {folder}"),
        (without_manifest, "{folder} has no manifest.json: nothing was pulled to its end"),
        (with_half_a_manifest, "{folder}/manifest.json is not valid JSON"),
        (with_a_manifest_somebody_altered, "{folder}/manifest.json is refused: its content"),
        (with_another_version_s_manifest, "{folder}/manifest.json is of version"),
        (without_a_note, "{folder} does not say which model it holds"),
        (with_a_note_that_is_none, "{folder}/.pulled.json is not what `pull` writes"),
        (with_a_note_of_a_later_format, "{folder}/.pulled.json is not what `pull` writes"),
        (with_a_file_missing, "{folder}/unet/config.json is missing"),
        (with_a_file_cut_short, f"{{folder}}/{UNET} has {CHUNK_SIZE} bytes where"),
        (with_a_file_grown, f"{{folder}}/{UNET} has"),
        (with_a_pipe_for_a_file, f"{{folder}}/{UNET} has 0 bytes where"),
        (with_a_file_for_a_folder, "cannot read {folder}/unet/config.json: Not a directory"),
    ],
)
def test_a_folder_that_is_not_whole_is_left_alone_and_the_log_says_why(
    server, published, own, caplog, spoil: Callable[[Path], None], reason: str
):
    spoil(own)
    expected = reason.format(folder=own)
    options = ReadOptions(folder=own)

    with open_model(patient(server), MODEL, options=options) as stream:
        assert_whole(stream, published)

    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"reading s3://{BUCKET}/{MODEL}, since {expected}")
    assert "Publish the model again" not in line
    assert stream.counters()["folder_bytes"] == 0
    assert stream.source == f"s3://{BUCKET}/{MODEL}"
    with pytest.raises(FolderError, match=r"nowhere to read .* from") as refused:
        open_model(None, MODEL, options=options)
    assert expected in str(refused.value)
    assert "MODEL_BUCKET_NAME" in str(refused.value)


def test_the_folder_of_another_model_with_the_same_content_is_left_alone(
    server, published, pulled, caplog
):
    other = "Somebody/Else"
    shutil.copytree(published.root / BUCKET / MODEL, published.root / BUCKET / other)
    try:
        bucket = patient(server)
        with open_model(bucket, other, options=ReadOptions(folder=pulled)) as stream:
            assert_whole(stream, published)
    finally:
        shutil.rmtree(published.root / BUCKET / "Somebody")

    assert stream.version == published.version
    assert stream.counters()["folder_bytes"] == 0
    assert f"since {pulled} holds {MODEL}, and MODEL_PATH is {other}" in caplog.text


def test_the_folder_of_another_version_than_the_pinned_one_is_left_alone(
    server, tmp_path, published, pulled, caplog
):
    root = tmp_path / "other"
    later = write_published(root, seed=1)
    with ObjectServer(root) as other:
        bucket = patient(other)
        options = ReadOptions(folder=pulled)
        with open_model(bucket, MODEL, later.version, options=options) as stream:
            assert_whole(stream, later)

    assert stream.counters()["folder_bytes"] == 0
    assert (
        f"since {pulled} holds version {published.version}, and MODEL_VERSION is {later.version}"
        in caplog.text
    )


def test_the_folder_s_version_is_read_although_the_bucket_has_another(tmp_path, published, pulled):
    root = tmp_path / "other"
    write_published(root, seed=1)
    with ObjectServer(root) as other:
        bucket = patient(other)
        with open_model(bucket, MODEL, options=ReadOptions(folder=pulled)) as stream:
            assert_whole(stream, published)
        assert other.requests() == []


# What `pull` leaves


class Pulling:
    """`python -m weights pull` in a process of its own, up to where it waits for `held` to send more."""

    def __init__(self, endpoint_url: str, folder: Path, held: FaultProxy) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "weights", "pull", MODEL, "--to", folder, "--bucket", BUCKET],
            cwd=REPOSITORY,
            env={
                "PATH": os.defpath,
                "AWS_ENDPOINT_URL_S3": endpoint_url,
                "AWS_ACCESS_KEY_ID": "tid_reader",
                "AWS_SECRET_ACCESS_KEY": "tsec_hunter2",
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until(lambda: any(record.fault for record in held.requests), "it never gets so far")
        assert self.process.poll() is None

    def kill(self, how: signal.Signals) -> None:
        self.process.send_signal(how)
        self.process.wait(DEADLINE)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("before", ["nothing", "another version"])
def test_a_pull_that_was_interrupted_leaves_nothing_that_is_taken_for_a_model(
    server, published, pulled, tmp_path, how, before
):
    folder = tmp_path / "model"
    if before == "another version":
        root = tmp_path / "earlier"
        write_published(root, seed=1)
        with ObjectServer(root) as earlier:
            bucket = patient(earlier)
            pull(bucket, find_snapshot(bucket, MODEL), folder)
            assert pulled_snapshot(folder, MODEL)
    # The file that comes last: all others are there.
    stall = scripted([("*/vae/model.safetensors", Fault(FaultKind.STALL, at=10), None, 0)])
    with FaultProxy(server.endpoint_url, stall) as proxy:
        Pulling(proxy.endpoint_url, folder, proxy).kill(how)

    assert (folder / UNET).is_file()
    with pytest.raises(FolderError, match=r"has no manifest\.json"):
        pulled_snapshot(folder, MODEL)

    # Run again, it ends what was begun.
    bucket = patient(server)
    server.forget_requests()
    pull(bucket, find_snapshot(bucket, MODEL), folder)
    assert UNET not in weights_asked_for(server, published)
    assert pulled_snapshot(folder, MODEL) == replace(pulled_snapshot(pulled, MODEL), folder=folder)


def test_a_bare_folder_that_was_pulled_is_not_taken_for_a_published_model(bucket, model, tmp_path):
    for file in model.rglob("*"):
        if file.is_file():
            key = f"{MODEL}/{file.relative_to(model).as_posix()}"
            bucket.client.upload_file(str(file), bucket.name, key)
    pull(bucket, find_snapshot(bucket, MODEL), tmp_path / "out")
    with pytest.raises(FolderError, match=r"has no manifest\.json"):
        pulled_snapshot(tmp_path / "out", MODEL)


def test_publishing_a_pulled_folder_gives_the_same_version(bucket, published, pulled):
    recipe = pulled_snapshot(pulled, MODEL).recipe
    assert recipe is not None
    assert plan_publication(pulled, bucket, MODEL, recipe).version == published.version


def test_the_note_tells_people_which_bucket_it_was(pulled, published):
    assert json.loads((pulled / NOTE_NAME).read_text()) == {
        "format": "lightning-in-a-bucket/pulled/1",
        "model": MODEL,
        "version": published.version,
        "bucket": BUCKET,
    }

"""Tensors own their memory: it is theirs alone, goes back when they go, and a load takes the model and little more."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.support.object_server import ObjectServer
from tests.weights.folder_bucket import (
    MODEL,
    PublishedFolder,
    assert_whole,
    bucket_at,
    write_published,
)
from weights import LandedTensor, ReadOptions, open_model
from weights.chunks import CHUNK_SIZE
from weights.memory import ALIGNMENT, HostMemory, runs_of
from weights.safetensors_layout import TensorPlace
from weights.transport import Patience

REPOSITORY = Path(__file__).resolve().parents[2]
MIB = 2**20
LARGE_CHUNKS = 38  # 638 MB
ALLOWED = 256 * MIB

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc")


def resident_bytes() -> int:
    with Path("/proc/self/smaps_rollup").open() as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("Rss:")) * 1024


def places_of(*sizes: int) -> list[TensorPlace]:
    """Tensors of these sizes, one after another as in a file."""
    places, start = [], 100
    for number, size in enumerate(sizes):
        places.append(TensorPlace(f"tensor-{number}", "U8", (size,), start, start + size))
        start += size
    return places


def filled(*sizes: int) -> list[np.ndarray]:
    """Tensors of one file in host memory, each full of a number of its own."""
    memory = HostMemory()
    targets = memory.reserve("unet/model.safetensors", places_of(*sizes))
    arrays = []
    for number, (size, target) in enumerate(zip(sizes, targets, strict=True)):
        content = np.full(size, number + 1, dtype="uint8")
        memory.put([(target, 0, memoryview(content))], lambda: None)
        arrays.append(np.frombuffer(memory.hand_over(target), dtype="uint8"))
    return arrays


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> PublishedFolder:
    return write_published(tmp_path_factory.mktemp("bucket"))


@pytest.fixture(scope="module")
def server(published: PublishedFolder) -> Iterator[ObjectServer]:
    with ObjectServer(published.root) as server:
        yield server


@pytest.fixture(params=["thread", "process"])
def landed(server: ObjectServer, request: pytest.FixtureRequest) -> list[LandedTensor]:
    bucket = bucket_at(server.endpoint_url, patience=Patience())
    with open_model(bucket, MODEL, options=ReadOptions(reader=request.param)) as stream:
        return list(stream.tensors())


def test_a_landed_tensor_is_a_writable_buffer_of_exactly_its_bytes(landed, published):
    assert len(landed) == len(published.tensors)
    for tensor in landed:
        view = memoryview(tensor.data)
        assert not view.readonly
        assert view.nbytes == published.tensors[tensor.path, tensor.name].nbytes


def test_a_landed_tensor_is_aligned_for_vector_instructions(landed):
    for tensor in landed:
        memory = np.frombuffer(tensor.data, dtype="uint8")
        assert not memory.nbytes or memory.ctypes.data % ALIGNMENT == 0


def test_tensors_lie_as_in_the_file_until_one_would_be_misaligned():
    sizes = (128, 64, 0, 100, 64, 192, 1)
    places = places_of(*sizes)
    targets = HostMemory().reserve("unet/model.safetensors", places)

    runs = runs_of(places, targets)

    assert [(start, len(memory)) for start, memory in runs] == [
        (places[0].start, 128 + 64 + 0 + 100),
        (places[4].start, 64 + 192 + 1),
    ]
    for start, memory in runs:
        memory[:] = bytes((start + number) % 251 for number in range(len(memory)))
    for place, target in zip(places, targets, strict=True):
        expected = bytes(number % 251 for number in range(place.start, place.end))
        assert bytes(target.data) == expected


def test_writing_to_one_landed_tensor_changes_no_other(landed, published):
    arrays = {
        (tensor.path, tensor.name): np.frombuffer(tensor.data, dtype="uint8") for tensor in landed
    }
    for written, memory in arrays.items():
        before = memory.copy()
        memory.fill(0xA5)
        for name, array in arrays.items():
            if name != written:
                assert array.tobytes() == published.tensors[name].tobytes()
        memory[:] = before


def test_an_array_over_a_tensors_data_keeps_it_when_all_else_is_gone(landed, published):
    arrays = {
        (tensor.path, tensor.name): np.frombuffer(tensor.data, dtype="uint8") for tensor in landed
    }
    landed.clear()
    for name, array in arrays.items():
        assert array.tobytes() == published.tensors[name].tobytes()


@linux_only
@pytest.mark.parametrize("freed", [0, 1, 2])
def test_a_tensor_that_is_let_go_gives_its_pages_back_and_its_neighbours_stay(freed):
    size = 48 * MIB + 12_345  # neither pages nor huge pages end where it does
    arrays: dict[int, np.ndarray] = dict(enumerate(filled(size, size, size)))
    before = resident_bytes()

    del arrays[freed]

    assert before - resident_bytes() > size - 4 * MIB
    for number, array in arrays.items():
        assert (array == number + 1).all()


@pytest.mark.parametrize("freed", range(6))
def test_small_neighbours_of_a_tensor_that_is_let_go_stay_as_they_are(freed):
    arrays = dict(enumerate(filled(7, 1, 65_535, 16 * MIB + 3, 65_535, 5)))
    del arrays[freed]
    for number, array in arrays.items():
        assert (array == number + 1).all()


def take_and_let_go() -> tuple[int, int]:
    """By how many bytes the process grew with three tensors, and by how many it stays larger without them."""
    before = resident_bytes()
    arrays = filled(40 * MIB, 40 * MIB, 40 * MIB)
    taken = resident_bytes() - before
    arrays.clear()
    return taken, resident_bytes() - before


@linux_only
def test_letting_go_of_every_tensor_gives_all_of_the_memory_back():
    # In a process of its own: here, threads that earlier tests left behind allocate as they like.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        taken, kept = pool.submit(take_and_let_go).result()
    assert taken > 100 * MIB
    assert kept < 16 * MIB


@linux_only
def test_an_open_stream_holds_on_to_no_tensor_that_it_has_handed_over(tmp_path):
    large = write_published(tmp_path, chunks=2)
    with ObjectServer(large.root) as server:
        bucket = bucket_at(server.endpoint_url, patience=Patience())
        with open_model(bucket, MODEL, options=ReadOptions(reader="thread")) as stream:
            tensors = {(tensor.path, tensor.name): tensor for tensor in stream.tensors()}
            name = ("unet/diffusion_pytorch_model.safetensors", "large")
            before = resident_bytes()
            assert memoryview(tensors[name].data).nbytes == 2 * CHUNK_SIZE

            del tensors[name]

            assert before - resident_bytes() > 2 * CHUNK_SIZE - 4 * MIB
            for other, tensor in tensors.items():
                assert bytes(tensor.data) == large.tensors[other].tobytes()


# A child, so that the peak is of nothing but the load: what it takes beyond its imports, in both processes.
CHILD = """
import json, resource, sys
import numpy
from tests.weights.folder_bucket import MODEL, bucket_at
from weights import ReadOptions, open_model
from weights.options import HOST_RING
from weights.transport import Patience
import weights.stream  # among the imports, whenever it would be imported

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

bucket = bucket_at(sys.argv[1], patience=Patience())
bucket.reader
before = status("VmRSS")
with open_model(bucket, MODEL, options=ReadOptions(reader=sys.argv[2])) as stream:
    stream.configs()
    tensors = list(stream.tensors())
peak = status("VmHWM")
beside = 0
if sys.argv[2] == "process":
    # The ring is in both processes' peaks, and is there once.
    beside = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 - HOST_RING
model = sum(memoryview(tensor.data).nbytes for tensor in tensors)
print(json.dumps({"model": model, "peak": peak - before, "beside": beside}))
"""


@pytest.fixture(scope="module")
def large_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectServer]:
    large = write_published(tmp_path_factory.mktemp("large"), chunks=LARGE_CHUNKS)
    with ObjectServer(large.root) as server:
        yield server


@linux_only
@pytest.mark.slow
@pytest.mark.parametrize("reader", ["thread", "process"])
def test_a_load_takes_the_model_and_at_most_256_mib_at_its_peak(large_server, reader):
    run = subprocess.run(
        [sys.executable, "-c", CHILD, large_server.endpoint_url, reader],
        cwd=REPOSITORY,
        env={"PATH": os.defpath, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert run.returncode == 0, run.stderr
    taken = json.loads(run.stdout)
    assert taken["model"] >= 600_000_000
    assert taken["peak"] + taken["beside"] <= taken["model"] + ALLOWED, taken


def test_a_ring_far_smaller_than_the_model_is_enough(tmp_path):
    large = write_published(tmp_path, chunks=6)
    with ObjectServer(large.root) as server:
        options = ReadOptions(reader="process", ring_bytes=0)  # the fewest slots there are
        bucket = bucket_at(server.endpoint_url, patience=Patience())
        with open_model(bucket, MODEL, options=options) as stream:
            assert_whole(stream, large)

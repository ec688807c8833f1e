"""A streamed model is the published one, byte for byte, or an error that names the object."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from demo.s3_faults import Fault
from tests.weights.conftest import MODEL, NUMPY_DTYPES, RECIPE, publish_folder
from weights import (
    BucketError,
    CorruptObjectError,
    ManifestError,
    ModelNotFoundError,
    ModelStream,
    ObjectChangedError,
    ReadOptions,
    WeightsError,
    find_snapshot,
    open_model,
)
from weights.chunks import CHUNK_SIZE
from weights.manifest import dump_manifest

UNET = "unet/diffusion_pytorch_model.safetensors"


def arrays(stream: ModelStream) -> dict[tuple[str, str], np.ndarray]:
    return {
        (tensor.path, tensor.name): np.frombuffer(
            tensor.data, dtype=NUMPY_DTYPES[tensor.dtype]
        ).reshape(tensor.shape)
        for tensor in stream.tensors()
    }


def expected_arrays(folder: Path) -> dict[tuple[str, str], np.ndarray]:
    found = {}
    for file in folder.rglob("*.safetensors"):
        with safe_open(file, "np") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no dict
                found[file.relative_to(folder).as_posix(), name] = tensors.get_tensor(name)
    return found


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert got[name].dtype == array.dtype
        np.testing.assert_array_equal(got[name], array)


@pytest.mark.parametrize("reader", ["thread", "process"])
@pytest.mark.parametrize("connections", [1, 16, None])
def test_every_tensor_arrives_as_it_was_published(bucket, model, published, connections, reader):
    with open_model(
        bucket, MODEL, options=ReadOptions(connections=connections, reader=reader)
    ) as stream:
        configs = stream.configs()
        got = arrays(stream)

    assert_same(got, expected_arrays(model))
    assert configs.keys() == {"model_index.json", "unet/config.json", "vae/config.json"}
    assert configs["model_index.json"] == (model / "model_index.json").read_bytes()
    assert stream.recipe == RECIPE
    assert stream.version == published.version
    assert stream.bytes_read == stream.total_bytes == published.total_bytes


def test_a_tensor_owns_its_memory_and_the_stream_keeps_none_of_it(bucket, published):
    with open_model(bucket, MODEL) as stream:
        tensors = list(stream.tensors())
    for tensor in tensors:
        memory = np.frombuffer(tensor.data, dtype="uint8")
        assert memory.flags.writeable
    straddling = next(tensor for tensor in tensors if tensor.name == "straddles")
    before = bytes(straddling.data)
    for other in tensors:
        if other is not straddling:
            np.frombuffer(other.data, dtype="uint8").fill(0xFF)
    assert bytes(straddling.data) == before


def test_a_reader_needs_to_get_objects_and_nothing_else(s3, bucket, bucket_for, model, published):
    policy = {
        "Version": "2012-10-17",
        "Statement": [
            {
                "Effect": "Allow",
                "Action": "s3:GetObject",
                "Resource": f"arn:aws:s3:::{bucket.name}/*",
            }
        ],
    }
    keypair = s3.create_user(f"reader-{bucket.name}", policy)
    s3.forget_requests()

    with open_model(bucket_for(bucket.name, keypair), MODEL) as stream:
        assert_same(arrays(stream), expected_arrays(model))

    assert {record.method for record in s3.requests(bucket.name)} == {"GET"}
    assert all(record.key for record in s3.requests(bucket.name))


def test_a_pinned_version_is_read_without_asking_for_the_latest(s3, bucket, own_model):
    first = publish_folder(bucket, own_model)
    publish_folder(bucket, own_model, RECIPE | {"steps": [8]})
    s3.forget_requests()

    with open_model(bucket, MODEL, first.version) as stream:
        stream.configs()
        assert stream.version == first.version

    assert f"{MODEL}/latest.json" not in {record.key for record in s3.requests(bucket.name)}


@pytest.mark.parametrize("position", [0, 9, 100, CHUNK_SIZE + 5])
def test_a_flipped_byte_in_the_bucket_is_found(bucket, model, published, position):
    data = bytearray((model / UNET).read_bytes())
    data[position] ^= 0x01
    bucket.client.put_object(Bucket=bucket.name, Key=published.key(UNET), Body=bytes(data))

    with (
        pytest.raises(CorruptObjectError, match=published.key(UNET)),
        open_model(bucket, MODEL) as stream,
    ):
        arrays(stream)


def test_a_flipped_byte_in_a_config_is_found(bucket, published):
    key = published.key("unet/config.json")
    data = bucket.client.get_object(Bucket=bucket.name, Key=key)["Body"].read()
    bucket.client.put_object(Bucket=bucket.name, Key=key, Body=data.replace(b"S", b"s"))

    with pytest.raises(CorruptObjectError, match=key), open_model(bucket, MODEL) as stream:
        stream.configs()


@pytest.mark.parametrize(
    "change", [lambda data: data[:-1], lambda data: data + b"x", lambda data: b""]
)
def test_a_file_of_another_length_is_refused(bucket, model, published, change):
    data = change((model / UNET).read_bytes())
    bucket.client.put_object(Bucket=bucket.name, Key=published.key(UNET), Body=data)

    with (
        pytest.raises(WeightsError, match=published.key(UNET)),
        open_model(bucket, MODEL) as stream,
    ):
        arrays(stream)


@pytest.mark.parametrize("kind", ["corrupt", "truncate"])
def test_damage_on_the_wire_is_read_again(s3, bucket, model, published, kind):
    damage = Fault(
        kind=kind, bucket=bucket.name, key=f"*/{UNET}", at=CHUNK_SIZE + 1, times=1, skip=1
    )
    with s3.fault(damage), open_model(bucket, MODEL) as stream:
        assert_same(arrays(stream), expected_arrays(model))


def test_a_busy_server_is_asked_again(s3, bucket, model, published):
    busy = Fault(kind="status", status=503, bucket=bucket.name, times=3)
    with s3.fault(busy), open_model(bucket, MODEL) as stream:
        assert_same(arrays(stream), expected_arrays(model))


def test_an_object_replaced_while_it_is_read_is_noticed(s3, bucket, model, published):
    held = Fault(kind="hold", bucket=bucket.name, key=f"*/{UNET}", skip=1)
    s3.inject(held)
    try:
        stream = open_model(bucket, MODEL, options=ReadOptions(connections=1))
        configs = stream.configs()
        assert configs
        first = next(stream.tensors())  # from the head: the rest of the file is held back
        assert first
        bucket.client.put_object(
            Bucket=bucket.name, Key=published.key(UNET), Body=(model / UNET).read_bytes()[::-1]
        )
    finally:
        s3.clear_faults()

    with stream, pytest.raises(ObjectChangedError, match=published.key(UNET)):
        for _ in stream.tensors():
            pass


def test_a_manifest_that_names_a_path_outside_is_refused_and_the_path_never_asked_for(
    s3, bucket, published
):
    manifest = json.loads(dump_manifest(published.manifest))
    manifest["files"][0]["path"] = "../../etc/passwd"
    bucket.client.put_object(
        Bucket=bucket.name, Key=published.key("manifest.json"), Body=json.dumps(manifest)
    )
    s3.forget_requests()

    with pytest.raises(ManifestError, match=r"'../../etc/passwd' is not a plain path"):
        open_model(bucket, MODEL)

    assert not any("passwd" in record.key for record in s3.requests(bucket.name))


def test_a_manifest_of_another_version_is_refused(bucket, own_model):
    first = publish_folder(bucket, own_model)
    second = publish_folder(bucket, own_model, RECIPE | {"steps": [8]})
    bucket.client.copy_object(
        Bucket=bucket.name,
        Key=second.key("manifest.json"),
        CopySource={"Bucket": bucket.name, "Key": first.key("manifest.json")},
    )
    with pytest.raises(ManifestError, match=second.key("manifest.json")):
        open_model(bucket, MODEL)


def test_a_model_that_is_not_there_is_named_with_what_to_check(bucket):
    with pytest.raises(ModelNotFoundError) as caught:
        open_model(bucket, "No/Such")
    for part in ("No/Such", bucket.name, "MODEL_PATH", "prepare_model.py"):
        assert part in str(caught.value)


def test_a_version_that_is_not_there_is_named(bucket, published):
    with pytest.raises(ModelNotFoundError, match=f"version {'0' * 32} of {MODEL}"):
        open_model(bucket, MODEL, "0" * 32)


def test_a_bucket_that_is_not_there_is_named(bucket_for):
    with pytest.raises(BucketError, match=r"s3://no-such-bucket-at-all/.*does not exist"):
        open_model(bucket_for("no-such-bucket-at-all"), MODEL)


def test_wrong_keys_are_named_without_the_secret(s3, bucket, bucket_for, published):
    wrong = type(s3.admin)(s3.admin.access_key_id, "tsec_hunter2")
    with pytest.raises(BucketError, match="secret access key does not belong") as caught:
        open_model(bucket_for(bucket.name, wrong), MODEL)
    assert "hunter2" not in str(caught.value)


def test_leaving_early_stops_the_reading_and_leaves_no_thread(s3, bucket, large_model):
    published = publish_folder(bucket, large_model)
    s3.forget_requests()
    s3.inject(Fault(kind="hold", bucket=bucket.name, key=f"*/{UNET}", skip=1))
    stream = open_model(bucket, MODEL, options=ReadOptions(connections=1))
    stream.configs()
    s3.wait_for_held_request()
    leaving = threading.Thread(target=stream.close)
    leaving.start()
    s3.clear_faults()
    leaving.join()

    read = [record for record in s3.requests(bucket.name) if record.key == published.key(UNET)]
    assert len(read) <= 2  # the head and what was held, of five chunks
    assert not any(thread.name.startswith("weights") for thread in threading.enumerate())


def test_a_stream_that_was_stopped_does_not_pass_for_a_whole_one(s3, bucket, published):
    held = Fault(kind="hold", bucket=bucket.name, key=f"*/{UNET}")
    s3.inject(held)
    stream = open_model(bucket, MODEL, options=ReadOptions(connections=2))
    s3.wait_for_held_request()  # the head, which would queue more chunks when it lands
    stopping = threading.Thread(target=stream.close)
    stopping.start()
    s3.clear_faults()
    stopping.join()
    with pytest.raises(WeightsError, match="stopped before its end"):
        list(stream.tensors())


def test_an_answer_that_breaks_off_is_asked_for_again(s3, bucket, model, published):
    for name in ("latest.json", "manifest.json"):
        s3.inject(Fault(kind="truncate", bucket=bucket.name, key=f"*/{name}", at=5, times=1))
    try:
        with open_model(bucket, MODEL) as stream:
            assert_same(arrays(stream), expected_arrays(model))
    finally:
        s3.clear_faults()


def test_a_header_longer_than_a_chunk_is_read_whole(bucket, own_model):
    tensors = {"x": np.arange(10, dtype="float32"), "y": np.ones((3, 3), dtype="float16")}
    save_file(tensors, own_model / UNET, metadata={"padding": "x" * (CHUNK_SIZE + 100)})
    publish_folder(bucket, own_model)
    with open_model(bucket, MODEL) as stream:
        assert_same(arrays(stream), expected_arrays(own_model))


def upload_bare(bucket, folder: Path, prefix: str = MODEL) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            key = f"{prefix}/{file.relative_to(folder).as_posix()}"
            bucket.client.upload_file(str(file), bucket.name, key)


def test_a_bare_folder_loads_with_a_warning_that_it_carries_no_digests(bucket, model, caplog):
    upload_bare(bucket, model)

    with open_model(bucket, MODEL) as stream:
        assert_same(arrays(stream), expected_arrays(model))

    assert stream.recipe is None
    assert "carries no digests" in caplog.text


def test_a_bare_folder_is_listed_page_by_page(s3, bucket, model):
    upload_bare(bucket, model)
    for number in range(1001):  # a page of S3's listing has 1000 keys
        bucket.client.put_object(
            Bucket=bucket.name, Key=f"{MODEL}/unet/aaa-{number:04}.log", Body=b""
        )

    snapshot = find_snapshot(bucket, MODEL)

    assert UNET in {file.path for file in snapshot.files}
    assert not any(file.path.endswith(".log") for file in snapshot.files)


def test_a_bare_folder_that_changes_while_it_is_read_is_noticed(bucket, model):
    upload_bare(bucket, model)
    snapshot = find_snapshot(bucket, MODEL)
    bucket.client.put_object(
        Bucket=bucket.name, Key=f"{MODEL}/{UNET}", Body=(model / UNET).read_bytes()[::-1]
    )
    with (
        pytest.raises(ObjectChangedError, match=UNET),
        ModelStream(bucket, snapshot) as stream,
    ):
        arrays(stream)


def test_a_bare_folder_of_pickles_is_refused_by_name(bucket, own_model):
    (own_model / UNET).unlink()
    (own_model / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04")
    upload_bare(bucket, own_model)
    with pytest.raises(WeightsError, match=r"unet/diffusion_pytorch_model\.bin may hold a pickle"):
        open_model(bucket, MODEL)


def test_of_two_precisions_in_a_bare_folder_the_half_one_is_read(bucket, own_model):
    half = UNET.replace(".safetensors", ".fp16.safetensors")
    (own_model / half).write_bytes((own_model / UNET).read_bytes())
    upload_bare(bucket, own_model)
    paths = {file.path for file in find_snapshot(bucket, MODEL).files}
    assert half in paths
    assert UNET not in paths


def test_a_bare_folder_without_the_right_to_list_says_what_to_allow(s3, bucket, bucket_for, model):
    upload_bare(bucket, model)
    policy = {
        "Version": "2012-10-17",
        "Statement": [
            {
                "Effect": "Allow",
                "Action": "s3:GetObject",
                "Resource": f"arn:aws:s3:::{bucket.name}/*",
            }
        ],
    }
    keypair = s3.create_user(f"bare-reader-{bucket.name}", policy)
    with pytest.raises(WeightsError, match="Allow s3:ListBucket"):
        open_model(bucket_for(bucket.name, keypair), MODEL)

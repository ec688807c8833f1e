"""Tensorizer: a file format of its own, read over HTTP by a curl process for each of its readers.

Its s3:// addresses take no path-style endpoint, so it is given the object's plain URL, and signs nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.wire.target import Held, Target


def prepare(target: Target) -> Callable[[], Held]:
    from tensorizer import TensorDeserializer, stream_io  # type: ignore[import-not-found]

    if target.tensorizer_key is None:
        raise ModuleNotFoundError("tensorizer is not installed: its copy of the model was not made")
    url = f"{target.endpoint}/{target.bucket}/{target.tensorizer_key}"
    certificate = stream_io.CAInfo(cacert=target.certificate) if target.certificate else None

    def load() -> Held:
        source = stream_io.open_stream(url, certificate_handling=certificate)
        deserializer = TensorDeserializer(source, device="cpu")
        return Held(sum(tensor.nbytes for tensor in deserializer.values()), deserializer)

    return load


def write_copy(folder: Path, file: Path) -> None:
    """Every safetensors file under `folder` as one file in Tensorizer's format."""
    from safetensors.torch import load_file
    from tensorizer import TensorSerializer

    serializer = TensorSerializer(str(file))
    for number, source in enumerate(sorted(folder.rglob("*.safetensors"))):
        tensors = load_file(source)
        serializer.write_state_dict({f"{number}.{name}": tensors[name] for name in tensors})
    serializer.close()


if __name__ == "__main__":
    write_copy(Path(sys.argv[1]), Path(sys.argv[2]))

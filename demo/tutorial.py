"""The caller's side of the demo: the tutorial's own curl command, and a look at what its URL leads to."""

import io
import json
import os
import shutil
import subprocess
import urllib.error
import urllib.request
import uuid
from dataclasses import dataclass
from typing import Any

from PIL import Image

from demo.processes import DemoError

_ADDRESS = "http://ip:port"
_REQUEST = """{
    "input": {
        "prompt": "The space needle in Seattle, best quality, masterpiece",
        "aspect_ratio": "1:1",
        "guidance_scale": 3.5,
        "num_inference_steps": 4,
        "max_sequence_length": 512,
        "output_format": "png",
        "num_outputs": 1
    }
}"""
_CURL = f"""curl "{_ADDRESS}/predictions/$(uuidgen)" \\
  -X PUT \\
  -H "Content-Type: application/json" \\
  --data-binary '{_REQUEST}'"""

# Loopback is never behind a proxy, whatever the environment says.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_REQUEST_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Picture:
    """A PNG as it came, and what it says about itself."""

    png: bytes
    width: int
    height: int
    text: dict[str, str]


def curl_command(address: str) -> str:
    """The tutorial's command for a server at this address."""
    return _CURL.replace(_ADDRESS, address)


def programs_used() -> str:
    """With what `send` will send the request, for a person."""
    if not shutil.which("curl"):
        return "the tutorial's request, through Python: there is no curl on PATH"
    if not shutil.which("uuidgen"):
        return "the tutorial's curl, with a UUID from Python: there is no uuidgen on PATH"
    return "the tutorial's curl, as it stands"


def send(
    address: str, environment: dict[str, str], timeout: float = _REQUEST_TIMEOUT_S
) -> dict[str, Any]:
    """Send the tutorial's request and return the server's answer.

    Raises:
        DemoError: it was not sent, not answered, or answered with anything but a finished prediction.
    """
    with_curl = shutil.which("curl") is not None
    answer = (
        _send_with_curl(address, environment, timeout) if with_curl else _send(address, timeout)
    )
    try:
        prediction: dict[str, Any] = json.loads(answer)
    except ValueError as error:
        raise DemoError(f"The server's answer is not JSON:\n{answer[:2000]}") from error
    if prediction.get("status") != "succeeded" or not prediction.get("output"):
        told = prediction.get("error") or prediction.get("detail") or answer[:2000]
        raise DemoError(f"The prediction did not succeed: {told}")
    return prediction


def _send_with_curl(address: str, environment: dict[str, str], timeout: float) -> str:
    command = curl_command(address)
    if not shutil.which("uuidgen"):
        command = command.replace("$(uuidgen)", str(uuid.uuid4()))
    try:
        done = subprocess.run(
            ["/bin/sh", "-c", command],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired as error:
        raise DemoError(
            f"The server at {address} did not answer the request within {timeout:g} s. "
            "Is the machine busy with something else?"
        ) from error
    if done.returncode:
        raise DemoError(f"curl ended with exit code {done.returncode}:\n{done.stderr.strip()}")
    return done.stdout


def _send(address: str, timeout: float) -> str:
    request = urllib.request.Request(
        f"{address}/predictions/{uuid.uuid4()}",
        method="PUT",
        data=_REQUEST.encode(),
        headers={"Content-Type": "application/json"},
    )
    status, body, _ = fetch(request, timeout)
    if status >= 500:
        raise DemoError(f"The server answered {status}: {body[:2000].decode(errors='replace')}")
    return body.decode(errors="replace")


def fetch(
    request: urllib.request.Request | str, timeout: float = _REQUEST_TIMEOUT_S
) -> tuple[int, bytes, str]:
    """Status, body and content type; an error status is an answer like any other.

    Raises:
        DemoError: nobody answered.
    """
    url = request if isinstance(request, str) else request.full_url
    try:
        with _DIRECT.open(request, timeout=timeout) as response:
            return response.status, response.read(), response.headers.get("Content-Type", "")
    except urllib.error.HTTPError as error:
        return error.code, error.read(), error.headers.get("Content-Type", "")
    except OSError as error:
        raise DemoError(f"{url.partition('?')[0]} could not be fetched: {error}") from error


def fetch_picture(url: str) -> Picture:
    """Fetch a URL that the server returned, and make sure that it leads to a PNG, and only by its signature.

    Raises:
        DemoError: it does not.
    """
    bare = url.partition("?")[0]
    status, body, content_type = fetch(url)
    if (status, content_type) != (200, "image/png"):
        start = body[:500].decode(errors="replace")
        raise DemoError(f"{bare} answered {status} ({content_type}) instead of a PNG:\n{start}")
    try:
        with Image.open(io.BytesIO(body), formats=["PNG"]) as image:
            image.load()
            width, height = image.size
            text = {str(name): str(value) for name, value in image.info.items()}
    except (OSError, SyntaxError) as error:
        raise DemoError(f"What lies at {bare} is no PNG: {error}") from error
    if fetch(bare)[0] != 403:
        raise DemoError(f"{bare} can be read without a signature: the bucket is not private.")
    return Picture(body, width, height, text)


def file_name(url: str) -> str:
    return os.path.basename(url.partition("?")[0])  # noqa: PTH119 (a URL, no path of this machine)

"""`make demo` from end to end, and that nothing it started outlives it, however it ends."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil
import pytest
from PIL import Image

from demo.__main__ import save
from demo.processes import DemoError, inherited_environment
from demo.s3 import EmbeddedS3
from demo.stages import create_buckets, create_keypair
from demo.tutorial import curl_command, fetch_picture, send

REPOSITORY = Path(__file__).resolve().parents[2]
MARK = "DEMO_TEST_MARK"


@dataclass
class Demo:
    """A demo running as a child, recognisable by a mark that everything it starts inherits."""

    process: subprocess.Popen[str]
    mark: str

    @property
    def output(self) -> IO[str]:
        assert self.process.stdout is not None
        return self.process.stdout

    def read_until(self, text: str) -> str:
        """What it prints, up to and with `text` (which need not end a line)."""
        seen = ""
        while not seen.endswith(text):
            character = self.output.read(1)
            assert character, f"the demo ended without saying {text!r}:\n{seen}"
            seen += character
        return seen

    def finish(self) -> tuple[int, str]:
        rest = self.output.read()
        return self.process.wait(60), rest

    def relatives(self) -> list[str]:
        """The command lines of all processes that carry the mark."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark:
                    found.append(" ".join(process.cmdline()))
            except (psutil.AccessDenied, psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
        return found


StartDemo = Callable[..., Demo]


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[StartDemo]:
    """Starts demos; fails the test if one leaves a process behind."""
    started: list[Demo] = []

    def start(*arguments: str, **environment: str) -> Demo:
        mark = uuid.uuid4().hex
        inherited = {name: value for name, value in os.environ.items() if name != "KEEP"}
        process = subprocess.Popen(
            [sys.executable, "-m", "demo", "--output", str(tmp_path / "out"), *arguments],
            cwd=REPOSITORY,
            env={**inherited, **environment, MARK: mark, "TMPDIR": str(tmp_path)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        started.append(Demo(process, mark))
        return started[-1]

    yield start
    for each in started:
        if each.process.poll() is None:
            each.process.send_signal(signal.SIGTERM)
            each.process.wait(60)
        each.output.close()
        assert each.relatives() == []
    assert list(tmp_path.glob("demo-*")) == [], "its temporary folder is gone"


@pytest.mark.slow
def test_demo_makes_an_image_and_leaves_nothing_running(demo: StartDemo, tmp_path: Path) -> None:
    # An ambient setting, or a proxy, of whoever runs it must not matter.
    running = demo(
        AWS_ACCESS_KEY_ID="someone",
        AWS_ENDPOINT_URL="http://127.0.0.1:9",
        MODEL_VERSION="another",
        http_proxy="http://127.0.0.1:9",
    )
    exit_code, printed = running.finish()
    assert exit_code == 0, printed
    assert running.relatives() == []
    assert "Published s3://model-storage/demo/small-sdxl-lightning version" in printed
    (picture,) = (tmp_path / "out").iterdir()
    assert f"The image: {picture}" in printed
    with Image.open(picture) as image:
        assert (image.format, image.size) == ("PNG", (256, 256))
        assert "The space needle in Seattle" in " ".join(map(str, image.info.values()))


@pytest.mark.slow
def test_keep_serves_until_ctrl_c(demo: StartDemo) -> None:
    running = demo(KEEP="1")
    printed = running.read_until("--data-binary")
    assert "Serving until Ctrl-C" in printed
    address = printed.rsplit('curl "', 1)[1].partition("/predictions/")[0]
    with urllib.request.urlopen(f"{address}/ready") as response:
        assert b'"ready"' in response.read()
    running.process.send_signal(signal.SIGINT)
    exit_code, rest = running.finish()
    assert (exit_code, "Traceback" in rest) == (0, False)
    assert running.relatives() == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "number"),
    [
        ("Start an embedded S3 server", signal.SIGINT),
        ("Build a small SDXL model", signal.SIGTERM),
        ("Start the gateway", signal.SIGINT),
    ],
)
def test_interrupted_demo_leaves_nothing_running(demo: StartDemo, stage: str, number: int) -> None:
    running = demo()
    running.read_until(stage)
    running.process.send_signal(number)
    exit_code, rest = running.finish()
    assert exit_code == 128 + number
    assert running.relatives() == []
    assert "The demo was stopped by" in rest
    assert "Traceback" not in rest


@pytest.mark.slow
def test_failing_setup_is_shown_and_leaves_nothing_running(demo: StartDemo) -> None:
    running = demo(DEVICE="abacus")
    exit_code, printed = running.finish()
    assert exit_code == 1
    assert running.relatives() == []
    assert "The demo failed. The gateway ended with exit code 2." in printed
    assert "DEVICE" in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize("path", ["", None], ids=["python", "curl"])
def test_server_that_does_not_answer_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, path: str | None
) -> None:
    if path is not None:  # without curl
        monkeypatch.setenv("PATH", path)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(DemoError, match=address):
            send(address, inherited_environment(), timeout=0.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (create_buckets, "The bucket model-storage could not be created"),
        (
            lambda server: create_keypair(server, "model-runner"),
            "The keypair model-runner could not be created",
        ),
    ],
)
def test_s3_server_that_has_died_is_a_failure(
    make: Callable[[EmbeddedS3], object], message: str
) -> None:
    with EmbeddedS3() as server:
        os.kill(server.pid, signal.SIGKILL)
        with pytest.raises(DemoError, match=message):
            make(server)


def test_image_that_cannot_be_written_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file where the folder should be")
    with pytest.raises(DemoError, match=f"could not be written to {tmp_path}/out"):
        save(b"png", tmp_path / "out" / "image.png")


@pytest.mark.parametrize("body", [b"<html>", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_url_that_leads_to_no_png_is_a_failure(
    s3: EmbeddedS3, admin: Any, new_bucket: Callable[[], str], body: bytes
) -> None:
    target = {"Bucket": new_bucket(), "Key": "image.png"}
    admin.put_object(**target, Body=body, ContentType="image/png")
    with pytest.raises(DemoError, match="is no PNG"):
        fetch_picture(admin.generate_presigned_url("get_object", Params=target))


def test_command_is_the_tutorials(tmp_path: Path) -> None:
    command = curl_command("http://127.0.0.1:5001")
    assert command.startswith(
        'curl "http://127.0.0.1:5001/predictions/$(uuidgen)" \\\n  -X PUT \\\n'
    )
    body = command.partition("--data-binary '")[2].removesuffix("'")
    assert json.loads(body)["input"]["guidance_scale"] == 3.5

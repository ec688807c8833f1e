"""The real gateway, `python -m gateway`, as a child process, before the real Cog server with a runner of a few lines.

It sees only the environment a test gives it. The buckets are the embedded S3 server's.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from http.client import HTTPConnection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from scripts.generate_schema import generate
from tests.support.cog_server import NO_AMBIENT_CREDENTIALS, REPOSITORY
from tests.support.process_groups import members_of_group

RUNNER = REPOSITORY / "tests" / "support" / "runner_for_gateway.py"
TIMEOUT_S = 90.0
TAIL_LINES = 60


def small_runner(folder: Path, runner: Path = RUNNER) -> Path:
    """A folder as the repository's: predict.py and its schema. Returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(runner, folder / "predict.py")
    (folder / ".cog").mkdir(exist_ok=True)
    schema = generate(runner.read_text(encoding="utf-8"))
    (folder / ".cog" / "openapi_schema.json").write_text(json.dumps(schema), encoding="utf-8")
    return folder


@contextlib.contextmanager
def holding(folder: Path, *prompts: str) -> Iterator[None]:
    """The runner in this folder, whichever server runs it, begins these and goes on when the block is over."""
    marks = [folder / "held" / prompt for prompt in prompts]
    (folder / "held").mkdir(exist_ok=True)
    for mark in marks:
        mark.touch(exist_ok=False)
    try:
        yield
    finally:
        for mark in marks:
            mark.unlink()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class GatewayServer:
    """`with GatewayServer(environment, cwd) as gateway:` runs it in the block, which begins when it is ready."""

    def __init__(
        self,
        environment: Mapping[str, str],
        cwd: Path,
        *,
        port: int | None = None,
        wait_until_ready: bool = True,
    ) -> None:
        self.cwd = cwd
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.environment = {
            **{name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ},
            **NO_AMBIENT_CREDENTIALS,
            "PYTHONPATH": str(REPOSITORY),
            "HOST": "127.0.0.1",
            "PORT": str(self.port),
            "MODEL_PATH": "test/runner",
            "MODEL_BUCKET_NAME": "models",
            "LOG_FORMAT": "text",
            **environment,
        }
        self._wait_until_ready = wait_until_ready
        self._lines: list[str] = []
        self.process: subprocess.Popen[str]

    @property
    def logs(self) -> str:
        return "".join(self._lines)

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gateway"],
            cwd=self.cwd,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self.until(lambda: self.get("/ready" if self._wait_until_ready else "/live").is_success)
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(TIMEOUT_S)
        finally:
            self.kill()
        self._reader.join(TIMEOUT_S)
        if error is not None:
            tail = "".join(self._lines[-TAIL_LINES:])
            print(f"--- the gateway's last lines ---\n{tail}", file=sys.stderr)

    def kill(self) -> None:
        """As the kernel does for want of memory."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(TIMEOUT_S)

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def until(self, holds: Any, seconds: float = TIMEOUT_S) -> None:
        """Wait until `holds()`; a server that is not there yet is no failure."""
        ends = time.monotonic() + seconds
        while True:
            with contextlib.suppress(httpx.TransportError):
                if holds():
                    return
            if self.process.poll() is not None:
                raise AssertionError(f"the gateway ended:\n{self.logs}")
            if time.monotonic() > ends:
                raise AssertionError(f"it did not come to pass:\n{self.logs[-6000:]}")
            time.sleep(0.02)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=TIMEOUT_S, trust_env=False, **options)

    def post(self, path: str, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, timeout=TIMEOUT_S, trust_env=False, **options)

    def put(self, prediction_id: str, given: dict[str, Any], **options: Any) -> httpx.Response:
        body = {"input": given, **options.pop("fields", {})}
        return httpx.put(
            f"{self.url}/predictions/{prediction_id}",
            json=body,
            timeout=TIMEOUT_S,
            trust_env=False,
            **options,
        )

    @contextlib.contextmanager
    def asking(self, prediction_id: str, given: Mapping[str, Any]) -> Iterator[Iterator[str]]:
        """A caller who has heard that it started, and hangs up at the block's end. Gives the lines still to come."""
        with httpx.stream(
            "PUT",
            f"{self.url}/predictions/{prediction_id}",
            json={"input": given},
            headers={"Accept": "text/event-stream"},
            timeout=TIMEOUT_S,
            trust_env=False,
        ) as answer:
            lines = answer.iter_lines()  # held on to: they hang up when they are dropped
            assert next(line for line in lines if line.startswith("event")) == "event: start"
            yield lines

    @contextlib.contextmanager
    def sent(self, prediction_id: str, given: Mapping[str, Any]) -> Iterator[HTTPConnection]:
        """A caller whose request was sent, who has not waited for the answer, and hangs up at the block's end."""
        with contextlib.closing(
            HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT_S)
        ) as caller:
            body = json.dumps({"input": given})
            headers = {"Content-Type": "application/json"}
            caller.request("PUT", f"/predictions/{prediction_id}", body, headers)
            yield caller

    def cog_pid(self) -> int:
        """Of Cog's server, which leads a process group of its own."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        for child in children.split():
            if "cog.server.http" in Path(f"/proc/{child}/cmdline").read_text():
                return int(child)
        raise AssertionError("Cog's server does not run")

    def worker_pid(self) -> int:
        server = self.cog_pid()
        (worker,) = members_of_group(server).keys() - {server}
        return worker

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.append(line)

"""`EmbeddedS3`: a real S3 endpoint with IAM enforced, for the demo and the tests, in a child process on loopback.

It stands in for AWS or Tigris. moto speaks the protocol and checks signatures, actions and resources; `s3_gate` adds
presigned URLs, a record of requests and faults on demand. Not enforced: a policy's conditions, rights on the
source of a copy. Nothing is kept: what it holds ends with it.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import boto3
from botocore.config import Config

from demo.s3_faults import Fault, RequestRecord, to_json
from demo.s3_gate import CONTROL_PATH, TOKEN_HEADER

REGION = "us-east-1"
_STOP_TIMEOUT_S = 10.0
_REPOSITORY = Path(__file__).resolve().parent.parent


class EmbeddedS3Error(Exception):
    """The embedded S3 server did not start, or is not running."""


@dataclass(frozen=True)
class Keypair:
    """An access key; the secret stays out of its repr."""

    access_key_id: str
    secret_access_key: str = field(repr=False)


class EmbeddedS3:
    """Starts with `start()` or `with`, ends with `stop()`, with the block, or with the process that started it.

    Attributes once it runs: `endpoint_url`, and `admin`, a keypair that may do everything.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self._ready: dict[str, Any] = {}

    def launch(self) -> None:
        """Start the server's process without waiting for it; `start()` does that."""
        if self._process is not None:
            return
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed by stop)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "demo.s3_server"],
            stdin=subprocess.PIPE,  # the server ends when this closes
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd=_REPOSITORY,
            env=_environment_without_aws(),
            start_new_session=True,  # Ctrl-C is for the parent, which then stops its server in order
        )

    def start(self) -> Self:
        """Start the server and return once it serves.

        Raises:
            EmbeddedS3Error: it did not start; the message ends with its own last words.
        """
        self.launch()
        if self._ready:
            return self
        process = self._launched()
        line = process.stdout.readline() if process.stdout else b""
        if not line:
            last_words = self._last_words()
            self.stop()
            raise EmbeddedS3Error(f"The embedded S3 server did not start:\n{last_words}")
        self._ready = json.loads(line)
        return self

    def stop(self) -> None:
        """End the server; what it held is gone. Does nothing if it is not running."""
        process, self._process, self._ready = self._process, None, {}
        if process is None:
            return
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if self._log is not None:
            self._log.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        return self._launched().pid

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{self._serving()['port']}"

    @property
    def admin(self) -> Keypair:
        ready = self._serving()
        return Keypair(ready["access_key_id"], ready["secret_access_key"])

    def environment(self, keypair: Keypair | None = None) -> dict[str, str]:
        """The variables that point a program at this server with `keypair` (the admin's, unless given)."""
        keys = keypair or self.admin
        return {
            "AWS_ACCESS_KEY_ID": keys.access_key_id,
            "AWS_SECRET_ACCESS_KEY": keys.secret_access_key,
            "AWS_ENDPOINT_URL_S3": self.endpoint_url,
            "AWS_REGION": "auto",
        }

    def client(self, keypair: Keypair | None = None, service: str = "s3") -> Any:
        """A boto3 client of this server with `keypair` (the admin's, unless given)."""
        keys = keypair or self.admin
        # A session of its own: boto3's default one must not be made by two threads at once.
        make_client: Any = boto3.session.Session().client
        return make_client(
            service,
            endpoint_url=self.endpoint_url,
            aws_access_key_id=keys.access_key_id,
            aws_secret_access_key=keys.secret_access_key,
            region_name=REGION,
            config=Config(
                signature_version="s3v4" if service == "s3" else "v4",
                s3={"addressing_style": "path"},
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                retries={"total_max_attempts": 1},
                proxies={},  # loopback is never behind a proxy, whatever the environment says
            ),
        )

    def create_bucket(self, name: str) -> None:
        """Create a private bucket."""
        self.client().create_bucket(Bucket=name, ACL="private")

    def create_user(self, name: str, policy: Mapping[str, Any]) -> Keypair:
        """Create a user who may do what `policy` (an IAM policy document) allows, and a keypair of theirs."""
        iam = self.client(service="iam")
        iam.create_user(UserName=name)
        iam.put_user_policy(
            UserName=name, PolicyName=f"{name}-policy", PolicyDocument=json.dumps(policy)
        )
        key = iam.create_access_key(UserName=name)["AccessKey"]
        return Keypair(key["AccessKeyId"], key["SecretAccessKey"])

    def requests(self, bucket: str | None = None) -> list[RequestRecord]:
        """Every request answered so far, oldest first, or those of one bucket."""
        records = [
            RequestRecord(**{**record, "query": tuple(record["query"])})
            for record in self._control("GET", "requests")
        ]
        return [record for record in records if bucket in (None, record.bucket)]

    def forget_requests(self) -> None:
        self._control("DELETE", "requests")

    @contextlib.contextmanager
    def fault(self, fault: Fault) -> Iterator[None]:
        """Commit `fault` for as long as the block lasts; leaving it clears every fault."""
        self.inject(fault)
        try:
            yield
        finally:
            self.clear_faults()

    def inject(self, fault: Fault) -> None:
        self._control("POST", "faults", to_json(fault))

    def clear_faults(self) -> None:
        """Forget every fault, and let go of the requests that one holds."""
        self._control("DELETE", "faults")

    def wait_for_held_request(self) -> None:
        """Return once a `hold` fault has a request in its grip.

        Raises:
            EmbeddedS3Error: no such request came within two minutes.
        """
        if not self._control("GET", "held"):
            raise EmbeddedS3Error("No request came that a fault could hold.")

    def set_clock(self, offset_seconds: float) -> None:
        """Judge the expiry of presigned URLs this many seconds from now (0: by the real time)."""
        self._control("POST", "clock", {"offset": offset_seconds})

    def _control(self, method: str, name: str, content: Any = None) -> Any:
        request = urllib.request.Request(
            f"{self.endpoint_url}{CONTROL_PATH}{name}",
            method=method,
            data=None if content is None else json.dumps(content).encode(),
            headers={
                TOKEN_HEADER: self._ready["control_token"],
                "Content-Type": "application/json",
            },
        )
        # No proxy: a proxy variable in the environment must not send loopback traffic elsewhere.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request) as response:
            return json.load(response)

    def _launched(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise EmbeddedS3Error("The embedded S3 server is not running: call start() first.")
        return self._process

    def _serving(self) -> dict[str, Any]:
        self._launched()
        return self._ready

    def _last_words(self) -> str:
        if self._process is None or self._log is None:
            return ""
        self._process.wait(_STOP_TIMEOUT_S)
        self._log.seek(0)
        return self._log.read().decode(errors="replace")[-4000:]


def _environment_without_aws() -> dict[str, str]:
    """The server's own environment: a caller's AWS settings (an endpoint, a profile) are none of its business."""
    return {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}

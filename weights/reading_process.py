"""The parent's side of the reading process: starts it, gives it its order, and puts what it reads where it belongs."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weights.chunks import Chunk, SnapshotFile
from weights.errors import WeightsError
from weights.landing import WeightFile, WholeFile
from weights.ring import Ring

if TYPE_CHECKING:
    from weights.bucket import Bucket
    from weights.objects import ObjectReader
    from weights.options import ReadOptions

ROOT = Path(__file__).resolve().parents[1]
PATIENCE_AT_END = 5.0  # seconds that a child has to leave by itself

logger = logging.getLogger(__name__)


class ReadingProcess:
    """A child that reads chunks into a ring. Start it early: it imports while the parent finds out what to read."""

    def __init__(self, ring_bytes: int) -> None:
        self.ring = Ring.of_size(ring_bytes)
        self.counters: dict[str, float] = {}
        self.error: BaseException | None = None
        self.complete = False
        self._ours, theirs = socket.socketpair()
        self._lock = threading.Lock()
        self._stopped = False
        self._pump: threading.Thread | None = None
        self._ended = threading.Event()
        environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(ROOT), environment.get("PYTHONPATH")])
        )
        try:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "weights.reading_child",
                    str(theirs.fileno()),
                    str(self.ring.descriptor),
                ],
                pass_fds=(theirs.fileno(), self.ring.descriptor),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=environment,
            )
        except OSError as error:
            self._ours.close()
            self.ring.close()
            raise WeightsError(
                f"cannot start the process that reads the weights: {error.strerror}. "
                "Give the machine more memory or processes, or set MODEL_READER=thread"
            ) from error
        finally:
            theirs.close()

    def order(
        self,
        bucket: Bucket | None,
        files: Sequence[SnapshotFile],
        options: ReadOptions,
        folder: Path | None,
    ) -> None:
        """Tell the child what to read; it begins at once, as far as the ring reaches. Secrets go over the socket.

        With a `folder`, the bucket is made there, and only if it is needed.
        """
        self._files = list(files)
        self._chunks = [list(file.chunks()) for file in files]
        self._send(
            {
                "reader": None if folder or bucket is None else _as_plain(bucket.reader),
                "bucket": bucket.as_plain() if folder and bucket else None,
                "folder": None if folder is None else str(folder),
                "connections": options.connections,
                "verify": options.verify,
                "cache_folder": None if options.cache_folder is None else str(options.cache_folder),
                "cache_bytes": options.cache_bytes,
                "slots": self.ring.slots,
                "files": [asdict(file) for file in files],
            }
        )

    def deliver(
        self, landings: Mapping[str, WholeFile | WeightFile], on_end: Callable[[], None]
    ) -> None:
        """Begin to empty the ring into the landings, on a thread; `on_end` is called when it ends, well or not."""
        self._landings = landings
        self._pump = threading.Thread(
            target=self._empty, args=(on_end,), name="weights-ring", daemon=True
        )
        self._pump.start()

    def wait(self, seconds: float | None = None) -> bool:
        return self._ended.wait(seconds)

    def stop(self, *, wait: bool = True) -> None:
        """End the child: by hanging up, or at once without `wait`."""
        self._stopped = True
        with contextlib.suppress(OSError):
            self._ours.shutdown(socket.SHUT_RDWR)  # the child ends when its parent hangs up
        if not wait:
            self._process.kill()
        try:
            self._process.wait(PATIENCE_AT_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._pump is not None and self._pump is not threading.current_thread():
            self._pump.join()
        self._ours.close()
        self.ring.close()

    def _send(self, message: Any) -> None:
        data = json.dumps(message).encode() + b"\n"
        try:
            with self._lock:
                self._ours.sendall(data)
        except OSError:
            if not self._stopped and self._pump is None:
                raise WeightsError(self._death()) from None
            # Otherwise the pump sees the same, and knows more.

    def _empty(self, on_end: Callable[[], None]) -> None:
        try:
            with self._ours.makefile("r", encoding="utf-8") as lines:
                for line in lines:
                    if not self._handle(json.loads(line)):
                        return
            if not self._stopped:
                self.error = WeightsError(self._death())
        except BaseException as error:  # noqa: BLE001 - whatever it is, the one who waits is told
            if not self._stopped:
                self.error = error
        finally:
            self._ended.set()
            on_end()

    def _handle(self, message: dict[str, Any]) -> bool:
        """Act on one message; False after the last."""
        match message["kind"]:
            case "piece":
                number, index, offset = message["place"]
                slot = message["slot"]
                landing = self._landings[self._files[number].path]
                piece = self.ring.slot(slot)[: message["count"]]
                landing.put(
                    self._chunks[number][index],
                    offset,
                    piece,
                    lambda: self._send({"free": [slot]}),
                )
            case "landed":
                number, index = message["place"]
                chunk: Chunk = self._chunks[number][index]
                self.counters = message["counters"]
                self._landings[chunk.file.path].landed(chunk)
            case "counters":
                self.counters = message["counters"]
            case "log":
                logging.getLogger(message["name"]).log(message["level"], "%s", message["text"])
            case "failed":
                from weights.reading_child import rebuilt

                self.error = rebuilt(message)
                return False
            case "done":
                self.complete = True
                return False
        return True

    def _death(self) -> str:
        try:
            code = self._process.wait(PATIENCE_AT_END)
        except subprocess.TimeoutExpired:
            code = 0
        how = f"killed by signal {-code}" if code < 0 else f"exit status {code}"
        return (
            f"the process that reads the weights ended before its work was done ({how}). If the machine ran out of "
            "memory, give it more; what it wrote to standard error says more"
        )


def _as_plain(reader: ObjectReader) -> dict[str, Any]:
    """What the child makes the same reader of, without looking anything up again."""
    keypair = reader.keypair
    return {
        "bucket": reader.bucket,
        "endpoint": asdict(reader.endpoint),
        "region": reader.signer.region,
        "credentials": None if keypair is None else asdict(keypair),
        "patience": asdict(reader.patience),
    }

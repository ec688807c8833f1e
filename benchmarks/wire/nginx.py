"""nginx on loopback over a folder, as a stand-in for S3: it answers ranges and HEADs with ETags, and checks no keys.

It cannot list, which none of the measured needs, and is quick enough not to be what is measured.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from string import Template

STARTS_WITHIN = 10.0  # seconds
STOPS_WITHIN = 10.0
RATE = 90_000_000  # bytes a second, what one connection to a bucket far away may get
# With a rate, nginx pauses after each piece for as long as it should have taken, in whole milliseconds: 20 for this.
# It does not pause after the last piece of an answer, which about makes up for its timers being late.
PIECE = RATE // 50

CONFIGURATION = Template("""
$user
worker_processes 2;
daemon off;
pid $folder/nginx.pid;
error_log $folder/error.log warn;
events { worker_connections 1024; }
http {
  access_log off;
  log_format bytes '$$body_bytes_sent $$request_uri';
  client_body_temp_path $folder/temp-body;
  proxy_temp_path $folder/temp-proxy;
  fastcgi_temp_path $folder/temp-fastcgi;
  uwsgi_temp_path $folder/temp-uwsgi;
  scgi_temp_path $folder/temp-scgi;
  default_type application/octet-stream;
  root $root;
  sendfile on;
  tcp_nopush on;
  keepalive_requests 100000;
  keepalive_timeout 300s;
  server { listen 127.0.0.1:$free; }
  server { listen 127.0.0.1:$limited; limit_rate $rate; sendfile_max_chunk $piece; }
  server {
    listen 127.0.0.1:$counted;
    limit_rate $rate;
    sendfile_max_chunk $piece;
    access_log $folder/access.log bytes;
  }
  server {
    listen 127.0.0.1:$tls ssl;
    ssl_certificate $folder/server.pem;
    ssl_certificate_key $folder/server.key;
    ssl_protocols TLSv1.2 TLSv1.3;
    output_buffers 4 256k;
  }
}
""")


class NginxError(Exception):
    """nginx, or the certificate for it, could not be had; the message says why."""


@dataclass(frozen=True)
class Server:
    """The same folder behind four endpoints; `counted` is limited too, and writes down what it sends."""

    free: str
    limited: str
    tls: str
    counted: str
    certificate: str
    access_log: Path

    def sent_bytes(self) -> int:
        """Bytes of bodies that `counted` has sent since the last `forget_sent`, or ever."""
        lines = self.access_log.read_text().splitlines()
        return sum(int(line.split()[0]) for line in lines)

    def forget_sent(self) -> None:
        os.truncate(self.access_log, 0)


def missing_programs() -> list[str]:
    return [name for name in ("nginx", "openssl") if shutil.which(name) is None]


@contextmanager
def serve(root: Path, folder: Path) -> Iterator[Server]:
    """Serve `root`, with everything nginx writes in `folder`; it is stopped whatever ends the block."""
    folder.mkdir()
    certificate = make_certificates(folder)
    ports = dict(zip(("free", "limited", "tls", "counted"), free_ports(4), strict=True))
    configuration = folder / "nginx.conf"
    configuration.write_text(
        CONFIGURATION.substitute(
            # Started by root, workers would otherwise be somebody who may not read a private folder.
            user="user root;" if os.geteuid() == 0 else "",
            folder=folder,
            root=root,
            rate=RATE,
            piece=PIECE,
            **ports,
        )
    )
    log = folder / "error.log"
    process = subprocess.Popen(
        ["nginx", "-p", str(folder), "-e", str(log), "-c", str(configuration)],
        stdin=subprocess.DEVNULL,
    )
    try:
        for port in ports.values():
            _wait_for(port, process, log)
        yield Server(
            free=f"http://127.0.0.1:{ports['free']}",
            limited=f"http://127.0.0.1:{ports['limited']}",
            tls=f"https://127.0.0.1:{ports['tls']}",
            counted=f"http://127.0.0.1:{ports['counted']}",
            certificate=str(certificate),
            access_log=folder / "access.log",
        )
    finally:
        process.terminate()
        try:
            process.wait(STOPS_WITHIN)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_ports(count: int) -> list[int]:
    """Ports that the system has just given out, all different."""
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def make_certificates(folder: Path) -> Path:
    """An authority of one day, and a certificate for 127.0.0.1 signed by it; returns the authority's.

    Two, since strict clients (rustls) take no authority for a server.
    """
    authority, server = folder / "authority.pem", folder / "server.pem"
    key = ["-newkey", "rsa:2048", "-nodes", "-days", "1"]
    _openssl(
        ["req", "-x509", *key, "-subj", "/CN=benchmark authority"],
        ["-keyout", f"{folder}/authority.key", "-out", str(authority)],
    )
    _openssl(
        ["req", "-x509", *key, "-subj", "/CN=127.0.0.1"],
        ["-CA", str(authority), "-CAkey", f"{folder}/authority.key"],
        ["-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:FALSE"],
        ["-keyout", f"{folder}/server.key", "-out", str(server)],
    )
    return authority


def _openssl(*arguments: list[str]) -> None:
    command = ["openssl", *(part for group in arguments for part in group)]
    finished = subprocess.run(command, check=False, capture_output=True, text=True)
    if finished.returncode:
        raise NginxError(f"openssl could not make a certificate: {finished.stderr.strip()}")


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.02)
        else:
            return
    said = log.read_text() if log.exists() else ""
    raise NginxError(f"nginx did not start: {said.strip() or 'it said nothing'}")

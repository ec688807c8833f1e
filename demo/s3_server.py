"""The child process behind `demo.s3.EmbeddedS3`: moto's S3 and IAM with rights enforced, on a free port of loopback.

Prints one line of JSON when it serves (port, admin keypair, control token), and ends when its standard input does: a
parent that dies, however it dies, takes it along. Objects live in this process's memory.
"""

import json
import logging
import os
import secrets
import sys
import threading

# moto reads its settings when it is imported.
os.environ["INITIAL_NO_AUTH_ACTION_COUNT"] = "0"  # from the first request on, everything is checked
os.environ["MOTO_DISABLE_GLOBAL_CORS"] = "true"
os.environ["MOTO_IAM_LOAD_MANAGED_POLICIES"] = "false"

from typing import Any

from moto.core.models import DEFAULT_ACCOUNT_ID
from moto.iam.models import iam_backends
from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from werkzeug.serving import make_server

from demo.s3_gate import Gate
from demo.s3_moto import keep_content_in_memory

HOST = "127.0.0.1"
ADMIN_POLICY = {
    "Version": "2012-10-17",
    "Statement": [{"Effect": "Allow", "Action": ["s3:*", "iam:*", "sts:*"], "Resource": "*"}],
}


def main() -> None:
    keep_content_in_memory()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # one line per request helps nobody

    token = secrets.token_urlsafe(24)
    application = DomainDispatcherApplication(create_backend_app)
    gate = Gate(application, control_token=token, secret_of=_secret_of)
    server = make_server(HOST, 0, gate, threaded=True, request_handler=MotoRequestHandler)
    access_key_id, secret_access_key = _create_admin()
    ready = {
        "port": server.server_port,
        "access_key_id": access_key_id,
        "secret_access_key": secret_access_key,
        "control_token": token,
    }
    print(json.dumps(ready), flush=True)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # nobody reads the pipe from here on
    server.serve_forever()


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(0)  # the parent is gone, and so is everyone who could want what is in memory


def _create_admin() -> tuple[str, str]:
    """The first user is made from within: with rights enforced there is no other way to make it."""
    iam = iam_backends[DEFAULT_ACCOUNT_ID]["aws"]
    iam.create_user(region_name="us-east-1", user_name="admin")
    iam.put_user_policy("admin", "everything", json.dumps(ADMIN_POLICY))
    key: Any = iam.create_access_key("admin")
    return key.access_key_id, key.secret_access_key


def _secret_of(access_key_id: str) -> str | None:
    iam = iam_backends[DEFAULT_ACCOUNT_ID]["aws"]
    for user in list(iam.users.values()):
        for key in user.access_keys:
            if key.access_key_id == access_key_id and key.status == "Active":
                return str(key.secret_access_key)
    return None


if __name__ == "__main__":
    main()

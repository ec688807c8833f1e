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

HOST = "127.0.0.1"
_MOTO_SETTINGS = {
    "INITIAL_NO_AUTH_ACTION_COUNT": "0",  # from the first request on, everything is checked
    "MOTO_DISABLE_GLOBAL_CORS": "true",
    "MOTO_IAM_LOAD_MANAGED_POLICIES": "false",
}


def main() -> None:
    # Before the slow imports: the parent may end while they run.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(_MOTO_SETTINGS)  # moto reads them when it is imported
    from moto.moto_server.werkzeug_app import MotoRequestHandler
    from werkzeug.serving import make_server

    from demo import s3_moto
    from demo.s3_gate import Gate

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # one line per request helps nobody
    token = secrets.token_urlsafe(24)
    gate = Gate(s3_moto.application(), control_token=token, secret_of=s3_moto.secret_of)
    server = make_server(HOST, 0, gate, threaded=True, request_handler=MotoRequestHandler)
    access_key_id, secret_access_key = s3_moto.create_admin()
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


if __name__ == "__main__":
    main()

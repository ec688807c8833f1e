"""`make demo`: bucket in, image out, on this machine, with a line per stage.

With KEEP=1 in the environment (or --keep) it goes on serving until Ctrl-C. Whatever ends it, it ends what it started.
"""

import argparse
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from demo import stages, tutorial
from demo.console import Console
from demo.processes import DemoError, Interruption, Signals, inherited_environment
from demo.s3 import EmbeddedS3, EmbeddedS3Error
from demo.stages import IMAGE_BUCKET, MODEL_BUCKET, MODEL_PATH, Gateway, Workplace

_POLL_S = 0.5


def main() -> int:
    options = _parse()
    signals = Signals()
    signals.listen()
    try:
        with ExitStack() as exits:
            folder = exits.enter_context(tempfile.TemporaryDirectory(prefix="demo-"))
            try:
                _run(Workplace(Path(folder), signals, exits), options)
            finally:
                signals.ignore()  # from here on everything is being stopped
    except (DemoError, EmbeddedS3Error) as error:
        print(f"\nThe demo failed. {error}", file=sys.stderr)
        return 1
    except Interruption as interruption:
        print(f"\nThe demo was stopped by {interruption}.", file=sys.stderr)
        return interruption.exit_code
    return 0


def _run(place: Workplace, options: argparse.Namespace) -> None:
    console = Console()
    server = EmbeddedS3()
    place.exits.callback(server.stop)
    with console.stage("Start an embedded S3 server that enforces rights"):
        with place.signals.deferred():
            server.launch()
        server.start()
        console.note(server.endpoint_url)
    with console.stage(f"Create two private buckets: {MODEL_BUCKET}, {IMAGE_BUCKET}"):
        stages.create_buckets(server)
    with console.stage("Create two restricted keypairs from the policies in iam/"):
        publisher = stages.create_keypair(server, "model-publisher")
        workload = stages.create_keypair(server, "model-runner")
    with console.stage("Build a small SDXL model"):
        model = stages.build_model(place)
    with console.stage("Publish it with scripts/prepare_model.py"):
        console.note(stages.publish(place, server, publisher, model))
    with console.stage(
        "Start the gateway and Cog's server with the workload's keypair, until ready"
    ):
        gateway = stages.serve(place, server, workload)
        console.note(f"{gateway.address}, model {MODEL_PATH}")
    with console.stage("Send the tutorial's request"):
        console.note(f"({tutorial.programs_used()})")
        prediction = tutorial.send(gateway.address, inherited_environment())
        url = prediction["output"][0]
        console.note(url)
    with console.stage("Fetch the URL; without its signature it is refused"):
        picture = tutorial.fetch_picture(url)
        target = save(picture.png, options.output / tutorial.file_name(url))
        seed = prediction.get("metrics", {}).get("seed", "unknown")
        console.note(f"a PNG of {picture.width} x {picture.height} pixels, seed {seed}")
    console.say(f"\nThe image: {target}")
    console.say(
        f"It took {console.seconds:.0f} s. The model is untrained: its images are abstract."
    )
    if options.keep:
        _serve_until_stopped(gateway, console)


def save(png: bytes, target: Path) -> Path:
    """Write the image and return its path; raises DemoError."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(png)
    except OSError as error:
        raise DemoError(f"The image could not be written to {target}: {error.strerror}") from error
    return target


def _serve_until_stopped(gateway: Gateway, console: Console) -> None:
    try:
        # Inside: whoever reads this may press it at once.
        console.say(f"\nServing until Ctrl-C. Open {gateway.address} in a browser, or try:\n")
        console.say(tutorial.curl_command(gateway.address))
        while gateway.process.exit_code is None:
            time.sleep(_POLL_S)
    except Interruption:
        console.say("\nStopping.")
        return
    message = f"The gateway ended with exit code {gateway.process.exit_code}. Its last lines:"
    raise DemoError(f"{message}\n{gateway.process.tail()}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m demo",
        description="Publish a small model to an embedded S3 server, serve it, and get an image.",
    )
    parser.add_argument(
        "--keep",
        action="store_true",
        default=os.environ.get("KEEP", "") not in ("", "0"),
        help="go on serving until Ctrl-C (as does KEEP=1)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=stages.REPOSITORY / "demo-output",
        metavar="DIR",
        help="where the image goes (default: demo-output/)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

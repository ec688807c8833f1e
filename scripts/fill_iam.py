"""Fills your bucket names into one of the policies in iam/, and prints it.

    python scripts/fill_iam.py --model-bucket my-models --image-bucket my-images

It only edits a document: creating the policy and attaching it is done with the AWS CLI.
"""

from __future__ import annotations

import argparse
import copy
import ipaddress
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

POLICIES = Path(__file__).resolve().parent.parent / "iam"

# The names that the policies in iam/ and the tutorial use.
MODEL_BUCKET = "model-storage"
IMAGE_BUCKET = "generated-images"
ARN = "arn:aws:s3:::"


class PolicyError(Exception):
    """A name that cannot stand in a policy, or a policy that is not ours."""


def fill(
    policy: Mapping[str, Any],
    *,
    model_bucket: str,
    image_bucket: str,
    model_path: str | None = None,
    image_prefix: str | None = None,
) -> dict[str, Any]:
    """A copy of `policy` for these buckets, narrowed to one model and one image prefix if given.

    Raises PolicyError.
    """
    check_bucket_name(model_bucket)
    check_bucket_name(image_bucket)
    if model_bucket == image_bucket:
        raise PolicyError(
            f"model and images cannot share the bucket '{model_bucket}': whoever may write images "
            "could then overwrite the model. Create a second bucket"
        )
    places = {
        MODEL_BUCKET: (model_bucket, check_prefix(model_path)),
        IMAGE_BUCKET: (image_bucket, check_prefix(image_prefix)),
    }
    filled: dict[str, Any] = copy.deepcopy(dict(policy))
    for statement in filled["Statement"]:
        _narrow_listing(statement, places)
        statement["Resource"] = [_fill_resource(name, places) for name in statement["Resource"]]
    return filled


def _fill_resource(resource: str, places: Mapping[str, tuple[str, str | None]]) -> str:
    bucket, slash, objects = resource.removeprefix(ARN).partition("/")
    if bucket not in places:
        raise PolicyError(f"'{resource}' names neither {MODEL_BUCKET} nor {IMAGE_BUCKET}")
    name, prefix = places[bucket]
    if prefix and objects == "*":
        objects = f"{prefix}/*"
    return f"{ARN}{name}{slash}{objects}"


def _narrow_listing(
    statement: dict[str, Any], places: Mapping[str, tuple[str, str | None]]
) -> None:
    """Where a condition says which prefixes may be listed: those inside the one folder, if there is one."""
    patterns = statement.get("Condition", {}).get("StringLike", {}).get("s3:prefix")
    bucket = statement["Resource"][0].removeprefix(ARN)
    prefix = places[bucket][1] if bucket in places else None
    if patterns and prefix:
        inside = [f"{prefix}/{pattern}" for pattern in patterns if not pattern.startswith("*")]
        statement["Condition"]["StringLike"]["s3:prefix"] = inside


def check_bucket_name(name: str) -> None:
    """S3's rules for bucket names. Raises PolicyError."""
    problem = None
    if not 3 <= len(name) <= 63:
        problem = "it must have 3 to 63 characters"
    elif not re.fullmatch(r"[a-z0-9][a-z0-9.-]*[a-z0-9]", name):
        problem = (
            "only lower-case letters, digits, dots and hyphens, with a letter or digit at each end"
        )
    elif ".." in name:
        problem = "two dots may not follow each other"
    else:
        try:
            ipaddress.IPv4Address(name)
            problem = "it may not look like an IP address"
        except ValueError:
            pass
    if problem:
        raise PolicyError(f"'{name}' is not a bucket name: {problem}")


def check_prefix(prefix: str | None) -> str | None:
    """A key prefix without wildcards, which a policy would read as more than it says."""
    if prefix is None or not prefix.strip("/"):
        return None
    if re.search(r"[*?$]|(^|/)\.{1,2}(/|$)|//", prefix.strip("/")):
        raise PolicyError(f"'{prefix}' is not a path: no *, ?, $, '..' or empty parts")
    return prefix.strip("/")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Fill bucket names into a policy from iam/.")
    parser.add_argument(
        "policy",
        nargs="?",
        type=Path,
        default=POLICIES / "model-runner.json",
        help="iam/model-runner.json (AWS, the default), iam/model-runner.tigris.json or "
        "iam/model-publisher.json",
    )
    parser.add_argument("--model-bucket", default=MODEL_BUCKET, metavar="NAME")
    parser.add_argument("--image-bucket", default=IMAGE_BUCKET, metavar="NAME")
    parser.add_argument("--model-path", metavar="PATH", help="allow only this model, as MODEL_PATH")
    parser.add_argument("--image-prefix", metavar="PATH", help="allow only this, as IMAGE_PREFIX")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write here instead of printing"
    )
    options = parser.parse_args(arguments)
    try:
        policy = fill(
            json.loads(options.policy.read_text(encoding="utf-8")),
            model_bucket=options.model_bucket,
            image_bucket=options.image_bucket,
            model_path=options.model_path,
            image_prefix=options.image_prefix,
        )
        text = json.dumps(policy, indent=2) + "\n"
        if options.output:
            options.output.write_text(text, encoding="utf-8")
            print(f"wrote {options.output}")
        else:
            sys.stdout.write(text)
    except (PolicyError, OSError, ValueError) as error:
        print(f"Cannot fill {options.policy}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

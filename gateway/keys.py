"""API keys: who may come in. `API_KEYS` holds names and digests, so whoever reads the environment cannot use a key.

`python -m gateway.keys new NAME` makes one. What a name may do, and how often, is decided elsewhere.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import re
import secrets
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NewType

KeyName = NewType("KeyName", str)

# The prefix lets secret scanners, and people, see what a stray one is.
PREFIX = "gw_"
RANDOM_BYTES = 32
# Replicate's older clients say Token, and all others Bearer.
SCHEMES = ("bearer", "token")
# Names go into logs and metrics' labels, where a comma, a quote or a space would need care.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
NAME_RULE = (
    "1 to 63 letters, digits, dots, hyphens and underscores, beginning with a letter or digit"
)


class Keys:
    """The keys that are known, each as its name and its digest. Its repr shows names only."""

    def __init__(self, digests: Mapping[KeyName, str]) -> None:
        self._digests = MappingProxyType(dict(digests))

    @property
    def names(self) -> tuple[KeyName, ...]:
        return tuple(self._digests)

    def find(self, authorization_header: str | None) -> KeyName | None:
        """The name of the key that an `Authorization` header carries; None without a header or with an unknown key.

        Every digest is compared, and each in constant time: how long it takes says nothing about any of them.
        """
        scheme, _, key = (authorization_header or "").strip().partition(" ")
        if scheme.lower() not in SCHEMES:
            return None
        given = digest_of(key.strip())
        found = None
        for name, digest in self._digests.items():
            if hmac.compare_digest(given, digest):
                found = name
        return found

    def seal(self, text: str) -> str:
        """What only who has `API_KEYS` can make of a text: every replica makes the same of it."""
        secret = "".join(sorted(self._digests.values())).encode()
        message = text.encode("utf-8", "surrogatepass")
        return hmac.new(secret, message, hashlib.sha256).hexdigest()

    def __len__(self) -> int:
        return len(self._digests)

    def __repr__(self) -> str:
        return f"Keys({', '.join(self._digests)})"


def parse_keys(value: str) -> Keys:
    """Read `API_KEYS`: `name:sha256` for each key, with commas between them. Empty is no keys.

    Raises ValueError with a message that continues the variable's name and repeats nothing of its value: what stands
    in the wrong place may be a key.
    """
    digests: dict[KeyName, str] = {}
    if not value.strip():
        return Keys(digests)
    for position, part in enumerate(value.split(","), start=1):
        name, colon, digest = (piece.strip() for piece in part.partition(":"))
        digest = digest.lower()
        if not colon:
            raise ValueError(
                f"must be name:sha256 for each key, with commas between them: part {position} has no colon. "
                "`python -m gateway.keys new NAME` prints a key and its part"
            )
        if not NAME.fullmatch(name):
            raise ValueError(f"has a bad name in part {position}: a key's name is {NAME_RULE}")
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise ValueError(
                f"must hold a SHA-256 after {name}: 64 hexadecimal digits, not the key itself. "
                "`python -m gateway.keys new NAME` prints a key and its part"
            )
        if name in digests:
            raise ValueError(f"must not name a key twice: {name}")
        if digest in digests.values():
            raise ValueError(f"must not hold one key under two names: {name} is the second")
        digests[KeyName(name)] = digest
    return Keys(digests)


def new_key() -> str:
    return PREFIX + secrets.token_urlsafe(RANDOM_BYTES)


def digest_of(key: str) -> str:
    """The SHA-256 of a key.

    A slow hash protects what people think up. These are 256 random bits, which nobody guesses at any speed, and
    every request would pay for it.
    """
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m gateway.keys", description="Make the keys that let callers in."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    new = commands.add_parser("new", help="print a new key, once, and what to put into API_KEYS")
    new.add_argument("name", metavar="NAME", help="whose key it is, as logs and metrics will say")
    name = parser.parse_args(arguments).name
    if not NAME.fullmatch(name):
        parser.error(f"that is no name for a key: it must be {NAME_RULE}")

    key = new_key()
    print("The key, shown this once. Its holder sends it as `Authorization: Bearer …`:\n")
    print(f"    {key}\n")
    print("Put this into API_KEYS, after a comma if it holds others:\n")
    print(f"    {name}:{digest_of(key)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What the embedded server changes in moto: only how bytes are kept, so that large objects move at useful speed.

As it comes, moto keeps content in spooled files, reads a whole object for every ranged request (300 MB in ranges of
16 MB moved 5.7 GB), and copies every part of a multipart upload several times. What requests mean stays moto's own.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

from moto.s3.exceptions import EntityTooSmall, InvalidPart, MalformedXML
from moto.s3.models import FakeKey, FakeMultipart
from moto.settings import S3_UPLOAD_PART_MIN_SIZE


def keep_content_in_memory() -> None:
    """Have moto keep each object as one immutable string of bytes. For moto 5.2; call before the first request."""
    moto_key: Any = FakeKey
    moto_key.value = property(_content, _set_content)
    moto_key.etag = property(_etag)
    moto_multipart: Any = FakeMultipart
    moto_multipart.complete = _complete


def _content(key: Any) -> bytes:
    content: bytes = key.content
    return content


def _set_content(key: Any, content: bytes | str) -> None:
    key.content = content.encode() if isinstance(content, str) else bytes(content)
    key.contentsize = len(key.content)


def _etag(key: Any) -> str:
    key._etag = etag = key._etag or _md5(key.content).hexdigest()  # noqa: SLF001 (moto's own field)
    return f'"{etag}"'


def _complete(multipart: Any, body: Iterator[tuple[int, str]]) -> tuple[bytes, str, None]:
    """Join the parts a CompleteMultipartUpload names. The ETag: the MD5 of the parts' MD5s, and their number."""
    parts = []
    for number, etag in body:
        part = multipart.parts.get(number)
        if part is None or part.etag.strip('"') != etag.strip('"'):
            raise InvalidPart
        parts.append(part)
    if not parts:
        raise MalformedXML
    if any(part.contentsize < S3_UPLOAD_PART_MIN_SIZE for part in parts[:-1]):
        raise EntityTooSmall
    whole = b"".join(part.content for part in parts)
    digest = _md5(b"".join(bytes.fromhex(part.etag.strip('"')) for part in parts)).hexdigest()
    for part in multipart.parts.values():
        part.content = b""  # moto keeps the upload with the object: not twice its bytes, though
    return whole, f"{digest}-{len(parts)}", None


def _md5(content: bytes) -> Any:
    return hashlib.md5(content, usedforsecurity=False)

"""The moto application that the embedded server runs, its users, and what is changed in it.

Changed is how bytes are kept, so that large objects move at useful speed: as it comes, moto keeps content in spooled
files, reads a whole object for every ranged request (300 MB in ranges of 16 MB moved 5.7 GB), and copies every part of
a multipart upload several times. And what it gets wrong about unfinished uploads and about writes at one moment. The
rest stays moto's own.
"""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

from moto.core.models import DEFAULT_ACCOUNT_ID
from moto.iam.models import iam_backends
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.s3.exceptions import EntityTooSmall, InvalidPart, MalformedXML, NoSuchUpload
from moto.s3.models import FakeKey, FakeMultipart, S3Backend
from moto.s3.responses import S3Response
from moto.settings import S3_UPLOAD_PART_MIN_SIZE

_ADMIN = "admin"
_ADMIN_POLICY = {
    "Version": "2012-10-17",
    "Statement": [{"Effect": "Allow", "Action": ["s3:*", "iam:*", "sts:*"], "Resource": "*"}],
}


def application() -> Any:
    """moto's WSGI application, which tells services apart by how a request is signed."""
    _keep_content_in_memory()
    _answer_for_uploads_as_s3_does()
    _write_one_at_a_time()
    return DomainDispatcherApplication(create_backend_app)


def create_admin() -> tuple[str, str]:
    """Make the first user, who may do everything, and a key of theirs: its id and its secret.

    It is made from within: with rights enforced there is no other way.
    """
    iam = iam_backends[DEFAULT_ACCOUNT_ID]["aws"]
    iam.create_user(region_name="us-east-1", user_name=_ADMIN)
    iam.put_user_policy(_ADMIN, "everything", json.dumps(_ADMIN_POLICY))
    key: Any = iam.create_access_key(_ADMIN)
    return key.access_key_id, key.secret_access_key


def secret_of(access_key_id: str) -> str | None:
    """The secret of an active access key; None if there is no such key."""
    iam = iam_backends[DEFAULT_ACCOUNT_ID]["aws"]
    for user in list(iam.users.values()):
        for key in user.access_keys:
            if key.access_key_id == access_key_id and key.status == "Active":
                return str(key.secret_access_key)
    return None


def _keep_content_in_memory() -> None:
    """Have moto (5.2) keep each object as one immutable string of bytes."""
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


def _answer_for_uploads_as_s3_does() -> None:
    """moto answers 500 for an upload that is gone, and says of every one that it was begun in 2010."""
    moto_backend: Any = S3Backend
    for name in ("upload_part", "upload_part_copy", "complete_multipart_upload"):
        setattr(moto_backend, name, _of_an_upload_that_is_there(getattr(moto_backend, name)))
    create, list_uploads = moto_backend.create_multipart_upload, S3Response.list_multipart_uploads

    def create_and_remember(backend: Any, *arguments: Any, **named: Any) -> Any:
        upload = create(backend, *arguments, **named)
        upload.begun = datetime.now(UTC)
        return upload

    def list_with_true_times(response: Any) -> Any:
        body: Any
        status, headers, body = list_uploads(response)
        uploads = response.backend.list_multipart_uploads(response.bucket_name)
        for upload_id, upload in list(uploads.items()):
            body = re.sub(
                rf"(<UploadId>{upload_id}</UploadId>(?:(?!</Upload>).)*<Initiated>)[^<]*",
                rf"\g<1>{upload.begun:%Y-%m-%dT%H:%M:%S.000Z}",
                body,
                flags=re.DOTALL,
            )
        return status, headers, body

    moto_backend.create_multipart_upload = create_and_remember
    moto_response: Any = S3Response
    moto_response.list_multipart_uploads = list_with_true_times


def _write_one_at_a_time() -> None:
    """moto looks at If-Match and If-None-Match first and writes later: of several at one moment, two could win."""
    moto_response: Any = S3Response
    put_object = moto_response.put_object
    writing = threading.Lock()

    def put_alone(response: Any) -> Any:
        with writing:
            return put_object(response)

    moto_response.put_object = put_alone


def _of_an_upload_that_is_there(method: Callable[..., Any]) -> Callable[..., Any]:
    def checked(backend: Any, bucket: str, upload_id: str, *arguments: Any, **named: Any) -> Any:
        if upload_id not in backend.get_bucket(bucket).multiparts:
            raise NoSuchUpload(upload_id)
        return method(backend, bucket, upload_id, *arguments, **named)

    return checked


def _md5(content: bytes) -> Any:
    return hashlib.md5(content, usedforsecurity=False)

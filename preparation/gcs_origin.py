"""A model that lies in a Google Cloud Storage bucket, through the XML API, which speaks S3's protocol.

So all that reads S3 reads this too. Three kinds of callers: a service account, whose tokens google-auth fetches and
renews; an HMAC keypair, which signs as S3's do; and nobody, for public buckets.

Source: https://cloud.google.com/storage/docs/xml-api/overview
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preparation.access import Access
from preparation.bucket_origin import BucketOrigin, open_origin
from preparation.errors import PreparationError, UsageError
from preparation.source import SourceName
from s3 import connect
from s3.endpoint import endpoint_of
from s3.signing import Credentials, Signer, credentials_of, region_of
from settings import SourceSettings, StorageSettings
from weights import Bucket
from weights.objects import ObjectReader

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

Token = Callable[[], str]

_SCOPE = "https://www.googleapis.com/auth/devstorage.read_only"
_RIGHTS = "list and read its objects (the role Storage Object Viewer)"
_BETTER = (
    "Set GOOGLE_APPLICATION_CREDENTIALS to the key file of a service account (or SOURCE_AWS_ACCESS_KEY_ID and "
    "SOURCE_AWS_SECRET_ACCESS_KEY to an HMAC keypair)"
)


def open_gcs(name: SourceName, settings: SourceSettings, *, cache: Path, jobs: int) -> BucketOrigin:
    """What lies there; files that are fetched go under `cache`. Raises what `open_origin` raises.

    The service account comes first: SOURCE_AWS_ACCESS_KEY_ID may be there for an S3 bucket.
    """
    storage = settings.gcs_storage()
    token = None
    keys = "anonymous callers"
    if settings.google_credentials is not None:
        token = ServiceAccountTokens(settings.google_credentials)
        keys = "GOOGLE_APPLICATION_CREDENTIALS"
    elif storage.access_key_id is not None:
        keys = "SOURCE_AWS_ACCESS_KEY_ID"
    return open_origin(
        name,
        GcsBucket(storage, name.bucket, token=token, connections=jobs),
        Access(keys, _BETTER, _RIGHTS, "STORAGE_EMULATOR_HOST"),
        cache=cache / "gs" / name.bucket,
        server=storage.endpoint_url or "",
    )


class GcsBucket(Bucket):
    """A bucket at Google: `settings` with a keypair sign, `token` is borne, and without either nobody asks."""

    def __init__(
        self,
        settings: StorageSettings,
        name: str,
        *,
        token: Token | None = None,
        connections: int = 32,
    ) -> None:
        super().__init__(settings, name, connections=connections)
        self._token = token
        self._signs = token is None and settings.access_key_id is not None

    def url(self, key: str) -> str:
        return f"gs://{self.name}/{key}"

    @functools.cached_property
    def client(self) -> S3Client:
        client = connect(self._settings, connections=self._connections, sign=self._signs)
        if self._token is not None:
            client.meta.events.register("before-send.s3", self._authorise)
        return client

    @functools.cached_property
    def reader(self) -> ObjectReader:
        if self._signs:
            signer = Signer(credentials_of(self._settings), region_of(self._settings))
        else:
            signer = _BearerSigner(self._token)
        return _GcsReader(endpoint_of(self._settings), signer, self.name)

    def _authorise(self, request: Any, **_event: Any) -> None:
        if self._token is not None:
            request.headers["Authorization"] = f"Bearer {self._token()}"


class ServiceAccountTokens:
    """Access tokens of the service account whose key file this is, renewed before they expire. For many threads."""

    def __init__(self, file: Path) -> None:
        # Imported here: most models come from elsewhere.
        from google.auth import exceptions
        from google.oauth2.service_account import Credentials as ServiceAccount

        self._file = file
        self._lock = threading.Lock()
        try:
            # google-auth's annotations are partial.
            self._credentials = ServiceAccount.from_service_account_file(  # type: ignore[no-untyped-call]
                str(file), scopes=[_SCOPE]
            )
        except (exceptions.GoogleAuthError, OSError, ValueError) as error:
            raise UsageError(
                f"GOOGLE_APPLICATION_CREDENTIALS names {file}, which cannot be used ({type(error).__name__}). It is "
                "the JSON key file of a service account, as the Google Cloud console gives it."
            ) from error

    def __call__(self) -> str:
        from google.auth import exceptions
        from google.auth.transport.requests import Request

        with self._lock:
            if not self._credentials.valid:
                try:
                    self._credentials.refresh(Request())
                except exceptions.TransportError as error:
                    raise PreparationError(
                        f"Getting a token for {self._file}: Google could not be reached. Check the network, then run "
                        "the same command again: what has arrived is kept."
                    ) from error
                except exceptions.GoogleAuthError as error:
                    raise UsageError(
                        f"Getting a token for {self._file}: Google refuses it. Was the key or its account deleted? "
                        "Download a new key, and check this machine's clock."
                    ) from error
            return str(self._credentials.token)


class _GcsReader(ObjectReader):
    def url(self, key: str) -> str:
        return f"gs://{self.bucket}/{key}"


class _BearerSigner(Signer):
    """Signs nothing: a token says who asks, or nothing does."""

    def __init__(self, token: Token | None) -> None:
        super().__init__(_nobody, "auto")
        self._token = token

    def headers(
        self,
        method: str,  # noqa: ARG002
        host_header: str,
        path: str,  # noqa: ARG002
        query: str,  # noqa: ARG002
        headers: Mapping[str, str],
        now: datetime | None = None,  # noqa: ARG002
        payload_sha256: str = "",  # noqa: ARG002
    ) -> dict[str, str]:
        sent = {"Host": host_header, **headers}
        if self._token is not None:
            sent["Authorization"] = f"Bearer {self._token()}"
        return sent


def _nobody() -> Credentials:
    raise AssertionError("nothing is signed")

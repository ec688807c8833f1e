"""Who reads a bucket that a model comes from, and what to tell a person whose model cannot be read there.

The weights room explains a failure in the words of a deployment. Whoever prepares a model has set other variables, and
has rights on two buckets to mix up.
"""

from __future__ import annotations

from dataclasses import dataclass

from botocore.exceptions import NoCredentialsError, PartialCredentialsError

from preparation.errors import PreparationError, UsageError
from settings import SourceSettings
from weights.errors import BucketError, ObjectChangedError, WeightsError
from weights.objects import UNREACHABLE

_KEY_ERRORS = frozenset(
    {
        "AuthenticationRequired",  # Google, of a token
        "ExpiredToken",
        "InvalidAccessKeyId",
        "InvalidSecurity",  # Google, of an HMAC keypair
        "InvalidToken",
        "SignatureDoesNotMatch",
    }
)
_REGION_ERRORS = frozenset({"PermanentRedirect", "AuthorizationHeaderMalformed"})


@dataclass(frozen=True)
class Access:
    """How a source's bucket is reached, as a person has set it.

    `keys` names what was used, `better` says what to set instead, `rights` what that must allow. `server` is the
    variable that says where the bucket is, if one does.
    """

    keys: str
    better: str
    rights: str
    server: str

    @classmethod
    def of_s3(cls, settings: SourceSettings) -> Access:
        ambient = "the machine's own role or profile"
        inherited = "AWS_ACCESS_KEY_ID" if settings.access_key_id is not None else ambient
        own_keys = settings.source_access_key_id is not None
        own_server = settings.source_endpoint_url is not None
        return cls(
            keys="SOURCE_AWS_ACCESS_KEY_ID" if own_keys else inherited,
            better="Set SOURCE_AWS_ACCESS_KEY_ID and SOURCE_AWS_SECRET_ACCESS_KEY to a keypair",
            rights="list the bucket (s3:ListBucket) and read its objects (s3:GetObject)",
            server="SOURCE_AWS_ENDPOINT_URL_S3" if own_server else "AWS_ENDPOINT_URL_S3",
        )

    def explain(
        self, error: WeightsError, doing: str, where: str
    ) -> WeightsError | PreparationError:
        """`error` in a source's words; itself where it needs none. `doing`: "listing", "reading"."""
        what = f"{doing.capitalize()} {where}"
        if isinstance(error, ObjectChangedError):
            return PreparationError(
                f"{what}: it was replaced since it was listed. Run the same command again to have it as it is now; "
                "what has not changed is kept."
            )
        if not isinstance(error, BucketError):
            return error
        if advice := self._correction(error):
            return UsageError(f"{what}: {advice}")
        if error.code == "NoSuchKey":
            return PreparationError(
                f"{what}: it is not there any more. Run the same command again to have the folder as it is now."
            )
        retry = "then run the same command again: what has arrived is kept"
        if error.code == UNREACHABLE:
            return PreparationError(
                f"{what}: {_cause(error)}. Check {self.server} and the network, {retry}."
            )
        return PreparationError(f"{what}: {_cause(error)}. See to that, {retry}.")

    def _correction(self, error: BucketError) -> str | None:
        """What was wrong and how to set it right; None for what is not the caller's doing."""
        if isinstance(error.__cause__, (NoCredentialsError, PartialCredentialsError)):
            return f"no credentials were found. {self.better} that may {self.rights}."
        if error.code == "NoSuchBucket":
            return f"the bucket does not exist. Check its name, and the server ({self.server})."
        if error.code == "AccessDenied":
            return f"access was denied to {self.keys}. {self.better} that may {self.rights}."
        if error.code in _KEY_ERRORS:
            return f"the server does not accept {self.keys} ({error.code}). {self.better} that it knows."
        if error.code in _REGION_ERRORS:
            return "the bucket is in another region. Set SOURCE_AWS_REGION to it."
        return None


def _cause(error: BucketError) -> str:
    """What happened, without the advice, which is a deployment's."""
    _, _, explained = str(error).partition(": ")
    return explained.partition(". ")[0] or str(error)

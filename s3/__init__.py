"""What every room needs of S3: clients made from settings, signatures, and its errors in words.

It knows nothing of models or images. boto3 takes a second to import, so it is imported where it is used: the words and
the signatures serve code that never needs it.
"""

from s3.client import connect, content_md5
from s3.words import (
    CERTIFICATE_REFUSED,
    UNREACHED,
    error_code,
    explain,
    explain_answer,
)

__all__ = [
    "CERTIFICATE_REFUSED",
    "UNREACHED",
    "connect",
    "content_md5",
    "error_code",
    "explain",
    "explain_answer",
]

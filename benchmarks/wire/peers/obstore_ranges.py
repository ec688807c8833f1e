"""obstore: Rust's object_store under Python threads; every range arrives as bytes of its own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.wire.target import KEY, MEBIBYTE, REGION, Held, Span, Target


def prepare(target: Target, *, connections: int, mebibytes: int) -> Callable[[], Held]:
    import obstore  # type: ignore[import-not-found]
    from obstore.store import S3Store  # type: ignore[import-not-found]

    options = (
        {"root_certificate": Path(target.certificate).read_bytes()}
        if target.certificate
        else {"allow_http": True}
    )
    store = S3Store(
        target.bucket,
        endpoint=target.endpoint,
        region=REGION,
        access_key_id=KEY,
        secret_access_key=KEY,
        virtual_hosted_style_request=False,
        client_options=options,
    )

    def read(span: Span) -> Any:
        return obstore.get_range(store, span.key, start=span.start, length=span.length)

    def load() -> Held:
        with ThreadPoolExecutor(connections) as pool:
            pieces = list(pool.map(read, target.spans(mebibytes * MEBIBYTE)))
        return Held(sum(len(piece) for piece in pieces), pieces)

    return load

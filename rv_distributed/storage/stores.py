"""From a URI to the store that it lies in."""

from __future__ import annotations

from functools import lru_cache

from rv_distributed.errors import UsageError
from rv_distributed.storage.protocols import ObjectStore
from rv_distributed.storage.uris import StoreUri


@lru_cache(maxsize=64)
def store_of(uri: StoreUri) -> ObjectStore:
    """The store of a URI without a path. Clients are imported only here: each takes a while.

    Raises UsageError when its options do not make sense, OSError when it cannot be opened, as without credentials.
    """
    try:
        if uri.scheme == "s3":
            from rv_distributed.storage.s3 import S3Store

            return S3Store(uri)
        if uri.scheme == "gs":
            from rv_distributed.storage.gcs import GcsStore

            return GcsStore(uri)
        from rv_distributed.storage.arrow import open_arrow_store

        return open_arrow_store(uri)
    except ValueError as error:
        raise UsageError(f"{uri} cannot be opened: {error}") from error

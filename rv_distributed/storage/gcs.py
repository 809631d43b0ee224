"""Google Cloud Storage through google-cloud-storage: with it come Google's own ways to find credentials, uploads that
can be cancelled, and objects that are made only where there is none, which Arrow's file system lacks."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

import requests
from google.api_core.exceptions import GoogleAPIError, NotFound, RequestRangeNotSatisfiable
from google.auth.credentials import AnonymousCredentials
from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError, RefreshError
from google.cloud.storage import Client
from google.cloud.storage.exceptions import DataCorruption, InvalidResponse
from google.cloud.storage.retry import DEFAULT_RETRY
from urllib3.exceptions import HTTPError

from rv_distributed.errors import one_line
from rv_distributed.storage.protocols import StoredObject, TransientError, Upload
from rv_distributed.storage.uris import StoreUri, truth

_CONNECTIONS: Final = 64
_TIMEOUT_S: Final = (20, 30)
#: Of the calls that the client repeats by itself.
_RETRY: Final = DEFAULT_RETRY.with_timeout(90.0)
_FIELDS: Final = "items(name,size,md5Hash,crc32c,generation),nextPageToken"


class GcsStore:
    """As `ObjectStore`: one bucket."""

    def __init__(self, uri: StoreUri) -> None:
        self._uri = uri
        endpoint = uri.option("endpoint_override")
        if endpoint and "://" not in endpoint:
            endpoint = f"{uri.option('scheme') or 'https'}://{endpoint}"
        anonymous = truth(uri.option("anonymous")) or "STORAGE_EMULATOR_HOST" in os.environ
        with self._naming(""):
            client = Client(
                # No call of ours needs a project, but without one the client looks for it on the network.
                project=uri.option("project_id") or "none",
                credentials=AnonymousCredentials() if anonymous else None,
                client_options={"api_endpoint": endpoint} if endpoint else None,
            )
        adapter = requests.adapters.HTTPAdapter(pool_maxsize=_CONNECTIONS)
        for scheme in ("https://", "http://"):
            client._http.mount(scheme, adapter)
        self._client, self._bucket = client, client.bucket(uri.authority)

    def list(self, prefix: str) -> Iterator[StoredObject]:
        with self._naming(prefix):
            for blob in self._client.list_blobs(self._bucket, prefix=prefix, fields=_FIELDS, timeout=_TIMEOUT_S):
                yield StoredObject(blob.name, int(blob.size), _state(blob))

    def fetch(self, key: str, start: int, stop: int | None, take: Callable[[memoryview], None]) -> None:
        if stop is not None and start >= stop:
            return
        last = None if stop is None else stop - 1
        with self._naming(key), suppress(RequestRangeNotSatisfiable):
            # What arrived before an error is not to come again, so the one who asks is the one who asks again.
            self._bucket.blob(key).download_to_file(
                _Sink(take), start=start, end=last, raw_download=True, checksum=None, retry=None, timeout=_TIMEOUT_S
            )

    def put(self, key: str, data: bytes, *, only_new: bool = False) -> str:
        blob = self._bucket.blob(key)
        with self._naming(key):
            blob.upload_from_string(
                data,
                content_type="application/octet-stream",
                if_generation_match=0 if only_new else None,
                retry=_RETRY,
                timeout=_TIMEOUT_S,
            )
            return _state(blob)

    def upload(self, key: str, nbytes: int, part_bytes: int) -> Upload:  # noqa: ARG002 - the end tells the size
        return _Resumable(self, key, part_bytes)

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            with self._naming(key), suppress(NotFound):
                self._bucket.blob(key).delete(retry=_RETRY, timeout=_TIMEOUT_S)

    def abort_uploads(self, prefix: str) -> int:  # noqa: ARG002 - as in the protocol
        """Nothing to do: uploads that nobody finishes cost nothing here, and end after a week."""
        return 0

    @contextmanager
    def _naming(self, key: str) -> Iterator[None]:
        """Turn the client's errors into OSErrors."""
        try:
            yield
        except _KNOWN as error:
            raise _translated(error, str(self._uri._replace(path=key))) from error


class _Resumable:
    """As `Upload`, in a session of its own."""

    parallel: Final = 1

    def __init__(self, store: GcsStore, key: str, part_bytes: int) -> None:
        self._store, self._key = store, key
        self._blob = store._bucket.blob(key)
        self._writer: Any = self._blob.open(
            "wb",
            chunk_size=part_bytes,
            ignore_flush=True,
            content_type="application/octet-stream",
            retry=_RETRY,
            timeout=_TIMEOUT_S,
        )

    def send(self, number: int, data: bytes | bytearray) -> None:  # noqa: ARG002 - they come in order
        try:
            with self._store._naming(self._key):
                self._writer.write(data)
        except TransientError as error:
            # The client has tried again and again; and a second call would add the part a second time.
            raise OSError(errno.EIO, error.strerror, error.filename) from error

    def finish(self) -> str:
        with self._store._naming(self._key):
            self._writer.close()
            self._blob.reload(retry=_RETRY, timeout=_TIMEOUT_S)
            return _state(self._blob)

    def abort(self) -> None:
        with self._store._naming(self._key):
            self._writer.terminate()


class _Sink:
    """A file to write to."""

    def __init__(self, take: Callable[[memoryview], None]) -> None:
        self._take = take

    def write(self, data: bytes) -> int:
        self._take(memoryview(data))
        return len(data)


def _state(blob: Any) -> str:
    return str(blob.md5_hash or f"{blob.size}-{blob.crc32c or blob.generation}")


def _reason(error: Exception, response: Any) -> str:
    """What the store itself says, if it says something."""
    try:
        return one_line(str(response.json()["error"]["message"]))
    except (AttributeError, ValueError, KeyError, TypeError):
        return one_line(getattr(response, "reason", None) or str(error))


_CUT: Final = (requests.RequestException, HTTPError, ConnectionError)
_KNOWN: Final = (GoogleAPIError, GoogleAuthError, InvalidResponse, DataCorruption, *_CUT)


def _translated(error: Exception, path: str) -> OSError:
    response = getattr(error, "response", None)
    status = int(getattr(response, "status_code", 0))
    reason = _reason(error, response)
    if isinstance(error, DefaultCredentialsError):
        text = "no Google credentials were found: run gcloud auth application-default login, set "
        text += "GOOGLE_APPLICATION_CREDENTIALS, or add ?anonymous=true"
        return PermissionError(errno.EACCES, text, path)
    if isinstance(error, RefreshError):
        return PermissionError(errno.EACCES, f"the credentials have expired or are not valid ({reason})", path)
    if status == 404:
        return FileNotFoundError(errno.ENOENT, f"does not exist (404: {reason})", path)
    if status == 412:
        return FileExistsError(errno.EEXIST, f"exists already (412: {reason})", path)
    if status in (401, 403):
        return PermissionError(errno.EACCES, f"access denied ({status}: {reason})", path)
    if status in (408, 429) or status >= 500 or isinstance(error, _CUT):
        return TransientError(errno.EIO, f"the store did not answer well ({reason})", path)
    return OSError(errno.EIO, reason, path)

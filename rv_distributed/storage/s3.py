"""S3, and what speaks its protocol, through boto3: with it come AWS's own ways to find credentials, profile and region,
uploads that can be aborted, and objects that are made only where there is none, which Arrow's file system lacks."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, Final

import boto3
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, NoCredentialsError
from urllib3.exceptions import HTTPError

from rv_distributed.errors import one_line
from rv_distributed.storage.protocols import StoredObject, TransientError, Upload
from rv_distributed.storage.uris import StoreUri, truth

_LOG = logging.getLogger(__name__)
_CONNECTIONS: Final = 64
_TAKEN_BYTES: Final = 1 << 20
_PARALLEL_PARTS: Final = 4
_DELETED_AT_ONCE: Final = 1000
_PARTIAL_CONTENT: Final = 206
_MISSING: Final = frozenset({"404", "NoSuchKey", "NoSuchBucket", "NotFound", "NoSuchUpload"})
_TAKEN: Final = frozenset({"412", "PreconditionFailed", "409", "ConditionalRequestConflict"})
_EXPIRED: Final = frozenset({"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"})
_DENIED: Final = frozenset({"401", "403", "AccessDenied", "Forbidden", "InvalidAccessKeyId", "SignatureDoesNotMatch"})
_TRANSIENT: Final = frozenset({"SlowDown", "Throttling", "ThrottlingException", "RequestTimeout", "InternalError"})


class S3Store:
    """As `ObjectStore`: one bucket."""

    def __init__(self, uri: StoreUri) -> None:
        self._bucket, self._uri = uri.authority, uri
        endpoint = uri.option("endpoint_override")
        if endpoint and "://" not in endpoint:
            endpoint = f"{uri.option('scheme') or 'https'}://{endpoint}"
        has_own = endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        virtual = not has_own or truth(uri.option("force_virtual_addressing"))
        config = Config(
            max_pool_connections=_CONNECTIONS,
            # Whoever calls is patient: see `objects.patiently`.
            retries={"total_max_attempts": 1},
            connect_timeout=20,
            read_timeout=30,
            s3={"addressing_style": "auto" if virtual else "path"},
            # Checksums in trailers are unknown to many stores that speak S3; TLS and our own digests do without.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            **({"signature_version": UNSIGNED} if truth(uri.option("anonymous")) else {}),
        )
        with self._naming(""):
            session = boto3.session.Session()
            region = uri.option("region") or session.region_name or "us-east-1"
            self._client = session.client("s3", region_name=region, endpoint_url=endpoint, config=config)

    def list(self, prefix: str) -> Iterator[StoredObject]:
        with self._naming(prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=prefix)
            for page in pages:
                for found in page.get("Contents", ()):
                    yield StoredObject(found["Key"], found["Size"], found["ETag"].strip('"'))

    def fetch(self, key: str, start: int, stop: int | None, take: Callable[[memoryview], None]) -> None:
        if stop is not None and start >= stop:
            return
        wanted = {} if start == 0 and stop is None else {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"}
        with self._naming(key):
            try:
                answer = self._client.get_object(Bucket=self._bucket, Key=key, **wanted)
            except ClientError as error:
                if _code(error) in ("416", "InvalidRange"):
                    return
                raise
            if start and answer["ResponseMetadata"]["HTTPStatusCode"] != _PARTIAL_CONTENT:
                raise OSError(errno.EIO, "the store sends whole objects where a part was asked for", self._named(key))
            left = sys.maxsize if stop is None else stop - start
            with answer["Body"] as body:
                while left > 0 and (data := body.read(min(left, _TAKEN_BYTES))):
                    take(memoryview(data))
                    left -= len(data)

    def put(self, key: str, data: bytes, *, only_new: bool = False) -> str:
        with self._naming(key):
            if only_new and self.state(key) is not None:
                raise FileExistsError(errno.EEXIST, "exists already", self._named(key))
            condition = {"IfNoneMatch": "*"} if only_new else {}
            return _etag(self._client.put_object(Bucket=self._bucket, Key=key, Body=data, **condition))

    def state(self, key: str) -> str | None:
        """The state of an object; None when there is none."""
        try:
            return _etag(self._client.head_object(Bucket=self._bucket, Key=key))
        except ClientError as error:
            if _code(error) in _MISSING:
                return None
            raise

    def upload(self, key: str, nbytes: int, part_bytes: int) -> Upload:  # noqa: ARG002 - S3 needs to know neither
        with self._naming(key):
            made = self._client.create_multipart_upload(Bucket=self._bucket, Key=key)
        return _Multipart(self, key, made["UploadId"])

    def delete(self, keys: Iterable[str]) -> None:
        left = iter(keys)
        while batch := list(islice(left, _DELETED_AT_ONCE)):
            with self._naming(batch[0]):
                objects = [{"Key": key} for key in batch]
                done = self._client.delete_objects(Bucket=self._bucket, Delete={"Objects": objects, "Quiet": True})
            for failed in done.get("Errors", ()):
                text = f"cannot be removed: {failed.get('Code')}"
                raise PermissionError(errno.EACCES, text, self._named(str(failed.get("Key"))))

    def abort_uploads(self, prefix: str) -> int:
        count = 0
        try:
            pages = self._client.get_paginator("list_multipart_uploads").paginate(Bucket=self._bucket, Prefix=prefix)
            for upload in [found for page in pages for found in page.get("Uploads", ())]:
                # Not every server looks at the prefix.
                if upload["Key"].startswith(prefix):
                    self._abort(upload["Key"], upload["UploadId"])
                    count += 1
        except (ClientError, BotoCoreError) as error:
            _LOG.warning("unfinished uploads below %s cannot be looked for: %s", self._named(prefix), _reason(error))
        return count

    def _abort(self, key: str, upload: str) -> None:
        try:
            self._client.abort_multipart_upload(Bucket=self._bucket, Key=key, UploadId=upload)
        except ClientError as error:
            if _code(error) not in _MISSING:
                raise

    def _named(self, key: str) -> str:
        return str(self._uri._replace(path=key))

    @contextmanager
    def _naming(self, key: str) -> Iterator[None]:
        """Turn boto3's errors into OSErrors."""
        try:
            yield
        except (ClientError, BotoCoreError, HTTPError) as error:
            raise _translated(error, self._named(key)) from error


class _Multipart:
    """As `Upload`."""

    parallel: Final = _PARALLEL_PARTS

    def __init__(self, store: S3Store, key: str, upload: str) -> None:
        self._store, self._key, self._upload = store, key, upload
        self._etags: dict[int, str] = {}
        self._target = {"Bucket": store._bucket, "Key": key, "UploadId": upload}

    def send(self, number: int, data: bytes | bytearray) -> None:
        with self._store._naming(self._key):
            sent = self._store._client.upload_part(**self._target, PartNumber=number + 1, Body=data)
        self._etags[number] = sent["ETag"]

    def finish(self) -> str:
        parts = [{"PartNumber": number + 1, "ETag": self._etags[number]} for number in sorted(self._etags)]
        with self._store._naming(self._key):
            try:
                made = self._store._client.complete_multipart_upload(**self._target, MultipartUpload={"Parts": parts})
            except ClientError as error:
                # The answer to an earlier try may have been lost.
                state = self._store.state(self._key) if _code(error) == "NoSuchUpload" else None
                if state is None or not state.endswith(f"-{len(parts)}"):
                    raise
                return state
        return _etag(made)

    def abort(self) -> None:
        with self._store._naming(self._key):
            self._store._abort(self._key, self._upload)


def _etag(response: Any) -> str:
    return str(response["ETag"]).strip('"')


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _reason(error: Exception) -> str:
    if isinstance(error, ClientError):
        found = error.response.get("Error", {})
        return one_line(f"{found.get('Code', '')} {_status(error)}: {found.get('Message') or 'no explanation'}")
    return one_line(str(error))


def _translated(error: Exception, path: str) -> OSError:
    reason = _reason(error)
    if isinstance(error, NoCredentialsError):
        text = "no AWS credentials were found: set AWS_PROFILE or AWS_ACCESS_KEY_ID, or add ?anonymous=true"
        return PermissionError(errno.EACCES, text, path)
    if isinstance(error, ClientError):
        code, status = _code(error), _status(error)
        if code in _EXPIRED:
            return PermissionError(errno.EACCES, f"the credentials have expired; renew them ({reason})", path)
        if code in _MISSING or status == 404:
            text = "the bucket does not exist" if code == "NoSuchBucket" else "does not exist"
            return FileNotFoundError(errno.ENOENT, f"{text} ({reason})", path)
        if code in _TAKEN:
            return FileExistsError(errno.EEXIST, f"exists already ({reason})", path)
        if code in _DENIED or status in (401, 403):
            return PermissionError(errno.EACCES, f"access denied ({reason})", path)
        if code in _TRANSIENT or status == 429 or status >= 500:
            return TransientError(errno.EIO, f"the store did not answer well ({reason})", path)
        return OSError(errno.EIO, reason, path)
    if isinstance(error, (HTTPClientError, HTTPError)):
        return TransientError(errno.EIO, f"the connection failed ({reason})", path)
    return OSError(errno.EIO, reason, path)

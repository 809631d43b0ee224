"""Models on the Hugging Face Hub, through huggingface_hub: read by byte ranges, or from its cache what lies there.

A revision is resolved to a commit when a folder is opened; from then on everything names the commit, so that all
workers of a run read the same files, whatever is pushed meanwhile.
"""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Final, NamedTuple

from huggingface_hub import (
    HfApi,
    constants,
    get_hf_file_metadata,
    hf_hub_url,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    build_hf_headers,
    get_session,
    hf_raise_for_status,
)

from rv_distributed.checkpoint.model import FileState
from rv_distributed.checkpoint.uris import join
from rv_distributed.errors import InputError, Problem, UsageError, one_line
from rv_distributed.storage.objects import ObjectReader, checked_names, read_all
from rv_distributed.storage.posix import PosixFolder
from rv_distributed.storage.protocols import Reader, TransientError
from rv_distributed.storage.ranges import RangeReader
from rv_distributed.storage.uris import HubUri, parse_hub_uri

_COMMIT: Final = re.compile("[0-9a-f]{40}")
_TAKEN_BYTES: Final = 1 << 20
_PARTIAL_CONTENT: Final = 206
_BEHIND_THE_END: Final = 416
#: What an address that was good for some time answers afterwards.
_EXPIRED: Final = (401, 403, 404)
#: Where files are, of this process's; addresses without which the Hub would be asked for every range.
_LOCATIONS: Final[dict[HubUri, str]] = {}


class HubFolder:
    """As `Folder`: a repository at one commit, or a folder in it."""

    def __init__(self, place: HubUri) -> None:
        """Resolve the revision. Raises InputError, with the Hub's own explanation, when there is nothing to read."""
        listing = _listing_of(place)
        self._place = place._replace(revision=listing.commit)
        self.revision = listing.commit
        self.uri = str(self._place)
        inside = f"{place.path}/" if place.path else ""
        self._files = [
            file._replace(name=file.name[len(inside) :]) for file in listing.files if file.name.startswith(inside)
        ]

    def files(self) -> list[FileState]:
        if not self._files:
            raise InputError([Problem(self.uri, "holds no files", "Check the repository, the revision and the path.")])
        return sorted(checked_names(self.uri, self._files))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        place = parse_hub_uri(self.path(name))
        cached = _cached(place)
        if cached is not None:
            return PosixFolder(str(cached.parent)).read(cached.name, start, stop)
        return read_all(_Files(place), place.path, start, stop)

    def states(self, names: Iterable[str]) -> dict[str, str]:
        """As they were: what a commit holds does not change."""
        states = {file.name: file.state for file in self._files}
        return {name: states[name] for name in names if name in states}

    def path(self, name: str) -> str:
        return join(self.uri, name)


def open_hub_reader(path: str, stop: threading.Event | None) -> Reader:
    """A reader of a file at a commit."""
    place = parse_hub_uri(path)
    cached = _cached(place)
    return RangeReader(str(cached)) if cached is not None else ObjectReader(_Files(place), path, place.path, stop)


class _Listing(NamedTuple):
    commit: str
    files: tuple[FileState, ...]
    """With the names of their contents as states: those of the cache's blobs, too."""


def _listing_of(place: HubUri) -> _Listing:
    if place.revision is not None and _COMMIT.fullmatch(place.revision):
        return _listing_at(place.repo, place.revision)
    return _list(place.repo, place.revision)


@lru_cache(maxsize=64)
def _listing_at(repo: str, commit: str) -> _Listing:
    return _list(repo, commit)


def _list(repo: str, revision: str | None) -> _Listing:
    where = str(HubUri(repo, revision, ""))
    if constants.HF_HUB_OFFLINE:
        return _list_cached(repo, revision)
    local = "" if os.path.lexists(repo) else f"There is no local folder {repo}, either. "
    try:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    except (RepositoryNotFoundError, GatedRepoError) as error:
        remedy = f"{local}For a private or gated model, log in (hf auth login, or HF_TOKEN) and accept its terms."
        raise InputError([Problem(where, f"cannot be read from the Hub: {explained(error)}", remedy)]) from error
    except HFValidationError as error:
        raise UsageError(f"{where} names no repository: {one_line(str(error))}") from error
    except Exception as error:
        # The client's HTTP library has had several names; what it raises has no base here to catch it by.
        offline = "a model that is in the cache can be used with HF_HUB_OFFLINE=1"
        remedy = f"{local}Check the revision and the network; {offline}."
        raise InputError([Problem(where, f"cannot be read from the Hub: {explained(error)}", remedy)]) from error
    files = [
        FileState(file.rfilename, file.size or 0, file.lfs.sha256 if file.lfs else file.blob_id or "")
        for file in info.siblings or ()
    ]
    return _Listing(str(info.sha), tuple(files))


def _list_cached(repo: str, revision: str | None) -> _Listing:
    try:
        snapshot = Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except Exception as error:
        where = str(HubUri(repo, revision, ""))
        what = f"is not in the local cache, and HF_HUB_OFFLINE is set: {explained(error)}"
        raise InputError([Problem(where, what, "Unset HF_HUB_OFFLINE, or download the model first.")]) from error
    files = [
        FileState(found.name, found.size, os.path.basename(os.path.realpath(snapshot / found.name)))
        for found in PosixFolder(str(snapshot)).files()
    ]
    return _Listing(snapshot.name, tuple(files))


def _cached(place: HubUri) -> Path | None:
    """The file in huggingface_hub's cache, if it is there."""
    found = try_to_load_from_cache(place.repo, place.path, revision=place.revision)
    return Path(found) if isinstance(found, str) else None


class _Files:
    """As `Source`: the files of a repository at a commit."""

    def __init__(self, place: HubUri) -> None:
        self._place = place

    def fetch(self, key: str, start: int, stop: int | None, take: Callable[[memoryview], None]) -> None:
        if stop is not None and start >= stop:
            return
        wanted = f"bytes={start}-{'' if stop is None else stop - 1}"
        place = self._place._replace(path=key)
        with self._naming(place):
            location = _LOCATIONS.get(place) or _locate(place)
            try:
                _stream(location, wanted, take)
            except HfHubHTTPError as error:
                if error.response.status_code not in _EXPIRED:
                    raise
                _stream(_locate(place), wanted, take)

    @contextmanager
    def _naming(self, place: HubUri) -> Iterator[None]:
        path = str(place)
        try:
            yield
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status == 429 or status >= 500:
                raise TransientError(errno.EIO, f"the Hub did not answer well: {explained(error)}", path) from error
            kind = {401: PermissionError, 403: PermissionError, 404: FileNotFoundError}.get(status, OSError)
            raise kind(errno.EACCES if status in (401, 403) else errno.ENOENT, explained(error), path) from error
        except OSError as error:
            if isinstance(error, ConnectionError):  # HF_HUB_OFFLINE
                raise OSError(errno.EIO, explained(error), path) from error
            raise
        except Exception as error:
            # See `_list`: of a transfer, whatever the HTTP library raises means that it was cut short.
            raise TransientError(errno.EIO, f"the connection failed: {explained(error)}", path) from error


def _locate(place: HubUri) -> str:
    """Where the bytes of a file are: mostly not on the Hub itself, which is to be asked once, not for every range."""
    url = hf_hub_url(place.repo, place.path, revision=place.revision)
    _LOCATIONS[place] = get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT).location
    return _LOCATIONS[place]


def _stream(location: str, wanted: str, take: Callable[[memoryview], None]) -> None:
    # The token is for the Hub alone: elsewhere the address itself gives access.
    is_hub = location.startswith(f"{constants.ENDPOINT}/")
    headers = {**(build_hf_headers() if is_hub else {}), "range": wanted, "accept-encoding": "identity"}
    timeout_s = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", location, headers=headers, follow_redirects=True, timeout=timeout_s) as response:
        if response.status_code == _BEHIND_THE_END:
            return
        if response.status_code >= 400:
            response.read()
        hf_raise_for_status(response)
        if response.status_code != _PARTIAL_CONTENT and wanted != "bytes=0-":
            raise OSError(errno.EIO, "the server behind the Hub sends no ranges of files")
        for data in response.iter_bytes(_TAKEN_BYTES):
            take(memoryview(data))


def explained(error: Exception) -> str:
    """An error of huggingface_hub in a line."""
    return one_line(" ".join(str(error).split()).rstrip(".") or type(error).__name__)

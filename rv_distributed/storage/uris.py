"""Reading the URIs of object stores: which store, which key, which options.

Options stand in the query, under the names that `pyarrow.fs` has for them. Secrets have no place there: they come from
the environment, from files or from the machine's own identity, as each store's standard tools look for them.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple
from urllib.parse import quote, unquote

from rv_distributed.errors import UsageError, one_line, redacted
from rv_distributed.storage.posix import is_text

#: The options of each scheme.
_OPTIONS: Final[dict[str, frozenset[str]]] = {
    "s3": frozenset({"region", "endpoint_override", "scheme", "anonymous", "force_virtual_addressing"}),
    "gs": frozenset({"endpoint_override", "scheme", "anonymous", "project_id"}),
    "abfs": frozenset(
        {"blob_storage_authority", "client_id", "credential_kind", "dfs_storage_authority", "enable_tls"}
    ),
    "hdfs": frozenset({"user", "replication", "buffer_size", "default_block_size", "kerb_ticket"}),
}
_ALIASES: Final = {"s3a": "s3", "gcs": "gs", "abfss": "abfs", "viewfs": "hdfs"}
STORES: Final = frozenset(_OPTIONS)
_REFERENCE: Final = re.compile(r"(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+)(?:/(?P<path>.*))?")


class StoreUri(NamedTuple):
    """``scheme://authority/path?options``, checked."""

    scheme: str
    authority: str
    """The bucket; container and account; host and port."""
    path: str
    """Without slashes at its ends; empty for the whole bucket."""
    options: tuple[tuple[str, str], ...]

    @property
    def store(self) -> StoreUri:
        """The same without a path."""
        return self._replace(path="")

    def option(self, name: str) -> str | None:
        return dict(self.options).get(name)

    def __str__(self) -> str:
        query = "&".join(f"{name}={value}" for name, value in self.options)
        path = f"/{self.path}" if self.path else ""
        return f"{self.scheme}://{self.authority}{path}{f'?{query}' if query else ''}"


def parse_store_uri(text: str) -> StoreUri:
    """Raises UsageError for an unknown scheme or option, for a missing bucket, and for secrets."""
    shown = redacted(text)
    scheme, _, rest = text.partition("://")
    address, _, query = rest.partition("?")
    authority, _, path = address.partition("/")
    options = [tuple(option.partition("=")[::2]) for option in query.split("&") if option]
    known = _OPTIONS[_ALIASES.get(scheme, scheme)]
    unknown = [name for name, _ in options if name not in known]
    if unknown:
        raise UsageError(
            f"{shown}: {scheme}:// has no option {', '.join(unknown)}; it takes {', '.join(sorted(known))}. "
            "Credentials are not given in a URI, but in the environment or where the storage's own tools look for them."
        )
    if valueless := [name for name, value in options if not value]:
        raise UsageError(f"{shown}: the option {valueless[0]} has no value; write {valueless[0]}=…")
    if not is_text(text) or any(part in (".", "..") for part in path.split("/")) or "#" in text:
        raise UsageError(f"{shown!r} is no address of a folder; write for instance {scheme}://bucket/folder")
    user, at, host = authority.rpartition("@")
    if at and ((scheme != "abfs" and scheme != "abfss" and (scheme, user) != ("gs", "anonymous")) or ":" in user):
        raise UsageError(
            f"{shown}: credentials are not given in a URI, where logs and manifests would keep them. Set them in the "
            "environment, or where the storage's own tools look for them."
        )
    if scheme == "gs" and user == "anonymous":
        authority, options = host, [*options, ("anonymous", "true")]
    if not authority and scheme not in ("hdfs", "viewfs"):
        raise UsageError(f"{shown} names no bucket; write for instance {scheme}://bucket/folder")
    if scheme in ("abfs", "abfss") and not at:
        example = f"{scheme}://container@account.dfs.core.windows.net/folder"
        raise UsageError(f"{shown} does not name container and account; write for instance {example}")
    return StoreUri(_ALIASES.get(scheme, scheme), authority, path.strip("/"), tuple(sorted(set(options))))  # type: ignore[arg-type]


def is_store_uri(text: str) -> bool:
    scheme, mark, _ = text.partition("://")
    return bool(mark) and _ALIASES.get(scheme, scheme) in STORES


def truth(text: str | None) -> bool:
    """Whether an option says yes."""
    return text is not None and text.lower() in ("1", "true", "yes")


class HubUri(NamedTuple):
    """``hf://org/name@revision/path``."""

    repo: str
    revision: str | None
    path: str
    """Of a folder or a file in the repository; empty for all of it."""

    def __str__(self) -> str:
        revision = f"@{quote(self.revision, safe='')}" if self.revision is not None else ""
        return f"hf://{self.repo}{revision}{f'/{self.path}' if self.path else ''}"


def parse_hub_uri(uri: str) -> HubUri:
    """Raises UsageError."""
    org, _, rest = uri.removeprefix("hf://").partition("/")
    name, at, rest = rest.partition("@") if "@" in rest else (rest, "", "")
    name, _, path = name.partition("/")
    revision = None
    if at and (found := _REFERENCE.fullmatch(rest)):
        revision, path = unquote(found["revision"]), found["path"] or ""
    path = path.strip("/")
    odd = any(part in (".", "..") for part in (org, name, *path.split("/"))) or "?" in uri or "#" in uri
    if not org or not name or odd or bool(at) != bool(revision):
        raise UsageError(f"{one_line(uri)} names no repository; write for instance hf://org/name or hf://org/name@main")
    return HubUri(f"{org}/{name}", revision, path)

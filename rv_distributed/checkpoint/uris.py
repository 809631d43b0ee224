"""Names of places: local paths, and URIs whose options stand behind a question mark. Text only; nothing is opened."""

from __future__ import annotations


def is_remote(uri: str) -> bool:
    """Whether a resolved name is a URI; all others are paths of this machine."""
    return "://" in uri


def join(uri: str, name: str) -> str:
    """The file ``name`` in a folder: ``s3://bucket/model?region=x`` and ``config.json`` make
    ``s3://bucket/model/config.json?region=x``."""
    if not is_remote(uri):
        return f"{uri.rstrip('/')}/{name}"
    folder, mark, options = uri.partition("?")
    return f"{folder.rstrip('/')}/{name}{mark}{options}"


def parent(uri: str) -> str:
    """The folder of a file, as `join` takes it."""
    path, mark, options = uri.partition("?") if is_remote(uri) else (uri, "", "")
    return f"{path.rpartition('/')[0]}{mark}{options}"


def last_part(uri: str) -> str:
    """The name of the folder or file itself."""
    return (uri.partition("?")[0] if is_remote(uri) else uri).rstrip("/").rsplit("/", 1)[-1]


def within(uri: str, folder: str) -> bool:
    """Whether a URI is ``folder``, or lies in it."""
    own, _, options = uri.partition("?")
    other, _, of_folder = folder.partition("?")
    return options == of_folder and f"{own.rstrip('/')}/".startswith(f"{other.rstrip('/')}/")

"""A Hugging Face Hub on loopback: the endpoints that huggingface_hub itself calls, for models."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "t" * 34
USER = "ada"
#: Of those, files are stored apart, as the Hub does with weights.
LARGE = (".safetensors", ".parquet")


@dataclass
class Repo:
    """A model repository."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Files by name, by commit."""
    refs: dict[str, str] = field(default_factory=dict)
    """Commits by branch."""
    private: bool = False
    gated: bool = False

    def commit(self, ref: str, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(repr((ref, len(self.commits), sorted(files))).encode()).hexdigest()  # noqa: S324
        self.commits[sha] = files
        self.refs[ref] = sha
        return sha


@dataclass
class Hub:
    """Repositories by name, and what was asked of the server."""

    repos: dict[str, Repo] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    """What was uploaded, by SHA-256, before a commit names it."""
    port: int = 0
    cdn_port: int = 0
    asked: list[tuple[str, str, int]] = field(default_factory=list)
    """Method, path, and bytes of the answer's body."""
    leaked: list[str] = field(default_factory=list)
    """Tokens that arrived where files are stored."""
    broken_uploads: int = 0
    """Uploads of files that are to fail yet."""

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def put(self, repo: str, files: dict[str, bytes], ref: str = "main", **more: Any) -> str:
        """Commit files to a repository, which is made if there is none."""
        found = self.repos.setdefault(repo, Repo(**more))
        return found.commit(ref, files)


@contextmanager
def hub_server() -> Iterator[Hub]:
    """The Hub, and another server that it sends to for large files."""
    hub = Hub()
    with _serving(_handler(hub, is_cdn=False)) as hub.port, _serving(_handler(hub, is_cdn=True)) as hub.cdn_port:
        yield hub


@contextmanager
def _serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _handler(hub: Hub, *, is_cdn: bool) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *_: Any) -> None:
            pass

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            path = unquote(urlsplit(self.path).path)
            if is_cdn:
                if "authorization" in self.headers:
                    hub.leaked.append(self.path)
                self._store(path, body)
            else:
                self._api(path, body)

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815 - the names of http.server

        # What is stored apart -----------------------------------------------------------------------------------

        def _store(self, path: str, body: bytes) -> None:
            digest = path.rpartition("/")[2]
            if self.command == "PUT":
                if hub.broken_uploads:
                    hub.broken_uploads -= 1
                    self._say(403, b"no")
                    return
                hub.blobs[digest] = body
                self._say(200, b"")
            else:
                self._file(hub.blobs[digest])

        # The Hub itself -----------------------------------------------------------------------------------------

        def _api(self, path: str, body: bytes) -> None:
            allowed = self.headers.get("authorization") == f"Bearer {TOKEN}"
            if path == "/api/whoami-v2":
                if not allowed:
                    self._refuse(401, "", "Invalid username or password.")
                    return
                self._json({"name": USER, "type": "user", "orgs": [{"name": "org"}], "auth": {}})
            elif path == "/api/repos/create":
                self._create(json.loads(body))
            elif path == "/api/validate-yaml":
                self._json({"errors": [], "warnings": []})
            elif found := re.fullmatch(r"/(?:api/models/)?([\w.-]+/[\w.-]+?)(\.git/info/lfs/objects/batch|/.*)?", path):
                name, rest = found[1], found[2] or ""
                repo = hub.repos.get(name)
                if repo is None or (repo.private and not allowed):
                    self._refuse(401 if not allowed else 404, "RepoNotFound", "Repository not found")
                elif repo.gated and not allowed:
                    text = f"Access to model {name} is restricted. You must be authenticated to access it."
                    self._refuse(401, "GatedRepo", text)
                else:
                    self._repo(name, repo, rest, body)
            else:
                self._refuse(404, "", f"no such endpoint: {path}")

        def _create(self, asked: dict[str, Any]) -> None:
            name = f"{asked.get('organization') or USER}/{asked['name']}"
            if name in hub.repos:
                self._json({"error": "You already created this model repo", "url": f"{hub.endpoint}/{name}"}, 409)
                return
            private = asked.get("private") or asked.get("visibility") == "private"
            hub.put(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=bool(private))
            self._json({"url": f"{hub.endpoint}/{name}", "name": name})

        def _repo(self, name: str, repo: Repo, rest: str, body: bytes) -> None:
            api = urlsplit(self.path).path.startswith("/api/")
            if api and rest.startswith("/auth-check"):
                self._json({})
            elif api and rest.startswith("/branch/"):
                repo.refs.setdefault(rest.removeprefix("/branch/"), repo.refs["main"])
                self._json({})
            elif api and rest.startswith("/preupload/"):
                files = [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                        "shouldIgnore": False,
                        "oid": None,
                    }
                    for file in json.loads(body)["files"]
                ]
                self._json({"files": files})
            elif api and rest.startswith("/commit/"):
                self._commit(name, repo, rest.removeprefix("/commit/"), body)
            elif rest == ".git/info/lfs/objects/batch":
                self._batch(json.loads(body))
            elif api and rest.startswith("/tree/"):
                self._tree(repo, rest.removeprefix("/tree/").partition("?")[0])
            elif api and (rest == "" or rest.startswith("/revision/")):
                self._info(name, repo, rest.removeprefix("/revision/") or "main")
            elif rest.startswith("/resolve/"):
                revision, _, file = rest.removeprefix("/resolve/").partition("/")
                self._resolve(repo, revision, file)
            else:
                self._refuse(404, "", f"no such endpoint: {self.path}")

        def _at(self, repo: Repo, revision: str) -> tuple[str, dict[str, bytes]] | None:
            sha = repo.refs.get(revision, revision)
            if sha not in repo.commits:
                self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
                return None
            return sha, repo.commits[sha]

        def _info(self, name: str, repo: Repo, revision: str) -> None:
            if (found := self._at(repo, revision)) is not None:
                siblings = [_described(file, data) for file, data in sorted(found[1].items())]
                about = {"id": name, "modelId": name, "sha": found[0], "private": repo.private, "siblings": siblings}
                self._json({**about, "tags": [], "downloads": 0, "likes": 0})

        def _tree(self, repo: Repo, revision: str) -> None:
            if (found := self._at(repo, revision)) is not None:
                entries = [
                    {"type": "file", "oid": file["blobId"], "size": file["size"], "path": file["rfilename"]}
                    | ({"lfs": {**file["lfs"], "oid": file["lfs"]["sha256"]}} if "lfs" in file else {})
                    for file in (_described(name, data) for name, data in sorted(found[1].items()))
                ]
                self._json(entries)

        def _resolve(self, repo: Repo, revision: str, file: str) -> None:
            if (found := self._at(repo, revision)) is None:
                return
            if file not in found[1]:
                self._refuse(404, "EntryNotFound", "Entry not found")
                return
            data = found[1][file]
            about = {"X-Repo-Commit": found[0], "ETag": f'"{_git_oid(data)}"'}
            if file.endswith(LARGE):
                digest = hashlib.sha256(data).hexdigest()
                hub.blobs[digest] = data
                about |= {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{digest}"'}
                where = f"http://localhost:{hub.cdn_port}/{digest}"
                self._say(302, b"", {**about, "Location": where})
            else:
                self._file(data, about)

        def _batch(self, asked: dict[str, Any]) -> None:
            objects = []
            for item in asked["objects"]:
                entry: dict[str, Any] = {"oid": item["oid"], "size": item["size"], "authenticated": True}
                if item["oid"] not in hub.blobs:
                    href = f"http://localhost:{hub.cdn_port}/{item['oid']}"
                    entry["actions"] = {"upload": {"href": href, "header": {}}}
                objects.append(entry)
            self._json({"transfer": "basic", "objects": objects})

        def _commit(self, name: str, repo: Repo, revision: str, body: bytes) -> None:
            files = dict(repo.commits[repo.refs.get(revision, revision)])
            for line in body.splitlines():
                item = json.loads(line)
                value = item["value"]
                if item["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif item["key"] == "lfsFile":
                    files[value["path"]] = hub.blobs[value["oid"]]
                elif item["key"] == "deletedFile":
                    del files[value["path"]]
            ref = revision
            answer: dict[str, Any] = {"success": True}
            if "create_pr=1" in self.path:
                ref = f"refs/pr/{1 + sum(ref.startswith('refs/pr/') for ref in repo.refs)}"
                answer["pullRequestUrl"] = f"{hub.endpoint}/{name}/discussions/{ref.rpartition('/')[2]}"
            sha = repo.commit(ref, files)
            self._json({**answer, "commitOid": sha, "commitUrl": f"{hub.endpoint}/{name}/commit/{sha}"})

        # Answers ------------------------------------------------------------------------------------------------

        def _file(self, data: bytes, headers: dict[str, str] | None = None) -> None:
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range", ""))
            if asked is None:
                self._say(200, data, headers)
                return
            start, stop = int(asked[1]), min(int(asked[2] or len(data)) + 1, len(data))
            if start >= len(data):
                self._say(416, b"", headers)
                return
            about = {**(headers or {}), "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
            self._say(206, data[start:stop], about)

        def _json(self, document: Any, status: int = 200) -> None:
            self._say(status, json.dumps(document).encode(), {"Content-Type": "application/json"})

        def _refuse(self, status: int, code: str, text: str) -> None:
            headers = {"X-Error-Message": text, "Content-Type": "application/json"}
            self._say(status, json.dumps({"error": text}).encode(), headers | ({"X-Error-Code": code} if code else {}))

        def _say(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response_only(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            sent = 0 if self.command == "HEAD" else len(body)
            # Before the answer: whoever has that may look.
            hub.asked.append((self.command, self.path, sent))
            self.wfile.write(body[:sent])

    return Handler


def _described(name: str, data: bytes) -> dict[str, Any]:
    about: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": _git_oid(data)}
    if name.endswith(LARGE):
        about["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return about


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()  # noqa: S324 - git's own

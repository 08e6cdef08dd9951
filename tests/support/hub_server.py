"""A hub on 127.0.0.1 that speaks the protocol of the hub's own client: models, commits, access.

The client library is the real one; only this server is ours. It keeps its files in memory.
"""

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
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

Files = dict[str, bytes]


@dataclass
class Repository:
    """Commits of one repository; ``refs`` maps branches and tags to them."""

    kind: str = "models"
    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def commit(self, files: Files, branch: str = "main") -> str:
        """Add a commit with exactly these files; its id is derived from what it holds."""
        before = self.refs.get(branch, "")
        text = json.dumps([before, {n: hashlib.sha1(d).hexdigest() for n, d in files.items()}])
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha], self.refs[branch] = dict(files), sha
        return sha

    def at(self, revision: str) -> tuple[str, Files] | None:
        sha = self.refs.get(revision, revision)
        return (sha, self.commits[sha]) if sha in self.commits else None


@dataclass
class Hub:
    """Repositories, the token that opens gated and private ones, and what has been asked.

    ``cut`` is a number of bytes after which the next downloads of weights lose their connection,
    one entry per download.
    """

    address: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    token: str = "hf_right"
    cut: list[int] = field(default_factory=list)
    broken: int | None = None  # status of every answer
    asked: list[str] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)  # bytes of weights, one entry per download

    def put(self, name: str, folder: Path | Files, **facts: Any) -> str:
        """Commit a folder to a repository, which is made where it is missing."""
        repository = self.repositories.setdefault(name, Repository(**facts))
        return repository.commit(folder if isinstance(folder, dict) else files_of(folder))

    def environment(self, cache: Path, **more: str) -> dict[str, str]:
        """The variables that lead the client here, with a cache of its own."""
        return {
            "HF_ENDPOINT": self.address, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": "", "NO_PROXY": "127.0.0.1",
        } | more  # fmt: skip


def files_of(folder: Path) -> Files:
    """Every file of a folder by its name in it."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@contextmanager
def serve() -> Iterator[Hub]:
    """A running hub."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
    server.hub = hub  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    @property
    def hub(self) -> Hub:
        return self.server.hub  # type: ignore[attr-defined]

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

    def _answer(self, body: bytes) -> None:
        path = unquote(urlparse(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        if self.hub.broken is not None:
            return self._send(self.hub.broken, b"")
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        api = re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(\w+)(?:/(.+))?)?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if api:
            self._api(*api.groups(), body)
        elif file:
            self._file(*file.groups())
        else:
            self._refuse(404, "EntryNotFound")

    def _open(self, kind: str, name: str) -> Repository | None:
        """The repository, unless it has been refused."""
        found = self.hub.repositories.get(name)
        known = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if found is None or found.kind != kind or (found.private and not known):
            self._refuse(404 if known else 401, "RepoNotFound")
            return None
        return found

    def _may_read(self, repository: Repository) -> bool:
        given = self.headers.get("Authorization")
        if repository.gated and given != f"Bearer {self.hub.token}":
            self._refuse(403 if given else 401, "GatedRepo")
            return False
        return True

    def _api(self, kind: str, name: str, verb: str | None, rest: str | None, body: bytes) -> None:
        repository = self._open(kind, name)
        if repository is None:
            return
        if verb == "refs":
            named = [
                {"name": n, "ref": f"refs/heads/{n}", "targetCommit": sha}
                for n, sha in repository.refs.items()
            ]
            return self._json({"branches": named, "tags": [], "converts": []})
        writes = verb in ("commit", "branch", "preupload")
        if writes and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self._refuse(403, "")
        if verb == "branch":
            repository.refs[str(rest)] = repository.refs["main"]
            return self._json({})
        if verb == "preupload":
            files = json.loads(body)["files"]
            plain = {"uploadMode": "regular", "shouldIgnore": False}
            return self._json({"files": [{"path": f["path"], **plain} for f in files]})
        if verb == "commit":
            return self._commit(name, repository, str(rest), body)
        found = repository.at(rest or "main")
        if found is None:
            return self._refuse(404, "RevisionNotFound")
        sha, files = found
        if verb == "tree":
            return self._json([
                {"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                for n, d in files.items()
            ])  # fmt: skip
        siblings = [{"rfilename": n} for n in files]
        self._json({"id": name, "sha": sha, "siblings": siblings, "private": repository.private})

    def _create(self, asked: dict[str, Any]) -> None:
        name = "/".join(p for p in (asked.get("organization"), asked["name"]) if p)
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self._refuse(401, "")
        if name in self.hub.repositories:
            return self._send(409, json.dumps({"url": f"{self.hub.address}/{name}"}).encode())
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.put(name, {".gitattributes": b""}, private=private)
        self._json({"url": f"{self.hub.address}/{name}"})

    def _commit(self, name: str, repository: Repository, branch: str, body: bytes) -> None:
        if branch not in repository.refs:
            return self._refuse(404, "RevisionNotFound")
        files = dict(repository.commits[repository.refs[branch]])
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "deletedFile":
                del files[entry["value"]["path"]]
        sha = repository.commit(files, branch)
        url = f"{self.hub.address}/{name}/commit/{sha}"
        self._json({"success": True, "commitOid": sha, "commitUrl": url})

    def _file(self, name: str, revision: str, path: str) -> None:
        repository = self._open("models", name)
        if repository is None or not self._may_read(repository):
            return
        found = repository.at(revision)
        if found is None or path not in found[1]:
            return self._refuse(404, "EntryNotFound" if found else "RevisionNotFound")
        sha, files = found
        data = files[path]
        start = int((re.match(r"bytes=(\d+)-", self.headers.get("Range") or "") or "00")[1])
        facts = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": sha}
        if start:
            facts["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        cut = None
        if self.command == "GET" and path.endswith(".safetensors"):
            cut = self.hub.cut.pop(0) if self.hub.cut else None
            self.hub.sent.append(len(data[start:][:cut]))
        self._send(206 if start else 200, data[start:], facts, cut)

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code} if code else {})

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(
        self, status: int, data: bytes, facts: dict[str, str] | None = None, cut: int | None = None
    ) -> None:
        self.send_response(status)
        for key, value in {**(facts or {}), "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:cut])
        if cut is not None:
            self.close_connection = True

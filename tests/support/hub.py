"""A stand-in for the Hugging Face hub on localhost, with the part of its API that huggingface_hub uses for models.

POST /api/repos/create                   make a repository
POST /api/models/NAME/preupload/REVISION how to send each file: here always in the commit
POST /api/models/NAME/commit/REVISION    one commit, a line of JSON for each file
POST /api/models/NAME/branch/REVISION    make a branch
GET  /api/models/NAME[/revision/REVISION] what a repository holds, with the hash of the commit
GET  /api/models/NAME/tree/REVISION      its files
GET  /NAME/resolve/REVISION/FILE         one of them
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Generator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
import transformers.utils.hub


@dataclass
class Repository:
    """Commits (hash -> file name -> content), and the branches and tags that point to them."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Commit files on top of a branch; return the hash."""
        held = self.commits.get(self.branches.get(branch, ""), {}) | files
        text = repr((len(self.commits), sorted(held.items()))).encode()
        sha = hashlib.sha1(text).hexdigest()
        self.commits[sha], self.branches[branch] = held, sha
        return sha

    def find(self, revision: str) -> str | None:
        """Return the hash of a revision."""
        return self.branches.get(revision, revision if revision in self.commits else None)


@dataclass
class Hub:
    """The server: its address, its repositories by name, and the files that were sent, as (name, file)."""

    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    sent: list[tuple[str, str]] = field(default_factory=list)

    def upload(self, name: str, folder: Path, branch: str = "main") -> str:
        """Put the files of a folder into a repository, without the API; return the hash of the commit."""
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        return self.repositories.setdefault(name, Repository()).commit(files, branch)

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """Return the files of a repository."""
        repository = self.repositories[name]
        return repository.commits[repository.branches.get(revision, revision)]


class Handler(BaseHTTPRequestHandler):
    """Answers as the hub does."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args) -> None:
        """Log nothing."""

    def do_POST(self) -> None:
        """Create repositories, branches and commits."""
        body, path = self._body(), unquote(urlsplit(self.path).path)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization'] or 'me'}/{asked['name']}"
            repository = self.hub.repositories.setdefault(name, Repository())
            if not repository.commits:
                repository.commit({".gitattributes": b""})
            self._json({"url": f"{self.hub.endpoint}/{name}", "name": name})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch)/(.+)", path):
            name, verb, revision = match.groups()
            self._change(name, verb, revision, body)
        else:
            self._refuse(404, "EntryNotFound")

    def _change(self, name: str, verb: str, revision: str, body: bytes) -> None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            self._refuse(401, "RepoNotFound")
        elif verb == "branch":
            repository.branches.setdefault(revision, repository.branches["main"])
            self._json({})
        elif revision not in repository.branches:
            self._refuse(404, "RevisionNotFound")
        elif verb == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            self._json({"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]})
        else:
            lines = [json.loads(line) for line in body.splitlines()]
            added = [line["value"] for line in lines if line["key"] == "file"]
            sha = repository.commit({file["path"]: base64.b64decode(file["content"]) for file in added}, revision)
            url = f"{self.hub.endpoint}/{name}"
            self._json({"success": True, "commitOid": sha, "commitUrl": f"{url}/commit/{sha}", "hookOutput": ""})

    def do_HEAD(self) -> None:
        """Answer as GET, without the content."""
        self.do_GET()

    def do_GET(self) -> None:
        """Describe repositories, and send files."""
        path = unquote(urlsplit(self.path).path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        about = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)(?:/(.+))?)?", path)
        match = file or about
        repository = self.hub.repositories.get(match[1]) if match else None
        if match is None or repository is None:
            self._refuse(401, "RepoNotFound")
            return
        sha = repository.find((match[2] if file else match[3]) or "main")
        if sha is None:
            self._refuse(404, "RevisionNotFound")
            return
        files = repository.commits[sha]
        if file:
            self._file(match[1], match[3], files, sha)
        elif match[2] == "tree":
            self._tree({name: files[name] for name in files if name.startswith(match[4] or "")})
        else:
            siblings = [{"rfilename": name} for name in files]
            self._json({"id": match[1], "sha": sha, "siblings": siblings, "tags": repository.tags, "private": False})

    def _tree(self, files: dict[str, bytes]) -> None:
        if not files:
            self._refuse(404, "EntryNotFound")
            return
        sizes = {name: {"size": len(content), "oid": _hash(content)} for name, content in files.items()}
        self._json([{"type": "file", "path": name} | described for name, described in sizes.items()])

    def _file(self, repository: str, name: str, files: dict[str, bytes], sha: str) -> None:
        if name not in files:
            self._refuse(404, "EntryNotFound", {"X-Repo-Commit": sha})
            return
        if self.command == "GET":
            self.hub.sent.append((repository, name))
        self._answer(200, files[name], {"ETag": f'"{_hash(files[name])}"', "X-Repo-Commit": sha})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _json(self, values) -> None:
        self._answer(200, json.dumps(values).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self._answer(status, b"", {"X-Error-Code": code, **(headers or {})})

    def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _hash(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextlib.contextmanager
def serving() -> Generator[Hub]:
    """Serve an empty hub on a free port."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=[0.01], daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def used(cache: Path) -> Generator[Hub]:
    """Serve an empty hub, and make this process and its children use it, with `cache` as their cache."""
    with serving() as hub, pytest.MonkeyPatch.context() as patch:
        for name, value in {"HF_ENDPOINT": hub.endpoint, "HF_HUB_CACHE": str(cache), "HF_TOKEN": "hf_none"}.items():
            patch.setenv(name, value)
        patch.delenv("HF_HUB_OFFLINE", raising=False)
        # As if the variables had been set before the import.
        patch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
        template = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        patch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        patch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.endpoint)
        patch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)
        yield hub

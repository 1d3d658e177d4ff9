"""A hub on loopback that serves folders as repositories: what transformers asks for when it loads. Reading only."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Hub:
    """Repositories by id, each with commits in order; `main` is the last."""

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, Path]] = {}

    def publish(self, repo: str, folder: Path) -> str:
        """Makes a folder the newest commit of a repository; returns the commit's hash."""
        history = self.commits.setdefault(repo, {})
        commit = hashlib.sha1(f"{repo}{len(history)}".encode()).hexdigest()
        history[commit] = folder
        return commit

    def resolve(self, repo: str, revision: str) -> tuple[str, Path] | None:
        history = self.commits.get(repo, {})
        commit = list(history)[-1] if revision == "main" and history else revision
        return (commit, history[commit]) if commit in history else None


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)/?(.*))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        repo, revision = (api[1], api[3] or "main") if api else (file[1], file[2]) if file else ("", "")
        found = self.hub.resolve(repo, revision)
        if found is None:
            self._send(404, {"X-Error-Code": "RevisionNotFound" if repo in self.hub.commits else "RepoNotFound"})
            return
        commit, folder = found
        if file:
            if not (folder / file[3]).is_file():
                self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
                return
            content = (folder / file[3]).read_bytes()
            etag = hashlib.sha256(content).hexdigest()
            self._send(200, {"X-Repo-Commit": commit, "ETag": f'"{etag}"'}, content, body)
            return
        files = sorted(p for p in (folder / (api[4] or "")).rglob("*") if p.is_file())
        names = [str(p.relative_to(folder)) for p in files]
        if api[2] == "tree":
            if not names:
                self._send(404, {"X-Error-Code": "EntryNotFound"})
                return
            listing = [{"type": "file", "path": n, "size": (folder / n).stat().st_size, "oid": commit} for n in names]
        else:
            listing = {
                "id": repo,
                "sha": commit,
                "siblings": [{"rfilename": n} for n in names],
                "tags": [],
                "private": False,
            }
        self._send(
            200, {"Content-Type": "application/json", "X-Repo-Commit": commit}, json.dumps(listing).encode(), body
        )

    def _send(self, status: int, headers: dict[str, str], content: bytes = b"", body: bool = True) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        """Silence."""


@contextmanager
def serving(hub: Hub) -> Iterator[str]:
    """Serves a hub on a free port of this machine; gives its address, for HF_ENDPOINT."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()

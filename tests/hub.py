"""A hub on loopback that serves folders as repositories: what transformers asks for when it loads, and a push."""

import base64
import hashlib
import json
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Hub:
    """Repositories by id, each with commits in order; `main` is the last.

    Large files come by LFS: their content once, by its hash; `received` counts the bytes of each such upload. A request
    whose path holds `fails` is answered by an error of the server. Writing needs the token `good`. As on the real one, a new
    repository has a first commit, with `.gitattributes`.
    """

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, Path]] = {}
        self.messages: dict[str, str] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}
        self.received: list[int] = []
        self.fails: str | None = None
        self._folders = tempfile.TemporaryDirectory()

    def commit(self, repo: str, lines: list[dict]) -> str:
        """A commit as huggingface_hub sends it, one operation a line, on top of the last one."""
        folder = Path(tempfile.mkdtemp(dir=self._folders.name))
        before = self.resolve(repo, "main")
        if before is not None:
            shutil.copytree(before[1], folder, dirs_exist_ok=True)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                content = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                (folder / value["path"]).unlink()
                continue
            else:
                continue
            (folder / value["path"]).parent.mkdir(parents=True, exist_ok=True)
            (folder / value["path"]).write_bytes(content)
        commit = self.publish(repo, folder)
        self.messages[commit] = lines[0]["value"]["summary"]
        return commit

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

    def do_PUT(self) -> None:
        content = self._body()
        if self.hub.fails and self.hub.fails in self.path:
            self._send(507, {})  # the client tries others again and again
            return
        self.hub.objects[self.path.rsplit("/", 1)[1]] = content
        self.hub.received.append(len(content))
        self._send(200, {})

    def do_POST(self) -> None:
        path, content = self.path.split("?")[0], self._body()
        if self.hub.fails and self.hub.fails in path:
            self._send(507, {})  # the client tries others again and again
            return
        if path != "/api/validate-yaml" and self.headers.get("Authorization") != "Bearer good":
            self._send(401, {}, b'{"error": "Invalid credentials in Authorization header"}')
            return
        address = f"http://{self.headers['Host']}"
        preupload = re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", path)
        commit = re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", path)
        if path == "/api/validate-yaml":
            answer: dict = {"errors": [], "warnings": []}
        elif path == "/api/repos/create":
            asked = json.loads(content)
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if repo in self.hub.commits:
                self._send(409, {}, json.dumps({"error": "exists", "url": f"{address}/{repo}"}).encode())
                return
            self.hub.commit(repo, [{"key": "header", "value": {"summary": "initial commit"}},
                                   {"key": "file", "value": {"path": ".gitattributes", "content": ""}}])  # fmt: skip
            self.hub.private[repo] = asked.get("visibility") == "private"
            answer = {"url": f"{address}/{repo}", "id": repo}
        elif preupload:
            answer = {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                    }
                    for file in json.loads(content)["files"]
                ]
            }
        elif path.endswith(".git/info/lfs/objects/batch"):
            asked = json.loads(content)["objects"]
            answer = {"transfer": "basic", "objects": [self._upload_of(one, address) for one in asked]}
        elif commit:
            made = self.hub.commit(commit[1], [json.loads(line) for line in content.splitlines()])
            url = f"{address}/{commit[1]}/commit/{made}"
            answer = {"success": True, "commitOid": made, "commitUrl": url, "hookOutput": ""}
        else:
            self._send(404, {})
            return
        self._send(200, {"Content-Type": "application/json"}, json.dumps(answer).encode())

    def _upload_of(self, asked: dict, address: str) -> dict:
        """Where an object is to be put; nowhere if its content is known."""
        known = asked["oid"] in self.hub.objects
        actions = {} if known else {"actions": {"upload": {"href": f"{address}/lfs/{asked['oid']}"}}}
        return {**asked, **actions}

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

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

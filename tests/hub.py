"""A hub of our own on 127.0.0.1: the endpoints that the libraries ask, over data sets and models."""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """A data set or model: its commits in order, each file name -> bytes; what the hub says instead."""

    commits: list[dict[str, bytes]] = field(default_factory=list)
    refusal: tuple[int, str] | None = None  # status, X-Error-Code

    def commit(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        named = {name_of(files): files for files in self.commits}
        found = name_of(self.commits[-1]) if revision == "main" else revision
        return (found, named[found]) if found in named else None


def name_of(files: dict[str, bytes]) -> str:
    """Return a commit's name."""
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class Hub(BaseHTTPRequestHandler):
    repositories: dict[str, Repository]
    asked: list[str]

    def log_message(self, format: str, *args: object) -> None: ...

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        self._serve(self.rfile.read(length).decode())

    def _serve(self, body: str = "") -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.asked.append(path)
        parts = path.removeprefix("api/").removeprefix("models/").split("/")
        if parts == ["repos", "create"]:
            made = json.loads(body)
            self.repositories.setdefault(f"{made['organization']}/{made['name']}", Repository([{}]))
            self._answer(200, json.dumps({"url": self._url(made["organization"], made["name"])}).encode())
            return
        if "/".join(parts[:2]) in self.repositories:
            parts = ["models", *parts]
        if parts[0] not in ("datasets", "models") or len(parts) < 3:
            self._answer(200, b"{}")
            return
        repository = self.repositories.get("/".join(parts[1:3]))
        if repository is None:
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif repository.refusal is not None:
            status, code = repository.refusal
            self._answer(status, b"{}", {"X-Error-Code": code, "X-Error-Message": "refused"})
        else:
            self._of_repository(repository, "/".join(parts[1:3]), parts[3:], path.startswith("api/"), body)

    def _of_repository(
        self, repository: Repository, name: str, rest: list[str], is_api: bool, body: str
    ) -> None:
        found = repository.commit(rest[1] if len(rest) > 1 else "main")
        if found is None:
            self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return
        sha, files = found
        if self.command == "POST" and rest[:1] in (["preupload"], ["commit"]):
            self._upload(repository, name, rest[0], files, body)
        elif not is_api:
            self._file(sha, files, "/".join(rest[2:]))
        elif rest[:1] in (["tree"], ["paths-info"]):
            wanted = [name for name in files if not body or name in unquote(body)]
            self._answer(200, json.dumps([_entry(name, files[name]) for name in wanted]).encode())
        else:
            siblings = [{"rfilename": file} for file in files]
            about = {
                "id": name,
                "sha": sha,
                "siblings": siblings,
                "private": False,
                "tags": [],
                "gated": False,
            }
            self._answer(200, json.dumps(about).encode())

    def _upload(
        self, repository: Repository, name: str, step: str, files: dict[str, bytes], body: str
    ) -> None:
        """Take all files as plain ones: first their names, then a line of JSON for each."""
        if step == "preupload":
            named = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in named]
            self._answer(200, json.dumps({"files": modes}).encode())
            return
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        given = [line["value"] for line in lines if line["key"] == "file"]
        new = {file["path"]: base64.b64decode(file["content"]) for file in given}
        repository.commits.append({**files, **new})
        sha = name_of(repository.commits[-1])
        said = {"success": True, "commitOid": sha, "commitUrl": f"{self._url(*name.split('/'))}/commit/{sha}"}
        self._answer(200, json.dumps(said).encode())

    def _url(self, owner: str, name: str) -> str:
        return f"http://{self.headers['Host']}/{owner}/{name}"

    def _file(self, sha: str, files: dict[str, bytes], name: str) -> None:
        if name not in files:
            self._answer(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
            return
        etag = hashlib.sha1(files[name]).hexdigest()
        self._answer(200, files[name], {"ETag": f'"{etag}"', "X-Repo-Commit": sha})

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _entry(name: str, content: bytes) -> dict[str, object]:
    oid = hashlib.sha1(content).hexdigest()
    return {"type": "file", "path": name, "size": len(content), "oid": oid}


@contextmanager
def running_hub(repositories: dict[str, Repository]) -> Iterator[str]:
    """Serve the data sets; yield the endpoint."""
    handler = type("OneHub", (Hub,), {"repositories": repositories, "asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()

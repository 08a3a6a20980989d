"""A hub on the loopback interface: as much of the Hugging Face Hub's HTTP protocol as creating, committing to and reading a model takes."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0" * 39 + "1"


class Hub(ThreadingHTTPServer):
    """Repositories in memory; `files[repo][path]` are their bytes, `requests` what was asked in which order."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.blobs: dict[str, bytes] = {}
        self.created: dict[str, Any] = {}
        self.messages: list[str] = []
        self.tokens: set[str | None] = set()
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that runs while it is used."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Hub  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def answer(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def answer_json(self, value: Any) -> None:
        self.answer(json.dumps(value).encode(), Content_Type="application/json")

    def body(self) -> bytes:
        self.server.requests.append(f"{self.command} {self.path}")
        self.server.tokens.add(self.headers.get("Authorization"))
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_POST(self) -> None:
        body, parts = self.body(), self.path.strip("/").split("/")
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"someone/{asked['name']}"
            self.server.files.setdefault(repo, {})
            self.server.created[repo] = asked
            self.answer_json({"url": f"{self.server.url}/{repo}", "id": repo, "name": repo})
        elif "preupload" in parts:
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            self.answer_json({"files": modes})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [{**o, "actions": {"upload": {"href": f"{self.server.url}/lfs/{o['oid']}"}}} for o in json.loads(body)["objects"]]
            self.answer_json({"transfer": "basic", "objects": objects})
        elif "commit" in parts:
            self.commit("/".join(parts[2:4]), [json.loads(line) for line in body.splitlines()])
        else:
            self.answer_json({"errors": [], "warnings": []})  # of a model card, which is asked about first

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        files = self.server.files[repo]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.server.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            else:
                raise AssertionError(line)
        self.answer_json({"commitUrl": f"{self.server.url}/{repo}/commit/{COMMIT}", "commitOid": COMMIT, "success": True, "hookOutput": ""})

    def do_PUT(self) -> None:
        body = self.body()
        assert hashlib.sha256(body).hexdigest() == self.path.rsplit("/", 1)[1]
        self.server.blobs[self.path.rsplit("/", 1)[1]] = body
        self.answer(b"")

    def do_GET(self) -> None:
        self.body()
        repo, _, rest = self.path.strip("/").partition("/resolve/")
        content = self.server.files.get(repo, {}).get(rest.split("?")[0].partition("/")[2])
        if content is None:
            self.answer(b"", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            return
        self.answer(content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET

"""A small server that speaks what uploads need of the hub's API: create a repository, upload, commit."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub(ThreadingHTTPServer):
    """`repos` holds what arrived: repository -> path -> content. `created` holds the bodies of the calls that create one."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.created: list[dict] = []
        self.large: dict[str, bytes] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body, path = self._body(), self.path.split("?")[0]
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if path.endswith("/info/lfs/objects/batch"):
            return self._answer({"transfer": "basic", "objects": [self._large(o) for o in json.loads(body)["objects"]]})
        repo, _, action = path.removeprefix("/api/models/").rpartition("/")[0].rpartition("/")
        if action == "preupload":
            return self._answer({"files": [self._mode(file["path"]) for file in json.loads(body)["files"]]})
        if action == "commit":
            return self._commit(repo, [json.loads(line) for line in body.splitlines() if line.strip()])
        self._missing()

    def do_PUT(self) -> None:
        self.server.large[self.path.removeprefix("/large/")] = self._body()
        self._answer({})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        repo, sign, file = self.path.removeprefix("/").partition("/resolve/main/")
        content = self.server.repos.get(repo, {}).get(file) if sign else None
        if content is None:
            return self._missing()
        self._reply(200, content, {"ETag": '"1"', "X-Repo-Commit": "0" * 40})

    def _create(self, body: dict) -> None:
        name = "/".join(filter(None, (body.get("organization"), body["name"])))
        self.server.created.append(body)
        self.server.repos.setdefault(name, {})
        self._answer({"url": f"{self.server.url}/{name}", "name": name})

    def _mode(self, path: str) -> dict:
        return {
            "path": path,
            "uploadMode": "lfs" if path.endswith(".safetensors") else "regular",
            "shouldIgnore": False,
        }

    def _large(self, wanted: dict) -> dict:
        upload = {"href": f"{self.server.url}/large/{wanted['oid']}"}
        return {"oid": wanted["oid"], "size": wanted["size"], "actions": {"upload": upload}}

    def _commit(self, repo: str, lines: list[dict]) -> None:
        files = self.server.repos[repo]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
        url = f"{self.server.url}/{repo}/commit/{'0' * 40}"
        self._answer({"success": True, "commitUrl": url, "commitOid": "0" * 40, "hookOutput": ""})

    def _missing(self) -> None:
        self._reply(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    def _answer(self, data: dict) -> None:
        self._reply(200, json.dumps(data).encode(), {"Content-Type": "application/json"})

    def _reply(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def log_message(self, *_arguments) -> None:
        """Quiet."""


@contextmanager
def running() -> Iterator[Hub]:
    """The hub, for as long as the block runs."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()

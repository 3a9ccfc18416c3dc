"""A hub of one's own: the few calls that creating a repository and committing files to it need, on this machine."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Hub:
    """What was asked of it: repositories as created, files by repository and path, the tokens that came.

    And how it behaves: `login`: the status it answers to who-am-I; `role`: the token's; `down`: how many commits it
    still answers with 412, which the client does not try again by itself; `refusals`: what it answers to a GET whose
    path ends so, as (status, the hub's error code). `page`: sent with status 200 instead of any answer, as a proxy
    does; `asleep`: it takes questions and never answers. `commit_status`: what it answers to every commit, of which it
    counts `commits`.
    """

    address: str = ""
    created: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)
    login: int = 200
    role: str = "write"
    down: int = 0
    refusals: dict[str, tuple[int, str]] = field(default_factory=dict)
    page: str = ""
    asleep: bool = False
    commit_status: int = 200
    commits: int = 0


@contextmanager
def hub(owner: str) -> Iterator[Hub]:
    seen = Hub()
    closing = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def answer(self, document: dict[str, Any], status: int = 200) -> None:
            body = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            if seen.asleep:
                closing.wait(60)
                return
            if seen.page:
                self.send_response(200)
                self.send_header("Content-Type", "text/html")
                self.send_header("Content-Length", str(len(seen.page)))
                self.end_headers()
                self.wfile.write(seen.page.encode())
                return
            for end, (status, code) in seen.refusals.items():
                if self.path.split("?")[0].endswith(end):
                    self.send_response(status)
                    self.send_header("X-Error-Code", code)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
            if "/api/models/" in self.path:
                files = [
                    {"rfilename": "transformer/a.safetensors", "size": 3 << 30},
                    {"rfilename": "x", "size": 9 << 40},
                ]
                self.answer({"id": "some/model", "sha": "0" * 40, "siblings": files})
                return
            token = {"accessToken": {"role": seen.role}}
            self.answer({"name": owner, "type": "user", "orgs": [{"name": "me"}], "auth": token}, seen.login)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            seen.tokens.add(self.headers.get("Authorization", ""))
            parts = self.path.split("?")[0].strip("/").split("/")
            if parts[1:] == ["repos", "create"]:
                asked = json.loads(body)
                seen.created.append(asked)
                name = f"{asked.get('organization') or owner}/{asked['name']}"
                self.answer({"url": f"{seen.address}/{name}", "name": name})
            elif "preupload" in parts:
                files = [
                    {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for one in json.loads(body)["files"]
                ]
                self.answer({"files": files})
            elif "commit" in parts:
                seen.commits += 1
                if seen.commit_status != 200:
                    self.answer({"error": "refused"}, seen.commit_status)
                    return
                if seen.down:
                    seen.down -= 1
                    self.answer({"error": f"down, said {self.headers.get('Authorization', '')}"}, 412)
                    return
                repo = "/".join(parts[2:4])
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        value = line["value"]
                        seen.files.setdefault(repo, {})[value["path"]] = base64.b64decode(value["content"])
                self.answer({"commitUrl": f"{seen.address}/{repo}/commit/0", "commitOid": "0" * 40, "success": True})
            else:
                self.answer({"errors": [], "warnings": []})

        def log_message(self, format: str, *args: Any) -> None:
            del format, args

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    seen.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        closing.set()
        server.shutdown()
        server.server_close()

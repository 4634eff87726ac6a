"""A hub on this machine: the requests that the real client of huggingface_hub makes, answered from a dictionary."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "c" * 40


@dataclass
class Hub:
    """What is on it, what goes wrong, and what was asked.

    Attributes:
        files: repository → file name → content.
        gated: repositories that need an agreement.
        cut: file name → after so many bytes its first download breaks off.
        spoil: file names whose content arrives changed.
        log: (method, repository or api path, file, Range header, revision) of every request.
    """

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    cut: dict[str, int] = field(default_factory=dict)
    spoil: set[str] = field(default_factory=set)
    log: list[tuple[str, str, str, str | None, str]] = field(default_factory=list)
    url: str = ""

    def fetched(self) -> list[str]:
        """Files whose content was asked for, in order."""
        return [file for method, _, file, _, _ in self.log if method == "GET" and file]


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Run a hub until the end of the block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def log_message(self, *args: object) -> None:
            pass

        def answer(self, body: bool) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            if path.startswith("api/models/"):
                return self.api(path)
            repo, _, rest = path.partition("/resolve/")
            revision, _, file = rest.partition("/")
            hub.log.append((self.command, repo, file, self.headers.get("Range"), revision))
            if trouble := self.trouble(repo, revision):
                return self.refuse(*trouble, body)
            if file not in hub.files[repo]:
                return self.refuse(404, "EntryNotFound", body)
            content = hub.files[repo][file]
            digest = hashlib.sha256(content).hexdigest()
            if file in hub.spoil:
                content = bytes(b ^ 1 for b in content)
            first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0] or 0)
            self.send_response(206 if first else 200)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{digest}"')
            self.send_header("Accept-Ranges", "bytes")
            if first:
                self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content) - first))
            stop = hub.cut.pop(file, None) if body else None
            if stop is not None:
                self.send_header("Connection", "close")
            self.end_headers()
            if body:
                self.wfile.write(content[first:stop])
                self.wfile.flush()
            if stop is not None:
                self.close_connection = True

        def api(self, path: str) -> None:
            repo = "/".join(path.split("/")[2:4])
            hub.log.append((self.command, path, "", None, ""))
            if trouble := self.trouble(repo, COMMIT):
                return self.refuse(*trouble, True)
            names = sorted(hub.files[repo])
            listed = [{"type": "file", "path": n, "size": len(hub.files[repo][n]), "oid": "0" * 40} for n in names]
            info = {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": [{"rfilename": n} for n in names], "tags": []}
            data = json.dumps(listed if "/tree/" in path else info).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def trouble(self, repo: str, revision: str) -> tuple[int, str] | None:
            if repo not in hub.files:
                return 404, "RepoNotFound"
            if repo in hub.gated:
                return 403, "GatedRepo"
            return None if revision in ("main", "v1", COMMIT) else (404, "RevisionNotFound")

        def refuse(self, status: int, code: str, body: bool) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

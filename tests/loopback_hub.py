"""The part of a Hugging Face hub's API that fetching a model needs, on this machine, with all that can go wrong."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


class LoopbackHub:
    """A hub with one repository, NAME, and beside it, at another port, the storage of its large files.

    files: path -> bytes. cuts: path -> after how many bytes each request is dropped, in turn. sent: what is sent in
    place of a file. failures: path, or "api", -> status and headers. requests: (where, path, headers) so far.
    """

    NAME = "ships/small"

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.commit = files, "c" * 40
        self.cuts: dict[str, list[int]] = {}
        self.sent: dict[str, bytes] = {}
        self.failures: dict[str, tuple[int, dict[str, str]]] = {}
        self.ranges, self.reset, self.hashes, self.plain = True, False, True, False
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self._servers = []

    def __enter__(self) -> LoopbackHub:
        for place in ("hub", "storage"):
            server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, place))
            server.daemon_threads = True
            server.handle_error = lambda request, address: None  # a client that was killed
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
            self._servers.append(server)
        self.url, self.storage = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)
        return self

    def __exit__(self, *exception: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def asked(self, path: str) -> list[str | None]:
        """The Range of every request for the content of a file."""
        here = self.place(path)
        return [headers.get("range") for place, name, headers in self.requests if (place, name) == (here, path)]

    def place(self, path: str) -> str:
        return "storage" if self.is_large(path) else "hub"

    def is_large(self, path: str) -> bool:
        return path.endswith((".safetensors", ".gguf", ".bin"))

    def listing(self) -> dict:
        siblings = []
        for path, content in self.files.items():
            one = {"rfilename": path}
            if self.hashes:
                blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                one |= {"size": len(content), "blobId": blob}
                if self.is_large(path):
                    sha = hashlib.sha256(content).hexdigest()
                    one["lfs"] = {"size": len(content), "sha256": sha, "pointerSize": 134}
            siblings.append(one)
        return {"id": self.NAME, "sha": self.commit, "siblings": siblings, "private": False, "tags": []}


def _handler(hub: LoopbackHub, place: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            address = urlsplit(self.path)
            path = unquote(address.path).strip("/")
            headers = {name.lower(): value for name, value in self.headers.items()}
            api = re.fullmatch(rf"api/models/({hub.NAME})/revision/([^/]+)", path)
            if api:
                hub.requests.append((place, "api", headers))
                assert parse_qs(address.query).get("blobs") in (["true"], ["True"])
                if api[2] != "main":
                    return self.fail(404, {"X-Error-Code": "RevisionNotFound"})
                if "api" in hub.failures:
                    return self.fail(*hub.failures["api"])
                if hub.plain:
                    return self.answer(b"<html>a proxy's page</html>", {"Content-Type": "text/html"})
                return self.answer(json.dumps(hub.listing()).encode(), {"Content-Type": "application/json"})
            found = re.fullmatch(rf"(?:{hub.NAME}/resolve/{hub.commit}|{place})/(.+)", path)
            if not found or found[1] not in hub.files:
                return self.fail(404, {"X-Error-Code": "RepoNotFound"})
            path = found[1]
            hub.requests.append((place, path, headers))
            if path in hub.failures:
                return self.fail(*hub.failures[path])
            content = hub.sent.get(path, hub.files[path])
            etag = hashlib.sha256(content).hexdigest()
            if place != hub.place(path):  # a large file: its address is elsewhere
                linked = {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content))}
                where = {"Location": f"{hub.storage}/storage/{path}", "X-Repo-Commit": hub.commit}
                return self.answer(b"", {**linked, **where}, 302)
            return self.content(path, content, {"ETag": f'"{etag}"', "X-Repo-Commit": hub.commit})

        def content(self, path: str, content: bytes, headers: dict[str, str]) -> None:
            asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            start = int(asked[1]) if asked and hub.ranges else 0
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            cut = hub.cuts[path].pop(0) if hub.cuts.get(path) else None
            self.answer(content[start:], headers, 206 if start else 200, cut)

        def answer(self, body: bytes, headers: dict[str, str], status: int = 200, cut: int | None = None) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body[:cut])
            if cut is not None:
                self.wfile.flush()
                if hub.reset:  # the other side gets an error instead of an end
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True

        def fail(self, status: int, headers: dict[str, str]) -> None:
            self.answer(b"", headers, status)

        def log_message(self, *arguments: object) -> None:
            pass

    return Handler

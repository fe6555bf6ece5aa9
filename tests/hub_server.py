"""A Hugging Face Hub of a few models, on the loopback: what `edgert convert hf://` asks of one."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CHUNK = 1 << 16


@dataclass
class Hub:
    """What the server has, what was asked of it, and how it fails."""

    models: dict[str, Path]  # by name, folders
    gated: set[str] = field(default_factory=set)
    token: str | None = None  # what private models ask for; None: all are public
    cut_after: int | None = None  # bytes of weights after which a connection is closed, once
    refuse_after_cut: bool = False  # and every request for weights behind it
    states_wrong_hash: bool = False
    states_size: int | None = None  # of weights, whatever they are
    endpoint: str = ""
    ranges: list[tuple[str, int, int]] = field(default_factory=list)  # file, first byte, bytes sent
    tokens: set[str] = field(default_factory=set)

    def asked_for(self) -> set[str]:
        """The names of the files that were fetched, whole or in part."""
        return {name for name, _, _ in self.ranges}

    def sent(self, name: str) -> int:
        """Bytes of a file that went over the line."""
        return sum(count for file, _, count in self.ranges if file == name)


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The hub, reachable at `hub.endpoint` inside."""

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        """`/api/models/NAME[/revision/REVISION]` and `/NAME/resolve/COMMIT/FILE`."""
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.tokens.add(self.headers.get("Authorization", ""))
        name, _, rest = path.removeprefix("api/models/").partition(
            "/revision/" if path.startswith("api/") else "/resolve/"
        )
        if name not in self.hub.models or not self._may_read():
            self._error(401, "RepoNotFound")
        elif path.startswith("api/"):
            self._model(name, rest)
        elif name in self.hub.gated:
            self._error(403, "GatedRepo")
        else:
            revision, _, file = rest.partition("/")
            assert revision == COMMIT
            self._file(self.hub.models[name] / file)

    def _may_read(self) -> bool:
        return self.hub.token is None or self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def _model(self, name: str, revision: str) -> None:
        if revision not in ("", "main", "v1", COMMIT):
            self._error(404, "RevisionNotFound")
            return
        siblings = []
        for path in sorted(self.hub.models[name].rglob("*")):
            if not path.is_file():
                continue
            data = path.read_bytes()
            listed: dict[str, object] = {
                "rfilename": path.relative_to(self.hub.models[name]).as_posix(),
                "size": len(data),
                "blobId": hashlib.sha1(data).hexdigest(),
            }
            if path.suffix in (".safetensors", ".gguf"):
                digest = hashlib.sha256(b"" if self.hub.states_wrong_hash else data).hexdigest()
                listed["size"] = self.hub.states_size or len(data)
                listed["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 134}
            siblings.append(listed)
        described = {"_id": "0", "id": name, "modelId": name, "sha": COMMIT, "siblings": siblings}
        described |= {"private": False, "downloads": 0, "likes": 0, "tags": [], "lastModified": None}
        self._answer(200, json.dumps(described).encode(), {"Content-Type": "application/json"})

    def _file(self, path: Path) -> None:
        if not path.is_file():
            self._error(404, "EntryNotFound")
            return
        data = path.read_bytes()
        first, last = (int(end) for end in self.headers["Range"].removeprefix("bytes=").split("-"))
        piece = data[first : last + 1]
        is_weights = path.suffix in (".safetensors", ".gguf")
        if is_weights and self.hub.refuse_after_cut and self.hub.cut_after is None:
            self._error(403, "")
            return
        self.send_response(206)
        self.send_header("Content-Length", str(len(piece)))
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.end_headers()
        end = len(piece)
        if is_weights and self.hub.cut_after is not None and first + len(piece) > self.hub.cut_after:
            end, self.hub.cut_after = max(0, self.hub.cut_after - first), None
        self.wfile.write(piece[:end])
        self.hub.ranges.append((path.name, first, end))
        if end < len(piece):
            self.close_connection = True

    def _error(self, status: int, code: str) -> None:
        self._answer(status, b"{}", {"X-Error-Code": code} if code else {})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

"""The hub's HTTP interface as far as a download needs it, on this machine: a repository is a folder of files."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LATER_COMMIT = "89abcdef0123456789abcdef0123456789abcdef"


# The folder or file that was found, or None; and what was said on standard error.
Found = tuple[Path | None, str]


@dataclass
class FakeHub:
    """A hub with one repository, `org/tiny`, at branch `main` and tag `v1`; everybody may ask what it was asked.

    cut_at: bytes after which the first answer with a file of at least twice as many breaks off; 0 for none.
    token: what a request must bring; "" for nothing. gated: as the hub says that terms are to be accepted.
    down: answers 503 to all. claimed_bytes: how large it says that the file `claimed` is; 0 for the truth.
    lost: a file that it lists and does not have.
    moves_to: what `main` is once it has been asked for: another folder, at LATER_COMMIT. None: it stays.
    """

    folder: Path
    cut_at: int = 0
    token: str = ""
    gated: bool = False
    down: bool = False
    claimed_bytes: int = 0
    claimed: str = "model.safetensors"
    lost: str = ""
    moves_to: Path | None = None
    has_moved: bool = False
    endpoint: str = ""
    asked: list[str] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)
    cuts: int = 0

    def commit_of(self, revision: str) -> str:
        """The commit that a branch or tag is right now."""
        is_later = revision == LATER_COMMIT or (revision == "main" and self.has_moved)
        return LATER_COMMIT if is_later else COMMIT

    def at(self, commit: str) -> Path:
        """The files of a commit."""
        later = self.moves_to if commit == LATER_COMMIT else None
        return later or self.folder


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.asked.append(f"{self.command} {path}")
        if hub.down:
            return self._error(503, "", body)
        if not path.startswith(("/api/models/org/tiny", "/org/tiny/resolve/")):
            return self._error(404 if hub.token else 401, "RepoNotFound", body)
        if hub.token and self.headers.get("authorization") != f"Bearer {hub.token}":
            return self._error(401, "RepoNotFound", body)
        if hub.gated and not path.startswith("/api/models/org/tiny/revision") and path != "/api/models/org/tiny":
            return self._error(403, "GatedRepo", body)
        if path.startswith("/org/tiny/resolve/"):
            revision, _, name = path.removeprefix("/org/tiny/resolve/").partition("/")
            commit = hub.commit_of(revision)
            if name == hub.lost or not (hub.at(commit) / name).is_file():
                return self._error(404, "EntryNotFound", body)
            return self._file(name, commit, body)
        rest = path.removeprefix("/api/models/org/tiny").strip("/")
        kind, _, revision = rest.partition("/")
        if kind and revision.split("/")[0] not in ("main", "v1", COMMIT, LATER_COMMIT):
            return self._error(404, "RevisionNotFound", body)
        commit = hub.commit_of(revision.split("/")[0] if kind else "main")
        folder = hub.at(commit)
        hub.has_moved = hub.moves_to is not None
        sizes = {
            str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()
        }
        if hub.claimed_bytes:
            sizes[hub.claimed] = hub.claimed_bytes
        if kind == "tree":
            return self._json(
                [
                    {"type": "file", "path": name, "size": size, "oid": _etag(folder / name)}
                    for name, size in sizes.items()
                ]
            )
        siblings = [_sibling(name, size, folder / name) for name, size in sizes.items()]
        return self._json({"id": "org/tiny", "modelId": "org/tiny", "sha": commit, "siblings": siblings, "tags": []})

    def _file(self, name: str, commit: str, body: bool) -> None:
        hub, path = self.hub, self.hub.at(commit) / name
        raw = path.read_bytes()
        wanted = self.headers.get("range")
        start = 0
        if wanted:
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            if body and start:
                hub.ranges.append(f"{name} {wanted}")
        part = raw[start:]
        self.send_response(206 if wanted else 200)
        self.send_header("ETag", f'"{_etag(path)}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(part)))
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(raw) - 1}/{len(raw)}")
        self.end_headers()
        if not body:
            return
        if hub.cut_at and len(part) >= 2 * hub.cut_at and not hub.cuts:
            hub.cuts += 1
            part = part[: hub.cut_at]
            self.close_connection = True
        hub.sent[name] = hub.sent.get(name, 0) + len(part)
        self.wfile.write(part)

    def _json(self, value: Any) -> None:
        raw = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def _error(self, status: int, code: str, body: bool) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def names(folder: Path | None) -> set[str]:
    """The files in a folder, by their paths there."""
    assert folder is not None
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def _is_large(path: Path) -> bool:
    """Whether it is kept as git-lfs does."""
    return path.suffix in (".safetensors", ".gguf", ".bin")


def _etag(path: Path) -> str:
    """The hash of its content, which names it in the cache: git's, or git-lfs's."""
    raw = path.read_bytes()
    if _is_large(path):
        return hashlib.sha256(raw).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(raw) + raw, usedforsecurity=False).hexdigest()


def _sibling(name: str, size: int, path: Path) -> dict[str, Any]:
    if not _is_large(path):
        return {"rfilename": name, "size": size, "blobId": _etag(path)}
    lfs = {"sha256": _etag(path), "size": size, "pointerSize": 135}
    return {"rfilename": name, "size": size, "blobId": "0" * 40, "lfs": lfs}


@contextmanager
def serving(folder: Path, **settings: Any) -> Iterator[FakeHub]:
    """The hub of `folder` while inside."""
    hub = FakeHub(folder, **settings)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

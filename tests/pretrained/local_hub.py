"""As much of the Hugging Face hub as a download asks for, on a local port; repositories are folders owner/name."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

COMMIT, TOKEN = "c" * 40, "hf_good"  # a gated model is a folder with a file .gated in it


class Handler(BaseHTTPRequestHandler):
    root: Path
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, status: int, body: object, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        found = re.fullmatch(
            r"(?:/api/models|(?:/api)?/datasets)?/([^/]+/[^/]+)(?:/(revision|tree|resolve)/([^/]+)(?:/(.+))?)?", path
        )
        folder = self.root / found[1] if found else self.root / "none"
        if not folder.is_dir():
            return self.answer(404, {"error": "not found"}, X_Error_Code="RepoNotFound")
        if (folder / ".gated").exists() and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(403, {"error": "gated"}, X_Error_Code="GatedRepo")
        files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
        names = sorted(path.relative_to(folder).as_posix() for path in files)
        if found[2] != "resolve":
            about = {"id": found[1], "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
            rows = [{"type": "file", "path": n, "size": (folder / n).stat().st_size, "oid": "0" * 40} for n in names]
            return self.answer(200, rows if found[2] == "tree" else about | {"_id": "1", "tags": []})
        if found[4] not in names:
            return self.answer(404, {"error": "no file"}, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        data = (folder / found[4]).read_bytes()
        return self.answer(200, data, ETag=f'"{hashlib.sha256(data).hexdigest()}"', X_Repo_Commit=COMMIT)


@contextmanager
def serving(root: Path) -> Iterator[str]:
    """The address of a hub whose models are below the root, inside the `with` block."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Hub", (Handler,), {"root": root}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()

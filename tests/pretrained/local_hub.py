"""As much of the Hugging Face hub as downloads and uploads ask for, on a local port; repositories are owner/name.

A repository's state is in files of its own: `.gated`, `.private`. Uploads go by LFS, as with HF_HUB_DISABLE_XET=1.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

COMMIT, TOKEN = "c" * 40, "hf_good"
ROLES = {TOKEN: "write", "hf_reader": "read", "hf_fine": "fineGrained"}  # of the tokens of the user `me`
LFS = (".safetensors", ".gguf")


class Handler(BaseHTTPRequestHandler):
    """root: where the repositories are. commits: the names of the files of each commit. blobs: what LFS was sent.
    failing: the status with which a path is answered that has this in it. most: how many commits the hub takes."""

    root: Path
    commits: list[list[str]]
    blobs: dict[str, bytes]
    failing: dict[str, int]
    most = 1000
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, status: int, body: object, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    @property
    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    @property
    def path_asked(self) -> str:
        return unquote(urlparse(self.path).path)

    def fails(self) -> bool:
        """Whether this request was answered with what a test makes the hub fail with."""
        status = next((status for part, status in self.failing.items() if part in self.path_asked), 0)
        if status:  # what a hub says may repeat what it was sent
            self.answer(status, {"error": f"failed for {self.token}"}, X_Error_Message=f"no, {self.token}")
        return bool(status)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if self.fails():
            return None
        path = self.path_asked
        if path == "/api/whoami-v2":
            if self.token not in ROLES:
                return self.answer(401, {"error": "Invalid credentials"})
            about = {"type": "user", "name": "me", "orgs": [{"name": "our-group"}]}
            return self.answer(200, about | {"auth": {"accessToken": {"role": ROLES[self.token]}}})
        found = re.fullmatch(
            r"(?:/api/models|(?:/api)?/datasets)?/([^/]+/[^/]+)(?:/(revision|tree|resolve)/([^/]+)(?:/(.+))?)?", path
        )
        folder = self.root / found[1] if found else self.root / "none"
        if not folder.is_dir() or ((folder / ".private").exists() and self.token not in ROLES):
            return self.answer(404, {"error": "not found"}, X_Error_Code="RepoNotFound")
        if (folder / ".gated").exists() and self.token != TOKEN:
            return self.answer(403, {"error": "gated"}, X_Error_Code="GatedRepo")
        files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
        names = sorted(path.relative_to(folder).as_posix() for path in files)
        if found[2] != "resolve":
            about = {"id": found[1], "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
            about |= {"_id": "1", "tags": [], "private": (folder / ".private").exists()}
            rows = [{"type": "file", "path": n, "size": (folder / n).stat().st_size, "oid": "0" * 40} for n in names]
            return self.answer(200, rows if found[2] == "tree" else about)
        if found[4] not in names:
            return self.answer(404, {"error": "no file"}, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        data = (folder / found[4]).read_bytes()
        return self.answer(200, data, ETag=f'"{hashlib.sha256(data).hexdigest()}"', X_Repo_Commit=COMMIT)

    def do_PUT(self) -> None:
        data = self.sent()
        self.blobs[hashlib.sha256(data).hexdigest()] = data
        if not self.fails():
            self.answer(200, b"")

    def do_POST(self) -> None:
        data, path = self.sent(), self.path_asked
        here = f"http://{self.headers['Host']}"
        if self.fails():
            return None
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if ROLES.get(self.token, "read") == "read":
            return self.answer(403, {"error": "You don't have the rights"})
        if path == "/api/repos/create":
            return self.create(json.loads(data), here)
        name = re.search(r"/([^/]+/[^/]+?)(?:\.git|/preupload|/commit)/", path)[1]
        if name.partition("/")[0] != "me":
            return self.answer(403, {"error": "You don't have the rights"})
        if path.endswith(".git/info/lfs/objects/batch"):
            put = [
                {"upload": {"href": f"{here}/put/{each['oid']}?signature=secret"}}
                for each in json.loads(data)["objects"]
            ]
            objects = [
                each | {"actions": actions} for each, actions in zip(json.loads(data)["objects"], put, strict=True)
            ]
            return self.answer(200, {"transfer": "basic", "objects": objects}, Content_Type="application/json")
        if "/preupload/" in path:
            modes = [
                (file["path"], "lfs" if file["path"].endswith(LFS) else "regular") for file in json.loads(data)["files"]
            ]
            return self.answer(200, {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes]})
        return self.commit(name, data, here)

    def create(self, asked: dict, here: str) -> None:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if not name.startswith("me/"):
            return self.answer(403, {"error": "You don't have the rights"})
        if (self.root / name).exists():
            return self.answer(409, {"error": "You already created this repository"})
        (self.root / name).mkdir(parents=True)
        if asked["visibility"] == "private":
            (self.root / name / ".private").touch()
        return self.answer(200, {"url": f"{here}/{name}", "name": name})

    def commit(self, name: str, data: bytes, here: str) -> None:
        if len(self.commits) == self.most:
            return self.answer(500, {"error": f"failed for {self.token}"})
        files = [line["value"] for line in map(json.loads, data.splitlines()) if line["key"] in ("file", "lfsFile")]
        for file in files:
            place = self.root / name / file["path"]
            place.write_bytes(self.blobs[file["oid"]] if "oid" in file else base64.b64decode(file["content"]))
        self.commits.append(sorted(file["path"] for file in files))
        about = {"success": True, "commitOid": COMMIT, "commitUrl": f"{here}/{name}/commit/{COMMIT}", "hookOutput": ""}
        return self.answer(200, about)

    def sent(self) -> bytes:
        if length := self.headers.get("Content-Length"):
            return self.rfile.read(int(length))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data


class Hub(str):
    """The address of a hub, and what tests ask of it."""

    handler: type[Handler]


@contextmanager
def serving(root: Path) -> Iterator[Hub]:
    """The address of a hub whose models are below the root, inside the `with` block."""
    handler = type("Hub", (Handler,), {"root": root, "commits": [], "blobs": {}, "failing": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        address = Hub(f"http://127.0.0.1:{server.server_port}")
        address.handler = handler
        yield address
    finally:
        server.shutdown()
        server.server_close()

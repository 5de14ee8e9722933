"""A Hub on loopback: what huggingface_hub needs to create, commit to and read repos.

Content lies in memory, one commit after another per repo; LFS uploads are checked by their hash.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from unittest.mock import patch
from urllib.parse import parse_qs, unquote

import yaml
from huggingface_hub import constants
from quiet_server import QuietServer

TOKEN = "hf_good"


def is_lfs(path: str) -> bool:
    return path.endswith((".parquet", ".png", ".safetensors"))


def file_entry(path: str, content: bytes) -> dict:
    """A file as the Hub lists it: git's hash of it, and the SHA-256 of what lies in LFS."""
    blob = hashlib.sha1(b"blob %d\0%b" % (len(content), content)).hexdigest()
    entry = {"type": "file", "path": path, "size": len(content), "oid": blob}
    if is_lfs(path):
        sha256 = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 130}
    return entry


def remote_oid(files: dict, path: str) -> str | None:
    """By what a client tells that it need not send a file: SHA-256 in LFS, else git's hash."""
    entry = file_entry(path, files[path]) if path in files else {}
    return entry.get("lfs", entry).get("oid")


def front_matter(card: str) -> dict | None:
    return yaml.safe_load(card.split("\n---\n")[0]) if card.startswith("---\n") else None


class Hub:
    """`repos`: "datasets/me/name" or "models/me/name" -> {path: bytes}; `commits`: summaries."""

    def __init__(self):
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.branches: dict[tuple[str, str], dict[str, bytes]] = {}
        self.tags: dict[str, str] = {}
        self.commits: list[str] = []
        self.sent: list[list[str]] = []  # by commit, the files in it
        self.shas: dict[str, list[str]] = {}  # of every repo, the newest last
        self.blobs: dict[str, bytes] = {}
        self.uploads = 0
        self.drop_uploads = 0
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                hub.route(self, "GET")

            do_POST = do_PUT = do_HEAD = lambda self: hub.route(self, self.command)

        self.server = QuietServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def environment(self, folder: Path, token: str | None = TOKEN) -> dict[str, str]:
        """What makes a stage use this Hub, with its cache below `folder`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(folder / "home"),
            **({"HF_TOKEN": token} if token else {}),
        }

    @contextmanager
    def here(self, folder: Path) -> Iterator[None]:
        """Make this process use this Hub, as `environment` does a new one, token aside."""
        ours = {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(folder / "home/hub"),
            "HF_TOKEN_PATH": str(folder / "home/token"),
        }
        with ExitStack() as stack:
            for name, value in ours.items():
                stack.enter_context(patch.object(constants, name, value))
            yield

    def route(self, request: BaseHTTPRequestHandler, method: str) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        path = unquote(request.path.partition("?")[0])
        if method == "PUT":
            return self.put_blob(request, path, body)
        if not path.startswith("/api/validate") and (
            request.headers.get("Authorization") != f"Bearer {TOKEN}"
        ):
            return self.send(request, 401, {"error": "Invalid username or password."})
        if path == "/api/whoami-v2":
            return self.send(request, 200, {"name": "me", "type": "user", "auth": {}})
        if path == "/api/validate-yaml":
            return self.send(request, 200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(request, json.loads(body))
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.batch(request, json.loads(body))
        match = re.fullmatch(
            r"/(?:api/)?(datasets/|models/)?([^/]+/[^/]+)"
            r"(?:/(preupload|commit|tree|revision|resolve|paths-info|branch|tag)/([^/]+)(?:/(.*))?)?",
            path,
        )
        kind, repo, action, revision, rest = match.groups() if match else (None,) * 5
        name = f"{kind or 'models/'}{repo}"
        if name not in self.repos:
            return self.send(request, 404, {"error": "no"}, {"X-Error-Code": "RepoNotFound"})
        files = self.branches.get((name, revision), self.repos[name])
        if action == "branch":
            self.branches[name, revision] = dict(self.repos[name])
            return self.send(request, 200, {})
        if action == "tag":
            if json.loads(body)["tag"] in self.tags:
                return self.send(request, 409, {"error": "tag exists"})
            self.tags[json.loads(body)["tag"]] = revision
            return self.send(request, 200, {})
        known = ["main", "HEAD", *self.shas[name], *(b for r, b in self.branches if r == name)]
        if revision and revision not in known:
            return self.send(request, 404, {"error": "no"}, {"X-Error-Code": "RevisionNotFound"})
        if action == "preupload":
            asked = json.loads(body)["files"]
            modes = [
                {
                    "path": file["path"],
                    "oid": remote_oid(files, file["path"]),
                    "shouldIgnore": False,
                    "uploadMode": "lfs" if is_lfs(file["path"]) else "regular",
                }
                for file in asked
            ]
            return self.send(request, 200, {"files": modes})
        if action == "commit":
            return self.commit(request, name, files, body)
        if action == "resolve":
            return self.send_file(request, self.sha(name), files, rest)
        if action == "tree":
            recursive = "recursive=true" in request.path.lower()
            return self.send(request, 200, self.entries(files, rest or "", recursive))
        if action == "paths-info":
            wanted = parse_qs(body.decode()).get("paths", [])
            entries = self.entries(files, "", True)
            return self.send(request, 200, [e for e in entries if e["path"] in wanted])
        info = {
            "id": repo,
            "sha": self.sha(name),
            "private": self.private[name],
            "siblings": [{"rfilename": p} for p in files],
            "tags": [],
            "cardData": front_matter(files.get("README.md", b"").decode()),
        }
        return self.send(request, 200, info)

    def entries(self, files: dict, folder: str, recursive: bool) -> list[dict]:
        """Files and folders under `folder`, as the tree endpoint lists them."""
        prefix = f"{folder}/" if folder else ""
        below = [p for p in files if p.startswith(prefix)]
        folders = {p[: p.index("/", len(prefix))] for p in below if "/" in p[len(prefix) :]}
        listed = below if recursive else [p for p in below if "/" not in p[len(prefix) :]]
        return [
            *({"type": "directory", "path": f, "oid": "0" * 40} for f in sorted(folders)),
            *(file_entry(path, files[path]) for path in listed),
        ]

    def sha(self, name: str) -> str:
        return self.shas[name][-1]

    def move_on(self, name: str) -> None:
        number = len(self.shas.setdefault(name, []))
        self.shas[name].append(hashlib.sha1(f"{name}{number}".encode()).hexdigest())

    def put(self, name: str, files: dict[str, bytes]) -> str:
        """Make a public repo, as if pushed by another. Returns its revision."""
        self.repos[name], self.private[name] = files, False
        self.move_on(name)
        return self.sha(name)

    def create(self, request, asked: dict) -> None:
        namespace = asked.get("organization") or "me"
        name = f"{asked.get('type') or 'model'}s/{namespace}/{asked['name']}"
        if namespace != "me":
            return self.send(request, 403, {"error": "no rights in this namespace"})
        if name in self.repos:
            return self.send(request, 409, {"error": "exists", "url": f"{self.url}/{name}"})
        self.put(name, {".gitattributes": b""})
        self.private[name] = asked.get("private", asked.get("visibility") == "private")
        return self.send(request, 200, {"url": f"{self.url}/{name}"})

    def batch(self, request, asked: dict) -> None:
        objects = []
        for wanted in asked["objects"]:
            entry = dict(wanted)
            if wanted["oid"] not in self.blobs:
                entry["actions"] = {"upload": {"href": f"{self.url}/blob/{wanted['oid']}"}}
            objects.append(entry)
        self.send(request, 200, {"transfer": "basic", "objects": objects})

    def put_blob(self, request, path: str, body: bytes) -> None:
        if self.drop_uploads:
            self.drop_uploads -= 1
            request.close_connection = True
            request.connection.close()
            return
        oid = path.rpartition("/")[2]
        assert hashlib.sha256(body).hexdigest() == oid
        self.blobs[oid] = body
        self.uploads += 1
        self.send(request, 200, {})

    def commit(self, request, name: str, files: dict, body: bytes) -> None:
        self.sent.append([])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            self.sent[-1] += [value["path"]] if line["key"] in ("file", "lfsFile") else []
            if line["key"] == "header":
                self.commits.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                files.pop(value["path"], None)
        self.move_on(name)
        url = f"{self.url}/{name.removeprefix('models/')}/commit/{self.sha(name)}"
        self.send(request, 200, {"commitUrl": url, "commitOid": self.sha(name), "success": True})

    def send_file(self, request, commit: str, files: dict, path: str) -> None:
        if path not in files:
            return self.send(request, 404, {"error": "no"}, {"X-Error-Code": "EntryNotFound"})
        content = files[path]
        request.send_response(200)
        request.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        request.send_header("X-Repo-Commit", commit)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(content)

    def send(self, request, status: int, body: object, headers: dict | None = None) -> None:
        data = json.dumps(body).encode()
        request.send_response(status)
        for key, value in {"Content-Type": "application/json", **(headers or {})}.items():
            request.send_header(key, value)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(data)

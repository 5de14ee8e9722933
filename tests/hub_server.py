"""A Hub on loopback: what huggingface_hub needs to create, commit to and read repos.

Content lies in memory, one commit after another per repo; LFS uploads are checked by their hash.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from unittest.mock import patch
from urllib.parse import parse_qs, unquote

from huggingface_hub import RepoCard, constants
from quiet_server import QuietHandler, Stub

TOKEN = "hf_good"
ROUTE = re.compile(
    r"/(?:api/)?(datasets/|models/)?([^/]+/[^/]+)"
    r"(?:/(refs)|/(preupload|commit|tree|revision|resolve|paths-info|branch|tag)/([^/]+)(?:/(.*))?)?"
)


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


class Hub(Stub):
    """`repos`: "datasets/me/name" or "models/me/name" -> {path: bytes}, of another branch than main
    "datasets/me/name@branch"; `commits`: summaries."""

    def __init__(self):
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.commits: list[str] = []
        self.sent: list[list[str]] = []  # by commit, the files in it
        self.shas: dict[str, list[str]] = {}  # of every repo, the newest last
        self.tags: dict[str, dict[str, str]] = {}  # of every repo, name -> commit
        self.blobs: dict[str, bytes] = {}
        self.uploads = self.drop_uploads = 0
        self.before_commit: list = []  # functions, the last called before the next commit
        hub = self

        class Handler(QuietHandler):
            protocol_version = "HTTP/1.1"
            do_GET = do_POST = do_PUT = do_HEAD = lambda self: hub.route(self)

        self.serve(Handler)

    def environment(self, folder: Path, token: str = TOKEN) -> dict[str, str]:
        """What makes a stage use this Hub, with its cache below `folder`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(folder / "home"),
            "HF_TOKEN": token,
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

    def sha(self, name: str) -> str:
        return self.shas[name][-1]

    def move_on(self, name: str) -> None:
        shas = self.shas.setdefault(name, [])
        number = len(shas)
        shas.append(hashlib.sha1(f"{name}{number}".encode()).hexdigest())

    def put(self, name: str, files: dict[str, bytes]) -> str:
        """Make a public repo, as if pushed by another. Returns its revision."""
        self.repos[name], self.private[name] = files, False
        self.move_on(name)
        return self.sha(name)

    def route(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        path = unquote(request.path.partition("?")[0])
        if request.command == "PUT":
            self.put_blob(request, path, body)
        elif path == "/api/validate-yaml":
            self.send(request, 200, {"errors": [], "warnings": []})
        elif request.headers.get("Authorization") != f"Bearer {TOKEN}" and not (
            request.command in ("GET", "HEAD")
            and request.headers.get("Authorization") is None
            and self.is_public(path)
        ):
            # Without a token the Hub does not tell a private repo from one that is not there.
            hidden = (
                {} if request.headers.get("Authorization") else {"X-Error-Code": "RepoNotFound"}
            )
            self.send(request, 401, {"error": "Invalid username or password."}, hidden)
        elif path == "/api/whoami-v2":
            self.send(request, 200, {"name": "me", "type": "user", "auth": {}})
        elif path == "/api/repos/create":
            self.create(request, json.loads(body))
        elif path.endswith(".git/info/lfs/objects/batch"):
            self.batch(request, json.loads(body))
        else:
            self.route_repo(request, path, body)

    def is_public(self, path: str) -> bool:
        """Whether a path is of a repo that is read without a token."""
        match = ROUTE.fullmatch(path)
        return bool(match) and self.private.get(f"{match[1] or 'models/'}{match[2]}") is False

    def route_repo(self, request, path: str, body: bytes) -> None:
        """What is asked of one repo."""
        match = ROUTE.fullmatch(path)
        kind, repo, refs, action, revision, rest = match.groups() if match else (None,) * 6
        repo_name = f"{kind or 'models/'}{repo}"
        if repo_name not in self.repos:
            return self.send(request, 404, {"error": "no"}, {"X-Error-Code": "RepoNotFound"})
        if refs or action == "branch":
            return self.send_refs(request, repo_name, revision, body)
        name = self.branch_of(repo_name, revision)
        if not name:
            return self.send(request, 404, {"error": "no"}, {"X-Error-Code": "RevisionNotFound"})
        if action == "tag":
            self.tags.setdefault(repo_name, {})[json.loads(body)["tag"]] = revision
            return self.send(request, 200, {})
        files = self.repos[name]
        if action == "commit":
            return self.commit(request, name, files, body)
        if action == "resolve":
            return self.send_file(request, self.sha(name), files, rest)
        if action == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            answer = {"files": [self.upload_mode(files, path) for path in paths]}
        elif action == "tree":
            answer = self.entries(files, rest or "", "recursive=true" in request.path.lower())
        elif action == "paths-info":
            paths = parse_qs(body.decode()).get("paths", [])
            answer = [file_entry(path, files[path]) for path in paths if path in files]
        else:
            try:
                card = RepoCard(files.get("README.md", b"").decode())
            except Exception:  # the Hub passes over a card that is none
                card = RepoCard("---\n{}\n---\n")
            about = {"id": repo, "sha": self.sha(name), "tags": []}
            about["private"] = self.private[repo_name]
            names = [{"rfilename": path} for path in files]
            answer = {**about, "siblings": names, "cardData": card.data.to_dict()}
        return self.send(request, 200, answer)

    def branch_of(self, repo_name: str, revision: str | None) -> str | None:
        """The key in `repos` that a branch or a commit belongs to; None if there is none."""
        if revision in (None, "main", "HEAD", *self.shas[repo_name]):
            return repo_name
        branches = [name for name in self.repos if name.startswith(f"{repo_name}@")]
        named = [n for n in branches if n == f"{repo_name}@{revision}" or revision in self.shas[n]]
        return named[0] if named else None

    def send_refs(self, request, repo_name: str, branch: str | None, body: bytes) -> None:
        """The branches and tags of a repo, or a new branch from the commit that is asked for."""
        if branch:
            start = self.branch_of(repo_name, json.loads(body)["startingPoint"])
            name = f"{repo_name}@{branch}"
            self.repos[name], self.shas[name] = dict(self.repos[start]), [self.sha(start)]
            return self.send(request, 200, {})
        branches = [{"name": "main", "ref": "refs/heads/main"} | self.target(repo_name)]
        for name in self.repos:
            repo, _, branch = name.partition("@")
            if repo == repo_name and branch:
                branches.append({"name": branch, "ref": f"refs/heads/{branch}"} | self.target(name))
        tags = [
            {"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": sha}
            for tag, sha in self.tags.get(repo_name, {}).items()
        ]
        return self.send(request, 200, {"branches": branches, "tags": tags, "converts": []})

    def target(self, name: str) -> dict[str, str]:
        return {"targetCommit": self.sha(name)}

    def upload_mode(self, files: dict, path: str) -> dict:
        """How to send a file; "oid" tells that it need not be: SHA-256 in LFS, else of git."""
        entry = file_entry(path, files[path]) if path in files else {}
        mode = {"path": path, "oid": entry.get("lfs", entry).get("oid"), "shouldIgnore": False}
        return mode | {"uploadMode": "lfs" if is_lfs(path) else "regular"}

    def entries(self, files: dict, folder: str, recursive: bool) -> list[dict]:
        """Files and folders under `folder`, as the tree endpoint lists them."""
        prefix = f"{folder}/" if folder else ""
        below = [p for p in files if p.startswith(prefix)]
        folders = {p[: p.index("/", len(prefix))] for p in below if "/" in p[len(prefix) :]}
        listed = [p for p in below if recursive or "/" not in p[len(prefix) :]]
        return [
            *({"type": "directory", "path": f, "oid": "0" * 40} for f in sorted(folders)),
            *(file_entry(path, files[path]) for path in listed),
        ]

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
        objects = [dict(wanted) for wanted in asked["objects"]]
        for entry in objects:
            if entry["oid"] not in self.blobs:
                entry["actions"] = {"upload": {"href": f"{self.url}/blob/{entry['oid']}"}}
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
        header, *changes = map(json.loads, body.splitlines())
        if self.before_commit:  # what another does just before
            self.before_commit.pop()()
        if header["value"].get("parentCommit", self.sha(name)) != self.sha(name):
            return self.send(request, 412, {"error": "the branch has moved"})
        self.commits.append(header["value"]["summary"])
        self.sent.append([])
        for change in changes:
            path, content = change["value"]["path"], change["value"].get("content")
            if change["key"] == "deletedFile":
                files.pop(path, None)
                continue
            lfs = change["key"] == "lfsFile"
            files[path] = self.blobs[change["value"]["oid"]] if lfs else base64.b64decode(content)
            self.sent[-1].append(path)
        self.move_on(name)
        url = f"{self.url}/{name.removeprefix('models/')}/commit/{self.sha(name)}"
        self.send(request, 200, {"commitUrl": url, "commitOid": self.sha(name), "success": True})

    def send_file(self, request, commit: str, files: dict, path: str) -> None:
        if path not in files:
            return self.send(request, 404, {"error": "no"}, {"X-Error-Code": "EntryNotFound"})
        etag = f'"{hashlib.sha1(files[path]).hexdigest()}"'
        return self.send(request, 200, files[path], {"ETag": etag, "X-Repo-Commit": commit})

    def send(self, request, status: int, body: object, headers: dict | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request.send_response(status)
        for key, value in {"Content-Type": "application/json", **(headers or {})}.items():
            request.send_header(key, value)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(data)

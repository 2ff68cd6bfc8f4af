"""A stand-in for the hub's kernels: real HTTP on 127.0.0.1, and a kernel that the `kernels` package loads.

with KernelHub() as hub:
    environment = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": folder}

Its FlashAttention-3 is written in Python, with an explicit mask, for every device.
"""

import hashlib
import json
import time
from http.server import BaseHTTPRequestHandler

from helpers.loopback import Loopback

REPOSITORY = "kernels-community/flash-attn3"
COMMIT = "1" * 40
BUILD = "build/torch-universal"

METADATA = {
    "name": "flash-attn3",
    "id": "_flash_attn3_of_the_tests",
    "version": 1,
    "license": "BSD-3-Clause",
    "python-depends": [],
    "backend": {"type": "cpu"},
}
KERNEL = '''"""FlashAttention's interface."""

import torch


def flash_attn_func(q, k, v, causal=False, window_size=(-1, -1)):
    before, after = window_size  # a query at i sees keys from i - before to i + after
    distance = torch.arange(q.size(1))[:, None] - torch.arange(k.size(1))
    visible = torch.ones_like(distance, dtype=torch.bool)
    if before >= 0:
        visible &= distance <= before
    if after >= 0:
        visible &= distance >= -after
    if causal:
        visible &= distance >= 0
    scores = torch.einsum("bqnh,bknh->bnqk", q, k) / q.size(-1) ** 0.5
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("bnqk,bknh->bqnh", weights, v)
'''
WITHOUT_WINDOW = KERNEL.replace("if before >= 0:", "if False:")


class KernelHub(Loopback):
    """Serves one repository. `requests` are "METHOD path" as they came in."""

    def __init__(self, kernel: str = KERNEL, manner: str = "fine"):
        self.files = {
            f"{BUILD}/metadata.json": json.dumps(METADATA).encode(),
            f"{BUILD}/__init__.py": kernel.encode(),
        }
        self.manner = manner  # "silent": it never answers; "half": it lacks the code that it announces
        self.requests: list[str] = []
        super().__init__(Handler)

    def answer(self, path: str) -> bytes | None:
        """What is at a path, None for nothing."""
        api = f"/api/kernels/{REPOSITORY}"
        resolved = f"/{path}".partition(f"/kernels/{REPOSITORY}/resolve/{COMMIT}/")[2]
        if resolved:
            is_lacking = self.manner == "half" and resolved.endswith(".py")
            return None if is_lacking else self.files.get(resolved)
        branches = [{"name": "v1", "ref": "refs/heads/v1", "targetCommit": COMMIT}]
        tree = [{"type": "directory", "path": BUILD, "oid": COMMIT}]
        for name, content in self.files.items():
            entry = {"type": "file", "path": name, "size": len(content), "oid": git_hash(content)}
            tree.append(entry)
        answers = {
            "/": {},
            "/api/organizations/kernels-community/overview": {
                "name": "kernels-community",
                "fullname": "kernels-community",
                "trustedKernelPublisher": True,
            },
            f"{api}/refs": {"branches": branches, "converts": [], "tags": []},
            f"{api}/tree/{COMMIT}/build": [entry for entry in tree if entry["type"] == "directory"],
            f"{api}/tree/{COMMIT}": tree,
            f"{api}/revision/{COMMIT}": {"id": REPOSITORY, "sha": COMMIT},
        }
        return json.dumps(answers[path]).encode() if path in answers else None


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub = self.server.hub
        path = self.path.partition("?")[0]
        hub.requests.append(f"{self.command} {path}")
        if hub.manner == "silent":
            time.sleep(60)
        body = hub.answer(path)
        self.send_response(404 if body is None else 200)
        body = body or b"{}"
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{git_hash(body)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

"""A stand-in for huggingface.co: real HTTP on loopback that serves real parquet, and misbehaves when told to.

with Hub() as hub:
    hub.files[CLIMBMIX.format(0)] = parquet(["some text"])
    hub.manners[CLIMBMIX.format(0)] = iter(["cut"])     # the first request; after that everything is fine
    main("--data", "climbmix", **hub.environment(folder))
    assert hub.requests == [...]

Like the real one it refuses whoever sends credentials that it does not know, and it knows none.
"""

import hashlib
import io
import random
import re
import socket
import struct
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from helpers.loopback import Loopback

CLIMBMIX = "datasets/karpathy/climbmix-400b-shuffle/resolve/main/shard_{:05d}.parquet"
CLIMBMIX_VALIDATION = CLIMBMIX.format(6542)
TINYSTORIES = "datasets/karpathy/tinystories-gpt4-clean/resolve/main/tinystories_gpt4_clean.parquet"


def parquet(texts: list, ballast: int = 0, column: str = "text") -> bytes:
    """A parquet file; `ballast` bytes of another column make it large without making it slow."""
    columns = {column: pa.array(texts)}
    if ballast:
        size = -(-ballast // len(texts))
        columns["ballast"] = pa.array([random.Random(i).randbytes(size) for i in range(len(texts))])
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


class Request(NamedTuple):
    name: str
    range: str | None
    status: int  # of the answer; 0 if there was none


class Hub(Loopback):
    """`files` by path, `manners` by path (an iterator, one a request), and `requests` as they came in."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.manners: dict[str, Iterator[str]] = {}
        self.requests: list[Request] = []
        self.release = threading.Event()
        super().__init__(Handler)

    def environment(self, cache: Path) -> dict[str, str]:
        """The variables with which prepare.py finds this hub."""
        return {"AUTORESEARCH_CACHE": str(cache), "HF_ENDPOINT": self.endpoint, "NO_PROXY": "*"}

    def names(self) -> list[str]:
        """The files that were asked for since the last call."""
        names = [request.name for request in self.requests]
        self.requests.clear()
        return names

    def __exit__(self, *error: object) -> None:
        self.release.set()
        super().__exit__(*error)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        hub = self.server.hub
        name = self.path.lstrip("/")
        manner = next(hub.manners.get(name, iter(())), "fine")
        asked = self.headers.get("Range")
        self.body = hub.files.get(name.removeprefix("cdn/"), b"")
        self.partial = {}
        if manner == "hold":  # nothing comes before the test says so
            hub.requests.append(Request(name, asked, 0))
            hub.release.wait()
            return self.answer(200, len(self.body), self.body)

        start = 0
        status = 200
        if self.headers.get("Authorization"):
            status = 401
        elif not self.body or manner == "404":
            status = 404
        elif manner.isdigit():
            status = int(manner)
        elif manner.startswith("redirect"):
            status = 302
        elif manner == "partial from the start":
            status = 206
        elif asked and manner != "no ranges" and self.headers.get("If-Range", self.etag) == self.etag:
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            status = 206
        hub.requests.append(Request(name, asked, 0 if manner == "no answer" else status))
        if status == 206:
            self.partial["Content-Range"] = f"bytes {start}-{len(self.body) - 1}/{len(self.body)}"
        self.behave(manner, status, self.body[start:])

    def behave(self, manner: str, status: int, body: bytes) -> None:
        half = body[: len(body) // 2]
        match manner:
            case "no answer":
                self.hang_up(reset=True)
            case "fine" | "partial from the start" if status < 400:
                self.answer(status, len(body), body)
            case "no ranges":
                self.answer(200, len(body), body, ETag=None)
            case "cut":
                self.answer(status, len(body), half, close=True)
            case "reset":
                self.answer(status, len(body), half, reset=True)
            case "announced too short":
                self.answer(status, len(half), body, close=True)
            case "more than announced":
                self.answer(status, len(body), body + body, close=True)
            case "no length":
                self.answer(status, None, body, close=True)
            case "no length, cut":
                self.answer(status, None, half, close=True)
            case "chunked" | "chunked, cut":
                chunks = [body[i : i + 2**16] for i in range(0, len(body), 2**16)]
                framed = [b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks]
                framed = [*framed, b"0\r\n\r\n"] if manner == "chunked" else framed[: len(framed) // 2]
                self.answer(status, None, b"".join(framed), close=True, Transfer_Encoding="chunked")
            case "stalled":
                self.answer(status, len(body), half, hold=True)
            case "html":
                page = b"<!DOCTYPE html><title>Sign in to the wireless network</title>" * 100
                self.answer(200, len(page), page, Content_Type="text/html")
            case "redirect":
                self.answer(302, 0, b"", Location=f"/cdn/{self.path.lstrip('/')}")
            case "redirect to itself":
                self.answer(302, 0, b"", Location=self.path)
            case "429":
                self.answer(429, 0, b"", Retry_After="3")
            case _:
                self.answer(status, 0, b"")

    @property
    def etag(self) -> str:
        return f'"{hashlib.sha256(self.body).hexdigest()}"'

    def answer(
        self, status: int, length: int | None, body: bytes, close=False, reset=False, hold=False, **more
    ) -> None:
        headers = {"ETag": self.etag} | self.partial
        headers |= {name.replace("_", "-"): value for name, value in more.items()}
        headers |= {"Content-Length": length, "Connection": "close" if close else None}
        self.send_response(status)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()
        if hold:
            self.server.hub.release.wait()
        if close or reset or hold:
            self.hang_up(reset)

    def hang_up(self, reset: bool) -> None:
        self.close_connection = True
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

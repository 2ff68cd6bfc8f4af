"""`python prepare.py ARGUMENTS` in a tenth of a second, by the fork server.

with Forks(folder) as forks:
    result = forks.run("--data", corpus, env={"AUTORESEARCH_CACHE": cache}, first="code to run before it")
"""

import contextlib
import os
import signal
from pathlib import Path

from helpers.fork_server import ROOT, Request, ask


class Job:
    """One process, which has begun; its folder gets stdout and stderr."""

    def __init__(self, folder: Path, request: Request):
        self.folder = folder
        self.args = request.arguments
        self.returncode: int | None = None
        self.stdout = self.stderr = ""
        folder.mkdir(parents=True)
        with (
            open(os.devnull) as stdin,
            open(folder / "stdout", "w") as stdout,
            open(folder / "stderr", "w") as stderr,
        ):
            self.connection = ask(request, (stdin.fileno(), stdout.fileno(), stderr.fileno()))
        self.answers = self.connection.makefile()
        self.connection.settimeout(60)
        self.pid = int(self.answers.readline())

    def kill(self, number: int = signal.SIGKILL) -> None:
        with contextlib.suppress(OSError):  # it has ended
            self.connection.send(bytes([number]))

    def wait(self, timeout: float = 60) -> "Job":
        self.connection.settimeout(timeout)
        try:
            self.returncode = int(self.answers.readline())
        except TimeoutError:
            raise AssertionError(f"{self.args}: has not ended after {timeout} s") from None
        self.stdout = (self.folder / "stdout").read_text(errors="replace")
        self.stderr = (self.folder / "stderr").read_text(errors="replace")
        self.close()
        return self

    def close(self) -> None:
        """Kills it, if it goes on."""
        self.answers.close()
        self.connection.close()


class Forks:
    def __init__(self, folder: Path):
        self.folder = folder
        self.jobs: list[Job] = []

    def start(self, *arguments: object, env: dict | None = None, first: str = "") -> Job:
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        for name, value in (env or {}).items():
            environment[name] = str(value)
        command = ["prepare.py", *map(str, arguments)]
        request = Request(str(ROOT), environment, command, first)
        self.jobs.append(Job(self.folder / f"job-{len(self.jobs)}", request))
        return self.jobs[-1]

    def run(self, *arguments: object, env: dict | None = None, first: str = "", timeout: float = 60) -> Job:
        return self.start(*arguments, env=env, first=first).wait(timeout)

    def __enter__(self) -> "Forks":
        return self

    def __exit__(self, *_: object) -> None:
        for job in self.jobs:
            job.close()

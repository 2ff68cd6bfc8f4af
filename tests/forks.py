"""`python prepare.py ARGUMENTS` in a tenth of a second: forked from a process that has imported torch already.

    with Forks(folder) as forks:
        result = forks.run("--data", corpus, env={"AUTORESEARCH_CACHE": cache}, first="code to run before the script")

The script is run as `__main__` in a process of its own: arguments, environment, exit code, output and signals are real.
"""

import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class Job:
    """One process; its folder gets stdout, stderr, pid and, when it has ended, its exit code."""

    def __init__(self, folder: Path, command: list):
        self.folder, self.args, self.returncode = folder, command, None

    def read(self, name: str, timeout: float) -> str:
        """A file of the folder, as soon as it is there."""
        deadline = time.monotonic() + timeout
        while not (self.folder / name).exists():
            assert time.monotonic() < deadline, f"{self.args}: no {name} after {timeout} s"
            time.sleep(0.002)
        return (self.folder / name).read_text(errors="replace")

    def kill(self, number: int = signal.SIGKILL) -> None:
        pid = int(self.read("pid", 60))
        with contextlib.suppress(ProcessLookupError):
            if not (self.folder / "returncode").exists():
                os.kill(pid, number)

    def wait(self, timeout: float = 60) -> "Job":
        self.returncode = int(self.read("returncode", timeout))
        self.stdout, self.stderr = self.read("stdout", 0.0), self.read("stderr", 0.0)
        return self


class Forks:
    def __init__(self, folder: Path):
        self.folder, self.jobs = folder, []
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-W", "ignore", __file__]  # 3.12 warns of forks where numpy has threads
        self.server = subprocess.Popen(
            command, stdin=subprocess.PIPE, text=True, cwd=ROOT, env=environment, start_new_session=True
        )

    def start(self, *arguments: object, env: dict | None = None, first: str = "") -> Job:
        job = Job(self.folder / f"job-{len(self.jobs)}", list(map(str, arguments)))
        job.folder.mkdir(parents=True)
        self.jobs.append(job)
        environment = {name: str(value) for name, value in (env or {}).items()}
        print(json.dumps([str(job.folder), job.args, environment, first]), file=self.server.stdin, flush=True)
        return job

    def run(self, *arguments: object, env: dict | None = None, first: str = "", timeout: float = 60) -> Job:
        return self.start(*arguments, env=env, first=first).wait(timeout)

    def __enter__(self) -> "Forks":
        return self

    def __exit__(self, *_: object) -> None:
        for job in self.jobs:
            job.kill()
        self.server.stdin.close()
        self.server.wait()


def published(path: Path, text: object) -> None:
    path.with_suffix(".new").write_text(str(text))
    path.with_suffix(".new").rename(path)


def serve(lines: Iterator[str]) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the parents of the jobs
    line = next((line for line in lines if os.fork() == 0), None)
    if line is None:
        return
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    folder, arguments, environment, first = json.loads(line)
    folder = Path(folder)
    for number, name in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_RDWR | os.O_CREAT), number)
    if pid := os.fork():
        published(folder / "pid", pid)
        published(folder / "returncode", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        os._exit(0)
    os.environ.update(environment)
    sys.argv = ["prepare.py", *arguments]
    exec(first, {})
    runpy.run_path("prepare.py", run_name="__main__")


if __name__ == "__main__":
    import concurrent.futures.thread  # noqa: F401

    import pyarrow.parquet  # noqa: F401
    import requests  # noqa: F401
    import rustbpe  # noqa: F401
    import tiktoken  # noqa: F401
    import torch  # noqa: F401

    serve(iter(sys.stdin.readline, ""))

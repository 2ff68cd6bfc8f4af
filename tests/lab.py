"""A real git repository with prepare.py, a train.py that takes a moment, and a `uv` on PATH that runs them.

`uv run train.py ...` is forked from a process that has imported torch already, with a training budget of BUDGET
seconds; arguments, environment, output, exit code and signals are real. Kill the shim, and its run is killed as well.
"""

import atexit
import contextlib
import fcntl
import functools
import gc
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUDGET, PROBES, ROWS = 0.2, 6, 64  # seconds of training; fewer probes and validation rows than usual, for speed
COLUMNS = "commit val_bpb memory_gb status description seed code fingerprint seconds".split()

# deterministic for one code and seed: all of the learning happens in the first step. RUN_HOLD=FILE makes a run wait
TRAIN = '''"""A tiny language model: token embedding and head."""

import os
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from prepare import MAX_SEQ_LEN, VOCAB_SIZE, Experiment, Tokenizer, evaluate_bpb, make_dataloader

STEPS = 4  # of Adam
LR = 0.05
WIDTH = 8


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = torch.nn.Embedding(VOCAB_SIZE, WIDTH)
        self.lm_head = torch.nn.Linear(WIDTH, VOCAB_SIZE)

    def forward(self, inputs):
        return self.lm_head(self.wte(inputs))


def train(run):
    tokenizer = Tokenizer.from_directory()
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    loader = make_dataloader(tokenizer, 4, MAX_SEQ_LEN)
    for _ in run.steps():
        for _ in range(STEPS):
            inputs, targets, _ = next(loader)
            loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        break
    if hold := os.environ.get("RUN_HOLD"):
        Path(hold).touch()
        while Path(hold).exists():
            time.sleep(0.005)
    evaluate_bpb(model, tokenizer, 16)
    run.summary(num_steps=STEPS)


def main():
    with Experiment(" ".join(sys.argv[1:])) as run:
        train(run)
    return run.exit_code


if __name__ == "__main__":
    sys.exit(main())
'''

SHIM = '''#!{python} -IS
import json, os, signal, socket, sys
if sys.argv[1:2] != ["run"]:
    sys.exit(f"this uv only knows: uv run FILE, not {{sys.argv[1:]}}")
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
for number in (signal.SIGINT, signal.SIGTERM):
    if signal.getsignal(number) != signal.SIG_IGN:
        signal.signal(number, lambda number, _: server.send(bytes([number])))
request = json.dumps([os.getcwd(), dict(os.environ), sys.argv[2:]]).encode()
socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2])
server.sendall(request)
answer = server.recv(1)
os._exit(answer[0] if answer else 255)
'''


def serve(address: str) -> list[str] | None:
    """Fork for every request; returns in the child that is to run it, or None when stdin ends."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
            client, _ = listener.accept()
            if os.fork() == 0:
                break
            client.close()
        else:
            return None
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    length, fds, _, _ = socket.recv_fds(client, 8, 3)
    request = client.recv(int.from_bytes(length, "big"), socket.MSG_WAITALL)
    if pid := os.fork():

        def forward() -> None:  # signals; without the shim, the last of them
            while number := client.recv(1):
                os.kill(pid, number[0])
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

        threading.Thread(target=forward, daemon=True).start()
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with contextlib.suppress(BrokenPipeError):
            client.send(bytes([code if code >= 0 else 128 - code]))
        os._exit(0)
    client.close()
    os.setsid()
    for number, fd in enumerate(fds):
        os.dup2(fd, number)
        os.close(fd)
    folder, environment, arguments = json.loads(request)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    return arguments


def run_script(arguments: list[str]) -> None:
    """What `python ARGUMENTS` does, with a shorter budget."""
    sys.argv, sys.path[0] = arguments, str(Path(arguments[0]).resolve().parent)
    if Path(arguments[0]).name == "train.py":
        import prepare

        prepare.TIME_BUDGET, prepare.PROBES = BUDGET, PROBES
        prepare._CONSTANTS, rows = prepare.constants(), prepare.Prepared.rows.func
        prepare.Prepared.rows = functools.cached_property(lambda prepared: rows(prepared)[:ROWS])
        prepare.Prepared.rows.__set_name__(prepare.Prepared, "rows")
        if grace := os.environ.get("RUN_GRACE"):  # for the watchdog alone, so that the fingerprint stays
            watch = prepare.Experiment._watch
            prepare.Experiment._watch = lambda run: (setattr(prepare, "GRACE", float(grace)), watch(run))
    code = 1
    try:
        runpy.run_path(arguments[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    os._exit(code)  # taking torch apart costs two seconds


@functools.cache
def shims() -> Path:
    """The folder with `uv`; its server ends with this process."""
    folder = Path(tempfile.mkdtemp(prefix="autoresearch-uv-"))
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", __file__, str(folder / "socket")]  # 3.12 warns of forks beside threads
    server = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, start_new_session=True)
    (folder / "uv").write_text(SHIM.format(python=sys.executable, address=str(folder / "socket")))
    (folder / "uv").chmod(0o755)

    def end() -> None:
        server.stdin.close()
        server.wait()
        shutil.rmtree(folder)

    atexit.register(end)
    wait_for((folder / "socket").exists, 60)
    return folder


def wait_for(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain"
        time.sleep(0.005)


def environment(**more: str) -> dict[str, str]:
    """No configuration of this user or machine, and nothing of a git that may have started the tests."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_") and name != "SEED"}
    git = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    return own | git | {"PATH": f"{shims()}{os.pathsep}{os.environ['PATH']}"} | more


class Outcome:
    """What a run printed, and its verdict: the last line."""

    def __init__(self, code: int, output: str, errors: str):
        self.code, self.output, self.errors = code, output, errors
        self.status = self.next = ""
        last = (output.splitlines() or [""])[-1]
        if last.startswith("status: "):
            self.status, self.next = (part.strip() for part in last.removeprefix("status: ").split("next: ", 1))


class Lab:
    """A folder of a repository that holds the two scripts; commands run in it by bash."""

    def __init__(self, folder: Path, **env: str):
        self.folder, self.env = folder, environment(**env)
        self.results, self.train = folder / "results.tsv", folder / "train.py"

    @classmethod
    def create(cls, folder: Path, sub: str = ".", identity: bool = True) -> "Lab":
        """A new repository with one commit; `sub` is where the scripts are."""
        lab = cls(folder / sub)
        lab.folder.mkdir(parents=True)
        for name in ("prepare.py", "program.md", ".gitignore"):
            shutil.copy(ROOT / name, lab.folder)
        lab.train.write_text(TRAIN)
        subprocess.run(["git", "init", "-q", "-b", "main", str(folder)], check=True, env=lab.env)
        if identity:
            lab.git("config", "user.name", "Ada")
            lab.git("config", "user.email", "ada@example.org")
        lab.git("add", "-A")
        lab.git("-c", "user.name=Ada", "-c", "user.email=ada@example.org", "commit", "-qm", "begin")
        return lab

    def sh(self, command: str, check: bool = True, timeout: float = 60, **env: str) -> Outcome:
        """A command as somebody would paste it."""
        options = {"cwd": self.folder, "env": self.env | env, "capture_output": True, "timeout": timeout}
        done = subprocess.run(["bash", "-c", command], stdin=subprocess.DEVNULL, **options)
        outcome = Outcome(done.returncode, done.stdout.decode(), done.stderr.decode())
        assert not check or outcome.code == 0, f"{command}: {outcome.code}\n{outcome.output}{outcome.errors}"
        return outcome

    def git(self, *command: str, env: dict | None = None) -> str:
        options = {"cwd": self.folder, "env": self.env | (env or {}), "check": True, "capture_output": True}
        return subprocess.run(["git", *command], **options).stdout.decode().strip()

    def run(self, description: str = "", **env: str) -> Outcome:
        """`uv run train.py DESCRIPTION`, which may fail; the description gets there without a shell."""
        return self.start(description, **env).wait()

    def start(self, description: str = "", **env: str) -> "Running":
        return Running(self, ["uv", "run", "train.py", *([description] if description else [])], env)

    def edit(self, *changes: tuple[str, str]) -> None:
        """Replace text in train.py."""
        text = self.train.read_text()
        for before, after in changes:
            assert text.count(before) == 1, before
            text = text.replace(before, after)
        self.train.write_text(text)

    def rows(self) -> list[dict[str, str]]:
        header, *lines = self.results.read_text().splitlines()
        assert header.split("\t") == COLUMNS
        return [dict(zip(COLUMNS, line.split("\t"), strict=True)) for line in lines]

    def state(self) -> tuple[str, ...]:
        """Branch, commit, index and work tree."""
        index = Path(self.git("rev-parse", "--absolute-git-dir")) / "index"
        tree = self.git("status", "--porcelain", "-uall"), self.git("diff"), self.git("diff", "--cached")
        head = self.git("rev-parse", "--symbolic-full-name", "HEAD"), self.git("rev-parse", "HEAD"), self.git("branch")
        return *head, *tree, index.read_bytes().hex(), self.git("stash", "list"), self.train.read_text()

    def saved(self, commit: str) -> str:
        """The train.py of a commit."""
        return self.git("show", f"{commit}:./train.py") + "\n"

    def lock_is_free(self) -> bool:
        lock = Path(self.git("rev-parse", "--absolute-git-dir")) / "autoresearch" / "lock"
        with open(lock) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True


class Running:
    """A run that has been started. While its RUN_HOLD exists, it is in the middle of its training."""

    def __init__(self, lab: Lab, command: list[str], env: dict[str, str]):
        self.lab, self.hold = lab, lab.env.get("RUN_HOLD") or env.get("RUN_HOLD")
        options = {"cwd": lab.folder, "env": lab.env | env, "stdin": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)

    def reached(self) -> "Running":
        wait_for(Path(self.hold).exists)
        return self

    def released(self) -> Outcome:
        Path(self.hold).unlink()
        return self.wait()

    def wait(self) -> Outcome:
        output, errors = self.process.communicate(timeout=60)
        return Outcome(self.process.returncode, output.decode(), errors.decode())

    def killed(self) -> Outcome:
        """By SIGKILL, the run too."""
        self.process.kill()
        outcome = self.wait()
        wait_for(self.lab.lock_is_free)
        return outcome


if __name__ == "__main__":
    import concurrent.futures.thread  # noqa: F401

    import matplotlib
    import numpy  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import tiktoken  # noqa: F401
    import torch
    import torch._dynamo  # noqa: F401  # by the first optimizer
    import tqdm  # noqa: F401

    matplotlib.use("Agg")
    import matplotlib.pyplot  # noqa: F401

    torch.set_num_threads(1)
    gc.freeze()
    if (arguments := serve(sys.argv[1])) is not None:
        run_script(arguments)

"""A real git repository with prepare.py, a train.py that takes a moment, and a `uv` on PATH that runs them.

`uv run FILE ...` is run by the fork server; arguments, environment, output, exit code and signals are real.
Kill the shim, and its run is killed as well.
"""

import fcntl
import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from helpers.fork_server import ROOT, address, wait_for

COLUMNS = "commit val_bpb memory_gb status description seed steps seconds branch code fingerprint".split()

# deterministic for one code and seed: all of the learning happens in the first step. RUN_HOLD=FILE: it waits
TRAIN = '''"""A tiny language model: token embedding and head."""

import os
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from prepare import MAX_SEQ_LEN, VOCAB_SIZE, Experiment, Tokenizer, evaluate_bpb, make_dataloader

STEPS = 4  # each by the sign of the gradient: torch's optimizers import more than all else that this needs
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
    loader = make_dataloader(tokenizer, 2, MAX_SEQ_LEN)
    for _ in run.steps():
        for _ in range(STEPS):
            inputs, targets, _ = next(loader)
            loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
            model.zero_grad()
            loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= LR * parameter.grad.sign()
        break
    if hold := os.environ.get("RUN_HOLD"):
        Path(hold).touch()
        while Path(hold).exists():
            time.sleep(0.005)
    evaluate_bpb(model, tokenizer, 2)
    run.summary(num_steps=STEPS)


def main():
    with Experiment(" ".join(sys.argv[1:])) as run:
        train(run)
    return run.exit_code


if __name__ == "__main__":
    sys.exit(main())
'''

# changes of it: a gain beyond doubt, 13 standard errors; two of 2 errors, which must repeat, and do; a loss
BETTER = ("STEPS = 4 ", "STEPS = 7 ")
SLIGHT = ("LR = 0.05", "LR = 0.054")
OTHER = ("LR = 0.05", "LR = 0.055")
WORSE = ("STEPS = 4 ", "STEPS = 2 ")
CRASH = ("for _ in range(STEPS):", "for _ in range(1 // 0):")

SHIM = """#!{python} -IS
import json, os, signal, socket, sys
if sys.argv[1:2] != ["run"]:
    sys.exit(f"this uv only knows: uv run FILE, not {{sys.argv[1:]}}")
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
for number in (signal.SIGINT, signal.SIGTERM):
    if signal.getsignal(number) != signal.SIG_IGN:
        signal.signal(number, lambda number, _: server.send(bytes([number])))
request = dict(folder=os.getcwd(), environment=dict(os.environ), arguments=sys.argv[2:])
text = json.dumps(request).encode()
socket.send_fds(server, [len(text).to_bytes(8, "big")], [0, 1, 2])
server.sendall(text)
_, code = server.makefile()  # process id and exit code, a line each
os._exit(int(code) % 256 if int(code) >= 0 else 128 - int(code))
"""


@functools.cache
def shims() -> Path:
    """The folder with `uv`, beside the server's socket."""
    folder = address().parent / "bin"
    folder.mkdir()
    (folder / "uv").write_text(SHIM.format(python=sys.executable, address=str(address())))
    (folder / "uv").chmod(0o755)
    return folder


def environment(**more: str) -> dict[str, str]:
    """No configuration of this user or machine, and nothing of a git that may have started the tests."""
    own = {
        name: value for name, value in os.environ.items() if not name.startswith("GIT_") and name != "SEED"
    }
    git = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    run = {
        "AUTORESEARCH_BUDGET": "5",
        "OMP_NUM_THREADS": "1",  # two wait for each other longer than they compute, if the machine is busy
        "PATH": f"{shims()}{os.pathsep}{os.environ['PATH']}",
    }
    return own | git | run | more


class Outcome:
    """What a run printed, and its verdict: the last line."""

    def __init__(self, code: int, output: str, errors: str):
        self.code = code
        self.output = output
        self.errors = errors
        self.status = self.next = ""
        last = (output.splitlines() or [""])[-1]
        if last.startswith("status: "):
            status, command = last.removeprefix("status: ").split("next: ", 1)
            self.status = status.strip()
            self.next = command.strip()

    def compared(self) -> tuple[str, str]:
        """What the verdict's line of reasons compares."""
        found = re.search(r"^(.*) against (.*); gain [+-]\d\.\d{6}, sigma \d\.\d{4}$", self.output, re.M)
        return found[1], found[2]


def shown(rows: list[dict[str, str]]) -> str:
    """Scores as a line of reasons shows them, with what else they depend on."""
    values = " and ".join(row["val_bpb"] for row in rows)
    seed = f"seed {rows[0]['seed']}, " if len(rows) == 1 else ""
    return f"{values} ({seed}{' and '.join(row['steps'] for row in rows)} steps)"


class Lab:
    """A folder of a repository that holds the two scripts; commands run in it by bash."""

    def __init__(self, folder: Path, **env: str):
        self.folder = folder
        self.env = environment(**env)
        self.results = folder / "results.tsv"
        self.train = folder / "train.py"

    @classmethod
    def create(cls, folder: Path, *options: str, sub: str = ".") -> "Lab":
        """A new repository, of `git init` with options, with one commit; `sub` is where the scripts are."""
        lab = cls(folder / sub)
        lab.folder.mkdir(parents=True)
        for name in ("prepare.py", "program.md", ".gitignore"):
            shutil.copy(ROOT / name, lab.folder)
        lab.train.write_text(TRAIN)
        command = ["git", "init", "-q", "--template=", "-b", "main", *options, str(folder)]
        subprocess.run(command, check=True, env=lab.env)
        lab.git("config", "user.name", "Ada")
        lab.git("config", "user.email", "ada@example.org")
        lab.git("add", "-A")
        lab.git("commit", "-qm", "begin")
        return lab

    @classmethod
    def copy(cls, lab: "Lab", folder: Path) -> "Lab":
        """The whole repository once more, with the branch's train.py and without RUN_HOLD."""
        copy = cls(Path(shutil.copytree(lab.folder, folder, symlinks=True)))
        copy.git("restore", "-SW", "train.py")
        copy.git("update-index", "--refresh")
        return copy

    def sh(self, command: str, check: bool = True, timeout: float = 60, **env: str) -> Outcome:
        """A command as somebody would paste it."""
        options = {"cwd": self.folder, "env": self.env | env, "capture_output": True, "timeout": timeout}
        done = subprocess.run(["bash", "-c", command], stdin=subprocess.DEVNULL, **options)
        outcome = Outcome(done.returncode, done.stdout.decode(), done.stderr.decode())
        assert not check or outcome.code == 0, f"{command}: {outcome.code}\n{outcome.output}{outcome.errors}"
        return outcome

    def git(self, *command: str, input: bytes | None = None) -> str:
        options = {"cwd": self.folder, "env": self.env, "check": True, "capture_output": True}
        return subprocess.run(["git", *command], input=input, **options).stdout.decode().strip()

    def run(self, description: str = "", **env: str) -> Outcome:
        """`uv run train.py DESCRIPTION`, which may fail; the description gets there without a shell."""
        return self.start(description, **env).wait()

    def start(self, description: str = "", **env: str) -> "Running":
        command = ["uv", "run", "train.py"]
        if description:
            command.append(description)
        return Running(self, command, env)

    def report(self, check: bool = True, **env: str) -> Outcome:
        return self.sh("uv run prepare.py --report", check, **env)

    def edit(self, *changes: tuple[str, str]) -> None:
        """Replace text in train.py."""
        text = self.train.read_text()
        for before, after in changes:
            assert text.count(before) == 1, before
            text = text.replace(before, after)
        self.train.write_text(text)

    def rows(self) -> list[dict[str, str]]:
        """Of results.tsv, by column."""
        header, *lines = self.results.read_text().splitlines()
        assert header.split("\t") == COLUMNS
        return [dict(zip(COLUMNS, line.split("\t"), strict=True)) for line in lines]

    def record(self) -> list[dict[str, str]]:
        """What git has of each run, in the order of the starts, read without the harness's own reader."""
        names = "%(objectname:short)%00%(contents:body)%00"
        parts = self.git("for-each-ref", f"--format={names}", "refs/autoresearch").split("\0")
        record = []
        for commit, body in zip(parts[::2], parts[1::2], strict=False):
            lines = body.split("\n\n")[0].splitlines()
            record.append({"commit": commit.strip()} | dict(line.split(": ", 1) for line in lines))
        return record

    def state(self) -> tuple[str, ...]:
        """Branch, commit, index and work tree."""
        index = Path(self.git("rev-parse", "--absolute-git-dir")) / "index"
        return (
            self.git("rev-parse", "--symbolic-full-name", "HEAD"),
            self.git("rev-parse", "HEAD"),
            self.git("branch"),
            self.git("status", "--porcelain", "-uall"),
            self.git("diff"),
            self.git("diff", "--cached"),
            self.git("stash", "list"),
            self.train.read_text(),
            index.read_bytes().hex(),
        )

    def is_clean(self) -> bool:
        """Whether there is nothing to commit and nothing was put aside where nobody looks."""
        return self.git("status", "--porcelain", "-uall") == "" == self.git("stash", "list")

    def saved(self, commit: str) -> str:
        """The train.py of a commit."""
        return self.git("show", f"{commit}:./train.py") + "\n"

    def edited(self) -> list[str]:
        """The versions of train.py that a run has put aside."""
        return [path.read_text() for path in self.folder.glob("train.py.edited-*")]

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
        self.lab = lab
        self.hold = env.get("RUN_HOLD")
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

"""A scripted stand-in for the agent follows program.md, with the commands that stand there, for a night."""

import os
import re
import shlex
import signal
import subprocess
from pathlib import Path

from helpers.fork_server import wait_for
from helpers.lab import BETTER, CRASH, ROOT, TRAIN, Lab, Outcome

PROGRAM = (ROOT / "program.md").read_text()
BLOCKS = re.findall(r"^ *```bash\n(.*?)^ *```$", PROGRAM, re.M | re.S)


def block(words: str) -> str:
    """The one block of program.md that holds these words."""
    (found,) = (text for text in BLOCKS if text.strip().startswith(words))
    return unindented(found)


def unindented(text: str) -> str:
    return "\n".join(line.strip() for line in text.splitlines())


class Agent:
    """Does what program.md says, and knows only what its commands print."""

    def __init__(self, lab: Lab):
        self.lab = lab
        self.reads = 0

    def do(self, command: str, **names: str) -> str:
        """A block, or a command that stands in a sentence, with its placeholders filled in."""
        blocks = [unindented(text) for text in BLOCKS]
        in_a_block = command in blocks or any(command in text.splitlines() for text in blocks)
        assert in_a_block or f"`{command}`" in PROGRAM
        for name, value in names.items():
            assert name in command, f"{command} does not mention {name}"
            command = command.replace(name, value)
        assert not re.search(r"\b(TAG|DESCRIPTION|HASH)\b", command), f"a placeholder is left in {command}"
        return self.lab.sh(command).output

    def read(self, command: str, **names: str) -> str:
        output = self.do(command, **names)
        assert len(output.splitlines()) <= 40, f"{command} prints {len(output.splitlines())} lines"
        self.reads += 1
        return output

    def tried(self) -> list[list[str]]:
        """commit, val_bpb, memory_gb, status, description, seed of the last runs."""
        lines = [line.split("\t") for line in self.read(block("tail")).splitlines()]
        return [line for line in lines if line[0] != "commit"]

    def experiment(self, description: str, *changes: tuple[str, str], **env: str) -> Outcome:
        """One edit, run as often as the verdict asks for, and the verdict's last command."""
        self.lab.edit(*changes)
        outcome = self.run(f'"{description}"', **env)
        while outcome.status == "maybe":
            *command, word = shlex.split(outcome.next)
            assert command == ["uv", "run", "train.py"] and word == description
            outcome = self.run(outcome.next.removeprefix("uv run train.py "), **env)
        if outcome.status:
            self.lab.sh(outcome.next)
            assert self.lab.is_clean(), outcome.next
        return outcome

    def run(self, word: str, **env: str) -> Outcome:
        self.lab.env |= env
        self.do(block("rm -f run.log"), **{'"DESCRIPTION"': word})
        for name in env:
            del self.lab.env[name]
        output = ""
        for _ in range(5):
            output = self.read(block("for i in"))
            if output and output.splitlines()[-1].startswith("exit: "):
                break
        log, _, code = output.rstrip().rpartition("exit: ")
        return Outcome(int(code), log, "")


def test_a_night_as_program_md_says(cache: Path, tmp_path: Path):
    lab = Lab.create(tmp_path / "repository")
    agent = Agent(lab)
    agent.do(block("git status"), TAG="night")
    assert lab.git("rev-parse", "--abbrev-ref", "HEAD") == "autoresearch/night"
    assert [agent.experiment("baseline").status for _ in range(2)] == ["keep", "baseline"]
    assert len(agent.tried()) == 2

    best = ("STEPS = 7 ", "STEPS = 11 ")
    assert agent.experiment("steps 4 -> 7", BETTER).status == "keep"
    assert agent.experiment("steps 7 -> 3", ("STEPS = 7 ", "STEPS = 3 ")).status == "discard"
    lucky = ("for _ in range(STEPS):", "for _ in range(9 if torch.initial_seed() == 42 else 3):")
    assert agent.experiment("a lucky seed", lucky).status == "discard"
    assert [row[3] for row in agent.tried()[-2:]] == ["maybe", "discard"]

    rows = len(agent.tried())
    broken = agent.experiment("steps 7 -> 11", best, ("WIDTH = 8", "WIDTH = = 8"))
    assert (broken.code, broken.status, len(agent.tried())) == (
        1,
        "",
        rows,
    ) and "SyntaxError" in broken.output
    assert agent.experiment("steps 7 -> 11", ("WIDTH = = 8", "WIDTH = 8")).status == "keep"

    failures = {
        "a crash": CRASH,
        "a huge model": ("        break\n", "        raise torch.OutOfMemoryError('640 GiB')\n"),
        "a division by zero": ("    evaluate_bpb(", "    model.lm_head.bias.data /= 0\n    evaluate_bpb("),
        "attention to what follows": ("self.wte(inputs)", "self.wte(inputs.roll(-1, 1))"),
        "a loop without an end": (
            "    for _ in run.steps():",
            "    time.sleep(600)\n    for _ in run.steps():",
        ),
    }
    best_train = lab.train.read_text()
    failed = {name: best_train.replace(*change) for name, change in failures.items()}
    statuses = {}
    for name, change in failures.items():
        grace = {"RUN_LIMIT": "1"} if name == "a loop without an end" else {}
        outcome = agent.experiment(name, change, **grace)
        statuses[name] = outcome.status
        assert (outcome.code, agent.tried()[-1][3:5]) == (1, [outcome.status, name])
    assert [*statuses.values()] == ["crash", "crash", "invalid", "invalid", "timeout"]

    # the machine goes down in mid-run; somebody else takes over, with nothing but git
    lab.edit(("STEPS = 11 ", "STEPS = 16 "))
    hold = tmp_path / "hold"
    command = block("rm -f run.log").replace('"DESCRIPTION"', '"steps 11 -> 16"')
    env = lab.env | {"RUN_HOLD": str(hold)}
    machine = subprocess.Popen(["bash", "-c", command], cwd=lab.folder, env=env, start_new_session=True)
    machine.wait()
    wait_for(hold.exists)
    os.killpg(machine.pid, signal.SIGKILL)
    wait_for(lab.lock_is_free)
    hold.unlink()
    agent = Agent(lab)
    log = agent.read(block("git log"))
    assert log.count(" val_bpb ") == 3 and re.search(r"^ train.py \|", log, re.M)
    commit, _, _, status, description, _ = agent.tried()[-1]
    assert (status, description) == ("unfinished", "steps 11 -> 16")
    lab.sh("git restore -SW train.py")
    agent.do("git restore -s HASH train.py", HASH=commit)
    assert lab.train.read_text() == best_train.replace("STEPS = 11 ", "STEPS = 16 ")
    assert agent.experiment("steps 11 -> 16").status == "keep"

    rows = lab.rows()
    assert [(row["status"], row["description"]) for row in rows] == [
        ("keep", "baseline"),
        ("baseline", "baseline"),
        ("maybe", "steps 4 -> 7"),
        ("keep", "steps 4 -> 7"),
        ("discard", "steps 7 -> 3"),
        ("maybe", "a lucky seed"),
        ("discard", "a lucky seed"),
        ("maybe", "steps 7 -> 11"),
        ("keep", "steps 7 -> 11"),
        *((statuses[name], name) for name in failures),
        ("unfinished", "steps 11 -> 16"),
        ("maybe", "steps 11 -> 16"),
        ("keep", "steps 11 -> 16"),
    ], "every run that began has a row"
    kept = [row for row in rows if row["status"] == "keep"]
    history = lab.git("log", "--reverse", "--format=%h %s").splitlines()[1:]
    assert [line.split()[0] for line in history] == [row["commit"] for row in kept], (
        "the improvements, in order"
    )
    notebook = r"\w+ val_bpb \d\.\d{6}(: baseline| \(-0\.\d{6}, 2 seeds\): steps \d+ -> \d+)"
    assert all(re.fullmatch(notebook, line) for line in history)
    levels = [float(line.split()[2].rstrip(":")) for line in history]
    assert levels == sorted(levels, reverse=True)
    assert (
        lab.train.read_text() == TRAIN.replace("STEPS = 4 ", "STEPS = 16 ") and lab.git("diff", "HEAD") == ""
    )

    show, difference = block("git show").splitlines()
    for row in rows:
        if row["status"] not in ("keep", "maybe", "baseline", "discard"):
            shown = agent.read(show, HASH=row["commit"])
            assert f"    val_bpb nan ({row['status']}): {row['description']}\n" in shown
            assert agent.do(difference, HASH=row["commit"]).startswith("diff --git a/train.py b/train.py\n")
            assert lab.saved(row["commit"]) == failed.get(row["description"], lab.train.read_text())
    outcome = lab.sh("uv run prepare.py --report")
    assert "4 kept, 7 dropped or repeated, 6 without a score" in outcome.output
    assert agent.reads > 8


def test_a_worktree_as_program_md_says(tmp_path: Path):
    lab = Lab.create(tmp_path / "repository")
    lab.sh(block("git worktree").replace("TAG-N", "night-1").replace("autoresearch-N", "autoresearch-1"))
    other = Lab(tmp_path / "autoresearch-1")
    assert other.git("rev-parse", "--abbrev-ref", "HEAD") == "autoresearch/night-1"
    assert other.train.read_text() == TRAIN and other.git("status", "--porcelain") == ""


def test_program_md_knows_every_status():
    assert len(PROGRAM.splitlines()) < 150
    first_column = re.findall(r"^ *\| (`.*?) \|", PROGRAM, re.M)
    known = set(re.findall(r"`(\w+)`", " ".join(first_column)))
    judged = {"keep", "maybe", "discard", "baseline", "unjudged"}
    assert known - {"reproduced"} == judged | {"crash", "timeout", "invalid", "stopped", "unfinished"}
    source = (ROOT / "prepare.py").read_text()
    assert all(f'"{status}"' in source for status in known)


def test_no_command_uses_the_stash():
    for text in (PROGRAM, (ROOT / "prepare.py").read_text()):
        assert "git stash p" not in text


def test_no_block_of_program_md_is_untried():
    tried = ("git status", "tail", "rm -f run.log", "for i in", "git show", "git log", "git worktree")
    assert [block(words) for words in tried if block(words)] and len(BLOCKS) == len(tried)

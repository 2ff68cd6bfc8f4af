"""A scripted stand-in for the agent follows program.md, with the commands that stand there, for a night."""

import os
import re
import shlex
import signal
import subprocess
from pathlib import Path

import pytest
from helpers.fork_server import wait_for
from helpers.lab import BETTER, CRASH, ROOT, TRAIN, WORSE, Lab, Outcome

PROGRAM = (ROOT / "program.md").read_text()
README = (ROOT / "README.md").read_text()
BLOCKS = [
    "\n".join(line.strip() for line in block.splitlines())
    for block in re.findall(r"^ *```bash\n(.*?)^ *```$", PROGRAM, re.M | re.S)
]
BRANCH, SMOKE_TEST, PLAIN_RUN, BACKGROUND_RUN, LOOK_BACK = BLOCKS
START, WAIT = BACKGROUND_RUN.splitlines()


def in_a_sentence(command: str) -> str:
    """A command that program.md has in the middle of a text."""
    assert f"`{command}`" in PROGRAM
    return command


class Agent:
    """Does what program.md says, and knows only what its commands print."""

    def __init__(self, lab: Lab):
        self.lab = lab
        self.in_background = 3  # runs that are still to be started in that way

    def do(self, command: str, lines: int = 40, **names: str) -> str:
        """What a command prints, with its placeholders filled in."""
        for name, value in names.items():
            assert name in command, f"{command} does not mention {name}"
            command = command.replace(name, value)
        assert not re.search(r"\b(TAG|DESCRIPTION|HASH)\b", command), f"a placeholder is left in {command}"
        output = self.lab.sh(command).output
        assert len(output.splitlines()) <= lines, f"{command} prints {len(output.splitlines())} lines"
        return output

    def tried(self) -> list[list[str]]:
        """commit, val_bpb, memory_gb, status and description of the last runs."""
        lines = self.do(in_a_sentence("cut -f 1-5 results.tsv | tail -n 40")).splitlines()
        return [line.split("\t") for line in lines if not line.startswith("commit\t")]

    def experiment(self, description: str, *changes: tuple[str, str], **env: str) -> Outcome:
        """One edit, run as often as the verdict asks for, and the verdict's last command."""
        self.lab.edit(*changes)
        outcome = self.run(f'"{description}"', **env)
        while outcome.status == "maybe":
            command = "uv run train.py "
            assert outcome.next.startswith(command)
            outcome = self.run(outcome.next.removeprefix(command), **env)
        if outcome.status:
            self.lab.sh(outcome.next)
            assert self.lab.is_clean(), outcome.next
        return outcome

    def run(self, word: str, **env: str) -> Outcome:
        self.in_background -= 1
        self.lab.env |= env
        if self.in_background < 0:
            output = self.do(PLAIN_RUN, **{'"DESCRIPTION"': word})
        else:
            self.do(START, **{'"DESCRIPTION"': word})
            output = ""
            while not output.splitlines()[-1:] or not output.splitlines()[-1].startswith("exit: "):
                output = self.do(WAIT)
        for name in env:
            del self.lab.env[name]
        return ended(output)

    def smoke_test(self) -> Outcome:
        return ended(self.do(SMOKE_TEST))


def ended(output: str) -> Outcome:
    log, _, code = output.rstrip().rpartition("exit: ")
    return Outcome(int(code), log, "")


@pytest.mark.slow
def test_a_night_as_program_md_says(cache: Path, tmp_path: Path):
    lab = Lab.create(tmp_path / "repository")
    agent = Agent(lab)
    assert agent.do(in_a_sentence("git status --short")) == ""
    agent.do(BRANCH, TAG="night")
    assert lab.git("rev-parse", "--abbrev-ref", "HEAD") == "autoresearch/night"
    notes = lab.folder / "notes.md"
    notes.write_text("more steps: -0.08, a better rate: -0.01\n")
    assert agent.experiment("baseline").status == "keep"
    assert len(agent.tried()) == 1

    assert agent.experiment("steps 4 -> 7", BETTER).status == "keep"
    assert agent.experiment("rate 0.05 -> 0.053", ("LR = 0.05", "LR = 0.053")).status == "keep"
    assert agent.experiment("steps 7 -> 3", ("STEPS = 7 ", "STEPS = 3 ")).status == "discard"
    rate = "(LR + 0.003 if torch.initial_seed() == 42 else LR - 0.01)"
    assert agent.experiment("a lucky seed", ("-= LR *", f"-= {rate} *")).status == "discard"
    assert [row[3] for row in agent.tried()] == "keep keep maybe keep discard maybe discard".split()

    # a large edit is tried first, and leaves no trace
    best = ("STEPS = 7 ", "STEPS = 11 ")
    lab.edit(best, ("WIDTH = 8", "WIDTH = = 8"))
    broken = agent.smoke_test()
    assert (broken.code, broken.status) == (1, "") and "SyntaxError" in broken.output
    assert agent.run('"steps 7 -> 11"').code == 1
    lab.edit(("WIDTH = = 8", "WIDTH = 8"))
    tried = agent.smoke_test()
    assert (tried.code, tried.status) == (0, "") and "plain run, not recorded: " in tried.output
    assert len(agent.tried()) == 7
    assert agent.experiment("steps 7 -> 11").status == "keep"

    failures = {
        "a crash": CRASH,
        "a huge model": ("        break\n", "        raise torch.OutOfMemoryError('640 GiB')\n"),
        "a division by zero": ("    evaluate_bpb(", "    model.lm_head.bias.data /= 0\n    evaluate_bpb("),
        "a loop without an end": (
            "    for _ in run.steps():",
            "    time.sleep(600)\n    for _ in run.steps():",
        ),
    }
    best_train = lab.train.read_text()
    failed = {name: best_train.replace(*change) for name, change in failures.items()}
    statuses = {}
    for name, change in failures.items():
        limit = {"RUN_LIMIT": "1"} if name == "a loop without an end" else {}
        outcome = agent.experiment(name, change, **limit)
        statuses[name] = outcome.status
        assert (outcome.code, agent.tried()[-1][3:]) == (1, [outcome.status, name])
    assert [*statuses.values()] == ["crash", "crash", "invalid", "timeout"]

    # the machine goes down in mid-run; somebody else takes over, with nothing but what is on disk
    lab.edit(("STEPS = 11 ", "STEPS = 16 "))
    hold = tmp_path / "hold"
    env = lab.env | {"RUN_HOLD": str(hold)}
    command = START.replace('"DESCRIPTION"', '"steps 11 -> 16"')
    machine = subprocess.Popen(["bash", "-c", command], cwd=lab.folder, env=env, start_new_session=True)
    machine.wait()
    wait_for(hold.exists)
    os.killpg(machine.pid, signal.SIGKILL)
    wait_for(lab.lock_is_free)
    hold.unlink()
    agent = Agent(lab)
    assert notes.read_text().startswith("more steps"), "no command of the night has touched it"
    output = agent.do(LOOK_BACK, lines=60)
    assert output.count(" val_bpb ") == 4 and re.search(r"^ train.py \|", output, re.M)
    commit, _, _, status, description = agent.tried()[-1]
    assert "\t".join(["unfinished", "steps 11 -> 16"]) in output
    assert (status, description) == ("unfinished", "steps 11 -> 16")
    lab.sh("git restore -SW train.py")
    agent.do(in_a_sentence("git restore -s HASH train.py"), HASH=commit)
    assert lab.train.read_text() == best_train.replace("STEPS = 11 ", "STEPS = 16 ")
    assert agent.experiment("steps 11 -> 16").status == "keep"

    rows = lab.rows()
    assert [(row["status"], row["description"]) for row in rows] == [
        ("keep", "baseline"),
        ("keep", "steps 4 -> 7"),
        ("maybe", "rate 0.05 -> 0.053"),
        ("keep", "rate 0.05 -> 0.053"),
        ("discard", "steps 7 -> 3"),
        ("maybe", "a lucky seed"),
        ("discard", "a lucky seed"),
        ("keep", "steps 7 -> 11"),
        *((statuses[name], name) for name in failures),
        ("unfinished", "steps 11 -> 16"),
        ("keep", "steps 11 -> 16"),
    ], "every run that began has a row"
    assert [row["steps"] for row in rows if row["val_bpb"] != "nan"] == "4 7 7 7 3 7 7 11 16".split()
    kept = [row for row in rows if row["status"] == "keep"]
    history = lab.git("log", "--reverse", "--format=%h %s").splitlines()[1:]
    assert [line.split()[0] for line in history] == [row["commit"] for row in kept], "in order"
    notebook = r"\w+ val_bpb \d\.\d{6}(: baseline| \(-0\.\d{6}, (1 seed|2 seeds)\): \w+ \S+ -> \S+)"
    assert all(re.fullmatch(notebook, line) for line in history)
    levels = [float(line.split()[2].rstrip(":")) for line in history]
    assert levels == sorted(levels, reverse=True)
    assert lab.train.read_text() == best_train.replace("STEPS = 11 ", "STEPS = 16 ")
    assert lab.git("diff", "HEAD") == ""

    for row in rows:
        if row["val_bpb"] == "nan":
            shown = agent.do(in_a_sentence("git show HASH"), lines=80, HASH=row["commit"])
            assert f"    val_bpb nan ({row['status']}): {row['description']}\n" in shown
            assert "\ndiff --git a/train.py b/train.py\n" in shown
            assert lab.saved(row["commit"]) == failed.get(row["description"], lab.train.read_text())
    report = agent.do(in_a_sentence("uv run prepare.py --report"))
    assert "5 kept on the last corpus and budget, 4 others, 5 without a score" in report
    assert "\nbranch autoresearch/night: 14 runs, 5 kept, " in report


@pytest.mark.slow
def test_a_simplification_may_be_kept_by_hand(begun):
    lab = begun
    agent = Agent(lab)
    assert agent.experiment("fewer steps", WORSE).status == "discard"
    commit = agent.tried()[-1][0]
    agent.do(in_a_sentence("git merge -q --ff-only --autostash HASH"), HASH=commit)
    assert lab.is_clean() and lab.train.read_text() == TRAIN.replace(*WORSE)
    assert agent.experiment("2 -> 4 steps", (WORSE[1], WORSE[0])).status == "keep", "it has a score"


def test_a_work_tree_as_program_md_says(tmp_path: Path):
    lab = Lab.create(tmp_path / "repository")
    command = in_a_sentence("git worktree add -q ../autoresearch-N -b autoresearch/TAG-N")
    Agent(lab).do(command, **{"autoresearch-N": "autoresearch-1", "TAG-N": "night-1"})
    other = Lab(tmp_path / "autoresearch-1")
    assert other.git("rev-parse", "--abbrev-ref", "HEAD") == "autoresearch/night-1"
    assert other.train.read_text() == TRAIN and other.git("status", "--porcelain") == ""


@pytest.mark.slow
@pytest.mark.parametrize("end", ["the agent ends", "the time is over"])
def test_a_cluster_job_as_the_readme_says(end, cache, tmp_path: Path):
    """The job script, with a stand-in for claude that makes one run; what it found is at the origin then."""
    lab = Lab.create(tmp_path / "prepared")
    origin = tmp_path / "origin.git"
    lab.sh(f"git clone -q --bare . {origin} && git remote add origin {origin}")
    job = tmp_path / "night.sbatch"
    job.write_text(re.search(r"```bash\n(#!/bin/bash\n#SBATCH .*?)```", README, re.S)[1])
    agent = tmp_path / "bin" / "claude"
    ready = tmp_path / "ready"
    lines = [
        "#!/bin/bash",
        '[ "$1" = -p ] && [ -f "$3" ] || exit',
        "uv run train.py baseline > run.log",
        "eval \"$(sed -n 's/.* next: //p' run.log)\"",
        f'echo "$2 $UV_PROJECT_ENVIRONMENT" > {ready}',
        f"exec sleep {0 if end == 'the agent ends' else 600}",
    ]
    agent.parent.mkdir()
    agent.write_text("\n".join(lines))
    agent.chmod(0o755)
    settings = lab.folder / ".claude" / "settings.local.json"
    settings.parent.mkdir()
    settings.write_text("{}")
    path = f"{agent.parent}{os.pathsep}{lab.env['PATH']}"
    env = lab.env | {"PATH": path, "SLURM_JOB_ID": "7", "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(["bash", str(job)], cwd=lab.folder, env=env, stdout=subprocess.PIPE)
    wait_for(lambda: ready.exists() and ready.read_text())
    if end == "the time is over":
        process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0].decode()
    assert re.search(r"\tkeep\tbaseline\t", output), output
    assert ready.read_text().split() == ["--settings", f"{lab.folder}/.venv"]
    refs = subprocess.run(
        ["git", "-C", origin, "for-each-ref"], capture_output=True, check=True
    ).stdout.decode()
    commit = re.search(r"^(\w{40}) commit\trefs/heads/autoresearch/\d{4}-7-0$", refs, re.M)[1]
    assert re.search(rf"^{commit} commit\trefs/autoresearch/", refs, re.M), refs


def test_the_notes_of_an_agent_are_ignored(tmp_path: Path):
    lab = Lab.create(tmp_path / "repository")
    for name in ("notes.md", "run.log", "results.tsv", "progress.png", ".claude/settings.local.json"):
        path = lab.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine\n")
    assert lab.is_clean()


def test_two_pieces_are_all_of_train_py():
    pieces = []
    for command in ("sed -n 1,350p train.py", "sed -n '351,$p' train.py"):
        done = subprocess.run(shlex.split(in_a_sentence(command)), cwd=ROOT, capture_output=True, check=True)
        pieces.append(done.stdout.decode())
        assert 1000 < len(pieces[-1]) < 30_000, "shells of agents cut what is longer"
    assert "".join(pieces) == (ROOT / "train.py").read_text()


STATUSES = "keep maybe discard baseline unjudged reproduced crash timeout invalid stopped unfinished".split()


def test_program_md_explains_every_status():
    source = (ROOT / "prepare.py").read_text()
    assert all(f'"{status}"' in source for status in STATUSES)
    first_column = re.findall(r"^ *\| (`.*?) \|", PROGRAM, re.M)
    explained = re.findall(r"`(\w+)`", " ".join(first_column))
    assert explained == STATUSES[:-1] and "stays `unfinished`" in PROGRAM


def test_program_md_fits_on_three_screens():
    assert len(PROGRAM.splitlines()) <= 150


def test_no_command_uses_the_stash():
    for text in (PROGRAM, (ROOT / "prepare.py").read_text()):
        assert "git stash" not in text

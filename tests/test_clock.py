"""A run from start to end: budget, seed, clock, summary and errors, under a clock that the tests move."""

import functools
import re
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers.experiments import CPU, StillClock, keep_cuda_busy, toy, uniform
from helpers.forks import Forks, Job
from helpers.lab import CRASH, Lab
from helpers.script import environment, load

import prepare
from prepare import (
    AutoresearchError,
    Clock,
    Experiment,
    MetricError,
    Prepared,
    Tokenizer,
    evaluate_bpb,
    make_dataloader,
)

SUMMARY = (
    "val_bpb training_seconds total_seconds peak_vram_mb mfu_percent total_tokens_M num_steps num_params_M "
    "depth startup_seconds eval_seconds seed fingerprint attention"
)


@pytest.fixture(scope="module")
def tokenizer(cache) -> Tokenizer:
    """With few validation rows, to save time."""
    whole = Tokenizer.from_directory()
    return Tokenizer(whole.data.tokenizer_path, replace(whole.data, rows=whole.data.rows[:12]))


@pytest.fixture
def begun(clock, cache) -> Clock:
    """A clock of its own that has begun."""
    return begin(prepare)


def begin(module: ModuleType) -> Clock:
    torch.manual_seed(42)
    clock = module.Clock()
    clock.begin(CPU, 42, module.Prepared.active())
    return clock


def train(run: Experiment | Clock, clock: StillClock, seconds: float = 100.0) -> int:
    """The number of steps."""
    steps = 0
    for _ in run.steps():
        clock.now += seconds
        steps += 1
    return steps


def only_line(text: str) -> str:
    """The error line, after a check that it is the only one."""
    assert re.fullmatch(r"error: [^\n]+\n", text), text
    return text


# -- the budget ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, grace", [("5", 300), ("300", 300), ("3600", 360), ("86400", 8640)])
def test_the_budget_is_what_the_user_says(cache, text, grace):
    module = load(AUTORESEARCH_BUDGET=text)
    assert (module.TIME_BUDGET, module.GRACE) == (int(text), grace)
    module.check_constants()


@pytest.mark.parametrize("text", [None, ""])
def test_without_a_word_the_budget_is_300_seconds(text):
    assert load(AUTORESEARCH_BUDGET=text).TIME_BUDGET == 300


@pytest.mark.parametrize("text", ["4", "86401", "abc", "-5", "1e3", "5.0", " 60", "0", "999999"])
def test_a_budget_out_of_reach_is_an_error(text):
    with pytest.raises(SystemExit, match=rf"^error: AUTORESEARCH_BUDGET is '{text}', not 5 to 86400 [^\n]*$"):
        load(AUTORESEARCH_BUDGET=text)


def test_every_budget_has_its_own_fingerprint(cache):
    """And another code, corpus or device too; the same budget in other digits has not."""
    fingerprints = {}
    for text in ("5", "300", "86400", "", "00300"):
        module = load(AUTORESEARCH_BUDGET=text)
        fingerprints[text] = module.Prepared.active().fingerprint(CPU)
    assert fingerprints[""] == fingerprints["300"] == fingerprints["00300"]
    assert fingerprints["300"] == Prepared.active().fingerprint(CPU)
    assert len(set(fingerprints.values())) == 3


# -- seed ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given, seed", [(None, 42), ("7", 7), ("0", 0)])
def test_torch_is_seeded_by_the_harness(tokenizer, given, seed):
    torch.manual_seed(1)
    with environment(SEED=given), toy() as run:
        drawn = torch.rand(5)
    assert run.seed == seed
    assert torch.equal(drawn, torch.rand(5, generator=torch.Generator().manual_seed(seed)))


def test_a_seed_that_is_no_number_is_refused(cache, capsys):
    with environment(SEED="lucky"), pytest.raises(SystemExit, match="^1$"):
        toy().__enter__()
    assert only_line(capsys.readouterr().err) == "error: SEED is 'lucky', not 1 to 9 digits; unset it\n"


def test_reseeding_is_invalid(begun, clock):
    train(begun, clock)
    torch.manual_seed(1234)
    with pytest.raises(MetricError, match="torch's seed is 1234, not 42"):
        begun.stop(begun.data)


# -- the first lines -----------------------------------------------------------------------------------------


def test_the_first_lines_say_what_is_at_stake(cache, capsys):
    with toy("an idea") as run:
        begun = capsys.readouterr().out
    tokenizer = Tokenizer.from_directory()
    targets = [token for row in tokenizer.data.rows.tolist() for token in row[1:]]
    text = b"".join(tokenizer.encoding.decode_tokens_bytes([t for t in targets if t != tokenizer.bos]))
    tokens = sum(len(np.fromfile(path, "<u2")) for path in tokenizer.data.train_paths)
    device = prepare.device_name(CPU)
    corpus = tokenizer.data.folder.name.removesuffix("-small")
    assert run.device == CPU and tokens > 100_000
    assert begun.splitlines() == [
        f"plain run, not recorded: small scale, 300 s, seed 42, {device}",
        f"corpus: {corpus}, {tokens:,} training tokens, at most {tokens // 257:,} rows an epoch, "
        f"{len(text) / len(targets):.2f} bytes a token",
    ]


def test_the_first_line_tells_an_experiment(cache, tmp_path):
    lab = Lab.create(tmp_path / "lab")
    lab.edit(("    tokenizer = Tokenizer", "    raise KeyboardInterrupt\n    tokenizer = Tokenizer"))
    lab.git("commit", "-qam", "ends at once")
    recorded = lab.run("an idea", AUTORESEARCH_BUDGET="60").output
    plain = lab.run("", AUTORESEARCH_BUDGET="60").output
    assert recorded.startswith("experiment: small scale, 60 s, seed 42, ")
    assert plain.startswith("plain run, not recorded: small scale, 60 s, seed 42, ")
    assert len(lab.record()) == 1


# -- clock ---------------------------------------------------------------------------------------------------


def test_every_step_counts_and_progress_rises_from_0(cache, clock):
    seen = []
    with toy() as run:
        clock.now += 60  # start-up is free
        for step, progress in run.steps():
            seen.append((step, progress))
            clock.now += 7
    # 42 * 7 = 294, a 43rd step would end at 301
    assert seen == [(i, pytest.approx(7 * i / 300)) for i in range(42)]
    assert prepare.TIME_BUDGET == 300


@pytest.mark.parametrize(
    "seconds, steps",
    [
        ([100] * 9, 3),  # the third one ends exactly with the budget
        ([101] * 9, 2),
        ([299] * 9, 2),  # after a first step nobody knows how long the others are
        ([400] * 9, 1),
        ([10, 150] + [10] * 99, 16),  # a single slow step does not end the run
        ([10, 150, 130, 10], 3),  # two of them do: at 290 s, the shorter one would end at 420 s
        ([10, 150, 10, 150, 10], 4),
        ([100] + [1] * 300, 201),  # a slow first step does not cost the others theirs
    ],
)
def test_a_step_that_would_pass_the_budget_is_not_begun(begun, clock, seconds, steps):
    """Judged by the shorter one of the last two."""
    taken = 0
    for step, _ in begun.steps():
        clock.now += seconds[step]
        taken += 1
    assert taken == steps


class Queue:
    """A CUDA device that works off what the host has asked for, while the host goes on."""

    def __init__(self, clock: StillClock):
        self.clock = clock
        self.done = clock.now

    def launch(self, seconds: float) -> None:
        self.done = max(self.done, self.clock.now) + seconds

    def synchronize(self) -> None:
        self.wait_until(self.done)

    def record_event(self) -> SimpleNamespace:
        return SimpleNamespace(synchronize=functools.partial(self.wait_until, self.done))

    def wait_until(self, moment: float) -> None:
        self.clock.now = max(self.clock.now, moment)


@pytest.mark.parametrize("seconds, steps", [(7, 42), (70, 4), (90, 3), (149, 2), (0.5, 600)])
def test_a_host_that_goes_ahead_keeps_to_the_budget(begun, clock, monkeypatch, seconds, steps):
    queue = Queue(clock)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: queue)
    monkeypatch.setattr(torch.accelerator, "synchronize", queue.synchronize)
    begun.device = torch.device("cuda")
    ahead = []
    for _ in begun.steps():
        ahead.append(queue.done - clock.now)
        queue.launch(seconds)
    begun.stop(begun.data)
    assert len(ahead) == steps and begun.training_seconds == steps * seconds
    assert ahead == [0.0] * len(ahead[:3]) + [seconds] * len(ahead[3:])


def test_the_clock_starts_once(begun, clock):
    train(begun, clock)
    with pytest.raises(MetricError, match="twice"):
        train(begun, clock)


@pytest.mark.parametrize("budget, most", [(5, 10), (60, 65), (300, 306), (86_400, 88_128)])
def test_5_seconds_or_2_percent_over_the_budget(cache, clock, budget, most):
    module = load(AUTORESEARCH_BUDGET=budget)
    for seconds in (most - 0.1, most + 0.1):
        run = begin(module)
        train(run, clock, seconds)
        if seconds < most:
            run.stop(run.data)
        else:
            with pytest.raises(
                module.MetricError, match=f"trained for {seconds:.1f} s, not {most}.0 at most"
            ):
                run.stop(run.data)


def test_what_comes_after_the_loop_is_not_free(begun, clock):
    train(begun, clock, 50)
    clock.now += 7  # averaging weights, say
    with pytest.raises(MetricError, match="trained for 307.0 s"):
        begun.stop(begun.data)


def test_no_data_is_drawn_before_the_clock(tokenizer):
    drawn = []
    with toy() as run:
        with pytest.raises(AutoresearchError, match="before the clock"):
            next(make_dataloader(tokenizer, 2, 16, device=CPU))
        drawn.append("refused")
        batches = make_dataloader(tokenizer, 2, 16, device=CPU)
        for _ in run.steps():
            drawn.append(next(batches)[0].shape)
            break
    assert drawn == ["refused", (2, 16)]
    # without an Experiment there is no clock
    assert next(make_dataloader(tokenizer, 2, 16, device=CPU))[0].shape == (2, 16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_the_host_cannot_outrun_the_clock(cache):
    module = load(AUTORESEARCH_BUDGET=5)
    steps = 0
    with module.Experiment() as run:
        for _ in run.steps():
            keep_cuda_busy()
            steps += 1
        module.evaluate_bpb(uniform, module.Tokenizer.from_directory(), 6)
    assert run.exit_code == 0
    assert steps > 10 and 4 < module.CLOCK.training_seconds < 5.7


# -- score and summary ---------------------------------------------------------------------------------------


def test_the_summary_has_the_keys_of_the_interface(tokenizer, clock, capsys):
    with toy() as run:
        clock.now += 20
        train(run, clock, 74.5)
        val_bpb = evaluate_bpb(uniform, tokenizer, 6)
        clock.now += 4.25
        capsys.readouterr()
        run.summary(mfu_percent="n/a", total_tokens_M=1.26, num_steps=4, num_params_M=11.55, depth=3)
        out = capsys.readouterr().out
        run.summary(mfu_percent=39.8765, total_tokens_M=1.26, num_steps=4, num_params_M=11.55, depth=3)
    again, errors = capsys.readouterr()
    assert again == out.replace("  n/a", "  39.88", 1)
    assert (run.exit_code, errors) == (0, "")
    head, *lines = out.splitlines()
    values = {key: value.strip() for key, value in (line.split(":") for line in lines)}
    assert head == "---" and " ".join(values) == SUMMARY
    assert values == {
        "val_bpb": f"{val_bpb:.6f}",
        "training_seconds": "298.0",
        "total_seconds": "322.2",
        "peak_vram_mb": values["peak_vram_mb"],
        "mfu_percent": "n/a",
        "total_tokens_M": "1.3",
        "num_steps": "4",
        "num_params_M": "11.6",
        "depth": "3",
        "startup_seconds": "20.0",
        "eval_seconds": "0.0",
        "seed": "42",
        "fingerprint": run.fingerprint,
        "attention": "n/a",
    }
    assert float(values["peak_vram_mb"]) > 10
    assert re.fullmatch("[0-9a-f]{8}", values["fingerprint"])


def test_evaluation_before_the_clock_is_invalid(tokenizer, capsys):
    with toy() as run:
        evaluate_bpb(uniform, tokenizer, 6)
    assert run.exit_code == 1
    assert "before the clock started" in only_line(capsys.readouterr().err)


def test_a_second_evaluation_is_invalid(begun, clock):
    train(begun, clock)
    begun.stop(begun.data)
    begun.finish(1.5)
    with pytest.raises(MetricError, match="twice"):
        begun.stop(begun.data)


def test_an_invalid_model_has_no_score(tokenizer, clock, capsys):
    """Even if the error is caught."""
    with toy() as run:
        train(run, clock)
        with pytest.raises(MetricError):
            evaluate_bpb(lambda inputs: uniform(inputs).mean(), tokenizer, 6)
    assert run.exit_code == 1
    assert "without a score" in only_line(capsys.readouterr().err)


@pytest.mark.parametrize("name, value", [("TIME_BUDGET", 600), ("TOLERANCE", 1.0), ("EVAL_TOKENS", 2**14)])
def test_a_changed_constant_is_refused(cache, clock, capsys, name, value):
    """By the program that runs, before it starts or while it runs."""
    for moment in ("start", "end"):
        module = load()
        found = f"{name} is {value}, not {getattr(module, name)}"
        if moment == "start":
            setattr(module, name, value)
            with pytest.raises(SystemExit, match="^1$"):
                module.Experiment().__enter__()
        else:
            with module.Experiment() as run:
                train(run, clock)
                setattr(module, name, value)
                module.evaluate_bpb(uniform, module.Tokenizer.from_directory(), 6)
            assert run.exit_code == 1
        assert found in only_line(capsys.readouterr().err)


# -- errors --------------------------------------------------------------------------------------------------


def test_a_run_without_a_score_is_an_error(cache, clock, capsys):
    with toy() as run:
        train(run, clock)
    assert run.exit_code == 1
    assert "without a score" in only_line(capsys.readouterr().err)


@pytest.mark.parametrize("error", [AutoresearchError, prepare.TrainError])
def test_an_error_of_ours_is_one_line(cache, capsys, error):
    with toy() as run:
        raise error("no room for a single row; lower depth")
    assert run.exit_code == 1
    assert capsys.readouterr().err == "error: no room for a single row; lower depth\n"


def ping(frames: int) -> None:
    pong(frames - 1) if frames else int("deep")


def pong(frames: int) -> None:
    ping(frames - 1) if frames else int("deep")


@pytest.mark.parametrize("frames", [3, 200])
def test_another_error_is_a_short_traceback(cache, capsys, frames):
    with toy() as run:
        ping(frames)
    assert run.exit_code == 1
    traceback = capsys.readouterr().err.splitlines()
    assert traceback[0] == "Traceback (most recent call last):"
    assert traceback[-1] == "ValueError: invalid literal for int() with base 10: 'deep'"
    assert any(f"line {ping.__code__.co_firstlineno + 1}, in ping" in line for line in traceback)
    assert 10 < len(traceback) <= 30
    assert ("  ..." in traceback) == (frames == 200)


def experiment(forks: Forks, body: str, cache: Path | None = None) -> Job:
    """A train.py of a few lines, in a process of its own."""
    lines = [
        "import os, signal, sys, time",
        f"sys.path.insert(0, {str(ROOT)!r})",
        "import prepare",
        "with prepare.Experiment('toy') as run:",
        f"    {body}",
        "sys.exit(run.exit_code)",
    ]
    env = {"AUTORESEARCH_CACHE": cache} if cache else {}
    return forks.run(first="\n".join(lines), env=env, timeout=100)


ANNOUNCE_STEPS = "for step, _ in run.steps(): print('step', step, flush=True)"


def test_training_before_prepare_is_an_error(forks, tmp_path):
    result = experiment(forks, ANNOUNCE_STEPS, tmp_path / "empty")
    assert (result.returncode, result.stdout) == (1, "")
    line = only_line(result.stderr)
    assert "nothing is prepared" in line and "run: uv run prepare.py" in line


@pytest.mark.parametrize("which", ["tokenizer-", "validation", "train"])
def test_an_altered_file_is_found_before_a_step(forks, cache_copy, which):
    folder = cache_copy / (cache_copy / "active-small").read_text()
    (path,) = (folder / "tokens").glob(f"{which}*")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    result = experiment(forks, ANNOUNCE_STEPS, cache_copy)
    assert result.returncode == 1 and "step" not in result.stdout
    line = only_line(result.stderr)
    assert str(path) in line and "altered" in line and "delete it and run prepare.py again" in line


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_a_stopped_run_is_one_line(forks, number):
    body = f"[os.kill(os.getpid(), signal.{number}) or time.sleep(30) for _ in run.steps()]"
    result = experiment(forks, body)
    assert result.returncode == 1
    assert "interrupted" in only_line(result.stderr)


# -- watchdog ------------------------------------------------------------------------------------------------


def hanging(folder: Path, call: str) -> Lab:
    """A train.py that hangs before it scores."""
    lab = Lab.create(folder / "lab")
    stuck = f"import ctypes\n\n\ndef stuck():\n    {call}\n\n\ndef train(run):"
    lab.edit(("def train(run):", stuck), ("    evaluate_bpb(model", "    stuck()\n    evaluate_bpb(model"))
    return lab


@pytest.mark.slow
def test_a_hang_is_ended_with_all_stacks(cache, tmp_path):
    hung = hanging(tmp_path, "time.sleep(600)").run("", RUN_LIMIT="1")
    assert hung.code == 1
    assert re.search(r"train\.py\", line \d+ in stuck\n", hung.errors)
    assert re.match(r"error: not done in 1\.0 s.*stacks above", hung.errors.splitlines()[-1])


@pytest.mark.slow
def test_a_hang_that_holds_the_interpreter_is_ended(cache, tmp_path):
    lab = hanging(tmp_path, "ctypes.PyDLL(None).sleep(600)")  # PyDLL keeps the lock of the interpreter
    begun = time.monotonic()
    hung = lab.run("", RUN_LIMIT="1")
    assert time.monotonic() - begun > 30
    assert hung.code == 1
    assert re.search(r"train\.py\", line \d+ in stuck\n", hung.errors)


@pytest.mark.slow
def test_a_run_that_has_ended_is_left_alone(cache, tmp_path):
    """By the watchdog, when the process goes on."""
    lab = Lab.create(tmp_path / "lab")
    again = "    code = run.exit_code\n    time.sleep(1.5)\n    print('alive')\n    return code\n"
    lab.edit(CRASH, ("    return run.exit_code\n", again))
    outcome = lab.run("", RUN_LIMIT="1")
    assert outcome.code == 1 and outcome.output.endswith("alive\n")
    assert "ZeroDivisionError" in outcome.errors and "not done" not in outcome.errors

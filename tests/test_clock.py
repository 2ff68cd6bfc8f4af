"""Experiment: seed, clock, summary and errors of one run, under a clock that the tests move; the watchdog for real."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from forks import Forks, Job

import prepare
from prepare import Experiment, Tokenizer, TrainError, evaluate_bpb, make_dataloader

SUMMARY = (
    "val_bpb training_seconds total_seconds peak_vram_mb mfu_percent total_tokens_M num_steps num_params_M depth "
    "startup_seconds eval_seconds seed fingerprint"
)


def uniform(inputs):
    return torch.zeros(*inputs.shape, prepare.VOCAB_SIZE, device=inputs.device)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """What the harness reads; it stands still unless a test moves it."""
    clock = Clock()
    monkeypatch.setattr(prepare.time, "perf_counter", clock)
    return clock


@pytest.fixture
def tokenizer(cache, monkeypatch, tmp_path) -> Tokenizer:
    """The tokenizer of a prepared corpus, on the CPU and outside any repository."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, "default_device", lambda: torch.device("cpu"))
    set_constant(monkeypatch, "PROBES", 16)  # here they only cost time
    return Tokenizer.from_directory()


def set_constant(monkeypatch, name: str, value: float) -> None:
    """Another constant, as if prepare.py said so."""
    monkeypatch.setattr(prepare, name, value)
    monkeypatch.setitem(prepare._CONSTANTS, name, value)


def train(run: Experiment, clock: Clock, seconds: float = 100.0) -> None:
    for _ in run.steps():
        clock.now += seconds


def only_line(text: str) -> str:
    """The error line, after a check that it is the only one."""
    assert re.fullmatch(r"error: [^\n]+\n", text), text
    return text


# -- seed --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given, seed", [(None, 42), ("7", 7)])
def test_torch_is_seeded_by_the_harness(tokenizer, monkeypatch, given, seed):
    if given:
        monkeypatch.setenv("SEED", given)
    torch.manual_seed(0)
    with Experiment("toy") as run:
        drawn = torch.rand(5)
    assert run.seed == seed
    assert torch.equal(drawn, torch.rand(5, generator=torch.Generator().manual_seed(seed)))


def test_a_seed_that_is_no_number_is_refused(tokenizer, monkeypatch, capsys):
    monkeypatch.setenv("SEED", "lucky")
    with pytest.raises(SystemExit, match="^1$"):
        Experiment("toy").__enter__()
    assert only_line(capsys.readouterr().err) == "error: SEED is 'lucky', not a whole number; unset it\n"


def test_reseeding_is_invalid(tokenizer, clock, capsys):
    with Experiment("toy") as run:
        train(run, clock)
        torch.manual_seed(1234)
        evaluate_bpb(uniform, tokenizer, 6)
    assert run.exit_code == 1
    assert "torch's seed is 1234, not 42" in only_line(capsys.readouterr().err)


# -- clock -------------------------------------------------------------------------------------------------------------


def test_every_step_counts_and_progress_rises_from_0(tokenizer, clock):
    seen = []
    with Experiment("toy") as run:
        clock.now += 60  # start-up is free
        for step, progress in run.steps():
            seen.append((step, progress))
            clock.now += 7
    assert seen == [(i, pytest.approx(7 * i / 300)) for i in range(42)]  # 42 * 7 = 294, a 43rd step would end at 301
    assert prepare.TIME_BUDGET == 300


@pytest.mark.parametrize(
    "seconds, steps",
    [
        ([100] * 9, 3),  # the third one ends exactly with the budget
        ([101] * 9, 2),
        ([299] * 9, 1),
        ([400] * 9, 1),
        ([10, 150, 10, 10], 2),  # at 160 s, a step like the last one would end at 310 s
        ([100] + [1] * 300, 201),  # a slow first step does not cost the others theirs
    ],
)
def test_the_loop_ends_before_a_step_that_would_pass_the_budget(tokenizer, clock, seconds, steps):
    taken = 0
    with Experiment("toy") as run:
        for step, _ in run.steps():
            clock.now += seconds[step]
            taken += 1
    assert taken == steps


def test_the_clock_starts_once(tokenizer, clock, capsys):
    with Experiment("toy") as run:
        train(run, clock)
        train(run, clock)
        evaluate_bpb(uniform, tokenizer, 6)
    assert run.exit_code == 1
    only_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    "budget, seconds, valid", [(300, 305.9, True), (300, 306.1, False), (60, 64.9, True), (60, 65.1, False)]
)
def test_at_most_5_seconds_or_2_percent_over_the_budget_count(
    tokenizer, clock, monkeypatch, capsys, budget, seconds, valid
):
    set_constant(monkeypatch, "TIME_BUDGET", budget)
    with Experiment("toy") as run:
        train(run, clock, seconds)
        evaluate_bpb(uniform, tokenizer, 6)
    assert run.exit_code == (0 if valid else 1)
    errors = capsys.readouterr().err
    assert valid and not errors or f"trained for {seconds} s, not" in only_line(errors)


def test_what_comes_between_the_loop_and_the_metric_is_not_free(tokenizer, clock, capsys):
    with Experiment("toy") as run:
        train(run, clock, 50)
        clock.now += 7  # averaging weights, say
        evaluate_bpb(uniform, tokenizer, 6)
    assert run.exit_code == 1
    assert "trained for 307.0 s" in only_line(capsys.readouterr().err)


def test_training_data_cannot_be_drawn_before_the_clock(tokenizer):
    drawn = []
    with Experiment("toy") as run:
        with pytest.raises(TrainError, match="before the clock"):
            next(make_dataloader(tokenizer, 2, 16))
        drawn.append("refused")
        batches = make_dataloader(tokenizer, 2, 16)
        for _ in run.steps():
            drawn.append(next(batches)[0].shape)
            break
    assert drawn == ["refused", (2, 16)]
    assert next(make_dataloader(tokenizer, 2, 16))[0].shape == (2, 16)  # without an Experiment there is no clock


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_the_host_cannot_outrun_the_clock(cache, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    set_constant(monkeypatch, "TIME_BUDGET", 2)
    steps = 0
    with Experiment("toy") as run:
        for _ in run.steps():
            torch.cuda._sleep(300_000_000)  # cycles, 0.15 to 0.3 s, which the host does not wait for
            steps += 1
        evaluate_bpb(uniform, Tokenizer.from_directory(), 6)
    assert run.exit_code == 0
    assert steps > 3 and 1 < run.training_seconds < 2.7


# -- score and summary -------------------------------------------------------------------------------------------------


def test_summary_has_the_keys_of_the_interface_in_their_order(tokenizer, clock, capsys):
    with Experiment("toy") as run:
        clock.now += 20
        train(run, clock, 74.5)
        val_bpb = evaluate_bpb(uniform, tokenizer, 6)
        clock.now += 4.25
        run.summary(mfu_percent="n/a", total_tokens_M=1.26, num_steps=4, num_params_M=11.55, depth=3)
        out = capsys.readouterr().out
        run.summary(mfu_percent=39.8765, total_tokens_M=1.26, num_steps=4, num_params_M=11.55, depth=3)
    again, errors = capsys.readouterr()
    assert again == out.replace("  n/a", "  39.88")
    assert (run.exit_code, errors) == (0, "")
    head, *lines = out.splitlines()
    values = {key: value.strip() for key, value in (line.split(":") for line in lines)}
    assert head == "---" and " ".join(values) == SUMMARY
    measured = {"val_bpb": f"{val_bpb:.6f}", "training_seconds": "298.0", "total_seconds": "322.2"}
    measured |= {"startup_seconds": "20.0", "eval_seconds": "0.0", "seed": "42", "fingerprint": run.fingerprint}
    told = {"mfu_percent": "n/a", "total_tokens_M": "1.3", "num_steps": "4", "num_params_M": "11.6", "depth": "3"}
    assert values == measured | told | {"peak_vram_mb": values["peak_vram_mb"]}
    assert float(values["peak_vram_mb"]) > 10
    assert re.fullmatch("[0-9a-f]{8}", values["fingerprint"])


def test_evaluation_before_the_clock_is_invalid(tokenizer, capsys):
    with Experiment("toy") as run:
        evaluate_bpb(uniform, tokenizer, 6)
    assert run.exit_code == 1
    assert "before the clock started" in only_line(capsys.readouterr().err)


def test_a_second_evaluation_is_invalid(tokenizer, clock, capsys):
    with Experiment("toy") as run:
        train(run, clock)
        evaluate_bpb(uniform, tokenizer, 6)
        evaluate_bpb(uniform, tokenizer, 6)
    assert run.exit_code == 1
    assert "twice" in only_line(capsys.readouterr().err)


def test_an_invalid_model_has_no_score_even_if_its_error_is_caught(tokenizer, clock, capsys):
    with Experiment("toy") as run:
        train(run, clock)
        with pytest.raises(prepare.MetricError):
            evaluate_bpb(lambda inputs: uniform(inputs).mean(), tokenizer, 6)
    assert run.exit_code == 1
    assert "without a score" in only_line(capsys.readouterr().err)


@pytest.mark.parametrize("name, value", [("TIME_BUDGET", 600), ("TOLERANCE", 1.0), ("EVAL_TOKENS", 2**14)])
def test_a_changed_constant_is_refused_at_the_start_and_at_the_end(tokenizer, clock, monkeypatch, capsys, name, value):
    found = f"{name} is {value}, not {getattr(prepare, name)}"
    with Experiment("toy") as run:
        train(run, clock)
        with monkeypatch.context() as patch:
            patch.setattr(prepare, name, value)
            evaluate_bpb(uniform, tokenizer, 6)
    assert run.exit_code == 1
    assert found in only_line(capsys.readouterr().err)
    monkeypatch.setattr(prepare, name, value)
    with pytest.raises(SystemExit, match="^1$"):
        Experiment("toy").__enter__()
    assert found in only_line(capsys.readouterr().err)


# -- errors ------------------------------------------------------------------------------------------------------------


def test_a_run_without_a_score_is_an_error(tokenizer, clock, capsys):
    with Experiment("toy") as run:
        train(run, clock)
    assert run.exit_code == 1
    assert "without a score" in only_line(capsys.readouterr().err)


def test_an_error_of_ours_is_one_line(tokenizer, capsys):
    with Experiment("toy") as run:
        raise TrainError("the loss is NaN at step 3; lower the learning rate")
    assert run.exit_code == 1
    assert capsys.readouterr().err == "error: the loss is NaN at step 3; lower the learning rate\n"


def ping(frames: int) -> None:
    pong(frames - 1) if frames else int("deep")


def pong(frames: int) -> None:
    ping(frames - 1) if frames else int("deep")


@pytest.mark.parametrize("frames", [3, 200])
def test_another_error_is_a_traceback_of_at_most_30_lines(tokenizer, capsys, frames):
    with Experiment("toy") as run:
        ping(frames)
    assert run.exit_code == 1
    traceback = capsys.readouterr().err.splitlines()
    assert traceback[0] == "Traceback (most recent call last):"
    assert traceback[-1] == "ValueError: invalid literal for int() with base 10: 'deep'"
    assert any(f"line {ping.__code__.co_firstlineno + 1}, in ping" in line for line in traceback)
    assert 10 < len(traceback) <= 30
    assert ("  ..." in traceback) == (frames == 200)


@pytest.fixture(scope="module")
def forks(cache, tmp_path_factory) -> Iterator[Forks]:
    with Forks(tmp_path_factory.mktemp("forks")) as forks:
        yield forks


def experiment(forks: Forks, body: str, cache: Path | None = None, before: str = "") -> Job:
    """A train.py of a few lines, in a process of its own."""
    lines = ["import ctypes, os, signal, sys, time", f"sys.path.insert(0, {str(ROOT)!r})", "import prepare", before]
    lines += ["with prepare.Experiment('toy') as run:", f"    {body}", "sys.exit(run.exit_code)"]
    return forks.run(first="\n".join(lines), env={"AUTORESEARCH_CACHE": cache} if cache else {}, timeout=100)


ANNOUNCE_STEPS = "for step, _ in run.steps(): print('step', step, flush=True)"


def test_training_before_prepare_is_an_error(forks, tmp_path):
    result = experiment(forks, ANNOUNCE_STEPS, tmp_path / "empty")
    assert (result.returncode, result.stdout) == (1, "")
    assert "nothing is prepared" in (line := only_line(result.stderr)) and "run: uv run prepare.py" in line


@pytest.mark.parametrize("which", ["tokenizer", "validation rows", "token file"])
def test_an_altered_file_is_found_before_the_first_step(forks, cache_copy, which):
    folder = cache_copy / (cache_copy / "active-small").read_text()
    pattern = {"tokenizer": "tokenizer-*", "validation rows": "validation*", "token file": "train*"}[which]
    (path,) = (folder / "tokens").glob(pattern)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    result = experiment(forks, ANNOUNCE_STEPS, cache_copy)
    assert (result.returncode, result.stdout) == (1, "")
    line = only_line(result.stderr)
    assert str(path) in line and "altered" in line and "delete it and run prepare.py again" in line


def test_ctrl_c_is_one_line_and_exit_code_1(forks):
    interrupt = "[os.kill(os.getpid(), signal.SIGINT) or time.sleep(30) for _ in run.steps()]"
    # a shell that runs the tests in the background leaves SIGINT ignored
    result = experiment(forks, interrupt, before="signal.signal(signal.SIGINT, signal.default_int_handler)")
    assert result.returncode == 1
    assert "interrupted" in only_line(result.stderr)


# -- watchdog ----------------------------------------------------------------------------------------------------------

SHORT = "for name in ('TIME_BUDGET', 'GRACE'): setattr(prepare, name, 0.5); prepare._CONSTANTS[name] = 0.5"


def test_a_hang_is_ended_with_all_stacks_and_a_line_that_says_so(forks):
    before = f"{SHORT}\ndef stuck(): time.sleep(600)"
    result = experiment(forks, "stuck()", before=before)
    assert result.returncode == 1
    assert re.search(r'File "<string>", line \d+ in stuck\n', result.stderr)
    assert re.match(r"error: .*1\.0 s.*stacks above", result.stderr.splitlines()[-1])


@pytest.mark.slow
def test_a_hang_that_holds_the_interpreter_is_ended_too(forks):
    before = f"{SHORT}\ndef stuck(): ctypes.PyDLL(None).sleep(600)"  # PyDLL keeps the lock of the interpreter
    begun = time.monotonic()
    result = experiment(forks, "stuck()", before=before)
    assert time.monotonic() - begun > 30
    assert result.returncode == 1
    assert re.search(r'File "<string>", line \d+ in stuck\n', result.stderr)


def test_a_run_that_has_ended_is_left_alone(tokenizer, monkeypatch):
    for name in ("TIME_BUDGET", "GRACE"):
        set_constant(monkeypatch, name, 0.1)
    killed = []
    monkeypatch.setattr(prepare.os, "_exit", killed.append)
    with Experiment("toy") as run:
        pass
    time.sleep(0.4)
    assert run.exit_code == 1 and not killed

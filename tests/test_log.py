"""run.log: the line of progress, losses that are hopeless, and what the summary takes from it.

The clock stands still unless a test moves it, so that every figure of a line can be told beforehand.
"""

import itertools
import math
import re
from dataclasses import replace

import pytest
import torch
from helpers.experiments import StillClock, keep_cuda_busy, toy, uniform
from torch.overrides import TorchFunctionMode

import prepare
from prepare import AutoresearchError, Experiment, Tokenizer, evaluate_bpb

REMEDY = "lower the learning rates, or warm up"


def bytes_per_token() -> float:
    """Of the targets of the validation rows, counted one by one."""
    tokenizer = Tokenizer.from_directory()
    targets = [token for row in tokenizer.data.rows.tolist() for token in row[1:]]
    words = tokenizer.encoding.decode_tokens_bytes([t for t in targets if t != tokenizer.bos])
    return sum(map(len, words)) / len(targets)


def train(run: Experiment, clock: StillClock, losses: list, seconds: float = 2.5, **details) -> int:
    """Log these losses, the last one again and again, a step every few seconds; the number of steps."""
    losses = iter([*losses[:-1], *itertools.repeat(losses[-1], 10_000)])
    count = 0
    for _ in run.steps():
        clock.now += seconds
        run.log(torch.as_tensor(next(losses)), **details)
        count += 1
    return count


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("step ")]


# -- the line ------------------------------------------------------------------------------------------------


def test_the_line_of_progress(cache, clock, capsys):
    """400 tokens a second of 3 GFLOP each are 12 % of 10 TFLOPS."""
    with toy() as run:
        run.log.peak_flops = 10e12
        train(run, clock, [4.5], tokens=1000, flops_per_token=3e9, lr_frac=0.5, epoch=3)
    bpb = 4.5 / math.log(2) / bytes_per_token()
    shown = lines(capsys.readouterr().out)
    assert len(shown) == 30
    for number, line in enumerate(shown, 1):
        assert line.split(" | ") == [
            f"step {4 * number:5d}",
            f"{number / 30:4.0%}",
            f"loss 4.5000 nat, {bpb:.3f} bpb",
            "lr 0.50",
            "2500 ms/step",
            "400 tok/s",
            "mfu 12.00",
            "epoch 3",
            f"{300 - 10 * number} s left",
        ]


def test_a_line_with_nothing_but_the_loss(cache, clock, capsys):
    with toy() as run:
        train(run, clock, [2.0])
    first = lines(capsys.readouterr().out)[0]
    assert re.search(r"\| lr nan \| 2500 ms/step \| 0 tok/s \| mfu n/a \| epoch 0 \| 290 s left$", first)


@pytest.mark.parametrize("seconds, first, apart", [(1.0, 10, 10), (4.0, 3, 3), (9.9, 3, 2), (30.0, 3, 1)])
def test_a_line_about_every_ten_seconds(cache, clock, capsys, seconds, first, apart):
    """The first one as soon as a loss has been read, two steps late."""
    with toy() as run:
        steps = train(run, clock, [3.0], seconds)
    shown = [int(line.split()[1]) for line in lines(capsys.readouterr().out)]
    assert shown == list(range(first, steps + 1, apart))


def test_figures_are_those_since_the_last_line(cache, clock, capsys):
    with toy() as run:
        run.log.peak_flops = 1e12
        for step, _ in run.steps():
            clock.now += 5 if step < 4 else 2
            tokens = 100 if step < 4 else 50
            run.log(torch.tensor(3.0), tokens=tokens, flops_per_token=1e9, lr_frac=step / 100, epoch=step)
            if step == 6:
                break
    first, second = (line.split(" | ")[3:8] for line in lines(capsys.readouterr().out))
    assert first == ["lr 0.02", "5000 ms/step", "20 tok/s", "mfu 2.00", "epoch 2"]  # 15 s, 300 tokens
    assert second == ["lr 0.06", "2750 ms/step", "23 tok/s", "mfu 2.27", "epoch 6"]  # 11 s, 250 tokens


def test_the_loss_is_an_average_two_steps_late(cache, clock, capsys):
    """The newest one counts a tenth."""
    losses = [9.0, 7.0, 5.0, 4.0, 3.0, 2.5]
    with toy() as run:
        train(run, clock, losses, seconds=11)
    average = losses[0]
    expected = [average]
    for loss in [*losses[1:], *[losses[-1]] * 30]:
        average = 0.9 * average + 0.1 * loss
        expected.append(average)
    shown = [float(re.search(r"loss ([\d.]+) nat", line)[1]) for line in lines(capsys.readouterr().out)]
    assert len(shown) > 20
    assert shown == pytest.approx(expected[: len(shown)], abs=6e-5)


def test_the_table_of_devices_finds_each_name():
    """A longer name comes first, so that H100 PCIe is not taken for H100."""
    for name in prepare.PEAK_TFLOPS:
        assert prepare.known_name(f"NVIDIA {name} 80GB") == name
    assert prepare.known_name("NVIDIA RTX A1000") == ""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_mfu_is_that_of_this_device():
    name = prepare.known_name(torch.cuda.get_device_name())
    log = prepare.TrainingLog(torch.device("cuda"), bytes_per_token=3.0)
    assert log.peak_flops == 1e12 * prepare.PEAK_TFLOPS.get(name, 0)


# -- losses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, 101.0])
def test_a_bad_loss_is_found_two_steps_late(cache, clock, bad):
    with toy() as run:
        for step, _ in run.steps():
            clock.now += 1
            loss = torch.tensor([5.0, 100.0, 4.0, bad, 3.0, 3.0][step])
            if step < 5:
                run.log(loss)
                continue
            with pytest.raises(AutoresearchError, match=rf"^step 3: the loss is {bad:.4g}, .*; {REMEDY}$"):
                run.log(loss)
            break
    assert step == 5


@pytest.mark.parametrize("bad_step", [0, 1, 2])
def test_a_bad_loss_is_found_when_the_loop_ends(cache, clock, capsys, bad_step):
    losses = [5.0, 5.0, 5.0]
    losses[bad_step] = math.nan
    with toy() as run:
        train(run, clock, losses, seconds=100)
        raise AssertionError("the loop has ended without an error")
    assert run.exit_code == 1
    found = f"error: step {bad_step}: the loss is nan, not a number up to 100; {REMEDY}\n"
    assert capsys.readouterr().err == found


class Reads(TorchFunctionMode):
    """Notes what torch is asked to do; `values` are the numbers that the host has read."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()
        self.values: list[float] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names.add(function.__name__)
        if not isinstance(result, torch.Tensor):
            self.values.append(result)
        return result


def test_the_host_reads_a_loss_two_steps_late(cache, clock):
    """Each of them once, and none of the present step, for which it would wait."""
    with toy() as run:
        losses = [torch.tensor(float(step)) for step in range(12)]
        for step, _ in run.steps():
            clock.now += 25
            with Reads() as reads:
                run.log(losses[step])
            assert reads.values == ([step - 2] if step >= 2 else [])
            assert reads.names <= {"__getitem__", "copy_", "detach", "item"}
    assert step == 11


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_the_host_does_not_wait(cache):
    with Experiment() as run:
        for step, _ in run.steps():
            keep_cuda_busy()
            loss = torch.ones((), device="cuda") * (step + 1)
            run.log(loss)
            assert not torch.cuda.current_stream().query(), "the step is over: nothing was put to the test"
            if step == 5:
                break
        torch.cuda.synchronize()
        run.log(loss)
    expected = 1.0
    for loss in (2, 3, 4, 5):
        expected = 0.9 * expected + 0.1 * loss
    assert run.log.average_loss == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_loss_that_needs_grad_is_taken_as_it_is(cache, clock, capsys, dtype):
    """Neither its graph nor its memory is held."""
    weight = torch.ones(3, dtype=dtype, requires_grad=True)
    with toy() as run:
        for _ in run.steps():
            clock.now += 10
            loss = weight.sum()
            assert loss.dim() == 0 and loss.requires_grad
            run.log(loss)
            loss.backward()
            loss.detach().fill_(math.nan)  # as a buffer is used again
    assert not run.log.losses.requires_grad and weight.grad.tolist() == [30] * 3
    shown = lines(capsys.readouterr().out)
    assert len(shown) == 28 and all("loss 3.0000 nat" in line for line in shown)


# -- the summary ---------------------------------------------------------------------------------------------


def finished(clock: StillClock, told: dict, **details) -> Experiment:
    """A run of three steps of 100 s that has a score, on a device of 1 TFLOPS."""
    with toy() as run:
        run.log.peak_flops = 1e12
        assert train(run, clock, [5.0], seconds=100, **details) == 3
        prepare.CLOCK.stop(run.data)
        prepare.CLOCK.finish(1.25)
        run.summary(**told)
    return run


def values(text: str) -> dict[str, str]:
    block = text.partition("---\n")[2]
    return {key: value.strip() for key, value in (line.split(":") for line in block.splitlines())}


def test_the_summary_takes_its_figures_from_the_log(cache, clock, capsys):
    run = finished(clock, {}, tokens=40_000, flops_per_token=5e5, epoch=2)
    out, errors = capsys.readouterr()
    found = values(out)
    assert (run.exit_code, errors) == (0, "")
    assert found["num_steps"] == "3" and found["total_tokens_M"] == "0.1"
    assert found["mfu_percent"] == "0.02"  # 120,000 tokens of 0.5 MFLOP in 300 s
    assert found["num_params_M"] == found["depth"] == "n/a"
    corpus = sum(path.stat().st_size for path in run.data.train_paths) // 2
    read = f"read 120,000 tokens, {120_000 / corpus:.2f} of the corpus, up to epoch 2\n"
    assert out.partition("---\n")[0].endswith(read)


def test_what_train_py_tells_wins(cache, clock, capsys):
    told = {"mfu_percent": 55.5, "total_tokens_M": 7.25, "num_steps": 12, "num_params_M": 1.5, "depth": 4}
    finished(clock, told, tokens=40_000, flops_per_token=5e5)
    found = values(capsys.readouterr().out)
    assert found["mfu_percent"] == "55.50" and found["total_tokens_M"] == "7.2"
    assert (found["num_steps"], found["num_params_M"], found["depth"]) == ("12", "1.5", "4")


def test_a_run_that_never_logs_is_scored(cache, clock, capsys):
    whole = Tokenizer.from_directory()
    data = replace(whole.data, rows=whole.data.rows[:12])  # to save time
    with toy() as run:
        for _ in run.steps():
            clock.now += 100
        val_bpb = evaluate_bpb(uniform, Tokenizer(data.tokenizer_path, data), 6)
        run.summary()
    out, errors = capsys.readouterr()
    found = values(out)
    assert (run.exit_code, errors) == (0, "")
    assert found["val_bpb"] == f"{val_bpb:.6f}" and 1 < val_bpb < 11
    assert found["num_steps"] == found["total_tokens_M"] == found["mfu_percent"] == "n/a"
    assert not lines(out) and "read " not in out

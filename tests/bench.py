"""The figures of speed and memory, for this machine: run by hand, not by pytest, while nothing else runs.

    uv run python tests/bench.py [--quick]

Prints a line about the hardware and then a table, row by row, that can be pasted into the README. It takes
about 12 minutes on two CPU cores; --quick leaves out the full run, which is half of that. All of it happens
in a temporary folder, on the Python sources of this environment: no network, no record, and a val_bpb that
compares only with others on the same sources.
"""

import argparse
import itertools
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import prepare  # noqa: E402
import train  # noqa: E402

SHORT_BUDGET = 10  # seconds of training where only the time around it counts
LOADER_TOKENS = 20_000_000
LOADER_REPEATS = 7
ATTENTION_STEPS = 4
ATTENTION_ROUNDS = 5


def config_of(scale: str) -> train.Config:
    return train.CONFIGS["MAC" if prepare.default_device().type == "mps" else scale.upper()]


def row(figure: str, values: list[float], form: str = ",.1f") -> None:
    """A row of the table: median, spread and number of the values; "n/a" where there are none."""
    middle = low = high = "n/a"
    if values:
        numbers = (statistics.median(values), min(values), max(values))
        middle, low, high = (f"{number:{form}}" for number in numbers)
    spread = f"{low} to {high}" if len(values) > 1 else ""
    print(f"| {figure:<64} | {middle:>10} | {spread:>22} | {len(values) or '':>2} |", flush=True)


# == 1. Other processes ========================================================


def make_lab(folder: Path) -> Path:
    """A folder with this train.py and prepare.py."""
    folder.mkdir()
    for name in ("prepare.py", "train.py"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def run(
    lab: Path, scale: str, *command: object, caches: Path | None = None, budget: int | None = None
) -> tuple[float, float, str]:
    """(seconds, peak GiB, output) of `python COMMAND` in the lab; the benchmark ends if that fails.

    `caches` is the folder for what torch, Triton and Python compile, in place of the usual ones. On Linux the
    peak is at least that of the parent; here that is an `import torch`, which every child does as well.
    """
    env = os.environ | {"AUTORESEARCH_SCALE": scale}
    if budget:
        env["AUTORESEARCH_BUDGET"] = str(budget)
    if caches:
        for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "PYTHONPYCACHEPREFIX"):
            env[name] = str(caches / name)
        env["PYTHONDONTWRITEBYTECODE"] = ""  # which is off: else no later run would find any
    command = [sys.executable, *map(str, command)]
    # a file, no pipe: a compiler's worker that outlives its parent would hold that open
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        begun = time.perf_counter()
        process = subprocess.Popen(command, cwd=lab, env=env, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begun
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
    if process.returncode:
        sys.exit(f"error: exit code {process.returncode} of {' '.join(command)}\n{text[-5000:]}")
    return seconds, usage.ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20), text


def run_training(lab: Path, scale: str, budget: int | None = None) -> dict[str, float]:
    """The numbers of the summary of a plain run; `outside_seconds` is all of its time but the training."""
    seconds, _, text = run(lab, scale, "train.py", caches=lab.parent / f"caches-{scale}", budget=budget)
    found = re.findall(r"^([a-zM_]+): +([\d.]+)$", text, re.MULTILINE)
    summary = {key: float(value) for key, value in found}
    epochs = [int(epoch) for epoch in re.findall(r"\| epoch (\d+) \|", text)]
    summary["epoch"] = max(epochs, default=1)
    summary["outside_seconds"] = seconds - summary["training_seconds"]
    return summary


def run_part(scale: str, part: str) -> None:
    """A part of this file in a process of its own: the scale is read once, when prepare.py is imported."""
    env = os.environ | {"AUTORESEARCH_SCALE": scale}
    subprocess.run([sys.executable, __file__, "--part", part], env=env, check=True)


# == 2. Figures of whole programs ==============================================


def preparation(lab: Path, scale: str) -> None:
    command = (lab, scale, "prepare.py", "--data", "python")
    seconds, peak_gib, text = run(*command)
    row(f"{scale}: prepare.py --data python, empty cache, s", [seconds])
    row(f"{scale}: prepare.py --data python, peak memory, GiB", [peak_gib], ".2f")
    tokens = re.search(r"^data: ([\d,]+) training tokens", text, re.MULTILINE)[1]
    row(f"{scale}: training tokens in that corpus, M", [int(tokens.replace(",", "")) / 1e6])
    again = [run(*command) for _ in range(3)]
    assert all("nothing to do" in text for _, _, text in again), again
    row(f"{scale}: prepare.py --data python, nothing to do, s", [seconds for seconds, _, _ in again])


def training_rows(label: str, runs: list[dict[str, float]]) -> None:
    row(f"{label}, outside the training, s", [found["outside_seconds"] for found in runs])
    row(f"{label}, start-up before the clock, s", [found["startup_seconds"] for found in runs])
    row(f"{label}, evaluation, s", [found["eval_seconds"] for found in runs])
    row(f"{label}, peak memory, GiB", [found["peak_vram_mb"] / 1024 for found in runs], ".2f")


def around_training(lab: Path, scale: str) -> None:
    """The first run finds nothing compiled, neither kernels nor Python's bytecode; the others find it all."""
    runs = [run_training(lab, scale, SHORT_BUDGET) for _ in range(4)]
    training_rows(f"{scale}: train.py, cold caches", runs[:1])
    training_rows(f"{scale}: train.py, warm caches", runs[1:])


def imports(lab: Path, scale: str) -> None:
    """Whole processes, alternating, with the bytecode of the training runs."""
    seconds = {"torch": [], "train": []}
    for module in [*seconds] * 5:
        took, _, _ = run(lab, scale, "-c", f"import {module}", caches=lab.parent / f"caches-{scale}")
        seconds[module].append(took)
    for module in seconds:
        row(f"python -c 'import {module}', s", seconds[module], ".2f")


def full_run(lab: Path, scale: str) -> None:
    label = f"{scale}: full run"
    found = run_training(lab, scale)
    tokens = found["num_steps"] * config_of(scale).batch_tokens  # the summary has them in millions, rounded
    row(f"{label}, val_bpb on the Python sources", [found["val_bpb"]], ".6f")
    row(f"{label}, training tokens/s", [tokens / found["training_seconds"]], ",.0f")
    row(f"{label}, MFU, %", [found["mfu_percent"]] if "mfu_percent" in found else [], ".2f")
    row(f"{label}, steps", [found["num_steps"]], ",.0f")
    row(f"{label}, epoch at the end", [found["epoch"]], ",.0f")
    training_rows(label, [found])


# == 3. Parts, each in a process of its own ====================================


def anonymous_mib() -> float | None:
    """Resident memory of this process in MiB, without the mapped token files; None where it is not known."""
    if sys.platform == "linux":
        return int(re.search(r"RssAnon:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
    return None


def dataloader() -> None:
    """Batches on the CPU, from one process."""
    T = prepare.MAX_SEQ_LEN
    B = 64 if prepare.SCALE == "small" else 32
    batches = prepare.make_dataloader(prepare.Tokenizer.from_directory(), B, T, device="cpu")
    count = LOADER_TOKENS // (B * T)
    speeds = []
    resident = []
    for _ in range(LOADER_REPEATS):
        begun = time.perf_counter()
        for _ in itertools.islice(batches, count):
            pass
        speeds.append(count * B * T / (time.perf_counter() - begun) / 1e6)
        resident.append(anonymous_mib())
    row(f"{prepare.SCALE}: dataloader, {B} rows of {T}, M tokens/s", speeds)
    tokens_M = (LOADER_REPEATS - 2) * LOADER_TOKENS // 10**6
    growth = f"memory growth in the last {tokens_M}M tokens, MiB"
    row(f"{prepare.SCALE}: dataloader, {growth}", [resident[-1] - resident[1]] if resident[1] else [])


def back_ends(config: train.Config, device: torch.device) -> dict[str, Callable]:
    """{name: a function that makes it} for each attention back end that is meant for this device."""
    makers = {"sdpa_attention": lambda: train.sdpa_attention}
    if train.can_compile(device):
        windows = set(config.layer_windows(prepare.MAX_SEQ_LEN))
        makers["flex_attention"] = lambda: train.flex_attention_for(prepare.MAX_SEQ_LEN, windows, device)
        makers["flash_attention_3"] = prepare.load_flash_attention_3
    return makers


def training_step(config: train.Config, device: torch.device, attend: Callable) -> tuple[Callable, int]:
    """A warmed-up function that takes one step on random tokens, and its FLOPs: as in train.train."""
    T = prepare.MAX_SEQ_LEN
    dtype = train.compute_dtype(device)
    compiled = train.can_compile(device)
    prepare.keep_freed_memory()
    with device:
        model = train.GPT(config, prepare.VOCAB_SIZE, T, attend, dtype)
    if compiled:
        torch.set_float32_matmul_precision("high")
        torch._dynamo.config.recompile_limit = 64  # several models share the code that is compiled
        model.compile(dynamic=False)
    optimizer = train.MuonAdamW(model, config, dtype, compiled)
    first = train.first_rows(config, device)
    rows = prepare.fit_micro_batch(lambda rows: train.warm_up(model, optimizer, rows, 42), first)
    micro_batches = config.micro_batches(rows, T)
    inputs, targets = torch.randint(prepare.VOCAB_SIZE, (2, rows, T), device=device)

    def step() -> None:
        train.accumulate_gradients(model, itertools.repeat((inputs, targets, 0)), micro_batches)
        optimizer.step(1.0, config.muon_momentum[0], config.matrix_weight_decay)
        model.zero_grad()

    return step, config.batch_tokens * model.flops_per_token()


def attention() -> None:
    """Training steps with each back end, the back ends in turn."""
    config = config_of(prepare.SCALE)
    device = prepare.default_device()
    synchronize = torch.accelerator.synchronize if device.type != "cpu" else lambda: None
    steps = {}
    seconds = {}
    batch_flops = 0
    for name, make in back_ends(config, device).items():
        try:
            steps[name], batch_flops = training_step(config, device, make())
            seconds[name] = []
        except Exception as error:  # no network, no kernel for this device, ...: the others can be measured
            reason = f"{type(error).__name__}: {error}".splitlines()[0].replace("|", "/")
            row(f"{prepare.SCALE}: {name} does not run here ({reason[:80]})", [])
    for name in [*steps] * ATTENTION_ROUNDS:
        synchronize()
        begun = time.perf_counter()
        for _ in range(ATTENTION_STEPS):
            steps[name]()
        synchronize()
        seconds[name].append(time.perf_counter() - begun)
    name = prepare.known_name(torch.cuda.get_device_name(device)) if device.type == "cuda" else ""
    peak = 1e12 * prepare.PEAK_TFLOPS.get(name, 0)
    for name in steps:
        speeds = [ATTENTION_STEPS * config.batch_tokens / s for s in seconds[name]]
        row(f"{prepare.SCALE}: {name}, training tokens/s", speeds, ",.0f")
        mfus = [100 * ATTENTION_STEPS * batch_flops / s / peak for s in seconds[name]] if peak else []
        row(f"{prepare.SCALE}: {name}, MFU, %", mfus, ".2f")


def logits() -> None:
    """What the metric asks of a model at once: this one looks at its first inputs and gives up."""

    class Asked(Exception):
        pass

    def model(inputs: torch.Tensor) -> torch.Tensor:
        raise Asked(inputs.numel())

    try:
        rows = config_of(prepare.SCALE).eval_rows
        prepare.evaluate_bpb(model, prepare.Tokenizer.from_directory(), rows)
    except Asked as asked:
        gib = asked.args[0] * prepare.VOCAB_SIZE * 4 / 2**30
        limit = prepare.LOGITS_BYTES / 2**30
        row(f"{prepare.SCALE}: logits that the evaluation holds, limit {limit:.2f}, GiB", [gib], ".2f")


PARTS = {part.__name__: part for part in (dataloader, attention, logits)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the figures of speed and memory for this machine.")
    parser.add_argument("--quick", action="store_true", help="leave out the full run of training")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        return PARTS[options.part]()
    here = prepare.SCALE  # full with CUDA, small without, unless AUTORESEARCH_SCALE says otherwise
    device = prepare.default_device()
    versions = f"{train.compute_dtype(device)}, torch {torch.__version__}, Python {sys.version.split()[0]}"
    cores = f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads"
    print(f"{prepare.device_name(device)}; {cores}, {versions}\n")
    print(f"| {'figure':<64} | {'median':>10} | {'min to max':>22} |  n |\n|---|---:|---:|---:|", flush=True)
    with tempfile.TemporaryDirectory(prefix="autoresearch-bench-", ignore_cleanup_errors=True) as folder:
        lab = make_lab(Path(folder) / "lab")
        os.environ |= {"AUTORESEARCH_CACHE": f"{folder}/cache", "HF_HUB_OFFLINE": "1"}  # for the children
        for name in ("SEED", "AUTORESEARCH_BUDGET"):
            os.environ.pop(name, None)
        for scale in dict.fromkeys(("full", "small", here)):
            preparation(lab, scale)
            run_part(scale, "dataloader")
            run_part(scale, "logits")
        for scale in dict.fromkeys(("small", here)):
            around_training(lab, scale)
        imports(lab, "small")
        run_part(here, "attention")
        if not options.quick:
            full_run(lab, here)


if __name__ == "__main__":
    main()

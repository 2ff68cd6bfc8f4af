"""What the device decides: the scale, the number of threads, the fingerprint, how a run starts."""

import os
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.lab import Lab
from helpers.machine import block, on_machine, use_cpus
from helpers.own import ready
from helpers.script import load

import prepare
import train
from train import GPT, SMALL, MuonAdamW

# == Scales ==================================================================================================

CARDS = {  # name as the driver gives it, GiB: scale
    ("NVIDIA H100 80GB HBM3", 79.1): "full",
    ("NVIDIA H100 PCIe", 79.1): "full",
    ("NVIDIA H200", 139.8): "full",
    ("NVIDIA GH200 480GB", 94.5): "full",
    ("NVIDIA B200", 178.3): "full",
    ("NVIDIA A100-SXM4-40GB", 39.4): "full",
    ("NVIDIA A100-PCIE-40GB", 39.4): "full",
    ("AMD Instinct MI300X", 191.7): "full",
    ("NVIDIA GeForce RTX 3090", 23.6): "desktop",
    ("NVIDIA GeForce RTX 4090", 23.5): "desktop",
    ("NVIDIA GeForce RTX 5090", 31.4): "desktop",
    ("NVIDIA RTX A1000", 7.7): "desktop",  # A100 is in its name
    ("NVIDIA RTX A1000", 79.0): "desktop",
    ("NVIDIA L40S", 44.4): "desktop",
    ("Tesla T4", 14.6): "desktop",
    ("NVIDIA GB10", 119.7): "desktop",
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 9.75): "desktop",
    ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", 19.5): "desktop",
    ("NVIDIA H200 MIG 4g.71gb", 70.0): "desktop",
    ("A card of next year", 500.0): "desktop",
    ("", 80.0): "desktop",
}


@pytest.mark.parametrize("card", CARDS, ids=lambda card: f"{card[0] or 'no name'}, {card[1]} GiB")
def test_a_card_has_its_scale(card, monkeypatch):
    StandInCard(monkeypatch, *card)
    assert prepare.default_scale() == CARDS[card]


def test_the_longest_name_gives_the_peak():
    """H100 stands in the names of three cards, of which two are slower."""
    names = [
        "NVIDIA H100 80GB HBM3",
        "NVIDIA H100 PCIe",
        "NVIDIA H100 NVL",
        "NVIDIA GH200 480GB",
        "NVIDIA L40S",
    ]
    assert [prepare.PEAK_TFLOPS[prepare.known_name(name)] for name in names] == [989.5, 756, 835, 989.5, 362]
    for name in (
        "NVIDIA RTX A1000",
        "NVIDIA GB10",
        "AMD Radeon RX 7900 XTX",
        "NVIDIA A10G",
        "NVIDIA H200 MIG 4g.71gb",
        "",
    ):
        assert prepare.known_name(name) == ""


class StandInCard:
    """Is asked for its name and memory as a CUDA device is, which initialises CUDA."""

    def __init__(self, patch: pytest.MonkeyPatch, name: str, gib: float):
        self.answer = SimpleNamespace(name=name, total_memory=int(gib * 2**30))
        self.allocator: list[str | None] = []  # its setting whenever CUDA was initialised
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "get_device_properties", self.properties)

    def properties(self, number: int) -> SimpleNamespace:
        assert number == 0
        self.allocator.append(os.environ.get("PYTORCH_ALLOC_CONF"))
        return self.answer


@pytest.mark.parametrize("own", [None, "max_split_size_mb:64"])
def test_the_allocator_is_set_before_cuda_begins(own, monkeypatch):
    card = StandInCard(monkeypatch, "NVIDIA GeForce RTX 3090", 23.6)
    module = load(AUTORESEARCH_SCALE=None, PYTORCH_ALLOC_CONF=own)
    assert module.SCALE == "desktop"
    assert card.allocator == [own or "expandable_segments:True"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this device has another scale")
def test_without_cuda_the_scale_is_small():
    """On a CPU, and on MPS: neither is asked for."""
    assert load(AUTORESEARCH_SCALE=None).SCALE == "small"
    assert load(AUTORESEARCH_SCALE="").SCALE == "small"


@pytest.mark.parametrize("scale", ["full", "desktop", "small"])
def test_a_scale_can_be_chosen(scale, monkeypatch):
    """Whatever device is there. It decides the rows, the vocabulary, the corpus and the time to start."""
    StandInCard(monkeypatch, "NVIDIA H100 80GB HBM3", 79.1)
    module = load(AUTORESEARCH_SCALE=scale)
    sizes = (module.MAX_SEQ_LEN, module.VOCAB_SIZE, module.EVAL_TOKENS, module.TRAIN_TOKENS)
    wanted = {
        "full": (2048, 8192, 40 * 524_288, 0),
        "desktop": (2048, 8192, 10 * 524_288, 0),
        "small": (256, 2048, 2**18, 2**23),
    }
    assert module.SCALE == scale and sizes == wanted[scale]
    assert module.DEFAULT_CORPUS == ("tinystories" if scale == "small" else "climbmix")
    assert (module.TIME_BUDGET, module.GRACE) == (300, 300 if scale == "small" else 600)
    long = load(AUTORESEARCH_SCALE=scale, AUTORESEARCH_BUDGET="36000")
    assert (long.TIME_BUDGET, long.GRACE) == (36_000, 3600)


@pytest.mark.parametrize("scale", ["full", "desktop"])
def test_another_scale_refuses_a_folder(scale, cache, corpus):
    ours = cache / (cache / "active-small").read_text()
    module = load(AUTORESEARCH_SCALE=scale, AUTORESEARCH_CACHE=cache)
    with pytest.raises(
        module.AutoresearchError, match=f"'small'.*not.*'{scale}'.*run prepare.py again"
    ) as error:
        module.Tokenizer.from_directory(ours)
    assert str(ours) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(module.AutoresearchError, match=f"nothing is prepared for {scale} in .*run") as error:
        module.Tokenizer.from_directory()
    assert "\n" not in str(error.value)


def test_the_refusal_is_one_line(cache_copy, tmp_path):
    """Also where somebody has made the folder of another scale the active one."""
    marker = cache_copy / "active-small"
    (cache_copy / "active-desktop").write_text(marker.read_text())
    lab = Lab.create(tmp_path / "lab")
    outcome = lab.run(AUTORESEARCH_SCALE="desktop", AUTORESEARCH_CACHE=str(cache_copy))
    assert outcome.code == 1 and re.fullmatch(r"error: .*'small'.*'desktop'.*--data\n", outcome.errors)


# == CPUs ====================================================================================================

ALL_CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
NEEDS_TWO_CPUS = pytest.mark.skipif(ALL_CPUS < 2, reason="with one CPU there is nothing to limit")


class Groups:
    """A tree of control groups, as the kernel shows them, and a process in one of them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.proc = folder / "proc-self-cgroup"
        self.root = folder / "cgroup"

    def is_in(self, *lines: str) -> None:
        self.proc.write_text("".join(line + "\n" for line in lines))

    def v2(self, group: str, limit: str) -> None:
        path = self.root / group
        path.mkdir(parents=True, exist_ok=True)
        (path / "cpu.max").write_text(limit + "\n")

    def v1(self, group: str, quota: int, period: int = 100_000, controllers: str = "cpu,cpuacct") -> None:
        path = self.root / controllers / group
        path.mkdir(parents=True, exist_ok=True)
        (path / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        (path / "cpu.cfs_period_us").write_text(f"{period}\n")

    def cpus(self) -> int:
        return prepare.usable_cpus(str(self.proc), str(self.root))


@pytest.fixture
def groups(tmp_path: Path) -> Groups:
    return Groups(tmp_path)


QUOTAS = {  # microseconds of 100,000: CPUs; without a quota those of the affinity
    "none": (None, ALL_CPUS),
    "one": (100_000, 1),
    "one and a half": (150_000, 1),
    "half of one": (50_000, 1),
    "a hundred": (10_000_000, ALL_CPUS),
}


@NEEDS_TWO_CPUS
@pytest.mark.parametrize("quota", QUOTAS)
@pytest.mark.parametrize("version", [1, 2])
def test_a_quota_limits_the_cpus(version, quota, groups):
    microseconds, cpus = QUOTAS[quota]
    if version == 1:
        groups.is_in("12:memory:/box", "3:cpuset:/box", "2:cpu,cpuacct:/box", "1:name=systemd:/", "0::/")
        groups.v1("box", microseconds or -1)
    else:
        groups.is_in("0::/box")
        groups.v2("box", f"{microseconds or 'max'} 100000")
    assert groups.cpus() == cpus


@NEEDS_TWO_CPUS
@pytest.mark.parametrize("version", [1, 2])
def test_the_smallest_quota_above_counts(version, groups):
    """Of the process's group and those that it lies in; not of those beside it."""
    quota = {1: groups.v1, 2: lambda group, microseconds: groups.v2(group, f"{microseconds} 100000")}[version]
    groups.is_in({1: "4:cpu,cpuacct:/outer/middle/inner", 2: "0::/outer/middle/inner"}[version])
    quota("outer/middle/inner", 9_000_000)
    quota("outer/beside", 100_000)
    assert groups.cpus() == ALL_CPUS
    quota("outer", 100_000)
    assert groups.cpus() == 1


@NEEDS_TWO_CPUS
def test_odd_files_say_nothing(groups):
    assert groups.cpus() == ALL_CPUS, "no /proc at all, as on a Mac"
    groups.is_in(f"0::/{'x' * 300}")
    assert groups.cpus() == ALL_CPUS, "the name is longer than a file's may be"
    groups.v2("", "")
    assert groups.cpus() == ALL_CPUS
    groups.is_in("0::/box")
    (groups.root / "box" / "cpu.max").mkdir(parents=True)
    assert groups.cpus() == ALL_CPUS, "it cannot be read"


@NEEDS_TWO_CPUS
def test_a_container_sees_its_group_at_the_top(groups):
    """The path is the host's, and is not there."""
    groups.is_in("4:cpu,cpuacct:/docker/0123456789ab", "0::/docker/0123456789ab")
    groups.v1("", 100_000)
    assert groups.cpus() == 1


@pytest.fixture(scope="module")
def lab(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Its train.py says how many threads torch has."""
    lab = Lab.create(tmp_path_factory.mktemp("threads") / "lab")
    lab.edit(
        ("    model = Model()\n", '    model = Model()\n    print("torch has", torch.get_num_threads())\n')
    )
    return lab


@pytest.mark.slow
@NEEDS_TWO_CPUS
def test_usable_cpus_follow_the_affinity(lab, tmp_path):
    """They decide the threads, and scores of different numbers of them do not compare."""
    one, two, *_ = sorted(os.sched_getaffinity(0))
    fingerprints = []
    for cpus in ([one], [two], [one, two]):
        job = on_machine(tmp_path / str(cpus), lab, "train.py", first=use_cpus(*cpus))
        assert job.returncode == 0, job.stderr
        assert f"torch has {len(cpus)}\n" in job.stdout and f" {len(cpus)} threads\n" in job.stdout
        fingerprints.append(re.search(r"fingerprint: +(\w+)", job.stdout)[1])
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


@NEEDS_TWO_CPUS
def test_prepare_counts_the_cpus_too(forks, cache, corpus):
    one, two, *_ = sorted(os.sched_getaffinity(0))
    told = [ready(forks.run("--data", corpus, first=use_cpus(*cpus))) for cpus in ([one], [one, two], [one])]
    assert told[0] == told[2] != told[1]


@pytest.mark.slow
@NEEDS_TWO_CPUS
def test_fewer_threads_are_obeyed_and_more_are_not(lab):
    more = lab.run(OMP_NUM_THREADS="64")
    note = f"note: OMP_NUM_THREADS is 64, but only {ALL_CPUS} CPUs may be used, and are"
    assert note in more.output.splitlines() and f"torch has {ALL_CPUS}\n" in more.output
    fewer = lab.run(OMP_NUM_THREADS="1")
    assert "OMP_NUM_THREADS" not in fewer.output and "torch has 1\n" in fewer.output
    for useless in ("0", "-1", "many", ""):
        outcome = lab.run(OMP_NUM_THREADS=useless)
        assert outcome.code == 0 and f"torch has {ALL_CPUS}\n" in outcome.output, outcome.errors


# == Without fcntl and resource, as on Windows ===============================================================


@pytest.mark.slow
def test_neither_fcntl_nor_resource_is_needed(corpus, tmp_path):
    """It prepares, trains for seconds, records and reports."""
    lab = Lab.create(tmp_path / "lab")
    env = {"AUTORESEARCH_CACHE": tmp_path / "cache"}
    first = block("fcntl", "resource", forget=("filelock",))
    commands = {
        "prepare": ["prepare.py", "--data", corpus],
        "train": ["train.py", "baseline"],
        "report": ["prepare.py", "--report"],
    }
    outputs = {}
    for name, command in commands.items():
        job = on_machine(tmp_path / name, lab, *command, first=first, **env)
        assert (job.returncode, job.stderr) == (0, "")
        outputs[name] = job.stdout
    assert re.search(r"^ready: .*fingerprint", outputs["prepare"], re.MULTILINE)
    assert re.search(r"^peak_vram_mb: +nan$", outputs["train"], re.MULTILINE), "resource was there"
    assert re.search(r"^status: keep ", outputs["train"], re.MULTILINE)
    assert outputs["report"].startswith("1 experiments in ")
    assert [row["memory_gb"] for row in lab.rows()] == ["nan"]


# == Compiled ================================================================================================

TINY = replace(SMALL, depth=1, n_embd=32, head_dim=32, ngram_ratio=1, batch_tokens=32, eval_rows=2)


def sees_values(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    if v.sum() > 0:
        v = -v
    return train.sdpa_attention(q, k, v, window)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # of torch's compiler
def test_a_graph_break_is_one_line():
    """It names the line of code and what can be done."""
    model = GPT(TINY, 64, 16, sees_values, torch.float32)
    optimizer = MuonAdamW(model, TINY, torch.float32, compiled=False)
    train.warm_up(model, optimizer, 2, seed=42)
    model.compile(backend="eager", dynamic=False, fullgraph=True)
    with pytest.raises(prepare.AutoresearchError) as error:
        train.warm_up(model, optimizer, 2, seed=42)
    line = str(error.value)
    assert "`if v.sum() > 0:`" in line and "without fullgraph=True" in line and "\n" not in line
    assert error.value.__suppress_context__ and len(line) < 400

"""The attention back ends of the released train.py, against an explicit mask, and how one is chosen.

An agent that edits train.py need not keep these green: its test is a plain run of five seconds.
"""

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.fork_server import Request
from helpers.forks import Job
from helpers.kernel_hub import BUILD, COMMIT, WITHOUT_WINDOW, KernelHub
from torch import Tensor

import prepare
import train

CPU = torch.device("cpu")
ATTEND = Path(__file__).parent / "helpers" / "attend.py"
SNAPSHOT = f"hub/kernels--kernels-community--flash-attn3/snapshots/{COMMIT}"


# == Every back end computes the same ==


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Every score, then the mask, in float64."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    position = torch.arange(q.size(2), device=q.device)
    ago = position[:, None] - position
    scores = q @ k.mT / math.sqrt(q.size(-1))
    scores = scores.masked_fill(~((ago >= 0) & (ago <= window)), -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def back_end(name: str, seq_len: int, window: int):
    """(attention, device, dtype, error allowed), or a skip with the reason."""
    if name == "sdpa_attention":
        return train.sdpa_attention, "cpu", torch.float32, 1e-5
    if not torch.cuda.is_available():
        pytest.skip(f"{name} needs CUDA")
    if name == "flex_attention":
        flex = train.flex_attention_for(seq_len, {window}, torch.device("cuda"))
        return flex, "cuda", torch.float32, 1e-2
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip(f"{name} needs a Hopper GPU")
    try:
        return prepare.load_flash_attention_3(), "cuda", torch.bfloat16, 5e-2
    except Exception as error:
        pytest.skip(f"{name} did not load: {error}")


others_may_warn = pytest.mark.filterwarnings("ignore")  # torch's compiler, and the kernel of the hub
BACK_ENDS = [
    "sdpa_attention",
    pytest.param("flex_attention", marks=others_may_warn),
    pytest.param("flash_attention_3", marks=others_may_warn),
]


@pytest.mark.parametrize("window", [0, 1, 20, 100, 101])
@pytest.mark.parametrize("name", BACK_ENDS)
def test_attention_equals_an_explicit_mask(name, window):
    attend, device, dtype, allowed = back_end(name, 101, window)
    H = 16 if device == "cpu" else 64
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, 101, 4, H, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    want = explicit_attention(q, k, v, window)
    got = attend(q, k, v, window)
    assert got.shape == want.shape and got.dtype == dtype
    assert (got - want).abs().max() < allowed
    other_window = window + 1 if window < 100 else 99
    assert (got - explicit_attention(q, k, v, other_window)).abs().max() > 10 * allowed
    direction = torch.randn_like(want)
    got_grads = torch.autograd.grad(got, (q, k, v), direction.to(dtype))
    want_grads = torch.autograd.grad(want, (q, k, v), direction)
    for got_grad, want_grad in zip(got_grads, want_grads, strict=True):
        assert (got_grad - want_grad).abs().max() < 10 * allowed


@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # of torch's compiler
@pytest.mark.slow
def test_flex_attention_in_a_compiled_model():
    """On the CPU it only runs forwards; masks, layout and the whole graph are those of CUDA."""
    T = 24
    config = replace(
        train.SMALL, depth=3, n_embd=64, head_dim=16, windows="SL", short_window=5, ngram_ratio=8
    )
    models = []
    for attend in (train.flex_attention_for(T, set(config.layer_windows(T)), CPU), train.sdpa_attention):
        torch.manual_seed(0)
        model = train.GPT(config, 61, T, attend, torch.float32)
        with torch.no_grad():
            for param in model.parameters():
                param.add_(torch.randn_like(param) * 0.1)
        models.append(model)
    models[0].compile(backend="aot_eager", dynamic=False, fullgraph=True)
    idx = torch.randint(61, (2, T))
    with torch.no_grad():
        torch.testing.assert_close(models[0](idx), models[1](idx), rtol=1e-4, atol=1e-4)


# == One is chosen ==


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_without_a_compiler_it_is_sdpa(device):
    chosen = train.choose_attention(train.SMALL, torch.device(device), torch.bfloat16, 256)
    assert chosen is train.sdpa_attention


def attention_of(scale: float = 1.0, window_off_by: int = 0, leak: int = 0):
    """Attention with a fault."""

    def attend(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        k, v = (x.roll(-leak, dims=1) for x in (k, v))
        return scale * train.sdpa_attention(q, k, v, window + window_off_by)

    return attend


@pytest.mark.parametrize("fault", [{"scale": 1.1}, {"window_off_by": -1}, {"window_off_by": 1}, {"leak": 1}])
def test_wrong_numbers_are_noticed(fault):
    torch.manual_seed(0)
    qkv = torch.randn(3, 1, 256, 2, 64)
    train.check_agreement(attention_of(), qkv, window=64)
    with pytest.raises(ValueError, match="relative error"):
        train.check_agreement(attention_of(**fault), qkv, window=64)


def test_the_noise_of_bfloat16_is_allowed():
    def in_float32(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        return train.sdpa_attention(q.float(), k.float(), v.float(), window).to(q.dtype)

    torch.manual_seed(0)
    qkv = torch.randn(3, 1, 256, 2, 64).bfloat16()
    assert not in_float32(*qkv, 64).equal(train.sdpa_attention(*qkv, 64))
    train.check_agreement(in_float32, qkv, window=64)


def test_wrong_gradients_are_noticed():
    def attend(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        return train.sdpa_attention(q.detach(), k, v, window) + 0 * q

    with pytest.raises(ValueError, match="relative error"):
        train.check_agreement(attend, torch.randn(3, 1, 64, 2, 16), window=16)


# == FlashAttention-3 comes from the hub ==


def choose(folder: Path, hub: KernelHub, number: int = 0) -> tuple[dict, list[str]]:
    """What helpers/attend.py found, with a cache in `folder`, and the other lines that it printed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(folder / "hf")}
    environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "CUDA_VISIBLE_DEVICES": ""}
    job = Job(folder / f"job-{number}", Request(str(folder), environment, [str(ATTEND)])).wait()
    assert (job.returncode, job.stderr) == (0, "")
    *lines, found = job.stdout.splitlines()
    return json.loads(found), lines


def assert_flash_attention_3(found: dict, lines: list[str]) -> None:
    assert (found["name"], lines) == ("flash_attention_3", [])
    assert len(found["errors"]) == 4
    assert max(found["errors"].values()) < 1e-5


def assert_fell_through(found: dict, lines: list[str], reason: str) -> None:
    assert found["name"] == "flex_attention [20, 96] of 96" and found["seconds"] < 5
    (line,) = lines
    assert line.startswith("FlashAttention-3 is not used (") and line.endswith("); FlexAttention is")
    assert reason in line


@pytest.mark.slow
def test_the_kernel_loads_online_then_offline(tmp_path):
    with KernelHub() as hub:
        assert_flash_attention_3(*choose(tmp_path, hub))
        assert (
            f"GET /kernels/kernels-community/flash-attn3/resolve/{COMMIT}/{BUILD}/__init__.py" in hub.requests
        )
        assert (tmp_path / "hf" / SNAPSHOT / BUILD / "__init__.py").exists()

        hub.requests.clear()
        assert_flash_attention_3(*choose(tmp_path, hub, 1))
        assert hub.requests == []  # it is there, and not asked
    assert_flash_attention_3(*choose(tmp_path, hub, 2))


@pytest.mark.slow
def test_half_a_download_is_completed_later(tmp_path):
    with KernelHub(manner="half") as hub:
        assert_fell_through(*choose(tmp_path, hub), "Error")
        assert (tmp_path / "hf" / SNAPSHOT / BUILD / "metadata.json").exists()  # it came first
        hub.manner = "fine"
        assert_flash_attention_3(*choose(tmp_path, hub, 1))


@pytest.mark.slow
def test_a_cached_kernel_of_another_torch_is_replaced(tmp_path):
    other = (
        tmp_path / "hf" / SNAPSHOT.replace(COMMIT, "2" * 40) / "build" / "torch27-cxx11-cu126-x86_64-linux"
    )
    other.mkdir(parents=True)
    with KernelHub() as hub:
        for name in ("metadata.json", "__init__.py"):
            (other / name).write_bytes(hub.files[f"{BUILD}/{name}"])
        assert_flash_attention_3(*choose(tmp_path, hub))


@pytest.mark.slow
def test_without_a_hub_it_is_flex_attention(tmp_path):
    with KernelHub() as hub:
        pass
    assert_fell_through(*choose(tmp_path, hub), "ConnectionError")


@pytest.mark.slow
def test_a_hub_that_is_silent_is_soon_given_up(tmp_path):
    with KernelHub(manner="silent") as hub:
        assert_fell_through(*choose(tmp_path, hub), "ReadTimeout")
        assert hub.requests == ["HEAD /"]


def test_a_kernel_with_wrong_numbers_is_not_used(tmp_path):
    with KernelHub(kernel=WITHOUT_WINDOW) as hub:
        assert_fell_through(*choose(tmp_path, hub), "relative error to sdpa_attention")


def test_a_kernel_that_does_not_load_is_not_used(tmp_path):
    with KernelHub(kernel="raise ImportError('no build for this torch\\nand more')") as hub:
        assert_fell_through(*choose(tmp_path, hub), "no build for this torch)")

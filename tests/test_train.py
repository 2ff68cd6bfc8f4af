"""train.py on the CPU at toy size: every part against a reference, and the whole through the real command line."""

import functools
import itertools
import math
import os
import re
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, run
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

import prepare
import train
from train import GPT, Config, Monitor, MuonAdamW, TrainError, accumulate_gradients, fit_micro_batch, softcap, warm_up

CPU = torch.device("cpu")
TINY = replace(
    train.SMALL, depth=3, n_embd=32, head_dim=8, windows="SL", short_window=5, gate_channels=8, batch_tokens=8 * 24,
    micro_rows=8, logit_softcap=15.0, loss_chunk=50, init_scale=1.0, value_every=2, mlp_ratio=4,
)  # fmt: skip
V, T = 61, 24


def tiny_model(config: Config = TINY, attend=train.block_attention, seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    return GPT(config, V, T, attend, torch.float32)


def trained_a_little(model: GPT) -> GPT:
    """Weights as they can be later on: at the start the blocks write nothing, and nothing can be seen of them."""
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param) * 0.1)
    return model


def batches(rows: int, seed: int = 0):
    tokens = torch.randint(V, (rows, T + 1), generator=torch.Generator().manual_seed(seed))
    return itertools.repeat((tokens[:, :-1], tokens[:, 1:], 1))


# == Attention ==


def explicit_attention(q, k, v, window):
    """Every score, then the mask, in float64."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
    ago = torch.arange(q.size(2), device=q.device)[:, None] - torch.arange(q.size(2), device=q.device)
    scores = q @ k.mT / math.sqrt(q.size(-1))
    scores = scores.masked_fill(~((ago >= 0) & (ago <= window)), -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def back_end(name: str, seq_len: int, window: int):
    """(attention, device, dtype, error allowed), or a skip with the reason."""
    if name in ("block_attention", "sdpa_attention"):
        return getattr(train, name), "cpu", torch.float32, 1e-5
    if not torch.cuda.is_available():
        pytest.skip(f"{name} needs CUDA")
    if name == "flex_attention":
        return train.flex_attention(seq_len, {window}, torch.device("cuda")), "cuda", torch.float32, 1e-2
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip(f"{name} needs a Hopper GPU")
    try:
        return train.flash_attention_3(), "cuda", torch.bfloat16, 5e-2
    except Exception as error:
        pytest.skip(f"{name} did not load: {error}")


@pytest.mark.parametrize("window", [0, 1, 20, 101])
@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("name", ["block_attention", "sdpa_attention", "flex_attention", "flash_attention_3"])
def test_attention_equals_an_explicit_mask(name, kv_heads, window):
    attend, device, dtype, allowed = back_end(name, 101, window)
    H = 16 if device == "cpu" else 64
    torch.manual_seed(1)
    shapes = ((2, 101, 4, H), (2, 101, kv_heads, H), (2, 101, kv_heads, H))
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes)
    want = explicit_attention(q, k, v, window)
    got = attend(q, k, v, window)
    assert got.shape == want.shape and got.dtype == dtype
    assert (got - want).abs().max() < allowed
    assert (got - explicit_attention(q, k, v, window + 1 if window < 100 else 99)).abs().max() > 10 * allowed
    direction = torch.randn_like(want)
    for got_grad, want_grad in zip(
        torch.autograd.grad(got, (q, k, v), direction.to(dtype)),
        torch.autograd.grad(want, (q, k, v), direction),
        strict=True,
    ):
        assert (got_grad - want_grad).abs().max() < 10 * allowed


@given(
    seq_len=st.integers(1, 150), window=st.integers(0, 160), heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)])
)
def test_block_attention_equals_an_explicit_mask_for_any_shape(seq_len, window, heads):
    generator = torch.Generator().manual_seed(seq_len)
    q, k, v = (torch.randn(1, seq_len, n, 4, generator=generator) for n in (heads[0], heads[1], heads[1]))
    got = train.block_attention(q, k, v, window)
    assert (got - explicit_attention(q, k, v, window)).abs().max() < 1e-5


@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # torch's own, when it loads its compiler
@pytest.mark.slow
def test_flex_attention_in_a_compiled_model_equals_sdpa():
    """On the CPU it only runs forwards; masks, layout and the whole graph are those of CUDA."""
    config = replace(TINY, head_dim=16, queries_per_kv=2)
    attend = train.flex_attention(T, set(config.layer_windows(T)), CPU)
    model, twin = (trained_a_little(tiny_model(config, a)) for a in (attend, train.sdpa_attention))
    model.compile(backend="aot_eager", dynamic=False, fullgraph=True)
    idx = next(batches(2))[0]
    with torch.no_grad():
        torch.testing.assert_close(model(idx), twin(idx), rtol=1e-4, atol=1e-4)


def test_the_cpu_uses_block_attention_and_other_devices_without_a_compiler_sdpa():
    assert train.choose_attention(CPU, torch.bfloat16, 256, {256}) is train.block_attention
    assert train.choose_attention(torch.device("mps"), torch.float32, 256, {256}) is train.sdpa_attention


def test_a_kernel_that_does_not_load_falls_through_with_one_line(monkeypatch, capsys):
    def no_kernel():
        raise ValueError("no build for this torch\nand more")

    monkeypatch.setattr(train, "can_compile", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(train, "flash_attention_3", no_kernel)
    monkeypatch.setattr(train, "flex_attention", lambda *args: args)
    assert train.choose_attention(torch.device("cuda"), torch.bfloat16, 64, {5})[0] == 64
    (line,) = capsys.readouterr().out.splitlines()
    assert "no build for this torch" in line and "FlexAttention" in line


@pytest.mark.parametrize("base", [10_000.0, 200_000.0])
def test_rotary_scores_depend_on_the_distance_only(base):
    cos, sin = train.rotary_tables(50, 16, base)
    torch.manual_seed(0)
    q, k = (train.rotate(torch.randn(16).expand(1, 50, 1, 16), cos, sin)[0, :, 0] for _ in range(2))
    scores = q @ k.T
    for distance in range(-49, 50):
        diagonal = scores.diagonal(distance)
        assert (diagonal - diagonal[0]).abs().max() < 1e-4, distance
    assert scores[0].std() > 0.1


# == Model ==


def test_norm_equals_rms_norm():
    x = torch.randn(5, 7, 33, requires_grad=True)
    want, got = F.rms_norm(x, (33,), eps=0), train.norm(x)
    torch.testing.assert_close(got, want)
    direction = torch.randn_like(x)
    (want_grad,), (got_grad,) = (torch.autograd.grad(y, x, direction) for y in (want, got))
    torch.testing.assert_close(got_grad, want_grad)
    assert train.norm(torch.zeros(4)).equal(torch.zeros(4))


@pytest.mark.parametrize("config", [TINY, replace(TINY, queries_per_kv=2), replace(TINY, depth=1, windows="L")])
@pytest.mark.parametrize("attend", [train.block_attention, train.sdpa_attention])
def test_changing_the_future_does_not_move_the_past(config, attend):
    model = trained_a_little(tiny_model(config, attend))
    idx = next(batches(3))[0] % 7  # pairs come again
    assert len(train.followed(idx, V * idx + F.pad(idx, (1, -1)))[:, :7].unique()) > 2
    want = model(idx)
    for cut in (1, 7, T - 1):
        changed = idx.clone()
        changed[:, cut:] = (changed[:, cut:] + 1) % 7
        changed[1] = (changed[1] + 5) % 7
        got = model(changed)
        assert (got[[0, 2], :cut] - want[[0, 2], :cut]).abs().max() < 1e-4
        assert (got[0, cut:] - want[0, cut:]).abs().max() > 0.01


def test_the_last_token_sees_the_first_one():
    model = trained_a_little(tiny_model())
    idx = next(batches(1))[0]
    changed = idx.clone()
    changed[0, 0] = (changed[0, 0] + 1) % V
    assert (model(idx) - model(changed))[0, -1].abs().max() > 1e-4


def test_the_untrained_model_is_uniform_and_its_blocks_add_nothing():
    model = tiny_model()
    inputs, targets, _ = next(batches(4))
    assert model(inputs, targets).item() == pytest.approx(math.log(V), abs=0.01)
    x = torch.randn(1, T, TINY.n_embd)
    assert model.blocks[0](x, inputs[:1], model.cos, model.sin).equal(x)


def test_the_token_shift_adds_the_token_before_channel_by_channel():
    block, seen = tiny_model().blocks[0], []
    block.attn.forward = lambda h, *_: seen.append(h) or torch.zeros_like(h)
    block.c_fc.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    x, shift = torch.randn(2, T, TINY.n_embd), torch.randn(2, TINY.n_embd)
    with torch.no_grad():
        block.shift.copy_(shift)
    block(x, None, None, None)
    for got, by in zip(seen, shift, strict=True):
        want = train.norm(x)
        want[:, 1:] += by * train.norm(x)[:, :-1]
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("length", [1, 2, 3, 7])
def test_a_short_row_has_the_logits_of_a_longer_one(length):
    model = trained_a_little(tiny_model())
    idx = next(batches(2))[0] % 7
    torch.testing.assert_close(model(idx[:, :length]), model(idx)[:, :length], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [2, 3, 4, 5])
def test_a_token_has_a_row_for_each_ngram_that_it_ends(length):
    model, looked_up = tiny_model(replace(TINY, ngram_ratio=1024, ngram_tokens=length)), []
    model.ngrams.register_forward_hook(lambda module, args, output: looked_up.append(args[0]))
    inputs, changed = torch.randint(V, (1, T)), T // 2
    other = inputs.clone()
    other[0, changed] = (other[0, changed] + 1) % V
    logits, _ = model(inputs), model(other)
    found = [rows[0].nonzero().flatten().tolist() for rows in looked_up[0] != looked_up[1]]
    assert found == [list(range(changed, changed + tokens)) for tokens in range(2, length + 1)]
    assert len(looked_up[0].unique()) > 0.75 * T * (length - 1)
    with torch.no_grad():  # at first they add nothing, then each to its own tokens, as long as the blocks write nothing
        assert model.ngrams.weight.count_nonzero() == 0
        model.ngrams.weight[looked_up[0][:, 0, changed]] = torch.randn(length - 1, TINY.n_embd)
    moved = (model(inputs) != logits).any(dim=-1)
    assert moved.equal(torch.isin(looked_up[0], looked_up[0][:, 0, changed]).any(0))


def test_equal_runs_of_tokens_have_equal_rows_and_few_others_do():
    config = replace(TINY, ngram_ratio=1024, ngram_tokens=5)
    model, looked_up = GPT(config, 2048, T, train.block_attention, torch.float32), []
    model.ngrams.register_forward_hook(lambda module, args, output: looked_up.append(args[0]))
    inputs = torch.randint(2048, (64, T), generator=torch.Generator().manual_seed(0))
    model(inputs)
    for rows, before in zip(looked_up[0], range(1, 5), strict=True):
        keys = [tuple(row[i - before : i + 1]) for row in inputs.tolist() for i in range(before, T)]
        found = {}
        for key, row in zip(keys, rows[:, before:].flatten().tolist(), strict=True):
            assert found.setdefault(key, row) == row
        assert len(set(found.values())) > 0.995 * len(found)  # about 1,400 draws from two million rows


@given(st.lists(st.lists(st.integers(0, 4), min_size=9, max_size=9), min_size=1, max_size=4))
def test_followed_finds_the_token_after_the_last_earlier_occurrence(keys):
    tokens = torch.arange(len(keys) * 9).view(-1, 9)
    got = train.followed(tokens, torch.tensor(keys))
    for row in range(len(keys)):
        for i in range(9):
            earlier = [j for j in range(i) if keys[row][j] == keys[row][i]]
            assert got[row, i] == tokens[row, earlier[-1] + 1 if earlier else 0]


def test_the_token_that_followed_the_same_pair_is_embedded():
    model, seen = tiny_model(), []
    model.follower.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    model(torch.tensor([[0, 5, 7, 8, 9, 5, 7, 6, 5, 7]]))
    assert seen[0].tolist() == [[0, 0, 0, 0, 0, 0, 8, 0, 0, 6]]


def test_value_embeddings_sit_on_alternate_layers_with_the_gate_at_one():
    model = tiny_model(replace(TINY, depth=5))
    assert [block.attn.value_embed is not None for block in model.blocks] == [True, False, True, False, True]
    attn = model.blocks[-1].attn
    values = []
    attn.attend = lambda q, k, v, window: values.append(v) or q
    idx, x = next(batches(2))[0], torch.randn(2, T, TINY.n_embd)
    attn(x, idx, model.cos, model.sin)
    torch.testing.assert_close(values[0].flatten(2), attn.c_v(x) + attn.value_embed(idx))


def test_logits_are_float32_and_capped():
    model = GPT(TINY, V, T, train.block_attention, torch.bfloat16)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    logits = model(next(batches(2))[0])
    assert logits.dtype == torch.float32 and logits.shape == (2, T, V)
    assert 0.9 * TINY.logit_softcap < logits.abs().max() <= TINY.logit_softcap
    free = GPT(replace(TINY, logit_softcap=0.0), V, T, train.block_attention, torch.bfloat16)
    free.load_state_dict(model.state_dict())
    assert free(next(batches(2))[0]).abs().max() > 100 * TINY.logit_softcap


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cap", [1.0, 0.0])
def test_the_chunked_loss_equals_the_plain_one(cap, dtype):
    model = trained_a_little(tiny_model(replace(TINY, logit_softcap=cap)))  # 120 positions in chunks of 50
    params = list(model.parameters())
    inputs, targets, _ = next(batches(5))

    def plain_loss():
        return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())

    float32_grads = torch.autograd.grad(3 * plain_loss(), params)
    model.dtype, model.cos, model.sin = dtype, model.cos.to(dtype), model.sin.to(dtype)
    plain, chunked = plain_loss(), model(inputs, targets)
    torch.testing.assert_close(chunked, plain)
    grads = (torch.autograd.grad(3 * loss, params) for loss in (chunked, plain))
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    for got, plain_grad, want in zip(*grads, float32_grads, strict=True):  # of x0_lambdas bfloat16 itself is 7 % off
        assert (got - want).norm() <= (plain_grad - want).norm() + tolerance * want.norm()


@pytest.mark.parametrize("cap", [5.0, 0.0])
def test_gradients_of_the_chunked_loss_in_bfloat16(cap):
    torch.manual_seed(0)
    x = torch.randn(1000, 16).bfloat16().requires_grad_()
    weight = torch.randn(V, 16).bfloat16().float().requires_grad_()
    targets = torch.randint(V, (1000,))
    got = torch.autograd.grad(train.ChunkedLoss.apply(x, weight, targets, cap, 300), (x, weight))
    assert [grad.dtype for grad in got] == [torch.bfloat16, torch.float32]
    exact = F.cross_entropy(train.softcap(x.double() @ weight.double().mT, cap), targets)
    for grad, want in zip(got, torch.autograd.grad(exact, (x, weight)), strict=True):
        assert (grad - want).norm() <= 0.01 * want.norm()


def test_the_chunked_loss_tells_of_hopeless_logits():
    x, weight = torch.tensor([[1.0]]).repeat(3, 1), torch.tensor([[0.0], [200.0]])
    assert train.ChunkedLoss.apply(x, weight, torch.tensor([0, 0, 0]), 0.0, 2).item() > 100  # which ends a run


def test_flops_are_counted_as_the_reference_counts_them():
    reference = Config(depth=8, n_embd=512, windows="SSSL", short_window=1024)
    with torch.device("meta"):
        model = GPT(reference, 8192, 2048, train.sdpa_attention, torch.bfloat16)
    assert model.flops_per_token() == pytest.approx(239e6, rel=0.005)  # as published


def test_windows_repeat_and_the_last_layer_is_long():
    assert train.FULL.layer_windows(2048) == [256, 256, 256, 256, 2048, 256, 256, 256, 2048]
    assert replace(TINY, windows="S", depth=3, short_window=100).layer_windows(24) == [24, 24, 24]


@pytest.mark.parametrize("bad", [{"n_embd": 33}, {"head_dim": 1}, {"queries_per_kv": 3}, {"windows": "SX"}])
def test_a_config_that_cannot_be_built_is_refused(bad):
    with pytest.raises(ValueError, match=str(next(iter(bad.values())))):
        replace(TINY, **bad)


# == Optimizer ==


@pytest.mark.parametrize("sparse", [False, True])
def test_rows_take_steps_of_rmsprop_when_they_have_a_gradient(sparse):
    torch.manual_seed(0)
    table = torch.zeros(6, 3, requires_grad=True)
    state = [torch.zeros(6, 1), torch.zeros(6, 1)]
    want, moments, steps = torch.zeros(6, 3), [0.0] * 6, [0] * 6
    for batch in ([0, 2, 2, 5], [2, 0], [3, 3, 3], [2, 5]):
        grads = torch.randn(len(batch), 3)
        total = torch.zeros(6, 3).index_add_(0, torch.tensor(batch), grads)
        for row in set(batch):
            steps[row] += 1
            moments[row] = 0.9 * moments[row] + 0.1 * total[row].square().mean().item()
            want[row] -= 0.5 * total[row] / (moments[row] / (1 - 0.9 ** steps[row])) ** 0.5
        (F.embedding(torch.tensor(batch), table, sparse=sparse) * grads).sum().backward()
        assert table.grad.is_sparse == sparse
        with torch.no_grad():
            train.rowwise_update(table, table.grad, *state, **train.scalars(lr=0.5, beta2=0.9))
        table.grad = None
        torch.testing.assert_close(table.detach(), want)
    assert table[[1, 4]].count_nonzero() == 0


def test_a_sparse_and_a_dense_gradient_of_the_ngrams_make_equal_steps():
    models = tiny_model(), tiny_model()
    models[1].load_state_dict(models[0].state_dict())
    models[1].ngrams.sparse = False  # as on a GPU
    optimizers = [MuonAdamW(model, TINY, torch.float32, compiled=False) for model in models]
    for _ in range(3):
        batch = [next(batches(4, seed=0)), next(batches(4, seed=1))]
        for model, optimizer in zip(models, optimizers, strict=True):
            accumulate_gradients(model, iter(batch), 2)
            optimizer.step(lr_frac=0.01, momentum=0.85, matrix_weight_decay=0.0)
            model.zero_grad()
    assert models[0].ngrams.sparse and models[0].ngrams.weight.count_nonzero() > 0
    torch.testing.assert_close(models[0].ngrams.weight, models[1].ngrams.weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape, lowest, highest",
    [((128, 64), 0.85, 1.15), ((64, 128), 0.85, 1.15), ((256, 64), 0.82, 1.15), ((64, 64), 0.0, 1.15)],
)
def test_orthogonalized_matrices_have_singular_values_near_one(shape, lowest, highest, dtype):
    torch.manual_seed(0)
    matrices = torch.randn(4, *shape)
    got = train.orthogonalize(matrices, dtype).float()
    assert got.shape == matrices.shape
    values = torch.linalg.svdvals(got)
    assert values.min() > lowest - 0.02 and values.max() < highest + 0.02
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)  # the same singular vectors
    cosine = ((u @ vh) * got).sum((-2, -1)) / (torch.linalg.matrix_norm(got) * min(shape) ** 0.5)
    assert cosine.min() > 0.97


def one_muon_update(params, grads, weight_decay=0.0, lr=1.0, state=None):
    state = state or [torch.zeros_like(params), torch.zeros_like(train.neuron_means(params))]
    numbers = train.scalars(lr=lr, momentum=0.9, beta2=0.95, weight_decay=weight_decay)
    train.muon_update(params, grads, *state, dtype=torch.float32, **numbers)
    return params


@pytest.mark.parametrize("shape, scale", [((128, 64), 2**0.5), ((64, 128), 1.0), ((256, 64), 2.0)])
def test_a_muon_update_has_singular_values_near_its_learning_rate(shape, scale):
    torch.manual_seed(0)
    moved = one_muon_update(torch.zeros(3, *shape), torch.randn(3, *shape) * 1e-3, lr=0.5)
    values = torch.linalg.svdvals(moved) / (0.5 * scale)  # NorMuon evens the neurons out and widens the range a little
    assert values.min() > 0.75 and values.max() < 1.25


def test_muon_moves_a_regression_towards_lower_loss():
    torch.manual_seed(0)
    x, target = torch.randn(200, 24), torch.randn(24, 16)
    params = torch.zeros(1, 24, 16)
    state = [torch.zeros_like(params), torch.zeros_like(train.neuron_means(params))]
    losses = []
    for _ in range(60):
        error = x @ (params[0] - target)
        losses.append(error.square().mean().item())
        one_muon_update(params, (x.T @ error)[None] / len(x), lr=0.1, state=state)
    assert losses[1] < losses[0] and losses[-1] < 0.05 * losses[0]


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (16, 16)])
def test_normuon_keeps_the_frobenius_norm_and_evens_out_the_neurons(shape):
    torch.manual_seed(0)
    update = torch.randn(3, *shape) * torch.rand(3, shape[0], 1) * torch.rand(3, 1, shape[1])
    second_moment = torch.zeros_like(train.neuron_means(update))
    assert second_moment.numel() == 3 * max(shape)
    got = train.normalize_neurons(update, second_moment, torch.tensor(0.95))
    torch.testing.assert_close(torch.linalg.matrix_norm(got), torch.linalg.matrix_norm(update))
    sizes, before = train.neuron_means(got.square()).flatten(1), train.neuron_means(update.square()).flatten(1)
    assert (sizes / sizes.mean(1, keepdim=True) - 1).abs().max() < 1e-3
    assert (before / before.mean(1, keepdim=True) - 1).abs().max() > 0.5


def test_weight_decay_is_cautious():
    torch.manual_seed(0)
    params, grads = torch.randn(2, 12, 6), torch.randn(2, 12, 6)
    plain, decayed = (one_muon_update(params.clone(), grads, decay, lr=0.01) for decay in (0.0, 0.2))
    agree = (params - plain) * params > 0  # the update takes away from the weight already
    assert 0.2 < agree.float().mean() < 0.8
    want = torch.where(agree, 0.01 * 2**0.5 * 0.2 * params, 0.0)
    torch.testing.assert_close(plain - decayed, want, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("config", [TINY, replace(TINY, queries_per_kv=4, depth=2), train.SMALL])
def test_every_parameter_is_in_one_group(config):
    model = tiny_model(config)
    optimizer = MuonAdamW(model, config, torch.float32, compiled=False)
    grouped = [optimizer.ngrams, *itertools.chain(*optimizer.stacks, *(group["params"] for group in optimizer.groups))]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))
    assert all(len({param.shape for param in stack}) == 1 for stack in optimizer.stacks)


def test_a_parameter_without_a_group_is_named():
    model = tiny_model()
    model.blocks[1].extra = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match=r"blocks\.1\.extra"):
        MuonAdamW(model, TINY, torch.float32, compiled=False)


def test_an_optimizer_step_moves_every_parameter_by_its_own_rate():
    model = trained_a_little(tiny_model())
    optimizer = MuonAdamW(model, TINY, torch.float32, compiled=False)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    accumulate_gradients(model, batches(8), 1)
    optimizer.step(lr_frac=0.5, momentum=0.85, matrix_weight_decay=0.0)
    moved = {name: (param - before[name]).abs().max().item() for name, param in model.named_parameters()}
    assert all(moved.values()), moved
    by_width = (TINY.n_embd / 768) ** -0.5  # AdamW's first step is one learning rate for each entry
    assert moved["wte.weight"] == pytest.approx(0.5 * TINY.embedding_lr * by_width, rel=0.01)
    ngrams = (model.ngrams.weight - before["ngrams.weight"]).square().mean(-1).sqrt()
    torch.testing.assert_close(ngrams[ngrams > 0], torch.full_like(ngrams[ngrams > 0], 0.5 * TINY.ngram_lr * by_width))
    assert moved["blocks.0.shift"] == pytest.approx(0.5 * TINY.shift_lr, rel=0.01)
    assert moved["lm_head.weight"] == pytest.approx(0.5 * TINY.head_lr * by_width, rel=0.01)
    assert moved["x0_lambdas"] == pytest.approx(0.5 * TINY.x0_lr, rel=0.01)
    assert moved["resid_lambdas"] == pytest.approx(0.5 * TINY.resid_lr, rel=0.01)


def test_adamw_has_the_weight_decays_and_betas_of_the_config():
    model = tiny_model()
    optimizer = MuonAdamW(model, TINY, torch.float32, compiled=False)
    found = {param: group for group in optimizer.adamw.param_groups for param in group["params"]}
    for param, weight_decay, betas in (
        (model.wte.weight, TINY.embedding_weight_decay, TINY.adam_betas),
        (model.follower.weight, TINY.embedding_weight_decay, TINY.adam_betas),
        (model.blocks[-1].attn.value_embed.weight, TINY.value_weight_decay, TINY.adam_betas),
        (model.lm_head.weight, TINY.head_weight_decay, TINY.adam_betas),
        (model.x0_lambdas, 0.0, TINY.x0_betas),
        (model.resid_lambdas, 0.0, TINY.adam_betas),
        (model.blocks[0].shift, 0.0, TINY.adam_betas),
    ):
        group = found[param]
        assert (group["weight_decay"], group["betas"], group["eps"]) == (weight_decay, betas, TINY.adam_eps)


# == Schedules ==


def test_schedules_have_the_stated_ends():
    config = replace(TINY, warmup_frac=0.1, warmdown_frac=0.5, final_lr_frac=0.05)
    lr = functools.partial(train.learning_rate_frac, config=config)
    assert [lr(0.0), lr(0.05), lr(0.1), lr(0.5), lr(1.0)] == pytest.approx([0.0, 0.5, 1.0, 1.0, 0.05])
    assert lr(0.75) == pytest.approx((1 + 0.05) / 2)
    assert train.learning_rate_frac(0.0, train.FULL) == 1.0
    assert train.learning_rate_frac(1.0, replace(config, warmdown_frac=0.0)) == 1.0
    momentum = [train.muon_momentum(step, train.FULL) for step in (0, 100, 200, 5000)]
    assert momentum == pytest.approx([0.85, 0.90, 0.95, 0.95])


@given(warmup=st.floats(0, 0.5), warmdown=st.floats(0, 0.5), final=st.floats(0, 1), progress=st.floats(0, 1))
def test_the_learning_rate_stays_between_zero_and_its_peak(warmup, warmdown, final, progress):
    config = replace(TINY, warmup_frac=warmup, warmdown_frac=warmdown, final_lr_frac=final)
    assert 0 <= train.learning_rate_frac(progress, config) <= 1


# == Training ==


def test_accumulation_gives_the_same_gradients():
    model = trained_a_little(tiny_model())
    inputs, targets, _ = next(batches(8))
    losses, gradients = [], []
    for count in (1, 2, 4):
        parts = zip(inputs.chunk(count), targets.chunk(count), range(count), strict=True)
        loss, epoch = accumulate_gradients(model, parts, count)
        assert epoch == count - 1
        losses.append(loss)
        gradients.append([param.grad.to_dense().clone() for param in model.parameters()])
        model.zero_grad()
    assert max(grad.abs().max() for grad in gradients[0]) > 0.01
    for loss, grads in zip(losses[1:], gradients[1:], strict=True):
        torch.testing.assert_close(loss, losses[0])
        torch.testing.assert_close(grads, gradients[0], rtol=1e-4, atol=1e-6)


def test_a_tiny_model_learns_a_repeating_sequence():
    config = replace(TINY, matrix_lr=0.02)
    model = tiny_model(config)
    optimizer = MuonAdamW(model, config, torch.float32, compiled=False)
    cycle = torch.randperm(V, generator=torch.Generator().manual_seed(0))[:7].repeat(10)
    rows = torch.stack([cycle[i : i + T + 1] for i in range(8)])
    for step in range(60):
        loss, _ = accumulate_gradients(model, iter([(rows[:, :-1], rows[:, 1:], 0)]), 1)
        optimizer.step(1 - step / 60, train.muon_momentum(step, config), 0.0)
        model.zero_grad()
    assert loss.item() < 0.02


def test_warm_up_leaves_no_trace(monkeypatch):
    model, twin = tiny_model(), tiny_model()
    optimizers = [MuonAdamW(m, TINY, torch.float32, compiled=False) for m in (model, twin)]
    steps, step = [], optimizers[0].step
    monkeypatch.setattr(optimizers[0], "step", lambda *numbers: steps.append(numbers) or step(*numbers))
    torch.manual_seed(5)
    random_state = torch.get_rng_state()
    warm_up(model, optimizers[0], 8)
    assert len(steps) == 2 and model.training
    assert torch.get_rng_state().equal(random_state)
    for m, optimizer in zip((model, twin), optimizers, strict=True):
        assert not optimizer.state and not optimizer.adamw.state
        assert all(param.grad is None for param in m.parameters())
        for _ in range(3):
            accumulate_gradients(m, batches(8), 1)
            optimizer.step(1.0, 0.9, 0.1)
            m.zero_grad()
    for (name, got), want in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert got.equal(want), name


@pytest.mark.slow
def test_model_and_updates_compile_as_one_graph_and_do_the_same():
    """As on CUDA: dense gradients, numbers as 0-D tensors."""
    models = [trained_a_little(tiny_model(replace(TINY, windows="L"), train.sdpa_attention)) for _ in range(2)]
    for model in models:
        model.ngrams.sparse = False
    optimizers = [MuonAdamW(model, TINY, torch.float32, compiled=False) for model in models]
    one_graph = functools.partial(torch.compile, backend="aot_eager", dynamic=False, fullgraph=True)
    optimizers[1].muon_update, optimizers[1].rowwise_update = map(one_graph, (train.muon_update, train.rowwise_update))
    optimizers[1].numbers = train.scalars
    for step in range(3):
        inputs, targets, _ = next(batches(8, seed=step))
        for model in (models[0], one_graph(models[1])):
            F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
        for (name, param), twin in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            assert (param.grad - twin.grad).norm() <= 1e-4 * param.grad.norm(), name
            twin.grad = param.grad.clone()  # AdamW makes much of little
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.step(0.1, 0.9, 0.1)
            model.zero_grad()
        for (name, param), twin in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            assert (param - twin).norm() <= 1e-4 * param.norm(), name


def test_at_full_scale_forward_pass_and_step_stay_on_the_gpu(monkeypatch):
    """Fake tensors have a device and a shape and compute nothing: they need no GPU, and refuse to mix devices."""
    monkeypatch.setattr(train, "window_mask", train.window_mask.__wrapped__)  # its cache must not keep fake ones
    device = torch.device("cuda", 0)
    with FakeTensorMode():
        with device:
            model = GPT(train.FULL, 8192, 2048, train.sdpa_attention, torch.bfloat16)
        tokens = torch.zeros(2, 2048, dtype=torch.int64, device=device)
        loss = model(tokens, tokens)
        with torch.no_grad():
            logits = model(tokens)
        for param in model.parameters():
            param.grad = torch.empty_like(param)
        optimizer = MuonAdamW(model, train.FULL, torch.bfloat16, compiled=False)
        optimizer.numbers = train.scalars  # as when compiled: the learning rates are the one thing on the CPU
        optimizer.step(lr_frac=1.0, momentum=0.9, matrix_weight_decay=0.1)
    assert (logits.shape, logits.dtype, logits.device) == ((2, 2048, 8192), torch.float32, device)
    assert (loss.shape, loss.dtype, loss.device) == ((), torch.float32, device)
    adamw = itertools.chain(*(state.values() for state in optimizer.adamw.state.values()))
    state = [*itertools.chain(*optimizer.state.values()), *adamw, *model.parameters(), *model.buffers()]
    assert {tensor.device for tensor in state} == {device}


@pytest.mark.slow
def test_nothing_is_compiled_after_the_warm_up(monkeypatch):
    """Neither the first real batch nor a new learning rate nor the evaluation may compile while the clock runs."""
    compiled = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=compiled))
    plain_loss = SimpleNamespace(apply=lambda x, weight, y, cap, _: F.cross_entropy(softcap(x @ weight.mT, cap), y))
    monkeypatch.setattr(train, "ChunkedLoss", plain_loss)  # as on CUDA
    model = tiny_model(replace(TINY, windows="L"), train.sdpa_attention)
    model.ngrams.sparse = False
    model.compile(backend=compiled, dynamic=False)
    optimizer = MuonAdamW(model, TINY, torch.float32, compiled=True)
    warm_up(model, optimizer, TINY.micro_rows)
    frames = compiled.frame_count
    assert frames >= 3 + len(optimizer.stacks)
    for step in range(3):
        rows = torch.stack(next(batches(8, seed=step))[:2])
        accumulate_gradients(model, iter([(*rows, 1)]), 1)
        optimizer.step(1 - step / 3, 0.9 + step / 100, 0.1 - step / 30)
        model.zero_grad()
    model.eval()
    with torch.no_grad():
        assert model(rows[0]).shape == (8, T, V)
    assert compiled.frame_count == frames


class Hungry(GPT):
    """Runs out of memory above `limit` rows."""

    limit = 2

    def forward(self, idx, targets=None):
        if len(idx) > self.limit:
            raise torch.OutOfMemoryError(f"no room for {len(idx)} rows")
        return super().forward(idx, targets)


def test_out_of_memory_halves_the_micro_batch_and_accumulation_makes_up_for_it(capsys):
    model = Hungry(TINY, V, T, train.block_attention, torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = MuonAdamW(model, TINY, torch.float32, compiled=False)
    rows = fit_micro_batch(lambda rows: warm_up(model, optimizer, rows), TINY.micro_rows)
    assert rows == 2 and TINY.micro_batches(rows, T) == 4
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    out = capsys.readouterr().out
    assert out.splitlines() == ["out of memory with 8 rows, trying 4", "out of memory with 4 rows, trying 2"]


def test_out_of_memory_with_one_row_ends_the_run_with_a_remedy():
    model = Hungry(TINY, V, T, train.block_attention, torch.float32)
    model.limit = 0
    optimizer = MuonAdamW(model, TINY, torch.float32, compiled=False)
    with pytest.raises(TrainError, match="single row; lower depth or n_embd"):
        fit_micro_batch(lambda rows: warm_up(model, optimizer, rows), TINY.micro_rows)


def test_a_batch_that_rows_do_not_divide_is_refused():
    with pytest.raises(TrainError, match="192 is not a multiple of 7 rows of 24"):
        TINY.micro_batches(7, T)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 101.0])
def test_a_bad_loss_is_found_two_steps_later_and_named(bad):
    monitor = Monitor(CPU, 100, 100)
    for step, loss in enumerate([5.0, 100.0, 4.0, bad]):
        monitor.watch(step, torch.tensor(loss))
    monitor.watch(4, torch.tensor(3.0))
    with pytest.raises(TrainError, match=rf"^step 3: the loss is {bad:.4g}, .*; lower matrix_lr"):
        monitor.watch(5, torch.tensor(3.0))


def test_the_line_of_progress(monkeypatch, capsys):
    clock = SimpleNamespace(monotonic=lambda: clock.now, now=100.0)
    monkeypatch.setattr(train, "time", clock)
    monitor = Monitor(CPU, 1000, 10)
    for step in range(8):
        monitor.watch(step, torch.tensor(4.5))
        clock.now += 2.5
        monitor.show(step + 1, 0.25, 0.5, 3)
    numbers = "loss 4.5000 | lr 0.50 | 2500 ms/step | 400 tok/s | mfu n/a | epoch 3 | 225 s left"
    assert capsys.readouterr().out.splitlines() == [f"step     {n} |  25% | {numbers}" for n in (4, 8)]


# == The whole ==


def test_import_is_silent_and_touches_nothing():
    code = """
import os, sys, torch
before = dict(os.environ), torch.get_rng_state(), torch.get_default_dtype(), torch.get_float32_matmul_precision()
import train
after = dict(os.environ), torch.get_rng_state(), torch.get_default_dtype(), torch.get_float32_matmul_precision()
assert before[0] == after[0] and before[1].equal(after[1]) and before[2:] == after[2:]
assert not torch.cuda.is_initialized()
heavy = {"kernels", "torch._dynamo", "torch._inductor", "huggingface_hub"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    result = run("-W", "error", "-c", code)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def small_main(monkeypatch, capsys, seed: int, seconds_per_step: float = 40.0, **changes) -> dict[str, str]:
    """The summary of train.main() with a tiny model and a clock that moves when a step is done, and then only."""
    clock = SimpleNamespace(**vars(time), now=1000.0)
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr(prepare, "time", clock)

    def accumulate_and_tick(*args):
        clock.now += seconds_per_step
        return accumulate_gradients(*args)

    config = replace(TINY, windows="SL", short_window=16, batch_tokens=4 * 256, micro_rows=4, eval_rows=32)
    config = replace(config, **changes)
    monkeypatch.setattr(train, "SMALL", config)
    monkeypatch.setattr(train, "accumulate_gradients", accumulate_and_tick)
    monkeypatch.setattr(sys, "argv", ["train.py", "a", "tiny model"])
    monkeypatch.setenv("SEED", str(seed))
    with monkeypatch.context() as cpu:
        cpu.setattr(prepare, "default_device", lambda: CPU)
        code = train.main()
    out, err = capsys.readouterr()
    assert code == 0, err
    summary = dict(line.split(":", 1) for line in out.partition("---\n")[2].splitlines())
    del summary["peak_vram_mb"]  # that of the process, tests before this one included
    return summary


def test_two_runs_with_one_seed_agree(cache, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    first, again, other = (small_main(monkeypatch, capsys, seed) for seed in (7, 7, 8))
    assert int(first["num_steps"]) == 7 and first["seed"].strip() == "7"
    assert first == again
    assert first["val_bpb"] != other["val_bpb"] and 1 < float(first["val_bpb"]) < 8


def test_help_is_help_and_not_the_description_of_a_run(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
    assert train.main() == 0
    assert 'uv run train.py "what is different"' in capsys.readouterr().out


def resources() -> tuple[int, int, int, int]:
    """(KiB of memory of its own, open files, threads, child processes) of this process."""
    anonymous = re.search(r"RssAnon:\s*(\d+)", Path("/proc/self/status").read_text())
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return int(anonymous[1]), len(os.listdir("/proc/self/fd")), threading.active_count(), len(children)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_two_thousand_steps_leave_memory_files_threads_and_processes_as_they_were(cache, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    before, seen, watch = resources(), [], train.Monitor.watch
    monkeypatch.setattr(train.Monitor, "watch", lambda *args: (seen.append(resources()), watch(*args)))
    summary = small_main(monkeypatch, capsys, 7, 300 / 2000, depth=1, batch_tokens=256, micro_rows=1)
    assert int(summary["num_steps"]) == len(seen) >= 1999
    memory, *counts = zip(*seen[200:], strict=True)
    assert np.median(memory[-200:]) - np.median(memory[:200]) < 4 * 1024
    assert all(max(count) == min(count) for count in counts)
    deadline = time.monotonic() + 10  # a thread that has nothing to do any more takes a moment to end
    while max(map(int.__sub__, resources()[1:], before[1:])) > 0 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert all(now <= then for now, then in zip(resources()[1:], before[1:], strict=True)), threading.enumerate()


def test_a_nan_loss_ends_the_run_with_its_step_and_a_remedy(cache: Path, tmp_path: Path):
    source = (ROOT / "train.py").read_text()
    broken = source.replace("matrix_lr: float = 0.04", 'matrix_lr: float = float("nan")')
    broken = re.sub(r"    depth=\d,", "    depth=1,", broken)  # to save time
    assert broken.count('float("nan")') == broken.count("depth=1,") == 1
    (tmp_path / "train.py").write_text(broken)
    result = run(ROOT / "tests" / "short.py", 60, tmp_path / "train.py", "no number", cwd=tmp_path)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: step 1: the loss is nan") and "lower matrix_lr" in line
    assert "val_bpb" not in result.stdout

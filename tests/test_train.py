"""The released train.py on the CPU at toy size: every part against a reference, and the whole as it is run.

An agent that edits train.py need not keep these green: its test is a plain run of five seconds.
"""

import functools
import itertools
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, run
from helpers.fork_server import Request
from helpers.forks import Job
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import train
from prepare import AutoresearchError, fit_micro_batch
from train import GPT, Config, MuonAdamW, accumulate_gradients, warm_up

CPU = torch.device("cpu")
TINY = replace(
    train.SMALL,
    depth=3,
    n_embd=32,
    head_dim=8,
    windows="SL",
    short_window=5,
    gate_channels=8,
    ngram_ratio=16,
    batch_tokens=8 * 24,
    micro_rows=8,
    logit_softcap=15.0,
    init_scale=1.0,
    value_every=2,
    mlp_ratio=4,
)
PLAIN = replace(TINY, token_shift=False, ngram_length=1)
V = 61
T = 24


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors of this size are no work for two, which would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_model(config: Config = TINY, attend: Callable = train.sdpa_attention, seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    return GPT(config, V, T, attend, torch.float32)


def optimizer_of(model: GPT) -> MuonAdamW:
    return MuonAdamW(model, model.config, torch.float32, compiled=False)


def trained_a_little(model: GPT) -> GPT:
    """As it can be later on: at the start the blocks write nothing, and nothing can be seen of them."""
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param) * 0.1)
    return model


def batches(rows: int, seed: int = 0) -> Iterator[tuple]:
    """One batch, again and again, contiguous as the dataloader's."""
    tokens = torch.randint(V, (rows, T + 1), generator=torch.Generator().manual_seed(seed))
    return itertools.repeat((tokens[:, :-1].clone(), tokens[:, 1:].clone(), 1))


def inputs_of(module: torch.nn.Module) -> list[torch.Tensor]:
    """A list that gets the first input of the module at each call."""
    seen = []
    module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    return seen


# == Config ==


def test_windows_repeat_and_the_last_is_long():
    config = Config(depth=9, windows="SSSSL", short_window=256)
    assert config.layer_windows(2048) == [256, 256, 256, 256, 2048, 256, 256, 256, 2048]
    assert replace(TINY, windows="S", depth=3, short_window=100).layer_windows(24) == [24, 24, 24]


@pytest.mark.parametrize(
    "bad", [{"n_embd": 33}, {"head_dim": 1}, {"windows": "SX"}, {"ngram_length": 6}, {"ngram_length": 0}]
)
def test_a_config_that_cannot_be_built_is_refused(bad):
    with pytest.raises(ValueError, match=str(next(iter(bad.values())))):
        replace(TINY, **bad)


def test_a_batch_that_rows_do_not_divide_is_refused():
    assert TINY.micro_batches(2, T) == 4
    with pytest.raises(AutoresearchError, match="192, not a multiple of 7 rows of 24; make .* powers of two"):
        TINY.micro_batches(7, T)


def test_full_is_the_best_published_branch_with_the_shift():
    full = train.FULL
    assert (full.depth, full.n_embd, full.head_dim) == (9, 640, 128)
    assert (full.windows, full.short_window, full.batch_tokens) == ("SSSSL", 256, 2**18)
    assert (full.rotary_base, full.init_scale) == (200_000, 0.68)
    assert (full.ngram_length, full.token_shift) == (1, True)  # measured on an H100


def parameters(c: Config, V: int) -> int:
    """Counted from the shapes that the model should have."""
    D = c.n_embd
    value_layers = len(range(c.depth - 1, -1, -c.value_every))
    ngram_rows = c.ngram_ratio * V if c.ngram_length > 1 else 0
    block = 4 * D * D + 2 * c.mlp_ratio * D * D + (2 * D if c.token_shift else 0)
    value_embedding = V * D + c.gate_channels * D // c.head_dim
    scalars = 2 * c.depth
    return (2 * V + ngram_rows) * D + c.depth * block + value_layers * value_embedding + scalars


def flops(c: Config, V: int, windows: list[int]) -> int:
    """A token's: two for each entry of a matrix, two for each entry of a key and of a value, three passes."""
    D = c.n_embd
    value_layers = len(range(c.depth - 1, -1, -c.value_every))
    matrices = (
        c.depth * (4 + 2 * c.mlp_ratio) * D * D + V * D + value_layers * c.gate_channels * D // c.head_dim
    )
    attention = sum(2 * D * window + 2 * D * window for window in windows)
    return 3 * (2 * matrices + attention)


SCALES = {  # name: T, V, windows, device
    "FULL": (2048, 8192, [256, 256, 256, 256, 2048, 256, 256, 256, 2048], "cuda:0"),
    "DESKTOP": (2048, 8192, [1024, 1024, 1024, 1024, 2048], "cuda:0"),
    "SMALL": (256, 2048, [64, 256], "cpu"),
    "MAC": (256, 2048, [64, 256], "cuda:0"),
}


@pytest.fixture
def fake() -> Iterator[None]:
    """Tensors that have a device and a shape and compute nothing: they need no GPU, and no memory."""
    train.window_mask.cache_clear()
    with FakeTensorMode():
        yield
    train.window_mask.cache_clear()  # it must not keep fake ones


@pytest.mark.parametrize("name", train.CONFIGS)
def test_each_config_makes_a_step(fake, name):
    config = train.CONFIGS[name]
    T, V, windows, device = SCALES[name]
    device = torch.device(device)
    with device:
        model = GPT(config, V, T, train.sdpa_attention, torch.bfloat16)
    params = list(model.parameters())
    assert model.windows == windows
    assert sum(param.numel() for param in params) == parameters(config, V)
    assert model.flops_per_token() == flops(config, V, windows)
    for halvings in range(config.micro_rows.bit_length()):
        rows = config.micro_rows >> halvings
        assert config.micro_batches(rows, T) * rows * T == config.batch_tokens
    assert rows == 1

    optimizer = optimizer_of(model)
    groups = [group["params"] for group in optimizer.groups]
    grouped = list(itertools.chain(*optimizer.stacks, *groups))
    if model.ngrams is not None:
        grouped.append(optimizer.table)
    assert sorted(map(id, grouped)) == sorted(map(id, params))

    tokens = torch.zeros(2, T, dtype=torch.int64, device=device)
    loss = model(tokens, tokens)
    logits = model(tokens)
    assert (logits.shape, logits.dtype, logits.device) == ((2, T, V), torch.float32, device)
    assert (loss.shape, loss.dtype, loss.device) == ((), torch.float32, device)
    for param in params:
        param.grad = torch.empty_like(param)
    optimizer.numbers = train.scalar_tensors  # as when compiled: the rates are the one thing on the CPU
    optimizer.step(lr_frac=1.0, momentum=0.9, weight_decay=0.1)
    adamw = itertools.chain(*(state.values() for state in optimizer.adamw.state.values()))
    state = [*optimizer.momentum_buffers, *optimizer.second_moments]
    if model.ngrams is not None:
        state += [optimizer.row_moments, optimizer.row_steps]
    assert {tensor.device for tensor in (*adamw, *state, *params, *model.buffers())} == {device}


def test_scales_have_the_configs_of_their_shape():
    assert set(train.CONFIGS) == set(SCALES)
    assert parameters(train.FULL, 8192) == 80_949_298
    mac_table = train.MAC.ngram_ratio * 2048 * train.MAC.n_embd
    assert mac_table * 4 <= 64 * 2**20  # its gradient is dense


def test_flops_are_counted_as_the_reference_does():
    reference = Config(depth=8, n_embd=512, windows="SSSL", short_window=1024)
    with torch.device("meta"):
        model = GPT(reference, 8192, 2048, train.sdpa_attention, torch.bfloat16)
    assert model.flops_per_token() == pytest.approx(239e6, rel=0.005)  # as published


# == Model ==


def test_weights_start_as_stated():
    config = replace(TINY, n_embd=128, init_scale=0.68)
    model = tiny_model(config)
    block = model.blocks[-1]
    readers = [block.attn.c_q, block.attn.c_k, block.attn.c_v, block.mlp.c_fc, block.attn.value_embed]
    for reader in readers:
        assert reader.weight.std().item() == pytest.approx(0.68 / 128**0.5, rel=0.02)
        assert reader.weight.abs().max().item() == pytest.approx(3**0.5 * 0.68 / 128**0.5, rel=0.01)
    for zero in (block.attn.c_proj, block.mlp.c_proj, block.attn.value_gate, model.ngrams.table):
        assert zero.weight.count_nonzero() == 0
    assert block.attn_shift.count_nonzero() == block.mlp_shift.count_nonzero() == 0
    assert model.wte.weight.std().item() == pytest.approx(1, rel=0.02)
    assert model.lm_head.weight.std().item() == pytest.approx(0.001, rel=0.02)
    assert model.resid_lambdas.tolist() == [1] * 3
    assert model.x0_lambdas.tolist() == pytest.approx([0.05] * 3)


@pytest.mark.parametrize("base", [10_000.0, 200_000.0])
def test_rotary_scores_depend_on_the_distance(base):
    cos, sin = train.rotary_tables(50, 16, base)
    torch.manual_seed(0)
    q, k = (train.rotate(torch.randn(16).expand(1, 50, 1, 16), cos, sin)[0, :, 0] for _ in range(2))
    scores = q @ k.T
    for distance in range(-49, 50):
        diagonal = scores.diagonal(distance)
        assert (diagonal - diagonal[0]).abs().max() < 1e-4, distance
    assert scores[0].std() > 0.1


def test_queries_and_keys_are_normed_and_rotated():
    seen = []

    def attend(q, k, v, window):
        seen.extend((q, k))
        return v

    model = tiny_model(TINY, attend)
    attn = model.blocks[0].attn
    x = 3 * torch.randn(2, T, TINY.n_embd)
    attn(x, next(batches(2))[0], model.cos, model.sin)
    for got, matrix in zip(seen, (attn.c_q, attn.c_k), strict=True):
        heads = matrix(x).view(2, T, 4, 8)
        want = train.norm(train.rotate(heads, model.cos, model.sin))  # the other order makes no difference
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
        assert (got - train.norm(heads)).abs().max() > 0.1


@pytest.mark.parametrize("config", [TINY, PLAIN, replace(TINY, depth=1, windows="L", ngram_length=2)])
def test_the_future_does_not_move_the_past(config):
    model = trained_a_little(tiny_model(config))
    idx = next(batches(3))[0] % 7  # pairs come again
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


def test_the_untrained_model_is_uniform():
    model = tiny_model()
    inputs, targets, _ = next(batches(4))
    assert model(inputs, targets).item() == pytest.approx(math.log(V), abs=0.01)
    x = torch.randn(1, T, TINY.n_embd)
    assert model.blocks[0](x, inputs[:1], model.cos, model.sin).equal(x)  # its blocks add nothing


def test_the_loss_is_the_mean_cross_entropy():
    model = trained_a_little(tiny_model())
    inputs, targets, _ = next(batches(4))
    log_probs = model(inputs).double().log_softmax(-1)
    want = -log_probs.gather(-1, targets[..., None]).mean()
    assert model(inputs, targets).item() == pytest.approx(want.item(), rel=1e-5)


@pytest.mark.parametrize("length", [1, 2, 3, 7])
def test_a_short_row_has_the_logits_of_a_longer_one(length):
    model = trained_a_little(tiny_model())
    idx = next(batches(2))[0] % 7
    torch.testing.assert_close(model(idx[:, :length]), model(idx)[:, :length], rtol=1e-4, atol=1e-4)


def test_the_token_shift_adds_the_token_before():
    model = trained_a_little(tiny_model())
    block = model.blocks[0]
    seen = [inputs_of(block.attn), inputs_of(block.mlp)]
    outputs = []
    block.attn.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    x = torch.randn(2, T, TINY.n_embd)
    block(x, next(batches(2))[0], model.cos, model.sin)
    shifts = (block.attn_shift, block.mlp_shift)
    for (got,), by, stream in zip(seen, shifts, (x, x + outputs[0]), strict=True):
        want = train.norm(stream)
        want[:, 1:] += by * train.norm(stream)[:, :-1]  # channel by channel
        torch.testing.assert_close(got, want)


def test_without_the_token_shift_nothing_is_left_of_it():
    model = trained_a_little(tiny_model(replace(TINY, token_shift=False)))
    twin = trained_a_little(tiny_model())
    shifts = [name for name, _ in twin.named_parameters() if "shift" in name]
    names = [name for name, _ in model.named_parameters()]
    assert len(shifts) == 2 * 3
    assert names == [name for name, _ in twin.named_parameters() if name not in shifts]
    optimizer = optimizer_of(model)
    accumulate_gradients(model, batches(2), 1)
    optimizer.step(1.0, 0.9, 0.1)
    with torch.no_grad():
        for name in shifts:
            twin.get_parameter(name).zero_()
    twin.load_state_dict(model.state_dict(), strict=False)
    idx = next(batches(2))[0]
    torch.testing.assert_close(model(idx), twin(idx), rtol=0, atol=0)


@pytest.mark.parametrize("length", [2, 3, 4, 5])
def test_a_token_has_a_row_for_each_ngram_it_ends(length):
    model = tiny_model(replace(TINY, ngram_ratio=1024, ngram_length=length))
    looked_up = inputs_of(model.ngrams.table)
    inputs = torch.randint(V, (1, T))
    changed = T // 2
    other = inputs.clone()
    other[0, changed] = (other[0, changed] + 1) % V
    logits = model(inputs)
    model(other)
    found = [rows[0].nonzero().flatten().tolist() for rows in looked_up[0] != looked_up[1]]
    assert found == [list(range(changed, changed + tokens)) for tokens in range(2, length + 1)]
    assert len(looked_up[0].unique()) > 0.75 * T * (length - 1)
    rows = looked_up[0][:, 0, changed]
    with torch.no_grad():  # each adds to its own tokens, as long as the blocks write nothing
        model.ngrams.table.weight[rows] = torch.randn(length - 1, TINY.n_embd)
    moved = (model(inputs) != logits).any(dim=-1)
    assert moved.equal(torch.isin(looked_up[0], rows).any(0))


def test_equal_ngrams_have_equal_rows_others_seldom():
    with torch.device("meta"):
        ngrams = train.NgramEmbedding(length=5, rows=2**21, width=1)
    inputs = torch.randint(2048, (64, T), generator=torch.Generator().manual_seed(0))
    looked_up = inputs_of(ngrams.table)
    ngrams.table.to_empty(device="cpu")
    ngrams(inputs)
    for rows, before in zip(looked_up[0], range(1, 5), strict=True):
        keys = [tuple(row[i - before : i + 1]) for row in inputs.tolist() for i in range(before, T)]
        found = {}
        for key, row in zip(keys, rows[:, before:].flatten().tolist(), strict=True):
            assert found.setdefault(key, row) == row
        assert len(set(found.values())) > 0.995 * len(found)  # about 1,400 draws from two million rows


def test_a_model_without_ngrams_trains():
    config = replace(TINY, ngram_length=1)
    model = tiny_model(config)
    assert model.ngrams is None
    assert not [name for name, _ in model.named_parameters() if "ngram" in name]
    optimizer = optimizer_of(model)
    losses = []
    for _ in range(5):
        losses.append(accumulate_gradients(model, batches(8), 1)[0].item())
        optimizer.step(0.3, 0.9, 0.1)
        model.zero_grad()
    assert losses[-1] < losses[0] - 0.5


def test_value_embeddings_sit_on_alternate_layers():
    values = []

    def attend(q, k, v, window):
        values.append(v)
        return q

    model = tiny_model(replace(TINY, depth=5), attend)
    found = [block.attn.has_value_embed for block in model.blocks]
    assert found == [True, False, True, False, True]
    assert [hasattr(block.attn, "value_embed") for block in model.blocks] == found
    attn = model.blocks[-1].attn
    idx = next(batches(2))[0]
    x = torch.randn(2, T, TINY.n_embd)
    attn(x, idx, model.cos, model.sin)  # with the gate at one
    torch.testing.assert_close(values[0].flatten(2), attn.c_v(x) + attn.value_embed(idx))
    with torch.no_grad():
        attn.value_gate.weight.fill_(-100)
        attn(x.abs(), idx, model.cos, model.sin)  # closed
    torch.testing.assert_close(values[1].flatten(2), attn.c_v(x.abs()))


def test_logits_are_float32_and_capped():
    model = GPT(TINY, V, T, train.sdpa_attention, torch.bfloat16)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    idx = next(batches(2))[0]
    logits = model(idx)
    assert logits.dtype == torch.float32 and logits.shape == (2, T, V)
    assert 0.9 * TINY.logit_softcap < logits.abs().max() <= TINY.logit_softcap
    free = GPT(replace(TINY, logit_softcap=0.0), V, T, train.sdpa_attention, torch.bfloat16)
    free.load_state_dict(model.state_dict())
    assert free(idx).abs().max() > 100 * TINY.logit_softcap


# == Optimizer ==


@pytest.mark.parametrize("sparse", [False, True])
def test_touched_rows_take_steps_of_rmsprop(sparse):
    torch.manual_seed(0)
    table = torch.zeros(6, 3, requires_grad=True)
    state = [torch.zeros(6, 1), torch.zeros(6, 1)]
    want = torch.zeros(6, 3)
    moments = [0.0] * 6
    steps = [0] * 6
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
            train.rowwise_update(table, table.grad, *state, **train.scalar_tensors(lr=0.5, beta2=0.9))
        table.grad = None
        torch.testing.assert_close(table.detach(), want)
    assert table[[1, 4]].count_nonzero() == 0


def test_sparse_and_dense_gradients_make_equal_steps():
    models = tiny_model(), tiny_model()
    models[1].ngrams.table.sparse = False  # as on a GPU
    for model in models:
        optimizer = optimizer_of(model)
        for _ in range(3):
            accumulate_gradients(model, iter([next(batches(4, seed=0)), next(batches(4, seed=1))]), 2)
            assert model.ngrams.table.weight.grad.is_sparse == model.ngrams.table.sparse
            optimizer.step(lr_frac=0.01, momentum=0.85, weight_decay=0.0)
            model.zero_grad()
    got, want = (model.ngrams.table.weight for model in models)
    assert models[0].ngrams.table.sparse and got.count_nonzero() > 0
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape, lowest, highest",
    [((128, 64), 0.85, 1.15), ((64, 128), 0.85, 1.15), ((256, 64), 0.82, 1.15), ((64, 64), 0.0, 1.15)],
)
def test_singular_values_are_brought_near_one(shape, lowest, highest, dtype):
    torch.manual_seed(0)
    matrices = torch.randn(4, *shape)
    got = train.orthogonalize(matrices, dtype).float()
    assert got.shape == matrices.shape
    values = torch.linalg.svdvals(got)
    assert values.min() > lowest - 0.02 and values.max() < highest + 0.02
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)  # the same singular vectors
    cosine = ((u @ vh) * got).sum((-2, -1)) / (torch.linalg.matrix_norm(got) * min(shape) ** 0.5)
    assert cosine.min() > 0.97


def muon_state(params: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros_like(params), torch.zeros_like(train.neuron_means(params))


def one_muon_update(params, grads, weight_decay=0.0, lr=1.0, state=None):
    numbers = train.scalar_tensors(lr=lr, momentum=0.9, beta2=0.95, weight_decay=weight_decay)
    train.muon_update(params, grads, *(state or muon_state(params)), dtype=torch.float32, **numbers)
    return params


@pytest.mark.parametrize("shape, scale", [((128, 64), 2**0.5), ((64, 128), 1.0), ((256, 64), 2.0)])
def test_a_muon_update_has_the_norm_of_its_rate(shape, scale):
    torch.manual_seed(0)
    moved = one_muon_update(torch.zeros(3, *shape), torch.randn(3, *shape) * 1e-3, lr=0.5)
    values = torch.linalg.svdvals(moved) / (0.5 * scale)
    assert values.min() > 0.75 and values.max() < 1.25  # NorMuon widens the range a little


def test_muon_moves_a_regression_to_a_lower_loss():
    torch.manual_seed(0)
    x = torch.randn(200, 24)
    target = torch.randn(24, 16)
    params = torch.zeros(1, 24, 16)
    state = muon_state(params)
    losses = []
    for _ in range(60):
        error = x @ (params[0] - target)
        losses.append(error.square().mean().item())
        one_muon_update(params, (x.T @ error)[None] / len(x), lr=0.1, state=state)
    assert losses[1] < losses[0] and losses[-1] < 0.05 * losses[0]


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (16, 16)])
def test_normuon_evens_out_neurons_and_keeps_the_norm(shape):
    torch.manual_seed(0)
    update = torch.randn(3, *shape) * torch.rand(3, shape[0], 1) * torch.rand(3, 1, shape[1])
    second_moment = torch.zeros_like(train.neuron_means(update))
    assert second_moment.numel() == 3 * max(shape)
    got = train.normalize_neurons(update, second_moment, torch.tensor(0.95))
    torch.testing.assert_close(torch.linalg.matrix_norm(got), torch.linalg.matrix_norm(update))
    after, before = (train.neuron_means(x.square()).flatten(1) for x in (got, update))
    assert (after / after.mean(1, keepdim=True) - 1).abs().max() < 1e-3
    assert (before / before.mean(1, keepdim=True) - 1).abs().max() > 0.5


def test_weight_decay_is_cautious():
    torch.manual_seed(0)
    params = torch.randn(2, 12, 6)
    grads = torch.randn(2, 12, 6)
    plain, decayed = (one_muon_update(params.clone(), grads, decay, lr=0.01) for decay in (0.0, 0.2))
    agree = (params - plain) * params > 0  # the update takes away from the weight already
    assert 0.2 < agree.float().mean() < 0.8
    want = torch.where(agree, 0.01 * 2**0.5 * 0.2 * params, 0.0)
    torch.testing.assert_close(plain - decayed, want, rtol=1e-3, atol=1e-6)


def test_a_parameter_without_a_group_is_named():
    model = tiny_model()
    model.blocks[1].extra = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match=r"no learning rate for blocks\.1\.extra; add"):
        optimizer_of(model)


def test_muon_gets_the_matrices_of_the_blocks():
    model = tiny_model()
    stacks = optimizer_of(model).stacks
    assert all(len({param.shape for param in stack}) == 1 for stack in stacks)
    found = {param for stack in stacks for param in stack}
    names = {name for name, param in model.named_parameters() if param in found}
    wanted = r"blocks\.\d\.(attn\.(c_q|c_k|c_v|c_proj|value_gate)|mlp\.(c_fc|c_proj))\.weight"
    assert names == {name for name, _ in model.named_parameters() if re.fullmatch(wanted, name)}
    assert len(names) == 3 * 6 + 2


def test_a_step_moves_every_parameter_by_its_rate():
    model = trained_a_little(tiny_model())
    optimizer = optimizer_of(model)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    accumulate_gradients(model, batches(8), 1)
    optimizer.step(lr_frac=0.5, momentum=0.85, weight_decay=0.0)
    moves = {name: param.detach() - before[name] for name, param in model.named_parameters()}
    largest = {name: move.abs().max().item() for name, move in moves.items()}
    assert all(largest.values()), largest
    by_width = (TINY.n_embd / 768) ** -0.5
    for name, rate in {  # AdamW's first step is one learning rate for each entry
        "wte.weight": TINY.embedding_lr * by_width,
        "blocks.2.attn.value_embed.weight": TINY.embedding_lr * by_width,
        "lm_head.weight": TINY.head_lr * by_width,
        "blocks.0.attn_shift": TINY.shift_lr,
        "blocks.0.mlp_shift": TINY.shift_lr,
        "x0_lambdas": TINY.x0_lr,
        "resid_lambdas": TINY.resid_lr,
    }.items():
        assert largest[name] == pytest.approx(0.5 * rate, rel=0.01), name
    rows = moves["ngrams.table.weight"].square().mean(-1).sqrt()
    rows = rows[rows > 0]
    torch.testing.assert_close(rows, torch.full_like(rows, 0.5 * TINY.ngram_lr * by_width))


def test_adamw_has_the_decays_and_betas_of_the_config():
    model = tiny_model()
    optimizer = optimizer_of(model)
    found = {param: group for group in optimizer.adamw.param_groups for param in group["params"]}
    for param, weight_decay, betas in (
        (model.wte.weight, TINY.embedding_weight_decay, TINY.adam_betas),
        (model.blocks[-1].attn.value_embed.weight, TINY.value_weight_decay, TINY.adam_betas),
        (model.lm_head.weight, TINY.head_weight_decay, TINY.adam_betas),
        (model.x0_lambdas, 0.0, TINY.x0_betas),
        (model.resid_lambdas, 0.0, TINY.adam_betas),
        (model.blocks[0].attn_shift, 0.0, TINY.adam_betas),
        (model.blocks[0].mlp_shift, 0.0, TINY.adam_betas),
    ):
        group = found[param]
        assert (group["weight_decay"], group["betas"], group["eps"]) == (weight_decay, betas, TINY.adam_eps)


# == Schedules ==


def test_schedules_have_the_stated_ends():
    config = replace(TINY, warmdown_frac=0.5, final_lr_frac=0.05)
    lr = functools.partial(train.learning_rate_frac, config=config)
    assert [lr(0.0), lr(0.1), lr(0.5), lr(1.0)] == pytest.approx([1.0, 1.0, 1.0, 0.05])
    assert lr(0.75) == pytest.approx((1 + 0.05) / 2)
    assert train.learning_rate_frac(0.0, train.FULL) == 1.0
    assert train.learning_rate_frac(1.0, replace(config, warmdown_frac=0.0)) == 1.0
    momentum = [train.muon_momentum(step, train.FULL) for step in (0, 100, 200, 5000)]
    assert momentum == pytest.approx([0.85, 0.90, 0.95, 0.95])


FRACTION = st.floats(0, 1)


@given(warmdown=FRACTION, final=FRACTION, progress=FRACTION)
def test_the_rate_stays_between_its_end_and_its_peak(warmdown, final, progress):
    config = replace(TINY, warmdown_frac=warmdown, final_lr_frac=final)
    assert final <= train.learning_rate_frac(progress, config) + 1e-9 <= 1 + 2e-9


# == Training ==


def test_accumulation_gives_the_same_gradients():
    model = trained_a_little(tiny_model())
    inputs, targets, _ = next(batches(8))
    losses = []
    gradients = []
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
    optimizer = optimizer_of(model)
    cycle = torch.randperm(V, generator=torch.Generator().manual_seed(0))[:7].repeat(10)
    rows = torch.stack([cycle[i : i + T + 1] for i in range(8)])
    for step in range(60):
        loss, _ = accumulate_gradients(model, iter([(rows[:, :-1], rows[:, 1:], 0)]), 1)
        optimizer.step(1 - step / 60, train.muon_momentum(step, config), 0.0)
        model.zero_grad()
    assert loss.item() < 0.02


class Hungry(GPT):
    """Runs out of memory with more than `room` rows, but only in its second forward pass or later."""

    def __init__(self, config: Config = TINY, room: int = 1000):
        super().__init__(config, V, T, train.sdpa_attention, torch.float32)
        self.room = room
        self.passes = []  # rows of each, and whether it was for training

    def forward(self, idx, targets=None):
        self.passes.append((len(idx), self.training and targets is not None))
        if len(idx) > self.room and len(self.passes) > 1:
            raise torch.OutOfMemoryError(f"no room for {len(idx)} rows")
        return super().forward(idx, targets)


def assert_fresh(model: GPT, optimizer: MuonAdamW, seed: int) -> None:
    """As a new model of that seed, state and random numbers included, and so are the next three steps."""
    after = torch.get_rng_state()
    twin = tiny_model(model.config)
    torch.manual_seed(seed)
    twin.init_weights()
    assert torch.initial_seed() == seed
    assert torch.get_rng_state().equal(after)
    assert model.training
    assert not optimizer.adamw.state
    states = [
        *optimizer.momentum_buffers,
        *optimizer.second_moments,
        optimizer.row_moments,
        optimizer.row_steps,
    ]
    assert not any(state.count_nonzero() for state in states)
    assert all(param.grad is None for param in model.parameters())
    optimizers = optimizer, optimizer_of(twin)
    for _ in range(4):
        for (name, got), want in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
            assert got.equal(want), name
        for each, its_optimizer in zip((model, twin), optimizers, strict=True):
            accumulate_gradients(each, batches(2), 1)
            its_optimizer.step(1.0, 0.9, 0.1)
            each.zero_grad()


def test_the_warm_up_leaves_no_trace():
    model = Hungry()
    optimizer = optimizer_of(model)
    stateful = [*optimizer.momentum_buffers, optimizer.row_steps]
    warm_up(model, optimizer, 4, seed=5)
    assert model.passes == [(4, True)] * 4 + [(4, False)]  # two steps of two batches, and an evaluation
    assert all(state.count_nonzero() for state in stateful)  # of the steps
    assert_fresh(model, optimizer, seed=5)


def test_out_of_memory_halves_the_micro_batch(capsys):
    model = Hungry(room=2)
    optimizer = optimizer_of(model)
    rows = fit_micro_batch(lambda rows: warm_up(model, optimizer, rows, seed=5), TINY.micro_rows)
    assert rows == 2
    assert [rows for rows, _ in model.passes] == [8, 8, 4] + [2] * 5
    assert_fresh(model, optimizer, seed=5)
    out = capsys.readouterr().out
    assert out.splitlines() == ["out of memory with 8 rows, trying 4", "out of memory with 4 rows, trying 2"]


@pytest.mark.slow
def test_out_of_memory_with_one_row_names_a_remedy():
    model = Hungry(room=0)
    optimizer = optimizer_of(model)
    with pytest.raises(AutoresearchError, match="single row; lower depth or n_embd"):
        fit_micro_batch(lambda rows: warm_up(model, optimizer, rows, seed=5), TINY.micro_rows)


def test_the_first_guess_halves_with_free_memory(monkeypatch, capsys):
    config = train.FULL
    cuda = torch.device("cuda", 0)
    guesses = []
    for gib in (100, 4, 2, 1, 0):
        free = gib * 2**30
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 2 * free))
        guesses.append(train.first_rows(config, cuda))
        assert f"{gib}.0 GiB are free: micro-batches of {guesses[-1]} rows" in capsys.readouterr().out
    most, four, two, one, none = guesses
    assert most == config.micro_rows
    assert most > four == 2 * two == 4 * one > 4
    assert none == 1
    assert train.first_rows(config, CPU) == config.micro_rows
    assert capsys.readouterr().out == ""


# == Compiled ==

QUIET = pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # of torch's compiler


@QUIET
@pytest.mark.slow
def test_compiled_updates_do_the_same():
    """As on CUDA: one graph each, dense gradients, numbers as 0-D tensors."""
    models = [trained_a_little(tiny_model(replace(TINY, windows="L"))) for _ in range(2)]
    for model in models:
        model.ngrams.table.sparse = False
    models[1].compile(backend="aot_eager", dynamic=False, fullgraph=True)
    optimizers = [MuonAdamW(model, TINY, torch.float32, compiled=model is models[1]) for model in models]
    for step in range(3):
        for model in models:
            accumulate_gradients(model, batches(8, seed=step), 1)
        for (name, param), twin in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            assert (param.grad - twin.grad).norm() <= 1e-4 * param.grad.norm(), name
            twin.grad = param.grad.clone()  # AdamW makes much of little
        optimizers[0].step(0.1, 0.9, 0.1)
        with torch.compiler.set_stance(force_backend="aot_eager"):
            optimizers[1].step(0.1, 0.9, 0.1)
        for (name, param), twin in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            assert (param - twin).norm() <= 1e-4 * param.norm(), name
        for model in models:
            model.zero_grad()


@QUIET
@pytest.mark.slow
def test_nothing_is_compiled_after_the_warm_up():
    """Neither the first real batch nor a new learning rate nor the evaluation may compile under the clock."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = tiny_model(replace(TINY, windows="L"))
    model.ngrams.table.sparse = False  # as on CUDA
    with torch.compiler.set_stance(force_backend=backend):
        model.compile(dynamic=False, fullgraph=True)
        optimizer = MuonAdamW(model, TINY, torch.float32, compiled=True)
        warm_up(model, optimizer, TINY.micro_rows, seed=5)
        count = len(graphs)
        assert count >= 3 + len(optimizer.stacks)  # training, evaluation, the n-grams, and each stack
        for step in range(3):
            accumulate_gradients(model, iter([next(batches(8, seed=step))]), 1)
            optimizer.step(1 - step / 3, 0.9 + step / 100, 0.1 - step / 30)
            model.zero_grad()
        model.eval()
        with torch.no_grad():
            assert model(next(batches(8))[0]).shape == (8, T, V)
        assert len(graphs) == count


# == The whole, as it is run ==

TINY_RUN = "depth=1, n_embd=32, head_dim=16, ngram_ratio=16, batch_tokens=2**10, micro_rows=4"
LOOP = "    for step, progress in run.steps():\n"
MAIN = "    prepare.leave(main())\n"


def edited(
    folder: Path, config: str = TINY_RUN, steps: int = 0, at_each_step: str = "", main: str = MAIN
) -> Path:
    """A folder with prepare.py and a train.py: changes of SMALL, and so many steps whatever the time."""
    folder.mkdir()
    shutil.copy(ROOT / "prepare.py", folder)
    loop = LOOP
    if steps:
        loop += f"        if step == {steps}:\n            break\n        progress = step / {steps}\n"
    source = (ROOT / "train.py").read_text()
    for before, after in (
        ('"SMALL": SMALL', f'"SMALL": replace(SMALL, {config})'),
        (LOOP, loop + at_each_step),
        (MAIN, main),
    ):
        assert source.count(before) == 1, before
        source = source.replace(before, after)
    (folder / "train.py").write_text(source)
    return folder


def run_script(folder: Path, *arguments: str, **env: str) -> Job:
    """`python ARGUMENTS` in the folder, with one thread, few probes and the session's cache."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | env
    return Job(folder / "job", Request(str(folder), environment, list(arguments))).wait()


def summary(stdout: str) -> dict[str, str]:
    lines = stdout.partition("---\n")[2].splitlines()
    return {key: value.strip() for key, value in (line.split(":", 1) for line in lines)}


@pytest.mark.slow
def test_a_plain_run_learns_and_prints_its_score(cache, tmp_path):
    shutil.copy(ROOT / "prepare.py", tmp_path)
    shutil.copy(ROOT / "train.py", tmp_path)
    done = run_script(tmp_path, "train.py", AUTORESEARCH_BUDGET="5")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("plain run, not recorded")
    assert re.search(
        r"^SMALL: \d+\.\dM parameters, torch\..*, sdpa_attention, eager, 1 x 32 rows", done.stdout, re.M
    )
    found = summary(done.stdout)
    assert int(found["num_steps"]) >= 2
    assert 1 < float(found["val_bpb"]) < 4.5  # 4.8 of an untrained model


SEEDS = """
    import os
    for seed in ("7", "7", "8"):
        os.environ["SEED"] = seed
        print("=== run")
        assert main() == 0
    prepare.leave(0)
"""


@pytest.mark.slow
def test_two_runs_with_one_seed_agree(cache, tmp_path):
    # in one process, to load torch's optimizers once
    done = run_script(edited(tmp_path / "lab", steps=7, main=SEEDS), "train.py")
    assert (done.returncode, done.stderr) == (0, "")
    outputs = done.stdout.split("=== run")[1:]
    assert all("read 7,168 tokens" in output for output in outputs)
    found = [summary(output) for output in outputs]
    assert [run["num_steps"] for run in found] == ["7"] * 3
    assert [run["seed"] for run in found] == ["7", "7", "8"]
    scores = [run["val_bpb"] for run in found]
    assert scores[0] == scores[1] != scores[2]
    assert 1 < float(scores[0]) < 8


@pytest.mark.slow
def test_a_nan_loss_ends_the_run(cache, tmp_path):
    folder = edited(tmp_path / "lab", config=f'{TINY_RUN}, matrix_lr=float("nan")')
    done = run_script(folder, "train.py")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: step 1: the loss is nan") and "lower the learning rates" in line
    assert "val_bpb" not in done.stdout


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_is_help_and_not_a_description(tmp_path, option):
    done = run_script(
        edited(tmp_path / "lab"), "train.py", option, AUTORESEARCH_CACHE=str(tmp_path / "nothing")
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert 'uv run train.py "what is different"' in done.stdout


IMPORT = """
import os, sys, warnings, torch
warnings.simplefilter("error")
def state():
    precision = torch.get_float32_matmul_precision()
    return dict(os.environ), torch.get_rng_state().tolist(), torch.get_default_dtype(), precision
before = state()
import train
assert state() == before
assert not torch.cuda.is_initialized()
heavy = {"kernels", "torch._dynamo", "torch._inductor", "huggingface_hub"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""


def test_import_is_silent_and_touches_nothing(tmp_path):
    folder = edited(tmp_path / "lab")
    (folder / "script.py").write_text(IMPORT)
    done = run_script(folder, "script.py")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


RESOURCES = """
        import os, threading
        from pathlib import Path
        memory = Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        print("resources", memory, len(os.listdir("/proc/self/fd")), threading.active_count(), len(children))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_thousand_steps_leave_nothing_behind(cache, tmp_path):
    """Memory of its own, open files, threads and processes stay as they were, and the process ends."""
    config = TINY_RUN.replace("2**10, micro_rows=4", "256, micro_rows=1")
    folder = edited(tmp_path / "lab", config, steps=1000, at_each_step=RESOURCES)
    done = run("train.py", cwd=folder, env={"OMP_NUM_THREADS": "1"}, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert summary(done.stdout)["num_steps"] == "1000"
    seen = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("resources")]
    memory, *counts = np.array(seen, int)[200:].T
    assert len(memory) == 800
    assert np.median(memory[-200:]) - np.median(memory[:200]) < 4 * 1024  # KiB
    files, threads, children = counts
    assert files.min() == files.max() > 0
    assert threads.min() == threads.max() > 0
    assert not children.any()


@pytest.mark.slow
def test_variants_of_the_config_make_a_table(cache):
    variants = ["small: depth=1 n_embd=64 ngram_length=1", "odd: batch_tokens=1000 ngram_length=1"]
    env = {"AUTORESEARCH_CACHE": cache, "AUTORESEARCH_BUDGET": "5"}
    done = run("tests/gpu_variants.py", *variants, env=env)
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["variant", *variants]
    assert 1 < float(rows[1][1]) < 3.6 and int(rows[1][2]) > 1
    assert set(rows[2][1:]) == {"-"} and "batch_tokens is 1,000, not a multiple" in done.stderr
    assert done.returncode == 1
    typo = run("tests/gpu_variants.py", variants[0], "typo: widht=64", env=env)
    assert typo.returncode == 1 and "widht" in typo.stderr and typo.stdout == ""

"""Train a GPT for five minutes and report its val_bpb: the file that an experiment edits.

    uv run train.py "what is different"

It reads in the order of a run: config, model, optimizer, schedules, warm-up, loop. Data, clock and metric come from
prepare.py. Shapes: B rows, T tokens, D model width, N heads, K key-value heads, H head width, V vocabulary, L layers.
"""

import ctypes
import functools
import gc
import itertools
import math
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._triton import has_triton

from prepare import MAX_SEQ_LEN, SCALE, TIME_BUDGET, Experiment, Tokenizer, TrainError, evaluate_bpb, make_dataloader

# == 1. Config =========================================================================================================

@dataclass(frozen=True)
class Config:
    """Every number worth tuning. "branch" is the best published overnight branch, val_bpb 0.9697 on an H100."""
    # model
    depth: int = 9  # layers L; branch
    n_embd: int = 640  # width D; branch
    head_dim: int = 128  # head width H; branch
    queries_per_kv: int = 1  # heads that share one key-value head, N / K; sharing hurt in the published searches
    windows: str = "SSSSL"  # a Short or Long window for each layer, repeated; the last layer is always long; branch
    short_window: int = 256  # tokens before itself that a token sees in a short layer; branch
    rotary_base: float = 200_000.0  # slowest rotation in tokens, over 2 pi; branch
    mlp_ratio: int = 4  # hidden width of the MLP, over D
    ngram_tokens: int = 3  # n-grams of 2 tokens up to this many, 5 at most, have rows in one table, found by a hash
    ngram_ratio: int = 16  # rows of that table, over V; not measured at full scale
    value_every: int = 2  # layers to a layer with value embeddings; branch
    gate_channels: int = 32  # of a layer's input that open and close its value embeddings
    logit_softcap: float = 15.0  # logits stay within +- this; 0 for none
    init_scale: float = 0.68  # of the matrices that read the residual stream, over 1 / sqrt(D); branch
    x0_init: float = 0.05  # how much of the embedding every layer adds at first; branch
    # batch
    batch_tokens: int = 2**18  # tokens of an optimizer step; branch
    micro_rows: int = 128  # rows of a forward pass, halved until they fit into memory; branch
    eval_rows: int = 32  # rows of a forward pass in the metric; it allows 2 GiB of float32 logits, which is 32 here
    loss_chunk: int = 512  # positions whose logits are held at once, except on CUDA; 256 to 1024 were alike
    # Muon, for the matrices of the blocks
    matrix_lr: float = 0.04  # spectral norm of a step; branch
    matrix_weight_decay: float = 0.2  # at the start; falls to 0; branch
    muon_momentum: tuple[float, float] = (0.85, 0.95)  # at the first step, and after the ramp
    muon_ramp_steps: int = 200  # branch
    muon_beta2: float = 0.95  # memory of NorMuon's second moment
    # RMSProp by rows, for the n-grams; the learning rates of n-grams, embeddings and head are meant for D = 768
    ngram_lr: float = 0.1  # where each row is met in every step, as in SMALL with a ratio of 2, 0.9 did harm
    ngram_beta2: float = 0.95  # memory of a row's second moment, in steps that touch the row
    # AdamW, for all else
    embedding_lr: float = 0.9  # of token, follower and value embeddings; branch
    head_lr: float = 0.005  # branch
    x0_lr: float = 0.5  # of the x0 scalars; branch
    resid_lr: float = 0.005  # of the residual scalars, smaller because their effects multiply; branch
    embedding_weight_decay: float = 0.001  # branch
    value_weight_decay: float = 0.003  # branch
    head_weight_decay: float = 0.01  # branch
    adam_betas: tuple[float, float] = (0.8, 0.95)
    x0_betas: tuple[float, float] = (0.96, 0.95)
    shift_lr: float = 0.02  # of the token shift, 1.198 to 1.181 with 4 layers of SMALL; not measured at full scale
    adam_eps: float = 1e-10  # far below the gradients, which are those of a mean over the whole batch
    # schedule, in fractions of the time budget
    warmup_frac: float = 0.0  # any warm-up hurt the branch
    warmdown_frac: float = 0.75  # branch
    final_lr_frac: float = 0.05  # of the peak learning rate; branch
    def __post_init__(self):
        if self.n_embd % (self.head_dim * self.queries_per_kv) or self.head_dim % 2:
            heads = f"head_dim {self.head_dim} (an even number) * queries_per_kv {self.queries_per_kv}"
            raise ValueError(f"n_embd is {self.n_embd}, not a multiple of {heads}")
        if not self.windows or set(self.windows) - {"S", "L"}:
            raise ValueError(f"windows is {self.windows!r}; write an S or an L for each layer, such as SSSL")
    def by_width(self, lr: float) -> float:
        """A wider model takes smaller steps: the rates are meant for D = 768."""
        return lr * (self.n_embd / 768) ** -0.5
    def layer_windows(self, seq_len: int) -> list[int]:
        """The window of each layer, in tokens; the last layer sees the whole row."""
        letters = [self.windows[i % len(self.windows)] for i in range(self.depth - 1)] + ["L"]
        return [seq_len if letter == "L" else min(self.short_window, seq_len) for letter in letters]
    def micro_batches(self, rows: int, seq_len: int) -> int:
        """How many of them make a batch."""
        if self.batch_tokens % (rows * seq_len):
            found = f"batch_tokens {self.batch_tokens:,} is not a multiple of {rows} rows of {seq_len:,} tokens"
            raise TrainError(f"{found}; make batch_tokens and micro_rows powers of two")
        return self.batch_tokens // (rows * seq_len)

FULL = Config()
SMALL = replace(  # for T = 256 and two CPU cores; val_bpb on Python sources when it was set, two seeds if kept
    FULL,
    depth=2,  # 1.149; 3 layers 1.156, 4 layers 1.181: fewer layers take more steps in the time; 1 was level
    n_embd=128,  # 1.035, 192 1.040; with smaller MLPs 0.988, 64 1.042
    head_dim=64, short_window=64,
    mlp_ratio=1,  # 0.988; 2 0.994, 4 1.003, but the machine's speed changed; side by side 1.023, 4 1.028
    ngram_tokens=4,  # 1.001, 3 1.010, 5 1.003 (as much computing each, 1,300 steps on one core)
    ngram_ratio=1024,  # 0.994, 512 1.001 (likewise); gradients are sparse on the CPU only: elsewhere it costs more
    ngram_lr=0.9,  # most rows are met a few times in all
    value_every=1,  # 1.137; every second layer 1.149
    batch_tokens=2**13,  # 1.003, 2^12 1.027; with smaller MLPs 0.988, 2^14 0.988
    micro_rows=32, eval_rows=8,  # 16 MB of logits in the metric; older glibc maps anew whatever is above 32
    logit_softcap=0.0,  # 1.209, with it 1.225: it costs a tenth of a step
)

# == 2. Attention: (q_BTNH, k_BTKH, v_BTKH, window) -> BTNH ============================================================
# With a window of W a token sees itself and the W tokens before it, W + 1 keys, in every back end.

@functools.lru_cache
def window_mask(queries: int, keys: int, window: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(queries, keys): 0 where the last `queries` of the `keys` tokens may look, -inf elsewhere."""
    ago = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return torch.zeros(ago.shape, dtype=dtype, device=device).masked_fill_((ago < 0) | (ago > window), -math.inf)

def sdpa_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """scaled_dot_product_attention, which runs everywhere."""
    T, shared = q.size(1), q.size(2) != k.size(2)
    mask = None if window >= T - 1 else window_mask(T, T, window, q.dtype, q.device)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=shared)
    return y.transpose(1, 2)

def block_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """Matrix products by blocks of tokens, which see themselves and the one before; faster on the CPU."""
    (B, T, N, H), block = q.shape, max(window, 16)
    blocks, before = (1, 0) if 2 * block >= T else (-(-T // block), block)
    block = T if blocks == 1 else block
    def in_blocks(x: torch.Tensor, before: int) -> torch.Tensor:  # (B, blocks, N, before + block, H)
        x = x.repeat_interleave(N // x.size(2), dim=2) if x.size(2) < N else x
        x = F.pad(x, (0, 0, 0, 0, before, blocks * block - T)).view(B, -1, block, N, H)
        return (torch.cat((x[:, :-1], x[:, 1:]), dim=2) if before else x).transpose(2, 3)

    scores = in_blocks(q * H**-0.5, 0) @ in_blocks(k, before).mT
    scores += window_mask(block, before + block, window, q.dtype, q.device)
    scores[:, 0, ..., :before] = -math.inf  # before the first block there is only padding
    y = scores.softmax(dim=-1) @ in_blocks(v, before)
    return y.transpose(2, 3).reshape(B, -1, N, H)[:, :T]

def flex_attention(seq_len: int, windows: set[int], device: torch.device) -> Callable:
    """FlexAttention, for CUDA: a compiled kernel that skips the blocks of tokens that are wholly masked."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    def block_mask(window: int):
        def visible(b, h, i, j):
            return (i >= j) & (i - j <= window)
        return create_block_mask(visible, None, None, seq_len, seq_len, device=device)

    masks = {window: block_mask(window) for window in windows}
    compiled = torch.compile(flex_attention, dynamic=False)
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        shared = q.size(2) != k.size(2)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(q, k, v, block_mask=masks[window], enable_gqa=shared).transpose(1, 2)
    return attend

def flash_attention_3() -> Callable:
    """FlashAttention-3, for bfloat16 on Hopper, from the Hugging Face kernel hub or its cache."""
    import requests

    try:
        requests.head(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=3)
    except requests.RequestException:
        os.environ["HF_HUB_OFFLINE"] = "1"  # else the hub's client tries again and again, and ignores its cache
    import kernels
    attend = kernels.get_kernel("kernels-community/flash-attn3", version=1).flash_attn_func
    return lambda q, k, v, window: attend(q, k, v, causal=True, window_size=(window, 0))

def choose_attention(device: torch.device, dtype: torch.dtype, seq_len: int, windows: set[int]) -> Callable:
    """The fastest back end that works here; a line says so if that is not the first choice."""
    if device.type == "cpu":
        return block_attention
    if not can_compile(device):
        return sdpa_attention
    if torch.cuda.get_device_capability(device) == (9, 0) and dtype == torch.bfloat16:
        try:
            return flash_attention_3()
        except Exception as error:  # no network, no kernel for this torch, ...: there is another back end
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"FlashAttention-3 did not load ({reason}); using FlexAttention", flush=True)
    return flex_attention(seq_len, windows, device)

# == 3. Model ==========================================================================================================
class Norm(torch.autograd.Function):
    """norm() without a compiler. Its backward pass goes over memory less often; steps take 0.92 of the time."""
    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        rms = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32) * x.size(-1) ** -0.5
        scale = rms.clamp_min(1e-6).reciprocal().to(x.dtype)
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y
    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        y, scale = ctx.saved_tensors
        return (grad - y * (grad * y).mean(-1, keepdim=True)).mul_(scale)

def norm(x: torch.Tensor) -> torch.Tensor:
    """RMSNorm without gains, x / sqrt(mean(x^2))."""
    return F.rms_norm(x, x.shape[-1:]) if torch.compiler.is_compiling() else Norm.apply(x)

def rotary_tables(seq_len: int, head_dim: int, base: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of position * base^(-2c/H) for the channel pairs c, float32 (T, 1, H/2)."""
    speed = base ** (torch.arange(0, head_dim, 2) / -head_dim)
    angle = torch.outer(torch.arange(seq_len), speed)[:, None]
    return angle.cos(), angle.sin()

def rotate(x_BTNH: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions (arXiv 2104.09864): a query at i and a key at j score by i - j, whatever i is."""
    a, b = x_BTNH.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)

class Linear(nn.Linear):
    """A matrix without a bias, kept in float32 and applied in the dtype of its input."""
    def __init__(self, n_in: int, n_out: int):
        super().__init__(n_in, n_out, bias=False)
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype))

class Attention(nn.Module):
    def __init__(self, config: Config, layer: int, window: int, vocab_size: int, attend: Callable):
        super().__init__()
        self.config, self.window, self.attend = config, window, attend
        n_kv = config.n_embd // config.queries_per_kv
        self.c_q, self.c_k, self.c_v = (Linear(config.n_embd, n_out) for n_out in (config.n_embd, n_kv, n_kv))
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.value_embed = None
        if (config.depth - 1 - layer) % config.value_every == 0:  # the last layer among them
            self.value_embed = nn.Embedding(vocab_size, n_kv)
            self.value_gate = Linear(config.gate_channels, n_kv // config.head_dim)
    def forward(self, x_BTD: torch.Tensor, idx_BT: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        heads = (*idx_BT.shape, -1, self.config.head_dim)
        q, k, v = (c(x_BTD).view(heads) for c in (self.c_q, self.c_k, self.c_v))
        if self.value_embed is not None:
            gate = 2 * torch.sigmoid(self.value_gate(x_BTD[..., : self.config.gate_channels]))
            v = v + gate.unsqueeze(-1) * self.value_embed(idx_BT).to(v.dtype).view(heads)
        q, k = norm(rotate(q, cos, sin)), norm(rotate(k, cos, sin))
        return self.c_proj(self.attend(q, k, v, self.window).flatten(2))

def shifted(x_BTD: torch.Tensor, by_D: torch.Tensor) -> torch.Tensor:
    """With some of the token before: attention finds what followed an earlier occurrence in one layer, not in two."""
    return torch.addcmul(x_BTD, by_D, F.pad(x_BTD, (0, 0, 1, -1)))

class Block(nn.Module):
    def __init__(self, config: Config, layer: int, window: int, vocab_size: int, attend: Callable):
        super().__init__()
        self.attn = Attention(config, layer, window, vocab_size, attend)
        self.shift = nn.Parameter(torch.zeros(2, config.n_embd))
        self.c_fc = Linear(config.n_embd, config.mlp_ratio * config.n_embd)
        self.c_proj = Linear(config.mlp_ratio * config.n_embd, config.n_embd)
    def forward(self, x: torch.Tensor, idx: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        to_attn, to_mlp = self.shift.to(x.dtype)
        x = x + self.attn(shifted(norm(x), to_attn), idx, cos, sin)
        return x + self.c_proj(F.relu(self.c_fc(shifted(norm(x), to_mlp))).square())

def softcap(logits: torch.Tensor, cap: float) -> torch.Tensor:
    """Within +- cap, if that is not 0."""
    return cap * torch.tanh(logits.float() / cap) if cap else logits

def followed(idx_BT: torch.Tensor, keys_BT: torch.Tensor) -> torch.Tensor:
    """The token after the last earlier occurrence of each key in its row; the row's first token, if there is none."""
    T = keys_BT.size(1)
    in_order_BT = (keys_BT * T + torch.arange(T, device=keys_BT.device)).sort(dim=1).values  # by key, then by place
    keys_BT, order_BT = in_order_BT // T, in_order_BT % T
    again_BT = F.pad(keys_BT[:, 1:] == keys_BT[:, :-1], (1, 0))
    last_BT = torch.empty_like(order_BT).scatter_(1, order_BT, torch.where(again_BT, order_BT.roll(1, 1), -1))
    return idx_BT.gather(1, last_BT + 1)

class ChunkedLoss(torch.autograd.Function):
    """Mean cross-entropy of x @ weight.T and its gradients, `size` positions at a time, so that they fit in cache."""
    @staticmethod
    def forward(ctx, x_MD: torch.Tensor, weight_VD: torch.Tensor, targets_M: torch.Tensor, cap: float, size: int):
        weight, targets_M1 = weight_VD.to(x_MD.dtype), targets_M.unsqueeze(1)
        loss, dx, dw = 0.0, torch.empty_like(x_MD), torch.zeros_like(weight_VD)
        for x, targets, dx_chunk in zip(*(t.split(size) for t in (x_MD, targets_M1, dx)), strict=True):
            logits = softcap(x @ weight.mT, cap)
            p = logits.softmax(dim=-1, dtype=torch.float32)
            p_target = p.gather(1, targets)
            loss = loss - p_target.clamp_min(1e-45).log().sum()  # never inf, but 103 ends a run
            dlogits = p.scatter_(1, targets, p_target - 1)
            dlogits = (dlogits.mul_(1 - (logits / cap).square()) if cap else dlogits).to(x.dtype)
            dx_chunk[:] = dlogits @ weight
            dw += dlogits.mT @ x
        ctx.save_for_backward(dx, dw)
        return loss / len(targets_M)
    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        dx, dw = ctx.saved_tensors
        grad = grad / len(dx)
        return dx * grad.to(dx.dtype), dw * grad, None, None, None

class GPT(nn.Module):
    """Weights in float32, activations in `dtype`, logits and loss in float32."""
    def __init__(self, config: Config, vocab_size: int, seq_len: int, attend: Callable, dtype: torch.dtype):
        super().__init__()
        self.config, self.dtype, self.seq_len = config, dtype, seq_len
        self.wte = nn.Embedding(vocab_size, config.n_embd)
        rows, sparse = torch.zeros(config.ngram_ratio * vocab_size, config.n_embd), self.wte.weight.is_cpu
        self.ngrams = nn.Embedding.from_pretrained(rows, freeze=False, sparse=sparse)  # sparse in its gradient
        self.follower = nn.Embedding(vocab_size, config.n_embd)
        windows = enumerate(config.layer_windows(seq_len))
        self.blocks = nn.ModuleList(Block(config, i, window, vocab_size, attend) for i, window in windows)
        self.resid_lambdas = nn.Parameter(torch.ones(config.depth))
        self.x0_lambdas = nn.Parameter(torch.full((config.depth,), config.x0_init))
        self.lm_head = Linear(config.n_embd, vocab_size)
        cos, sin = rotary_tables(seq_len, config.head_dim, config.rotary_base)
        self.register_buffer("cos", cos.to(dtype), persistent=False)
        self.register_buffer("sin", sin.to(dtype), persistent=False)
        self.init_weights()
    @torch.no_grad()
    def init_weights(self) -> None:
        """What writes to the residual stream starts at 0, and the gates too: 2 * sigmoid(0) is 1."""
        s = math.sqrt(3 / self.config.n_embd)  # U(-s, s) has a standard deviation of 1 / sqrt(D)
        nn.init.normal_(self.wte.weight)
        nn.init.zeros_(self.follower.weight)
        nn.init.normal_(self.lm_head.weight, std=0.001)
        for block in self.blocks:
            for reader in (block.attn.c_q, block.attn.c_k, block.attn.c_v, block.c_fc):
                nn.init.uniform_(reader.weight, -s * self.config.init_scale, s * self.config.init_scale)
            for writer in (block.attn.c_proj, block.c_proj):
                nn.init.zeros_(writer.weight)
            if block.attn.value_embed is not None:
                nn.init.uniform_(block.attn.value_embed.weight, -s, s)
                nn.init.zeros_(block.attn.value_gate.weight)
    def forward(self, idx_BT: torch.Tensor, targets_BT: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (B, T, V); with targets their mean cross-entropy, in nats."""
        cos, sin = self.cos[: idx_BT.size(1)], self.sin[: idx_BT.size(1)]
        base = 36313  # above V, so that equal numbers are equal n-grams, and odd, so that they spread over the rows
        keys = [idx_BT]
        for n in range(1, self.config.ngram_tokens):
            keys.append(base**n * idx_BT + F.pad(keys[-1], (1, -1)))
        ngrams_BTD = self.ngrams(torch.stack(keys[1:]) % self.ngrams.num_embeddings).sum(0)
        x = x0 = norm((self.wte(idx_BT) + ngrams_BTD + self.follower(followed(idx_BT, keys[1]))).to(self.dtype))
        for i, block in enumerate(self.blocks):
            x = block(self.resid_lambdas[i] * x + self.x0_lambdas[i] * x0, idx_BT, cos, sin)
        x, cap = norm(x), self.config.logit_softcap
        if targets_BT is not None and not x.is_cuda:  # on CUDA the compiler fuses soft-cap and loss
            x_MD, targets_M = x.flatten(0, 1), targets_BT.flatten()
            return ChunkedLoss.apply(x_MD, self.lm_head.weight, targets_M, cap, self.config.loss_chunk)
        logits = softcap(self.lm_head(x), cap).float()
        return logits if targets_BT is None else F.cross_entropy(logits.flatten(0, 1), targets_BT.flatten())
    def flops_per_token(self) -> int:
        """Forward and backward, as published: 6 for each entry of a matrix, 12 N H for each token of a window."""
        matrices = sum(module.weight.numel() for module in self.modules() if isinstance(module, Linear))
        return 6 * matrices + 12 * self.config.n_embd * sum(self.config.layer_windows(self.seq_len))

# == 4. Optimizer: its updates are plain functions that change parameters and state in place ===========================
def scalars(**values: float) -> dict[str, torch.Tensor]:
    """0-D tensors on the CPU: a new learning rate must not recompile an update."""
    return {name: torch.tensor(value, dtype=torch.float32) for name, value in values.items()}

def rowwise_update(param, grad, second_moment, steps, *, lr, beta2) -> None:
    """RMSProp with a second moment and a count of steps for each row; rows without a gradient stay as they are."""
    rows = slice(None)
    if grad.is_sparse:
        grad = grad.coalesce()
        rows, grad = grad.indices()[0], grad.values()
    mean = grad.square().mean(-1, keepdim=True)
    touched = (mean > 0).float()
    steps[rows] += touched
    second_moment[rows] = second_moment[rows].lerp(mean, (1 - beta2) * touched)
    root = (second_moment[rows] / (1 - beta2 ** steps[rows].clamp_min(1))).sqrt()
    param[rows] -= grad * (lr / root.clamp_min(1e-20))  # of an untouched row it is 0

POLAR_EXPRESS = (  # (a, b, c) of x <- a x + (b A + c A^2) x with A = x x^T, a row for each step; arXiv 2505.16932
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)

def orthogonalize(matrices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """U V^T, roughly, of matrices U S V^T (..., R, C): a polynomial brings every singular value close to 1."""
    x = matrices.to(dtype)
    x = x.mT if (tall := x.size(-2) > x.size(-1)) else x  # the smaller one of the two Gram matrices
    x = x / (1.02 * torch.linalg.matrix_norm(x.float(), keepdim=True) + 1e-6).to(dtype)  # 1.02: safe in bfloat16
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x

def normalize_neurons(update: torch.Tensor, second_moment: torch.Tensor, beta2: torch.Tensor) -> torch.Tensor:
    """NorMuon, arXiv 2510.05491: neurons of the longer side take steps of one size; the Frobenius norm stays."""
    means = neuron_means(update.square())
    second_moment.lerp_(means, 1 - beta2)
    scale = second_moment.clamp_min(1e-10).rsqrt()
    before, after = (x.sum((-2, -1), keepdim=True).sqrt() for x in (means, means * scale.square()))
    return update * (scale * before / after.clamp_min(1e-10))

def neuron_means(matrices: torch.Tensor) -> torch.Tensor:
    return matrices.mean(-1 if matrices.size(-2) >= matrices.size(-1) else -2, keepdim=True)

def muon_update(params, grads, momentum_buffer, second_moment, *, lr, momentum, beta2, weight_decay, dtype) -> None:
    """Muon for a stack (matrices, R, C), in `dtype`; weight decay only where the update agrees (arXiv 2510.12402)."""
    momentum_buffer.lerp_(grads, 1 - momentum)
    update = orthogonalize(grads.lerp(momentum_buffer, momentum), dtype).float()
    update = normalize_neurons(update, second_moment, beta2)
    lr = lr * max(1.0, params.size(-2) / params.size(-1)) ** 0.5
    params.sub_(lr * (update + weight_decay * params * (update * params > 0)))

class MuonAdamW:
    """Muon for the matrices of the blocks, stacked by shape, RMSProp by rows for the n-grams, AdamW for all else."""
    def __init__(self, model: GPT, config: Config, dtype: torch.dtype, compiled: bool):
        self.config, self.dtype, self.ngrams = config, dtype, model.ngrams.weight
        self.stacks, self.groups = matrix_stacks(model), adamw_groups(model, config)
        covered = {self.ngrams}.union(*self.stacks, *(group["params"] for group in self.groups))
        if forgotten := [name for name, param in model.named_parameters() if param not in covered]:
            raise ValueError(f"no learning rate for {', '.join(forgotten)}; add a group in adamw_groups")
        wire = functools.partial(torch.compile, dynamic=False, fullgraph=True) if compiled else lambda update: update
        self.muon_update, self.rowwise_update = wire(muon_update), wire(rowwise_update)
        self.numbers = scalars if compiled else dict
        self.reset()
    def reset(self) -> None:
        """Forget all steps."""
        self.state = defaultdict(list)
        self.adamw = torch.optim.AdamW([dict(group) for group in self.groups], eps=self.config.adam_eps, fused=True)
    @torch.no_grad()
    def step(self, lr_frac: float, momentum: float, matrix_weight_decay: float) -> None:
        """One step at `lr_frac` of the peak learning rates."""
        numbers = {"lr": lr_frac * self.config.matrix_lr, "momentum": momentum, "beta2": self.config.muon_beta2}
        numbers = self.numbers(**numbers, weight_decay=matrix_weight_decay)
        for params in self.stacks:
            stack, grads = torch.stack(params), torch.stack([param.grad for param in params])
            if not (state := self.state[params[0]]):  # the first matrix has that of the stack
                state += [torch.zeros_like(stack), torch.zeros_like(neuron_means(stack))]
            self.muon_update(stack, grads, *state, dtype=self.dtype, **numbers)
            torch._foreach_copy_(params, list(stack))
        if not (state := self.state[self.ngrams]):
            state += [self.ngrams.new_zeros(len(self.ngrams), 1) for _ in range(2)]
        numbers = self.numbers(lr=lr_frac * self.config.by_width(self.config.ngram_lr), beta2=self.config.ngram_beta2)
        self.rowwise_update(self.ngrams, self.ngrams.grad, *state, **numbers)
        for group in self.adamw.param_groups:
            group["lr"] = lr_frac * group["peak_lr"]
        self.adamw.step()

def matrix_stacks(model: GPT) -> list[list[nn.Parameter]]:
    """The matrices of the blocks, those of one shape together."""
    stacks = defaultdict(list)
    for module in model.blocks.modules():
        if isinstance(module, Linear):
            stacks[module.weight.shape].append(module.weight)
    return list(stacks.values())

def adamw_groups(model: GPT, config: Config) -> list[dict]:
    """As torch.optim takes them, with the peak of the learning rate."""
    embedding_lr, head_lr = config.by_width(config.embedding_lr), config.by_width(config.head_lr)
    embeddings = [model.wte.weight, model.follower.weight]
    values = [block.attn.value_embed.weight for block in model.blocks if block.attn.value_embed is not None]
    groups = [
        (embeddings, embedding_lr, config.embedding_weight_decay, config.adam_betas),
        (values, embedding_lr, config.value_weight_decay, config.adam_betas),
        ([model.lm_head.weight], head_lr, config.head_weight_decay, config.adam_betas),
        ([model.resid_lambdas], config.resid_lr, 0.0, config.adam_betas),
        ([model.x0_lambdas], config.x0_lr, 0.0, config.x0_betas),
        ([block.shift for block in model.blocks], config.shift_lr, 0.0, config.adam_betas),
    ]
    return [dict(zip(("params", "peak_lr", "weight_decay", "betas"), group, strict=True)) for group in groups]

# == 5. Schedules ======================================================================================================
def learning_rate_frac(progress: float, config: Config) -> float:
    """Up from 0 within warmup_frac of the time, flat at 1, down to final_lr_frac within the last warmdown_frac."""
    if progress < config.warmup_frac:
        return progress / config.warmup_frac
    down = max(0.0, 1 - (1 - progress) / config.warmdown_frac) if config.warmdown_frac else 0.0
    return 1 - down * (1 - config.final_lr_frac)

def muon_momentum(step: int, config: Config) -> float:
    """A ramp over steps, unlike the rest: what it waits for, a filled momentum buffer, comes with steps."""
    first, last = config.muon_momentum
    return first + (last - first) * min(1.0, step / config.muon_ramp_steps)

# == 6. Device =========================================================================================================
PEAK_TFLOPS = {  # dense bfloat16 by data sheet, for MFU; the first name that is part of the device's counts
    "B200": 2250, "H200": 989.5, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989.5, "A100": 312, "L40S": 362, "L40": 181,
    "L4": 121, "RTX 5090": 209.5, "RTX 4090": 165.2, "RTX 3090": 71,
}  # fmt: skip

def can_compile(device: torch.device) -> bool:
    """CUDA with Triton. On the CPU steps of SMALL would take 0.9 of the time, but compiling 27 s, and 90 s at first."""
    return device.type == "cuda" and has_triton()

def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where it is faster: on CPUs with AMX or AVX512-BF16. On MPS causal attention in it leaked the future."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    return torch.bfloat16 if fast else torch.float32

def keep_freed_memory() -> None:
    """Have glibc keep large buffers for the next step, 28,000 page faults less in each step of SMALL."""
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(-3, 2**30) or mallopt(-3, 2**25)  # M_MMAP_THRESHOLD; older releases take 32 MB at most
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD

# == 7. Warm-up ========================================================================================================
def accumulate_gradients(model: nn.Module, batches: Iterator, micro_batches: int) -> tuple[torch.Tensor, int]:
    """Add up the gradients of the mean loss of several (inputs, targets, epoch); returns that loss and the epoch."""
    total = 0.0
    for _ in range(micro_batches):
        inputs, targets, epoch = next(batches)
        loss = model(inputs, targets) / micro_batches
        loss.backward()
        total = total + loss.detach()
    return total, epoch

def warm_up(model: GPT, optimizer: MuonAdamW, rows: int) -> None:
    """Two training steps and an evaluation on random tokens, which compile and allocate all there is; then undone."""
    config, device = model.config, model.wte.weight.device
    micro_batches = min(2, config.micro_batches(rows, model.seq_len))
    zero = torch.zeros((), device=device)  # stands for tables of zeros: a copy of the n-grams' would take 1 GiB
    weights = {name: x.clone() if x.count_nonzero() else zero.expand_as(x) for name, x in model.state_dict().items()}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        # not one tensor for both: that would be compiled as a special case
        inputs, targets = torch.randint(model.wte.num_embeddings, (2, rows, model.seq_len), device=device)
        try:
            for _ in range(2):
                accumulate_gradients(model, itertools.repeat((inputs, targets, 0)), micro_batches)
                optimizer.step(1.0, config.muon_momentum[0], config.matrix_weight_decay)
                model.zero_grad()
            model.eval()
            with torch.no_grad():
                model(inputs[: config.eval_rows])
        finally:
            model.train()
            model.zero_grad()
            model.load_state_dict(weights)
            optimizer.reset()

def fit_micro_batch(attempt: Callable[[int], None], rows: int) -> int:
    """The largest of rows, rows / 2, rows / 4, ... for which attempt(rows) does not run out of memory."""
    while True:
        try:
            attempt(rows)
            return rows
        except torch.OutOfMemoryError:
            pass  # the exception holds tensors of the attempt; they are free only after this line
        if rows == 1:
            raise TrainError("out of memory with a single row; lower depth or n_embd, or free the device's memory")
        print(f"out of memory with {rows} rows, trying {rows // 2}", flush=True)
        rows //= 2
        torch.compiler.reset()  # a function is compiled 8 times at most
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

# == 8. Loop ===========================================================================================================
class Monitor:
    """Watches the loss, two steps late so that the host never waits for the device, and prints a line every 10 s."""
    def __init__(self, device: torch.device, batch_tokens: int, batch_flops: int):
        self.on_cuda, self.batch_tokens, self.batch_flops = device.type == "cuda", batch_tokens, batch_flops
        name = torch.cuda.get_device_name(device) if self.on_cuda else ""
        self.peak_flops = next((1e12 * tflops for part, tflops in PEAK_TFLOPS.items() if part in name), None)
        self.losses = torch.zeros(4, pin_memory=self.on_cuda)
        self.ema, self.ema_weight = 0.0, 0.0
        self.begun_s, self.shown_s, self.shown_steps = time.monotonic(), time.monotonic(), 0
    def mfu_percent(self, steps: int, seconds: float) -> str:
        return f"{100 * steps * self.batch_flops / seconds / self.peak_flops:.2f}" if self.peak_flops else "n/a"
    def watch(self, step: int, loss: torch.Tensor) -> None:
        """Take the loss of this step and check the one of two steps ago."""
        self.losses[step % 4].copy_(loss, non_blocking=self.on_cuda)
        if step >= 2:
            self.check(step - 2, self.losses[(step - 2) % 4].item())
    def check(self, step: int, loss: float) -> None:
        if not loss <= 100:  # NaN is not
            remedy = "lower matrix_lr and embedding_lr, or set warmup_frac"
            raise TrainError(f"step {step}: the loss is {loss:.4g}, not a number up to 100; {remedy}")
        self.ema, self.ema_weight = 0.9 * self.ema + 0.1 * loss, 0.9 * self.ema_weight + 0.1
    def show(self, steps: int, progress: float, lr_frac: float, epoch: int) -> None:
        now = time.monotonic()
        if now - self.shown_s < 10 or not self.ema_weight:
            return
        seconds, since = now - self.shown_s, steps - self.shown_steps
        speed = f"{1000 * seconds / since:.0f} ms/step | {since * self.batch_tokens / seconds:,.0f} tok/s"
        done = f"step {steps:5d} | {progress:4.0%} | loss {self.ema / self.ema_weight:.4f} | lr {lr_frac:.2f} | {speed}"
        left = f"epoch {epoch} | {TIME_BUDGET * (1 - progress):.0f} s left"
        print(f"{done} | mfu {self.mfu_percent(since, seconds)} | {left}", flush=True)
        self.shown_s, self.shown_steps = now, steps

def main() -> int:
    if sys.argv[1:] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    with Experiment(" ".join(sys.argv[1:])) as run:
        config = FULL if SCALE == "full" else SMALL
        device, dtype, compiled = run.device, compute_dtype(run.device), can_compile(run.device)
        keep_freed_memory()
        tokenizer = Tokenizer.from_directory()
        attend = choose_attention(device, dtype, MAX_SEQ_LEN, set(config.layer_windows(MAX_SEQ_LEN)))
        with device:
            model = GPT(config, tokenizer.get_vocab_size(), MAX_SEQ_LEN, attend, dtype)
        if compiled:
            torch.set_float32_matmul_precision("high")  # TF32 for what is not in bfloat16
            model.compile(dynamic=False)
        optimizer = MuonAdamW(model, config, dtype, compiled)
        rows = fit_micro_batch(lambda rows: warm_up(model, optimizer, rows), config.micro_rows)
        micro_batches = config.micro_batches(rows, MAX_SEQ_LEN)
        num_params_M = sum(param.numel() for param in model.parameters()) / 1e6
        kind = f"{device}, {dtype}, {attend.__qualname__.partition('.')[0]}, {'compiled' if compiled else 'eager'}"
        print(f"{num_params_M:.1f}M parameters, {kind}, {micro_batches} x {rows} rows of {MAX_SEQ_LEN}", flush=True)

        batches = make_dataloader(tokenizer, rows, MAX_SEQ_LEN, device=device)
        gc.collect()
        gc.freeze()  # what is alive now stays; looking through it would cost time in every collection
        monitor = Monitor(device, config.batch_tokens, config.batch_tokens * model.flops_per_token())
        for step, progress in run.steps():
            loss, epoch = accumulate_gradients(model, batches, micro_batches)
            lr_frac = learning_rate_frac(progress, config)
            optimizer.step(lr_frac, muon_momentum(step, config), config.matrix_weight_decay * (1 - progress))
            model.zero_grad()
            monitor.watch(step, loss)
            monitor.show(step + 1, progress, lr_frac, epoch)
        monitor.check(step, loss.item())
        mfu_percent = monitor.mfu_percent(step + 1, time.monotonic() - monitor.begun_s)
        evaluate_bpb(model, tokenizer, min(rows, config.eval_rows))
        tokens_M = (step + 1) * config.batch_tokens / 1e6
        run.summary(mfu_percent, tokens_M, num_steps=step + 1, num_params_M=num_params_M, depth=config.depth)
    return run.exit_code

if __name__ == "__main__":
    sys.exit(main())

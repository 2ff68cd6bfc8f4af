"""Train a GPT for five minutes and report its val_bpb: the file that an experiment edits.

    uv run train.py                         a plain run: prints its score
    uv run train.py "what is different"     an experiment: recorded and judged

Sections 1 to 5 are the model and how it learns, 6 and 7 only make it run, and fast. Shapes: B rows, T tokens,
D model width, N heads, H head width, V vocabulary, L layers.
"""

import functools
import gc
import itertools
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils._triton import has_triton

import prepare
from prepare import MAX_SEQ_LEN, SCALE, VOCAB_SIZE, AutoresearchError, Experiment

# == 1. Config =================


@dataclass(frozen=True)
class Config:
    """Every number worth tuning. Defaults are those of the best published run (0.9697), unless marked."""

    # model
    depth: int = 9  # layers L
    n_embd: int = 640  # width D
    head_dim: int = 128  # head width H
    windows: str = "SSSSL"  # Short or Long, for each layer, repeated; the last layer is always long
    short_window: int = 256  # earlier tokens that a token sees in a short layer
    rotary_base: float = 200_000.0
    mlp_ratio: int = 4  # hidden width of the MLP is this times D
    token_shift: bool = True  # ours: blocks also read the token before; -0.005 bpb (FULL) to -0.17 (SMALL)
    ngram_length: int = 1  # longest n-gram that has an embedding, 1 for none; in FULL 2 was level
    ngram_ratio: int = 5  # rows of their table for each token of V
    value_every: int = 2  # one layer in this many has value embeddings, the last included
    gate_channels: int = 32  # channels of x that the gate of the value embeddings reads
    logit_softcap: float = 15.0  # logits stay within +- this; 0 for none
    init_scale: float = 0.68  # sqrt(D) * deviation of the weights of q, k, v, MLP input, value embeddings
    x0_init: float = 0.05  # weight, at first, of the embedding that is added before each layer
    # batch
    batch_tokens: int = 2**18  # tokens of an optimizer step
    micro_rows: int = 128  # rows of a pass, at most; halved until they fit
    eval_rows: int = 32  # rows of a pass in the metric
    # Muon, for the matrices of the blocks
    matrix_lr: float = 0.04  # spectral norm of a step, roughly
    matrix_weight_decay: float = 0.2  # at the start; falls linearly to 0
    muon_momentum: tuple[float, float] = (0.85, 0.95)  # at the first step, and after the ramp
    muon_ramp_steps: int = 200
    muon_beta2: float = 0.95  # of NorMuon's second moment
    # RMSProp by rows, for the n-grams
    ngram_lr: float = 0.1  # ours; for D = 768, see by_width()
    ngram_beta2: float = 0.95  # ours
    # AdamW, for all else
    embedding_lr: float = 0.9  # for D = 768, too; of token and value embeddings
    head_lr: float = 0.005  # for D = 768, too
    x0_lr: float = 0.5
    resid_lr: float = 0.005  # of the residual scalars, whose effects multiply
    shift_lr: float = 0.02  # ours
    embedding_weight_decay: float = 0.001
    value_weight_decay: float = 0.003
    head_weight_decay: float = 0.01
    adam_betas: tuple[float, float] = (0.8, 0.95)
    x0_betas: tuple[float, float] = (0.96, 0.95)
    adam_eps: float = 1e-10  # must stay far below the gradients
    # schedule, in fractions of the time budget
    warmdown_frac: float = 0.75  # no warm-up: each that was tried hurt
    final_lr_frac: float = 0.05  # of the peak learning rate

    def __post_init__(self):
        if self.n_embd % self.head_dim or self.head_dim % 2:
            raise ValueError(f"n_embd is {self.n_embd}, not a multiple of an even head_dim ({self.head_dim})")
        if not self.windows or set(self.windows) - {"S", "L"}:
            raise ValueError(f"windows is {self.windows!r}; write an S or an L for each layer, such as SSSL")
        if not 1 <= self.ngram_length <= 5:
            raise ValueError(f"ngram_length is {self.ngram_length}, not 1 to 5; choose one of these")

    def by_width(self, lr: float) -> float:
        """Scale a rate given for D = 768: a wider model takes smaller steps."""
        return lr * (self.n_embd / 768) ** -0.5

    def layer_windows(self, seq_len: int) -> list[int]:
        """The window of each layer, in tokens."""
        windows = []
        for layer in range(self.depth):
            is_long = self.windows[layer % len(self.windows)] == "L" or layer == self.depth - 1
            windows.append(seq_len if is_long else min(self.short_window, seq_len))
        return windows

    def micro_batches(self, rows: int, seq_len: int) -> int:
        """The number of micro-batches of `rows` rows in a batch."""
        count, rest = divmod(self.batch_tokens, rows * seq_len)
        if rest:
            found = f"batch_tokens is {self.batch_tokens:,}, not a multiple of {rows} rows of {seq_len:,}"
            raise AutoresearchError(f"{found}; make it and micro_rows powers of two")
        return count


FULL = Config()
DESKTOP = replace(  # published for an RTX 3090: shape and batch took val_bpb from 1.596 to 1.101
    FULL,
    depth=5,
    n_embd=512,
    windows="S",
    short_window=1024,  # T / 2
    batch_tokens=2**16,  # learning rates stay: scaling them hurt
    micro_rows=32,
    eval_rows=8,  # 0.5 GiB of logits
    warmdown_frac=0.6,
)
SMALL = replace(  # for T = 256 and two CPU cores, tuned on Python sources
    FULL,
    depth=2,  # beats 3 and 4: steps are cheaper
    n_embd=128,  # beats 64 and 192
    head_dim=64,  # beats 32 and 128
    short_window=64,
    mlp_ratio=1,  # beats 2 and 4: steps are cheaper
    ngram_length=4,  # beats 3 and 5
    ngram_ratio=1024,  # beats 512
    ngram_lr=0.9,  # most rows are met a few times in all
    value_every=1,  # beats 2
    batch_tokens=2**13,  # beats 2^12; 2^14 is level
    micro_rows=32,
    eval_rows=8,
    logit_softcap=0.0,  # a cap would take a tenth of the time
)
MAC = replace(SMALL, ngram_ratio=64)  # on MPS the table's gradient is dense: 64 MiB in each step
CONFIGS = {"FULL": FULL, "DESKTOP": DESKTOP, "SMALL": SMALL, "MAC": MAC}


def config_name(device: torch.device) -> str:
    return "MAC" if device.type == "mps" and SCALE == "small" else SCALE.upper()


# == 2. Model ==================


def norm(x: Tensor) -> Tensor:
    """RMSNorm without gains, x / sqrt(mean(x^2)) over the last dimension."""
    return F.rms_norm(x, (x.size(-1),))


def rotary_tables(seq_len: int, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position * base^(-2c/H) for the channel pairs c, float32 (T, 1, H/2)."""
    speed = base ** (torch.arange(0, head_dim, 2) / -head_dim)
    angle = torch.outer(torch.arange(seq_len), speed).unsqueeze(1)
    return angle.cos(), angle.sin()


def rotate(x_BTNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (arXiv 2104.09864): a query at i and a key at j score by i - j, whatever i is."""
    a, b = x_BTNH.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


class Linear(nn.Linear):
    """A matrix without a bias, kept in float32, applied in the dtype of its input."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Attention(nn.Module):
    """Causal attention within a window; some layers add a gated embedding of each token to its value."""

    def __init__(self, config: Config, layer: int, window: int, vocab_size: int, attend: Callable):
        super().__init__()
        D = config.n_embd
        self.config = config
        self.window = window
        self.attend = attend
        self.c_q = Linear(D, D)
        self.c_k = Linear(D, D)
        self.c_v = Linear(D, D)
        self.c_proj = Linear(D, D)
        layers_after = config.depth - 1 - layer
        self.has_value_embed = layers_after % config.value_every == 0
        if self.has_value_embed:
            self.value_embed = nn.Embedding(vocab_size, D)
            self.value_gate = Linear(config.gate_channels, D // config.head_dim)

    def forward(self, x_BTD, idx_BT, cos, sin) -> Tensor:
        heads = (*idx_BT.shape, -1, self.config.head_dim)
        q_BTNH = self.c_q(x_BTD).view(heads)
        k_BTNH = self.c_k(x_BTD).view(heads)
        v_BTNH = self.c_v(x_BTD).view(heads)
        if self.has_value_embed:
            gate_BTN = 2 * torch.sigmoid(self.value_gate(x_BTD[..., : self.config.gate_channels]))
            v_BTNH = v_BTNH + gate_BTN.unsqueeze(-1) * self.value_embed(idx_BT).to(x_BTD.dtype).view(heads)
        q_BTNH = rotate(norm(q_BTNH), cos, sin)
        k_BTNH = rotate(norm(k_BTNH), cos, sin)
        return self.c_proj(self.attend(q_BTNH, k_BTNH, v_BTNH, self.window).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, config.mlp_ratio * config.n_embd)
        self.c_proj = Linear(config.mlp_ratio * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    def __init__(self, config: Config, layer: int, window: int, vocab_size: int, attend: Callable):
        super().__init__()
        self.attn = Attention(config, layer, window, vocab_size, attend)
        self.mlp = MLP(config)
        self.attn_shift = nn.Parameter(torch.empty(config.n_embd)) if config.token_shift else None
        self.mlp_shift = nn.Parameter(torch.empty(config.n_embd)) if config.token_shift else None

    def forward(self, x_BTD, idx_BT, cos, sin) -> Tensor:
        x_BTD = x_BTD + self.attn(shifted(norm(x_BTD), self.attn_shift), idx_BT, cos, sin)
        return x_BTD + self.mlp(shifted(norm(x_BTD), self.mlp_shift))


def shifted(x_BTD: Tensor, shift_D: Tensor | None) -> Tensor:
    """The token shift: x plus, channel by channel, a learned multiple of the token before."""
    if shift_D is None:
        return x_BTD
    before_BTD = F.pad(x_BTD, (0, 0, 1, -1))
    return x_BTD + shift_D.to(x_BTD.dtype) * before_BTD


class NgramEmbedding(nn.Module):
    """For each n from 2 to `length` the last n tokens are hashed to a row of a table; the rows are added."""

    BASE = 36313  # > V: of one length only keys of 5 tokens, which overflow 64 bits, may collide

    def __init__(self, length: int, rows: int, width: int):
        super().__init__()
        self.length = length
        # not nn.Embedding(rows, width), which would draw a gigabyte of random numbers
        self.table = nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)
        self.table.sparse = self.table.weight.is_cpu  # on MPS and for compiled code gradients are dense

    def forward(self, idx_BT: Tensor) -> Tensor:
        key_BT = idx_BT
        rows = []
        for i in range(1, self.length):
            key_of_before = F.pad(key_BT, (1, -1))
            key_BT = self.BASE**i * idx_BT + key_of_before
            rows.append(key_BT % self.table.num_embeddings)
        return self.table(torch.stack(rows)).sum(dim=0)


class GPT(nn.Module):
    """Weights in float32, activations in `dtype`, logits and loss in float32."""

    def __init__(self, config: Config, vocab_size: int, seq_len: int, attend: Callable, dtype: torch.dtype):
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.windows = config.layer_windows(seq_len)
        self.wte = nn.Embedding(vocab_size, config.n_embd)
        self.ngrams = None
        if config.ngram_length > 1:
            self.ngrams = NgramEmbedding(config.ngram_length, config.ngram_ratio * vocab_size, config.n_embd)
        blocks = [Block(config, i, window, vocab_size, attend) for i, window in enumerate(self.windows)]
        self.blocks = nn.ModuleList(blocks)
        self.resid_lambdas = nn.Parameter(torch.empty(config.depth))
        self.x0_lambdas = nn.Parameter(torch.empty(config.depth))
        self.lm_head = Linear(config.n_embd, vocab_size)
        cos, sin = rotary_tables(seq_len, config.head_dim, config.rotary_base)
        self.register_buffer("cos", cos.to(dtype), persistent=False)
        self.register_buffer("sin", sin.to(dtype), persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Set every parameter; warm_up() calls it again. Writers to the residual stream start at 0."""
        s = self.config.init_scale * math.sqrt(3 / self.config.n_embd)  # U(-s, s): deviation scale / sqrt(D)
        nn.init.normal_(self.wte.weight)
        nn.init.normal_(self.lm_head.weight, std=0.001)
        nn.init.ones_(self.resid_lambdas)
        nn.init.constant_(self.x0_lambdas, self.config.x0_init)
        if self.ngrams is not None:
            nn.init.zeros_(self.ngrams.table.weight)
        for block in self.blocks:
            for reader in (block.attn.c_q, block.attn.c_k, block.attn.c_v, block.mlp.c_fc):
                nn.init.uniform_(reader.weight, -s, s)
            for writer in (block.attn.c_proj, block.mlp.c_proj):
                nn.init.zeros_(writer.weight)
            if block.attn.has_value_embed:
                nn.init.uniform_(block.attn.value_embed.weight, -s, s)
                nn.init.zeros_(block.attn.value_gate.weight)  # 2 * sigmoid(0) is 1
            if self.config.token_shift:
                nn.init.zeros_(block.attn_shift)
                nn.init.zeros_(block.mlp_shift)

    def forward(self, idx_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        """Logits (B, T, V); with targets their mean cross-entropy, in nats."""
        T = idx_BT.size(1)
        x = self.wte(idx_BT)
        if self.ngrams is not None:
            x = x + self.ngrams(idx_BT)
        x = x0 = norm(x.to(self.dtype))
        for i, block in enumerate(self.blocks):
            x = self.resid_lambdas[i] * x + self.x0_lambdas[i] * x0
            x = block(x, idx_BT, self.cos[:T], self.sin[:T])
        logits = self.lm_head(norm(x)).float()
        cap = self.config.logit_softcap
        if cap:
            logits = cap * torch.tanh(logits / cap)
        if targets_BT is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets_BT.flatten())

    def flops_per_token(self) -> int:
        """Forward and backward, as published: 6 for each matrix entry, 12 D for each token of a window."""
        matrices = sum(module.weight.numel() for module in self.modules() if isinstance(module, Linear))
        return 6 * matrices + 12 * self.config.n_embd * sum(self.windows)


# == 3. Optimizer ==============

POLAR_EXPRESS = (  # (a, b, c) of x <- a x + (b A + c A^2) x, A = x x^T, a row for each step; arXiv 2505.16932
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalize(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """U V^T, roughly, of matrices U S V^T (..., R, C): singular values are brought close to 1."""
    x = matrices.to(dtype)
    is_tall = x.size(-2) > x.size(-1)
    if is_tall:
        x = x.mT  # for the smaller Gram matrix
    frobenius = torch.linalg.matrix_norm(x.float(), keepdim=True)
    x = x / (1.02 * frobenius + 1e-6).to(dtype)  # 1.02: safe in bfloat16
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if is_tall else x


def neuron_means(matrices: Tensor) -> Tensor:
    """Means over the shorter side of the matrices, (..., R, 1) or (..., 1, C)."""
    is_wide = matrices.size(-2) < matrices.size(-1)
    return matrices.mean(dim=-2 if is_wide else -1, keepdim=True)


def normalize_neurons(update: Tensor, second_moment: Tensor, beta2: float) -> Tensor:
    """NorMuon, arXiv 2510.05491: rows (in a wide matrix columns) take steps of one size on average.

    The update's Frobenius norm stays.
    """
    means = neuron_means(update.square())
    second_moment.lerp_(means, 1 - beta2)
    scale = second_moment.clamp_min(1e-10).rsqrt()
    before = means.sum((-2, -1), keepdim=True).sqrt()
    after = (means * scale.square()).sum((-2, -1), keepdim=True).sqrt()
    return update * (scale * before / after.clamp_min(1e-10))


def muon_update(params, grads, momentum_buffer, second_moment, *, lr, momentum, beta2, weight_decay, dtype):
    """Muon for a stack (matrices, R, C). Decay only where the update shrinks a weight, arXiv 2510.12402."""
    momentum_buffer.lerp_(grads, 1 - momentum)
    update = orthogonalize(grads.lerp(momentum_buffer, momentum), dtype).float()
    update = normalize_neurons(update, second_moment, beta2)
    lr = lr * max(1.0, params.size(-2) / params.size(-1)) ** 0.5
    params.sub_(lr * (update + weight_decay * params * (update * params > 0)))


def rowwise_update(table, grad, second_moment, steps, *, lr, beta2):
    """RMSProp with second moment and step count per row; rows without a gradient stay as they are."""
    rows = slice(None)
    if grad.is_sparse:
        grad = grad.coalesce()
        rows = grad.indices()[0]
        grad = grad.values()
    mean_square = grad.square().mean(-1, keepdim=True)
    is_touched = (mean_square > 0).float()  # in a dense gradient most rows are zeros
    steps[rows] += is_touched
    second_moment[rows] = second_moment[rows].lerp(mean_square, (1 - beta2) * is_touched)
    bias = 1 - beta2 ** steps[rows].clamp_min(1)
    root = (second_moment[rows] / bias).sqrt()
    table[rows] -= grad * (lr / root.clamp_min(1e-20))  # the gradient of an untouched row is 0


class MuonAdamW:
    """Muon for the matrices of the blocks, RMSProp by rows for the n-grams, AdamW for all else."""

    def __init__(self, model: GPT, config: Config, dtype: torch.dtype, compiled: bool):
        self.config = config
        self.dtype = dtype
        self.stacks = matrix_stacks(model)
        self.table = None if model.ngrams is None else model.ngrams.table.weight
        self.groups = adamw_groups(model, config)
        covered = {self.table}.union(*self.stacks, *(group["params"] for group in self.groups))
        forgotten = [name for name, param in model.named_parameters() if param not in covered]
        if forgotten:
            raise ValueError(f"no learning rate for {', '.join(forgotten)}; add a group in adamw_groups")
        self.muon_update = muon_update
        self.rowwise_update = rowwise_update
        self.numbers = dict  # plain numbers in eager mode
        if compiled:
            self.muon_update = torch.compile(muon_update, dynamic=False, fullgraph=True)
            self.rowwise_update = torch.compile(rowwise_update, dynamic=False, fullgraph=True)
            self.numbers = scalar_tensors
        self.reset()

    def reset(self) -> None:
        """Forget all steps."""
        stacked = [torch.stack(params) for params in self.stacks]
        self.momentum_buffers = [torch.zeros_like(stack) for stack in stacked]
        self.second_moments = [torch.zeros_like(neuron_means(stack)) for stack in stacked]
        if self.table is not None:
            self.row_moments = self.table.new_zeros(len(self.table), 1)
            self.row_steps = self.table.new_zeros(len(self.table), 1)
        groups = [dict(group) for group in self.groups]
        self.adamw = torch.optim.AdamW(groups, eps=self.config.adam_eps, fused=True)

    @torch.no_grad()
    def step(self, lr_frac: float, momentum: float, weight_decay: float) -> None:
        """One step at `lr_frac` of the peak rates; momentum and weight decay are Muon's."""
        config = self.config
        lr = lr_frac * config.matrix_lr
        muon = self.numbers(lr=lr, momentum=momentum, beta2=config.muon_beta2, weight_decay=weight_decay)
        for i, params in enumerate(self.stacks):
            stack = torch.stack(params)
            grads = torch.stack([param.grad for param in params])
            state = (self.momentum_buffers[i], self.second_moments[i])
            self.muon_update(stack, grads, *state, dtype=self.dtype, **muon)
            torch._foreach_copy_(params, list(stack))
        if self.table is not None:
            rmsprop = self.numbers(lr=lr_frac * config.by_width(config.ngram_lr), beta2=config.ngram_beta2)
            self.rowwise_update(self.table, self.table.grad, self.row_moments, self.row_steps, **rmsprop)
        for group in self.adamw.param_groups:
            group["lr"] = lr_frac * group["peak_lr"]
        self.adamw.step()


def scalar_tensors(**values: float) -> dict[str, Tensor]:
    """0-D tensors on the CPU: a new learning rate must not recompile an update."""
    return {name: torch.tensor(value, dtype=torch.float32) for name, value in values.items()}


def matrix_stacks(model: GPT) -> list[list[nn.Parameter]]:
    """The matrices of the blocks, those of one shape together."""
    stacks = defaultdict(list)
    for module in model.blocks.modules():
        if isinstance(module, Linear):
            stacks[module.weight.shape].append(module.weight)
    return list(stacks.values())


def adamw_groups(model: GPT, c: Config) -> list[dict]:
    """Groups as torch.optim takes them; MuonAdamW fills in `lr`."""
    embeds = [model.wte.weight]
    value_embeds = [block.attn.value_embed.weight for block in model.blocks if block.attn.has_value_embed]
    heads = [model.lm_head.weight]
    shifts = [param for name, param in model.named_parameters() if name.endswith("_shift")]
    embed_lr = c.by_width(c.embedding_lr)
    head_lr = c.by_width(c.head_lr)
    return [
        dict(params=embeds, peak_lr=embed_lr, weight_decay=c.embedding_weight_decay, betas=c.adam_betas),
        dict(params=value_embeds, peak_lr=embed_lr, weight_decay=c.value_weight_decay, betas=c.adam_betas),
        dict(params=heads, peak_lr=head_lr, weight_decay=c.head_weight_decay, betas=c.adam_betas),
        dict(params=[model.resid_lambdas], peak_lr=c.resid_lr, weight_decay=0.0, betas=c.adam_betas),
        dict(params=[model.x0_lambdas], peak_lr=c.x0_lr, weight_decay=0.0, betas=c.x0_betas),
        dict(params=shifts, peak_lr=c.shift_lr, weight_decay=0.0, betas=c.adam_betas),
    ]


# == 4. Schedules ==============


def learning_rate_frac(progress: float, config: Config) -> float:
    """1 at first; a straight line down to final_lr_frac in the last warmdown_frac of the time."""
    if progress <= 1 - config.warmdown_frac:
        return 1.0
    left = (1 - progress) / config.warmdown_frac
    return left + (1 - left) * config.final_lr_frac


def muon_momentum(step: int, config: Config) -> float:
    """A ramp over steps, not over time, because the buffer needs steps to fill."""
    first, last = config.muon_momentum
    return first + (last - first) * min(1.0, step / max(1, config.muon_ramp_steps))


def muon_weight_decay(progress: float, config: Config) -> float:
    return config.matrix_weight_decay * (1 - progress)


# == 5. Training ===============


def accumulate_gradients(model: nn.Module, batches: Iterator, micro_batches: int) -> tuple[Tensor, int]:
    """Add up the gradients of several batches; return their mean loss, and the epoch."""
    total = 0.0
    for _ in range(micro_batches):
        inputs, targets, epoch = next(batches)
        loss = model(inputs, targets) / micro_batches
        loss.backward()
        total = total + loss.detach()
    return total, epoch


def train(run: Experiment) -> None:
    device = run.device
    name = config_name(device)
    config = CONFIGS[name]
    dtype = compute_dtype(device)
    compiled = can_compile(device)
    tokenizer = prepare.Tokenizer.from_directory()
    attend = choose_attention(config, device, dtype, MAX_SEQ_LEN)
    with device:
        model = GPT(config, tokenizer.get_vocab_size(), MAX_SEQ_LEN, attend, dtype)
    if compiled:
        torch.set_float32_matmul_precision("high")  # TF32 for what is not in bfloat16
        model.compile(dynamic=False, fullgraph=True)
    optimizer = MuonAdamW(model, config, dtype, compiled)

    rows = first_rows(config, device)
    rows = prepare.fit_micro_batch(lambda n: warm_up(model, optimizer, n, run.seed), rows)
    micro_batches = config.micro_batches(rows, MAX_SEQ_LEN)
    num_params_M = sum(param.numel() for param in model.parameters()) / 1e6
    how = f"{dtype}, {attend.__name__}, {'compiled' if compiled else 'eager'}"
    shape = f"{micro_batches} x {rows} rows of {MAX_SEQ_LEN}"
    print(f"{name}: {num_params_M:.1f}M parameters, {how}, {shape}", flush=True)

    batches = prepare.make_dataloader(tokenizer, rows, MAX_SEQ_LEN, device=device)
    flops_per_token = model.flops_per_token()
    gc.collect()
    gc.freeze()  # collections skip what is alive now
    for step, progress in run.steps():
        loss, epoch = accumulate_gradients(model, batches, micro_batches)
        lr_frac = learning_rate_frac(progress, config)
        optimizer.step(lr_frac, muon_momentum(step, config), muon_weight_decay(progress, config))
        model.zero_grad()
        run.log(loss, config.batch_tokens, flops_per_token, lr_frac, epoch)
    prepare.evaluate_bpb(model, tokenizer, min(rows, config.eval_rows))  # noted for the summary
    run.summary(num_params_M=num_params_M, depth=config.depth, attention=attend.__name__)


def main() -> int:
    if sys.argv[1:] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    with Experiment(" ".join(sys.argv[1:])) as run:
        train(run)
    return run.exit_code


# == 6. Start ==================


def can_compile(device: torch.device) -> bool:
    """CUDA with Triton. On CPUs it saves 10 % of a step and costs 90 s at first."""
    return device.type == "cuda" and has_triton()


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where it is fast: CPUs need AMX or AVX512-BF16. Not on MPS, where it broke causal masks."""
    is_fast = False
    if device.type == "cuda":
        is_fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        is_fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if is_fast else torch.float32


def warm_up(model: GPT, optimizer: MuonAdamW, rows: int, seed: int) -> None:
    """Compile and allocate all by two steps and an evaluation on random tokens; then start afresh."""
    config = model.config
    seq_len = len(model.cos)
    micro_batches = min(2, config.micro_batches(rows, seq_len))  # 2, to add up gradients
    inputs = torch.randint(model.wte.num_embeddings, (rows, seq_len), device=model.cos.device)
    targets = inputs.flip(0)  # one tensor for both would be compiled as a special case
    try:
        for _ in range(2):
            accumulate_gradients(model, itertools.repeat((inputs, targets, 0)), micro_batches)
            optimizer.step(1.0, config.muon_momentum[0], config.matrix_weight_decay)
            model.zero_grad()
        model.eval()
        with torch.no_grad():
            model(inputs[: config.eval_rows])
    except torch._dynamo.exc.Unsupported as error:
        raise graph_break(str(error).splitlines()) from None
    finally:
        model.train()
        model.zero_grad()
    torch.manual_seed(seed)
    model.init_weights()
    optimizer.reset()


def graph_break(lines: list[str]) -> AutoresearchError:
    """What the compiler says, in one line: why, and the line of code."""
    code = [line.strip() for line in lines if line.startswith("    ")]
    found = f"the model is not one graph: {lines[0]}, in `{code[-1] if code else '?'}`"
    return AutoresearchError(f"{found}; write that line otherwise, or compile without fullgraph=True")


def first_rows(config: Config, device: torch.device) -> int:
    """A first guess of a micro-batch's rows, from free memory and a row's estimated bytes."""
    rows = max(1, min(config.micro_rows, config.batch_tokens // MAX_SEQ_LEN))
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        bytes_of_row = MAX_SEQ_LEN * (40 * config.depth * config.n_embd + 8 * VOCAB_SIZE)
        while rows > 1 and rows * bytes_of_row > free:
            rows //= 2
        print(f"{free / 2**30:.1f} GiB are free: micro-batches of {rows} rows for a start", flush=True)
    return rows


# == 7. Attention back ends, (q_BTNH, k_BTNH, v_BTNH, window) -> BTNH
# With a window of W a token sees itself and the W tokens before it, W + 1 keys.


@functools.lru_cache
def window_mask(seq_len: int, window: int, device: torch.device) -> Tensor:
    """bool (T, T): True where a query, in rows, may see a key."""
    position = torch.arange(seq_len, device=device)
    distance = position[:, None] - position
    return (distance >= 0) & (distance <= window)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Runs everywhere."""
    T = q.size(1)
    is_long = window >= T - 1
    mask = None if is_long else window_mask(T, window, q.device)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_long).transpose(1, 2)


def flex_attention_for(seq_len: int, windows: set[int], device: torch.device) -> Callable:
    """For CUDA: a compiled kernel that skips blocks of tokens that are wholly masked."""
    from torch.nn.attention import flex_attention as flex

    def block_mask(window: int):
        def is_visible(b, h, i, j):
            return (i >= j) & (i - j <= window)

        return flex.create_block_mask(is_visible, None, None, seq_len, seq_len, device=device)

    masks = {window: block_mask(window) for window in windows}
    compiled = torch.compile(flex.flex_attention, dynamic=False)

    def flex_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(q, k, v, block_mask=masks[window]).transpose(1, 2)

    return flex_attention


def check_agreement(attend: Callable, qkv: Tensor, window: int) -> None:
    """Raise ValueError if output or gradients for qkv (3, B, T, N, H) are not sdpa_attention's."""
    results = []
    for back_end in (attend, sdpa_attention):
        inputs = qkv.clone().requires_grad_()
        output = back_end(*inputs, window)
        output.float().square().sum().backward()
        results.append(torch.cat((output.detach(), *inputs.grad)).float())
    found, wanted = results
    error = ((found - wanted).norm() / wanted.norm()).item()
    if not error < 0.015:  # bfloat16 gives 0.003, a window one token off 0.024
        raise ValueError(f"its relative error to sdpa_attention is {error:.2g}")


def choose_attention(config: Config, device: torch.device, dtype: torch.dtype, seq_len: int) -> Callable:
    """The fastest back end that works here; a line says why if FlashAttention-3 fails."""
    if not can_compile(device):
        return sdpa_attention
    is_nvidia = torch.version.hip is None
    if is_nvidia and torch.cuda.get_device_capability(device) == (9, 0) and dtype == torch.bfloat16:
        try:
            attend = prepare.load_flash_attention_3()
            qkv = torch.randn(3, 1, seq_len, 2, config.head_dim, device=device, dtype=dtype)
            check_agreement(attend, qkv, config.short_window)
            return attend
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"FlashAttention-3 is not used ({reason}); FlexAttention is", flush=True)
    return flex_attention_for(seq_len, set(config.layer_windows(seq_len)), device)


if __name__ == "__main__":
    prepare.leave(main())

"""
The one model file: a pre-LN GPT-2, and the same with thought tokens.

  ModelConfig, GPT2                  tokens in, logits out; KV cache; generation; weights from and to Hugging Face
  ThinkingModelConfig, GPT2Thinking  adds thought tokens that have no text, and rollouts of them

Tokens are numbered  0 .. d_normal_vocab-1                   normal tokens (text, integers)
                     d_normal_vocab .. d_vocab_total-2       thought tokens <think0>, <think1>, ...
                     d_vocab_total-1                         <end_thought>

Shapes: B rows (sequences), S positions, H heads, D = d_model / n_head, V tokens that the model can write.
Names of parameters are those of Hugging Face's GPT2LMHeadModel without the leading "transformer.".
"""
import contextlib
import math
from dataclasses import asdict, dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from utils import being_recorded, digits, fused, need, sample

try:
    import triton
    import triton.language as tl
except ImportError:     # where there is no GPU
    triton = None

REACH = 16      # distances up to which 'relative' positions tell tokens apart
# up to this many keys, explicit forms of attention are faster
TINY = 8
CHUNK = 8192    # rows of logits that a loss makes at a time


# ---- configs --------------------------------------------------------------------------------------------------------

@dataclass
class ModelConfig:
    """Shape of a GPT2. Raises ValueError when the numbers cannot make a model."""
    d_vocab: int = 50257        # tokens that can be read and written
    block_size: int = 1024      # longest sequence, tokens
    n_layer: int = 12
    n_head: int = 12
    d_model: int = 768
    tie_weights: bool = True    # one matrix embeds and unembeds
    init: str = 'gpt2'          # 'gpt2': std .02 | 'unit': activations of size one, for small models
    positions: str = 'learned'  # 'learned': an embedding each | 'rotary' | 'relative': attention by distance
    dropout: float = 0.         # share of numbers dropped in training: of embeddings, attention and what a layer adds

    def __post_init__(self):
        for name in ('d_vocab', 'block_size', 'n_layer', 'n_head', 'd_model'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name}={getattr(self, name)} must be at least 1')
        if self.d_model % self.n_head:
            raise ValueError(f'n_head={self.n_head} does not divide d_model={self.d_model}')
        if self.init not in ('gpt2', 'unit'):
            raise ValueError(f"init={self.init!r} must be 'gpt2' or 'unit'")
        if self.positions not in ('learned', 'rotary', 'relative'):
            raise ValueError(f"positions={self.positions!r} must be 'learned', 'rotary' or 'relative'")
        if self.positions == 'rotary' and self.d_model // self.n_head % 2:
            raise ValueError(f'rotary positions turn pairs: d_model={self.d_model} / n_head={self.n_head} must be even')
        if self.tie_weights and self.init == 'unit':
            raise ValueError("init='unit' needs tie_weights=False: embeddings of size one make logits too large")
        if self.tie_weights and self.reads != self.writes:
            raise ValueError('tie_weights needs a model that reads and writes the same tokens')

    @property
    def reads(self):
        """Range of tokens that have an embedding."""
        return range(self.d_vocab)

    @property
    def writes(self):
        """Range of tokens that have a logit."""
        return range(self.d_vocab)


@dataclass
class ThinkingModelConfig(ModelConfig):
    """
    Shape of a GPT2Thinking. One model may read and write everything; of two split policies, the thinking one writes
    thoughts only, and the answering one writes normal tokens only, and reads thoughts only where it is blind.
    """
    d_vocab: int = 0            # d_vocab_total, computed from the next two
    d_normal_vocab: int = 50257
    d_thought_vocab: int = 10   # L, without end_thought
    input_kind: str = 'all'     # 'all' | 'normal' | 'thought'
    output_kind: str = 'all'    # 'all' | 'normal' | 'thought'
    gate: float | None = None   # None: no gate; or what it starts at, see GPT2Thinking.think_everywhere

    def __post_init__(self):
        if self.d_normal_vocab < 1 or self.d_thought_vocab < 1:
            raise ValueError('d_normal_vocab and d_thought_vocab must be at least 1')
        self.d_vocab = self.d_normal_vocab + self.d_thought_vocab + 1
        if isinstance(self.gate, bool):     # in older checkpoints
            self.gate = 0. if self.gate else None
        super().__post_init__()

    def _range(self, kind):
        ranges = {'all': range(self.d_vocab), 'normal': range(self.d_normal_vocab),
                  'thought': range(self.d_normal_vocab, self.d_vocab)}
        if kind not in ranges:
            raise ValueError(f'input_kind and output_kind must be one of {", ".join(ranges)}, not {kind!r}')
        return ranges[kind]

    @property
    def reads(self):
        return self._range(self.input_kind)

    @property
    def writes(self):
        return self._range(self.output_kind)

    @property
    def d_vocab_total(self):
        return self.d_vocab

    @property
    def end_thought(self):
        """The token that ends a thought, the last one."""
        return self.d_vocab - 1


# ---- the network ----------------------------------------------------------------------------------------------------

class KVCache:
    """Keys and values (B, H, S, D) of each layer at the positions a model has already read, in memory reserved once."""

    def __init__(self, config, n_rows, n_positions, device=None, dtype=None):
        shape = n_rows, config.n_head, n_positions, config.d_model // config.n_head
        self.kv = [[torch.empty(shape, device=device, dtype=dtype) for _ in 'kv'] for _ in range(config.n_layer)]
        self.positions = torch.empty(n_positions, dtype=torch.long, device=device)
        self.length = 0     # tokens in it
        self.on_device = torch.zeros((), dtype=torch.int32, device=device)      # the same, for attend
        # whether our own kernels, through which no gradients pass, read it
        self.fast = (triton is not None and self.positions.is_cuda and shape[-1] in (16, 32, 64, 128)
                     and not torch.is_grad_enabled())

    @property
    def early(self):
        """Whether a kernel may begin before the one before it is done: programmatic dependent launch, since Hopper."""
        device = self.positions.device
        return device.type == 'cuda' and not torch.version.hip and torch.cuda.get_device_capability(device) >= (9, 0)

    def place(self, positions):
        """Note the positions (S,) of the tokens to come; return those of all tokens with them. Layers call append."""
        self.positions[self.length:self.length + len(positions)] = positions
        return self.positions[:self.length + len(positions)]

    def grow(self, n):
        """Count n tokens that all layers have appended."""
        self.length += n
        self.on_device += n

    def append(self, layer, k, v):
        """Store k, v (B, H, S, D) behind what is there; return all keys and values so far."""
        end = self.length + k.shape[2]
        for kept, new in zip(self.kv[layer], (k, v)):
            kept[:, :, self.length:end] = new
        return [kept[:, :, :end] for kept in self.kv[layer]]

    def attend(self, layer, q, k, v, early=False):
        """
        Append k, v of one token (B, H, 1, D) and attend to all: what attention(q, *append(layer, k, v)) returns, by
        one kernel that reads keys and values once, as wide as memory allows. Only on a GPU, see fast and early.
        """
        (B, H, _, D), out = q.shape, torch.empty_like(q, memory_format=torch.contiguous_format)
        if not q.stride() == k.stride() == v.stride():
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        how = dict(block=32, num_warps=1) if B * H > 500 else dict(block=128, num_warps=4)
        how |= {'launch_pdl': True} if early else {}
        attend_kernel[(B * H,)](q, k, v, *self.kv[layer], out, self.on_device, len(self.positions), *q.stride()[:2], H,
                                D, early=early, **how)
        return out

    def repeat(self, n):
        """Every row n times, side by side: one question's cache serves its whole group of rollouts."""
        self.kv = [[kept.repeat_interleave(n, dim=0) for kept in layer] for layer in self.kv]
        return self


class GrowingCache:
    """The same in memory that grows, through which gradients pass: (2, B, H, S, D) for each layer."""

    def __init__(self):
        self.kv, self.positions, self.length = {}, None, 0

    def place(self, positions):
        self.positions = positions if self.length == 0 else torch.cat([self.positions, positions])
        return self.positions

    def grow(self, n):
        self.length += n

    def append(self, layer, k, v):
        kv = torch.stack([k, v])
        self.kv[layer] = torch.cat([self.kv[layer], kv], dim=3) if layer in self.kv else kv
        return self.kv[layer]

    def repeat(self, n):
        self.kv = {layer: kv.repeat_interleave(n, dim=1) for layer, kv in self.kv.items()}
        return self

    def select(self, rows):
        """Only these rows (n,), in this order, each perhaps several times."""
        self.kv = {layer: kv[:, rows] for layer, kv in self.kv.items()}
        return self


if triton:
    @triton.jit
    def attend_kernel(q, k, v, keys, values, out, length, S, stride_row, stride_head, H: tl.constexpr, D: tl.constexpr,
                      block: tl.constexpr, early: tl.constexpr):
        """One head of one row: see KVCache.attend. Softmax as it goes (Milakov and Gimelshein 2018), in float32."""
        if early:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()
        row, d, n = tl.program_id(0), tl.arange(0, D), tl.load(length)
        at = row // H * stride_row + row % H * stride_head + d
        old = row.to(tl.int64) * S * D + d
        new_k, new_v = tl.load(k + at), tl.load(v + at)
        tl.store(keys + old + n * D, new_k)
        tl.store(values + old + n * D, new_v)
        query = tl.load(q + at).to(tl.float32) / tl.sqrt(D * 1.)
        top, total, mix = tl.sum(query * new_k.to(tl.float32)), 1., new_v.to(tl.float32)
        for start in range(0, n, block):
            s = start + tl.arange(0, block)[:, None]                                        # (block, 1)
            key = tl.load(keys + old + s * D, s < n, 0.).to(tl.float32)                     # (block, D)
            value = tl.load(values + old + s * D, s < n, 0.).to(tl.float32)
            score = tl.where(s < n, tl.sum(query * key, 1, keep_dims=True), -float('inf'))
            best = tl.maximum(top, tl.max(score))
            p, keep = tl.exp(score - best), tl.exp(top - best)
            top, total, mix = best, total * keep + tl.sum(p), mix * keep + tl.sum(p * value, 0)
        tl.store(out + row * D + d, (mix / total).to(new_v.dtype))

    @triton.jit
    def project_kernel(x, gain, shift, weight, bias, add, out, K: tl.constexpr, wide: tl.constexpr, part: tl.constexpr,
                       norm: tl.constexpr, gelu: tl.constexpr, more: tl.constexpr, early: tl.constexpr):
        """Of a single row, `part` numbers of what project returns: sums in float32."""
        if early:
            tl.extra.cuda.gdc_launch_dependents()
        n, k = tl.program_id(0) * part + tl.arange(0, part), tl.arange(0, wide)
        rows = tl.load(weight + n[:, None] * K + k, (k < K)[None, :], 0.)                   # (part, wide)
        if early:       # weights were not made by the kernel before, x was
            tl.extra.cuda.gdc_wait()
        h = tl.load(x + k, k < K, 0.).to(tl.float32)
        if norm:
            h = tl.where(k < K, h - tl.sum(h) / K, 0.)
            h = h * tl.rsqrt(tl.sum(h * h) / K + 1e-5) * tl.load(gain + k, k < K, 0.) + tl.load(shift + k, k < K, 0.)
            h = h.to(rows.dtype).to(tl.float32)
        y = tl.sum(rows.to(tl.float32) * h[None, :], 1) + tl.load(bias + n)
        if gelu:
            y = y / (1 + tl.exp(-1.5957691216 * (y + .044715 * y * y * y)))
        if more:
            y = y.to(rows.dtype) + tl.load(add + n)
        tl.store(out + n, y.to(rows.dtype))


def project(x, linear, norm=None, gelu=False, add=None, early=False):
    """
    A single row x (1, 1, K) through a linear layer, with a LayerNorm before it, and GELU and what is added behind it:
    one kernel that reads the weights once, as wide as memory allows, and with early before x is there, see KVCache. On
    a GPU; the number of outputs divides by 8.
    """
    (N, K), part = linear.weight.shape, 8
    out = x.new_empty(1, 1, N)
    gain, shift = (x, x) if norm is None else (norm.weight, norm.bias)
    project_kernel[(N // part,)](x, gain, shift, linear.weight, linear.bias, x if add is None else add, out, K,
                                 triton.next_power_of_2(K), part, norm is not None, gelu, add is not None, early,
                                 num_warps=4, **({'launch_pdl': True} if early else {}))
    return out


def fastest_attention(q):
    """A context in which PyTorch prefers cuDNN's attention, which trains long sequences fastest on a recent GPU."""
    if not (q.is_cuda and q.requires_grad and q.dtype is torch.bfloat16):
        return contextlib.nullcontext()
    return sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
                        SDPBackend.MATH], set_priority=True)


def attention(q, k, v, bias=None, visible=None, dropout=0.):
    """
    Attention of q (B, H, Sq, D), the last Sq of the Sk tokens, to k and v (B, H, Sk, D). Returns q's shape.
    visible: (Sq, Sk), True for what each may see; None: those before it and itself. bias: (H, Sq, Sk), added to scores.
    dropout: share of the weights that are dropped.
    """
    n_query, n_key = q.shape[2], k.shape[2]
    if n_key == 1 and not dropout:      # whose weight is 1: computed, it had a gradient of rounding error, and Adam
        return v                        # would blow that up
    tiny = n_key <= TINY
    if not tiny and bias is None and visible is None and n_query in (1, n_key):
        with fastest_attention(q):
            return F.scaled_dot_product_attention(q, k, v, is_causal=n_query > 1, dropout_p=dropout)
    mask = visible
    if visible is None:
        mask = torch.ones(n_query, n_key, dtype=torch.bool, device=q.device).tril(n_key - n_query)  # (Sq, Sk)
    if bias is not None:
        mask = bias.to(q.dtype).masked_fill(~mask, -torch.inf)                                      # (H, Sq, Sk)
    if not tiny:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    if bias is None:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
    if q.is_cuda or n_query == 1:   # which multiplies thousands of tiny matrices faster number by number
        scores = (q[:, :, :, None] * k[:, :, None]).sum(-1) * q.shape[-1] ** -.5 + mask             # (B, H, Sq, Sk)
        return (F.dropout(scores.softmax(-1), dropout)[..., None] * v[:, :, None]).sum(3).to(v.dtype)
    return F.dropout((q @ k.transpose(-2, -1) * q.shape[-1] ** -.5 + mask).softmax(-1), dropout) @ v    # likewise


class LinearCrossEntropy(torch.autograd.Function):
    """
    Mean cross-entropy, in nats, of logits x @ weight.T against targets: x (n, d_model), weight (V, d_model), targets
    (n,). Logits are made and used for CHUNK rows at a time and never all in memory, as their gradient is computed in
    the forward pass (as in Liger Kernel, Hsu et al. 2024).
    """
    @staticmethod
    def forward(ctx, x, weight, targets):
        loss, grad_x, grad_weight, V = x.new_zeros((), dtype=torch.float), [], torch.zeros_like(weight), len(weight)
        if torch.is_autocast_enabled(x.device.type):
            x, weight = (tensor.to(torch.get_autocast_dtype(x.device.type)) for tensor in (x, weight))
        more = -V % 64 if x.is_cuda else 0      # rows of a round length are multiplied faster there
        weight, number = F.pad(weight, (0, 0, 0, more)), torch.arange(V + more, device=x.device)
        for rows, target in zip(x.split(CHUNK), targets.split(CHUNK)):
            if torch.compiler.is_compiling():   # or all chunks were made side by side: each waits for the one before
                rows = rows * (loss == loss)
            logits = (rows @ weight.T).float()                                              # (CHUNK, V + more)
            log_p = (logits.masked_fill(number >= V, -torch.inf) if more else logits).log_softmax(-1)
            loss = loss - log_p.gather(-1, target[:, None]).sum()
            grad = ((log_p.exp() - (number == target[:, None]).float()) / len(x)).to(x.dtype)
            grad_x.append(grad @ weight)
            grad_weight += (grad.T @ rows)[:V]
        ctx.save_for_backward(torch.cat(grad_x), grad_weight)
        return loss / len(x)

    @staticmethod
    def backward(ctx, grad):
        grad_x, grad_weight = ctx.saved_tensors
        return grad * grad_x, grad * grad_weight, None


def turns(positions, d_head):
    """Cosines and sines (S, d_head / 2) of the angles by which 'rotary' turns positions (S,) (Su et al. 2021)."""
    rates = 10000. ** -(torch.arange(0, d_head, 2, device=positions.device) / d_head)
    angles = positions[:, None] * rates
    return angles.cos(), angles.sin()


def turn(x, cos, sin):
    """Turn the pairs (i, i + D / 2) of queries or keys x (B, H, S, D) by the angles of their positions."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


def one_token(x, cache, visible, module):
    """Whether x (B, S, d_model) is one token a row, which KVCache.attend can serve in this module."""
    plain = module.config.positions != 'relative' and not (module.training and module.config.dropout)
    return plain and visible is None and x.shape[1] == 1 and isinstance(cache, KVCache) and cache.fast


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.c_attn = nn.Linear(config.d_model, 3 * config.d_model)
        self.c_proj = nn.Linear(config.d_model, config.d_model)
        if config.positions == 'relative':      # what a distance of -REACH..REACH adds to a head's scores
            self.relative = nn.Embedding(2 * REACH + 1, config.n_head)
        # a bias of the keys raises all scores of a query alike and changes nothing: its gradient is rounding error,
        # which Adam would blow up to full steps, different with every number of processes
        mask = [1, 0, 1]        # of queries, keys, values
        self.c_attn.bias.register_hook(lambda grad: torch.cat([part * m for part, m in zip(grad.chunk(3), mask)]))

    def forward(self, x, layer, cache, places, visible):
        B, S, d_model = x.shape
        q, k, v = (y.view(B, S, self.config.n_head, -1).transpose(1, 2)           # (B, H, S, D)
                   for y in self.c_attn(x).split(d_model, dim=-1))
        if self.config.positions == 'rotary':
            q, k = turn(q, *places), turn(k, *places)
        dropout = self.config.dropout if self.training else 0.
        if one_token(x, cache, visible, self):
            return self.c_proj(cache.attend(layer, q, k, v).view(B, S, d_model))
        if cache is not None:
            k, v = cache.append(layer, k, v)
        bias = None
        if self.config.positions == 'relative':
            bias = 8 * self.relative(places).permute(2, 0, 1)                                              # (H, Sq, Sk)
        return self.c_proj(attention(q, k, v, bias, visible, dropout).transpose(1, 2).reshape(B, S, d_model))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.d_model, 4 * config.d_model)
        self.c_proj = nn.Linear(4 * config.d_model, config.d_model)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate='tanh'))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.d_model)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.d_model)
        self.mlp = MLP(config)
        self.config = config

    def forward(self, x, layer, cache=None, places=None, visible=None):
        x = x + F.dropout(self.attn(self.ln_1(x), layer, cache, places, visible), self.config.dropout, self.training)
        return x + F.dropout(self.mlp(self.ln_2(x)), self.config.dropout, self.training)

    def step(self, x, layer, cache):
        """What forward does to one token of a single row (1, 1, d_model), by five kernels; see GPT2.single."""
        early, through = cache.early, partial(project, early=cache.early)
        q, k, v = (y.view(1, self.config.n_head, 1, -1)
                   for y in through(x, self.attn.c_attn, self.ln_1).chunk(3, dim=-1))
        x = through(cache.attend(layer, q, k, v, early).view_as(x), self.attn.c_proj, add=x)
        return through(through(x, self.mlp.c_fc, self.ln_2, gelu=True), self.mlp.c_proj, add=x)


def merge_rows(tokens):
    """Indices (n,) of rows of tokens (N, S) of which no two are alike, and (N,) which of these each row is like."""
    which = torch.zeros_like(tokens[:, 0])
    for column in tokens.T:     # of a number per row, which is quicker to sort than rows
        which = (which * (tokens.max() + 1) + column).unique(return_inverse=True)[1]
    one = torch.empty_like(which[:which.max() + 1])
    return one.scatter_(0, which, torch.arange(len(which), device=which.device)), which


class Tree:
    """
    Reads rows of tokens bit by bit, those that are alike so far once. Gradients pass where they did when it was made:
    a tree by which rollouts were sampled gives their log-probabilities too, for one backward pass.
    """

    def __init__(self, model):
        self.model, self.cache, self.grad = model, GrowingCache(), torch.is_grad_enabled()
        self.tokens, self.steps = None, []

    def read(self, tokens, positions):
        """
        Go on to the end of tokens (N, S), at positions (S,). Returns states (n, d_model) at the last of them, of the n
        rows that are not alike, and (N,) which of these each row is; steps keeps them, tokens what was read.
        """
        rows, which = merge_rows(tokens)
        with torch.set_grad_enabled(self.grad):
            if self.steps:
                self.cache.select(self.steps[-1][1][rows])
            new = slice(self.cache.length, tokens.shape[1])
            states = self.model.hidden(tokens[rows, new], self.cache, positions[new])[:, -1]
        self.tokens = tokens
        self.steps.append((states, which))
        return states, which


def go_on(positions, n_prompt, n_new, device):
    """Positions (n_prompt + n_new,) of a prompt, where they are None from 0, and of new tokens behind its last."""
    if positions is None:
        return torch.arange(n_prompt + n_new, device=device)
    return torch.cat([positions, positions[-1] + 1 + torch.arange(n_new, device=device)])


class Rollout(NamedTuple):
    """What generation returns: N rows of T new tokens."""
    tokens: torch.Tensor        # (N, T) tokens; from a row's stop token on, only stop tokens
    log_probs: torch.Tensor     # (N, T) log-probability of each token, see utils.sample; 0 outside mask
    mask: torch.Tensor          # (N, T) True where the policy chose a token, a row's stop token included


class GPT2(nn.Module):
    """
    GPT-2 (Radford et al. 2019): pre-LN transformer with learned positions; or with rotary ones (Su et al. 2021), or
    with a learned bias for every distance up to REACH (Raffel et al. 2020).
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(len(config.reads), config.d_model)
        if config.positions == 'learned':
            self.wpe = nn.Embedding(config.block_size, config.d_model)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.d_model)
        self.lm_head = nn.Linear(config.d_model, len(config.writes), bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.wte.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """
        'gpt2': all matrices normal with std .02, those that end a residual branch by another 1/sqrt(2 n_layer).
        'unit': embeddings std 1, matrices 1/sqrt(fan_in), so that every activation starts with size one.
        """
        unit = self.config.init == 'unit'
        for name, p in self.named_parameters():
            if name.endswith('.bias'):
                nn.init.zeros_(p)
            elif p.dim() == 2:
                std = .02 if not unit else 1. if name in ('wte.weight', 'wpe.weight') else p.shape[1] ** -.5
                if name.endswith('c_proj.weight'):
                    std /= math.sqrt(2 * self.config.n_layer)
                nn.init.normal_(p, std=std)
                if name.endswith('relative.weight'):    # nearer tokens first, by heads of a longer and longer reach
                    distance = torch.arange(-REACH, REACH + 1).abs()
                    p.copy_(-10 / 8 * distance[:, None] * .5 ** torch.arange(self.config.n_head))

    def embed(self, tokens):
        """
        tokens: (B, S), or how much there is of each token that can be read, (B, S, len(config.reads)), for gradients
        with respect to tokens. Returns embeddings (B, S, d_model).
        """
        return tokens @ self.wte.weight if tokens.is_floating_point() else self.wte(tokens - self.config.reads.start)

    def layers(self, x, cache=None, positions=None, visible=None):
        """
        x: (B, S, d_model), embeddings of tokens that are appended to what the cache holds. positions: (S,), where they
        say they are; None: where they are. visible: see attention; then it is for the caller to mind block_size.
        Returns the last layer's states (B, S, d_model).
        """
        start = 0 if cache is None else cache.length
        end = start + x.shape[1]
        if end > self.config.block_size and visible is None:
            raise ValueError(f'{end} tokens are more than block_size={self.config.block_size}')
        if positions is None:
            positions = torch.arange(start, end, device=x.device)
        keys, places = positions if cache is None else cache.place(positions), None     # keys (Sk,): of all tokens
        if self.config.positions == 'learned':
            x = x + self.wpe(positions)                                                 # (B, S, d_model)
        elif self.config.positions == 'rotary':
            places = turns(positions, self.config.d_model // self.config.n_head)
        else:
            places = (keys - positions[:, None]).clamp(-REACH, REACH) + REACH           # (S, Sk)
        x = F.dropout(x, self.config.dropout, self.training)
        if torch.is_autocast_enabled(x.device.type):    # what layers add to takes half the memory and time
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if self.single(x, cache, visible):
            for layer, block in enumerate(self.h):
                x = block.step(x, layer, cache)
            x = self.ln_f(x)
        else:
            x = self.blocks(x, cache, places, visible)
        if cache is not None:
            cache.grow(x.shape[1])
        return x

    def single(self, x, cache, visible):
        """Whether x (B, S, d_model) is one token of a single row, which Block.step can read."""
        fits = 4 * self.config.d_model <= 4096      # longer rows do not fit into registers
        return (len(x) == 1 and fits and self.config.positions == 'learned' and x.dtype is self.wte.weight.dtype
                and one_token(x, cache, visible, self))

    @fused
    def blocks(self, x, cache, places, visible):
        """What layers does to embeddings x (B, S, d_model); places: of positions, as Attention takes them."""
        for layer, block in enumerate(self.h):
            x = block(x, layer, cache, places, visible)
        return self.ln_f(x)

    def hidden(self, tokens, cache=None, positions=None):
        """States (B, S, d_model) of the last layer at tokens, as embed takes them; for the rest, see layers."""
        return self.layers(self.embed(tokens), cache, positions)

    def logits(self, states, among):
        """Logits (..., len(among)) of a range of tokens at states (..., d_model)."""
        return F.linear(states, self.lm_head.weight[self.columns(among)])

    def loss(self, tokens, targets):
        """Mean cross-entropy, in nats, of targets (B, S) as the tokens that follow on tokens (B, S)."""
        return LinearCrossEntropy.apply(self.hidden(tokens).flatten(0, 1), self.lm_head.weight, targets.flatten())

    def forward(self, tokens, cache=None, positions=None):
        """tokens: (B, S). Returns logits (B, S, V), column i for token config.writes[i]. See layers."""
        return self.lm_head(self.hidden(tokens, cache, positions))

    def columns(self, among):
        """The slice of logit columns for a range of tokens. Raises ValueError when the model does not write them."""
        writes = self.config.writes
        if among.start < writes.start or among.stop > writes.stop:
            raise ValueError(f'tokens {among.start}..{among.stop - 1} are not among those this model writes')
        return slice(among.start - writes.start, among.stop - writes.start)

    @torch.no_grad()
    def generate(self, prompt, n_new, *, positions=None, n_rollouts=1, among=None, stop=None, noise=None,
                 use_cache=True, merge=False, **how):
        """
        Continue each prompt by n_new tokens, n_rollouts times. The prompt is read once for all its rollouts.

        prompt: (B, S) tokens, S >= 1. Rows of the result: N = B * n_rollouts, those of one prompt side by side.
        positions: (S,) of the prompt's tokens, see layers; new tokens go on behind the last.
        among: range of tokens to choose from. stop: token after which a row is done.
        how: temperature, top_k, top_p, epsilon and bias (N, tokens to choose from), see utils.sample.
        noise: (N, n_new) uniform in [0, 1), one number decides one token; drawn here when None.
        use_cache=False reads everything again for each token: the slow reference. merge: rollouts that are alike so
        far are read once, which is faster than the usual cache for many short rollouts of a prompt on a CPU; or a new
        Tree to do so, for log_probs.
        Returns a Rollout.
        """
        N, among = len(prompt) * n_rollouts, among or self.config.writes
        if noise is None:
            noise = torch.rand(N, n_new, device=prompt.device)
        alive = torch.ones(N, dtype=torch.bool, device=prompt.device)
        log_probs, mask = [], []

        def choose(t, state):
            nonlocal alive
            token, log_prob = sample(self.logits(state, among), noise[:, t], **how)
            token = token + among.start                                     # (N,)
            if stop is not None:
                token, log_prob = torch.where(alive, token, stop), torch.where(alive, log_prob, 0.)
            log_probs.append(log_prob)
            mask.append(alive)
            if stop is not None:
                alive = alive & (token != stop)
            return token, None if stop is None else alive

        tokens = self.unroll(prompt, n_new, choose, positions, n_rollouts, use_cache, merge)
        missing = (0, n_new - tokens.shape[1])
        empty = tokens.new_zeros(N, 0)      # where n_new is 0
        log_probs, mask = (torch.stack(x, dim=1) if x else empty for x in (log_probs, mask))
        return Rollout(F.pad(tokens, missing, value=stop or 0), F.pad(log_probs.float(), missing),
                       F.pad(mask.bool(), missing))

    def unroll(self, prompt, n_new, choose, positions=None, n_rollouts=1, use_cache=True, merge=False):
        """
        Continue prompts (B, S) n_rollouts times, side by side, by up to n_new tokens: choose(t, states) is given the
        states (N, d_model) at the last tokens, and returns the t-th new ones (N,), and which rows are to go on (N,),
        None: all; it ends when none is. For the rest, see generate. Returns the new tokens (N, T).
        """
        S, device, cache = prompt.shape[1], prompt.device, None
        tree = Tree(self) if merge is True else merge
        positions = go_on(positions, S, n_new, device)                                  # (S + n_new,)
        if use_cache and not merge:
            autocast = torch.is_autocast_enabled(device.type)
            dtype = torch.get_autocast_dtype(device.type) if autocast else self.wte.weight.dtype
            cache = KVCache(self.config, len(prompt), S + n_new - 1, device, dtype)
        sequence = prompt.repeat_interleave(n_rollouts, dim=0)
        for t in range(n_new):
            if merge:
                states, which = tree.read(sequence, positions[:S + t])
                state = states[which]                                                   # (N, d_model)
            elif t == 0:
                state = self.hidden(prompt, cache, positions[:S])[:, -1].repeat_interleave(n_rollouts, dim=0)
                if use_cache and n_rollouts > 1:
                    cache.repeat(n_rollouts)
            elif use_cache:
                state = self.hidden(sequence[:, -1:], cache, positions[S + t - 1:S + t])[:, -1]
            else:
                state = self.hidden(sequence, None, positions[:S + t])[:, -1]
            token, alive = choose(t, state)
            sequence = torch.cat([sequence, token[:, None]], dim=1)
            if alive is not None and not being_recorded(device) and not alive.any():
                break
        return sequence[:, S:]

    def log_probs(self, prompt, tokens, among=None, entropy=False, merge=False):
        """
        Log-probabilities (N, T), with gradient, of tokens (N, T) chosen among a range after prompt (N, S): at
        temperature 1 and of the whole range, whatever the tokens were sampled with. entropy: return as well the
        entropy (N, T), in nats, of each choice. merge: as in generate; or the Tree by which it sampled the tokens with
        these weights, so that nothing is read twice. Raises ValueError when that has read others.
        """
        among = among or self.config.writes
        read, S = torch.cat([prompt, tokens[:, :-1]], dim=1), prompt.shape[1]
        if merge:
            tree, positions = Tree(self) if merge is True else merge, torch.arange(read.shape[1], device=read.device)
            if tree.steps and not torch.equal(tree.tokens, read[:, :tree.tokens.shape[1]]):
                raise ValueError('the tree has read other tokens than these')
            for end in range(S + len(tree.steps), read.shape[1] + 1):
                tree.read(read[:, :end], positions[:end])
            steps = tree.steps
            parts = [self.logits(states, among).float().log_softmax(-1) for states, _ in steps]
        else:
            steps, parts = None, [self.logits(self.hidden(read)[:, S - 1:], among).float().log_softmax(-1)]

        def every(values):          # (N, T, ...) from those of distinct rows
            return torch.stack([x[which] for x, (_, which) in zip(values, steps)], dim=1) if merge else values[0]
        chosen = every(parts).gather(-1, (tokens - among.start)[..., None])[..., 0]
        return (chosen, every([-(log_p.exp() * log_p).sum(-1) for log_p in parts])) if entropy else chosen

    # ---- weights from and to Hugging Face

    @staticmethod
    def from_pretrained(source):
        """
        A GPT2 with the weights of a Hugging Face GPT-2: a local folder, or a hub name such as 'gpt2' or 'gpt2-xl'.
        Raises ValueError, in one line, when there are no such weights, or the model is not one this file can express.
        """
        transformers = need('transformers', 'to load pretrained weights')
        try:
            theirs = transformers.AutoConfig.from_pretrained(source)
            if theirs.model_type != 'gpt2':
                raise ValueError(f'{source} is not a GPT-2 but a {theirs.model_type}')
            odd = [name for name, usual in HF_FIXED.items() if getattr(theirs, name) != usual]
            if odd or theirs.n_inner not in (None, 4 * theirs.n_embd):
                raise ValueError(f'{source} is not a plain GPT-2: {", ".join(odd) or "n_inner"} differs')
            theirs = transformers.GPT2LMHeadModel.from_pretrained(source, use_safetensors=True, dtype=torch.float32)
        except OSError as error:
            raise ValueError(f'no GPT-2 weights at {source}: {str(error).strip().splitlines()[0]}') from error
        c = theirs.config
        model = GPT2(ModelConfig(d_vocab=c.vocab_size, block_size=c.n_positions, n_layer=c.n_layer, n_head=c.n_head,
                                 d_model=c.n_embd, tie_weights=c.tie_word_embeddings))
        state = {name.removeprefix('transformer.'): p for name, p in theirs.state_dict().items()}
        model.load_state_dict({name: p.t() if name.endswith(HF_TRANSPOSED) else p for name, p in state.items()})
        return model

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors that transformers' GPT2LMHeadModel.from_pretrained loads."""
        transformers = need('transformers', 'to export weights')
        c = self.config
        if c.reads != c.writes or c.positions != 'learned':
            raise ValueError('only a model with learned positions that writes what it reads can be exported')
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
            vocab_size=c.d_vocab, n_positions=c.block_size, n_layer=c.n_layer, n_head=c.n_head, n_embd=c.d_model,
            tie_word_embeddings=c.tie_weights, bos_token_id=None, eos_token_id=None))
        theirs.load_state_dict({('' if name.startswith('lm_head') else 'transformer.') + name:
                                p.t() if name.endswith(HF_TRANSPOSED) else p for name, p in self.state_dict().items()})
        theirs.save_pretrained(folder)


HF_TRANSPOSED = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')    # transformers keeps these matrices as (in, out)
HF_FIXED = {'activation_function': 'gelu_new', 'layer_norm_epsilon': 1e-5, 'scale_attn_weights': True,
            'scale_attn_by_inverse_layer_idx': False, 'add_cross_attention': False}


class GPT2Thinking(GPT2):
    """A GPT2 with thought tokens. What it reads and writes is in its ThinkingModelConfig."""

    def __init__(self, config):
        super().__init__(config)
        if config.gate is not None:     # how much each number of a state with thoughts counts
            self.gate = nn.Parameter(torch.full((config.d_model,), float(config.gate)))

    def thought_range(self, fixed):
        """Tokens that a thinking policy chooses from: the thoughts, and end_thought unless their number is fixed."""
        return range(self.config.d_normal_vocab, self.config.end_thought + (not fixed))

    def think(self, question, think_len, *, fixed=True, **how):
        """
        Roll out thoughts after questions (B, S). fixed: exactly think_len thoughts, none of them end_thought; else up
        to think_len tokens, where end_thought ends a row. how: as in generate. Returns a Rollout of (N, think_len).
        """
        return self.generate(question, think_len, among=self.thought_range(fixed),
                             stop=None if fixed else self.config.end_thought, **how)

    def n_thoughts(self, thoughts):
        """How many thoughts (N,) stand before the first end_thought in each row of thoughts (N, T)."""
        return (thoughts != self.config.end_thought).cumprod(1).sum(1)

    def number(self, thoughts, fixed=True):
        """Thoughts (..., T) as numbers (...): in base L, or in base L + 1 where end_thought is one of the digits."""
        choices = self.thought_range(fixed)
        place_value = len(choices) ** torch.arange(thoughts.shape[-1] - 1, -1, -1, device=thoughts.device)
        return ((thoughts - choices.start) * place_value).sum(-1)

    def spell(self, numbers, think_len, fixed=True):
        """The thoughts (n, think_len) of numbers (n,); behind the first end_thought there are only more of it."""
        choices = self.thought_range(fixed)
        thoughts = choices.start + digits(numbers, think_len, len(choices))
        behind = torch.arange(think_len, device=numbers.device) > self.n_thoughts(thoughts)[:, None]
        return thoughts.masked_fill(behind, self.config.end_thought)

    def thought_log_probs(self, question, thoughts, fixed=True, entropy=False, merge=False):
        """
        Log-probabilities (N, T), with gradient, of thoughts (N, T) after questions (N, S), and if asked for the
        entropies (N, T); both are 0 behind a row's end_thought. merge: see log_probs.
        """
        both = self.log_probs(question, thoughts, self.thought_range(fixed), entropy=True, merge=merge)
        chosen = torch.arange(thoughts.shape[1], device=thoughts.device) <= self.n_thoughts(thoughts)[:, None]  # (N, T)
        log_probs, entropies = (torch.where(chosen, x, 0.) for x in both)
        return (log_probs, entropies) if entropy else log_probs

    def answer(self, thoughts, question=None):
        """
        Logits (N, d_normal_vocab) of the answer, read at the end_thought that closes each row: at the first one in
        thoughts (N, T), T >= 0, or behind them. question: (N, S), what the policy sees before them; None: blind.
        """
        end, position = self.config.end_thought, self.n_thoughts(thoughts)              # (N,)
        sequence = F.pad(thoughts, (0, 1), value=end)                       # (N, T + 1)
        if question is not None:
            sequence, position = torch.cat([question, sequence], dim=1), position + question.shape[1]
        states = self.hidden(sequence)[torch.arange(len(sequence), device=sequence.device), position]
        return self.logits(states, range(self.config.d_normal_vocab))

    def think_and_answer(self, question, thoughts, fixed=True, close=True, positions=None):
        """
        One pass over questions (N, S) and thoughts (N, T) behind them, T >= 0. Returns log-probabilities (N, T) and
        entropies (N, T) of the thoughts, 0 behind a row's end_thought, and logits (N, d_normal_vocab) of the answer:
        read at the end_thought that closes the thoughts, or with close=False where it would be written, at the last
        thought or, without thoughts, at the question's last token. positions: (S,) of the question, see generate.
        """
        (N, S), T, choices = question.shape, thoughts.shape[1], self.thought_range(fixed)
        sequence = torch.cat([question, thoughts, thoughts.new_full((N, close), self.config.end_thought)], dim=1)
        states = self.hidden(sequence, None, go_on(positions, S, T + close, sequence.device))
        log_p = self.logits(states[:, S - 1:S - 1 + T], choices).float().log_softmax(-1)
        length = self.n_thoughts(thoughts)                                                          # (N,)
        chosen = torch.arange(T, device=sequence.device) <= length[:, None]                         # (N, T)
        log_probs = log_p.gather(-1, (thoughts - choices.start)[..., None])[..., 0]
        entropies = -(log_p.exp() * log_p).sum(-1)
        read = states[torch.arange(N, device=sequence.device), S - 1 + length + close]              # (N, d_model)
        logits = self.logits(read, range(self.config.d_normal_vocab))
        return torch.where(chosen, log_probs, 0.), torch.where(chosen, entropies, 0.), logits

    def allowed(self, n_thoughts, closed, think_len, fixed=True, close=False):
        """
        What may come next in text with thoughts inside, (..., d_vocab_total) of bool: n_thoughts (...) stand behind the
        last normal token, at most think_len, and closed (...) says whether end_thought closes them. fixed: think_len
        thoughts before every normal token; or as many as the policy likes. close: end_thought must close thoughts.
        """
        full, begun = n_thoughts >= think_len, n_thoughts > 0
        if close:
            normal = closed | ~begun & (not fixed or not think_len)
            end = begun & ~closed & (full | (not fixed))
        else:
            normal, end = full | (not fixed), full & False
        token, config = torch.arange(self.config.d_vocab, device=full.device), self.config
        thought = torch.where(token < config.end_thought, (~full & ~closed)[..., None], end[..., None])
        return torch.where(token < config.d_normal_vocab, normal[..., None], thought)       # (..., d_vocab_total)

    @torch.no_grad()
    def write(self, prompt, n_new, think_len, *, fixed=True, close=False, n_rollouts=1, noise=None, text=None,
              thoughts=None, use_cache=True, **how):
        """
        Continue prompts (B, S) until n_new normal tokens are written, with thoughts between them, see allowed; rows
        that are done before others are filled up with end_thought.

        noise: (N, n_new (think_len + 1 + close)), as in generate, as are n_rollouts, use_cache and how. text: (N,
        n_new), normal tokens to write in place of sampled ones. thoughts: shaped as noise, the same for thoughts.
        Returns tokens (N, T) and mask (N, T) of what was written.
        """
        S, N, config = prompt.shape[1], len(prompt) * n_rollouts, self.config
        longest = n_new * (think_len + 1 + close * (think_len > 0))
        if S + longest - 1 > config.block_size:
            raise ValueError(f'{S} tokens and up to {longest} new ones are more than block_size={config.block_size}')
        if text is not None and not think_len:
            return text, torch.ones_like(text, dtype=torch.bool)
        if noise is None:
            noise = torch.rand(N, longest, device=prompt.device)
        n_thoughts, n_normal = torch.zeros(2, N, dtype=torch.long, device=prompt.device)
        closed = torch.zeros(N, dtype=torch.bool, device=prompt.device)
        mask = []

        def choose(t, state):
            nonlocal n_thoughts, n_normal, closed
            may = self.allowed(n_thoughts, closed, think_len, fixed, close)
            bias = torch.zeros_like(may, dtype=torch.float).masked_fill(~may, -torch.inf)
            mask.append(n_normal < n_new)
            token = sample(self.logits(state, config.writes), noise[:, t], bias=bias, **how)[0]
            normal = token < config.d_normal_vocab
            if text is not None:
                token = torch.where(normal, text.gather(1, n_normal.clamp(max=n_new - 1)[:, None])[:, 0], token)
            if thoughts is not None:
                token = torch.where(normal | (token == config.end_thought), token, thoughts[:, t])
            token = torch.where(mask[-1], token, config.end_thought)
            normal = normal & mask[-1]
            closed = token == config.end_thought
            n_thoughts = torch.where(normal, 0, n_thoughts + ~closed)
            n_normal = n_normal + normal
            return token, None if fixed or not think_len else n_normal < n_new

        return self.unroll(prompt, longest, choose, None, n_rollouts, use_cache), torch.stack(mask, dim=1)

    def written_log_probs(self, prompt, tokens, think_len, fixed=True, close=False):
        """
        Log-probabilities and entropies (N, T), with gradient, of tokens (N, T) that write continued prompts (N, S) by:
        among what was allowed at each place, at temperature 1.
        """
        place = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
        ends = tokens == self.config.end_thought
        last = (place * (tokens < self.config.d_normal_vocab)).cummax(1).values             # normal token before, or 0
        ended = (place * ends).cummax(1).values > last
        n_thoughts = F.pad((place - last - ended.long())[:, :-1], (1, 0))
        may = self.allowed(n_thoughts, F.pad(ends[:, :-1], (1, 0)), think_len, fixed, close)
        states = self.hidden(torch.cat([prompt, tokens[:, :-1]], dim=1))[:, prompt.shape[1] - 1:]
        logits = self.logits(states, self.config.writes).float().masked_fill(~may, -torch.inf)
        log_p = logits.log_softmax(-1)
        entropy = -(log_p.exp() * log_p.masked_fill(~may, 0.)).sum(-1)
        return log_p.gather(-1, tokens[..., None])[..., 0], entropy

    def think_everywhere(self, tokens, noise, *, thought='token', readers='own', fixed=True, at_once=1, given=None,
                         **how):
        """
        Thoughts at every position of text at once: one pass over S positions for each of T thoughts, or for those that
        are written at once. The thoughts of a position follow on its token, as if the text behind it were not there; it
        sees the text up to itself and its own thoughts (a diagonal of the mask for each, as in Quiet-STaR, Zelikman et
        al. 2024).

        tokens: (B, S), S + T at most block_size. noise: (N, S, T), see utils.sample; N / B rollouts of each row.
        thought: 'token' | 'straight_through', tokens whose gradient is that of their probabilities | 'continuous', the
        last state itself is read again (Hao et al. 2024), marked as a thought, and there are no tokens.
        readers: 'own' | 'later': whether positions see the thoughts of those before them, up to the same one, too.
        fixed: always T thoughts; or end_thought ends those of a position, see think.
        at_once: thoughts that are written from one state and read in one pass, the sum of their embeddings; each has an
        equal part of the thought tokens to choose from (as the categoricals of Hafner et al. 2021). They divide T.
        given: (N, S, T) thoughts to read in place of sampled ones. how: see utils.sample.
        Returns, all with gradient: thoughts (N, S, T), their log-probabilities and entropies (N, S, T), which are 0
        behind end_thought, states (B, S, d_model) without thoughts, and states (N, S, d_model) at the last thought, to
        predict the next token by. With config.gate the latter are what the former are, and a learned share of what is
        seen at the last thought.
        """
        (B, S), (N, _, T), choices = tokens.shape, noise.shape, self.thought_range(fixed)
        if S + T > self.config.block_size:
            raise ValueError(f'{S} tokens and {T} thoughts are more than block_size={self.config.block_size}')
        if T % at_once or len(choices) % at_once:
            raise ValueError(f'at_once={at_once} does not divide {T} thoughts and {len(choices)} tokens for them')
        size = len(choices) // at_once
        first = choices.start + size * torch.arange(at_once, device=tokens.device)      # of each part of the tokens
        seen = torch.ones(S, S, dtype=torch.bool, device=tokens.device).tril()          # of the text
        new = seen if readers == 'later' else seen & seen.T                             # of each thought
        cache = GrowingCache()
        plain = self.hidden(tokens, cache)                                              # (B, S, d_model)
        cache.repeat(N // B)
        state = last = plain.repeat_interleave(N // B, dim=0)                           # (N, S, d_model)
        alive = torch.ones(N, S, 1, dtype=torch.bool, device=tokens.device)
        written = []
        for step in range(T // at_once):
            part = slice(step * at_once, (step + 1) * at_once)
            logits = self.logits(state, choices).float().unflatten(-1, (at_once, size))
            log_p = logits.log_softmax(-1)                                              # (N, S, at_once, size)
            if given is None:
                with torch.no_grad():
                    index = sample(logits.flatten(0, 2), noise[..., part].flatten(), **how)[0].view(N, S, at_once)
            else:
                index = (given[..., part] - choices.start) % size
            token = torch.where(alive, first + index, self.config.end_thought)
            log_prob = log_p.gather(-1, index[..., None])[..., 0]                       # (N, S, at_once)
            entropy = -(log_p.exp() * log_p).sum(-1)
            written.append((token, torch.where(alive, log_prob, 0.), torch.where(alive, entropy, 0.)))
            if thought == 'continuous':
                x = state + self.embed(first[:1])       # of the first thought token, so that it is not taken for text
            else:
                x = self.embed(token).sum(2) * at_once ** -.5
            if thought == 'straight_through':
                rows = self.wte.weight[choices.start - self.config.reads.start:choices.stop]
                soft = log_p.exp().flatten(2) @ rows * at_once ** -.5
                x = x.detach() + soft - soft.detach()
            seen = torch.cat([seen, new], dim=1)                                        # (S, (step + 2) S)
            position = torch.arange(S, device=tokens.device) + step + 1
            state = self.layers(x, cache, position, seen)
            alive = alive & (token != self.config.end_thought).all(-1, keepdim=True)
            last = torch.where(alive, state, last)
        if self.config.gate is not None and T:
            last = plain.repeat_interleave(N // B, dim=0) + self.gate * last
        thoughts, log_probs, entropies = (torch.cat(x, dim=-1) for x in zip(*written)) if T else 3 * [noise]
        return thoughts, log_probs, entropies, plain, last

    @staticmethod
    def from_normal(model, d_thought_vocab, spread=1., **more):
        """
        Grow a normal GPT2 by d_thought_vocab thoughts and end_thought. Old rows of embedding and unembedding are
        copied, so logits of normal tokens stay what they were; new rows are drawn around the mean of the old ones, with
        their standard deviation times spread, which decides how certain thoughts are at first. more: fields of
        ThinkingModelConfig, such as gate, or a larger block_size, for which there are more embeddings of positions.
        """
        shape = {name: value for name, value in asdict(model.config).items() if name != 'd_vocab'}
        shape |= {'d_normal_vocab': model.config.d_vocab, 'd_thought_vocab': d_thought_vocab, **more}
        config = ThinkingModelConfig(**shape)
        grown = GPT2Thinking(config).to(model.wte.weight.device)
        state = grown.state_dict() | model.state_dict()
        for name in ('wte.weight', 'lm_head.weight', 'wpe.weight'):
            if name in state:
                old = state[name]
                n_new, wide = d_thought_vocab + 1, spread
                if name == 'wpe.weight':
                    n_new, wide = config.block_size - model.config.block_size, 1.
                noise = wide * torch.randn(n_new, config.d_model, device=old.device)
                state[name] = torch.cat([old, old.mean(0) + old.std(0) * noise])
        if config.tie_weights:
            state['lm_head.weight'] = state['wte.weight']
        grown.load_state_dict(state)
        return grown


# ---- models in checkpoints ------------------------------------------------------------------------------------------

MODELS = {'ModelConfig': (ModelConfig, GPT2), 'ThinkingModelConfig': (ThinkingModelConfig, GPT2Thinking)}


def pack(model):
    """A model as numbers, text and tensors, to be stored in a checkpoint."""
    return {'kind': type(model.config).__name__, 'config': asdict(model.config), 'state': model.state_dict()}


def unpack(packed):
    """The model that pack took apart. Raises ValueError when something in it does not fit."""
    try:
        Config, Model = MODELS[packed['kind']]
        model = Model(Config(**packed['config']))
        model.load_state_dict(packed['state'])
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f'no model of this version in the checkpoint: {str(error).splitlines()[0]}') from error
    return model


def find_model(checkpoint, name='model'):
    """The model called name in a checkpoint. Raises ValueError when there is none."""
    if name not in checkpoint['models']:
        raise ValueError(f'the checkpoint has no model called {name}, but {", ".join(checkpoint["models"])}')
    return unpack(checkpoint['models'][name])


def make_model(config, checkpoint=None, name='model', spread=1.):
    """
    A new model of this shape, or with a checkpoint the model called name in it; a normal one is grown where the shape
    is that of a thinking one, by thoughts as from_normal makes them with spread. Raises ValueError when the checkpoint
    has no such model, or one of another shape.
    """
    if checkpoint is None:
        return MODELS[type(config).__name__][1](config)
    model = find_model(checkpoint, name)
    if isinstance(config, ThinkingModelConfig) and not isinstance(model, GPT2Thinking):
        model = GPT2Thinking.from_normal(model, config.d_thought_vocab, spread, gate=config.gate,
                                         block_size=max(config.block_size, model.config.block_size))
    model.config.dropout = config.dropout       # no part of a model's shape
    for field, value in asdict(config).items():
        if getattr(model.config, field, None) != value:
            theirs = getattr(model.config, field, None)
            raise ValueError(f'the model in the checkpoint has {field}={theirs}, not {value}')
    return model

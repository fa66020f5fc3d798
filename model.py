"""
The one model file: a pre-LN GPT-2, and the same with thought tokens.

  ModelConfig, GPT2                  tokens in, logits out; generation; weights from and to Hugging Face
  ThinkingModelConfig, GPT2Thinking  adds thought tokens, which have no text, and ways to roll them out

Tokens are numbered  0 .. d_normal_vocab-1                   normal tokens (text, integers)
                     d_normal_vocab .. d_vocab_total-2       thought tokens <think0>, <think1>, ...
                     d_vocab_total-1                         <end_thought>

Shapes: B rows, N = B * n_rollouts, S positions, T thoughts, H heads, D = d_model / n_head, V logits.
Parameters have the names of Hugging Face's GPT2LMHeadModel without the leading "transformer.".
"""
import copy
import math
from dataclasses import asdict, dataclass
from typing import NamedTuple

import utils  # must precede torch
from utils import attend_to_cache, attention, causal, digits, fused, has_kernel, need, sample, think_merged

import torch
import torch.nn as nn
import torch.nn.functional as F

REACH = 16  # 'relative' positions: longer distances count as this


# ---- configs ----

@dataclass
class ModelConfig:
    """Shape of a GPT2. Raises ValueError if it cannot be."""
    d_vocab: int = 50257        # tokens that can be read and written
    block_size: int = 1024      # longest sequence, tokens
    n_layer: int = 12
    n_head: int = 12
    d_model: int = 768
    tie_weights: bool = True    # one matrix embeds and unembeds
    init: str = 'gpt2'          # 'gpt2': std .02 | 'unit': activations of size one, for small models
    position_encoding: str = 'learned'  # 'learned': an embedding each | 'rotary' | 'relative': by distance
    dropout: float = 0.         # share of activations dropped in training
    input_kind = output_kind = 'all'  # class attributes, not fields

    def __post_init__(self):
        for name in ('d_vocab', 'block_size', 'n_layer', 'n_head', 'd_model'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name}={getattr(self, name)} must be at least 1')
        if self.d_model % self.n_head:
            raise ValueError(f'n_head={self.n_head} does not divide d_model={self.d_model}')
        if self.init not in ('gpt2', 'unit'):
            raise ValueError(f'unknown init={self.init}')
        if self.position_encoding not in ('learned', 'rotary', 'relative'):
            raise ValueError(f'unknown position_encoding={self.position_encoding}')
        if self.position_encoding == 'rotary' and self.d_model // self.n_head % 2:
            raise ValueError(f'rotary: d_model={self.d_model} / n_head={self.n_head} must be even')
        if self.tie_weights and (self.init == 'unit' or self.reads != self.writes):
            raise ValueError("tie_weights needs init='gpt2', and the same tokens to read and write")

    def tokens(self, kind):
        """Range of tokens of a kind; 'thought' has end_thought."""
        return range(self.d_vocab)

    @property
    def reads(self):
        """Range of tokens that have an embedding."""
        return self.tokens(self.input_kind)

    @property
    def writes(self):
        """Range of tokens that have a logit."""
        return self.tokens(self.output_kind)


@dataclass
class ThinkingModelConfig(ModelConfig):
    """Shape of a GPT2Thinking. Of two split policies, the thinking one writes only thoughts; the answering
    one writes only normal tokens and, if it is blind, reads only thoughts."""
    d_vocab: int = 0            # d_vocab_total, computed from the next two
    d_normal_vocab: int = 50257
    d_thought_vocab: int = 10   # L, without end_thought
    input_kind: str = 'all'     # 'all' | 'normal' | 'thought'
    output_kind: str = 'all'    # 'all' | 'normal' | 'thought'
    gate: float | None = None   # None: no gate; or its first value, see GPT2Thinking.think_everywhere

    def __post_init__(self):
        if self.d_normal_vocab < 1 or self.d_thought_vocab < 1:
            raise ValueError('d_normal_vocab, d_thought_vocab must be at least 1')
        if not {self.input_kind, self.output_kind} <= {'all', 'normal', 'thought'}:
            raise ValueError('input_kind and output_kind: all, normal or thought')
        self.d_vocab = self.d_vocab_total = self.d_normal_vocab + self.d_thought_vocab + 1
        super().__post_init__()

    @property
    def end_thought(self):
        """The token that ends a thought."""
        return self.d_vocab - 1

    def tokens(self, kind):
        return range(self.d_normal_vocab if kind == 'thought' else 0,
                     self.d_normal_vocab if kind == 'normal' else self.d_vocab)


# ---- the network ----

class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.c_attn = nn.Linear(config.d_model, 3 * config.d_model)
        self.c_proj = nn.Linear(config.d_model, config.d_model)
        if config.position_encoding == 'relative':  # bias per head, distance -REACH..REACH
            self.relative = nn.Embedding(2 * REACH + 1, config.n_head)  # holds bias / 8: learns faster
        # A bias of the keys raises all scores of a query alike: it changes nothing (except 'rotary'), and
        # its gradient is rounding error, which Adam blows up.
        keep = [1, 0, 1]  # gradients of queries, keys, values
        self.c_attn.bias.register_hook(
            lambda grad: torch.cat([part * kept for part, kept in zip(grad.chunk(3), keep)]))

    def forward(self, x, layer, cache, places, visible, first):
        """x: (B, S, d_model). places: rotary angles or relative distances. visible, first: see layers."""
        B, S, d_model = x.shape
        q, k, v = (y.view(B, S, self.config.n_head, -1).transpose(1, 2)  # (B, H, S, D)
                   for y in self.c_attn(x).split(d_model, dim=-1))
        dropout = self.config.dropout if self.training else 0.
        mask = visible  # (Sq, Sk)
        if self.config.position_encoding == 'rotary':
            q, k = turn(q, *places), turn(k, *places)
        elif self.config.position_encoding == 'relative':
            visible = causal(S, places.shape[1], x.device) if visible is None else visible
            mask = (8 * self.relative(places).permute(2, 0, 1)).to(q.dtype).masked_fill(~visible, -torch.inf)
        q = q[:, :, first:]
        mask = mask if mask is None else mask[..., first:, :]
        if cache is not None and cache.fast and S == 1 and mask is None and not dropout:
            y = attend_to_cache(layer, q, k, v, cache)
        else:
            if cache is not None:
                k, v = cache.append(layer, k, v)
            y = attention(q, k, v, mask, dropout)
        return self.c_proj(y.transpose(1, 2).reshape(B, -1, d_model))


def rotary_angles(positions, d_head):
    """Cosines and sines (S, D / 2) of the angles by which 'rotary' turns positions (S,) (Su et al. 2021)."""
    rates = 10000. ** -(torch.arange(0, d_head, 2, device=positions.device) / d_head)
    angles = positions[:, None] * rates
    return angles.cos(), angles.sin()


def turn(x, cos, sin):
    """Turn the pairs (i, i + D / 2) of queries or keys x (B, H, S, D) by the angles of their positions."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


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

    def forward(self, x, layer, cache, places, visible, first):
        seen = self.attn(self.ln_1(x), layer, cache, places, visible, first)
        x = x[:, first:] + F.dropout(seen, self.config.dropout, self.training)
        return x + F.dropout(self.mlp(self.ln_2(x)), self.config.dropout, self.training)


class GPT2(nn.Module):
    """GPT-2 (Radford et al. 2019): pre-LN transformer with learned positions; or with rotary ones (Su et al.
    2021), or with a learned bias for every distance up to REACH (Raffel et al. 2020)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(len(config.reads), config.d_model)
        if config.position_encoding == 'learned':
            self.wpe = nn.Embedding(config.block_size, config.d_model)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.d_model)
        self.lm_head = nn.Linear(config.d_model, len(config.writes), bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.wte.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """'gpt2': matrices std .02. 'unit': embeddings std 1, matrices 1/sqrt(fan_in). Both: those that
        end a residual branch divided by sqrt(2 n_layer)."""
        unit = self.config.init == 'unit'
        for name, p in self.named_parameters():
            if name.endswith('.bias'):
                nn.init.zeros_(p)
            elif p.dim() == 2:
                std = .02 if not unit else 1. if name in ('wte.weight', 'wpe.weight') else p.shape[1] ** -.5
                if name.endswith('c_proj.weight'):
                    std /= math.sqrt(2 * self.config.n_layer)
                nn.init.normal_(p, std=std)
                if name.endswith('relative.weight'):  # bias -10 * distance / 2^head: near counts more
                    distance = torch.arange(-REACH, REACH + 1).abs()
                    p.copy_(-10 / 8 * distance[:, None] * .5 ** torch.arange(self.config.n_head))

    def embed(self, tokens):
        """Embeddings (B, S, d_model) of tokens (B, S), or mixtures of them (B, S, n)."""
        if tokens.is_floating_point():
            return tokens @ self.wte.weight
        return self.wte(tokens - self.config.reads.start)

    def layers(self, x, cache=None, positions=None, visible=None, first=0):
        """States after the last layer for embeddings x, both (B, S, d_model). The cache grows.
        positions: (S,); None: those after the cache. visible: (S, Sk), True where a token may look; None:
        causal. first: only states[:, first:] are worked out and returned."""
        start = cache.length if cache else 0
        end = start + x.shape[1]
        if end > self.config.block_size and visible is None:  # visible: positions repeat
            raise ValueError(f'{end} tokens are more than block_size={self.config.block_size}')
        positions = torch.arange(start, end, device=x.device) if positions is None else positions
        places, keys = None, cache.place(positions) if cache else positions  # positions of keys (Sk,)
        if self.config.position_encoding == 'learned':
            x = x + self.wpe(positions)
        elif self.config.position_encoding == 'rotary':
            places = rotary_angles(positions, self.config.d_model // self.config.n_head)
        else:
            places = (keys - positions[:, None]).clamp(-REACH, REACH) + REACH  # (S, Sk)
        x = F.dropout(x, self.config.dropout, self.training)
        if torch.is_autocast_enabled(x.device.type):  # the residual stream in half the memory
            x = x.to(torch.get_autocast_dtype(x.device.type))
        x = self.blocks(x, cache, places, visible, first)
        if cache is not None:
            cache.grow(end - start)
        return x

    @fused
    def blocks(self, x, cache, places, visible, first):
        for layer, block in enumerate(self.h):
            x = block(x, layer, cache, places, visible, first if layer == len(self.h) - 1 else 0)
        return self.ln_f(x)

    def hidden(self, tokens, cache=None, positions=None, first=0):
        """States of the last layer at tokens (B, S); see embed and layers."""
        return self.layers(self.embed(tokens), cache, positions, first=first)

    def logits(self, states, among):
        """Logits (..., len(among)) of a range of tokens at states (..., d_model). Raises ValueError."""
        writes = self.config.writes
        if among.start < writes.start or among.stop > writes.stop:
            raise ValueError(f'tokens {among.start}..{among.stop - 1} are not among those this model writes')
        return F.linear(states, self.lm_head.weight[among.start - writes.start:among.stop - writes.start])

    def forward(self, tokens, cache=None, positions=None, first=0):
        """Logits (B, S, V) after tokens (B, S), column i for token config.writes[i]. See layers."""
        return self.lm_head(self.hidden(tokens, cache, positions, first))

    def loss(self, tokens, targets, positions=None):
        """Mean cross-entropy, in nats, of targets (B, S) after tokens (B, S). positions: as in layers."""
        return F.cross_entropy(self(tokens, None, positions).flatten(0, 1).float(), targets.flatten())

    def log_probs(self, prompt, tokens, among=None):
        """Log-probabilities and entropies (N, T), in nats, with gradient, of tokens (N, T) after prompts
        (N, S), each chosen among a range, at temperature 1."""
        among = among or self.config.writes
        states = self.hidden(torch.cat([prompt, tokens[:, :-1]], dim=1), first=prompt.shape[1] - 1)
        return choice(self.logits(states[:, :tokens.shape[1]], among), tokens - among.start)

    # ---- generation

    @torch.no_grad()
    def generate(self, prompt, n_new, *, among=None, stop=None, noise=None, positions=None, n_rollouts=1,
                 use_cache=True, **sampling):
        """Continue prompts (B, S), S >= 1, by n_new tokens, n_rollouts times, side by side. Returns
        tokens (N, n_new). among: range of tokens to choose from. stop: a token that ends a row, which then
        repeats it. noise: (N, n_new) in [0, 1). positions: (S,), new tokens count on. sampling: see
        utils.sample. use_cache=False: the slow reference."""
        N, among = len(prompt) * n_rollouts, among or self.config.writes
        if noise is None:
            noise = torch.rand(N, n_new, device=prompt.device)
        alive = torch.ones(N, dtype=torch.bool, device=prompt.device)

        def choose(t, state):
            nonlocal alive
            token = among.start + sample(self.logits(state, among), noise[:, t], **sampling)  # (N,)
            if stop is None:
                return token, None
            token = torch.where(alive, token, stop)
            alive = alive & (token != stop)
            return token, alive

        tokens = self.unroll(prompt, n_new, choose, positions, n_rollouts, use_cache)
        return F.pad(tokens, (0, n_new - tokens.shape[1]), value=stop or 0)

    def unroll(self, prompt, n_new, choose, positions, n_rollouts, use_cache):
        """Continue prompts (B, S) by up to n_new tokens, n_rollouts times: choose(t, states) gets the states
        (N, d_model) at the last tokens; returns the next ones (N,) and which rows go on (N,), None: all.
        Stops if no row does. Returns the new tokens (N, T)."""
        S, device, cache = prompt.shape[1], prompt.device, None
        positions = count_on(positions, S, n_new, device)  # (S + n_new,)
        if use_cache:
            autocast = torch.is_autocast_enabled(device.type)
            dtype = torch.get_autocast_dtype(device.type) if autocast else self.wte.weight.dtype
            cache = KVCache(self.config, len(prompt), S + n_new - 1, device, dtype)
        sequence, new = prompt.repeat_interleave(n_rollouts, dim=0), prompt
        for t in range(n_new):
            state = self.hidden(new, cache, positions[S + t - new.shape[1]:S + t], first=-1)[:, 0]
            if t == 0:
                state = state.repeat_interleave(n_rollouts, dim=0)  # (N, d_model)
                if use_cache and n_rollouts > 1:
                    cache.repeat(n_rollouts)
            token, alive = choose(t, state)
            sequence = torch.cat([sequence, token[:, None]], dim=1)
            new = token[:, None] if use_cache else sequence
            if alive is not None and not utils.recording and not alive.any():
                break
        return sequence[:, S:]


def choice(logits, chosen):
    """Log-probabilities and entropies (...), in nats, of choices (...) among logits (..., V)."""
    log_p = logits.float().log_softmax(-1)
    log_prob = log_p.gather(-1, chosen[..., None])[..., 0]
    return log_prob, -(log_p.exp() * log_p.clamp(min=torch.finfo().min)).sum(-1)  # p = 0: 0


def count_on(positions, n_prompt, n_new, device):
    """Positions (n_prompt + n_new,) of a prompt, from 0 if they are None, and of new tokens after it."""
    if positions is None:
        return torch.arange(n_prompt + n_new, device=device)
    return torch.cat([positions, positions[-1] + 1 + torch.arange(n_new, device=device)])


# ---- thoughts ----

class Thoughts(NamedTuple):
    """What GPT2Thinking.think returns; log_probs and entropies only with grad=True."""
    tokens: torch.Tensor  # (N, T); end_thought repeats to the end
    log_probs: torch.Tensor | None = None  # (N, T), 0 at repeats
    entropies: torch.Tensor | None = None  # (N, T), 0 at repeats


class GPT2Thinking(GPT2):
    """A GPT2 with thought tokens. What it reads and writes is in its ThinkingModelConfig."""

    def __init__(self, config):
        super().__init__(config)
        if config.gate is not None:  # weight of each component of states with thoughts
            self.gate = nn.Parameter(torch.full((config.d_model,), float(config.gate)))

    def thought_range(self, fixed):
        """Tokens that a thinking policy chooses from: thoughts, and end_thought if not fixed."""
        return range(self.config.d_normal_vocab, self.config.end_thought + (not fixed))

    def think(self, question, think_len, *, fixed=True, n_rollouts=1, noise=None, positions=None,
              temperature=1., epsilon=0., use_cache=True, grad=False):
        """Roll out thoughts after questions (B, S), n_rollouts times. fixed: think_len thoughts; else at most
        as many, ended by end_thought. grad: with log-probabilities and entropies; no positions.
        The rest as in generate. Returns Thoughts (N, T)."""
        if grad and positions is not None:
            raise ValueError('with grad, positions must be None')
        choices, stop = self.thought_range(fixed), None if fixed else self.config.end_thought
        if noise is None:
            noise = torch.rand(len(question) * n_rollouts, think_len, device=question.device)
        many = question.repeat_interleave(n_rollouts, dim=0)  # (N, S)
        repetitive = not question.is_cuda or len(choices) ** (think_len - 1) < n_rollouts
        if grad and repetitive and use_cache and not utils.recording:
            return Thoughts(*think_merged(self, KVCache(), many, choices, noise, stop, temperature, epsilon))
        tokens = self.generate(question, think_len, among=choices, stop=stop, noise=noise,
                               positions=positions, n_rollouts=n_rollouts, use_cache=use_cache,
                               temperature=temperature, epsilon=epsilon)
        return Thoughts(tokens, *self.thought_log_probs(many, tokens, fixed)) if grad else Thoughts(tokens)

    def n_thoughts(self, thoughts):
        """Number (...) of thoughts (..., T) before the first end_thought."""
        return (thoughts != self.config.end_thought).cumprod(-1).sum(-1)

    def until_end(self, thoughts, *values):
        """Values (N, T) of thoughts (N, T), with zeros after each row's end_thought."""
        chosen = torch.arange(thoughts.shape[1], device=thoughts.device) <= self.n_thoughts(thoughts)[:, None]
        return [torch.where(chosen, x, 0.) for x in values]

    def thought_log_probs(self, question, thoughts, fixed=True):
        """Log-probabilities and entropies (N, T), with gradient, of thoughts; 0 after an end_thought."""
        return self.until_end(thoughts, *self.log_probs(question, thoughts, self.thought_range(fixed)))

    def answer(self, thoughts, question=None, fixed=False):
        """Logits (N, d_normal_vocab) of the answer, read at the first end_thought of thoughts (N, T); one is
        appended. fixed: there is no other. question: (N, S), read first; None: blind."""
        sequence, T = F.pad(thoughts, (0, 1), value=self.config.end_thought), thoughts.shape[1]
        if question is not None:
            sequence = torch.cat([question, sequence], dim=1)
        states = self.hidden(sequence, first=-1 if fixed else -T - 1)
        ends = 0 if fixed else self.n_thoughts(thoughts)
        states = states[torch.arange(len(states), device=states.device), ends]
        return self.logits(states, range(self.config.d_normal_vocab))

    def think_and_answer(self, question, thoughts, fixed=True, positions=None):
        """Read questions (B, S), each once, and the thoughts (N, T) after them. Returns log-probabilities and
        entropies of thoughts, 0 after an end_thought, and logits (N, d_normal_vocab) of the answer, read
        where another thought would be."""
        (B, S), (N, T), cache = question.shape, thoughts.shape, KVCache()
        positions = count_on(positions, S, T, question.device)
        states = self.hidden(question, cache, positions[:S], first=-1).repeat_interleave(N // B, dim=0)
        if T:
            cache.repeat(N // B)
            states = torch.cat([states, self.hidden(thoughts, cache, positions[S:])], dim=1)  # (N, 1 + T)
        choices, rows = self.thought_range(fixed), torch.arange(N, device=states.device)
        both = choice(self.logits(states[:, :T], choices), thoughts - choices.start)
        answer = self.logits(states[rows, self.n_thoughts(thoughts)], range(self.config.d_normal_vocab))
        return *self.until_end(thoughts, *both), answer

    # ---- thoughts as numbers

    def number(self, thoughts, fixed=True):
        """Thoughts (..., T) as numbers (...) in base L, or L + 1 if end_thought is one of the digits."""
        choices = self.thought_range(fixed)
        place_value = len(choices) ** torch.arange(thoughts.shape[-1] - 1, -1, -1, device=thoughts.device)
        return ((thoughts - choices.start) * place_value).sum(-1)

    def spell(self, numbers, think_len, fixed=True):
        """The thoughts (n, think_len) of numbers (n,); after an end_thought only repeats."""
        choices = self.thought_range(fixed)
        thoughts = choices.start + digits(numbers, think_len, len(choices))
        behind = torch.arange(think_len, device=numbers.device) > self.n_thoughts(thoughts)[:, None]
        return thoughts.masked_fill(behind, self.config.end_thought)

    # ---- thoughts inside a text

    def allowed(self, n_thoughts, think_len, fixed=True):
        """Which tokens may come next in a text, (..., d_vocab_total) of bool, if n_thoughts (...) follow
        the last normal token. fixed: think_len thoughts before every normal token; else at most as many."""
        full = (n_thoughts >= think_len)[..., None]
        token = torch.arange(self.config.d_vocab, device=full.device)
        return torch.where(token < self.config.d_normal_vocab, full | (not fixed),
                           ~full & (token < self.config.end_thought))

    @torch.no_grad()
    def write(self, prompt, n_new, think_len, *, fixed=True, n_rollouts=1, noise=None, text=None,
              thoughts=None, use_cache=True, **sampling):
        """Continue prompts (B, S) until n_new normal tokens are written, with thoughts between them, see
        allowed. Returns tokens (N, T), filled with end_thought. noise: (N, n_new * (think_len + 1)). text:
        (N, n_new), normal tokens to write; thoughts: shaped like noise, thoughts to write. The rest as in
        generate."""
        N, config, longest = len(prompt) * n_rollouts, self.config, n_new * (think_len + 1)
        if text is not None and not think_len:
            return text
        if noise is None:
            noise = torch.rand(N, longest, device=prompt.device)
        n_thoughts, n_normal = torch.zeros(2, N, dtype=torch.long, device=prompt.device)

        def choose(t, state):
            nonlocal n_thoughts, n_normal
            may = self.allowed(n_thoughts, think_len, fixed)
            bias = torch.zeros_like(may, dtype=torch.float).masked_fill(~may, -torch.inf)
            token = sample(self.logits(state, config.writes), noise[:, t], bias=bias, **sampling)
            normal, going = token < config.d_normal_vocab, n_normal < n_new
            if text is not None:
                given = text.gather(1, n_normal.clamp(max=n_new - 1)[:, None])[:, 0]
                token = torch.where(normal, given, token)
            if thoughts is not None:
                token = torch.where(normal, token, thoughts[:, t])
            n_thoughts = torch.where(normal, 0, n_thoughts + 1)
            n_normal = n_normal + (normal & going)
            alive = None if fixed or not think_len else n_normal < n_new
            return torch.where(going, token, config.end_thought), alive

        return self.unroll(prompt, longest, choose, None, n_rollouts, use_cache)

    # ---- thoughts at every position of a text at once

    def think_everywhere(self, tokens, noise, *, thought_kind='token', readers='own', fixed=True, at_once=1,
                         given=None, **sampling):
        """Think at every position of a text at once: one pass over S positions for each of T thoughts. A
        position sees the text up to itself and its own thoughts, as if the text ended there (Zelikman et al.
        2024).

        tokens: (B, S). noise: (N, S, T); N / B rollouts of each row. thought_kind: 'token';
        'straight_through': tokens with the gradient of their probabilities; 'continuous': the last state is
        read again (Hao et al. 2024). readers: who sees thoughts: their 'own' position, or all 'later' too;
        'loop': as 'later', but no pass sees another: if 'continuous', the layers are run again.
        at_once: how many thoughts are written from one state; they are read in one pass, as the sum of their
        embeddings, each from its own part of the thought tokens (Hafner et al. 2021). given: (N, S, T), plain
        tokens to read. fixed: as in think.

        Returns, with gradient: thoughts, log-probabilities and entropies (N, S, T), 0 after an end_thought;
        states (B, S, d_model) without thoughts; states (N, S, d_model) that predict the next token: those at
        the last thought; with config.gate those without thoughts + gate * these. Raises ValueError."""
        (B, S), (N, _, T), choices = tokens.shape, noise.shape, self.thought_range(fixed)
        if S + T > self.config.block_size:
            raise ValueError(f'{S} tokens and {T} thoughts are more than block_size={self.config.block_size}')
        if T % at_once or len(choices) % at_once:
            raise ValueError(f'at_once={at_once} does not divide {T} thoughts and {len(choices)} tokens')
        size = len(choices) // at_once
        starts = choices.start + size * torch.arange(at_once, device=tokens.device)  # of each part
        visible = causal(S, S, tokens.device)  # the text
        new = visible & visible.T if readers == 'own' else visible  # the diagonal
        cache = KVCache()
        plain = self.hidden(tokens, cache)  # (B, S, d_model)
        cache.repeat(N // B)
        state = last = plain.repeat_interleave(N // B, dim=0)  # (N, S, d_model)
        alive = torch.ones(N, S, 1, dtype=torch.bool, device=tokens.device)
        written = []
        for step in range(T // at_once):
            part = slice(step * at_once, (step + 1) * at_once)
            logits = self.logits(state, choices).float().unflatten(-1, (at_once, size))
            if given is None:
                index = sample(logits.detach().flatten(0, 2), noise[..., part].flatten(), **sampling)
            else:
                index = (given[..., part].flatten() - choices.start) % size
            index = index.view(N, S, at_once)
            token = torch.where(alive, starts + index, self.config.end_thought)  # (N, S, at_once)
            written.append((token, *(torch.where(alive, x, 0.) for x in choice(logits, index))))
            if thought_kind == 'continuous':
                x = state + self.embed(starts[:1])  # marked as a thought
            else:
                x = self.embed(token).sum(2) * at_once ** -.5
            if thought_kind == 'straight_through' and given is None:
                rows = self.wte.weight[choices.start:choices.stop]
                soft = logits.log_softmax(-1).exp().flatten(2) @ rows * at_once ** -.5
                x = x.detach() + soft - soft.detach()
            visible = torch.cat([visible & (readers != 'loop'), new], dim=1)  # (S, (step + 2) S)
            position = torch.arange(S, device=tokens.device) + step + 1
            state = self.layers(x, cache, position, visible)
            alive = alive & (token != self.config.end_thought).all(-1, keepdim=True)
            last = torch.where(alive, state, last)
        if self.config.gate is not None and T:
            last = plain.repeat_interleave(N // B, dim=0) + self.gate * last
        written = (torch.cat(x, dim=-1) for x in zip(*written)) if T else 3 * [noise]
        return *written, plain, last

    @staticmethod
    def from_normal(model, d_thought_vocab, spread=1., gate=None, block_size=0):
        """Grow a normal GPT2 by d_thought_vocab thoughts and end_thought; logits of normal tokens stay the
        same. New embeddings are drawn around the mean of the old ones, with spread times their deviation."""
        shape = {name: value for name, value in asdict(model.config).items() if name != 'd_vocab'}
        shape |= {'d_normal_vocab': model.config.d_vocab, 'd_thought_vocab': d_thought_vocab,
                  'gate': gate, 'block_size': max(block_size, model.config.block_size)}
        config = ThinkingModelConfig(**shape)
        grown = GPT2Thinking(config).to(model.wte.weight.device)
        state = grown.state_dict() | model.state_dict()
        tokens, places = d_thought_vocab + 1, config.block_size - model.config.block_size
        for name, n_new, wide in (('wte.weight', tokens, spread), ('lm_head.weight', tokens, spread),
                                  ('wpe.weight', places, 1.)):
            if name in state:
                old = state[name]
                noise = wide * torch.randn(n_new, config.d_model, device=old.device)
                state[name] = torch.cat([old, old.mean(0) + old.std(0, correction=len(old) > 1) * noise])
        if config.tie_weights:
            state['lm_head.weight'] = state['wte.weight']
        grown.load_state_dict(state)
        return grown


# ---- keys and values ----

class KVCache:
    """Keys and values (B, H, S, D) of each layer at the positions a model has read. It grows and passes
    gradients; given a config and sizes, it fills memory reserved once, without gradients."""

    def __init__(self, config=None, n_rows=0, n_positions=0, device=None, dtype=None):
        self.kv, self.length, self.positions = {}, 0, None
        self.reserved = config is not None
        self.fast = False  # whether our kernel can read it
        if self.reserved:
            shape = n_rows, config.n_head, n_positions, config.d_model // config.n_head
            self.kv = {layer: [torch.empty(shape, device=device, dtype=dtype) for _ in 'kv']
                       for layer in range(config.n_layer)}
            self.fast = has_kernel(device, shape[-1])
            self.on_device = torch.zeros((), dtype=torch.int32, device=device)  # length

    def append(self, layer, k, v):
        """Store k, v (B, H, S, D) of new tokens. Returns all so far."""
        if self.reserved:
            end = self.length + k.shape[2]
            for kept, new in zip(self.kv[layer], (k, v)):
                kept[:, :, self.length:end] = new
            return [kept[:, :, :end] for kept in self.kv[layer]]
        if layer in self.kv:
            k, v = (torch.cat([kept, new], dim=2) for kept, new in zip(self.kv[layer], (k, v)))
        self.kv[layer] = [k, v]
        return self.kv[layer]

    def place(self, positions):
        """Note positions (S,) of tokens that layers will append. Returns those of all tokens."""
        self.positions = positions if self.positions is None else torch.cat([self.positions, positions])
        return self.positions

    def grow(self, n):
        """Count n tokens that all layers appended."""
        self.length += n
        if self.fast:
            self.on_device += n

    def repeat(self, n):
        """Repeat every row n times, side by side."""
        self.kv = {layer: [kept.repeat_interleave(n, dim=0) for kept in kv] for layer, kv in self.kv.items()}

    def select(self, rows):
        """Keep these rows (n,), in this order, perhaps repeated."""
        self.kv = {layer: [kept[rows] for kept in kv] for layer, kv in self.kv.items()}


# ---- Hugging Face weights ----

HF_TRANSPOSED = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')  # (in, out) in transformers
HF_FIXED = {'model_type': 'gpt2', 'activation_function': 'gelu_new', 'layer_norm_epsilon': 1e-5,
            'scale_attn_weights': True, 'scale_attn_by_inverse_layer_idx': False}


def from_pretrained(source):
    """A GPT2 with the weights of a Hugging Face GPT-2: a folder or hub name. Raises ValueError."""
    transformers = need('transformers', 'to load pretrained weights')
    transformers.utils.logging.set_verbosity_error()
    try:
        c = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        odd = [name for name, usual in HF_FIXED.items() if getattr(c, name, None) != usual]
        if odd or c.n_inner not in (None, 4 * c.n_embd):
            raise ValueError(f'not a plain GPT-2, {", ".join(odd) or "n_inner"} differs')
        theirs = transformers.GPT2LMHeadModel.from_pretrained(source, use_safetensors=True, dtype='float32')
        model = GPT2(ModelConfig(c.vocab_size, c.n_positions, c.n_layer, c.n_head, c.n_embd,
                                 c.tie_word_embeddings))
        state = {name.removeprefix('transformer.'): p for name, p in theirs.state_dict().items()}
        model.load_state_dict({k: p.t() if k.endswith(HF_TRANSPOSED) else p for k, p in state.items()})
    except Exception as error:
        raise ValueError(f'no GPT-2 weights at {source} (transformers>=4.56): {error}') from error
    return model


def save_pretrained(model, folder):
    """Write a folder for transformers' GPT2LMHeadModel, without a tokenizer. Raises ValueError."""
    transformers, c = need('transformers', 'to export weights'), model.config
    if c.reads != c.writes or c.position_encoding != 'learned':
        raise ValueError('only models with learned positions that write what they read can be exported')
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=c.d_vocab, n_positions=c.block_size, n_layer=c.n_layer, n_head=c.n_head, n_embd=c.d_model,
        tie_word_embeddings=c.tie_weights, bos_token_id=None, eos_token_id=None))
    state = {('' if name.startswith('lm_head') else 'transformer.') + name: p
             for name, p in model.state_dict().items()}
    theirs.load_state_dict({k: p.t() if k.endswith(HF_TRANSPOSED) else p for k, p in state.items()})
    theirs.save_pretrained(folder)


# ---- checkpoints ----

MODELS = {'ModelConfig': (ModelConfig, GPT2), 'ThinkingModelConfig': (ThinkingModelConfig, GPT2Thinking)}


def unpack(packed):
    """The model that utils.pack took apart. Raises ValueError."""
    try:
        Config, Model = MODELS[packed['kind']]
        config, state = Config(**packed['config']), packed['state']
        if config.n_layer > len(state) or not all(p.isfinite().all() for p in state.values()):
            raise ValueError('weights are missing, or not finite')
        with torch.device('meta'):  # takes no memory
            Model(config).load_state_dict(dict(state), assign=True)  # checks shapes
        model = Model(config)
        model.load_state_dict(state)
    except Exception as error:
        raise ValueError(f'no model of this version in the checkpoint: {error}') from error
    return model


def find_model(checkpoint, name='model'):
    """The model called name in a checkpoint. Raises ValueError."""
    if name not in checkpoint['models']:
        raise ValueError(f'the checkpoint has no model called {name}, but {list(checkpoint["models"])}')
    return unpack(checkpoint['models'][name])


def make_model(config, checkpoint=None, name='model', spread=1.):
    """A model of this shape, or the checkpoint's of this name, grown if need be. Raises ValueError."""
    if checkpoint is None:
        return MODELS[type(config).__name__][1](config)
    model = find_model(checkpoint, name)
    if isinstance(config, ThinkingModelConfig) and not isinstance(model, GPT2Thinking):
        model = GPT2Thinking.from_normal(
            model, config.d_thought_vocab, spread, config.gate, config.block_size)
    model.config.dropout = config.dropout  # no part of a model's shape
    for field, value in asdict(config).items():
        if (theirs := getattr(model.config, field, None)) != value:
            raise ValueError(f'the model in the checkpoint has {field}={theirs}, not {value}')
    return model


def lagged_copy(model, checkpoint=None):
    """A copy that does not learn; or the model called lagged, if a checkpoint has it."""
    lagged = copy.deepcopy(model).requires_grad_(False)
    if checkpoint and 'lagged' in checkpoint['models']:
        lagged.load_state_dict(make_model(model.config, checkpoint, 'lagged').state_dict())
    return lagged

"""
Text: whole rollouts. The model goes on from a real text, with thoughts where it likes, and another model judges.

    a real text   ->   normal tokens and thoughts, mixed   ->   thoughts stripped   ->   log p by a reference model

Every normal token is paid what a frozen reference model thinks of it, the thoughts stripped. Its reward flows back to
the tokens and thoughts before it, gamma times less for each normal token between. G rollouts go on from the same text,
and are compared with each other at the same normal token. The same without thoughts is the control.

    python supervised_rollout_think.py --think_len=0                                    # a model to start from
    python rollout_think.py --init_from=out/supervised_rollout_think/think_len=0/ckpt.pt --reference=<a better one>.pt
    python rollout_think.py --init_from=... --reference=... --think_len=0               # the control
    python rollout_think.py --data=data/novels --init_from=gpt2 --reference=gpt2-xl     # in GPT-2's tokens
    torchrun --standalone --nproc_per_node=2 rollout_think.py --init_from=... --reference=...
    python prepare_data.py --dataset=problems                                           # for --reward=math, see below
    python rollout_think.py --reward=math --data=data/problems --levels=1,2 --text_len=48 --batch_size=32 \\
        --learning_rate=1e-5 --max_steps=40 --dtype=bfloat16 --init_from=HuggingFaceTB/SmolLM2-135M-Instruct

Each step: B prefixes from the text, G continuations of each, and the policy gradient (Williams 1992) with the mean of
the group as baseline (Dr. GRPO, Liu et al. 2025). There is no clipping of ratios, as each rollout is used once. A
reference likes to be told what it expects, again and again. So -log p of what is written is paid as well: with
entropy_weight=1 reward and entropy make the KL divergence from the reference, and nothing is better than to write as it
would; with less, than to write its likelier texts. KL to the starting model and a price for repetition are other ways.
What is real can be mixed in (supervised_weight), with own thoughts before it.

With reward=math a pretrained model of transformers, with a chat template or without, writes solutions of problems, and
is paid 1 for the right answer and format_weight for the form that is shown to it, one \\boxed{} in which the answer is.
It thinks in its own words before the answer; it is not grown by thought tokens. Problems are generated ones or JSON
lines like those of MATH and GSM8K. Each step: B problems, G solutions of each by transformers' generate, one update by
them, so there is no ratio to be clipped. The loss is -weight * sum of log p over the tokens of a solution / text_len:
the sum, as a mean over its own tokens would make tokens of short right solutions count more, and those of long wrong
ones less (Dr. GRPO). There is no KL to the start and no bonus for entropy.
"""
import copy
import html
import json
import math
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from model import GPT2, GPT2Thinking, ModelConfig, find_model, pack
from utils import (Run, World, advantages, concentration, fail, load_checkpoint, load_text, make_optimizer, need, paint,
                   read_knobs, recorded, sample, schedule, show_tokens, user_errors, write_atomic)

# ---- knobs ----------------------------------------------------------------------------------------------------------

reward = 'text'                 # 'text' | 'math': who pays, a reference model or the right answer of a problem
data = 'data/shakespeare_char'  # folder that prepare_data.py made; math: or with train and val or test.jsonl, or a file
levels = ''                     # math: difficulties of problems that are taken, with commas between; empty: all
format_weight = .1              # math: what the right form is paid; the right answer is paid 1
at_once = 32                    # math: solutions that are read at once for the gradient; memory grows with it
reference = ''                  # who judges: path of a checkpoint, a .gguf file, or a transformers folder or hub name
prefix_len = 32                 # tokens of real text to go on from
text_len = 32                   # normal tokens that are written; math: at most
batch_size = 8                  # prefixes or problems per step, over all processes
group_size = 8                  # G: rollouts of each
max_steps = 500                 # updates
max_seconds = 1e6               # stop after this wall-clock time
learning_rate = 3e-4            # falls to a tenth of it, as a cosine
weight_decay = 0.
clip = 1.                       # largest norm of the gradient; 0: any
warmup_steps = 10               # steps over which the learning rate rises
n_layer = 4                     # of a model from scratch
n_head = 4
d_model = 128
d_thought_vocab = 64            # L: thought tokens
think_len = 1                   # T: largest number of thoughts before a normal token; 0: none
fixed = False                   # always T thoughts before a normal token
close = False                   # end_thought must close thoughts before the next normal token
spread = 1.                     # size of the embeddings of thoughts at first, those of text are 1
advantage = 'dr_grpo'           # 'dr_grpo' | 'grpo' | 'rloo' | 'quantile' | 'softmax' | 'softmax_quantile' |
                                # 'softmax_centred' | 'best': see utils.py
tau = 1.                        # temperature of the three softmax
gamma = .9                      # tokens are paid for normal ones behind the next, too, each gamma times the one before
think_cost = 0.                 # what a thought costs, nats
repeat_cost = 0.                # what a normal token costs that completes four that are in its text already, nats
kl_weight = 0.                  # of log p(normal token) over what the starting model gives it, taken from its reward
entropy_weight = 1.             # of -log p(normal token), added to its reward; 1: the best is to write as the reference
supervised_weight = 0.          # of cross-entropy of the real continuation, with own thoughts
temperature = 1.                # of rollouts
top_k = 0                       # of rollouts: only the k most likely tokens; 0: all
top_p = 1.                      # of rollouts: only the most likely tokens that make up this probability
eval_every = 50                 # steps between evaluations, each with a checkpoint and samples
eval_prefixes = 128             # rollouts per evaluation, from prefixes, or problems, evenly from all of val
log_every = 1                   # steps between lines of metrics.jsonl
seed = 0                        # of weights, prefixes and rollouts
device = 'auto'                 # auto, cpu, cuda, cuda:1, mps
dtype = 'float32'               # 'float32' | 'bfloat16'
compile = False                 # write as one CUDA graph: faster, where rows do not end early
init_from = 'scratch'           # scratch, resume, path of a checkpoint (thinking or normal), name or folder of a GPT-2;
                                # math: resume, a checkpoint, a .gguf file, or a transformers folder or hub name
page = False                    # write samples.html: texts before and after training, with their thoughts
eval_only = False               # evaluate, train nothing, write nothing
out_dir = ''                    # folder of the run; empty: out/rollout_think/<changed knobs>
wandb_mode = 'disabled'         # 'disabled' | 'offline' | 'online'

# ---- set-up ---------------------------------------------------------------------------------------------------------

knobs = read_knobs(__file__, globals(), pretrained=True)
USELESS = {     # what nothing is made of where this pays
    'text': {'levels', 'format_weight', 'at_once'},
    'math': {'reference', 'prefix_len', 'n_layer', 'n_head', 'd_model', 'd_thought_vocab', 'think_len', 'fixed',
             'close', 'spread', 'gamma', 'think_cost', 'repeat_cost', 'kl_weight', 'entropy_weight',
             'supervised_weight', 'compile', 'page'}}
if useless := knobs.changed.keys() & USELESS[reward]:
    fail(f'--reward={reward} makes no use of --{min(useless)}')
if group_size < 2:
    fail(f'rollouts of a prefix are compared with each other: group_size={group_size} must be at least 2')
if reward == 'math' and init_from == 'scratch':
    fail('--init_from must name a pretrained model, or a checkpoint of one')
if reward == 'text' and not reference:
    fail('--reference must name a model that judges, such as the checkpoint of a larger one')
world = World(knobs)
G = group_size

# ---- data -----------------------------------------------------------------------------------------------------------

def boxed(text):
    """What is in the last \\boxed{...} of a text, None where there is none, or no end of it."""
    _, found, rest = text.rpartition('\\boxed{')
    depth = 1
    for i, character in enumerate(rest if found else ''):
        depth += {'{': 1, '}': -1}.get(character, 0)
        if depth == 0:
            return rest[:i]
    return None


def load_problem(line):
    """
    The problem in a line of JSON, {question, answer, level}, all text. GSM8K has its answer behind ####, MATH calls a
    question problem, has its answer in a \\boxed{} of its solution, and levels such as "Level 4". Raises ValueError.
    """
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError('it is no {...}')
    question, answer = row.get('question', row.get('problem')), row.get('answer')
    answer = boxed(str(row.get('solution'))) if answer is None else str(answer).rpartition('####')[2]
    if not isinstance(question, str) or not answer or not answer.strip():
        raise ValueError('it needs a question, or problem, and an answer, or a solution with \\boxed{}')
    return {'question': question, 'answer': answer.strip(), 'level': str(row.get('level', '')).removeprefix('Level ')}


def load_problems(path):
    """The problems of the wanted levels in a file of JSON lines, from low levels to high. Fails in one line."""
    problems, wanted = [], levels.replace(' ', '').split(',')
    try:
        lines = path.read_text(encoding='utf-8').split('\n')
    except (OSError, ValueError) as error:
        fail(f'no problems in {path}: {error}')
    for n, line in enumerate(lines, 1):
        if line.strip():
            try:
                problems.append(load_problem(line))
            except ValueError as error:
                fail(f'{path}, line {n} is no problem: {error}')
    found = sorted({problem['level'] for problem in problems})
    problems = [problem for problem in problems if not levels or problem['level'] in wanted]
    if len(problems) < 2:
        fail(f'{path} has no two problems of levels={levels}; its levels are {", ".join(found) or "none"}')
    return sorted(problems, key=lambda problem: problem['level'])


if reward == 'math':
    folder = Path(data)
    if folder.is_dir():
        train_set = load_problems(folder / 'train.jsonl')
        val_set = load_problems(folder / ('val.jsonl' if (folder / 'val.jsonl').exists() else 'test.jsonl'))
    else:       # every tenth is held out
        train_set = load_problems(folder)
        val_set = train_set[::10]
        del train_set[::10]
else:
    train_set, val_set, d_vocab, decode = load_text(data)
    if min(len(train_set), len(val_set)) < prefix_len + text_len + 1:
        fail(f'{data} has no {prefix_len + text_len} tokens in a row: a smaller --prefix_len or --text_len')


def cut(tokens, starts):
    """Prefixes (n, prefix_len) that start there, and how they really go on (n, text_len)."""
    rows = torch.from_numpy(tokens[starts.numpy()[:, None] + np.arange(prefix_len + text_len)].astype(np.int64))
    return rows.to(world.device).split([prefix_len, text_len], dim=1)


def draw(step):
    """Prefixes (B, prefix_len) of a step, this process's share, and how they go on (B, text_len). seed decides it."""
    starts = np.random.default_rng([seed, step]).integers(len(train_set) - prefix_len - text_len, size=batch_size)
    return cut(train_set, world.share(torch.from_numpy(starts)))


# ---- models ---------------------------------------------------------------------------------------------------------

def load_theirs(kind, source, **how):
    """What a class of transformers makes of a hub name, a folder or a .gguf file. Raises ValueError, in one line."""
    folder, _, file = source.rpartition('/') if source.endswith('.gguf') else (source, '', None)
    transformers = need('transformers', 'for models of other families')
    transformers.utils.logging.disable_progress_bar()
    try:
        how |= {'gguf_file': file} if file else {}
        return getattr(transformers, kind).from_pretrained(folder or '.', **how)
    except Exception as error:      # transformers, tokenizers and safetensors raise many kinds
        raise ValueError(f'no model of transformers at {source}: {str(error).strip().splitlines()[0]}') from error


def load_solver():
    """
    A pretrained model, what it was made from, and its tokenizer. Of a checkpoint are the weights, the rest is made from
    where the model in it was made from. Raises ValueError, in one line.
    """
    packed = knobs.checkpoint['models'].get('model', {}) if knobs.checkpoint else {'source': init_from}
    if 'source' not in packed:
        raise ValueError(f'{init_from} has no model for --reward=math')
    source = packed['source']
    tokenizer = load_theirs('AutoTokenizer', source)
    model = load_theirs('AutoModelForCausalLM', source, dtype=torch.float32)
    if 'state' in packed:
        model.load_state_dict(packed['state'])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    if tokenizer.pad_token is None or ends is None:
        raise ValueError(f'the tokenizer of {source} has no token that ends a text')
    # greedy, but for the noise that we add; nothing else of how its makers like to sample
    model.generation_config = need('transformers', '').GenerationConfig(
        max_new_tokens=text_len, do_sample=False, pad_token_id=tokenizer.pad_token_id, eos_token_id=ends)
    return model, source, tokenizer


def load_writer():
    """A model that writes text with thoughts inside. Raises ValueError, in one line."""
    if knobs.checkpoint:        # a model has the shape it has
        model = find_model(knobs.checkpoint)
    elif init_from != 'scratch':
        model = GPT2.from_pretrained(init_from)
    else:
        model = GPT2(ModelConfig(d_vocab=d_vocab, block_size=prefix_len + longest, n_layer=n_layer, n_head=n_head,
                                 d_model=d_model))
    if not isinstance(model, GPT2Thinking):
        model = GPT2Thinking.from_normal(model, d_thought_vocab, spread=spread,
                                         block_size=max(model.config.block_size, prefix_len + longest))
    if model.config.d_normal_vocab != d_vocab:
        raise ValueError(f'{init_from} is a model of {model.config.d_normal_vocab} tokens, {data} has {d_vocab}')
    if model.config.block_size < prefix_len + longest:
        raise ValueError(f'{init_from} reads {model.config.block_size} tokens, {prefix_len} and up to {longest} '
                         'written ones are more')
    return model


RULES = {'think_len': think_len, 'fixed': fixed, 'close': close}
SAMPLING = {'temperature': temperature, 'top_k': top_k, 'top_p': top_p}
longest = text_len      # of a rollout
if reward == 'text':
    longest *= think_len + 1 + (close and think_len > 0)
with user_errors():
    if reward == 'math':
        model, source, tokenizer = load_solver()
    else:
        model = load_writer()
model.to(world.device).eval()       # nothing is dropped
models, config = {'model': model}, model.config
if reward == 'text':
    models['start'] = copy.deepcopy(model).requires_grad_(False)
    thought_tokens = range(d_vocab, d_vocab + config.d_thought_vocab)
    if init_from == 'resume':
        with user_errors():
            models['start'] = find_model(knobs.checkpoint, 'start').to(world.device).requires_grad_(False).eval()
powers = torch.arange(text_len, device=world.device)
powers = torch.where(powers[:, None] >= powers, gamma ** (powers[:, None] - powers).clamp(min=0.), 0.)    # (n, n)


def text_log_probs(judge, prefix, text):
    """Log-probabilities (N, n) of normal tokens text (N, n) after prefix (N, S), by a model that sees no thoughts."""
    return judge.log_probs(prefix, text, range(d_vocab))


def load_reference(source):
    """
    A function from prefix (N, S) and text (N, n) to log-probabilities (N, n), by a model of the same tokens: our own
    checkpoint, or a GPT-2 with as many; or by a model of transformers with tokens of its own: the text is tokenised
    again, and the log-probability of each of its tokens is shared out among ours by the characters they have in common.
    Raises ValueError, in one line.
    """
    same = source.endswith('.pt')       # tokens as ours
    if same:
        judge = find_model(load_checkpoint(source))
    else:
        theirs = load_theirs('AutoConfig', source)
        same = theirs.model_type == 'gpt2' and theirs.vocab_size == d_vocab
        if same:
            judge = GPT2.from_pretrained(source)
        else:
            tokenizer = load_theirs('AutoTokenizer', source, use_fast=True)
            judge = load_theirs('AutoModelForCausalLM', source, dtype=torch.float32)
    judge.to(world.device).requires_grad_(False).eval()
    if same:
        if getattr(judge.config, 'd_normal_vocab', judge.config.d_vocab) != d_vocab:
            raise ValueError(f'reference={source} is no model of {d_vocab} tokens')
        if judge.config.block_size < prefix_len + text_len - 1:
            raise ValueError(f'reference={source} reads {judge.config.block_size} tokens, too few')
        return lambda prefix, text: text_log_probs(judge, prefix, text)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id

    def log_probs(prefix, text):
        pieces = [decode(row) for row in torch.cat([prefix, text], dim=1).tolist()]
        theirs = tokenizer([''.join(row) for row in pieces], add_special_tokens=False, return_offsets_mapping=True)
        longest = max(len(row) for row in theirs['input_ids'])
        ids = torch.tensor([[start] + row + [start] * (longest - len(row)) for row in theirs['input_ids']])
        ids = ids.to(world.device)                                                          # (N, 1 + longest)
        log_p = judge(ids[:, :-1]).logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0].cpu()
        shared = torch.stack([share_out(log_p[i, :len(spans)], spans, [len(piece) for piece in pieces[i]])
                              for i, spans in enumerate(theirs['offset_mapping'])])
        return shared[:, prefix.shape[1]:].to(world.device)
    return log_probs


def share_out(log_p, spans, lengths):
    """
    Numbers log_p (m,) of pieces of a text, spans (m,) of (start, end) in characters, for other pieces, of these lengths
    (n,) in characters: each gets the share of the characters that it has in common. Returns (n,), of the same sum.
    """
    by_character = log_p.new_zeros(sum(lengths))
    for value, (begin, end) in zip(log_p, spans):
        begin = min(begin, len(by_character) - 1)       # a piece without characters goes with the one behind it
        end = max(end, begin + 1)
        by_character[begin:end] += value / (end - begin)
    return torch.stack([part.sum() for part in by_character.split(lengths)])


if reward == 'text':
    with user_errors():
        judged = load_reference(reference)

# ---- optimiser and run ----------------------------------------------------------------------------------------------

optimizer = make_optimizer(model, learning_rate, weight_decay)
run = Run(knobs, world, [optimizer])


def save(step, file='ckpt.pt'):
    packed = {'model': {'source': source, 'state': model.state_dict()}} if reward == 'math' else {
        name: pack(each) for name, each in models.items()}
    run.save(step, packed, file)


# ---- rewards --------------------------------------------------------------------------------------------------------

def strip(tokens):
    """The normal tokens (N, n) among those of rollouts (N, T), and which of them (N, T) each token is, or leads to."""
    normal = tokens < d_vocab                                                               # (N, T)
    place = (normal.cumsum(1) - normal.long()).clamp(max=text_len - 1)
    return tokens[normal].view(len(tokens), text_len), place


def cut_end(tokens, mask):
    """Rollouts (N, T) without the columns where all have ended."""
    n = mask.any(0).sum()
    return tokens[:, :n], mask[:, :n]


def repeats(text, n=4):
    """For each token of texts (N, S), whether it completes n tokens that are in its text already: (N, S)."""
    found = torch.zeros_like(text, dtype=torch.bool)
    if text.shape[1] >= n:
        grams = text.unfold(1, n, 1)                                                        # (N, S - n + 1, n)
        same = (grams[:, :, None] == grams[:, None]).all(-1).tril(-1)
        found[:, n - 1:] = same.any(-1)
    return found


def write(prefix, noise):
    """Rollouts of prefixes (B, prefix_len) by noise (N, longest): tokens (N, T), mask (N, T), as model.write."""
    return model.write(prefix, text_len, n_rollouts=len(noise) // len(prefix), noise=noise, **RULES, **SAMPLING)


def write_real(prefix, real, noise):
    """Own thoughts, by noise (B, longest), inside the real continuations (B, n) of prefixes (B, prefix_len)."""
    return model.write(prefix, text_len, noise=noise, text=real, **RULES)


def losses(prefix, real, noise, noise_real):
    """The loss of prefixes (B, prefix_len) with rollouts by noise (N, longest), and what to log."""
    tokens, mask = cut_end(*write(prefix, noise))
    many = prefix.repeat_interleave(G, dim=0)
    text, place = strip(tokens)                                                             # (N, n), (N, T)
    log_pi, entropy = model.written_log_probs(many, tokens, **RULES)                        # (N, T)
    with torch.no_grad():
        log_p = judged(many, text)                                                          # (N, n)
        normal = tokens < d_vocab
        own = log_pi[normal].view(text.shape)
        kl = own - text_log_probs(models['start'], many, text)
        again = repeats(torch.cat([many, text], dim=1))[:, prefix_len:]
        n_thoughts = torch.zeros_like(log_p).scatter_add(
            1, place, ((tokens >= d_vocab) & (tokens < config.end_thought) & mask).float())
        rewards = log_p - entropy_weight * own - kl_weight * kl - repeat_cost * again - think_cost * n_thoughts
        returns = (rewards @ powers).view(len(prefix), G, text_len)                         # paid for what follows
        rows = returns.transpose(1, 2).flatten(0, 1)                                        # (B n, G)
        weights = advantages(rows, advantage, tau).view(len(prefix), text_len, G).transpose(1, 2).flatten(0, 1)
        weights = weights.gather(1, place) * mask                                           # (N, T)
    loss = -(weights * log_pi.masked_fill(~mask, 0.)).sum() / (len(prefix) * text_len)
    logged = {'reward': log_p.mean(), 'kl': kl.mean(), 'entropy': entropy[mask].detach().mean(),
              'repeats': again.float().mean(), 'thoughts': n_thoughts.mean(),
              'reward_std_in_group': rows.std(1, correction=0).mean()}
    if supervised_weight:
        tokens, mask = cut_end(*write_real(prefix, real, noise_real))
        log_pi, _ = model.written_log_probs(prefix, tokens, **RULES)
        supervised = -log_pi[(tokens < d_vocab) & mask].mean()
        loss, logged['supervised_loss'] = loss + supervised_weight * supervised, supervised.detach()
    return loss, logged


# ---- evaluation -----------------------------------------------------------------------------------------------------

def distinct(text, n=4):
    """Share of different ones among all runs of n tokens in texts (N, S)."""
    grams = text.unfold(1, min(n, text.shape[1]), 1).flatten(0, 1)
    return len(grams.unique(dim=0)) / len(grams)


def describe(prefix, text):
    """
    What texts (N, n) after prefixes are like: loss by the reference model, nats per token, and the same as perplexity;
    share of different ones among all runs of four tokens; share of tokens that complete eight tokens once more.
    """
    loss = -judged(prefix, text).mean().item()
    return {'val_loss': loss, 'perplexity': math.exp(loss), 'distinct_4': distinct(text),
            'repeated_8': repeats(text, 8).float().mean().item()}


@torch.no_grad()
def test():
    """What continuations of prefixes from val are like, by name: real ones, own, and with thoughts replaced."""
    starts = torch.linspace(0, len(val_set) - prefix_len - text_len, eval_prefixes).long()
    prefix, real = cut(val_set, starts)
    generator = torch.Generator(world.device).manual_seed(seed)
    noise = torch.rand(len(prefix), longest, generator=generator, device=world.device)
    tokens, mask = model.write(prefix, text_len, noise=noise, **RULES)
    pool = tokens[(tokens >= d_vocab) & (tokens < config.end_thought) & mask]
    found = {'real': describe(prefix, real),
             'own': {'thoughts': pool.numel() / prefix.shape[0] / text_len} | describe(prefix, strip(tokens)[0])}
    if len(pool):
        draw_from = torch.rand(noise.shape, generator=generator, device=world.device)
        swaps = {'shuffled': pool[(draw_from * len(pool)).long()],
                 'random': thought_tokens.start + (draw_from * len(thought_tokens)).long(),
                 'constant': pool.mode().values.expand(noise.shape)}
        for name, thoughts in swaps.items():
            found[name] = describe(prefix, strip(model.write(prefix, text_len, noise=noise, thoughts=thoughts,
                                                             **RULES)[0])[0])
    if think_len:
        found['none'] = describe(prefix, strip(model.write(prefix, text_len, 0, noise=noise[:, :text_len])[0])[0])
    return found, torch.cat([prefix, tokens], dim=1)


def evaluate(step):
    """Report on val, show a continuation, keep the best checkpoint. Returns what belongs on the last line."""
    found, tokens = test()
    run.report(step, **{f'val_loss_{name}': numbers['val_loss'] for name, numbers in found.items() if name != 'own'},
               **found['own'])
    for row in tokens[:3]:
        run.sample(show_tokens(row, config, decode, ''))
    if -found['own']['val_loss'] > run.best:
        run.best = -found['own']['val_loss']
        save(step, 'best.pt')
    return {**found['own'], 'real': found['real'],
            'ablation': {name: numbers['val_loss'] for name, numbers in found.items() if name != 'real'}}


@torch.no_grad()
def changes(by, prefix, tokens):
    """By how much each thought among tokens (N, T) raised log p(the next normal token), nats: (N, T), 0 elsewhere."""
    states = by.hidden(torch.cat([prefix, tokens], dim=1))[:, prefix.shape[1] - 1:]         # (N, T + 1, d_model)
    log_p = by.logits(states, range(d_vocab)).float().log_softmax(-1)
    text, place = strip(tokens)
    next_one = text.gather(1, place)[..., None]                                             # (N, T, 1)
    change = (log_p[:, 1:].gather(-1, next_one) - log_p[:, :-1].gather(-1, next_one))[..., 0]
    return change * (tokens >= d_vocab)


def write_page(n=10):
    """samples.html: how n prefixes of val are continued before training and after; it needs nothing else."""
    prefix, _ = cut(val_set, torch.linspace(0, len(val_set) - prefix_len - text_len, n).long())
    noise = torch.rand(n, longest, generator=torch.Generator(world.device).manual_seed(seed), device=world.device)
    parts = ['<!doctype html><meta charset="utf-8"><title>Thoughts in text</title><style>body{max-width:50em;'
             'margin:auto;font:16px serif;white-space:pre-wrap}i{color:#999}b{color:#088;cursor:help}</style>']
    for title, by in (('Before', models['start']), ('After', model)):
        parts.append(f'<h2>{title}</h2>')
        tokens, mask = by.write(prefix, text_len, noise=noise, **RULES)
        for start, row, written, change in zip(prefix, tokens, mask, changes(by, prefix, tokens)):
            texts = decode([*start.tolist(), *row[row < d_vocab].tolist()])
            parts.append('<p><i>' + html.escape(''.join(texts[:prefix_len])) + '</i>')
            rest = iter(texts[prefix_len:])
            for token, raised in zip(row[written].tolist(), change.tolist()):
                name = f'think{token - d_vocab}' if token < config.end_thought else 'end_thought'
                parts.append(html.escape(next(rest)) if token < d_vocab else
                             f'<b title="log p of the next token {raised:+.2f}">&lt;{name}&gt;</b>')
            parts.append('</p>')
    write_atomic(run.folder / 'samples.html', lambda path: path.write_text(''.join(parts)))


# ---- problems -------------------------------------------------------------------------------------------------------

PROMPT = 'Solve the problem step by step. Put the answer into \\boxed{}.'
EXAMPLES = [    # they show the form, which the smallest models do not find out from the words
    ('Tom has 9 pens. Tom loses 6 pens. How many pens does Tom have now?', '9 - 6 = 3\n\\boxed{3}'),
    ('Eva has 7 pens. Eva finds 5 more pens. Tom has 2 times as many pens as Eva has now. How many pens does Tom have?',
     '7 + 5 = 12\n2 * 12 = 24\n\\boxed{24}')]
NUMBER = re.compile(r'[+-]?(\d+/\d+|\d+\.?\d*|\.\d+)')


def draw_problems(step):
    """The problems of a step, this process's share, in place of prefixes. seed decides it."""
    chosen = np.random.default_rng([seed, step]).integers(len(train_set), size=batch_size)
    return [train_set[i] for i in world.share(torch.from_numpy(chosen)).tolist()], None


def ask(problems):
    """What the model is asked: tokens (B, S), padded in front, and which of them (B, S) are no padding."""
    texts = []
    for problem in problems:
        turns = [text for example in EXAMPLES for text in example] + [problem['question']]
        if tokenizer.chat_template:
            turns[0] = f'{PROMPT}\n\n{turns[0]}'      # not by a system's turn: some templates have none
            said = [{'role': ('user', 'assistant')[i % 2], 'content': text} for i, text in enumerate(turns)]
            texts.append(tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True))
        else:
            texts.append('\n\n'.join([PROMPT, *turns, '']))
    asked = tokenizer(texts, return_tensors='pt', padding=True, padding_side='left',
                      add_special_tokens=not tokenizer.chat_template)
    return asked['input_ids'].to(world.device), asked['attention_mask'].to(world.device).bool()


@torch.no_grad()
def solve(asked, given, noise=None):
    """
    Solutions of what is asked (N, S), of it given (N, S): tokens (N, T), which of them are written (N, T), the end
    included, and the texts. noise (N, text_len) decides them; none: the most likely tokens.
    """
    def draw_token(ids, logits):
        token, _ = sample(logits, noise[:, ids.shape[1] - asked.shape[1]], **SAMPLING)
        return torch.full_like(logits, -torch.inf).scatter(1, token[:, None], 0.)
    with torch.autocast(world.device.type, torch.bfloat16, enabled=dtype == 'bfloat16'):    # world's may be entered
        tokens = model.generate(input_ids=asked, attention_mask=given,
                                logits_processor=None if noise is None else [draw_token])[:, asked.shape[1]:]
    torch.clear_autocast_cache()        # weights that were cast here have no gradient
    ends = torch.isin(tokens, torch.tensor(model.generation_config.eos_token_id, device=world.device)).long()
    mask = ends.cumsum(1) - ends == 0
    texts = [tokenizer.decode(row[written], skip_special_tokens=True) for row, written in zip(tokens, mask)]
    return tokens, mask, texts


def solution_log_probs(asked, given, tokens, mask):
    """Log-probabilities (N, T) of tokens (N, T) where mask (N, T) says so, else 0, after what is asked, as in solve."""
    ids, seen = torch.cat([asked, tokens], dim=1), torch.cat([given, mask], dim=1)          # (N, S + T)
    logits = model(input_ids=ids, attention_mask=seen.long(), position_ids=(seen.cumsum(1) - 1).clamp(min=0),
                   logits_to_keep=tokens.shape[1] + 1).logits[:, :-1]                       # (N, T, V)
    return logits.float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0].masked_fill(~mask, 0.)


def value(answer):
    """An answer without what does not matter: a Fraction where it is a number, else text."""
    answer = re.sub(r'\\text\{([^{}]*)\}', r'\1', answer)
    answer = re.sub(r'(?<!\d)\\[dt]?frac\{([^{}]+)\}\{([^{}]+)\}', r'\1/\2', answer)
    answer = re.sub(r'\\left|\\right|\\[,!;:]|[\s$%\\]|(?<=\d),(?=\d{3}(\D|$))', '', answer).rstrip('.')
    try:
        return Fraction(answer) if NUMBER.fullmatch(answer) else answer
    except (ValueError, ZeroDivisionError):     # too many digits, n/0
        return answer


def mark(text, answer):
    """
    Whether a solution gives the answer, and whether it has the form: one \\boxed{...}. Without it, its last number is
    what it gives, so that one can be right without the other.
    """
    given = boxed(text)
    numbers = re.findall(r'(?:(?<![\d.])-)?\d+(?:,\d{3})*(?:\.\d+)?', text) if given is None else [given]
    return bool(numbers) and value(numbers[-1]) == value(answer), given is not None and text.count('\\boxed{') == 1


def losses_of_problems(problems, _, noise, __):
    """The loss of problems (B,) with solutions by noise (N, text_len), and what to log."""
    asked, given = (rows.repeat_interleave(G, dim=0) for rows in ask(problems))             # (N, S)
    tokens, mask, texts = solve(asked, given, noise)
    marks = torch.tensor([mark(text, problems[n // G]['answer']) for n, text in enumerate(texts)],
                         device=world.device).float()                                       # (N, 2)
    right, formed = marks.T
    weights = advantages((right + format_weight * formed).view(-1, G), advantage, tau)      # (B, G)
    # only some are in memory at once: they are read here, and once more when the gradient is due
    log_pi = torch.cat([checkpoint(solution_log_probs, *some, use_reentrant=False, preserve_rng_state=False)
                        for some in zip(*(x.split(at_once) for x in (asked, given, tokens, mask)))])    # (N, T)
    loss = -(weights.flatten() * log_pi.sum(1)).sum() / (len(problems) * text_len)
    share = right.view(-1, G).mean(1)
    return loss, {'accuracy': right.mean(), 'format': formed.mean(), 'length': mask.sum(1).float().mean(),
                  'mixed': ((share > 0) & (share < 1)).float().mean(),
                  'entropy': -(log_pi.detach().sum() / mask.sum()), **concentration(weights)}


def evaluate_problems(step):
    """Report on val, show solutions, keep the best checkpoint. Returns what belongs on the last line."""
    tried = [val_set[i] for i in torch.linspace(0, len(val_set) - 1, eval_prefixes).long().tolist()]
    texts = [text for i in range(0, len(tried), batch_size * G) for text in solve(*ask(tried[i:i + batch_size * G]))[2]]
    marks = [mark(text, problem['answer']) for text, problem in zip(texts, tried)]
    by_level = {}
    for problem, (right, _) in zip(tried, marks):
        by_level.setdefault(problem['level'], []).append(right)
    accuracy, form = np.mean(marks, axis=0).tolist()
    by_level = {level: np.mean(rights).item() for level, rights in by_level.items()}
    run.report(step, **{f'val_accuracy_at_{level}': share for level, share in by_level.items()}, val_format=form,
               val_accuracy=accuracy)
    for i in range(0, len(tried), max(1, len(tried) // 5)):
        run.sample(f'{paint(tried[i]["question"], "blue")}\n{texts[i]}', marks[i][0])
    if accuracy > run.best:
        run.best = accuracy
        save(step, 'best.pt')
    return {'accuracy': accuracy, 'accuracy_at_level': by_level, 'format': form}


if reward == 'math':
    draw, losses, evaluate = draw_problems, losses_of_problems, evaluate_problems
    size, room = lambda problem: len(problem['question']), getattr(config, 'max_position_embeddings', None)
    n_asked = ask(sorted(train_set + val_set, key=size)[-100:])[0].shape[1]
    if room and n_asked + text_len > room:
        fail(f'{init_from} reads {room} tokens, problems of {n_asked} and solutions of {text_len} are more')

# ---- training -------------------------------------------------------------------------------------------------------

if compile:
    write, write_real = recorded(write), recorded(write_real)
n_steps = run.first_step
for step in run.steps(run.first_step, run.first_step if eval_only else max_steps):
    if step % eval_every == 0:
        save(step)
        evaluate(step)
    schedule(optimizer, learning_rate, step, max_steps, warmup_steps, cosine=True)
    prefix, real = draw(step)
    noise = world.draw(torch.rand, batch_size, G, longest).flatten(0, 1)                    # (N, longest)
    noise_real = world.draw(torch.rand, batch_size, longest)
    with world.autocast:
        loss, logged = losses(prefix, real, noise, noise_real)
    loss.backward()
    world.mean_gradients(model.parameters())
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip or torch.inf)
    optimizer.step()
    optimizer.zero_grad()
    n_steps = step + 1
    if step % log_every == 0:
        run.log(step, **{name: float(number) for name, number in logged.items()}, gradient_norm=norm.item())

# ---- the last line --------------------------------------------------------------------------------------------------

save(n_steps)
found = evaluate(n_steps)
if page and run.writes:
    write_page()
run.finish(steps=n_steps, **found)

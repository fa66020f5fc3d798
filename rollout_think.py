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

Each step: B prefixes from the text, G continuations of each, and the policy gradient (Williams 1992) with the mean of
the group as baseline (Dr. GRPO, Liu et al. 2025). There is no clipping of ratios, as each rollout is used once. A
reference likes to be told what it expects, again and again. So -log p of what is written is paid as well: with
entropy_weight=1 reward and entropy make the KL divergence from the reference, and nothing is better than to write as it
would; with less, than to write its likelier texts. KL to the starting model and a price for repetition are other ways.
What is real can be mixed in (supervised_weight), with own thoughts before it.
"""
import copy
import html
import math

import numpy as np
import torch

from model import GPT2, GPT2Thinking, ModelConfig, find_model, pack
from utils import (Run, World, advantages, fail, load_checkpoint, load_text, make_optimizer, need, read_knobs, recorded,
                   schedule, show_tokens, user_errors, write_atomic)

# ---- knobs ----------------------------------------------------------------------------------------------------------

data = 'data/shakespeare_char'  # folder that prepare_data.py made
reference = ''                  # who judges: path of a checkpoint, a .gguf file, or a transformers folder or hub name
prefix_len = 32                 # tokens of real text to go on from
text_len = 32                   # normal tokens that are written
batch_size = 8                  # prefixes per step, over all processes
group_size = 8                  # G: rollouts of a prefix
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
advantage = 'dr_grpo'           # 'dr_grpo' | 'grpo' | 'rloo' | 'quantile' | 'softmax' | 'softmax_quantile' | 'best'
tau = 1.                        # temperature of softmax and softmax_quantile
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
eval_prefixes = 128             # rollouts per evaluation, from prefixes evenly from all of val
log_every = 1                   # steps between lines of metrics.jsonl
seed = 0                        # of weights, prefixes and rollouts
device = 'auto'                 # auto, cpu, cuda, cuda:1, mps
dtype = 'float32'               # 'float32' | 'bfloat16'
compile = False                 # write as one CUDA graph: faster, where rows do not end early
init_from = 'scratch'           # scratch, resume, path of a checkpoint (thinking or normal), name or folder of a GPT-2
page = False                    # write samples.html: texts before and after training, with their thoughts
eval_only = False               # evaluate, train nothing, write nothing
out_dir = ''                    # folder of the run; empty: out/rollout_think/<changed knobs>
wandb_mode = 'disabled'         # 'disabled' | 'offline' | 'online'

# ---- set-up ---------------------------------------------------------------------------------------------------------

knobs = read_knobs(__file__, globals(), pretrained=True)
if group_size < 2:
    fail(f'rollouts of a prefix are compared with each other: group_size={group_size} must be at least 2')
if not reference:
    fail('--reference must name a model that judges, such as the checkpoint of a larger one')
world = World(knobs)
G = group_size

# ---- data -----------------------------------------------------------------------------------------------------------

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

longest = text_len * (think_len + 1 + (close and think_len > 0))      # of a rollout
with user_errors():
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
config = model.config
if config.d_normal_vocab != d_vocab:
    fail(f'{init_from} is a model of {config.d_normal_vocab} tokens, {data} has {d_vocab}')
if config.block_size < prefix_len + longest:
    fail(f'{init_from} reads {config.block_size} tokens, {prefix_len} and up to {longest} written ones are more')
model.to(world.device).eval()       # nothing is dropped
models = {'model': model, 'start': copy.deepcopy(model).requires_grad_(False)}
if init_from == 'resume':
    with user_errors():
        models['start'] = find_model(knobs.checkpoint, 'start').to(world.device).requires_grad_(False).eval()
thought_tokens = range(d_vocab, d_vocab + config.d_thought_vocab)
RULES = {'think_len': think_len, 'fixed': fixed, 'close': close}
SAMPLING = {'temperature': temperature, 'top_k': top_k, 'top_p': top_p}
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
    folder, _, file = source.rpartition('/') if source.endswith('.gguf') else (source, '', None)
    more = {'gguf_file': file} if file else {}
    same = source.endswith('.pt')       # tokens as ours
    if same:
        judge = find_model(load_checkpoint(source))
    else:
        transformers = need('transformers', 'to load a reference model')
        try:
            theirs = transformers.AutoConfig.from_pretrained(folder or '.', **more)
            same = theirs.model_type == 'gpt2' and theirs.vocab_size == d_vocab
            if same:
                judge = GPT2.from_pretrained(source)
            else:
                tokenizer = transformers.AutoTokenizer.from_pretrained(folder or '.', use_fast=True, **more)
                judge = transformers.AutoModelForCausalLM.from_pretrained(folder or '.', dtype=torch.float32, **more)
        except (OSError, ValueError, ImportError) as error:
            raise ValueError(f'no reference model at {source}: {str(error).strip().splitlines()[0]}') from error
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


with user_errors():
    judged = load_reference(reference)

# ---- optimiser and run ----------------------------------------------------------------------------------------------

optimizer = make_optimizer(model, learning_rate, weight_decay)
run = Run(knobs, world, [optimizer])


def save(step, file='ckpt.pt'):
    run.save(step, {name: pack(each) for name, each in models.items()}, file)


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
    grams = text.unfold(1, n, 1).flatten(0, 1)
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
    """Report on val, show a continuation, keep the best checkpoint. Returns what test found."""
    found, tokens = test()
    run.report(step, **{f'val_loss_{name}': numbers['val_loss'] for name, numbers in found.items() if name != 'own'},
               **found['own'])
    for row in tokens[:3]:
        run.sample(show_tokens(row, config, decode, ''))
    if -found['own']['val_loss'] > run.best:
        run.best = -found['own']['val_loss']
        save(step, 'best.pt')
    return found


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
        run.log(step, **{name: value.item() for name, value in logged.items()}, gradient_norm=norm.item())

# ---- the last line --------------------------------------------------------------------------------------------------

save(n_steps)
found = evaluate(n_steps)
if page and run.writes:
    write_page()
run.finish(steps=n_steps, **found['own'], real=found['real'],
           ablation={name: numbers['val_loss'] for name, numbers in found.items() if name != 'real'})

"""
Text: thoughts before every next token. Without thoughts it is ordinary GPT training, the baseline.

    tokens 0..t of a text  ->  T thoughts  ->  token t + 1,   for every t of a sequence at once

One model reads text, thinks and predicts. Nobody tells it what a thought means.

    python prepare_data.py                                          # Shakespeare, by character
    python supervised_rollout_think.py                              # eight thoughts before every character
    python supervised_rollout_think.py --think_len=0                # the baseline: a GPT
    python supervised_rollout_think.py --thoughts=filler            # a control: the same thoughts everywhere
    python supervised_rollout_think.py --thought_kind=token         # thoughts that are learned by reward
    python supervised_rollout_think.py --thought_kind=continuous --gate=none --think_len=1 --at_once=1
    python supervised_rollout_think.py --gate=learned --init_from=<a checkpoint without thoughts>
    torchrun --standalone --nproc_per_node=2 supervised_rollout_think.py    # the same update

All positions think at the same time, as in Quiet-STaR (Zelikman et al. 2024); that mixes logits with and
without thoughts, here states are added. By default thoughts are learned by gradient: eight tokens are written
at once, and the gradient of each goes on to its probabilities (straight-through, Bengio et al. 2013).
With thought_kind=token they are learned by reward: G rollouts at each position are paid log p(next token).
The policy gradient (Williams 1992) compares them with the mean of their position (Dr. GRPO, Liu et al. 2025),
so that nobody is paid for easy tokens, or with a lagged copy that does not think (RLP, Hatamizadeh et al.
2025). There is no clipping, KL term or importance weight, as each rollout is used once.
"""
from model import GPT2, GPT2Thinking, ModelConfig, find_model, lagged_copy, make_model
from utils import (Run, World, ablations, advantages, fail, load_checkpoint, load_text, make_optimizer,
                   read_knobs, sample, schedule, show_tokens)

import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib.stride_tricks import sliding_window_view

# ---- knobs ----

data = 'data/shakespeare_char'    # folder that prepare_data.py made
text_len = 64                 # S: tokens of a sequence
batch_size = 16               # sequences per step, over all processes
micro_batch = 0               # sequences that are read at once for the gradient; 0: all of a process's share
max_steps = 2000              # updates
max_seconds = 1e6             # stop after this wall-clock time
learning_rate = 2e-3          # falls to a tenth of it, as a cosine
weight_decay = .1
beta2 = .99                   # of AdamW
clip = 1.                     # largest norm of the gradient; 0: any
warmup_steps = 100            # steps over which the learning rate rises
n_layer = 1
n_head = 4
d_model = 128
dropout = 0.                  # share of numbers dropped in training; differs with the number of processes
thoughts = 'own'              # 'own' | 'filler' | 'random': whose are read; filler: the first thought token
thought_kind = 'straight_through'    # 'token' | 'straight_through' | 'continuous': see model.think_everywhere
readers = 'later'             # 'own' | 'later' | 'loop': who reads thoughts, see model.think_everywhere
d_thought_vocab = 512         # L: thought tokens
think_len = 8                 # T: thoughts before each token; 0: none, ordinary training
at_once = 8                   # thoughts per pass, each from its own part of the thought tokens
fixed = True                  # always T thoughts; False: up to T, end_thought ends them
think_cost = .01              # what a thought costs if their number is not fixed, nats
group_size = 4                # G: rollouts of a position, if thoughts are tokens
gate = 'open'                 # 'open' | 'learned' | 'none' | 'closed': plain + g * thinking state, with g
                              # learned from 1; with g learned from 0; thinking state only; plain only
policy_weight = 1.            # of the policy gradient, if thoughts are tokens; 0: they are not trained
baseline = 'group'            # 'group' | 'no_think': mean of the rollouts, or a lagged copy without thoughts
entropy_weight = .01          # of a bonus for the entropy of thoughts that are paid; falls to zero
eval_every = 1000             # steps between evaluations, each with a checkpoint and a sample
eval_sequences = 800          # sequences per evaluation, evenly from all of val
log_every = 10                # steps between lines of metrics.jsonl
seed = 0                      # of weights, batches and thoughts
device = 'auto'               # auto, cpu, cuda, cuda:1, mps
dtype = 'float32'             # 'float32' | 'bfloat16'; on a GPU float32 products are TF32
compile = False               # compile the model, faster after a minute or two
init_from = 'scratch'         # scratch, resume, auto (resume what is there), or a checkpoint's path
reference = ''                # checkpoint of a model without thoughts, to compare the loss with
eval_only = False             # evaluate, train nothing, write nothing
out_dir = ''                  # folder of the run; empty: out/supervised_rollout_think/<changed knobs>
wandb_mode = 'disabled'       # 'disabled' | 'offline' | 'online'

# ---- set-up ----

knobs = read_knobs(__file__, globals())
legible = thoughts == 'own' and think_len > 0 and thought_kind != 'continuous'      # can be shown
paid = legible and thought_kind == 'token' and policy_weight > 0
if paid and baseline == 'group' and group_size < 2:
    fail(f'baseline=group compares the rollouts of a group: group_size={group_size} must be at least 2')
if not fixed and (thoughts != 'own' or thought_kind != 'token'):
    fail(f'thoughts={thoughts}, thought_kind={thought_kind} have no end to choose: --fixed=True')
if readers == 'loop' and thought_kind != 'continuous':
    fail(f'readers=loop runs the layers again, for --thought_kind=continuous, not {thought_kind}')
if at_once > 1 and (thought_kind == 'continuous' or not fixed):
    fail('continuous thoughts, and thoughts that may end, are written one at a time: --at_once=1')
if think_len % at_once or d_thought_vocab % at_once:
    fail(f'at_once={at_once} must divide think_len={think_len} and d_thought_vocab={d_thought_vocab}')
world = World(knobs)
if micro_batch and batch_size // world.size % micro_batch:
    fail(f'micro_batch={micro_batch} does not divide the {batch_size // world.size} sequences of a process')
G = group_size if thought_kind == 'token' and thoughts != 'filler' else 1
temperature = 1. if thought_kind == 'token' else 0.     # of thoughts; 0 takes the most likely ones

# ---- data ----

train_set, val_set, d_vocab, decode = load_text(data, knobs)
if min(len(train_set), len(val_set)) < text_len + 1:
    fail(f'{data} has no {text_len + 1} tokens in a row: a smaller --text_len')
train_set, val_set = (sliding_window_view(text, text_len + 1) for text in (train_set, val_set))   # (n, S + 1)


def cut(rows):
    """Sequences (n, S) and the tokens (n, S) that come next, from rows (n, S + 1) of text."""
    rows, gpu = torch.from_numpy(rows.astype(np.int64)), world.device.type == 'cuda'
    rows = (rows.pin_memory() if gpu else rows).to(world.device, non_blocking=gpu)      # waits for no step
    return rows[:, :-1], rows[:, 1:]


# ---- model, optimiser, run ----

SPREAD = 3.     # size of the embeddings of thoughts at first, those of text are 1: how certain thoughts are
model = GPT2(ModelConfig(d_vocab, text_len, n_layer, n_head, d_model, dropout=dropout))
if think_len:       # what it knows of text at first is the same with thoughts and without
    model = GPT2Thinking.from_normal(model, d_thought_vocab, SPREAD, block_size=text_len + think_len,
                                     gate={'learned': 0., 'open': 1.}.get(gate))
if knobs.checkpoint:
    model = make_model(model.config, knobs.checkpoint, spread=SPREAD)
models = {'model': model.to(world.device)}
if paid and baseline == 'no_think':
    models['lagged'] = lagged_copy(model, knobs.checkpoint).eval()
other = find_model(load_checkpoint(reference, text=knobs.text)).to(world.device).eval() if reference else None
if other and (other.config.d_vocab != d_vocab or other.config.block_size < text_len):
    fail(f'reference={reference} is no normal model of {d_vocab} tokens that reads {text_len} of them')
normal_tokens, thought_tokens = range(d_vocab), range(d_vocab, d_vocab + d_thought_vocab)
optimizer = make_optimizer(model, learning_rate, weight_decay, betas=(.9, beta2))
run = Run(knobs, world, [optimizer])

# ---- thinking and predicting ----

def think(x, noise, temperature=temperature, given=None):
    """Thoughts, log p, entropies, all as noise (N, S, T), states without, with; see think_everywhere."""
    if not think_len:
        states = model.hidden(x)
        return noise, noise, noise, states, states
    if thoughts != 'own' and given is None:
        given = thought_tokens.start + (noise * d_thought_vocab * (thoughts == 'random')).long()
    *written, plain, last = model.think_everywhere(
        x, noise, thought_kind=thought_kind, readers=readers, fixed=fixed, at_once=at_once,
        given=given, temperature=temperature)
    return *written, plain, plain.repeat_interleave(len(noise) // len(x), dim=0) if gate == 'closed' else last


def loss_at(states, y, by=model):
    """Cross-entropy (n, S) of next tokens y (n, S), predicted from states (n, S, d_model); nats."""
    logits = by.logits(states, normal_tokens).float()
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction='none').view(y.shape)


# ---- three ways to learn ----
# Each returns the loss for sequences x (B, S) with next tokens y (B, S), and what to log beside it or in its
# place. noise (B G, S, T) draws thoughts, bonus is what their entropy is worth.

def ordinary(x, y, noise, bonus):
    """There are no thoughts."""
    return model.loss(x, y), {}


def by_gradient(x, y, noise, bonus):
    """Thoughts learn what lowers the loss: its gradient passes through them, unless they are plain tokens."""
    return loss_at(think(x, noise)[-1], y.repeat_interleave(G, dim=0)).mean(), {}


def by_reward(x, y, noise, bonus):
    """Thoughts are paid log p(next token), less what they cost, and compared with the baseline."""
    thought, log_pi, entropy, plain, last = think(x, noise)                     # (B G, S, T)
    log_p_next = -loss_at(last, y.repeat_interleave(G, dim=0))                  # (B G, S)
    loss, n_thoughts = -log_p_next.mean(), model.n_thoughts(thought)
    rewards = log_p_next.detach() - (0. if fixed else think_cost * n_thoughts)
    rewards, log_pi = (numbers.view(-1, G, text_len).transpose(1, 2).flatten(0, 1)
                       for numbers in (rewards, log_pi.sum(-1)))                # (B S, G)
    seen = {'loss': loss, 'entropy': entropy.mean(), 'thoughts': n_thoughts.float().mean(),
            'reward_std_in_group': rewards.std(1, correction=0).mean()}
    if baseline == 'group':
        weights = advantages(rewards, 'dr_grpo')
    else:       # the model learns to predict without thoughts too, and the copy follows it
        seen['loss_without'] = loss_at(plain, y).mean()
        loss = loss + seen['loss_without']
        without = -loss_at(models['lagged'].hidden(x), y, models['lagged'])     # (B, S)
        weights = advantages(rewards, 'reinforce', baseline=without.view(-1, 1))
    return loss - policy_weight * (weights * log_pi).sum(1).mean() - bonus * entropy.sum(-1).mean(), seen


learn = by_reward if paid else by_gradient if think_len else ordinary

# ---- evaluation ----

@torch.no_grad()
def test():
    """{name: losses (n, S)} on val with own greedy thoughts, others (see utils.ablations), and none."""
    generator, parts = torch.Generator(world.device).manual_seed(seed), []
    index = torch.linspace(0, len(val_set) - 1, eval_sequences).long()
    for some in index.split(max(1, 4096 // text_len)):
        x, y = cut(val_set[some.numpy()])
        noise = torch.rand(*x.shape, think_len, generator=generator, device=world.device)
        with world.autocast:
            own, *_, plain, last = think(x, noise, temperature=0)
            found = {'own': loss_at(last, y)}
            if legible:
                others = ablations(own.flatten(0, 1), thought_tokens)
                for name in ('shuffled', 'random', 'constant'):
                    found[name] = loss_at(think(x, noise, given=others[name].view(own.shape))[-1], y)
            found |= {'none': loss_at(plain, y)} if think_len else {}
            found |= {'reference': loss_at(other.hidden(x), y, other)} if reference else {}
        parts.append(found)
    return {name: torch.cat([found[name] for found in parts]).cpu() for name in found}


@torch.no_grad()
def write():
    """The end of val, and how the model goes on from it, with its thoughts, in colours."""
    generator, written = torch.Generator(world.device).manual_seed(seed), []
    text = start = cut(val_set[-1:])[1]                                         # (1, S)
    for _ in range(min(text_len, 100)):
        noise = torch.rand(1, text_len, 1 + think_len, generator=generator, device=world.device)
        thought, *_, last = think(text[:, -text_len:], noise[..., 1:])
        token = sample(model.logits(last[:, -1], normal_tokens), noise[:, -1, 0])       # (1,)
        text = torch.cat([text, token[:, None]], dim=1)
        written += [*thought[0, -1][:model.n_thoughts(thought[0, -1])], *token] if legible else [*token]
    return ' | '.join(show_tokens(tokens, model.config, decode, '') for tokens in (start[0], written))


def evaluate(step):
    """Report on val, show a text, keep the best checkpoint. Returns the numbers; losses are in nats."""
    model.eval()
    found = test()
    mean = {name: loss.mean().item() for name, loss in found.items()}
    run.report(step, **{f'val_loss_{name}': x for name, x in mean.items() if name != 'own'},
               val_loss=mean['own'])
    run.sample(write())
    run.save_best(step, -mean['own'], models)
    mean.pop('reference', None)
    apart = {name: (found[name] - found['own']).mean(1) for name in found if name != 'own'}     # (n,)
    above_own = {name: [x.mean().item(), x.std(correction=0).item() / max(1, len(x) - 1) ** .5]
                 for name, x in apart.items()}      # by how much, and its standard error
    return {'val_loss': mean['own'], 'ablation': mean, 'above_own': above_own}


# ---- training ----

learn = torch.compile(learn) if compile else learn
# operations per token of text, as nanoGPT counts them, in all passes; attention to thoughts is left out
n_weights = sum(p.numel() for name, p in model.named_parameters() if name != 'wpe.weight')
n_flops = (1 + G * think_len // at_once) * (6 * n_weights + 12 * n_layer * d_model * text_len)
peak = 989e12 if dtype == 'bfloat16' else None        # operations per second of an H100 (data sheet)
n_steps, begun, since = run.first_step, run.first_step, run.seconds()       # where the speed is measured from
for step in run.steps(run.first_step if eval_only else max_steps):
    if step % eval_every == 0:
        run.save(step, models)
        evaluate(step)
        begun, since = step, run.seconds()
    schedule(optimizer, learning_rate, step, max_steps, warmup_steps, cosine=True)
    torch.manual_seed(step)     # for dropout: a resumed run drops the same
    model.train()

    # seed and step decide what is read: the same with thoughts and without
    index = np.random.default_rng([seed, step]).integers(len(train_set), size=batch_size)
    x, y = (world.share(rows) for rows in cut(train_set[index]))                # (B, S)
    noise = world.draw(batch_size, G, text_len, think_len).flatten(0, 1)    # (B G, S, T)
    bonus = torch.full((), entropy_weight * (1 - step / max_steps), device=world.device)
    size, logged = micro_batch or len(x), []
    for part in zip(x.split(size), y.split(size), noise.split(size * G)):
        with world.autocast:
            loss, seen = learn(*part, bonus)
        (loss * (size / len(x))).backward()
        logged.append({name: number.detach() for name, number in ({'loss': loss} | seen).items()})
    world.mean_gradients(model.parameters())
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip or torch.inf)
    optimizer.step()
    optimizer.zero_grad()
    for old, new in zip(models['lagged'].parameters(), model.parameters()) if 'lagged' in models else ():
        old.lerp_(new.detach(), .01)

    n_steps = step + 1
    if step % log_every == 0:
        seen = {name: torch.stack([part[name] for part in logged]).mean().item() for name in logged[0]}
        speed = (n_steps - begun) * batch_size * text_len / max(1e-6, run.seconds() - since)
        mfu = {'mfu': speed * n_flops / peak / world.size} if peak else {}
        run.log(step, **seen, gradient_norm=norm.item(), tokens_per_second=speed, **mfu)
        begun, since = n_steps, run.seconds()

# ---- the last line ----

run.save(n_steps, models)
result = evaluate(n_steps)
run.finish(steps=n_steps, best_val_loss=-run.best, **result)

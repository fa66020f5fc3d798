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
    python supervised_rollout_think.py --gate=learned --init_from=out/supervised_rollout_think/think_len=0/ckpt.pt
    torchrun --standalone --nproc_per_node=2 supervised_rollout_think.py    # the same update, by two processes

By default thoughts are learned by gradient: eight tokens are written at once, and each passes on the gradient
to its probabilities (straight-through, Bengio et al. 2013). With thought_kind=token they are learned by
reward. Each position has G rollouts of its thoughts, which are paid log p(next token). The policy gradient
(Williams 1992) compares them with the mean of their position (Dr. GRPO, Liu et al. 2025), so that nobody is
paid for easy tokens, or with a lagged copy of the model that does not think (RLP, Hatamizadeh et al. 2025).
There is no clipping, KL term or importance weight, as each rollout is used once.

All positions think at the same time, in one pass per thought (Quiet-STaR, Zelikman et al. 2024), or per group
of thoughts that are written at once. Quiet-STaR mixes logits with and without thoughts. Here states are added:
with --gate=learned those with thoughts count for nothing at first, so training starts at the loss of the model
without thoughts.
"""
import numpy as np
import torch
import torch.nn.functional as F

from model import GPT2, GPT2Thinking, ModelConfig, find_model, lagged_copy, make_model
from utils import (Run, World, ablations, advantages, fail, load_checkpoint, load_text, make_optimizer, peak_flops,
                   read_knobs, sample, schedule, show_tokens, user_errors)

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
thoughts = 'own'              # 'own' | 'filler' | 'random': whose are read; filler is always the first thought token
thought_kind = 'straight_through'    # 'token' | 'straight_through' | 'continuous': see think_everywhere in model.py
readers = 'later'             # 'own' | 'later': who sees a position's thoughts: only itself, or later positions too
d_thought_vocab = 512         # L: thought tokens
think_len = 8                 # T: thoughts before each token; 0: none, ordinary training
at_once = 8                   # thoughts that are written and read in one pass, each from its own part of the L tokens
fixed = True                  # always T thoughts; False: up to T, end_thought ends them
think_cost = .01              # what a thought costs if their number is not fixed, nats
group_size = 4                # G: rollouts of a position, if thoughts are tokens
gate = 'open'                 # 'open' | 'learned' | 'none' | 'closed': what the prediction is read from: the state
                              # without thoughts plus a learned share, 1 or 0 at first, of the state with them; only
                              # the state with thoughts; only the state without
policy_weight = 1.            # of the policy gradient, if thoughts are tokens; 0: they are not trained
baseline = 'group'            # 'group' | 'no_think': mean of the rollouts, or log p of a lagged copy without thoughts
entropy_weight = .01          # of a bonus for the entropy of thoughts that are paid; falls to zero
eval_every = 250              # steps between evaluations, each with a checkpoint and samples
eval_sequences = 400          # sequences per evaluation, evenly from all of val
log_every = 10                # steps between lines of metrics.jsonl
seed = 0                      # of weights, batches and thoughts
device = 'auto'               # auto, cpu, cuda, cuda:1, mps
dtype = 'float32'             # 'float32' | 'bfloat16'
compile = False               # compile the model, faster after a minute or two
init_from = 'scratch'         # scratch, resume, or the path of a checkpoint to take weights from, thinking or normal
reference = ''                # path of a checkpoint without thoughts, whose loss on the same text is reported as well
eval_only = False             # evaluate, train nothing, write nothing
out_dir = ''                  # folder of the run; empty: out/supervised_rollout_think/<changed knobs>
wandb_mode = 'disabled'       # 'disabled' | 'offline' | 'online'

# ---- set-up ----

knobs = read_knobs(__file__, globals())
paid = thoughts == 'own' and think_len and thought_kind == 'token' and policy_weight
legible = thoughts == 'own' and think_len and thought_kind != 'continuous'      # tokens that can be shown, and replaced
if paid and baseline == 'group' and group_size < 2:
    fail(f'baseline=group compares the rollouts of a group: group_size={group_size} must be at least 2')
if not fixed and (thoughts != 'own' or thought_kind != 'token'):
    fail(f'thoughts={thoughts}, thought_kind={thought_kind} have no end to choose: --fixed=True, or own tokens')
if at_once > 1 and (thought_kind == 'continuous' or not fixed):
    fail('continuous thoughts, and thoughts that may end, are written one at a time: --at_once=1')
if think_len % at_once or d_thought_vocab % at_once:
    fail(f'at_once={at_once} must divide think_len={think_len} and d_thought_vocab={d_thought_vocab}')
world = World(knobs)
if micro_batch and batch_size // world.size % micro_batch:
    fail(f'micro_batch={micro_batch} does not divide the {batch_size // world.size} sequences of a process')
G = group_size if thought_kind == 'token' and thoughts != 'filler' else 1
# The policy gradient is that of temperature 1. Other kinds of thoughts take the most likely token.
temperature = 1. if thought_kind == 'token' else 0.

# ---- data ----

train_set, val_set, d_vocab, decode = load_text(data)
if min(len(train_set), len(val_set)) < text_len + 2:
    fail(f'{data} has no {text_len + 1} tokens in a row: a smaller --text_len')


def cut(tokens, starts):
    """Sequences (n, S) of a text that begin at starts (n,), and the tokens (n, S) that come next."""
    rows = torch.from_numpy(tokens[starts.numpy()[:, None] + np.arange(text_len + 1)].astype(np.int64))
    rows = rows.to(world.device, non_blocking=True)
    return rows[:, :-1], rows[:, 1:]


def draw(step):
    """A step's sequences and next tokens (B, S) of this process; the same with thoughts and without."""
    starts = np.random.default_rng([seed, step]).integers(len(train_set) - text_len, size=batch_size)
    return cut(train_set, world.share(torch.from_numpy(starts)))


# ---- model, optimiser, run ----

SPREAD = 3.     # the larger the embeddings of thoughts at first, the more certain are thoughts; those of text are 1
with user_errors():
    config = ModelConfig(d_vocab=d_vocab, block_size=text_len, n_layer=n_layer, n_head=n_head, d_model=d_model,
                         dropout=dropout)
    model = GPT2(config)        # starts with the same weights for text, with thoughts and without
    if think_len:
        model = GPT2Thinking.from_normal(model, d_thought_vocab, SPREAD, block_size=text_len + think_len,
                                         gate={'learned': 0., 'open': 1.}.get(gate))
    if knobs.checkpoint:
        model = make_model(model.config, knobs.checkpoint, spread=SPREAD)
    models = {'model': model.to(world.device)}
    if paid and baseline == 'no_think':
        models['lagged'] = lagged_copy(model, knobs.checkpoint).eval()
    other = find_model(load_checkpoint(reference)).to(world.device).eval() if reference else None
if other and (other.config.d_vocab != d_vocab or other.config.block_size < text_len):
    fail(f'reference={reference} is no normal model of {d_vocab} tokens that reads {text_len} of them')
normal_tokens = range(d_vocab)
thought_tokens = range(d_vocab, d_vocab + d_thought_vocab)
end_thought = thought_tokens.stop

optimizer = make_optimizer(model, learning_rate, weight_decay, betas=(.9, beta2))
run = Run(knobs, world, [optimizer])

# ---- thinking and predicting ----

def think(x, noise, temperature=temperature, given=None):
    """
    Think at every position of text x (B, S) with noise (N, S, T), N / B rollouts of each row, or read given thoughts
    (N, S, T). Returns thoughts, their log-probabilities and entropies (N, S, T), states (B, S, d_model) without
    thoughts, and states (N, S, d_model) to predict from.
    """
    if not think_len:
        states = model.hidden(x)
        return noise, noise, noise, states, states
    if thoughts != 'own' and given is None:
        given = thought_tokens.start + (noise * d_thought_vocab * (thoughts == 'random')).long()
    *written, plain, last = model.think_everywhere(x, noise, thought_kind=thought_kind, readers=readers, fixed=fixed,
                                                   at_once=at_once, given=given, temperature=temperature)
    return *written, plain, plain.repeat_interleave(len(noise) // len(x), dim=0) if gate == 'closed' else last


def loss_at(states, y, by=model):
    """Cross-entropy (n, S) of next tokens y (n, S), predicted from states (n, S, d_model); nats."""
    logits = by.logits(states, normal_tokens).float()
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction='none').view(y.shape)


def by_position(x):
    """Numbers (B G, S) of rollouts as groups (B S, G)."""
    return x.view(-1, G, text_len).transpose(1, 2).flatten(0, 1)


# ---- three ways to learn ----
# Each returns the loss for sequences x (B, S) with next tokens y (B, S), and what to log. noise (B G, S, T) draws the
# thoughts, bonus is what their entropy is worth.

def ordinary(x, y, noise, bonus):
    """A GPT without thoughts."""
    loss = model.loss(x, y)
    return loss, {'loss': loss}


def by_gradient(x, y, noise, bonus):
    """Thoughts learn what lowers the loss: its gradient passes through them, unless they are plain tokens."""
    *_, last = think(x, noise)
    loss = loss_at(last, y.repeat_interleave(G, dim=0)).mean()
    return loss, {'loss': loss}


def by_reward(x, y, noise, bonus):
    """Thoughts are paid log p(next token), less what they cost, and compared with the baseline."""
    thought, log_pi, entropy, plain, last = think(x, noise)                 # (B G, S, T)
    log_p_next = -loss_at(last, y.repeat_interleave(G, dim=0))              # (B G, S)
    loss, n_thoughts = -log_p_next.mean(), model.n_thoughts(thought)
    seen = {'loss': loss, 'entropy': entropy.mean(), 'thoughts': n_thoughts.float().mean()}
    rewards = by_position(log_p_next.detach() - (0. if fixed else think_cost * n_thoughts))     # (B S, G)
    if baseline == 'group':
        weights = advantages(rewards, 'dr_grpo')
    else:       # the model learns to predict without thoughts too, and the copy follows it
        seen['loss_without'] = loss_at(plain, y).mean()
        loss = loss + seen['loss_without']
        with torch.no_grad():
            without = -loss_at(models['lagged'].hidden(x), y, models['lagged'])                 # (B, S)
        weights = advantages(rewards, 'reinforce', baseline=without.view(-1, 1))
    seen['reward_std_in_group'] = rewards.std(1, correction=0).mean()
    policy_loss = -(weights * by_position(log_pi.sum(-1))).sum(1).mean()
    return loss + policy_weight * policy_loss - bonus * entropy.sum(-1).mean(), seen


learn = by_reward if paid else by_gradient if think_len else ordinary

# ---- evaluation ----

@torch.no_grad()
def test():
    """
    Losses (n, S) on sequences evenly from all of val, by what is read: 'own' greedy thoughts, others in their place (see
    ablations in utils.py), 'none'; and 'reference', the losses of that model.
    """
    starts, parts = torch.linspace(0, len(val_set) - text_len - 1, eval_sequences).long(), []
    generator = torch.Generator(world.device).manual_seed(seed)
    for some in starts.split(max(1, 4096 // text_len)):
        x, y = cut(val_set, some)
        noise = torch.rand(*x.shape, think_len, generator=generator, device=world.device)
        with world.autocast:
            own, *_, plain, last = think(x, noise, temperature=0)
            found = {'own': loss_at(last, y)}
            others = ablations(own.flatten(0, 1), thought_tokens) if legible else {}
            for name in others.keys() - {'own', 'none'}:
                found[name] = loss_at(think(x, noise, given=others[name].view(own.shape))[-1], y)
            if think_len:
                found['none'] = loss_at(plain, y)
            if other:
                found['reference'] = loss_at(other.hidden(x), y, other)
        parts.append(found)
    return {name: torch.cat([found[name] for found in parts]).cpu() for name in parts[0]}


def compare(found):
    """Mean losses of test, by how much each is above own, with its standard error over sequences; nats."""
    result = {'ablation': {name: loss.mean().item() for name, loss in found.items() if name != 'reference'}}
    apart = {name: (loss - found['own']).mean(1) for name, loss in found.items() if name != 'own'}      # (n,)
    result['above_own'] = {name: [x.mean().item(), (x.std() / len(x) ** .5).item() if len(x) > 1 else None]
                           for name, x in apart.items()}
    without = found.get('reference', found.get('none'))
    if without is not None:     # the fifth of tokens that is the easiest without thoughts, ..., the hardest
        fifths = without.flatten().argsort().chunk(5)
        result['by_difficulty'] = {name: [found[name].flatten()[part].mean().item() for part in fifths]
                                   for name in ('reference', 'none', 'own') if name in found}
    return result


tail = torch.from_numpy(val_set[-text_len:].astype(np.int64)).to(world.device)[None]            # (1, S)


def show(tokens):
    """Text with thoughts (n,) in colours, without end_thought."""
    return show_tokens(tokens[tokens != end_thought], config, decode, '')


def evaluate(step):
    """Report on val, show its end with thoughts, keep the best checkpoint. Returns the losses of test."""
    model.eval()
    found = test()
    means = {name: loss.mean().item() for name, loss in found.items()}
    val_loss = means.pop('own')
    run.report(step, **{f'val_loss_{name}': mean for name, mean in means.items()}, val_loss=val_loss)
    shown = tail[..., None]                                                                     # (1, S, 1)
    if legible:
        noise = torch.zeros(1, text_len, think_len, device=world.device)
        with torch.no_grad():
            shown = torch.cat([shown, think(tail, noise, temperature=0)[0]], dim=2)             # (1, S, 1 + T)
    run.sample(show(shown.flatten()))
    run.save_best(step, -val_loss, models)
    return found


@torch.no_grad()
def write(n=200):
    """The end of val, and n tokens by which the model continues it, with its thoughts, in colours."""
    text, written = tail, []
    for _ in range(n):
        x = text[:, -text_len:]
        noise = torch.rand(*x.shape, think_len + 1, generator=world.generator, device=world.device)
        thought, *_, last = think(x, noise[..., 1:])
        token = sample(model.logits(last[:, -1], normal_tokens), noise[:, -1, 0])               # (1,)
        text = torch.cat([text, token[:, None]], dim=1)
        written += [*thought[0, -1], *token] if legible else [*token]
    return f'{show(tail[0])} | {show(torch.stack(written))}'


# ---- training ----

learn = torch.compile(learn) if compile else learn
# Operations per token of text, as nanoGPT counts them: 6 for each weight that is no position embedding, and attention
# to the text. Each pass of thoughts reads all positions once more; its attention to thoughts is left out.
n_weights = sum(p.numel() for name, p in model.named_parameters() if name != 'wpe.weight')
n_flops = (1 + G * think_len // at_once) * (6 * n_weights + 12 * n_layer * d_model * text_len)
peak = peak_flops(world.device) if dtype == 'bfloat16' else None
n_steps = run.first_step
begun, since = n_steps, run.seconds()       # from when on the speed is measured
for step in run.steps(run.first_step if eval_only else max_steps):
    if step % eval_every == 0:
        run.save(step, models)
        evaluate(step)
        begun, since = step, run.seconds()
    schedule(optimizer, learning_rate, step, max_steps, warmup_steps, cosine=True)
    if dropout:
        torch.manual_seed(step)     # a resumed run drops the same

    model.train()
    x, y = draw(step)                                                                           # (B, S)
    noise = world.draw(torch.rand, batch_size, G, text_len, think_len)                          # (B, G, S, T)
    bonus = torch.tensor(entropy_weight * (1 - step / max_steps), device=world.device)
    parts = []
    for some_x, some_y, some_noise in zip(*(rows.split(micro_batch or len(x)) for rows in (x, y, noise))):
        with world.autocast:
            loss, seen = learn(some_x, some_y, some_noise.flatten(0, 1), bonus)
        (loss * len(some_x) / len(x)).backward()
        parts.append({name: value.detach() for name, value in seen.items()})
    world.mean_gradients(model.parameters())
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip or torch.inf)
    optimizer.step()
    optimizer.zero_grad()
    for old, new in zip(models['lagged'].parameters(), model.parameters()) if 'lagged' in models else ():
        old.lerp_(new.detach(), .01)

    n_steps = step + 1
    if step % log_every == 0:
        seen = {name: torch.stack([part[name] for part in parts]).mean().item() for name in parts[0]}
        speed = (n_steps - begun) * batch_size * text_len / max(1e-6, run.seconds() - since)    # tokens of text per second
        if peak:
            seen['mfu'] = speed * n_flops / peak / world.size
        run.log(step, **seen, gradient_norm=norm.item(), tokens_per_second=speed)
        begun, since = n_steps, run.seconds()

# ---- the last line ----

run.save(n_steps, models)
found = evaluate(n_steps)
run.sample(write())
run.finish(steps=n_steps, val_loss=found['own'].mean().item(), best_val_loss=-run.best, **compare(found))

"""
Text: thoughts before every next token. Without thoughts it is ordinary GPT training, the baseline.

    tokens 0..t of a text   ->   T thoughts   ->   token t + 1,   for every t of a sequence at once

One model reads text, thinks and predicts, and nobody tells it what a thought means. By default eight tokens are thought
at once, by gradient: that of a token is that of its probabilities (straight-through, Bengio et al. 2013). Or by reward:
log p(the next token), compared with other thoughts of the same position, so that nobody is paid for easy tokens.

    python prepare_data.py                                                        # Shakespeare, by character
    python supervised_rollout_think.py
    python supervised_rollout_think.py --think_len=0                              # the baseline: a GPT
    python supervised_rollout_think.py --thoughts=filler                          # a control: the same thoughts always
    python supervised_rollout_think.py --thought=continuous --gate=none --think_len=1 --at_once=1       # no tokens
    python supervised_rollout_think.py --thought=token --temperature=1            # by reward
    python supervised_rollout_think.py --gate=learned --init_from=out/supervised_rollout_think/think_len=0/ckpt.pt
    torchrun --standalone --nproc_per_node=2 supervised_rollout_think.py

Each step: a batch of sequences; G rollouts of T thoughts at each of their positions, one pass over all positions for
each thought (Quiet-STaR, Zelikman et al. 2024), or for those that are written at once; cross-entropy of the next
tokens; and by reward the policy gradient (Williams 1992) on the thoughts, with the mean reward of the position's group
as baseline (Dr. GRPO, Liu et al. 2025) or what a lagged copy gets that does not think (RLP, Hatamizadeh et al. 2025).
There is no clipping of ratios and no KL term, as each rollout is used once. What is seen with thoughts is added to what
is seen without, by a gate (in Quiet-STaR it mixes logits); --gate=learned begins with nothing, at the loss of a model
that does not think.
"""
import copy

import numpy as np
import torch
import torch.nn.functional as F

from model import GPT2, GPT2Thinking, ModelConfig, find_model, make_model, pack
from utils import (Run, World, ablations, advantages, fail, load_checkpoint, load_text, make_optimizer, peak_flops,
                   read_knobs, sample, schedule, show_tokens, user_errors)

# ---- knobs ----------------------------------------------------------------------------------------------------------

data = 'data/shakespeare_char'  # folder that prepare_data.py made
batch_size = 12                 # sequences per step, over all processes
accumulate = 1                  # parts that a process works through its share of them in, for less memory
text_len = 64                   # S: tokens of a sequence
max_steps = 2000                # updates
max_seconds = 1e6               # stop after this wall-clock time
learning_rate = 2e-3            # falls to a tenth of it, as a cosine
weight_decay = .1
beta2 = .99                     # of AdamW
clip = 1.                       # largest norm of the gradient; 0: any
warmup_steps = 100              # steps over which the learning rate rises
n_layer = 4
n_head = 4
d_model = 128
dropout = 0.                    # share of numbers dropped in training; several processes drop others than one
init = 'gpt2'                   # 'gpt2' | 'unit': see init_weights in model.py; unit has two matrices for tokens
thoughts = 'own'                # 'own' | 'filler' | 'random': controls read the same thought always, or any
thought = 'straight_through'    # 'token' | 'straight_through' | 'continuous': see think_everywhere in model.py
readers = 'later'               # 'own' | 'later': who sees the thoughts of a position: itself, or later ones as well
positions = 'all'               # 'all' | 'last': all of a sequence think, or the last, by the slow code (to compare)
d_thought_vocab = 512           # L: thought tokens
think_len = 8                   # T: thoughts before each token; 0: none, ordinary training
at_once = 8                     # of these written and read in one pass, each with its own part of the thought tokens
fixed = True                    # always T thoughts; False: up to T, end_thought ends them
think_cost = .01                # what a thought costs if their number is not fixed, nats
group_size = 4                  # G: rollouts of a position, with thought = 'token'
gate = 'open'                   # 'learned' | 'open' | 'none' | 'closed': the answer is what is seen without thoughts
                                # plus a share, 0 | 1 at first, of what is seen with them | the latter | the former
plain_weight = 0.               # weight of predicting without thoughts too
policy_weight = 1.              # weight of the policy gradient, with thought = 'token'; 0: they are not trained
baseline = 'group'              # 'group' | 'no_think': mean of the position's group, or a lagged copy without thoughts
advantage = 'dr_grpo'           # 'dr_grpo' | 'grpo' | 'rloo' | 'quantile' | 'softmax' | 'softmax_quantile' |
                                # 'softmax_centred' | 'best': with baseline group, see utils.py
tau = 1.                        # temperature of the three softmax
gamma = 0.                      # thoughts are paid for the tokens after the next, too, each gamma times the one before
spread = 3.                     # size of the embeddings of thoughts at first, those of text are 1: how certain they are
temperature = 0.                # of thoughts in training; 1 is what the policy gradient is of, 0 the most likely ones
epsilon = 0.                    # share of thoughts that are drawn at random
entropy_weight = .01            # of a bonus for the entropy of thoughts that are paid, falls to zero
eval_every = 250                # steps between evaluations, each with a checkpoint and samples
eval_sequences = 400            # sequences per evaluation, evenly from all of val
log_every = 10                  # steps between lines of metrics.jsonl
seed = 0                        # of weights, batches and thoughts
device = 'auto'                 # auto, cpu, cuda, cuda:1, mps
dtype = 'float32'               # 'float32' | 'bfloat16'
compile = False                 # compile the model, quicker after a minute or two
init_from = 'scratch'           # scratch, resume, or the path of a checkpoint to take weights from, thinking or normal
reference = ''                  # path of a checkpoint without thoughts; its loss on the same text is reported as well
eval_only = False               # evaluate, train nothing, write nothing
out_dir = ''                    # folder of the run; empty: out/supervised_rollout_think/<changed knobs>
wandb_mode = 'disabled'         # 'disabled' | 'offline' | 'online'

# ---- set-up ---------------------------------------------------------------------------------------------------------

knobs = read_knobs(__file__, globals())
thinks = thoughts == 'own' and think_len > 0
learns = thinks and thought == 'token' and policy_weight > 0        # by reward
if learns and group_size < 2 and baseline == 'group':
    fail(f'baseline=group compares the rollouts of a group: group_size={group_size} must be at least 2')
if baseline != 'group' and 'advantage' in knobs.changed:
    fail(f'advantage={advantage} needs --baseline=group')
if learns and not temperature:
    fail('the rollouts of a group would all be the most likely one: --temperature=1')
if not fixed and (thoughts != 'own' or thought != 'token'):
    fail(f'thoughts={thoughts}, thought={thought} have no end to choose: --fixed=True, or --thought=token')
if positions == 'last' and (gate != 'none' or readers == 'later' or thought != 'token' or at_once > 1 or not think_len):
    fail('positions=last is for single tokens that their position reads: --gate=none --readers=own --thought=token '
         '--temperature=1 --at_once=1')
if at_once > 1 and (thought == 'continuous' or not fixed):
    fail('states are read, and thoughts ended, one at a time: --at_once=1')
if think_len % at_once or d_thought_vocab % at_once:
    fail(f'at_once={at_once} must divide think_len={think_len} and d_thought_vocab={d_thought_vocab}')
if init == 'unit' and dropout:
    fail('init=unit is for small models: --dropout=0')
world = World(knobs)
if batch_size // world.size % accumulate:
    fail(f'accumulate={accumulate} does not divide the {batch_size // world.size} sequences of a process')

# ---- data -----------------------------------------------------------------------------------------------------------

train_set, val_set, d_vocab, decode = load_text(data)
if min(len(train_set), len(val_set)) < text_len + 2:
    fail(f'{data} has no {text_len + 1} tokens in a row: a smaller --text_len')


def draw(step):
    """
    The batch of a step: this process's sequences (B, S) and the tokens (B, S) that come next. Seed and step decide it,
    so that runs with thoughts and without read the same.
    """
    starts = np.random.default_rng([seed, step]).integers(len(train_set) - text_len, size=batch_size)
    return cut(train_set, world.share(torch.from_numpy(starts)))


def cut(tokens, starts):
    """Sequences (n, S) that start there, and the tokens (n, S) that come next."""
    rows = torch.from_numpy(tokens[starts.numpy()[:, None] + np.arange(text_len + 1)].astype(np.int64))
    rows = rows.to(world.device, non_blocking=True)
    return rows[:, :-1], rows[:, 1:]


# ---- model ----------------------------------------------------------------------------------------------------------

with user_errors():
    config = ModelConfig(d_vocab=d_vocab, block_size=text_len, n_layer=n_layer, n_head=n_head, d_model=d_model,
                         dropout=dropout, init=init, tie_weights=init == 'gpt2')
    model = GPT2(config)        # what it knows of text at first is the same with thoughts and without
    if think_len:
        model = GPT2Thinking.from_normal(model, d_thought_vocab, spread=spread, block_size=text_len + think_len,
                                         gate={'learned': 0., 'open': 1.}.get(gate))
        config = model.config
    if knobs.checkpoint:
        model = make_model(config, knobs.checkpoint, spread=spread)
    model.to(world.device)
models = {'model': model}
if learns and baseline == 'no_think':       # a lagged copy that does not think
    models['lagged'] = copy.deepcopy(model).requires_grad_(False)
    if init_from == 'resume':
        models['lagged'].load_state_dict(make_model(config, knobs.checkpoint, 'lagged').state_dict())
if reference:
    with user_errors():
        other = find_model(load_checkpoint(reference)).to(world.device)
    if other.config.d_vocab != d_vocab or other.config.block_size < text_len:
        fail(f'reference={reference} is no normal model of {d_vocab} tokens that reads {text_len} of them')
normal_tokens = range(d_vocab)
thought_tokens = range(d_vocab, d_vocab + d_thought_vocab)
SAMPLING = {'temperature': temperature, 'epsilon': epsilon}
G = group_size if think_len and (thinks and thought == 'token' or thoughts == 'random') else 1
powers = torch.arange(text_len, device=world.device)
powers = torch.where(powers[:, None] >= powers, gamma ** (powers[:, None] - powers).clamp(min=0.), 0.)    # (S, S)

# ---- optimiser and run ----------------------------------------------------------------------------------------------

optimizer = make_optimizer(model, learning_rate, weight_decay, betas=(.9, beta2))
run = Run(knobs, world, [optimizer])


def save(step, file='ckpt.pt'):
    run.save(step, {name: pack(each) for name, each in models.items()}, file)


# ---- thinking and predicting ----------------------------------------------------------------------------------------

def think(x, noise, given=None, **how):
    """
    Thoughts at every position of text x (B, S) by noise (N, S, T), or given ones, and states to predict by, as
    think_everywhere in model.py returns them.
    """
    if thoughts == 'filler' and given is None:
        given = torch.full(noise.shape, thought_tokens.start, device=noise.device)
    if thoughts == 'random' and given is None:
        given = thought_tokens.start + (noise * d_thought_vocab).long()
    *written, plain, last = model.think_everywhere(x, noise, thought=thought, readers=readers, fixed=fixed,
                                                   at_once=at_once, given=given, **how)
    return *written, plain, plain.repeat_interleave(len(noise) // len(x), dim=0) if gate == 'closed' else last


def loss_at(states, y, by=model):
    """Cross-entropy (n, S) of next tokens y (n, S), predicted by states (n, S, d_model); nats."""
    logits = by.logits(states, normal_tokens).float()
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction='none').view(y.shape)


def losses(x, y, noise, bonus):
    """The loss for sequences x (B, S) and next tokens y (B, S) by noise (N, S, T), and what to log: tensors by name."""
    if not think_len:
        loss = model.loss(x, y)
        return loss, {'loss': loss.detach()}
    n_rollouts = len(noise) // len(x)
    if positions == 'last':
        tokens = model.think(x, think_len, fixed=fixed, n_rollouts=n_rollouts, noise=noise[:, -1], **SAMPLING).tokens
        prompt, y = x.repeat_interleave(n_rollouts, dim=0), y[:, -1:]
        log_pi, entropy, logits = model.think_and_answer(prompt, tokens, fixed, close=False)
        tokens, log_pi, entropy = tokens[:, None], log_pi[:, None], entropy[:, None]                # (N, 1, T)
        right = -F.cross_entropy(logits.float(), y.repeat_interleave(n_rollouts), reduction='none')[:, None]    # (N, 1)
    else:
        tokens, log_pi, entropy, plain, last = think(x, noise, **SAMPLING)
        right = -loss_at(last, y.repeat_interleave(n_rollouts, dim=0))                              # (N, S)
    loss = -right.mean()
    logged = {'loss': loss.detach()}
    if plain_weight or learns and baseline == 'no_think':
        without = loss_at(plain, y)                                                                 # (B, S)
        loss = loss + (plain_weight or 1.) * without.mean()
        logged['loss_without'] = without.detach().mean()

    # what the thoughts are paid, compared with the baseline
    if learns:
        n = y.shape[1]

        def by_position(rewards):       # (N, n) -> (B n, N / B), paid for later tokens too
            rewards = rewards @ powers[:n, :n]
            return rewards.view(len(x), -1, n).transpose(1, 2).flatten(0, 1)
        rewards = right.detach()
        if not fixed:
            rewards = rewards - think_cost * (tokens != config.end_thought).sum(-1)
        base = 0.
        if baseline == 'no_think':
            with torch.no_grad():
                base = by_position(-loss_at(models['lagged'].hidden(x), y, models['lagged']))       # (B n, 1)
        rewards = by_position(rewards)                                                              # (B n, G)
        weights = advantages(rewards, advantage if baseline == 'group' else 'reinforce', tau, base)
        chosen = log_pi.sum(-1).view(len(x), -1, n).transpose(1, 2).flatten(0, 1)                   # (B n, G)
        loss = loss - policy_weight * (weights * chosen).sum(1).mean() - bonus * entropy.sum(-1).mean()
        logged |= {'reward_std_in_group': rewards.std(1, correction=0).mean(), 'entropy': entropy.detach().mean(),
                   'thoughts': (tokens != config.end_thought).sum(-1).float().mean()}
    return loss, logged


# ---- evaluation -----------------------------------------------------------------------------------------------------

@torch.no_grad()
def test(n=eval_sequences):
    """
    Losses (n, S) on sequences evenly from all of val, by name: 'own' with greedy thoughts, 'none' without, others with
    what they are replaced by (see ablations in utils.py), 'reference' those of that model.
    """
    starts, found = torch.linspace(0, len(val_set) - text_len - 1, n).long(), {}
    generator = torch.Generator(world.device).manual_seed(seed)
    for part in starts.split(max(1, 4096 // text_len)):
        x, y = cut(val_set, part)
        with world.autocast:
            if reference:
                found.setdefault('reference', []).append(loss_at(other.hidden(x), y, other))
            if not think_len:
                found.setdefault('own', []).append(loss_at(model.hidden(x), y))
                continue
            noise = torch.rand(*x.shape, think_len, generator=generator, device=world.device)
            own, *_, plain, last = think(x, noise, **({'temperature': 0} if thinks else {}))
            found.setdefault('own', []).append(loss_at(last, y))
            others = ablations(own.flatten(0, 1), thought_tokens) if thinks and thought != 'continuous' else {}
            for name, tokens in others.items():
                if name not in ('own', 'none'):
                    last = think(x, noise, given=tokens.view(own.shape))[-1]
                    found.setdefault(name, []).append(loss_at(last, y))
            found.setdefault('none', []).append(loss_at(plain, y))
    return {name: torch.cat(parts).cpu() for name, parts in found.items()}


def compare(found):
    """Mean losses of test, and by how much each is above own, with its standard error over sequences; nats."""
    result = {'ablation': {name: loss.mean().item() for name, loss in found.items() if name != 'reference'}}
    apart = {name: (loss - found['own']).mean(1) for name, loss in found.items() if name != 'own'}      # (n,)
    result['above_own'] = {name: [loss.mean().item(), (loss.std() / len(loss) ** .5).item() if len(loss) > 1 else None]
                           for name, loss in apart.items()}
    known = found.get('reference', found.get('none'))
    if known is not None:       # losses on the fifth of tokens that are the easiest without thoughts, ..., the hardest
        fifths = known.flatten().argsort().chunk(5)
        result['by_difficulty'] = {name: [loss.flatten()[part].mean().item() for part in fifths]
                                   for name, loss in found.items() if name in ('reference', 'none', 'own')}
    return result


def evaluate(step):
    """Report on val, show text with its thoughts, keep the best checkpoint. Returns the losses of test."""
    model.eval()
    found = test()
    val_loss = found['own'].mean().item()
    run.report(step, **{f'val_loss_{name}': loss.mean().item() for name, loss in found.items() if name != 'own'},
               val_loss=val_loss)
    shown = cut(val_set, torch.tensor([len(val_set) // 2 - text_len]))[0][..., None]                # (1, S, 1)
    if thinks and thought != 'continuous':
        noise = torch.zeros(*shown.shape[:2], think_len, device=world.device)
        with torch.no_grad():
            shown = torch.cat([shown, think(shown[..., 0], noise, temperature=0)[0]], dim=2)        # (1, S, 1 + T)
    run.sample(show_tokens(shown.flatten(), config, decode, ''))
    if -val_loss > run.best:
        run.best = -val_loss
        save(step, 'best.pt')
    return found


@torch.no_grad()
def write(n=200):
    """A text of n tokens that the model writes, with its thoughts, as text in colours."""
    x, shown = torch.zeros(1, 1, dtype=torch.long, device=world.device), []
    for _ in range(n):
        x = x[:, -text_len:]
        noise = torch.rand(*x.shape, think_len + 1, generator=world.generator, device=world.device)
        if think_len:
            tokens, *_, states = think(x, noise[..., 1:], temperature=temperature)
            shown += tokens[0, -1].tolist() if thinks else []
        else:
            states = model.hidden(x)
        token = sample(model.logits(states[:, -1], normal_tokens), noise[:, -1, 0])[0]
        x = torch.cat([x, token[:, None]], dim=1)
        shown.append(token.item())
    return show_tokens(torch.tensor(shown), config, decode, '')


# ---- training -------------------------------------------------------------------------------------------------------

forward = torch.compile(losses) if compile else losses
n_steps, peak = run.first_step, peak_flops(world.device)
flops = 6 * sum(p.numel() for p in model.parameters()) + 12 * n_layer * d_model * text_len      # per token, as nanoGPT
begun, since = n_steps, run.seconds()       # of which the speed is measured
for step in run.steps(run.first_step, run.first_step if eval_only else max_steps):
    if step % eval_every == 0:
        save(step)
        evaluate(step)
        begun, since = step, run.seconds()
    schedule(optimizer, learning_rate, step, max_steps, warmup_steps, cosine=True)
    if dropout:
        torch.manual_seed(step)     # a resumed run drops the same

    model.train()
    x, y = draw(step)                                                                               # (B, S)
    noise = world.draw(torch.rand, batch_size, G, text_len, think_len)                              # (B, G, S, T)
    bonus = torch.tensor(entropy_weight * (1 - step / max_steps), device=world.device)
    for parts in zip(x.chunk(accumulate), y.chunk(accumulate), noise.chunk(accumulate)):
        with world.autocast:
            loss, logged = forward(*parts[:2], parts[2].flatten(0, 1), bonus)
        (loss / accumulate).backward()
    world.mean_gradients(model.parameters())
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip or torch.inf)
    optimizer.step()
    optimizer.zero_grad()
    for old, new in zip(models['lagged'].parameters(), model.parameters()) if 'lagged' in models else ():
        old.lerp_(new.detach(), .01)

    n_steps = step + 1
    if step % log_every == 0:
        numbers = {name: value.item() for name, value in logged.items()} | {'gradient_norm': norm.item()}
        now = run.seconds()
        speed = (step + 1 - begun) * batch_size * text_len / max(1e-6, now - since)         # tokens of text per second
        numbers['tokens_per_second'] = speed
        if peak:
            numbers['mfu'] = speed * (1 + G * think_len // at_once) * flops / peak / world.size
        begun, since = step + 1, now
        run.log(step, **numbers)

# ---- the last line --------------------------------------------------------------------------------------------------

save(n_steps)
found = evaluate(n_steps)
run.sample(write())
run.finish(steps=n_steps, val_loss=found['own'].mean().item(), best_val_loss=-run.best, **compare(found))

"""
Thoughts between question and answer, on problems that need them: work that is done step by step.

    a start, k operations, =   ->   T thoughts   ->   answer

One model reads the question, writes thoughts and answers, seeing both. Nobody tells it what a thought means
or shows it a step in between: it is paid log p(answer | question, thoughts), less a price of overuse.

    python add_think.py                                         # ((7 + 3) x 5 + 9) ... % 11, six operations
    python add_think.py --thoughts=none                         # the control: answers at once
    python add_think.py --fixed=False                           # as many thoughts as are worth their cost
    torchrun --standalone --nproc_per_node=2 add_think.py       # the same update, by two processes

Each step: questions of one depth, that is, number of operations; G rollouts of thoughts each; cross-entropy
on answers, and the policy gradient on thoughts with the group's mean as baseline (Dr. GRPO, Liu et al. 2025),
without clipping, KL term or importance weights, as each rollout is used once. The answer at one depth is a
useful thought at the next, so questions get deeper when enough are right; with --mixture, any may be deep.

The answer is read where another thought would be written: the same weights work out a state as answer or as
thought. Thought t has the position of operation t, so steps look alike (position coupling, Cho et al. 2024).
"""
from model import ModelConfig, ThinkingModelConfig, lagged_copy, make_model
from utils import (Run, SerialTask, World, ablations, advantages, concentration, fail, heat_map,
                   make_optimizer, picture, read_knobs, schedule)

import torch
import torch.nn.functional as F

# ---- knobs ----

task = 'add'                  # 'add' | 'perm' | 's5' | 'story': see SerialTask in utils.py
input_max = 11                # M: states are 0..M-1, for 'add' a prime; 's5' has 120, 'story' 5, always
n_letters = 10                # operations of 'perm' and 's5' to choose from
k = 6                         # depth: operations per question
k_test = 0                    # greatest depth that is tested, beyond training; 0: k
heldout = .1                  # share of the questions of depth k that is never trained on
batch_size = 32               # questions per step, over all processes
max_steps = 8000              # updates; the learning rate falls to zero over their second half
enough = 1.                   # training ends when this share of held-out answers is right; above 1: never
max_seconds = 1e6             # stop after this wall-clock time
learning_rate = 2e-3
weight_decay = 0.
n_layer = 1
n_head = 4
d_model = 64
position_encoding = 'relative'    # 'relative' | 'rotary' | 'learned'
recount = True                # thought t has the position of operation t; False: positions are counted on
thoughts = 'own'              # 'own' | 'none' | 'filler' | 'random' | 'chain': the true states, supervised
d_thought_vocab = 32          # L: thought tokens
think_len = 0                 # T: thoughts per question; 0: one less than operations, or k + 1 if not fixed
fixed = True                  # always T thoughts; False: up to T, end_thought ends them
think_cost = .1               # what a thought costs if their number is not fixed, nats
mixture = 0.                  # above 0: no schedule, depth d always has a share in proportion to d^-mixture
advance_at = .96              # share of right answers, a running mean, at which depth grows by one
group_size = 8                # G: rollouts of a question
baseline = 'group'            # 'group' | 'batch' | 'no_think': their mean, or a lagged copy without thoughts
advantage = 'dr_grpo'         # 'dr_grpo' | 'grpo' | 'rloo' | 'softmax' | 'best' | 'batch_std' | 'quantile' |
                              # 'quantile_batch' | 'softmax_quantile' | 'softmax_centred' | 'tpo': see utils
tau = 1.                      # temperature of the three softmax and tpo
code_price = 3.               # nats per log of a thought's overuse, so that no two states share a thought
text_weight = 0.              # of the mean cross-entropy of a question's tokens, padding too
entropy_weight = .05          # of a bonus for entropy of thoughts; after 300 steps of a depth a fifth of it
eval_every = 500              # steps between evaluations, each with a checkpoint and samples
eval_questions = 2000         # questions per evaluation
log_every = 10                # steps between lines of metrics.jsonl
seed = 0                      # of weights, task, questions and thoughts
device = 'auto'               # auto, cpu, cuda, cuda:1, mps
dtype = 'float32'             # 'float32' | 'bfloat16'; on a GPU float32 products are TF32
init_from = 'scratch'         # scratch, resume, auto (resume what is there), or a checkpoint's path
eval_only = False             # evaluate, train nothing, write nothing
out_dir = ''                  # folder of the run; empty: out/add_think/<changed knobs>
wandb_mode = 'disabled'       # 'disabled' | 'offline' | 'online'
plot = False                  # draw what thoughts mean at the end: meaning.html, needs plotly

# ---- set-up ----

knobs = read_knobs(__file__, globals())
if baseline != 'group' and advantage != 'dr_grpo':
    fail(f'advantage={advantage} needs --baseline=group')
if group_size < 2 and baseline == 'group' and thoughts == 'own':
    fail(f'baseline=group compares the rollouts of a group: group_size={group_size} must be at least 2')
if not fixed and thoughts != 'own':
    fail(f'thoughts={thoughts} have no end to choose: --fixed=True')
world = World(knobs)

# ---- data ----

questions = SerialTask(task, input_max, n_letters, seed)
n_states, k_most = questions.n_states, max(k, k_test)
if thoughts == 'chain' and (d_thought_vocab < n_states or think_len):
    fail(f'thoughts=chain needs --d_thought_vocab={n_states} or more, one for each state, and --think_len=0')
shares = torch.arange(1, k + 1.) ** -mixture            # of depths 1 to k in a mixture
hashing = torch.randint(2**24, (k + 2,), generator=torch.Generator().manual_seed(seed))


def draw(n, depth, generator=world.generator, test=False):
    """n questions (n, S) of a depth and their states (n, depth) after each operation; test: held-out ones."""
    parts = []
    while sum(len(question) for question, _ in parts) < n:
        question, states = questions.draw(2 * n, depth, generator)
        if depth == k and heldout:      # split by a hash, as there are too many questions to list
            key = states if task == 'story' else question       # the same in any words
            chance = (key * hashing[:key.shape[1]].to(key.device)).sum(1)
            for _ in range(2):          # mix the bits
                chance = (chance ^ chance >> 15) * 0x9E3779B1 & 0xFFFFFFFF
            keep = (chance / 2**32 < heldout) == test
            question, states = question[keep], states[keep]
        parts.append((question, states))
        if len(parts) > 1000:
            fail(f'heldout={heldout} leaves no questions to {"test" if test else "train"} among so few')
    return [torch.cat(part)[:n] for part in zip(*parts)]


def n_thoughts(depth):
    """T for questions of a depth."""
    return 0 if thoughts == 'none' else think_len or (depth - 1 if fixed else k + 1)


def places(question):
    """Positions (S,) of a question's tokens: their places. recount: the last token is put at the start, so
    thought t is at operation t, or line t of a story."""
    position = torch.arange(question.shape[1], device=question.device) // questions.width
    position[-1] = questions.first if recount else position[-1]
    return position


# ---- model, optimiser, run ----

n_tokens = len(questions.names)
thought_tokens = range(n_tokens, n_tokens + d_thought_vocab)
shape = dict(n_layer=n_layer, n_head=n_head, d_model=d_model, position_encoding=position_encoding,
             init='unit', tie_weights=False,
             block_size=(questions.first + k_most + 2) * questions.width + 2 + (think_len or k_most))
config = (ModelConfig(d_vocab=n_tokens, **shape) if thoughts == 'none' else
          ThinkingModelConfig(d_normal_vocab=n_tokens, d_thought_vocab=d_thought_vocab, **shape))
model = make_model(config, knobs.checkpoint).to(world.device)
models = {'model': model}
if baseline == 'no_think':
    models['lagged'] = lagged_copy(model, knobs.checkpoint)
optimizer = make_optimizer(model, learning_rate, weight_decay)
run = Run(knobs, world, [optimizer])
state = run.restore({
    'depth': torch.tensor(k if mixture else 1),     # greatest so far
    'since': torch.tensor(0),           # step at which it was new
    'accuracy': torch.tensor(0.),       # running mean of right answers at this depth
    'frequency': torch.full((max(1, n_thoughts(k)), d_thought_vocab + 1), 1 / n_states)})  # (T, L + 1)
if knobs.checkpoint and not run.resumed and knobs.checkpoint['script'] == knobs.script:     # it has learned
    state['depth'] = knobs.checkpoint['depth'].clamp(1, k)

# ---- thinking, answering, and what thoughts are paid ----

def think(question, states, noise, **sampling):
    """Thoughts (N, T) after questions (B, S) with states (B, depth), by noise (N, T); N / B for each."""
    if thoughts == 'own' and noise.shape[1]:
        return model.think(question, noise.shape[1], fixed=fixed, positions=places(question),
                           n_rollouts=len(noise) // len(question), noise=noise, **sampling).tokens
    if thoughts == 'chain':
        return thought_tokens.start + states[:, :-1]
    return thought_tokens.start + (noise * d_thought_vocab * (thoughts == 'random')).long()


def respond(question, thought, by=model):
    """Log p and entropies (N, T) of thoughts after questions (B, S), log p (N, M) of answers."""
    if thoughts == 'none':
        logits = by(question, None, places(question), first=-1)[:, 0]
        log_pi = entropy = logits[:, :0]
    else:
        log_pi, entropy, logits = by.think_and_answer(question, thought, fixed, places(question))
    return log_pi, entropy, logits[:, :n_states].float().log_softmax(-1)


def losses(question, states, step):
    """The loss for questions (B, S) with states (B, depth), which whole rollouts are right, what to log."""
    B, T = len(question), n_thoughts(states.shape[1])
    G = group_size if thoughts in ('own', 'random') and T else 1
    n_cut = 0 if fixed else G // 2
    noise = world.draw(batch_size, G - n_cut, T).flatten(0, 1)
    thought = think(question, states, noise)
    if n_cut:
        thought = add_copies(thought.view(B, -1, T), world.draw(batch_size, G)[:, :n_cut])
    answer = states[:, -1].repeat_interleave(G)
    log_pi, entropy, log_q = respond(question, thought)                     # (B G, T), (B G, n_states)
    log_p_answer = log_q.gather(1, answer[:, None]).view(B, G)
    loss, seen = -log_p_answer.mean(), {}
    if thoughts == 'chain':
        loss = loss - log_pi.sum(1).mean()
    elif thoughts == 'own' and T:
        if baseline == 'no_think':      # what the lagged copy is to learn
            loss = loss + F.nll_loss(respond(question, thought[::G, :0])[2], answer[::G])
        weights, seen = pay(question, thought, answer[::G], log_p_answer.detach(), log_pi.detach())
        bonus = entropy_weight * max(.2, 1 - .8 * (step - state['since'].item()) / 300)
        loss = loss - (weights * log_pi.sum(1).view(B, G)).sum(1).mean() - bonus * entropy.sum(1).mean()
        seen |= {'entropy': entropy.mean(), 'log_prob': log_pi.mean(), **concentration(weights)}
    if text_weight:
        loss = loss + text_weight * model.loss(question[:, :-1], question[:, 1:], places(question)[:-1])
    return loss, (log_q.argmax(-1) == answer).view(B, G)[:, n_cut:].float(), seen


def pay(question, thought, answer, rewards, log_pi):
    """Weights (B, G) of rollouts, and what to log. They are paid rewards (B, G), that is log p(answer), less
    what their thoughts (B G, T) cost, compared with a baseline. log_pi: (B G, T), of thoughts."""
    if not fixed:
        rewards = rewards - think_cost * model.n_thoughts(thought).view(rewards.shape)
    rewards = rewards - code_price * overuse(thought).view(rewards.shape)
    everyone = world.gather(rewards)
    base = everyone.mean() if baseline == 'batch' else 0.
    if baseline == 'no_think':
        base = respond(question, question[:, :0], models['lagged'])[2].gather(1, answer[:, None])
    kind = advantage if baseline == 'group' else 'reinforce'
    weights = advantages(rewards, kind, tau, base, everyone, log_pi.sum(1).view(rewards.shape))
    return weights, {'reward': rewards.mean(), 'reward_std_in_group': rewards.std(1, correction=0).mean(),
                     'thoughts': model.n_thoughts(thought).float().mean(),
                     'distinct_thoughts': len(thought.unique())}


def overuse(thought):
    """Cost (N,) of thoughts (N, T) at a price of 1: summed logs of how far each exceeds its fair share."""
    used = F.one_hot(world.gather(thought) - n_tokens, d_thought_vocab + 1).float().mean(0)     # (T, L + 1)
    frequency = state['frequency'][:len(used)].lerp_(used, .1)
    share = frequency[torch.arange(len(used), device=used.device), thought - n_tokens]  # (N, T)
    excess = (share * n_states / 1.2).clamp(min=1).log()        # a fifth more is chance
    return excess.masked_fill(thought == model.config.end_thought, 0.).sum(1)


def add_copies(thought, at):
    """Copies of rollouts (B, n, T) cut at shares `at` (B, n_cut) of their length, then all (B G, T)."""
    copies = thought[:, -at.shape[1]:]
    end = (at * (model.n_thoughts(copies) + 1)).long()                              # (B, n_cut)
    behind = torch.arange(thought.shape[2], device=end.device) >= end[..., None]
    thought = torch.cat([copies.masked_fill(behind, model.config.end_thought), thought], dim=1).flatten(0, 1)
    return thought[:, :world.gather(model.n_thoughts(thought)).max() + 1]           # until all have ended


# ---- evaluation ----

@torch.no_grad()
def test(depth, unseen=True, thought=None):
    """Share of right answers, answers (n,), thoughts, questions (n, S) and their states (n, depth)."""
    generator = torch.Generator(world.device).manual_seed(seed + 1)
    question, states = draw(eval_questions, depth, generator, unseen)
    if thought is None:
        noise = torch.rand(len(question), n_thoughts(depth), generator=generator, device=world.device)
        thought = think(question, states, noise, temperature=0)
    answers = torch.cat([respond(*x)[2].argmax(1) for x in zip(question.split(1000), thought.split(1000))])
    return (answers == states[:, -1]).float().mean().item(), answers, thought, question, states


def evaluate(step):
    """Report on questions of depth k, show a few, keep the best checkpoint. Returns the numbers."""
    heldout_accuracy, answers, thought, question, states = test(k)
    result = {'depth': state['depth'].item(), 'codes': len(thought.unique()),
              'accuracy': test(k, unseen=False)[0], 'heldout_accuracy': heldout_accuracy}
    run.report(step, **result)
    run.show(config, question, thought, answers, states[:, -1], questions.names)
    run.save_best(step, heldout_accuracy, models, **state)
    return result


def draw_meaning():
    """HTML: how often each thought met each state, see counts below."""
    used = counts[:-1].sum(1).nonzero()[:, 0]
    used = used[counts[used].argmax(1).argsort()]       # by the state each is mostly written for
    figure = picture(1, f'What a thought means: purity {result["purity"]:.3f}')
    heat_map(figure, 1, counts[used].T, 'thought', used.tolist(), 'state', questions.names[:n_states])
    return figure.to_html()


# ---- training ----

n_steps, tested = run.first_step, None
for step in run.steps(run.first_step if eval_only else max_steps):
    if step % eval_every == 0:
        run.save(step, models, **state)
        result, tested = evaluate(step), step
        if run.best >= enough and state['depth'] == k:
            break
    schedule(optimizer, learning_rate, step, max_steps)
    greatest = state['depth'].item()        # a fifth of the steps is easier, or depth 1 is forgotten
    coin, which = torch.rand(2, generator=world.generator, device=world.device).tolist()
    depth = 1 + int(which * (greatest - 1)) if greatest > 1 and coin >= .8 else greatest
    if mixture:
        depth = 1 + int((shares.cumsum(0)[:-1] < which * shares.sum()).sum())
    question, states = (world.share(part) for part in draw(batch_size, depth))      # (B, S), (B, depth)
    with world.autocast:
        loss, right, seen = losses(question, states, step)
    loss.backward()
    world.mean_gradients(model.parameters())
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    optimizer.step()
    optimizer.zero_grad()
    for old, new in zip(models['lagged'].parameters(), model.parameters()) if 'lagged' in models else ():
        old.lerp_(new.detach(), .01)
    if depth == greatest:       # are answers good enough for deeper questions?
        share = world.gather(right).mean()
        state['accuracy'].lerp_(share, .05)
        if depth < k and state['accuracy'] >= advance_at:
            state |= {'depth': state['depth'] + 1, 'since': torch.tensor(step + 1), 'accuracy': 0 * share}
    if step % log_every == 0:
        run.log(step, depth=greatest, loss=loss.item(), gradient_norm=norm.item(),
                **{name: float(torch.as_tensor(x).detach()) for name, x in seen.items()})
    n_steps = step + 1

# ---- the last line ----

run.save(n_steps, models, **state)
result = result if tested == n_steps else evaluate(n_steps)
depths = {*range(1, min(k, 8) + 1), k, *(2**i for i in range(13) if 2**i <= k_most), k_most}
tests = {depth: test(depth) for depth in sorted(depths)}
result['accuracy_at_depth'] = {depth: found[0] for depth, found in tests.items()}
if n_thoughts(k):
    _, _, thought, _, states = tests[k]
    result['ablation'] = {n: test(k, thought=x)[0] for n, x in ablations(thought, thought_tokens).items()}
    result['thoughts_at_depth'] = {depth: model.n_thoughts(found[2]).float().mean().item()
                                   for depth, found in tests.items()}
    # counts[thought, state], (L + 1, M): how often thought t met the state after t operations
    T, counts = min(thought.shape[1], k), torch.zeros(d_thought_vocab + 1, n_states)
    counts.index_put_((thought[:, :T].cpu() - n_tokens, states[:, :T].cpu()), torch.ones(()), accumulate=True)
    result['purity'] = (counts[:-1].max(1).values.sum() / counts[:-1].sum().clamp(min=1)).item()
    run.draw('meaning.html', draw_meaning) if plot else None
run.finish(steps=n_steps, **result)

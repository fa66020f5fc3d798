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
import torch
import torch.nn.functional as F

import model as model_file
from model import KVCache, ModelConfig, ThinkingModelConfig, choice, lagged_copy, make_model
from utils import (Run, SerialTask, World, ablations, advantages, concentration, fail, heat_map, sample,
                   make_optimizer, picture, read_knobs, schedule)

# ---- knobs ----

task = 'add'                  # 'add' | 'plus' | 'perm' | 's5' | 'hop' | 'sort' | 'sat': see SerialTask in utils.py
input_max = 11                # M: states are 0..M-1, for 'add' a prime; 's5' has 120
n_letters = 10                # operations of 'perm' and 's5' to choose from; length of the lists of 'sort'
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
thoughts = 'own'              # 'own' | 'none' | 'filler' | 'random' | 'chain' | 'continuous': the last state is read again
search = 'sample'             # 'sample' | 'tree': of thoughts, each node scored as if the thought ended there
beam = 2                      # nodes of the tree that are expanded
lag = 0.                      # above 0: a copy that moves by this share a step
lagged_does = 'pays'          # 'pays' | 'thinks': what the lagged copy is for
different = 'none'            # 'none' | 'distance' | 'variance': a reward for being different
different_weight = 1.
attention_weight = 0.         # reward per share of attention that the answer pays to thoughts
answer_weight = 1.            # reward per log p(answer)
choose_among = 0              # above 0: at the end, choose among so many rollouts without knowing the answer
d_thought_vocab = 32          # L: thought tokens
think_len = 0                 # T: thoughts per question; 0: one less than operations, or k + 1 if not fixed
fixed = True                  # always T thoughts; False: up to T, end_thought ends them
think_cost = .1               # what a thought costs if their number is not fixed, nats
mixture = 0.                  # above 0: no schedule, depth d always has a share in proportion to d^-mixture
advance_at = .96              # share of right answers, a running mean, at which depth grows by one
group_size = 8                # G: rollouts of a question
baseline = 'group'            # 'group' | 'batch' | 'no_think' | 'value': their mean, or a lagged copy without thoughts
advantage = 'dr_grpo'         # 'dr_grpo' | 'grpo' | 'rloo' | 'softmax' | 'best' | 'batch_std' | 'quantile' |
                              # 'quantile_batch' | 'softmax_quantile' | 'softmax_centred': with baseline group
tau = 1.                      # temperature of the three softmax
code_price = 3.               # nats per log of a thought's overuse, so that no two states share a thought
epsilon = 0.                  # share of thoughts that are random; falls to zero over the first half
entropy_weight = .05          # of a bonus for entropy of thoughts when a depth is new; a fifth of it stays
eval_every = 500              # steps between evaluations, each with a checkpoint and samples
eval_questions = 2000         # questions per evaluation
log_every = 10                # steps between lines of metrics.jsonl
seed = 0                      # of weights, task, questions and thoughts
device = 'auto'               # auto, cpu, cuda, cuda:1, mps
dtype = 'float32'             # 'float32' | 'bfloat16'
init_from = 'scratch'         # scratch, resume, auto (resume what is there), or a checkpoint's path
eval_only = False             # evaluate, train nothing, write nothing
out_dir = ''                  # folder of the run; empty: out/add_think/<changed knobs>
wandb_mode = 'disabled'       # 'disabled' | 'offline' | 'online'
plot = False                  # draw what thoughts mean at the end: meaning.html, needs plotly

# ---- set-up ----

knobs = read_knobs(__file__, globals())
if baseline != 'group' and advantage != 'dr_grpo':
    fail(f'advantage={advantage} needs --baseline=group')
if group_size < 2 and baseline == 'group':
    fail(f'baseline=group compares the rollouts of a group: group_size={group_size} must be at least 2')
if not fixed and thoughts != 'own':
    fail(f'thoughts={thoughts} have no end to choose: --fixed=True')
world = World(knobs)

# ---- data ----

questions = SerialTask(task, input_max, n_letters, seed)
n_states, k_most = questions.n_states, max(k, k_test)
if task == 'sort' and k_most > n_letters:
    fail(f'a list of n_letters={n_letters} has no number {k_most} in order')
if thoughts == 'chain' and (d_thought_vocab < n_states or think_len):
    fail(f'thoughts=chain needs --d_thought_vocab={n_states} or more, one for each state, and --think_len=0')
shares = torch.arange(1, k + 1.) ** -mixture            # of depths 1 to k in a mixture
hashing = torch.randint(2**24, (questions.n_prefix + k + 2,), generator=torch.Generator().manual_seed(seed))


def draw(n, depth, generator=world.generator, test=False):
    """n questions (n, S) of a depth and their states (n, depth) after each operation; test: held-out ones."""
    parts = []
    while sum(len(question) for question, _ in parts) < n:
        question, states = questions.draw(2 * n, depth, generator)
        if depth == k and heldout:      # split by a hash, as there are too many questions to list
            chance = (question * hashing.to(question.device)).sum(1)
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
    """Positions (S,) of a question's tokens. recount: '=' sits at the start, thought t at operation t."""
    position = torch.arange(question.shape[1], device=question.device)
    position[-1] = questions.n_prefix if recount else position[-1]
    return position


# ---- model, optimiser, run ----

n_tokens = len(questions.names)
thought_tokens = range(n_tokens, n_tokens + d_thought_vocab)
shape = dict(n_layer=n_layer, n_head=n_head, d_model=d_model, position_encoding=position_encoding,
             init='unit', tie_weights=False,
             block_size=questions.n_prefix + k_most + 3 + (think_len or k_most + 1))
config = (ModelConfig(d_vocab=n_tokens, **shape) if thoughts == 'none' else
          ThinkingModelConfig(d_normal_vocab=n_tokens, d_thought_vocab=d_thought_vocab, **shape))
model = make_model(config, knobs.checkpoint).to(world.device)
models = {'model': model}
if baseline == 'no_think':
    models['lagged'] = lagged_copy(model, knobs.checkpoint)
if lag:
    models['lagged'] = lagged_copy(model, knobs.checkpoint)
optimizer = make_optimizer(model, learning_rate, weight_decay)
optimizers = [optimizer]
if baseline == 'value':
    models['value'] = make_model(config, knobs.checkpoint, 'value').to(world.device)
    optimizers.append(make_optimizer(models['value'], learning_rate, weight_decay))
run = Run(knobs, world, optimizers)
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
        if search == 'tree' and not sampling.get('greedy') and 'temperature' not in sampling:
            return tree(question, states, noise, lambda q, log_q: log_q.gather(-1, states[:, -1, None, None]
                        .expand(-1, log_q.shape[1], 1))[..., 0])
        writer = models['lagged'] if lag and lagged_does == 'thinks' and torch.is_grad_enabled() else model
        return writer.think(question, noise.shape[1], fixed=fixed, positions=places(question),
                           n_rollouts=len(noise) // len(question), noise=noise, **sampling).tokens
    if thoughts == 'chain':
        return thought_tokens.start + states[:, :-1]
    return thought_tokens.start + (noise * d_thought_vocab * (thoughts == 'random')).long()


@torch.no_grad()
def tree(question, states, noise, score):
    """Thoughts (B G, T): at each level `beam` nodes of a question get G / beam children each, sampled; the best
    of these G by log p(answer), as if the thought ended there, are the next nodes."""
    B, T = len(question), noise.shape[1]
    G = len(noise) // B
    cache, position = KVCache(), places(question)
    state = model.hidden(question, cache, position)[:, -1]
    cache.repeat(G)
    state, written = state.repeat_interleave(G, 0), noise.new_zeros(B * G, 0).long()
    for t in range(T):
        logits = model.logits(state, range(n_tokens, n_tokens + d_thought_vocab))
        token = n_tokens + sample(logits, noise[:, t])
        written = torch.cat([written, token[:, None]], 1)
        state = model.hidden(token[:, None], cache, position[-1:] + 1 + t)[:, -1]
        if t < T - 1:
            log_q = model.logits(state, range(n_states)).float().log_softmax(-1).view(B, G, -1)
            best = score(written, log_q).topk(beam, 1).indices.repeat_interleave(G // beam, 1)     # (B, G)
            rows = (best + G * torch.arange(B, device=best.device)[:, None]).flatten()
            cache.select(rows)
            state, written = state[rows], written[rows]
    return written


def muse(question, T, given=None):
    """Continuous thoughts (N, T, d_model) after questions (N, S), and log-probabilities of answers."""
    cache, position, mark = KVCache(), places(question), model.embed(question.new_full((1, 1), n_tokens))
    state, written = model.hidden(question, cache, position)[:, -1:], []
    for t in range(T if given is None else given.shape[1]):
        written.append(state if given is None else given[:, t:t + 1])
        state = model.layers(written[-1] + mark, cache, position[-1:] + 1 + t)
    written = torch.cat(written, 1) if written else state[:, :0]
    return written, model.logits(state[:, -1], range(n_states)).float().log_softmax(-1)


def values(question, thought):
    """Predicted rewards (N, T + 1) of questions (N, S) with the first 0 to T of thoughts (N, T)."""
    by, (S, T) = models['value'], (question.shape[1], thought.shape[1])
    position = torch.cat([places(question), places(question)[-1] + 1 + torch.arange(T, device=question.device)])
    states = by.hidden(torch.cat([question, thought], 1), None, position)[:, S - 1:]
    return by.logits(states, range(1))[..., 0].float()


def attention_to(question, thought):
    """Shares (N,) of the last layer's attention at the answer that thoughts get, mean over heads."""
    kept, plain = {}, model_file.attention
    def keep(q, k, v, mask=None, dropout=0.):
        kept.update(q=q, k=k, v=v, mask=mask)
        return plain(q, k, v, mask, dropout)
    model_file.attention = keep
    with torch.no_grad():
        model.think_and_answer(question, thought, fixed, places(question))
    model_file.attention = plain
    q, k, mask, S = kept['q'][:, :, -1:], kept['k'], kept['mask'], question.shape[1]
    score = q @ k.transpose(-2, -1) * q.shape[-1] ** -.5
    if mask is not None:
        score = score + (mask[..., -1:, :] if mask.dtype != torch.bool else 0)
    share = score.softmax(-1)[:, :, 0]
    size = kept['v'].norm(dim=-1)
    return share[..., S:].sum(-1).mean(1), size[..., S:].mean().item() / size[..., :S].mean().item()


def respond(question, thought, by=model):
    """Log-probabilities and entropies (N, T) of thoughts, log-probabilities (N, M) of answers."""
    if thoughts == 'continuous':
        log_q = muse(question, thought.shape[1])[1]
        return log_q[:, :0], log_q[:, :0], log_q
    if thoughts == 'none':
        logits = by(question, None, places(question))[:, -1]
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
    thought = think(question, states, noise, epsilon=epsilon * max(0, 1 - 2 * step / max_steps))
    if n_cut:
        thought = add_copies(thought.view(B, -1, T), world.draw(batch_size, G)[:, :n_cut])
    question, answer = question.repeat_interleave(G, dim=0), states[:, -1].repeat_interleave(G)
    log_pi, entropy, log_q = respond(question, thought)                     # (B G, T), (B G, n_states)
    log_p_answer = log_q.gather(1, answer[:, None]).view(B, G)
    loss, seen = -log_p_answer.mean(), {}
    if thoughts == 'chain':
        loss = loss - log_pi.sum(1).mean()
    elif thoughts == 'own' and T:
        if baseline == 'no_think':      # what the lagged copy is to learn
            loss = loss + F.nll_loss(respond(question[::G], thought[::G, :0])[2], answer[::G])
        paid = log_p_answer.detach()
        if lag and lagged_does == 'pays':
            with torch.no_grad():
                paid = respond(question, thought, models['lagged'])[2].gather(1, answer[:, None]).view(B, G)
        weights, seen = pay(question[::G], thought, answer[::G], paid)
        new = max(0, 1 - (step - state['since'].item()) / 300)      # 1 to 0 in a depth's first 300 steps
        bonus = entropy_weight / 5 + (entropy_weight - entropy_weight / 5) * new
        if baseline == 'value':
            V = values(question, thought)                                       # (B G, T + 1)
            whole = seen.pop('rewards').view(-1, 1)
            loss = loss + (V - whole).square().mean()
            per_thought = (whole - V[:, :-1].detach()) / G
            gain = (per_thought * log_pi).sum(1).view(B, G)
            seen |= {'value_error': (V - whole).square().mean(0)[-1].sqrt()}
        else:
            gain = weights * log_pi.sum(1).view(B, G)
        loss = loss - gain.sum(1).mean() - bonus * entropy.sum(1).mean()
        seen |= {'entropy': entropy.mean(), 'log_prob': log_pi.mean(), **concentration(weights)}
    return loss, (log_q.argmax(-1) == answer).view(B, G)[:, n_cut:].float(), seen


def pay(question, thought, answer, rewards):
    """Weights (B, G) of rollouts, and what to log. They are paid rewards (B, G), that is log p(answer), less
    what their thoughts (B G, T) cost, compared with a baseline."""
    if not fixed:
        rewards = rewards - think_cost * model.n_thoughts(thought).view(rewards.shape)
    seen = {'variance': rewards.exp().var(1, correction=0).mean()}
    size = {'distance': lambda R: (R - R.mean(1, keepdim=True)).abs(),
            'variance': lambda R: (R.exp() - R.exp().mean(1, keepdim=True)).square()}
    rewards = answer_weight * rewards + (different_weight * size[different](rewards) if different != 'none' else 0)
    if attention_weight:
        share, seen['value_norm'] = attention_to(question.repeat_interleave(rewards.shape[1], 0), thought)
        rewards = rewards + attention_weight * share.view(rewards.shape)
        seen['attention'] = share.mean()
    rewards = rewards - code_price * overuse(thought).view(rewards.shape)
    everyone = world.gather(rewards)
    base = everyone.mean() if baseline == 'batch' else 0.
    if baseline == 'no_think':
        base = respond(question, question[:, :0], models['lagged'])[2].gather(1, answer[:, None])
    weights = advantages(rewards, advantage if baseline in ('group', 'value') else 'reinforce', tau, base, everyone)
    if baseline == 'value':
        seen['rewards'] = rewards
    return weights, seen | {'reward': rewards.mean(), 'reward_std_in_group': rewards.std(1, correction=0).mean(),
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
    parts = zip(question.split(1000), thought.split(1000))
    answers = torch.cat([respond(*part)[2].argmax(-1) for part in parts])
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
    for each in optimizers:
        schedule(each, learning_rate, step, max_steps)
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
    for each in optimizers:
        each.step()
        each.zero_grad()
    for old, new in zip(models['lagged'].parameters(), model.parameters()) if 'lagged' in models else ():
        old.lerp_(new.detach(), lag or .01)
    if depth == greatest:       # are answers good enough for deeper questions?
        share = world.gather(right).mean()
        state['accuracy'].lerp_(share, .05)
        if depth < k and state['accuracy'] >= advance_at:
            state |= {'depth': state['depth'] + 1, 'since': torch.tensor(step + 1), 'accuracy': 0 * share}
    if step % log_every == 0:
        run.log(step, depth=greatest, loss=loss.item(), gradient_norm=norm.item(),
                **{name: float(torch.as_tensor(x).detach()) for name, x in seen.items()})
    n_steps = step + 1

@torch.no_grad()
def choose(n, depth, questions_=500):
    """Accuracy of ways to choose among n sampled rollouts, without knowing the answer."""
    generator = torch.Generator(world.device).manual_seed(seed + 2)
    question, states = draw(questions_, depth, generator, True)
    noise = torch.rand(questions_ * n, n_thoughts(depth), generator=generator, device=world.device)
    thought = model.think(question, noise.shape[1], fixed=fixed, positions=places(question), n_rollouts=n, noise=noise).tokens
    many = question.repeat_interleave(n, 0)
    log_pi, _, log_q = respond(many, thought)
    answers, right = log_q.argmax(-1).view(-1, n), states[:, -1:]
    votes = F.one_hot(answers, n_states).sum(1).argmax(-1, keepdim=True)
    pick = lambda score: answers.gather(1, score.view(-1, n).argmax(1, keepdim=True))
    found = {'one': answers, 'vote': votes, 'log_prob': pick(log_pi.sum(1)), 'confidence': pick(log_q.amax(-1)),
             'log_prob + confidence': pick(log_pi.sum(1) + log_q.amax(-1))}
    if 'value' in models:
        V = values(many, thought)[:, -1]
        found |= {'value': pick(V), 'value_vote': (F.one_hot(answers, n_states) * V.view(-1, n, 1).exp()).sum(1).argmax(-1, keepdim=True)}
        by_value = tree(question, states, noise, lambda w, log_q: values(question.repeat_interleave(n, 0), w)[:, -1].view(-1, n)) if n >= beam else thought
        log_q = respond(many, by_value)[2]
        V = values(many, by_value)[:, -1]
        answers = log_q.argmax(-1).view(-1, n)
        found['value_tree'] = pick(V)
    found['any'] = torch.where((answers == right).any(1, keepdim=True), right, -1)
    return {name: (x == right).float().mean().item() for name, x in found.items()}


# ---- the last line ----

run.save(n_steps, models, **state)
result = result if tested == n_steps else evaluate(n_steps)
depths = {*range(1, min(k, 8) + 1), k, *(2**i for i in range(13) if 2**i <= k_most), k_most}
tests = {depth: test(depth) for depth in sorted(depths)}
result['accuracy_at_depth'] = {depth: found[0] for depth, found in tests.items()}
if n_thoughts(k):
    _, _, thought, _, states = tests[k]
    if thoughts == 'continuous':
        with torch.no_grad():
            generator = torch.Generator(world.device).manual_seed(seed + 1)
            question, states = draw(eval_questions, k, generator, True)
            T = n_thoughts(k)
            own = muse(question, T)[0]
            order = torch.randperm(len(own), generator=torch.Generator().manual_seed(0))
            answer = states[:, -1]
            result['ablation'] = {name: (muse(question, T, x)[1].argmax(-1) == answer).float().mean().item()
                for name, x in {'own': own, 'shuffled': own[order], 'constant': own[:1].expand_as(own), 'none': own[:, :0]}.items()}
    else:
        result['ablation'] = {n: test(k, thought=x)[0] for n, x in ablations(thought, thought_tokens).items()}
    if attention_weight:
        share, size = attention_to(tests[k][3][:512], thought[:512])
        result |= {'attention': share.mean().item(), 'value_norm': size}
    result['thoughts_at_depth'] = {depth: model.n_thoughts(found[2]).float().mean().item()
                                   for depth, found in tests.items()}
    # counts[thought, state], (L + 1, M): how often thought t met the state after t operations
    T, counts = min(thought.shape[1], k), torch.zeros(d_thought_vocab + 1, n_states)
    at = thought[:, :T].cpu() - n_tokens, states[:, :T].cpu()
    counts.index_put_(at, torch.tensor(1.), accumulate=True)
    result['purity'] = (counts[:-1].max(1).values.sum() / counts[:-1].sum().clamp(min=1)).item()
    run.draw('meaning.html', draw_meaning) if plot else None
if choose_among:
    result['choose'] = {d: {n: choose(n, d) for n in (1, 2, 4, 8, 16, 32, 64) if n <= choose_among} for d in {k, k_most}}
run.finish(steps=n_steps, **result)

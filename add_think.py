"""
Thoughts between question and answer, on problems that need them: work that is done step by step.

    a start, k operations, =   ->   T thoughts   ->   answer

One model reads the question, writes thoughts and answers; it sees both. Nobody tells it what a thought means, and no
step in between is ever shown: it is paid for its answers only, log p(answer | question, thoughts).

    python add_think.py                                                    # ((7 + 3) x 5 + 9) ... % 11, six operations
    python add_think.py --thoughts=none                                    # the control: answers at once
    python add_think.py --task=perm --input_max=10                         # permutations of ten things
    python add_think.py --fixed=False                                      # as many thoughts as are worth their cost
    python add_think.py --init_from=out/add_think/thoughts=none/ckpt.pt --thoughts=own     # a normal model, grown
    python add_think.py --init_from=resume                                 # go on after an interruption
    torchrun --standalone --nproc_per_node=2 add_think.py                  # the same update, by two processes

Each step: a batch of questions of one depth, that is, number of operations; G rollouts of thoughts for each; the policy
gradient (Williams 1992) on the thoughts, with the mean reward of the question's group as baseline, as in Dr. GRPO (Liu
et al. 2025); cross-entropy on the answers. There is no clipping, no KL term and no importance weight (also not with
epsilon, which changes how rollouts are sampled), as each rollout is used once. Questions get deeper by one operation as
soon as enough answers are right, so what was an answer at one depth is worth thinking at the next. That is a kind of
supervision, though not of thoughts.

What makes it quick: the answer is read at the last thought, where another thought would be written, so that the same
weights work out a state, be it to answer it or to think it. Thoughts count as from the start again, thought t as
operation t, and attention sees distances: every step looks like every other (position coupling, Cho et al. 2024). And
codes that are written more often than answers come up cost something, or two states would share one for good.
"""
import copy

import torch
import torch.nn.functional as F

from model import ModelConfig, ThinkingModelConfig, make_model, pack
from utils import (Run, SerialTask, World, ablations, advantages, concentration, fail, make_optimizer, need, paint,
                   read_knobs, schedule, show_tokens, some_rollouts, user_errors)

# ---- knobs ----------------------------------------------------------------------------------------------------------

task = 'add'                    # 'add' | 'perm' | 's5' | 'hop' | 'sort': see SerialTask in utils.py
input_max = 11                  # M: states are 0..M-1, for 'add' a prime; 's5' has 120
ops = '+*'                      # '+*' | '+': operations of 'add'
n_letters = 10                  # operations of 'perm' and 's5' to choose from; length of the lists of 'sort'
k = 6                           # depth: operations per question
k_test = 0                      # greatest depth that is tested; above k nothing is trained. 0: k
heldout = .1                    # share of the questions of depth k that is never trained on
batch_size = 32                 # questions per step, over all processes
max_steps = 8000                # updates; the learning rate falls to zero over their second half
enough = 1.                     # share of right answers to held-out questions that ends training; above 1: none
max_seconds = 1e6               # stop after this wall-clock time
learning_rate = 2e-3
weight_decay = 0.
warmup_steps = 50               # steps over which the learning rate rises
n_layer = 1
n_head = 4
d_model = 64
positions = 'relative'          # 'relative' | 'rotary' | 'learned'
recount = True                  # thoughts count as from the start again, thought t as operation t
thoughts = 'own'                # 'own' | 'none' | 'filler' | 'random' | 'chain': chain is the true states, supervised
d_thought_vocab = 32            # L: thought tokens
think_len = 0                   # T: thoughts per question; 0: one less than its operations, if not fixed k + 1 for all
fixed = True                    # always T thoughts; False: up to T, end_thought ends them
think_cost = .1                 # what a thought costs if their number is not fixed, nats
cut = .5                        # share of a group that are copies of others, cut short at random, if it is not fixed
answer_at = 'last'              # 'last' | 'end': the answer is read at the last thought, or at end_thought behind it
hardest = .8                    # share of steps with questions of the greatest depth so far; the others are of any less
advance_at = .96                # share of right answers, a running mean, at which depth grows by one
group_size = 8                  # G: rollouts of a question
rollouts_per_update = 0         # rollouts of a group, drawn by chance, that thoughts are learned from; 0: all
baseline = 'group'              # 'group' | 'batch' | 'no_think': mean of the group, of all, or a lagged copy's log p
advantage = 'dr_grpo'           # 'dr_grpo' | 'grpo' | 'rloo' | 'softmax' | 'best' | 'batch_std' | 'quantile' |
                                # 'quantile_batch' | 'softmax_quantile' | 'softmax_centred': with baseline group
tau = 1.                        # temperature of the three softmax
code_price = 3.                 # price of a code, nats per log of how much too often it is written
memory = .9                     # share of the counts of written codes that is kept per step
epsilon = 0.                    # share of a rollout's thoughts that are drawn at random
entropy_weight = .05            # of a bonus for the entropy of thoughts, when a depth is new
entropy_steps = 300             # steps over which it falls
entropy_end = .01               # to this, so that a name can still be changed
eval_every = 500                # steps between evaluations, each with a checkpoint and samples
eval_questions = 2000           # questions per evaluation
log_every = 10                  # steps between lines of metrics.jsonl
seed = 0                        # of weights, task, questions and thoughts
device = 'auto'                 # auto, cpu, cuda, cuda:1, mps
dtype = 'float32'               # 'float32' | 'bfloat16'
init_from = 'scratch'           # scratch, resume, or the path of a checkpoint to take weights from
eval_only = False               # evaluate, train nothing, write nothing
out_dir = ''                    # folder of the run; empty: out/add_think/<changed knobs>
wandb_mode = 'disabled'         # 'disabled' | 'offline' | 'online'
plot = False                    # draw what thoughts mean at the end: meaning.html, needs plotly; not with eval_only

# ---- set-up ---------------------------------------------------------------------------------------------------------

knobs = read_knobs(__file__, globals())
thinks = thoughts == 'own'
if baseline != 'group' and 'advantage' in knobs.changed:
    fail(f'advantage={advantage} needs --baseline=group')
if group_size < 2 and thinks and baseline == 'group':
    fail(f'baseline=group compares the rollouts of a group: group_size={group_size} must be at least 2')
if rollouts_per_update > group_size:
    fail(f'rollouts_per_update={rollouts_per_update} are some of a group of group_size={group_size}')
if not fixed and not thinks:
    fail(f'thoughts={thoughts} have no end to choose: --fixed=True')
if thoughts == 'none' and answer_at == 'end':
    fail('a model without thoughts answers at the question\'s last token: --answer_at=last')
world = World(knobs)

# ---- data -----------------------------------------------------------------------------------------------------------

with user_errors():
    questions = SerialTask(task, input_max, ops, n_letters, seed)
n_states, k_most = questions.n_states, max(k, k_test)
if task == 'sort' and k_most > n_letters:
    fail(f'a list of n_letters={n_letters} has no number {k_most} in order')
if thoughts == 'chain' and (d_thought_vocab < n_states or think_len):
    fail(f'thoughts=chain are {n_states} states, one less than operations: a larger --d_thought_vocab, --think_len=0')
hashing = torch.randint(2**24, (questions.n_prefix + k + 2,), generator=torch.Generator().manual_seed(seed))


def draw(n, depth, generator=world.generator, test=False):
    """n questions (n, S) of a depth and their states (n, depth) after each operation; of depth k, test or training."""
    parts, missing = [], n
    while missing > 0:
        question, states = questions.draw(2 * n, depth, generator)
        if depth == k and heldout:
            chance = (question * hashing.to(question.device)).sum(1)
            for _ in range(2):      # mix the bits
                chance = (chance ^ chance >> 15) * 0x9E3779B1 & 0xFFFFFFFF
            keep = (chance / 2**32 < heldout) == test
            question, states = question[keep], states[keep]
        parts.append((question, states))
        missing -= len(question)
        if len(parts) > 1000:
            fail(f'heldout={heldout} leaves no questions to {"test" if test else "train"} among so few')
    return [torch.cat(part)[:n] for part in zip(*parts)]


def n_thoughts(depth):
    """T for questions of a depth."""
    return 0 if thoughts == 'none' else think_len or (depth - 1 if fixed else k + 1)


def places(question):
    """Positions (S,) of the tokens of questions; with recount the '=', which thoughts follow, is at the start."""
    position = torch.arange(question.shape[1], device=question.device)
    position[-1] = questions.n_prefix if recount else position[-1]
    return position


# ---- model ----------------------------------------------------------------------------------------------------------

shape = dict(block_size=questions.n_prefix + k_most + 3 + (think_len or k_most + 1), n_layer=n_layer, n_head=n_head,
             d_model=d_model, init='unit', tie_weights=False, positions=positions)
n_tokens = len(questions.names)
with user_errors():
    if thoughts == 'none':
        config = ModelConfig(d_vocab=n_tokens, **shape)
    else:
        config = ThinkingModelConfig(d_normal_vocab=n_tokens, d_thought_vocab=d_thought_vocab, **shape)
    model = make_model(config, knobs.checkpoint).to(world.device)
models = {'model': model}
if baseline == 'no_think':      # a lagged copy that answers at once
    models['lagged'] = copy.deepcopy(model).requires_grad_(False)
    if init_from == 'resume':
        models['lagged'].load_state_dict(make_model(config, knobs.checkpoint, 'lagged').state_dict())
thought_tokens = range(n_tokens, n_tokens + d_thought_vocab)

# ---- optimiser and run ----------------------------------------------------------------------------------------------

optimizer = make_optimizer(model, learning_rate, weight_decay)
run = Run(knobs, world, [optimizer])
state = {'depth': torch.tensor(1),              # greatest so far
         'since': torch.tensor(0),              # step at which it was new
         'accuracy': torch.tensor(0.),          # running mean of right answers to questions of this depth
         'baseline': torch.tensor(0.),          # running mean of rewards
         'frequency': torch.full((max(1, n_thoughts(k)), d_thought_vocab + 1), 1 / n_states)}   # of codes, by position
if init_from == 'resume':
    state = {name: knobs.checkpoint[name] for name in state}
elif knobs.checkpoint and knobs.checkpoint['script'] == knobs.script:      # what it has learned stays learned
    state['depth'] = knobs.checkpoint['depth']
state = {name: x.to(world.device) for name, x in state.items()}


def save(step, file='ckpt.pt'):
    run.save(step, {name: pack(each) for name, each in models.items()}, file, **state)


# ---- thinking and answering -----------------------------------------------------------------------------------------

def think(question, states, noise, **how):
    """The thoughts (N, T) of questions (B, S) with states (B, depth), by noise (N, T); N / B rollouts of each."""
    N, T = noise.shape
    if thoughts == 'chain':
        return thought_tokens.start + states[:, :-1]
    if thoughts == 'filler':
        return torch.full((N, T), thought_tokens.start, device=noise.device)
    if thoughts == 'random' or T == 0:
        return thought_tokens.start + (noise * d_thought_vocab).long()
    return model.think(question, T, fixed=fixed, positions=places(question), n_rollouts=N // len(question),
                       noise=noise, **how).tokens


def respond(question, thought, by=model):
    """
    Log-probabilities and entropies (N, T) of thoughts (N, T) after questions (N, S), and the log-probabilities
    (N, n_states) of answers after both; all with gradient.
    """
    if thoughts == 'none':
        log_pi = entropy = torch.zeros(len(question), 0, device=question.device)
        logits = by(question, None, places(question))[:, -1]
    else:
        log_pi, entropy, logits = by.think_and_answer(question, thought, fixed, answer_at == 'end', places(question))
    return log_pi, entropy, logits[:, :n_states].float().log_softmax(-1)


# ---- evaluation -----------------------------------------------------------------------------------------------------

@torch.no_grad()
def test(depth, n=eval_questions, heldout=True):
    """Questions of a depth that are not trained on, greedy thoughts, answers, and the share that is right."""
    generator = torch.Generator(world.device).manual_seed(seed + 1)
    question, states = draw(n, depth, generator, heldout)
    noise = torch.rand(n, n_thoughts(depth), generator=generator, device=world.device)
    thought = think(question, states, noise, temperature=0) if thinks else think(question, states, noise)
    return question, states, thought, *judge(question, states, thought)


@torch.no_grad()
def judge(question, states, thought):
    """Answers (n,) after thoughts (n, T), and the share that is right."""
    answers = torch.cat([respond(*parts)[2].argmax(-1) for parts in zip(question.split(1000), thought.split(1000))])
    return answers, (answers == states[:, -1]).float().mean().item()


def meaning(states, thought):
    """How often each thought (n, T) was written as the t-th when the state after t operations was this: (L, M)."""
    T = min(thought.shape[1], states.shape[1])
    pairs = torch.stack([thought[:, :T] - n_tokens, states[:, :T]], dim=-1).flatten(0, 1)
    pairs = pairs[pairs[:, 0] < d_thought_vocab]        # without end_thought
    counts = (pairs[:, 0] * n_states + pairs[:, 1]).bincount(minlength=d_thought_vocab * n_states)
    return counts.view(d_thought_vocab, n_states)


def purity(counts):
    """Share of thoughts that were written for the state that each of them is written for most."""
    return (counts.max(1).values.sum() / counts.sum().clamp(min=1)).item()


def length(thought):
    """Mean number of thoughts."""
    return thought.shape[1] if fixed else model.n_thoughts(thought).float().mean().item()


def evaluate(step):
    """Report on questions of depth k, show a few, keep the best checkpoint. Returns the numbers."""
    question, states, thought, answers, heldout_accuracy = test(k)
    result = {'depth': state['depth'].item()}
    if n_thoughts(k):
        result |= {'thoughts': length(thought), 'codes': len(thought.unique()),
                   'purity': purity(meaning(states, thought))}
    result |= {'accuracy': test(k, heldout=False)[-1], 'heldout_accuracy': heldout_accuracy}
    run.report(step, **result)
    for q, t, answer, right in zip(question[:3], thought, answers, states[:, -1]):
        shown = [paint(questions.names[i], 'blue') for i in q.tolist()]
        if len(t):
            shown.append(show_tokens(t[:model.n_thoughts(t[None])], config))
        if thoughts != 'none':
            shown.append(paint('<end_thought>', 'magenta'))
        run.sample(' '.join([*shown, paint(questions.names[answer], 'blue')]), right=answer == right)
    if heldout_accuracy > run.best:
        run.best = heldout_accuracy
        save(step, 'best.pt')
    return result


def show_meaning(states, thought):
    """Print which thoughts (n, T) are written for which state (n, k), and draw it: meaning.html."""
    counts = meaning(states, thought)
    for value in range(min(n_states, 12)):
        most = counts[:, value].topk(min(3, d_thought_vocab))
        codes = ', '.join(f'{paint(f"<think{code}>", "cyan")} {n / counts[:, value].sum():.0%}'
                          for n, code in zip(most.values.tolist(), most.indices.tolist()) if n)
        run.print(f'{questions.names[value]:>3}: {codes}')
    run.print(f'{purity(counts):.1%} of thoughts are written for the state that they mostly mean')
    if plot and run.writes:
        figure = need('plotly.graph_objects', 'to draw pictures').Figure()
        used = (counts.sum(1) > 0).nonzero()[:, 0]
        used = used[counts[used].argmax(1).argsort()]       # by the state each is written for
        figure.add_heatmap(z=counts[used].T.cpu().numpy(), x=[f'think{i}' for i in used.tolist()],
                           y=questions.names[:n_states], colorscale='Blues', colorbar={'title': 'thoughts'})
        figure.update_layout(title=f'What a thought means: purity {purity(counts):.3f}', width=900, height=700)
        figure.update_xaxes(title='thought', type='category')
        figure.update_yaxes(title='state after as many operations', type='category')
        run.picture('meaning.html', figure)


# ---- training -------------------------------------------------------------------------------------------------------

def overuse(thought):
    """What thoughts (N, T) cost at a price of 1: log of how much more often a code is written than an answer is due."""
    used = F.one_hot(world.gather(thought) - n_tokens, d_thought_vocab + 1).float().mean(0)     # (T, L + 1)
    frequency = state['frequency'][:len(used)].lerp_(used, 1 - memory)
    share = frequency[torch.arange(len(used), device=used.device), thought - n_tokens]          # (N, T)
    excess = (share * n_states / 1.2).clamp(min=1).log()        # a fifth more is chance
    return excess.masked_fill(thought == model.config.end_thought, 0.).sum(1)


n_steps, tested = run.first_step, None
for step in run.steps(run.first_step, run.first_step if eval_only else max_steps):
    if step % eval_every == 0:
        save(step)
        result, tested = evaluate(step), step
        if run.best >= enough and state['depth'] == k:
            break
    schedule(optimizer, learning_rate, step, max_steps, warmup_steps)

    # a batch of questions of one depth; every process draws all of it and takes its share
    depth = greatest = state['depth'].item()
    easier, less = torch.rand(2, generator=world.generator, device=world.device).tolist()
    if depth > 1 and easier >= hardest:
        depth = 1 + int(less * (depth - 1))
    question, states = (world.share(part) for part in draw(batch_size, depth))      # (B, S), (B, depth)
    T = n_thoughts(depth)
    G = group_size if thoughts in ('own', 'random') and T else 1
    n_cut = 0 if fixed else int(cut * G)            # of a group
    noise = world.draw(torch.rand, batch_size, G - n_cut, T).flatten(0, 1)          # (B (G - n_cut), T)
    whole = torch.arange(len(question) * G, device=world.device) % G >= n_cut       # (B G,)
    answer = states[:, -1].repeat_interleave(G)                                     # (B G,)

    with world.autocast:
        # rollouts; if their number of thoughts is not fixed, some again, cut short, to see what fewer would have done
        thought = think(question, states, noise, **({'epsilon': epsilon} if thinks else {}))
        if not fixed:
            which = torch.arange(-n_cut, G - n_cut, device=world.device) % (G - n_cut)              # (G,) of the whole
            thought = thought.view(len(question), -1, T)[:, which].flatten(0, 1)                    # (B G, T)
            end = model.n_thoughts(thought)                                                         # (B G,)
            at = world.draw(torch.rand, batch_size, G).flatten()
            end = torch.where(whole, end, (at * (end + 1)).long())
            thought = thought.masked_fill(torch.arange(T, device=end.device) >= end[:, None], model.config.end_thought)
            thought = thought[:, :world.gather(end).max() + 1]      # what is longer is nobody's
        question = question.repeat_interleave(G, dim=0)
        log_pi, entropy, log_q = respond(question, thought)
        right = log_q.gather(1, answer[:, None]).view(-1, G)                        # (B, G) log p(answer)
        loss = -right.mean()

        # what the thoughts are paid, compared with the baseline
        if thinks and T:
            rewards = right.detach()
            if not fixed:
                rewards = rewards - think_cost * model.n_thoughts(thought).view(-1, G)
            if code_price:
                rewards = rewards - code_price * overuse(thought).view(-1, G)
            base = state['baseline']
            if baseline == 'no_think':
                nothing = thought[::G, :0]
                loss = loss + F.nll_loss(respond(question[::G], nothing)[2], answer[::G])
                with torch.no_grad():
                    base = respond(question[::G], nothing, models['lagged'])[2].gather(1, answer[::G, None])    # (B, 1)
            everybody = world.gather(rewards)
            weights = advantages(rewards, advantage if baseline == 'group' else 'reinforce', tau, base, everybody)
            counted = weights                                                       # (B, G)
            if rollouts_per_update:
                counted = some_rollouts(weights, rollouts_per_update, world.draw(torch.rand, batch_size, G))
            state['baseline'].lerp_(everybody.mean(), .1)
            new = max(0, 1 - (step - state['since'].item()) / max(1, entropy_steps))      # falls from 1 to 0
            bonus = entropy_end + (entropy_weight - entropy_end) * new
            loss = loss - (counted * log_pi.sum(1).view(-1, G)).sum(1).mean() - bonus * entropy.sum(1).mean()
        elif thoughts == 'chain':
            loss = loss - log_pi.sum(1).mean()
    loss.backward()
    world.mean_gradients(model.parameters())
    if step % log_every == 0:
        logged = {'depth': greatest, 'loss': loss.item(), 'gradient_norm': torch.nn.utils.get_total_norm(
            [p.grad for p in model.parameters()]).item()}
    optimizer.step()
    optimizer.zero_grad()
    if baseline == 'no_think':
        for old, new in zip(models['lagged'].parameters(), model.parameters()):
            old.lerp_(new.detach(), .01)

    # are answers good enough for deeper questions?
    if depth == greatest:
        share = world.gather((log_q.argmax(-1) == answer).float())[world.gather(whole)].mean()
        share = share.nan_to_num(0.)        # of none
        state['accuracy'].lerp_(share, .05)
        if depth < k and state['accuracy'] >= advance_at:
            state |= {'depth': state['depth'] + 1, 'since': torch.tensor(step + 1), 'accuracy': 0 * share}

    if step % log_every == 0:
        if thinks and T:        # collapse shows here
            logged |= {'reward': rewards.mean().item(),
                       'reward_std_in_group': rewards.std(1, correction=0).mean().item(),
                       'entropy': entropy.mean().item(), 'distinct_thoughts': len(thought.unique()),
                       'log_prob': log_pi.mean().item(), **concentration(weights),
                       'epsilon': epsilon, 'thoughts': length(thought)}
        run.log(step, **logged)
    n_steps = step + 1

# ---- the last line --------------------------------------------------------------------------------------------------

if tested != n_steps:
    save(n_steps)
    result = evaluate(n_steps)
depths = sorted({*range(1, min(k, 8) + 1), k, *(2**i for i in range(13) if 2**i <= k_most), k_most})
tests = {depth: test(depth) for depth in depths}
result['accuracy_at_depth'] = {depth: accuracy for depth, (*_, accuracy) in tests.items()}
if not fixed:
    result['thoughts_at_depth'] = {depth: length(thought) for depth, (_, _, thought, *_) in tests.items()}
if n_thoughts(k):
    question, states, thought, *_ = tests[k]
    result['ablation'] = {name: judge(question, states, replaced)[1]
                          for name, replaced in ablations(thought, thought_tokens).items()}
    show_meaning(states, thought)
run.finish(steps=n_steps, **result)

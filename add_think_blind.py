"""
Blind addition: two policies invent a language, and answer every question in it.

    question a, b  ->  thinking policy  ->  T thoughts  ->  answering policy  ->  (a + b) % M

The answering policy sees nothing but the thoughts. Nobody tells either policy what a thought means.

    python add_think_blind.py                                      # M=100, 10 thought tokens, 2 thoughts
    python add_think_blind.py --d_thought_vocab=100 --think_len=1  # one thought says it all
    python add_think_blind.py --search=False                       # only codes that the thinking policy wrote
    python add_think_blind.py --super=True                         # the answering policy is taught the digits
    python add_think_blind.py --init_from=resume                   # go on after an interruption
    torchrun --standalone --nproc_per_node=2 add_think_blind.py    # the same update, by two processes

A code is the thoughts of a question as one number. In each step codes compete for the answers (see invent). An
answer prefers the codes that the answering policy already reads as it, but no code is taken by more than its
share of answers. Thoughts are drawn from these preferences; the thinking policy learns to write them, the
answering policy to read them. A code that is a little better becomes a lot better: this is how meaning starts.

This is not a policy gradient. Advantage-weighted regression (Peng et al. 2019) weights the samples of one
question by softmax(reward / tau). Here codes are weighted for an answer, and balanced, or answers would share
codes (--advantage=softmax). Policy gradients are here for comparison (--search=False --advantage=grpo): without
importance weights for epsilon, clipping or a KL term, as each rollout is used once.
"""
import math
from functools import partial

import torch
import torch.nn.functional as F

from model import ThinkingModelConfig, make_model, pack
from utils import (NEED_GROUPS, Run, World, ablations, addition_questions, advantages, balanced_target,
                   concentration, curve, digits, distinct, fail, fused, heat_map, judge, make_optimizer,
                   picture, read_knobs, recorded, sample, save_picture, schedule, user_errors)

# ---- knobs ----

input_max = 100               # M: numbers are 0..M-1
n_adds = 2                    # numbers to be added
d_thought_vocab = 10          # L: thought tokens
think_len = 2                 # T: thoughts per question
fixed = True                  # always T thoughts; False: up to T, end_thought ends them
heldout = .2                  # share of the questions that is never trained on
batch_size = 512              # questions per step, over all processes
max_steps = 1500              # updates; the learning rates fall to zero over their second half
max_seconds = 1e6             # stop after this wall-clock time
learning_rate = 3e-3          # of the thinking policy
learning_rate_answer = 2e-3   # of the answering policy
weight_decay = 3.             # of the thinking policy: what makes it generalise
n_layer = 1                   # of both policies, as the next two
n_head = 32
d_model = 128
split = True                  # two models; False: one is both policies
frozen = 'none'               # 'none' | 'thinking' | 'answering': the policy that does not learn
super = False                 # teach the answering policy hand-made thoughts: the answer's digits in base L
super_order = 'msb'           # 'msb' | 'lsb' | 'random': most or least significant digit first, or a random code
clean = False                 # hand-made reward: 1 for exactly the hand-made thoughts, else 0
supervised_weight = 0.        # of teaching the thinking policy the hand-made thoughts too: teacher forcing + RL
search = True                 # all codes compete; False: only those that the thinking policy writes
advantage = 'balanced'        # 'balanced' | 'softmax' | 'best' | 'grpo' | 'rloo' | 'dr_grpo' | 'reinforce' | 'raw' |
                              # 'batch_std' | 'quantile' | 'quantile_batch' | 'softmax_quantile' |
                              # 'softmax_centred': see utils.py
tau = .1                      # temperature of balanced and of all softmax: smaller makes the best count more
memory = .9                   # without search: share of the counts of written codes that is kept per step
group_size = 8                # G: rollouts of a question, without search
epsilon = 0.                  # share of their thoughts that are random; falls to zero over the first half
entropy_weight = 0.           # of a bonus for the entropy of the thinking policy, along the chosen thoughts
eval_every = 250              # steps between evaluations, each with a checkpoint and samples
eval_questions = 10000        # questions of each kind per evaluation, at most
log_every = 10                # steps between lines of metrics.jsonl
seed = 0                      # of weights, questions and thoughts
device = 'auto'               # auto, cpu, cuda, cuda:1, mps
dtype = 'float32'             # 'float32' | 'bfloat16'
compile = False               # run a step as one CUDA graph: faster on a GPU
fuse = False                  # compile its kernels as well: twice as fast again, half a minute later
init_from = 'scratch'         # scratch, resume, or the path of a checkpoint to take weights from
eval_only = False             # evaluate, train nothing, write nothing
out_dir = ''                  # folder of the run; empty: out/add_think_blind/<changed knobs>
wandb_mode = 'disabled'       # 'disabled' | 'offline' | 'online'
plot = False                  # draw the language at the end: language.html, needs plotly


# ---- set-up ----

knobs = read_knobs(__file__, globals())
base = d_thought_vocab + (not fixed)        # tokens to choose from
if think_len < 1 or max(input_max, 2**9) * base ** think_len > 2**26:
    fail(f'--think_len={think_len} must be at least 1, and few enough for at most 2^17 codes, or 2^26 / input_max')
if (super or clean or supervised_weight) and d_thought_vocab ** think_len < input_max:
    fail(f'd_thought_vocab={d_thought_vocab} and think_len={think_len} make no digits for {input_max} answers')
if search and (advantage not in ('balanced', 'softmax', 'best') or epsilon):
    fail(f'advantage={advantage}, epsilon={epsilon:g} need rollouts: --search=False')
if group_size < 2 and advantage in NEED_GROUPS:
    fail(f'advantage={advantage} compares the rollouts of a group: group_size={group_size} must be at least 2')
if compile and (epsilon or not search and advantage == 'balanced'):
    fail('compile=True needs steps that are alike: no epsilon, and without search another advantage than balanced')
if fuse and not compile or frozen != 'none' and not split:
    fail(f'fuse={fuse} needs --compile=True, frozen={frozen} needs --split=True')
world = World(knobs)

# ---- data ----

with user_errors():
    train_set, heldout_set = (part.to(world.device)
                              for part in addition_questions(0, input_max, heldout, seed, n_adds))


def answer_to(question):
    """The right answers (n,), each 0..M-1, to questions (n, n_adds). Edit this line for another task."""
    return question.sum(1) % input_max


# ---- model ----

shape = dict(block_size=think_len + max(1, n_adds - 1), n_layer=n_layer, n_head=n_head, d_model=d_model,
             init='unit', tie_weights=False, d_normal_vocab=input_max, d_thought_vocab=d_thought_vocab)
with user_errors():
    if split:
        writes, reads = dict(output_kind='thought'), dict(input_kind='thought', output_kind='normal')
        models = {name: make_model(ThinkingModelConfig(**shape, **kinds), knobs.checkpoint, name).to(world.device)
                  for name, kinds in (('thinking', writes), ('answering', reads))}
        thinking, answering = models.values()
    else:
        thinking = answering = make_model(ThinkingModelConfig(**shape), knobs.checkpoint).to(world.device)
        models = {'model': thinking}
if frozen != 'none':
    models[frozen].requires_grad_(False)

# thoughts as one number, their code, and back
number = partial(thinking.number, fixed=fixed)
spell = partial(thinking.spell, think_len=think_len, fixed=fixed)
thought_tokens = thinking.thought_range(fixed)
all_codes = number(spell(torch.arange(base ** think_len, device=world.device))).unique()    # (C,)
hand_made = torch.arange(input_max)
if super_order == 'random':
    hand_made = torch.randperm(input_max, generator=torch.Generator().manual_seed(seed))
hand_made = thought_tokens.start + digits(hand_made, think_len, d_thought_vocab).to(world.device)   # (M, T)
hand_made = hand_made.flip(1) if super_order == 'lsb' else hand_made

# ---- optimiser and run ----

optimizers = [make_optimizer(thinking, learning_rate, weight_decay, recorded=compile)]
if split:
    optimizers.append(make_optimizer(answering, learning_rate_answer, 0., recorded=compile))
run = Run(knobs, world, optimizers)
state = run.restore({
    'prices': torch.zeros(base ** think_len),                               # of codes, see balanced_target
    'habit': torch.zeros(input_max, 0 if search else base ** think_len),    # how often codes were written
    'baseline': torch.tensor(0. if clean else -math.log(input_max))})       # running mean of rewards
if len(all_codes) < input_max:
    run.print(f'warning: {len(all_codes)} codes cannot name {input_max} answers, '
              f'accuracy can reach {len(all_codes) / input_max:.4g}')


def save(step, file='ckpt.pt'):
    run.save(step, {name: pack(model) for name, model in models.items()}, file, **state)


# ---- three ways to learn ----
# Each returns the losses of the thinking and of the answering policy for questions (B, n_adds) with answers (B,), and
# what to log. By noise (B,) codes are drawn from a target, by dice (B, G, T) rollouts.

@fused
def invent(question, answer, noise, dice, epsilon, codes=all_codes, habit=0.):
    """Codes (C,) compete for the answers. habit: (M, C), added to their scores."""
    log_q = answering.answer(spell(codes)).float().log_softmax(-1).T                # (M, C) log p(answer | code)
    rewards = (hand_made_reward(codes) if clean else log_q.detach()) + habit
    if advantage == 'balanced':
        log_target, prices = balanced_target(rewards, state['prices'][codes], tau)  # (M, C) codes of each answer
        state['prices'].index_copy_(0, codes, prices)
    else:
        log_target = advantages(rewards, advantage, tau).log()
    chosen = codes[sample(log_target[answer], noise)]                               # (B,) a code for each question
    log_pi, entropy = thinking.thought_log_probs(question, spell(chosen), fixed)    # (B, T)
    thinking_loss = -log_pi.sum(1).mean()
    answering_loss = -(log_target.exp() * log_q).sum(1)[answer].mean()
    return thinking_loss, answering_loss, {'entropy': entropy.sum(1).mean(), 'chosen': chosen}


def own_codes(question, answer, noise, dice, epsilon):
    """Only codes that the thinking policy has just written compete, by log p(written for the answer and read as it)."""
    written = world.gather(number(roll_out(question, dice, epsilon).tokens).view(-1, group_size))
    codes, column = written.unique(return_inverse=True)                             # (C,), (B, G) of all processes
    pairs = (world.gather(answer)[:, None] * len(codes) + column).flatten()
    counts = pairs.bincount(minlength=input_max * len(codes)).view(input_max, -1)   # (M, C)
    state['habit'].mul_(memory).index_add_(1, codes, counts.float())
    habit = state['habit'][:, codes] + 1 / len(codes)
    habit = (habit / habit.sum(1, keepdim=True)).log()
    return invent(question, answer, noise, dice, epsilon, codes, habit)


@fused
def policy_gradient(question, answer, noise, dice, epsilon):
    """Rollouts of a question are compared with each other."""
    thoughts, *both = roll_out(question, dice, epsilon, grad=True)                  # (B G, T)
    log_pi, entropy = (x.sum(1).view(-1, group_size) for x in both)                 # (B, G)
    codes, column = distinct(number(thoughts).view(-1, group_size))                 # (C,), (B, G)
    log_q = answering.answer(spell(codes)).float().log_softmax(-1).T                # (M, C)
    rewards = (hand_made_reward(codes) if clean else log_q.detach())[answer[:, None], column]       # (B, G)
    everyone = world.gather(rewards)
    weights = advantages(rewards, advantage, tau, state['baseline'], everyone)      # (B, G)
    state['baseline'].lerp_(everyone.mean(), .1)
    thinking_loss = -(weights * log_pi).sum(1).mean()
    positive = weights.clamp(min=0) + 1e-9
    share = positive / positive.sum(1, keepdim=True)
    answering_loss = -(share * log_q[answer[:, None], column]).sum(1).mean()
    return thinking_loss, answering_loss, {'entropy': entropy.mean(), 'chosen': codes[column], 'weights': weights}


def hand_made_reward(codes):
    """1 if a code (C,) is the hand-made one of an answer, else 0: (M, C)."""
    return (number(hand_made)[:, None] == codes).float()


def roll_out(question, dice, epsilon, grad=False):
    """Thoughts (B G, T) of G rollouts for each question."""
    return thinking.think(question, think_len, fixed=fixed, n_rollouts=group_size, noise=dice.flatten(0, 1),
                          epsilon=epsilon, grad=grad)


learn = invent if search else own_codes if advantage == 'balanced' else policy_gradient
parameters = [p for model in models.values() for p in model.parameters()]


def update(question, answer, noise, dice, epsilon):
    """One step of both policies, as a function so that it can be recorded. Returns what to log."""
    with world.autocast:
        thinking_loss, answering_loss, seen = learn(question, answer, noise, dice, epsilon)
        if super:
            answering_loss = F.cross_entropy(answering.answer(hand_made).float()[answer], answer)
        if supervised_weight:
            log_pi, _ = thinking.thought_log_probs(question, hand_made[answer], fixed)      # (B, T)
            thinking_loss = thinking_loss - supervised_weight * log_pi.sum(1).mean()
    (thinking_loss - entropy_weight * seen['entropy'] + answering_loss).backward()
    world.mean_gradients(parameters)
    norm = torch.nn.utils.get_total_norm([p.grad for p in thinking.parameters() if p.grad is not None])
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    seen |= {'thinking_loss': thinking_loss, 'answering_loss': answering_loss, 'gradient_norm': norm}
    return {name: x.detach() for name, x in seen.items()}


# ---- evaluation ----

def think(question):
    """The thoughts (n, T) that the thinking policy prefers for questions (n, n_adds)."""
    return thinking.think(question, think_len, fixed=fixed, temperature=0).tokens


def evaluate(step):
    """Report on both sets of questions, show a few, keep the best checkpoint. Returns the numbers."""
    train, test = train_set[:eval_questions], heldout_set[:eval_questions]
    codes, thoughts = think(train), think(test)
    accuracy = judge(answering, codes, answer_to(train))[1]
    answers, heldout_accuracy, bits = judge(answering, thoughts, answer_to(test))
    result = {'codes': len(codes.unique(dim=0)), 'bits': bits,
              'thoughts': thinking.n_thoughts(thoughts).float().mean().item(),
              'accuracy': accuracy, 'heldout_accuracy': heldout_accuracy}
    run.report(step, **result)
    run.show(thinking.config, test, thoughts, answers, answer_to(test))
    if heldout_accuracy > run.best:
        run.best = heldout_accuracy
        save(step, 'best.pt')
    return result


def draw_language():
    """language.html: which thoughts are written for which answer, and how the language grew."""
    question = torch.cat([train_set, heldout_set])[:10**5]
    thoughts, column = think(question).unique(dim=0, return_inverse=True)
    counts = (answer_to(question) * len(thoughts) + column).bincount(minlength=input_max * len(thoughts))
    names = [' '.join(str(t - thought_tokens.start) for t in row[:n])
             for row, n in zip(thoughts.tolist(), thinking.n_thoughts(thoughts))]
    figure = picture(2, 'The invented language', height=1000, heights=[.75, .25])
    heat_map(figure, 1, counts.view(input_max, -1), 'thoughts', names, 'answer', list(range(input_max)))
    curve(figure, 2, run.curve('codes'), 'distinct codes', 'firebrick')
    curve(figure, 2, run.curve('bits'), 'bits that reach the answering policy', 'teal', right=True)
    save_picture(figure, run.folder / 'language.html')


# ---- training ----

if compile:
    update = recorded(update, fuse)
n_steps = run.first_step
for step in run.steps(run.first_step if eval_only else max_steps):
    if step % eval_every == 0:
        save(step)
        evaluate(step)
    for optimizer, rate in zip(optimizers, (learning_rate, learning_rate_answer)):
        schedule(optimizer, rate, step, max_steps)

    # every process draws the whole batch and takes its share
    rows = torch.randint(len(train_set), (batch_size,), generator=world.generator, device=world.device)
    question = train_set[world.share(rows)]                                         # (B, n_adds)
    noise = world.draw(torch.rand, batch_size)                                      # (B,)
    dice = None if search else world.draw(torch.rand, batch_size, group_size, think_len)    # (B, G, T)
    seen = update(question, answer_to(question), noise, dice, epsilon * max(0, 1 - 2 * step / max_steps))

    if step % log_every == 0:
        chosen, weights = seen.pop('chosen'), seen.pop('weights', None)
        run.log(step, **{name: x.item() for name, x in seen.items()}, chosen_codes=len(chosen.unique()),
                highest_price=state['prices'].max().item(), **({} if weights is None else concentration(weights)))
    n_steps = step + 1

# ---- the last line ----

save(n_steps)
result, test = evaluate(n_steps), heldout_set[:eval_questions]
ablation = {name: judge(answering, thoughts, answer_to(test))[1]
            for name, thoughts in ablations(think(test), thought_tokens).items()}
if plot and run.writes:
    draw_language()
update = None       # a CUDA graph in which processes meet must be gone before they part
run.finish(steps=n_steps, **result, ablation=ablation)

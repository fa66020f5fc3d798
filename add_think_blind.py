"""
Blind addition: two policies invent a language, and answer questions in it.

    question a, b  ->  thinking policy  ->  T thoughts  ->  answering policy  ->  (a + b) % M

The answering policy sees nothing but the thoughts. Nobody tells either policy what a thought means.

    python add_think_blind.py                                      # M=100, 10 thought tokens, 2 thoughts
    python add_think_blind.py --search=False                       # only codes that the thinking policy wrote
    torchrun --standalone --nproc_per_node=2 add_think_blind.py    # the same update, by two processes

A code is the thoughts of a question as one number. In each step codes compete for the answers (see invent).
Answers prefer codes from which the answering policy predicts them; codes that too many want rise in price.
For each question a code is drawn from its answer's preferences: the thinking policy learns to write it, the
answering one to predict the answer from all preferred codes. Small advantages grow: meaning starts.

This is not a policy gradient. Advantage-weighted regression (Peng et al. 2019) weights samples of a question;
here codes are weighted for an answer, and balanced, or answers would share codes. For comparison there are
policy gradients (--search=False --advantage=rloo), without importance weights, clipping or a KL term.
"""
import math
from functools import partial

from model import ThinkingModelConfig, make_model
from utils import (NEED_GROUPS, Run, World, ablations, addition_questions, advantages, balanced_target,
                   concentration, curve, digits, distinct, fail, fused, heat_map, judge, make_optimizer,
                   picture, read_knobs, recorded, sample, schedule)

import torch
import torch.nn.functional as F

# ---- knobs ----

input_max = 100               # M: numbers are 0..M-1
n_adds = 2                    # numbers to be added
d_thought_vocab = 10          # L: thought tokens
think_len = 2                 # T: thoughts per question
fixed = True                  # always T thoughts; False: up to T, end_thought ends them
heldout = .2                  # share of the questions that is never trained on
batch_size = 512              # questions per step, over all processes
max_steps = 1000              # updates; the learning rates fall to zero over their second half
max_seconds = 1e6             # stop after this wall-clock time
learning_rate = 3e-3          # of the thinking policy
learning_rate_answer = 2e-3   # of the answering policy
weight_decay = 3.             # of the thinking policy: needed to generalise
n_layer = 1                   # of both policies, like the next two
n_head = 32
d_model = 128
split = True                  # two models; False: one is both policies
frozen = 'none'               # 'none' | 'thinking' | 'answering': the policy that does not learn
super = False                 # teach the answering policy hand-made thoughts: the answer's digits in base L
super_order = 'msb'           # 'msb' | 'lsb' | 'random': most or least significant first, or a random code
clean = False                 # hand-made reward: 1 for exactly the hand-made thoughts, else 0
supervised_weight = 0.        # of teaching the thinking policy the hand-made thoughts too (teacher forcing)
search = True                 # all codes compete; False: only those that the thinking policy writes
advantage = 'balanced'        # 'balanced' | 'softmax' | 'best' | 'grpo' | 'rloo' | 'dr_grpo' | 'reinforce' |
                              # 'raw' | 'batch_std' | 'quantile' | 'quantile_batch' | 'softmax_quantile' |
                              # 'softmax_centred' | 'tpo': see utils.py
tau = .1                      # temperature of balanced, softmax, tpo: smaller makes the best count more
group_size = 8                # G: rollouts of a question, without search
epsilon = 0.                  # share of random thoughts, if not search; falls to 0 by max_steps / 2
entropy_weight = 0.           # of a bonus for the entropy of the thinking policy, along the chosen thoughts
eval_every = 250              # steps between evaluations, each with a checkpoint and samples
eval_questions = 10000        # questions of each kind per evaluation, at most
log_every = 10                # steps between lines of metrics.jsonl
seed = 0                      # of weights, questions and thoughts
device = 'auto'               # auto, cpu, cuda, cuda:1, mps
dtype = 'float32'             # 'float32' | 'bfloat16'; on a GPU float32 products are TF32
compile = False               # run a step as one CUDA graph: faster on a GPU
fuse = False                  # the same with compiled kernels: twice as fast again, after half a minute
init_from = 'scratch'         # scratch, resume, auto (resume what is there), or a checkpoint's path
eval_only = False             # evaluate, train nothing, write nothing
out_dir = ''                  # folder of the run; empty: out/add_think_blind/<changed knobs>
wandb_mode = 'disabled'       # 'disabled' | 'offline' | 'online'
plot = False                  # draw the language at the end: language.html, needs plotly

# ---- set-up ----

knobs = read_knobs(__file__, globals())
compile = compile or fuse
base = d_thought_vocab + (not fixed)  # base of a code
if think_len < 1 or max(input_max, 2**9) * base ** think_len > 2**26:  # memory
    fail(f'--think_len={think_len} makes no code, or more than min(2^17, 2^26 / input_max)')
if (super or clean or supervised_weight) and d_thought_vocab ** think_len < input_max:
    fail(f'{think_len} thoughts of {d_thought_vocab} tokens make no digits for {input_max} answers')
if search and (advantage not in ('balanced', 'softmax', 'best') or epsilon):
    fail(f'advantage={advantage}, epsilon={epsilon:g} need rollouts: --search=False')
if group_size < 2 and advantage in NEED_GROUPS:
    fail(f'advantage={advantage} compares rollouts: group_size={group_size} must be at least 2')
if compile and (epsilon or not search and advantage == 'balanced'):
    fail('compile=True needs steps that are alike: no epsilon; advantage=balanced needs --search=True')
if frozen != 'none' and not split:
    fail(f'frozen={frozen} needs two models: --split=True')
world = World(knobs)

# ---- data ----

train_set, heldout_set = (part.to(world.device)
                          for part in addition_questions(0, input_max, heldout, seed, n_adds))
train_sample, heldout_sample = train_set[:eval_questions], heldout_set[:eval_questions]


def answer_to(question):
    """The right answers (n,), 0..M-1, to questions (n, n_adds). Edit the next line for another task."""
    return question.sum(1) % input_max


# ---- model, optimiser, run ----

shape = dict(block_size=think_len + max(1, n_adds - 1), n_layer=n_layer, n_head=n_head, d_model=d_model,
             init='unit', tie_weights=False, d_normal_vocab=input_max, d_thought_vocab=d_thought_vocab)
kinds = {'thinking': dict(output_kind='thought'),
         'answering': dict(input_kind='thought', output_kind='normal')} if split else {'model': {}}
models = {name: make_model(ThinkingModelConfig(**shape, **kind), knobs.checkpoint, name).to(world.device)
          for name, kind in kinds.items()}
thinking, answering = [*models.values()][0], [*models.values()][-1]     # the same model without split
if frozen != 'none':
    models[frozen].requires_grad_(False)

number = partial(thinking.number, fixed=fixed)      # thoughts to code
spell = partial(thinking.spell, think_len=think_len, fixed=fixed)
thought_tokens = thinking.thought_range(fixed)
all_codes = number(spell(torch.arange(base ** think_len, device=world.device))).unique()    # (C,)
hand_made = torch.arange(input_max)
if super_order == 'random':
    hand_made = torch.randperm(input_max, generator=torch.Generator().manual_seed(seed))
hand_made = thought_tokens.start + digits(hand_made, think_len, d_thought_vocab).to(world.device)   # (M, T)
hand_made = hand_made.flip(1) if super_order == 'lsb' else hand_made

optimizers = [make_optimizer(thinking, learning_rate, weight_decay, recorded=compile)]
if split:
    optimizers.append(make_optimizer(answering, learning_rate_answer, 0., recorded=compile))
run = Run(knobs, world, optimizers)
state = run.restore({
    'prices': torch.zeros(base ** think_len),                               # of codes, see balanced_target
    'habit': torch.zeros(input_max, 0 if search else base ** think_len),    # (M, codes) decaying counts
    'baseline': torch.tensor(0. if clean else -math.log(input_max))})       # running mean of rewards
if (n_codes := len(all_codes)) < input_max:
    run.print(f'{n_codes} codes cannot name {input_max} answers, accuracy can reach {n_codes / input_max:.4}')

# ---- three ways to learn ----
# Each returns the losses of both policies for questions (B, n_adds) with answers (B,), and what to log.
# noise (B,) picks codes from a target, dice (B G, T) pick the thoughts of rollouts.

@fused
def invent(question, answer, noise, dice, epsilon, codes=all_codes, bonus=0.):
    """Codes (C,) compete for the answers. bonus: (M, C), added to their scores."""
    log_q = answering.answer(spell(codes), fixed=fixed).float().log_softmax(-1).T  # (M, C) log p(answer|code)
    scores = reward(log_q, codes) + bonus
    if advantage == 'balanced':
        log_target, prices = balanced_target(scores, state['prices'][codes], tau)       # (M, C)
        state['prices'].index_copy_(0, codes, prices)
    else:
        log_target = advantages(scores, advantage, tau).log()
    chosen = codes[sample(log_target[answer], noise)]                       # (B,)
    log_pi, entropy = thinking.thought_log_probs(question, spell(chosen), fixed)        # (B, T)
    thinking_loss = -log_pi.sum(1).mean()
    answering_loss = -(log_target.exp() * log_q).sum(1)[answer].mean()  # over all codes
    return thinking_loss, answering_loss, dict(entropy=entropy.sum(1).mean(), chosen=chosen)


def own_codes(question, answer, noise, dice, epsilon):
    """Only codes that were just written compete, by log p(code | answer) + log p(answer | code)."""
    written = number(thinking.think(question, think_len, fixed=fixed, n_rollouts=group_size, noise=dice,
                                    epsilon=epsilon).tokens).view(-1, group_size)       # (B, G)
    codes, column = world.gather(written).unique(return_inverse=True)       # (C,), (B, G) of all processes
    pairs = (world.gather(answer)[:, None] * len(codes) + column).flatten()
    counts = pairs.bincount(minlength=input_max * len(codes)).view(input_max, -1)       # (M, C)
    state['habit'].mul_(.9).index_add_(1, codes, counts.float())
    habit = state['habit'][:, codes] + 1 / len(codes)       # no code is impossible
    return invent(question, answer, noise, dice, epsilon, codes, (habit / habit.sum(1, keepdim=True)).log())


@fused
def policy_gradient(question, answer, noise, dice, epsilon):
    """G rollouts per question, weighted by advantage."""
    thoughts, *both = thinking.think(question, think_len, fixed=fixed, n_rollouts=group_size, noise=dice,
                                     epsilon=epsilon, grad=True)            # (B G, T)
    log_pi, entropy = (x.sum(1).view(-1, group_size) for x in both)         # (B, G)
    codes, column = distinct(number(thoughts).view(-1, group_size))         # (C,), (B, G)
    log_q = answering.answer(spell(codes), fixed=fixed).float().log_softmax(-1).T    # (M, C)
    rewards = reward(log_q, codes)[answer[:, None], column]                 # (B, G)
    pooled = world.gather(rewards)
    weights = advantages(rewards, advantage, tau, state['baseline'], pooled, log_pi.detach())
    state['baseline'].lerp_(pooled.mean(), .1)
    thinking_loss = -(weights * log_pi).sum(1).mean()
    gains = weights.clamp(min=0) + 1e-9  # the answering policy learns from better rollouts, else all
    log_p_answer = log_q[answer[:, None], column]
    answering_loss = -(gains / gains.sum(1, keepdim=True) * log_p_answer).sum(1).mean()
    return thinking_loss, answering_loss, dict(entropy=entropy.mean(), chosen=codes[column], weights=weights)


def reward(log_q, codes):
    """Rewards (M, C) of codes (C,) for answers: log p(answer | code); if clean 1 for hand-made, else 0."""
    return (number(hand_made)[:, None] == codes).float() if clean else log_q.detach()


learn = invent if search else own_codes if advantage == 'balanced' else policy_gradient


def update(question, answer, noise, dice, epsilon):
    """One step of both policies, a function so that a CUDA graph can record it. Returns what to log."""
    with world.autocast:
        thinking_loss, answering_loss, seen = learn(question, answer, noise, dice, epsilon)
        if super:
            answering_loss = F.cross_entropy(answering.answer(hand_made, fixed=True).float()[answer], answer)
        if supervised_weight:
            log_pi, _ = thinking.thought_log_probs(question, hand_made[answer], fixed)      # (B, T)
            thinking_loss = thinking_loss - supervised_weight * log_pi.sum(1).mean()
    (thinking_loss - entropy_weight * seen['entropy'] + answering_loss).backward()
    world.mean_gradients([p for model in models.values() for p in model.parameters()])
    norm = torch.nn.utils.get_total_norm([p.grad for p in thinking.parameters() if p.grad is not None])
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    losses = {'thinking_loss': thinking_loss, 'answering_loss': answering_loss, 'gradient_norm': norm}
    return {name: x.detach() for name, x in (losses | seen).items()}


# ---- evaluation ----

def think(question):
    """The thoughts (n, T) that the thinking policy prefers for questions (n, n_adds)."""
    return thinking.think(question, think_len, fixed=fixed, temperature=0).tokens


def evaluate(step):
    """Report on both sets ('codes' of train_sample), show a few, keep the best. Returns numbers."""
    known, thoughts, right = think(train_sample), think(heldout_sample), answer_to(heldout_sample)
    answers, heldout_accuracy, bits = judge(answering, thoughts, right)
    accuracy, length = judge(answering, known, answer_to(train_sample))[1], thinking.n_thoughts(thoughts)
    result = {'codes': len(known.unique(dim=0)), 'thoughts': length.float().mean().item(), 'bits': bits,
              'accuracy': accuracy, 'heldout_accuracy': heldout_accuracy}
    run.report(step, **result)
    run.show(thinking.config, heldout_sample, thoughts, answers, right)
    run.save_best(step, heldout_accuracy, models, **state)
    return result


def draw_language():
    """HTML: which thoughts are written for which answer, and how the language grew."""
    question = torch.cat([train_set, heldout_set])[:10**5]
    thoughts, column = think(question).unique(dim=0, return_inverse=True)
    counts = (answer_to(question) * len(thoughts) + column).bincount(minlength=input_max * len(thoughts))
    names = [' '.join(str(t - thought_tokens.start) for t in row[:n])
             for row, n in zip(thoughts.tolist(), thinking.n_thoughts(thoughts))]
    figure = picture(3, 'The invented language', heights=[.7, .15, .15])
    heat_map(figure, 1, counts.view(input_max, -1), 'thoughts', names, 'answer', list(range(input_max)))
    curve(figure, 2, run, 'codes', 'firebrick')
    curve(figure, 3, run, 'bits', 'teal')
    return figure.to_html()


# ---- training ----

update = recorded(update, fuse) if compile else update
n_steps = run.first_step
for step in run.steps(run.first_step if eval_only else max_steps):
    if step % eval_every == 0:
        run.save(step, models, **state)
        evaluate(step)
    for optimizer, rate in zip(optimizers, (learning_rate, learning_rate_answer)):
        schedule(optimizer, rate, step, max_steps)

    # every process draws the whole batch and takes its share
    rows = torch.randint(len(train_set), (batch_size,), generator=world.generator, device=world.device)
    question = train_set[world.share(rows)]                                 # (B, n_adds)
    noise = world.draw(batch_size)                              # (B,)
    dice = None if search else world.draw(batch_size, group_size, think_len).flatten(0, 1)
    seen = update(question, answer_to(question), noise, dice, epsilon * max(0, 1 - 2 * step / max_steps))

    if step % log_every == 0:
        numbers = {name: x.item() for name, x in seen.items() if x.dim() == 0}
        numbers |= concentration(seen['weights']) if 'weights' in seen else {}
        run.log(step, **numbers, chosen_codes=len(seen['chosen'].unique()),
                highest_price=state['prices'].max().item())
    n_steps = step + 1

# ---- the last line ----

run.save(n_steps, models, **state)
result = evaluate(n_steps)
replaced, right = ablations(think(heldout_sample), thought_tokens), answer_to(heldout_sample)
ablation = {name: judge(answering, thoughts, right)[1] for name, thoughts in replaced.items()}
run.draw('language.html', draw_language) if plot else None
update = None       # free the CUDA graph before the process group that it uses ends
run.finish(steps=n_steps, **result, ablation=ablation)

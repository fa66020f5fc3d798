"""
Blind addition: two policies invent a language, and answer every question in it.

    question a, b  ->  thinking policy  ->  T thoughts  ->  answering policy  ->  (a + b) % M

The answering policy sees nothing but the thoughts. Nobody tells either what a thought means.

    python add_think_blind.py                                              # M=100, 10 thought tokens, 2 thoughts
    python add_think_blind.py --d_thought_vocab=100 --think_len=1          # one thought says it all
    python add_think_blind.py --search=False                               # only codes that the thinking policy wrote
    python add_think_blind.py --super=True                                 # the answering policy is taught the digits
    python add_think_blind.py --init_from=resume                           # go on after an interruption
    torchrun --standalone --nproc_per_node=2 add_think_blind.py            # the same update, by two processes

Each step: the answering policy scores candidate codes, that is, says how likely every answer is after every code: all
L^T of them (search), or those that the thinking policy has written for the batch. These rewards, log p(answer | code),
are turned into a target: a distribution over codes for every answer, near softmax(reward / tau), in which no code is
taken by more than its share of answers. Thoughts are drawn from the target. The thinking policy learns to write them
(cross-entropy), the answering policy to read them (cross-entropy weighted by the target), which makes codes that are a
little better for an answer a lot better: this is how meaning gets started. Without search the reward is log p(the code
is written for the answer and read as it), so both policies have a say in the language; with search it is the answering
policy's invention.

What it is not: a policy gradient. Advantage-weighted regression (Peng et al. 2019) weights the samples of one question
by softmax(reward / tau); here codes are weighted for an answer, and the weights are balanced over codes, without which
answers come to share codes (--balance_steps=0). The policy gradients are there to be compared, as --search=False
--advantage=grpo and others: on rollouts of one question, the reward log p(answer | code) or, with clean, 1 or 0. They
have no importance weights where exploration changes how rollouts are sampled, and no clipping or KL term, as each
rollout is used once; the answering policy learns from rollouts as far as their advantages are positive.
"""
import math
from functools import partial

import torch
import torch.nn.functional as F

from model import ThinkingModelConfig, Tree, make_model, pack
from utils import (NEED_GROUPS, Run, World, ablations, addition_questions, advantages, balanced_target, concentration,
                   digits, fail, fused, make_optimizer, need, read_knobs, recorded, sample, schedule, show_tokens,
                   some_rollouts, user_errors)

# ---- knobs ----------------------------------------------------------------------------------------------------------

input_max = 100                 # M: numbers are 0..M-1
n_adds = 2                      # numbers to be added
d_thought_vocab = 10            # L: thought tokens
think_len = 2                   # T: thoughts per question
fixed = True                    # always T thoughts; False: up to T, end_thought ends them
heldout = .2                    # share of the questions that is never trained on
batch_size = 512                # questions per step, over all processes
max_steps = 1500                # updates; the learning rates fall to zero over their second half
max_seconds = 1e6               # stop after this wall-clock time
learning_rate = 3e-3            # of the thinking policy
weight_decay = 3.               # of the thinking policy: what makes it generalise
learning_rate_answer = 2e-3     # of the answering policy
weight_decay_answer = 0.        # of the answering policy
warmup_steps = 50               # steps over which learning rates rise
n_layer = 1                     # of both policies
n_head = 32                     # of both policies
d_model = 128                   # of both policies
split = True                    # two models; False: one is both policies, with learning_rate and weight_decay
frozen = 'none'                 # 'none' | 'thinking' | 'answering': the policy that does not learn
super = False                   # teach the answering policy hand-made thoughts: the answer's digits in base L
super_order = 'msb'             # 'msb' | 'lsb' | 'random': digits most or least significant first, or a random code
clean = False                   # hand-made reward: 1 for exactly the hand-made thoughts, 0 for all others
supervised_weight = 0.          # of teaching the thinking policy the hand-made thoughts too: teacher forcing + RL
search = True                   # candidates are all L^T codes, or from 2^17 on those written and as many random ones
advantage = 'balanced'          # 'balanced' | 'softmax' | 'best' | 'grpo' | 'rloo' | 'dr_grpo' | 'reinforce' |
                                # 'clean' | 'batch_std' | 'quantile' | 'quantile_batch' | 'softmax_quantile' |
                                # 'softmax_centred': see utils.py
tau = .1                        # temperature of balanced and all softmax: smaller makes the best count more
balance_steps = 10              # of balanced: iterations per step that keep answers from sharing codes; 0: they may
memory = .9                     # of balanced without search: share of the counts of written codes kept per step
answer_on = 'chosen'            # 'chosen' | 'written': answering learns from thoughts that advantage chose, or all
group_size = 8                  # G: rollouts of a question; none when all codes are searched, so next seven do nothing
rollouts_per_update = 0         # rollouts of a group, drawn by chance, that the thinking policy learns from; 0: all
temperature = 1.                # of rollouts
top_k = 0                       # rollouts choose from the k most likely thoughts; 0: from all
top_p = 1.                      # rollouts choose from the fewest thoughts that have this probability together
epsilon = 0.                    # share of a rollout's thoughts that are drawn at random
epsilon_steps = 0               # steps over which epsilon falls to zero; 0: it stays
logit_noise = 0.                # std of what is added to the logits of thoughts, drawn once per rollout
entropy_weight = 0.             # of a bonus for the entropy of the thinking policy's choices, along the chosen thoughts
eval_every = 250                # steps between evaluations, each with a checkpoint and samples
eval_questions = 10000          # questions of each kind per evaluation, at most
log_every = 10                  # steps between lines of metrics.jsonl
seed = 0                        # of weights, questions and thoughts
device = 'auto'                 # auto, cpu, cuda, cuda:1, mps
dtype = 'float32'               # 'float32' | 'bfloat16'
compile = False                 # a step as one CUDA graph: faster on a GPU; nothing may depend on what is written
fuse = False                    # with compile, fuse its kernels: again twice as fast, half a minute later
init_from = 'scratch'           # scratch, resume, or the path of a checkpoint to take weights from
eval_only = False               # evaluate, train nothing, write nothing
out_dir = ''                    # folder of the run; empty: out/add_think_blind/<changed knobs>
wandb_mode = 'disabled'         # 'disabled' | 'offline' | 'online'
plot = False                    # draw the language at the end: language.html, needs plotly; not with eval_only

# ---- set-up ---------------------------------------------------------------------------------------------------------

knobs = read_knobs(__file__, globals())
if think_len < 1:
    fail(f'--think_len={think_len} must be at least 1, as the answering policy sees nothing else')
base = d_thought_vocab + (not fixed)        # tokens to choose from
if think_len * math.log2(base) > 62:
    fail(f'd_thought_vocab={d_thought_vocab} and think_len={think_len} make over 2^62 codes, too many to number')
n_codes = d_thought_vocab ** think_len if fixed else sum(d_thought_vocab ** t for t in range(think_len + 1))
n_slots = min(base ** think_len, 2**17 - 1)     # for prices and counts: where codes are more, some share one
search_all = search and base ** think_len <= n_slots
if (super or clean or supervised_weight) and d_thought_vocab ** think_len < input_max:
    fail(f'd_thought_vocab={d_thought_vocab} and think_len={think_len} make no digits for {input_max} answers')
if search and advantage not in ('balanced', 'softmax', 'best'):
    fail(f'advantage={advantage} needs rollouts: --search=False')
if search and answer_on == 'written':
    fail('answer_on=written needs rollouts: --search=False')
if group_size < 2 and advantage in NEED_GROUPS:
    fail(f'advantage={advantage} compares the rollouts of a group: group_size={group_size} must be at least 2')
if not search and advantage == 'balanced' and input_max * n_slots > 2**26:
    fail(f'without search, counts are kept for {input_max} answers x {n_slots} codes, over 2^26: --search=True')
if rollouts_per_update > group_size or rollouts_per_update and (search or advantage == 'balanced'):
    fail(f'rollouts_per_update={rollouts_per_update} are of the rollouts of a policy gradient, group_size={group_size}')
if compile and (epsilon_steps or not search_all and (search or advantage == 'balanced')):
    fail('compile=True needs steps that are alike: all codes searched, or rollouts without balanced and epsilon_steps')
if fuse and not compile:
    fail('fuse=True needs --compile=True')
if not split and frozen != 'none':
    fail(f'frozen={frozen} needs two models: --split=True')
world = World(knobs)

# ---- data -----------------------------------------------------------------------------------------------------------

with user_errors():
    train_set, heldout_set = (part.to(world.device)
                              for part in addition_questions(0, input_max, heldout, seed, n_adds))

# ---- model ----------------------------------------------------------------------------------------------------------

shape = dict(block_size=think_len + max(1, n_adds - 1), n_layer=n_layer, n_head=n_head, d_model=d_model, init='unit',
             tie_weights=False, d_normal_vocab=input_max, d_thought_vocab=d_thought_vocab)
with user_errors():
    if split:
        thinking = make_model(ThinkingModelConfig(**shape, output_kind='thought'), knobs.checkpoint, 'thinking')
        answering = make_model(ThinkingModelConfig(**shape, input_kind='thought', output_kind='normal'),
                               knobs.checkpoint, 'answering')
    else:
        thinking = answering = make_model(ThinkingModelConfig(**shape), knobs.checkpoint)
thinking, answering = thinking.to(world.device), answering.to(world.device)
models = {'thinking': thinking, 'answering': answering} if split else {'model': thinking}
if frozen != 'none':
    models[frozen].requires_grad_(False)

# ---- codes: thoughts as one number, see GPT2Thinking.number ----------------------------------------------------------

merge = world.device.type == 'cpu'          # rollouts that are alike so far are read once, which is quicker there
thought_tokens = thinking.thought_range(fixed)
number = partial(thinking.number, fixed=fixed)
spell = partial(thinking.spell, think_len=think_len, fixed=fixed)
all_codes = torch.arange(base ** think_len if search_all else 0, device=world.device)
all_codes = number(spell(all_codes)).unique()                                           # (C,)
hand_made = torch.arange(input_max)
if super_order == 'random':
    hand_made = torch.randperm(input_max, generator=torch.Generator().manual_seed(seed))
hand_made = thought_tokens.start + digits(hand_made, think_len, d_thought_vocab).to(world.device)   # (M, T)
hand_made = hand_made.flip(1) if super_order == 'lsb' else hand_made

# ---- optimiser and run ----------------------------------------------------------------------------------------------

optimizers = [make_optimizer(thinking, learning_rate, weight_decay, recorded=compile)]
if split:
    optimizers.append(make_optimizer(answering, learning_rate_answer, weight_decay_answer, recorded=compile))
run = Run(knobs, world, optimizers)
state = {'prices': torch.zeros(n_slots),        # what balanced_target asks for a code
         'habit': torch.zeros(input_max, 0 if search or advantage != 'balanced' else n_slots),      # how often written
         'baseline': torch.tensor(0. if clean else -math.log(input_max))}       # running mean of rewards, for reinforce
if init_from == 'resume':
    state = {name: knobs.checkpoint.get(name, x) for name, x in state.items()}
state = {name: x.to(world.device) for name, x in state.items()}
if n_codes < input_max:
    run.print(f'warning: {n_codes} codes cannot name {input_max} answers, accuracy can reach {n_codes / input_max:.4g}')


def save(step, file='ckpt.pt'):
    run.save(step, {name: pack(model) for name, model in models.items()}, file, **state)


# ---- evaluation -----------------------------------------------------------------------------------------------------

@torch.no_grad()
def think_greedily(question):
    """question: (n, n_adds). Returns the thoughts (n, T) that the thinking policy prefers."""
    return torch.cat([thinking.think(part, think_len, fixed=fixed, temperature=0).tokens
                      for part in question.split(4096)])


@torch.no_grad()
def judge(question, thoughts):
    """
    What the answering policy makes of thoughts (n, T): its answers (n,), the share of questions (n, n_adds) that they
    answer rightly, and how many bits about the answer reach it: log2(M) minus its cross-entropy, or 0, for answers that
    are equally frequent a lower bound of their mutual information with the thoughts (Barber and Agakov 2003).
    """
    log_q = torch.cat([answering.answer(part).float().log_softmax(-1) for part in thoughts.split(4096)])    # (n, M)
    answer, right = log_q.argmax(-1), question.sum(1) % input_max
    bits = math.log2(input_max) + log_q.gather(1, right[:, None]).mean().item() / math.log(2)
    return answer, (answer == right).sum().item() / len(question), max(0., bits)


def evaluate(step):
    """Report on all questions, show a few, keep the best checkpoint. Returns the numbers."""
    train, test = train_set[:eval_questions], heldout_set[:eval_questions]
    train_thoughts, test_thoughts = think_greedily(train), think_greedily(test)
    answers, heldout_accuracy, bits = judge(test, test_thoughts)
    result = {'codes': len(number(train_thoughts).unique()), 'bits': bits}
    if not fixed:
        result['thoughts'] = thinking.n_thoughts(test_thoughts).float().mean().item()
    if super:       # share of questions whose first, first two, ... thoughts are the digits
        follow = (test_thoughts == hand_made[test.sum(1) % input_max]).cumprod(1).float().mean(0)
        result |= {f'digits_{t}': share for t, share in enumerate(follow.tolist(), 1)}
    result |= {'accuracy': judge(train, train_thoughts)[1], 'heldout_accuracy': heldout_accuracy}
    run.report(step, **result)
    for question, thoughts, answer in zip(test[:3], test_thoughts, answers):
        end = torch.full_like(thoughts[:1], thinking.config.end_thought)
        thoughts = thoughts[:thinking.n_thoughts(thoughts[None])]
        run.sample(show_tokens(torch.cat([question, thoughts, end, answer[None]]), thinking.config),
                   right=answer == question.sum() % input_max)
    if heldout_accuracy > run.best:
        run.best = heldout_accuracy
        save(step, 'best.pt')
    return result


def draw_language():
    """Which thoughts are written for which answer, and how the language grew: pictures, stand-alone HTML."""
    graph, subplots = (need(f'plotly.{name}', 'to draw pictures') for name in ('graph_objects', 'subplots'))
    question = torch.cat([train_set, heldout_set])[:10**5]
    codes, column = number(think_greedily(question)).unique(return_inverse=True)
    counts = (question.sum(1) % input_max * len(codes) + column).bincount(minlength=input_max * len(codes))
    names = [' '.join(str(t - thought_tokens.start) for t in row if t != thinking.config.end_thought)
             for row in spell(codes).tolist()]
    figure = subplots.make_subplots(2, 1, row_heights=[.75, .25], vertical_spacing=.1,
                                    specs=[[{}], [{'secondary_y': True}]])
    figure.add_heatmap(
        z=counts.view(input_max, -1).int().cpu().numpy(), x=names, y=list(range(input_max)), colorscale='Blues',
        colorbar={'title': 'questions', 'len': .75, 'y': 1, 'yanchor': 'top'},
        hovertemplate='answer %{y}, thoughts %{x}: %{z} questions<extra></extra>', row=1, col=1)
    for name, title, colour in (('codes', 'distinct codes', 'firebrick'),
                                ('bits', 'bits that reach the answering policy', 'teal')):
        run.draw_curve(figure, name, title, colour, row=2, col=1, secondary_y=name == 'bits')
    figure.update_yaxes(showgrid=False, tickmode='auto', row=2, col=1, secondary_y=True)
    figure.update_xaxes(title='thoughts', type='category', tickangle=90, row=1, col=1)
    figure.update_yaxes(title='answer', row=1, col=1)
    figure.update_layout(title='The invented language', width=900, height=1000, showlegend=False)
    run.picture('language.html', figure)


# ---- training -------------------------------------------------------------------------------------------------------

def explore(question, reader, dice, jitter, epsilon):
    """
    Thoughts (B, G, T) of rollouts for question (B, n_adds), by dice (B G, T) and jitter (B G, tokens) of logits.
    reader: see merge in GPT2.generate.
    """
    return thinking.think(
        question, think_len, fixed=fixed, n_rollouts=group_size, noise=dice, bias=logit_noise * jitter,
        temperature=temperature, top_k=top_k, top_p=top_p, epsilon=epsilon, merge=reader,
    ).tokens.view(-1, group_size, think_len)


def candidates(question, reader, more=None, *how):
    """
    Codes to choose from, (C,) numbers: all, or those written for the whole batch, and with search the random ones in
    `more` as well; in ascending order, unless compiled. And where among them the rollouts for question (B, n_adds) are,
    (B, G), or None where all are. reader and how: see explore.
    """
    if search_all:
        return all_codes, None
    written = number(explore(question, reader, *how))                               # (B, G)
    if compile:
        return written.flatten(), torch.arange(written.numel(), device=world.device).view(written.shape)
    codes = world.gather(written).flatten()
    if search:
        codes = torch.cat([codes, number(spell(more))])
    codes = codes.unique()
    return codes, torch.searchsorted(codes, written)


def target(rewards, codes, column, answers):
    """
    The log of a distribution over codes (C,) for every answer, (M, C), from the rewards (M, C) of an answer for a code.
    column (B, G) says which codes were written for answers (B,), those of the whole batch. Changes the state.
    """
    if advantage != 'balanced':
        return advantages(rewards, advantage, tau).log()
    slot = codes % n_slots
    if not search:      # a code is worth the probability that it is written and read
        counts = (answers[:, None] * len(codes) + column).flatten().bincount(minlength=rewards.numel())
        state['habit'].mul_(memory).index_add_(1, slot, counts.view(rewards.shape).float())
        written = state['habit'][:, slot] + 1 / len(codes)                          # (M, C)
        rewards = rewards + (written / written.sum(1, keepdim=True)).log()
    log_target, prices = balanced_target(rewards, state['prices'][slot], tau, balance_steps)
    state['prices'].scatter_reduce_(0, slot, prices, 'amax', include_self=False)
    return log_target


@fused
def losses(rows, noise, *how):
    """
    For questions with these rows (batch_size,), of all processes, by noise (B,), with rollouts_per_update (B, G):
    losses of the thinking and of the answering policy, entropy of thoughts, which candidates were chosen (B, K), and
    how much they count. how: see candidates and explore.
    """
    all_answers = train_set[rows].sum(1) % input_max
    question, answer = train_set[world.share(rows)], world.share(all_answers)       # (B, n_adds), (B,)

    # candidate codes, and what each is worth for every answer
    own = not search and advantage != 'balanced'    # whether what is sampled is what is learned from
    reader = Tree(thinking) if merge and own else merge
    numbers, column = candidates(question, reader, *how)                            # (C,), (B, G)
    codes = spell(numbers)                                                          # (C, T)
    log_q = answering.answer(codes).float().log_softmax(-1).T                       # (M, C) log p(answer | code)
    rewards = (number(hand_made)[:, None] == numbers).float() if clean else log_q.detach()

    # which of them the thinking policy is to write, and how much each counts
    if not own:     # drawn from the target of the answer
        log_target = target(rewards, numbers, None if search else world.gather(column), all_answers)
        chosen, weights = sample(log_target[answer], noise)[0][:, None], 1.         # (B, 1)
        answering_loss = -(log_target.exp() * log_q).sum(1)[answer].mean()
    else:                                       # its own rollouts, compared with the others of the group
        chosen, group_rewards = column, rewards[answer[:, None], column]            # (B, G)
        everybody = world.gather(group_rewards)
        weights = advantages(group_rewards, advantage, tau, state['baseline'], everybody)           # (B, G)
        state['baseline'].lerp_(everybody.mean(), .1)
        positive = weights.clamp(min=0) + 1e-9
        answering_loss = -(positive / positive.sum(1, keepdim=True) * log_q[answer[:, None], column]).sum(1).mean()
    if answer_on == 'written':
        answering_loss = -log_q[answer[:, None], column].mean()
    if super:
        answering_loss = F.cross_entropy(answering.answer(hand_made).float()[answer], answer)

    counted = some_rollouts(weights, rollouts_per_update, noise) if rollouts_per_update else weights
    K = chosen.shape[1]
    log_pi, entropy = (x.sum(1).view(-1, K) for x in thinking.thought_log_probs(
        question.repeat_interleave(K, dim=0), codes[chosen].flatten(0, 1), fixed, entropy=True,
        merge=own and reader))                                                      # (B, K)
    thinking_loss = -(counted * log_pi).sum(1).mean()
    if supervised_weight:
        log_pi = thinking.thought_log_probs(question, hand_made[answer], fixed)     # (B, T)
        thinking_loss = thinking_loss - supervised_weight * log_pi.sum(1).mean()
    return thinking_loss, answering_loss, entropy.mean(), chosen, weights


def update(*how):
    """One step of the optimisers, see losses for how; what that returns, and the norm of thinking's gradient."""
    with world.autocast:
        thinking_loss, answering_loss, entropy, *more = losses(*how)
    (thinking_loss - entropy_weight * entropy + answering_loss).backward()
    world.mean_gradients([parameter for model in models.values() for parameter in model.parameters()])
    norm = torch.nn.utils.get_total_norm([p.grad for p in thinking.parameters() if p.grad is not None])
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return thinking_loss.detach(), answering_loss.detach(), entropy.detach(), *more, norm


if compile:
    update = recorded(update, fuse)
n_steps = run.first_step
for step in run.steps(run.first_step, run.first_step if eval_only else max_steps):
    if step % eval_every == 0:
        save(step)
        evaluate(step)
    for optimizer, rate in zip(optimizers, (learning_rate, learning_rate_answer)):
        schedule(optimizer, rate, step, max_steps, warmup_steps)

    # a batch of questions; every process draws all of it and takes its share
    rows = torch.randint(len(train_set), (batch_size,), generator=world.generator, device=world.device)
    how = [rows, world.draw(torch.rand, batch_size, *[group_size] * (rollouts_per_update > 0))]
    if not search_all:
        dice = world.draw(torch.rand, batch_size, group_size, think_len).flatten(0, 1)
        jitter = world.draw(torch.randn, batch_size, group_size, base).flatten(0, 1) if logit_noise else 0.
        more = torch.randint(base ** think_len, (batch_size * group_size,), generator=world.generator,
                             device=world.device) if search else None
        how += [more, dice, jitter, epsilon * max(0, 1 - step / epsilon_steps) if epsilon_steps else epsilon]
    thinking_loss, answering_loss, entropy, chosen, weights, norm = update(*how)
    if step % log_every == 0:
        run.log(step, thinking_loss=thinking_loss.item(), answering_loss=answering_loss.item(),
                entropy=entropy.item(), chosen_codes=len(chosen.unique()),
                highest_price=state['prices'].max().item(), gradient_norm=norm.item(),
                **(concentration(weights) if chosen.shape[1] > 1 else {}))
    n_steps = step + 1

# ---- the last line --------------------------------------------------------------------------------------------------

save(n_steps)
result = evaluate(n_steps)
test = heldout_set[:eval_questions]
ablation = {name: judge(test, thoughts)[1]
            for name, thoughts in ablations(think_greedily(test), thought_tokens).items()}
if plot and run.writes:
    draw_language()
update = None       # a CUDA graph in which processes meet must be gone before they part
run.finish(steps=n_steps, **result, ablation=ablation)

"""
Autoencoder: two policies agree on a code for one token, from nothing.

    x of M  ->  thinking policy  ->  T thoughts, each one of L tokens  ->  answering policy  ->  x

The answering policy sees nothing but the thoughts, and no gradient passes through them (but for --method=gumbel). Where
L^T = M every code is needed, so that an accuracy of 1 is a perfect one-to-one code.

    python autoencoder_think.py                                            # M=64, 8 thought tokens, 2 thoughts
    python autoencoder_think.py --input_max=1000 --d_thought_vocab=10 --think_len=3      # 1000 codes for 1000 inputs
    python autoencoder_think.py --method=reinforce --learning_rate=5e-4 --max_steps=3000 --eval_every=100 --log_every=20
    python autoencoder_think.py --method=gumbel --tau=8 --learning_rate=1e-3 --learning_rate_answer=1e-3 --max_steps=999
    python autoencoder_think.py --init_from=resume                         # go on after an interruption
    torchrun --standalone --nproc_per_node=2 autoencoder_think.py          # the same update, by two processes

Four methods say which thoughts are learned from:
match      The answering policy scores codes for the inputs of the batch, log p(x | code): those that these inputs own,
           and as many that nobody does. They are dealt out anew, one to an input, the best scores first, and both
           policies learn the pairs by cross-entropy. Who owns what is kept, so that no code ever has two owners.
           This is expert iteration with somebody who deals, not a policy gradient.
sinkhorn   The same with prices in place of owners: thoughts are drawn from a target that balances all inputs over all
           codes, see utils.balanced_target.
reinforce  The policy gradient (Williams 1992) on the thinking policy's own rollouts, by the advantages of RLOO, GRPO or
           others. A rollout is paid log p(x | thoughts) - code_price * log(how often its code is written; 1 is its
           share), and there is a bonus for entropy that begins near 1, where certainty is worth as much as
           indifference, and falls slowly. The answering policy learns from all rollouts by cross-entropy. Left out:
           importance weights (also with logit_noise, which changes how rollouts are sampled), clipping, as each rollout
           is used once, and what an early thought does to the entropy of later ones.
gumbel     The straight-through Gumbel-softmax (Jang et al. 2017): the answer's gradient passes through the thoughts.
"""
import math
from functools import partial

import torch
import torch.nn.functional as F

from model import ThinkingModelConfig, Tree, make_model, pack
from utils import (NEED_GROUPS, Run, World, ablations, advantages, balanced_target, fail, make_optimizer, need,
                   read_knobs, sample, schedule, show_tokens, user_errors)

# ---- knobs ----------------------------------------------------------------------------------------------------------

method = 'match'                # 'match' | 'sinkhorn' | 'reinforce' | 'gumbel'
input_max = 64                  # M: inputs are 0..M-1
d_thought_vocab = 8             # L: thought tokens
think_len = 2                   # T: thoughts per input
batch_size = 1024               # inputs per step, over all processes; all of them where M is less
max_steps = 30                  # steps; the learning rates fall to zero over their second half
inner_steps = 5                 # of match and sinkhorn: updates per step, with the same pairs
max_seconds = 1e6               # stop after this wall-clock time
learning_rate = 1e-2            # of the thinking policy
learning_rate_answer = 1e-2     # of the answering policy
weight_decay = 0.               # of both policies
warmup_steps = 5                # steps over which learning rates rise
n_layer = 1                     # of both policies
n_head = 8                      # of both policies
d_model = 64                    # of both policies
init = 'unit'                   # 'unit' | 'gpt2': activations of size one, or weights of std .02
frozen = 'none'                 # 'none' | 'thinking' | 'answering': the policy that does not learn
rematch = True                  # of match: deal codes out in every step; False: once, what is owned stays so
unique = True                   # of match: one code to an input; False: each takes its best, whoever else does
tau = .1                        # temperature of sinkhorn's target, of gumbel's softmax, and of all others
balance_steps = 10              # of sinkhorn: iterations per step
group_size = 256                # of reinforce, as the next six: G, rollouts of an input
advantage = 'rloo'              # 'rloo' | 'grpo' | 'dr_grpo' | 'reinforce' | 'batch_std' | 'quantile' |
                                # 'quantile_batch' | 'softmax' | 'softmax_centred' | 'softmax_quantile' | 'best'
code_price = 8.                 # price of a code, in nats per log of how often it is written
memory = .5                     # share of the counts of written codes that is kept per step, below 1
entropy_weight = .95            # of a bonus for the entropy of the thinking policy, at the first step
entropy_end = .4                # its weight at the end, reached linearly
logit_noise = 0.                # std of what is added to the logits of thoughts, drawn once per rollout
eval_every = 10                 # steps between evaluations, each with a checkpoint and samples
log_every = 1                   # steps between lines of metrics.jsonl
seed = 0                        # of weights, batches and thoughts
device = 'auto'                 # auto, cpu, cuda, cuda:1, mps
dtype = 'float32'               # 'float32' | 'bfloat16'
init_from = 'scratch'           # scratch, resume, or the path of a checkpoint to take weights from
eval_only = False               # evaluate, train nothing, write nothing
out_dir = ''                    # folder of the run; empty: out/autoencoder_think/<changed knobs>
wandb_mode = 'disabled'         # 'disabled' | 'offline' | 'online'
plot = False                    # draw how the code grew at the end: growth.html, needs plotly; not with eval_only

# ---- set-up ---------------------------------------------------------------------------------------------------------

knobs = read_knobs(__file__, globals())
if think_len < 1:
    fail(f'--think_len={think_len} must be at least 1, as the answering policy sees nothing else')
if max(think_len * math.log2(d_thought_vocab), math.log2(input_max)) > 24:
    fail(f'over 2^24 codes or inputs are too many to keep tables of: d_thought_vocab={d_thought_vocab}, '
         f'think_len={think_len}, input_max={input_max}')
n_codes = d_thought_vocab ** think_len
n_slots = max(n_codes, input_max)       # where codes are few, each has as many slots as it can have inputs
n_batch = min(batch_size, input_max)
if method == 'sinkhorn' and input_max * n_codes > 2**26:
    fail(f'sinkhorn scores {input_max} inputs x {n_codes} codes, over 2^26: --method=match')
if method == 'match' and n_batch * min(2 * n_batch, n_slots) > 2**29:
    fail(f'match scores {n_batch} inputs x twice as many codes, over 2^29: a smaller --batch_size')
if method == 'reinforce' and group_size < 2 and advantage in NEED_GROUPS:
    fail(f'advantage={advantage} compares the rollouts of a group: group_size={group_size} must be at least 2')
world = World({**knobs, 'batch_size': n_batch})

# ---- data -----------------------------------------------------------------------------------------------------------

inputs = torch.arange(input_max, device=world.device)
best_accuracy = min(1, n_codes / input_max)

# ---- model ----------------------------------------------------------------------------------------------------------

shape = dict(block_size=think_len + 1, n_layer=n_layer, n_head=n_head, d_model=d_model, init=init, tie_weights=False,
             d_normal_vocab=input_max, d_thought_vocab=d_thought_vocab)
with user_errors():
    thinking = make_model(ThinkingModelConfig(**shape, output_kind='thought'), knobs.checkpoint, 'thinking')
    answering = make_model(ThinkingModelConfig(**shape, input_kind='thought', output_kind='normal'),
                           knobs.checkpoint, 'answering')
models = {'thinking': thinking.to(world.device), 'answering': answering.to(world.device)}
if frozen != 'none':
    models[frozen].requires_grad_(False)

# ---- codes: thoughts as one number, see GPT2Thinking.number; an input's slot is the code number slot % n_codes ------

thought_tokens = thinking.thought_range(fixed=True)
spell = partial(thinking.spell, think_len=think_len)

# ---- optimiser and run ----------------------------------------------------------------------------------------------

optimizers = [make_optimizer(thinking, learning_rate, weight_decay),
              make_optimizer(answering, learning_rate_answer, weight_decay)]
run = Run(knobs, world, optimizers)
state = {'order': inputs,                                           # of the inputs in this epoch
         'slots': torch.full((input_max,), -1),                     # which slot each input owns, -1 none yet
         'prices': torch.zeros(n_codes * (method == 'sinkhorn')),   # what balanced_target asks for a code
         'frequency': torch.full((n_codes * (method == 'reinforce'),), 1 / n_codes),    # how often each is written
         'baseline': torch.tensor(-math.log(input_max))}            # running mean of rewards, for reinforce
if init_from == 'resume':
    state = {name: knobs.checkpoint[name] for name in state}
state = {name: x.to(world.device) for name, x in state.items()}
if n_codes < input_max:
    run.print(f'warning: {n_codes} codes cannot name {input_max} inputs, accuracy can reach {best_accuracy:.4g}')


def save(step, file='ckpt.pt'):
    run.save(step, {name: pack(model) for name, model in models.items()}, file, **state)


# ---- evaluation -----------------------------------------------------------------------------------------------------

@torch.no_grad()
def think_greedily():
    """The thoughts (M, T) that the thinking policy prefers, for every input."""
    return torch.cat([thinking.think(part[:, None], think_len, temperature=0).tokens for part in inputs.split(4096)])


@torch.no_grad()
def judge(thoughts):
    """
    What the answering policy makes of thoughts (M, T), one row for every input: its answers (M,), the share that is
    right, and how many bits about x reach it: log2(M) minus its cross-entropy, or 0, a lower bound of the mutual
    information of x and thoughts (Barber and Agakov 2003).
    """
    answers, log_q = [], []
    for part, x in zip(thoughts.split(4096), inputs.split(4096)):
        log_p = answering.answer(part).float().log_softmax(-1)                      # (n, M)
        answers.append(log_p.argmax(-1))
        log_q.append(log_p.gather(1, x[:, None])[:, 0])
    answer, bits = torch.cat(answers), math.log2(input_max) + torch.cat(log_q).mean().item() / math.log(2)
    return answer, (answer == inputs).sum().item() / input_max, max(0., bits)


def evaluate(step):
    """Report on every input, show a few, keep the best checkpoint. Returns the numbers."""
    thoughts = think_greedily()
    answers, accuracy, bits = judge(thoughts)
    counts = thinking.number(thoughts).unique(return_counts=True)[1].double()
    result = {'codes': len(counts),
              # I(x; greedy thoughts), exact: the entropy of the code, as x decides it and is uniform
              'bits_written': max(0., math.log2(input_max) - (counts * counts.log2()).sum().item() / input_max),
              'bits': bits, 'accuracy': accuracy}
    run.report(step, **result)
    for x, row, answer in zip(inputs[:3], thoughts, answers):
        end = torch.full_like(row[:1], thinking.config.end_thought)
        run.sample(show_tokens(torch.cat([x[None], row, end, answer[None]]), thinking.config), right=answer == x)
    if accuracy > run.best:
        run.best = accuracy
        save(step, 'best.pt')
    return result


def draw_growth():
    """How the code grew: accuracy, distinct codes and bits over the steps; dotted what can be had. Stand-alone HTML."""
    subplots = need('plotly.subplots', 'to draw pictures')
    figure = subplots.make_subplots(3, 1, shared_xaxes=True, vertical_spacing=.04)
    most = min(n_codes, input_max)
    for row, name, title, colour, limit in (
            (1, 'accuracy', 'accuracy', 'seagreen', best_accuracy),
            (2, 'codes', 'distinct codes', 'firebrick', most),
            (3, 'bits_written', 'bits written', 'darkorange', math.log2(most)),
            (3, 'bits', 'bits read', 'teal', math.log2(most))):
        run.draw_curve(figure, name, title, colour, row=row, col=1)
        figure.add_hline(limit, line_dash='dot', line_color='gray', row=row, col=1)
        if row < 3:
            figure.update_xaxes(title='', row=row, col=1)
    figure.update_yaxes(title='bits about the input', color='black', row=3, col=1)
    figure.update_layout(title=f'{method}: a code for {input_max} inputs of {think_len} thoughts, each one of '
                         f'{d_thought_vocab}', width=900, height=800, legend={'orientation': 'h', 'y': 1.07})
    run.picture('growth.html', figure)


# ---- training -------------------------------------------------------------------------------------------------------

def next_batch(step):
    """The inputs (B,) of a step, of all processes: a new order in every epoch, of whole batches only."""
    batch = step % (input_max // n_batch)
    if batch == 0:
        state['order'] = torch.randperm(input_max, generator=world.generator, device=world.device)
    return state['order'][batch * n_batch:][:n_batch]


@torch.no_grad()
def score(codes, x):
    """log p(x | code) for inputs x (B,) and numbers of codes (C,): (B, C)."""
    return torch.cat([answering.answer(spell(part)).float().log_softmax(-1)[:, x]
                      for part in codes.split(max(1, 2**25 // input_max))]).T


def one_to_one(scores):
    """
    A column of its own for every row of scores (n, m), n <= m, the highest scores first: pairs that are each other's
    best are taken out until no row is left. Of columns that are alike one goes per round. Returns columns (n,).
    """
    chosen = torch.full(scores.shape[:1], -1, device=scores.device)
    rows, columns = (torch.arange(n, device=scores.device) for n in scores.shape)
    while len(rows):
        best = scores.argmax(1)                                                     # of each row that is left
        mutual = scores.argmax(0)[best] == torch.arange(len(rows), device=scores.device)
        chosen[rows[mutual]] = columns[best[mutual]]
        left = torch.ones_like(columns, dtype=torch.bool).index_fill(0, best[mutual], False)
        scores, rows, columns = scores[~mutual][:, left], rows[~mutual], columns[left]
    return chosen


def match(x):
    """Deal slots out to inputs x (B,): those they own and as many that nobody does. Returns codes (B,)."""
    slots = state['slots']
    new = x if rematch else x[slots[x] < 0]
    if len(new):
        free = torch.ones(n_slots + 1, dtype=torch.bool, device=world.device)       # the last one stands for slot -1
        free = free.index_fill(0, slots, False)[:-1].nonzero()[:, 0]
        free = free[torch.randperm(len(free), generator=world.generator, device=world.device)[:n_batch]]
        own = slots[new].unique()
        choices = torch.cat([own[own >= 0], free])                                  # (C,)
        scores = score(choices % n_codes, new)                                      # (B, C)
        slots[new] = choices[one_to_one(scores) if unique else scores.argmax(1)]
    return slots[x] % n_codes


def balance(x):
    """Draw codes (B,) for inputs x (B,) from the balanced target of all inputs and codes."""
    scores = score(torch.arange(n_codes, device=world.device), inputs)              # (M, C)
    log_target, state['prices'] = balanced_target(scores, state['prices'], tau, balance_steps)
    return sample(log_target[x], torch.rand(n_batch, generator=world.generator, device=world.device))[0]


def imitate(x, codes):
    """Losses of both policies for inputs x (B,) that are to have these codes (B,)."""
    thoughts = spell(codes)                                                         # (B, T)
    return {'thinking_loss': -thinking.thought_log_probs(x[:, None], thoughts).sum(1).mean(),
            'answering_loss': F.cross_entropy(answering.answer(thoughts).float(), x)}


def policy_gradient(x, step):
    """Losses of both policies from their own rollouts for inputs x (B,)."""
    noise = world.draw(torch.rand, n_batch, group_size, think_len).flatten(0, 1)
    bias = world.draw(torch.randn, n_batch, group_size, d_thought_vocab).flatten(0, 1) if logit_noise else 0.
    tree = Tree(thinking)
    thoughts = thinking.think(x[:, None], think_len, n_rollouts=group_size, noise=noise, bias=logit_noise * bias,
                              merge=tree).tokens                                    # (B G, T)
    log_pi, entropy = (each.sum(1).view(-1, group_size) for each in thinking.thought_log_probs(
        x.repeat_interleave(group_size)[:, None], thoughts, entropy=True, merge=tree))      # (B, G)

    numbers = thinking.number(thoughts).view(-1, group_size)                        # (B, G)
    counts = world.gather(numbers).flatten().bincount(minlength=n_codes)
    state['frequency'].lerp_(counts / counts.sum(), 1 - memory)
    codes, column = numbers.unique(return_inverse=True)                             # (C,): each is read once
    log_q = answering.answer(spell(codes)).float().log_softmax(-1)[column, x[:, None]]      # (B, G)
    rewards = log_q.detach() - code_price * (state['frequency'][numbers] * n_codes).log()
    everybody = world.gather(rewards)
    weights = advantages(rewards, advantage, tau, state['baseline'], everybody)     # (B, G)
    state['baseline'].lerp_(everybody.mean(), .1)

    bonus = entropy_weight + (entropy_end - entropy_weight) * step / max_steps
    return {'thinking_loss': -(weights * log_pi).sum(1).mean() - bonus * entropy.mean(),
            'answering_loss': -log_q.mean(), 'entropy': entropy.mean()}


def straight_through(x):
    """The loss of both policies together for inputs x (B,): thoughts are tokens forward, and probabilities backward."""
    V, end = thinking.config.d_vocab_total, thinking.config.end_thought
    sequence = F.one_hot(x[:, None], V).float()                                     # (B, 1, V)
    for _ in range(think_len):
        logits = thinking(sequence)[:, -1, thinking.columns(thought_tokens)].float()
        uniform = world.draw(torch.rand, n_batch, d_thought_vocab).clamp(1e-9)
        soft = ((logits - (-uniform.log()).log()) / tau).softmax(-1)                # (B, L)
        thought = F.one_hot(soft.argmax(-1), d_thought_vocab) + soft - soft.detach()
        sequence = torch.cat([sequence, F.pad(thought, (input_max, 1))[:, None]], dim=1)
    ends = F.one_hot(torch.full_like(x, end)[:, None], V)
    read = torch.cat([sequence[:, 1:], ends], dim=1)[..., input_max:]               # (B, T + 1, L + 1)
    return {'answering_loss': F.cross_entropy(answering(read)[:, -1].float(), x)}


n_steps = run.first_step
for step in run.steps(run.first_step, run.first_step if eval_only else max_steps):
    if step % eval_every == 0:
        save(step)
        evaluate(step)
    for optimizer, rate in zip(optimizers, (learning_rate, learning_rate_answer)):
        schedule(optimizer, rate, step, max_steps, warmup_steps)

    # a batch of inputs, and the codes to be learned; every process finds all of them and takes its share
    batch = next_batch(step)
    imitates = method in ('match', 'sinkhorn')
    if imitates:
        codes = world.share(match(batch) if method == 'match' else balance(batch))
    x = world.share(batch)                                                          # (B,)
    for _ in range(inner_steps if imitates else 1):
        with world.autocast:
            losses = (imitate(x, codes) if imitates else
                      policy_gradient(x, step) if method == 'reinforce' else straight_through(x))
        sum(loss for name, loss in losses.items() if name.endswith('loss')).backward()
        world.mean_gradients([parameter for model in models.values() for parameter in model.parameters()])
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    if step % log_every == 0:
        run.log(step, **{name: value.item() for name, value in losses.items()})
    n_steps = step + 1

# ---- the last line --------------------------------------------------------------------------------------------------

save(n_steps)
result = evaluate(n_steps)
ablation = {name: judge(thoughts)[1] for name, thoughts in ablations(think_greedily(), thought_tokens).items()}
if plot and run.writes:
    draw_growth()
run.finish(steps=n_steps, **result, ablation=ablation)

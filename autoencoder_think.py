"""
Autoencoder: two policies agree on a code for one token, from nothing.

    x of M  ->  thinking policy  ->  T thoughts, each one of L tokens  ->  answering policy  ->  x

The answering policy sees nothing but the thoughts. If L^T = M, an accuracy of 1 is a perfect one-to-one code.

    python autoencoder_think.py                                        # M=64, 8 thought tokens, 2 thoughts
    python autoencoder_think.py --input_max=1000 --d_thought_vocab=10 --think_len=3
    python autoencoder_think.py --method=reinforce --learning_rate=5e-4 --max_steps=600
    python autoencoder_think.py --method=gumbel --tau=8 --learning_rate=1e-3 --learning_rate_answer=1e-3
    torchrun --standalone --nproc_per_node=2 autoencoder_think.py      # the same update, by two processes

Four methods:

match      The answering policy scores codes for a batch of inputs by log p(x | code): those the inputs
           own, and as many free ones. Codes are dealt anew, one to an input, the best scores first, and both
           policies learn the pairs. Expert iteration with a dealer, not a policy gradient.
sinkhorn   The same with prices in place of owners, see balanced_target in utils.py.
reinforce  The policy gradient (Williams 1992), summed over all codes instead of samples. A code is paid
           log p(x | code) - code_price * log(how often it is written, relative to its share), and there is
           a bonus for entropy. In the second half, inputs that are misread are also drawn to codes that are
           written less than their share. The answering policy learns from all codes by cross-entropy.
gumbel     The straight-through Gumbel-softmax (Jang et al. 2017): gradients pass through the thoughts.
"""
import math

from model import KVCache, ThinkingModelConfig, make_model
from utils import (Run, World, ablations, balanced_target, curve, fail, judge, make_optimizer, picture,
                   read_knobs, sample, schedule)

import torch
import torch.nn.functional as F

# ---- knobs ----

method = 'match'              # 'match' | 'sinkhorn' | 'reinforce' | 'gumbel'
input_max = 64                # M: inputs are 0..M-1
d_thought_vocab = 8           # L: thought tokens
think_len = 2                 # T: thoughts per input
batch_size = 1024             # inputs per step, over all processes; all of them if M is less
max_steps = 30                # steps; the learning rates fall to zero over their second half
inner_steps = 5               # of match and sinkhorn: updates per step, with the same pairs
max_seconds = 1e6             # stop after this wall-clock time
learning_rate = 1e-2          # of the thinking policy
learning_rate_answer = 1e-2   # of the answering policy
weight_decay = 0.             # of both policies, as the next four
n_layer = 1
n_head = 8
d_model = 64
init = 'unit'                 # 'unit' | 'gpt2': activations of size one, or weights of std .02
frozen = 'none'               # 'none' | 'thinking' | 'answering': the policy that does not learn
rematch = True                # of match: deal codes in every step; False: only once
unique = True                 # of match: no two inputs share a code; False: each has its best, shared or not
tau = .1                      # temperature of sinkhorn's target and of gumbel's softmax
code_price = 8.               # of reinforce: price of a code, in nats per log of its use
entropy_weight = .5           # of reinforce: of a bonus for the entropy of codes; 1: being sure never pays
explore = .3                  # of reinforce: pull of misread inputs to spare codes in the second half
eval_every = 10               # steps between evaluations, each with a checkpoint and samples
log_every = 1                 # steps between lines of metrics.jsonl
seed = 0                      # of weights, batches and thoughts
device = 'auto'               # auto, cpu, cuda, cuda:1, mps
dtype = 'float32'             # 'float32' | 'bfloat16'; on a GPU float32 products are TF32
init_from = 'scratch'         # scratch, resume, auto (resume what is there), or a checkpoint's path
eval_only = False             # evaluate, train nothing, write nothing
out_dir = ''                  # folder of the run; empty: out/autoencoder_think/<changed knobs>
wandb_mode = 'disabled'       # 'disabled' | 'offline' | 'online'
plot = False                  # draw how the code grew at the end: growth.html, needs plotly

# ---- set-up ----

knobs = read_knobs(__file__, globals())
if think_len < 1 or max(think_len * math.log2(d_thought_vocab), math.log2(input_max)) > 24:
    fail(f'--think_len={think_len} must be at least 1, and at most 2^24 codes and inputs are possible: '
         f'd_thought_vocab={d_thought_vocab}, input_max={input_max}')
n_codes = d_thought_vocab ** think_len
n_slots = max(n_codes, input_max)       # slot s is code s % n_codes: with few codes, inputs have to share
n_batch = min(batch_size, input_max)
if method == 'sinkhorn' and input_max * n_codes > 2**26:
    fail(f'sinkhorn scores {input_max} inputs x {n_codes} codes, over 2^26: --method=match')
if method == 'match' and n_batch * min(2 * n_batch, n_slots) > 2**29:
    fail(f'match scores {n_batch} inputs x twice as many codes, over 2^29: a smaller --batch_size')
if method == 'reinforce' and (n_batch < input_max or input_max * n_codes > 2**23):
    fail(f'reinforce needs all {input_max} inputs in a batch, and at most 2^23 pairs of input and code')
world = World({**knobs, 'batch_size': n_batch})
inputs = torch.arange(input_max, device=world.device)

# ---- model, optimiser, run ----

shape = dict(block_size=think_len + 1, n_layer=n_layer, n_head=n_head, d_model=d_model, init=init,
             tie_weights=False, d_normal_vocab=input_max, d_thought_vocab=d_thought_vocab)
kinds = {'thinking': dict(output_kind='thought'),
         'answering': dict(input_kind='thought', output_kind='normal')}
models = {name: make_model(ThinkingModelConfig(**shape, **kind), knobs.checkpoint, name).to(world.device)
          for name, kind in kinds.items()}
thinking, answering = models.values()
if frozen != 'none':
    models[frozen].requires_grad_(False)
thought_tokens = thinking.thought_range(fixed=True)

optimizers = [make_optimizer(thinking, learning_rate, weight_decay),
              make_optimizer(answering, learning_rate_answer, weight_decay)]
run = Run(knobs, world, optimizers)
state = run.restore({
    'order': inputs,                                            # of the inputs in this epoch
    'slots': torch.full((input_max,), -1),                      # which slot each input owns, -1: none yet
    'prices': torch.zeros(n_codes * (method == 'sinkhorn'))})   # of codes, see balanced_target
best_accuracy = min(1, n_codes / input_max)
if best_accuracy < 1:
    run.print(f'{n_codes} codes cannot name {input_max} inputs, accuracy can reach {best_accuracy:.4}')

# ---- evaluation ----

def think():
    """The thoughts (M, T) that the thinking policy prefers, for every input."""
    return thinking.think(inputs[:, None], think_len, temperature=0).tokens


def evaluate(step):
    """Report on every input, show a few, keep the best checkpoint. Returns the numbers."""
    thoughts = think()
    answers, accuracy, bits = judge(answering, thoughts, inputs)
    counts = thinking.number(thoughts).unique(return_counts=True)[1].double()
    # the mutual information of input and greedy thoughts: the entropy of the code, as inputs are uniform
    bits_written = math.log2(input_max) - (counts * counts.log2()).sum().item() / input_max
    result = {'codes': len(counts), 'bits_written': max(0., bits_written), 'bits': bits, 'accuracy': accuracy}
    run.report(step, **result)
    run.show(thinking.config, inputs[:, None], thoughts, answers, inputs)
    run.save_best(step, accuracy, models, **state)
    return result


def draw_growth():
    """HTML: accuracy, distinct codes and bits over the steps."""
    figure = picture(3, f'{method}: {input_max} inputs, {think_len} thoughts of {d_thought_vocab} tokens')
    curve(figure, 1, run, 'accuracy', 'seagreen')
    curve(figure, 2, run, 'codes', 'firebrick')
    curve(figure, 3, run, 'bits_written', 'darkorange')
    curve(figure, 3, run, 'bits', 'teal')
    return figure.to_html()


# ---- scores of codes; match and sinkhorn choose codes (B,) for the inputs x (B,) of all processes ----

def score(codes, x):
    """log p(x | code) of inputs x (B,) and codes (C,): (B, C)."""
    parts = [thinking.spell(part, think_len) for part in codes.split(max(1, 2**25 // input_max))]
    return torch.cat([answering.answer(part, fixed=True).float().log_softmax(-1)[:, x] for part in parts]).T


def one_to_one(scores):
    """
    A column of its own for every row of scores (n, m), n <= m, the highest scores first: pairs that prefer
    each other are taken out until no row is left. Returns columns (n,).
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


@torch.no_grad()
def match(x):
    """Deal slots to inputs: those that they own, and as many free ones."""
    slots = state['slots']
    new = x if rematch else x[slots[x] < 0]
    if len(new):
        free = torch.ones(n_slots + 1, dtype=torch.bool, device=world.device)       # the last one is slot -1
        free = free.index_fill(0, slots, False)[:-1].nonzero()[:, 0]
        free = free[torch.randperm(len(free), generator=world.generator, device=world.device)[:n_batch]]
        own = slots[new].unique()
        choices = torch.cat([own[own >= 0], free])                                  # (C,)
        scores = score(choices % n_codes, new)                                      # (B, C)
        slots[new] = choices[one_to_one(scores) if unique else scores.argmax(1)]
    return slots[x] % n_codes


@torch.no_grad()
def sinkhorn(x):
    """Draw codes from the balanced target of all inputs and codes."""
    scores = score(torch.arange(n_codes, device=world.device), inputs)              # (M, C)
    log_target, state['prices'] = balanced_target(scores, state['prices'], tau)
    return sample(log_target[x], torch.rand(n_batch, generator=world.generator, device=world.device))


# ---- losses of both policies for inputs x (B,), and codes (B,) if the method chose some ----

def imitate(x, codes, step):
    """Both policies learn given pairs."""
    thoughts = thinking.spell(codes, think_len)                                     # (B, T)
    return {'thinking_loss': -thinking.thought_log_probs(x[:, None], thoughts)[0].sum(1).mean(),
            'answering_loss': F.cross_entropy(answering.answer(thoughts, fixed=True).float(), x)}


def policy_gradient(x, codes, step):
    """Both policies learn from all codes, each weighted by its probability."""
    log_pi, log_q = code_log_probs(x), score(torch.arange(n_codes, device=x.device), x)     # (B, C)
    pi = log_pi.exp().detach()
    usage = world.gather(pi.mean(0, keepdim=True)).mean(0) * n_codes                # (C,), 1: a fair share
    price = code_price * usage.clamp(min=1e-9).log()
    reward = log_q - price - entropy_weight * log_pi                                        # (B, C)
    weights = pi * (reward - (pi * reward).sum(1, keepdim=True)).detach()
    if step >= max_steps / 2:       # misread inputs are drawn to spare codes, however unlikely
        misread = 1 - (pi * log_q.exp()).sum(1, keepdim=True).detach()                      # (B, 1)
        spare = (1 - usage).clamp(min=0)
        weights = weights + explore * misread * spare / spare.sum().clamp(min=.1)   # .1: not 0 / 0
    return {'thinking_loss': -(weights * log_pi).sum(1).mean(), 'answering_loss': -(pi * log_q).sum(1).mean(),
            'entropy': -(pi * log_pi).sum(1).mean()}


def code_log_probs(x):
    """Log-probabilities (B, C) of all codes for inputs x (B,). The prefixes of codes are read once each."""
    cache, sequence, log_pi = KVCache(), x[:, None], torch.zeros(len(x), 1, device=x.device)
    for t in range(think_len):
        if t:       # each goes on in L ways
            cache.repeat(d_thought_vocab)
            sequence = torch.tensor(thought_tokens, device=x.device).repeat(len(sequence))[:, None]
        logits = thinking.logits(thinking.hidden(sequence, cache, first=-1)[:, 0], thought_tokens)
        log_pi = log_pi.view(-1, 1) + logits.float().log_softmax(-1)        # (B L^t, L)
    return log_pi.view(len(x), -1)


def straight_through(x, codes, step):
    """Thoughts are tokens in the forward pass and probabilities in the backward pass."""
    sequence = F.one_hot(x[:, None], thinking.config.d_vocab_total).float()         # (B, 1, V)
    for _ in range(think_len):
        logits = thinking.logits(thinking.hidden(sequence, first=-1)[:, 0], thought_tokens).float()
        uniform = world.draw(n_batch, d_thought_vocab).clamp(1e-9)
        soft = ((logits - (-uniform.log()).log()) / tau).softmax(-1)                # (B, L)
        thought = F.one_hot(soft.argmax(-1), d_thought_vocab) + soft - soft.detach()
        sequence = torch.cat([sequence, F.pad(thought, (input_max, 1))[:, None]], dim=1)
    read = F.pad(sequence[:, 1:, input_max:], (0, 0, 0, 1))                         # (B, T + 1, L + 1)
    read[:, -1, -1] = 1                                                             # end_thought
    return {'answering_loss': F.cross_entropy(answering(read, first=-1)[:, 0].float(), x)}


# ---- training ----

choose = {'match': match, 'sinkhorn': sinkhorn}.get(method)
losses = {'reinforce': policy_gradient, 'gumbel': straight_through}.get(method, imitate)
n_steps = run.first_step
for step in run.steps(run.first_step if eval_only else max_steps):
    if step % eval_every == 0:
        run.save(step, models, **state)
        evaluate(step)
    for optimizer, rate in zip(optimizers, (learning_rate, learning_rate_answer)):
        schedule(optimizer, rate, step, max_steps, warmup_steps=5)

    # a new order of the inputs in every epoch; every process finds all codes and takes its share
    begin = step % (input_max // n_batch) * n_batch
    if begin == 0:
        state['order'] = torch.randperm(input_max, generator=world.generator, device=world.device)
    batch = state['order'][begin:begin + n_batch]
    x, codes = world.share(batch), world.share(choose(batch)) if choose else None   # (B,), (B,)
    for _ in range(inner_steps if choose else 1):
        with world.autocast:
            seen = losses(x, codes, step)
        sum(loss for name, loss in seen.items() if name.endswith('loss')).backward()
        world.mean_gradients([parameter for model in models.values() for parameter in model.parameters()])
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    if step % log_every == 0:
        run.log(step, **{name: value.item() for name, value in seen.items()})
    n_steps = step + 1

# ---- the last line ----

run.save(n_steps, models, **state)
result, thoughts = evaluate(n_steps), think()
replaced = ablations(thoughts, thought_tokens)
ablation = {name: judge(answering, other, inputs)[1] for name, other in replaced.items()}
run.draw('growth.html', draw_growth) if plot else None
run.finish(steps=n_steps, **result, ablation=ablation)

"""
Blind addition: two policies invent a language, and answer every question in it.

    question a, b  ->  thinking policy  ->  T thoughts  ->  answering policy  ->  (a + b) % M

The answering policy sees nothing but the thoughts. Nobody tells either what a thought means.

    python add_think_blind.py                                              # M=100, 10 thought tokens, 2 thoughts
    python add_think_blind.py --d_thought_vocab=100 --think_len=1          # one thought says it all
    python add_think_blind.py --init_from=resume                           # go on after an interruption
    torchrun --standalone --nproc_per_node=2 add_think_blind.py            # the same update, by two processes

Each step: the answering policy scores all L^T codes, that is, says how likely every answer is after every code. These
rewards, log p(answer | code), are turned into a target: a distribution over codes for every answer, near
softmax(reward / tau), in which no code is taken by more than its share of answers. Thoughts are drawn from the target.
The thinking policy learns to write them (cross-entropy), the answering policy to read them (cross-entropy weighted by
the target), which makes codes that are a little better for an answer a lot better: this is how meaning gets started.

What it is not: a policy gradient. Advantage-weighted regression (Peng et al. 2019) would weight samples of the thinking
policy by softmax(reward / tau); here all codes are weighted, and the weights are balanced over codes, without which
answers come to share codes (--balance_steps=0). Because all codes are scored, the language is the answering policy's
invention, and the thinking policy learns it.
"""
import math

import torch

from model import ThinkingModelConfig, make_model, pack
from utils import (Run, World, ablations, addition_pairs, balanced_target, fail, make_optimizer, need,
                   read_knobs, sample, schedule, show_tokens, user_errors, write_atomic)

# ---- knobs ----------------------------------------------------------------------------------------------------------

input_max = 100                 # M: numbers are 0..M-1
d_thought_vocab = 10            # L: thought tokens
think_len = 2                   # T: thoughts per question
heldout = .2                    # share of the M^2 questions that is never trained on
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
tau = .1                        # temperature of the target: smaller makes the best codes count more
balance_steps = 10              # iterations per step that keep answers from sharing codes; 0: they may
eval_every = 250                # steps between evaluations, each with a checkpoint and samples
eval_questions = 10000          # questions of each kind per evaluation, at most
log_every = 10                  # steps between lines of metrics.jsonl
seed = 0                        # of weights, questions and thoughts
device = 'auto'                 # auto, cpu, cuda, cuda:1, mps
dtype = 'float32'               # 'float32' | 'bfloat16'
init_from = 'scratch'           # scratch, resume, or the path of a checkpoint to take weights from
eval_only = False               # evaluate, train nothing, write nothing
out_dir = ''                    # folder of the run; empty: out/add_think_blind/<changed knobs>
wandb_mode = 'disabled'         # 'disabled' | 'offline' | 'online'
plot = False                    # draw the language at the end: language.html, needs plotly; not with eval_only

# ---- set-up ---------------------------------------------------------------------------------------------------------

knobs = read_knobs(__file__, globals())
if think_len * math.log2(d_thought_vocab) > 17:
    fail(f'd_thought_vocab={d_thought_vocab} and think_len={think_len} make over 2^17 codes, too many to score all')
n_codes = d_thought_vocab ** think_len
world = World(knobs)

# ---- data -----------------------------------------------------------------------------------------------------------

train_pairs, heldout_pairs = (pairs.to(world.device) for pairs in addition_pairs(0, input_max, heldout, seed))

# ---- model ----------------------------------------------------------------------------------------------------------

shape = dict(block_size=think_len + 1, n_layer=n_layer, n_head=n_head, d_model=d_model, init='unit', tie_weights=False,
             d_normal_vocab=input_max, d_thought_vocab=d_thought_vocab)
with user_errors():
    thinking = make_model(ThinkingModelConfig(**shape, output_kind='thought'), knobs.checkpoint, 'thinking')
    answering = make_model(ThinkingModelConfig(**shape, input_kind='thought', output_kind='normal'), knobs.checkpoint,
                           'answering')
thinking, answering = thinking.to(world.device), answering.to(world.device)
thought_tokens = thinking.thought_range(fixed=True)
codes = torch.cartesian_prod(*[torch.arange(thought_tokens.start, thought_tokens.stop)] * think_len)
codes = codes.view(n_codes, think_len).to(world.device)                                         # (n_codes, T)
prices = torch.zeros(n_codes, device=world.device)

# ---- optimiser and run ----------------------------------------------------------------------------------------------

thinking_optimizer = make_optimizer(thinking, learning_rate, weight_decay)
answering_optimizer = make_optimizer(answering, learning_rate_answer, weight_decay_answer)
optimizers = [thinking_optimizer, answering_optimizer]
run = Run(knobs, world, optimizers)
if init_from == 'resume':
    prices = knobs.checkpoint['prices'].to(world.device)
if n_codes < input_max:
    run.print(f'warning: {n_codes} codes cannot name {input_max} answers, accuracy can reach {n_codes / input_max:.4g}')


def save(step, name='ckpt.pt'):
    run.save(step, {'thinking': pack(thinking), 'answering': pack(answering)}, name, prices=prices)


# ---- evaluation -----------------------------------------------------------------------------------------------------

@torch.no_grad()
def think_greedily(question):
    """question: (n, 2). Returns the thoughts (n, T) that the thinking policy prefers."""
    return torch.cat([thinking.think(part, think_len, temperature=0).tokens for part in question.split(4096)])


@torch.no_grad()
def answer_greedily(thoughts):
    """thoughts: (n, T). Returns the answers (n,) that the answering policy prefers."""
    return torch.cat([answering.answer(part).argmax(-1) for part in thoughts.split(4096)])


def accuracy(question, thoughts):
    """Share of questions (n, 2) answered rightly after thoughts (n, T)."""
    return (answer_greedily(thoughts) == question.sum(1) % input_max).sum().item() / len(question)


def evaluate(step):
    """Report on all questions, show a few, keep the best checkpoint. Returns the numbers."""
    train, test = train_pairs[:eval_questions], heldout_pairs[:eval_questions]
    train_thoughts, test_thoughts = think_greedily(train), think_greedily(test)
    result = {'accuracy': accuracy(train, train_thoughts), 'heldout_accuracy': accuracy(test, test_thoughts),
              'codes': len(train_thoughts.cpu().unique(dim=0))}
    run.report(step, **result)
    for question, thought, answer in zip(test[:3], test_thoughts, answer_greedily(test_thoughts[:3])):
        end = torch.full_like(thought[:1], thinking.config.end_thought)
        run.sample(show_tokens(torch.cat([question, thought, end, answer[None]]), thinking.config),
                   right=answer == question.sum() % input_max)
    if result['heldout_accuracy'] > run.best:
        run.best = result['heldout_accuracy']
        save(step, 'best.pt')
    return result


def draw_language(path):
    """Which thoughts are written for which answer, and how often, over all questions: a picture, stand-alone HTML."""
    graph = need('plotly.graph_objects', 'to draw pictures')
    question = torch.cat([train_pairs, heldout_pairs])
    place_value = torch.tensor([d_thought_vocab ** t for t in range(think_len - 1, -1, -1)], device=world.device)
    code = ((think_greedily(question) - thought_tokens.start) * place_value).sum(1)     # (M^2,) thoughts as one number
    counts = (question.sum(1) % input_max * n_codes + code).bincount(minlength=input_max * n_codes)
    counts = counts.view(input_max, n_codes).cpu().numpy()
    names = [' '.join(map(str, row)) for row in (codes - thought_tokens.start).tolist()]
    figure = graph.Figure(graph.Heatmap(
        z=counts, x=names, y=list(range(input_max)), colorscale='Blues', colorbar_title='questions',
        hovertemplate='answer %{y}, thoughts %{x}: %{z} questions<extra></extra>'))
    figure.update_layout(title='The invented language', xaxis={'title': 'thoughts', 'type': 'category'},
                         yaxis_title='answer', width=900, height=800)
    write_atomic(path, lambda temporary: figure.write_html(temporary, config={'displayModeBar': False}))


# ---- training -------------------------------------------------------------------------------------------------------

n_steps = run.first_step
for step in run.steps(run.first_step, run.first_step if eval_only else max_steps):
    if step % eval_every == 0:
        save(step)
        evaluate(step)
    schedule(thinking_optimizer, learning_rate, step, max_steps, warmup_steps)
    schedule(answering_optimizer, learning_rate_answer, step, max_steps, warmup_steps)

    # a batch of questions; every process draws all of it and takes its share
    rows = torch.randint(len(train_pairs), (batch_size,), generator=world.generator, device=world.device)
    noise = world.share(torch.rand(batch_size, generator=world.generator, device=world.device))
    question = train_pairs[world.share(rows)]                                       # (B, 2)
    answer = question.sum(1) % input_max                                            # (B,)

    with world.autocast:
        # rewards of all codes, and the thoughts that the target draws
        log_q = answering.answer(codes).float().log_softmax(-1).T                   # (M, n_codes) log p(answer | code)
        log_target, prices = balanced_target(log_q.detach(), prices, tau, balance_steps)
        code, _ = sample(log_target[answer], noise)
        thoughts = codes[code]                                                      # (B, T)

        thinking_loss = -thinking.thought_log_probs(question, thoughts).sum(1).mean()
        answering_loss = -(log_target.exp() * log_q)[answer].sum(1).mean()
    (thinking_loss + answering_loss).backward()
    world.mean_gradients([*thinking.parameters(), *answering.parameters()])
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()

    if step % log_every == 0:
        run.log(step, thinking_loss=thinking_loss.item(), answering_loss=answering_loss.item(),
                target_codes=len(log_target.argmax(1).unique()), highest_price=prices.max().item())
    n_steps = step + 1

# ---- the last line --------------------------------------------------------------------------------------------------

save(n_steps)
result = evaluate(n_steps)
test = heldout_pairs[:eval_questions]
thoughts = think_greedily(test)
ablation = {name: accuracy(test, replaced) for name, replaced in ablations(thoughts, thought_tokens).items()}
if plot and run.writes:
    draw_language(run.folder / 'language.html')
run.finish(steps=n_steps, **result, ablation=ablation)

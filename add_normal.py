"""
Addition answered at once: the baseline without thoughts.

    question a, b  ->  model  ->  answer

    python add_normal.py                                            # one token per integer, (a + b) % 100
    python add_normal.py --encoding=digits --input_max=1000         # characters: 007+012=0019
    python add_normal.py --init_from=resume                         # go on after an interruption
    torchrun --standalone --nproc_per_node=2 add_normal.py          # the same update, by two processes

With encoding 'int' a question is two tokens and its answer one, as in add_think_blind.py: this is its
control, with the shape of one of its policies and the same steps. With 'digits' it is text of the characters
0-9, + and =, numbers padded with zeros to equal length, and the sum is not reduced; an answer is right if all
its digits are, generated one by one.
"""
from model import ModelConfig, make_model
from utils import (Run, World, addition_questions, digits, make_optimizer, paint, read_knobs, schedule)

import torch

# ---- knobs ----

encoding = 'int'              # 'int' | 'digits'
digit_order = 'msb'           # 'msb' | 'lsb': of the answer, most or least significant digit first
input_min = 0                 # numbers are input_min..M-1
input_max = 100               # M
heldout = .2                  # share of the questions that is never trained on
batch_size = 512              # questions per step, over all processes
max_steps = 1500              # updates; the learning rate falls to zero over their second half
max_seconds = 1e6             # stop after this wall-clock time
learning_rate = 3e-3
weight_decay = 3.             # what makes it generalise
n_layer = 1
n_head = 32
d_model = 128
eval_every = 250              # steps between evaluations, each with a checkpoint and samples
eval_questions = 10000        # questions of each kind per evaluation, at most
log_every = 10                # steps between lines of metrics.jsonl
seed = 0                      # of weights and questions
device = 'auto'               # auto, cpu, cuda, cuda:1, mps
dtype = 'float32'             # 'float32' | 'bfloat16'; on a GPU float32 products are TF32
init_from = 'scratch'         # scratch, resume, auto (resume what is there), or a checkpoint's path
eval_only = False             # evaluate, train nothing, write nothing
out_dir = ''                  # folder of the run; empty: out/add_normal/<changed knobs>
wandb_mode = 'disabled'       # 'disabled' | 'offline' | 'online'

# ---- set-up ----

knobs = read_knobs(__file__, globals())
world = World(knobs)

# ---- data ----

train_set, heldout_set = (part.to(world.device)
                          for part in addition_questions(input_min, input_max, heldout, seed))
CHARACTERS = '0123456789+='


def encode(pairs):
    """Tokens (n, S) of questions and (n, A) of their answers, for pairs of numbers (n, 2)."""
    a, b = pairs.T
    if encoding == 'int':
        return pairs, ((a + b) % input_max)[:, None]
    plus, equals = (torch.full_like(a, CHARACTERS.index(character))[:, None] for character in '+=')
    width, answer = len(str(input_max - 1)), digits(a + b, len(str(2 * input_max - 2)))
    question = torch.cat([digits(a, width), plus, digits(b, width), equals], dim=1)
    return question, answer.flip(1) if digit_order == 'lsb' else answer


def decode(tokens):
    """Tokens (n,) as text."""
    if encoding == 'int':
        return ' '.join(map(str, tokens.tolist()))
    return ''.join(CHARACTERS[i] for i in tokens.tolist())


question_len, answer_len = (tokens.shape[1] for tokens in encode(train_set[:1]))

# ---- model, optimiser, run ----

config = ModelConfig(d_vocab=input_max if encoding == 'int' else len(CHARACTERS), n_layer=n_layer,
                     n_head=n_head, d_model=d_model, block_size=question_len + answer_len, init='unit',
                     tie_weights=False)
model = make_model(config, knobs.checkpoint).to(world.device)

optimizer = make_optimizer(model, learning_rate, weight_decay)
run = Run(knobs, world, [optimizer])

# ---- evaluation ----

def accuracy(pairs):
    """The share of questions (n, 2) whose whole answer is right."""
    question, answer = encode(pairs)
    return (model.generate(question, answer_len, temperature=0) == answer).all(1).sum().item() / len(pairs)


def evaluate(step):
    """Report on both sets of questions, show a few, keep the best checkpoint. Returns the numbers."""
    train, test = train_set[:eval_questions], heldout_set[:eval_questions]
    result = {'accuracy': accuracy(train), 'heldout_accuracy': accuracy(test)}
    run.report(step, **result)
    question, answer = encode(test[:3])
    for q, a, guess in zip(question, answer, model.generate(question, answer_len, temperature=0)):
        run.sample(paint(decode(torch.cat([q, guess])), 'blue'), right=(guess == a).all())
    run.save_best(step, result['heldout_accuracy'], {'model': model})
    return result


# ---- training ----

n_steps = run.first_step
for step in run.steps(run.first_step if eval_only else max_steps):
    if step % eval_every == 0:
        run.save(step, {'model': model})
        evaluate(step)
    schedule(optimizer, learning_rate, step, max_steps)

    # every process draws the whole batch and takes its share
    rows = torch.randint(len(train_set), (batch_size,), generator=world.generator, device=world.device)
    question, answer = encode(train_set[world.share(rows)])                         # (B, S), (B, A)
    with world.autocast:
        loss = -model.log_probs(question, answer)[0].sum(1).mean()
    loss.backward()
    world.mean_gradients(model.parameters())
    optimizer.step()
    optimizer.zero_grad()

    if step % log_every == 0:
        run.log(step, loss=loss.item())
    n_steps = step + 1

# ---- the last line ----

run.save(n_steps, {'model': model})
result = evaluate(n_steps)
run.finish(steps=n_steps, **result)

"""
Text: whole rollouts. A model goes on from a real text, thinking where it likes, and another model judges.

    a real text  ->  normal tokens and thoughts, mixed  ->  thoughts stripped  ->  log p by a reference

    python supervised_rollout_think.py --think_len=0                            # a model to start from
    python rollout_think.py --init_from=out/supervised_rollout_think/think_len=0/ckpt.pt --reference=<better>
    python rollout_think.py --init_from=... --reference=... --think_len=0       # the control
    python rollout_think.py --data=data/novels --init_from=gpt2 --reference=gpt2-xl     # in GPT-2's tokens
    torchrun --standalone --nproc_per_node=2 rollout_think.py --init_from=... --reference=...
    python rollout_think.py --reward=math --data=data/problems --init_from=HuggingFaceTB/SmolLM2-135M-Instruct

Each step: B prefixes, G rollouts of each. A frozen reference, which sees no thoughts, pays each normal token
its log p. All tokens and thoughts before it are paid too, gamma times less for each normal token between.
Rollouts of a prefix are compared at the same normal token: the policy gradient (Williams 1992) with the mean
of the group as baseline (Dr. GRPO, Liu et al. 2025). No ratios are clipped, as each rollout is used once.

A reference likes to be told what it expects, again and again. So a normal token is also paid its own -log p,
among normal tokens, after the thoughts that were written. With entropy_weight=1 a text earns, on average,
minus the KL divergence of its tokens from the reference, given the thoughts, which earn nothing.

With reward=math a pretrained model of transformers solves problems, thinking in its own words. It is paid for
the right answer, and for the form that examples show: the answer in one \\boxed{}. Its loss is a sum over
tokens: a mean would make short right solutions count more, and long wrong ones less (Dr. GRPO).
"""
import json
import math
import re
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from model import GPT2, GPT2Thinking, ModelConfig, choice, find_model, from_pretrained
from utils import (Run, World, advantages, as_html, concentration, fail, fingerprint, load_checkpoint,
                   load_text, make_optimizer, need, paint, read_knobs, recorded, sample, schedule,
                   show_tokens)

# ---- knobs ----

reward = 'text'               # 'text' | 'math': who pays, a reference model or the right answer to a problem
data = 'data/shakespeare_char'    # folder that prepare_data.py made; math: or one file of problems
levels = ''                   # math: wanted difficulties, separated by commas; empty: all
format_weight = .1            # math: what the right form is paid; the right answer is paid 1
micro_batch = 32              # math: solutions that are read at once for the gradient; 0: all of a process
reference = ''                # who judges: a checkpoint, or the folder or hub name of a GPT-2
prefix_len = 32               # tokens of real text to go on from
text_len = 32                 # normal tokens that are written; math: at most
batch_size = 8                # prefixes or problems per step, over all processes
group_size = 8                # G: rollouts of each
max_steps = 500               # updates
max_seconds = 1e6             # stop after this wall-clock time
learning_rate = 3e-4          # falls to a tenth of it, as a cosine
weight_decay = 0.
clip = 1.                     # largest norm of the gradient; 0: any
warmup_steps = 10             # steps over which the learning rate rises
n_layer = 4                   # of a model from scratch, as the next two
n_head = 4
d_model = 128
d_thought_vocab = 64          # L: thought tokens
think_len = 1                 # T: largest number of thoughts before a normal token; 0: none
fixed = False                 # always T thoughts before a normal token
advantage = 'dr_grpo'         # 'dr_grpo' | 'grpo' | 'rloo' | 'quantile' | 'softmax' | 'softmax_quantile' |
                              # 'softmax_centred' | 'best': see utils.py
tau = 1.                      # temperature of the three softmax
gamma = .9                    # share of its return that a normal token passes on to the one before
entropy_weight = 1.           # reward for entropy: times a normal token's own -log p
supervised_weight = 0.        # of the cross-entropy of the real continuation, with own thoughts inside
temperature = 1.              # of rollouts
eval_every = 50               # steps between evaluations, each with a checkpoint and samples
eval_prefixes = 128           # prefixes or problems per evaluation, evenly from all of val
log_every = 1                 # steps between lines of metrics.jsonl
seed = 0                      # of weights, prefixes and rollouts
device = 'auto'               # auto, cpu, cuda, cuda:1, mps
dtype = 'float32'             # 'float32' | 'bfloat16'
compile = False               # write as one CUDA graph of fused kernels: faster, a minute later
init_from = 'scratch'         # scratch, resume, auto, checkpoint, GPT-2; math: hub name, folder, .gguf file
page = False                  # write samples.html at the end: texts with thoughts
eval_only = False             # evaluate, train nothing, write nothing
out_dir = ''                  # folder of the run; empty: out/rollout_think/<changed knobs>
wandb_mode = 'disabled'       # 'disabled' | 'offline' | 'online'

# ---- set-up ----

knobs = read_knobs(__file__, globals(), pretrained=True)
if group_size < 2:
    fail(f'rollouts of a prefix are compared: group_size={group_size} must be at least 2')
if reward == 'text' and not reference or reward == 'math' and init_from == 'scratch':
    fail('--reward=text needs a --reference that judges, --reward=math a pretrained model: --init_from')
world, G = World(knobs), group_size

# ---- text: data and models ----

def cut(tokens, starts):
    """Prefixes (B, prefix_len) of tokens at starts (B,), and what follows (B, text_len)."""
    rows = tokens[starts.numpy()[:, None] + np.arange(n_cut)].astype(np.int64)
    return torch.from_numpy(rows).to(world.device).split([prefix_len, text_len], dim=1)


if reward == 'text':
    train_set, val_set, d_vocab, decode = load_text(data, knobs)
    n_cut, longest = prefix_len + text_len, text_len * (think_len + 1)
    n_read = prefix_len + longest       # at most, with thoughts
    if min(len(train_set), len(val_set)) <= n_cut:
        fail(f'{data} has no {n_cut} tokens in a row: a smaller --prefix_len or --text_len')
    val_prefix, val_real = cut(val_set, torch.linspace(0, len(val_set) - n_cut, eval_prefixes).long())
    if knobs.checkpoint:        # its shape counts, not the knobs
        model = find_model(knobs.checkpoint)
    elif init_from != 'scratch':
        model = from_pretrained(init_from)
    else:
        model = GPT2(ModelConfig(d_vocab, n_read, n_layer, n_head, d_model))
    if not isinstance(model, GPT2Thinking):
        room = max(model.config.block_size, n_read)
        model = GPT2Thinking.from_normal(model, d_thought_vocab, block_size=room)
    judge = (find_model(load_checkpoint(reference, text=knobs.text)) if reference.endswith('.pt') else
             from_pretrained(reference))
    for source, it, most in ((init_from, model, n_read), (reference, judge, n_cut - 1)):
        room, n_tokens = it.config.block_size, getattr(it.config, 'd_normal_vocab', it.config.d_vocab)
        if room < most or n_tokens != d_vocab:
            fail(f'{source} reads {room} of {n_tokens} tokens, texts have up to {most} of {d_vocab}')
    config, models = model.config, {'model': model.to(world.device)}
    judge.to(world.device).eval()

# ---- text: what is written, and what it is paid ----

def write(prefix, noise, text=None):
    """Rollouts (N, T) of prefixes (B, prefix_len) by noise (N, longest); with given text (N, n) if any."""
    return model.write(prefix, text_len, think_len, fixed=fixed, n_rollouts=len(noise) // len(prefix),
                       noise=noise, text=text, temperature=temperature)


def strip(tokens):
    """Text (N, n) of rollouts (N, T); for each token, the index in it of this or the next normal one."""
    normal = tokens < d_vocab
    place = (normal.cumsum(1) - normal.long()).clamp(max=text_len - 1)
    return tokens[normal].view(-1, text_len), place


def read(prefix, tokens):
    """Log p (N, T) of rollouts (N, T); log p and entropies (N, n) of the text in them. With gradient."""
    tokens = tokens[:, :(tokens != config.end_thought).any(0).sum()]    # T: until all have ended
    states = model.hidden(torch.cat([prefix, tokens[:, :-1]], dim=1))[:, prefix_len - 1:]
    logits, normal = model.logits(states, config.writes).float(), tokens < d_vocab
    # a rollout's tokens: among all that were allowed after so many thoughts
    t = torch.arange(tokens.shape[1], device=tokens.device)
    n_thoughts = t - torch.where(normal, t, -1).cummax(1).values  # (N, T) since the last normal token
    may = model.allowed(F.pad(n_thoughts, (1, -1)), think_len, fixed)
    log_p = logits.masked_fill(~may, -torch.inf).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    # its normal tokens: among normal ones only
    is_thought = torch.arange(config.d_vocab, device=tokens.device) >= d_vocab
    own = choice(logits[normal].masked_fill(is_thought, -torch.inf), tokens[normal])
    return torch.where(tokens == config.end_thought, 0., log_p), *(x.view(-1, text_len) for x in own)


def repeats(text, n):
    """For each token of texts (N, S), whether it completes n tokens that are in its text already: (N, S)."""
    runs = text.unfold(1, min(n, text.shape[1]), 1)  # (N, S - n + 1, n)
    again = (runs[:, :, None] == runs[:, None]).all(-1).tril(-1).any(-1)
    return F.pad(again, (text.shape[1] - again.shape[1], 0))


def pay(prefix, text, own):
    """Discounted rewards (N, n) of tokens of texts (N, n) with own log p (N, n); and their mean log p."""
    log_p = judge.log_probs(prefix, text, range(d_vocab))[0]
    place = torch.arange(text_len, device=text.device)
    paid_on = (gamma ** (place[:, None] - place).abs()).tril()      # (n, n): what follows pays, too
    return (log_p - entropy_weight * own) @ paid_on, log_p.mean()


def text_losses(batch, dice):
    """The loss for prefixes and how they really go on, see cut, and what to log. dice: see training."""
    (prefix, real), (noise, noise_real) = batch, dice
    tokens, many = write(prefix, noise), prefix.repeat_interleave(G, dim=0)  # (N, T), N = B G
    log_pi, own, entropy = read(many, tokens)  # (N, T), (N, n), (N, n)
    text, place = strip(tokens[:, :log_pi.shape[1]])  # (N, n), (N, T)
    with torch.no_grad():       # rollouts of a prefix are a group at each of n places
        returns, log_p = pay(many, text, own)
        groups = returns.view(-1, G, text_len).transpose(1, 2).flatten(0, 1)  # (B n, G)
        weights = advantages(groups, advantage, tau).view(-1, text_len, G).transpose(1, 2).flatten(0, 1)
    loss = -(weights.gather(1, place) * log_pi).sum() / (len(prefix) * text_len)
    seen = {'reward': log_p, 'entropy': entropy.detach().mean(),
            'reward_std_in_group': groups.std(1, correction=0).mean(),
            'thoughts': ((tokens != config.end_thought).sum() - text.numel()) / text.numel()}
    if supervised_weight:
        supervised = -read(prefix, write_real(prefix, noise_real, real))[1].mean()
        loss, seen['supervised_loss'] = loss + supervised_weight * supervised, supervised.detach()
    return loss, seen


# ---- text: evaluation ----

def describe(text):
    """Loss of texts (eval_prefixes, n) by the reference, nats per token; how varied and repetitive."""
    loss = -judge.log_probs(val_prefix, text, range(d_vocab))[0].mean().item()
    runs = text.unfold(1, min(4, text_len), 1).flatten(0, 1)
    return {'val_loss': loss, 'perplexity': math.exp(min(loss, 700)),    # which fits into a number
            'distinct_4': len(runs.unique(dim=0)) / len(runs),
            'repeated_8': repeats(text, 8).float().mean().item()}


@torch.no_grad()
def evaluate_texts(step):
    """Report on val, show three texts, keep the best checkpoint. Returns what belongs on the last line."""
    torch.manual_seed(seed)
    noise, other = torch.rand(2, eval_prefixes, longest, device=world.device)
    rollouts = partial(model.write, val_prefix, text_len, think_len, fixed=fixed, noise=noise)
    tokens = rollouts()
    pool = tokens[(tokens >= d_vocab) & (tokens != config.end_thought)]     # all thoughts in them
    own = {'thoughts': len(pool) / eval_prefixes / text_len} | describe(strip(tokens)[0])
    swaps = {} if not len(pool) else {
        'shuffled': pool[(other * len(pool)).long()],
        'random': d_vocab + (other * config.d_thought_vocab).long(),
        'constant': pool.mode().values.expand(other.shape)}
    losses = {name: describe(strip(rollouts(thoughts=swap))[0])['val_loss'] for name, swap in swaps.items()}
    if think_len:
        losses['none'] = describe(model.write(val_prefix, text_len, 0, noise=noise))['val_loss']
    real = describe(val_real)
    run.report(step, val_loss_real=real['val_loss'],
               **{f'val_loss_{name}': loss for name, loss in losses.items()}, **own)
    for row in torch.cat([val_prefix, tokens], dim=1)[:3].tolist():
        run.sample(show_tokens([t for t in row if t != config.end_thought], config, decode, ''))
    run.save_best(step, -own['val_loss'], models)
    return own | {'real': real, 'ablation': {'own': own['val_loss']} | losses}


@torch.no_grad()
def samples_page():
    """HTML: how the model goes on from ten prefixes, with its thoughts."""
    torch.manual_seed(seed)
    written = model.write(val_prefix[:10], text_len, think_len, fixed=fixed)
    rows = (''.join(decode(start)) + show_tokens(row[row != config.end_thought], config, decode, '')
            for start, row in zip(val_prefix.tolist(), written))
    return '<meta charset=utf-8><style>div{overflow-wrap:anywhere}</style>' + '<hr>'.join(map(as_html, rows))


# ---- problems: data and model ----

def boxed(text):
    """What the last \\boxed{...} of a text holds; None if it is missing or does not end."""
    _, found, rest = text.rpartition('\\boxed{')
    depth = 1
    for i, character in enumerate(rest if found else ''):
        depth += {'{': 1, '}': -1}.get(character, 0)
        if depth == 0:
            return rest[:i]
    return None


def load_problems(path):
    """Problems {question, answer, level}, text, of the wanted levels, by level, from a file of JSON lines of
    our form, GSM8K's or MATH's: two or more."""
    problems, wrong = [], f'no problems in {path}'
    try:
        for n, line in enumerate(path.read_text(encoding='utf-8-sig').split('\n'), 1):
            wrong = f'{path}, line {n} is no problem'
            if not line.strip():
                continue
            row = json.loads(line)
            question, answer = row.get('question', row.get('problem')), row.get('answer')
            answer = boxed(str(row.get('solution'))) if answer is None else str(answer).rpartition('####')[2]
            if not isinstance(question, str) or not answer or not answer.strip():
                raise ValueError('it needs a question or problem, an answer or a solution with \\boxed{}')
            level = str(row.get('level', '')).removeprefix('Level ')
            problems.append({'question': question, 'answer': answer.strip(), 'level': level})
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        fail(f'{wrong}: {error}')
    found = sorted({problem['level'] for problem in problems})
    wanted = levels.replace(' ', '').split(',') if levels else found
    problems = sorted((row for row in problems if row['level'] in wanted), key=lambda row: row['level'])
    if len(problems) < 2:
        fail(f'{path} has no two problems of levels={levels}; its levels are {", ".join(found) or "none"}')
    return problems


def value(answer):
    """An answer without what does not matter: a Fraction if it is a number, else text."""
    answer = re.sub(r'\\text\{([^{}]*)\}', r'\1', answer)
    answer = re.sub(r'(?<!\d)\\[dt]?frac\{([^{}]+)\}\{([^{}]+)\}', r'\1/\2', answer)
    answer = re.sub(r'\\left|\\right|\\[,!;:]|[\s$%\\]|(?<=\d),(?=\d{3}(\D|$))', '', answer).rstrip('.')
    try:
        return Fraction(answer) if re.fullmatch(r'[+-]?(\d+/\d+|\d+\.?\d*|\.\d+)', answer) else answer
    except (ValueError, ZeroDivisionError):  # too many digits, n/0
        return answer


def grade(solution, answer):
    """Whether a solution gives the answer, in the last box or as the last number; whether it has one box."""
    given = boxed(solution)
    numbers = re.findall(r'(?:(?<![\d.])-)?\d+(?:,\d{3})*(?:\.\d+)?', solution) if given is None else [given]
    right = bool(numbers) and value(numbers[-1]) == value(answer)
    return right, given is not None and solution.count('\\boxed{') == 1


TURNS = [   # examples show the form: the smallest models do not get it from the words
    'Solve the problem step by step. Put the answer into \\boxed{}.\n\n'
    'Tom has 9 pens. Tom loses 6 pens. How many pens does Tom have now?', '9 - 6 = 3\n\\boxed{3}',
    'Eva has 7 pens. Eva finds 5 more pens. Tom has 2 times as many pens as Eva has now. '
    'How many pens does Tom have?', '7 + 5 = 12\n2 * 12 = 24\n\\boxed{24}']


def pick(problems, rows):
    """The problems (B,) with these numbers (B,)."""
    return [problems[i] for i in rows.tolist()]


def ask(problems):
    """What the model is asked: tokens (B, S), padded in front, and which of them are no padding (B, S)."""
    texts, template = [], tokenizer.chat_template
    for problem in problems:
        turns = [*TURNS, problem['question']]
        chat = [{'role': ('user', 'assistant')[i % 2], 'content': text} for i, text in enumerate(turns)]
        texts.append(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
                     if template else '\n\n'.join([*turns, '']))
    asked = tokenizer(texts, return_tensors='pt', padding=True, padding_side='left',
                      add_special_tokens=not template)
    return asked['input_ids'].to(world.device), asked['attention_mask'].to(world.device).bool()


if reward == 'math':
    path = Path(data)
    train_set = load_problems(path / 'train.jsonl' if path.is_dir() else path)
    tests = [file for file in (path / 'val.jsonl', path / 'test.jsonl') if file.exists()]
    val_set = load_problems(tests[0]) if tests else train_set[::10]
    if not tests:       # every tenth is held out
        del train_set[::10]
    knobs.text = {'data': fingerprint(json.dumps(train_set).encode())}
    if init_from == 'resume' and knobs.checkpoint['text'] != knobs.text:
        fail(f'{data} is not what the checkpoint was trained on')
    transformers = need('transformers', 'for models of other families')
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        packed = knobs.checkpoint['models']['model'] if knobs.checkpoint else {'source': init_from}
        source, options = packed['source'], {'trust_remote_code': False}
        if source.endswith('.gguf'):
            source, options['gguf_file'] = str(Path(source).parent), Path(source).name
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
        model.load_state_dict(packed.get('state', model.state_dict()))
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        n_read = ask(train_set + val_set)[0].shape[1] + text_len
    except Exception as error:      # of many kinds
        fail(f'no model of transformers at {init_from}: {error}')
    models = {'model': {'source': packed['source'], 'state': model.to(world.device).state_dict()}}
    longest, room = text_len, getattr(model.config, 'max_position_embeddings', math.inf)
    if n_read > room:
        fail(f'{init_from} reads {room} tokens, problems with their solutions have up to {n_read}')
    # greedy, since solve samples on its own, and free of its makers' settings
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    model.generation_config = transformers.GenerationConfig(
        max_new_tokens=text_len, do_sample=False, pad_token_id=tokenizer.pad_token_id, eos_token_id=ends)


@torch.no_grad()
def solve(asked, given, noise=None):
    """Solutions, by noise (N, text_len) or greedy: tokens (N, T), which are no padding (N, T), and texts."""
    def draw_token(ids, logits):
        token = sample(logits, noise[:, ids.shape[1] - asked.shape[1]], temperature)
        return torch.full_like(logits, -torch.inf).scatter(1, token[:, None], 0.)
    tokens = model.generate(input_ids=asked, attention_mask=given,
                            logits_processor=None if noise is None else [draw_token])[:, asked.shape[1]:]
    torch.clear_autocast_cache()        # weights that were cast here have no gradient
    ends = torch.isin(tokens, torch.tensor(model.generation_config.eos_token_id, device=world.device)).long()
    mask = ends.cumsum(1) - ends == 0
    texts = [tokenizer.decode(row[written], skip_special_tokens=True) for row, written in zip(tokens, mask)]
    return tokens, mask, texts


def solution_log_probs(asked, given, tokens, mask):
    """Log-probabilities (N, T), with gradient, of solutions as solve returns them; 0 behind their end."""
    ids, seen = torch.cat([asked, tokens], dim=1), torch.cat([given, mask], dim=1)  # (N, S + T)
    logits = model(input_ids=ids, attention_mask=seen.long(), position_ids=(seen.cumsum(1) - 1).clamp(min=0),
                   logits_to_keep=tokens.shape[1] + 1).logits[:, :-1]  # (N, T, V)
    return logits.float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0].masked_fill(~mask, 0.)


def problem_losses(problems, dice):
    """The loss for problems (B,), and what to log. dice: see training."""
    asked, given = (rows.repeat_interleave(G, dim=0) for rows in ask(problems))  # (N, S), N = B G
    tokens, mask, texts = solve(asked, given, dice[0])
    grades = [grade(text, problems[n // G]['answer']) for n, text in enumerate(texts)]
    right, formed = torch.tensor(grades, device=world.device).float().T  # (N,)
    weights = advantages((right + format_weight * formed).view(-1, G), advantage, tau)  # (B, G)
    # each part is read here, and again for its gradient, so that only one is in memory
    parts = zip(*(x.split(micro_batch or len(x)) for x in (asked, given, tokens, mask)))
    log_pi = torch.cat([checkpoint(solution_log_probs, *part, use_reentrant=False, preserve_rng_state=False)
                        for part in parts])  # (N, T)
    loss = -(weights.flatten() * log_pi.sum(1)).sum() / (len(problems) * text_len)
    return loss, {'accuracy': right.mean(), 'format': formed.mean(), 'length': mask.sum(1).float().mean(),
                  'mixed': (right.view(-1, G).std(1) > 0).float().mean(),   # groups with right and wrong ones
                  'entropy': -log_pi.detach().sum() / mask.sum(), **concentration(weights)}


def evaluate_problems(step):
    """Report on val, show solutions, keep the best checkpoint. Returns what belongs on the last line."""
    tried, texts = pick(val_set, torch.linspace(0, len(val_set) - 1, eval_prefixes).long()), []
    for i in range(0, len(tried), batch_size * G):
        with world.autocast:
            texts += solve(*ask(tried[i:i + batch_size * G]))[2]
    grades = np.array([grade(text, problem['answer']) for text, problem in zip(texts, tried)])  # (n, 2)
    level = np.array([problem['level'] for problem in tried])
    by_level = {name: grades[level == name, 0].mean().item() for name in np.unique(level).tolist()}
    accuracy, form = grades.mean(0).tolist()
    run.report(step, **{f'val_accuracy_at_{name}': share for name, share in by_level.items()},
               val_format=form, val_accuracy=accuracy)
    for i in range(0, len(tried), max(1, len(tried) // 5)):
        run.sample(f'{paint(tried[i]["question"], "blue")}\n{texts[i]}', grades[i][0])
    run.save_best(step, accuracy, models)
    return {'accuracy': accuracy, 'accuracy_at_level': by_level, 'format': form}


# ---- training ----
if reward == 'text':
    draw, losses, evaluate, n_train = cut, text_losses, evaluate_texts, len(train_set) - n_cut
    write, write_real = [recorded(write, fuse=True) for _ in 'ab'] if compile else [write, write]
else:
    draw, losses, evaluate, n_train = pick, problem_losses, evaluate_problems, len(train_set)
optimizer = make_optimizer(model.eval(), learning_rate, weight_decay)       # nothing is dropped
run = Run(knobs, world, [optimizer])
n_steps = run.first_step
for step in run.steps(run.first_step if eval_only else max_steps):
    if step % eval_every == 0:
        run.save(step, models)
        evaluate(step)
    schedule(optimizer, learning_rate, step, max_steps, warmup_steps, cosine=True)
    rows = torch.from_numpy(np.random.default_rng([seed, step]).integers(n_train, size=batch_size))
    dice = [world.draw(batch_size * n, longest) for n in (G, 1)]    # for rollouts, for real text
    with world.autocast:
        loss, seen = losses(draw(train_set, world.share(rows)), dice)
    loss.backward()
    world.mean_gradients(model.parameters())
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip or torch.inf)
    optimizer.step()
    optimizer.zero_grad()
    if step % log_every == 0:
        run.log(step, **{name: float(x) for name, x in seen.items()}, gradient_norm=norm.item())
    n_steps = step + 1

# ---- the last line ----

run.save(n_steps, models)
result = evaluate(n_steps)
run.draw('samples.html', samples_page) if page and reward == 'text' else None
run.finish(steps=n_steps, **result)

"""
Text: whole rollouts. A model goes on from a real text, thinking where it likes, and another model judges.

    a real text  ->  normal tokens and thoughts, mixed  ->  thoughts stripped  ->  log p by a reference

    python supervised_rollout_think.py --think_len=0    # a model to start from
    python rollout_think.py --init_from=out/supervised_rollout_think/think_len=0/ckpt.pt --reference=<better>
    python rollout_think.py --init_from=... --reference=... --think_len=0   # the control
    torchrun --standalone --nproc_per_node=2 rollout_think.py --init_from=... --reference=...
    python rollout_think.py --reward=math --data=data/problems --init_from=HuggingFaceTB/SmolLM2-135M-Instruct

Each step: B prefixes, G rollouts of each. A frozen reference, which sees no thoughts, pays each normal token
its log p. All tokens and thoughts before it are paid too, gamma times less for each normal token between.
Rollouts of a prefix are compared at the same normal token: the policy gradient (Williams 1992) with the mean
of the group as baseline (Dr. GRPO, Liu et al. 2025). No ratio is clipped: each rollout is used once.

A reference likes to be told what it expects, again and again. So a normal token is also paid its own -log p,
among normal tokens. With entropy_weight=1 a text earns, on average, minus the KL divergence of its tokens
from the reference, given the thoughts, which earn nothing.

With reward=math a pretrained model of transformers solves problems, thinking in its own words. It is paid for
the right answer and for the form: the answer in a \\boxed{}. Its loss is a sum over tokens: a mean would make
short right solutions count more, and long wrong ones less (Dr. GRPO).
"""
import json
import logging
import math
import re
from contextlib import suppress
from fractions import Fraction
from functools import partial
from pathlib import Path

from model import GPT2Thinking, choice, find_model, from_pretrained
from utils import (Run, World, advantages, concentration, fail, fingerprint, load_checkpoint, load_text,
                   make_optimizer, need, paint, read_knobs, recorded, sample, schedule, show_tokens)

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# ---- knobs ----

reward = 'text'               # 'text' | 'math': what pays, a reference model or right answers
data = 'data/shakespeare_char'    # folder that prepare_data.py made; math: or one file of problems
levels = ''                   # math: difficulties, separated by commas; empty: all
format_weight = .1            # math: what the form is paid; a right answer is paid 1
micro_batch = 32              # math: solutions per process read at once for the gradient; 0: all
reference = ''                # who judges: a checkpoint, or a GPT-2's folder or hub name
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
d_thought_vocab = 64          # L: thought tokens
think_len = 1                 # T: largest number of thoughts before a normal token; 0: none
fixed = False                 # always T thoughts before a normal token
advantage = 'dr_grpo'         # 'dr_grpo' | 'grpo' | 'rloo' | 'quantile' | 'softmax' | 'softmax_quantile' |
                              # 'softmax_centred' | 'best': see utils.py
tau = 1.                      # of softmax
gamma = .9                    # share of its return that a normal token passes on to the one before
entropy_weight = 1.           # reward for entropy: times a normal token's own -log p
supervised_weight = 0.        # of the cross-entropy of the real continuation, with own thoughts inside
temperature = 1.              # of rollouts
eval_every = 50               # steps between evaluations, each with a checkpoint and samples
eval_prefixes = 128           # prefixes or problems per evaluation, evenly from val
log_every = 1                 # steps between lines of metrics.jsonl
seed = 0                      # of prefixes, problems and rollouts
device = 'auto'               # auto, cpu, cuda, cuda:1, mps
dtype = 'float32'             # 'float32' | 'bfloat16'; on a GPU float32 products are TF32
compile = False               # write as one CUDA graph of fused kernels: faster, a minute later
init_from = 'scratch'         # resume, auto, a checkpoint, GPT-2; math: hub name, folder, .gguf
eval_only = False             # evaluate, train nothing, write nothing
out_dir = ''                  # folder of the run; empty: out/rollout_think/<changed knobs>
wandb_mode = 'disabled'       # 'disabled' | 'offline' | 'online'

# ---- set-up ----

knobs = read_knobs(__file__, globals(), pretrained=True)
if group_size < 2:
    fail(f'rollouts of a prefix are compared: group_size={group_size} must be at least 2')
if init_from == 'scratch' or reward == 'text' and not reference:
    fail('it needs a model to start from, --init_from; for text also a --reference')
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
    model = find_model(knobs.checkpoint) if knobs.checkpoint else from_pretrained(init_from)
    if not isinstance(model, GPT2Thinking):
        model = GPT2Thinking.from_normal(model, d_thought_vocab, block_size=n_read)
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
    """Rollouts (N, T) of prefixes (B, prefix_len) by noise (N, longest), perhaps of text (N, n)."""
    return model.write(prefix, text_len, think_len, fixed=fixed, n_rollouts=len(noise) // len(prefix),
                       noise=noise, text=text, temperature=temperature)


def strip(tokens):
    """Text (N, n) of rollouts (N, T); for each token, the index in it of this or the next normal one."""
    normal = tokens < d_vocab
    place = (normal.cumsum(1) - normal.long()).clamp(max=text_len - 1)
    return tokens[normal].view(-1, text_len), place


def read(prefix, tokens, temperature=1.):
    """Log p (N, T) of rollouts (N, T); log p and entropies (N, n) of the text in them. With gradient."""
    tokens = tokens[:, :(tokens != config.end_thought).any(0).sum()]    # T: until all have ended
    states = model.hidden(torch.cat([prefix, tokens[:, :-1]], dim=1), first=prefix_len - 1)
    logits, normal = model.logits(states, config.writes).float() / temperature, tokens < d_vocab
    # a rollout's tokens: among all that were allowed there
    t = torch.arange(tokens.shape[1], device=tokens.device)
    n_thoughts = t - torch.where(normal, t, -1).cummax(1).values  # (N, T) since the last normal token
    may = model.allowed(F.pad(n_thoughts, (1, -1)), think_len, fixed)
    log_p = logits.masked_fill(~may, -torch.inf).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    # its normal tokens: among normal ones only
    is_thought = torch.arange(config.d_vocab, device=tokens.device) >= d_vocab
    own = choice(logits[normal].masked_fill(is_thought, -torch.inf), tokens[normal])
    return torch.where(tokens == config.end_thought, 0., log_p), *(x.view(-1, text_len) for x in own)


def pay(prefix, text, own):
    """Discounted rewards (N, n) of tokens of texts (N, n) with own log p (N, n); and their mean log p."""
    log_p = judge.log_probs(prefix, text, range(d_vocab))[0]
    place = torch.arange(text_len, device=text.device)
    paid_on = (gamma ** (place[:, None] - place).abs()).tril()      # (n, n): what follows pays, too
    return (log_p - entropy_weight * own) @ paid_on, log_p.mean()


def text_losses(batch, dice):
    """The loss for prefixes and real continuations, and what to log. dice: see training."""
    (prefix, real), (noise, noise_real) = batch, dice
    tokens, many = write(prefix, noise), prefix.repeat_interleave(G, dim=0)  # (N, T), N = B G
    log_pi, own, entropy = read(many, tokens, temperature)  # (N, T), (N, n), (N, n)
    text, place = strip(tokens[:, :log_pi.shape[1]])  # (N, n), (N, T)
    with torch.no_grad():       # the rollouts of a prefix are a group at each of n places
        returns, log_p = pay(many, text, own)
        groups = returns.view(-1, G, text_len).transpose(1, 2).flatten(0, 1)  # (B n, G)
        weights = advantages(groups, advantage, tau).view(-1, text_len, G).transpose(1, 2).flatten(0, 1)
    loss = -(weights.gather(1, place) * log_pi).sum() / (len(prefix) * text_len)
    seen = {'reward': log_p, 'entropy': entropy.detach().mean(),
            'thoughts': ((tokens != config.end_thought).sum() - text.numel()) / text.numel()}
    if supervised_weight:
        supervised = -read(prefix, write_real(prefix, noise_real, real))[1].mean()
        loss, seen['supervised_loss'] = loss + supervised_weight * supervised, supervised.detach()
    return loss, seen


# ---- text: evaluation ----

def describe(text):
    """Loss of texts (eval_prefixes, n) by the reference, nats per token; their variety."""
    loss = -judge.log_probs(val_prefix, text, range(d_vocab))[0].mean().item()
    runs = text.unfold(1, min(4, text_len), 1).flatten(0, 1)
    return {'val_loss': loss, 'perplexity': math.exp(min(loss, 700)),    # a finite number
            'distinct_4': len(runs.unique(dim=0)) / len(runs)}


@torch.no_grad()
def evaluate_texts(step):
    """Report on val, show three texts, keep the best checkpoint. Returns the last line's numbers."""
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
    run.report(step, **{f'val_loss_{name}': loss for name, loss in losses.items()}, **own)
    for start, row in zip(val_prefix[:3].tolist(), tokens):
        run.sample(''.join(decode(start)) + show_tokens(row[row != config.end_thought], config, decode, ''))
    run.save_best(step, -own['val_loss'], models)
    return own | {'real': describe(val_real), 'ablation': {'own': own['val_loss']} | losses}


# ---- problems: grading, data and model ----

HELD = '[^{}]*'
for _ in range(6):      # braces within braces
    HELD = rf'(?:[^{{}}]|\{{{HELD}\}})*'
BOX = re.compile(rf'\\(?:boxed|fbox)\s*(?:\{{({HELD})\}}|([-+\\\d][^\s{{}}$\\]*))')
SIGN = r'(?<![\w.)}])(?<![\d)}] )[+-]\s*'
NUMBER = rf'(?:{SIGN})?(?:\d+\s+(?=\d+/))?(?:(?:\d{{1,3}}(?:,\d{{3}})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:/\d+)?'
UNIT = r'(?<=\d)(?!\s*(\w+illion|thousand|hundred|dozen|percent))(\s+[a-zA-Z]{2,})+(\^\{?[23]\}?)?$'


def final(text, which=0):
    """A text's answer: in its first (-1: last) complete box, else after ####, else all; whether in a box."""
    in_box = False
    while boxes := BOX.findall(text):
        text, in_box = ''.join(boxes[which]), True
    return text if in_box else text.rpartition('####')[2], in_box


def simplify(text):
    """A text without units, dollar signs, a leading x =; fractions as 1/2, minus signs as -."""
    text = text.replace('−', '-').replace('{,}', ',').replace('\\!', '')
    text = re.sub(r'\\[cdt]?frac\s*(?:\{(-?\d+)\}|(\d))\s*(?:\{(\d+)\}|(\d))', r' \1\2/\3\4', text)
    text = re.sub(r'\\(?:text\w*|mathrm|mbox)\s*\{([^{}]*)\}', r' \1', text)
    text = re.sub(r'\\?[$£€°]|\\[,;: ]|\^?\{?\\circ\}?|^\s*\w\s*=', ' ', text)
    return re.sub(UNIT, '', text.strip().rstrip('.,'))


def number(text):
    """A Fraction if a text is just a number, as 1,018, -3.5, \\frac{1}{2}, 1 1/2, x = $18; or None."""
    if re.fullmatch(NUMBER, text := simplify(text)):
        with suppress(ValueError, ZeroDivisionError):   # n/0
            size = sum(map(Fraction, text.strip('+-').replace(',', '').split()))
            return -size if '-' in text else size


def grade(solution, answer):
    """Whether a solution gives the answer, in its first box, else after ####, else as its last number; and
    whether it has a box. No sum or product gives a number. The rest: math-verify, two seconds each."""
    (given, formed), (wanted, _) = final(solution), final(answer, -1)
    given = given if formed else ['', *re.findall(NUMBER, simplify(given))][-1]
    value, truth = number(given), number(wanted)
    summed = re.search(r'[\d)}]\s*([-+*×÷]|\\(cd|[dt]i))', simplify(given))
    if truth is not None and (summed or truth in (value, int(truth))):
        return value == truth, formed
    math_verify = need('math_verify', 'to compare answers that are not integers')
    logging.getLogger('math_verify').setLevel('CRITICAL')
    boxes = (f'\\boxed{{{text.strip(" $")}}}' for text in (wanted, given * (len(given) <= 300)))
    parsed = [math_verify.parse(box, parsing_timeout=2) for box in boxes]
    return math_verify.verify(*parsed, timeout_seconds=2), formed


def load_problems(path):
    """Problems {question, answer, level} of the wanted levels, from JSON lines as ours, GSM8K's or MATH's."""
    problems = []
    for n, line in enumerate(path.read_bytes().split(b'\n'), 1):
        try:
            row = json.loads(line or b'{}')
            question, given = row.get('question', row.get('problem')), row.get('answer')
            answer, in_box = final(str(row.get('solution') if given is None else given), -1)
            known = in_box or type(given) in (str, int, float)
            if row and not (isinstance(question, str) and answer.strip() and known):
                raise ValueError('it needs question or problem; answer, or solution with \\boxed{}')
        except (ValueError, AttributeError, RecursionError) as error:
            fail(f'{path}, line {n} is not a problem: {error}')
        level = str(row.get('level', '')).removeprefix('Level ')
        problems += [{'question': question, 'answer': answer.strip(), 'level': level}] if row else []
    found = sorted({problem['level'] for problem in problems})
    wanted = [level.strip() for level in levels.split(',')] if levels else found
    problems = sorted((row for row in problems if row['level'] in wanted), key=lambda row: row['level'])
    if len(problems) < 2:
        fail(f'{path} has no two problems of levels={levels}; it has {", ".join(found)}')
    return problems


TURNS = [   # examples show the form: the smallest models do not get it from the words
    'Solve the problem step by step. Put the answer into \\boxed{}.\n\n'
    'Tom has 9 pens. Tom loses 6 pens. How many pens does Tom have now?', '9 - 6 = 3\n\\boxed{3}',
    'Eva has 7 pens. Eva finds 5 more pens. Tom has 2 times as many pens as Eva has now. '
    'How many pens does Tom have?', '7 + 5 = 12\n2 * 12 = 24\n\\boxed{24}']


def ask(problems):
    """What the model is asked: tokens (B, S), padded in front; which are not padding (B, S)."""
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
    val_set = load_problems(tests[0]) if tests else train_set[::10]     # every tenth is held out
    train_set = train_set if tests else [row for i, row in enumerate(train_set) if i % 10]
    known, n_val = {row['question'].strip() for row in train_set}, len(val_set)
    val_set = [row for row in val_set if row['question'].strip() not in known]
    if not val_set:
        fail(f'all problems of val in {data} are also in train')
    if len(val_set) < n_val and world.main:
        print(f'{n_val - len(val_set)} of {n_val} problems of val are also in train: left out')
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
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
        model.load_state_dict(packed.get('state', model.state_dict()))
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
        ends, closing = model.generation_config.eos_token_id, set()
        if tokenizer.chat_template:     # what closes a turn
            chat = [{'role': role, 'content': '?'} for role in ('user', 'assistant')]
            behind = tokenizer.apply_chat_template(chat, tokenize=False).rpartition('?')[2]
            added = tokenizer.added_tokens_decoder.items()
            closing = {i for i, token in added if (token.content.strip() or '?') in behind}
        ends = closing | {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        assert ends, 'its tokenizer has no end token'
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.convert_ids_to_tokens(min(ends))
        parts = [ask(p[i:i + 999])[0].cpu() for p in (train_set, val_set) for i in range(0, len(p), 999)]
        assert all(map(torch.numel, parts)), 'no tokenizer'
        last = max(*ends, tokenizer.pad_token_id, *(part.max() for part in parts))
    except Exception as error:      # of many kinds
        fail(f'cannot use {init_from} with transformers (4.56 or later): {error}')
    models = {'model': {'source': packed['source'], 'state': model.to(world.device).state_dict()}}
    longest, n_cut, room = text_len, 0, getattr(model.config, 'max_position_embeddings', math.inf)
    n_read, d_vocab = max(x.shape[1] for x in parts) + text_len, model.get_input_embeddings().num_embeddings
    if n_read > room or last >= d_vocab:
        fail(f'{init_from} reads {room} tokens and knows {d_vocab}; problems have {n_read} of {last + 1}')
    model.generation_config = transformers.GenerationConfig(    # greedy: solve samples itself
        max_new_tokens=text_len, do_sample=False, pad_token_id=min(ends), eos_token_id=sorted(ends))


@torch.no_grad()
def solve(asked, given, noise=None):
    """Solutions drawn with noise (N, text_len), else greedy: tokens, mask (N, T); texts; endless (N,)."""
    def draw_token(ids, logits):
        token = sample(logits, noise[:, ids.shape[1] - asked.shape[1]], temperature)
        return torch.full_like(logits, -torch.inf).scatter(1, token[:, None], 0.)
    tokens = model.generate(input_ids=asked, attention_mask=given,
                            logits_processor=None if noise is None else [draw_token])[:, asked.shape[1]:]
    torch.clear_autocast_cache()        # casts made here carry no gradient
    stop = model.generation_config.eos_token_id
    ends = torch.isin(tokens, torch.tensor(stop, device=world.device))
    if not closing:     # another example would begin after an empty line
        pairs = torch.stack([F.pad(tokens, (1, -1), value=stop[0]), tokens], dim=-1).flatten(0, 1)
        empty = torch.tensor(['\n\n' in text for text in tokenizer.batch_decode(pairs)], device=world.device)
        ends |= empty.view(tokens.shape)
    mask = ends.cumsum(1) - ends.long() == 0
    texts = [tokenizer.decode(row[written], skip_special_tokens=True) for row, written in zip(tokens, mask)]
    return tokens, mask, texts, ~ends.any(1)


def solution_log_probs(asked, given, tokens, mask):
    """Log-probabilities (N, T), with gradient, of solutions, at the temperature of sampling; 0 after ends."""
    ids, seen = torch.cat([asked, tokens], dim=1), torch.cat([given, mask], dim=1)  # (N, S + T)
    logits = model(input_ids=ids, attention_mask=seen.long(), position_ids=(seen.cumsum(1) - 1).clamp(min=0),
                   logits_to_keep=tokens.shape[1] + 1).logits[:, :-1]  # (N, T, V)
    log_p = (logits.float() / temperature).log_softmax(-1)
    return log_p.gather(-1, tokens[..., None])[..., 0].masked_fill(~mask, 0.)


def problem_losses(problems, dice):
    """The loss for problems (B,), and what to log. dice: see training."""
    asked, given = (rows.repeat_interleave(G, dim=0) for rows in ask(problems))  # (N, S), N = B G
    tokens, mask, texts, endless = solve(asked, given, dice[0])
    grades = [grade(text, problems[n // G]['answer']) for n, text in enumerate(texts)]
    right, formed = torch.tensor(grades, device=world.device).float().T  # (N,)
    weights = advantages((right + format_weight * formed).view(-1, G), advantage, tau)  # (B, G)
    # each part is read again for its gradient: one at a time in memory
    parts = zip(*(x.split(micro_batch or len(x)) for x in (asked, given, tokens, mask)))
    log_pi = torch.cat([checkpoint(solution_log_probs, *part, use_reentrant=False, preserve_rng_state=False)
                        for part in parts])  # (N, T)
    loss = -(weights.flatten() * log_pi.sum(1)).sum() / (len(problems) * text_len)
    return loss, {'accuracy': right.mean(), 'format': formed.mean(), 'length': mask.sum(1).float().mean(),
                  'mixed': (right.view(-1, G).std(1) > 0).float().mean(),   # groups with both
                  'cut_off': endless.float().mean(), 'entropy': -log_pi.detach().sum() / mask.sum(),
                  **concentration(weights)}


def evaluate_problems(step):
    """Report on val, show solutions, keep the best checkpoint. Returns the last line's numbers."""
    tried = [val_set[i] for i in torch.linspace(0, len(val_set) - 1, min(eval_prefixes, len(val_set))).long()]
    texts, endless = [], 0
    for i in range(0, len(tried), batch_size * G):
        with world.autocast:
            *_, some, cut_off = solve(*ask(tried[i:i + batch_size * G]))
        texts, endless = texts + some, endless + cut_off.sum().item()
    grades = np.array([grade(text, problem['answer']) for text, problem in zip(texts, tried)])  # (n, 2)
    level = np.array([problem['level'] for problem in tried])
    by_level = {name: grades[level == name, 0].mean().item() for name in np.unique(level).tolist()}
    accuracy, form = grades.mean(0).tolist()
    run.report(step, **{f'val_accuracy_at_{name}': share for name, share in by_level.items()},
               val_cut_off=endless / len(tried), val_format=form, val_accuracy=accuracy)
    for i in range(0, len(tried), max(1, len(tried) // 5)):
        run.sample(f'{paint(tried[i]["question"], "blue")}\n{texts[i]}', grades[i][0])
    run.save_best(step, accuracy, models)
    return {'accuracy': accuracy, 'accuracy_at_level': by_level, 'format': form}


# ---- training ----
draw, losses, evaluate = ((cut, text_losses, evaluate_texts) if reward == 'text' else
                          (lambda rows, i: [rows[n] for n in i], problem_losses, evaluate_problems))
write, write_real = [recorded(write, fuse=True) for _ in 'ab'] if compile else [write, write]
optimizer = make_optimizer(model.eval(), learning_rate, weight_decay)       # nothing is dropped
run = Run(knobs, world, [optimizer])
n_steps = run.first_step
for step in run.steps(run.first_step if eval_only else max_steps):
    if step % eval_every == 0:
        run.save(step, models)
        evaluate(step)
    schedule(optimizer, learning_rate, step, max_steps, warmup_steps, cosine=True)
    rows = np.random.default_rng([seed, step]).integers(len(train_set) - n_cut, size=batch_size)
    dice = [world.draw(batch_size * n, longest) for n in (G, 1)]    # for rollouts, for real text
    with world.autocast:
        loss, seen = losses(draw(train_set, world.share(torch.from_numpy(rows))), dice)
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
run.finish(steps=n_steps, **result)

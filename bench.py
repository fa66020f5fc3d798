"""
Measures the numbers on the pages, except trials: it runs the suites of assets/suites.toml, keeps raw results
in assets/results/, and writes tables and numbers into README.md and assets/notes/.

    python bench.py                                 # the suite `learning`: rows for this machine, CPU or GPU
    python bench.py --only=digits --seeds=3         # one row of it
    python bench.py --suite=variants --parallel=12  # another suite, twelve runs at once: each is slower
    python bench.py --suite=forming                 # assets/forming.gif: how a language forms (needs pillow)
    python bench.py --suite=tables                  # no runs: only the pages
    python bench.py --suite=tables --pictures=out   # and out/gradient.html (needs plotly)

A new row is a line in assets/suites.toml. Its result is a line of assets/results/<suite>.jsonl, with command,
hardware, torch, commit (null where git is not at hand) and the last line of every run. On a page,
`<!-- table <suite> <rows> -->` begins a table and `<!--= <suite>/<row>:<key> .3f -->` a number.
"""
import functools
import importlib.util
import itertools
import json
import math
import os
import re
import runpy
import subprocess
import sys
import threading
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, median, stdev, variance

import torch
from torch.nn.functional import cross_entropy

import utils
from model import GPT2, GPT2Thinking, ModelConfig, ThinkingModelConfig
from utils import advantages, fail, git_commit, make_optimizer, need, read_knobs, recorded, write_atomic

# ---- knobs ----
suite = 'learning'              # a suite of assets/suites.toml; forming: the animation; tables: no runs
only = ''                       # names of rows, with commas between; empty: all
seeds = 5                       # runs of each row, with seeds 0, 1, ...
parallel = 1                    # runs at once
nanogpt = ''                    # speed: folder of a checkout of nanoGPT, to be measured beside ours
pretrained = ''                 # math: the model to start from, see init_from in rollout_think.py
pictures = ''                   # folder for gradient.html; empty: no picture

# ---- suites and results ----

knobs = read_knobs(__file__, globals())
ROOT = Path(__file__).parent
COMMIT = git_commit()           # before results change the checkout
SUITES = tomllib.loads((ROOT / 'assets/suites.toml').read_text())
turn = itertools.count()        # of GPUs
running = {}                    # row: futures of its runs, by seed
starting = threading.Lock()     # one thread at a time runs what others start from


@functools.cache
def results(suite):
    """What assets/results/<suite>.jsonl holds: {row: its line}."""
    path = ROOT / f'assets/results/{suite}.jsonl'
    try:
        lines = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
        return {line['row']: line for line in lines}
    except (ValueError, LookupError, TypeError) as error:
        fail(f'{path} is damaged: {error}')


def keep(suite, row, kind, command, runs):
    """Write a row's line to assets/results/<suite>.jsonl; those of other rows stay. kind: 'cpu' or 'cuda'."""
    line = {'row': row, 'command': command, 'hardware': device_name(kind), 'torch': torch.__version__,
            'commit': COMMIT, 'parallel': parallel, 'runs': runs}
    text = ''.join(json.dumps(one) + '\n' for one in (results(suite) | {row: line}).values())
    path = ROOT / f'assets/results/{suite}.jsonl'
    write_atomic(path, lambda file: file.write(text.encode()))
    results.cache_clear()


def device_name(kind):
    """The name of this machine's GPUs (kind 'cuda') or CPU."""
    if kind == 'cuda':
        n = torch.cuda.device_count()
        return f'{n} {torch.cuda.get_device_name()}' if n > 1 else torch.cuda.get_device_name()
    info = Path('/proc/cpuinfo')
    found = re.search(r'model name\s*: (.*)', info.read_text() if info.exists() else '')
    return f'{found[1] if found else sys.platform}, {os.cpu_count()} cores'


def row_of(suite, row):
    """A row with what its suite says of all its rows, see the top of suites.toml."""
    common, own = SUITES[suite], SUITES[suite]['rows'][row]
    shared = '' if 'script' in own else common.get('knobs', '')
    return {'what': '', 'on': 'cpu', 'start': {}, 'at': '', **common, **own,
            'knobs': f'{shared} {own.get("knobs", "")}'.strip()}


# ---- running ----

def run(suite, row, seed, folder, *more):
    """Run a row's command in out/bench/<suite>-<row>/<folder>. Returns that folder and the last line."""
    it = row_of(suite, row)
    device = it['on'] if it['on'] == 'cpu' else f'cuda:{next(turn) % torch.cuda.device_count()}'
    folder = ROOT / f'out/bench/{suite}-{row}/{folder}'
    done = Path(f'{folder}.done')       # is there if it ran to its end
    done.unlink(missing_ok=True)
    threads = {'OMP_NUM_THREADS': str(max(1, os.cpu_count() // parallel))}      # unless it is set
    command = [sys.executable, f'{it["script"]}.py', *it['knobs'].split(), f'--seed={seed}',
               f'--device={device}', f'--out_dir={folder}', *more]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=threads | os.environ)
    if ran.returncode:
        raise ChildProcessError(f'{suite}/{row} with seed {seed} ended with exit code {ran.returncode}')
    done.touch()
    return folder, json.loads(ran.stdout.splitlines()[-1])


def learn(suite, row, seed):
    """The last line of a run and what tables need of its log. Runs whose checkpoints it needs come first."""
    more = [f'--init_from={pretrained}'] if suite == 'math' else []
    for knob, start in row_of(suite, row)['start'].items():
        where, first, which = re.fullmatch(r'(.*)/(.*)@(.*)', start).groups()
        which = seed if which == '<seed>' else int(which)
        folder = f'out/bench/{where}-{first}/{which}'
        if where == suite and first in running:
            running[first][which].result()
        with starting:
            if not (ROOT / f'{folder}.done').exists():
                run(where, first, which, which)
        more.append(f'--{knob}={folder}/ckpt.pt')
    folder, result = run(suite, row, seed, seed, *more)
    log = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    batch_size = json.loads((folder / 'config.json').read_text())['knobs']['batch_size']
    result |= from_log(result, log, batch_size)
    if 'beside' in SUITES[suite]:
        result |= steadiness(log)
    if suite == 'questions':
        losses = [line for line in log if 'gradient_norm' in line]
        result |= {'first': losses[0], 'log': {key: mean(line[key] for line in losses[-10:] if key in line)
                                               for key in losses[-1]}}
    print(row, json.dumps(result), flush=True)
    return result


def from_log(result, log, batch_size):
    """What tables need of a log: when 99% and all were right; of rollouts, curves of evaluations."""
    found, goal = {}, 'heldout_accuracy' if 'heldout_accuracy' in result else 'accuracy'
    for name, least in (('of_99', .99), ('to_all', 1.)):
        first = next((line for line in log if line.get(goal, 0) >= least), {})
        found |= {f'{unit}_{name}': first.get(unit) for unit in ('step', 'seconds')}
    found['questions_of_99'] = found['step_of_99'] and found['step_of_99'] * batch_size
    if result['script'] == 'rollout_think':
        evaluations = [line for line in log if 'perplexity' in line or 'val_accuracy' in line]
        found['curve'] = {key: [line[key] for line in evaluations]
                          for key in evaluations[0] if all(key in line for line in evaluations)}
        found |= {key: mean(line[key] for line in log if key in line)
                  for key in ('mixed', 'gradient_norm', 'effective_n') if any(key in line for line in log)}
        found['perplexity_with'] = {kind: math.exp(loss) for kind, loss in result.get('ablation', {}).items()}
    return found


def reverse(suite, row, seed, n_steps=2000, B=100, G=8):
    """Writes H bits in reverse order, paid 1 if all are right, else 0 (Kaddour 2026). Skips batches without a
    right answer. row: H-advantage-updates of a batch, above 1 only for tpo and 'kept'. 'kept' trains on the
    last 4096 solved questions, with label smoothing that fades as they grow: the first few mislead."""
    H, kind, updates = (int(part) if part.isdigit() else part for part in row.split('-'))
    torch.manual_seed(seed)
    model = GPT2(ModelConfig(d_vocab=2, block_size=2 * H, n_layer=2, n_head=4, d_model=64, tie_weights=False,
                             init='unit'))
    optimizer, errors, n_right, kept = make_optimizer(model, 1e-3, 0.), [], 0, torch.zeros(0, H).long()
    while len(errors) < n_steps and (len(errors) < 100 or mean(errors[-100:]) > .002):
        prompt = torch.randint(2, (B, H))
        many, answer = prompt.repeat_interleave(G, dim=0), model.generate(prompt, H, n_rollouts=G)  # (B G, H)
        right = (answer == many.flip(1)).all(1).float().view(B, G)
        errors.append(1 - right.mean().item())
        new = prompt[right.any(1)]
        kept, n_right, old = torch.cat([new, kept])[:4096], n_right + len(new), None
        for _ in range(updates if len(new) else 0):
            if kind == 'kept':
                known = kept[torch.randint(len(kept), (256,))]
                logits = model(torch.cat([known, known.flip(1)], dim=1)[:, :-1], first=H - 1).transpose(1, 2)
                loss = H * cross_entropy(logits, known.flip(1), label_smoothing=12.8 / (32 + n_right))
            else:
                log_pi = model.log_probs(many, answer)[0].sum(1).view(B, G)
                old = log_pi.detach() if old is None else old
                weights = advantages(right, kind, log_pi=old)       # tpo goes on to its target
                loss = -((weights + old.softmax(1) - log_pi.detach().softmax(1)) * log_pi).sum(1).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return {'seed': seed, 'steps': len(errors), 'error': mean(errors[-50:]),
            'curve': [mean(errors[i:i + 50]) for i in range(0, len(errors), 50)]}


def measure(suite, rows):
    """Run rows with every seed, `parallel` runs at once, and keep their results. Returns what failed."""
    one = {'reversal': reverse, 'gradient': gradient}.get(suite, learn)
    failed, once = [], json.dumps(SUITES)   # a row that others start from @0 is run once
    with ThreadPoolExecutor(parallel if one == learn else 1) as pool:    # threads share random numbers
        for row in rows:
            n = 1 if f'{suite}/{row}@0' in once else seeds
            running[row] = [pool.submit(one, suite, row, seed) for seed in range(n)]
        for row in rows:
            it, runs = row_of(suite, row), []
            command = f'python {it["script"]}.py {it["knobs"]}'.strip()
            for knob, start in it['start'].items():
                command += f' --{knob}=out/bench/{start.replace("/", "-").replace("@", "/")}/ckpt.pt'
            command += f' --init_from={Path(pretrained).name}' if suite == 'math' else ''
            for future in running[row]:
                try:
                    runs.append(future.result())
                except ChildProcessError as error:
                    failed.append(str(error))
            if runs:
                keep(suite, row, it['on'], command, runs)
    return failed


def forming(every=20, scale=4):
    """assets/forming.gif: which codes (columns, in the order of their meanings at the end) are written for
    which answers (rows), while add_think_blind.py learns."""
    image, draw = (need(f'PIL.{name}', 'to draw the animation') for name in ('Image', 'ImageDraw'))
    question = torch.cartesian_prod(torch.arange(100), torch.arange(100))
    answer, frames, save = question.sum(1) % 100, [], utils.Run.save

    def look_and_save(self, step, models, file='ckpt.pt', **state):
        if file == 'ckpt.pt':
            thinking = models['thinking']
            code = thinking.number(thinking.think(question, 2, temperature=0).tokens)
            right = models['answering'].answer(thinking.spell(code.unique(), 2)).argmax(-1)
            correct = (right[torch.unique(code, return_inverse=True)[1]] == answer).float().mean()
            frames.append((step, correct, (answer * 100 + code).bincount(minlength=10**4).view(100, 100)))
        save(self, step, models, file, **state)

    utils.Run.save = look_and_save
    folder = ROOT / 'out/bench/forming'
    sys.argv = ['add_think_blind.py', f'--eval_every={every}', '--device=cpu', f'--out_dir={folder}']
    runpy.run_path(str(ROOT / 'add_think_blind.py'))
    order, pictures = frames[-1][2].float().argmax(0).argsort(), []
    for step, correct, counts in frames:
        shown = 255 - 255 * (counts[:, order] / counts.sum(1, keepdim=True)).sqrt()
        picture = image.fromarray(shown.byte().numpy()).resize((100 * scale,) * 2, image.Resampling.NEAREST)
        frame = image.new('L', (100 * scale, 100 * scale + 24), 255)
        frame.paste(picture, (0, 24))
        draw.Draw(frame).text((8, 6), f'step {step}: {correct:.0%} of answers right', fill=0)
        pictures.append(frame)
    pictures[0].save(ROOT / 'assets/forming.gif', save_all=True, append_images=pictures[1:], loop=0,
                     duration=[100] * (len(pictures) - 1) + [3000], optimize=True)


# ---- speed ----

KINDS = {   # of kernels: parts of their names, the first that fits counts
    'attention': 'flash|fmha|attend|sdpa|cudnn', 'matrices': 'nvjet|gemm|gemv|cutlass|cublas',
    'norms': 'layer_norm', 'loss-and-sampling': 'softmax|sort|scan|argmax|gather', 'GELU': '(?i)gelu',
    'optimiser': 'multi_tensor|adam', 'copies': '(?i)copy|cat|memcpy|memset|to_copy|index', 'other': ''}


def profile(function, milliseconds):
    """Shares of a GPU's time: of each of KINDS, by torch's profiler, and of waiting."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        function()
        torch.cuda.synchronize()
    spent = dict.fromkeys(KINDS, 0.)
    for event in profiler.key_averages():
        kind = next(kind for kind, parts in KINDS.items() if re.search(parts, event.key))
        spent[kind] += event.device_time_total / 1000
    spent['waits'] = max(0., milliseconds - sum(spent.values()))
    return {kind: time / sum(spent.values()) for kind, time in spent.items()}


def speeds(ways, tokens, repeats=5):
    """Of ways {name: function} to do a job on a GPU: milliseconds, tokens per second, memory, shares."""
    found = {}
    for name, function in ways.items():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        ends = []
        for _ in range(repeats + 1):
            function()
            torch.cuda.synchronize()
            ends.append(1000 * time.perf_counter())
        milliseconds = [after - before for before, after in itertools.pairwise(ends)]
        middle = median(milliseconds)
        found[name] = {'milliseconds': milliseconds, 'tokens_per_second': 1000 * tokens / middle,
                       'peak_memory_mb': round(torch.cuda.max_memory_allocated() / 2**20)}
        if middle < 2000:       # else the profile is too large
            found[name]['share'] = profile(function, middle)
    return found


def nano_model(**shape):
    """The model of a checkout of nanoGPT, from scratch, with its rounded vocabulary of 50304 tokens."""
    spec = importlib.util.spec_from_file_location('nanogpt_model', Path(nanogpt) / 'model.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.GPT(module.GPTConfig(vocab_size=50304, bias=True, **shape)).cuda()


def speed_think(n_prompts, length=64, T=32):
    """Thoughts after prompts by a GPT-2 of 124M parameters in bfloat16, the prompts' reading included."""
    torch.manual_seed(0)
    model = GPT2Thinking(ThinkingModelConfig(d_thought_vocab=64)).cuda().bfloat16().eval()
    prompt = torch.randint(50257, (n_prompts, length), device='cuda')
    noise = torch.rand(n_prompts, T, device='cuda')

    def think(prompt, noise):
        return model.think(prompt, T, noise=noise).tokens

    graph, fused = recorded(think), recorded(think, fuse=True)
    for function in (graph, graph, fused, fused):
        function(prompt, noise)
    assert torch.equal(graph(prompt, noise), think(prompt, noise))
    ways = {'again': lambda: model.think(prompt, T, noise=noise, use_cache=False),
            'cache': lambda: think(prompt, noise), 'graph': lambda: graph(prompt, noise),
            'fused': lambda: fused(prompt, noise)}
    if importlib.util.find_spec('transformers'):
        import transformers
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config()).cuda().bfloat16().eval()
        ways['transformers'] = lambda: theirs.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=T, min_new_tokens=T, top_k=0,
            do_sample=True, pad_token_id=0)
    if nanogpt:
        nano = nano_model(block_size=1024).bfloat16().eval()
        ways['nanogpt'] = lambda: nano.generate(prompt, T)
    return speeds(ways, n_prompts * T, repeats=3)


def speed_train(batch=32, length=1024):
    """Five training steps of a GPT-2 of 124M parameters, bfloat16, by our model and by nanoGPT's."""
    torch.manual_seed(0)
    tokens, targets = torch.randint(50257, (2, batch, length), device='cuda')
    flops = 6 * 124e6 + 12 * 12 * 768 * length      # per token, as nanoGPT counts
    torch.set_float32_matmul_precision('high')

    def stepper(model, optimizer, loss):
        def step():
            with torch.autocast('cuda', torch.bfloat16):
                value = loss(tokens, targets)
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
            optimizer.step()
            optimizer.zero_grad()
        return lambda: [step() for _ in range(5)]

    def ours(wrap):
        model = GPT2(ModelConfig(d_vocab=50304)).cuda()     # as many as nanoGPT's
        return stepper(model, make_optimizer(model, 1e-4, .1), wrap(model.loss))

    def theirs():
        model = nano_model(block_size=length)
        compiled = torch.compile(model)
        return stepper(model, model.configure_optimizers(.1, 1e-4, (.9, .95), 'cuda'),
                       lambda x, y: compiled(x, y)[1])

    makers, found = {'eager': lambda: ours(lambda loss: loss), 'compiled': lambda: ours(torch.compile)}, {}
    for name, make in (makers | ({'nanogpt': theirs} if nanogpt else {})).items():
        found |= speeds({name: make()}, 5 * batch * length)
        found[name]['mfu'] = found[name]['tokens_per_second'] * flops / 989e12      # of an H100
    return found


def speed_script(script, arguments, ways, n, every=50):
    """Steps of a script with n tokens each, by its log. ways: {name: arguments (of torchrun | its own)}."""
    found = {}
    for name, more in ways.items():
        *torchrun, more = more.split('|')
        folder = ROOT / f'out/bench/speed/{name}'
        how = ['-m', 'torch.distributed.run', '--standalone', *torchrun[0].split()] if torchrun else []
        command = [sys.executable, *how, f'{script}.py', *arguments.split(), *more.split(),
                   f'--out_dir={folder}', f'--max_steps={6 * every + 1}', f'--log_every={every}',
                   '--eval_every=10000']
        out = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, check=True).stdout
        log = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
        log = [line for line in log if 'gradient_norm' in line]
        seconds = [line['seconds'] for line in log[1:]]
        seconds = [(after - before) / every for before, after in itertools.pairwise(seconds)]
        found[name] = {'milliseconds': [1000 * s for s in seconds], 'tokens_per_second': n / median(seconds),
                       'peak_memory_mb': json.loads(out.splitlines()[-1])['peak_memory_mb'],
                       'gradient_norm': {line['step']: line['gradient_norm'] for line in log}}
    return found


def time_job(row):
    """What the speed suite says of a row's job: {way to do it: numbers}."""
    knobs = row_of('speed', row)['knobs']
    still = f'{knobs} --learning_rate=0 --learning_rate_answer=0 --eval_questions=100'  # codes stay varied
    graph = {'eager': '', 'graph': '--compile=True', 'fused': '--compile=True --fuse=True'}
    by_two = {'one': '--nproc_per_node=1|', 'two': '--nproc_per_node=2|'}
    text, blind = 'supervised_rollout_think', 'add_think_blind'
    return {
        'think-512': lambda: speed_think(512), 'think-1': lambda: speed_think(1), 'train': speed_train,
        'two': lambda: speed_script(text, knobs, by_two, 128 * 1024, every=10),
        'two-thoughts': lambda: speed_script(text, knobs, by_two, 144 * 4 * 256 * 4, every=10),
        'blind': lambda: speed_script(blind, still, graph, 64 * 32),
        'blind-default': lambda: speed_script(blind, still, graph, 512),
        'blind-cpu': lambda: speed_script(blind, still, {'merged': '--device=cpu'}, 64 * 32)}[row]()


# ---- weightings beside the exact gradient ----

ESTIMATORS = {      # name: (kind, tau)
    **{kind: (kind, 1.) for kind in ('raw', 'reinforce', 'rloo', 'dr_grpo', 'grpo', 'batch_std', 'quantile',
                                     'quantile_batch', 'softmax')},
    'softmax-sharp': ('softmax', .1), 'softmax_centred': ('softmax_centred', 1.),
    'softmax_centred-sharp': ('softmax_centred', .1), 'softmax_quantile': ('softmax_quantile', 1.),
    'best': ('best', 1.), 'tpo': ('tpo', 1.)}
GROUPS = (2, 4, 8, 16, 32, 64)
STATES = {'untrained': 0., 'quarter': .25, 'most': .75}     # row: share of rollouts that are right


class Enumerated:
    """
    A thinking policy small enough to enumerate: 64 questions a, b < 8, all 64 codes of two thoughts, and what
    each code is worth for each question, (64, 64): 'sparse' 1 for the answer's right code (drawn at random),
    else 0; 'dense' log p(answer | code) of a reader that counts the thoughts shared with right codes.
    level: it is taught the right codes, by cross-entropy, until this share of its rollouts is right.
    """

    def __init__(self, seed, level=0., M=8, L=8, T=2):
        torch.manual_seed(seed)
        self.model = GPT2Thinking(ThinkingModelConfig(
            block_size=T + 1, n_layer=1, n_head=4, d_model=32, init='unit', tie_weights=False,
            d_normal_vocab=M, d_thought_vocab=L, output_kind='thought'))
        right = torch.randperm(L ** T)[:M]                                      # (M,)
        self.question = torch.cartesian_prod(torch.arange(M), torch.arange(M))  # (Q, 2)
        self.codes = self.model.spell(torch.arange(L ** T), T)                  # (C, T)
        answer = self.question.sum(1) % M                                       # (Q,)
        alike = (self.codes[:, None] == self.codes[right]).sum(-1)              # (C, M) thoughts
        self.rewards = {'sparse': (torch.arange(L ** T) == right[answer][:, None]).float(),
                        'dense': (2. * alike).log_softmax(1).T[answer]}
        self.climb(lambda log_pi: (log_pi * self.rewards['sparse']).sum(1), 300, level)

    def climb(self, aim, n_steps, level=2.):
        """Up to n_steps of Adam up the mean of aim(log pi), until a share `level` of rollouts is right."""
        optimizer = torch.optim.Adam(self.model.parameters(), 3e-3)
        for _ in range(n_steps):
            log_pi = self.log_pi(self.question)
            if (log_pi.exp() * self.rewards['sparse']).sum(1).mean() >= level:
                break
            (-aim(log_pi).mean()).backward()
            optimizer.step()
            optimizer.zero_grad()

    def log_pi(self, question):
        """Log-probabilities (n, C) of all codes after questions (n, 2), with gradient."""
        many, codes = question.repeat_interleave(len(self.codes), dim=0), self.codes.repeat(len(question), 1)
        return self.model.thought_log_probs(many, codes)[0].sum(1).view(len(question), -1)

    def value(self, reward):
        """The expected reward of a rollout, with gradient."""
        return (self.log_pi(self.question).exp() * self.rewards[reward]).sum(1).mean()

    def jacobian(self):
        """The gradient of every log pi(code | question), (Q C, parameters)."""
        weights, rows = list(self.model.parameters()), []
        for question in self.question:
            log_pi = self.log_pi(question[None])[0]
            parts = torch.autograd.grad(log_pi, weights, torch.eye(len(log_pi)), is_grads_batched=True,
                                        materialize_grads=True)
            rows.append(torch.cat([part.flatten(1) for part in parts], dim=1))
        return torch.cat(rows)

    def exact(self, pi, reward):
        """The gradient of the expected reward as weights (Q C,) of the rows of the Jacobian."""
        return (pi * self.rewards[reward]).flatten() / len(pi)


def weigh(rewards, log_pi, name, baseline):
    """The weights of an estimator for many batches of groups, all (n, groups, G)."""
    kind, tau = ESTIMATORS[name]
    if kind in ('batch_std', 'quantile_batch'):
        return torch.stack([advantages(batch, kind) for batch in rewards])
    return advantages(rewards.flatten(0, 1), kind, tau, baseline, None, log_pi.flatten(0, 1)).view_as(rewards)


def compare(weights, which, gram, exact, blocks=20):
    """
    Estimates of the gradient, each the sum of rows `which` (n, S) of the Jacobian times weights
    {name: (n, S)}, beside the exact one, the sum of all rows times exact (R,). Lengths and angles follow from
    gram (R, R), the products of rows. The squared length of the mean estimate comes from products of
    different blocks of estimates, which noise does not lengthen; its error from leaving out one block each.

    Returns {name: numbers}: cosine of one estimate with the exact gradient (mean, standard error), its length
    relative to it, cosine of the mean estimate (value, standard error), relative error of the mean estimate,
    and variance of one estimate (trace of the covariance) relative to the squared length of the mean.
    """
    n, along = len(which), gram @ exact
    length = (exact @ along).sqrt()
    all_weights = torch.stack(list(weights.values()), dim=1)                    # (n, K, S)
    square = torch.cat([(w @ gram[rows[:, :, None], rows[:, None]] * w).sum(-1)
                        for w, rows in zip(all_weights.split(200), which.split(200))])      # (n, K)
    inner, found = (all_weights * along[which][:, None]).sum(-1), {}            # (n, K)
    for k, (name, weight) in enumerate(weights.items()):
        mean_of = torch.zeros(blocks, len(gram)).scatter_add_(
            1, which.view(blocks, -1), weight.reshape(blocks, -1) * blocks / n)     # (blocks, R)
        products, to_exact = mean_of @ gram @ mean_of.T, mean_of @ along

        def of_mean(left, products=products, to_exact=to_exact):
            m = len(left)
            between = (products[left][:, left].sum() - products[left, left].sum()) / (m * (m - 1))
            return to_exact[left].mean() / (between.clamp(min=1e-30).sqrt() * length), between
        every = torch.arange(blocks)
        direction, between = of_mean(every)
        without = torch.stack([of_mean(every[every != b])[0] for b in range(blocks)])
        error = between - 2 * to_exact.mean() + length**2
        each = inner[:, k] / (square[:, k].sqrt() * length).clamp(min=1e-30)    # length 0: cosine 0
        numbers = {'cosine': each.mean(), 'cosine_error': each.std() / n**.5,
                   'length': square[:, k].sqrt().mean() / length, 'mean_cosine': direction,
                   'mean_cosine_error': (without.var(correction=0) * (blocks - 1)).sqrt(),
                   'bias': error.clamp(min=0).sqrt() / length,
                   'variance': (square[:, k].mean() - between) / between.clamp(min=1e-30)}
        found[name] = {key: float(f'{value.item():.5g}') for key, value in numbers.items()}
    return found


def gradient(suite, row, seed, samples=256, n=1000):
    """Every estimator at every group size beside the exact gradient, from as many rollouts; see compare."""
    small = Enumerated(seed, STATES[row])
    pi = small.log_pi(small.question).exp().detach()                            # (Q, C)
    jacobian = small.jacobian()
    gram, generator = jacobian @ jacobian.T, torch.Generator().manual_seed(seed)
    values = {reward: small.value(reward).item() for reward in small.rewards}
    result = {'seed': seed, 'groups': GROUPS, 'value': values, 'sparse': {}, 'dense': {}}
    for G in GROUPS:
        at = torch.randint(len(pi), (n * samples // G,), generator=generator)   # of a group
        code = pi[at].multinomial(G, replacement=True, generator=generator)     # (n groups, G)
        which = (at[:, None] * pi.shape[1] + code).view(n, samples)
        for reward, worth in small.rewards.items():
            got, log_pi = (table[at[:, None], code].view(n, -1, G) for table in (worth, pi.log()))
            weights = {name: weigh(got, log_pi, name, values[reward]).view(n, samples) * G / samples
                       for name in ESTIMATORS}
            for name, numbers in compare(weights, which, gram, small.exact(pi, reward)).items():
                for key, number in numbers.items():
                    result[reward].setdefault(name, {}).setdefault(key, []).append(number)
    if row == 'untrained':      # where the exact gradient itself leads to
        small.climb(lambda log_pi: (log_pi.exp() * small.rewards['sparse']).sum(1), 100)
        pi = small.log_pi(small.question).exp().detach()
        result['climbed'] = {'value': small.value('sparse').item(),
                             'share_of_one_code': pi.mean(0).max().item()}
    return result


def over_models(runs, reward, name, G, key):
    """Mean of a number over models, and the half width of its 95% confidence interval (Student's t)."""
    values = [run[reward][name][key][GROUPS.index(G)] for run in runs]
    t = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}.get(len(values), 1.96)
    return mean(values), t * stdev(values) / len(values)**.5 if len(values) > 1 else math.nan


def gradient_picture():
    """What the gradient suite found, a figure: bands are 95% confidence intervals over models."""
    panels = [(reward, row) for reward in ('sparse', 'dense') for row in ('untrained', 'quarter')]
    families = list(ESTIMATORS)[:8], list(ESTIMATORS)[8:]      # linear in rewards or ranks; softmax, best
    lines = list(itertools.product(families, ('cosine', 'mean_cosine')))
    colours = ['#000000', '#888888', '#D55E00', '#E69F00', '#0072B2', '#56B4E9', '#009E73', '#CC79A7']
    figure = need('plotly.subplots', 'to draw pictures').make_subplots(
        4, 4, shared_xaxes=True, vertical_spacing=.035, horizontal_spacing=.035, column_titles=[
            f'<b>{"right or wrong: 1 or 0" if reward == "sparse" else "log p(answer)"}</b><br>'
            f'{row_of("gradient", row)["what"]}' for reward, row in panels])
    for column, (reward, row) in enumerate(panels, 1):
        runs = results('gradient')[row]['runs']
        for line, (names, key) in enumerate(lines, 1):
            for name, colour in zip(names, colours):
                middle, half = zip(*(over_models(runs, reward, name, G, key) for G in GROUPS))
                low, high = ([m + sign * h for m, h in zip(middle, half)] for sign in (-1, 1))
                where, group = dict(row=line, col=column), f'legend{"" if line < 3 else 2}'
                figure.add_scatter(x=[*GROUPS, *GROUPS[::-1]], y=high + low[::-1], fill='toself',
                                   mode='lines', fillcolor=colour, opacity=.08, line_width=0,
                                   showlegend=False, **where)
                figure.add_scatter(x=GROUPS, y=middle, name=name, mode='lines+markers', marker_color=colour,
                                   legend=group, showlegend=column == 1 and line in (1, 3), **where)
    figure.update_xaxes(type='log', tickvals=GROUPS, ticktext=GROUPS, gridcolor='#dddddd')
    figure.update_yaxes(gridcolor='#dddddd', zerolinecolor='#888888')
    figure.update_xaxes(title='group size G', row=4)
    for line, (_, key) in enumerate(lines, 1):
        figure.update_yaxes(row=line, range=[-.15, .8] if key == 'cosine' else [-.45, 1.12])
        title = 'one estimate' if key == 'cosine' else 'mean of many (bias)'
        figure.update_yaxes(row=line, col=1, title=title)
    return figure.update_layout(
        title={'text': 'Cosine with the exact gradient, estimates from 256 rollouts: mean and 95% interval',
               'x': .5, 'y': .985}, width=1500, height=1250, plot_bgcolor='white', font_size=15,
        margin={'l': 80, 'r': 210, 't': 110, 'b': 60}, legend={'y': .9}, legend2={'y': .4})


def steadiness(log):
    """Of a log: the share of right answers at early steps, variance and decay of the gradient norm, effective
    number of rollouts, whether it collapsed: entropy of thoughts below .05 nats, less than half right."""
    success = {str(line['step']): line['accuracy'] for line in log if 'accuracy' in line}
    norms, few, entropy = ([line[key] for line in log if key in line]
                           for key in ('gradient_norm', 'effective_n', 'entropy'))
    quarter = len(norms) // 4 or 1
    return {'early': {step: success[step] for step in '10 20 30 100 300 1000'.split() if step in success},
            'norm_variance': variance(norms) / max(mean(norms), 1e-12)**2 if len(norms) > 1 else 0.,
            'norm_decay': mean(norms[-quarter:]) / max(mean(norms[:quarter]), 1e-12),
            'effective_n': mean(few) if few else None,
            'collapsed': bool(entropy) and mean(entropy[-3:]) < .05 and list(success.values())[-1] < .5}


def verdict(runs, others):
    """
    Better or worse than others (rloo), for reasons that hold in each seed: succeeds more or less at the end
    (by .01), is ahead at step 10, 20 or 30 (by .01), has steadier gradients (variance of the norm, relative
    to its mean, a fifth less); or gradients vanish (to 1% while under .9 are right), or effective n is below
    1.5. Reasons on both sides: success decides. Otherwise: inconclusive.
    """
    others = {run['changed'].get('seed', 0): run for run in others}
    pairs = [(run, others[seed]) for run in runs if (seed := run['changed'].get('seed', 0)) in others]
    if not pairs or all(run == other for run, other in pairs):
        return ''
    gain = [run['accuracy'] - other['accuracy'] for run, other in pairs]
    ahead = [[run['early'][step] - other['early'][step] for run, other in pairs]
             for step in ('10', '20', '30')
             if all(step in one['early'] for pair in pairs for one in pair)]
    better = {'succeeds more': min(gain) > .01, 'faster early': any(min(gains) > .01 for gains in ahead),
              'steadier gradients': all(run['norm_variance'] < .8 * other['norm_variance']
                                        for run, other in pairs)}
    worse = {'succeeds less': max(gain) < -.01,
             'gradients vanish': all(run['norm_decay'] < .01 and run['accuracy'] < .9 for run, _ in pairs),
             'effective n near 1': all((run['effective_n'] or 9) < 1.5 for run, _ in pairs)}
    word = 'inconclusive'
    if any(better.values()) != any(worse.values()):
        word = 'better' if any(better.values()) else 'worse'
    elif better['succeeds more'] or worse['succeeds less']:
        word = 'better' if better['succeeds more'] else 'worse'
    why = ', '.join(reason for reason, holds in (better | worse).items() if holds)
    return f'{word}: {why}' if why else word


# ---- pages ----

def values(runs, key):
    """What runs have at a key such as ablation.shuffled or curve.perplexity.-1; some may have nothing."""
    def at(inside, name):
        return None if inside is None else inside[int(name)] if isinstance(inside, list) else inside.get(name)
    return [found for run in runs if (found := functools.reduce(at, key.split('.'), run)) is not None]


def cell(runs, text):
    """
    What a table says of some runs. text: a key and a format, 'accuracy .3f', for mean and range over runs,
    and how many have a number if not all; or `mean`, `sum` or `median` (of a list, in the first run) behind
    it. A dict becomes the means of its values, a curve its mean at six steps; parts of a / b are means.
    """
    if ' / ' in text:
        cells = [cell(runs, f'{part} mean') or '–' for part in text.split(' / ')]
        return ' / '.join(cells) if set(cells) != {'–'} else ''
    if ' → ' in text:
        cells = [cell(runs, part) for part in text.split(' → ')]
        return ' → '.join(cells) if any(cells) else ''
    key, form, how = (*text.split(), '')[:3]
    found = values(runs, key)
    if not found:
        return 'never' if any(key in run for run in runs) else ''
    if isinstance(found[0], dict):
        return ' / '.join(format(mean(one[name] for one in found), form) for name in found[0])
    if how == 'median':
        return f'{median(found[0]):{form}} ({min(found[0]):{form}} to {max(found[0]):{form}})'
    if isinstance(found[0], list):
        steps = runs[0]['curve']['step']
        shown = sorted({round(i * (len(steps) - 1) / 5) for i in range(6)})
        return ', '.join(f'{steps[i]}: {mean(one[i] for one in found):{form}}' for i in shown)
    if how:
        return format({'mean': mean, 'sum': sum}[how](found), form)
    low, high = (format(number, form) for number in (min(found), max(found)))
    text = low if low == high else f'{mean(found):{form}} ({low} to {high})'
    return text if len(found) == len(runs) else f'{text}, {len(found)} of {len(runs)}'


def table(suite, only=()):
    """A suite's table in Markdown, or some rows of it. What all rows have in common is said above it."""
    def part(name):     # of this suite, or of the one that it names
        return SUITES[it[name]][name] if isinstance(it[name], str) else it[name]

    it, found, lines, said, shared = SUITES[suite], results(suite), [], [], False
    rows, columns = part('rows'), part('columns')
    if 'ways' in it:        # to do the job of a row
        rows = {row: {'what': part('ways')[row.partition('.')[2]], 'job': rows[row.partition('.')[0]]['what']}
                for row in results(it.get('of', suite))}
    for row, own in rows.items():
        if only and row not in only and row.partition('.')[0] not in only:
            continue
        starts = [f'--{knob}=<{start.partition("@")[0]}>' for knob, start in own.get('start', {}).items()]
        shared = shared or 'script' not in own
        other = [f'python {own["script"]}.py'] if 'script' in own else []
        changes = ' '.join([*other, *own.get('knobs', '').split(), *starts])
        at = f' at {own["at"]}' if 'at' in own else ''
        line, shown = found.get(row, {'runs': []}), {'job': own.get('job', ''), '': own.get('what', row)}
        shown['knobs'] = f'`{changes}`{at}' if changes else ''
        for head, text in columns.items():
            where, _, text = text.replace('{row}', row).rpartition(': ')
            place, _, name = where.partition('/')
            runs = results(place).get(name or row, {'runs': []})['runs'] if where else line['runs']
            shown[head] = cell(runs, text) if text != 'verdict' else verdict(
                runs, results(it['beside'])['rloo']['runs'])
        if any(shown[head] for head in columns):
            at_once = f', {line["parallel"]} at once' if line.get('parallel', 1) > 1 else ''
            on = f'{line["hardware"]}, torch {line["torch"]}{at_once}' if 'torch' in line else ''
            on = re.sub(r'\(R\)| Processor|NVIDIA | 80GB HBM3|\+cpu|\+cu\w+', '', on)
            lines.append(shown | {'seeds': len(line['runs']) if on and 'ways' not in it else '', 'on': on})
    if shared and 'script' in it:
        said.append(f'`python {it["script"]}.py {it.get("knobs", "")}'.strip() + '`')
    said += [f'at {it["at"]}'] if 'at' in it else []
    for head in [head for head in lines[0] if head != '']:
        every = {line[head] for line in lines}
        if every == {''} or len(every) == 1 and len(lines) > 1:
            said += [f'{head} {every.pop()}'] if every != {''} else []
            for line in lines:
                del line[head]
    lines = [list(lines[0]), ['---'] * len(lines[0]), *(line.values() for line in lines)]
    lines = [f'| {" | ".join(map(str, line))} |' for line in lines]
    return '\n'.join([f'{"; ".join(said)}.\n'] * bool(said) + lines)


def number(text):
    """A number of a sentence: suite/row:key@min, perhaps - or / another one, and a format."""
    def value(term):
        suite, row, key, how = re.fullmatch(r'(.+?)/(.+?):([^@]+)@?(\w*)', term).groups()
        return {'': mean, 'min': min, 'max': max, 'n': len}[how](values(results(suite)[row]['runs'], key))
    term, *rest, form = text.split()
    found = value(term)
    if rest:
        found = found - value(rest[1]) if rest[0] == '-' else found / value(rest[1])
    return format(found, form)


def write_pages():
    """Put tables and numbers into README.md and assets/notes/, between their marks."""
    for page in (ROOT / 'README.md', *sorted((ROOT / 'assets/notes').glob('*.md'))):
        text = page.read_text()
        try:
            new = re.sub(r'(<!-- table (\S+)([^\n]*?) -->\n).*?(<!-- end -->)', lambda mark: (
                f'{mark[1]}{table(mark[2], mark[3].split())}\n{mark[4]}'), text, flags=re.S)
            new = re.sub(r'(<!--= (.*?) -->).*?(<!--/-->)', lambda mark: (
                f'{mark[1]}{number(mark[2])}{mark[3]}'), new, flags=re.S)
        except (KeyError, ValueError, IndexError, AttributeError) as error:
            fail(f'{page.name} has a mark without a result: {error!r}')
        if new != text:
            write_atomic(page, lambda file, new=new: file.write(new.encode()))


# ---- the command ----

run_by_us = [name for name, it in SUITES.items() if isinstance(it['rows'], dict)    # not from other suites
             and (name == 'speed' or all('script' in row_of(name, row) for row in it['rows']))]
if suite not in (*run_by_us, 'forming', 'tables'):
    fail(f'--suite={suite} must be one of {", ".join(run_by_us)}, forming, tables')
if suite == 'math' and not pretrained:
    fail('--suite=math needs --pretrained=<the model to start from>')
failed = ()
if suite == 'forming':
    forming()
elif suite != 'tables':
    here = 'cuda' if torch.cuda.is_available() else 'cpu'
    every = {row: row_of(suite, row) for row in SUITES[suite]['rows']}
    usual = [row for row, it in every.items() if it['on'] == here and not it['at']]
    for row in only.split(',') if only else ():
        if row not in every:
            fail(f'--only={row} must be one of {", ".join(every)}')
        if every[row]['at']:
            fail(f'{row} of the {suite} suite can only be measured at commit {every[row]["at"]}')
        if here == 'cpu' and every[row]['on'] == 'cuda':
            fail(f'{row} of the {suite} suite must be measured on a GPU')
    rows = [row for row in every if row in only.split(',')] if only else usual     # starts come first
    if not rows:
        fail(f'no row of the {suite} suite belongs on a machine with {here}')
    for row in rows if suite == 'speed' else ():
        for way, found in time_job(row).items():
            command = f'python bench.py --suite=speed --only={row}'
            keep('speed', f'{row}.{way}', every[row]['on'], command, [found])
    failed = measure(suite, rows) if suite != 'speed' else ()
    print('' if failed else table(suite, rows))
write_pages()
if pictures:
    Path(pictures).mkdir(parents=True, exist_ok=True)
    page = gradient_picture().to_html(config={'displayModeBar': False}).encode()
    write_atomic(Path(pictures) / 'gradient.html', lambda file: file.write(page))
if failed:
    fail('; '.join(dict.fromkeys(failed)))

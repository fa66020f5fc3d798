"""
What several scripts share: bad input, knobs, processes, the run directory, tasks, sampling, advantages,
balanced targets, ablations, colours and pictures. Last come fast paths: they change no result, skip them at
first.
"""
import codecs
import contextlib
import difflib
import fcntl
import functools
import html
import importlib
import itertools
import json
import math
import os
import platform
import re
import resource
import subprocess
import sys
import time
from dataclasses import asdict
from datetime import timedelta
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm import tqdm

try:
    import triton
    import triton.language as tl
except ImportError:     # where there is no GPU
    triton = None


# ---- bad input: one line, exit code 2 ----

def fail(message):
    """End the program because of a user's mistake: one line on stderr, exit code 2, no traceback."""
    rank = os.environ.get('RANK')
    line = ' '.join(str(message).split())[:500]
    print(f'error{" of process " + rank if rank else ""}: {line}', file=sys.stderr)
    sys.exit(2)


@contextlib.contextmanager
def user_errors():
    """A ValueError inside, or a model too large for the memory, is the user's mistake: fail with it."""
    try:
        yield
    except ValueError as error:
        fail(error)
    except RuntimeError as error:
        if 'memory' not in str(error):
            raise
        fail(str(error).splitlines()[0])


def need(package, purpose):
    """Import an optional package. Raises ValueError that says what to install if it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f'{package} is needed {purpose}: pip install {package.partition(".")[0]}') from error


# ---- knobs ----

LIMITS = {name: limits for limits, names in {       # smallest and largest value; of all others 0 and 2^31 - 1
    (1, 2**31 - 1): 'max_steps inner_steps eval_every eval_questions log_every n_tokens seeds parallel',
    (1, 2**20): 'batch_size group_size d_thought_vocab d_model text_len eval_sequences eval_prefixes prefix_len',
    (1, 2**12): 'n_layer n_head n_adds k n_letters at_once', (0, 2**12): 'think_len k_test',
    (2, 2**31 - 1): 'input_max n_questions', (1, 10**5): 'n_problems',
    (1e-6, 1e9): 'tau max_seconds', (1e-3, 1e3): 'temperature',
    (0, 1): 'epsilon hardest advance_at beta2', (0, .99): 'heldout val_share dropout',
}.items() for name in names.split()}
# these may differ when a run is resumed, and do not name its folder
FREE = ('init_from', 'eval_only', 'out_dir', 'max_steps', 'max_seconds', 'eval_every', 'log_every', 'wandb_mode',
        'plot', 'page')
# these decide which questions are held out: weights of a script are only used with the split they were trained on
SPLIT = ('seed', 'heldout', 'input_min', 'input_max', 'n_adds', 'task', 'n_letters', 'k')


class Knobs(dict):
    """A script's knobs by name, and: script (its name), folder, changed (on the command line), checkpoint."""


def read_knobs(file, script_globals, pretrained=False):
    """
    Read a script's knobs, the lines `name = value  # meaning, unit` below the banner "knobs", overridden by
    --name=value. 'a' | 'b' in a comment, of one or more lines, lists the choices of a text. --help prints the
    block. The values go into the script's globals. With init_from=resume, knobs that are not given come from
    the checkpoint; with the path of a checkpoint of the same script, only those in SPLIT. pretrained: what
    does not end in .pt is left to the script. Returns Knobs, or ends the program with one line.
    """
    block = Path(file).read_text().partition('# ---- knobs ----')[2].partition('\n# ----')[0].strip()
    comments, name = {}, None
    for line in block.splitlines():
        code, _, comment = line.partition('#')
        name = code.partition(' = ')[0] if re.match(r'\w+ = ', code) else name
        comments[name] = comments.get(name, '') + comment
    defaults = {name: script_globals[name] for name in comments}
    if {'-h', '--help'} & set(sys.argv[1:]):
        print(script_globals['__doc__'].strip(), 'Knobs, set by --name=value:', block, sep='\n\n')
        sys.exit(0)

    given = {}
    for argument in sys.argv[1:]:
        match = re.fullmatch(r'--(\w+)=(.*)', argument, re.DOTALL)
        if not match:
            fail(f'{argument!r} is not of the form --name=value, see --help')
        name, text = match.groups()
        if name not in defaults:
            near = difflib.get_close_matches(name, defaults, n=1, cutoff=0)[0]
            fail(f'unknown knob --{name}, the nearest is --{near}')
        given[name] = parse_knob(name, text, defaults[name])
    knobs = Knobs(defaults | given)
    for name, value in knobs.items():
        check_knob(name, value, defaults[name], comments[name])

    sys.stdout.reconfigure(errors='replace')    # a terminal that cannot show a tick is no reason to stop
    knobs.script, knobs.checkpoint = Path(file).stem, None
    name = ','.join(f'{k}={v}' for k, v in knobs.items() if v != defaults[k] and k not in FREE)
    knobs.folder = Path(knobs.get('out_dir') or f'out/{knobs.script}/{name.replace("/", "_") or "default"}')
    start = knobs.get('init_from', 'scratch')
    resume = start == 'resume'
    path = knobs.folder / 'ckpt.pt' if resume else Path(start)
    if start != 'scratch' and not (pretrained and path.suffix != '.pt'):
        knobs.checkpoint = load_checkpoint(path, 'nothing to resume' if resume else 'no checkpoint to start from')
        own = knobs.checkpoint['script'] == knobs.script
        if resume and not own:
            fail(f'{path} is from {knobs.checkpoint["script"]}.py')
        kept = knobs.keys() & (defaults if resume else SPLIT) - {'init_from', 'eval_only', 'out_dir'} if own else ()
        for name in kept:
            old = knobs.checkpoint['knobs'].get(name, knobs[name])
            if given.get(name, old) != old and name not in FREE:
                fail(f'--{name}={given[name]} cannot be changed when going on from {path}, it was {old}')
            knobs[name] = given.get(name, old)
    knobs.changed = {k: v for k, v in knobs.items() if v != defaults[k]}
    script_globals.update(knobs)
    return knobs


def parse_knob(name, text, default):
    """The value of a knob from its text on the command line, of the type of its default; or fail."""
    if isinstance(default, bool):
        return {'True': True, 'False': False}.get(text, text)
    try:
        return type(default)(text)
    except ValueError:
        fail(f'--{name}={text} must be {"an integer" if isinstance(default, int) else "a number"}')


def check_knob(name, value, default, comment):
    """Fail if a value, given or edited into the file, is impossible."""
    choices = re.findall(r"'([^']*)'", comment) if "' | '" in comment else None
    low, high = LIMITS.get(name, (0, 2**31 - 1))
    if isinstance(default, bool) and not isinstance(value, bool):
        fail(f'--{name}={value} must be True or False')
    if type(value) in (int, float) and not low <= value <= high:        # nan is neither
        fail(f'--{name}={value} must be between {low:g} and {high:g}')
    if choices and value not in choices:
        fail(f'--{name}={value} must be one of {", ".join(choices)}')


# ---- device and processes ----

class World:
    """
    Device and processes. Under torchrun every process draws the random numbers of the whole batch and works
    on its share of the rows, so N processes make the same update as one.
    """

    def __init__(self, knobs):
        self.rank, self.size = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
        self.main, name = self.rank == 0, knobs['device']
        if name == 'auto':
            name = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
        name = f'cuda:{os.environ.get("LOCAL_RANK", 0)}' if name == 'cuda' else name
        if not re.fullmatch(r'cpu|mps|cuda:\d+', name):
            fail(f'--device={name} must be auto, cpu, cuda, cuda:<number> or mps')
        try:
            self.device = torch.device(name)
            torch.zeros(1, device=self.device)
        except (RuntimeError, AssertionError) as error:
            fail(f'--device={name} is not available: {str(error).splitlines()[0]}')
        if self.device.type == 'cuda':
            torch.cuda.set_device(self.device)
        if self.size > 1 and (name == 'mps' or knobs['device'].startswith('cuda:')):
            fail('several processes need --device=cpu, or cuda without a number')
        if knobs['batch_size'] % self.size:
            fail(f'--batch_size={knobs["batch_size"]} cannot be shared by {self.size} processes')
        if self.size > 1:
            dist.init_process_group('nccl' if self.device.type == 'cuda' else 'gloo', timeout=timedelta(minutes=10))
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=knobs.get('dtype') == 'bfloat16')
        if self.device.type == 'cpu':
            make_repeatable()
        torch.manual_seed(knobs['seed'])
        # questions and noise are drawn from here, the same in all processes
        self.generator = torch.Generator(self.device).manual_seed(knobs['seed'])

    def share(self, x):
        """This process's rows of a tensor of the whole batch."""
        return x.chunk(self.size)[self.rank] if self.size > 1 else x

    def draw(self, kind, *shape):
        """Draw the whole batch's random numbers, by torch.rand or torch.randn. Returns this process's rows."""
        return self.share(kind(*shape, generator=self.generator, device=self.device))

    def gather(self, x):
        """The tensor of the whole batch from every process's rows."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    def mean_gradients(self, parameters):
        """Average gradients over processes, in place."""
        if self.size > 1:
            grads = [p.grad for p in parameters if p.grad is not None]
            flat = parameters_to_vector(grads)      # one message: each costs more than a small model's numbers
            dist.all_reduce(flat)
            vector_to_parameters(flat / self.size, grads)

    def peak_memory_mb(self):
        """The most memory this process has used, of the GPU if there is one."""
        if self.device.type == 'cuda':
            return torch.cuda.max_memory_allocated() / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == 'darwin' else 2**10)


def make_repeatable():
    """
    Make a CPU give the same bits in every repetition, so that a resumed run continues bit for bit. MKL must
    not vary its code or its threads, and must choose before two threads ask at once; torch must add in a
    fixed order.
    """
    os.environ.setdefault('MKL_CBWR', 'AUTO,STRICT')
    torch.set_num_threads(torch.get_num_threads())
    for function in (torch.exp, torch.log, torch.sin, torch.cos, torch.tanh):
        function(torch.ones(1))
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False


# ---- the run directory ----

def write_atomic(path, write):
    """Let write(temporary_path) write a file, then rename it: path is never half-written."""
    temporary = path.with_name(path.name + '.tmp')
    write(temporary)
    with open(temporary, 'rb+') as f:
        os.fsync(f.fileno())
    os.replace(temporary, path)


def load_checkpoint(path, missing='no checkpoint'):
    """Read a checkpoint: tensors, numbers and text, nothing that runs. Fails in one line if it is damaged."""
    if not os.path.isfile(path):
        fail(f'{missing}: {path} is not there')
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:      # cut off, not a checkpoint, or more than data: torch raises many kinds
        fail(f'{path} is damaged or no checkpoint ({type(error).__name__})')
    needed = {'script', 'knobs', 'models', 'step', 'best', 'seconds', 'written', 'optimizers', 'generator'}
    if not isinstance(checkpoint, dict) or not needed <= checkpoint.keys():
        fail(f'{path} is no checkpoint of these scripts')
    return checkpoint


def pack(model):
    """A model as numbers, text and tensors; model.unpack makes it a model again."""
    return {'kind': type(model.config).__name__, 'config': asdict(model.config), 'state': model.state_dict()}


class Run:
    """
    One run and its folder: config.json, metrics.jsonl, samples.txt, ckpt.pt, best.pt. An older run there is
    moved to <folder>.1, .2, ... Only the main process writes, nothing with eval_only. If a run is resumed,
    optimisers, random numbers and files go back to where they were, and first_step is the step to continue
    with.
    """

    def __init__(self, knobs, world, optimizers):
        self.knobs, self.world, self.folder, self.optimizers = knobs, world, knobs.folder, optimizers
        self.start, self.best, self.first_step, self.wandb, self.shown = time.time(), -math.inf, 0, None, []
        self.writes = world.main and not knobs['eval_only']
        resumed = knobs.checkpoint if knobs['init_from'] == 'resume' else None
        if resumed:
            for optimizer, state in zip(optimizers, resumed['optimizers'], strict=True):
                optimizer.load_state_dict(state)
                for group in optimizer.param_groups:
                    if isinstance(group['lr'], torch.Tensor):
                        group['lr'] = group['lr'].to(world.device)
            try:
                world.generator.set_state(resumed['generator'])
            except RuntimeError:
                fail('this run was made on another kind of device: pass its ckpt.pt as init_from to use its weights')
            self.start, self.best, self.first_step = self.start - resumed['seconds'], resumed['best'], resumed['step']
        try:
            self.open_folder(resumed) if self.writes else None
        except OSError as error:
            fail(f'cannot write to {self.folder}: {error.strerror}')

    def restore(self, state):
        """What a script keeps between steps, {name: tensor}: as given, or from the checkpoint that is resumed."""
        resume = self.knobs['init_from'] == 'resume'
        return {name: (self.knobs.checkpoint[name] if resume else x).to(self.world.device) for name, x in state.items()}

    def open_folder(self, resumed):
        """Make the folder ours and open the files in it. resumed: a checkpoint, or None."""
        config, mode = self.folder / 'config.json', self.knobs['wandb_mode']
        with user_errors():
            wandb = need('wandb', 'for wandb_mode') if mode != 'disabled' else None
            need('plotly', 'to plot') if self.knobs.get('plot') else None
            written = json.loads(config.read_text()) if config.exists() else None
        if written and 'script' not in written or self.folder.resolve() == Path.cwd():
            fail(f'{self.folder} is not the folder of a run, pass another --out_dir')
        if written and not resumed:
            self.open_log().close()     # fails if that run is still going
            older = (self.folder.with_name(f'{self.folder.name}.{n}') for n in itertools.count(1))
            self.folder.rename(next(path for path in older if not path.exists()))
        self.folder.mkdir(parents=True, exist_ok=True)
        self.metrics = self.open_log()
        self.samples = open(self.folder / 'samples.txt', 'a', buffering=1, encoding='utf-8')
        for file, length in zip((self.metrics, self.samples), resumed['written'] if resumed else (0, 0)):
            file.truncate(length)       # forget what was written after the checkpoint
            file.seek(length)
        now = {'knobs': self.knobs, 'commit': git_commit(), 'torch': torch.__version__,
               'device': device_name(self.world.device.type), 'processes': self.world.size}
        if resumed and written:
            written.setdefault('resumed', []).append({'step': self.first_step, **now})
        else:
            written = {'script': self.knobs.script, **now}
        write_atomic(config, lambda path: path.write_text(json.dumps(written, indent=1)))
        try:
            self.wandb = wandb and wandb.init(project='think-tokens', name=f'{self.knobs.script} {self.folder.name}',
                                              config=dict(self.knobs), dir=self.folder, mode=mode)
        except Exception as error:      # no login, no network: wandb raises many kinds
            fail(f'wandb: {error}')

    def open_log(self):
        """metrics.jsonl, locked while it is open: two runs in one folder would ruin each other."""
        log = open(self.folder / 'metrics.jsonl', 'a', buffering=1, encoding='utf-8')
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.close()
            fail(f'another run is writing to {self.folder}')
        return log

    def seconds(self):
        """Wall-clock seconds of this run, including those before it was resumed."""
        return time.time() - self.start

    def steps(self, last):
        """Step numbers from first_step to last - 1, with a progress bar, until max_seconds have passed."""
        self.bar = tqdm(range(self.first_step, last), initial=self.first_step, total=last, dynamic_ncols=True,
                        disable=None if self.world.main else True)
        with self.bar:
            for step in self.bar:
                if step % self.knobs['log_every'] == 0:     # not always: all processes wait for the main one's clock
                    late = torch.tensor(float(self.seconds() > self.knobs['max_seconds']), device=self.world.device)
                    dist.broadcast(late, 0) if self.world.size > 1 else None
                    if late:
                        self.print(f'stopped at step {step}: max_seconds={self.knobs["max_seconds"]:g} have passed')
                        break
                yield step

    def print(self, text):
        """Print above the progress bar, in colour if stdout is a terminal and NO_COLOR is not set."""
        if self.world.main:
            tqdm.write(text if sys.stdout.isatty() and not os.environ.get('NO_COLOR') else plain(text))

    def sample(self, text, right=None):
        """Print coloured text, with a tick or a cross; keep it in samples.txt and for Weights & Biases."""
        if right is not None:
            text = f'{text} {paint("✓", "green") if right else paint("✗", "red")}'
        self.print(text)
        if self.writes:
            self.samples.write(plain(text) + '\n')
            self.shown.append(text)

    def show(self, config, questions, thoughts, answers, right, names=None):
        """Show the first three questions (n, S), with thoughts (n, T) and answers (n,). names: of normal tokens."""
        end = [config.end_thought] if hasattr(config, 'end_thought') else []
        for question, row, answer, truth in zip(questions[:3].tolist(), thoughts.tolist(), answers.tolist(), right):
            tokens = [*question, *(token for token in row if token not in end), *end, answer]
            text = show_tokens(tokens, config, lambda tokens: [names[i] if names else str(i) for i in tokens])
            self.sample(text, right=answer == truth)

    def log(self, step, **numbers):
        """Write a line of metrics.jsonl. Only seconds, tokens_per_second and mfu change when a run is repeated."""
        for name, value in numbers.items():
            if not math.isfinite(value):
                fail(f'{name} is {value} at step {step}: training diverged, a smaller learning_rate may help')
        if self.writes:
            self.metrics.write(json.dumps({'step': step, **numbers, 'seconds': round(self.seconds(), 4)}) + '\n')
            if self.wandb:
                self.wandb.log(numbers | self.table(), step=step)
            self.shown.clear()

    def table(self):
        """What was shown since the last line of the log, in colour, for Weights & Biases."""
        rows = ''.join(f'<tr><td>{as_html(text)}</td></tr>' for text in self.shown)
        return {'samples': importlib.import_module('wandb').Html(f'<table>{rows}</table>')} if rows else {}

    def report(self, step, **numbers):
        """Log an evaluation, print it, and show its last two numbers behind the progress bar."""
        self.log(step, **numbers)
        shown = {name: f'{value:.4g}' for name, value in numbers.items()}
        self.print(f'step {step}: ' + ', '.join(f'{name} {value}' for name, value in shown.items()))
        self.bar.set_postfix(dict(list(shown.items())[-2:]))

    def save(self, step, models, file='ckpt.pt', **state):
        """Write a checkpoint of models and tensors, both by name, from which the run continues bit for bit."""
        if self.writes:
            packed = {name: model if isinstance(model, dict) else pack(model) for name, model in models.items()}
            checkpoint = {'script': self.knobs.script, 'knobs': dict(self.knobs), 'step': step, 'best': self.best,
                          'seconds': self.seconds(), 'written': [self.metrics.tell(), self.samples.tell()],
                          'models': packed, 'optimizers': [o.state_dict() for o in self.optimizers],
                          'generator': self.world.generator.get_state(), **state}
            write_atomic(self.folder / file, lambda path: torch.save(checkpoint, path))

    def save_best(self, step, score, models, **state):
        """Write best.pt if the score is the highest so far."""
        if score > self.best:
            self.best = score
            self.save(step, models, 'best.pt', **state)

    def picture(self, name, figure):
        """Write a plotly figure as HTML that needs nothing else."""
        write_atomic(self.folder / name, figure.write_html)

    def finish(self, **result):
        """The last line of stdout: one JSON object."""
        changed = {k: v for k, v in self.knobs.changed.items() if k not in ('init_from', 'out_dir')}
        line = {'script': self.knobs.script, 'changed': changed, **result, 'seconds': round(self.seconds(), 2),
                'peak_memory_mb': round(self.world.peak_memory_mb())}
        if self.writes:
            self.metrics.close()
            self.samples.close()
        if self.wandb:
            self.wandb.log(self.table())
            self.wandb.summary.update(line)
            self.wandb.finish()
        if self.world.main:
            print(json.dumps(line), flush=True)
        if self.world.size > 1:
            dist.destroy_process_group()


def git_commit():
    """The commit of this checkout, with + if its files differ from it; None outside one."""
    command = ['git', '-C', Path(__file__).parent, 'describe', '--always', '--abbrev=40', '--exclude=*', '--dirty=+']
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def device_name(kind):
    """The name of this machine's device of a kind ('cpu', 'cuda')."""
    if kind == 'cuda':
        return torch.cuda.get_device_name()
    cpuinfo = Path('/proc/cpuinfo')
    found = re.search(r'model name\s*: (.*)', cpuinfo.read_text()) if cpuinfo.exists() else None
    return f'{found[1] if found else platform.machine()}, {os.cpu_count()} cores'


def peak_flops(device):
    """Dense bfloat16 operations per second in a GPU's data sheet; None if it is not one of these."""
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else ''
    return 989e12 if 'H100' in name or 'H200' in name else 312e12 if 'A100' in name else None


# ---- tasks: sums, serial problems ----

def digits(numbers, width, base=10):
    """The digits (n, width) of numbers (n,), most significant first, padded with zeros."""
    return numbers[:, None] // base ** torch.arange(width - 1, -1, -1, device=numbers.device) % base


def addition_questions(input_min, input_max, heldout, seed, n_adds=2, n_max=10**6):
    """
    All rows (a, b, ...) of n_adds numbers from input_min to input_max - 1, at most n_max, split at random: to
    train on, and a held-out share. Two tensors (n, n_adds), neither empty. Raises ValueError.
    """
    generator = torch.Generator().manual_seed(seed)
    n_numbers = input_max - input_min
    n_rows = n_numbers ** n_adds
    if n_rows > 2**62:
        raise ValueError(f'{n_adds} numbers of {n_numbers} make over 2^62 questions, too many to number')
    index = torch.arange(n_rows if n_rows <= n_max else 0)
    while len(index) < min(n_max, n_rows):
        index = torch.cat([index, torch.randint(n_rows, (n_max,), generator=generator)]).unique()
    index = index[torch.randperm(len(index), generator=generator)[:n_max]]
    rows = input_min + digits(index, n_adds, n_numbers)
    n_heldout = min(max(1, round(heldout * len(rows))), len(rows) - 1)
    return rows[n_heldout:], rows[:n_heldout]


class SerialTask:
    """
    Questions that are worked out step by step: a start, then a number of operations, their *depth*. After
    each operation there is a state; the last one is the answer.

    'add'   a running total modulo a prime; an operation is + c, or x c with c > 0
    'plus'  the same with additions only, modulo any number
    'perm'  of n states; an operation is one of n_letters random permutations of them (a word problem)
    's5'    of the 120 permutations of five things; an operation is one of n_letters of them
    'hop'   a random mapping f of n elements, given as tokens v>f(v) in random order, and a start; every operation is f
    'sort'  a list of n_letters numbers below n in place of a start; an operation asks for the next in order

    Tokens, with their text in names: states are 0..n_states-1, then come operations (one for 'hop' and
    'sort'), the arrows of 'hop', and last '=', which ends a question. n_prefix tokens stand before the start.
    Raises ValueError.
    """

    def __init__(self, task, n_states, n_letters=10, seed=0):
        generator = torch.Generator().manual_seed(seed)
        states = torch.arange(n_states)
        self.task, self.n_states, self.n_prefix, self.table = task, n_states, 0, None
        if task in ('add', 'plus'):
            if task == 'add' and any(n_states % d == 0 for d in range(2, math.isqrt(n_states) + 1)):
                raise ValueError(f'products need a prime modulus, not input_max={n_states}')
            factors = range(1, n_states if task == 'add' else 1)
            names = [f'+{c}' for c in range(n_states)] + [f'*{c}' for c in factors]
            self.table = torch.stack([states + c for c in states] + [states * c for c in factors]) % n_states
        elif task == 'perm':
            names = [f'p{i}' for i in range(n_letters)]
            self.table = torch.stack([torch.randperm(n_states, generator=generator) for _ in names])
        elif task == 's5':
            elements = list(itertools.permutations(range(5)))
            if n_letters > len(elements):
                raise ValueError(f'there are 120 permutations, not n_letters={n_letters}')
            self.n_states, number = len(elements), {element: i for i, element in enumerate(elements)}
            letters = [elements[i] for i in torch.randperm(120, generator=generator)[:n_letters].tolist()]
            names = [''.join(map(str, letter)) for letter in letters]
            self.table = torch.tensor([[number[tuple(letter[i] for i in element)] for element in elements]
                                       for letter in letters])
        elif task == 'hop':
            arrows = [f'{v}>{w}' for v in range(n_states) for w in range(n_states)]
            names, self.n_prefix = ['f', *arrows], n_states
        else:
            if n_letters > n_states:
                raise ValueError(f'a list of n_letters={n_letters} different numbers needs as many below input_max')
            names, self.n_prefix = ['next'], n_letters - 1      # the list ends where a start would be
        self.names = [str(i) for i in range(self.n_states)] + names + ['=']

    def draw(self, n, depth, generator):
        """n questions of a depth, on the generator's device: tokens (n, S), and states (n, depth) after operations."""
        device = generator.device
        ends = torch.full((n, 1), len(self.names) - 1, device=device)
        letters = torch.full((n, depth), self.n_states, device=device)
        if self.task == 'sort':
            order = torch.rand(n, self.n_states, generator=generator, device=device).argsort(1)
            numbers = order[:, :self.n_prefix + 1]
            return torch.cat([numbers, letters, ends], dim=1), numbers.sort(1).values[:, :depth]
        x = torch.randint(self.n_states, (n, 1), generator=generator, device=device)
        prefix, states = x[:, :0], [x]
        if self.task == 'hop':
            mapping = torch.randint(self.n_states, (n, self.n_states), generator=generator, device=device)
            order = torch.rand(n, self.n_states, generator=generator, device=device).argsort(1)
            prefix = self.n_states + 1 + order * self.n_states + mapping.gather(1, order)       # v>f(v)
            for _ in range(depth):
                states.append(mapping.gather(1, states[-1]))
        else:
            table = self.table.to(device)
            chosen = torch.randint(len(table), (n, depth), generator=generator, device=device)
            letters = self.n_states + chosen
            for step in chosen.T:
                states.append(table[step, states[-1][:, 0]][:, None])
        return torch.cat([prefix, x, letters, ends], dim=1), torch.cat(states[1:], dim=1)


# ---- tasks: text ----

def gpt2_encoding():
    """tiktoken's encoding of GPT-2. Fails in one line if its files are not here and cannot be fetched."""
    try:
        return need('tiktoken', "for GPT-2's tokens").get_encoding('gpt2')
    except Exception as error:      # networks fail in many ways
        fail(f"no files of GPT-2's tokens, TIKTOKEN_CACHE_DIR may name a folder that has them: {error}")


def load_text(folder):
    """
    What prepare_data.py left in a folder: train and val, memory maps of tokens (n,), the size of the
    vocabulary, and a function from a list of tokens to a list of texts. If several tokens make one character,
    the last has its text.
    """
    try:
        meta = json.loads((Path(folder) / 'meta.json').read_text())
        train, val = (np.memmap(Path(folder) / f'{part}.bin', dtype=np.uint16, mode='r') for part in ('train', 'val'))
        characters = meta['characters'] if meta['tokenizer'] == 'char' else None
    except (OSError, ValueError, LookupError) as error:
        fail(f'no data in {folder}, see python prepare_data.py --help: {error}')
    encoding = None if characters else gpt2_encoding()

    def decode(tokens):
        if characters:
            return [characters[token] for token in tokens]
        utf8 = codecs.getincrementaldecoder('utf-8')('replace')
        return [utf8.decode(encoding.decode_single_token_bytes(token)) for token in tokens]
    return train, val, meta['d_vocab'], decode


# ---- tasks: problems with one right answer ----

def boxed(text):
    """What the last \\boxed{...} of a text holds; None if there is none, or if it does not end."""
    _, found, rest = text.rpartition('\\boxed{')
    depth = 1
    for i, character in enumerate(rest if found else ''):
        depth += {'{': 1, '}': -1}.get(character, 0)
        if depth == 0:
            return rest[:i]
    return None


def load_problem(line):
    """
    The problem in a line of JSON: {question, answer, level}, all text. GSM8K has its answer behind ####; MATH
    has a problem, its answer in a \\boxed{} of its solution, and levels like "Level 4". Raises ValueError.
    """
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError('it is not of the form {...}')
    question, answer = row.get('question', row.get('problem')), row.get('answer')
    answer = boxed(str(row.get('solution'))) if answer is None else str(answer).rpartition('####')[2]
    if not isinstance(question, str) or not answer or not answer.strip():
        raise ValueError('it needs a question, or problem, and an answer, or a solution with \\boxed{}')
    return {'question': question, 'answer': answer.strip(), 'level': str(row.get('level', '')).removeprefix('Level ')}


def load_problems(path, levels=''):
    """Two or more problems in a file of JSON lines, ordered by level. levels: with commas between; empty: all."""
    problems = []
    try:
        lines = path.read_text(encoding='utf-8').split('\n')
    except (OSError, ValueError) as error:
        fail(f'no problems in {path}: {error}')
    for n, line in enumerate(lines, 1):
        try:
            problems += [load_problem(line)] if line.strip() else []
        except ValueError as error:
            fail(f'{path}, line {n} is no problem: {error}')
    found = sorted({problem['level'] for problem in problems})
    wanted = levels.replace(' ', '').split(',') if levels else found
    problems = sorted((problem for problem in problems if problem['level'] in wanted), key=lambda row: row['level'])
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
    except (ValueError, ZeroDivisionError):     # too many digits, n/0
        return answer


def grade(solution, answer):
    """
    Whether a solution gives the answer, and whether it has the form: one \\boxed{...}. Without a box its last
    number counts, so it can be right without the form.
    """
    given = boxed(solution)
    numbers = re.findall(r'(?:(?<![\d.])-)?\d+(?:,\d{3})*(?:\.\d+)?', solution) if given is None else [given]
    right = bool(numbers) and value(numbers[-1]) == value(answer)
    return right, given is not None and solution.count('\\boxed{') == 1


# ---- optimiser and schedule ----

def make_optimizer(model, learning_rate, weight_decay, betas=(.9, .98), recorded=False):
    """AdamW that decays matrices and embeddings, not biases and norms. recorded: may be part of a CUDA graph."""
    groups = [{'params': [p for p in model.parameters() if p.dim() >= 2], 'weight_decay': weight_decay},
              {'params': [p for p in model.parameters() if p.dim() < 2], 'weight_decay': 0.}]
    device = groups[0]['params'][0].device
    recorded = recorded and device.type == 'cuda'
    return torch.optim.AdamW(groups, lr=torch.tensor(learning_rate, device=device) if recorded else learning_rate,
                             betas=betas, fused=device.type != 'mps', capturable=recorded)


def schedule(optimizer, learning_rate, step, max_steps, warmup_steps=50, cosine=False):
    """Linear warm-up, constant, linear decay to zero over the second half; cosine: all the way, down to a tenth."""
    factor = min(1, (step + 1) / (warmup_steps + 1), 2 * (1 - step / max_steps))
    if cosine:
        done = max(0, step - warmup_steps) / max(1, max_steps - warmup_steps)
        factor = min((step + 1) / (warmup_steps + 1), .55 + .45 * math.cos(math.pi * done))
    for group in optimizer.param_groups:
        if isinstance(group['lr'], torch.Tensor):
            group['lr'].fill_(learning_rate * factor)
        else:
            group['lr'] = learning_rate * factor


# ---- sampling ----

fusing = False      # whether @fused functions are to be compiled, see recorded


def fused(function):
    """
    Compile a function if it is called in a recorded one with fuse=True: one kernel then does what several
    did, but the first call with new shapes takes a while. Elsewhere it is the function itself.
    """
    compiled = None

    @functools.wraps(function)
    def run(*arguments, **more):
        nonlocal compiled
        if not fusing or torch.compiler.is_compiling():
            return function(*arguments, **more)
        compiled = compiled or torch.compile(function, dynamic=False)
        return compiled(*arguments, **more)
    return run


@fused
def sample(logits, noise, temperature=1., epsilon=0., bias=0.):
    """
    Draw one token per row by inverting the distribution function at a uniform number: whoever draws the noise
    decides the token, whatever the batch or the number of processes. logits: (N, V). noise: (N,) in [0, 1).
    temperature: 0 takes the most likely token. epsilon: share of draws that are uniform over V. bias: added
    to the logits, (N, V). Returns tokens (N,). Raises ValueError.
    """
    if temperature != 0 and temperature < 1e-3 or not 0 <= epsilon <= 1:
        raise ValueError(f'cannot sample with {temperature=}, {epsilon=}')
    log_p = logits.float() + bias
    if temperature == 0:
        return log_p.argmax(-1)
    log_p = (log_p / temperature).log_softmax(-1)
    if epsilon:
        log_p = ((1 - epsilon) * log_p.exp() + epsilon / log_p.shape[-1]).log()
    below = log_p.exp().cumsum(-1)                                      # (N, V) distribution function
    target = noise[:, None] * below[:, -1:] * (1 - 2**-22)              # strictly below its last value
    return (below <= target).sum(-1)


# ---- advantages: how much each rollout of a group counts ----

def finite(rewards, otherwise=0.):
    """Rewards (N, G) with infinities replaced by the largest and smallest finite one of the group, or `otherwise`."""
    known = rewards.isfinite()
    low = rewards.masked_fill(~known, torch.inf).amin(1, keepdim=True)
    high = rewards.masked_fill(~known, -torch.inf).amax(1, keepdim=True)
    return torch.where(low <= high, rewards.clamp(low, high), torch.where(rewards.isnan(), rewards, otherwise))


def centred(rewards):
    """R - mean of the group (N, G)."""
    rewards = finite(rewards)
    return rewards - rewards.mean(1, keepdim=True)


def quantile(rewards, among):
    """
    Normal quantiles (N, G) of the ranks that rewards (N, G) have among others, (N, n) of the same row or (n,)
    of all: Phi^-1((rank - 1/2) / n), equal rewards at the mean of their ranks (rankit, Bliss 1967).
    """
    rewards, ordered = rewards.contiguous(), among.sort(-1).values
    below, up_to = (torch.searchsorted(ordered, rewards, right=right) for right in (False, True))
    scores = torch.special.ndtri((below + up_to).to(rewards.dtype) / (2 * ordered.shape[-1]))
    return torch.where(rewards.isnan(), rewards, scores)


def softmax(scores):
    """Softmax over rows (N, G). If the largest is infinite, its limit: those that have it share equally."""
    most = scores.amax(1, keepdim=True)
    return torch.where(scores == most, 0., scores - most).softmax(1)


ADVANTAGES = {  # from rewards R (N, G), a temperature t, a baseline b and the rewards of the whole batch
    'raw': lambda R, t, b, batch: finite(R),
    # b is a running mean (Williams 1992). Unbiased
    'reinforce': lambda R, t, b, batch: finite(R, b) - b,
    # Liu et al. 2025. Along the exact gradient, (G - 1)/G of its length
    'dr_grpo': lambda R, t, b, batch: centred(R),
    # R - mean of the others (Ahmadian et al. 2024). Unbiased
    'rloo': lambda R, t, b, batch: centred(R) * R.shape[1] / max(1, R.shape[1] - 1),
    # Shao et al. 2024. Questions with rare successes count more
    'grpo': lambda R, t, b, batch: centred(R) / (centred(R).square().mean(1, keepdim=True).sqrt() + 1e-6),
    # Liu et al. 2025, Tricks or traps
    'batch_std': lambda R, t, b, batch: centred(R) / (finite(batch).std(correction=0) + 1e-6),
    # blind to the scale of R
    'quantile': lambda R, t, b, batch: centred(quantile(R, R)),
    'quantile_batch': lambda R, t, b, batch: centred(quantile(R, batch.flatten())),
    # softmax without what it adds to every rollout, whatever its reward
    'softmax_centred': lambda R, t, b, batch: R.shape[1] * softmax(R / t) - 1,
    # advantage-weighted regression (Peng et al. 2019)
    'softmax': lambda R, t, b, batch: softmax(R / t),
    'softmax_quantile': lambda R, t, b, batch: softmax(quantile(R, R) / t),
    # the first of the best: softmax for t -> 0
    'best': lambda R, t, b, batch: torch.zeros_like(R).scatter(1, R.argmax(1, keepdim=True), 1.)}
SUM_TO_ONE = ('softmax', 'softmax_quantile', 'best')        # weights of a group; the others are advantages
# always 0 in a group of one
NEED_GROUPS = ('dr_grpo', 'rloo', 'grpo', 'batch_std', 'quantile', 'quantile_batch', 'softmax_centred')


def advantages(rewards, kind, tau=1., baseline=0., batch=None):
    """
    Weights (N, G) of rollouts by their rewards (N, G): the loss is -sum of weight * log-probability over the
    group, a mean for advantages, which are divided by G. kind: a name of ADVANTAGES. tau: temperature of the
    softmax. baseline: of reinforce, a number or (N, 1). batch: rewards (B, G) of all processes; None: these
    are all. Equal rewards: advantages with a group mean are 0, softmax weights 1/G. Infinite ones: see
    finite, quantile, softmax. nan stays nan.
    """
    weights = ADVANTAGES[kind](rewards, tau, baseline, rewards if batch is None else batch)
    return weights if kind in SUM_TO_ONE else weights / rewards.shape[1]


def concentration(weights):
    """
    On how few rollouts of a group the absolute weight (N, G) rests, means over groups: the largest share, and
    the effective number 1 / sum of squared shares, G if all weights are 0.
    """
    share = weights.abs() / weights.abs().sum(1, keepdim=True).clamp(min=1e-9)
    return {'max_weight': share.max(1).values.mean().item(),
            'effective_n': (1 / share.square().sum(1).clamp(min=1e-9)).clamp(max=weights.shape[1]).mean().item()}


# ---- balanced targets ----

def balanced_target(scores, prices, tau, n_steps=10):
    """
    Which codes each answer is to be written with: those it scores well with, by softmax(scores / tau -
    prices), where the price of a code rises until no more than its share of answers want it. Entropic optimal
    transport, at most max(1, n_answers / n_codes) answers per code, by Sinkhorn's iteration (Cuturi 2013)
    with prices that cannot fall below zero, as in an auction (Bertsekas 1988).

    scores: (n_answers, n_codes), log p(answer | code). prices: (n_codes,), zeros at first; if they are kept
    from call to call, a few n_steps are enough. Returns the log of the target (n_answers, n_codes), and the
    new prices.
    """
    n_answers, n_codes = scores.shape
    log_share = math.log(max(1., n_answers / n_codes))
    wanted = scores / tau
    for _ in range(n_steps):
        log_target = (wanted - prices).log_softmax(1)
        prices = (prices + log_target.logsumexp(0) - log_share).clamp(min=0)
    return (wanted - prices).log_softmax(1), prices


# ---- are the thoughts used? ----

@torch.no_grad()
def judge(answering, thoughts, right):
    """
    What an answering policy makes of thoughts (n, T): its answers (n,), the share that are `right` (n,), and
    the bits about the answer that reach it, log2(d_normal_vocab) minus its cross-entropy: for equally
    frequent answers a lower bound of their mutual information with the thoughts (Barber and Agakov 2003).
    """
    answers, log_q = [], []
    for part, answer in zip(thoughts.split(4096), right.split(4096)):
        log_p = answering.answer(part).float().log_softmax(-1)
        answers.append(log_p.argmax(-1))
        log_q.append(log_p.gather(1, answer[:, None])[:, 0])
    answers = torch.cat(answers)
    bits = math.log2(answering.config.d_normal_vocab) + torch.cat(log_q).mean().item() / math.log(2)
    return answers, (answers == right).sum().item() / len(right), max(0., bits)


def ablations(thoughts, choices, seed=0):
    """
    What replaces a checkpoint's greedy thoughts (N, T), to see whether the answer uses them: another
    question's, random ones of the range `choices`, the most frequent row for all, none at all. Returns {name:
    thoughts}.
    """
    generator = torch.Generator().manual_seed(seed)
    N, T = thoughts.shape
    rows, counts = thoughts.cpu().unique(dim=0, return_counts=True)
    return {'own': thoughts,
            'shuffled': thoughts[torch.randperm(N, generator=generator).to(thoughts.device)],
            'random': torch.randint(choices.start, choices.stop, (N, T), generator=generator).to(thoughts.device),
            'constant': rows[counts.argmax()].expand(N, T).to(thoughts.device),
            'none': thoughts[:, :0]}


# ---- colours and pictures ----

COLOURS = {'red': 31, 'green': 32, 'blue': 34, 'magenta': 35, 'cyan': 36}


def paint(text, colour):
    """Text in a colour, for Run.print."""
    return f'\033[{COLOURS[colour]}m{text}\033[0m'


def plain(text):
    """Coloured text without its colours."""
    return re.sub('\033\\[[0-9;]*m', '', text)


def as_html(text):
    """Coloured text as HTML."""
    names = {str(code): name for name, code in COLOURS.items()}
    text = re.sub('\033\\[(3\\d)m', lambda match: f'<span style="color:{names[match[1]]}">', html.escape(text))
    return f'<span style="white-space:pre-wrap">{text}</span>'.replace('\033[0m', '</span>')


def show_tokens(tokens, config, decode=lambda tokens: map(str, tokens), between=' '):
    """
    Tokens as coloured text: normal ones blue, <think3> cyan, <end_thought> magenta. decode: from a list of
    normal tokens to texts. If nothing is between tokens, thoughts side by side are one group:
    <think3,17,40,…>.
    """
    n_normal, end = getattr(config, 'd_normal_vocab', config.d_vocab), getattr(config, 'end_thought', None)
    texts, parts = iter(decode([token for token in tokens if token < n_normal])), []
    for is_thought, group in itertools.groupby(map(int, tokens), lambda token: token >= n_normal and token != end):
        if is_thought:
            numbers = [str(token - n_normal) for token in group]
            if not between:
                numbers = [','.join(numbers[:3] + ['…'] * (len(numbers) > 3))]
            parts += [paint(f'<think{number}>', 'cyan') for number in numbers]
        else:
            parts += [paint('<end_thought>', 'magenta') if token == end else paint(next(texts), 'blue')
                      for token in group]
    return between.join(parts)


def picture(n_panels, title, height=800, heights=None):
    """An empty plotly figure of panels, one below the other, each with a second scale on its right."""
    subplots = need('plotly.subplots', 'to draw pictures')
    figure = subplots.make_subplots(n_panels, 1, row_heights=heights, specs=[[{'secondary_y': True}]] * n_panels)
    return figure.update_layout(title=title, width=900, height=height, legend={'orientation': 'h'})


def heat_map(figure, panel, counts, x_title, x, y_title, y):
    """Draw counts (len(y), len(x)) into a panel; x and y are names."""
    figure.add_heatmap(z=counts.int().cpu().numpy(), x=x, y=y, colorscale='Blues', row=panel, col=1)
    figure.update_traces(showscale=False, selector={'type': 'heatmap'})
    figure.update_xaxes(title=x_title, type='category', tickangle=90, row=panel, col=1)
    figure.update_yaxes(title=y_title, type='category', row=panel, col=1, secondary_y=False)


def curve(figure, panel, run, name, colour, right=False, most=None):
    """Draw what a run logged under a name, on the right scale if asked; dotted: the most that is possible."""
    log = map(json.loads, (run.folder / 'metrics.jsonl').read_text().splitlines())
    steps, values = zip(*((line['step'], line[name]) for line in log if name in line))
    title, where = name.replace('_', ' '), {'row': panel, 'col': 1, 'secondary_y': right}
    figure.add_scatter(x=steps, y=values, name=title, line_color=colour, **where)
    if most is not None:
        figure.add_hline(most, line_dash='dot', **where)
    figure.update_yaxes(title=title, color=colour, rangemode='tozero', showgrid=not right, **where)


# ==== Fast paths. Nothing below changes a result: each has a slow form that the tests compare it with. ====

recording = False   # whether a recorded function is running on a GPU, where nothing may depend on what was computed


def being_recorded():
    return recording


def recorded(function, fuse=False):
    """
    Run a function of tensors on a GPU as a CUDA graph: its second call records its kernels, later ones launch
    them all at once. Tensors must keep their shapes, other arguments their values; the next call overwrites
    what is returned; what it reads besides, such as weights, must change in place. fuse: compile @fused
    functions. On a CPU: itself.
    """
    graph = given = result = None

    def call():
        global fusing, recording
        fusing, recording = fuse, True
        try:        # weights that autocast has cast must not be kept for later
            with torch.autocast('cuda', cache_enabled=False, dtype=torch.get_autocast_dtype('cuda'),
                                enabled=torch.is_autocast_enabled('cuda')):
                return function(*given)
        finally:
            fusing = recording = False

    def run(*arguments):
        nonlocal graph, given, result
        if arguments[0].device.type != 'cuda':
            return function(*arguments)
        if given is None:           # libraries set themselves up
            given = [x.clone() if isinstance(x, torch.Tensor) else x for x in arguments]
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                result = call()
            torch.cuda.current_stream().wait_stream(side)
            return result
        if graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = call()
        for mine, x in zip(given, arguments, strict=True):
            if isinstance(x, torch.Tensor):
                mine.copy_(x)
        graph.replay()
        return result
    return run


def causal(n_query, n_key, device):
    """(n_query, n_key), True where each of the last n_query of n_key tokens may look: before it and at itself."""
    return torch.ones(n_query, n_key, dtype=torch.bool, device=device).tril(n_key - n_query)


FEW = 8     # keys up to which attention is written out


def attention(q, k, v, mask=None, dropout=0.):
    """
    F.scaled_dot_product_attention of q (B, H, Sq, D), the last Sq of Sk tokens, to k and v (B, H, Sk, D), the
    fastest way. mask: (Sq, Sk) True where a token may look, or (H, Sq, Sk) to add to the scores; None:
    causal.
    """
    n_query, n_key = q.shape[2], k.shape[2]
    if n_key == 1 and not dropout:      # its weight is 1, but computed it has a gradient of rounding error, which Adam
        return v                        # would blow up
    few = n_key <= FEW
    if not few and mask is None and n_query in (1, n_key):
        return F.scaled_dot_product_attention(q, k, v, is_causal=n_query > 1, dropout_p=dropout)
    mask = causal(n_query, n_key, q.device) if mask is None else mask
    if not few:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    if mask.dtype is torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
    if q.is_cuda or n_query == 1:       # not as thousands of tiny matrices that are multiplied one by one
        scores = (q[:, :, :, None] * k[:, :, None]).sum(-1) * q.shape[-1] ** -.5 + mask     # (B, H, Sq, Sk)
        return (F.dropout(scores.softmax(-1), dropout)[..., None] * v[:, :, None]).sum(3).to(v.dtype)
    return F.dropout((q @ k.transpose(-2, -1) * q.shape[-1] ** -.5 + mask).softmax(-1), dropout) @ v


def has_kernel(device, d_head):
    """Whether attend_to_cache serves heads of this size on a device; gradients do not pass through it."""
    return triton is not None and device.type == 'cuda' and d_head in (16, 32, 64, 128) and not torch.is_grad_enabled()


def attend_to_cache(layer, q, k, v, cache):
    """attention(q, *cache.append(layer, k, v)) of one token (B, H, 1, D), reading keys and values once."""
    (B, H, _, D), out = q.shape, torch.empty_like(q, memory_format=torch.contiguous_format)
    if not q.stride() == k.stride() == v.stride():
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    launch = {'block': 32, 'num_warps': 1} if B * H > 500 else {'block': 128, 'num_warps': 4}
    keys, values = cache.kv[layer]
    attend_kernel[(B * H,)](q, k, v, keys, values, out, cache.on_device, keys.shape[2], *q.stride()[:2], H, D, **launch)
    return out


if triton:
    @triton.jit
    def attend_kernel(q, k, v, keys, values, out, length, S, stride_row, stride_head, H: tl.constexpr,
                      D: tl.constexpr, block: tl.constexpr):
        """One head of one row. Softmax as it goes (Milakov and Gimelshein 2018), in float32."""
        row, d, n = tl.program_id(0), tl.arange(0, D), tl.load(length)
        at = row // H * stride_row + row % H * stride_head + d
        old = row.to(tl.int64) * S * D + d
        new_k, new_v = tl.load(k + at), tl.load(v + at)
        tl.store(keys + old + n * D, new_k)
        tl.store(values + old + n * D, new_v)
        query = tl.load(q + at).to(tl.float32) / tl.sqrt(D * 1.)
        top, total, mix = tl.sum(query * new_k.to(tl.float32)), 1., new_v.to(tl.float32)
        for start in range(0, n, block):
            s = start + tl.arange(0, block)[:, None]                                # (block, 1)
            key = tl.load(keys + old + s * D, s < n, 0.).to(tl.float32)             # (block, D)
            value = tl.load(values + old + s * D, s < n, 0.).to(tl.float32)
            score = tl.where(s < n, tl.sum(query * key, 1, keep_dims=True), -float('inf'))
            best = tl.maximum(top, tl.max(score))
            p, keep = tl.exp(score - best), tl.exp(top - best)
            top, total, mix = best, total * keep + tl.sum(p), mix * keep + tl.sum(p * value, 0)
        tl.store(out + row * D + d, (mix / total).to(new_v.dtype))


def distinct(numbers):
    """Different numbers (C,) among numbers (...), and where each is among them, (...); all of them if recorded."""
    if being_recorded():
        return numbers.flatten(), torch.arange(numbers.numel(), device=numbers.device).view(numbers.shape)
    return numbers.unique(return_inverse=True)


def alike(which, column):
    """
    Number rows (N,) so that those with the same old number and the same token (N,) have one number. Returns
    the numbers (N,), and a row (n,) for each number.
    """
    which = (which * (column.max() + 1) + column).unique(return_inverse=True)[1]
    one = torch.empty_like(which[:which.max() + 1])
    return which, one.scatter_(0, which, torch.arange(len(which), device=which.device))


def think_merged(model, cache, question, choices, noise, stop=None, **sampling):
    """
    GPT2Thinking.think with grad=True for questions (N, S) and noise (N, T): rollouts that are alike so far
    are read once, in the backward pass too. cache: an empty one. choices: range of tokens. stop: token that
    ends a row.
    """
    which = torch.zeros_like(question[:, 0])        # (N,) number of the tokens that each row has read
    for column in question.T:
        which, rows = alike(which, column)
    new, alive, written = question[rows], torch.ones_like(which, dtype=torch.bool), []
    for t in range(noise.shape[1]):
        states = model.hidden(new, cache)[:, -1]                                    # (n, d_model)
        logits = model.logits(states, choices).float()                              # (n, L)
        log_p = logits.log_softmax(-1)
        with torch.no_grad():
            token = choices.start + sample(logits[which], noise[:, t], **sampling)  # (N,)
            token = token if stop is None else torch.where(alive, token, stop)
        log_prob = log_p[which].gather(-1, (token - choices.start)[:, None])[:, 0]
        entropy = -(log_p.exp() * log_p).sum(-1)[which]
        written.append((token, torch.where(alive, log_prob, 0.), torch.where(alive, entropy, 0.)))
        alive = alive & (token != stop)
        last, (which, rows) = which, alike(which, token)
        cache.select(last[rows])
        new = token[rows, None]
    return [torch.stack(each, dim=1) for each in zip(*written)]


CHUNK = 8192    # rows of logits that the loss makes at a time


class LinearCrossEntropy(torch.autograd.Function):
    """
    F.cross_entropy(x @ weight.T, targets), x (n, d_model), weight (V, d_model), targets (n,). Logits are made
    in chunks, with their gradient, so that they are never all in memory (as in Liger Kernel, Hsu et al.
    2024).
    """
    @staticmethod
    def forward(ctx, x, weight, targets):
        loss, grad_x, grad_weight, V = x.new_zeros((), dtype=torch.float), [], torch.zeros_like(weight), len(weight)
        if torch.is_autocast_enabled(x.device.type):
            x, weight = (tensor.to(torch.get_autocast_dtype(x.device.type)) for tensor in (x, weight))
        more = -V % 64 if x.is_cuda else 0      # matrices with a round number of rows are multiplied faster there
        weight, number = F.pad(weight, (0, 0, 0, more)), torch.arange(V + more, device=x.device)
        for rows, target in zip(x.split(CHUNK), targets.split(CHUNK)):
            if torch.compiler.is_compiling():   # make each chunk wait for the one before, or all are made at once
                rows = rows * (loss == loss)
            logits = (rows @ weight.T).float()                                      # (CHUNK, V + more)
            log_p = (logits.masked_fill(number >= V, -torch.inf) if more else logits).log_softmax(-1)
            loss = loss - log_p.gather(-1, target[:, None]).sum()
            grad = ((log_p.exp() - (number == target[:, None]).float()) / len(x)).to(x.dtype)
            grad_x.append(grad @ weight)
            grad_weight += (grad.T @ rows)[:V]
        ctx.save_for_backward(torch.cat(grad_x), grad_weight)
        return loss / len(x)

    @staticmethod
    def backward(ctx, grad):
        grad_x, grad_weight = ctx.saved_tensors
        return grad * grad_x, grad * grad_weight, None

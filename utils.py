"""
What several scripts share: bad input, knobs, processes, the run directory, tasks, sampling, advantages, balanced
targets, ablations, colours and pictures. The last part, fast paths, changes no result; skip it on a first reading.
"""
import ast
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
from datetime import timedelta
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm import tqdm

try:
    import triton
    import triton.language as tl
except ImportError:     # where there is no GPU
    triton = None

# ---- bad input: one line, exit code 2 -----------------------------------------------------------

def fail(message):
    """End the program because of a user's mistake: one line on stderr, exit code 2, no traceback."""
    rank = os.environ.get('RANK')
    line = ' '.join(str(message).split())[:500]
    print(f'error{" of process " + rank if rank else ""}: {line}', file=sys.stderr)
    sys.exit(2)


@contextlib.contextmanager
def user_errors():
    """A ValueError inside, or too little memory for a model of that size, is the user's mistake: fail with it."""
    try:
        yield
    except ValueError as error:
        fail(error)
    except RuntimeError as error:
        if 'memory' not in str(error):
            raise
        fail(str(error).splitlines()[0])


def need(package, purpose):
    """Import an optional package. Raises ValueError that says what to install when it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f'{package} is needed {purpose}: pip install {package.partition(".")[0]}') from error


# ---- knobs --------------------------------------------------------------------------------------

LIMITS = {name: limits for limits, names in {   # smallest and largest value; all others are from 0 to 2^31 - 1
    (2, 2**31 - 1): 'input_max',
    (1, 2**31 - 1): 'max_steps inner_steps eval_every eval_questions log_every seeds parallel',
    (1, 2**20): 'batch_size group_size d_thought_vocab d_model text_len eval_sequences eval_prefixes prefix_len at_once',
    (1, 2**12): 'n_layer n_head n_adds k n_letters',
    (0, 2**12): 'think_len k_test',
    (1e-6, 1e9): 'tau max_seconds',
    (1e-3, 1e3): 'temperature',
    (0, 1): 'epsilon memory hardest advance_at beta2',
    (0, .99): 'heldout val_share dropout',
    (1, 10**12): 'n_tokens',
    (2, 10**8): 'n_questions',
    (1, 10**5): 'n_problems',       # every level has more
}.items() for name in names.split()}
# knobs that may differ when a run is resumed; they do not name its folder either
FREE = ('init_from', 'eval_only', 'out_dir', 'max_steps', 'max_seconds', 'eval_every', 'log_every', 'wandb_mode',
        'plot', 'page')
# knobs that decide which questions are held out: weights of a script are only ever used with the same split
SPLIT = ('seed', 'heldout', 'input_min', 'input_max', 'n_adds', 'task', 'n_letters', 'k')


class Knobs(dict):
    """All knobs of a script by name, and: script (its name), folder, changed (by the command line), checkpoint."""


def read_knobs(file, script_globals, pretrained=False):
    """
    Read a script's knobs: the block of `name = value  # meaning, unit` above the line `knobs = ...`, overridden by
    --name=value. Values may be any expression. 'a' | 'b' in the comment of a text knob lists its choices; a comment
    that ends in | goes on in the next line. --help prints the block. The values go into the script's globals.

    With init_from=resume, knobs that are not given are those of the checkpoint. With the path of a checkpoint of the
    same script, only those that decide which questions are held out. pretrained: init_from may also name pretrained
    weights, anything that does not end in .pt, which is left to the script.

    Returns Knobs. Ends the program with one line if anything is wrong.
    """
    source = Path(file).read_text()
    lines, tree = source.splitlines(), ast.parse(source)
    defaults, choices, first, last = {}, {}, None, 0
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name == 'knobs':
                break
            defaults[name] = script_globals[name]
            first, last = first or node.lineno, node.end_lineno
            comment = lines[last - 1].partition('#')[2]
            while comment.endswith('|'):
                last += 1
                comment += lines[last - 1].partition('#')[2]
            choices[name] = re.findall(r"'([^']*)'", comment) if "' | '" in comment else None
    if {'-h', '--help'} & set(sys.argv[1:]):
        print(ast.get_docstring(tree), 'Knobs, set by --name=value:', sep='\n\n', end='\n\n')
        print('\n'.join(lines[first - 1:last]))
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
        given[name] = parse_knob(name, text, type(defaults[name]))

    knobs = Knobs(defaults | given)
    for name, value in knobs.items():
        check_knob(name, value, choices[name])
    sys.stdout.reconfigure(errors='replace')    # a terminal that cannot show a tick is no reason to stop
    knobs.script, knobs.checkpoint = Path(file).stem, None
    name = ','.join(f'{k}={given[k]}' for k in defaults if k in given and k not in FREE and given[k] != defaults[k])
    knobs.folder = Path(knobs.get('out_dir') or Path('out') / knobs.script / (name.replace('/', '_') or 'default'))
    start = knobs.get('init_from', 'scratch')
    resume = start == 'resume'
    path = knobs.folder / 'ckpt.pt' if resume else Path(start)
    if start != 'scratch' and not (pretrained and path.suffix != '.pt'):
        knobs.checkpoint = load_checkpoint(path, 'nothing to resume' if resume else 'no checkpoint to start from')
        own = knobs.checkpoint['script'] == knobs.script
        if resume and not own:
            fail(f'{path} is from {knobs.checkpoint["script"]}.py')
        for name in (defaults if resume else SPLIT) if own else ():
            old = knobs.checkpoint['knobs'].get(name, knobs.get(name))
            if name in given and given[name] != old and name not in FREE:
                fail(f'--{name}={given[name]} cannot be changed when going on from {path}, it was {old}')
            if name in defaults and name not in given and name not in ('init_from', 'eval_only', 'out_dir'):
                knobs[name] = old
    knobs.changed = {k: v for k, v in knobs.items() if v != defaults[k]}
    script_globals.update(knobs)
    return knobs


def parse_knob(name, text, kind):
    """The value of a knob from its text on the command line, of the type of its default; or fail."""
    if kind is bool:
        if text not in ('True', 'False'):
            fail(f'--{name}={text} must be True or False')
        return text == 'True'
    try:
        return kind(text)
    except ValueError:
        fail(f'--{name}={text} must be {"an integer" if kind is int else "a number"}')


def check_knob(name, value, choices=None):
    """Fail if a value, given or edited into the file, is impossible."""
    if not isinstance(value, (bool, int, float, str)):
        fail(f'--{name}={value} must be a number, a text, True or False')
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        low, high = LIMITS.get(name, (0, 2**31 - 1))
        if not low <= value <= high:        # nan is neither
            fail(f'--{name}={value} must be between {low:g} and {high:g}')
    elif choices and value not in choices:
        fail(f'--{name}={value} must be one of {", ".join(choices)}')


# ---- device and processes -----------------------------------------------------------------------

class World:
    """
    Device and processes. Under `torchrun --standalone --nproc_per_node=N` every process draws the random numbers of
    the whole batch and works on its share of the rows, so N processes make the same update as one.
    """

    def __init__(self, knobs):
        self.rank, self.size = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
        self.main = self.rank == 0
        name = knobs['device']
        if name == 'auto':
            name = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
        if name == 'cuda':
            name = f'cuda:{os.environ.get("LOCAL_RANK", 0)}'
        if not re.fullmatch(r'cpu|mps|cuda:\d+', name):
            fail(f'--device={name} must be auto, cpu, cuda, cuda:<number> or mps')
        try:
            self.device = torch.device(name)
            torch.zeros(1, device=self.device)
        except (RuntimeError, AssertionError) as error:
            fail(f'--device={name} is not available: {str(error).splitlines()[0]}')
        if self.size > 1 and (name == 'mps' or knobs['device'].startswith('cuda:')):
            fail('several processes need --device=cpu, or cuda without a number')
        if self.device.type == 'cuda':
            torch.cuda.set_device(self.device)
        if knobs['batch_size'] % self.size:
            fail(f'--batch_size={knobs["batch_size"]} cannot be shared by {self.size} processes')
        if self.size > 1:
            dist.init_process_group('nccl' if self.device.type == 'cuda' else 'gloo', timeout=timedelta(minutes=10))
        bfloat16 = knobs.get('dtype', 'float32') == 'bfloat16'
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16)
        if self.device.type == 'cpu':
            make_repeatable()
        torch.manual_seed(knobs['seed'])
        # questions and noise are drawn from here, the same in all processes
        self.generator = torch.Generator(self.device).manual_seed(knobs['seed'])

    def share(self, x):
        """This process's rows of a tensor of the whole batch."""
        return x.chunk(self.size)[self.rank] if self.size > 1 else x

    def draw(self, kind, *shape):
        """Draw random numbers of the whole batch by torch.rand or torch.randn; return this process's rows."""
        return self.share(kind(*shape, generator=self.generator, device=self.device))

    def gather(self, x):
        """The tensor of the whole batch from every process's rows."""
        if self.size == 1:
            return x
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x)
        return torch.cat(parts)

    def mean_gradients(self, parameters):
        """Average gradients over processes, in place."""
        if self.size > 1:
            grads = [p.grad for p in parameters if p.grad is not None]
            flat = parameters_to_vector(grads)      # one message: each costs more than a small model's numbers
            dist.all_reduce(flat)
            vector_to_parameters(flat / self.size, grads)

    def peak_memory_mb(self):
        """Most memory this process has used: of the GPU if there is one, else of the machine."""
        if self.device.type == 'cuda':
            return torch.cuda.max_memory_allocated() / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == 'darwin' else 2**10)


def make_repeatable():
    """
    Make a CPU give the same bits in every repetition, with any number of threads: a resumed run continues bit for bit
    only then. MKL must not choose its code by alignment, nor its threads by load, and must choose before two threads
    ask at once; torch must add in a fixed order.
    """
    os.environ.setdefault('MKL_CBWR', 'AUTO,STRICT')
    torch.set_num_threads(torch.get_num_threads())
    for function in (torch.exp, torch.log, torch.sin, torch.cos, torch.tanh):
        function(torch.ones(1))
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False


# ---- the run directory --------------------------------------------------------------------------

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
    except Exception as error:      # cut off, not a checkpoint, or more than data in it: torch raises many kinds
        fail(f'{path} is damaged or no checkpoint ({type(error).__name__})')
    needed = {'script', 'knobs', 'models', 'step', 'best', 'seconds', 'written', 'optimizers', 'generator'}
    if not isinstance(checkpoint, dict) or not needed <= checkpoint.keys():
        fail(f'{path} is no checkpoint of these scripts')
    return checkpoint


class Run:
    """
    One run and its folder: config.json, metrics.jsonl, samples.txt, ckpt.pt, best.pt. An older run in the folder is
    moved to <folder>.1, .2, ... Only the main process writes; with eval_only nothing is written. When a run is resumed,
    optimisers, random numbers and files go back to where they were, and first_step is the step to continue with.
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
                fail('this run was made on another kind of device: pass its ckpt.pt as init_from instead of resuming')
            self.start, self.best, self.first_step = time.time() - resumed['seconds'], resumed['best'], resumed['step']
        if self.writes:
            try:
                self.open_folder(resumed)
            except OSError as error:
                fail(f'cannot write to {self.folder}: {error.strerror}')

    def restore(self, state):
        """What a script keeps between steps, {name: tensor}: as given, or as in the checkpoint that is resumed."""
        if self.knobs['init_from'] == 'resume':
            state = {name: self.knobs.checkpoint[name] for name in state}
        return {name: x.to(self.world.device) for name, x in state.items()}

    def open_folder(self, resumed):
        """Make the folder ours and open the files in it. resumed: a checkpoint, or None."""
        with user_errors():
            wandb = need('wandb', 'for wandb_mode') if self.knobs['wandb_mode'] != 'disabled' else None
            if self.knobs.get('plot'):
                need('plotly', 'to plot')
            config = self.folder / 'config.json'
            written = json.loads(config.read_text()) if config.exists() else None
        if written and 'script' not in written or self.folder.resolve() == Path.cwd():
            fail(f'{self.folder} is not the folder of a run, pass another --out_dir')
        if written and not resumed:
            self.open_log().close()     # fails if that run is still going
            n = 1
            while (older := self.folder.with_name(f'{self.folder.name}.{n}')).exists():
                n += 1
            self.folder.rename(older)
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
        if wandb:
            try:
                self.wandb = wandb.init(project='think-tokens', name=f'{self.knobs.script} {self.folder.name}',
                                        config=dict(self.knobs), dir=self.folder, mode=self.knobs['wandb_mode'])
            except Exception as error:      # no login, no network: wandb raises many kinds
                fail(f'wandb: {error}')

    def open_log(self):
        """metrics.jsonl, locked while this process has it open: two runs in one folder would ruin each other."""
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
        first = self.first_step
        self.bar = tqdm(range(first, last), initial=first, total=last, dynamic_ncols=True,
                        disable=None if self.world.main else True)
        with self.bar:      # is closed where a script breaks off, too
            for step in self.bar:
                if step % self.knobs['log_every'] == 0 and self.late():     # asking the main process takes time
                    self.print(f'stopped at step {step}: max_seconds={self.knobs["max_seconds"]:g} have passed')
                    break
                yield step

    def late(self):
        """Whether max_seconds have passed, by the clock of the main process."""
        late = torch.tensor(float(self.seconds() > self.knobs['max_seconds']), device=self.world.device)
        if self.world.size > 1:
            dist.broadcast(late, 0)
        return bool(late)

    def print(self, text):
        """Print above the progress bar, in colour if stdout is a terminal and NO_COLOR is not set."""
        if self.world.main:
            tqdm.write(text if sys.stdout.isatty() and not os.environ.get('NO_COLOR') else plain(text))

    def sample(self, text, right=None):
        """
        Print coloured text, with a green tick or a red cross, and keep it: without colours in samples.txt, and as a
        table in the next line of Weights & Biases.
        """
        if right is not None:
            text = f'{text} {paint("✓", "green") if right else paint("✗", "red")}'
        self.print(text)
        if self.writes:
            self.samples.write(plain(text) + '\n')
            self.shown.append(text)

    def show(self, config, questions, thoughts, answers, right, names=None):
        """Show the first three questions (n, S), with thoughts (n, T) and answers (n,). names: of normal tokens."""
        end = getattr(config, 'end_thought', None)
        for question, row, answer, truth in zip(questions[:3].tolist(), thoughts.tolist(), answers.tolist(), right):
            thought = [token for token in row if token != end] + [end] * (end is not None)
            text = show_tokens(torch.tensor([*question, *thought, answer]), config,
                               lambda tokens: [names[token] if names else str(token) for token in tokens])
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
        """What was shown since the last line of the log, as a coloured table for Weights & Biases."""
        rows = ''.join(f'<tr><td>{as_html(text)}</td></tr>' for text in self.shown)
        return {'samples': importlib.import_module('wandb').Html(f'<table>{rows}</table>')} if rows else {}

    def report(self, step, **numbers):
        """Log an evaluation, print it, and show its last two numbers behind the progress bar."""
        self.log(step, **numbers)
        shown = {name: f'{value:.4g}' for name, value in numbers.items()}
        self.print(f'step {step}: ' + ', '.join(f'{name} {value}' for name, value in shown.items()))
        self.bar.set_postfix(dict(list(shown.items())[-2:]))

    def save(self, step, models, name='ckpt.pt', **more):
        """Write a checkpoint of packed models from which the run continues bit for bit."""
        if self.writes:
            checkpoint = {'script': self.knobs.script, 'knobs': dict(self.knobs), 'step': step, 'best': self.best,
                          'seconds': self.seconds(), 'written': [self.metrics.tell(), self.samples.tell()],
                          'models': models, 'optimizers': [o.state_dict() for o in self.optimizers],
                          'generator': self.world.generator.get_state(), **more}
            write_atomic(self.folder / name, lambda path: torch.save(checkpoint, path))

    def curve(self, name):
        """Steps and values of what metrics.jsonl calls name, two tuples."""
        log = map(json.loads, (self.folder / 'metrics.jsonl').read_text().splitlines())
        return zip(*((line['step'], line[name]) for line in log if name in line))

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
    """The commit of this checkout, with + if its scripts differ from it; None outside one."""
    def git(*words):
        command = ['git', '-C', Path(__file__).parent, *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    try:
        return git('rev-parse', 'HEAD').strip() + '+' * bool(git('status', '--porcelain', '*.py'))
    except (OSError, subprocess.CalledProcessError):
        return None


def device_name(kind):
    """The name of this machine's device of a kind ('cpu', 'cuda')."""
    if kind == 'cuda':
        return torch.cuda.get_device_name()
    cpuinfo = Path('/proc/cpuinfo').read_text() if os.path.exists('/proc/cpuinfo') else ''
    name = re.search(r'model name\s*: (.*)', cpuinfo)
    return f'{name.group(1) if name else platform.machine()}, {os.cpu_count()} cores'


def peak_flops(device):
    """Dense bfloat16 operations per second in a GPU's data sheet, None for GPUs that are not in this list."""
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else ''
    return next((peak for kind, peak in {'H100': 989e12, 'H200': 989e12, 'A100': 312e12}.items() if kind in name), None)


# ---- tasks: sums, serial problems ---------------------------------------------------------------

def addition_questions(input_min, input_max, heldout, seed, n_adds=2, n_max=10**6):
    """
    All rows (a, b, ...) of n_adds numbers from input_min to input_max - 1, or n_max different ones if there are more,
    split at random into training and a held-out share.
    Returns two tensors (n, n_adds) in random order, neither empty. Raises ValueError for more than 2^62 rows.
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


def digits(numbers, width, base=10):
    """The digits (n, width) of numbers (n,), most significant first, padded with zeros."""
    return numbers[:, None] // base ** torch.arange(width - 1, -1, -1, device=numbers.device) % base


class SerialTask:
    """
    Questions that are worked out step by step: a start, then a number of operations, their *depth*. After each
    operation there is a state; the last one is the answer.

    'add'   a running total modulo a prime, each operation is + c, or x c with c > 0
    'plus'  the same with additions only, modulo any number
    'perm'  of n states, each operation is one of n_letters random permutations of them (a word problem)
    's5'    of the 120 permutations of five things, each operation is one of n_letters of them
    'hop'   a random mapping f of n elements, given as n tokens v>f(v) in random order, and a start x;
            every operation is f, the answer f(f(...x)) (graph search)
    'sort'  a list of n_letters different numbers below n in place of a start; each operation asks for the next of them

    Tokens, with their text in names: states are 0..n_states-1, then come the operations (only one for 'hop' and
    'sort'), the arrows of 'hop', and last '=', which ends a question. n_prefix tokens stand before the start.
    Raises ValueError for numbers that define no task.
    """

    def __init__(self, task, n_states, n_letters=10, seed=0):
        generator = torch.Generator().manual_seed(seed)
        states = torch.arange(n_states)
        self.task, self.n_states, self.n_prefix, self.table = task, n_states, 0, None
        if task in ('add', 'plus'):
            factors = range(1, n_states) if task == 'add' else ()
            if task == 'add' and any(n_states % d == 0 for d in range(2, math.isqrt(n_states) + 1)):
                raise ValueError(f'products need a prime modulus, not input_max={n_states}')
            names = [f'+{c}' for c in range(n_states)] + [f'*{c}' for c in factors]
            rows = [states + c for c in range(n_states)] + [states * c for c in factors]
            self.table = torch.stack(rows) % n_states
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
            names, self.n_prefix = ['next'], n_letters - 1    # the list ends where a start would be
        self.names = [str(i) for i in range(self.n_states)] + names + ['=']

    def draw(self, n, depth, generator):
        """
        Draw n questions of a depth, on the generator's device. Returns tokens (n, S), and the states (n, depth) after
        each operation.
        """
        device = generator.device
        ends = torch.full((n, 1), len(self.names) - 1, device=device)
        letters = torch.full((n, depth), self.n_states, device=device)
        if self.task == 'sort':
            order = torch.rand(n, self.n_states, generator=generator, device=device).argsort(1)
            numbers = order[:, :self.n_prefix + 1]
            return torch.cat([numbers, letters, ends], dim=1), numbers.sort(1).values[:, :depth]
        x = torch.randint(self.n_states, (n, 1), generator=generator, device=device)
        states = [x]
        if self.task == 'hop':
            mapping = torch.randint(self.n_states, (n, self.n_states), generator=generator, device=device)
            order = torch.rand(n, self.n_states, generator=generator, device=device).argsort(1)
            prefix = self.n_states + 1 + order * self.n_states + mapping.gather(1, order)           # v>f(v)
            for _ in range(depth):
                states.append(mapping.gather(1, states[-1]))
        else:
            table, prefix = self.table.to(device), x[:, :0]
            chosen = torch.randint(len(table), (n, depth), generator=generator, device=device)
            letters = self.n_states + chosen
            for step in chosen.T:
                states.append(table[step, states[-1][:, 0]][:, None])
        return torch.cat([prefix, x, letters, ends], dim=1), torch.cat(states[1:], dim=1)


# ---- tasks: text --------------------------------------------------------------------------------

def gpt2_encoding():
    """tiktoken's encoding of GPT-2. Fails in one line if its files are not here and cannot be fetched."""
    try:
        return need('tiktoken', "for GPT-2's tokens").get_encoding('gpt2')
    except Exception as error:      # networks fail in many ways
        fail(f"tiktoken has not got GPT-2's tokens; TIKTOKEN_CACHE_DIR may name a folder that has its files: {error}")


def load_text(folder):
    """
    Read what prepare_data.py left in a folder. Returns train and val, memory maps of tokens (n,) in uint16, the size of
    the vocabulary, and a function from a list of tokens to a list of texts. If a character is made of several tokens,
    the last of them has its text and the others are empty. Fails in one line if there are no such data.
    """
    try:
        meta = json.loads((Path(folder) / 'meta.json').read_text())
        train, val = (np.memmap(Path(folder) / f'{part}.bin', dtype=np.uint16, mode='r') for part in ('train', 'val'))
        characters = meta['tokenizer'] == 'char' and meta['characters']
    except (OSError, ValueError, LookupError) as error:
        fail(f'no data in {folder}, see python prepare_data.py --help: {error}')
    if characters:
        return train, val, meta['d_vocab'], lambda tokens: [characters[token] for token in tokens]
    encoding = gpt2_encoding()

    def decode(tokens):
        utf8 = codecs.getincrementaldecoder('utf-8')('replace')
        return [utf8.decode(encoding.decode_single_token_bytes(token)) for token in tokens]
    return train, val, meta['d_vocab'], decode


# ---- tasks: problems with one right answer ------------------------------------------------------

NUMBER = re.compile(r'[+-]?(\d+/\d+|\d+\.?\d*|\.\d+)')


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
    The problem in a line of JSON: {question, answer, level}, all text. GSM8K has its answer behind ####; MATH calls a
    question problem, has its answer in a \\boxed{} of its solution, and levels such as "Level 4". Raises ValueError.
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
    """
    The problems in a file of JSON lines, ordered by level. levels: those that are wanted, separated by commas; empty:
    all. Fails in one line if there are no two such problems.
    """
    problems, wanted = [], levels.replace(' ', '').split(',')
    try:
        lines = path.read_text(encoding='utf-8').split('\n')
    except (OSError, ValueError) as error:
        fail(f'no problems in {path}: {error}')
    for n, line in enumerate(lines, 1):
        if line.strip():
            try:
                problems.append(load_problem(line))
            except ValueError as error:
                fail(f'{path}, line {n} is no problem: {error}')
    found = sorted({problem['level'] for problem in problems})
    problems = [problem for problem in problems if not levels or problem['level'] in wanted]
    if len(problems) < 2:
        fail(f'{path} has no two problems of levels={levels}; its levels are {", ".join(found) or "none"}')
    return sorted(problems, key=lambda problem: problem['level'])


def value(answer):
    """An answer without what does not matter: a Fraction if it is a number, else text."""
    answer = re.sub(r'\\text\{([^{}]*)\}', r'\1', answer)
    answer = re.sub(r'(?<!\d)\\[dt]?frac\{([^{}]+)\}\{([^{}]+)\}', r'\1/\2', answer)
    answer = re.sub(r'\\left|\\right|\\[,!;:]|[\s$%\\]|(?<=\d),(?=\d{3}(\D|$))', '', answer).rstrip('.')
    try:
        return Fraction(answer) if NUMBER.fullmatch(answer) else answer
    except (ValueError, ZeroDivisionError):     # too many digits, n/0
        return answer


def grade(solution, answer):
    """
    Whether a solution gives the answer, and whether it has the form: one \\boxed{...}. Without a box its last number
    counts, so a solution can be right without the form.
    """
    given = boxed(solution)
    numbers = re.findall(r'(?:(?<![\d.])-)?\d+(?:,\d{3})*(?:\.\d+)?', solution) if given is None else [given]
    right = bool(numbers) and value(numbers[-1]) == value(answer)
    return right, given is not None and solution.count('\\boxed{') == 1


# ---- optimiser and schedule ---------------------------------------------------------------------

def make_optimizer(model, learning_rate, weight_decay, betas=(.9, .98), recorded=False):
    """
    AdamW with weight decay for matrices and embeddings, but not for biases and norms; schedule() sets the learning
    rate. recorded: its steps may be part of a CUDA graph.
    """
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{'params': matrices, 'weight_decay': weight_decay}, {'params': vectors, 'weight_decay': 0.}]
    device = matrices[0].device
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


# ---- fast paths that decorate what follows; see the last part -----------------------------------

fusing = False      # whether @fused functions are to be compiled
recording = False   # whether a function is being run to be recorded


def fused(function):
    """
    Compile a function where it is part of a recorded one with fuse=True: one kernel then does what several did, but
    the first call with new shapes takes a while. Elsewhere it is the function itself.
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


# ---- sampling -----------------------------------------------------------------------------------

@fused
def sample(logits, noise, temperature=1., top_k=0, top_p=1., epsilon=0., bias=0.):
    """
    Draw one token per row by inverting the distribution function at a uniform number: whoever draws the noise decides
    the token, whatever the batch or the number of processes.

    logits: (N, V). noise: (N,) in [0, 1). temperature: 0 takes the most likely token. top_k: keep the k most likely
    (0: all). top_p: keep the fewest that have this probability together (nucleus sampling, Holtzman et al. 2019).
    epsilon: share of draws that are uniform over V. bias: added to the logits, (N, V).
    Returns tokens (N,). Raises ValueError for settings that define no distribution.
    """
    if temperature != 0 and temperature < 1e-3 or top_k < 0 or not 0 < top_p <= 1 or not 0 <= epsilon <= 1:
        raise ValueError(f'cannot sample with {temperature=}, {top_k=}, {top_p=}, {epsilon=}')
    logits = logits.float() + bias
    if temperature == 0:
        return logits.log_softmax(-1).argmax(-1)
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, order = logits.softmax(-1).sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered       # probability of the more likely ones
        logits = logits.masked_fill((before >= top_p).gather(-1, order.argsort(-1)), -torch.inf)
    log_p = logits.log_softmax(-1)
    if epsilon:
        log_p = ((1 - epsilon) * log_p.exp() + epsilon / log_p.shape[-1]).log()
    below = log_p.exp().cumsum(-1)                                              # (N, V) distribution function
    target = noise[:, None] * below[:, -1:] * (1 - 2**-22)                      # strictly below its last value
    return (below <= target).sum(-1)


# ---- advantages: how much each rollout of a group counts ----------------------------------------

def finite(rewards, otherwise=0.):
    """
    Rewards (N, G) with infinities replaced by the largest and smallest finite reward of their group, so that linear
    advantages are finite; a group without a finite one gets `otherwise`.
    """
    known = rewards.isfinite()
    low = rewards.masked_fill(~known, torch.inf).amin(1, keepdim=True)
    high = rewards.masked_fill(~known, -torch.inf).amax(1, keepdim=True)
    return torch.where(low <= high, rewards.clamp(low, high), torch.where(rewards.isnan(), rewards, otherwise))


def centred(rewards):
    """R - mean of the group (N, G)."""
    rewards = finite(rewards)
    return rewards - rewards.mean(1, keepdim=True)


def unit_std(centred):
    """Centred rewards (N, G) divided by the standard deviation of their group."""
    return centred / (centred.square().mean(1, keepdim=True).sqrt() + 1e-6)


def quantile(rewards, among):
    """
    The normal quantiles (N, G) of the ranks that rewards (N, G) have among others, (N, n) of the same row or (n,) of
    all: Phi^-1((rank - 1/2) / n); equal rewards get the mean of their ranks (rankit, Bliss 1967; a rank-based inverse
    normal transformation, Beasley et al. 2009).
    """
    rewards, ordered = rewards.contiguous(), among.sort(-1).values
    below, up_to = (torch.searchsorted(ordered, rewards, right=right) for right in (False, True))
    scores = torch.special.ndtri((below + up_to).to(rewards.dtype) / (2 * ordered.shape[-1]))
    return torch.where(rewards.isnan(), rewards, scores)


def softmax(scores):
    """Softmax over rows (N, G). If the largest is infinite, its limit: those that have it share equally."""
    most = scores.amax(1, keepdim=True)
    return torch.where(scores == most, 0., scores - most).softmax(1)


def best(rewards):
    """1 for the best of each group (N, G), the first of them if several are, else 0."""
    return torch.zeros_like(rewards).scatter(1, rewards.argmax(1, keepdim=True), 1.)


ADVANTAGES = {  # from rewards R (N, G), a temperature t, a baseline b, and the rewards of the whole batch: (N, G)
    # A = R
    'raw': lambda R, t, b, batch: finite(R),
    # A = R - b, where b does not depend on these rollouts: a running mean (Williams 1992). Unbiased
    'reinforce': lambda R, t, b, batch: finite(R, b) - b,
    # A = R - mean of the group (Liu et al. 2025). Along the exact gradient, (G - 1)/G of its length
    'dr_grpo': lambda R, t, b, batch: centred(R),
    # A = R - mean of the others of the group = G/(G - 1) (R - mean) (Ahmadian et al. 2024). Unbiased
    'rloo': lambda R, t, b, batch: centred(R) * R.shape[1] / max(1, R.shape[1] - 1),
    # A = (R - mean) / std, both of the group (Shao et al. 2024). Questions with rare successes count more
    'grpo': lambda R, t, b, batch: unit_std(centred(R)),
    # A = (R - mean of the group) / std of the batch (Liu et al. 2025, Tricks or traps). All questions count alike
    'batch_std': lambda R, t, b, batch: centred(R) / (finite(batch).std(correction=0) + 1e-6),
    # A = q - mean of the group, q the normal quantile of R's rank within the group. Blind to the scale of R
    'quantile': lambda R, t, b, batch: centred(quantile(R, R)),
    # the same with ranks in the whole batch
    'quantile_batch': lambda R, t, b, batch: centred(quantile(R, batch.flatten())),
    # A = G softmax(R / t) - 1: softmax without what it adds to every rollout, whatever its reward
    'softmax_centred': lambda R, t, b, batch: R.shape[1] * softmax(R / t) - 1,
    # w = softmax(R / t) over the group: advantage-weighted regression (Peng et al. 2019)
    'softmax': lambda R, t, b, batch: softmax(R / t),
    # w = softmax(q / t), q as for quantile
    'softmax_quantile': lambda R, t, b, batch: softmax(quantile(R, R) / t),
    # w = 1 for the best of the group: softmax for t -> 0
    'best': lambda R, t, b, batch: best(R),
}
SUM_TO_ONE = ('softmax', 'softmax_quantile', 'best')        # weights w of a group, never negative; the others are A
# always 0 in a group of one
NEED_GROUPS = ('dr_grpo', 'rloo', 'grpo', 'batch_std', 'quantile', 'quantile_batch', 'softmax_centred')


def advantages(rewards, kind, tau=1., baseline=0., batch=None):
    """
    Weights (N, G) of rollouts from their rewards (N, G): the loss is -sum of weight * log-probability over the group.
    Linear advantages A are divided by G, so that their sum is a mean over the group.

    kind: a name of ADVANTAGES. tau: temperature of the three softmax. baseline: of reinforce, a number or (N, 1).
    batch: the rewards (B, G) of all processes, for batch_std and quantile_batch; None: these rewards are all.

    Equal rewards: advantages with a group mean are 0, softmax weights 1/G; the same in a group of one. Infinite
    rewards: see finite, quantile and softmax. A reward that is nan stays nan, so that the loss shows it.
    """
    weights = ADVANTAGES[kind](rewards, tau, baseline, rewards if batch is None else batch)
    return weights if kind in SUM_TO_ONE else weights / rewards.shape[1]


def concentration(weights):
    """
    On how few rollouts of its group the absolute weight (N, G) rests, means over groups: the largest share, and the
    effective number 1 / sum of squared shares, which is G if all weights are 0.
    """
    share = weights.abs() / weights.abs().sum(1, keepdim=True).clamp(min=1e-9)
    return {'max_weight': share.max(1).values.mean().item(),
            'effective_n': (1 / share.square().sum(1).clamp(min=1e-9)).clamp(max=weights.shape[1]).mean().item()}


# ---- balanced targets ---------------------------------------------------------------------------

def balanced_target(scores, prices, tau, n_steps=10):
    """
    Which codes each answer is to be written with. Every answer prefers the codes it scores well with, by
    softmax(scores / tau - prices). If a code is wanted by more than its share of answers, its price rises until it is
    not: entropic optimal transport with at most max(1, n_answers / n_codes) answers per code, by Sinkhorn's iteration
    (Cuturi 2013) with prices that cannot fall below zero, as in an auction (Bertsekas 1988).

    scores: (n_answers, n_codes), log-probability of the answer given the code. prices: (n_codes,) from the last call,
    zeros at first. n_steps: iterations of this call; a few are enough when the prices are kept.
    Returns the log of the target (n_answers, n_codes), whose rows sum to 1, and the new prices.
    """
    n_answers, n_codes = scores.shape
    log_share = math.log(max(1., n_answers / n_codes))
    wanted = scores / tau
    for _ in range(n_steps):
        log_target = (wanted - prices).log_softmax(1)
        prices = (prices + log_target.logsumexp(0) - log_share).clamp(min=0)
    return (wanted - prices).log_softmax(1), prices


# ---- are the thoughts used? ---------------------------------------------------------------------

@torch.no_grad()
def judge(answering, thoughts, right):
    """
    What an answering policy makes of thoughts (n, T): its answers (n,), the share that are `right` (n,), and how many
    bits about the answer reach it: log2(d_normal_vocab) minus its cross-entropy, at least 0. If all answers are
    equally frequent, this is a lower bound of their mutual information with the thoughts (Barber and Agakov 2003).
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
    What replaces a checkpoint's own greedy thoughts (N, T), to see whether the answer uses them: another question's,
    random ones of the range `choices`, the most frequent row for all, none at all. Returns {name: thoughts}.
    """
    generator = torch.Generator().manual_seed(seed)
    N, T = thoughts.shape
    rows, counts = thoughts.cpu().unique(dim=0, return_counts=True)
    return {'own': thoughts,
            'shuffled': thoughts[torch.randperm(N, generator=generator).to(thoughts.device)],
            'random': torch.randint(choices.start, choices.stop, (N, T), generator=generator).to(thoughts.device),
            'constant': rows[counts.argmax()].expand(N, T).to(thoughts.device),
            'none': thoughts[:, :0]}


# ---- colours and pictures -----------------------------------------------------------------------

COLOURS = {'red': 31, 'green': 32, 'blue': 34, 'magenta': 35, 'cyan': 36}


def paint(text, colour):
    """Text in a colour, for Run.print."""
    return f'\033[{COLOURS[colour]}m{text}\033[0m'


def plain(text):
    """Coloured text without its colours."""
    return re.sub('\033\\[[0-9;]*m', '', text)


def as_html(text):
    """Coloured text as HTML."""
    text = f'<span style="white-space:pre-wrap">{html.escape(text)}</span>'.replace('\033[0m', '</span>')
    for colour, code in COLOURS.items():
        text = text.replace(f'\033[{code}m', f'<span style="color:{colour}">')
    return text


def show_tokens(tokens, config, decode=lambda tokens: map(str, tokens), between=' '):
    """
    A row of tokens as coloured text: normal tokens blue, <think3> cyan, <end_thought> magenta. Without anything
    between them, as in text, neighbouring thoughts are one short group: <think3,17,40,…>.
    """
    n_normal = getattr(config, 'd_normal_vocab', config.d_vocab)
    kinds = itertools.groupby(tokens.tolist(), lambda token: (token >= n_normal) + (token == n_normal + n_thoughts))
    n_thoughts, parts = config.d_vocab - 1 - n_normal, []
    texts = iter(decode([token for token in tokens.tolist() if token < n_normal]))
    for kind, some in kinds:
        some = list(some)
        if kind == 0:
            parts += [paint(next(texts), 'blue') for _ in some]
        elif kind == 2:
            parts += [paint('<end_thought>', 'magenta') for _ in some]
        elif between:
            parts += [paint(f'<think{token - n_normal}>', 'cyan') for token in some]
        else:
            numbers = [str(token - n_normal) for token in some]
            parts.append(paint(f'<think{",".join(numbers[:3] + ["…"] * (len(numbers) > 3))}>', 'cyan'))
    return between.join(parts)


def picture(n_panels, title, height=800, heights=None):
    """An empty plotly figure of panels one below the other, each with a second scale on its right."""
    subplots = need('plotly.subplots', 'to draw pictures')
    figure = subplots.make_subplots(n_panels, 1, row_heights=heights, vertical_spacing=.1,
                                    specs=[[{'secondary_y': True}]] * n_panels)
    return figure.update_layout(title=title, width=900, height=height, legend={'orientation': 'h'})


def heat_map(figure, panel, counts, x_title, x, y_title, y):
    """Draw counts (len(y), len(x)) into a panel, x and y are names."""
    figure.add_heatmap(z=counts.int().cpu().numpy(), x=x, y=y, colorscale='Blues', row=panel, col=1,
                       hovertemplate=f'{y_title} %{{y}}, {x_title} %{{x}}: %{{z}}<extra></extra>',
                       colorbar={'len': .6, 'y': 1, 'yanchor': 'top'})
    figure.update_xaxes(title=x_title, type='category', tickangle=90, row=panel, col=1)
    figure.update_yaxes(title=y_title, type='category', row=panel, col=1, secondary_y=False)


def curve(figure, panel, points, title, colour, right=False, most=None):
    """Draw (steps, values) into a panel, on its right scale if asked, with a dotted line at the most that is possible."""
    where = {'row': panel, 'col': 1, 'secondary_y': right}
    steps, values = points
    figure.add_scatter(x=steps, y=values, name=title, line_color=colour, **where)
    if most is not None:
        figure.add_hline(most, line_dash='dot', line_color='gray', **where)
    figure.update_yaxes(title=title, color=colour, rangemode='tozero', showgrid=not right, **where)
    figure.update_xaxes(title='step', row=panel, col=1)


def save_picture(figure, path):
    """Write a plotly figure as HTML that needs nothing else."""
    write_atomic(path, lambda temporary: figure.write_html(temporary, config={'displayModeBar': False}))


# =================================================================================================
# Fast paths. Nothing below changes a result: each function has a slow form that the tests compare.
# =================================================================================================

def recorded(function, fuse=False):
    """
    Run a function of tensors on a GPU as a CUDA graph: at its second call its kernels are recorded, from then on all
    are launched at once. Tensors must keep their shapes, other arguments their values, and the next call overwrites
    what is returned. What it reads besides, such as weights, must be changed in place. On another device it is the
    function itself. fuse: compile @fused functions in it.
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


def being_recorded():
    """Whether the program is inside a recorded function on a GPU, where nothing may depend on what was computed."""
    return recording


def attention(q, k, v, mask=None, dropout=0.):
    """
    F.scaled_dot_product_attention of q (B, H, Sq, D), the last Sq of the Sk tokens, to k and v (B, H, Sk, D), by the
    fastest way. mask: (Sq, Sk) True where a token may look, or (H, Sq, Sk) numbers that are added to the scores; None:
    every token sees those before it and itself. Returns q's shape.
    """
    n_query, n_key = q.shape[2], k.shape[2]
    if n_key == 1 and not dropout:      # the weight is 1. Computed, it would have a gradient of rounding error,
        return v                        # which Adam would blow up
    few = n_key <= FEW
    if not few and mask is None and n_query in (1, n_key):
        with prefer_cudnn(q):
            return F.scaled_dot_product_attention(q, k, v, is_causal=n_query > 1, dropout_p=dropout)
    if mask is None:
        mask = causal(n_query, n_key, q.device)
    if not few:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    # few keys: written out, so that thousands of tiny matrices are not multiplied one by one
    if mask.dtype is torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
    if q.is_cuda or n_query == 1:
        scores = (q[:, :, :, None] * k[:, :, None]).sum(-1) * q.shape[-1] ** -.5 + mask             # (B, H, Sq, Sk)
        return (F.dropout(scores.softmax(-1), dropout)[..., None] * v[:, :, None]).sum(3).to(v.dtype)
    return F.dropout((q @ k.transpose(-2, -1) * q.shape[-1] ** -.5 + mask).softmax(-1), dropout) @ v


FEW = 8


def causal(n_query, n_key, device):
    """(n_query, n_key), True where each of the last n_query of n_key tokens may look: before it and at itself."""
    return torch.ones(n_query, n_key, dtype=torch.bool, device=device).tril(n_key - n_query)


def prefer_cudnn(q):
    """A context in which PyTorch prefers cuDNN's attention, the fastest in training on a recent GPU."""
    if not (q.is_cuda and q.requires_grad and q.dtype is torch.bfloat16):
        return contextlib.nullcontext()
    return sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
                        SDPBackend.MATH], set_priority=True)


def attend_to_cache(layer, q, k, v, cache):
    """
    Append k, v of one token (B, H, 1, D) to a cache and attend to all of it: what attention(q, *cache.append(layer, k,
    v)) returns, by one kernel that reads keys and values once. For caches whose `fast` is True.
    """
    (B, H, _, D), out = q.shape, torch.empty_like(q, memory_format=torch.contiguous_format)
    if not q.stride() == k.stride() == v.stride():
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    launch = {'block': 32, 'num_warps': 1} if B * H > 500 else {'block': 128, 'num_warps': 4}
    keys, values = cache.kv[layer]
    attend_kernel[(B * H,)](q, k, v, keys, values, out, cache.on_device, keys.shape[2], *q.stride()[:2], H, D, **launch)
    return out


def has_kernel(device, d_head):
    """Whether attend_to_cache serves heads of this size on a device; no gradients pass through it."""
    return triton is not None and device.type == 'cuda' and d_head in (16, 32, 64, 128) and not torch.is_grad_enabled()


if triton:
    @triton.jit
    def attend_kernel(q, k, v, keys, values, out, length, S, stride_row, stride_head, H: tl.constexpr, D: tl.constexpr,
                      block: tl.constexpr):
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
            s = start + tl.arange(0, block)[:, None]                                        # (block, 1)
            key = tl.load(keys + old + s * D, s < n, 0.).to(tl.float32)                     # (block, D)
            value = tl.load(values + old + s * D, s < n, 0.).to(tl.float32)
            score = tl.where(s < n, tl.sum(query * key, 1, keep_dims=True), -float('inf'))
            best = tl.maximum(top, tl.max(score))
            p, keep = tl.exp(score - best), tl.exp(top - best)
            top, total, mix = best, total * keep + tl.sum(p), mix * keep + tl.sum(p * value, 0)
        tl.store(out + row * D + d, (mix / total).to(new_v.dtype))


def alike(which, column):
    """
    Number rows by their group (N,) and one more token each (N,), so that rows that are alike have one number. Returns
    the numbers (N,), in order of group and token, and one row (n,) of each number.
    """
    which = (which * (column.max() + 1) + column).unique(return_inverse=True)[1]
    one = torch.empty_like(which[:which.max() + 1])
    return which, one.scatter_(0, which, torch.arange(len(which), device=which.device))


def distinct(numbers):
    """
    Different numbers (C,) among numbers (...), and where each of them is, (...). In a recorded function, where sizes
    must not depend on what was computed, all of them.
    """
    if being_recorded():
        return numbers.flatten(), torch.arange(numbers.numel(), device=numbers.device).view(numbers.shape)
    return numbers.unique(return_inverse=True)


def think_merged(model, cache, question, choices, noise, stop=None, **sampling):
    """
    Thoughts after questions (N, S) by noise (N, T), with gradient, where rollouts that are alike so far are read once,
    in sampling and in the backward pass. cache: an empty one through which gradients pass. choices: range of tokens.
    stop: token that ends a row. Returns tokens, log-probabilities and entropies (N, T), as GPT2Thinking.think.
    """
    which = torch.zeros_like(question[:, 0])                        # (N,) number of what each row has read
    for column in question.T:
        which, rows = alike(which, column)
    new, alive, written = question[rows], torch.ones_like(which, dtype=torch.bool), []
    for t in range(noise.shape[1]):
        states = model.hidden(new, cache)[:, -1]                                        # (n, d_model)
        logits = model.logits(states, choices).float()                                  # (n, L)
        log_p = logits.log_softmax(-1)
        with torch.no_grad():
            token = choices.start + sample(logits[which], noise[:, t], **sampling)      # (N,)
            token = token if stop is None else torch.where(alive, token, stop)
        log_prob = log_p[which].gather(-1, (token - choices.start)[:, None])[:, 0]
        entropy = -(log_p.exp() * log_p).sum(-1)[which]
        written.append((token, torch.where(alive, log_prob, 0.), torch.where(alive, entropy, 0.)))
        alive = alive & (token != stop)
        last, (which, rows) = which, alike(which, token)
        cache.select(last[rows])
        new = token[rows, None]
    return tuple(torch.stack(each, dim=1) for each in zip(*written))


class LinearCrossEntropy(torch.autograd.Function):
    """
    F.cross_entropy(x @ weight.T, targets): mean, in nats, of x (n, d_model), weight (V, d_model), targets (n,). Logits
    are made and used for CHUNK rows at a time, with their gradient, so that they are never all in memory (as in Liger
    Kernel, Hsu et al. 2024).
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
            logits = (rows @ weight.T).float()                                              # (CHUNK, V + more)
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


CHUNK = 8192

"""
What scripts share, and nothing else: knobs, processes, the run directory with its checkpoints and logs, tasks,
text, optimiser and schedule, sampling, advantages, balanced targets, ablations, colours.
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
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm import tqdm


# ---- bad input: one line, exit code 2 -------------------------------------------------------------------------------

def fail(message):
    """End the program for a mistake of its user: one line on stderr, exit code 2, no traceback."""
    rank = os.environ.get('RANK')
    print(f'error{" of process " + rank if rank else ""}: {" ".join(str(message).split())[:500]}', file=sys.stderr)
    sys.exit(2)


@contextlib.contextmanager
def user_errors():
    """What goes wrong inside, numbers that make no model or one too large for memory, is the user's: fail with it."""
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


# ---- knobs ----------------------------------------------------------------------------------------------------------

LIMITS = {  # smallest and largest value of a knob besides its default; the others are from 0 to 2**31 - 1
    'input_max': (2, 2**31 - 1),
    **dict.fromkeys(('max_steps', 'inner_steps', 'eval_every', 'eval_questions', 'log_every', 'seeds', 'parallel'),
                    (1, 2**31 - 1)),
    **dict.fromkeys(('batch_size', 'group_size', 'd_thought_vocab', 'd_model', 'text_len',
                     'eval_sequences', 'eval_prefixes', 'prefix_len', 'accumulate', 'at_once'), (1, 2**20)),
    **dict.fromkeys(('n_layer', 'n_head', 'n_adds', 'k', 'n_letters'), (1, 2**12)),
    **dict.fromkeys(('think_len', 'k_test'), (0, 2**12)), 'rollouts_per_update': (0, 2**20),
    **dict.fromkeys(('tau', 'max_seconds'), (1e-6, 1e9)),
    **dict.fromkeys(('epsilon', 'memory', 'hardest', 'advance_at', 'gamma', 'beta2'), (0, 1)), 'cut': (0, .9),
    **dict.fromkeys(('heldout', 'val_share', 'dropout'), (0, .99)), 'n_tokens': (1, 10**12), 'n_questions': (2, 10**8),
    'n_problems': (1, 10**5),   # there are more of every level
    'temperature': (1e-3, 1e3), 'top_p': (1e-6, 1),
}
# knobs that may differ when a run is resumed; they do not name its folder either
FREE = ('init_from', 'eval_only', 'out_dir', 'max_steps', 'max_seconds', 'eval_every', 'log_every', 'wandb_mode',
        'plot', 'page')
# knobs that decide which questions are held out; they stay what they were when a script's own checkpoint is used
SPLIT = ('seed', 'heldout', 'input_min', 'input_max', 'n_adds', 'task', 'ops', 'n_letters', 'k')


class Knobs(dict):
    """All knobs of a script by name, and: script (its name), folder, changed (from the script's values), checkpoint."""


def read_knobs(file, script_globals, pretrained=False):
    """
    Read a script's knobs: the block of `name = value  # meaning, unit` at its top, overridden by --name=value.
    'a' | 'b' in the comment of a text knob lists its choices, on several lines if they end in |. --help prints the
    block. The new values go into the script's globals. With init_from=resume, or the path of a checkpoint of the same
    script, knobs that are not given are those of the checkpoint. pretrained: init_from may also be the name or folder
    of pretrained weights, which does not end in .pt and is left to the script.

    Returns Knobs. Ends the program with one line for whatever is wrong.
    """
    source = Path(file).read_text()
    defaults, choices, first, last = {}, {}, None, None
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign):
            if isinstance(node.value, ast.Call):    # knobs = read_knobs(...), behind the block
                break
            name = node.targets[0].id
            defaults[name] = ast.literal_eval(node.value)
            first, last = first or node.lineno, node.end_lineno
            comment = source.splitlines()[last - 1].partition('#')[2]
            while comment.endswith('|'):        # more choices on the next line
                last += 1
                comment += source.splitlines()[last - 1].partition('#')[2]
            choices[name] = re.findall(r"'([^']*)'", comment) if "' | '" in comment else None
    if {'-h', '--help'} & set(sys.argv[1:]):
        print(ast.get_docstring(ast.parse(source)), 'Knobs, set by --name=value:', sep='\n\n', end='\n\n')
        print('\n'.join(source.splitlines()[first - 1:last]))
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
        given[name] = parse_knob(name, text, defaults[name], choices[name])

    knobs = Knobs(defaults | given)
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
        for name, old in knobs.checkpoint['knobs'].items() if own else ():
            if name in given and given[name] != old and (resume and name not in FREE or name in SPLIT):
                fail(f'--{name}={given[name]} cannot be changed when going on from {path}, it was {old}')
            if name in defaults and name not in given and name not in ('init_from', 'eval_only', 'out_dir'):
                knobs[name] = old
    knobs.changed = {k: v for k, v in knobs.items() if v != defaults[k]}
    script_globals.update(knobs)
    return knobs


def parse_knob(name, text, default, choices=None):
    """The value of a knob from its text on the command line, of the type of its default; or fail."""
    kind = type(default)
    value = text
    if kind is bool:
        if text not in ('True', 'False'):
            fail(f'--{name}={text} must be True or False')
        value = text == 'True'
    elif kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            fail(f'--{name}={text} must be {"an integer" if kind is int else "a number"}')
        low, high = LIMITS.get(name, (0, 2**31 - 1))
        if not low <= value <= high and value != default:     # nan is neither
            fail(f'--{name}={text} must be between {low:g} and {high:g}')
    elif choices and text not in choices:
        fail(f'--{name}={text} must be one of {", ".join(choices)}')
    return value


# ---- device and processes -------------------------------------------------------------------------------------------

class World:
    """
    Device and processes. Under `torchrun --standalone --nproc_per_node=N` every process draws the same random numbers
    for the whole batch and works on its share of the rows, so that N processes make the update that one makes.
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
            fail(f'--device={name} is not to be had here: {str(error).splitlines()[0]}')
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
        if self.device.type == 'cpu':       # two threads add in the same order in every repetition
            os.environ.setdefault('MKL_CBWR', 'AUTO,STRICT')
            torch.set_num_threads(torch.get_num_threads())      # which makes torch stop MKL from varying its own
            for function in (torch.exp, torch.log, torch.sin, torch.cos, torch.tanh):
                function(torch.ones(1))     # MKL chooses its code when it is first used; two threads at once may differ
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False
        torch.manual_seed(knobs['seed'])
        # questions and noise are drawn from here, alike in all processes
        self.generator = torch.Generator(self.device).manual_seed(knobs['seed'])

    def share(self, x):
        """This process's rows of a tensor of the whole batch."""
        return x.chunk(self.size)[self.rank] if self.size > 1 else x

    def draw(self, kind, *shape):
        """Random numbers, kind torch.rand or torch.randn: every process draws the whole batch's, and takes its rows."""
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
        """Most memory this process has used: of the GPU where there is one, else of the machine."""
        if self.device.type == 'cuda':
            return torch.cuda.max_memory_allocated() / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == 'darwin' else 2**10)


def being_recorded(device):
    """Whether a CUDA graph is being recorded, where nothing may wait for the GPU."""
    return device.type == 'cuda' and torch.cuda.is_current_stream_capturing()


def recorded(function, fuse=False):
    """
    A function of tensors on a GPU that is run as a CUDA graph: at its second call its kernels are recorded, and from
    then on all of them are started at once, which saves what launching each of them costs. Tensors must keep their
    shapes and other arguments their values, and what is returned is overwritten by the next call. What it reads
    besides, such as weights, must be changed in place. On another device it is the function itself. fuse: see fused.
    """
    graph = given = result = None

    def call():
        global fusing
        fusing = fuse
        try:        # weights that autocast has cast must not be kept for later
            with torch.autocast('cuda', cache_enabled=False, dtype=torch.get_autocast_dtype('cuda'),
                                enabled=torch.is_autocast_enabled('cuda')):
                return function(*given)
        finally:
            fusing = False

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


fusing = False      # whether functions that are fused are to be compiled


def fused(function):
    """
    A function that is compiled where it is part of a recorded one with fuse=True: what several kernels write and read
    again is done by one. It takes a while when it is first called with tensors of other shapes. Elsewhere it is itself.
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


# ---- the run directory ----------------------------------------------------------------------------------------------

def write_atomic(path, write):
    """Let write(temporary_path) write a file, then rename it: path is never half-written."""
    temporary = path.with_name(path.name + '.tmp')
    write(temporary)
    with open(temporary, 'rb+') as f:
        os.fsync(f.fileno())
    os.replace(temporary, path)


def load_checkpoint(path, missing='no checkpoint'):
    """The content of a checkpoint: tensors, numbers and text, nothing that runs. Fails in one line if it is damaged."""
    if not os.path.isfile(path):
        fail(f'{missing}: {path} is not there')
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:      # cut off, not a checkpoint, or holding more than data: torch raises many kinds
        fail(f'{path} is damaged or no checkpoint ({type(error).__name__})')
    needed = {'script', 'knobs', 'models', 'step', 'best', 'seconds', 'written', 'optimizers', 'generator'}
    if not isinstance(checkpoint, dict) or not needed <= checkpoint.keys():
        fail(f'{path} is no checkpoint of these scripts')
    return checkpoint


class Run:
    """
    One run and its folder: config.json, metrics.jsonl, samples.txt, ckpt.pt, best.pt. An older run in the folder is
    moved to <folder>.1, .2, ... Only the main process writes, and with eval_only nothing is written. When resuming, the
    optimisers, random numbers and files are put back to where they were; first_step is the step to go on with.
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
            self.open_log().close()     # fails while that run is still going on
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
            except Exception as error:      # no login, no network, no such mode: wandb raises many kinds
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
        """Wall-clock seconds of this run, those before it was resumed included."""
        return time.time() - self.start

    def steps(self, first, last):
        """Step numbers first..last-1 with a progress bar (on a terminal), until max_seconds have passed."""
        self.bar = tqdm(range(first, last), initial=first, total=last, dynamic_ncols=True,
                        disable=None if self.world.main else True)
        for step in self.bar:
            if step % self.knobs['log_every'] == 0:     # not at every step: asking the other processes makes them wait
                late = torch.tensor(float(self.seconds() > self.knobs['max_seconds']), device=self.world.device)
                if self.world.size > 1:
                    dist.broadcast(late, 0)             # the main process's clock counts for all
                if late:
                    self.print(f'stopped at step {step}: max_seconds={self.knobs["max_seconds"]:g} have passed')
                    break
            yield step
        self.bar.close()

    def print(self, text):
        """Print above the progress bar, in colours where stdout is a terminal and NO_COLOR is not set."""
        if self.world.main:
            tqdm.write(text if sys.stdout.isatty() and not os.environ.get('NO_COLOR') else plain(text))

    def sample(self, text, right=None):
        """
        Print coloured text, with a green tick or a red cross, and keep it: in samples.txt, without colours, and in a
        table of the next line of Weights & Biases.
        """
        if right is not None:
            text = f'{text} {paint("✓", "green") if right else paint("✗", "red")}'
        self.print(text)
        if self.writes:
            self.samples.write(plain(text) + '\n')
            self.shown.append(text)

    def log(self, step, **numbers):
        """One line of metrics.jsonl. Only seconds, tokens_per_second and mfu are not the same in every repetition."""
        for name, value in numbers.items():
            if not math.isfinite(value):
                fail(f'{name} is {value} at step {step}: training diverged, a smaller learning_rate may help')
        if self.writes:
            self.metrics.write(json.dumps({'step': step, **numbers, 'seconds': round(self.seconds(), 4)}) + '\n')
            if self.wandb:
                self.wandb.log(numbers | self.table(), step=step)
            self.shown.clear()

    def table(self):
        """What was shown since the last line of the log, as a coloured table for Weights & Biases, if anything was."""
        rows = ''.join(f'<tr><td>{as_html(text)}</td></tr>' for text in self.shown)
        return {'samples': importlib.import_module('wandb').Html(f'<table>{rows}</table>')} if rows else {}

    def report(self, step, **numbers):
        """Log an evaluation, print it, and keep its last two numbers at the end of the progress bar."""
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

    def draw_curve(self, figure, name, title, colour, **where):
        """Add to a plotly figure, where it says, what metrics.jsonl holds under a name over the steps."""
        log = map(json.loads, (self.folder / 'metrics.jsonl').read_text().splitlines())
        steps, values = zip(*((line['step'], line[name]) for line in log if name in line))
        figure.add_scatter(x=steps, y=values, name=title, line_color=colour, **where)
        figure.update_yaxes(title=title, color=colour, rangemode='tozero', **where)
        figure.update_xaxes(title='step', row=where['row'], col=where['col'])

    def picture(self, name, figure):
        """Keep a plotly figure in the folder as HTML that needs nothing else."""
        write_atomic(self.folder / name, lambda path: figure.write_html(path, config={'displayModeBar': False}))

    def finish(self, **result):
        """The last line of stdout: one JSON object."""
        line = {'script': self.knobs.script,
                'changed': {k: v for k, v in self.knobs.changed.items() if k not in ('init_from', 'out_dir')}, **result,
                'seconds': round(self.seconds(), 2), 'peak_memory_mb': round(self.world.peak_memory_mb())}
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
    """The commit of this checkout, with + when its scripts differ from it; None outside one."""
    def git(*words):
        command = ['git', '-C', Path(__file__).parent, *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    try:
        return git('rev-parse', 'HEAD').strip() + '+' * bool(git('status', '--porcelain', '*.py'))
    except (OSError, subprocess.CalledProcessError):
        return None


def device_name(kind):
    """What results on a device of this kind ('cpu', 'cuda') are measured on, in words."""
    if kind == 'cuda':
        return torch.cuda.get_device_name()
    cpuinfo = Path('/proc/cpuinfo').read_text() if os.path.exists('/proc/cpuinfo') else ''
    name = re.search(r'model name\s*: (.*)', cpuinfo)
    return f'{name.group(1) if name else platform.machine()}, {os.cpu_count()} cores'


def peak_flops(device):
    """Dense bfloat16 operations per second that a GPU is sold with, None for what is not in this list."""
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else ''
    return next((peak for kind, peak in {'H100': 989e12, 'H200': 989e12, 'A100': 312e12}.items() if kind in name), None)


# ---- tasks ----------------------------------------------------------------------------------------------------------

def addition_questions(input_min, input_max, heldout, seed, n_adds=2, n_max=10**6):
    """
    Rows (a, b, ...) of n_adds numbers of input_min..input_max-1 in two parts by chance: training, and the fraction
    `heldout` held out. All rows, or where there are more n_max of them, drawn by chance, none twice.
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


class SerialTask:
    """
    Questions that are worked out step by step: a start, then a number of operations, their *depth*, and after each of
    them there is a state. The answer is the last state.

    'add'   a running total modulo a prime, where each operation is + c or, if ops is '+*', + c or x c with c > 0
    'perm'  of n states, where operations are n_letters random permutations of them (a word problem)
    's5'    of the 120 permutations of five things, where operations are n_letters of them, drawn by chance
    'hop'   a random mapping of n elements to themselves, given as n tokens v>f(v) in random order, and a start x:
            every operation is f, the answer f(f(...x)) (graph search)
    'sort'  a list of n_letters different numbers below n, in place of a start; an operation asks for the next of them

    Tokens, with their text in names: 0..n_states-1 are states, then come the operations (of 'hop' and 'sort' only one),
    the arrows of 'hop', and '=' last, which ends a question. n_prefix tokens stand before the start.
    Raises ValueError for numbers that define no task.
    """

    def __init__(self, task, n_states, ops='+*', n_letters=10, seed=0):
        generator = torch.Generator().manual_seed(seed)
        states = torch.arange(n_states)
        self.task, self.n_states, self.n_prefix, self.table = task, n_states, 0, None
        if task == 'add':
            if '*' in ops and any(n_states % d == 0 for d in range(2, math.isqrt(n_states) + 1)):
                raise ValueError(f'products need a prime modulus, not input_max={n_states}')
            names = [f'+{c}' for c in range(n_states)] + [f'*{c}' for c in range(1, n_states)] * ('*' in ops)
            rows = [states + c for c in range(n_states)] + [states * c for c in range(1, n_states)] * ('*' in ops)
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
            names, self.n_prefix = ['f', *(f'{v}>{w}' for v in range(n_states) for w in range(n_states))], n_states
        else:
            if n_letters > n_states:
                raise ValueError(f'a list of n_letters={n_letters} different numbers needs as many below input_max')
            names, self.n_prefix = ['next'], n_letters - 1    # the list ends where a start would be
        self.names = [str(i) for i in range(self.n_states)] + names + ['=']

    def draw(self, n, depth, generator):
        """
        n questions of a depth from a generator, on its device: tokens (n, S), and states (n, depth) after operations.
        """
        device = generator.device
        ends = torch.full((n, 1), len(self.names) - 1, device=device)
        letters = torch.full((n, depth), self.n_states, device=device)
        if self.task == 'sort':
            numbers = torch.rand(n, self.n_states, generator=generator, device=device).argsort(1)[:, :self.n_prefix + 1]
            return torch.cat([numbers, letters, ends], dim=1), numbers.sort(1).values[:, :depth]
        x = torch.randint(self.n_states, (n, 1), generator=generator, device=device)
        if self.task == 'hop':
            mapping = torch.randint(self.n_states, (n, self.n_states), generator=generator, device=device)
            order = torch.rand(n, self.n_states, generator=generator, device=device).argsort(1)
            prefix = self.n_states + 1 + order * self.n_states + mapping.gather(1, order)           # v>f(v)
            states = [x]
            for _ in range(depth):
                states.append(mapping.gather(1, states[-1]))
        else:
            table, prefix = self.table.to(device), x[:, :0]
            chosen = torch.randint(len(table), (n, depth), generator=generator, device=device)
            letters, states = self.n_states + chosen, [x]
            for step in chosen.T:
                states.append(table[step, states[-1][:, 0]][:, None])
        return torch.cat([prefix, x, letters, ends], dim=1), torch.cat(states[1:], dim=1)


def digits(numbers, width, base=10):
    """The digits (n, width) of numbers (n,), highest first, padded with zeros."""
    return numbers[:, None] // base ** torch.arange(width - 1, -1, -1, device=numbers.device) % base


def gpt2_encoding():
    """tiktoken's encoding with GPT-2's tokens. Fails in one line where its files are neither here nor to be fetched."""
    try:
        return need('tiktoken', "for GPT-2's tokens").get_encoding('gpt2')
    except Exception as error:      # whatever a network does
        fail(f"tiktoken has not got GPT-2's tokens; TIKTOKEN_CACHE_DIR may name a folder that has its files: {error}")


def load_text(folder):
    """
    What prepare_data.py left in a folder: train and val, memory maps of tokens (n,) as uint16, the size of the
    vocabulary, and a function from tokens to their texts, one each: of a character that several tokens make, the last
    has all and the others nothing. Fails in one line where that is not there.
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


# ---- optimiser and schedule -----------------------------------------------------------------------------------------

def make_optimizer(model, learning_rate, weight_decay, betas=(.9, .98), recorded=False):
    """
    AdamW that decays matrices and embeddings, and neither biases nor norms; schedule() sets the learning rate.
    recorded: its steps may be part of a CUDA graph.
    """
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{'params': matrices, 'weight_decay': weight_decay}, {'params': vectors, 'weight_decay': 0.}]
    device = matrices[0].device
    recorded = recorded and device.type == 'cuda'
    return torch.optim.AdamW(groups, lr=torch.tensor(learning_rate, device=device) if recorded else learning_rate,
                             betas=betas, fused=device.type != 'mps', capturable=recorded)


def schedule(optimizer, learning_rate, step, max_steps, warmup_steps, cosine=False):
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


# ---- sampling -------------------------------------------------------------------------------------------------------

@fused
def sample(logits, noise, temperature=1., top_k=0, top_p=1., epsilon=0., bias=0.):
    """
    Draw one token per row by inverting the distribution function at a uniform number, so that whoever draws the noise
    decides the token, whatever the batch or the number of processes.

    logits: (N, V). noise: (N,) in [0, 1). temperature: 0 takes the most likely token. top_k: keep the k most likely
    (0: all). top_p: keep the fewest that together have this probability (Holtzman et al. 2019, nucleus sampling).
    epsilon: share of draws that are uniform over V. bias: added to the logits, (N, V).
    Returns tokens (N,) and their log-probabilities (N,) in the distribution they were drawn from; greedy tokens get
    theirs at temperature 1. Raises ValueError for settings that define no distribution.
    """
    if temperature != 0 and temperature < 1e-3 or top_k < 0 or not 0 < top_p <= 1 or not 0 <= epsilon <= 1:
        raise ValueError(f'cannot sample with {temperature=}, {top_k=}, {top_p=}, {epsilon=}')
    logits = logits.float() + bias
    if temperature == 0:
        log_p = logits.log_softmax(-1)
        token = log_p.argmax(-1)
        return token, log_p.gather(-1, token[:, None])[:, 0]
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
    token = (below <= target).sum(-1)
    return token, log_p.gather(-1, token[:, None])[:, 0]


# ---- advantages -----------------------------------------------------------------------------------------------------
# One function each: from rewards R (N, G) of N groups, and what some need besides, the advantages A (N, G).

def finite(rewards, otherwise=0.):
    """
    Rewards (N, G) whose infinities are the largest and smallest finite reward of their group, so that a linear
    advantage of them is finite; in a group that has no finite one, all are `otherwise`.
    """
    known = rewards.isfinite()
    low = rewards.masked_fill(~known, torch.inf).amin(1, keepdim=True)
    high = rewards.masked_fill(~known, -torch.inf).amax(1, keepdim=True)
    return torch.where(low <= high, rewards.clamp(low, high), torch.where(rewards.isnan(), rewards, otherwise))


def centred(rewards):
    """R - mean of the group (N, G)."""
    rewards = finite(rewards)
    return rewards - rewards.mean(1, keepdim=True)


def normal_scores(rewards, among):
    """
    The normal quantiles (N, G) of the ranks that rewards (N, G) have among others, (N, n) of the same row or (n,) of
    all: Phi^-1((rank - 1/2) / n), in which those that are alike have the mean of their ranks (rankit, Bliss 1967; a
    rank-based inverse normal transformation, Beasley et al. 2009). All moments are fixed, not only two.
    """
    rewards, ordered = rewards.contiguous(), among.sort(-1).values
    below, up_to = (torch.searchsorted(ordered, rewards, right=right) for right in (False, True))
    scores = torch.special.ndtri((below + up_to).to(rewards.dtype) / (2 * ordered.shape[-1]))
    return torch.where(rewards.isnan(), rewards, scores)


def softmax_weights(scores):
    """Softmax over rows (N, G); where the largest is infinite, its limit: those that have it share alike."""
    most = scores.amax(1, keepdim=True)
    return torch.where(scores == most, 0., scores - most).softmax(1)


def a_clean(rewards, tau, baseline, batch):
    """A = R."""
    return finite(rewards)


def a_reinforce(rewards, tau, baseline, batch):
    """A = R - b with a baseline b that does not depend on these rollouts, a running mean (Williams 1992). Unbiased."""
    return finite(rewards, baseline) - baseline


def a_dr_grpo(rewards, tau, baseline, batch):
    """A = R - mean of the group (Liu et al. 2025). Along the exact gradient, (G - 1)/G of its length."""
    return centred(rewards)


def a_rloo(rewards, tau, baseline, batch):
    """A = R - mean of the others of the group = G/(G - 1) (R - mean) (Ahmadian et al. 2024). Unbiased."""
    G = rewards.shape[1]
    return centred(rewards) * G / max(1, G - 1)


def a_grpo(rewards, tau, baseline, batch):
    """A = (R - mean) / std, both of the group (Shao et al. 2024). Questions count by 1/std: rare successes more."""
    advantage = centred(rewards)
    return advantage / (advantage.square().mean(1, keepdim=True).sqrt() + 1e-6)


def a_batch_std(rewards, tau, baseline, batch):
    """A = (R - mean of the group) / std of the batch (Liu et al. 2025, Tricks or traps). All questions count alike."""
    return centred(rewards) / (finite(batch).std(correction=0) + 1e-6)


def a_quantile(rewards, tau, baseline, batch):
    """A = q - mean of the group, where q is the normal quantile of R's rank within the group. Blind to its scale."""
    return centred(normal_scores(rewards, rewards))


def a_quantile_batch(rewards, tau, baseline, batch):
    """A = q - mean of the group, where q is the normal quantile of R's rank in the whole batch."""
    return centred(normal_scores(rewards, batch.flatten()))


def w_softmax(rewards, tau, baseline, batch):
    """w = softmax(R / tau) over the group: advantage-weighted regression (Peng et al. 2019). Sums to 1."""
    return softmax_weights(rewards / tau)


def a_softmax_centred(rewards, tau, baseline, batch):
    """A = G softmax(R / tau) - 1 over the group: softmax without what it adds to whatever was sampled."""
    return rewards.shape[1] * softmax_weights(rewards / tau) - 1


def w_softmax_quantile(rewards, tau, baseline, batch):
    """w = softmax(q / tau) over the group, q as for quantile. Sums to 1."""
    return softmax_weights(normal_scores(rewards, rewards) / tau)


def w_best(rewards, tau, baseline, batch):
    """w = 1 for the best of the group, the first of them where several are: softmax for tau -> 0."""
    return torch.zeros_like(rewards).scatter(1, rewards.argmax(1, keepdim=True), 1.)


ADVANTAGES = {'clean': a_clean, 'reinforce': a_reinforce, 'dr_grpo': a_dr_grpo, 'rloo': a_rloo, 'grpo': a_grpo,
              'batch_std': a_batch_std, 'quantile': a_quantile, 'quantile_batch': a_quantile_batch,
              'softmax': w_softmax, 'softmax_centred': a_softmax_centred, 'softmax_quantile': w_softmax_quantile,
              'best': w_best}
SUM_TO_ONE = ('softmax', 'softmax_quantile', 'best')        # weights of a group, never negative
# of a group of one always 0
NEED_GROUPS = ('dr_grpo', 'rloo', 'grpo', 'batch_std', 'quantile', 'quantile_batch', 'softmax_centred')


def advantages(rewards, kind, tau=1., baseline=0., batch=None):
    """
    How much each rollout of a group counts: the loss is -sum of weight * log-probability over the group.

    rewards: (N, G). kind: a name of ADVANTAGES. tau: temperature of the three softmax. baseline: of
    reinforce, a number or (N, 1). batch: the rewards (B, G) of all processes, for batch_std and quantile_batch; None:
    these rewards are all. Linear advantages are divided by G, so that they are a mean over the group.

    Where rewards of a group are all alike, its linear advantages with a group mean are 0, its softmax weights 1/G; so
    they are in a group of one. Ranks of equal rewards are their mean. Infinite rewards: a linear advantage takes them
    for the largest and smallest finite one of the group, and a group without any counts nothing; ranks need no more;
    softmax is its limit. A reward that is nan stays one, so that the loss shows it. Returns weights (N, G).
    """
    weights = ADVANTAGES[kind](rewards, tau, baseline, rewards if batch is None else batch)
    return weights if kind in SUM_TO_ONE else weights / rewards.shape[1]


def some_rollouts(weights, n, noise):
    """
    Of the weights (N, G) of each group only n, chosen by noise (N, G), times G / n, the others 0: the mean over all
    choices is weights. The gradients of a group's rollouts are correlated, so fewer of more groups may do.
    """
    kept = torch.zeros_like(weights).scatter(1, noise.argsort(1)[:, :n], 1.)
    return weights * kept * weights.shape[1] / n


def concentration(weights):
    """
    On how few rollouts of its group the absolute weight (N, G) rests, means over groups: the largest share, and the
    effective number 1 / sum of squared shares, which is G where there is no weight at all.
    """
    share = weights.abs() / weights.abs().sum(1, keepdim=True).clamp(min=1e-9)
    return {'max_weight': share.max(1).values.mean().item(),
            'effective_n': (1 / share.square().sum(1).clamp(min=1e-9)).clamp(max=weights.shape[1]).mean().item()}


# ---- balanced targets -----------------------------------------------------------------------------------------------

def balanced_target(scores, prices, tau, n_steps=10):
    """
    Which codes each answer is to be written with. Every answer prefers the codes it scores well with, by
    softmax(scores / tau - prices), and a code that is wanted by more than its share of the answers has its price raised
    until it is not: entropic optimal transport with at most max(1, n_answers / n_codes) answers per code, by Sinkhorn's
    iteration (Cuturi 2013) with prices that cannot fall below zero, as in an auction (Bertsekas 1988).

    scores: (n_answers, n_codes), log-probability of the answer given the code. prices: (n_codes,) from the last call,
    zeros at first. n_steps: iterations of this call; a few follow the scores closely when the prices are kept.
    Returns the log of the target (n_answers, n_codes), whose rows sum to 1, and the new prices.
    """
    n_answers, n_codes = scores.shape
    log_share = math.log(max(1., n_answers / n_codes))
    wanted = scores / tau
    for _ in range(n_steps):
        log_target = (wanted - prices).log_softmax(1)
        prices = (prices + log_target.logsumexp(0) - log_share).clamp(min=0)
    return (wanted - prices).log_softmax(1), prices


# ---- are the thoughts used? -----------------------------------------------------------------------------------------

def ablations(thoughts, choices, seed=0):
    """
    What a checkpoint's own greedy thoughts (N, T) are replaced by, to see whether the answer uses them:
    another question's, random ones of the range `choices`, the most frequent row for all, none at all.
    Returns a dict of name -> thoughts.
    """
    generator = torch.Generator().manual_seed(seed)
    N, T = thoughts.shape
    rows, counts = thoughts.cpu().unique(dim=0, return_counts=True)
    return {'own': thoughts,
            'shuffled': thoughts[torch.randperm(N, generator=generator).to(thoughts.device)],
            'random': torch.randint(choices.start, choices.stop, (N, T), generator=generator).to(thoughts.device),
            'constant': rows[counts.argmax()].expand(N, T).to(thoughts.device),
            'none': thoughts[:, :0]}


# ---- colours --------------------------------------------------------------------------------------------------------

COLOURS = {'red': 31, 'green': 32, 'blue': 34, 'magenta': 35, 'cyan': 36}


def paint(text, colour):
    """Text in a colour, for Run.print, which prints it so on terminals."""
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
    """A row of tokens as coloured text: normal tokens blue, thoughts cyan, end_thought magenta."""
    n_normal = getattr(config, 'd_normal_vocab', config.d_vocab)
    texts = iter(decode([token for token in tokens.tolist() if token < n_normal]))

    def show(token):
        if token < n_normal:
            return paint(next(texts), 'blue')
        if token < config.end_thought:
            return paint(f'<think{token - n_normal}>', 'cyan')
        return paint('<end_thought>', 'magenta')
    return between.join(map(show, tokens.tolist()))

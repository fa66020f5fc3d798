"""What scripts share. Last come fast paths, which change no result: skip them at first."""
import codecs
import difflib
import functools
import hashlib
import html
import importlib
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import traceback
import zipfile
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault('GOMP_SPINCOUNT', '3000')  # before torch: threads spin less

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import FileLock
from tqdm import tqdm

triton = None
with suppress(ImportError):
    import triton
    import triton.language as tl


# ---- what ends a program early, knobs ----

def fail(message):
    """End the program: one line, exit code 2."""
    print('error:', ' '.join(printable(str(message)).split())[:500], file=sys.stderr)
    sys.exit(2)


def excepthook(kind, error, trace):
    """One line for what is no bug; a ValueError of this folder is a user's mistake."""
    first, source = str(error).strip().partition('\n')[0], traceback.extract_tb(trace)[-1].filename
    if kind is BrokenPipeError:  # | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    if kind is KeyboardInterrupt:
        fail(f'stopped{Run.where}')
    if issubclass(kind, OSError):
        fail(first + Run.where * Path(error.filename or 'x').parent.exists())
    if kind.__module__.startswith(('torch._dynamo', 'torch._inductor')):
        fail(f'cannot compile: {first}')
    if issubclass(kind, MemoryError) or issubclass(kind, RuntimeError) and 'memory' in first:
        fail(f'not enough memory: {first}')
    ours = Path(source).resolve().parent == Path(__file__).parent
    if issubclass(kind, ValueError) and (ours or kind.__name__.endswith('DecodeError')):
        fail(error)
    sys.__excepthook__(kind, error, trace)


def need(package, purpose):
    """Import an optional package. Raises ValueError."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f'{package} is needed {purpose}: pip install {package.split(".")[0]}') from error


LIMITS = {name: limits for limits, names in {  # least, most; others: 0 and 2^31
    (1, 2**31): 'max_steps inner_steps eval_every eval_questions log_every n_tokens seeds parallel',
    (1, 2**20): 'batch_size d_thought_vocab d_model text_len eval_sequences eval_prefixes prefix_len',
    (1, 10**5): 'n_problems', (2, 2**31): 'input_max n_questions', (1, 120): 'n_layer n_head n_letters',
    (1, 2**12): 'group_size n_adds k at_once', (0, 2**12): 'think_len', (0, 2**10): 'k_test',
    (1e-6, 1e9): 'tau max_seconds', (1e-3, 1e3): 'temperature', (0, 1): 'epsilon advance_at',
    (0, .9999): 'beta2', (0, .99): 'heldout val_share dropout',
}.items() for name in names.split()}
ELSEWHERE = {'init_from', 'eval_only', 'out_dir', 'wandb_mode', 'device'}  # never from a checkpoint
FREE = ELSEWHERE | set('max_steps max_seconds eval_every log_every plot'.split())  # may change on resuming
SPLIT = set('seed heldout input_min input_max n_adds task n_letters k'.split())  # what is held out


class Knobs(dict):
    """A script's knobs by name. Has script (its name), folder, changed, checkpoint, text."""


def read_knobs(file, script_globals, pretrained=False):
    """A script's knobs: lines `name = value  # meaning, unit` below the banner "knobs", 'a' | 'b' are
    choices; overridden by --name=value, and put into its globals. init_from=resume takes those not given
    from the checkpoint, another checkpoint only those in SPLIT. pretrained: init_from may be a model."""
    sys.excepthook = excepthook
    with suppress(ValueError):  # in other threads
        if 'WORLD_SIZE' not in os.environ:
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    if hasattr(sys.stdout, 'reconfigure'):  # not in a notebook
        sys.stdout.reconfigure(errors='replace')
    block = Path(file).read_text('utf-8').partition('# ---- knobs ----')[2].partition('\n# ----')[0].strip()
    if {'-h', '--help'} & set(sys.argv[1:]):
        print(script_globals['__doc__'].strip(), 'Knobs, set by --name=value:', block, sep='\n\n', flush=True)
        sys.exit(0)
    comments, name = {}, ''
    for line in block.splitlines():
        code, _, comment = line.partition('#')
        name = code.partition(' = ')[0] if ' = ' in code else name
        comments[name] = comments.get(name, '') + comment
    defaults = {name: script_globals[name] for name in comments}
    given = dict(parse_knob(argument, defaults) for argument in sys.argv[1:])
    knobs = Knobs(defaults | given)
    for name, value in knobs.items():
        check_knob(name, value, comments[name])
    knobs.script, knobs.checkpoint, knobs.text = Path(file).stem, None, {}
    name = ','.join(f'{k}={v}' for k, v in knobs.items() if v != defaults[k] and k not in FREE)
    if len(name.encode()) > 150:
        name = f'{name[:30]}-{fingerprint(name.encode())}'
    knobs.folder = Path(knobs.get('out_dir') or f'out/{knobs.script}/{name.replace("/", "_") or "default"}')
    if knobs.get('init_from') == 'auto':
        knobs['init_from'] = 'resume' if (knobs.folder / 'ckpt.pt').exists() else 'scratch'
    start = knobs.get('init_from', 'scratch')
    resume = start == 'resume'
    path = knobs.folder / 'ckpt.pt' if resume else Path(start)
    if start != 'scratch' and (path.suffix == '.pt' or not pretrained):
        knobs.checkpoint = load_checkpoint(path)
        script, old = knobs.checkpoint['script'], knobs.checkpoint['knobs']
        if resume and script != knobs.script:
            fail(f'{path} is from {script}.py')
        kept = knobs.keys() - ELSEWHERE if resume else SPLIT
        for name in old.keys() & knobs.keys() & kept if script == knobs.script else ():
            value = parse_knob(f'--{name}={old[name]}', defaults)[1]
            check_knob(name, value, comments[name])
            if name not in FREE and given.get(name, value) != value:
                fail(f'--{name}={given[name]} cannot be changed when going on from {path}, was {value}')
            knobs[name] = given.get(name, value)
    knobs.changed = {k: v for k, v in knobs.items() if v != defaults[k]}
    script_globals.update(knobs)
    return knobs


def parse_knob(argument, defaults):
    """Name and value in --name=value, of the type of the knob's default; or fail."""
    if not (match := re.fullmatch(r'--(\w+)=(.*)', argument, re.DOTALL)):
        fail(f'{argument!r} is not of the form --name=value, see --help')
    name, text = match.groups()
    if name not in defaults:
        near = difflib.get_close_matches(name, defaults, n=1, cutoff=0)[0]
        fail(f'unknown knob --{name}, the nearest is --{near}')
    kind = type(defaults[name])
    try:
        return name, {'True': True, 'False': False}[text] if kind is bool else kind(text)
    except (KeyError, ValueError):
        must = {bool: 'True or False', int: 'an integer', float: 'a number'}[kind]
        fail(f'--{name}={text} must be {must}')


def check_knob(name, value, comment):
    """Fail if a knob's value is beyond its limits or none of the choices in its comment."""
    number, (low, high) = type(value) in (int, float), LIMITS.get(name, (0, 2**31))
    if number and not low <= value <= high:  # nor nan
        fail(f'--{name}={value} must be between {low:g} and {high:g}')
    if isinstance(value, str) and not value.isprintable():
        fail(f'--{name}={value!r} cannot be printed')
    choices = re.findall(r"'([^']*)'", comment) if "' | '" in comment else [value]
    if value not in choices:
        fail(f'--{name}={value} must be one of {", ".join(choices)}')


# ---- device and processes ----

class World:
    """Device and processes. Each draws all random numbers and reads its share of the rows."""
    def __init__(self, knobs):
        if ('RANK' in os.environ) != ('WORLD_SIZE' in os.environ):
            fail('of RANK and WORLD_SIZE only one is set')
        self.rank, self.size = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
        self.main, name = self.rank == 0, knobs['device']
        if name == 'auto':
            name = 'cuda' if torch.cuda.is_available() else 'mps' if torch.mps.is_available() else 'cpu'
        name = f'cuda:{os.environ.get("LOCAL_RANK", 0)}' if name == 'cuda' else name
        try:
            self.device = torch.device(name)
            torch.zeros(1, device=self.device).item()
        except Exception as error:
            fail(f'--device={name} must be auto, cpu, cuda, cuda:<number> or mps, and be there: {error}')
        if self.size > 1 and (name == 'mps' or knobs['device'].startswith('cuda:')):
            fail('several processes need --device=cpu or cuda')
        if knobs['batch_size'] % self.size:
            fail(f'--batch_size={knobs["batch_size"]} cannot be shared by {self.size} processes')
        kind = self.device.type
        if kind == 'cuda':
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision('high')  # TF32
        if self.size > 1:  # restarts: dead addresses are left
            place = os.environ.get('TORCHELASTIC_RESTART_COUNT', '')
            store = dist.PrefixStore(place, next(dist.rendezvous('env://'))[0])
            dist.init_process_group('nccl' if kind == 'cuda' else 'gloo', store=store, rank=self.rank,
                                    world_size=self.size)
        self.autocast = torch.autocast(kind, torch.bfloat16, enabled=knobs.get('dtype') == 'bfloat16')
        if kind == 'cpu':  # the same bits every time
            os.environ.setdefault('MKL_CBWR', 'AUTO,STRICT')  # MKL may not vary its code,
            torch.set_num_threads(torch.get_num_threads())  # nor threads,
            for function in (torch.exp, torch.log, torch.sin, torch.cos, torch.tanh):
                function(torch.ones(1))  # chosen before two threads ask at once
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False
        torch.manual_seed(knobs['seed'])
        self.generator = torch.Generator(self.device).manual_seed(knobs['seed'])  # alike in all processes

    def share(self, x):
        """This process's rows of the whole batch."""
        return x.chunk(self.size)[self.rank] if self.size > 1 else x

    def draw(self, *shape):
        """This process's rows of the batch's random numbers in [0, 1)."""
        return self.share(torch.rand(*shape, generator=self.generator, device=self.device))

    def gather(self, x):
        """The whole batch, from every process's rows."""
        if self.size == 1:
            return x
        whole = x.new_empty(self.size * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(whole, x.contiguous())
        return whole

    def mean_gradients(self, parameters):
        """Average gradients over processes."""
        if self.size > 1:
            grads = [p.grad for p in parameters if p.grad is not None]
            flat = torch.nn.utils.parameters_to_vector(grads)
            dist.all_reduce(flat)
            torch.nn.utils.vector_to_parameters(flat / self.size, grads)

    def peak_memory_mb(self):
        """Most memory used, a GPU's if any."""
        if self.device.type == 'cuda':
            return round(torch.cuda.max_memory_allocated() / 2**20)
        with suppress(ImportError):  # on Windows
            used = importlib.import_module('resource').getrusage(0).ru_maxrss
            return round(used / (2**20 if sys.platform == 'darwin' else 2**10))


# ---- the run directory ----

def write_atomic(path, write):
    """Let write(file) fill a new file, then rename it: path is never half-written."""
    temporary = path.with_name(path.name + '.tmp')
    temporary.unlink(missing_ok=True)
    try:
        with open(temporary, 'xb') as file:  # x: follows no link
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        error = error.__context__ if isinstance(error.__context__, (OSError, KeyboardInterrupt)) else error
        error.filename = str(path)
        raise error


def lock(folder):
    """Make and lock a folder. Returns the lock."""
    folder.mkdir(parents=True, exist_ok=True)
    held = FileLock(folder / '.lock', timeout=0)
    held.acquire()
    return held


CHECKPOINT = {'script': str, 'knobs': dict, 'models': dict, 'optimizers': list, 'generator': torch.Tensor,
              'step': int, 'best': float, 'seconds': float, 'written': list, 'text': dict}


def load_checkpoint(path, text=None):
    """Read a checkpoint, which runs no code, or fail. text: whose tokens it must know."""
    if not os.path.isfile(path):
        fail(f'there is no checkpoint {path}')
    try:
        with zipfile.ZipFile(path) as archive:  # torch checks neither sizes nor checksums
            unpacked = sum(part.file_size for part in archive.infolist())
            if unpacked > os.path.getsize(path) or archive.testzip():
                raise ValueError('checksum')
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        if wrong := [name for name, kind in CHECKPOINT.items() if type(checkpoint[name]) is not kind]:
            raise ValueError(f'its {wrong[0]} is wrong')
    except Exception as error:
        fail(f'{path} is damaged or no checkpoint of ours: {type(error).__name__} {error}')
    if text and text['tokens'] != checkpoint['text'].get('tokens'):
        fail(f'{path} was trained on text with other tokens')
    return checkpoint


def pack(model):
    """A model as plain data, for model.unpack."""
    return {'kind': type(model.config).__name__, 'config': asdict(model.config), 'state': model.state_dict()}


OURS = r'((config\.json|metrics\.jsonl|samples\.txt|(ckpt|best)\.pt|\w+\.html)(\.tmp)?|\.lock|wandb)'


class Run:
    """A run and its folder; an older run there is moved to <folder>.1, ... Only the main process writes."""
    where = ''  # the last checkpoint

    def __init__(self, knobs, world, optimizers):
        self.knobs, self.world, self.folder, self.optimizers = knobs, world, knobs.folder, optimizers
        self.start, self.best, self.first_step, self.wandb, self.shown = time.time(), -math.inf, 0, None, []
        self.writes = world.main and not knobs['eval_only']
        self.resumed = knobs.checkpoint if knobs['init_from'] == 'resume' else None
        try:
            self.resume() if self.resumed else None
            self.open_folder() if self.writes else None
        except Exception as error:
            fail(f'cannot use {self.folder} (--out_dir): {error}')

    def resume(self):
        """Go on where the checkpoint was written."""
        old = self.resumed
        self.start, self.best, self.first_step = self.start - old['seconds'], old['best'], old['step']
        for optimizer, saved in zip(self.optimizers, old['optimizers'], strict=True):
            groups = optimizer.state_dict()['param_groups']  # rates are the knobs'
            optimizer.load_state_dict({'state': saved['state'], 'param_groups': groups})
            for p, state in optimizer.state.items():
                shapes = {name: x.shape for name, x in state.items()}
                if shapes != {'step': (), 'exp_avg': p.shape, 'exp_avg_sq': p.shape}:
                    raise ValueError('its optimiser does not fit')
        self.world.generator.set_state(old['generator'])

    def restore(self, state):
        """What a script keeps between steps, {name: tensor}: given, or resumed."""
        old = self.resumed or state
        for name, x in state.items():
            if not torch.is_tensor(old.get(name)) or (old[name].shape, old[name].dtype) != (x.shape, x.dtype):
                fail(f'{self.folder}/ckpt.pt: {name} does not fit')
        return {name: old[name].to(self.world.device) for name in state}

    def files(self):
        return [path for path in self.folder.iterdir() if path.name != '.lock' and path.suffix != '.tmp']

    def open_folder(self):
        """Make the folder ours and open its files."""
        config, mode = self.folder / 'config.json', self.knobs['wandb_mode']
        wandb = need('wandb', 'for wandb_mode') if mode != 'disabled' else None
        self.folder.mkdir(parents=True, exist_ok=True)
        known = set()
        for path in self.folder.iterdir():  # no link
            wanted = path.is_dir() if path.name == 'wandb' else path.is_file() and path.stat().st_nlink == 1
            if path.is_symlink() or not wanted or not re.fullmatch(OURS, path.name):
                raise ValueError(f'{path.name} is not ours')
        with suppress(Exception):
            known = set(json.loads(config.read_text()))
        if self.files() and not {'script', 'knobs', 'processes'} <= known:
            raise ValueError('config.json is not ours')
        self.lock = lock(self.folder)
        if self.files() and not self.resumed:
            older = (Path(f'{self.folder.resolve()}.{n}') for n in itertools.count(1))
            older = next(path for path in older if not path.exists())
            older.mkdir()
            for path in sorted(self.files(), key=lambda path: path == config):  # it marks a run
                path.rename(older / path.name)
        on_gpu = self.world.device.type == 'cuda'
        now = {'script': self.knobs.script, 'knobs': self.knobs, 'commit': git_commit(),
               'torch': torch.__version__, 'processes': self.world.size, 'started': time.ctime(),
               'device': torch.cuda.get_device_name() if on_gpu else 'cpu'}
        if not self.resumed:
            write_atomic(config, lambda file: file.write(json.dumps(now, indent=1).encode()))
        self.metrics, self.samples = (open(self.folder / name, 'a', buffering=1, encoding='utf-8')
                                      for name in ('metrics.jsonl', 'samples.txt'))
        written = self.resumed['written'] if self.resumed else (0, 0)
        self.logs = [*zip((self.metrics, self.samples), written, strict=True)]
        if any(file.seek(0, 2) < length for file, length in self.logs):
            raise ValueError('its logs are too short')
        same = {'id': fingerprint(config.read_bytes()), 'resume': 'allow'}
        self.wandb = wandb and wandb.init(project='think-tokens', name=self.folder.name, mode=mode,
                                          config=dict(self.knobs), dir=self.folder, **same)

    def seconds(self):
        return time.time() - self.start

    def steps(self, last):
        """Steps from first_step to last - 1, for at most max_seconds."""
        self.bar = tqdm(range(self.first_step, last), initial=self.first_step, total=last,
                        disable=None if self.world.main else True)
        for log, length in self.logs if self.writes else ():
            log.truncate(log.seek(length))
        most = self.knobs['max_seconds']
        with self.bar:
            for step in self.bar:
                if step % self.knobs['log_every'] == 0:
                    late = torch.tensor(float(self.seconds() > most), device=self.world.device)
                    dist.broadcast(late, 0) if self.world.size > 1 else None
                    if late:
                        return self.print(f'stopped at step {step}: max_seconds={most:g} have passed')
                yield step

    def print(self, text):
        """Print, coloured on a terminal without NO_COLOR."""
        if self.world.main:
            tqdm.write(text if sys.stdout.isatty() and not os.environ.get('NO_COLOR') else plain(text))

    def sample(self, text, right=None):
        """Print and keep coloured text, with a tick or cross."""
        text = printable(text)
        if right is not None:
            text += ' ' + (paint('✓', 'green') if right else paint('✗', 'red'))
        self.shown.append(text)
        self.print(text)
        if self.writes:
            self.samples.write(plain(text) + '\n')

    def show(self, config, questions, thoughts, answers, right, names=None):
        """Show three questions (n, S), thoughts (n, T) and answers (n,). names: of normal tokens."""
        end = [config.end_thought] if hasattr(config, 'end_thought') else []
        rows = zip(*(x[:3].tolist() for x in (questions, thoughts, answers, right)))
        for question, thought, answer, truth in rows:
            tokens = [*question, *(token for token in thought if token not in end), *end, answer]
            text = show_tokens(tokens, config, lambda tokens: [names[i] if names else str(i) for i in tokens])
            self.sample(text, right=answer == truth)

    def log(self, step, **numbers):
        """Write a line of metrics.jsonl: means over processes."""
        if self.world.size > 1:
            mean = torch.tensor(list(numbers.values()), dtype=torch.double, device=self.world.device)
            dist.all_reduce(mean)
            numbers = dict(zip(numbers, (mean / self.world.size).tolist()))
        for name, value in numbers.items():
            self.check(math.isfinite(value), f'{name} is {value}', step)
        if self.writes:
            line = {'step': step, **numbers, 'seconds': round(self.seconds(), 4)}
            self.metrics.write(json.dumps(line) + '\n')
        if self.wandb:
            self.wandb.log(numbers, step=step)

    def check(self, good, what, step):
        if not good:
            fail(f'{what} at step {step}: training diverged, a smaller learning_rate may help{Run.where}')

    def report(self, step, **numbers):
        """Log and print an evaluation."""
        self.log(step, **numbers)
        self.shown = []
        shown = {name: f'{value:.4g}' for name, value in numbers.items()}
        self.print(f'step {step}: ' + ', '.join(f'{name} {value}' for name, value in shown.items()))
        self.bar.set_postfix(dict(list(shown.items())[-2:]))

    def save(self, step, models, file='ckpt.pt', **state):
        """Write a checkpoint of models and tensors by name."""
        packed = {name: x if isinstance(x, dict) else pack(x) for name, x in models.items()}
        finite = all(x.isfinite().all() for model in packed.values() for x in model['state'].values())
        self.check(finite, 'a weight is not finite', step)
        if self.writes:
            for log in (self.metrics, self.samples):  # before the checkpoint that counts on them
                os.fsync(log.fileno())
            checkpoint = {
                'script': self.knobs.script, 'knobs': dict(self.knobs), 'text': self.knobs.text, 'step': step,
                'best': self.best, 'models': packed, 'seconds': self.seconds(),
                'optimizers': [optimizer.state_dict() for optimizer in self.optimizers],
                'generator': self.world.generator.get_state(),
                'written': [self.metrics.tell(), self.samples.tell()], **state}
            write_atomic(self.folder / file, lambda file: torch.save(checkpoint, file))
            Run.where = f'; {self.folder}/ckpt.pt of step {step} is whole, --init_from=resume goes on from it'

    def save_best(self, step, score, models, **state):
        """Write best.pt if this score is the best."""
        if score > self.best:
            self.best = score
            self.save(step, models, 'best.pt', **state)

    def draw(self, name, page):
        """Write the HTML that page() returns, if it can."""
        try:
            if self.writes:
                write_atomic(self.folder / name, lambda file: file.write(page().encode()))
        except Exception as error:
            self.print(f'no {name}: {error}')

    def finish(self, **result):
        """The last line: JSON."""
        changed = {k: v for k, v in self.knobs.changed.items() if k not in ('init_from', 'out_dir')}
        line = json.dumps({'script': self.knobs.script, 'changed': changed, **result, 'seconds': round(
            self.seconds(), 2), 'peak_memory_mb': self.world.peak_memory_mb()})
        self.draw('samples.html', lambda: '<meta charset=utf-8>' + '<hr>'.join(map(as_html, self.shown)))
        if self.writes:
            self.metrics.close()
            self.samples.close()
            self.lock.release()
        if self.wandb:
            self.wandb.summary.update(json.loads(line))
            self.wandb.finish()
        if self.world.main:
            print(line, flush=True)
        if self.world.size > 1:
            dist.destroy_process_group()


def git_commit():
    """This checkout's commit, + if files differ; or None."""
    command = 'git describe --always --abbrev=40 --exclude=* --dirty=+'.split()
    with suppress(OSError):
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
        return found.stdout.strip() or None


# ---- tasks ----

def digits(numbers, width, base=10):
    """Digits (n, width) of numbers (n,), most significant first, with zeros."""
    return numbers[:, None] // base ** torch.arange(width - 1, -1, -1, device=numbers.device) % base


def addition_questions(input_min, input_max, heldout, seed, n_adds=2, n_max=10**6):
    """Two sets of rows (n, n_adds) of numbers, n_max in all: to train on, held out. Raises ValueError."""
    generator, n_numbers = torch.Generator().manual_seed(seed), input_max - input_min
    n_rows = n_numbers ** n_adds
    if n_numbers < 2 or n_rows > 2**62:
        raise ValueError(f'questions of {n_adds} numbers among {n_numbers} are too few or too many')
    index = torch.arange(n_rows if n_rows <= n_max else 0)
    while len(index) < min(n_max, n_rows):
        index = torch.cat([index, torch.randint(n_rows, (n_max,), generator=generator)]).unique()
    index = index[torch.randperm(len(index), generator=generator)[:n_max]]
    rows = input_min + digits(index, n_adds, n_numbers)
    n_heldout = min(max(1, round(heldout * len(rows))), len(rows) - 1)
    return rows[n_heldout:], rows[:n_heldout]


PEOPLE, THINGS = 'Anna Ben Carla David Eva'.split(), 'book cup key lamp coin'.split()
STORY = {  # two wordings of a line; who then has what s had. Ben (1) is to the right of Anna (0)
    '{a} has the {x} .|the {x} belongs to {a} .': lambda s, a, b: s,
    '{a} and {b} trade .|{a} swaps with {b} .': lambda s, a, b: {a: b, b: a}.get(s, s),
    'all pass to the left .|left they go .': lambda s, a, b: (s - 1) % 5,
    'all pass to the right .|right they go .': lambda s, a, b: (s + 1) % 5,
    'all swap across {a} .|{a} is the mirror .': lambda s, a, b: (2 * a - s) % 5,
    'it starts to rain .|{a} waves at {b} .': lambda s, a, b: s,
    'who has the book now ?|whose is the book ?': lambda s, a, b: s}


class SerialTask:
    """Questions worked out step by step: a start and *depth* operations, each leads to a state, the last one
    is the answer. names: of tokens, first of states.

    'add'   a running total modulo a prime; an operation is + c, or x c with c > 0
    'perm'  n states; operations are n_letters random permutations
    's5'    states are the permutations of 5 things; operations, n_letters of them
    'story' who has the book now? First, find who had it; other operations are lines

    A place has `width` tokens; that of the start is `first`.
    """
    def __init__(self, task, n_states, n_letters=10, seed=0):
        generator = torch.Generator().manual_seed(seed)
        states = torch.arange(n_states)
        self.task, self.first, self.width = task, 0, 1
        if task == 'add':
            if any(n_states % d == 0 for d in range(2, math.isqrt(n_states) + 1)):
                raise ValueError(f'products need a prime modulus, not input_max={n_states}')
            letters = [f'+{c}' for c in range(n_states)] + [f'*{c}' for c in range(1, n_states)]
            self.table = torch.cat([states[:, None] + states, states[1:, None] * states]) % n_states
        elif task == 'perm':
            letters = [f'p{i}' for i in range(n_letters)]
            self.table = torch.stack([torch.randperm(n_states, generator=generator) for _ in letters])
        elif task == 's5':
            elements = torch.tensor([*itertools.permutations(range(5))])
            chosen = elements[torch.randperm(120, generator=generator)[:n_letters]]
            letters = [''.join(map(str, letter)) for letter in chosen.tolist()]
            self.table = (chosen[:, elements][:, :, None] == elements).all(-1).int().argmax(-1)
        else:
            self.first, self.width = 4, 7
            pairs = [*itertools.product(range(5), repeat=2)]
            lines = [[('_ ' * 6 + text.format(a=PEOPLE[a], b=PEOPLE[b], x=THINGS[b])).split()[-7:]
                      for text in texts.split('|')] for texts in STORY for a, b in pairs]
            names = [*dict.fromkeys(PEOPLE + sum(sum(lines, []), []))]
            self.lines = torch.tensor([[[*map(names.index, line)] for line in two] for two in lines])
            self.table = torch.tensor([[after(s, a, b) for s in range(5)]
                                       for after in STORY.values() for a, b in pairs])
        self.n_states = self.table.shape[1]
        self.names = names if task == 'story' else [*map(str, range(self.n_states)), *letters, '=']

    def draw(self, n, depth, generator):
        """Questions of a depth: tokens (n, S), and states (n, depth)."""
        random, table = {'generator': generator, 'device': generator.device}, self.table.to(generator.device)
        if self.task == 'story':
            who, what = (torch.rand(n, 5, **random).argsort(1) for _ in range(2))
            pair = torch.rand(n, depth - 1, 5, **random).argsort(2)
            chosen = torch.randint(1, 6, (n, depth - 1), **random) * 25 + 5 * pair[..., 0] + pair[..., 1]
            lines = torch.cat([5 * who + what, chosen, torch.full_like(who[:, :1], 150)], dim=1)
            wording = torch.randint(2, lines.shape, **random)
            question, start = self.lines.to(lines.device)[lines, wording].flatten(1), who[what == 0][:, None]
        else:
            start = torch.randint(self.n_states, (n, 1), **random)
            chosen = torch.randint(len(table), (n, depth), **random)
            ends = torch.full((n, 1), len(self.names) - 1, device=generator.device)
            question = torch.cat([start, self.n_states + chosen, ends], dim=1)
        states = [*itertools.accumulate(chosen.T, lambda s, row: table[row, s], initial=start[:, 0])]
        return question, torch.stack(states[-depth:], dim=1)


def gpt2_encoding():
    """tiktoken's encoding of GPT-2, or fail."""
    try:
        return need('tiktoken', "for GPT-2's tokens").get_encoding('gpt2')
    except Exception as error:
        fail(f"no files of GPT-2's tokens, see TIKTOKEN_CACHE_DIR: {error}")


def fingerprint(content):
    """A short hash of bytes."""
    return hashlib.sha256(content).hexdigest()[:16]


def load_text(folder, knobs):
    """What prepare_data.py left: train and val, tokens (n,), d_vocab, and decode(tokens) -> texts. A
    checkpoint must know its tokens; one that is resumed, its text."""
    folder = Path(folder)
    try:
        meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
        train, val = (np.memmap(folder / f'{part}.bin', np.uint16, 'r') for part in ('train', 'val'))
        d_vocab, kind = meta['d_vocab'], meta['tokenizer']
        characters = {'char': meta.get('characters'), 'gpt2': None}[kind]
        known = 50257 if characters is None else len(set(''.join(characters)))
        if not d_vocab == known == len(characters or range(known)) or max(train.max(), val.max()) >= known:
            raise ValueError(f'its tokens are not its vocabulary of {known}')
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        fail(f'no data in {folder}, see prepare_data.py: {error}')
    text = knobs.text = {'tokens': fingerprint(json.dumps(characters).encode()), 'data': fingerprint(train)}
    old = knobs.checkpoint['text'] if knobs.checkpoint else text
    if old.get('tokens') != text['tokens'] or knobs['init_from'] == 'resume' and old != text:
        fail(f'{folder} is not what --init_from={knobs["init_from"]} was trained on')
    encoding = None if characters else gpt2_encoding()

    def decode(tokens):
        if characters:
            return [characters[token] for token in tokens]
        utf8 = codecs.getincrementaldecoder('utf-8')('replace')
        return [utf8.decode(encoding.decode_single_token_bytes(token)) for token in tokens]
    return train, val, d_vocab, decode


# ---- optimiser, schedule, sampling ----

def make_optimizer(model, learning_rate, weight_decay, betas=(.9, .98), recorded=False):
    """AdamW; biases and norms do not decay. recorded: for a CUDA graph."""
    groups = [{'params': [p for p in model.parameters() if p.dim() >= 2], 'weight_decay': weight_decay},
              {'params': [p for p in model.parameters() if p.dim() < 2], 'weight_decay': 0.}]
    device = groups[0]['params'][0].device
    recorded = recorded and device.type == 'cuda'
    rate = torch.tensor(learning_rate, device=device) if recorded else learning_rate
    return torch.optim.AdamW(groups, lr=rate, betas=betas, fused=device.type != 'mps', capturable=recorded)


def schedule(optimizer, learning_rate, step, max_steps, warmup_steps=50, cosine=False):
    """Warm-up, then linear decay to 0 over the second half; cosine: from warm-up on, to a tenth."""
    factor = 2 * (1 - step / max_steps)
    if cosine:
        done = max(0, step - warmup_steps) / max(1, max_steps - warmup_steps)
        factor = .55 + .45 * math.cos(math.pi * done)
    rate = learning_rate * min(1, (step + 1) / (warmup_steps + 1), factor)
    for group in optimizer.param_groups:
        group['lr'] = group['lr'].fill_(rate) if torch.is_tensor(group['lr']) else rate


def fused(function):
    """Compile a function, but only inside recorded(..., fuse=True)."""
    compiled = functools.cache(lambda: torch.compile(function, dynamic=False))

    def run(*args, **kw):
        compile = fusing and not torch.compiler.is_compiling()
        return (compiled() if compile else function)(*args, **kw)
    return run


long_cumsum = torch.compiler.disable(lambda p: p.cumsum(-1))  # torch 2.11 cannot compile it


@fused
def sample(logits, noise, temperature=1., epsilon=0., bias=0.):
    """Tokens (N,) drawn by inverting the distribution function: only noise (N,) in [0, 1) decides. logits:
    (N, V). temperature: 0 takes the likeliest token. epsilon: share of uniform draws."""
    log_p = logits.float() + bias
    if temperature == 0:
        return log_p.argmax(-1)
    log_p = (log_p / temperature).log_softmax(-1)
    if epsilon:
        log_p = ((1 - epsilon) * log_p.exp() + epsilon / log_p.shape[-1]).log()
    p = log_p.exp()
    below = p.cumsum(-1) if p.shape[-1] <= 8192 else long_cumsum(p)  # (N, V)
    target = noise[:, None] * below[:, -1:] * (1 - 2**-22)
    return (below <= target).sum(-1)


# ---- what rollouts are worth, and whether thoughts are used ----

def finite(rewards, otherwise=0.):
    """Rewards (N, G), infinite ones clamped to the group's finite ones; if it has none, `otherwise`."""
    known = rewards.isfinite()
    low = rewards.masked_fill(~known, torch.inf).amin(1, keepdim=True)
    high = rewards.masked_fill(~known, -torch.inf).amax(1, keepdim=True)
    unknown = torch.where(rewards.isnan(), rewards, otherwise)
    return torch.where(low <= high, rewards.clamp(low, high), unknown)


def centred(rewards):
    """R - mean of the group (N, G)."""
    rewards = finite(rewards)
    return rewards - rewards.mean(1, keepdim=True)


def quantile(rewards, among):
    """Normal quantiles of ranks of rewards (N, G) among (N, n) or (n,) others (rankit, Bliss 1967)."""
    rewards, ordered = rewards.contiguous(), among.sort(-1).values
    below, up_to = (torch.searchsorted(ordered, rewards, right=right) for right in (False, True))
    scores = torch.special.ndtri((below + up_to).to(rewards.dtype) / (2 * ordered.shape[-1]))
    return torch.where(rewards.isnan(), rewards, scores)


def softmax(scores):
    """Softmax over rows (N, G), its limit if infinite."""
    return scores.clamp(-1e30, 1e30).softmax(1)


ADVANTAGES = {  # of rewards R (N, G), temperature t, baseline b, the batch's rewards B, log-probabilities p
    'raw': lambda R, t, b, B, p: finite(R),
    'reinforce': lambda R, t, b, B, p: finite(R, b) - b,  # Williams 1992
    'dr_grpo': lambda R, t, b, B, p: centred(R),  # Liu et al. 2025
    'rloo': lambda R, t, b, B, p: centred(R) * R.shape[1] / max(1, R.shape[1] - 1),  # Ahmadian et al. 2024
    # Shao et al. 2024. Questions with rare successes count more
    'grpo': lambda R, t, b, B, p: centred(R) / (centred(R).square().mean(1, keepdim=True).sqrt() + 1e-6),
    'batch_std': lambda R, t, b, B, p: centred(R) / (finite(B).std(correction=0) + 1e-6),
    'quantile': lambda R, t, b, B, p: centred(quantile(R, R)),
    'quantile_batch': lambda R, t, b, B, p: centred(quantile(R, B.flatten())),
    'softmax_centred': lambda R, t, b, B, p: R.shape[1] * softmax(R / t) - 1,
    # Kaddour 2026: the policy over the group goes to itself times exp(grpo / t)
    'tpo': lambda R, t, b, B, p: R.shape[1] * (
        (p + ADVANTAGES['grpo'](R, t, b, B, p) / t).softmax(1) - p.softmax(1)),
    'softmax': lambda R, t, b, B, p: softmax(R / t),  # advantage-weighted regression, Peng et al. 2019
    'softmax_quantile': lambda R, t, b, B, p: softmax(quantile(R, R) / t),
    'best': lambda R, t, b, B, p: torch.zeros_like(R).scatter(1, R.argmax(1, keepdim=True), 1.)}
SUM_TO_ONE = {'softmax', 'softmax_quantile', 'best'}  # weights of a group; the others are advantages
NEED_GROUPS = ADVANTAGES.keys() - SUM_TO_ONE - {'raw', 'reinforce'}  # always 0 in a group of one


def advantages(rewards, kind, tau=1., baseline=0., batch=None, log_pi=None):
    """Weights (N, G) of rollouts by rewards (N, G): the loss is -sum of weight * log-probability in a group.
    baseline: of reinforce, a number or (N, 1). batch: rewards of all processes. log_pi: (N, G), of tpo."""
    weights = ADVANTAGES[kind](rewards, tau, baseline, rewards if batch is None else batch, log_pi)
    return weights if kind in SUM_TO_ONE else weights / rewards.shape[1]


def concentration(weights):
    """Of absolute weights (N, G): the largest share, 1 / sum of squared shares; means over groups."""
    share = weights.abs() / weights.abs().sum(1, keepdim=True).clamp(min=1e-9)
    effective = (1 / share.square().sum(1).clamp(min=1e-9)).clamp(max=weights.shape[1])
    return {'max_weight': share.max(1).values.mean().item(), 'effective_n': effective.mean().item()}


def balanced_target(scores, prices, tau, n_steps=10):
    """How to write answers, log softmax(scores / tau - prices), (answers, codes), and new prices
    (codes,), 0 at first, which rise until no more than its share of answers want a code. Sinkhorn's iteration
    (Cuturi 2013), prices not below 0 as in an auction (Bertsekas 1988)."""
    n_answers, n_codes = scores.shape
    log_share = math.log(max(1., n_answers / n_codes))
    wanted = scores / tau
    for _ in range(n_steps):
        log_target = (wanted - prices).log_softmax(1)
        prices = (prices + log_target.logsumexp(0) - log_share).clamp(min=0)
    return (wanted - prices).log_softmax(1), prices


@torch.no_grad()
def judge(answering, thoughts, right):
    """A policy's answers (n,) to thoughts (n, T), the share that are `right`, the bits that it got."""
    found = []
    for part, answer in zip(thoughts.split(4096), right.split(4096)):
        part, row = F.pad(part, (0, 1)).unique(dim=0, return_inverse=True)  # each once; padded, as T may be 0
        log_p = answering.answer(part[:, :-1]).float().log_softmax(-1)
        found.append((log_p.argmax(-1)[row], log_p[row, answer]))
    answers, log_q = (torch.cat(each) for each in zip(*found))
    # a lower bound of mutual information (Barber and Agakov 2003)
    bits = math.log2(answering.config.d_normal_vocab) + log_q.mean().item() / math.log(2)
    return answers, (answers == right).sum().item() / len(right), max(0., bits)


def ablations(thoughts, choices, seed=0):
    """What replaces thoughts (N, T) of range `choices` to see if they are used: {name: thoughts}."""
    generator, (N, T) = torch.Generator().manual_seed(seed), thoughts.shape
    rows, counts = thoughts.cpu().unique(dim=0, return_counts=True)
    order = torch.randperm(N, generator=generator).to(thoughts.device)
    replaced = {'own': thoughts, 'shuffled': thoughts[order],
                'random': torch.randint(choices.start, choices.stop, (N, T), generator=generator),
                'constant': rows[counts.argmax()].expand(N, T), 'none': thoughts[:, :0]}
    return {name: x.to(thoughts.device) for name, x in replaced.items()}


# ---- colours and pictures ----

COLOURS = {'red': 31, 'green': 32, 'blue': 34, 'magenta': 35, 'cyan': 36}


def paint(text, colour):
    return f'\033[{COLOURS[colour]}m{text}\033[0m'


def plain(text):
    """Text without colours."""
    return re.sub('\033\\[[0-9;]*m', '', text)


def printable(text):
    """Text without control characters but colours."""
    return re.sub('(?!\033\\[(0|3[1-6])m)[\0-\x08\x0b-\x1f\x7f-\x9f]', '?', text)


def as_html(text):
    """Coloured text as HTML."""
    text = html.escape(text).replace('\033[0m', '</span>')
    for colour, number in COLOURS.items():
        text = text.replace(f'\033[{number}m', f'<span style="color:dark{colour}">')
    return f'<div style="white-space:pre-wrap;overflow-wrap:anywhere">{text}</div>'


def show_tokens(tokens, config, decode, between=' '):
    """Coloured text of tokens. decode: texts of normal ones. With no `between`: <think3,17,40,…>."""
    n_normal, end = getattr(config, 'd_normal_vocab', config.d_vocab), getattr(config, 'end_thought', None)
    tokens = [int(token) for token in tokens]
    texts = iter(decode([token for token in tokens if token < n_normal]))
    text = between.join(paint(next(texts), 'blue') if token < n_normal else
                        paint('<end_thought>', 'magenta') if token == end else
                        paint(f'<think{token - n_normal}>', 'cyan') for token in tokens)
    if not between:
        text = re.sub(r'(<think\d+,\d+,\d+),[\d,]+', r'\1,…', text.replace('>\033[0m\033[36m<think', ','))
    return text


def picture(n_panels, title, heights=None):
    """An empty figure."""
    figure = need('plotly.subplots', 'to plot').make_subplots(n_panels, 1, row_heights=heights)
    return figure.update_layout(title=title, width=900, height=800, legend={'orientation': 'h'})


def heat_map(figure, panel, counts, x_title, x, y_title, y):
    """Draw counts (len(y), len(x)) into a panel; x, y: names."""
    where = {'row': panel, 'col': 1}
    figure.add_heatmap(z=counts.int().cpu().numpy(), x=x, y=y, colorscale='Blues', showscale=False, **where)
    figure.update_xaxes(title=x_title, type='category', tickangle=90, **where)
    figure.update_yaxes(title=y_title, type='category', **where)


def curve(figure, panel, run, name, colour):
    """Draw a logged number into a panel."""
    log = map(json.loads, (run.folder / 'metrics.jsonl').read_text().splitlines())
    steps, values = zip(*((line['step'], line[name]) for line in log if name in line))
    figure.add_scatter(x=steps, y=values, name=name.replace('_', ' '), line_color=colour, row=panel, col=1)


# ==== Fast paths: they change no result, tests compare each with its slow form ====

fusing = False  # whether @fused functions are compiled
recording = False  # whether a recorded function runs: nothing may depend on values
FEW = 8  # keys up to which attention is written out


def recorded(function, fuse=False):
    """A function of tensors as a CUDA graph: its second call on a GPU records its kernels, later ones launch
    them at once. Shapes and other arguments must not change, weights change in place, the next call
    overwrites results. fuse: compile @fused functions."""
    graph = given = result = None

    def call():
        global fusing, recording
        fusing, recording = fuse, True
        try:  # keep no weights that autocast has cast
            with torch.autocast('cuda', cache_enabled=False, dtype=torch.get_autocast_dtype('cuda'),
                                enabled=torch.is_autocast_enabled('cuda')):
                return function(*given)
        finally:
            fusing = recording = False

    def run(*arguments):
        nonlocal graph, given, result
        if arguments[0].device.type != 'cuda':
            return function(*arguments)
        if given is None:  # libraries set themselves up
            given = [x.clone() if torch.is_tensor(x) else x for x in arguments]
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
            if torch.is_tensor(x):
                mine.copy_(x)
        graph.replay()
        return result
    return run


def causal(n_query, n_key, device):
    """(n_query, n_key), True where the last n_query of n_key tokens may look."""
    return torch.ones(n_query, n_key, dtype=torch.bool, device=device).tril(n_key - n_query)


def attention(q, k, v, mask=None, dropout=0.):
    """F.scaled_dot_product_attention for the last Sq of Sk tokens. mask: as there; None: causal."""
    n_query, n_key, few = q.shape[2], k.shape[2], k.shape[2] <= FEW
    if n_key == 1 and not dropout:
        return v  # else q, k get rounding errors as gradients
    if mask is None and (few or n_query not in (1, n_key)):
        mask = causal(n_query, n_key, q.device)
    if not few:
        is_causal = mask is None and n_query > 1
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, dropout_p=dropout)
    if mask.dtype is torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
    if q.is_cuda or n_query == 1:  # not thousands of tiny products
        scores = (q[:, :, :, None] * k[:, :, None]).sum(-1) * q.shape[-1] ** -.5 + mask  # (B, H, Sq, Sk)
        return (F.dropout(scores.softmax(-1), dropout)[..., None] * v[:, :, None]).sum(3).to(v.dtype)
    return F.dropout((q @ k.transpose(-2, -1) * q.shape[-1] ** -.5 + mask).softmax(-1), dropout) @ v


def has_kernel(device, d_head):
    """Whether attend_to_cache serves heads of this size, without gradients."""
    on_gpu = triton is not None and device is not None and device.type == 'cuda'
    return on_gpu and d_head in (16, 32, 64, 128) and not torch.is_grad_enabled()


def attend_to_cache(layer, q, k, v, cache):
    """attention(q, *cache.append(layer, k, v)) of a token (B, H, 1, D), reading the cache once."""
    (B, H, _, D), out = q.shape, torch.empty_like(q, memory_format=torch.contiguous_format)
    if not q.stride() == k.stride() == v.stride():
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    block, num_warps = (32, 1) if B * H > 500 else (128, 4)
    keys, values = cache.kv[layer]
    attend_kernel[(B * H,)](q, k, v, keys, values, out, cache.on_device, keys.shape[2], *q.stride()[:2], H, D,
                            block, num_warps=num_warps)
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
            s = start + tl.arange(0, block)[:, None]  # (block, 1)
            key = tl.load(keys + old + s * D, s < n, 0.).to(tl.float32)  # (block, D)
            value = tl.load(values + old + s * D, s < n, 0.).to(tl.float32)
            score = tl.where(s < n, tl.sum(query * key, 1, keep_dims=True), -float('inf'))
            best = tl.maximum(top, tl.max(score))
            p, keep = tl.exp(score - best), tl.exp(top - best)
            top, total, mix = best, total * keep + tl.sum(p), mix * keep + tl.sum(p * value, 0)
        tl.store(out + row * D + d, (mix / total).to(new_v.dtype))


def distinct(numbers):
    """Different numbers (C,) among numbers (...), and where each is, (...); all numbers if recorded."""
    if recording:
        return numbers.flatten(), torch.arange(numbers.numel(), device=numbers.device).view(numbers.shape)
    return numbers.unique(return_inverse=True)


def think_merged(model, cache, question, choices, noise, stop, temperature, epsilon):
    """GPT2Thinking.think(grad=True) from an empty cache: rollouts alike so far are read once."""
    def alike(which, column):  # group (N,) of each row, by its old group and a token (N,); one row (n,) each
        which = (which * (column.max() + 1) + column).unique(return_inverse=True)[1]
        one = torch.empty_like(which[:which.max() + 1])
        return which, one.scatter_(0, which, torch.arange(len(which), device=which.device))

    which = torch.zeros_like(question[:, 0])
    for column in question.T:
        which, rows = alike(which, column)
    new, alive, written, token = question[rows], torch.ones_like(which, dtype=torch.bool), [], None
    for t in range(noise.shape[1]):
        if t:
            last, (which, rows) = which, alike(which, token)
            cache.select(last[rows])
            new = token[rows, None]
        states = model.hidden(new, cache, first=-1)[:, 0]  # (n, d_model)
        logits = model.logits(states, choices).float()  # (n, L)
        log_p = logits.log_softmax(-1)
        with torch.no_grad():
            token = choices.start + sample(logits[which], noise[:, t], temperature, epsilon)  # (N,)
            token = token if stop is None else torch.where(alive, token, stop)
        log_prob = log_p[which].gather(-1, (token - choices.start)[:, None])[:, 0]
        entropy = -(log_p.exp() * log_p).sum(-1)[which]
        written.append((token, torch.where(alive, log_prob, 0.), torch.where(alive, entropy, 0.)))
        alive = alive & (token != stop)
    return [torch.stack(each, dim=1) for each in zip(*written)]

"""
Every number in the README: this script measures it, keeps the raw results in assets/results/ and writes the tables.

    python bench.py                             # all runs of the learning table that belong on this machine
    python bench.py --only=blind --seeds=2      # those of one row
    python bench.py --suite=tables              # no runs: the README's tables from assets/results/

A result file names the command, the hardware, the versions and the commit, and holds the last line of every run.
"""
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from statistics import mean

import torch

from utils import fail, git_commit, read_knobs, write_atomic

# ---- knobs ----------------------------------------------------------------------------------------------------------
suite = 'learning'              # 'learning' | 'tables'
only = ''                       # name of one row; empty: all
seeds = 5                       # runs of each row, with seeds 0, 1, ...

knobs = read_knobs(__file__, globals())

# ---- what is run ----------------------------------------------------------------------------------------------------
# name of the row: (device it belongs on, script, knobs, what it shows)
FIVE_DIGITS = '--encoding=digits --input_min=10000 --input_max=100000 --n_layer=2 --max_steps=6000 --weight_decay=.3'
LEARNING = {
    'blind': ('cpu', 'add_think_blind.py', '', 'two thoughts of ten tokens'),
    'blind-one': ('cpu', 'add_think_blind.py', '--d_thought_vocab=100 --think_len=1', 'one of a hundred tokens'),
    'normal': ('cpu', 'add_normal.py', '', 'the control: no thoughts, same size and steps'),
    'digits': ('cpu', 'add_normal.py', '--encoding=digits --input_max=1000', 'text, highest digit first'),
    'digits-lsb': ('cpu', 'add_normal.py', '--encoding=digits --input_max=1000 --digit_order=lsb', 'lowest first'),
    'blind-gpu': ('cuda', 'add_think_blind.py', '', 'the main job'),
    'digits-5': ('cuda', 'add_normal.py', FIVE_DIGITS, 'five digits, highest first'),
}
ROOT = Path(__file__).parent
RESULTS = ROOT / 'assets' / 'results'


def hardware():
    """What the runs are measured on, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    if Path('/proc/cpuinfo').exists():
        name = re.search(r'model name\s*: (.*)', Path('/proc/cpuinfo').read_text()).group(1)
    return f'{name}, {os.cpu_count()} cores'


def measure(name):
    """Run a row's command with every seed; write assets/results/learning-<name>.json."""
    _, script, arguments, _ = LEARNING[name]
    command, runs = f'python {script} {arguments}'.strip(), []
    for seed in range(seeds):
        print(f'{command} --seed={seed}', flush=True)
        run = subprocess.run([sys.executable, ROOT / script, *arguments.split(), f'--seed={seed}',
                              f'--out_dir=out/bench/{name}/{seed}'], stdout=subprocess.PIPE, text=True)
        if run.returncode:
            fail(f'{command} --seed={seed} ended with exit code {run.returncode}')
        runs.append(json.loads(run.stdout.splitlines()[-1]))
        print(json.dumps(runs[-1]), flush=True)
    result = {'command': command, 'hardware': hardware(), 'torch': torch.__version__, 'commit': git_commit(),
              'runs': runs}
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_atomic(RESULTS / f'learning-{name}.json', lambda path: path.write_text(json.dumps(result, indent=1) + '\n'))


# ---- tables ---------------------------------------------------------------------------------------------------------

def spread(values, n_digits):
    """Mean and range of some numbers, one number where they are all the same."""
    low, high = (f'{v:.{n_digits}f}' for v in (min(values), max(values)))
    return low if low == high else f'{mean(values):.{n_digits}f} ({low} to {high})'


def learning_table():
    """The README's learning table, in Markdown, from the result files there are."""
    lines = ['| command | what | training | held out | shuffled / random / constant / none | seconds | seeds | on |',
             '|---|---|---|---|---|---|---|---|']
    for name, (_, _, _, what) in LEARNING.items():
        if not (path := RESULTS / f'learning-{name}.json').exists():
            continue
        result = json.loads(path.read_text())
        runs, ablation = result['runs'], '-'
        if 'ablation' in runs[0]:
            ablation = ' / '.join(f'{mean(run["ablation"][kind] for run in runs):.3f}'
                                  for kind in ('shuffled', 'random', 'constant', 'none'))
        accuracy, heldout, seconds = (spread([run[key] for run in runs], n_digits) for key, n_digits in
                                      (('accuracy', 4), ('heldout_accuracy', 4), ('seconds', 0)))
        lines.append(f'| `{result["command"]}` | {what} | {accuracy} | {heldout} | {ablation} | {seconds} '
                     f'| {len(runs)} | {result["hardware"]} |')
    return '\n'.join(lines)


def write_tables():
    """Put the tables into the README, between their marks."""
    text = (ROOT / 'README.md').read_text()
    for name, table in {'learning': learning_table()}.items():
        begin, end = f'<!-- {name} -->\n', f'\n<!-- end of {name} -->'
        if begin not in text or end not in text:
            fail(f'README.md has no marks {begin.strip()} and {end.strip()}')
        text = text[:text.index(begin)] + begin + table + text[text.index(end):]
    write_atomic(ROOT / 'README.md', lambda path: path.write_text(text))


# ---- run ------------------------------------------------------------------------------------------------------------
if only and only not in LEARNING:
    fail(f'--only={only} must be one of {", ".join(LEARNING)}')
if suite == 'learning':
    here = 'cuda' if torch.cuda.is_available() else 'cpu'
    for name, (device, *_) in LEARNING.items():
        if name == only or not only and device == here:
            measure(name)
write_tables()
print(learning_table())

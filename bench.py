"""
Every number in the README: this script measures it, keeps the raw results in assets/results/ and writes the tables.

    python bench.py                                 # all runs of the first table that belong on this machine
    python bench.py --only=digits --seeds=3         # those of one row
    python bench.py --suite=ablation --seeds=3      # another table
    python bench.py --suite=tables                  # no runs: the README's tables from assets/results/

A result file names the command, the hardware, the version of torch and the commit (null where git is not at hand), and
holds the last line of every run. A row is measured on a CPU or on a GPU, whichever it belongs on.
"""
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean

import torch

from utils import device_name, fail, git_commit, read_knobs, write_atomic

# ---- knobs ----------------------------------------------------------------------------------------------------------
suite = 'learning'              # 'learning' | 'ablation' | 'tables'
only = ''                       # name of one row; empty: all
seeds = 5                       # runs of each row, with seeds 0, 1, ...

knobs = read_knobs(__file__, globals())

# ---- what is run ----------------------------------------------------------------------------------------------------
DIGITS = '--encoding=digits --input_max=1000 --max_steps=1000'
SUITES = {  # suite: {row: (device it belongs on, script, knobs, what it shows)}
    'learning': {
        'blind': ('cpu', 'add_think_blind', '', 'two thoughts of ten tokens'),
        'blind-one': ('cpu', 'add_think_blind', '--d_thought_vocab=100 --think_len=1', 'one of a hundred tokens'),
        'blind-few': ('cpu', 'add_think_blind', '--d_thought_vocab=9', '81 codes for 100 answers: at best .81'),
        'normal': ('cpu', 'add_normal', '', 'the control: no thoughts'),
        'digits': ('cpu', 'add_normal', DIGITS, 'text, highest digit first'),
        'digits-lsb': ('cpu', 'add_normal', f'{DIGITS} --digit_order=lsb', 'lowest digit first'),
        'blind-gpu': ('cuda', 'add_think_blind', '--max_steps=1000', 'the main job, two thirds of the steps'),
        'digits-5': ('cuda', 'add_normal', '--encoding=digits --input_min=10000 --input_max=100000 --max_steps=6000',
                     'five digits, highest first'),
    },
    'ablation': {
        'whole': ('cuda', 'add_think_blind', '--max_steps=1000', 'the whole recipe'),
        'balance': ('cuda', 'add_think_blind', '--max_steps=1000 --balance_steps=0', 'codes without prices'),
        'tau': ('cuda', 'add_think_blind', '--max_steps=1000 --tau=10', 'no amplification'),
        'decay': ('cuda', 'add_think_blind', '--max_steps=1000 --weight_decay=0', 'no weight decay'),
        'heads': ('cuda', 'add_think_blind', '--max_steps=1000 --n_head=4', '4 heads of 32, not 32 of 4'),
    },
}
ROOT = Path(__file__).parent
RESULTS = ROOT / 'assets' / 'results'


def measure(suite, row):
    """Run a row's command with every seed; write assets/results/<suite>-<row>.json."""
    device, script, arguments, _ = SUITES[suite][row]
    command = f'python {script}.py {arguments}'.strip()
    result = {'command': command, 'hardware': device_name(device), 'torch': torch.__version__, 'commit': git_commit(),
              'runs': []}
    for seed in range(seeds):
        print(f'{command} --seed={seed}', flush=True)
        run = subprocess.run([sys.executable, ROOT / f'{script}.py', *arguments.split(), f'--seed={seed}',
                              f'--device={device}', f'--out_dir=out/bench/{suite}-{row}/{seed}'],
                             stdout=subprocess.PIPE, text=True)
        if run.returncode:
            fail(f'{command} --seed={seed} ended with exit code {run.returncode}')
        result['runs'].append(json.loads(run.stdout.splitlines()[-1]))
        print(json.dumps(result['runs'][-1]), flush=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_atomic(RESULTS / f'{suite}-{row}.json', lambda path: path.write_text(json.dumps(result, indent=1) + '\n'))


# ---- tables ---------------------------------------------------------------------------------------------------------

def spread(values, n_digits):
    """Mean and range of some numbers, one number where they are all the same."""
    low, high = (f'{v:.{n_digits}f}' for v in (min(values), max(values)))
    return low if low == high else f'{mean(values):.{n_digits}f} ({low} to {high})'


def columns(suite, runs):
    """What a suite's table says of the runs of a row: {heading: text}."""
    said = {'training': spread([run['accuracy'] for run in runs], 4),
            'held out': spread([run['heldout_accuracy'] for run in runs], 4)}
    if suite == 'learning':
        kinds = ('shuffled', 'random', 'constant', 'none')
        said[' / '.join(kinds)] = ' / '.join(f'{mean(run["ablation"][kind] for run in runs):.3f}' for kind in kinds
                                             ) if 'ablation' in runs[0] else ''
        said['seconds'] = spread([run['seconds'] for run in runs], 0)
    if suite == 'ablation':
        said['codes written'] = spread([run['codes'] for run in runs], 0)
    return said


def table(suite):
    """A suite's table in Markdown, from the result files there are."""
    lines = []
    for row, (_, _, _, what) in SUITES[suite].items():
        if (path := RESULTS / f'{suite}-{row}.json').exists():
            result = json.loads(path.read_text())
            cells = {'command': f'`{result["command"]}`', '': what, **columns(suite, result['runs']),
                     'seeds': str(len(result['runs'])), 'on': f'{result["hardware"]}, torch {result["torch"]}'}
            if not lines:
                lines = [cells, ['---'] * len(cells)]
            lines.append(cells.values())
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def write_tables():
    """Put the tables into the README, between their marks."""
    text = (ROOT / 'README.md').read_text()
    for suite in SUITES:
        begin, end = f'<!-- {suite} -->\n', f'<!-- end of {suite} -->'
        if begin not in text or end not in text:
            fail(f'README.md has no marks {begin.strip()} and {end}')
        text = text[:text.index(begin)] + begin + table(suite) + '\n' + text[text.index(end):]
    write_atomic(ROOT / 'README.md', lambda path: path.write_text(text))


# ---- run ------------------------------------------------------------------------------------------------------------
if suite != 'tables':
    if only and only not in SUITES[suite]:
        fail(f'--only={only} must be one of {", ".join(SUITES[suite])}')
    here = 'cuda' if torch.cuda.is_available() else 'cpu'
    rows = [row for row, (device, *_) in SUITES[suite].items() if row == only or not only and device == here]
    if not rows:
        fail(f'no row of the {suite} suite belongs on a machine with {here}')
    for row in rows:
        measure(suite, row)
    print(table(suite))
write_tables()

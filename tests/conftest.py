"""How the tests run the scripts: in a process of their own where that matters, else in this one."""
import functools
import gc
import json
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

import utils
from model import GPT2, ModelConfig

torch.set_num_threads(1)  # tiny models are faster so
ROOT = Path(__file__).parent.parent
TEXT = tempfile.TemporaryDirectory()  # 40 words of 14 characters, repeated, and models for them
TORCHRUN = sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2'
ALL = ['--n_head=2', '--d_model=16', '--max_steps=6', '--eval_every=3', '--log_every=1', '--device=cpu']
OF_TEXT = [*ALL, f'--data={TEXT.name}', '--n_layer=1', '--d_thought_vocab=5', '--warmup_steps=2']
TINY = {
    'add_normal': [*ALL, '--input_max=7', '--batch_size=16'],
    'add_think_blind': [*ALL, '--input_max=7', '--d_thought_vocab=7', '--think_len=1', '--batch_size=16'],
    'add_think': [*ALL, '--input_max=3', '--k=3', '--advance_at=.3', '--batch_size=8', '--group_size=4',
                  '--d_thought_vocab=5', '--eval_questions=20', '--enough=2'],
    'autoencoder_think': [*ALL, '--input_max=8', '--d_thought_vocab=3', '--batch_size=8', '--inner_steps=2'],
    'supervised_rollout_think': [*OF_TEXT, '--text_len=8', '--batch_size=8', '--eval_sequences=10',
                                 '--thought_kind=token', '--readers=own', '--think_len=1', '--at_once=1',
                                 '--gate=learned'],
    'rollout_think': [
        *ALL[2:], f'--data={TEXT.name}', '--d_thought_vocab=5', '--warmup_steps=2', '--prefix_len=5',
        f'--init_from={TEXT.name}/start.pt', f'--reference={TEXT.name}/judge.pt', '--text_len=6',
        '--batch_size=4', '--group_size=4', '--eval_prefixes=10']}


# tiny data in the form that prepare_data.py leaves
characters = sorted('\n abcdefghijkl')
words = np.random.default_rng(0).integers(2, len(characters), size=(40, 4))
text = np.pad(words, ((0, 0), (0, 1)), constant_values=1).flatten()  # a space behind each word
for part, n in (('train', 20), ('val', 3)):
    np.tile(text, n).astype(np.uint16).tofile(f'{TEXT.name}/{part}.bin')
meta = {'tokenizer': 'char', 'characters': characters, 'd_vocab': len(characters)}
Path(TEXT.name, 'meta.json').write_text(json.dumps(meta))

torch.manual_seed(0)
JUDGE, START = (GPT2(ModelConfig(d_vocab=14, block_size=16, n_layer=1, n_head=2, d_model=16)) for _ in 'ab')
EMPTY = {name: kind() for name, kind in utils.CHECKPOINT.items()}
EMPTY['text'] = {'tokens': utils.fingerprint(json.dumps(characters).encode())}
for file, name, it in (('judge', 'model', JUDGE), ('start', 'model', START), ('other', 'other', JUDGE)):
    torch.save(EMPTY | {'models': {name: utils.pack(it)}}, f'{TEXT.name}/{file}.pt')


@pytest.fixture(scope='session', autouse=True)
def nothing_is_left_in_the_checkout():
    """Tests write their runs elsewhere."""
    before = set(ROOT.glob('out/*/*'))
    yield
    assert set(ROOT.glob('out/*/*')) == before


def start(script, *arguments, launcher=(sys.executable,), env=()):
    """Start a script with its tiny knobs and more; a running process."""
    command = [*launcher, ROOT / f'{script}.py', *TINY[script], *arguments]
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'NO_COLOR': '1', **dict(env)}
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)


def run(script, *arguments, env=()):
    """Run a script with its tiny knobs and more. Returns the JSON object of its last line."""
    process = start(script, *arguments, env=env)
    out, err = process.communicate(timeout=300)
    return result_of((process.returncode, out, err))


@pytest.fixture
def run_here(monkeypatch, capsys, tmp_path):
    """Run a script in this process: (exit code, stdout, stderr). Quicker, as torch is loaded."""
    monkeypatch.chdir(tmp_path)

    def run_here(script, *arguments):
        monkeypatch.setattr(sys, 'argv', [f'{script}.py', *TINY.get(script, ()), *arguments])
        capsys.readouterr()
        code, utils.Run.where = 0, ''
        try:
            runpy.run_path(str(ROOT / f'{script}.py'), run_name='__main__')
        except SystemExit as error:
            code = error.code or 0
        except Exception as error:  # what the interpreter does with it
            try:
                utils.excepthook(type(error), error, error.__traceback__)
            except SystemExit as end:
                code = end.code
            else:
                raise
        if code and 'out_dir' in str(arguments):
            gc.collect()  # closes its files
        out, err = capsys.readouterr()
        return code, out, err
    return run_here


def result_of(ran):
    """The last line, a JSON object, of a script that ran to its end: (exit code, stdout, stderr)."""
    code, out, err = ran
    assert code == 0, err
    return json.loads(out.splitlines()[-1])


def interrupt(step, run_here, *arguments):
    """Run a script in this process until it logs this step."""
    def breaks(self, at, log=utils.Run.log, **numbers):
        if at == step:
            raise KeyboardInterrupt
        log(self, at, **numbers)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(utils.Run, 'log', breaks)
        run_here(*arguments)
    gc.collect()  # closes its files, as the end of a process does


def metrics(folder):
    """The lines of metrics.jsonl but for the speeds and times in them."""
    lines = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    times = ('seconds', 'tokens_per_second', 'mfu')
    return [{name: value for name, value in line.items() if name not in times} for line in lines]


@pytest.fixture
def names_of(monkeypatch, tmp_path):
    """The names of a script that ran with more knobs, but trained and wrote nothing."""
    def names_of(name, *more):
        always = '--eval_only=True', f'--out_dir={tmp_path}/e'
        monkeypatch.setattr(sys, 'argv', [f'{name}.py', *TINY[name], *always, *more])
        return runpy.run_path(str(ROOT / f'{name}.py'))
    return names_of


@pytest.fixture
def script(request, names_of):
    """The same for the test module's SCRIPT."""
    return functools.partial(names_of, request.module.SCRIPT)

"""How the tests run the scripts: in a process of their own where that matters, in this one where it does not."""
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

from model import GPT2, ModelConfig, pack

torch.set_num_threads(1)    # tiny models are faster so
ROOT = Path(__file__).parent.parent
TEXT = tempfile.TemporaryDirectory()     # data as prepare_data.py makes it: 40 words again and again, 14 characters
TINY = {'add_think_blind': ['--input_max=7', '--d_thought_vocab=7', '--think_len=1', '--batch_size=16', '--d_model=16',
                            '--n_head=2', '--max_steps=6', '--eval_every=3', '--log_every=1', '--device=cpu'],
        'add_think': ['--input_max=3', '--k=3', '--advance_at=.3', '--batch_size=8', '--group_size=4', '--d_model=16',
                      '--n_head=2', '--d_thought_vocab=5', '--max_steps=6', '--eval_every=3', '--log_every=1',
                      '--eval_questions=20', '--enough=2', '--device=cpu'],
        'add_normal': ['--input_max=7', '--batch_size=16', '--d_model=16', '--n_head=2', '--max_steps=6',
                       '--eval_every=3', '--log_every=1', '--device=cpu'],
        'autoencoder_think': ['--input_max=8', '--d_thought_vocab=3', '--batch_size=4', '--d_model=16', '--n_head=2',
                              '--inner_steps=2', '--max_steps=6', '--eval_every=3', '--log_every=1', '--device=cpu'],
        'supervised_rollout_think': [f'--data={TEXT.name}', '--text_len=8', '--batch_size=8', '--n_layer=1',
                                     '--n_head=2', '--d_model=16', '--d_thought_vocab=5', '--warmup_steps=2',
                                     '--max_steps=6', '--eval_every=3', '--log_every=1', '--eval_sequences=10',
                                     '--device=cpu', '--thought=token', '--readers=own', '--think_len=1', '--at_once=1',
                                     '--spread=1', '--temperature=1', '--gate=learned'],
        'rollout_think': [f'--data={TEXT.name}', f'--reference={TEXT.name}/judge.pt', '--prefix_len=5', '--text_len=6',
                          '--batch_size=4', '--group_size=4', '--n_layer=1', '--n_head=2', '--d_model=16',
                          '--d_thought_vocab=5', '--warmup_steps=2', '--max_steps=6', '--eval_every=3',
                          '--eval_prefixes=10', '--device=cpu']}


def make_text(folder):
    """Tiny data in the form that prepare_data.py leaves."""
    characters = sorted('\n abcdefghijkl')
    words = np.random.default_rng(0).integers(2, len(characters), size=(40, 4))
    tokens = np.pad(words, ((0, 0), (0, 1)), constant_values=1).flatten()      # a space behind each word
    for part, n in (('train', 20), ('val', 3)):
        np.tile(tokens, n).astype(np.uint16).tofile(f'{folder}/{part}.bin')
    (Path(folder) / 'meta.json').write_text(json.dumps(
        {'tokenizer': 'char', 'characters': characters, 'd_vocab': len(characters)}))


make_text(TEXT.name)
torch.manual_seed(0)
JUDGE = GPT2(ModelConfig(d_vocab=14, block_size=16, n_layer=1, n_head=2, d_model=16))
for name in ('model', 'other'):
    torch.save(dict.fromkeys(('knobs', 'step', 'best', 'seconds', 'written', 'optimizers', 'generator'), {}) | {
        'script': 'judge', 'models': {name: pack(JUDGE)}}, f'{TEXT.name}/{"judge" if name == "model" else name}.pt')


def start(script, *arguments, launcher=(sys.executable,), env=()):
    """Start a script with its tiny knobs and more; a running process."""
    return subprocess.Popen([*launcher, ROOT / f'{script}.py', *TINY[script], *arguments], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, 'OMP_NUM_THREADS': '1', 'NO_COLOR': '1', **dict(env)})


def run(script, *arguments, **how):
    """Run a script with its tiny knobs and more to its end. Returns the JSON object of its last line."""
    process = start(script, *arguments, **how)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


@pytest.fixture
def run_here(monkeypatch, capsys):
    """Run a script in this process: (exit code, stdout, stderr). Quicker, as torch is loaded."""
    def run_here(script, *arguments):
        monkeypatch.setattr(sys, 'argv', [f'{script}.py', *TINY.get(script, ()), *arguments])
        capsys.readouterr()
        code = 0
        try:
            runpy.run_path(str(ROOT / f'{script}.py'), run_name='__main__')
        except SystemExit as error:
            code = error.code or 0
        out, err = capsys.readouterr()
        return code, out, err
    return run_here


def metrics(folder):
    """The lines of metrics.jsonl but for the speeds and times in them."""
    lines = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    times = ('seconds', 'tokens_per_second', 'mfu')
    return [{name: value for name, value in line.items() if name not in times} for line in lines]


@pytest.fixture
def script(request, monkeypatch, tmp_path):
    """The names of the test module's SCRIPT after it has run with more knobs, but trained and written nothing."""
    name = request.module.SCRIPT

    def script(*more):
        monkeypatch.setattr(sys, 'argv', [f'{name}.py', *TINY[name], '--eval_only=True', f'--out_dir={tmp_path}/e',
                                          *more])
        return runpy.run_path(str(ROOT / f'{name}.py'))
    return script

"""The scripts as users run them: every one with tiny knobs, interrupted, by two processes, with bad input."""
import itertools
import json
import math
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TEXT, TINY, metrics, run, start

from model import unpack
from utils import addition_questions

SCRIPTS = list(TINY)
THINKING = [script for script in SCRIPTS if script != 'add_normal']
TWO_POLICIES = ['add_think_blind', 'autoencoder_think']
# what the best checkpoint is best in; an arbitrary code has nothing that could be held out
SCORE = {script: 'heldout_accuracy' if script.startswith('add') else 'accuracy' for script in SCRIPTS}
SCORE['supervised_rollout_think'] = SCORE['rollout_think'] = 'val_loss'
VARIANTS = {    # of scripts: what else must be resumed, and shared by processes
    'sampled': ['add_think_blind', '--search=False', '--group_size=4', '--think_len=2'],
    'reinforce': ['add_think_blind', '--search=False', '--advantage=reinforce', '--group_size=4', '--epsilon=.3',
                  '--epsilon_steps=30', '--logit_noise=.5', '--temperature=1.5', '--top_k=5', '--top_p=.9',
                  '--entropy_weight=.1', '--rollouts_per_update=2', '--supervised_weight=.1'],
    'one model': ['add_think_blind', '--split=False', '--search=False', '--advantage=softmax', '--fixed=False',
                  '--think_len=2'],
    'many codes': ['add_think_blind', '--think_len=8', '--group_size=2', '--n_adds=3', '--balance_steps=3'],
    'many written': ['add_think_blind', '--think_len=8', '--group_size=2', '--search=False', '--dtype=bfloat16'],
    'code by reinforce': ['autoencoder_think', '--method=reinforce', '--advantage=reinforce', '--group_size=4',
                          '--logit_noise=.5'],
    'free': ['add_think', '--fixed=False', '--baseline=no_think', '--answer_at=end', '--epsilon=.2', '--task=hop'],
    'text': ['supervised_rollout_think', '--fixed=False', '--think_len=2', '--baseline=no_think', '--accumulate=2',
             '--epsilon=.2', '--gate=none'],
    'text, straight through': ['supervised_rollout_think', '--thought=straight_through', '--readers=later',
                               '--plain_weight=.5', '--gate=open', '--think_len=4', '--at_once=4',
                               '--d_thought_vocab=8', '--temperature=0'],
    'rollouts': ['rollout_think', '--fixed=True', '--think_len=2', '--close=True', '--supervised_weight=.5',
                 '--top_k=9'],
    'code by sinkhorn': ['autoencoder_think', '--method=sinkhorn'],
    'code by gumbel': ['autoencoder_think', '--method=gumbel', '--tau=.5'],
}


# ---- a run and what it leaves

@pytest.mark.parametrize('script', SCRIPTS)
def test_what_a_run_leaves(script, run_here, tmp_path):
    code, out, err = run_here(script, f'--out_dir={tmp_path}/a', '--seed=3')
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result['script'] == script and result['steps'] == 6 and result['changed']['seed'] == 3
    assert 0 <= result[SCORE[script]] <= 4 and result['seconds'] > 0 and result['peak_memory_mb'] > 10
    if script in THINKING:
        assert set(result['ablation']) == {'own', 'shuffled', 'random', 'constant', 'none'}
        assert result['ablation']['own'] == result[SCORE[script]]
        assert '<think' in (tmp_path / 'a/samples.txt').read_text()
    assert sorted(p.name for p in (tmp_path / 'a').iterdir()) == ['best.pt', 'ckpt.pt', 'config.json', 'metrics.jsonl',
                                                                  'samples.txt']
    config = json.loads((tmp_path / 'a/config.json').read_text())
    assert config['knobs']['seed'] == 3 and config['torch'] == torch.__version__ and 'commit' in config
    assert [line['step'] for line in metrics(tmp_path / 'a')] == [0, 0, 1, 2, 3, 3, 4, 5, 6]

    # evaluating its checkpoint gives the same numbers and writes nothing
    before = {p: p.read_bytes() for p in (tmp_path / 'a').iterdir()}
    code, out, _ = run_here(script, f'--out_dir={tmp_path}/a', '--init_from=resume', '--eval_only=True')
    again = json.loads(out.splitlines()[-1])
    assert code == 0 and again['steps'] == 6
    for name in ('accuracy', 'heldout_accuracy', 'val_loss', 'ablation'):
        assert again.get(name) == result.get(name)
    assert {p: p.read_bytes() for p in (tmp_path / 'a').iterdir()} == before

    # a new run does not overwrite the old one, and may start from its weights
    code, out, _ = run_here(script, f'--out_dir={tmp_path}/a', f'--init_from={tmp_path}/a/ckpt.pt', '--seed=3',
                            '--max_steps=1')
    assert code == 0 and (tmp_path / 'a.1/ckpt.pt').read_bytes() == before[tmp_path / 'a/ckpt.pt']
    assert metrics(tmp_path / 'a')[0][SCORE[script]] == result[SCORE[script]]


def test_held_out_questions_stay_so_when_a_checkpoint_is_evaluated(run_here, tmp_path):
    """It has learned its training pairs by heart: nothing but the held-out ones of its own split is unknown to it."""
    more = ['--weight_decay=0', '--max_steps=800', '--eval_every=800', '--input_max=20', '--d_model=64']
    first = json.loads(run_here('add_normal', f'--out_dir={tmp_path}/a', *more, '--seed=5')[1].splitlines()[-1])
    assert first['accuracy'] > .95 and first['heldout_accuracy'] < .5
    start = [f'--init_from={tmp_path}/a/ckpt.pt', '--eval_only=True', *more]
    again = json.loads(run_here('add_normal', *start)[1].splitlines()[-1])
    assert again['heldout_accuracy'] == first['heldout_accuracy']
    refused(run_here('add_normal', *start, '--seed=6'), '--seed=6 cannot be changed when going on from')
    refused(run_here('add_normal', *start, '--heldout=.1'), '--heldout=0.1 cannot be changed')


def test_two_runs_do_not_share_a_folder(run_here, tmp_path):
    out = f'--out_dir={tmp_path}/a'
    process = start('add_normal', out, '--max_steps=100000')
    while not (tmp_path / 'a/ckpt.pt').exists():
        time.sleep(.01)
    refused(run_here('add_normal', out), 'another run is writing to')
    refused(run_here('add_normal', out, '--init_from=resume'), 'another run is writing to')
    process.kill()
    process.communicate()
    assert run_here('add_normal', out)[0] == 0 and (tmp_path / 'a.1/ckpt.pt').exists()


def test_folders_that_are_not_of_a_run_are_left_alone(run_here, tmp_path, monkeypatch):
    (tmp_path / 'model').mkdir()
    (tmp_path / 'model/config.json').write_text('{"model_type": "gpt2"}')
    refused(run_here('add_normal', f'--out_dir={tmp_path}/model'), 'is not the folder of a run')
    assert [p.name for p in (tmp_path / 'model').iterdir()] == ['config.json']
    monkeypatch.chdir(tmp_path / 'model')
    (tmp_path / 'model/config.json').unlink()
    refused(run_here('add_normal', '--out_dir=.'), 'is not the folder of a run')


def test_the_folder_is_named_after_what_was_changed(run_here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_here('add_normal', '--n_layer=2')
    folder = tmp_path / 'out/add_normal/input_max=7,batch_size=16,n_layer=2,n_head=2,d_model=16,device=cpu'
    assert (folder / 'ckpt.pt').exists()
    assert run_here('add_normal', '--n_layer=2', '--init_from=resume', '--max_steps=8')[0] == 0
    assert metrics(folder)[-1]['step'] == 8
    # resuming without knobs takes those of the checkpoint, the number of steps as well
    monkeypatch.setattr('conftest.TINY', {'add_normal': []})
    code, out, _ = run_here('add_normal', f'--out_dir={folder}', '--init_from=resume')
    result = json.loads(out.splitlines()[-1])
    assert code == 0 and result['steps'] == 8 and result['changed']['input_max'] == 7


@pytest.mark.parametrize('script', SCRIPTS)
def test_help_prints_the_knobs(script, run_here):
    code, out, _ = run_here(script, '--help')
    assert code == 0 and '\nbatch_size = ' in out and f'python {script}.py' in out


def test_a_step_as_a_graph_is_the_step(run_here, tmp_path):
    """Candidates are not merged then: the same up to the last digits."""
    for more in ([], ['--search=False', '--advantage=grpo'], ['--search=False', '--advantage=rloo', '--fixed=False']):
        logs = []
        for compiled in (False, True):
            folder = tmp_path / f'{len(more)}{more[-1:]}{compiled}'
            code, _, err = run_here('add_think_blind', f'--out_dir={folder}', f'--compile={compiled}', *more)
            assert code == 0, err
            logs.append([line['thinking_loss'] for line in metrics(folder) if 'thinking_loss' in line])
        assert logs[0] == pytest.approx(logs[1], abs=1e-4)


def test_wandb_offline(tmp_path):
    pytest.importorskip('wandb')
    run('rollout_think', f'--out_dir={tmp_path}/a', '--wandb_mode=offline', env={'WANDB_SILENT': 'true'})
    folder, = (tmp_path / 'a/wandb').glob('offline-run-*')
    assert list(folder.glob('*.wandb'))
    tables = [path.read_text() for path in (folder / 'files/media/html').glob('samples_*.html')]
    assert len(tables) == 3 and all(table.count('<tr>') == 3 for table in tables)
    assert all('<span style="color:blue">' in table for table in tables)
    assert any('<span style="color:cyan">&lt;think' in table for table in tables)


def test_the_picture_shows_who_calls_what_how(run_here, tmp_path, monkeypatch):
    go = pytest.importorskip('plotly.graph_objects')
    drawn = []
    write_html = go.Figure.write_html
    monkeypatch.setattr(go.Figure, 'write_html', lambda self, *a, **k: drawn.append(self) or write_html(self, *a, **k))
    assert run_here('add_think_blind', '--think_len=2', f'--out_dir={tmp_path}/a', '--plot=True')[0] == 0
    counts = torch.as_tensor(drawn[0].data[0].z)
    assert counts.shape == (7, len(drawn[0].data[0].x)) and counts.sum(1).tolist() == [7] * 7   # questions per answer
    assert (counts.sum(0) > 0).all()
    assert [line['bits'] for line in metrics(tmp_path / 'a') if 'bits' in line] == list(drawn[0].data[2].y)
    page = (tmp_path / 'a/language.html').read_text()
    assert 'invented language' in page and 'script src=' not in page        # stand-alone


# ---- do they learn?

SIXTEEN = ['--input_max=16', '--d_thought_vocab=4', '--think_len=2', '--d_model=64', '--n_head=8', '--max_steps=400',
           '--eval_every=400', '--batch_size=128', '--weight_decay=1', '--heldout=.1']


def test_blind_policies_invent_a_language(run_here, tmp_path):
    """16 answers and 16 codes: every code is needed, and must mean the same to both policies."""
    code, out, _ = run_here('add_think_blind', *SIXTEEN, f'--out_dir={tmp_path}/a')
    result = json.loads(out.splitlines()[-1])
    assert code == 0 and result['accuracy'] > .99 and result['codes'] == 16
    assert max(result['ablation'][name] for name in ('shuffled', 'random', 'constant', 'none')) < .4
    _, out, _ = run_here('add_think_blind', *SIXTEEN, f'--out_dir={tmp_path}/b', '--balance_steps=0')
    assert json.loads(out.splitlines()[-1])['accuracy'] < .99      # and the prices are what keeps codes apart


@pytest.mark.parametrize('variant', [
    ['--search=False'], ['--search=False', '--fixed=False'], ['--fixed=False'], ['--super=True', '--super_order=lsb'],
    ['--super=True', '--super_order=random', '--search=False', '--advantage=best', '--epsilon=.5'],
    ['--split=False', '--weight_decay=0', '--search=False']])
def test_variants_that_learn(variant, run_here, tmp_path):
    code, out, _ = run_here('add_think_blind', *SIXTEEN, *variant, f'--out_dir={tmp_path}/a')
    result = json.loads(out.splitlines()[-1])
    assert code == 0 and result['accuracy'] > .95
    checkpoint = torch.load(tmp_path / 'a/ckpt.pt', weights_only=True)
    assert ('thoughts' in result) == ('--fixed=False' in variant)
    assert list(checkpoint['models']) == (['model'] if '--split=False' in variant else ['thinking', 'answering'])
    counted = '--search=False' in variant and '--advantage=best' not in variant
    assert checkpoint['habit'].numel() == (16 * (5 if '--fixed=False' in variant else 4)**2 if counted else 0)
    assert max(result['ablation'][name] for name in ('shuffled', 'random', 'constant', 'none')) < .4


def written_digits(folder, order):
    """Which of the first 16 numbers a thinking policy trained on one number writes as its digits in base 4."""
    model = unpack(torch.load(folder / 'ckpt.pt', weights_only=True)['models']['thinking'])
    numbers = torch.arange(16)
    right = torch.stack([numbers // 4, numbers % 4], dim=1)
    thoughts = model.think(numbers[:, None], 2, temperature=0).tokens - 16
    return (thoughts == (right if order == 'msb' else right.flip(1))).all(1)


@pytest.mark.parametrize('order', ['msb', 'lsb'])
def test_super_teaches_the_digits(order, run_here, tmp_path):
    more = ['--n_adds=1', f'--super_order={order}', '--max_steps=150', f'--out_dir={tmp_path}/a']
    assert run_here('add_think_blind', *SIXTEEN, *more, '--super=True')[0] == 0
    assert written_digits(tmp_path / 'a', order).sum() >= 13        # two of 16 are held out
    _, out, _ = run_here('add_think_blind', *SIXTEEN, *more, '--super=True', '--heldout=.5')
    result = json.loads(out.splitlines()[-1])       # of the eight that are held out
    assert result['digits_2'] <= result['digits_1'] and result['digits_2'] == result['heldout_accuracy']
    run_here('add_think_blind', *SIXTEEN, *more)
    assert written_digits(tmp_path / 'a', order).sum() < 8          # and nobody writes them of himself


def test_clean_pays_for_the_right_thoughts_only(run_here, tmp_path):
    """Nobody teaches the answering policy, but thoughts are paid by hand: the thinking policy learns the digits."""
    more = ['--clean=True', '--search=False', '--advantage=clean', '--frozen=answering', '--n_adds=1',
            '--learning_rate=1e-2', '--batch_size=32', '--group_size=16', '--epsilon=.3']
    assert run_here('add_think_blind', *SIXTEEN, *more, f'--out_dir={tmp_path}/a')[0] == 0
    assert written_digits(tmp_path / 'a', 'msb').sum() >= 13


def test_bits_and_accuracy_are_those_of_the_checkpoint(run_here, tmp_path):
    more = ['--n_adds=3', '--max_steps=100', '--think_len=2', '--d_thought_vocab=4', '--weight_decay=.1']
    _, out, _ = run_here('add_think_blind', f'--out_dir={tmp_path}/a', *more, '--input_max=4', '--seed=1')
    result = json.loads(out.splitlines()[-1])
    models = torch.load(tmp_path / 'a/ckpt.pt', weights_only=True)['models']
    thinking, answering = (unpack(models[name]) for name in ('thinking', 'answering'))
    question = addition_questions(0, 4, .2, 1, n_adds=3)[1]
    answer, logits = question.sum(1) % 4, answering.answer(thinking.think(question, 2, temperature=0).tokens)
    assert result['heldout_accuracy'] == pytest.approx((logits.argmax(1) == answer).float().mean().item())
    bits = 2 - torch.nn.functional.cross_entropy(logits, answer).item() / math.log(2)
    assert result['bits'] == pytest.approx(max(0, bits), abs=1e-5)


@pytest.mark.parametrize('script', TWO_POLICIES)
@pytest.mark.parametrize('policy', ['thinking', 'answering'])
def test_a_frozen_policy_stays_as_it_was(script, policy, run_here, tmp_path):
    for name, more in (('a', []), ('b', [f'--init_from={tmp_path}/a/ckpt.pt', f'--frozen={policy}'])):
        assert run_here(script, f'--out_dir={tmp_path}/{name}', *more)[0] == 0
    a, b = (torch.load(tmp_path / name / 'ckpt.pt', weights_only=True)['models'] for name in 'ab')
    same = {name: all(torch.equal(x, b[name]['state'][key]) for key, x in packed['state'].items())
            for name, packed in a.items()}
    assert same.pop(policy) and not any(same.values())


@pytest.mark.parametrize('order', ['msb', 'lsb'])
def test_digits_are_learned(order, run_here, tmp_path):
    code, out, _ = run_here('add_normal', '--encoding=digits', f'--digit_order={order}', '--input_max=30',
                            '--d_model=64', '--n_head=8', '--max_steps=400', '--eval_every=400', '--batch_size=128',
                            '--weight_decay=1', f'--out_dir={tmp_path}/a')
    assert code == 0 and json.loads(out.splitlines()[-1])['accuracy'] > .9
    assert '+' in (tmp_path / 'a/samples.txt').read_text()


def test_every_knob_of_exploration_does_something(run_here, tmp_path):
    """And each of them what it says, as far as the first steps show."""
    def state(*more):
        assert run_here('add_think_blind', '--search=False', f'--out_dir={tmp_path}/a', *more)[0] == 0
        shutil.rmtree(tmp_path / 'older', ignore_errors=True)
        models = torch.load(tmp_path / 'a/ckpt.pt', weights_only=True)['models']
        (tmp_path / 'a').rename(tmp_path / 'older')
        return torch.cat([x.flatten() for model in models.values() for x in model['state'].values()])
    usual = state()
    assert torch.equal(state(), usual)
    for knob in ('temperature=2', 'top_k=3', 'top_p=.5', 'epsilon=.5', 'logit_noise=1', 'entropy_weight=1', 'memory=0',
                 'group_size=3', 'tau=1', 'balance_steps=0', 'answer_on=written', 'advantage=grpo',
                 'supervised_weight=1'):
        assert not torch.equal(state(f'--{knob}'), usual), knob
    paid = [state(f'--advantage={advantage}', *more) for advantage in ('grpo', 'softmax_quantile', 'quantile_batch')
            for more in ([], ['--rollouts_per_update=1'])]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(paid, 2))
    assert not torch.equal(state('--epsilon=.5', '--epsilon_steps=3'), state('--epsilon=.5'))
    greedy = [metrics(tmp_path / 'older') for _ in map(state, ('--entropy_weight=0', '--entropy_weight=5'))]
    assert greedy[1][-2]['entropy'] > greedy[0][-2]['entropy']


def test_a_picture_of_codes_of_every_length(run_here, tmp_path, monkeypatch):
    go = pytest.importorskip('plotly.graph_objects')
    drawn = []
    monkeypatch.setattr(go.Figure, 'write_html', lambda self, path, **k: drawn.append(self) or path.write_text('x'))
    more = ['--fixed=False', '--think_len=2', '--d_thought_vocab=1', '--plot=True']
    code, out, _ = run_here('add_think_blind', *more, f'--out_dir={tmp_path}/a')
    assert code == 0 and '3 codes cannot name 7 answers' in out         # none, one or two thoughts
    assert set(drawn[0].data[0].x) <= {'', '0', '0 0'}


def test_fewer_codes_than_answers_warns(run_here, tmp_path):
    code, out, _ = run_here('add_think_blind', '--d_thought_vocab=2', '--think_len=2', f'--out_dir={tmp_path}/a',
                            '--d_model=64', '--batch_size=128', '--max_steps=300', '--eval_every=300')
    assert code == 0 and '4 codes cannot name 7 answers, accuracy can reach 0.5714' in out
    assert .35 < json.loads(out.splitlines()[-1])['accuracy'] < .62     # and trains: chance is .14


def test_divergence_ends_in_one_line(run_here, tmp_path):
    refused(run_here('add_normal', f'--out_dir={tmp_path}/a', '--learning_rate=1e9', '--max_steps=100'), 'diverged')


# ---- a code from nothing

SIXTEEN_CODES = ['--input_max=16', '--d_thought_vocab=4', '--batch_size=16', '--d_model=32', '--n_head=4',
                 '--inner_steps=5']


@pytest.mark.parametrize('method, least, more', [
    ('match', 1, ['--max_steps=15']),
    ('match', 1, ['--max_steps=100', '--batch_size=5', '--learning_rate=3e-3', '--learning_rate_answer=3e-3']),
    ('sinkhorn', .8, ['--max_steps=60']),
    ('reinforce', .6, ['--max_steps=600', '--learning_rate=1e-3', '--eval_every=300']),
    ('gumbel', .25, ['--max_steps=400', '--learning_rate=1e-3', '--tau=1', '--eval_every=200'])])
def test_a_code_from_nothing(method, least, more, run_here, tmp_path):
    """Sixteen inputs and sixteen codes: least is what seeds 0 to 3 reached on a CPU, chance is .06."""
    _, out, _ = run_here('autoencoder_think', *SIXTEEN_CODES, f'--method={method}', *more, f'--out_dir={tmp_path}/a')
    result = json.loads(out.splitlines()[-1])
    assert result['accuracy'] >= least and result['codes'] >= 16 * result['accuracy']
    assert result['ablation']['own'] > 2 * max(result['ablation'][name] for name in ('shuffled', 'constant', 'none'))


def test_no_code_has_two_owners(run_here, tmp_path):
    """Over batches and epochs, at capacity, with spare codes, and with as many inputs per code as there must be."""
    for n_inputs, n_tokens, batch in ((9, 3, 4), (16, 5, 5), (20, 2, 20), (20, 2, 6)):
        assert run_here('autoencoder_think', f'--input_max={n_inputs}', f'--d_thought_vocab={n_tokens}',
                        f'--batch_size={batch}', '--max_steps=13', f'--out_dir={tmp_path}/{n_inputs}-{batch}')[0] == 0
        slots = torch.load(tmp_path / f'{n_inputs}-{batch}/ckpt.pt', weights_only=True)['slots']
        assert len(slots[slots >= 0].unique()) == (slots >= 0).sum() >= .9 * n_inputs
        counts = (slots[slots >= 0] % n_tokens**2).bincount(minlength=n_tokens**2)
        assert counts.max() == math.ceil(n_inputs / n_tokens**2)


def test_dealing_equals_the_obvious_way(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['', *TINY['autoencoder_think'], f'--out_dir={tmp_path}/a'])
    one_to_one = runpy.run_path(str(ROOT / 'autoencoder_think.py'))['one_to_one']
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        scores = torch.randn(7, 7 + seed % 3 * 4, generator=generator)
        left, expected = scores.clone(), [None] * 7
        while None in expected:
            row, column = divmod(left.argmax().item(), left.shape[1])
            expected[row] = column
            left[row], left[:, column] = -torch.inf, -torch.inf
        assert one_to_one(scores).tolist() == expected
    for tied in (torch.zeros(5, 5), torch.zeros(5, 9), torch.randn(5, 1).expand(5, 5)):
        assert len(one_to_one(tied).unique()) == 5


def test_the_accuracy_of_a_code_is_exact(run_here, tmp_path):
    more = ['--max_steps=60', '--method=reinforce', '--learning_rate=1e-2', '--seed=1', f'--out_dir={tmp_path}/a']
    result = json.loads(run_here('autoencoder_think', *SIXTEEN_CODES, *more)[1].splitlines()[-1])
    models = torch.load(tmp_path / 'a/ckpt.pt', weights_only=True)['models']
    thinking, answering = (unpack(models[name]) for name in ('thinking', 'answering'))
    x = torch.arange(16)
    thoughts = thinking.think(x[:, None], 2, temperature=0).tokens
    logits = answering.answer(thoughts)
    assert result['accuracy'] == (logits.argmax(1) == x).float().mean().item() < 1
    assert result['bits'] == pytest.approx(
        max(0, 4 - torch.nn.functional.cross_entropy(logits, x).item() / math.log(2)), abs=1e-5)
    share = torch.tensor([thoughts.tolist().count(row) for row in thoughts.tolist()]) / 16
    assert result['bits_written'] == pytest.approx(-share.log2().mean().item(), abs=1e-5)
    assert result['codes'] == len({tuple(row) for row in thoughts.tolist()})


def test_fewer_codes_than_inputs(run_here, tmp_path):
    code, out, _ = run_here('autoencoder_think', '--input_max=20', '--d_thought_vocab=2', '--think_len=3',
                            '--batch_size=20', '--d_model=32', '--max_steps=40', '--inner_steps=5',
                            f'--out_dir={tmp_path}/a')
    assert code == 0 and '8 codes cannot name 20 inputs, accuracy can reach 0.4' in out
    assert json.loads(out.splitlines()[-1])['accuracy'] == .4


def test_every_knob_of_the_code_does_something(run_here, tmp_path):
    def state(*more):
        assert run_here('autoencoder_think', f'--out_dir={tmp_path}/a', *more)[0] == 0
        models = torch.load(tmp_path / 'a/ckpt.pt', weights_only=True)['models']
        shutil.rmtree(tmp_path / 'a')
        return torch.cat([x.flatten() for model in models.values() for x in model['state'].values()])
    for method, changes in {
            'match': ['inner_steps=3', 'rematch=False', 'unique=False', 'init=gpt2', 'weight_decay=1'],
            'sinkhorn': ['tau=1', 'balance_steps=0', 'inner_steps=3'],
            'reinforce': ['group_size=3', 'advantage=grpo', 'advantage=softmax', 'code_price=0', 'memory=0',
                          'entropy_weight=0', 'entropy_end=0', 'logit_noise=1'],
            'gumbel': ['tau=1']}.items():
        usual = state(f'--method={method}', '--seed=1')
        for change in changes:
            assert not torch.equal(state(f'--method={method}', '--seed=1', f'--{change}'), usual), change


def test_the_picture_of_a_growing_code(run_here, tmp_path):
    pytest.importorskip('plotly')
    assert run_here('autoencoder_think', f'--out_dir={tmp_path}/a', '--plot=True')[0] == 0
    page = (tmp_path / 'a/growth.html').read_text()
    assert all(title in page for title in ('accuracy', 'distinct codes', 'bits written', 'bits read'))


# ---- thoughts between question and answer

SHORT = ['--task=perm', '--input_max=5', '--n_letters=3', '--k=2', '--advance_at=.9', '--batch_size=32', '--d_model=32',
         '--n_head=4', '--group_size=8', '--d_thought_vocab=12', '--learning_rate=4e-3', '--max_steps=1000',
         '--eval_every=1000', '--eval_questions=500', '--heldout=0']


def test_thoughts_are_learned_and_used(run_here, tmp_path):
    """Nobody shows the step in between, and answers depend on what is thought of it."""
    code, out, _ = run_here('add_think', *SHORT, f'--out_dir={tmp_path}/a')
    result = json.loads(out.splitlines()[-1])
    assert code == 0 and result['depth'] == 2 and result['heldout_accuracy'] > .95
    assert max(result['ablation'][name] for name in ('shuffled', 'random', 'constant', 'none')) < .6
    assert result['accuracy_at_depth']['2'] == result['heldout_accuracy'] == result['ablation']['own']
    # what is learned stays learned when going on, and the tables say what thoughts mean
    _, out, _ = run_here('add_think', *SHORT, f'--out_dir={tmp_path}/b', '--max_steps=1',
                         f'--init_from={tmp_path}/a/ckpt.pt')
    assert json.loads(out.splitlines()[-1])['depth'] == 2
    assert '<think' in out.splitlines()[-3] and 'of thoughts are written for the state' in out.splitlines()[-2]


@pytest.mark.parametrize('whose', ['none', 'filler', 'random', 'chain'])
def test_controls_of_thinking(whose, run_here, tmp_path):
    code, out, err = run_here('add_think', f'--out_dir={tmp_path}/a', f'--thoughts={whose}', '--plot=False')
    result = json.loads(out.splitlines()[-1])
    assert code == 0, err
    assert ('ablation' in result) == (whose != 'none') and 'purity' in result or whose == 'none'
    if whose == 'none':     # a normal model, which then grows: without thoughts it answers as before
        kind = torch.load(tmp_path / 'a/ckpt.pt', weights_only=True)['models']['model']['kind']
        assert kind == 'ModelConfig'
        code, out, err = run_here('add_think', f'--init_from={tmp_path}/a/ckpt.pt', f'--out_dir={tmp_path}/b',
                                  '--thoughts=own', '--max_steps=1', '--learning_rate=0')
        grown = json.loads(out.splitlines()[-1])
        assert code == 0, err
        assert grown['accuracy_at_depth']['1'] == result['accuracy_at_depth']['1']
    if whose == 'chain':
        model = unpack(torch.load(tmp_path / 'a/ckpt.pt', weights_only=True)['models']['model'])
        assert model.config.positions == 'relative' and result['purity'] == 1


def test_held_out_questions_of_a_depth_are_never_drawn_to_train(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['add_think.py', '--eval_only=True', '--input_max=3', '--k=2', '--heldout=.3',
                                      '--eval_questions=10', '--device=cpu', f'--out_dir={tmp_path}/a'])
    script = runpy.run_path(str(ROOT / 'add_think.py'))
    generator = torch.Generator().manual_seed(0)
    train, test = ({tuple(q) for q in script['draw'](3000, 2, generator, heldout)[0].tolist()}
                   for heldout in (False, True))
    assert not train & test and len(train | test) == 3 * 5 * 5 and 10 < len(test) < 35
    easier = {tuple(q) for q in script['draw'](3000, 1, generator)[0].tolist()}
    assert len(easier) == 3 * 5     # all of them
    assert script['places'](torch.zeros(1, 4)).tolist() == [0, 1, 2, 0]


def test_a_code_in_use_too_often_has_a_price(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['add_think.py', '--eval_only=True', '--input_max=5', '--k=2', '--memory=0',
                                      '--eval_questions=10', '--device=cpu', f'--out_dir={tmp_path}/a'])
    script = runpy.run_path(str(ROOT / 'add_think.py'))
    first = script['n_tokens']
    thought = first + torch.tensor([[0], [0], [0], [1], [2], [3], [4], [4], [5], [6]])
    due = torch.tensor([.3, .3, .3, .1, .1, .1, .2, .2, .1, .1]) * 5 / 1.2       # a fifth of all is each answer's share
    torch.testing.assert_close(script['overuse'](thought), due.clamp(min=1).log())


def test_every_knob_of_thinking_does_something(run_here, tmp_path):
    def state(*more):
        shutil.rmtree(tmp_path / 'a', ignore_errors=True)
        code, _, err = run_here('add_think', f'--out_dir={tmp_path}/a', '--advance_at=0', *more)
        assert code == 0, err
        return torch.cat([x.flatten() for x in torch.load(tmp_path / 'a/ckpt.pt', weights_only=True)
                          ['models']['model']['state'].values()])
    seen = [state()]
    for knob in ('recount=False', 'answer_at=end', 'hardest=0', 'group_size=3', 'advantage=grpo', 'entropy_weight=1',
                 'entropy_steps=2', 'entropy_end=1', 'epsilon=1', 'baseline=batch', 'baseline=no_think', 'fixed=False',
                 'think_len=4', 'heldout=.5', 'ops=+', 'seed=1', 'rollouts_per_update=1', 'advantage=quantile_batch'):
        seen.append(state(f'--{knob}'))
    for most in (['--advantage=softmax'], ['--advantage=softmax', '--tau=9'], ['--memory=0'],
                 ['--memory=0', '--code_price=9'], ['--memory=.1']):
        seen.append(state(*most))
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(seen, 2))
    usual = state('--fixed=False')
    for knob in ('think_cost=1', 'cut=0'):
        assert not torch.equal(state('--fixed=False', f'--{knob}'), usual), knob


def test_the_picture_of_what_thoughts_mean(run_here, tmp_path):
    pytest.importorskip('plotly')
    assert run_here('add_think', f'--out_dir={tmp_path}/a', '--plot=True')[0] == 0
    page = (tmp_path / 'a/meaning.html').read_text()
    assert 'What a thought means' in page and 'script src=' not in page


# ---- interruption

def kill_at_line(n_lines, script, folder, *arguments, **how):
    """Start a run and kill it once its log has n_lines."""
    process, log = start(script, f'--out_dir={folder}', *arguments, **how), folder / 'metrics.jsonl'
    while process.poll() is None and (not log.exists() or log.read_text().count('\n') < n_lines):
        time.sleep(.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, 'it ended before it was killed'


def assert_same_runs(a, b):
    """Two runs that left the same metrics, samples and weights."""
    assert metrics(a) == metrics(b)
    assert (a / 'samples.txt').read_text() == (b / 'samples.txt').read_text()
    for name in ('ckpt.pt', 'best.pt'):
        ours, theirs = (torch.load(folder / name, weights_only=True) for folder in (a, b))
        assert ours['step'] == theirs['step'] and ours['best'] == theirs['best']
        state = [name for name, x in ours.items() if torch.is_tensor(x)]
        assert all(torch.equal(ours[name], theirs[name]) for name in state)
        for model, packed in ours['models'].items():
            for key, tensor in packed['state'].items():
                assert torch.equal(tensor, theirs['models'][model]['state'][key]), key


@pytest.mark.parametrize('script, more', [*((script, []) for script in SCRIPTS), *(
    (VARIANTS[name][0], VARIANTS[name][1:]) for name in ('sampled', 'reinforce', 'many written', 'free', 'text')),
    ('supervised_rollout_think', ['--thought=straight_through', '--readers=later', '--dropout=.1'])])
def test_killed_and_resumed_equals_uninterrupted(script, more, tmp_path):
    """Killed at any step, resumed, killed again, before or after the next checkpoint, resumed."""
    more = [*more, '--max_steps=130', '--eval_every=37', '--log_every=2']
    first = random.randint(2, 25)
    second = random.randint(first + 1, 40)
    print(f'killed when the log has {first} and {second} lines')
    whole = start(script, f'--out_dir={tmp_path}/whole', *more)     # meanwhile
    kill_at_line(first, script, tmp_path / 'killed', *more)
    kill_at_line(second, script, tmp_path / 'killed', *more, '--init_from=resume')
    run(script, f'--out_dir={tmp_path}/killed', *more, '--init_from=resume')
    assert 'error' not in whole.communicate()[1] and whole.returncode == 0
    assert_same_runs(tmp_path / 'killed', tmp_path / 'whole')
    assert len(json.loads((tmp_path / 'killed/config.json').read_text())['resumed']) == 2
    if script == 'add_normal':      # resuming what is finished changes nothing
        run(script, f'--out_dir={tmp_path}/killed', *more, '--init_from=resume')
        assert_same_runs(tmp_path / 'killed', tmp_path / 'whole')


def test_resumed_at_full_size_with_two_threads(tmp_path):
    more = ['--input_max=100', '--d_thought_vocab=10', '--think_len=2', '--batch_size=512', '--d_model=128',
            '--n_head=32', '--max_steps=12', '--eval_every=5']
    threads = {'env': {'OMP_NUM_THREADS': '2'}}
    run('add_think_blind', f'--out_dir={tmp_path}/whole', *more, **threads)
    kill_at_line(9, 'add_think_blind', tmp_path / 'killed', *more, **threads)
    run('add_think_blind', f'--out_dir={tmp_path}/killed', *more, '--init_from=resume', **threads)
    assert_same_runs(tmp_path / 'killed', tmp_path / 'whole')


def test_the_clock_goes_on_when_resumed(run_here, tmp_path):
    out = f'--out_dir={tmp_path}/a'
    _, text, _ = run_here('add_normal', out, '--max_steps=100000', '--max_seconds=2')
    steps = json.loads(text.splitlines()[-1])['steps']
    _, text, _ = run_here('add_normal', out, '--init_from=resume')
    result = json.loads(text.splitlines()[-1])
    assert 0 < steps == result['steps'] and 2 < result['seconds']       # the two seconds were over


def test_a_checkpoint_survives_a_write_that_breaks(run_here, tmp_path, monkeypatch):
    out = f'--out_dir={tmp_path}/a'
    run_here('add_normal', out)
    good = (tmp_path / 'a/ckpt.pt').read_bytes()

    def breaks(checkpoint, path):
        path.write_bytes(good[:99])
        raise KeyboardInterrupt
    monkeypatch.setattr(torch, 'save', breaks)
    with pytest.raises(KeyboardInterrupt):
        run_here('add_normal', out, '--init_from=resume', '--max_steps=9')
    assert (tmp_path / 'a/ckpt.pt').read_bytes() == good


# ---- processes

@pytest.mark.parametrize('script, more', [*((script, []) for script in SCRIPTS), *(
    (script, more) for script, *more in VARIANTS.values())])
def test_two_processes_equal_one(script, more, run_here, tmp_path):
    # float32: in half precision two halves of a batch round otherwise than the whole, by 1e-4 after the first update
    more = [*more, '--max_steps=20', '--eval_every=10', '--dtype=float32']
    two = start(script, f'--out_dir={tmp_path}/two', *more,
                launcher=(sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2'))
    code, out, err = run_here(script, f'--out_dir={tmp_path}/one', *more)
    assert code == 0, err
    lines, err = two.communicate(timeout=300)
    assert two.returncode == 0, err
    one, two = (json.loads(text.splitlines()[-1]) for text in (out, lines))
    assert one['steps'] == two['steps'] == 20
    one, two = (torch.load(tmp_path / name / 'ckpt.pt', weights_only=True)['models'] for name in ('one', 'two'))
    for name, packed in one.items():
        for key, tensor in packed['state'].items():
            torch.testing.assert_close(two[name]['state'][key], tensor, atol=1e-5, rtol=0)
    assert json.loads((tmp_path / 'two/config.json').read_text())['processes'] == 2


# ---- bad input

BAD = {
    '--d_modle=32': 'nearest is --d_model',
    'd_model=32': 'not of the form --name=value',
    '--eval_only': 'not of the form --name=value',
    '--n_head=3': 'n_head=3 does not divide d_model=16',
    '--max_steps=many': 'must be an integer',
    '--max_steps=2.5': 'must be an integer',
    '--max_steps=0': 'must be between 1',
    '--learning_rate=nan': 'must be between 0',
    '--learning_rate=inf': 'must be between 0',
    '--learning_rate=-1': 'must be between 0',
    '--learning_rate=fast': 'must be a number',
    '--seed=99999999999999999999': 'must be between 0',
    '--batch_size=0': 'must be between 1',
    '--eval_only=yes': 'must be True or False',
    '--device=tpu9': '--device=tpu9 must be auto, cpu',
    '--device=meta': '--device=meta must be auto, cpu',
    '--device=cuda:77': '--device=cuda:77 is not to be had',
    '--d_model=1048576': 'memory',
    '--dtype=float8': 'must be one of float32, bfloat16',
    '--wandb_mode=on': 'must be one of disabled, offline, online',
    '--init_from=resume': 'nothing to resume',
    '--init_from=nowhere.pt': 'no checkpoint to start from',
}


def refused(result, message):
    """Exit code 2, and one line that holds the message."""
    code, _, err = result
    assert code == 2 and len(err.splitlines()) == 1 and err.startswith('error: ') and message in err, err


@pytest.mark.parametrize('script', SCRIPTS)
def test_bad_input(script, run_here, tmp_path):
    for argument, message in BAD.items():
        refused(run_here(script, f'--out_dir={tmp_path}/a', argument), message)
    assert not (tmp_path / 'a').exists()


def test_bad_input_of_one_script(run_here, tmp_path):
    out = f'--out_dir={tmp_path}/a'
    refused(run_here('add_normal', out, '--encoding=roman'), 'must be one of int, digits')
    refused(run_here('add_normal', out, '--input_min=6'), 'leaves no two numbers')
    refused(run_here('add_normal', out, '--heldout=1'), 'must be between 0')
    for arguments, message in {
            '--think_len=40': 'too many to number', '--think_len=4000': 'too many to number',
            '--n_adds=40': 'too many to number', '--n_adds=0': 'must be between 1',
            '--think_len=0': 'must be at least 1, as the answering policy sees nothing else',
            '--tau=0': 'must be between', '--temperature=0': 'must be between', '--top_p=2': 'must be between',
            '--epsilon=1.5': 'must be between 0', '--advantage=ppo': 'must be one of balanced, softmax, best, grpo',
            '--advantage=grpo': 'needs rollouts: --search=False', '--answer_on=written': 'needs rollouts',
            '--compile=True --search=False': 'needs steps that are alike',
            '--fuse=True': 'fuse=True needs --compile=True',
            '--search=False --advantage=rloo --group_size=1': 'must be at least 2',
            '--search=False --advantage=quantile_batch --group_size=1': 'must be at least 2',
            '--search=False --advantage=grpo --rollouts_per_update=9': 'are of the rollouts of a policy gradient',
            '--rollouts_per_update=1': 'are of the rollouts of a policy gradient',
            '--supervised_weight=1 --d_thought_vocab=6': 'make no digits',
            '--split=False --frozen=thinking': 'needs two models', '--super=True --d_thought_vocab=6': 'make no digits',
            '--clean=True --d_thought_vocab=6': 'make no digits',
            '--search=False --think_len=8 --input_max=700': 'counts are kept for 700 answers'}.items():
        refused(run_here('add_think_blind', out, *arguments.split()), message)
    for arguments, message in {
            '--input_max=4': 'products need a prime', '--k=0': 'must be between 1',
            '--task=maze': 'must be one of add, perm', '--group_size=1': 'must be at least 2',
            '--fixed=False --thoughts=filler': 'have no end to choose',
            '--baseline=batch --advantage=grpo': 'advantage=grpo needs --baseline=group',
            '--thoughts=none --answer_at=end': 'answers at the question',
            '--rollouts_per_update=5': 'are some of a group of group_size=4',
            '--task=sort': 'different numbers needs as many', '--task=s5 --n_letters=121': 'there are 120',
            '--task=sort --input_max=20 --k=11': 'has no number 11 in order',
            '--thoughts=chain --d_thought_vocab=2': 'a larger --d_thought_vocab', '--think_len=-1': 'must be between 0',
            '--heldout=.0005 --k=1': 'leaves no questions', '--positions=rotary --d_model=6': 'must be even'}.items():
        refused(run_here('add_think', out, *arguments.split()), message)
    for arguments, message in {
            '--method=ppo': 'must be one of match, sinkhorn, reinforce, gumbel', '--think_len=40': 'too many to keep',
            '--input_max=2147483647': 'too many to keep',
            '--input_max=99999 --batch_size=65536': 'a smaller --batch_size',
            '--inner_steps=0': 'must be between 1', '--init=zero': 'must be one of unit, gpt2',
            '--method=sinkhorn --think_len=14 --input_max=99': 'over 2^26: --method=match',
            '--method=reinforce --group_size=1': 'must be at least 2'}.items():
        refused(run_here('autoencoder_think', out, *arguments.split()), message)
    for arguments, message in {
            '--data=nowhere': 'no data in nowhere, see python prepare_data.py --help', '--group_size=1': 'at least 2',
            '--fixed=False --thought=continuous': 'have no end to choose', '--accumulate=3': 'does not divide the 8',
            '--temperature=0': 'would all be the most likely',
            '--baseline=no_think --advantage=grpo': 'advantage=grpo needs --baseline=group',
            '--thought=continuous --think_len=2 --at_once=2 --d_thought_vocab=6': 'one at a time: --at_once=1',
            '--positions=last': 'is for single tokens that their position', '--text_len=900': 'a smaller --text',
            '--at_once=2': 'must divide think_len=1', '--at_once=0': 'must be between 1',
            '--init=unit --dropout=.1': 'is for small models', '--reference=nowhere.pt': 'nowhere.pt is not there',
            f'--reference={TEXT.name}/other.pt': 'no model called model, but other',
            '--think_len=-1': 'must be between 0', '--beta2=2': 'must be between 0'}.items():
        refused(run_here('supervised_rollout_think', out, *arguments.split()), message)


def test_bad_input_has_no_traceback_as_a_process(tmp_path):
    process = start('add_normal', f'--out_dir={tmp_path}/a', '--n_head=3')
    _, err = process.communicate()
    assert process.returncode == 2 and err == 'error: n_head=3 does not divide d_model=16\n'


def test_inputs_that_processes_cannot_share(run_here, tmp_path, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    refused(run_here('autoencoder_think', f'--out_dir={tmp_path}/a', '--input_max=7', '--batch_size=8'),
            '--batch_size=7 cannot be shared by 2 processes')


def test_bad_checkpoints(run_here, tmp_path):
    out = f'--out_dir={tmp_path}/a'
    assert run_here('add_normal', out)[0] == 0
    good = (tmp_path / 'a/ckpt.pt').read_bytes()
    (tmp_path / 'a/ckpt.pt').write_bytes(good[:len(good) // 2])
    refused(run_here('add_normal', out, '--init_from=resume'), 'damaged or no checkpoint')
    torch.save([1, 2], tmp_path / 'a/ckpt.pt')
    refused(run_here('add_normal', out, '--init_from=resume'), 'no checkpoint of these scripts')
    (tmp_path / 'a/ckpt.pt').write_bytes(good)
    refused(run_here('add_normal', out, '--init_from=resume', '--n_layer=2'), 'cannot be changed when going on')
    refused(run_here('add_think_blind', out, '--init_from=resume'), 'is from add_normal.py')
    refused(run_here('add_normal', f'--init_from={tmp_path}/a/ckpt.pt', '--n_layer=2'), 'n_layer=1, not 2')
    refused(run_here('add_think_blind', f'--init_from={tmp_path}/a/ckpt.pt'), 'no model called thinking')
    lines = metrics(tmp_path / 'a')
    assert run_here('add_normal', out, '--init_from=resume')[0] == 0      # and nothing was damaged
    assert metrics(tmp_path / 'a') == lines


def test_a_folder_that_cannot_be_written(run_here, tmp_path):
    (tmp_path / 'file').write_text('')
    refused(run_here('add_normal', f'--out_dir={tmp_path}/file/a'), 'cannot write to')
    (tmp_path / 'folder').mkdir(mode=0o500)
    if not os.access(tmp_path / 'folder', os.W_OK):     # root may write everywhere
        refused(run_here('add_normal', f'--out_dir={tmp_path}/folder/a'), 'cannot write to')


def test_a_missing_package_is_named(run_here, tmp_path, monkeypatch):
    for package, knob in (('wandb', '--wandb_mode=offline'), ('plotly', '--plot=True')):
        monkeypatch.setitem(sys.modules, package, None)
        refused(run_here('add_think_blind', f'--out_dir={tmp_path}/a', knob), f'pip install {package}')
    assert not (tmp_path / 'a').exists()


# ---- the repository

def test_the_tables_of_the_readme_are_those_of_the_results(tmp_path):
    for name in ('bench.py', 'model.py', 'utils.py', 'README.md'):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / 'assets/results', tmp_path / 'assets/results')
    subprocess.run([sys.executable, tmp_path / 'bench.py', '--suite=tables'], check=True)
    readme = (tmp_path / 'README.md').read_text()
    assert readme == (ROOT / 'README.md').read_text() and '| `python add_think_blind.py` |' in readme
    assert '| `python add_think_blind.py --d_thought_vocab=100 --think_len=1` |' in readme and '| `… --fixed' in readme
    unknown = subprocess.run([sys.executable, tmp_path / 'bench.py', '--only=nothing'], capture_output=True, text=True)
    assert unknown.returncode == 2 and unknown.stderr.startswith('error: --only=nothing must be one of blind, ')


def test_ci_runs_the_command_of_the_readme():
    command = (ROOT / '.ci/run').read_text().splitlines()[-1].replace(' -q -r', ' -r')
    assert command in (ROOT / 'README.md').read_text()

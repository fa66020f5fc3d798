"""The scripts as users run them: tiny, edited, interrupted, by two processes, with bad input."""
import contextlib
import itertools
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TEXT, TINY, TORCHRUN, interrupt, metrics, result_of, start

import utils
from model import unpack

SCRIPTS = list(TINY)
# what the best checkpoint is best in; an arbitrary code holds out nothing
SCORE = {script: 'heldout_accuracy' if script.startswith('add') else 'accuracy' for script in SCRIPTS}
SCORE['supervised_rollout_think'] = SCORE['rollout_think'] = 'val_loss'
VARIANTS = {  # what else must be resumed, and shared by processes
    'add_normal': ['--encoding=digits'],
    'add_think_blind': ['--search=False --group_size=4 --think_len=2',
                        '--split=False --fixed=False --think_len=2 --super=True',
                        '--search=False --advantage=reinforce --epsilon=.3 --supervised_weight=.1'],
    'add_think': ['--fixed=False --baseline=no_think --text_weight=1 --task=story',
                  '--baseline=batch --mixture=1'],
    'autoencoder_think': ['--method=reinforce', '--batch_size=4', '--method=sinkhorn --batch_size=4',
                          '--method=gumbel --tau=.5'],
    'supervised_rollout_think': [
        '--fixed=False --think_len=2 --baseline=no_think --micro_batch=2 --gate=none',
        '--thought_kind=straight_through --readers=later --think_len=4 --at_once=4 --d_thought_vocab=8'],
    'rollout_think': ['--fixed=True --think_len=2 --supervised_weight=.5']}


@pytest.fixture
def train(run_here):
    """Run a script with knobs to its end, in a folder of tmp_path. Returns its last line."""
    def train(script, knobs='', folder='a'):
        return result_of(run_here(script, f'--out_dir={folder}', *knobs.split()))
    return train


@pytest.fixture
def refuse(run_here):
    """Check that bad input ends with exit code 2 and one line, with a message."""
    def refuse(script, knobs, message):
        code, _, err = run_here(script, *knobs.split())
        assert code == 2 and len(err.splitlines()) == 1 and err.startswith('error: ') and message in err, err
    return refuse


def checkpoint(folder='a', file='ckpt.pt'):
    return torch.load(Path(folder) / file, weights_only=True)


def policies(folder='a'):
    return [unpack(packed) for packed in checkpoint(folder)['models'].values()]


def others(result):
    """The best accuracy with thoughts of others."""
    return max(value for name, value in result['ablation'].items() if name != 'own')


# ---- a run and what it leaves

@pytest.mark.parametrize('script', SCRIPTS)
def test_what_a_run_leaves(script, train, tmp_path):
    result, score = train(script, '--seed=3'), SCORE[script]
    assert result['script'] == script and result['steps'] == 6 and result['changed']['seed'] == 3
    assert 0 <= result[score] <= 4 and result['seconds'] > 0 and result['peak_memory_mb'] > 10
    if script != 'add_normal':
        assert set(result['ablation']) == {'own', 'shuffled', 'random', 'constant', 'none'}
        assert result['ablation']['own'] == result[score]
        assert '<think' in (tmp_path / 'a/samples.txt').read_text()
        assert '<span style="color:darkcyan">&lt;think' in (tmp_path / 'a/samples.html').read_text()
    before = {path.name: path.read_bytes() for path in (tmp_path / 'a').iterdir()}
    assert sorted(before) == ['.lock', 'best.pt', 'ckpt.pt', 'config.json', 'metrics.jsonl', 'samples.html',
                              'samples.txt']
    config = json.loads(before['config.json'])
    assert config['knobs']['seed'] == 3 and config['torch'] == torch.__version__ and 'commit' in config
    assert [line['step'] for line in metrics(tmp_path / 'a')] == [0, 0, 1, 2, 3, 3, 4, 5, 6]

    # evaluating it gives the same and writes nothing
    again = train(script, '--init_from=resume --eval_only=True')
    for name in ('steps', 'accuracy', 'heldout_accuracy', 'val_loss', 'ablation'):
        assert again.get(name) == result.get(name)
    assert {path.name: path.read_bytes() for path in (tmp_path / 'a').iterdir()} == before

    # a new run may start from it, and overwrites nothing
    train(script, '--init_from=a/ckpt.pt --seed=3 --max_steps=1')
    assert (tmp_path / 'a.1/ckpt.pt').read_bytes() == before['ckpt.pt']
    assert metrics(tmp_path / 'a')[0][score] == result[score]


def test_held_out_questions_stay_so_when_a_checkpoint_is_evaluated(train, refuse):
    more = '--weight_decay=0 --max_steps=800 --eval_every=800 --input_max=20 --d_model=64'
    first = train('add_normal', f'{more} --seed=5')
    assert first['accuracy'] > .95 and first['heldout_accuracy'] < .5
    more += ' --init_from=a/ckpt.pt --eval_only=True'
    assert train('add_normal', more, 'b')['heldout_accuracy'] == first['heldout_accuracy']
    refuse('add_normal', f'{more} --seed=6', '--seed=6 cannot be changed when going on from')
    refuse('add_normal', f'{more} --heldout=.1', '--heldout=0.1 cannot be changed')


def test_two_runs_do_not_share_a_folder(train, refuse, tmp_path, monkeypatch):
    def try_too(self, step, log=utils.Run.log, **numbers):
        if step == 2:
            for more in ('', ' --init_from=resume'):
                refuse('add_normal', f'--out_dir=a{more}', 'could not be acquired')
        log(self, step, **numbers)
    monkeypatch.setattr(utils.Run, 'log', try_too)
    train('add_normal')
    assert len(metrics(tmp_path / 'a')) == 9


def test_folders_that_are_not_of_a_run_are_left_alone(train, refuse, tmp_path):
    """Whatever is in them. A link would lead elsewhere."""
    def contents():
        return {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}
    train('add_normal')
    refuse('add_normal', '--out_dir=.', 'a is not ours')
    (tmp_path / 'elsewhere').mkdir()
    (tmp_path / 'elsewhere/file').write_text('mine')
    for name, content in (('notes', ''), ('config.json', '{"model_type": "gpt2"}'), ('config.json', ''),
                          ('config.json', '[' * 10**5), ('config.json', None), ('ckpt.pt.tmp', 'file'),
                          ('metrics.jsonl', 'file'), ('wandb', '.'), ('best.pt', 'hard')):
        shutil.rmtree(tmp_path / 'b', ignore_errors=True)
        shutil.copytree(tmp_path / 'a', tmp_path / 'b')
        path = tmp_path / 'b' / name
        path.unlink(missing_ok=True)
        if content in ('file', '.'):
            path.symlink_to(tmp_path / 'elsewhere' / content)
        elif content == 'hard':
            path.hardlink_to(tmp_path / 'elsewhere/file')
        elif content is not None:
            path.write_text(content)
        before = contents()
        refuse('add_normal', '--out_dir=b', 'cannot use b')
        assert contents() == before and not (tmp_path / 'b.1').exists()


def test_the_folder_is_named_after_what_was_changed(run_here, train, tmp_path, monkeypatch):
    result_of(run_here('add_normal', '--n_layer=2'))
    folder = tmp_path / 'out/add_normal/input_max=7,batch_size=16,n_layer=2,n_head=2,d_model=16'
    assert (folder / 'ckpt.pt').exists()
    result_of(run_here('add_normal', '--n_layer=2', '--init_from=resume', '--max_steps=8'))
    assert metrics(folder)[-1]['step'] == 8
    long = [f'--{knob}={value}' for knob in ('learning_rate', 'weight_decay') for value in ['.' + '1' * 90]]
    assert len(result_of(run_here('add_normal', *long, '--max_steps=1'))['changed']) > 5
    assert max(len(path.name) for path in folder.parent.iterdir()) < 150
    # resuming takes knobs from the checkpoint, max_steps too
    monkeypatch.setattr('conftest.TINY', {})
    result = train('add_normal', '--init_from=resume', folder)
    assert result['steps'] == 8 and result['changed']['input_max'] == 7


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('more', ['', '--search=False --advantage=grpo --fixed=False'])
def test_a_step_as_a_graph_is_the_step(more, train, tmp_path):
    for compiled in (False, True):
        train('add_think_blind', f'--device=cuda --compile={compiled} {more}', str(compiled))
    slow, fast = ([line['thinking_loss'] for line in metrics(tmp_path / name) if 'thinking_loss' in line]
                  for name in ('False', 'True'))
    assert len(slow) == 6 and slow == pytest.approx(fast, abs=1e-4)


@pytest.mark.parametrize('script', SCRIPTS)
def test_wandb_offline(script, train, tmp_path, monkeypatch):
    wandb = pytest.importorskip('wandb')
    monkeypatch.setenv('WANDB_SILENT', 'true')
    train(script, '--wandb_mode=offline --max_steps=2')
    if script == 'add_normal':
        train(script, '--wandb_mode=offline --init_from=resume')
        assert len({path.name.split('-')[3] for path in (tmp_path / 'a/wandb').glob('offline-run-*')}) == 1
        # somebody else's checkpoint does not turn it on
        result = train(script, '--init_from=resume --max_steps=8')
        assert result['steps'] == 8 and 'wandb_mode' not in result['changed']
    wandb.teardown()  # or it would go on writing there
    assert list((tmp_path / 'a/wandb').glob('offline-run-*/*.wandb'))


def test_pictures(train, tmp_path, monkeypatch):
    go, drawn = pytest.importorskip('plotly.graph_objects'), []

    def to_html(self, to_html=go.Figure.to_html, **how):
        drawn.append(self)
        return to_html(self, **how)
    monkeypatch.setattr(go.Figure, 'to_html', to_html)
    for script, file, title in (('add_think_blind', 'language.html', 'The invented language'),
                                ('autoencoder_think', 'growth.html', 'bits written'),
                                ('add_think', 'meaning.html', 'What a thought means')):
        train(script, '--plot=True', script)
        page = (tmp_path / script / file).read_text()
        assert title in page and 'script src=' not in page  # stands alone
    heat, _, bits = drawn[0].data
    counts = torch.as_tensor(heat.z)  # questions per answer and code
    assert counts.shape == (7, len(heat.x)) and counts.sum(1).tolist() == [7] * 7 and counts.sum(0).all()
    logged = [line['bits'] for line in metrics(tmp_path / 'add_think_blind') if 'bits' in line]
    assert logged == list(bits.y)
    train('add_think_blind', '--fixed=False --think_len=2 --d_thought_vocab=1 --plot=True')
    monkeypatch.delattr(go.Figure, 'to_html')  # the last line comes anyway
    assert train('add_think_blind', '--plot=True')['steps'] == 6
    assert set(drawn[-1].data[0].x) <= {'', '0', '0 0'}  # none, one or two thoughts


# ---- do they learn?

SIXTEEN = ('--input_max=16 --heldout=.1 --d_thought_vocab=4 --think_len=2 --d_model=32 --n_head=4 '
           '--max_steps=400 --eval_every=400 --batch_size=128 --weight_decay=1 --learning_rate=5e-3 '
           '--learning_rate_answer=5e-3 ')


def test_blind_policies_invent_a_language(train):
    result = train('add_think_blind', SIXTEEN)
    assert result['accuracy'] > .99 and result['codes'] == 16
    # prices part codes
    assert train('add_think_blind', SIXTEEN + '--advantage=softmax')['accuracy'] < .99


@pytest.mark.parametrize('variant', [
    '--search=False --fixed=False', '--fixed=False', '--super=True --super_order=lsb',
    '--super=True --super_order=random --search=False --advantage=best --epsilon=1 --n_adds=1',
    '--split=False --weight_decay=0 --search=False'])
def test_variants_that_learn(variant, train):
    assert train('add_think_blind', SIXTEEN + variant)['accuracy'] > .95
    assert len(checkpoint()['models']) == 2 - ('--split=False' in variant)


def written_digits(order):
    """How many of the numbers 0 to 15 are written as their digits in base 4."""
    numbers = torch.arange(16)
    right = torch.stack([numbers // 4, numbers % 4], dim=1)
    thoughts = policies()[0].think(numbers[:, None], 2, temperature=0).tokens - 16
    return (thoughts == (right if order == 'msb' else right.flip(1))).all(1).sum()


@pytest.mark.parametrize('order', ['msb', 'lsb'])
def test_super_teaches_the_digits(order, train):
    knobs = SIXTEEN + f'--n_adds=1 --super_order={order} --max_steps=150'
    train('add_think_blind', f'{knobs} --super=True')
    assert written_digits(order) >= 13  # two of 16 are held out
    train('add_think_blind', knobs)
    assert written_digits(order) < 8


def test_clean_pays_for_the_right_thoughts_only(train):
    train('add_think_blind', SIXTEEN + '--clean=True --search=False --advantage=raw --frozen=answering '
          '--n_adds=1 --epsilon=1 --learning_rate=1e-3 --batch_size=16 --group_size=64 --max_steps=200')
    assert written_digits('msb') >= 13


@pytest.mark.parametrize('script', ['add_think_blind', 'autoencoder_think'])
def test_a_frozen_policy_stays_as_it_was(script, train):
    train(script)
    before = policies()
    for frozen, policy in enumerate(('thinking', 'answering')):
        train(script, f'--init_from=a/ckpt.pt --frozen={policy}', policy)
        for i, (old, new) in enumerate(zip(before, policies(policy))):
            same = all(torch.equal(a, b) for a, b in zip(old.parameters(), new.parameters()))
            assert same == (i == frozen)


@pytest.mark.parametrize('order', ['msb', 'lsb'])
def test_digits_are_learned(order, train, tmp_path):
    result = train('add_normal', f'--encoding=digits --digit_order={order} --input_max=30 --d_model=64 '
                   '--n_head=8 --max_steps=200 --batch_size=128 --weight_decay=1 --learning_rate=5e-3')
    assert result['accuracy'] > .9 and '+' in (tmp_path / 'a/samples.txt').read_text()


@pytest.mark.parametrize('script, always, changes', [  # each change must lead elsewhere
    ('add_think_blind', '--search=False', 'epsilon=.5 entropy_weight=1 group_size=3 tau=1 weight_decay=0 '
     'supervised_weight=1 advantage=grpo advantage=softmax_quantile advantage=quantile_batch heldout=.5'),
    ('add_think_blind', '', 'tau=1 advantage=softmax advantage=best super=True frozen=thinking n_adds=3'),
    ('autoencoder_think', '', 'inner_steps=3 rematch=False unique=False init=gpt2 weight_decay=1'),
    ('autoencoder_think', '--method=sinkhorn', 'tau=1 inner_steps=3'),
    ('autoencoder_think', '--method=gumbel', 'tau=1'),
    ('autoencoder_think', '--method=reinforce', 'code_price=0 entropy_weight=0 explore=0'),
    ('add_think', '', 'recount=False mixture=1 group_size=3 entropy_weight=1 text_weight=1 baseline=batch '
     'baseline=no_think fixed=False think_len=4 heldout=.5 task=perm seed=1 advantage=grpo '
     'advantage=quantile_batch advantage=softmax position_encoding=rotary'),
    ('add_think', '--advantage=softmax', 'tau=9'), ('add_think', '--fixed=False', 'think_cost=1'),
    ('add_think', '--input_max=11', 'code_price=0'),
    ('supervised_rollout_think', '--gate=none --max_steps=3',
     'batch_size=4 text_len=6 learning_rate=1e-2 weight_decay=.5 beta2=.9 clip=.01 warmup_steps=9 dropout=.1 '
     'thoughts=filler thoughts=random readers=later think_len=2 thought_kind=straight_through fixed=False '
     'thought_kind=continuous group_size=3 gate=learned gate=open gate=closed policy_weight=0 '
     'baseline=no_think entropy_weight=1 seed=1'),
    ('supervised_rollout_think', '--think_len=2 --d_thought_vocab=6', 'at_once=2'),
    ('supervised_rollout_think', '--fixed=False', 'think_cost=9'),
    ('rollout_think', '--max_steps=3',
     'prefix_len=4 text_len=5 batch_size=2 group_size=3 learning_rate=1e-2 clip=.01 warmup_steps=9 '
     'd_thought_vocab=4 think_len=2 fixed=True advantage=grpo gamma=0 entropy_weight=0 '
     'supervised_weight=1 temperature=2 seed=1'),
    ('rollout_think', '--advantage=softmax', 'tau=.1'),
    ('rollout_think', '--learning_rate=1e-2', 'weight_decay=.5')])
def test_every_knob_does_something(script, always, changes, train):
    def state(change=''):
        train(script, f'--advance_at=0 {always} {change}' if script == 'add_think' else f'{always} {change}')
        shutil.rmtree('older', ignore_errors=True)
        os.rename('a', 'older')
        return torch.cat([p.flatten() for model in policies('older') for p in model.parameters()])
    seen = {'nothing': state(), **{change: state(f'--{change}') for change in changes.split()}}
    assert torch.equal(state(), seen['nothing'])
    for a, b in itertools.combinations(seen, 2):
        assert seen[a].shape != seen[b].shape or not torch.equal(seen[a], seen[b]), (a, b)


# ---- a code from nothing

SIXTEEN_CODES = '--input_max=16 --d_thought_vocab=4 --batch_size=16 --d_model=32 --n_head=4 --inner_steps=5 '


@pytest.mark.parametrize('method, least, knobs', [
    ('match', 1, '--max_steps=15'), ('match', .8, '--max_steps=40 --batch_size=5'),
    ('sinkhorn', .8, '--max_steps=30'), ('reinforce', 1, '--max_steps=600 --learning_rate=1e-3'),
    ('gumbel', .35, '--max_steps=150 --learning_rate=1e-3 --learning_rate_answer=1e-3 --tau=8')])
def test_a_code_from_nothing(method, least, knobs, train):
    """Sixteen inputs and codes: least is what seeds 0 to 2 reached on a CPU, chance is .06."""
    result = train('autoencoder_think', f'{SIXTEEN_CODES} --eval_every=300 --method={method} {knobs}')
    assert result['accuracy'] >= least and result['codes'] >= 16 * result['accuracy']
    assert result['ablation']['own'] > 2 * others(result)


def test_the_policy_gradient_over_all_codes(names_of):
    """Its gradient is that of its goal, worked out code by code."""
    names = names_of('autoencoder_think', '--method=reinforce')
    thinking, x = names['thinking'], names['inputs']
    codes = thinking.spell(torch.arange(9), 2)
    log_pi = torch.stack([thinking.thought_log_probs(x[:, None], code.expand(len(x), -1))[0].sum(1)
                          for code in codes], dim=1)
    torch.testing.assert_close(names['code_log_probs'](x), log_pi)
    log_q = names['answering'].answer(codes).log_softmax(-1).T.detach()
    pi, written = log_pi.exp(), log_pi.exp().mean(0)
    goal = (pi * (log_q - names['entropy_weight'] * log_pi)).sum(1).mean()
    goal -= names['code_price'] * (written * written.log()).sum()
    loss, weights = names['policy_gradient'](x, None, 0)['thinking_loss'], [*thinking.parameters()]
    for slow, fast in zip(*(torch.autograd.grad(y, weights) for y in (-goal, loss))):
        torch.testing.assert_close(fast, slow, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize('n_inputs, n_tokens, batch', [(9, 3, 4), (16, 5, 5), (20, 2, 20), (20, 2, 6)])
def test_no_code_has_two_owners(n_inputs, n_tokens, batch, train):
    train('autoencoder_think', f'--input_max={n_inputs} --d_thought_vocab={n_tokens} --batch_size={batch} '
          '--max_steps=13')
    slots = checkpoint()['slots']
    owned = slots[slots >= 0]
    assert len(owned.unique()) == len(owned) >= .9 * n_inputs
    assert (owned % n_tokens**2).bincount().max() == math.ceil(n_inputs / n_tokens**2)


def test_dealing_equals_the_obvious_way(names_of):
    one_to_one = names_of('autoencoder_think')['one_to_one']
    for seed in range(20):
        scores = torch.randn(7, 7 + seed % 3 * 4, generator=torch.Generator().manual_seed(seed))
        left, expected = scores.clone(), {}
        while len(expected) < 7:
            row, column = divmod(left.argmax().item(), left.shape[1])
            expected[row] = column
            left[row], left[:, column] = -torch.inf, -torch.inf
        assert dict(enumerate(one_to_one(scores).tolist())) == expected
    assert len(one_to_one(torch.zeros(5, 9)).unique()) == 5


# ---- thoughts between question and answer

SHORT = ('--task=perm --input_max=5 --n_letters=3 --k=2 --advance_at=.9 --batch_size=32 --d_model=32 '
         '--n_head=4 --group_size=8 --d_thought_vocab=12 --learning_rate=6e-3 --eval_every=500 '
         '--eval_questions=500 --heldout=0 ')


def test_thoughts_are_learned_and_used(train):
    result = train('add_think', SHORT + '--max_steps=500')
    assert result['depth'] == 2 and result['heldout_accuracy'] > .95 and others(result) < .6
    assert result['accuracy_at_depth']['2'] == result['heldout_accuracy'] == result['ablation']['own']
    # what is learned stays learned when going on
    assert train('add_think', SHORT + '--max_steps=1 --init_from=a/ckpt.pt')['depth'] == 2


@pytest.mark.parametrize('whose', ['none', 'filler', 'random', 'chain'])
def test_controls_of_thinking(whose, train):
    result = train('add_think', f'--thoughts={whose}')
    assert ('ablation' in result) == ('purity' in result) == (whose != 'none')
    if whose == 'none':  # a normal model, which then grows
        assert checkpoint()['models']['model']['kind'] == 'ModelConfig'
        grown = train('add_think', '--init_from=a/ckpt.pt --max_steps=1 --learning_rate=0')
        assert grown['accuracy_at_depth']['1'] == result['accuracy_at_depth']['1']
    if whose == 'chain':
        assert result['purity'] == 1


def test_held_out_questions_of_a_depth_are_never_drawn_to_train(names_of):
    script = names_of('add_think', '--k=2', '--heldout=.3')
    generator = torch.Generator().manual_seed(0)
    train, test = ({tuple(q) for q in script['draw'](3000, 2, generator, heldout)[0].tolist()}
                   for heldout in (False, True))
    assert not train & test and len(train | test) == 3 * 5 * 5 and 10 < len(test) < 35
    easier = {tuple(q) for q in script['draw'](3000, 1, generator)[0].tolist()}
    assert len(easier) == 3 * 5  # all of them
    assert script['places'](torch.zeros(1, 4)).tolist() == [0, 1, 2, 0]


def test_a_code_in_use_too_often_has_a_price(names_of):
    script = names_of('add_think', '--input_max=5', '--k=2', '--d_thought_vocab=32')
    thought = script['n_tokens'] + torch.tensor([[0], [0], [0], [1], [2], [3], [4], [4], [5], [6]])
    used = torch.tensor([.3, .3, .3, .1, .1, .1, .2, .2, .1, .1])
    # a running mean from a fifth, as five answers are due; a fifth more is chance
    due = (.9 * .2 + .1 * used) * 5 / 1.2
    torch.testing.assert_close(script['overuse'](thought), due.clamp(min=1).log())


@pytest.mark.parametrize('baseline', ['group', 'batch', 'no_think'])
def test_what_rollouts_are_compared_with(baseline, names_of):
    script = names_of('add_think', f'--baseline={baseline}', '--code_price=0', '--k=2')
    question, states = script['draw'](3, 2)
    thought, answer = script['n_tokens'] + torch.randint(5, (12, 1)), states[:, -1]
    rewards = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    weights, _ = script['pay'](question, thought, answer, rewards, 0. * thought)
    at_once = script['respond'](question, question[:, :0])[2].detach().gather(1, answer[:, None])
    base = {'group': rewards.mean(1, keepdim=True), 'batch': rewards.mean(), 'no_think': at_once}[baseline]
    torch.testing.assert_close(weights * 4, rewards - base)


# ---- knobs that are edited into the file

@pytest.fixture
def edited(tmp_path):
    """A copy of a script with other knobs, to be run in its place."""
    def edited(script, **knobs):
        text = (ROOT / f'{script}.py').read_text()
        for name, code in knobs.items():
            text, n = re.subn(rf'(?m)^{name} = .*?(?=  #|$)', f'{name} = {code}', text)
            assert n == 1
        (tmp_path / f'{script}.py').write_text(text)
        return tmp_path / script
    return edited


def test_any_expression_is_fine_in_the_file(edited, train):
    path = edited('add_normal', batch_size='4 * 4', max_steps='int(6)', input_max='3 + 4')
    assert train(path, '--device=cpu')['steps'] == 6
    knobs = checkpoint()['knobs']
    assert knobs['batch_size'] == 16 and knobs['input_max'] == 7


def test_what_is_edited_counts_as_what_is_given(edited, train, refuse):
    def used(knobs, folder):
        train(path, ' '.join(TINY['add_normal']) + knobs, folder)
        return [checkpoint(folder)['knobs'][name] for name in ('learning_rate', 'heldout')]
    train('add_normal')
    path = edited('add_normal', learning_rate='1e-2 / 5', heldout='.5')
    assert used(' --init_from=a/ckpt.pt', 'b') == [.002, .2]  # keeps its split
    assert used(' --init_from=resume --max_steps=8', 'a') == [.003, .2]  # keeps all
    refuse(edited('add_think', advantage="'grpo'"), '--baseline=batch', 'needs --baseline=group')
    refuse(edited('add_normal', n_layer='-1'), '', '--n_layer=-1 must be between 1')


# ---- interruption

def assert_same_runs(a, b):
    """Two runs that left the same metrics, samples and weights."""
    assert metrics(a) == metrics(b)
    assert (a / 'samples.txt').read_text() == (b / 'samples.txt').read_text()
    for file in ('ckpt.pt', 'best.pt'):
        ours, theirs = checkpoint(a, file), checkpoint(b, file)
        assert ours['step'] == theirs['step'] and ours['best'] == theirs['best']
        state = [name for name, x in ours.items() if torch.is_tensor(x)]
        assert all(torch.equal(ours[name], theirs[name]) for name in state)
        for model, packed in ours['models'].items():
            for key, tensor in packed['state'].items():
                assert torch.equal(tensor, theirs['models'][model]['state'][key]), key


@pytest.mark.parametrize('script, more', [
    *((script, more) for script in SCRIPTS for more in ('', *VARIANTS[script])),
    ('add_think_blind', '--search=False --advantage=grpo --dtype=bfloat16'),
    ('supervised_rollout_think', '--thought_kind=straight_through --dropout=.1')])
def test_interrupted_and_resumed_equals_uninterrupted(script, more, train, run_here, tmp_path):
    train(script, more, 'whole')
    broken = [script, *more.split(), '--out_dir=broken']
    interrupt(2, run_here, *broken)
    interrupt(4, run_here, *broken, '--init_from=resume')
    interrupt(6, run_here, *broken, '--init_from=resume')
    for _ in range(2):  # resuming what is finished changes nothing
        train(script, f'{more} --init_from=resume', 'broken')
        assert_same_runs(tmp_path / 'broken', tmp_path / 'whole')


def test_stopped_by_a_signal(tmp_path):
    process = start('add_normal', f'--out_dir={tmp_path}/a', '--max_steps=100000')
    while process.poll() is None and not (tmp_path / 'a/ckpt.pt').exists():
        time.sleep(.01)
    process.terminate()
    _, err = process.communicate()
    assert process.returncode == 2 and err.count('\n') == 1
    assert 'stopped; ' in err and '--init_from=resume goes on' in err


def test_as_people_run_it():
    """Into `head`, and on Windows, which has no fcntl and resource."""
    windows = '-W ignore -c "import sys; sys.modules.update(fcntl=None, resource=None); import utils"'
    for command in ('add_normal.py --help | true', windows):
        ran = subprocess.run(f'{sys.executable} {command}', shell=True, cwd=ROOT, stderr=subprocess.PIPE)
        assert (ran.returncode, ran.stderr) == (0, b'')


def test_the_clock_goes_on_when_resumed(train):
    steps = train('add_normal', '--max_steps=100000 --max_seconds=.5')['steps']
    result = train('add_normal', '--init_from=resume')
    assert 0 < steps == result['steps'] and .5 < result['seconds']  # its time was over


SEVERAL_RUNS = """
import json, os, runpy, sys
for i, sys.argv in enumerate(json.loads(sys.argv[1])):
    os.environ['TORCHELASTIC_RESTART_COUNT'] = str(i)
    runpy.run_path(sys.argv[0], run_name='__main__')
"""


@pytest.mark.parametrize('scripts, n_nodes', [(SCRIPTS[:3], 1), (SCRIPTS[3:], 2)])
def test_two_processes_equal_one(scripts, n_nodes, train, tmp_path):
    """Of one node, or of two here. They start once, as that takes a while, for all variants."""
    # half precision rounds halves of a batch otherwise
    runs = [(script, f'{more} --max_steps=8 --eval_every=4 --dtype=float32')
            for script in scripts for more in ('', *VARIANTS[script])]
    lines = [[str(ROOT / f'{script}.py'), *TINY[script], *more.split(), f'--out_dir={tmp_path}/two{i}']
             for i, (script, more) in enumerate(runs)]
    (tmp_path / 'several.py').write_text(SEVERAL_RUNS)
    env = os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    with socket.create_server(('localhost', 0)) as server:
        node = f'--nnodes=2 --nproc_per_node=1 --master_port={server.getsockname()[1]} --node_rank='
    nodes = [TORCHRUN] if n_nodes == 1 else [[*TORCHRUN[:3], *(node + rank).split()] for rank in '01']
    log = tmp_path / 'log'
    with log.open('w') as file:
        nodes = [subprocess.Popen([*command, tmp_path / 'several.py', json.dumps(lines)], env=env,
                                  stdout=file, stderr=file) for command in nodes]
    for i, (script, more) in enumerate(runs):
        assert train(script, more, f'one{i}')['steps'] == 8
    assert [process.wait(timeout=300) for process in nodes] == [0] * n_nodes, log.read_text()
    for i, (script, more) in enumerate(runs):
        for one, two in zip(policies(f'one{i}'), policies(f'two{i}'), strict=True):
            for (name, p), q in zip(one.named_parameters(), two.parameters()):
                torch.testing.assert_close(q, p, atol=1e-5, rtol=0, msg=f'{script} {more}: {name}')
        assert json.loads((tmp_path / f'two{i}/config.json').read_text())['processes'] == 2
        assert_alike(tmp_path / f'one{i}', tmp_path / f'two{i}')


def assert_alike(*folders):
    for one, two in zip(*map(metrics, folders), strict=True):
        for name in one.keys() - {'chosen_codes', 'distinct_thoughts'}:
            assert two[name] == pytest.approx(one[name], abs=1e-3), name


DIES = """
import os, runpy, signal, sys, utils
def dies(self, step, log=utils.Run.log, **numbers):
    if step == 4 and self.world.rank == 1 and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':
        os.kill(os.getpid(), signal.SIGKILL)
    log(self, step, **numbers)
utils.Run.log, sys.argv = dies, sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


def test_a_killed_worker_is_started_again_and_goes_on(train, tmp_path):
    (tmp_path / 'dies.py').write_text(DIES)
    two = start('add_normal', f'--out_dir={tmp_path}/two', '--init_from=auto', env={'PYTHONPATH': str(ROOT)},
                launcher=(*TORCHRUN, '--max-restarts=1', tmp_path / 'dies.py'))
    train('add_normal', '--init_from=auto', 'one')
    assert two.wait(timeout=300) == 0, two.stderr.read()
    assert_alike(tmp_path / 'one', tmp_path / 'two')


# ---- bad input

BAD = {
    'of every script': {
        '--batch_sise=2': 'nearest is --batch_size', 'seed=3': 'not of the form --name=value',
        '--eval_only=yes': 'must be True or False', '--max_steps=2.5': 'must be an integer',
        '--max_steps=0': 'must be between 1', '--learning_rate=nan': 'must be between 0',
        '--seed=9999999999': 'must be between 0', '--out_dir=\a': 'cannot be printed',
        '--n_head=3': 'n_head=3 does not divide', '--d_model=1048576': 'memory',
        '--device=tpu9': '--device=tpu9 must be', '--device=meta': '--device=meta must be',
        '--device=cuda:77': '--device=cuda:77 must be', '--dtype=float8': 'must be one of float32, bfloat16',
        '--init_from=resume': 'no checkpoint out/', '--init_from=nowhere.pt': 'no checkpoint nowhere.pt'},
    'add_normal': {
        '--encoding=roman': 'must be one of int, digits', '--input_min=6': 'too few',
        '--heldout=1': 'must be between 0'},
    'add_think_blind': {
        '--think_len=40': 'min(2^17', '--n_adds=40': 'too few or too many',
        '--advantage=ppo': 'must be one of balanced, softmax, best', '--epsilon=1.5': 'must be between 0',
        '--advantage=grpo': 'need rollouts: --search=False', '--epsilon=.1': 'need rollouts: --search=False',
        '--compile=True --search=False': 'steps that are alike',
        '--search=False --advantage=rloo --group_size=1': 'must be at least 2',
        '--super=True --d_thought_vocab=6': 'make no digits',
        '--split=False --frozen=thinking': '--split=True'},
    'add_think': {
        '--input_max=4': 'products need a prime', '--group_size=1': 'must be at least 2',
        '--n_letters=121': 'must be between 1', '--task=maze': 'one of add, perm, s5, story',
        '--fixed=False --thoughts=filler': 'have no end to choose',
        '--baseline=batch --advantage=grpo': 'advantage=grpo needs --baseline=group',
        '--thoughts=chain --d_thought_vocab=2': 'needs --d_thought_vocab=3',
        '--position_encoding=rotary --d_model=6': 'must be even',
        '--heldout=.0005 --k=1 --eval_only=True': 'leaves no questions'},
    'autoencoder_think': {
        '--method=ppo': 'must be one of match, sinkhorn', '--think_len=40': '2^24 codes',
        '--input_max=2147483647': '2^24',
        '--method=sinkhorn --think_len=14 --input_max=99': 'over 2^26: --method=match',
        '--method=reinforce --batch_size=7': 'all 8 inputs', '--method=reinforce --think_len=14': '2^23'},
    'supervised_rollout_think': {
        '--data=nowhere': 'no data in nowhere, see prepare_data.py', '--group_size=1': 'at least 2',
        '--text_len=900': 'a smaller --text', '--readers=loop': 'runs the layers again',
        '--at_once=2': 'must divide think_len=1',
        '--fixed=False --thought_kind=continuous': 'have no end', '--micro_batch=3': 'does not divide the 8',
        '--thought_kind=continuous --think_len=2 --at_once=2 --d_thought_vocab=6': '--at_once=1',
        '--reference=nowhere.pt': 'no checkpoint nowhere.pt', '--beta2=1': 'must be between 0',
        f'--reference={TEXT.name}/other.pt': "no model called model, but ['other']"},
    'rollout_think': {'--group_size=1': 'must be at least 2', '--reference=': 'a --reference',
                      '--n_head=3': 'unknown knob', '--d_model=1048576': 'unknown knob'}}


@pytest.mark.parametrize('script', SCRIPTS)
def test_bad_input(script, refuse, run_here, tmp_path):
    for knobs, message in (BAD['of every script'] | BAD[script]).items():
        refuse(script, knobs, message)
    assert not list(tmp_path.iterdir())
    code, out, _ = run_here(script, '--help')
    assert code == 0 and '\nbatch_size = ' in out and f'python {script}.py' in out


CHANGES = {  # of a checkpoint, which then cannot be resumed
    'step': '3', 'best': [], 'seconds': None, 'written': [0, 10**9], 'knobs': [], 'models': {}, 'text': '',
    'generator': torch.zeros(3), 'optimizers': [], 'depth': 1, 'frequency': torch.zeros(2, 2)}


def test_checkpoints_are_not_trusted(train, refuse, tmp_path):
    def refused(message, **changes):
        torch.save(good | changes, tmp_path / 'a/ckpt.pt')
        refuse('add_think', '--out_dir=a --init_from=resume', message)
    train('add_think')
    good = checkpoint()
    logs = [(tmp_path / 'a' / file).read_bytes() for file in ('metrics.jsonl', 'samples.txt')]
    for name, value in CHANGES.items():
        refused('', **{name: value})
        assert logs == [(tmp_path / 'a' / file).read_bytes() for file in ('metrics.jsonl', 'samples.txt')]
    for knob, value in {'batch_size': 'x', 'n_layer': 1.5, 'group_size': 10**9, 'task': 'no'}.items():
        refused(f'--{knob}=', knobs=good['knobs'] | {knob: value})
    optimizer = checkpoint()['optimizers'][0]
    optimizer['state'][0]['exp_avg'] = torch.zeros(1)  # fused kernels would write beyond
    refused('does not fit', optimizers=[optimizer])
    model = checkpoint()['models']['model']
    for change in ({'n_layer': 10**9}, {'d_model': 2**20}, {'init': 7}):
        refused('no model of this version', models={'model': model | {'config': model['config'] | change}})
    model['state']['wte.weight'][0] = math.nan
    refused('not finite', models={'model': model})
    torch.save(good, tmp_path / 'a/ckpt.pt')
    train('add_think', '--init_from=resume')


def test_bad_checkpoints(train, refuse, tmp_path):
    train('add_normal')
    path, lines, resume = tmp_path / 'a/ckpt.pt', metrics(tmp_path / 'a'), '--out_dir=a --init_from=resume'
    good, packed = path.read_bytes(), zipfile.ZipFile(tmp_path / 'packed.pt', 'w', zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(path) as archive, packed:
        for name in archive.namelist():
            packed.writestr(name, bytes(10**8) if name.endswith('data/0') else archive.read(name))
    flipped = bytearray(good)
    flipped[good.index(checkpoint()['models']['model']['state']['wte.weight'].numpy().tobytes())] ^= 1
    for damaged in (good[:len(good) // 2], bytes(flipped), (tmp_path / 'packed.pt').read_bytes()):
        path.write_bytes(damaged)
        refuse('add_normal', resume, 'damaged or no checkpoint')
    torch.save([1, 2], path)
    refuse('add_normal', resume, 'no checkpoint of ours')
    path.write_bytes(good)
    refuse('add_normal', f'{resume} --n_layer=2', 'cannot be changed when going on')
    refuse('add_think_blind', resume, 'is from add_normal.py')
    refuse('add_normal', '--init_from=a/ckpt.pt --n_layer=2', 'n_layer=1, not 2')
    refuse('add_think_blind', '--init_from=a/ckpt.pt', 'no model called thinking')
    train('add_normal', '--init_from=resume')  # nothing was damaged
    assert metrics(tmp_path / 'a') == lines
    os.truncate(tmp_path / 'a/metrics.jsonl', 9)
    refuse('add_normal', resume, 'its logs are too short')


def test_a_diverged_run_keeps_its_good_checkpoint(train, refuse):
    diverges = '--learning_rate=1e9 --weight_decay=1e9 --log_every=100 --max_steps=10 --eval_every='
    refuse('add_normal', f'--out_dir=a {diverges}1', 'diverged, a smaller learning_rate may help; a/ckpt.pt')
    refuse('add_normal', f'--out_dir=b {diverges}99', 'a weight is not finite at step 10')
    for folder, file in itertools.product('ab', ('ckpt.pt', 'best.pt')):
        for packed in checkpoint(folder, file)['models'].values():
            assert all(x.isfinite().all() for x in packed['state'].values())


@pytest.mark.parametrize('error, line', [
    (KeyboardInterrupt(), 'stopped; a/ckpt.pt is whole'), (BrokenPipeError(), ''),
    (OSError(28, 'No space left on device', 'x'), "No space left on device: 'x'; a/ckpt.pt is whole"),
    (OSError(2, 'No such file', 'gone/x'), "No such file: 'gone/x'\n"),
    (MemoryError('Unable to allocate'), 'not enough memory'), (RuntimeError('out of memory'), 'not enough'),
    (type('NoCompiler', (Exception,), {'__module__': 'torch._inductor.exc'})('g++'), 'cannot compile: g++'),
    (ZeroDivisionError(), 'Traceback'), (ValueError('of a library'), 'Traceback')])
def test_what_is_no_bug_is_one_line(error, line, monkeypatch, capfd):
    monkeypatch.setattr(utils.Run, 'where', '; a/ckpt.pt is whole')
    monkeypatch.setattr(os, 'dup2', print)  # would close stdout
    with pytest.raises(SystemExit) if line != 'Traceback' else contextlib.nullcontext():
        try:
            raise error
        except BaseException as raised:
            utils.excepthook(type(raised), raised, raised.__traceback__)
    err = capfd.readouterr().err
    assert line in err and (line == 'Traceback' or err.count('\n') == (line != ''))


def test_a_full_disk(train, refuse, tmp_path, monkeypatch):
    train('add_normal')
    good = (tmp_path / 'a/ckpt.pt').read_bytes()

    def full(checkpoint, file):
        try:
            file.write(b'half of it')
            raise OSError(28, 'No space left on device')
        finally:
            raise RuntimeError('unexpected pos')  # as torch does
    monkeypatch.setattr(torch, 'save', full)
    refuse('add_normal', '--out_dir=a --init_from=resume --max_steps=9', 'No space left on device')
    assert (tmp_path / 'a/ckpt.pt').read_bytes() == good and not [*(tmp_path / 'a').glob('*.tmp')]


@pytest.mark.parametrize('script', ['supervised_rollout_think', 'rollout_think'])
def test_text_is_not_trusted(script, train, refuse, tmp_path):
    folder, meta = tmp_path / 'text', json.loads(Path(TEXT.name, 'meta.json').read_text())
    shutil.copytree(TEXT.name, folder)
    train(script, f'--data={folder}')
    for change in ({'d_vocab': '14'}, {'d_vocab': 9}, {'characters': None}, {'characters': ['a'] * 14},
                   {'tokenizer': 'bert'}, {'tokenizer': []}, {'tokenizer': 'gpt2'}):
        (folder / 'meta.json').write_text(json.dumps(meta | change))
        refuse(script, f'--data={folder}', 'no data in')
    (folder / 'meta.json').write_text(json.dumps(meta | {'characters': meta['characters'][::-1]}))
    for other in ('--init_from=a/ckpt.pt', f'--reference={TEXT.name}/judge.pt'):  # of the same number
        refuse(script, f'--data={folder} {other}', 'text' if 'ref' in other else 'is not what --init_from')
    (folder / 'meta.json').write_text(json.dumps(meta))
    tokens = bytearray((folder / 'train.bin').read_bytes())
    for token, message in ((3 - tokens[0] % 2, 'is not what --init_from=resume'), (14, 'no data in')):
        tokens[0] = token
        (folder / 'train.bin').write_bytes(tokens)
        refuse(script, f'--data={folder} --out_dir=a --init_from=resume', message)


def test_what_is_found_to_be_bad_later(refuse, tmp_path, monkeypatch):
    refuse('add_normal', '--learning_rate=1e9 --max_steps=100', 'training diverged')
    (tmp_path / 'file').touch()
    (tmp_path / 'loop').symlink_to('loop')
    for folder, message in (('file/a', 'Not a directory'), ('loop/a', 'symbolic links'),
                            ('x' * 300, 'name too long'), ('/proc/a', 'No such file')):
        refuse('add_normal', f'--out_dir={folder}', message)
    monkeypatch.setitem(sys.modules, 'wandb', None)
    refuse('add_think_blind', '--out_dir=b --wandb_mode=offline', 'pip install wandb')
    monkeypatch.setenv('WORLD_SIZE', '2')
    refuse('autoencoder_think', '--out_dir=b', 'only one is set')
    monkeypatch.setenv('RANK', '0')
    refuse('autoencoder_think', '--out_dir=b --batch_size=3', 'batch_size=3 cannot be shared by 2')
    assert not (tmp_path / 'b').exists()


# ---- the repository

ROOM = {  # files: most lines, most KB
    'model.py': (700, 38), 'utils.py': (1000, 51), 'add_normal.py': (140, 6.5),
    'add_think_blind.py': (290, 17.5), 'add_think.py': (320, 19), 'autoencoder_think.py': (280, 16),
    'supervised_rollout_think.py': (290, 17.5), 'rollout_think.py': (450, 27), 'prepare_data.py': (240, 13.5),
    'bench.py': (780, 46), 'README.md': (250, 20), 'tests/*.py': (2400, 125)}


@pytest.mark.parametrize('files', list(ROOM))
def test_files_keep_to_their_room(files):
    text = ''.join(path.read_text() for path in ROOT.glob(files))
    most_lines, most_kb = ROOM[files]
    assert len(text.splitlines()) <= most_lines and len(text.encode()) <= 1000 * most_kb
    assert files == 'README.md' or [line for line in text.splitlines() if len(line) > 110] == []
    block = text.partition('# ---- knobs ----')[2].partition('\n# ----')[0]
    assert len(re.findall(r'(?m)^\w+ = ', block)) <= 42

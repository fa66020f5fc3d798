"""supervised_rollout_think.py: ordinary training where nobody thinks, and what thoughts are paid where they do."""
import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TEXT, metrics

from model import GPT2, ModelConfig, unpack

SCRIPT = 'supervised_rollout_think'


def losses(folder, *more):
    """The training loss at each step of a run."""
    return torch.tensor([line['loss'] for line in metrics(folder) if 'loss' in line], dtype=torch.float64)


def load(folder):
    return unpack(torch.load(folder / 'ckpt.pt', weights_only=True)['models']['model'])


def test_without_thoughts_it_is_ordinary_training(run_here, tmp_path):
    """As nanoGPT's train.py does it, written out here."""
    knobs = ['--think_len=0', '--learning_rate=1e-2', '--max_steps=30', '--eval_every=30', '--warmup_steps=5',
             '--seed=3', '--n_layer=2']
    assert run_here(SCRIPT, f'--out_dir={tmp_path}/a', *knobs)[0] == 0
    torch.manual_seed(3)
    model = GPT2(ModelConfig(d_vocab=14, block_size=8, n_layer=2, n_head=2, d_model=16))
    decay, rest = ([p for p in model.parameters() if (p.dim() >= 2) == matrix] for matrix in (True, False))
    optimizer = torch.optim.AdamW([{'params': decay, 'weight_decay': .1}, {'params': rest, 'weight_decay': 0.}],
                                  lr=1e-2, betas=(.9, .99))
    text, found = np.fromfile(f'{TEXT.name}/train.bin', np.uint16), []
    for step in range(30):
        rate = 1e-2 * (step + 1) / 6 if step < 5 else (
            1e-3 + (1e-2 - 1e-3) * .5 * (1 + math.cos(math.pi * (step - 5) / (30 - 5))))
        for group in optimizer.param_groups:
            group['lr'] = rate
        starts = np.random.default_rng([3, step]).integers(len(text) - 8, size=8)
        x, y = (torch.tensor(np.stack([text[i + k:i + k + 8] for i in starts]).astype(int)) for k in (0, 1))
        loss = F.cross_entropy(model(x).view(-1, 14), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        optimizer.step()
        found.append(loss.item())
    torch.testing.assert_close(losses(tmp_path / 'a'), torch.tensor(found, dtype=torch.float64), atol=1e-6, rtol=0)
    assert found[-1] < found[0] - .1


@pytest.mark.parametrize('more', [['--think_len=3'], ['--readers=later', '--init=unit'], ['--accumulate=4']])
def test_thoughts_that_are_hidden_from_the_answer_change_nothing(more, run_here, tmp_path):
    more += ['--max_steps=20', '--eval_every=20']
    assert run_here(SCRIPT, f'--out_dir={tmp_path}/a', *more, '--think_len=0')[0] == 0
    assert run_here(SCRIPT, f'--out_dir={tmp_path}/b', *more, '--gate=closed', '--policy_weight=0')[0] == 0
    if '--accumulate=4' not in more:
        torch.testing.assert_close(losses(tmp_path / 'a'), losses(tmp_path / 'b'), atol=1e-6, rtol=0)
    for name, p in load(tmp_path / 'a').state_dict().items():
        grown = load(tmp_path / 'b').state_dict()[name][:len(p)]
        torch.testing.assert_close(grown, p, atol=1e-5, rtol=0)


def test_parts_of_a_batch_make_the_update_of_the_whole(run_here, tmp_path):
    for parts in (1, 4):
        assert run_here(SCRIPT, f'--out_dir={tmp_path}/{parts}', f'--accumulate={parts}')[0] == 0
    for name, p in load(tmp_path / '1').state_dict().items():
        torch.testing.assert_close(load(tmp_path / '4').state_dict()[name], p, atol=1e-5, rtol=0)


def test_a_model_that_is_grown_begins_at_the_loss_it_had(run_here, tmp_path):
    code, out, _ = run_here(SCRIPT, f'--out_dir={tmp_path}/a', '--think_len=0', '--max_steps=30')
    before = json.loads(out.splitlines()[-1])['val_loss']
    grow = [f'--init_from={tmp_path}/a/ckpt.pt', '--think_len=2', f'--reference={tmp_path}/a/ckpt.pt']
    code, out, err = run_here(SCRIPT, f'--out_dir={tmp_path}/b', *grow)
    assert code == 0, err
    first, result = metrics(tmp_path / 'b')[0], json.loads(out.splitlines()[-1])
    for name in ('val_loss', 'val_loss_none', 'val_loss_reference'):
        assert first[name] == pytest.approx(before, abs=1e-6)
    assert result['above_own']['reference'][0] == pytest.approx(before - result['val_loss'], abs=1e-6)
    assert result['val_loss'] != before and set(result['by_difficulty']) == {'reference', 'none', 'own'}
    fifths = result['by_difficulty']['reference']
    assert sorted(fifths) == fifths and len(fifths) == 5 and sum(fifths) / 5 == pytest.approx(before, abs=.01)


def test_the_last_position_alone_loses_what_it_loses_among_all(script):
    names = script('--positions=last', '--gate=none', '--think_len=2', '--policy_weight=0')
    x, y = names['draw'](0)
    noise = torch.rand(16, 8, 2)
    last = names['losses'](x, y, noise, 0.)[0]
    *_, states = names['think'](x, noise)
    every = names['loss_at'](states, y.repeat_interleave(2, dim=0))
    torch.testing.assert_close(last, every[:, -1].mean(), atol=1e-5, rtol=0)


@pytest.mark.parametrize('gamma', [0., .5])
def test_thoughts_are_paid_by_what_others_of_their_position_get(gamma, script):
    names = script('--think_len=2', '--gate=none', '--policy_weight=3', f'--gamma={gamma}', '--readers=later')
    x, y = (part[:2] for part in names['draw'](0))
    noise = torch.rand(6, 8, 2)     # three rollouts
    loss = names['losses'](x, y, noise, .7)[0]
    _, log_pi, entropy, _, states = names['think'](x, noise)
    right = -names['loss_at'](states, y.repeat_interleave(3, dim=0))
    expected = -right.mean()
    for b in range(2):
        for s in range(8):
            paid = [sum(gamma ** (t - s) * right[3 * b + g, t].item() for t in range(s, 8)) for g in range(3)]
            for g in range(3):
                advantage = paid[g] - sum(paid) / 3
                expected = expected - 3 * advantage / 3 * log_pi[3 * b + g, s].sum() / 16
                expected = expected - .7 * entropy[3 * b + g, s].sum() / 48
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)


def test_every_knob_of_text_does_something(run_here, tmp_path):
    def state(*more):
        shutil.rmtree(tmp_path / 'a', ignore_errors=True)
        code, _, err = run_here(SCRIPT, f'--out_dir={tmp_path}/a', '--gate=none', '--max_steps=3', *more)
        assert code == 0, err
        return torch.cat([x.flatten() for x in load(tmp_path / 'a').state_dict().values()])
    usual, seen = state(), []
    for knob in ('batch_size=4', 'text_len=6', 'learning_rate=1e-2', 'weight_decay=.5', 'beta2=.9', 'clip=.01',
                 'warmup_steps=9', 'dropout=.1', 'init=unit', 'thoughts=filler', 'thoughts=random',
                 'thought=straight_through', 'thought=continuous', 'readers=later', 'think_len=2', 'fixed=False',
                 'spread=3', 'temperature=.1',
                 'group_size=3', 'gate=learned', 'gate=open', 'gate=closed', 'plain_weight=.5', 'policy_weight=0',
                 'baseline=no_think', 'advantage=grpo', 'advantage=softmax', 'gamma=.5', 'epsilon=1',
                 'entropy_weight=1', 'positions=last', 'seed=1'):
        seen.append(state(f'--{knob}'))
        assert not torch.equal(seen[-1], usual), knob
    assert not torch.equal(state('--advantage=softmax', '--tau=.1'), state('--advantage=softmax'))
    assert not torch.equal(state('--think_len=2', '--d_thought_vocab=6', '--at_once=2'),
                           state('--think_len=2', '--d_thought_vocab=6'))
    assert not torch.equal(state('--fixed=False', '--think_cost=9'), state('--fixed=False'))

"""supervised_rollout_think.py: training without thoughts, and what thoughts are paid."""
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TEXT, metrics, result_of

from model import GPT2, ModelConfig, unpack

SCRIPT = 'supervised_rollout_think'


@pytest.fixture
def train(run_here, tmp_path):
    """Train with more knobs, in a new folder; returns it, and the last line."""
    def train(*more, name='a'):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        return tmp_path / name, result_of(run_here(SCRIPT, f'--out_dir={tmp_path}/{name}', *more))
    return train


def losses(folder):
    """The training loss at each step of a run."""
    return torch.tensor([line['loss'] for line in metrics(folder) if 'loss' in line])


def load(folder):
    return unpack(torch.load(folder / 'ckpt.pt', weights_only=True)['models']['model'])


def test_without_thoughts_it_is_ordinary_training(train):
    """As nanoGPT's train.py does it, written out here."""
    knobs = '--learning_rate=1e-2 --max_steps=30 --warmup_steps=5 --seed=3 --n_layer=2'
    folder, _ = train('--think_len=0', *knobs.split())
    torch.manual_seed(3)
    model = GPT2(ModelConfig(d_vocab=14, block_size=8, n_layer=2, n_head=2, d_model=16))
    optimizer = torch.optim.AdamW([
        {'params': [p for p in model.parameters() if p.dim() >= 2], 'weight_decay': .1},
        {'params': [p for p in model.parameters() if p.dim() < 2], 'weight_decay': 0.}], betas=(.9, .99))
    text, found = np.fromfile(f'{TEXT.name}/train.bin', np.uint16), []
    for step in range(30):
        cosine = 1e-3 + (1e-2 - 1e-3) * .5 * (1 + math.cos(math.pi * (step - 5) / (30 - 5)))
        for group in optimizer.param_groups:
            group['lr'] = 1e-2 * (step + 1) / 6 if step < 5 else cosine
        starts = np.random.default_rng([3, step]).integers(len(text) - 8, size=8)
        x, y = (torch.tensor(np.stack([text[i + k:i + k + 8] for i in starts]).astype(int)) for k in (0, 1))
        loss = F.cross_entropy(model(x).view(-1, 14), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        optimizer.step()
        found.append(loss.item())
    torch.testing.assert_close(losses(folder), torch.tensor(found), atol=1e-6, rtol=0)
    assert found[-1] < found[0] - .1


@pytest.mark.parametrize('more', ['--think_len=3', '--readers=later', '--micro_batch=2'])
def test_thoughts_that_are_hidden_from_the_answer_change_nothing(more, train):
    more = [more, '--max_steps=20', '--eval_every=20']
    plain, _ = train(*more, '--think_len=0')
    hidden, _ = train(*more, '--gate=closed', '--policy_weight=0', name='b')
    torch.testing.assert_close(losses(plain), losses(hidden), atol=1e-6, rtol=0)
    for name, p in load(plain).state_dict().items():
        torch.testing.assert_close(load(hidden).state_dict()[name][:len(p)], p, atol=1e-5, rtol=0)


def test_micro_batches_make_the_update_of_the_whole(train, run_here):
    whole, parts = train()[0], train('--micro_batch=2', name='b')[0]
    torch.testing.assert_close(losses(whole), losses(parts), atol=1e-5, rtol=0)
    torch.testing.assert_close(load(whole).state_dict(), load(parts).state_dict(), atol=1e-5, rtol=0)
    refused = run_here(SCRIPT, '--micro_batch=3')
    assert refused == (2, '', 'error: micro_batch=3 does not divide the 8 sequences of a process\n')


def test_a_model_that_is_grown_begins_at_the_loss_it_had(train):
    folder, before = train('--think_len=0', '--max_steps=30')
    grow = [f'--init_from={folder}/ckpt.pt', '--think_len=2', f'--reference={folder}/ckpt.pt']
    grown, result = train(*grow, name='b')
    for name in ('val_loss', 'val_loss_none', 'val_loss_reference'):
        assert metrics(grown)[0][name] == pytest.approx(before['val_loss'], abs=1e-6)
    above, error = result['above_own']['reference']
    assert above == pytest.approx(before['val_loss'] - result['val_loss'], abs=1e-6) and above != 0 < error
    assert [*result['ablation']] == ['own', 'shuffled', 'random', 'constant', 'none']


@pytest.mark.parametrize('baseline', ['group', 'no_think'])
def test_thoughts_are_paid_more_than_the_baseline_or_less(baseline, script):
    names = script('--think_len=2', '--gate=none', '--policy_weight=3', '--group_size=3', '--readers=later',
                   f'--baseline={baseline}')
    x, y = names['cut'](names['train_set'][:2])
    noise = torch.rand(6, 8, 2)
    loss, _ = names['learn'](x, y, noise, .7)
    _, log_pi, entropy, plain, states = names['think'](x, noise)
    right = -names['loss_at'](states, y.repeat_interleave(3, dim=0))
    without = -names['loss_at'](plain, y)  # the copy is still the model
    expected = -right.mean() - (without.mean() if baseline == 'no_think' else 0)
    for b in range(2):
        for s in range(8):
            paid = right[3 * b:3 * b + 3, s].detach()
            advantage = paid - (paid.mean() if baseline == 'group' else without[b, s].detach())
            for g in range(3):
                expected = expected - 3 * advantage[g] / 3 * log_pi[3 * b + g, s].sum() / 16
                expected = expected - .7 * entropy[3 * b + g, s].sum() / 48
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)


def test_samples_go_on_from_the_end_of_a_short_val(train, tmp_path):
    for part in ('train.bin', 'meta.json'):
        shutil.copy(f'{TEXT.name}/{part}', tmp_path)
    np.arange(2, 14, dtype=np.uint16).tofile(tmp_path / 'val.bin')  # abc...l
    for more in (['--fixed=False', '--think_len=3'], ['--think_len=0']):
        samples = (train(f'--data={tmp_path}', *more)[0] / 'samples.txt').read_text()
        assert samples.startswith('efghijkl | ') and ('<think' in samples) == ('--think_len=3' in more)
        assert '<end_thought>' not in samples and '><' not in samples

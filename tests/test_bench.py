"""bench.py: the exact gradient that estimators are measured against, and verdicts on trainings."""
import json
import runpy
import shutil
import sys

import pytest
import torch
from conftest import ROOT


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """The names of bench.py, which has written nothing but the tables of a README without results."""
    for name in ('bench.py', 'README.md'):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.setattr(sys, 'argv', ['bench.py', '--suite=tables'])
    return runpy.run_path(str(tmp_path / 'bench.py'))


@pytest.mark.parametrize('reward', ['sparse', 'dense'])
def test_the_exact_gradient_is_that_of_the_expected_reward(bench, reward):
    small = bench['Enumerated'](0, level=.4, M=3, L=3)
    pi = small.log_pi(small.question).exp().detach()
    assert torch.allclose(pi.sum(1), torch.ones(9))
    assert .4 <= (pi * small.rewards['sparse']).sum(1).mean() < .8
    exact = small.exact(pi, reward) @ small.jacobian()
    by_autograd = torch.autograd.grad(
        small.value(reward), list(small.model.parameters()), materialize_grads=True)
    assert torch.allclose(exact, torch.cat([part.flatten() for part in by_autograd]), atol=1e-5)


def test_estimates_beside_the_exact_gradient(bench):
    small, G, n = bench['Enumerated'](0, M=3, L=3), 4, 2000
    pi, jacobian = small.log_pi(small.question).exp().detach(), small.jacobian()
    generator = torch.Generator().manual_seed(0)
    at = torch.randint(9, (n * 8,), generator=generator)
    code = pi[at].multinomial(G, replacement=True, generator=generator)
    which, got = (at[:, None] * 9 + code).view(n, -1), small.rewards['dense'][at[:, None], code].view(n, 8, G)
    value = small.value('dense').item()
    weights = {name: bench['weigh'](got, name, value).view(n, -1) / 8
               for name in ('rloo', 'dr_grpo', 'reinforce', 'softmax, tau .1')}
    assert torch.allclose(weights['dr_grpo'] * G / (G - 1), weights['rloo'], atol=1e-6)
    exact = small.exact(pi, 'dense')
    found = bench['compare'](weights, which, jacobian @ jacobian.T, exact)
    gradient = exact @ jacobian
    for name, weight in weights.items():        # the same the obvious way
        estimates = torch.stack([w @ jacobian[rows] for w, rows in zip(weight, which)])
        cosine = torch.cosine_similarity(estimates, gradient[None])
        assert abs(found[name]['cosine'] - cosine.mean()) < 1e-3
        assert abs(found[name]['length'] - (estimates.norm(dim=1) / gradient.norm()).mean()) < 1e-3
        mean_cosine = torch.cosine_similarity(estimates.mean(0), gradient, dim=0)
        assert abs(found[name]['mean_cosine'] - mean_cosine) < .02
    for name in ('rloo', 'reinforce'):          # without bias
        assert abs(found[name]['mean_cosine'] - 1) < 4 * found[name]['mean_cosine_error'] < .05
        assert found[name]['bias']**2 < 6 * found[name]['variance'] / n         # what noise makes of none
    assert abs(found['dr_grpo']['length'] / found['rloo']['length'] - (1 - 1 / G)) < 1e-3       # too short
    assert found['softmax, tau .1']['mean_cosine'] < .98


def test_verdicts(bench, tmp_path):
    def runs(accuracy, early=(.1, .1, .1), norm_variance=1., effective_n=5., norm_decay=1.):
        return [{'task': 'x', 'changed': {'seed': seed} if seed else {}, 'accuracy': accuracy + .001 * seed,
                 'early': dict(zip(('10', '20', '30'), early)), 'norm_variance': norm_variance,
                 'effective_n': effective_n, 'norm_decay': norm_decay} for seed in range(3)]
    assert bench['verdict'](runs(.5)) == ''     # nothing to compare with
    (tmp_path / 'assets/results').mkdir(parents=True)
    (tmp_path / 'assets/results/weighting-x-rloo.json').write_text(json.dumps({'runs': runs(.5)}))
    assert bench['verdict'](runs(.5)) == ''     # rloo itself
    assert bench['verdict'](runs(.505)) == 'inconclusive'
    assert bench['verdict'](runs(.6)) == 'better: succeeds more'
    assert bench['verdict'](runs(.5, early=(.1, .3, .1))) == 'better: faster early'
    assert bench['verdict'](runs(.3, norm_variance=.1)) == 'worse: steadier gradients, succeeds less'
    assert bench['verdict'](runs(.5, effective_n=1.1)) == 'worse: effective n near 1'
    assert bench['verdict'](runs(.5, norm_variance=.1, norm_decay=.001)) == (
        'inconclusive: steadier gradients, gradients vanish')
    disagree = runs(.6)[:2] + runs(.4)[2:]
    assert bench['verdict'](disagree) == 'inconclusive'


def test_the_tables_of_the_readme_are_those_of_the_results(tmp_path, monkeypatch):
    shutil.copytree(ROOT / 'assets/results', tmp_path / 'assets/results')
    bench.__wrapped__(tmp_path, monkeypatch)
    assert (tmp_path / 'README.md').read_text() == (ROOT / 'README.md').read_text()

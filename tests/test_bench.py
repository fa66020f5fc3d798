"""bench.py: the exact gradient that estimators are measured against, verdicts, tables, the pages."""
import re
import runpy
import shutil
import sys

import pytest
import torch
from conftest import ROOT, TINY


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """The names of bench.py, which has written the pages of a copy."""
    (tmp_path / 'assets').mkdir(exist_ok=True)
    for name in ('bench.py', 'README.md', 'assets/suites.toml'):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / 'assets/results', tmp_path / 'assets/results', dirs_exist_ok=True)
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
               for name in ('rloo', 'dr_grpo', 'reinforce', 'softmax-sharp')}
    assert torch.allclose(weights['dr_grpo'] * G / (G - 1), weights['rloo'], atol=1e-6)
    exact = small.exact(pi, 'dense')
    found = bench['compare'](weights, which, jacobian @ jacobian.T, exact)
    gradient = exact @ jacobian
    for name, weight in weights.items():  # the same the obvious way
        estimates = torch.stack([w @ jacobian[rows] for w, rows in zip(weight, which)])
        cosine = torch.cosine_similarity(estimates, gradient[None])
        assert abs(found[name]['cosine'] - cosine.mean()) < 1e-3
        assert abs(found[name]['length'] - (estimates.norm(dim=1) / gradient.norm()).mean()) < 1e-3
        mean_cosine = torch.cosine_similarity(estimates.mean(0), gradient, dim=0)
        assert abs(found[name]['mean_cosine'] - mean_cosine) < .02
    for name in ('rloo', 'reinforce'):  # without bias
        assert abs(found[name]['mean_cosine'] - 1) < 4 * found[name]['mean_cosine_error'] < .05
        assert found[name]['bias']**2 < 6 * found[name]['variance'] / n  # what noise makes of none
    assert abs(found['dr_grpo']['length'] / found['rloo']['length'] - (1 - 1 / G)) < 1e-3  # too short
    assert found['softmax-sharp']['mean_cosine'] < .98


def test_verdicts(bench):
    def runs(accuracy, early=(.1, .1, .1), norm_variance=1., effective_n=5., norm_decay=1.):
        return [{'changed': {'seed': seed} if seed else {}, 'accuracy': accuracy + .001 * seed,
                 'early': dict(zip(('10', '20', '30'), early)), 'norm_variance': norm_variance,
                 'effective_n': effective_n, 'norm_decay': norm_decay} for seed in range(3)]
    for found, said in {
            '': runs(.5), 'inconclusive': runs(.505), 'better: succeeds more': runs(.6),
            'better: faster early': runs(.5, early=(.1, .3, .1)),
            'worse: steadier gradients, succeeds less': runs(.3, norm_variance=.1),
            'worse: effective n near 1': runs(.5, effective_n=1.1),
            'inconclusive: steadier gradients, gradients vanish': runs(.5, norm_variance=.1, norm_decay=.001),
    }.items():
        assert bench['verdict'](said, runs(.5)) == found
    assert bench['verdict'](runs(.6), []) == ''     # nothing to compare with
    assert bench['verdict'](runs(.6)[:2] + runs(.4)[2:], runs(.5)) == 'inconclusive'


def test_what_a_table_says_of_runs(bench):
    runs = [{'a': 1., 'b': None, 'c': {'1': .5, '2': .25}, 'curve': {'step': [0, 5], 'a': [3., 1.]}},
            {'a': 2., 'b': 7, 'c': {'1': .5, '2': .75}, 'curve': {'step': [0, 5], 'a': [5., 2.]}}]
    for text, said in {
            'a .1f': '1.5 (1.0 to 2.0)', 'a .1f mean': '1.5', 'b .0f': '7, 1 of 2', 'd .0f': '',
            'c .2f': '0.50 / 0.50', 'c.1 .1f': '0.5', 'c.1 .1f / d .1f': '0.5 / –',
            'curve.a .1f': '0: 4.0, 5: 1.5', 'curve.a .0f median': '2 (1 to 3)',
            'curve.a.0 .0f → curve.a.-1 .1f': '4 (3 to 5) → 1.5 (1.0 to 2.0)'}.items():
        assert bench['cell'](runs, text) == said
    assert bench['cell'](runs[:1], 'b .0f') == 'never'


# ---- the pages

PAGES = [ROOT / 'README.md', *sorted((ROOT / 'assets/notes').glob('*.md'))]


def test_tables_and_numbers_of_the_pages_are_those_of_the_results(tmp_path, monkeypatch):
    shutil.copytree(ROOT / 'assets', tmp_path / 'assets', dirs_exist_ok=True)
    bench.__wrapped__(tmp_path, monkeypatch)
    for page in PAGES:
        assert (tmp_path / page.relative_to(ROOT)).read_text() == page.read_text()


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)
def test_what_pages_name_exists(page):
    def anchors(path):
        titles = re.findall(r'(?m)^#+ (.*)', path.read_text())
        return {re.sub(r'[^\w -]', '', title.lower()).replace(' ', '-') for title in titles}
    text = page.read_text()
    for link in re.findall(r'\]\((?!http)(.*?)\)', text):
        file, _, anchor = link.partition('#')
        path = page.parent / file if file else page
        assert path.exists(), link
        assert not anchor or anchor in anchors(path), link
    source = ''.join((ROOT / f'{script}.py').read_text() for script in (*TINY, 'utils'))
    for code in re.findall(r'(?s)```python\n(.*?)```', text):
        assert code in source or not code.startswith(('def', '@', ' '))  # quoted


def commands(text):
    return set(re.findall(r'(\w+)\.py((?: +--\w+=?[^\s`]*)+)', text.replace('\\\n', ' ')))


def test_commands_of_pages_and_suites(bench, run_here):
    """Every script and knob exists; what needs no checkpoint and no data runs, with tiny sizes."""
    shown = set.union(*(commands(page.read_text()) for page in PAGES))
    rows = [bench['row_of'](suite, row) for suite in bench['run_by_us']
            for row in bench['SUITES'][suite]['rows']]
    found = shown | {(row['script'], row['knobs']) for row in rows if 'script' in row and not row['at']}
    for script, knobs in found:
        block = (ROOT / f'{script}.py').read_text().partition('# ---- knobs')[2].partition('\n# ----')[0]
        names = {*re.findall(r'(?m)^(\w+) = ', block), 'help'}
        assert set(re.findall(r'--(\w+)', knobs)) <= names, (script, knobs)
    for script, knobs in shown:
        small = [knob.partition('=')[0] for knob in TINY.get(script, ())]
        more = [knob for knob in knobs.split() if knob.partition('=')[0] not in small]
        if small and not re.search('init_from|reference|reward=math|plot|page|input_min', knobs):
            assert run_here(script, *more, '--out_dir=a')[0] == 0, (script, knobs)

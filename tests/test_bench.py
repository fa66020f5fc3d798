"""bench.py: the exact gradient that estimators are measured against; pages."""
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


@pytest.mark.parametrize('row', ['1-kept-2', '1-tpo-2'])
def test_a_bit_is_learned_to_be_repeated(bench, row):
    assert bench['reverse']('reversal', row, 0, n_steps=30, B=8)['error'] < .2


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
    """Every script and knob exists; what needs no checkpoint and no data runs, tiny."""
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
        more = [knob for knob in knobs.split() if knob.partition('=')[0] not in (*small, '--compile')]
        if small and not re.search('init_from|reference|reward=math|plot|page|input_min', knobs):
            assert run_here(script, *more, '--out_dir=a')[0] == 0, (script, knobs)

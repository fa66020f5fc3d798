"""utils.py: sampling, balanced targets, advantages, tasks, ablations, colours."""
import itertools
import math
import os
import pickle
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import utils
from model import GPT2Thinking, ThinkingModelConfig
from utils import (ADVANTAGES, NEED_GROUPS, SUM_TO_ONE, Run, SerialTask, ablations, addition_questions,
                   advantages, as_html, balanced_target, judge, plain, sample, schedule, show_tokens)

# normal tokens 0..9, thoughts 10..59, end_thought 60
CONFIG = ThinkingModelConfig(0, 8, n_layer=1, n_head=1, d_model=4, d_normal_vocab=10, d_thought_vocab=50)


# ---- sampling

@pytest.mark.parametrize('how, expected', [
    ({}, [.7, .2, .1, 0.]), ({'temperature': .5}, [.49 / .54, .04 / .54, .01 / .54, 0.]),
    ({'temperature': 0}, [1., 0., 0., 0.]), ({'epsilon': .4}, [.52, .22, .16, .1]),
    ({'bias': torch.tensor([[-torch.inf, 0., 0., 0.]])}, [0., 2 / 3, 1 / 3, 0.])])
def test_samples_have_the_probabilities_that_are_asked_for(how, expected):
    logits, noise = torch.tensor([.7, .2, .1, 0.]).log(), (torch.arange(100000) + .5) / 100000
    share = sample(logits.expand(100000, 4), noise, **how).bincount(minlength=4) / 100000
    torch.testing.assert_close(share, torch.tensor(expected), atol=2e-5, rtol=0)


def test_no_noise_reaches_an_impossible_token():
    logits = torch.full((3, 1000), -torch.inf)
    logits[:, 300:700] = torch.randn(3, 400)
    for noise in (0., 1 - 2**-24):
        tokens = sample(logits, torch.full((3,), noise))
        assert ((tokens >= 300) & (tokens < 700)).all()


# ---- balanced targets

def follow(scores, n_calls=300, tau=.1):
    prices = torch.zeros(scores.shape[1])
    for _ in range(n_calls):
        log_target, prices = balanced_target(scores, prices, tau)
    return log_target.exp()


@pytest.mark.parametrize('seed', range(3))
def test_a_square_target_is_as_good_as_the_best_assignment(seed):
    """Entropic transport loses at most tau times the entropy of a plan, n log n, of the best value."""
    n, tau = 6, .02
    scores = torch.randn(n, n, generator=torch.Generator().manual_seed(seed))
    target = follow(scores, n_calls=1000, tau=tau)
    torch.testing.assert_close(target.sum(1), torch.ones(n))
    torch.testing.assert_close(target.sum(0), torch.ones(n), atol=1e-3, rtol=0)
    best = max(sum(scores[i, j].item() for i, j in enumerate(p)) for p in itertools.permutations(range(n)))
    assert best - tau * n * math.log(n) <= (target * scores).sum().item() <= best + .01


def test_shares_with_more_and_with_fewer_codes_than_answers():
    generator = torch.Generator().manual_seed(0)
    few, many = (follow(torch.randn(*shape, generator=generator)) for shape in ((30, 10), (10, 300)))
    torch.testing.assert_close(few.sum(0), torch.full((10,), 3.), atol=1e-2, rtol=0)
    assert many.sum(0).max() < 1.01


# ---- advantages

POLICY = torch.tensor([.1, .2, .3, .4])  # of a group


def by_hand(name):
    """Weights times G of the first rewards in the test below, with tau=.5 and baseline=1."""
    rewards, normal = torch.tensor([0., 3., 1., 1.]), torch.distributions.Normal(0., 1.).icdf
    ranks = normal(torch.tensor([.125, .875, .5, .5]))  # 1, 4, 2.5, 2.5 of 4; their mean is 0
    # in the batch: 0 is 1st, both 1 are 2.5th, the four 2 are 5.5th, 3 is 8th of 8
    in_batch = normal((torch.tensor([1, 8, 2.5, 2.5]) - .5) / 8)
    centred = torch.tensor([-1.25, 1.75, -.25, -.25])
    grpo = centred / math.sqrt(centred.square().mean())
    return {'raw': rewards, 'reinforce': rewards - 1, 'dr_grpo': centred,
            'rloo': rewards - torch.tensor([5, 2, 4, 4]) / 3,  # less the mean of the others
            'grpo': grpo,
            'batch_std': centred / math.sqrt(27 / 8 - (13 / 8)**2),  # squares of the batch sum to 11 + 16
            'quantile': ranks, 'quantile_batch': in_batch - in_batch.mean(),
            'softmax': 4 * (2 * rewards).softmax(0), 'softmax_centred': 4 * (2 * rewards).softmax(0) - 1,
            'softmax_quantile': 4 * (2 * ranks).softmax(0), 'best': torch.tensor([0., 4., 0., 0.]),
            'tpo': 4 * (POLICY * (2 * grpo).exp() / (POLICY * (2 * grpo).exp()).sum() - POLICY)}[name]


@pytest.mark.parametrize('kind', list(ADVANTAGES))
def test_advantages_by_hand(kind):
    rewards = torch.tensor([[0., 3., 1., 1.], [2., 2., 2., 2.]])
    log_pi = POLICY.log().expand(2, -1) - 5
    weights = advantages(rewards, kind, tau=.5, baseline=1., log_pi=log_pi)
    torch.testing.assert_close(weights[0] * 4, by_hand(kind), atol=1e-5, rtol=0)
    # a process that has the first row only is told of the others
    alone = advantages(rewards[:1], kind, tau=.5, baseline=1., batch=rewards, log_pi=log_pi[:1])
    torch.testing.assert_close(alone, weights[:1])
    if 'batch' in kind:
        assert not torch.allclose(advantages(rewards[:1], kind), weights[:1])
    if kind == 'quantile':
        assert torch.allclose(advantages(100 * rewards + 7, kind), weights)  # blind to scale


@pytest.mark.parametrize('kind', list(ADVANTAGES))
def test_rewards_that_are_alike_few_or_infinite(kind):
    inf, sums = math.inf, kind in SUM_TO_ONE
    log_pi = torch.randn(4, 4)
    flat = advantages(torch.full((2, 4), -3.), kind, baseline=-3., log_pi=log_pi[:2])
    alike = {'best': [1, 0, 0, 0], 'raw': [-.75] * 4}.get(kind, [.25] * 4 if sums else [0] * 4)
    assert flat.tolist() == [alike, alike]
    alone = advantages(torch.tensor([[5.]]), kind, baseline=1., log_pi=log_pi[:1, :1]).item()
    assert alone == {'raw': 5, 'reinforce': 4}.get(kind, float(sums))
    assert kind not in NEED_GROUPS or alone == 0
    rewards = torch.tensor([[-inf, 0., 1., -2.], [-inf] * 4, [inf, 0., 0., 1.], [-inf, inf, -inf, inf]])
    weights = advantages(rewards, kind, baseline=-1., log_pi=log_pi)
    assert weights.isfinite().all()
    if sums:
        assert torch.allclose(weights.sum(1), torch.ones(4))
        assert kind != 'softmax' or weights[1:].tolist() == [[.25] * 4, [1, 0, 0, 0], [0, .5, 0, .5]]
    elif not kind.startswith(('quantile', 'softmax')):
        assert weights[1].tolist() == weights[3].tolist() == [0] * 4  # nothing is known of them
    unknown = advantages(torch.tensor([[math.nan, 1., 2.]]), kind, log_pi=log_pi[:1, :3])
    assert unknown.isnan().any() or kind == 'best'



# ---- tasks

@pytest.mark.parametrize('kind, n', [('add', 7), ('perm', 5), ('s5', 2)])
@pytest.mark.parametrize('depth', [1, 4])
def test_serial_tasks_by_brute_force(kind, n, depth):
    task = SerialTask(kind, n, n_letters=4, seed=3)
    question, states = task.draw(200, depth, torch.Generator().manual_seed(0))
    assert states.shape == (200, depth) and question.shape == (200, depth + 2)
    words = [[task.names[i] for i in row] for row in question.tolist()]
    assert len({*task.names}) == len(task.names) and {row[-1] for row in words} == {'='}
    elements = list(itertools.permutations(range(5)))
    for (start, *operations, _), right in zip(words, states.tolist()):
        state = int(start)
        for operation, after in zip(operations, right):
            if kind == 'add':
                c = int(operation[1:])
                state = (state + c if operation[0] == '+' else state * c) % n
            elif kind == 'perm':
                state = task.table[int(operation[1:])].tolist()[state]
            else:
                state = elements.index(tuple(int(operation[i]) for i in elements[state]))
            assert state == after
    assert (task.table.sort(1).values == torch.arange(task.n_states)).all()


def test_stories():
    task, people = SerialTask('story', 11), 'Anna Ben Carla David Eva'.split()
    question, states = task.draw(300, 6, torch.Generator().manual_seed(0))
    for row, right in zip(question.view(300, 11, -1).tolist(), states.tolist()):
        lines = [[task.names[i] for i in line if task.names[i] != '_'] for line in row]
        has = {person: 'book' in line for line in lines[:5] for person in people if person in line}
        circle, found = [has[person] for person in people], []
        for line in [[], *lines[5:-1]]:
            who = [people.index(word) for word in line if word in people]
            turn = ('left' in line) - ('right' in line)
            circle = circle[turn:] + circle[:turn]
            if {'trade', 'swaps'} & {*line}:
                a, b = who
                circle[a], circle[b] = circle[b], circle[a]
            elif {'across', 'mirror'} & {*line}:
                circle = [circle[(2 * who[0] - i) % 5] for i in range(5)]
            found.append(circle.index(True))
        assert found == right and lines[-1][-1] == '?'


@pytest.mark.parametrize('low, high, n_adds', [(0, 13, 2), (2, 5, 3)])
def test_questions_are_split_without_loss_or_overlap(low, high, n_adds):
    train, test = addition_questions(low, high, .2, seed=3, n_adds=n_adds)
    rows = list(itertools.product(range(low, high), repeat=n_adds))
    assert len(test) == round(.2 * len(rows))
    assert sorted(map(tuple, torch.cat([train, test]).tolist())) == rows
    again, other = (addition_questions(low, high, .2, seed, n_adds)[0] for seed in (3, 4))
    assert torch.equal(again, train) and not torch.equal(other, train)
    assert [len(part) for part in addition_questions(0, 2, .01, seed=0)] == [3, 1]


# ---- optimiser and schedule

def test_schedule():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.)
    line = []
    for step in range(100):
        schedule(optimizer, 2., step, 100, warmup_steps=9)
        line.append(optimizer.param_groups[0]['lr'])
    assert line[0] == pytest.approx(.2) and line[9] == line[50] == 2. and line[75] == pytest.approx(1.)
    assert line[99] == pytest.approx(.04) and sorted(line[50:], reverse=True) == line[50:]


# ---- are the thoughts used?

def test_ablations():
    thoughts = torch.randint(20, 26, (500, 3), generator=torch.Generator().manual_seed(0))
    thoughts[:100] = torch.tensor([21, 22, 23])
    replaced = ablations(thoughts, range(20, 26))
    assert list(replaced) == ['own', 'shuffled', 'random', 'constant', 'none']
    assert torch.equal(replaced['own'], thoughts) and replaced['none'].shape == (500, 0)
    assert replaced['shuffled'].sort(0).values.equal(thoughts.sort(0).values)
    assert not torch.equal(replaced['shuffled'], thoughts)
    assert (replaced['constant'] == torch.tensor([21, 22, 23])).all()
    assert replaced['random'].unique().tolist() == list(range(20, 26))
    assert torch.equal(ablations(thoughts, range(20, 26))['random'], replaced['random'])


def test_what_an_answering_policy_makes_of_thoughts():
    torch.manual_seed(0)
    answering = GPT2Thinking(CONFIG)
    thoughts, right = torch.randint(10, 60, (5000, 2)), torch.randint(10, (5000,))  # more than one part
    logits = answering.answer(thoughts)
    answers, accuracy, bits = judge(answering, thoughts, right)
    assert torch.equal(answers, logits.argmax(1)) and accuracy == (answers == right).sum().item() / 5000
    expected = math.log2(10) - torch.nn.functional.cross_entropy(logits, right).item() / math.log(2)
    assert bits == pytest.approx(max(0, expected), abs=1e-5)


# ---- checkpoints, colours

def test_a_checkpoint_cannot_run_code(tmp_path, capsys):
    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'harm'),)
    for name, write in (('torch.pt', torch.save), ('pickle.pt', lambda o, p: p.write_bytes(pickle.dumps(o)))):
        write({'script': 'x', 'knobs': {}, 'models': Harmful()}, tmp_path / name)
        with pytest.raises(SystemExit) as error:
            utils.load_checkpoint(tmp_path / name)
        assert error.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / 'harm').exists()


def test_colours_only_on_a_terminal(monkeypatch, capsys):
    tokens = [7, 10, 12, 60, 9]
    coloured = ('\033[34m7\033[0m \033[36m<think0>\033[0m \033[36m<think2>\033[0m '
                '\033[35m<end_thought>\033[0m \033[34m9\033[0m')
    text = '7 <think0> <think2> <end_thought> 9'
    assert show_tokens(tokens, CONFIG, partial(map, str)) == coloured and plain(coloured) == text
    assert as_html(coloured).count('<span') == as_html(coloured).count('</span>') == 5
    assert utils.printable(f'{coloured}\n\033]0;title\a\033[2J\r') == f'{coloured}\n?]0;title??[2J?'
    assert '<span style="color:darkcyan">&lt;think2&gt;</span>' in as_html(coloured)
    for terminal, no_color, expected in ((False, '', text), (True, '', coloured), (True, '1', text)):
        monkeypatch.setenv('NO_COLOR', no_color)
        monkeypatch.setattr(sys.stdout, 'isatty', lambda terminal=terminal: terminal)
        Run.print(SimpleNamespace(world=SimpleNamespace(main=True)), coloured)
        assert capsys.readouterr().out == expected + '\n'


def test_neighbouring_thoughts_of_a_text_are_one_short_group():
    tokens = [0, 13, 27, 1, 14, 2, 13, 27, 50, 51, 52, 60, 0]
    found = plain(show_tokens(tokens, CONFIG, lambda tokens: ['abc'[token] for token in tokens], between=''))
    assert found == 'a<think3,17>b<think4>c<think3,17,40,…><end_thought>a'

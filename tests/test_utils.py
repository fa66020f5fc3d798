"""utils.py: sampling, balanced targets, tasks, optimiser, checkpoints, colours."""
import itertools
import math
import os
import pickle
import sys
from types import SimpleNamespace

import pytest
import torch

import utils
from model import GPT2, GPT2Thinking, ModelConfig, ThinkingModelConfig
from utils import (ADVANTAGES, NEED_GROUPS, SUM_TO_ONE, Run, SerialTask, ablations, addition_questions, advantages,
                   as_html, balanced_target, concentration, digits, make_optimizer, parse_knob, plain, sample,
                   schedule, show_tokens, some_rollouts)


# ---- sampling

def grid(n):
    return (torch.arange(n) + .5) / n


def test_samples_have_the_probabilities_of_the_softmax():
    logits = torch.randn(7, generator=torch.Generator().manual_seed(0))
    tokens, log_probs = sample(logits.expand(100000, 7), grid(100000), temperature=.5)
    p = (logits / .5).softmax(-1)
    torch.testing.assert_close(tokens.bincount(minlength=7) / 100000, p, atol=2e-5, rtol=0)
    torch.testing.assert_close(log_probs, p.log()[tokens])


def test_top_k_top_p_and_greedy():
    logits = torch.tensor([.05, .4, .1, .25, .2]).log()

    def seen(**how):
        return sample(logits.expand(1000, 5), grid(1000), **how)[0].unique().tolist()
    assert seen() == [0, 1, 2, 3, 4]
    assert seen(top_k=2) == [1, 3]
    assert seen(top_k=99) == [0, 1, 2, 3, 4]
    assert seen(top_p=.3) == [1]
    assert seen(top_p=.64) == [1, 3]
    assert seen(top_p=.66) == [1, 3, 4]
    assert seen(top_k=3, top_p=.5) == [1, 3]
    tokens, log_probs = sample(logits[None], torch.tensor([.99]), temperature=0)
    assert tokens.item() == 1 and log_probs.exp().item() == pytest.approx(.4, abs=1e-6)
    _, log_probs = sample(logits.expand(9, 5), grid(9), top_k=2)
    assert log_probs.exp().unique().tolist() == pytest.approx([.25 / .65, .4 / .65], abs=1e-5)


def test_exploration_of_samples():
    logits = torch.tensor([.7, .2, .1, 0.]).log()
    tokens, log_probs = sample(logits.expand(100000, 4), grid(100000), epsilon=.4)
    p = torch.tensor([.52, .22, .16, .1])
    torch.testing.assert_close(tokens.bincount(minlength=4) / 100000, p, atol=2e-5, rtol=0)
    torch.testing.assert_close(log_probs, p.log()[tokens])
    bias = torch.tensor([[0., 9., 0., 0.], [0., 0., 9., 0.]])
    assert sample(logits.expand(2, 4), torch.tensor([.5, .5]), bias=bias)[0].tolist() == [1, 2]


def test_no_noise_reaches_an_impossible_token():
    logits = torch.full((3, 1000), -torch.inf)
    logits[:, 300:700] = torch.randn(3, 400)
    for noise in (0., 1 - 2**-24):
        tokens, log_probs = sample(logits, torch.full((3,), noise))
        assert ((tokens >= 300) & (tokens < 700)).all() and log_probs.isfinite().all()


def test_settings_that_define_no_distribution():
    for how in ({'temperature': -1}, {'temperature': 1e-45}, {'top_k': -1}, {'top_p': 0}, {'top_p': 1.5},
                {'epsilon': -.1}, {'epsilon': 1.1}):
        with pytest.raises(ValueError, match='cannot sample'):
            sample(torch.zeros(1, 3), torch.zeros(1), **how)


# ---- balanced targets

def follow(scores, n_calls=300, tau=.1):
    prices = torch.zeros(scores.shape[1])
    for _ in range(n_calls):
        log_target, prices = balanced_target(scores, prices, tau)
    return log_target.exp()


@pytest.mark.parametrize('seed', range(5))
def test_a_square_target_is_as_good_as_the_best_assignment(seed):
    """Entropic transport loses at most tau times the entropy of a plan, n log n, of the best value."""
    n, tau = 6, .02
    scores = torch.randn(n, n, generator=torch.Generator().manual_seed(seed))
    target = follow(scores, n_calls=1000, tau=tau)
    torch.testing.assert_close(target.sum(1), torch.ones(n))
    torch.testing.assert_close(target.sum(0), torch.ones(n), atol=1e-3, rtol=0)
    best = max(sum(scores[i, j].item() for i, j in enumerate(p)) for p in itertools.permutations(range(n)))
    assert best - tau * n * math.log(n) <= (target * scores).sum().item() <= best + .01


def test_prices_keep_codes_apart():
    scores = torch.randn(30, 30, generator=torch.Generator().manual_seed(0))
    assert scores.argmax(1).unique().numel() == 20 and follow(scores, tau=.05).argmax(1).unique().numel() >= 29


def test_shares_with_more_and_with_fewer_codes_than_answers():
    generator = torch.Generator().manual_seed(0)
    few = follow(torch.randn(30, 10, generator=generator))
    torch.testing.assert_close(few.sum(0), torch.full((10,), 3.), atol=1e-2, rtol=0)
    scores = torch.randn(10, 300, generator=generator)
    many = follow(scores)
    assert many.sum(0).max() < 1.01
    best = scores.argmax(1)
    alone = best.bincount(minlength=300)[best] == 1     # nobody else wants it, so nothing is in its way
    assert alone.any() and torch.equal(many.argmax(1)[alone], best[alone])


# ---- advantages

def test_advantages_are_what_they_are_called():
    rewards = torch.tensor([[1., 2., 6.], [0., 0., 0.]])
    w = {kind: advantages(rewards, kind, tau=2., baseline=1.) for kind in (
        'clean', 'reinforce', 'dr_grpo', 'rloo', 'grpo', 'softmax', 'best')}
    assert torch.allclose(w['clean'] * 3, rewards)
    assert torch.allclose(w['reinforce'] * 3, rewards - 1)
    assert torch.allclose(w['dr_grpo'] * 3, torch.tensor([[-2., -1., 3.], [0., 0., 0.]]))
    assert torch.allclose(w['rloo'][0] * 3, torch.tensor([1 - 4., 2 - 3.5, 6 - 1.5]))
    assert torch.allclose(w['grpo'][0] * 3, torch.tensor([-2., -1., 3.]) / math.sqrt(14 / 3))
    assert torch.allclose(w['softmax'][0], (rewards[0] / 2).softmax(0)) and w['softmax'].sum(1).allclose(torch.ones(2))
    assert w['best'][0].tolist() == [0, 0, 1] and w['best'].sum(1).tolist() == [1, 1]
    assert all(weights.isfinite().all() for weights in w.values())


@pytest.mark.parametrize('kind', ['reinforce', 'dr_grpo', 'rloo', 'grpo'])
def test_policy_gradients_point_where_the_exact_gradient_does(kind):
    """Over many groups the estimate is along the gradient of the expected reward, worked out over all tokens."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, generator=generator, requires_grad=True)
    reward = torch.randn(5, generator=generator)
    exact, = torch.autograd.grad((logits.softmax(0) * reward).sum(), logits)
    token = sample(logits.detach().expand(80000, 5), torch.rand(80000, generator=generator))[0].view(-1, 4)
    weights = advantages(reward[token], kind, baseline=.3)
    loss = -(weights * logits.log_softmax(0)[token]).sum(1).mean()
    estimate, = torch.autograd.grad(-loss, logits)
    assert torch.cosine_similarity(estimate, exact, dim=0) > (.95 if kind == 'grpo' else .99)
    if kind in ('reinforce', 'rloo'):       # those without bias
        torch.testing.assert_close(estimate, exact, atol=.02, rtol=0)


def hand_made_groups():
    """A group of rewards with ties, a flat one, and Phi^-1 of (rank - 1/2) / n for the numbers that come up."""
    return torch.tensor([[0., 3., 1., 1.], [2., 2., 2., 2.]]), torch.distributions.Normal(0., 1.).icdf


def test_quantiles_by_hand():
    rewards, q = hand_made_groups()
    scores = q(torch.tensor([.125, .875, .5, .5]))      # ranks 1, 4, 2.5, 2.5 of 4; symmetric, so their mean is 0
    w = advantages(rewards, 'quantile')
    assert torch.allclose(w[0] * 4, scores, atol=1e-6) and w[1].tolist() == [0, 0, 0, 0]
    assert torch.allclose(advantages(100 * rewards + 7, 'quantile'), w)     # blind to scale
    assert torch.allclose(advantages(rewards, 'softmax_quantile', tau=.5)[0], (2 * scores).softmax(0))
    assert advantages(rewards, 'softmax_quantile')[1].tolist() == [.25] * 4
    assert torch.allclose(advantages(rewards, 'softmax_centred', tau=.5), (2 * rewards).softmax(1) - .25, atol=1e-6)
    # in the batch: 0 is 1st, both 1 are 2.5th, the four 2 are 5.5th, 3 is 8th of 8
    ranks = torch.tensor([1, 8, 2.5, 2.5])
    expected = q((ranks - .5) / 8)
    w = advantages(rewards, 'quantile_batch')
    assert torch.allclose(w[0] * 4, expected - expected.mean(), atol=1e-6) and w[1].tolist() == [0, 0, 0, 0]


def test_batch_std_by_hand():
    rewards, _ = hand_made_groups()
    mean = 13 / 8       # sum of squares 11 + 16
    std = math.sqrt(27 / 8 - mean**2)
    assert torch.allclose(advantages(rewards, 'batch_std')[0] * 4, torch.tensor([-1.25, 1.75, -.25, -.25]) / std)


@pytest.mark.parametrize('kind', ['batch_std', 'quantile_batch'])
def test_the_batch_is_that_of_all_processes(kind):
    rewards = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    whole = advantages(rewards, kind)
    parts = [advantages(part, kind, batch=rewards) for part in rewards.chunk(2)]
    assert torch.equal(torch.cat(parts), whole) and not torch.equal(advantages(rewards[:3], kind), whole[:3])


@pytest.mark.parametrize('kind', list(ADVANTAGES))
def test_rewards_that_are_alike_few_or_infinite(kind):
    inf = math.inf
    sums = kind in SUM_TO_ONE
    flat = advantages(torch.full((2, 4), -3.), kind, baseline=-3.)
    alike = {'best': [1, 0, 0, 0], 'clean': [-.75] * 4}.get(kind, [.25] * 4 if sums else [0] * 4)
    assert flat.tolist() == [alike, alike]
    alone = advantages(torch.tensor([[5.]]), kind, baseline=1.).item()
    assert alone == {'clean': 5, 'reinforce': 4}.get(kind, float(sums))
    assert kind not in NEED_GROUPS or alone == 0
    rewards = torch.tensor([[-inf, 0., 1., -2.], [-inf] * 4, [inf, 0., 0., 1.], [-inf, inf, -inf, inf]])
    weights = advantages(rewards, kind, baseline=-1.)
    assert weights.isfinite().all()
    if sums:
        assert torch.allclose(weights.sum(1), torch.ones(4))
    elif not kind.startswith(('quantile', 'softmax')):      # ranks and limits know what to do with infinities
        tamed = torch.tensor([[-2., 0., 1., -2.], [0.] * 4, [1., 0., 0., 1.], [0.] * 4])
        batch = rewards if kind == 'batch_std' else None
        assert torch.allclose(weights[::2], advantages(tamed, kind, baseline=-1., batch=batch)[::2])
        assert weights[1].tolist() == weights[3].tolist() == [0] * 4        # nothing is known of these groups
    assert advantages(torch.tensor([[math.nan, 1., 2.]]), kind).isnan().any() or kind == 'best'


def test_softmax_of_infinities_is_its_limit():
    inf = math.inf
    rewards = torch.tensor([[-inf, 0., 0.], [-inf, -inf, -inf], [inf, inf, 0.], [-inf, inf, 5.]])
    expected = torch.tensor([[0, .5, .5], [1 / 3] * 3, [.5, .5, 0], [0, 1, 0]])
    assert torch.allclose(advantages(rewards, 'softmax', tau=.3), expected)
    assert advantages(torch.tensor([[1., 3., 3.]]), 'softmax', tau=1e-6).tolist() == [[0, .5, .5]]


def test_some_rollouts_are_all_on_average():
    weights = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    for n in (1, 3, 4):
        every = [some_rollouts(weights, n, torch.tensor([order, order]).argsort(1).float())
                 for order in itertools.permutations(range(4))]
        assert all((w != 0).sum(1).tolist() == [n, n] for w in every)
        assert torch.allclose(torch.stack(every).mean(0), weights, atol=1e-6)


def test_concentration():
    found = concentration(torch.tensor([[1., -1., 0., 0.], [0., 4., 0., 0.]]))
    assert found == {'max_weight': .75, 'effective_n': 1.5}
    assert concentration(torch.zeros(1, 4)) == {'max_weight': 0, 'effective_n': 4}


# ---- tasks

def test_digits():
    assert digits(torch.tensor([0, 7, 123]), 3).tolist() == [[0, 0, 0], [0, 0, 7], [1, 2, 3]]
    assert digits(torch.tensor([5, 6]), 3, base=2).tolist() == [[1, 0, 1], [1, 1, 0]]


@pytest.mark.parametrize('how', [
    dict(task='add', n_states=7), dict(task='add', n_states=6, ops='+'), dict(task='perm', n_states=5, n_letters=3),
    dict(task='s5', n_states=2, n_letters=4), dict(task='hop', n_states=6), dict(task='sort', n_states=9, n_letters=5)])
@pytest.mark.parametrize('depth', [1, 4])
def test_answers_of_serial_tasks_by_brute_force(how, depth):
    task = SerialTask(**how, seed=3)
    question, states = task.draw(200, depth, torch.Generator().manual_seed(0))
    assert states.shape == (200, depth) and question.shape == (200, task.n_prefix + depth + 2)
    words = [[task.names[i] for i in row] for row in question.tolist()]
    assert len(set(task.names)) == len(task.names) and {row[-1] for row in words} == {'='}
    elements = list(itertools.permutations(range(5)))
    for row, right in zip(words, states.tolist()):
        prefix, start, operations = row[:task.n_prefix], row[task.n_prefix], row[task.n_prefix + 1:-1]
        if how['task'] == 'sort':
            assert right == sorted(int(number) for number in [*prefix, start])[:depth] and len({*prefix, start}) == 5
            continue
        arrows, state = dict(arrow.split('>') for arrow in prefix), int(start)
        for operation, after in zip(operations, right):
            if how['task'] == 'add':
                c = int(operation[1:])
                state = (state + c if operation[0] == '+' else state * c) % how['n_states']
            elif how['task'] == 'perm':
                state = task.table[int(operation[1:])].tolist()[state]
            elif how['task'] == 's5':
                state = elements.index(tuple(int(operation[i]) for i in elements[state]))
            else:
                state = int(arrows[str(state)])
            assert state == after
    if how['task'] == 'hop':
        assert all(len({word.split('>')[0] for word in row[:6]}) == 6 for row in words)
    if task.table is not None:      # every operation is one that can be undone
        assert (task.table.sort(1).values == torch.arange(task.n_states)).all()


def test_serial_tasks_are_seeded():
    one, same, other = (SerialTask('perm', 9, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.table, same.table) and not torch.equal(one.table, other.table)
    draws = [SerialTask('hop', 5).draw(9, 2, torch.Generator().manual_seed(s))[0] for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_questions_of_three_numbers():
    train, test = addition_questions(2, 5, .2, seed=0, n_adds=3)
    rows = sorted(map(tuple, torch.cat([train, test]).tolist()))
    assert rows == sorted(itertools.product(range(2, 5), repeat=3)) and len(test) == 5
    with pytest.raises(ValueError, match='too many to number'):
        addition_questions(0, 100, .2, seed=0, n_adds=10)


def test_pairs_are_split_without_loss_or_overlap():
    train, test = addition_questions(0, 13, .2, seed=3)
    assert len(test) == round(.2 * 169)
    assert sorted(map(tuple, torch.cat([train, test]).tolist())) == [(a, b) for a in range(13) for b in range(13)]
    assert torch.equal(addition_questions(0, 13, .2, seed=3)[0], train)
    assert not torch.equal(addition_questions(0, 13, .2, seed=4)[0], train)
    assert [len(part) for part in addition_questions(0, 2, .01, seed=0)] == [3, 1]


def test_pairs_of_large_numbers_are_drawn():
    train, test = addition_questions(10000, 100000, .1, seed=0, n_max=5000)
    both = torch.cat([train, test])
    assert len(both) == 5000 and both.min() >= 10000 and both.max() < 100000
    assert len(both.unique(dim=0)) == len(both)
    assert both[:, 0].float().mean().item() == pytest.approx(55000, rel=.03)
    assert len(torch.cat(addition_questions(0, 71, .1, seed=0, n_max=5000)).unique(dim=0)) == 5000     # of 5041


def test_two_threads_add_in_the_same_order_in_every_repetition():
    torch.set_num_threads(2)
    try:
        utils.World({'device': 'cpu', 'batch_size': 1, 'seed': 0})
        x, rows, g = torch.randn(9, 100, requires_grad=True), torch.randint(9, (1000,)), torch.randn(1000, 100)
        grads = [torch.autograd.grad((x[rows] * g).sum(), x)[0] for _ in range(20)]
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(grads[0], grad) for grad in grads)


# ---- processes

def test_processes_share_a_batch_without_loss_or_overlap():
    world = utils.World({'device': 'cpu', 'batch_size': 12, 'seed': 0})
    batch, world.size, shares = torch.arange(12), 3, []
    for world.rank in range(3):
        shares.append(world.share(batch))
    assert [len(share) for share in shares] == [4, 4, 4] and torch.equal(torch.cat(shares), batch)
    world.size = 1
    assert torch.equal(world.gather(batch), batch)      # by several: the test of two processes


# ---- optimiser and schedule

@pytest.mark.parametrize('tied', [True, False])
def test_every_parameter_is_optimised_once(tied):
    model = GPT2(ModelConfig(d_vocab=9, block_size=4, n_layer=2, n_head=2, d_model=8, tie_weights=tied))
    decayed, free = make_optimizer(model, 1e-3, .1).param_groups
    ids = [id(p) for group in (decayed, free) for p in group['params']]
    assert len(set(ids)) == len(ids) and set(ids) == {id(p) for p in model.parameters()}
    assert decayed['weight_decay'] == .1 and all(p.dim() == 2 for p in decayed['params'])
    assert free['weight_decay'] == 0 and all(p.dim() == 1 for p in free['params'])


def test_schedule():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.)
    rates = []
    for step in range(100):
        schedule(optimizer, 2., step, 100, warmup_steps=9)
        rates.append(optimizer.param_groups[0]['lr'])
    assert rates[0] == pytest.approx(.2) and rates[9] == rates[50] == 2. and rates[75] == pytest.approx(1.)
    assert rates[99] == pytest.approx(.04) and sorted(rates[50:], reverse=True) == rates[50:]


# ---- ablations

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


# ---- knobs and files

def test_knobs_have_the_type_of_their_default():
    assert parse_knob('tau', '2', .1) == 2. and isinstance(parse_knob('tau', '2', .1), float)
    assert parse_knob('max_steps', '30', 5) == 30 and parse_knob('plot', 'True', False) is True
    assert parse_knob('encoding', 'int', 'digits', ['int', 'digits']) == 'int'


def test_a_file_is_never_half_written(tmp_path):
    path = tmp_path / 'file'
    utils.write_atomic(path, lambda p: p.write_text('old'))

    def breaks(p):
        p.write_text('half')
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        utils.write_atomic(path, breaks)
    assert path.read_text() == 'old'


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


# ---- colours and pictures

def test_colours_only_on_a_terminal(monkeypatch, tmp_path, capsys):
    config = ThinkingModelConfig(d_normal_vocab=10, d_thought_vocab=3, block_size=4, n_layer=1, n_head=1, d_model=4)
    tokens = torch.tensor([7, 10, 12, 13, 9])
    coloured = ('\033[34m7\033[0m \033[36m<think0>\033[0m \033[36m<think2>\033[0m \033[35m<end_thought>\033[0m '
                '\033[34m9\033[0m')
    assert show_tokens(tokens, config) == coloured and plain(coloured) == '7 <think0> <think2> <end_thought> 9'
    assert as_html(coloured).count('<span') == as_html(coloured).count('</span>') == 6
    assert '<span style="color:cyan">&lt;think2&gt;</span>' in as_html(coloured)
    text = plain(coloured)
    for terminal, no_color, expected in ((False, '', text), (True, '', coloured), (True, '1', text)):
        monkeypatch.setenv('NO_COLOR', no_color)
        monkeypatch.setattr(sys.stdout, 'isatty', lambda terminal=terminal: terminal)
        Run.print(SimpleNamespace(world=SimpleNamespace(main=True)), coloured)
        assert capsys.readouterr().out == expected + '\n'


def test_config_of_a_thinker_names_its_tokens():
    config = GPT2Thinking(ThinkingModelConfig(d_normal_vocab=10, d_thought_vocab=3, block_size=4, n_layer=1, n_head=1,
                                              d_model=4)).config
    assert (config.d_vocab_total, config.end_thought, config.reads) == (14, 13, range(14))


# ---- CUDA graphs

def test_recorded_is_the_function_itself_without_a_gpu():
    calls = []
    run = utils.recorded(lambda x, factor: calls.append(1) or factor * x)
    for n in (2, 3):
        assert torch.equal(run(torch.ones(n), 5), torch.full((n,), 5.)) and len(calls) == n - 1


def test_what_is_fused_is_compiled_only_where_it_is_asked_for(monkeypatch):
    made = []
    monkeypatch.setattr(torch, 'compile', lambda function, **how: made.append(how) or (lambda x: ('compiled', x)))
    function = utils.fused(lambda x: x)
    assert function(1) == 1 and not made
    for fuse, expected in ((True, ('compiled', 1)), (False, 1), (True, ('compiled', 1))):
        monkeypatch.setattr(utils, 'fusing', fuse)
        assert function(1) == expected
    assert len(made) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_recorded_steps_are_the_steps_on_a_gpu():
    def train(wrap):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 4, device='cuda')
        optimizer = make_optimizer(model, 1e-2, .1, recorded=True)

        def update(x):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            return model.weight.detach().clone()
        update = wrap(update)
        for step in range(5):
            schedule(optimizer, 1e-2, step, 5, 2)
            weight = update(torch.full((3, 4), float(step), device='cuda'))
        return weight.clone()
    torch.testing.assert_close(train(utils.recorded), train(lambda function: function))

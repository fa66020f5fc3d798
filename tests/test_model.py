"""model.py: agreement with transformers, fast paths against slow ones, causality, positions, growing."""

import pytest
import torch
import torch.nn.functional as F
import transformers

import utils
from model import (GPT2, GPT2Thinking, KVCache, ModelConfig, ThinkingModelConfig, from_pretrained, make_model,
                   save_pretrained, unpack)
from utils import attention, pack, recorded, sample

SMALL = dict(block_size=24, n_layer=2, n_head=4, d_model=32)
POSITIONS = ['learned', 'rotary', 'relative']
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
DEVICES = ['cpu', pytest.param('cuda', marks=on_gpu)]


def large_weights(model):
    """Far from the start, so that differences show: all weights random, logits of a few units."""
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data += .2 * torch.randn(p.shape, generator=generator)
    return model


def small_model(**more):
    return large_weights(GPT2(ModelConfig(**{'d_vocab': 50, **SMALL, **more})))


def small_thinker(**more):
    shape = {**SMALL, 'd_normal_vocab': 20, 'd_thought_vocab': 6, **more}
    return large_weights(GPT2Thinking(ThinkingModelConfig(**shape)))


def tokens_for(model, n_rows, n_positions, seed=1):
    generator, reads = torch.Generator().manual_seed(seed), model.config.reads
    return torch.randint(reads.start, reads.stop, (n_rows, n_positions), generator=generator)


def gradients(loss, tensors):
    """Of a loss by tensors, 0 where there is none."""
    return torch.autograd.grad(loss, list(tensors), allow_unused=True, materialize_grads=True)


# ---- Hugging Face

@pytest.mark.parametrize('tied', [True, False])
def test_logits_equal_transformers_both_ways(tmp_path, tied):
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=50, n_positions=24, n_embd=32, n_layer=2, n_head=4, initializer_range=.2,
        tie_word_embeddings=tied, bos_token_id=None, eos_token_id=None)).eval()
    theirs.save_pretrained(tmp_path / 'theirs')
    ours = from_pretrained(str(tmp_path / 'theirs'))
    tokens = tokens_for(ours, 3, 20)
    assert ours.config.tie_weights == tied
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)

    for mine in (small_model(tie_weights=tied), GPT2Thinking.from_normal(ours, 3)):
        save_pretrained(mine, tmp_path / 'mine')
        back = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / 'mine').eval()
        torch.testing.assert_close(back(tokens).logits, mine(tokens), atol=1e-4, rtol=0)
        torch.testing.assert_close(from_pretrained(str(tmp_path / 'mine'))(tokens), mine(tokens))


def test_what_is_no_gpt2_is_refused_in_one_line(tmp_path):
    transformers.LlamaConfig(hidden_size=32).save_pretrained(tmp_path / 'llama')
    transformers.GPT2Config(activation_function='relu').save_pretrained(tmp_path / 'relu')
    for folder, message in (('nothing', 'no GPT-2 weights'), ('llama', 'model_type'),
                            ('relu', 'activation_function')):
        with pytest.raises(ValueError, match=message) as error:
            from_pretrained(str(tmp_path / folder))
        assert '\n' not in str(error.value)
    with pytest.raises(ValueError, match='learned positions'):
        save_pretrained(small_model(position_encoding='rotary'), tmp_path / 'nowhere')


# ---- the network

@pytest.mark.parametrize('few', [0, 100])  # attention of PyTorch, and written out
@pytest.mark.parametrize('n_query, n_key', [(1, 1), (1, 6), (6, 6), (3, 6)])
def test_attention_equals_its_definition(few, n_query, n_key, monkeypatch):
    monkeypatch.setattr(utils, 'FEW', few)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 4, requires_grad=True) for n in (n_query, n_key, n_key))
    lower = torch.ones(n_query, n_key, dtype=torch.bool).tril(n_key - n_query)
    some = lower & (torch.rand(n_query, n_key) < .5)
    some[:, 0] = True
    added = torch.randn(3, n_query, n_key).masked_fill(~lower, -torch.inf)
    for mask, explicit in ((None, lower), (lower, lower), (some, some), (added, added)):
        found = []
        for y in (attention(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, attn_mask=explicit)):
            found.append([y, *gradients(y.square().sum(), (q, k, v))])
        for ours, reference in zip(*found):
            torch.testing.assert_close(ours, reference, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('length', [5, 20])  # both forms of attention
@pytest.mark.parametrize('kind', POSITIONS)
def test_causality(length, kind):
    model = small_model(position_encoding=kind)
    tokens = tokens_for(model, 2, length)
    changed = tokens.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 50
    difference = (model(changed) - model(tokens)).abs().amax(-1)  # (2, length)
    assert difference[:, :3].max() < 1e-5 and difference[:, 3:8].min() > 1e-3
    for first in (2, -1):
        torch.testing.assert_close(model(tokens, first=first), model(tokens)[:, first:])
    assert model.log_probs(tokens, tokens[:, :0])[1].shape == (2, 0)


def test_reading_in_parts_equals_reading_at_once():
    model = small_model()
    tokens = tokens_for(model, 3, 16)
    for cache in (KVCache(model.config, 3, 13), KVCache()):
        parts = [model(part, cache) for part in tokens[:, :13].split([5, 1, 7], dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens)[:, :13], atol=1e-5, rtol=1e-5)
    rows = torch.tensor([2, 0, 0])
    cache.select(rows)
    rest = model(tokens[rows, 13:], cache)
    torch.testing.assert_close(rest, model(tokens)[rows, 13:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('kind', ['rotary', 'relative'])
def test_positions_by_distance(kind):
    """Shifted positions change nothing, other ones do, and the cache keeps them."""
    model = small_model(position_encoding=kind, block_size=60)
    tokens, position = tokens_for(model, 3, 20), torch.arange(20)
    logits = model(tokens)
    torch.testing.assert_close(model(tokens, positions=position + 100), logits, atol=1e-3, rtol=0)
    mixed = torch.cat([position[:12], position[:8]])
    other = model(tokens, positions=mixed)
    assert (other - logits).abs().max() > .1
    cache = KVCache(model.config, 3, 20)
    parts = [model(tokens[:, a:b], cache, mixed[a:b]) for a, b in ((0, 12), (12, 13), (13, 20))]
    torch.testing.assert_close(torch.cat(parts, 1), other, atol=1e-4, rtol=0)


@pytest.mark.filterwarnings('ignore')  # torch.compile's own
def test_what_is_fused_is_one_graph():
    model, how = small_thinker(), dict(backend='eager', fullgraph=True)
    tokens = tokens_for(model, 3, 5)
    args = model.embed(tokens).detach(), KVCache(model.config, 3, 9), None, None, 2
    torch.testing.assert_close(torch.compile(model.blocks, **how)(*args), model.blocks(*args))
    args = torch.randn(3, 10), torch.rand(3), .7, .1
    assert torch.equal(torch.compile(sample, **how)(*args), sample(*args))
    args = tokens[:, :-1], tokens[:, 1:]
    torch.testing.assert_close(torch.compile(model.loss, **how)(*args), model.loss(*args))


@pytest.mark.filterwarnings('ignore')  # torch.compile's own
@on_gpu
@pytest.mark.parametrize('kind', ['learned', 'rotary'])
@pytest.mark.parametrize('n_rows, G', [(1, 1), (1, 3), (70, 3)])
def test_thoughts_on_a_gpu_equal_uncached(kind, n_rows, G):
    model = small_thinker(block_size=200, position_encoding=kind, n_head=3, d_model=48).cuda()
    with torch.no_grad():
        assert KVCache(model.config, n_rows, 2, torch.device('cuda')).fast
    prompt, noise = tokens_for(model, n_rows, 90).cuda(), torch.rand(G * n_rows, 60, device='cuda')

    def think(prompt, noise):
        return model.think(prompt, 60, n_rollouts=G, noise=noise).tokens
    slow = model.think(prompt, 60, n_rollouts=G, noise=noise, use_cache=False).tokens
    as_graph = recorded(think, fuse=True)
    as_graph(prompt, noise)
    for fast in (think(prompt, noise), as_graph(prompt, noise)):
        assert torch.equal(fast, slow)


# ---- generation and thoughts

@pytest.mark.parametrize('how', [{}, {'temperature': 0}, {'epsilon': .3}])
@pytest.mark.parametrize('fixed', [True, False])
@pytest.mark.parametrize('positions', [[0], [0, 1, 2, 3], [0, 1, 2, 0]])
def test_cached_thoughts_equal_uncached(how, fixed, positions):
    model = small_thinker(position_encoding='rotary' if positions[-1] == 0 else 'learned')
    question, end = tokens_for(model, 5, len(positions)), model.config.end_thought
    noise = torch.rand(15, 9, generator=torch.Generator().manual_seed(2))
    how = dict(how, fixed=fixed, positions=torch.tensor(positions))
    fast, slow = (model.think(question, 9, n_rollouts=3, noise=noise, use_cache=use_cache, **how).tokens
                  for use_cache in (True, False))
    assert torch.equal(fast, slow) and fast.shape == (15, 9)
    # every rollout follows its own noise
    alone = model.think(question.repeat_interleave(3, dim=0), 9, noise=noise, **how).tokens
    assert torch.equal(fast, alone) and ('temperature' in how or len(fast[:3].unique(dim=0)) > 1)
    # fixed: no thought is an end; else behind the first one are only ends
    assert fast.min() >= 20 and torch.equal(fast == end, torch.arange(9) >= model.n_thoughts(fast)[:, None])
    assert not fixed or fast.max() < end


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('fixed', [True, False])
@pytest.mark.parametrize('n_thoughts', [1, 3, 7])
def test_rollouts_for_learning_equal_reading_what_was_written(device, fixed, n_thoughts):
    model = small_thinker().to(device)
    question, noise = tokens_for(model, 3, 2).to(device), torch.rand(60, n_thoughts).to(device)
    how = dict(fixed=fixed, n_rollouts=20, noise=noise, epsilon=.2)
    rollouts = model.think(question, n_thoughts, grad=True, **how)
    tokens = model.think(question, n_thoughts, **how).tokens
    assert torch.equal(rollouts.tokens, tokens)
    both = model.thought_log_probs(question.repeat_interleave(20, dim=0), tokens, fixed)
    found = []
    for log_probs, entropies in (rollouts[1:], both):
        loss = (log_probs.square() + entropies).sum()
        found.append([log_probs, entropies, *gradients(loss, model.parameters())])
    for fast, slow in zip(*found):
        torch.testing.assert_close(fast, slow, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(rollouts.log_probs, both[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('fixed', [True, False])
def test_numbers_spell_thoughts(fixed):
    model = small_thinker()
    thoughts = model.think(tokens_for(model, 50, 2), 3, fixed=fixed).tokens
    assert torch.equal(model.spell(model.number(thoughts, fixed), 3, fixed), thoughts)
    numbers = torch.arange((6 + (not fixed)) ** 3)
    spelled = model.spell(numbers, 3, fixed)
    assert len(spelled.unique(dim=0)) == (216 if fixed else 1 + 6 + 36 + 216)
    assert fixed == torch.equal(model.number(spelled, fixed), numbers)


def test_answers_of_mixed_lengths_equal_one_at_a_time():
    model = small_thinker()
    question, end = tokens_for(model, 30, 3), model.config.end_thought
    thoughts = model.think(question, 5, fixed=False).tokens
    for given in (thoughts, thoughts[:, :0]):
        together = model.answer(given, question)
        for row in range(30):
            own = given[row][given[row] != end]
            sequence = torch.cat([question[row], own, torch.tensor([end])])
            torch.testing.assert_close(together[row], model(sequence[None])[0, -1, :20], atol=1e-5, rtol=1e-5)
    thoughts = model.think(question, 5).tokens
    torch.testing.assert_close(model.answer(thoughts, question, True), model.answer(thoughts, question))


@pytest.mark.parametrize('kind', POSITIONS)
@pytest.mark.parametrize('fixed', [True, False])
def test_thinking_and_answering_in_one_pass_equals_token_by_token(kind, fixed):
    model = small_thinker(position_encoding=kind)
    question, position = tokens_for(model, 9, 5) % 20, torch.tensor([0, 1, 2, 3, 0])
    noise, choices = torch.rand(18, 4, generator=torch.Generator().manual_seed(0)), model.thought_range(fixed)
    thoughts = model.think(question, 4, fixed=fixed, positions=position, noise=noise, n_rollouts=2).tokens
    log_probs, entropies, logits = model.think_and_answer(question, thoughts, fixed, position)
    for n, row in enumerate(thoughts.tolist()):
        read, at, stopped = question[n // 2].tolist(), position.tolist(), False
        for t, token in enumerate(row):
            log_p = model(torch.tensor([read]), positions=torch.tensor(at))[0, -1, choices.start:choices.stop]
            log_p = log_p.log_softmax(-1)
            assert stopped or token == 20 + sample(log_p[None], noise[n, t:t + 1]).item()
            entropy = -(log_p.exp() * log_p).sum().item()
            expected = (0., 0.) if stopped else (log_p[token - 20].item(), entropy)
            assert (log_probs[n, t].item(), entropies[n, t].item()) == pytest.approx(expected, abs=1e-4)
            stopped = stopped or token == model.config.end_thought
            if not stopped:
                read, at = [*read, token], [*at, at[-1] + 1]
        expected = model(torch.tensor([read]), positions=torch.tensor(at))[0, -1, :20]
        torch.testing.assert_close(logits[n], expected, atol=1e-4, rtol=0)
    assert fixed or (thoughts == 26).any()


# ---- growing, checkpoints, bad shapes

@pytest.mark.parametrize('tied', [True, False])
def test_growing_leaves_the_old_logits(tied):
    model = small_model(tie_weights=tied)
    grown = GPT2Thinking.from_normal(model, 5, block_size=30)
    tokens = tokens_for(model, 4, 24)
    assert grown.config.d_vocab_total == 56 and grown.config.end_thought == 55
    torch.testing.assert_close(grown(tokens)[..., :50], model(tokens), atol=1e-5, rtol=0)
    assert (grown.lm_head.weight is grown.wte.weight) == tied
    assert len(grown.wte.weight[50:].unique(dim=0)) == 6
    grown.think(tokens, 3)  # longer than the old one could read


def test_models_in_checkpoints():
    for model in (small_model(), small_thinker()):
        again = unpack(pack(model))
        assert again.config == model.config and type(again) is type(model)
        assert all(torch.equal(p, q) for p, q in zip(again.parameters(), model.parameters(), strict=True))
    checkpoint = {'models': {'model': pack(small_model())}}
    with pytest.raises(ValueError, match='n_layer=2, not 3'):
        make_model(ModelConfig(d_vocab=50, **{**SMALL, 'n_layer': 3}), checkpoint)
    with pytest.raises(ValueError, match='no model called thinking'):
        make_model(small_model().config, checkpoint, 'thinking')
    del checkpoint['models']['model']['state']['wte.weight']
    with pytest.raises(ValueError, match='no model of this version'):
        make_model(small_model().config, checkpoint)


@pytest.mark.parametrize('make, bad', [
    (small_model, {'n_head': 3}), (small_model, {'n_layer': 0}), (small_model, {'d_model': -8}),
    (small_model, {'init': 'zero'}), (small_model, {'init': 'unit'}), (small_thinker, {'input_kind': 'no'}),
    (small_model, {'position_encoding': 'no'}), (small_model, {'d_model': 12, 'position_encoding': 'rotary'}),
    (small_thinker, {'d_thought_vocab': 0}), (small_thinker, {'tie_weights': True, 'output_kind': 'normal'})])
def test_bad_shapes_are_named(make, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        make(**bad)


def test_what_a_model_cannot_read_or_write():
    with pytest.raises(ValueError, match='25 tokens are more than block_size=24'):
        small_model()(torch.zeros(1, 25, dtype=torch.long))
    blind = small_thinker(input_kind='thought', output_kind='normal', tie_weights=False)
    assert (len(blind.wte.weight), len(blind.lm_head.weight)) == (7, 20)
    with pytest.raises(IndexError):
        blind(torch.tensor([[3]]))
    with pytest.raises(ValueError, match='not among those'):
        blind.think(tokens_for(blind, 1, 2), 1)
    with pytest.raises(ValueError, match='positions'):
        blind.think(torch.zeros(1, 2), 1, positions=torch.arange(2), grad=True)


# ---- thoughts at every position of text at once

def text_model(**more):
    torch.manual_seed(0)
    shape = dict(d_normal_vocab=11, d_thought_vocab=5, block_size=12, n_layer=2, n_head=2, d_model=16,
                 init='unit', tie_weights=False)
    return GPT2Thinking(ThinkingModelConfig(**shape | more))


@pytest.mark.parametrize('fixed', [True, False])
@pytest.mark.parametrize('kind', POSITIONS)
def test_thoughts_everywhere_equal_those_of_one_position_after_another(fixed, kind):
    model = text_model(position_encoding=kind)
    tokens, noise = torch.randint(11, (3, 9)), torch.rand(6, 9, 3)
    thoughts, log_probs, entropies, plain, last = model.think_everywhere(tokens, noise, fixed=fixed)
    assert fixed or (thoughts == model.config.end_thought).any()
    weights, logits, total = torch.randn(6, 9, 11), model.logits(last, range(11)), 0.
    ours = gradients((weights * logits).sum() + log_probs.sum() + entropies.sum(), model.parameters())
    for t in range(9):
        prefix = tokens[:, :t + 1]
        rollouts = model.think(prefix, 3, fixed=fixed, noise=noise[:, t], n_rollouts=2).tokens
        assert torch.equal(rollouts, thoughts[:, t])
        one = model.think_and_answer(prefix, rollouts, fixed)
        for reference, at_once in zip(one, (log_probs[:, t], entropies[:, t], logits[:, t])):
            torch.testing.assert_close(at_once, reference, atol=1e-4, rtol=0)
        torch.testing.assert_close(plain[:, t], model.hidden(prefix)[:, -1], atol=1e-4, rtol=0)
        total = total + (weights[:, t] * one[2]).sum() + one[0].sum() + one[1].sum()
    for a, b in zip(ours, gradients(total, model.parameters())):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)


def test_thoughts_that_later_positions_read_equal_one_pass_with_one_mask():
    model = text_model()
    tokens, noise = torch.randint(11, (3, 9)), torch.rand(3, 9, 3)
    thoughts, *_, last = model.think_everywhere(tokens, noise, readers='later')
    sequence = torch.cat([tokens, *thoughts.unbind(-1)], dim=1)  # (3, 36), by step
    step, position = torch.arange(36) // 9, torch.arange(36) % 9
    visible = (step <= step[:, None]) & (position <= position[:, None])
    states = model.layers(model.embed(sequence), None, step + position, visible)
    torch.testing.assert_close(last, states[:, -9:], atol=1e-4, rtol=0)
    own = model.think_everywhere(tokens, noise, given=thoughts)[-1]
    torch.testing.assert_close(own[:, 0], last[:, 0], atol=1e-4, rtol=0)  # the first has none before it
    assert (own - last)[:, 1:].abs().amax(-1).min() > .01
    loop = model.think_everywhere(tokens, noise[..., :1], readers='loop', thought_kind='continuous')[-1]
    again = model.hidden(tokens) + model.wte.weight[11]
    torch.testing.assert_close(loop, model.layers(again, positions=1 + torch.arange(9)))


@pytest.mark.parametrize('readers', ['own', 'later'])
@pytest.mark.parametrize('kind', ['token', 'straight_through', 'continuous'])
def test_thoughts_everywhere_know_nothing_of_the_text_behind_them(readers, kind):
    model = text_model()
    tokens, noise = torch.randint(11, (3, 9)), torch.rand(3, 9, 2)
    other = tokens.clone()
    other[:, 5:] = (other[:, 5:] + 1) % 11
    before, after = (model.think_everywhere(text, noise, readers=readers, thought_kind=kind)[-1]
                     for text in (tokens, other))
    torch.testing.assert_close(before[:, :5], after[:, :5], atol=1e-5, rtol=0)
    assert (before - after)[:, 5:].abs().amax(-1).min() > .01


def test_thoughts_written_at_once_are_one_of_their_product():
    model = text_model(d_thought_vocab=6)
    tokens, noise = torch.randint(11, (3, 7)), torch.rand(6, 7, 4)
    thoughts, log_probs, entropies, plain, last = model.think_everywhere(tokens, noise, at_once=2)
    assert ((thoughts - 11) // 3).unique(dim=0).tolist() == [[[0, 1, 0, 1]] * 7]
    both = model.logits(plain, range(11, 17)).unflatten(-1, (2, 3)).log_softmax(-1).repeat_interleave(2, 0)
    pair = both[..., 0, :, None] + both[..., 1, None, :]  # (6, 7, 3, 3)
    choices = torch.distributions.Categorical(logits=pair.flatten(2))
    index = (thoughts[..., 0] - 11) * 3 + thoughts[..., 1] - 14
    torch.testing.assert_close(log_probs[..., :2].sum(-1), choices.log_prob(index))
    torch.testing.assert_close(entropies[..., :2].sum(-1), choices.entropy())
    given = 11 + (thoughts - 11) % 3  # as ablations may give them
    again = model.think_everywhere(tokens, noise, at_once=2, given=given)
    assert torch.equal(again[1], log_probs) and torch.equal(again[2], entropies)
    with pytest.raises(ValueError, match='at_once=4 does not divide 4 thoughts and 6 tokens'):
        model.think_everywhere(tokens, noise, at_once=4)


def test_gradients_pass_through_thoughts_only_where_they_are_asked_to():
    model = text_model()
    tokens, noise = torch.randint(11, (3, 9)), torch.rand(3, 9, 1)

    def gradient(kind, given=None):
        last = model.think_everywhere(tokens, noise, thought_kind=kind, given=given)[-1]
        return torch.autograd.grad(model.logits(last, range(11)).square().sum(), model.lm_head.weight)[0][11:]
    assert not gradient('token').any() and not gradient('continuous').any()
    assert not gradient('straight_through', torch.full((3, 9, 1), 11)).any()
    straight = gradient('straight_through')
    assert straight[:5].any(1).all() and not straight[5].any()
    straight, token = (model.think_everywhere(tokens, noise, thought_kind=kind)[-1]
                       for kind in ('straight_through', 'token'))
    torch.testing.assert_close(straight, token, atol=1e-5, rtol=0)

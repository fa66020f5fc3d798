"""model.py: agreement with transformers, fast paths against slow ones, causality, masks, growing."""
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers

import model as model_file
from model import GPT2, GPT2Thinking, KVCache, ModelConfig, ThinkingModelConfig, Tree, make_model, pack, unpack
from utils import recorded

SMALL = dict(block_size=24, n_layer=2, n_head=4, d_model=32)


def large_weights(model):
    """Far from the start, so that differences show: all weights and biases random, logits of a few units."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += .2 * torch.randn(p.shape, generator=generator)
    return model


def small_model(**more):
    return large_weights(GPT2(ModelConfig(d_vocab=50, **{**SMALL, **more})))


def small_thinker(**more):
    shape = {**SMALL, 'd_normal_vocab': 20, 'd_thought_vocab': 6, **more}
    return large_weights(GPT2Thinking(ThinkingModelConfig(**shape)))


def tokens_for(model, n_rows, n_positions, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.reads.start, model.config.reads.stop, (n_rows, n_positions), generator=generator)


# ---- Hugging Face

@pytest.mark.parametrize('tied', [True, False])
def test_logits_equal_transformers_both_ways(tmp_path, tied):
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=50, n_positions=24, n_embd=32, n_layer=2, n_head=4, initializer_range=.2, tie_word_embeddings=tied,
        bos_token_id=None, eos_token_id=None)).eval()
    theirs.save_pretrained(tmp_path / 'theirs')
    ours = GPT2.from_pretrained(str(tmp_path / 'theirs'))
    tokens = tokens_for(ours, 3, 20)
    assert ours.config.tie_weights == tied
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)

    mine = small_model(tie_weights=tied)
    mine.save_pretrained(tmp_path / 'mine')
    back = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / 'mine').eval()
    torch.testing.assert_close(back(tokens).logits, mine(tokens), atol=1e-4, rtol=0)
    torch.testing.assert_close(GPT2.from_pretrained(str(tmp_path / 'mine'))(tokens), mine(tokens))


def test_a_grown_model_is_exported_too(tmp_path):
    grown = GPT2Thinking.from_normal(small_model(), 3)
    grown.save_pretrained(tmp_path)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    tokens = tokens_for(grown, 2, 9)
    torch.testing.assert_close(theirs(tokens).logits, grown(tokens), atol=1e-4, rtol=0)


def test_what_is_no_gpt2_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match='no GPT-2 weights') as error:
        GPT2.from_pretrained(str(tmp_path / 'nothing'))
    assert '\n' not in str(error.value)
    transformers.LlamaConfig(hidden_size=32).save_pretrained(tmp_path / 'llama')
    with pytest.raises(ValueError, match='not a GPT-2 but a llama'):
        GPT2.from_pretrained(str(tmp_path / 'llama'))
    transformers.GPT2Config(activation_function='relu').save_pretrained(tmp_path / 'relu')
    with pytest.raises(ValueError, match='activation_function'):
        GPT2.from_pretrained(str(tmp_path / 'relu'))
    with pytest.raises(ValueError, match='cannot|only'):
        small_thinker(tie_weights=False, output_kind='thought').save_pretrained(tmp_path)


# ---- the network

@pytest.mark.parametrize('length', [5, 20])     # the explicit form of attention, and the fused one
def test_causality(length):
    model = small_model()
    tokens = tokens_for(model, 2, length)
    changed = tokens.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 50
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(after[:, :3], before[:, :3])
    assert ((after[:, 3:] - before[:, 3:]).abs().amax(dim=-1) > 1e-3).all()


def test_explicit_attention_equals_fused(monkeypatch):
    model = small_model()
    tokens = tokens_for(model, 2, 7)
    results = []
    for tiny in (0, 100):
        monkeypatch.setattr(model_file, 'TINY', tiny)
        model.zero_grad()
        logits = model(tokens)
        logits.square().mean().backward()
        results.append([logits.detach(), *(p.grad.clone() for p in model.parameters())])
    for fused, explicit in zip(*results, strict=True):
        torch.testing.assert_close(explicit, fused, atol=1e-5, rtol=1e-4)


def test_reading_in_parts_equals_reading_at_once():
    model = small_model()
    tokens = tokens_for(model, 3, 16)
    cache = model_file.KVCache(model.config, 3, 16)
    parts = [model(part, cache) for part in tokens.split([5, 1, 7, 3], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), atol=1e-5, rtol=1e-5)


def test_the_cache_is_read_once_for_a_group():
    model = small_model()
    tokens = tokens_for(model, 2, 6)
    cache = model_file.KVCache(model.config, 2, 7)
    model(tokens, cache)
    cache.repeat(3)
    last = torch.arange(6)[:, None]
    whole = model(torch.cat([tokens.repeat_interleave(3, dim=0), last], dim=1))
    torch.testing.assert_close(model(last, cache)[:, -1], whole[:, -1], atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings('ignore')      # torch.compile's own
def test_what_is_fused_is_one_graph():
    model, how = small_thinker(), dict(backend='eager', fullgraph=True)
    tokens, noise = tokens_for(model, 3, 5), torch.rand(3, 4)
    x = model.embed(tokens).detach()
    args = KVCache(model.config, 3, 9), None, None
    torch.testing.assert_close(torch.compile(model.blocks, **how)(x, *args), model.blocks(x, *args))
    args = torch.randn(3, 10), noise[:, 0], .7, 5
    for fast, slow in zip(torch.compile(model_file.sample, **how)(*args), model_file.sample(*args), strict=True):
        torch.testing.assert_close(fast, slow)
    loss = torch.compile(model.loss, **how)(tokens[:, :-1], tokens[:, 1:].clamp(max=26))
    torch.testing.assert_close(loss, model.loss(tokens[:, :-1], tokens[:, 1:].clamp(max=26)))


@pytest.mark.filterwarnings('ignore')      # torch.compile's own
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('positions', ['learned', 'rotary'])
@pytest.mark.parametrize('n_rows, G', [(1, 1), (1, 3), (70, 3)])
def test_thoughts_on_a_gpu_equal_uncached(positions, n_rows, G):
    model = small_thinker(block_size=200, positions=positions, n_head=3, d_model=48).cuda()
    with torch.no_grad():
        assert KVCache(model.config, n_rows, 2, 'cuda').fast
    prompt, noise = tokens_for(model, n_rows, 90).cuda(), torch.rand(G * n_rows, 60, device='cuda')

    def think(prompt, noise):
        return model.think(prompt, 60, n_rollouts=G, noise=noise)
    slow = model.think(prompt, 60, n_rollouts=G, noise=noise, use_cache=False)
    as_graph = recorded(think, fuse=True)
    as_graph(prompt, noise)
    for fast in (think(prompt, noise), as_graph(prompt, noise)):
        assert torch.equal(fast.tokens, slow.tokens)
        torch.testing.assert_close(fast.log_probs, slow.log_probs, atol=1e-3, rtol=0)


def check_kernels():
    """Run on a CPU by Triton's interpreter, see the next test."""
    usual = KVCache.__init__

    def fast(self, *args):
        usual(self, *args)
        self.fast = True

    for positions, n_head, d_model, n_rows, G in (('learned', 3, 48, 1, 1), ('learned', 6, 96, 1, 1),
                                                  ('learned', 4, 64, 2, 3), ('rotary', 2, 64, 1, 1),
                                                  ('rotary', 6, 96, 28, 3)):
        model = small_thinker(block_size=60, positions=positions, n_head=n_head, d_model=d_model, n_layer=1)
        prompt, noise = tokens_for(model, n_rows, 40), torch.rand(G * n_rows, 3)
        how, found = dict(n_rollouts=G, noise=noise), []
        for KVCache.__init__ in (fast, usual):
            found.append(model.think(prompt, 3, **how))
        assert torch.equal(found[0].tokens, model.think(prompt, 3, use_cache=False, **how).tokens)
        torch.testing.assert_close(found[0].log_probs, found[1].log_probs, atol=1e-4, rtol=0)


@pytest.mark.skipif(not importlib.util.find_spec('triton'), reason='needs Triton')
def test_kernels_on_a_cpu_equal_uncached():
    command = [sys.executable, '-c', 'from test_model import check_kernels; check_kernels()']
    folder = Path(__file__).parent
    path = os.pathsep.join([str(folder), str(folder.parent), *sys.path])
    subprocess.run(command, env=os.environ | {'TRITON_INTERPRET': '1', 'PYTHONPATH': path}, check=True)


# ---- generation and thoughts

@pytest.mark.parametrize('how', [{}, {'temperature': 0}, {'temperature': .7, 'top_k': 5}, {'top_p': .8}])
@pytest.mark.parametrize('fixed', [True, False])
@pytest.mark.parametrize('n_question', [1, 4])
def test_cached_thoughts_equal_uncached(how, fixed, n_question):
    model = small_thinker()
    question = tokens_for(model, 5, n_question)
    noise = torch.rand(15, 9, generator=torch.Generator().manual_seed(2))
    fast, slow = (model.think(question, 9, fixed=fixed, n_rollouts=3, noise=noise, use_cache=use_cache, **how)
                  for use_cache in (True, False))
    assert torch.equal(fast.tokens, slow.tokens) and torch.equal(fast.mask, slow.mask)
    torch.testing.assert_close(fast.log_probs, slow.log_probs, atol=1e-5, rtol=0)


@pytest.mark.parametrize('fixed', [True, False])
def test_sampled_log_probs_equal_those_of_one_forward_pass(fixed):
    model = small_thinker()
    question = tokens_for(model, 20, 3)
    rollout = model.think(question, 6, fixed=fixed)
    again = model.thought_log_probs(question, rollout.tokens, fixed=fixed)
    torch.testing.assert_close(rollout.log_probs, again.detach(), atol=1e-5, rtol=0)
    assert again.requires_grad
    assert torch.equal(model.n_thoughts(rollout.tokens), (rollout.mask & (rollout.tokens != 26)).sum(1))


def test_entropy_of_thoughts_is_that_of_each_choice():
    model = small_thinker()
    question = tokens_for(model, 4, 3)
    thoughts = torch.tensor([[20, 21], [22, 26], [26, 26], [25, 25]])      # 26 is end_thought
    log_probs, entropy = model.thought_log_probs(question, thoughts, fixed=False, entropy=True)
    assert torch.equal(log_probs, model.thought_log_probs(question, thoughts, fixed=False))
    p = model(torch.cat([question, thoughts[:, :1]], dim=1))[:, 2:, 20:].softmax(-1)       # (4, 2, 7)
    expected = torch.distributions.Categorical(p).entropy()
    expected[2, 1] = 0      # behind the end
    torch.testing.assert_close(entropy, expected)


def test_fixed_thoughts_hold_no_end_and_variable_ones_end_once():
    model = small_thinker()
    question, end = tokens_for(model, 50, 3), model.config.end_thought
    fixed = model.think(question, 8)
    assert fixed.mask.all() and fixed.tokens.min() >= 20 and fixed.tokens.max() < end

    rollout = model.think(question, 8, fixed=False)
    is_end = rollout.tokens == end
    first_end = torch.where(is_end.any(1), is_end.int().argmax(1), 8)           # (50,)
    position = torch.arange(8)
    assert torch.equal(rollout.mask, position <= first_end[:, None])            # all up to the first end, with it
    assert is_end[position > first_end[:, None]].all()                          # and nothing but ends behind it
    assert (rollout.log_probs[~rollout.mask] == 0).all() and (rollout.log_probs[rollout.mask] < 0).all()
    assert len(first_end.unique()) > 3


@pytest.mark.parametrize('n_thoughts', [1, 3])
def test_merged_log_probs_equal_those_of_every_row(n_thoughts):
    model = small_thinker()
    question, noise = tokens_for(model, 3, 2), torch.rand(60, n_thoughts)
    tree = Tree(model)
    thoughts, again = (model.think(question, n_thoughts, fixed=False, n_rollouts=20, noise=noise, merge=merge).tokens
                       for merge in (tree, False))
    assert torch.equal(thoughts, again)
    question, found = question.repeat_interleave(20, dim=0), []
    for merge in (False, True, tree):
        model.zero_grad()
        both = model.thought_log_probs(question, thoughts, fixed=False, entropy=True, merge=merge)
        (both[0].square().sum() + both[1].sum()).backward()
        found.append([*both, *(p.grad for p in model.parameters())])
    for separate, merged, sampled in zip(*found):
        torch.testing.assert_close(merged, separate, atol=1e-3, rtol=1e-4)
        assert torch.equal(merged, sampled)
    if n_thoughts > 1:
        with pytest.raises(ValueError, match='other tokens'):
            model.thought_log_probs(question, thoughts.roll(1, 0), fixed=False, merge=tree)


def test_soft_tokens_equal_tokens_and_have_gradients():
    model = small_thinker(input_kind='thought', tie_weights=False, output_kind='normal')
    tokens = tokens_for(model, 4, 5)
    soft = torch.nn.functional.one_hot(tokens - 20, 7).float().requires_grad_()
    torch.testing.assert_close(model(soft), model(tokens))
    # the gradient by a token's weight is the change of logits when there is a little more of it
    model(soft)[:, -1, 0].sum().backward()
    more = soft.detach().clone()
    more[2, 3, 1] += .01
    change = (model(more) - model(soft))[2, -1, 0].item() / .01
    assert change == pytest.approx(soft.grad[2, 3, 1].item(), rel=.1, abs=1e-3)


@pytest.mark.parametrize('fixed', [True, False])
def test_numbers_spell_thoughts(fixed):
    model = small_thinker()
    thoughts = model.think(tokens_for(model, 50, 2), 3, fixed=fixed).tokens
    assert torch.equal(model.spell(model.number(thoughts, fixed), 3, fixed), thoughts)
    numbers = torch.arange((6 + (not fixed)) ** 3)
    spelled = model.spell(numbers, 3, fixed)
    assert len(spelled.unique(dim=0)) == (216 if fixed else 1 + 6 + 36 + 216)
    assert fixed == torch.equal(model.number(spelled, fixed), numbers)


def test_generation_ends_early_when_all_rows_have(monkeypatch):
    model = small_thinker()
    calls, hidden = [], model.hidden
    monkeypatch.setattr(model, 'hidden', lambda *a: calls.append(a[0].shape) or hidden(*a))
    with torch.no_grad():       # end_thought, the last column, is what any state makes most likely
        model.lm_head.weight[-1] = 0
        model.ln_f.weight.zero_()
        model.ln_f.bias.copy_(model.lm_head.weight[0])
        model.lm_head.weight[20:-1] = -model.lm_head.weight[0]
    rollout = model.think(tokens_for(model, 4, 3), 15, fixed=False, temperature=0)
    assert calls == [(4, 3)]    # the question, and nothing after it
    assert rollout.mask.sum(1).tolist() == [1] * 4


def test_rollouts_of_a_group_follow_their_own_noise():
    model = small_thinker()
    question = tokens_for(model, 3, 4)
    noise = torch.rand(12, 5)
    together = model.think(question, 5, n_rollouts=4, noise=noise)
    alone = model.think(question.repeat_interleave(4, dim=0), 5, noise=noise)
    assert torch.equal(together.tokens, alone.tokens)
    assert len(together.tokens[:4].unique(dim=0)) > 1


def test_answers_of_mixed_lengths_equal_one_at_a_time():
    model = small_thinker()
    question, end = tokens_for(model, 30, 3), model.config.end_thought
    thoughts = model.think(question, 5, fixed=False).tokens
    together = model.answer(thoughts, question)
    assert together.shape == (30, 20)
    for row in range(30):
        own = thoughts[row][thoughts[row] != end]
        sequence = torch.cat([question[row], own, torch.tensor([end])])
        torch.testing.assert_close(together[row], model(sequence[None])[0, -1, :20], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.answer(thoughts[:, :0], question),     # no thoughts at all
                               model(torch.cat([question, torch.full((30, 1), end)], dim=1))[:, -1, :20])


@pytest.mark.parametrize('kind', ['learned', 'rotary', 'relative'])
@pytest.mark.parametrize('fixed', [True, False])
@pytest.mark.parametrize('close', [True, False])
def test_thinking_and_answering_in_one_pass_equals_two(kind, fixed, close):
    model = small_thinker(positions=kind)
    question, position = tokens_for(model, 9, 5) % 20, torch.tensor([0, 1, 2, 3, 0])
    thoughts = model.think(question, 4, fixed=fixed, positions=position).tokens
    log_probs, entropy, logits = model.think_and_answer(question, thoughts, fixed, close, position)
    # the reference: row by row, token by token
    for n, row in enumerate(thoughts.tolist()):
        read, at, stopped = question[n].tolist(), position.tolist(), False
        for t, token in enumerate(row):
            log_p = model(torch.tensor([read]), positions=torch.tensor(at))[0, -1, model.thought_range(fixed).start:]
            log_p = log_p[:len(model.thought_range(fixed))].log_softmax(-1)
            expected = (0., 0.) if stopped else (log_p[token - 20].item(), -(log_p.exp() * log_p).sum().item())
            assert (log_probs[n, t].item(), entropy[n, t].item()) == pytest.approx(expected, abs=1e-4)
            stopped = stopped or token == model.config.end_thought
            if not stopped:
                read, at = [*read, token], [*at, at[-1] + 1]
        if close:
            read, at = [*read, model.config.end_thought], [*at, at[-1] + 1]
        expected = model(torch.tensor([read]), positions=torch.tensor(at))[0, -1, :20]
        torch.testing.assert_close(logits[n], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize('kind', ['rotary', 'relative'])
def test_positions_by_distance(kind):
    """Shifted positions change nothing, other ones do; the cache keeps them; no parameter is tied to a position."""
    model = small_model(positions=kind, block_size=60)
    tokens, position = tokens_for(model, 3, 20), torch.arange(20)
    logits = model(tokens)
    torch.testing.assert_close(model(tokens, positions=position + 100), logits, atol=1e-3, rtol=0)
    mixed = torch.cat([position[:12], position[:8]])
    other = model(tokens, positions=mixed)
    assert (other - logits).abs().max() > .1
    cache = KVCache(model.config, 3, 20)
    parts = [model(tokens[:, a:b], cache, mixed[a:b]) for a, b in ((0, 12), (12, 13), (13, 20))]
    torch.testing.assert_close(torch.cat(parts, 1), other, atol=1e-4, rtol=0)
    assert not any(name.startswith('wpe') for name, _ in model.named_parameters())
    with pytest.raises(ValueError, match='learned positions'):
        model.save_pretrained('nowhere')


def test_generated_tokens_go_on_behind_the_last_position():
    model = small_thinker(positions='relative')
    question, position = tokens_for(model, 4, 5) % 20, torch.tensor([0, 1, 2, 3, 0])
    noise = torch.rand(8, 6, generator=torch.Generator().manual_seed(2))
    fast, slow = (model.think(question, 6, positions=position, noise=noise, n_rollouts=2, use_cache=use_cache)
                  for use_cache in (True, False))
    assert torch.equal(fast.tokens, slow.tokens)
    torch.testing.assert_close(fast.log_probs, slow.log_probs, atol=1e-4, rtol=0)
    again, *_ = model.think_and_answer(question.repeat_interleave(2, 0), fast.tokens, positions=position)
    torch.testing.assert_close(fast.log_probs, again, atol=1e-4, rtol=0)


def test_split_policies_have_only_the_vocabularies_they_need():
    thinking = small_thinker(output_kind='thought', tie_weights=False)
    answering = small_thinker(input_kind='thought', output_kind='normal', tie_weights=False)
    assert thinking.wte.weight.shape[0] == 27 and thinking.lm_head.weight.shape[0] == 7
    assert answering.wte.weight.shape[0] == 7 and answering.lm_head.weight.shape[0] == 20
    rollout = thinking.think(tokens_for(thinking, 10, 2), 4, fixed=False)
    assert rollout.tokens.min() >= 20 and answering.answer(rollout.tokens).shape == (10, 20)
    with pytest.raises(ValueError, match='not among those'):
        thinking.generate(tokens_for(thinking, 1, 2), 1, among=range(0, 20))
    with pytest.raises(IndexError):
        answering(torch.tensor([[3]]))      # blind: it has no embedding of a normal token


# ---- growing, packing, bad shapes

@pytest.mark.parametrize('tied', [True, False])
def test_growing_leaves_the_old_logits(tied):
    model = small_model(tie_weights=tied)
    grown = GPT2Thinking.from_normal(model, 5)
    tokens = tokens_for(model, 4, 12)
    assert grown.config.d_vocab_total == 56 and grown.config.end_thought == 55
    torch.testing.assert_close(grown(tokens)[..., :50], model(tokens), atol=1e-5, rtol=0)
    assert (grown.lm_head.weight is grown.wte.weight) == tied
    assert len(grown.wte.weight[50:].unique(dim=0)) == 6
    grown.think(tokens, 3)


def test_pack_and_unpack():
    for model in (small_model(), small_thinker(input_kind='thought', output_kind='normal', tie_weights=False)):
        again = unpack(pack(model))
        assert again.config == model.config and type(again) is type(model)
        for name, p in model.state_dict().items():
            assert torch.equal(p, again.state_dict()[name])
    checkpoint = {'models': {'model': pack(small_model())}}
    with pytest.raises(ValueError, match='n_layer=2, not 3'):
        make_model(ModelConfig(d_vocab=50, **{**SMALL, 'n_layer': 3}), checkpoint)
    with pytest.raises(ValueError, match='no model called thinking'):
        make_model(small_model().config, checkpoint, 'thinking')
    del checkpoint['models']['model']['state']['wte.weight']
    with pytest.raises(ValueError, match='no model of this version'):
        make_model(small_model().config, checkpoint)


@pytest.mark.parametrize('bad', [{'n_head': 3}, {'n_layer': 0}, {'d_model': -8}, {'init': 'zero'}, {'block_size': 0}])
def test_bad_shapes(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        small_model(**bad)


def test_too_long_a_sequence():
    with pytest.raises(ValueError, match='block_size=24'):
        small_model()(torch.zeros(1, 25, dtype=torch.long))
    with pytest.raises(ValueError, match='must be one of all, normal, thought'):
        small_thinker(input_kind='thoughts')
    with pytest.raises(ValueError, match='reads and writes'):
        small_thinker(output_kind='thought')
    with pytest.raises(ValueError, match='tie_weights=False'):
        small_model(init='unit')


# ---- thoughts at every position of text at once

TEXT = dict(d_normal_vocab=11, d_thought_vocab=5, block_size=12, n_layer=2, n_head=2, d_model=16, init='unit',
            tie_weights=False)


@pytest.mark.parametrize('fixed', [True, False])
@pytest.mark.parametrize('positions', ['learned', 'rotary', 'relative'])
def test_thoughts_everywhere_equal_those_of_one_position_after_another(fixed, positions):
    torch.manual_seed(0)
    model = GPT2Thinking(ThinkingModelConfig(positions=positions, **TEXT))
    tokens, noise = torch.randint(11, (3, 9)), torch.rand(6, 9, 3)
    thoughts, log_probs, entropies, plain, last = model.think_everywhere(tokens, noise, fixed=fixed)
    assert fixed or (thoughts == model.config.end_thought).any()
    weights = torch.randn(6, 9, 11)
    grown = (weights * model.logits(last, range(11))).sum() + log_probs.sum() + entropies.sum()
    ours = torch.autograd.grad(grown, list(model.parameters()))
    total = 0.
    for t in range(9):
        prefix = tokens[:, :t + 1]
        rollout = model.think(prefix, 3, fixed=fixed, noise=noise[:, t], n_rollouts=2)
        assert torch.equal(rollout.tokens, thoughts[:, t])
        one = model.think_and_answer(prefix.repeat_interleave(2, dim=0), rollout.tokens, fixed, close=False)
        for reference, all_at_once in zip(one, (log_probs[:, t], entropies[:, t], model.logits(last[:, t], range(11)))):
            torch.testing.assert_close(all_at_once, reference, atol=1e-4, rtol=0)
        torch.testing.assert_close(plain[:, t], model.hidden(prefix)[:, -1], atol=1e-4, rtol=0)
        total = total + (weights[:, t] * one[2]).sum() + one[0].sum() + one[1].sum()
    for a, b in zip(ours, torch.autograd.grad(total, list(model.parameters()))):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)


def test_thoughts_that_later_positions_read_equal_one_pass_with_one_mask():
    torch.manual_seed(0)
    model = GPT2Thinking(ThinkingModelConfig(**TEXT))
    tokens, noise = torch.randint(11, (3, 9)), torch.rand(3, 9, 3)
    thoughts, *_, last = model.think_everywhere(tokens, noise, readers='later')
    sequence = torch.cat([tokens, *thoughts.unbind(-1)], dim=1)                                 # (3, 36), by step
    step, position = torch.arange(36) // 9, torch.arange(36) % 9
    visible = (step <= step[:, None]) & (position <= position[:, None])
    states = model.layers(model.embed(sequence), None, step + position, visible)
    torch.testing.assert_close(last, states[:, -9:], atol=1e-4, rtol=0)
    own = model.think_everywhere(tokens, noise, given=thoughts)[-1]
    torch.testing.assert_close(own[:, 0], last[:, 0], atol=1e-4, rtol=0)       # the first has none before it
    assert (own - last)[:, 1:].abs().amax(-1).min() > .01


@pytest.mark.parametrize('readers', ['own', 'later'])
@pytest.mark.parametrize('thought', ['token', 'straight_through', 'continuous'])
def test_thoughts_everywhere_know_nothing_of_the_text_behind_them(readers, thought):
    torch.manual_seed(0)
    model = GPT2Thinking(ThinkingModelConfig(**TEXT))
    tokens, noise = torch.randint(11, (3, 9)), torch.rand(3, 9, 2)
    other = tokens.clone()
    other[:, 5:] = (other[:, 5:] + 1) % 11
    before, after = (model.think_everywhere(x, noise, readers=readers, thought=thought)[-1] for x in (tokens, other))
    torch.testing.assert_close(before[:, :5], after[:, :5], atol=1e-5, rtol=0)
    assert (before - after)[:, 5:].abs().amax(-1).min() > .01


def test_thoughts_written_at_once_are_one_of_their_product():
    """Two of three tokens each are one of nine, whose embeddings are the sums."""
    torch.manual_seed(0)
    model = GPT2Thinking(ThinkingModelConfig(**TEXT | {'d_thought_vocab': 6}))
    tokens, noise = torch.randint(11, (3, 7)), torch.rand(6, 7, 4)
    thoughts, log_probs, entropies, plain, last = model.think_everywhere(tokens, noise, at_once=2)
    assert ((thoughts - 11) // 3).unique(dim=0).tolist() == [[[0, 1, 0, 1]] * 7]
    both = model.logits(plain, range(11, 17)).unflatten(-1, (2, 3)).log_softmax(-1).repeat_interleave(2, dim=0)
    pair = both[..., 0, :, None] + both[..., 1, None, :]                                        # (6, 7, 3, 3)
    index = (thoughts[..., 0] - 11) * 3 + thoughts[..., 1] - 14
    torch.testing.assert_close(log_probs[..., :2].sum(-1), pair.flatten(2).gather(-1, index[..., None])[..., 0])
    torch.testing.assert_close(entropies[..., :2].sum(-1), -(pair.exp() * pair).sum((-1, -2)))
    again = model.think_everywhere(tokens, noise, at_once=2, given=11 + (thoughts - 11) % 3)   # as ablations may give
    for ours, theirs in zip((log_probs, entropies), again[1:]):
        assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match='at_once=4 does not divide 4 thoughts and 6 tokens'):
        model.think_everywhere(tokens, noise, at_once=4)


def test_gradients_pass_through_thoughts_only_where_they_are_asked_to():
    torch.manual_seed(0)
    model = GPT2Thinking(ThinkingModelConfig(**TEXT))
    tokens, noise = torch.randint(11, (3, 9)), torch.rand(3, 9, 1)
    def gradient(**how):
        last = model.think_everywhere(tokens, noise, **how)[-1]
        return torch.autograd.grad(model.logits(last, range(11)).square().sum(), model.lm_head.weight)[0][11:]
    given = model.think_everywhere(tokens, noise)[0]
    assert not gradient().any() and not gradient(thought='continuous').any()
    straight = gradient(thought='straight_through')
    assert straight[:5].any(1).all() and not straight[5].any()
    soft = model.think_everywhere(tokens, noise, thought='straight_through')[-1]
    torch.testing.assert_close(soft, model.think_everywhere(tokens, noise, given=given)[-1], atol=1e-5, rtol=0)


def test_a_gate_starts_at_what_is_known_without_thoughts():
    torch.manual_seed(0)
    normal = GPT2(ModelConfig(d_vocab=11, block_size=9, n_layer=2, n_head=2, d_model=16))
    model = GPT2Thinking.from_normal(normal, 5, gate=0., block_size=12)
    tokens = torch.randint(11, (3, 9))
    *_, plain, last = model.think_everywhere(tokens, torch.rand(3, 9, 3))
    torch.testing.assert_close(plain, normal.hidden(tokens), atol=1e-5, rtol=0)
    assert torch.equal(last, plain)
    noise, thought = torch.rand(3, 9, 3), {}
    for gate in (1., None):
        torch.manual_seed(1)
        model = GPT2Thinking.from_normal(normal, 5, gate=gate, block_size=12)
        *_, plain, thought[gate] = model.think_everywhere(tokens, noise)
    torch.testing.assert_close(thought[1.], plain + thought[None])
    with pytest.raises(ValueError, match='9 tokens and 4 thoughts are more than block_size=12'):
        model.think_everywhere(tokens, torch.rand(3, 9, 4))


def test_loss_in_chunks_is_the_loss(monkeypatch):
    torch.manual_seed(0)
    model = GPT2(ModelConfig(d_vocab=50, block_size=9, n_layer=1, n_head=2, d_model=8))
    tokens, targets = torch.randint(50, (2, 5, 9))
    expected = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    slow = torch.autograd.grad(3 * expected, list(model.parameters()))
    for chunk in (7, 8192):
        monkeypatch.setattr('model.CHUNK', chunk)
        loss = model.loss(tokens, targets)
        assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
        for ours, grad in zip(torch.autograd.grad(3 * loss, list(model.parameters())), slow, strict=True):
            torch.testing.assert_close(ours, grad, atol=1e-6, rtol=0)
    with torch.autocast('cpu', torch.bfloat16):
        assert model.loss(tokens, targets).item() == pytest.approx(expected.item(), abs=.02)

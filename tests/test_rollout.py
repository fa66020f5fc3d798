"""
rollout_think.py: text with thoughts inside, what it is paid, and other models that judge it; problems that a pretrained
model solves.
"""
import gc
import itertools
import json
import sys
from fractions import Fraction

import pytest
import torch
from conftest import JUDGE, TEXT, metrics, start

import utils
from model import GPT2, GPT2Thinking, ThinkingModelConfig

SCRIPT = 'rollout_think'
WAYS = list(itertools.product((True, False), (False, True), (0, 1, 3)))     # fixed, close, think_len


def tiny():
    torch.manual_seed(0)
    return GPT2Thinking(ThinkingModelConfig(d_normal_vocab=7, d_thought_vocab=3, block_size=64, n_layer=2, n_head=2,
                                            d_model=16, tie_weights=False, init='unit'))


@pytest.mark.parametrize('fixed, close, think_len', WAYS)
def test_text_with_thoughts_inside_keeps_the_rules(fixed, close, think_len):
    model, prompt = tiny(), torch.randint(7, (3, 4))
    noise = torch.rand(12, 6 * (think_len + 1 + (close and think_len > 0)))
    how = {'fixed': fixed, 'close': close, 'n_rollouts': 4, 'noise': noise}
    tokens, mask = model.write(prompt, 6, think_len, **how)
    slow, slow_mask = model.write(prompt, 6, think_len, use_cache=False, **how)
    assert torch.equal(tokens, slow) and torch.equal(mask, slow_mask)
    lengths = set()
    for row, written in zip(tokens, mask):
        assert (row[~written] == 10).all()
        words = ''.join('n' if token < 7 else 't' if token < 10 else 'e' for token in row[written].tolist())
        assert words.count('n') == 6 and words[-1] == 'n'
        for thoughts in words[:-1].split('n'):
            lengths.add(len(thoughts.rstrip('e')))
            assert thoughts.count('e') == (close and thoughts != '') and thoughts[:-1].count('e') == 0
    assert lengths <= set(range(think_len + 1)) and (not fixed or lengths == {think_len})
    assert len(lengths) > 1 or fixed or not think_len

    # what is given is written: text with own thoughts, thoughts with own text
    text = torch.randint(7, (12, 6))
    forced, _ = model.write(prompt, 6, think_len, text=text, **how)
    assert torch.equal(forced[forced < 7].view(12, 6), text)
    swapped, _ = model.write(prompt, 6, think_len, thoughts=torch.full(noise.shape, 8), **how)
    assert set(swapped[(swapped >= 7) & (swapped < 10)].tolist()) <= {8}


@pytest.mark.parametrize('fixed, close, think_len', WAYS)
def test_what_is_written_has_the_probability_that_it_is_read_with(fixed, close, think_len):
    """One token after another, among those that may come next by the rules, written out here."""
    model, prompt = tiny(), torch.randint(7, (5, 4))
    tokens, mask = model.write(prompt, 4, think_len, fixed=fixed, close=close)
    log_p, entropy = model.written_log_probs(prompt, tokens, think_len, fixed, close)
    for n, row in enumerate(tokens.tolist()):
        since, closed = 0, False
        for t, token in enumerate(row):
            if not mask[n, t]:
                break
            may = set()
            if closed or since == think_len and not (close and think_len) or since == 0 and not fixed or (
                    not fixed and not close):
                may |= set(range(7))
            if since < think_len and not closed:
                may |= {7, 8, 9}
            if close and 0 < since and not closed and (since == think_len or not fixed):
                may |= {10}
            logits = model(torch.cat([prompt[n], tokens[n, :t]])[None])[0, -1]
            p = logits[sorted(may)].softmax(0)
            assert log_p[n, t].item() == pytest.approx(p[sorted(may).index(token)].log().item(), abs=1e-4)
            assert entropy[n, t].item() == pytest.approx(-(p * p.log()).sum().item(), abs=1e-4)
            closed = token == 10
            since = 0 if token < 7 else since + (token < 10)


def test_growing_leaves_the_text_as_it_was():
    torch.manual_seed(0)
    grown = GPT2Thinking.from_normal(JUDGE, 5, block_size=30)
    prompt, noise = torch.randint(14, (3, 5)), torch.rand(6, 6)
    before = JUDGE.generate(prompt, 6, n_rollouts=2, noise=noise)
    after, mask = grown.write(prompt, 6, 0, n_rollouts=2, noise=noise)
    assert torch.equal(after, before.tokens) and mask.all()
    torch.testing.assert_close(grown.written_log_probs(prompt.repeat_interleave(2, dim=0), after, 0)[0],
                               before.log_probs, atol=1e-5, rtol=0)


def test_rewards_flow_back_to_what_was_written_before(script):
    names = script('--gamma=.5', '--kl_weight=0', '--entropy_weight=.4', '--repeat_cost=2', '--think_cost=.3',
                   '--think_len=2', '--group_size=3')
    prefix, real = names['draw'](0)
    noise = torch.rand(12, 18)
    loss = names['losses'](prefix, real, noise, None)[0]
    model, expected = names['model'], 0.
    tokens, mask = model.write(prefix, 6, 2, fixed=False, n_rollouts=3, noise=noise)
    log_pi, _ = model.written_log_probs(prefix.repeat_interleave(3, dim=0), tokens, 2, False)
    returns, rows = torch.zeros(12, 6), []
    for n, row in enumerate(tokens.tolist()):
        row = [token for token, written in zip(row, mask[n]) if written]
        rows.append(row)
        whole = prefix[n // 3].tolist() + [token for token in row if token < 14]
        log_p = JUDGE(torch.tensor([whole[:-1]]))[0].log_softmax(-1)
        paid, thoughts = [], 0
        for t, token in enumerate(row):
            thoughts += token >= 14
            if token < 14:
                at = 5 + len(paid)
                seen = [whole[i:i + 4] for i in range(at - 3)]
                paid.append(log_p[at - 1, token].item() - .4 * log_pi[n, t].item() - .3 * thoughts
                            - 2 * (whole[at - 3:at + 1] in seen))
                thoughts = 0
        returns[n] = torch.tensor([sum(.5 ** (j - i) * paid[j] for j in range(i, 6)) for i in range(6)])
    for n, row in enumerate(rows):
        for t in range(len(row)):
            i = sum(token < 14 for token in row[:t])
            group = returns[n // 3 * 3:n // 3 * 3 + 3, i]
            expected = expected - (returns[n, i] - group.mean()) / 3 * log_pi[n, t] / (4 * 6)
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-4)


def test_repeated_and_distinct_runs_of_tokens(script):
    names = script()
    text = torch.randint(3, (5, 30))
    for n in (2, 4):
        found, runs = names['repeats'](text, n), []
        for row, again in zip(text.tolist(), found.tolist()):
            seen = []
            for end in range(len(row)):
                gram = row[end - n + 1:end + 1] if end >= n - 1 else None
                assert again[end] == (gram is not None and gram in seen)
                seen += [gram] if gram else []
            runs += map(tuple, seen)
        assert names['distinct'](text, n) == len(set(runs)) / len(runs)
    assert not names['repeats'](text[:, :3], 4).any()


def test_log_probs_are_shared_out_by_characters(script):
    share_out = script()['share_out']
    log_p = torch.tensor([-1., -2., -3., -4.])
    shared = share_out(log_p, [(0, 2), (2, 3), (3, 3), (3, 7)], [1, 2, 4])      # the third has no characters
    torch.testing.assert_close(shared, torch.tensor([-.5, -2.5, -7.]))


def test_a_llama_with_tokens_of_its_own_judges(script, tmp_path):
    """Its tokens are pairs of characters, ours are characters: totals are the same."""
    transformers = pytest.importorskip('transformers')
    from tokenizers import Tokenizer, models
    letters = [chr(i) for i in range(97, 123)] + [' ', '\n', '.']
    vocab = {piece: i for i, piece in enumerate(['<s>', *letters, *(a + b for a in letters for b in letters)])}
    theirs = Tokenizer(models.BPE(vocab, [(a, b) for a in letters for b in letters], unk_token='<s>'))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=theirs, bos_token='<s>')
    tokenizer.save_pretrained(tmp_path / 'llama')
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(vocab), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2))
    llama.save_pretrained(tmp_path / 'llama')
    names = script(f'--reference={tmp_path}/llama')
    prefix, real = names['draw'](0)
    shared = names['judged'](prefix[:, :0], torch.cat([prefix, real], dim=1))
    for row, ours in zip(torch.cat([prefix, real], dim=1).tolist(), shared):
        ids = [0, *tokenizer(''.join(names['decode'](row)), add_special_tokens=False)['input_ids']]
        assert len(ids) < len(row)
        log_p = llama(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        assert ours.sum().item() == pytest.approx(log_p.gather(1, torch.tensor(ids)[1:, None]).sum().item(), abs=1e-3)
    assert torch.allclose(names['judged'](prefix, real), shared[:, 5:], atol=1e-4)


def test_a_gpt2_writes_and_judges(script, run_here, tmp_path):
    """By its folder, as by the name of GPT-2's weights: the text that it writes at first is its own."""
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=14, n_positions=32, n_embd=16, n_layer=2, n_head=2, initializer_range=.5)).eval()
    theirs.save_pretrained(tmp_path / 'gpt2')
    how = [f'--init_from={tmp_path}/gpt2', f'--reference={tmp_path}/gpt2']
    names = script(*how)
    model, (prefix, real) = names['model'], names['draw'](0)
    assert isinstance(model, GPT2Thinking) and model.config.d_thought_vocab == 5
    both = torch.cat([prefix, real], dim=1)
    expected = theirs(both).logits.log_softmax(-1)[:, 4:-1].gather(-1, real[..., None])[..., 0]
    torch.testing.assert_close(names['judged'](prefix, real), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(model.written_log_probs(prefix, real, 0)[0], expected, atol=1e-4, rtol=0)
    code, out, err = run_here(SCRIPT, f'--out_dir={tmp_path}/a', *how)
    assert code == 0, err
    assert run_here(SCRIPT, f'--out_dir={tmp_path}/a', *how[1:], '--init_from=resume', '--max_steps=8')[0] == 0
    assert GPT2.from_pretrained(tmp_path / 'gpt2').config.n_layer == 2


def test_characters_of_several_tokens_are_judged_whole(tmp_path, monkeypatch):
    """As GPT-2's tokens of curly quotes, which are parts of a character."""
    class Encoding:
        n_vocab = 50257

        def decode_single_token_bytes(self, token):
            return [b'a', '“'.encode()[:2], '“'.encode()[2:], b'bc'][token]
    monkeypatch.setattr(utils, 'gpt2_encoding', Encoding)
    for part in ('train', 'val'):
        torch.zeros(4, dtype=torch.uint16).numpy().tofile(tmp_path / f'{part}.bin')
    (tmp_path / 'meta.json').write_text('{"tokenizer": "gpt2", "d_vocab": 50257}')
    decode = utils.load_text(tmp_path)[3]
    assert decode([0, 1, 2, 3, 1, 3, 2]) == ['a', '', '“', 'bc', '', '\ufffdbc', '\ufffd']
    thinking = ThinkingModelConfig(d_normal_vocab=4, d_thought_vocab=2, n_layer=1, n_head=1, d_model=4)
    assert utils.plain(utils.show_tokens(torch.tensor([1, 4, 2, 0]), thinking, decode, '')) == '<think0>“a'


def test_the_page_says_what_each_thought_changed(run_here, tmp_path, script):
    names = script('--fixed=True', '--think_len=2')
    prefix, _ = names['draw'](0)
    tokens, _ = names['model'].write(prefix, 6, 2)
    change = names['changes'](names['model'], prefix, tokens)
    for t in range(18):
        after, before = (names['model'](torch.cat([prefix, tokens[:, :end]], dim=1))[:, -1, :14].log_softmax(-1)
                         for end in (t + 1, t))
        following = tokens[:, t // 3 * 3 + 2]
        expected = (after - before).gather(1, following[:, None])[:, 0] * (t % 3 < 2)
        torch.testing.assert_close(change[:, t], expected, atol=1e-4, rtol=0)
    assert run_here(SCRIPT, f'--out_dir={tmp_path}/a', '--page=True', '--fixed=True')[0] == 0
    page = (tmp_path / 'a/samples.html').read_text()
    assert page.count('<p>') == 20 and page.count('<b title="log p of the next token') == 20 * 6


def test_every_knob_of_rollouts_does_something(run_here, tmp_path):
    def log(*more):
        code, _, err = run_here(SCRIPT, f'--out_dir={tmp_path}/a', '--max_steps=3', *more)
        assert code == 0, err
        return metrics(tmp_path / 'a')
    usual = log()
    for knob in ('prefix_len=4', 'text_len=5', 'batch_size=2', 'group_size=3', 'learning_rate=1e-2', 'clip=.01',
                 'warmup_steps=9', 'd_thought_vocab=4', 'think_len=2', 'think_len=0', 'fixed=True', 'close=True',
                 'spread=9', 'advantage=grpo', 'gamma=0', 'think_cost=1', 'kl_weight=1',
                 'entropy_weight=0', 'supervised_weight=1', 'temperature=2', 'top_k=3', 'top_p=.5', 'seed=1'):
        assert log(f'--{knob}') != usual, knob
    assert log('--text_len=11', '--top_k=2', '--repeat_cost=9') != log('--text_len=11', '--top_k=2')
    assert log('--weight_decay=.5', '--learning_rate=1e-2') != log('--learning_rate=1e-2')
    assert log('--advantage=softmax', '--tau=.1') != log('--advantage=softmax')


def test_models_that_do_not_fit_are_refused(run_here, tmp_path):
    out = f'--out_dir={tmp_path}/a'
    code, text, err = run_here(SCRIPT, out, '--text_len=5', '--max_steps=1')
    assert code == 0, err
    start = [out, f'--init_from={tmp_path}/a/ckpt.pt', '--text_len=5', '--max_steps=1']
    for more, message in ((['--text_len=9'], 'up to 18 written ones are more'), (['--group_size=1'], 'at least 2'),
                          (['--reference=nowhere.pt'], 'nowhere.pt is not'), (['--reference='], 'must name a model'),
                          ([f'--reference={TEXT.name}/other.pt'], 'no model called model, but other'),
                          ([f'--reference={tmp_path}/none/here'], 'no model of transformers at'),
                          (['--init_from=scratch', '--text_len=13'], 'reads 16 tokens, too few'),
                          ([f'--init_from={tmp_path}/none/here'], 'no GPT-2 weights at'),
                          (['--prefix_len=99999'], 'a smaller')):
        code, _, err = run_here(SCRIPT, *start, *more)
        assert code == 2 and message in err and err.count('\n') == 1, err
    assert run_here(SCRIPT, *start)[0] == 0


# ---- problems

@pytest.fixture(scope='module')
def solver(tmp_path_factory):
    """A folder with a tiny Llama, whose tokens are x (anything else), 0, 1, 2, \\boxed{ and }, and with problems."""
    transformers = pytest.importorskip('transformers')
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    folder = tmp_path_factory.mktemp('solver')
    vocab = {piece: i for i, piece in enumerate(['<end>', 'x', '\\boxed{', '}', '0', '1', '2'])}
    theirs = Tokenizer(models.WordLevel(vocab, unk_token='x'))
    theirs.pre_tokenizer = pre_tokenizers.Split(Regex(r'\\boxed\{|[012}]|[^012}\\]+|\\'), 'isolated')
    theirs.decoder = decoders.Fuse()
    transformers.PreTrainedTokenizerFast(tokenizer_object=theirs, eos_token='<end>').save_pretrained(folder / 'llama')
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=7, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=None, eos_token_id=0, initializer_range=.1)).save_pretrained(folder / 'llama')
    for part, n in (('train', 30), ('val', 12)):
        (folder / f'{part}.jsonl').write_text(''.join(
            json.dumps({'question': '0' * (i % 5) + '1?', 'answer': '2', 'level': 1 + i % 3}) + '\n' for i in range(n)))
    return folder


@pytest.fixture
def of_math(solver, monkeypatch):
    """Knobs of this script for problems, in place of those for text."""
    knobs = ['--reward=math', f'--data={solver}', f'--init_from={solver}/llama', '--text_len=6', '--batch_size=4',
             '--group_size=8', '--max_steps=6', '--eval_every=3', '--warmup_steps=2', '--eval_prefixes=9',
             '--learning_rate=3e-3', '--device=cpu', '--at_once=5']
    monkeypatch.setattr('conftest.TINY', {SCRIPT: knobs})
    return knobs


def test_a_pretrained_model_learns_what_is_paid(of_math, run_here, tmp_path):
    code, out, err = run_here(SCRIPT, f'--out_dir={tmp_path}/a', '--max_steps=30', '--eval_every=15')
    assert code == 0 and not err, err
    result, lines = json.loads(out.splitlines()[-1]), metrics(tmp_path / 'a')
    assert result['accuracy'] == 1 and result['accuracy_at_level'] == {'1': 1, '2': 1, '3': 1}
    assert lines[0]['val_accuracy'] < .5 and lines[-1]['val_accuracy_at_3'] == 1 and 0 <= result['format'] <= 1
    assert lines[1]['accuracy'] < .5 < lines[-2]['accuracy'] and {
        'format', 'length', 'mixed', 'entropy', 'max_weight', 'effective_n', 'gradient_norm'} < lines[1].keys()
    samples = (tmp_path / 'a/samples.txt').read_text()
    assert '01?\n' in samples and '2 ✓' in samples and '✗' in samples
    # its checkpoint has its weights, and is no model for texts
    code, out, _ = run_here(SCRIPT, f'--out_dir={tmp_path}/b', f'--init_from={tmp_path}/a/ckpt.pt', '--eval_only=True')
    assert code == 0 and json.loads(out.splitlines()[-1])['accuracy'] == 1


@pytest.mark.parametrize('advantage', ['grpo', 'softmax'])
def test_solutions_are_drawn_and_paid_as_the_obvious_way_does(advantage, of_math, script):
    """One after another, without a cache or padding, with the rewards by hand; and in parts of any size."""
    names = script(f'--advantage={advantage}', '--tau=.3', '--format_weight=.4', '--temperature=.7')
    model, (problems, _) = names['model'], names['draw'](0)
    noise = torch.rand(32, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():       # an untrained head is hardly ever right, and never wrong enough to tell
        model.lm_head.weight *= 3
    loss, logged = names['losses'](problems, None, noise, None)
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    expected, rewards, lengths, n_mixed = 0., torch.zeros(4, 8), [], 0
    for b, problem in enumerate(problems):
        ids, mask = names['ask']([problem])
        assert mask.all()
        log_ps = []
        for g in range(8):
            row, log_p, text = ids[0], 0., ''
            for t in range(6):
                logits = model(row[None]).logits[0, -1]
                token, _ = utils.sample(logits[None], noise[8 * b + g, t:t + 1], temperature=.7)
                log_p = log_p + logits.log_softmax(0)[token[0]]
                row = torch.cat([row, token])
                text += ['', 'x', '\\boxed{', '}', '0', '1', '2'][token]
                if token == 0:
                    break
            log_ps.append(log_p)
            lengths.append(t + 1)
            box = text.rpartition('\\boxed{')[2].partition('}') if '\\boxed{' in text else ('', '', '')
            numbers = ''.join(c if c in '012' else ' ' for c in text).split()
            given = box[0] if box[1] else numbers[-1] if numbers else ''
            rewards[b, g] = (given.isdigit() and int(given) == 2) + .4 * (bool(box[1]) and text.count('\\boxed{') == 1)
        n_mixed += 0 < (rewards[b] >= 1).sum() < 8
        weights = utils.advantages(rewards[b:b + 1], advantage, .3)[0]
        expected = expected - sum(w * log_p for w, log_p in zip(weights, log_ps)) / (4 * 6)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-4)
    assert logged['accuracy'] == (rewards >= 1).float().mean() > 0 and logged['mixed'] == n_mixed / 4
    assert logged['length'] == sum(lengths) / 32 and min(lengths) < max(lengths)
    model.zero_grad()
    expected.backward()
    for p, gradient in zip(model.parameters(), gradients):
        torch.testing.assert_close(p.grad, gradient, atol=1e-5, rtol=1e-3)
    # half precision: what generate has cast must not cost the weights their gradient
    half = script(f'--advantage={advantage}', '--tau=.3', '--dtype=bfloat16', '--at_once=99')
    half['model'].load_state_dict(model.state_dict())
    with half['world'].autocast:
        loss, _ = half['losses'](problems, None, noise, None)
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in half['model'].parameters())


def test_problems_resume_bit_for_bit(of_math, run_here, tmp_path, monkeypatch):
    assert run_here(SCRIPT, f'--out_dir={tmp_path}/whole')[0] == 0
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        log = utils.Run.log

        def breaks(self, step, **numbers):
            if step == 4:
                raise KeyboardInterrupt
            log(self, step, **numbers)
        patch.setattr(utils.Run, 'log', breaks)
        run_here(SCRIPT, f'--out_dir={tmp_path}/broken')
    gc.collect()        # closes its files, as the end of a process does
    code, _, err = run_here(SCRIPT, f'--out_dir={tmp_path}/broken', '--init_from=resume')
    assert code == 0, err
    assert metrics(tmp_path / 'broken') == metrics(tmp_path / 'whole') and len(metrics(tmp_path / 'whole')) == 9
    broken, whole = (torch.load(tmp_path / name / 'ckpt.pt', weights_only=True)['models']['model']
                     for name in ('broken', 'whole'))
    assert broken['source'] == whole['source']
    assert all(torch.equal(tensor, whole['state'][key]) for key, tensor in broken['state'].items())
    # not as a model for texts, and no model for texts for it
    monkeypatch.undo()
    for more, message in (([f'--init_from={tmp_path}/whole/ckpt.pt', '--reward=text'], 'makes no use of'),
                          ([f'--init_from={TEXT.name}/judge.pt', '--reward=math'], 'makes no use of')):
        code, _, err = run_here(SCRIPT, *more)
        assert code == 2 and message in err and err.count('\n') == 1, err


def test_two_processes_solve_as_one(of_math, run_here, tmp_path):
    more = ['--max_steps=4', '--eval_every=4']
    two = start(SCRIPT, f'--out_dir={tmp_path}/two', *more,
                launcher=(sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2'))
    assert run_here(SCRIPT, f'--out_dir={tmp_path}/one', *more)[0] == 0
    _, err = two.communicate(timeout=300)
    assert two.returncode == 0, err
    one, two = (torch.load(tmp_path / name / 'ckpt.pt', weights_only=True)['models']['model']['state']
                for name in ('one', 'two'))
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, atol=1e-5, rtol=0)


def test_problems_of_math_and_gsm8k_are_read(of_math, script, run_here, tmp_path):
    load = script()['load_problem']
    hard = {'problem': 'Find $x$.', 'level': 'Level 4', 'type': 'Algebra',
            'solution': 'It is $\\boxed{0}$, no, \\boxed{\\frac{1}{2}}.'}
    school = {'question': 'How many?', 'answer': '9 + 9 = <<9+9=18>>18\n#### 1,018'}
    assert load(json.dumps(hard)) == {'question': 'Find $x$.', 'answer': '\\frac{1}{2}', 'level': '4'}
    assert load(json.dumps(school)) == {'question': 'How many?', 'answer': '1,018', 'level': ''}
    assert load(json.dumps({**hard, 'answer': None}))['answer'] == '\\frac{1}{2}'
    assert load('{"question": "?", "answer": 7, "level": 2}') == {'question': '?', 'answer': '7', 'level': '2'}
    rows = [json.dumps({**hard, 'level': f'Level {level}'}) for level in range(1, 6) for _ in range(7)]
    (tmp_path / 'math.jsonl').write_text('\n'.join(rows))
    names = script(f'--data={tmp_path}/math.jsonl', '--levels=4, 5')
    assert [len(names[part]) for part in ('train_set', 'val_set')] == [12, 2]
    assert {row['level'] for row in names['train_set']} == {'4', '5'} == {row['level'] for row in names['val_set']}
    for line, message in (('{"question": "?"', 'line 3 is no problem: Expecting'),
                          ('[1]', 'line 3 is no problem: it is no'),
                          ('{"question": "?", "answer": null}', 'line 3 is no problem: it needs'),
                          ('{"problem": "?", "solution": "\\\\boxed{1"}', 'line 3 is no problem: it needs'),
                          ('', 'no two problems of levels=7; its levels are 4')):
        (tmp_path / 'bad.jsonl').write_text(f'{json.dumps(hard)}\n\n{line}\n')
        code, _, err = run_here(SCRIPT, f'--data={tmp_path}/bad.jsonl', '--levels=7')
        assert code == 2 and message in err and err.count('\n') == 1, err
    for more, message in (('--data=nowhere', 'no problems in nowhere'), ('--gamma=.5', 'makes no use of --gamma'),
                          ('--init_from=scratch', 'must name a pretrained model'),
                          ('--text_len=3000', 'reads 2048 tokens, problems of'),
                          ('--eval_prefixes=0', 'must be between 1 and'),
                          (f'--init_from={tmp_path}/none', 'no model of transformers'),
                          (f'--init_from={TEXT.name}/judge.pt', 'has no model for --reward=math')):
        code, _, err = run_here(SCRIPT, more)
        assert code == 2 and message in err and err.count('\n') == 1, err


def test_answers_are_compared_as_numbers(of_math, script):
    names = script()
    for text in ('18', '18.0', '$18', ' 18. ', '+18', '36/2', '\\frac{36}{2}', '\\dfrac{36}{2}', '18\\%', '\\text{18}'):
        assert names['value'](text) == 18, text
    assert names['value']('1,234,567.5') == Fraction(2469135, 2) and names['value']('-.5') == Fraction(-1, 2)
    assert names['value']('(1,2)') == names['value']('\\left( 1, 2 \\right)') != names['value']('(12)')
    assert names['value']('2\\frac{1}{2}') != Fraction(21, 2) and names['value']('-\\frac{1}{2}') == Fraction(-1, 2)
    assert names['value']('1/0') == '1/0' and names['value']('1e999999999') == '1e999999999'
    for text, right, formed in (('So \\boxed{18}.', True, True), ('\\boxed{1} or \\boxed{ 18 }', True, False),
                                ('12 + 6 = 18', True, False), ('\\boxed{17} 18', False, True), ('', False, False),
                                ('\\boxed{18', True, False), ('18 or 1,800', False, False), ('20-2=18,', True, False),
                                ('She has 18, then.', True, False), ('18-18', True, False), ('no, -18', False, False),
                                ('\\boxed{\\frac{36}{2}}', True, True)):
        assert names['mark'](text, '18') == (right, formed), text


def test_a_chat_template_is_used_where_there_is_one(of_math, script):
    names = script()
    names['tokenizer'].chat_template = "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}"
    problems = [{'question': question} for question in ('00?', '2?')]
    ids, given = names['ask'](problems)
    assert ids.shape == given.shape and given.sum(1).tolist() == [ids.shape[1], ids.shape[1] - 1]
    (first, solved), (second, again) = names['EXAMPLES']
    shown = f"user{names['PROMPT']}\n\n{first}assistant{solved}user{second}assistant{again}user"
    assert ids[0].tolist() == names['tokenizer'](shown + '00?')['input_ids']

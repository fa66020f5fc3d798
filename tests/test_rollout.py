"""rollout_think.py: texts with thoughts; problems."""
import json
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import JUDGE, TEXT, TORCHRUN, interrupt, metrics, result_of, start
from torch.testing import assert_close

import utils
from model import GPT2, ModelConfig, save_pretrained

SCRIPT = 'rollout_think'


def certain(model):
    """Surer than untrained."""
    torch.nn.init.normal_(model.wte.weight, std=.3, generator=torch.Generator().manual_seed(0))
    return model


def refused(run_here, message, *knobs):
    code, _, err = run_here(SCRIPT, *knobs)
    assert code == 2 and message in err and err.count('\n') == 1, err


@pytest.mark.parametrize('fixed', [True, False])
@pytest.mark.parametrize('think_len', [0, 1, 3])
def test_writing_and_reading_by_the_rules(fixed, think_len, script):
    names = script(f'--fixed={fixed}', f'--think_len={think_len}', '--text_len=4')
    model, prefix, noise = certain(names['model']), names['val_prefix'], torch.rand(20, 4 * (think_len + 1))
    tokens, how = names['write'](prefix, noise), dict(fixed=fixed, n_rollouts=2, noise=noise)
    assert torch.equal(tokens, model.write(prefix, 4, think_len, use_cache=False, **how))
    log_p, own, entropy = names['read'](prefix.repeat_interleave(2, dim=0), tokens)
    lengths = set()
    for n, row in enumerate(tokens.tolist()):
        since = place = 0
        for t, token in enumerate(row):
            if place == 4:  # filled up
                assert token == 19 and (t >= log_p.shape[1] or log_p[n, t] == 0)
                continue
            logits = model(torch.cat([prefix[n // 2], tokens[n, :t]])[None])[0, -1]
            may = [*range(14)] * (not fixed or since == think_len) + [*range(14, 19)] * (since < think_len)
            assert_close(log_p[n, t], logits[may].log_softmax(0)[may.index(token)])
            since += 1
            if token < 14:
                normal = logits[:14].log_softmax(0)
                assert_close(own[n, place], normal[token])
                assert_close(entropy[n, place], -(normal.exp() * normal).sum())
                lengths.add(since - 1)
                place, since = place + 1, 0
        assert place == 4
    assert lengths == {think_len} if fixed or not think_len else len(lengths) > 1

    # what is given is written
    text = torch.randint(14, (20, 4))
    forced = model.write(prefix, 4, think_len, text=text, **how)
    swapped = model.write(prefix, 4, think_len, thoughts=torch.full(noise.shape, 15), **how)
    assert torch.equal(forced[forced < 14].view(20, 4), text)
    assert not {14, 16, 17, 18} & {*swapped.flatten().tolist()}


@pytest.mark.parametrize('thoughts', [[], [18, 16]])
def test_a_text_earns_minus_its_divergence(thoughts, script):
    names = script('--text_len=1', '--think_len=2')
    model, prefix, text = certain(names['model']), names['val_prefix'][:1], torch.arange(14)[:, None]
    tokens = torch.cat([torch.tensor([thoughts] * 14).long(), text], dim=1)
    returns, _ = names['pay'](prefix.expand(14, -1), text, names['read'](prefix.expand(14, -1), tokens)[1])
    p = model(torch.tensor([[*prefix[0], *thoughts]]))[0, -1, :14].softmax(0)
    q = JUDGE(prefix)[0, -1].softmax(0)
    assert_close(p @ returns[:, 0], -(p * (p / q).log()).sum(), atol=1e-5, rtol=0)


def test_rewards_flow_back(script):
    names = script('--gamma=.5', '--entropy_weight=.4', '--think_len=2', '--group_size=3',
                   '--supervised_weight=.7')
    certain(names['model'])
    prefix, real = names['cut'](names['train_set'], torch.tensor([3, 50, 71, 98]))
    many, dice = prefix.repeat_interleave(3, dim=0), [torch.rand(12, 18), torch.rand(4, 18)]
    loss, seen = names['losses']((prefix, real), dice)
    tokens = names['write'](prefix, dice[0])
    log_pi, own, entropy = names['read'](many, tokens)
    text = tokens[tokens < 14].view(12, 6)
    paid = JUDGE.log_probs(many, text)[0] - .4 * own
    returns = torch.stack([sum(.5 ** (j - i) * paid[:, j] for j in range(i, 6)) for i in range(6)], dim=1)
    weights = (returns.view(4, 3, 6) - returns.view(4, 3, 6).mean(1, keepdim=True)).view(12, 6).detach() / 3
    expected = -.7 * names['read'](prefix, names['write'](prefix, dice[1], real))[1].mean()
    for n, row in enumerate(tokens.tolist()):
        for t in range(sum(token < 19 for token in row)):
            i = sum(token < 14 for token in row[:t])  # the normal token it is, or leads to
            expected = expected - weights[n, i] * log_pi[n, t] / (4 * 6)
    assert_close(loss, expected, atol=1e-4, rtol=1e-4)
    assert_close(seen['entropy'], entropy.mean().detach())
    assert seen['thoughts'] == ((tokens >= 14) & (tokens < 19)).sum() / 72 > 0


def test_a_gpt2_writes_and_judges(run_here, tmp_path):
    pytest.importorskip('transformers')
    for d_vocab in (14, 64):
        save_pretrained(GPT2(ModelConfig(d_vocab, 32, 2, 2, 16)), tmp_path / f'{d_vocab}')
    how = [f'--init_from={tmp_path}/14', f'--reference={tmp_path}/14', f'--out_dir={tmp_path}/a']
    result_of(run_here(SCRIPT, *how))
    result_of(run_here(SCRIPT, *how[1:], '--init_from=resume', '--max_steps=8'))
    code, _, err = run_here(SCRIPT, *how, f'--reference={tmp_path}/64')
    assert code == 2 and 'reads 32 of 64 tokens' in err


def test_models_that_do_not_fit_are_refused(run_here, tmp_path):
    more = [f'--out_dir={tmp_path}/a', '--text_len=5', '--max_steps=1']
    result_of(run_here(SCRIPT, *more))
    more += [f'--init_from={tmp_path}/a/ckpt.pt']
    for knobs, message in ((['--text_len=9'], 'ckpt.pt reads 16 of 14 tokens, texts have up to 23 of 14'),
                           (['--prefix_len=99999'], 'a smaller --prefix_len'),
                           ([f'--reference={TEXT.name}/other.pt'], "no model called model, but ['other']"),
                           ([f'--reference={tmp_path}/none'], 'no GPT-2 weights at'),
                           ([f'--init_from={TEXT.name}/start.pt', '--text_len=13'], 'judge.pt reads'),
                           ([f'--init_from={tmp_path}/none'], 'no GPT-2 weights at')):
        refused(run_here, message, *more, *knobs)
    result_of(run_here(SCRIPT, *more))


# ---- problems ----

PIECES = ['<end>', 'x', '\\boxed{', '}', '0', '1', '2', '\n']  # x: others


@pytest.fixture(scope='module')
def solver(tmp_path_factory):
    transformers = pytest.importorskip('transformers')
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    folder = tmp_path_factory.mktemp('solver')
    theirs = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(PIECES)}, unk_token='x'))
    theirs.pre_tokenizer = pre_tokenizers.Split(Regex(r'\\boxed\{|[012\n]|[^012\n}\\]+|\\'), 'isolated')
    theirs.decoder = decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=theirs, eos_token='<end>')
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=9, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=None, eos_token_id=0, initializer_range=.1))
    for name, more in (('llama', {}), ('chat', {'additional_special_tokens': ['<turn>']}),
                       ('padded', {'pad_token': '<pad>'})):  # beyond the embedding
        tokenizer.add_special_tokens(more)
        tokenizer.save_pretrained(folder / name)
        model.save_pretrained(folder / name)
        tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + m['content'] }}<turn>{% endfor %}"
    for part, ask, n in (('train', '1?', 30), ('val', '1!', 12)):
        rows = ({'question': '0' * (i % 5) + ask, 'answer': '2', 'level': 1 + i % 3} for i in range(n))
        (folder / f'{part}.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def of_math(solver, monkeypatch):
    monkeypatch.setattr('conftest.TINY', {SCRIPT: [
        '--reward=math', f'--data={solver}', f'--init_from={solver}/llama', '--text_len=6', '--batch_size=4',
        '--max_steps=6', '--eval_every=3', '--warmup_steps=2', '--eval_prefixes=9', '--learning_rate=3e-3',
        '--device=cpu', '--micro_batch=5']})


def test_a_pretrained_model_learns_what_is_paid(of_math, run_here, tmp_path):
    result = result_of(run_here(SCRIPT, f'--out_dir={tmp_path}/a', '--max_steps=30', '--eval_every=15'))
    lines, samples = metrics(tmp_path / 'a'), (tmp_path / 'a/samples.txt').read_text()
    assert result['accuracy'] == 1 and result['accuracy_at_level'] == {'1': 1, '2': 1, '3': 1}
    assert lines[0]['val_accuracy'] < .5 and lines[-1]['val_accuracy_at_3'] == 1 and lines[1]['accuracy'] < .5
    assert '01!\n' in samples and '✓' in samples and '✗' in samples


@pytest.mark.parametrize('advantage', ['grpo', 'softmax'])
def test_solutions_by_the_obvious_way(advantage, of_math, script):
    names = script(f'--advantage={advantage}', '--tau=.3', '--format_weight=.4', '--temperature=.7')
    model, problems, noise = names['model'], names['train_set'][:4], torch.rand(32, 6)
    with torch.no_grad():  # less alike
        model.lm_head.weight *= 1.5
    loss, logged = names['losses'](problems, [noise])
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    expected, right, lengths, endless = 0., torch.zeros(4, 8), [], 0
    for b, problem in enumerate(problems):
        ids, log_ps, rewards = names['ask']([problem])[0][0], [], torch.zeros(1, 8)
        for g in range(8):
            row, log_p = ids, 0.
            for t in range(6):
                logits = model(row[None]).logits[0, -1]
                token = utils.sample(logits[None], noise[8 * b + g, t:t + 1], temperature=.7)
                log_p, row = log_p + (logits / .7).log_softmax(0)[token[0]], torch.cat([row, token])
                if token == 0 or t and row[-2:].tolist() == [7, 7]:  # the end, or an empty line
                    break
            else:
                endless += 1
            log_ps.append(log_p)
            lengths.append(t + 1)
            right[b, g], formed = names['grade'](''.join(PIECES[i] for i in row[len(ids):] if 0 < i < 8), '2')
            rewards[0, g] = right[b, g] + .4 * formed
        weights = utils.advantages(rewards, advantage, .3)[0]
        expected = expected - sum(w * log_p for w, log_p in zip(weights, log_ps)) / (4 * 6)
    assert_close(loss, expected, atol=1e-5, rtol=1e-4)
    assert_close(gradients, torch.autograd.grad(expected, list(model.parameters())), atol=1e-5, rtol=1e-3)
    assert logged['accuracy'] == right.mean() > 0 and logged['length'] == sum(lengths) / 32 < max(lengths)
    assert logged['mixed'] == sum(0 < row.sum() < 8 for row in right) / 4
    assert logged['cut_off'] == endless / 32 > 0


def test_problems_resume_bit_for_bit(of_math, run_here, tmp_path, monkeypatch):
    result_of(run_here(SCRIPT, f'--out_dir={tmp_path}/whole'))
    interrupt(4, run_here, SCRIPT, f'--out_dir={tmp_path}/broken')
    result_of(run_here(SCRIPT, f'--out_dir={tmp_path}/broken', '--init_from=resume'))
    assert metrics(tmp_path / 'broken') == metrics(tmp_path / 'whole')
    assert len(metrics(tmp_path / 'whole')) == 9
    assert_close(weights(tmp_path / 'broken'), weights(tmp_path / 'whole'), atol=0, rtol=0)
    refused(run_here, 'cannot use', f'--init_from={TEXT.name}/judge.pt')
    monkeypatch.undo()
    refused(run_here, 'is not what --init_from=', f'--init_from={tmp_path}/whole/ckpt.pt')


def weights(folder):
    return torch.load(folder / 'ckpt.pt', weights_only=True)['models']['model']['state']


def test_two_processes_solve_as_one(of_math, run_here, tmp_path):
    two = start(SCRIPT, f'--out_dir={tmp_path}/two', '--max_steps=4', launcher=TORCHRUN)
    result_of(run_here(SCRIPT, f'--out_dir={tmp_path}/one', '--max_steps=4'))
    assert two.wait(timeout=300) == 0, two.stderr.read()
    assert_close(weights(tmp_path / 'two'), weights(tmp_path / 'one'), atol=1e-5, rtol=0)


def test_problems_of_math_and_gsm8k_are_read(of_math, script, run_here, tmp_path):
    hard = {'problem': 'Find $x$.', 'level': 'Level 4',
            'solution': 'It is $\\boxed{0}$, no, \\boxed{\\frac{1}{2}}.'}
    load_problems = script()['load_problems']
    for row, expected in ((hard, ['Find $x$.', '\\frac{1}{2}', '4']),
                          ({'question': '?', 'answer': '<<9+9=18>>18\n#### 1,018'}, ['?', '1,018', '']),
                          ({'question': '?', 'answer': 7, 'level': 2}, ['?', '7', '2'])):
        (tmp_path / 'one.jsonl').write_text('\ufeff' + f'{json.dumps(row)}\n' * 2)
        assert list(load_problems(tmp_path / 'one.jsonl')[1].values()) == expected
    rows = [json.dumps({**hard, 'problem': f'{i}', 'level': f'Level {1 + i // 7}'}) for i in range(35)]
    (tmp_path / 'math.jsonl').write_text('\n'.join(rows))
    names = script(f'--data={tmp_path}/math.jsonl', '--levels=4, 5')
    levels = [[row['level'] for row in names[part]] for part in ('train_set', 'val_set')]
    assert [sorted(set(part)) for part in levels] == [['4', '5']] * 2 and list(map(len, levels)) == [12, 2]
    for line, message in (('{"question": "?"', 'line 3 is not a problem: Expecting'),
                          ('{"question": "?", "answer": null}', 'line 3 is not a problem: it needs'),
                          ('', 'no two problems of levels=7; it has 4')):
        (tmp_path / 'bad.jsonl').write_text(f'{json.dumps(hard)}\n\n{line}\n')
        refused(run_here, message, f'--data={tmp_path}/bad.jsonl', '--levels=7')
    for knob, message in (('data=nowhere', 'No such file'),
                          ('init_from=scratch', 'needs a model to'),
                          ('text_len=3000', 'reads 2048 tokens'),
                          (f'init_from={tmp_path}/no', 'cannot use')):
        refused(run_here, message, f'--{knob}')


def test_answers_are_graded(of_math, script):
    """answers.txt: right, has a box | the answer | a solution."""
    grade = script()['grade']
    pytest.importorskip('math_verify')
    for line in (Path(__file__).parent / 'answers.txt').read_text(encoding='utf-8').splitlines():
        verdict, answer, solution = line.split(' | ')
        assert ''.join(str(int(x)) for x in grade(solution, answer)) == verdict, line
    for text in ('{' * 10**5 + '}' * 10**5, '\\boxed' * 25000, '\\boxed{9^{9^{9^9}}}', '1+' * 10**5):
        for answer in ('18', '\\sqrt{2}'):
            began = time.time()
            assert not grade(text, answer)[0] and time.time() - began < 5


def test_a_chat_template_is_used(of_math, script, solver):
    names = script(f'--init_from={solver}/chat')
    model, tokenizer = names['model'], names['tokenizer']
    ids, given = names['ask']([{'question': question} for question in ('00?', '2?')])
    assert ids.shape == given.shape and given.sum(1).tolist() == [ids.shape[1], ids.shape[1] - 1]
    first, solved, second, again = names['TURNS']
    shown = f'user{first}<turn>assistant{solved}<turn>user{second}<turn>assistant{again}<turn>user'
    assert ids[0].tolist() == tokenizer(shown + '00?<turn>')['input_ids']
    assert model.generation_config.eos_token_id == [0, 8]
    with torch.no_grad():
        model.lm_head.weight[:] = 0
    noise = torch.tensor([[.85, .85, .99, .1, .1, .1], 6 * [.5]])
    tokens, mask, texts, endless = names['solve'](ids, given, noise)
    assert tokens[0].tolist() == [7, 7, 8, 0, 0, 0] and mask.sum(1).tolist() == [3, 6]
    assert texts[0] == '\n\n' and endless.tolist() == [False, True]


def test_what_does_not_fit_a_solver(of_math, run_here, solver, tmp_path, monkeypatch):
    def problems(rows):
        (tmp_path / 'some.jsonl').write_text('\n'.join(
            json.dumps({'question': question, 'answer': answer}) for question, answer in rows))
        return f'--data={tmp_path}/some.jsonl', f'--out_dir={tmp_path}/a'
    refused(run_here, 'knows 9; problems have 49 of 10', f'--init_from={solver}/padded')
    save_pretrained(GPT2(ModelConfig(50, 512, 1, 2, 16)), tmp_path)
    refused(run_here, 'no tokenizer', f'--init_from={tmp_path}')
    long = [('1' * n, '2') for n in (*range(10), 3000)]  # the last is for val
    refused(run_here, 'reads 2048 tokens and knows 9; problems have 3', *problems(long))
    refused(run_here, 'are also in train', *problems([('1', '2')] * 40))
    code, out, err = run_here(SCRIPT, *problems((str(i % 25), '2') for i in range(40)))
    assert code == 0 and out.startswith('3 of 4 problems of val are also in train: left'), err
    monkeypatch.setitem(sys.modules, 'math_verify', None)
    refused(run_here, 'math_verify is needed', *problems((str(i), '\\pi') for i in range(20)))


def test_a_model_cannot_run_code(of_math, run_here, solver, tmp_path, monkeypatch):
    shutil.copytree(solver / 'llama', tmp_path / 'llama')
    config = json.loads((tmp_path / 'llama/config.json').read_text())
    config |= {'model_type': 'odd', 'auto_map': {'AutoConfig': 'code.A', 'AutoModelForCausalLM': 'code.A'}}
    (tmp_path / 'llama/config.json').write_text(json.dumps(config))
    (tmp_path / 'llama/code.py').write_text(f'open("{tmp_path}/harm", "w")')
    monkeypatch.setattr('builtins.input', lambda *_: 'y')
    refused(run_here, 'cannot use', f'--init_from={tmp_path}/llama')
    refused(run_here, 'no GPT-2 weights', '--reward=text', f'--data={TEXT.name}', '--reference=x',
            f'--init_from={tmp_path}/llama')
    assert not (tmp_path / 'harm').exists()

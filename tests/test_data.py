"""prepare_data.py: what it writes, from text that is made here. Nothing is downloaded."""
import bz2
import gc
import gzip
import json
import lzma
import os
import random
import re
import shutil
import sys
import types

import numpy as np
import pytest
import tiktoken
from conftest import ROOT, result_of
from filelock import FileLock
from tiktoken_ext.openai_public import r50k_pat_str

from utils import addition_questions

PARTS = ('train', 'val')
SPACES = " \n\t\ra's1!\x1c\u00a0\u3000é"


@pytest.fixture(autouse=True)
def encoding(monkeypatch):
    """GPT-2's tokenizer with its splits and few of its merges, as its own must be downloaded."""
    ranks = {bytes([i]): i for i in range(256)}
    for text in (a + b for a in SPACES for b in SPACES):
        ranks.setdefault(text.encode(), len(ranks))
    encoding = tiktoken.Encoding('gpt2', pat_str=r50k_pat_str, mergeable_ranks=ranks,
                                 special_tokens={'<|endoftext|>': 50256})
    monkeypatch.setattr(tiktoken, 'get_encoding', lambda name: encoding)
    return encoding


@pytest.fixture
def run_data(run_here, tmp_path):
    """Run the script: (exit code, stdout, stderr)."""
    def run_data(*arguments):
        ran = run_here('prepare_data', f'--out_dir={tmp_path}/data', *arguments)
        gc.collect()  # closes its files
        return ran
    return run_data


@pytest.fixture
def prepare(run_data, tmp_path):
    """Run the script: the JSON object of its last line, meta.json, and tokens of train and val."""
    def prepare(*arguments):
        shutil.rmtree(tmp_path / 'data', ignore_errors=True)
        result, folder = result_of(run_data(*arguments)), tmp_path / 'data'
        meta = json.loads((folder / 'meta.json').read_text())
        names = {path.name for path in folder.iterdir()} - {'input.txt', '.lock'}
        assert not (tmp_path / 'data.part').exists()
        assert names == {'meta.json', 'train.bin', 'val.bin'} and result['d_vocab'] == meta['d_vocab']
        data = [np.memmap(folder / f'{part}.bin', dtype=np.uint16, mode='r') for part in PARTS]
        for part, tokens in zip(PARTS, data):
            assert meta[f'{part}_tokens'] == result[f'{part}_tokens'] == len(tokens)
        return result, meta, *data
    return prepare


@pytest.fixture
def refused(run_data, tmp_path):
    """See that the script ends in one line with a message and exit code 2, and writes nothing."""
    def refused(message, *arguments, writes=False):
        code, _, err = run_data(*arguments)
        assert code == 2 and err.startswith('error: ') and err.count('\n') == 1 and message in err, err
        assert writes or not [*tmp_path.glob('data*')]
    return refused


def characters(meta, tokens):
    return ''.join(meta['characters'][i] for i in tokens)


# ---- what it writes ----

def test_shakespeare_is_split_and_numbered_as_in_nanogpt(prepare, tmp_path, encoding):
    text = ''.join(random.Random(0).choices('To be, or not to be:\n', k=10007))
    (tmp_path / 'input.txt').write_text(text)
    result, meta, train, val = prepare(f'--path={tmp_path}/input.txt')
    assert characters(meta, train) == text[:9006] and characters(meta, val) == text[9006:]
    assert meta['characters'] == sorted(set(text))
    assert result['script'] == 'prepare_data' and list(result['changed']) == ['path', 'out_dir']

    _, meta, train, val = prepare('--dataset=shakespeare', f'--path={tmp_path}/input.txt')
    assert train.tolist() == encoding.encode_ordinary(text[:9006]) and encoding.decode(val) == text[9006:]
    assert meta['tokenizer'] == 'gpt2' and meta['d_vocab'] == 50257


def test_documents_of_a_folder(prepare, tmp_path, encoding):
    texts = {'a.txt': 'Ä first.\n\n', 'b.txt.xz': 'the 2nd', 'c/d.txt.gz': '\nthird ',
             'e.txt.bz2': 31 * 'é'}
    (tmp_path / 'books/c').mkdir(parents=True)
    for open_as, (name, text) in zip((open, lzma.open, gzip.open, bz2.open), texts.items()):
        with open_as(tmp_path / 'books' / name, 'wt', encoding='utf-8-sig', newline='\r\n') as file:
            file.write(text)
    (tmp_path / 'books/empty.txt').write_text('')
    (tmp_path / 'books/.hidden').mkdir()
    for name in ('cover.jpg', '._a.txt', 'a.txt~', 'a.txt.bak', '.hidden/a.txt'):  # none is text for us
        (tmp_path / 'books' / name).write_bytes(b'\xff\xd8')
    _, meta, train, val = prepare('--dataset=text', f'--path={tmp_path}/books')
    *whole, last = texts.values()
    assert encoding.decode(train) == ''.join(f'<|endoftext|>{text}' for text in [*whole, last[:25]])
    assert encoding.decode(val) == f'<|endoftext|>{last[25:]}'

    (tmp_path / 'val.txt').write_text('ö <|endoftext|>')  # a text cannot fake the mark
    both = '--dataset=text', f'--path={tmp_path}/books', f'--val_path={tmp_path}/val.txt'
    _, meta, train, val = prepare(*both)
    assert encoding.decode(train) == ''.join(f'<|endoftext|>{text}' for text in texts.values())
    assert val.tolist() == [50256, *encoding.encode_ordinary('ö <|endoftext|>')]
    _, meta, train, val = prepare(*both, '--tokenizer=char')
    assert characters(meta, train) == ''.join(texts.values()) and characters(meta, val) == 'ö <|endoftext|>'


def test_pieces_have_the_tokens_of_the_whole_text(prepare, encoding, tmp_path):
    pattern = re.search(r"PIECE = re.compile\(r'(.*)', re", (ROOT / 'prepare_data.py').read_text())[1]
    small = re.compile(pattern.replace('1000000', '9'), re.DOTALL)
    for seed in range(300):
        text = ''.join(random.Random(seed).choices(SPACES + ' ' * 5 + '\n' * 9, k=100))
        pieces = small.findall(text)
        assert ''.join(pieces) == text and len(pieces) > 3
        assert sum(map(encoding.encode_ordinary, pieces), []) == encoding.encode_ordinary(text)

    text = ''.join(random.Random(0).choices(SPACES.replace('\r', 'b') + 'cdefgh', k=2_200_000)) + 'x' * 100
    (tmp_path / 'long.txt').write_text(text)
    _, meta, train, val = prepare('--dataset=text', f'--path={tmp_path}/long.txt')
    assert train.tolist() == [50256, *encoding.encode_ordinary(text[:int(len(text) * .9)])]
    assert encoding.decode(val[1:]) == text[int(len(text) * .9):] and meta['pieces'] >= 3


def test_addition(prepare):
    _, meta, *data = prepare('--dataset=addition', '--n_questions=15000', '--seed=3')
    assert characters(meta, range(13)) == '0123456789+=\n'
    asked = addition_questions(10000, 100000, .1, 3, n_max=15000)  # by add_normal.py too
    for tokens, rows in zip(data, asked, strict=True):
        assert characters(meta, tokens) == ''.join(f'{a:05}+{b:05}={a + b:06}\n' for a, b in rows.tolist())
    _, meta, train, val = prepare('--dataset=addition', '--input_min=0', '--input_max=12', '--val_share=.5')
    assert len(train) == len(val) == 72 * len('07+11=18\n')


def calculate(question):
    """What a word problem tells, from its sentences: the calculation as text, and its result."""
    *story, asked = re.findall(r'[A-Z][^.?]*[.?]', question)
    who, total = re.fullmatch(r'(\w+) has (\d+) \w+\.', story[0]).groups()
    calculation, total = total, int(total)
    for sentence in story[1:]:
        subject, n = sentence.split()[0], int(re.search(r'\d+', sentence)[0])
        if 'times as many' in sentence:
            assert f'as {who} has now' in sentence and subject != who
            who, kind, total = subject, '*', total * n
        elif re.search('buys|finds', sentence) or f' gives {who} ' in sentence:
            kind, total = '+', total + n
        else:
            assert subject == who and re.search('gives|loses|sells', sentence)
            kind, total = '-', total - n
        calculation += kind + str(n)
    assert f'does {who} have' in asked
    return calculation, total


def test_word_problems(run_data, tmp_path):
    def make(*more):
        shutil.rmtree(tmp_path / 'data', ignore_errors=True)
        result = result_of(run_data('--dataset=problems', '--n_problems=200', '--val_share=.3', *more))
        parts = [(tmp_path / f'data/{part}.jsonl').read_text().splitlines() for part in PARTS]
        assert [result[f'{part}_problems'] for part in PARTS] == [len(lines) for lines in parts]
        return parts
    parts = make()
    seen, steps = (set(), set()), {level: set() for level in range(1, 6)}
    for lines, calculations in zip(parts, seen):
        for row in map(json.loads, lines):
            calculation, total = calculate(row['question'])
            assert row['answer'] == str(total) and total >= 0
            calculations.add(calculation)
            steps[row['level']].add(re.sub(r'\d', '', calculation))
    assert len(set(parts[0] + parts[1])) == 1000 and 200 < len(parts[1]) < 400 and not seen[0] & seen[1]
    assert steps[2] == {'++', '+-', '-+', '--'} and {len(s) for s in steps[5]} == {4}
    assert make() == parts != make('--seed=1')


# ---- once, and again ----

def test_what_is_there_is_not_made_again(prepare, run_data, refused, tmp_path):
    arguments, folder = ['--dataset=addition', '--n_questions=50'], tmp_path / 'data'
    first, *_ = prepare(*arguments)
    made = (folder / 'meta.json').stat().st_mtime_ns
    assert result_of(run_data(*arguments))['train_tokens'] == first['train_tokens']
    for name, content in (('', ''), ('val.bin', '1234'), ('meta.json', '{"of": "somebody else"}')):
        (folder / name).write_text(content) if name else None
        refused('holds something else', *arguments, *['--seed=1'] * (not name), writes=True)
    assert (folder / 'train.bin').stat().st_mtime_ns < made


def test_two_runs_do_not_write_to_one_folder(refused, tmp_path):
    with FileLock(tmp_path / 'data.part/.lock'):
        refused('could not be acquired', '--dataset=addition', '--n_questions=50', writes=True)
    assert [path.name for path in tmp_path.rglob('*')] == ['data.part', '.lock']


def test_fineweb_goes_on_where_it_was(prepare, refused, run_data, tmp_path, monkeypatch, encoding):
    stream = {'breaks': 0, 'skipped': None}  # where it breaks off; documents skipped
    def skip(n):
        stream['skipped'] = n
        for i in range(n, 5000):
            if i == stream['breaks']:
                stream['breaks'] = None
                raise ConnectionError('the line is\ndead')
            yield {'text': f'Document {i} is as long as ' + 'é' * (i % 7), 'id': i}

    def load_dataset(*where, **given):
        assert where == ('HuggingFaceFW/fineweb-edu', 'sample-10BT') and given['split'] == 'train'
        return types.SimpleNamespace(skip=skip)
    monkeypatch.setitem(sys.modules, 'datasets', types.SimpleNamespace(load_dataset=load_dataset))
    arguments, folder = ['--dataset=fineweb_edu', '--n_tokens=60000'], tmp_path / 'data'
    making = tmp_path / 'data.part'
    refused('FineWeb-Edu broke off', *arguments)
    _, meta, train, val = prepare(*arguments)
    found = [re.findall(r'<\|endoftext\|>Document (\d+)', encoding.decode(tokens)) for tokens in (train, val)]
    n = sum(map(len, found))
    assert found == [[str(i) for i in range(n) if i % 100], [str(i) for i in range(0, n, 100)]]
    assert n > 1500 and 60000 <= len(train) < 60040

    def break_off():
        shutil.rmtree(folder)
        stream['breaks'] = 1234
        refused('the same command goes on from there: ConnectionError: the line', *arguments, writes=True)
        assert json.loads((making / 'meta.json').read_text())['pieces'] == 1000 and not folder.exists()
    break_off()
    assert prepare(*arguments)[1] == meta and stream['skipped'] == 1000  # with the same tokens

    # what another data set left half-written is not taken as done
    break_off()
    (tmp_path / 'other.txt').write_text('other text')
    broken = types.SimpleNamespace(encode_ordinary=None, eot_token=50256, n_vocab=50257)
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(tiktoken, 'get_encoding', lambda name: broken)
        run_data('--dataset=text', f'--path={tmp_path}/other.txt')
    gc.collect()
    for part in PARTS:
        with open(making / f'{part}.bin', 'ab') as file:
            file.truncate(10**6)
    assert prepare(*arguments)[1] == meta and stream['skipped'] == 0


# ---- bad input ----

def test_bad_input(refused, tmp_path):
    for name, content, message in (
            ('empty.txt', b'', 'too little text'), ('short.txt', b'x', '0 characters to train on and 1 of'),
            ('binary.txt', b'text \xff', "can't decode byte 0xff"), ('plain.txt.gz', b'text', 'cannot read'),
            ('cut.txt.xz', lzma.compress(b'text' * 1000)[:60], 'cannot read')):
        (tmp_path / name).write_bytes(content)
        refused(message, '--dataset=text', f'--path={tmp_path}/{name}')
    (tmp_path / 'all.txt').write_text(''.join(map(chr, range(0x10000, 0x20001))))
    (tmp_path / 'nothing').mkdir()
    text = ['--dataset=text', f'--path={tmp_path}/all.txt']
    refused('no such file', f'--path={tmp_path}/nowhere.txt')
    refused('too little text', *text, f'--path={tmp_path}/nothing')
    refused('to train on and 0 of val', *text, f'--val_path={tmp_path}/empty.txt')
    refused('65537 different characters', *text, '--tokenizer=char')
    refused('needs --path', '--dataset=text')
    refused('makes no use of --tokenizer', '--dataset=shakespeare', '--tokenizer=char')
    refused('too few', '--dataset=addition', '--input_max=10001')
    os.mkfifo(tmp_path / 'pipe')
    refused('no regular one', *text, f'--path={tmp_path}/pipe')
    (tmp_path / 'data.part').write_text('')
    refused('File exists', '--dataset=addition', '--n_questions=9', writes=True)
    (tmp_path / 'data').write_text('')
    refused('Not a directory', '--dataset=problems', '--n_problems=9', writes=True)


def test_without_a_network(refused, tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError('Name or service not known')
    monkeypatch.setattr('urllib.request.urlopen', offline)
    refused('pass a copy of it by --path=input.txt', '--dataset=shakespeare')
    monkeypatch.setattr('urllib.request.urlopen', lambda *_, **__: open(__file__, 'rb'))  # another page
    refused('it is not what it was')
    monkeypatch.setitem(sys.modules, 'datasets', None)
    refused('pip install datasets', '--dataset=fineweb_edu')
    monkeypatch.setattr(tiktoken, 'get_encoding', offline)
    (tmp_path / 'input.txt').write_text('To be, or not to be')
    refused('TIKTOKEN_CACHE_DIR', '--dataset=shakespeare', f'--path={tmp_path}/input.txt')

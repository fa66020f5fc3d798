"""prepare_data.py: what it writes, from text that is made here. Nothing is downloaded."""
import bz2
import fcntl
import gc
import gzip
import hashlib
import json
import lzma
import random
import re
import runpy
import sys
import types
import urllib.error

import numpy as np
import pytest
import tiktoken
from conftest import ROOT
from tiktoken_ext.openai_public import r50k_pat_str

from utils import addition_questions

PARTS = ('train', 'val')
SPACES = " \n\t\ra's1!\x1c\u00a0\u3000é"


@pytest.fixture(autouse=True)
def encoding(monkeypatch):
    """GPT-2's tokenizer with its splits and few of its merges, as its own would have to be downloaded."""
    ranks = {bytes([i]): i for i in range(256)}
    for text in (a + b for a in SPACES for b in SPACES):
        ranks.setdefault(text.encode(), len(ranks))
    encoding = tiktoken.Encoding('gpt2', pat_str=r50k_pat_str, mergeable_ranks=ranks,
                                 special_tokens={'<|endoftext|>': 50256})
    monkeypatch.setattr(tiktoken, 'get_encoding', lambda name: encoding)
    return encoding


@pytest.fixture
def prepare(run_here, tmp_path):
    """Run the script: the JSON object of its last line, meta.json, and tokens of train and val."""
    def prepare(*arguments):
        code, out, err = run_here('prepare_data', f'--out_dir={tmp_path}/data', *arguments)
        assert code == 0 and not err, err
        folder = tmp_path / 'data'
        meta = json.loads((folder / 'meta.json').read_text())
        assert {p.name for p in folder.iterdir()} - {'input.txt'} == {'meta.json', 'train.bin', 'val.bin'}
        result, data = json.loads(out.splitlines()[-1]), []
        for part in PARTS:
            data.append(np.memmap(folder / f'{part}.bin', dtype=np.uint16, mode='r'))
            assert meta[f'{part}_tokens'] == result[f'{part}_tokens'] == len(data[-1]) > 0
            assert meta[f'{part}_sha256'] == hashlib.sha256((folder / f'{part}.bin').read_bytes()).hexdigest()
            assert data[-1].max() < meta['d_vocab'] == result['d_vocab']
        return result, meta, *data
    return prepare


@pytest.fixture
def refused(run_here, tmp_path):
    """Run the script and see that it ends in one line that holds a message, with exit code 2, and writes nothing."""
    def refused(message, *arguments, writes=False):
        code, _, err = run_here('prepare_data', f'--out_dir={tmp_path}/data', *arguments)
        gc.collect()        # closes its files, as the end of a process does
        assert code == 2 and len(err.splitlines()) == 1 and err.startswith('error: ') and message in err, err
        assert writes or not (tmp_path / 'data').exists()
    return refused


def characters(meta, tokens):
    return ''.join(meta['characters'][i] for i in tokens)


# ---- what it writes

def test_shakespeare_is_split_and_numbered_as_in_nanogpt(prepare, tmp_path, encoding):
    text = ''.join(random.Random(0).choices('To be, or not to be:\n', k=10007))
    (tmp_path / 'input.txt').write_text(text)
    result, meta, train, val = prepare(f'--path={tmp_path}/input.txt')
    number = {character: i for i, character in enumerate(sorted(set(text)))}
    assert train.tolist() + val.tolist() == [number[c] for c in text] and len(train) == int(10007 * .9)
    assert meta['characters'] == sorted(set(text)) and meta['tokenizer'] == 'char' and result['d_vocab'] == len(number)
    assert result['script'] == 'prepare_data' and list(result['changed']) == ['path'] and result['seconds'] >= 0
    assert meta['dataset'] == 'shakespeare_char' and meta['source'] == f'{tmp_path}/input.txt'

    result, meta, train, val = prepare('--dataset=shakespeare', f'--path={tmp_path}/input.txt')
    assert train.tolist() == encoding.encode_ordinary(text[:9006]) and encoding.decode(val) == text[9006:]
    assert meta['tokenizer'] == 'gpt2' and meta['d_vocab'] == 50257 and 'characters' not in meta
    assert meta['train_bytes'] == meta['train_characters'] == 9006 and meta['val_characters'] == 1001


def test_documents_of_a_folder(prepare, tmp_path, encoding):
    texts = {'a.txt': 'Ä first.\n\n', 'b.txt.xz': 'the 2nd', 'c/d.txt.gz': '\nthird ', 'e.txt.bz2': 'é' * 31}
    opens = {'.xz': lzma.open, '.gz': gzip.open, '.bz2': bz2.open, '.txt': open}
    (tmp_path / 'books/c').mkdir(parents=True)
    for name, text in texts.items():
        with opens[name[name.rindex('.'):]](tmp_path / 'books' / name, 'wt', encoding='utf-8-sig', newline='\r\n') as f:
            f.write(text)
    (tmp_path / 'books/cover.jpg').write_bytes(b'\xff\xd8')
    (tmp_path / 'books/empty.txt').write_text('')
    _, meta, train, val = prepare('--dataset=text', f'--path={tmp_path}/books')
    *whole, last = texts.values()
    assert encoding.decode(train) == ''.join(f'<|endoftext|>{text}' for text in [*whole, last[:25]])
    assert encoding.decode(val) == f'<|endoftext|>{last[25:]}'
    assert (meta['train_characters'], meta['train_bytes']) == (49, 49 + 1 + 25)
    assert (meta['val_characters'], meta['val_bytes']) == (6, 12)

    (tmp_path / 'val.txt').write_text('ö <|endoftext|>')     # a text cannot fake the mark
    _, meta, train, val = prepare('--dataset=text', f'--path={tmp_path}/books', f'--val_path={tmp_path}/val.txt')
    assert encoding.decode(train) == ''.join(f'<|endoftext|>{text}' for text in texts.values())
    assert val.tolist() == [50256, *encoding.encode_ordinary('ö <|endoftext|>')] and val.tolist().count(50256) == 1
    _, meta, train, val = prepare('--dataset=text', f'--path={tmp_path}/books', f'--val_path={tmp_path}/val.txt',
                                  '--tokenizer=char')
    assert characters(meta, train) == ''.join(texts.values()) and characters(meta, val) == 'ö <|endoftext|>'


def test_pieces_have_the_tokens_of_the_whole_text(prepare, encoding, tmp_path, monkeypatch):
    (tmp_path / 'input.txt').write_text('0123456789')
    monkeypatch.setattr(sys, 'argv', ['', f'--path={tmp_path}/input.txt', f'--out_dir={tmp_path}/other'])
    pattern = runpy.run_path(str(ROOT / 'prepare_data.py'))['PIECE'].pattern
    small = re.compile(pattern.replace('1000000', '9'), re.DOTALL)
    behind = re.compile(r'.{1,9}\n(?=\S)|.+', re.DOTALL)
    wrong = 0
    for seed in range(300):
        text = ''.join(random.Random(seed).choices(SPACES + ' ' * 5 + '\n' * 9, k=100))
        pieces = small.findall(text)
        assert ''.join(pieces) == text and len(pieces) > 3
        tokens = encoding.encode_ordinary(text)
        assert sum(map(encoding.encode_ordinary, pieces), []) == tokens
        wrong += sum(map(encoding.encode_ordinary, behind.findall(text)), []) != tokens
    assert wrong        # so the test can tell

    text = ''.join(random.Random(0).choices(SPACES + 'bcdefgh', k=2_200_000)) + 'x' * 100
    (tmp_path / 'long.txt').write_text(text, newline='')
    text = text.replace('\r\n', '\n').replace('\r', '\n')
    _, meta, train, val = prepare('--dataset=text', f'--path={tmp_path}/long.txt')
    assert train.tolist() == [50256, *encoding.encode_ordinary(text[:int(len(text) * .9)])]
    assert encoding.decode(val[1:]) == text[int(len(text) * .9):]


def test_addition(prepare, tmp_path):
    result, meta, train, val = prepare('--dataset=addition', '--n_questions=15000', '--seed=3')
    assert characters(meta, range(13)) == '0123456789+=\n'
    rows = []
    for data, n in (train, 13500), (val, 1500):
        found = re.findall(r'(\d{5})\+(\d{5})=(\d{6})\n', characters(meta, data))
        assert len(found) == n and len(data) == 19 * n
        assert all(int(a) + int(b) == int(c) and int(a) >= 10000 <= int(b) for a, b, c in found)
        rows.append([(int(a), int(b)) for a, b, _ in found])
    assert len(set(rows[0] + rows[1])) == 15000     # none twice, none in both
    asked = addition_questions(10000, 100000, .1, 3, n_max=15000)
    assert rows == [[tuple(row) for row in part.tolist()] for part in asked]
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


def test_word_problems(run_here, tmp_path):
    def make(*more):
        code, out, err = run_here('prepare_data', '--dataset=problems', f'--out_dir={tmp_path}/data', *more)
        assert code == 0 and not err and {p.name for p in (tmp_path / 'data').iterdir()} == {'train.jsonl', 'val.jsonl'}
        parts = [(tmp_path / f'data/{part}.jsonl').read_text() for part in PARTS]
        result = json.loads(out.splitlines()[-1])
        assert [result[f'{part}_problems'] for part in PARTS] == [text.count('\n') for text in parts]
        return parts
    parts = make('--n_problems=200', '--val_share=.3', '--seed=3')
    train, val = ([json.loads(line) for line in text.splitlines()] for text in parts)
    assert len({row['question'] for row in train + val}) == 1000 and 200 < len(val) < 400
    seen, steps, largest = [set(), set()], {level: set() for level in range(1, 6)}, {}
    for rows, calculations in zip((train, val), seen):
        for row in rows:
            calculation, total = calculate(row['question'])
            assert row['answer'] == str(total) and total >= 0
            calculations.add(calculation)
            steps[row['level']].add(re.sub(r'\d', '', calculation))
            largest[row['level']] = max(largest.get(row['level'], 0), total)
    assert not seen[0] & seen[1]
    assert steps[1] == {'+', '-'} and steps[2] == {'++', '+-', '-+', '--'} and all(len(s) == 4 for s in steps[5])
    assert largest[1] <= 20 < largest[3] < largest[5]
    assert make('--n_problems=200', '--val_share=.3', '--seed=3') == parts != make('--n_problems=200', '--val_share=.3')


# ---- once, and again

def test_what_is_there_is_not_made_again(prepare, run_here, tmp_path):
    arguments, folder = ['--dataset=addition', '--n_questions=50'], tmp_path / 'data'
    first, *_ = prepare(*arguments)

    def again(*arguments):
        before = (folder / 'meta.json').stat().st_mtime_ns
        code, out, _ = run_here('prepare_data', f'--out_dir={folder}', *arguments)
        assert code == 0
        made = (folder / 'meta.json').stat().st_mtime_ns != before
        assert made == ('is there' not in out)
        return made, json.loads(out.splitlines()[-1])
    made, result = again(*arguments)
    assert not made and {**result, 'seconds': 0} == {**first, 'seconds': 0}
    assert again(*arguments, '--seed=1')[0] and not again(*arguments, '--seed=1')[0] and again(*arguments)[0]
    (folder / 'val.bin').write_bytes(b'1234')
    assert again(*arguments)[0] and not again(*arguments)[0]
    (folder / 'train.bin').unlink()
    assert again(*arguments)[0] and not again(*arguments)[0]
    (folder / 'meta.json').write_text('{"of": "somebody else"}')
    assert again(*arguments)[0] and not again(*arguments)[0]


def test_two_runs_do_not_write_to_one_folder(refused, tmp_path):
    (tmp_path / 'data').mkdir()
    with open(tmp_path / 'data/train.bin.part', 'w') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refused('another run', '--dataset=addition', '--n_questions=50', writes=True)


class Stream:
    """Made-up documents in place of FineWeb-Edu's, which break off once before document `breaks`."""
    breaks, skipped = None, []

    def __init__(self, first=0):
        self.first = first

    def skip(self, n):
        Stream.skipped.append(n)
        return Stream(n)

    def __iter__(self):
        for i in range(self.first, 5000):
            if i == Stream.breaks:
                Stream.breaks = None
                raise ConnectionError('the line is\ndead')
            yield {'text': f'Document {i} is as long as ' + 'é' * (i % 7), 'id': i}


def test_fineweb_goes_on_where_it_was(prepare, refused, run_here, tmp_path, monkeypatch, encoding):
    asked = []
    datasets = types.SimpleNamespace(load_dataset=lambda *a, **k: asked.append((a, k)) or Stream())
    monkeypatch.setitem(sys.modules, 'datasets', datasets)
    monkeypatch.setattr(Stream, 'skipped', [])
    monkeypatch.setattr(Stream, 'breaks', 0)
    arguments = ['--dataset=fineweb_edu', '--n_tokens=60000']
    refused('FineWeb-Edu broke off', *arguments)
    _, meta, train, val = prepare(*arguments)
    assert asked[0] == ((), {'path': 'HuggingFaceFW/fineweb-edu', 'name': 'sample-10BT', 'split': 'train',
                             'streaming': True})
    documents = encoding.decode(train).split('<|endoftext|>')
    assert documents[0] == '' and documents[1].startswith('Document 1 ') and 60000 <= len(train) < 60040
    assert encoding.decode(val).startswith('<|endoftext|>Document 0 is as long as <|endoftext|>Document 100 ')
    n_documents = len(documents) - 1 + encoding.decode(val).count('<|endoftext|>')
    assert n_documents > 1500 and documents[-1].startswith(f'Document {n_documents - 1} ')
    train, val = train.tolist(), val.tolist()

    (tmp_path / 'data/meta.json').unlink()
    Stream.skipped.clear()
    Stream.breaks = 1234
    refused('FineWeb-Edu broke off, the same command goes on from there: ConnectionError: the line is dead', *arguments,
            writes=True)
    assert json.loads((tmp_path / 'data/state.json').read_text())['pieces'] == 1000
    assert (tmp_path / 'data/train.bin').exists() and not (tmp_path / 'data/meta.json').exists()
    _, resumed, train_again, val_again = prepare(*arguments)
    assert Stream.skipped == [0, 1000] and resumed == meta
    assert train_again.tolist() == train and val_again.tolist() == val

    # what another data set left half-written in this folder is not taken for the documents that are done
    (tmp_path / 'data/meta.json').unlink()
    Stream.breaks = 1234
    refused('broke off', *arguments, writes=True)
    (tmp_path / 'long.txt').write_text('other text ' * 200_000)
    encode = iter([encoding.encode_ordinary]).__next__      # ends after the first piece
    half = types.SimpleNamespace(encode_ordinary=lambda text: encode()(text), eot_token=50256, n_vocab=50257)
    with monkeypatch.context() as m, pytest.raises(StopIteration):
        m.setattr(tiktoken, 'get_encoding', lambda name: half)
        run_here('prepare_data', '--dataset=text', f'--path={tmp_path}/long.txt', f'--val_path={tmp_path}/long.txt',
                 f'--out_dir={tmp_path}/data')
    gc.collect()
    with open(tmp_path / 'data/val.bin.part', 'ab') as file:
        file.truncate(10**6)
    Stream.skipped.clear()
    assert prepare(*arguments)[1] == meta and Stream.skipped == [0]


# ---- bad input

def test_bad_input(refused, tmp_path):
    files = {'empty.txt': b'', 'binary.txt': b'text \xff\xfe', 'cut.txt.xz': lzma.compress(b'text' * 1000)[:60],
             'plain.txt.gz': b'not zipped', 'short.txt': b'x',
             'all.txt': ''.join(map(chr, range(0x10000, 0x20001))).encode()}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / 'nothing').mkdir()
    for name, message in {'nowhere.txt': 'No such file', 'empty.txt': 'there is no text in', 'nothing': 'no file *.txt',
                          'binary.txt': "can't decode byte 0xff", 'cut.txt.xz': 'cannot read', 'short.txt': 'too short',
                          'plain.txt.gz': 'cannot read'}.items():
        refused(message, '--dataset=text', f'--path={tmp_path}/{name}')
        refused(message, f'--path={tmp_path}/{name}')
    refused('No such file', '--dataset=text', f'--path={tmp_path}/short.txt', f'--val_path={tmp_path}/nowhere.txt')
    refused('no text', '--dataset=text', f'--path={tmp_path}/short.txt', f'--val_path={tmp_path}/empty.txt')
    refused('65537 different characters', '--dataset=text', f'--path={tmp_path}/all.txt', '--tokenizer=char')
    refused('too short', '--dataset=text', f'--path={tmp_path}/all.txt', '--val_share=0')
    refused('needs --path', '--dataset=text')
    refused('makes no use of --tokenizer', '--dataset=shakespeare', '--tokenizer=char')
    refused('unknown knob --n_token, the nearest is --n_tokens', '--n_token=3')
    refused('must be one of shakespeare_char, shakespeare, text, fineweb_edu, addition, problems',
            '--dataset=wikipedia')
    refused('must be between 1 and', '--dataset=fineweb_edu', '--n_tokens=0')
    refused('must be between 2 and', '--dataset=addition', '--n_questions=1')
    refused('leaves no two numbers', '--dataset=addition', '--input_max=10001')
    (tmp_path / 'data').write_text('')
    refused('cannot write to', '--dataset=addition', '--n_questions=9', writes=True)
    refused('cannot write to', '--dataset=problems', '--n_problems=9', writes=True)
    refused('makes no use of --path', '--dataset=problems', '--path=x', writes=True)
    refused('must be between 1 and', '--dataset=problems', '--n_problems=100001', writes=True)


def test_without_a_network(refused, prepare, tmp_path, monkeypatch):
    def offline(*_, **__):
        raise urllib.error.URLError('Name or service not known')
    monkeypatch.setattr('urllib.request.urlopen', offline)
    refused('pass a copy of it by --path=input.txt', '--dataset=shakespeare')
    monkeypatch.setattr('urllib.request.urlopen', lambda *_, **__: open(ROOT / 'LICENSE', 'rb'))    # please log in
    refused('sent something else')
    monkeypatch.setitem(sys.modules, 'datasets', None)
    refused('pip install datasets', '--dataset=fineweb_edu')
    monkeypatch.setattr(tiktoken, 'get_encoding', offline)
    (tmp_path / 'input.txt').write_text('To be, or not to be')
    refused('TIKTOKEN_CACHE_DIR', '--dataset=shakespeare', f'--path={tmp_path}/input.txt')

    # a copy in the folder, as a download leaves it, is enough
    (tmp_path / 'data').mkdir()
    (tmp_path / 'input.txt').rename(tmp_path / 'data/input.txt')
    assert prepare()[1]['source'].startswith('https://')

"""
Every data set, made or downloaded.

    python prepare_data.py                              # Shakespeare by character, as in nanoGPT
    python prepare_data.py --dataset=shakespeare        # the same in GPT-2's tokens
    python prepare_data.py --dataset=text --path=books --val_path=b.txt.xz --tokenizer=char     # your own
    python prepare_data.py --dataset=fineweb_edu        # run it again after an interruption
    python prepare_data.py --dataset=addition           # 12345+67890=080235, by character
    python prepare_data.py --dataset=problems           # word problems of five levels

Tokens go to train.bin and val.bin, for np.memmap(file, dtype=np.uint16). meta.json lists the characters in
the order of their tokens. In GPT-2's tokens each document begins with <|endoftext|>, except in Shakespeare.
Problems are text: train.jsonl and val.jsonl have lines {"question": ..., "answer": "12", "level": 1}. All
problems with one calculation, such as 7+3-2, are in one file. A data set is made in <folder>.part.
"""
import json
import os
import random
import re
import shutil
import time
import urllib.request
from contextlib import suppress
from itertools import accumulate, chain, islice
from pathlib import Path

import fsspec
import numpy as np
from tqdm import tqdm

from utils import addition_questions, fail, gpt2_encoding, lock, need, read_knobs, write_atomic

# ---- knobs ----

dataset = 'shakespeare_char'  # 'shakespeare_char' | 'shakespeare' | 'text' | 'fineweb_edu' | 'addition' |
                              # 'problems'
path = ''                     # text: a file (also .xz, .gz, .bz2) or folder; Shakespeare: a copy of input.txt
val_path = ''                 # text: a file or folder for val; empty: val is the end of the text in path
val_share = .1                # text, addition, problems: share of val, in problems roughly
tokenizer = 'gpt2'            # 'gpt2' | 'char': of text; char has a token for each character of train and val
n_tokens = 100_000_000        # fineweb_edu: to train on; the document in which they end is kept whole
n_questions = 1_000_000       # addition: different ones; all if there are fewer
input_min = 10_000            # addition: numbers are input_min..M-1
input_max = 100_000           # M
n_problems = 5000             # problems: different ones in each level
seed = 0                      # addition, problems: of the choice
out_dir = ''                  # folder of the data; empty: data/<dataset>

# ---- set-up ----
began, knobs = time.time(), read_knobs(__file__, globals())
folder, PARTS = Path(os.path.abspath(out_dir or f'data/{dataset}')), ('train', 'val')
making = Path(f'{folder}.part')
FILES = {part: f'{part}.{"jsonl" if dataset == "problems" else "bin"}' for part in PARTS}
uses = {'text': 'path val_path val_share tokenizer', 'fineweb_edu': 'n_tokens',
        'addition': 'val_share n_questions input_min input_max seed',
        'problems': 'val_share n_problems seed'}.get(dataset, 'path').split()    # Shakespeare: path
made_with = {name: knobs[name] for name in ['dataset', *uses]}      # all that decides what is written
if useless := knobs.changed.keys() - made_with - {'out_dir'}:
    fail(f'--dataset={dataset} makes no use of --{min(useless)}')
if dataset == 'text' and not path:
    fail('--dataset=text needs --path=<file or folder>')
if dataset.startswith('shakespeare'):       # like nanoGPT
    val_path, val_share, tokenizer = '', .1, 'char' if dataset == 'shakespeare_char' else 'gpt2'


def look(folder):
    """meta.json of a data set of these knobs, with all the tokens that it counts, else None."""
    with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):     # not there, not ours
        meta = json.loads((folder / 'meta.json').read_text())
        n = [(folder / FILES[part]).stat().st_size // 2 - meta.get(f'{part}_tokens', 0) for part in PARTS]
        return meta if min(n) >= 0 and meta['knobs'] == made_with else None


def write(name, text):
    """Write a file of the data set."""
    write_atomic(making / name, lambda file: file.write(text.encode()))


def start_writing(meta):
    """Lock the folder in which the data set is made, and look again. meta marks it as ours."""
    held, known = lock(making), {'.lock', 'meta.json.tmp'}
    with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
        if json.loads((making / 'meta.json').read_text())['knobs']['dataset']:
            known |= {'meta.json', *FILES.values()}
    for path in making.iterdir():
        if path.is_symlink() or not {path.name, path.name.removesuffix('.tmp')} & known:
            fail(f'{path} is not of this script, pass another --out_dir')
    if made := look(folder):    # another run was quicker
        shutil.rmtree(making)
        finish('is there', made)
    write('meta.json', json.dumps(meta))
    return held


def finish(verb, meta):
    """End with the last line of stdout: one JSON object. 'is made': let the whole data set appear at once."""
    if verb == 'is made':
        write('meta.json', json.dumps(meta, indent=1))
        os.rename(making, folder)
    n = {name: meta[name] for name in meta if name.endswith(('_tokens', '_problems', '_vocab'))}
    line = {'script': knobs.script, 'changed': knobs.changed, **n, 'seconds': round(time.time() - began, 2)}
    print(f'{folder} {verb}', json.dumps(line), sep='\n')
    raise SystemExit


# ---- word problems: stories in which each sentence is a step of a calculation ----

PEOPLE = 'Anna Ben Carla David Emma Felix Grace Hugo Ivy Jack Kate Leo Mia Noah Olga Paul Rosa Sam Tina Will'
THINGS = 'apples books cards coins flowers marbles pencils shells stamps stickers'
STEPS = {   # the things of {a} are counted, {b} is somebody else
    '+': ['{a} buys {n} more {things}.', '{a} finds {n} more {things}.', '{b} gives {a} {n} {things}.'],
    '-': ['{a} gives {n} {things} to {b}.', '{a} loses {n} {things}.', '{a} sells {n} {things}.'],
    '*': ['{b} has {n} times as many {things} as {a} has now.']}        # from then on {b}'s are counted
# of each level: operations, the largest number to begin with or to add, the largest to multiply by
LEVELS = [('+ -', 10, 0), ('++ +- -+ --', 20, 0), ('*+ *- +* -*', 20, 4), ('+*- -*+ *+- *-+ +-*', 50, 6),
          ('*+*- +*-* *-+* -*+*', 100, 9)]


def word_problem(draw, operations, largest, most):
    """A problem drawn by a random.Random: its question, answer, and calculation from left to right."""
    people = draw.sample(PEOPLE.split(), 6)
    who, things = people.pop(), draw.choice(THINGS.split())
    total = draw.randint(4, largest)        # 4 are enough to take 2 away twice
    question, calculation = f'{who} has {total} {things}.', str(total)
    for operation in draw.choice(operations.split()):
        n = draw.randint(2, {'+': largest, '-': max(2, total - 2), '*': most}[operation])
        other = people.pop()
        question += ' ' + draw.choice(STEPS[operation]).format(a=who, b=other, n=n, things=things)
        calculation += operation + str(n)
        total = {'+': total + n, '-': total - n, '*': total * n}[operation]
        who = other if operation == '*' else who
    now = 'then' if operation == '*' else 'now'
    return f'{question} How many {things} does {who} have {now}?', str(total), calculation


if meta := look(folder):
    finish('is there (to make it again, delete it)', meta)
if folder.is_symlink() or making.is_symlink() or folder.exists() and any(folder.iterdir()):
    fail(f'{folder} is a link or holds something else: delete it, or pass another --out_dir')
if dataset == 'problems':
    draw, lines = random.Random(seed), {'train': {}, 'val': {}}     # dicts, as sets that keep their order
    for level, shape in enumerate(LEVELS, 1):
        while sum(map(len, lines.values())) < level * n_problems:
            question, answer, calculation = word_problem(draw, *shape)
            line = json.dumps({'question': question, 'answer': answer, 'level': level}) + '\n'
            chance = random.Random(f'{seed} {calculation}').random()    # one per calculation
            lines['val' if chance < val_share else 'train'][line] = True
    meta = {'knobs': made_with, **{f'{part}_problems': len(lines[part]) for part in PARTS}}
    held = start_writing(meta)
    for part in PARTS:
        write(FILES[part], ''.join(lines[part]))
    finish('is made', meta)

# ---- text, in pieces: (train or val, whether a document begins, text) ----

SHAKESPEARE = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
# Text is cut where a token of GPT-2 begins, at the last space or newline before a word, within a million
PIECE = re.compile(r'.{1,1000000}(?=[ \n]\S)|.+?(?=[ \n]\S|\Z)', re.DOTALL)


def read(where):
    """The texts of a file, or of all *.txt, *.txt.xz, .gz, .bz2 in a folder and below, ordered by name."""
    name = re.compile(r'([^./][^/]*/)*[^./][^/]*\.txt(\.xz|\.gz|\.bz2)?')     # nothing is hidden
    inside = (file for file in where.rglob('*') if name.fullmatch(file.relative_to(where).as_posix()))
    texts = []
    for file in sorted(inside) if where.is_dir() else [where]:
        try:
            if not file.is_file():
                raise OSError('no such file, or no regular one')
            with fsspec.open(file, 'rt', compression='infer', encoding='utf-8-sig') as f:
                texts.append(f.read())
        except Exception as error:      # missing, damaged or not text
            fail(f'cannot read {file} as text in UTF-8: {error}')
    return texts


def fineweb_pieces():
    """FineWeb-Edu, from the document where it was left. Every 100th document is for val."""
    try:
        documents = datasets.load_dataset('HuggingFaceFW/fineweb-edu', 'sample-10BT', split='train',
                                          streaming=True).skip(meta['pieces'])
        for i, document in enumerate(documents, meta['pieces']):
            if meta['train_tokens'] >= n_tokens:
                break
            yield PARTS[i % 100 == 0], True, document['text']
    except Exception as error:      # networks fail in many ways
        fail(f'FineWeb-Edu broke off, the same command goes on from there: {type(error).__name__}: {error}')


characters, total = [], None    # no characters: GPT-2's tokens
if dataset == 'addition':       # the questions of add_normal.py, split as there with heldout=val_share
    characters = list('0123456789+=\n')
    parts = addition_questions(input_min, input_max, val_share, seed, n_max=n_questions)
    n, m = len(str(input_max - 1)), len(str(2 * input_max - 2))     # digits of a number and of a sum
    pieces = iter([(part, False, ''.join(f'{a:0{n}}+{b:0{n}}={a + b:0{m}}\n' for a, b in some.tolist()))
                   for part, rows in zip(PARTS, parts) for some in rows.split(10_000)])
elif dataset == 'fineweb_edu':
    datasets = need('datasets', 'to stream FineWeb-Edu')
    pieces, total = fineweb_pieces(), n_tokens // 1000      # roughly
else:
    try:
        page = None if path else urllib.request.urlopen(SHAKESPEARE, timeout=60).read().decode()
        assert path or len(page) == 1_115_394, 'it is not what it was'
    except Exception as error:      # networks fail in many ways
        fail(f'cannot download {SHAKESPEARE}, pass a copy of it by --path=input.txt: {error}')
    texts = read(Path(path)) if path else [page]
    end = int(sum(map(len, texts)) * (1 if val_path else 1 - val_share))    # where val begins
    texts += read(Path(val_path)) if val_path else []
    if not (n := sum(map(len, texts))) > end > 0:
        fail(f'too little text: {end} characters to train on and {n - end} of val')
    cuts = [max(0, end - start) for start in accumulate(map(len, texts), initial=0)]    # in each text
    pieces = ((part, match.start() == 0 and dataset == 'text', match[0]) for text, cut in zip(texts, cuts)
              for part, some in zip(PARTS, (text[:cut], text[cut:])) for match in PIECE.finditer(some))
    characters = sorted(set().union(*texts)) if tokenizer == 'char' else []
if len(characters) > 2**16:
    fail(f'{len(characters)} different characters are too many, try --tokenizer=gpt2')

# ---- tokens ----
encoding = None if characters else gpt2_encoding()
number = {character: i for i, character in enumerate(characters)}
meta = {'knobs': made_with, 'pieces': 0, 'train_tokens': 0, 'val_tokens': 0, 'characters': characters,
        'tokenizer': 'char' if characters else 'gpt2', 'd_vocab': len(characters) or encoding.n_vocab}
meta = dataset == 'fineweb_edu' and look(making) or meta
pieces = chain(list(islice(pieces, 1)), pieces)     # get one before anything is written
held = start_writing(meta)
files = {part: open(making / FILES[part], 'ab') for part in PARTS}
for part, file in files.items():
    file.truncate(2 * meta[f'{part}_tokens'])       # forget what was written after meta.json
for part, begins, text in tqdm(pieces, initial=meta['pieces'], total=total, disable=None):
    tokens = ([number[character] for character in text] if characters else
              [encoding.eot_token] * begins + encoding.encode_ordinary(text))
    files[part].write(np.array(tokens, np.uint16).tobytes())
    files[part].flush()
    meta[f'{part}_tokens'] += len(tokens)
    meta['pieces'] += 1
    if meta['pieces'] % 1000 == 0:
        write('meta.json', json.dumps(meta))
for file in files.values():
    os.fsync(file.fileno())
finish('is made', meta)

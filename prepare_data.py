"""
Every data set, made or downloaded: train.bin and val.bin, tokens as uint16, and meta.json, which says what they are.

    python prepare_data.py                                                 # Shakespeare by character, as nanoGPT does
    python prepare_data.py --dataset=shakespeare                           # the same in GPT-2's tokens
    python prepare_data.py --dataset=text --path=books                     # your own: a file, or a folder of *.txt
    python prepare_data.py --dataset=text --path=a.txt.xz --val_path=b.txt.xz --tokenizer=char
    python prepare_data.py --dataset=fineweb_edu --n_tokens=1000000000     # run it again if it was interrupted
    python prepare_data.py --dataset=addition                              # 12345+67890=080235, by character
    python prepare_data.py --dataset=problems                              # in words, of five levels, as JSON lines

Read the tokens by np.memmap(file, dtype=np.uint16). meta.json counts characters and UTF-8 bytes too, by which nats per
token become bits per byte, and lists the characters in the order of their tokens. In GPT-2's tokens every document, or
part of one, begins with <|endoftext|>, but for Shakespeare. Line ends become \\n. What is there is not made again, but
for problems, which take a second.

problems has no tokens: train.jsonl and val.jsonl hold {"question": ..., "answer": "12", "level": 1} in each line,
for rollout_think.py --reward=math, and what val calculates (numbers and operations) is nowhere calculated in train.
Files of MATH (problem, solution, level) and GSM8K (question, answer with ####) need no preparation: rollout_think.py
reads them as they are, by their path.
"""
import bz2
import fcntl
import gzip
import hashlib
import json
import lzma
import os
import random
import re
import sys
import time
import urllib.request
from itertools import accumulate, chain, islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from utils import addition_questions, fail, gpt2_encoding, need, read_knobs, user_errors, write_atomic

# ---- knobs ----------------------------------------------------------------------------------------------------------

dataset = 'shakespeare_char'    # 'shakespeare_char' | 'shakespeare' | 'text' | 'fineweb_edu' | 'addition' | 'problems'
path = ''                       # text: a file (also .xz, .gz, .bz2) or a folder; Shakespeare: a copy of input.txt
val_path = ''                   # text: a file or folder that becomes val; empty: the end of the text does
val_share = .1                  # text, addition, problems: the share that becomes val; the latter's about
tokenizer = 'gpt2'              # 'gpt2' | 'char': text; char has a token for every character of train or val
n_tokens = 100_000_000          # fineweb_edu: to train on, and the rest of the document in which they end
n_questions = 1_000_000         # addition: drawn by chance, none twice; all that there are, if these are fewer
input_min = 10_000              # addition: numbers are input_min..M-1
input_max = 100_000             # M
n_problems = 5000               # problems: of each level, none twice
seed = 0                        # addition, problems: of the questions
out_dir = ''                    # folder of the data; empty: data/<dataset>

# ---- set-up ---------------------------------------------------------------------------------------------------------

knobs = read_knobs(__file__, globals())
began, changed = time.time(), {name: value for name, value in knobs.changed.items() if name != 'out_dir'}
uses = {'text': ['path', 'val_path', 'val_share', 'tokenizer'], 'fineweb_edu': ['n_tokens'],
        'addition': ['val_share', 'n_questions', 'input_min', 'input_max', 'seed'],
        'problems': ['val_share', 'n_problems', 'seed']}.get(dataset, ['path'])
if useless := changed.keys() - {'dataset', *uses}:
    fail(f'--dataset={dataset} makes no use of --{min(useless)}')
if dataset == 'text' and not path:
    fail('--dataset=text needs --path=<file or folder>')
if dataset == 'addition' and input_min >= input_max - 1:
    fail(f'--input_min={input_min} leaves no two numbers below input_max={input_max}')
recorded = {'dataset': dataset, **{name: knobs[name] for name in uses}}      # all that decides what is made
folder, PARTS = Path(out_dir or f'data/{dataset}'), ('train', 'val')


def load(name, ending=''):
    """The counts in a JSON file, if it is of the same knobs and the .bin files have what it counts; else None."""
    try:
        counts = json.loads((folder / name).read_text())
        more = [(folder / f'{part}.bin{ending}').stat().st_size - 2 * counts[f'{part}_tokens'] for part in PARTS]
        return counts if counts['knobs'] == recorded and (more == [0, 0] or ending and min(more) >= 0) else None
    except (OSError, ValueError, LookupError):      # not there, or not of this script
        return None


def finish(meta, verb):
    """What there is, in words, and the last line of stdout: one JSON object."""
    print(f'{folder} {verb}: {meta["train_tokens"]:,} tokens to train on and {meta["val_tokens"]:,} of val')
    counts = {name: meta[name] for name in ('train_tokens', 'val_tokens', 'd_vocab')}
    print(json.dumps({'script': knobs.script, 'changed': changed, **counts, 'seconds': round(time.time() - began, 2)}))


# ---- word problems: a story of a few sentences, each of them a calculation ------------------------------------------

PEOPLE = 'Anna Ben Carla David Emma Felix Grace Hugo Ivy Jack Kate Leo Mia Noah Olga Paul Rosa Sam Tina Will'.split()
THINGS = ['apples', 'books', 'cards', 'coins', 'flowers', 'marbles', 'pencils', 'shells', 'stamps', 'stickers']
STEPS = {   # what happens to the number of things that {a} has; {n} is the number of it, {b} somebody else
    '+': ['{a} buys {n} more {things}.', '{a} finds {n} more {things}.', '{b} gives {a} {n} {things}.'],
    '-': ['{a} gives {n} {things} to {b}.', '{a} loses {n} {things}.', '{a} sells {n} {things}.'],
    '*': ['{b} has {n} times as many {things} as {a} has now.'],        # and the story goes on with {b}
}
LEVELS = {      # level: (operations, largest number at first and to add, largest number to multiply by)
    1: (['+', '-'], 10, 0), 2: (['++', '+-', '-+', '--'], 20, 0), 3: (['*+', '*-', '+*', '-*'], 20, 4),
    4: (['+*-', '-*+', '*+-', '*-+', '+-*'], 50, 6), 5: (['*+*-', '+*-*', '*-+*', '-*+*'], 100, 9)}


def word_problem(level, draw):
    """A problem of a level by a random.Random: question, answer, and what is to be calculated, all three texts."""
    kinds, largest, times = LEVELS[level]
    people = draw.sample(PEOPLE, 6)
    who, things = people.pop(), draw.choice(THINGS)
    total = draw.randint(4, largest)        # enough to take something away twice
    story, calculation = [f'{who} has {total} {things}.'], str(total)
    for kind in draw.choice(kinds):
        n = draw.randint(2, {'+': largest, '-': max(2, total - 2), '*': times}[kind])
        other = people.pop()
        story.append(draw.choice(STEPS[kind]).format(a=who, b=other, n=n, things=things))
        total = {'+': total + n, '-': total - n, '*': total * n}[kind]
        calculation += kind + str(n)
        who = other if kind == '*' else who
    now = 'now' if kind != '*' else 'then'
    return f'{" ".join(story)} How many {things} does {who} have {now}?', str(total), calculation


def write_word_problems():
    """Write train.jsonl and val.jsonl. Returns how many problems are in each."""
    draw, lines = random.Random(seed), {part: [] for part in PARTS}
    for level in LEVELS:
        found = {}
        while len(found) < n_problems:
            question, answer, calculation = word_problem(level, draw)
            found[question] = PARTS[random.Random(f'{seed} {calculation}').random() < val_share], answer
        for question, (part, answer) in found.items():
            lines[part].append(json.dumps({'question': question, 'answer': answer, 'level': level}) + '\n')
    folder.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        write_atomic(folder / f'{part}.jsonl', lambda temporary, part=part: temporary.write_text(''.join(lines[part])))
    return {f'{part}_problems': len(lines[part]) for part in PARTS}


if dataset == 'problems':
    try:
        counts = write_word_problems()
    except OSError as error:
        fail(f'cannot write to {folder}: {error.strerror}')
    print(f'{folder} is made: {counts["train_problems"]:,} problems to train on and {counts["val_problems"]:,} of val')
    print(json.dumps({'script': knobs.script, 'changed': changed, **counts, 'seconds': round(time.time() - began, 2)}))
    sys.exit()
if meta := load('meta.json'):
    finish(meta, 'is there (to make it again, delete its meta.json)')
    sys.exit()

# ---- text, in pieces: (train or val, whether a document begins, text) -----------------------------------------------

SHAKESPEARE = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'
FINEWEB = {'path': 'HuggingFaceFW/fineweb-edu', 'name': 'sample-10BT', 'split': 'train'}
OPEN = {'.xz': lzma.open, '.gz': gzip.open, '.bz2': bz2.open}
# No token of GPT-2 reaches over the front of a space or newline with a letter behind it, so pieces that end there have
# the tokens of the whole text. (Behind the newline they would not: \n\n is one token only where the text ends.)
PIECE = re.compile(r'.{1,1000000}(?=[ \n]\S)|.+?(?=[ \n]\S|\Z)', re.DOTALL)


def read(where):
    """The texts of a file, or of the files *.txt, *.txt.xz and so on in a folder and below, in order of their names."""
    texts, files = [], sorted(where.rglob('*.txt*')) if where.is_dir() else [where]
    for file in files:
        try:
            with OPEN.get(file.suffix, open)(file, 'rt', encoding='utf-8-sig') as f:
                texts.append(f.read())
        except Exception as error:      # not there, damaged, not text: every reader raises its own kind
            fail(f'cannot read {file} as text in UTF-8: {error}')
    if not any(texts):
        fail(f'there is no text in {where}' if files else f'there is no file *.txt in {where}')
    return texts


def fineweb_pieces():
    """FineWeb-Edu from where it was left, every 100th document for val."""
    print('streaming {path}, {name}, from huggingface.co'.format(**FINEWEB), flush=True)
    with user_errors():
        datasets = need('datasets', 'to stream FineWeb-Edu')
    try:
        documents = datasets.load_dataset(**FINEWEB, streaming=True).skip(done['pieces'])
        for i, document in enumerate(documents, done['pieces']):
            if done['train_tokens'] >= n_tokens:
                break
            yield PARTS[i % 100 == 0], True, document['text']
    except Exception as error:      # whatever a network does
        fail(f'FineWeb-Edu broke off, the same command goes on from there: {type(error).__name__}: {error}')


def addition_pieces():
    """Lines of the questions that add_normal.py asks, in the same parts if its heldout is val_share."""
    width, answer_width = len(str(input_max - 1)), len(str(2 * input_max - 2))
    with user_errors():
        parts = addition_questions(input_min, input_max, val_share, seed, n_max=n_questions)
    for part, rows in zip(PARTS, parts):
        for some in rows.split(10_000):
            yield part, False, ''.join(f'{a:0{width}}+{b:0{width}}={a + b:0{answer_width}}\n' for a, b in some.tolist())


done = {'dataset': dataset, 'knobs': recorded, 'pieces': 0,
        **{f'{part}_{what}': 0 for part in PARTS for what in ('tokens', 'characters', 'bytes')}}
characters = total = None       # those of the vocabulary, in order; what the progress bar counts up to
if dataset == 'addition':
    source, pieces, characters = 'utils.addition_questions', addition_pieces(), list('0123456789+=\n')
elif dataset == 'fineweb_edu':
    source, pieces = ', '.join(FINEWEB.values()), fineweb_pieces()
    done, total = load('state.json', '.part') or done, n_tokens
else:
    source, file = path or SHAKESPEARE, Path(path or folder / 'input.txt')
    if not path and not file.exists():
        print(f'fetching {SHAKESPEARE}, 1.1 MB', flush=True)
        try:
            content = urllib.request.urlopen(SHAKESPEARE, timeout=60).read()
        except Exception as error:      # whatever a network does
            fail(f'cannot fetch {SHAKESPEARE}, pass a copy of it by --path=input.txt: {error}')
        if hashlib.sha256(content).hexdigest() != SHA256:
            fail(f'{SHAKESPEARE} sent something else, pass a copy of the text by --path=input.txt')
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(file, lambda temporary: temporary.write_bytes(content))
    texts = read(file)
    if val_path:
        texts = texts, read(Path(val_path))
    else:
        starts = [0, *accumulate(map(len, texts))]
        cuts = [max(0, int(starts[-1] * (1 - val_share)) - start) for start in starts]
        texts = [text[:cut] for text, cut in zip(texts, cuts)], [text[cut:] for text, cut in zip(texts, cuts)]
        if not any(texts[0]) or not any(texts[1]):
            fail(f'{file} is too short, {starts[-1]} characters, to be split with val_share={val_share:g}')
    pieces = ((part, match.start() == 0, match[0])
              for part, some in zip(PARTS, texts) for text in some for match in PIECE.finditer(text))
    total = sum(map(len, chain(*texts)))
    if dataset == 'shakespeare_char' or tokenizer == 'char':
        characters = sorted(set().union(*texts[0], *texts[1]))

# ---- tokens ---------------------------------------------------------------------------------------------------------

if characters:
    d_vocab = len(characters)
    if d_vocab > 2**16:
        fail(f'{d_vocab} different characters are too many for uint16: --tokenizer=gpt2')
    table = np.zeros(sys.maxunicode + 1, np.uint16)     # from code points to tokens
    table[[ord(character) for character in characters]] = np.arange(d_vocab)
else:
    print("GPT-2's tokenizer, 1.5 MB, by tiktoken: its cache, or openaipublic.blob.core.windows.net", flush=True)
    encoding = gpt2_encoding()
    d_vocab = encoding.n_vocab


def encode(text, begins):
    """Tokens of a piece of text, uint16."""
    if characters:
        return table[np.frombuffer(text.encode('utf-32-le'), '<u4')]
    mark = [encoding.eot_token] if begins and dataset != 'shakespeare' else []
    return np.array(mark + encoding.encode_ordinary(text), np.uint16)


pieces = chain(list(islice(pieces, 1)), pieces)         # where nothing can be had, nothing is written
try:
    folder.mkdir(parents=True, exist_ok=True)
    bins = {part: open(folder / f'{part}.bin.part', 'ab') for part in PARTS}
    fcntl.flock(bins['train'], fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError as error:
    fail(f'cannot write to {folder}, or another run does: {error.strerror}')
if not done['pieces']:
    (folder / 'state.json').unlink(missing_ok=True)     # what it counts is overwritten now
for part, file in bins.items():
    file.truncate(2 * done[f'{part}_tokens'])           # forget what was written after the state
bar = tqdm(initial=done['train_tokens'], total=total, unit_scale=True, dynamic_ncols=True, disable=None)
for part, begins, text in pieces:
    tokens = encode(text, begins)
    bins[part].write(tokens.tobytes())
    for what, n in (('tokens', len(tokens)), ('characters', len(text)), ('bytes', len(text.encode()))):
        done[f'{part}_{what}'] += n
    done['pieces'] += 1
    bar.update(len(text) if dataset != 'fineweb_edu' else len(tokens) if part == 'train' else 0)
    if done['pieces'] % 1000 == 0:
        for file in bins.values():
            file.flush()
            os.fsync(file.fileno())
        write_atomic(folder / 'state.json', lambda temporary: temporary.write_text(json.dumps(done)))
bar.close()

# ---- the files, and the last line -----------------------------------------------------------------------------------

meta = {'source': source, **done, 'tokenizer': 'char' if characters else 'gpt2', 'd_vocab': d_vocab}
if characters:
    meta['characters'] = characters
(folder / 'meta.json').unlink(missing_ok=True)          # it is never beside files that it does not describe
for part, file in bins.items():
    file.close()
    write_atomic(folder / f'{part}.bin', Path(file.name).rename)
    with open(folder / f'{part}.bin', 'rb') as written:
        meta[f'{part}_sha256'] = hashlib.file_digest(written, 'sha256').hexdigest()
write_atomic(folder / 'meta.json', lambda temporary: temporary.write_text(json.dumps(meta, indent=1)))
(folder / 'state.json').unlink(missing_ok=True)
finish(meta, 'is made')

# dataset                       d_vocab      train tokens      val tokens
# shakespeare_char                   65         1,003,854         111,540
# shakespeare                    50,257           301,966          36,059
# addition                           13        17,100,000       1,900,000
# fineweb_edu                    50,257       100,000,000       1,000,000      about
# text, 76 MB of novels          50,257        18,485,702         560,996
# the same by character             249        73,882,734       2,290,674

"""
Every number in the README: this script measures it, keeps the raw results in assets/results/ and writes the tables.

    python bench.py                                 # all runs of the first table that belong on this machine
    python bench.py --only=digits --seeds=3         # those of one row
    python bench.py --suite=ablation --seeds=3      # another table
    python bench.py --suite=variants --parallel=12  # twelve runs at once: quicker in all, each of them slower
    python bench.py --suite=tables                  # no runs: the README's tables from assets/results/
    python bench.py --suite=tables --pictures=out   # and its pictures of the suites gradient and scaling, as HTML

A result file names the command, the hardware, the version of torch and the commit (null where git is not at hand), and
holds the last line of every run. A row is measured on a CPU or on a GPU, whichever it belongs on.
"""
import importlib.util
import itertools
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, median, stdev, variance

import torch

from model import GPT2, GPT2Thinking, KVCache, ModelConfig, ThinkingModelConfig, unpack
from utils import (SerialTask, advantages, attend_to_cache, concentration, digits, fail, git_commit,
                   make_optimizer, need, peak_flops, read_knobs, recorded, user_errors, write_atomic)

# ---- knobs ----
suite = 'learning'              # which table: a name of SUITES below; tables: no runs, only the README
only = ''                       # names of rows, with commas between; empty: all
seeds = 5                       # runs of each row, with seeds 0, 1, ...
parallel = 1                    # runs at once
nanogpt = ''                    # speed: folder of a checkout of nanoGPT, to be measured beside ours
pretrained = ''                 # math: the model to start from, a .gguf file, or a transformers folder or hub name
pictures = ''                   # folder for gradient.html and scaling.html, needs plotly; empty: no pictures

# ---- set-up ----

knobs = read_knobs(__file__, globals())

def device_name(kind):
    """The name of this machine's GPU (kind 'cuda') or CPU."""
    info = Path('/proc/cpuinfo')
    found = re.search(r'model name\s*: (.*)', info.read_text() if info.exists() else '')
    cpu = f'{found[1] if found else sys.platform}, {os.cpu_count()} cores'
    return torch.cuda.get_device_name() if kind == 'cuda' else cpu


# ---- what is run ----------------------------------------------------------------------------------------------------

def by_reward(max_steps, group_size=256):
    """Knobs of autoencoder_think for learning by reward."""
    more = f' --group_size={group_size}' if group_size != 256 else ''
    return f'--method=reinforce --learning_rate=5e-4 --max_steps={max_steps}{more} --eval_every=100 --log_every=20'


DIGITS = '--encoding=digits --input_max=1000 --max_steps=1000'
EXPLORE = '--epsilon=.2 --entropy_weight=.01'
ENTROPY = '--entropy_weight=.03'
LARGE = f'--group_size=32 {ENTROPY}'
SMALL = '--input_max=64 --d_thought_vocab=8 --d_model=64 --n_head=16 --group_size=4 --max_steps=1000 --eval_every=50'
THOUSAND = ('--input_max=1000 --think_len=3 --batch_size=8192 --d_model=256 --n_head=64 --weight_decay=1 '
            '--learning_rate=2e-3 --log_every=50')
LENGTHS = '--search=False --input_max=64 --d_model=64 --n_head=16 --group_size=4 --max_steps=300 --eval_every=300'
ADD_LENGTHS = '--max_steps=600 --eval_every=600 --eval_questions=100 --think_cost=0'
FORMING = '--d_thought_vocab=100 --think_len=1 --max_steps=200 --eval_every=200'
GUMBEL = ('--method=gumbel --learning_rate=1e-3 --learning_rate_answer=1e-3 --tau=8 --max_steps=4000 --eval_every=100 '
          '--log_every=20')
CASES = {   # inputs-tokens-thoughts: (knobs, those of reinforce)
    '64-64-1': ('--d_thought_vocab=64 --think_len=1', by_reward(3000)),
    '64-8-2': ('', by_reward(3000)),
    '100-10-2': ('--input_max=100 --d_thought_vocab=10', by_reward(4000)),
    '256-4-4': ('--input_max=256 --d_thought_vocab=4 --think_len=4', by_reward(6000, 128)),
    '1000-10-3': ('--input_max=1000 --d_thought_vocab=10 --think_len=3', by_reward(6000, 64)),
}
SLOWER = '--learning_rate=3e-3 --learning_rate_answer=3e-3'
DEALT = CASES['256-4-4'][0]
PAID = f'--d_thought_vocab=64 --think_len=1 {by_reward(2000)}'
VARIANTS = {    # row: (knobs, why it learns or does not)
    'search': ('', 'the main job at this size: all codes are scored'),
    'sampled': ('--search=False', 'only codes that the thinking policy wrote'),
    'forgetful': ('--search=False --memory=0',
                  'the same without counts of earlier steps: a batch says too little about what is written'),
    'written': ('--search=False --answer_on=written',
                'the answering policy trains on all that is written: its preferences average out before they grow'),
    'variable': ('--fixed=False', 'up to two thoughts, end_thought ends them'),
    'variable-sampled': ('--search=False --fixed=False', 'the same, sampled'),
    'one-model': ('--split=False', 'one network is both policies'),
    'frozen-answering': ('--frozen=answering',
                         'an untrained answering policy hardly tells codes apart, so targets stay soft'),
    'frozen-thinking': ('--frozen=thinking --search=False',
                        'untrained thoughts say nothing about the sum'),
    'three-numbers': ('--n_adds=3', 'a + b + c, 262,144 questions: not in 1000 steps'),
    'softmax': ('--advantage=softmax', 'no prices: some answers share codes, and do not part again'),
    'best': ('--advantage=best', 'the same, sharper, and worse: more answers share'),
    'sampled-softmax': ('--search=False --advantage=softmax', 'own rollouts, no prices: a few codes take all answers'),
    'sampled-best': ('--search=False --advantage=best', 'the same by best of the group'),
    'reinforce': ('--search=False --advantage=reinforce', 'rewards differ little between codes: falls to one code'),
    'grpo': ('--search=False --advantage=grpo',
             'the same: the group mean removes difficulty, but there is no meaning to be found yet'),
    'rloo': ('--search=False --advantage=rloo', 'the same: it is dr_grpo times G/(G-1), which Adam does not see'),
    'dr_grpo': ('--search=False --advantage=dr_grpo', 'the same'),
    'grpo-written': ('--search=False --advantage=grpo --answer_on=written',
                     'on-policy for both, the usual set-up: the same'),
    'grpo-explore': (f'--search=False --advantage=grpo {EXPLORE}', 'the same with exploration and an entropy bonus'),
    'grpo-32': (f'--search=False --advantage=grpo {LARGE}', 'the same with large groups and an entropy bonus'),
    'super': ('--super=True', 'the answering policy is taught digits: modular addition is all there is to learn'),
    'super-lsb': ('--super=True --super_order=lsb', 'lowest digit first'),
    'super-random': ('--super=True --super_order=random', 'a random code is hardly harder to learn than digits'),
    'super-sampled': ('--super=True --search=False', 'taught digits, own codes'),
    'super-softmax': ('--super=True --search=False --advantage=softmax',
                      'own rollouts: few are right at first, and the least bad of the others are learned as well'),
    'super-best': ('--super=True --search=False --advantage=best', 'the same by best of the group'),
    'super-reinforce': ('--super=True --search=False --advantage=reinforce', 'falls to one code, taught or not'),
    'super-grpo': ('--super=True --search=False --advantage=grpo', 'the same'),
    'super-explore': (f'--super=True --search=False --advantage=grpo {EXPLORE}', 'the same, explored'),
    'super-grpo-32': (f'--super=True --search=False --advantage=grpo {LARGE}',
                      'large groups: one wrong code is still better paid than another'),
    'super-clean': ('--super=True --clean=True --search=False --advantage=raw',
                    'paid 1 for the right digits, else 0: of 2048 rollouts of a step, 32 are right at first'),
    'super-clean-explore': (f'--super=True --clean=True --search=False --advantage=raw {EXPLORE}',
                            'with exploration: fewer codes still'),
    'super-clean-grpo': (f'--super=True --clean=True --search=False --advantage=grpo {EXPLORE}',
                         'by grpo, explored'),
    'super-clean-grpo-entropy': (f'--super=True --clean=True --search=False --advantage=grpo {ENTROPY}',
                                 'by grpo, with an entropy bonus only'),
    'super-clean-grpo-32': (f'--super=True --clean=True --search=False --advantage=grpo {LARGE}',
                            'large groups: 256 are right at first, enough to learn from'),
    'batch-64': ('--batch_size=64', 'a small batch, as many steps: never leaves chance'),
    'batch-128': ('--batch_size=128', 'starts to learn'),
    'decay-.01': ('--weight_decay=.01', 'tiny weight decay: the language is agreed on, questions are learned by heart'),
    'decay-1': ('--weight_decay=1', 'the same, a little less'),
}
S5 = '--task=s5 --d_thought_vocab=256 --n_layer=2 --d_model=128 --batch_size=256 --advance_at=.85 --eval_every=1000'
PLUS = '--task=plus --k=1 --input_max=31 --weight_decay=1 --batch_size=128'
HOP = '--task=hop --input_max=10 --k=8 --k_test=16 --n_layer=2 --position_encoding=rotary'
FREE = '--fixed=False --hardest=.2 --learning_rate=5e-4 --group_size=16 --max_steps=2500 --enough=2'
LESS = '--max_steps=4000 --enough=2'
FOUR = '--n_layer=4 --batch_size=12'
NOVELS = ('--n_layer=1 --d_model=256 --text_len=128 --batch_size=32 --learning_rate=2e-3 --eval_every=6000 '
          '--eval_sequences=2000 --weight_decay=0')
TEXTS = {       # suite: (where, what all its rows have in common, steps)
    'shakespeare': ('cpu', '--n_layer=1 --batch_size=16 --eval_every=5000 --eval_sequences=2000', 5000),
    'novels': ('cuda', f'--data=data/novels_char {NOVELS}', 6000),
    'words': ('cuda', f'--data=data/novels {NOVELS} --dtype=bfloat16', 4000),
}
TEXT_ROWS = {   # row: (knobs, what it shows)
    'none': ('--think_len=0', 'no thoughts'),
    'none-twice': ('--think_len=0', 'none, twice the steps: as much work as with thoughts'),
    'deeper': ('--think_len=0 --n_layer=2', 'none, two layers: as much work, more weights'),
    'filler': ('--thoughts=filler', 'the same thoughts always'),
    'straight': ('', 'eight tokens of 64 at once, by gradient'),
    'continuous': ('--thought_kind=continuous --gate=none --think_len=1 --at_once=1',
                   'the state itself instead of tokens'),
}
ON = '--learning_rate=5e-4 --entropy_weight=0 --max_steps=2000'
ON_ROWS = {     # what goes on from straight
    'straight-on': (ON, 'straight, and on by gradient'),
    'paid': (f'--thought_kind=token {ON}', 'straight, and on by reward'),
    'unpaid': (f'--thought_kind=token --policy_weight=0 {ON}', 'straight, and on, thoughts not trained'),
    'unpaid-1': (f'--thought_kind=token --policy_weight=0 --group_size=1 {ON}',
                 'straight, and on, thoughts not trained, one rollout'),
}
ROLLOUTS = {    # suite: (knobs of all rows, of start and reference, steps of start, of reference)
    'rollouts': ('--data=data/novels_char --batch_size=16 --eval_prefixes=256 --max_steps=500 --eval_every=50',
                 '--data=data/novels_char', 1000, 4000),
    'rollouts-words': ('--data=data/novels --eval_prefixes=128 --max_steps=100 --eval_every=20', '--data=data/novels',
                       1000, 2000),
}
START = ('--think_len=0 --n_layer=6 --n_head=6 --d_model=384 --text_len=128 --batch_size=64 --learning_rate=1e-3 '
         '--weight_decay=0 --dtype=bfloat16 --eval_sequences=500 --log_every=50')
WHOLE = '--prefix_len=64 --text_len=64 --compile=True'
ROLLOUT_ROWS = {    # row: (knobs, what it shows)
    'none': ('--think_len=0', 'no thoughts, no real text'),
    'none-real': ('--think_len=0 --supervised_weight=1', 'no thoughts, real text mixed in'),
    'free': ('', 'up to one thought a token, no real text'),
    'free-real': ('--supervised_weight=1', 'up to one thought a token'),
    'fixed': ('--fixed=True', 'one thought before every token, no real text'),
    'fixed-real': ('--fixed=True --supervised_weight=1', 'one thought before every token'),
    'less': ('--think_len=0 --supervised_weight=1 --entropy_weight=.8', 'no thoughts, less paid for entropy'),
    'bare': ('--think_len=0 --entropy_weight=0', 'no thoughts, paid by the reference alone'),
    'usual': ('--think_len=0 --entropy_weight=0 --kl_weight=.3 --repeat_cost=1',
              'the same, with KL to the start and a price of repetition'),
}
THINKING = {    # row: (knobs, what it shows)
    'add': ('', 'the main case'),
    'add-none': ('--thoughts=none --max_steps=12000', 'none, three times the steps'),
    'add-none-learned': ('--thoughts=none --position_encoding=learned --recount=False --max_steps=12000',
                         'none, positions as usual'),
    'add-none-direct': ('--thoughts=none --position_encoding=learned --recount=False --advance_at=0 --max_steps=12000',
                        'none, positions as usual, full depth at once'),
    'add-filler': (f'--thoughts=filler {LESS}', 'the same thought again and again'),
    'add-random': (f'--thoughts=random {LESS}', 'random thoughts'),
    'add-chain': (f'--thoughts=chain {LESS}', 'supervised: the true states'),
    'perm': ('--task=perm --input_max=10', 'permutations of ten things'),
    'perm-none': ('--task=perm --input_max=10 --thoughts=none --max_steps=12000', 'none, three times the steps'),
    'perm-none-learned': ('--task=perm --input_max=10 --thoughts=none --position_encoding=learned --recount=False '
                          '--max_steps=12000', 'none, positions as usual'),
}
NEEDS = {
    'recount': ('--recount=False', 'thoughts are numbered on'),
    'end': ('--answer_at=end', 'the answer is read at an end_thought'),
    'learned': ('--position_encoding=learned', 'an embedding for every position'),
    'rotary': ('--position_encoding=rotary', 'rotary positions'),
    'price': ('--code_price=0', 'codes without a price'),
    'entropy': ('--entropy_weight=.1 --entropy_end=.1', 'a larger bonus for entropy, which stays'),
    'certain': ('--entropy_end=0', 'a bonus that falls to nothing'),
    'hardest': ('--hardest=1', 'no easier questions in between'),
    'batch': ('--baseline=batch', 'compared with the mean reward of all questions'),
}
MATH = ('--reward=math --data=data/problems --levels=1,2 --text_len=48 --batch_size=32 --learning_rate=1e-5 '
        '--max_steps=40 --eval_every=20 --eval_prefixes=256 --dtype=bfloat16')
SPARSE = ('--super=True --clean=True --search=False --input_max=32 --d_thought_vocab=6 --d_model=64 --n_head=16 '
          '--batch_size=128 --group_size=32')
HALF = {    # tasks whose groups are looked at: (script, knobs of a training that stops half way)
    'blind': ('add_think_blind', f'{SPARSE} {ENTROPY} --advantage=grpo --max_steps=300 --eval_every=300'),
    'perm': ('add_think', '--task=perm --input_max=10 --k=2 --k_test=6 --enough=.4 --eval_every=20'),
    's5': ('add_think', '--task=s5 --n_letters=3 --d_thought_vocab=256 --batch_size=64 --advance_at=.85 '
           '--max_steps=1000 --eval_every=1000'),
}
OFTEN = '--eval_every=10 --eval_questions=500'
WEIGHED = {     # tasks on which weightings are compared by training: (script, knobs)
    'blind': ('add_think_blind', f'{SPARSE} {ENTROPY} --max_steps=1000 {OFTEN}'),
    'bare': ('add_think_blind', f'{SPARSE} --max_steps=1000 {OFTEN}'),
    'perm': ('add_think', f'--task=perm --input_max=10 --k=3 --max_steps=2000 --enough=2 {OFTEN}'),
    'add': ('add_think', f'--k=3 --max_steps=2000 --enough=2 {OFTEN}'),
}
WEIGHTINGS = {  # row: (knobs, what it is)
    'rloo': ('--advantage=rloo', 'what the others are compared with'),
    **{kind: (f'--advantage={kind}', '') for kind in ('dr_grpo', 'grpo', 'batch_std', 'quantile', 'quantile_batch')},
    'softmax': ('--advantage=softmax --tau=1', 'tau 1'), 'softmax-sharp': ('--advantage=softmax --tau=.1', 'tau .1'),
    'softmax_centred': ('--advantage=softmax_centred --tau=1', 'tau 1, less 1/G'),
    'softmax_centred-sharp': ('--advantage=softmax_centred --tau=.1', 'tau .1, less 1/G'),
    'softmax_quantile': ('--advantage=softmax_quantile --tau=1', 'tau 1'), 'best': ('--advantage=best', ''),
    'one': ('--advantage=rloo --rollouts_per_update=1', 'rloo, one rollout of each group counts'),
}
SUITES = {  # suite: {row: (device it belongs on, script, knobs, what it shows)}
    'learning': {
        'blind': ('cpu', 'add_think_blind', '', 'two thoughts of ten tokens'),
        'blind-one': ('cpu', 'add_think_blind', '--d_thought_vocab=100 --think_len=1', 'one of a hundred tokens'),
        'sampled': ('cpu', 'add_think_blind', '--search=False', 'only codes that the thinking policy wrote'),
        'sampled-one': ('cpu', 'add_think_blind', '--search=False --d_thought_vocab=100 --think_len=1',
                        'the same, one of a hundred tokens'),
        'super-500': ('cpu', 'add_think_blind', '--super=True --input_max=500 --think_len=3 --batch_size=2048 '
                      '--weight_decay=2 --max_steps=3000 --eval_every=500', '500 numbers, taught the digits'),
        'blind-few': ('cpu', 'add_think_blind', '--d_thought_vocab=9', '81 codes for 100 answers: at best .81'),
        'normal': ('cpu', 'add_normal', '', 'the control: no thoughts'),
        'digits': ('cpu', 'add_normal', DIGITS, 'text, highest digit first'),
        'digits-lsb': ('cpu', 'add_normal', f'{DIGITS} --digit_order=lsb', 'lowest digit first'),
        'blind-gpu': ('cuda', 'add_think_blind', '--max_steps=1000', 'the main job, two thirds of the steps'),
        'digits-5': ('cuda', 'add_normal', '--encoding=digits --input_min=10000 --input_max=100000 --max_steps=6000',
                     'five digits, highest first'),
    },
    'reach': {row + ('-gpu' if device == 'cuda' else ''): (device, script, knobs if device == 'cuda' else '', what)
              for device in ('cpu', 'cuda') for row, script, knobs, what in (
                  ('normal', 'add_normal', '', 'the control: no thoughts'),
                  ('blind', 'add_think_blind', '--compile=True', 'the main job'),
                  ('code', 'autoencoder_think', '', 'two policies and a code'),
                  ('add', 'add_think', '', 'thoughts that are needed'))},
    'ablation': {
        'whole': ('cuda', 'add_think_blind', '--max_steps=1000', 'the whole recipe'),
        'balance': ('cuda', 'add_think_blind', '--max_steps=1000 --balance_steps=0', 'codes without prices'),
        'tau': ('cuda', 'add_think_blind', '--max_steps=1000 --tau=10', 'no amplification'),
        'decay': ('cuda', 'add_think_blind', '--max_steps=1000 --weight_decay=0', 'no weight decay'),
        'heads': ('cuda', 'add_think_blind', '--max_steps=1000 --n_head=4', '4 heads of 32, not 32 of 4'),
    },
    'variants': {row: ('cpu', 'add_think_blind', f'{SMALL} {knobs}'.strip(), why)
                 for row, (knobs, why) in VARIANTS.items()},
    'thousand': {
        'super-msb': ('cuda', 'add_think_blind', f'{THOUSAND} --max_steps=6000 --super=True',
                      'taught digits, highest first'),
        'super-lsb': ('cuda', 'add_think_blind', f'{THOUSAND} --max_steps=6000 --super=True --super_order=lsb',
                      'taught digits, lowest first'),
        'invented': ('cuda', 'add_think_blind', f'{THOUSAND} --max_steps=6000', 'their own language'),
        'invented-3000': ('cuda', 'add_think_blind', f'{THOUSAND} --max_steps=3000', 'the same, half the steps'),
        'sampled': ('cuda', 'add_think_blind', f'{THOUSAND} --max_steps=3000 --search=False --group_size=4',
                    'only codes that the thinking policy wrote'),
    },
    'lengths': {
        'fixed-2': ('cpu', 'add_think_blind', f'{LENGTHS} --d_thought_vocab=8 --think_len=2', 'two'),
        'to-2': ('cpu', 'add_think_blind', f'{LENGTHS} --d_thought_vocab=8 --think_len=2 --fixed=False', 'up to two'),
        'fixed-5': ('cpu', 'add_think_blind', f'{LENGTHS} --d_thought_vocab=3 --think_len=5', 'five'),
        'to-6': ('cpu', 'add_think_blind', f'{LENGTHS} --d_thought_vocab=3 --think_len=6 --fixed=False', 'up to six'),
        'add-4': ('cpu', 'add_think', f'{ADD_LENGTHS} --think_len=4', 'four'),
        'add-to-7': ('cpu', 'add_think', f'{ADD_LENGTHS} --think_len=7 --fixed=False', 'up to seven'),
    },
    'origin': {
        'search': ('cpu', 'add_think_blind', FORMING, ''),
        'sampled': ('cpu', 'add_think_blind', f'{FORMING} --search=False', ''),
    },
    'code': {
        **{f'{method}-{case}': ('cuda' if method in ('reinforce', 'gumbel') and case[:2] != '64' else 'cpu',
                                'autoencoder_think', f'{sizes} {how}'.strip(), f'{method} ({case.replace("-", ", ")})')
           for case, (sizes, reinforce) in CASES.items()
           for method, how in (('match', ''), ('sinkhorn', '--method=sinkhorn'), ('reinforce', reinforce),
                               ('gumbel', GUMBEL))},
        'match-100-3-3': ('cpu', 'autoencoder_think', '--input_max=100 --d_thought_vocab=3 --think_len=3',
                          'match (100, 3, 3): 27 codes, .27 at best'),
    },
    'capacity': {
        '1000-10-4': ('cpu', 'autoencoder_think', '--input_max=1000 --d_thought_vocab=10 --think_len=4',
                      'ten times as many codes as inputs'),
        '4096-8-4': ('cuda', 'autoencoder_think', '--input_max=4096 --d_thought_vocab=8 --think_len=4 '
                     f'--batch_size=4096 --max_steps=100 {SLOWER}', 'every code is needed, as in the next two'),
        '10000-10-4': ('cuda', 'autoencoder_think', '--input_max=10000 --d_thought_vocab=10 --think_len=4 '
                       f'--batch_size=10000 --max_steps=150 {SLOWER}', ''),
        '65536-16-4': ('cuda', 'autoencoder_think', '--input_max=65536 --d_thought_vocab=16 --think_len=4 '
                       f'--batch_size=8192 --max_steps=500 --eval_every=20 {SLOWER}', 'eight batches an epoch'),
    },
    'thinking': {row: ('cpu', 'add_think', *knobs) for row, knobs in THINKING.items()},
    'needs': {row: ('cpu', 'add_think', *knobs) for row, knobs in NEEDS.items()},
    's5': {
        '16': ('cuda', 'add_think', f'{S5} --k=16 --k_test=64 --max_steps=5000', 'sixteen operations'),
        '16-none': ('cuda', 'add_think', f'{S5} --k=16 --max_steps=7000 --thoughts=none', 'none, twice the steps'),
        '32': ('cuda', 'add_think', f'{S5} --k=32 --k_test=64 --max_steps=5000', 'thirty-two operations'),
    },
    'buys': {
        'plus': ('cpu', 'add_think', f'{PLUS} --think_len=2', 'a + b, two thoughts'),
        'plus-none': ('cpu', 'add_think', f'{PLUS} --thoughts=none', 'no thoughts'),
        'totals': ('cpu', 'add_think', '--task=plus', 'only additions, which can all be done at once'),
        'totals-none': ('cpu', 'add_think', '--task=plus --thoughts=none', 'no thoughts'),
        'sort': ('cpu', 'add_think', '--task=sort --input_max=20', 'the sixth smallest of ten'),
        'sort-none': ('cpu', 'add_think', '--task=sort --input_max=20 --thoughts=none', 'no thoughts'),
        'hop': ('cpu', 'add_think', f'{HOP} --max_steps=2000', 'eight hops, two layers'),
        'hop-none': ('cpu', 'add_think', f'{HOP} --max_steps=4000 --thoughts=none', 'none, twice the steps'),
    },
    'free': {
        baseline: ('cpu', 'add_think', f'{FREE} --baseline={baseline}', what) for baseline, what in (
            ('group', 'compared with the mean reward of the same question'),
            ('batch', 'with the mean reward of all questions'),
            ('no_think', 'with log p of a lagged copy that answers at once'))
    },
    'text': {
        'none': ('cpu', 'supervised_rollout_think', f'{FOUR} --think_len=0', 'four layers'),
        'own': ('cpu', 'supervised_rollout_think', FOUR, 'four layers, with thoughts'),
        'large': ('cuda', 'supervised_rollout_think', '--think_len=0 --n_layer=6 --n_head=6 --d_model=384 '
                  '--text_len=256 --batch_size=64 --dropout=.2 --max_steps=5000 --learning_rate=1e-3 '
                  '--dtype=bfloat16', 'six layers'),
    },
    **{suite: {row: (where, 'supervised_rollout_think', ' '.join([common, *knobs.split()] + (
                     [] if row in ON_ROWS else [f'--max_steps={steps * (1 + (row == "none-twice"))}'])), what)
               for row, (knobs, what) in (TEXT_ROWS | (ON_ROWS if suite == 'novels' else {})).items()}
       for suite, (where, common, steps) in TEXTS.items()},
    **{suite: {**{row: ('cuda', 'supervised_rollout_think', f'{text} {START} --max_steps={n} --eval_every={n}', what)
                  for row, n, what in (('start', n_start, 'the start'), ('reference', n_reference, 'the reference'))},
               **{row: ('cuda', 'rollout_think', f'{common} {WHOLE} {knobs}'.strip(), what)
                  for row, (knobs, what) in ROLLOUT_ROWS.items()}}
       for suite, (common, text, n_start, n_reference) in ROLLOUTS.items()},
    'math': {row: ('cuda', 'rollout_think', f'{MATH} {knobs}', what) for row, knobs, what in (
        ('grpo', '--advantage=grpo', 'compared with the mean of the group, by its standard deviation'),
        ('softmax', '--advantage=softmax --tau=.3', 'weighted by softmax of the reward'))},
    'dealt': {
        'whole': ('cpu', 'autoencoder_think', DEALT, 'the whole recipe'),
        'init': ('cpu', 'autoencoder_think', f'{DEALT} --init=gpt2', 'GPT-2\'s small weights'),
        'unique': ('cpu', 'autoencoder_think', f'{DEALT} --unique=False', 'codes may have several owners'),
        'inner': ('cpu', 'autoencoder_think', f'{DEALT} --inner_steps=1', 'one update per step, not five'),
        'inner-150': ('cpu', 'autoencoder_think', f'{DEALT} --inner_steps=1 --max_steps=150',
                      'the same, as many updates'),
        'rematch': ('cpu', 'autoencoder_think', f'{DEALT} --rematch=False', 'dealt once, at the first step'),
    },
    'paid': {row: ('cuda', 'autoencoder_think', f'{PAID} {knobs}'.strip(), what) for row, (knobs, what) in {
        'whole': ('', 'the whole recipe'),
        'init': ('--init=gpt2', "GPT-2's small weights"),
        'price': ('--code_price=0', 'codes without a price'),
        'entropy': ('--entropy_weight=0 --entropy_end=0', 'no bonus for entropy'),
        'usual-entropy': ('--entropy_weight=.1 --entropy_end=0', 'a bonus as small as is usual'),
        'both': ('--code_price=0 --entropy_weight=.1 --entropy_end=0', 'a small bonus and no price'),
        'group': ('--group_size=8', 'small groups'),
        'rates': ('--learning_rate_answer=5e-4', 'equal learning rates, the lower one'),
        'fast': ('--learning_rate=1e-2', 'equal learning rates, the higher one'),
        'grpo': ('--advantage=grpo', 'divided by the standard deviation'),
        'baseline': ('--advantage=reinforce', 'compared with a running mean, not with the group'),
        'noise': ('--logit_noise=1', 'noise added to logits'),
        'frozen': ('--frozen=answering', 'the answering policy does not learn'),
    }.items()},
    'gradient': {row: ('cpu', 'bench', f'--suite=gradient --only={row}', what) for row, what in {
        'untrained': 'untrained', 'quarter': '25% of rollouts right', 'most': '75% right'}.items()},
    **{suite: {row: ('cpu', script, knobs, '') for row, (script, knobs) in HALF.items()}
       for suite in ('sparsity', 'weights')},
    'weighting': {
        **{f'{task}-{row}': ('cpu', script, f'{base} {more}', what) for task, (script, base) in WEIGHED.items()
           for row, (more, what) in WEIGHTINGS.items()},
        **{f'{task}-reinforce': ('cpu', *WEIGHED[task][:1], f'{WEIGHED[task][1]} {more}', 'a mean of all questions')
           for task, more in (('blind', '--advantage=reinforce'), ('bare', '--advantage=reinforce'),
                              ('perm', '--baseline=batch'), ('add', '--baseline=batch'))},
        'blind-taught': ('cpu', 'add_think_blind', f'{WEIGHED["blind"][1]} --advantage=rloo --supervised_weight=1',
                         'rloo, and taught the right code beside it'),
    },
    'temperature': {f'{task}-{kind}-{tau}': ('cpu', *WEIGHED[task][:1], f'{WEIGHED[task][1]} --advantage={kind} '
                                             f'--tau={tau}', '')
                    for task in ('blind', 'perm') for kind in ('softmax', 'softmax_quantile')
                    for tau in ('.1', '.25', '.5', '.75', '1', '2', '5')},
}
COMMON = {'variants': SMALL, 'thousand': THOUSAND, 'lengths': LENGTHS, 'origin': FORMING, 'code': '', 'capacity': '',
          'dealt': DEALT, 'paid': PAID, **dict.fromkeys(('thinking', 'needs', 'buys'), ''), 's5': S5,
          'free': FREE, 'text': '', 'math': MATH,
          **{suite: f'{common} {WHOLE}' for suite, (common, *_) in ROLLOUTS.items()},
          **{suite: common for suite, (_, common, _) in TEXTS.items()}}     # of all rows
# what rows go on from: {knob: (suite, row, seed)}, seed None: the same as theirs
STARTS = {('novels', row): {'init_from': ('novels', 'straight', None)} for row in ON_ROWS}
STARTS |= {('free', row): {'init_from': ('thinking', 'add', None)} for row in SUITES['free']}
STARTS |= {(suite, row): {'init_from': (suite, 'start', 0), 'reference': (suite, 'reference', 0)}
           for suite in ROLLOUTS for row in ROLLOUT_ROWS}
ONCE = {start for starts in STARTS.values() for start in starts.values()}       # those with seed 0 for all seeds
# knobs of some rows that are gone since commit 6bf880c: these rows are shown as they were measured, and not run again
GONE = re.compile(r'--(memory|answer_on|balance_steps|rollouts_per_update|answer_at|logit_noise)='
                  r'|add_think(\.py)? .*--entropy_end=')
ROOT = Path(__file__).parent
RESULTS = ROOT / 'assets' / 'results'
turn = itertools.count()         # of GPUs
running = {}                    # row: futures of its runs, by seed


def stored(name):
    """What assets/results/<name>.json holds, None where there is no such file."""
    path = RESULTS / f'{name}.json'
    return json.loads(path.read_text()) if path.exists() else None


def keep(name, result, indent=1):
    """Write assets/results/<name>.json."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_atomic(RESULTS / f'{name}.json', lambda path: path.write_text(json.dumps(result, indent=indent) + '\n'))


def as_code(command, short=None):
    """A command in Markdown, perhaps in short, and the commit at which it runs if a knob of it is gone."""
    return f'`{command if short is None else short}`{" at 6bf880c" if GONE.search(command) else ""}'


def markdown(head, lines):
    """A table."""
    return '\n'.join(f'| {" | ".join(map(str, line))} |' for line in (head, ['---'] * len(head), *lines))


def run(suite, row, seed, folder, *more):
    """Run a row's command with a seed in out/bench/<suite>-<row>/<folder>. Returns that folder and the last line."""
    device, script, arguments, _ = SUITES[suite][row]
    if device == 'cuda':        # GPUs take turns
        device = f'cuda:{next(turn) % torch.cuda.device_count()}'
    folder = ROOT / f'out/bench/{suite}-{row}/{folder}'
    threads = {'OMP_NUM_THREADS': str(max(1, os.cpu_count() // parallel))}
    run = subprocess.run([sys.executable, f'{script}.py', *arguments.split(), f'--seed={seed}', f'--device={device}',
                          f'--out_dir={folder}', *more], stdout=subprocess.PIPE, text=True, cwd=ROOT,
                         env=threads | os.environ)     # a number of threads that is set counts
    if run.returncode:
        raise ChildProcessError(f'{script}.py {arguments} --seed={seed} ended with exit code {run.returncode}')
    return folder, json.loads(run.stdout.splitlines()[-1])


def learn(suite, row, seed):
    """
    The last line of a run, and the step at which 99% of held-out questions were first right; where none is held out,
    the step and the seconds at which all answers were.
    """
    more = [f'--init_from={pretrained}'] if suite == 'math' else []
    for knob, (where, first, which) in STARTS.get((suite, row), {}).items():
        which = seed if which is None else which
        checkpoint = Path(f'out/bench/{where}-{first}/{which}/ckpt.pt')
        if where == suite and first in running:
            running[first][which].result()
        elif not (ROOT / checkpoint).exists():
            run(where, first, which, which)
        more.append(f'--{knob}={checkpoint}')
    folder, result = run(suite, row, seed, seed, *more)
    log = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    if suite == 'math':
        levels = [f'val_accuracy_at_{level}' for level in result['accuracy_at_level']]
        result['curve'] = {name: [line[name] for line in log if name in line] for name in (
            'val_accuracy', *levels, 'val_format', 'accuracy', 'format', 'length', 'mixed', 'entropy', 'gradient_norm',
            'max_weight', 'effective_n')} | {'step': [line['step'] for line in log if 'val_accuracy' in line]}
    elif result['script'] == 'rollout_think':
        result['curve'] = {name: [line[name] for line in log if 'perplexity' in line]
                           for name in ('step', 'perplexity', 'distinct_4', 'repeated_8', 'thoughts')}
    elif 'val_loss' in result:
        pass
    elif 'heldout_accuracy' in result:
        first = next((line for line in log if line.get('heldout_accuracy', 0) >= .99), {})
        result |= {'step_of_99': first.get('step'), 'seconds_of_99': first.get('seconds')}
    else:
        first = next((line for line in log if line.get('accuracy') == 1), {})
        result |= {f'{unit}_to_all': first.get(unit) for unit in ('step', 'seconds')}
        first = next((line for line in log if line.get('accuracy', 0) >= .99), {})
        result |= {f'{unit}_of_99': first.get(unit) for unit in ('step', 'seconds')}
    result['batch_size'] = json.loads((folder / 'config.json').read_text())['knobs']['batch_size']
    if suite in ('weighting', 'temperature'):
        result |= steadiness(row, log)
    print(f'{row} {json.dumps(result)}', flush=True)
    return result


def origin(suite, row, seed):
    """
    Whose language is it? The share of codes that mean the same answer to the answering policy when one thing about a
    run is another: questions and noise, the thinking policy it begins with, or the answering policy (all after one step
    of warm-up).
    """
    def train(*how):
        folder, _ = run(suite, row, *how)
        return torch.load(folder / 'ckpt.pt', weights_only=True)

    def meanings(checkpoint):
        answering = unpack(checkpoint['models']['answering'])
        return answering.answer(answering.config.d_normal_vocab + torch.arange(100)[:, None]).argmax(-1)

    begun = [train(s, f'{seed}-begun-{s}', '--max_steps=1') for s in (seed, seed + 100)]
    found = {}
    for name, thinking, answering, noise in (('same', 0, 0, 0), ('noise', 0, 0, 1), ('thinking', 1, 0, 0),
                                             ('answering', 0, 1, 0)):
        start = begun[noise] | {'models': {'thinking': begun[thinking]['models']['thinking'],
                                           'answering': begun[answering]['models']['answering']}}
        path = ROOT / f'out/bench/{suite}-{row}/{seed}-{name}.pt'
        torch.save(start, path)
        found[name] = meanings(train(seed + 100 * noise, f'{seed}-{name}', f'--init_from={path}'))
    result = {name: (meaning == found['same']).float().mean().item() for name, meaning in found.items()}
    print(row, json.dumps(result), flush=True)
    return result


def measure(suite, rows):
    """Run rows with every seed, `parallel` runs at once; write assets/results/<suite>-<row>.json for each."""
    failed, commit = [], git_commit()
    with ThreadPoolExecutor(parallel) as pool:
        one = {'origin': origin, 'gradient': gradient, 'sparsity': sparsity, 'weights': weights}.get(suite, learn)
        for row in rows:
            n = 1 if (suite, row, 0) in ONCE else seeds
            running[row] = [pool.submit(one, suite, row, seed) for seed in range(n)]
        for row in rows:
            device, script, arguments, _ = SUITES[suite][row]
            result = {'command': f'python {script}.py {arguments}'.strip(), 'hardware': device_name(device),
                      'torch': torch.__version__, 'commit': commit, 'parallel': parallel}
            if device == 'cuda' and torch.cuda.device_count() > 1:
                result['hardware'] = f'{torch.cuda.device_count()} {result["hardware"]}'
            for knob, (where, first, which) in STARTS.get((suite, row), {}).items():
                seed = '<seed>' if which is None else which
                result['command'] += f' --{knob}=out/bench/{where}-{first}/{seed}/ckpt.pt'
            if suite == 'math':
                result['command'] += f' --init_from={Path(pretrained).name}'
            result['runs'] = []
            for future in running[row]:
                try:
                    result['runs'].append(future.result())
                except ChildProcessError as error:
                    failed.append(str(error))
            if not result['runs']:
                continue
            keep(f'{suite}-{row}', result, indent=None if suite in ('gradient', 'weights') else 1)
    if failed:
        fail('; '.join(failed))


# ---- speed ----------------------------------------------------------------------------------------------------------

def timed(function, repeats=5):
    """Seconds that a function takes, `repeats` times after a first one, with whatever it leaves the GPU to do."""
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return seconds[1:]


KINDS = {   # of kernels: parts of their names, the first that fits counts
    'attention': 'flash|fmha|attend|sdpa|cudnn', 'matrices': 'nvjet|gemm|gemv|cutlass|cublas',
    'norms': 'layer_norm', 'softmax, loss, sampling': 'softmax|sort|scan|argmax|gather', 'GELU': '(?i)gelu',
    'optimiser': 'multi_tensor|adam',
    'copies and casts': '(?i)copy|cat|memcpy|memset|to_copy|index', 'other': ''}


def profile(function):
    """Milliseconds that a function keeps a GPU busy with each of KINDS, by torch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        function()
        torch.cuda.synchronize()
    spent = dict.fromkeys(KINDS, 0.)
    for event in profiler.key_averages():
        kind = next(kind for kind, parts in KINDS.items() if re.search(parts, event.key))
        spent[kind] += event.device_time_total / 1000
    return {kind: round(milliseconds, 3) for kind, milliseconds in spent.items()}


def speeds(ways, tokens, repeats=5):
    """
    For each of some ways to do the same, {name: function}: seconds, as timed, tokens per second by their median, the
    most memory that it takes, and where the time goes on a GPU.
    """
    found = {}
    for name, function in ways.items():
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        seconds = timed(function, repeats)
        found[name] = {'seconds': seconds, 'tokens_per_second': tokens / median(seconds)}
        if torch.cuda.is_available():
            found[name]['peak_memory_mb'] = round(torch.cuda.max_memory_allocated() / 2**20)
            if median(seconds) < 2:     # or there is too much to be noted
                found[name]['profile'] = profile(function)
        print(name, json.dumps(found[name]), flush=True)
    return found


def nano_model(**shape):
    """The model of a checkout of nanoGPT, from scratch, with its rounded vocabulary of 50304 tokens."""
    spec = importlib.util.spec_from_file_location('nanogpt_model', Path(nanogpt) / 'model.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.GPT(module.GPTConfig(vocab_size=50304, bias=True, **shape)).cuda()


def speed_think(n_prompts, length=64, T=32):
    """Thoughts after prompts by a GPT-2 of 124M parameters in bfloat16, the prompts' reading included."""
    torch.manual_seed(0)
    config = ThinkingModelConfig(d_thought_vocab=64, tie_weights=True)
    model = GPT2Thinking(config).cuda().bfloat16().eval()
    prompt = torch.randint(50257, (n_prompts, length), device='cuda')
    noise = torch.rand(n_prompts, T, device='cuda')

    def think(prompt, noise):
        return model.think(prompt, T, noise=noise).tokens

    as_graph, with_fusion = recorded(think), recorded(think, fuse=True)
    for function in (as_graph, with_fusion):
        function(prompt, noise)
        function(prompt, noise)
    assert torch.equal(as_graph(prompt, noise), think(prompt, noise))
    ways = {'all read again for every thought': lambda: model.think(prompt, T, noise=noise, use_cache=False),
            'KV cache': lambda: think(prompt, noise), 'KV cache, one CUDA graph': lambda: as_graph(prompt, noise),
            'the same, kernels fused': lambda: with_fusion(prompt, noise)}
    if importlib.util.find_spec('transformers'):
        import transformers
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config()).cuda().bfloat16().eval()
        ways[f'transformers {transformers.__version__}'] = lambda: theirs.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=T, min_new_tokens=T, do_sample=True, top_k=0,
            pad_token_id=0)
    if nanogpt:
        nano = nano_model(block_size=1024).bfloat16().eval()
        ways['nanoGPT'] = lambda: nano.generate(prompt, T)
    return speeds(ways, n_prompts * T, repeats=3)


def speed_train(batch=32, length=1024):
    """
    Training steps of a GPT-2 of 124M parameters, bfloat16: as supervised_rollout_think.py makes them, compiled or not,
    and by nanoGPT's model and optimiser.
    """
    torch.manual_seed(0)
    tokens, targets = torch.randint(50257, (2, batch, length), device='cuda')
    flops = 6 * 124e6 + 12 * 12 * 768 * length      # per token, as nanoGPT counts
    torch.set_float32_matmul_precision('high')

    def stepper(model, optimizer, loss):
        def step():
            with torch.autocast('cuda', torch.bfloat16):
                value = loss(tokens, targets)
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
            optimizer.step()
            optimizer.zero_grad()
        return lambda: [step() for _ in range(5)]

    def ours(wrap):
        model = GPT2(ModelConfig()).cuda()
        return stepper(model, make_optimizer(model, 1e-4, .1), wrap(model.loss))

    found = {}
    makers = {'eager': lambda: ours(lambda loss: loss), 'compiled': lambda: ours(torch.compile)}
    if nanogpt:
        def theirs():
            model = nano_model(block_size=length)
            optimizer = model.configure_optimizers(.1, 1e-4, (.9, .95), 'cuda')
            compiled = torch.compile(model)
            return stepper(model, optimizer, lambda x, y: compiled(x, y)[1])
        makers['nanoGPT, compiled'] = theirs
    for name, make in makers.items():
        found |= speeds({name: make()}, 5 * batch * length)
        found[name]['mfu'] = found[name]['tokens_per_second'] * flops / (peak_flops(torch.device('cuda')) or math.nan)
    return found


def speed_script(script, ways, n, every=50):
    """
    Steps of a script with n tokens each, by its own log, for {name: arguments}; those of torchrun stand before a |.
    """
    found = {}
    for name, arguments in ways.items():
        *torchrun, arguments = arguments.split('|')
        folder = ROOT / f'out/bench/speed/{len(found)}'
        how = ['-m', 'torch.distributed.run', '--standalone', *torchrun[0].split()] if torchrun else []
        command = [sys.executable, *how, f'{script}.py', *arguments.split(), f'--out_dir={folder}',
                   f'--max_steps={6 * every + 1}', '--eval_every=10000', f'--log_every={every}']
        line = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, check=True).stdout
                          .splitlines()[-1])
        log = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
        log = [entry for entry in log if entry.keys() & {'loss', 'thinking_loss'}]
        seconds = [(after['seconds'] - before['seconds']) / every for before, after in itertools.pairwise(log[1:])]
        found[name] = {'seconds': seconds, 'tokens_per_second': n / median(seconds),
                       'peak_memory_mb': line['peak_memory_mb'],
                       'gradient_norm': {entry['step']: entry['gradient_norm'] for entry in log}}
        print(name, json.dumps(found[name]), flush=True)
    return found


def speed_blind(arguments, ways, n=64 * 32):
    """Steps of add_think_blind.py; the policies do not learn, so that they go on to explore."""
    still = '--learning_rate=0 --learning_rate_answer=0 --eval_questions=100'
    return speed_script('add_think_blind', {name: f'{arguments} {more} {still}' for name, more in ways.items()}, n)


def read_once(thinking, question, T, G):
    """Thoughts (N, T) and their log-probabilities (N, T), with gradient: rollouts that are alike are read once."""
    return thinking.think(question, T, n_rollouts=G, grad=True)[:2]


def read_each(thinking, question, T, G):
    """The same written down plainly: no cache, every rollout read by itself."""
    thoughts = thinking.think(question, T, n_rollouts=G, use_cache=False).tokens
    return thoughts, thinking.thought_log_probs(question.repeat_interleave(G, dim=0), thoughts)[0]


def policy_step(M, T, d_model, L=10, n_questions=64, G=32, think=read_once):
    """A step of policy gradient for both policies, of two layers: a function of questions (n_questions, 2)."""
    shape = dict(block_size=T + 1, n_layer=2, n_head=4, d_model=d_model, init='unit', tie_weights=False,
                 d_normal_vocab=M, d_thought_vocab=L)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    thinking = GPT2Thinking(ThinkingModelConfig(**shape, output_kind='thought')).to(device)
    answering = GPT2Thinking(ThinkingModelConfig(**shape, input_kind='thought', output_kind='normal')).to(device)
    optimizers = [make_optimizer(model, 0., 0., recorded=True) for model in (thinking, answering)]

    def step(question):
        thoughts, log_pi = think(thinking, question, T, G)                              # (n_questions G, T)
        right = (question.sum(1) % M).repeat_interleave(G)[:, None]
        log_q = answering.answer(thoughts).log_softmax(-1).gather(1, right).view(-1, G)
        weights = advantages(log_q.detach(), 'grpo')
        positive = weights.clamp(min=0) + 1e-9
        loss = -(weights * log_pi.sum(1).view(-1, G)).sum(1).mean()
        (loss - (positive / positive.sum(1, keepdim=True) * log_q).sum(1).mean()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    question = torch.randint(M, (n_questions, 2), device=device)
    return step, question


def speed_plain(M, T, d_model):
    """The same step as in FIVE written down plainly."""
    step, question = policy_step(M, T, d_model, think=read_each)
    return speeds({'eager, no cache, every rollout by itself': lambda: step(question)}, 64 * 32, repeats=20)


def speed_attention(n_rows=512, n=80):
    """Attention of one token to the 80 before it in 12 layers of GPT-2's size, bfloat16; GB of keys and values."""
    cache = KVCache(ModelConfig(), n_rows, n + 1, torch.device('cuda'), torch.bfloat16)
    cache.on_device += n
    cache.length = n
    q, k, v = torch.randn(n_rows, 3, 12, 1, 64, device='cuda', dtype=torch.bfloat16).unbind(1)
    for kept in itertools.chain(*cache.kv.values()):
        kept.normal_()

    def explicit(q, k, v):
        return (q @ k.transpose(-2, -1) / 8).softmax(-1) @ v

    def by(function, q):
        return [function(q, *cache.append(layer, k, v)) for layer in range(12)]

    def library(backend):
        def run(q):
            with torch.nn.attention.sdpa_kernel(backend):
                return by(torch.nn.functional.scaled_dot_product_attention, q)
        return run

    kernels = torch.nn.attention.SDPBackend
    ways = {'ours': lambda q: [attend_to_cache(layer, q, k, v, cache) for layer in range(12)],
            **{name: library(backend) for name, backend in (
                ('cuDNN', kernels.CUDNN_ATTENTION), ('flash', kernels.FLASH_ATTENTION),
                ('memory-efficient', kernels.EFFICIENT_ATTENTION))},
            'two products of matrices': lambda q: by(explicit, q)}
    exact = by(explicit, q)
    for name, way in ways.items():
        for found, right in zip(way(q), exact, strict=True):
            torch.testing.assert_close(found, right, atol=2e-2, rtol=2e-2)
        ways[name] = recorded(way)
        ways[name](q), ways[name](q)
    return speeds({name: lambda way=way: way(q) for name, way in ways.items()},
                  12 * 2 * n_rows * 768 * n * 2 / 1e9, repeats=20)


def speed_everywhere(S=256, T=4, n_rows=8):
    """An update by the thoughts of every position of eight sequences: of all at once, and one after another."""
    model = GPT2Thinking(ThinkingModelConfig(d_normal_vocab=65, d_thought_vocab=64, block_size=S + T, n_layer=6,
                                             n_head=6, d_model=384)).cuda()
    tokens, noise = torch.randint(65, (n_rows, S), device='cuda'), torch.rand(n_rows, S, T, device='cuda')

    def at_once():
        with torch.autocast('cuda', torch.bfloat16):
            _, log_probs, _, _, last = model.think_everywhere(tokens, noise, readers='own')
            (log_probs.mean() + model.logits(last, range(65)).mean()).backward()

    def in_turn():
        for s in range(S):
            with torch.autocast('cuda', torch.bfloat16):
                thoughts = model.think(tokens[:, :s + 1], T, noise=noise[:, s]).tokens
                log_probs, _, logits = model.think_and_answer(tokens[:, :s + 1], thoughts)
                (log_probs.mean() + logits.mean()).backward()

    def plain():
        with torch.autocast('cuda', torch.bfloat16):
            model.logits(model.hidden(tokens), range(65)).mean().backward()
    return speeds({'one position after another': in_turn}, n_rows * S * T, repeats=1) | speeds(
        {'all at once': at_once, 'no thoughts': plain}, n_rows * S * T)


def speed_write(n_prompts=16, length=64, n_new=64, G=8):
    """Rollouts of 64 characters with up to one thought before each, as rollout_think.py writes them, six layers."""
    model = GPT2Thinking(ThinkingModelConfig(d_normal_vocab=90, d_thought_vocab=64, block_size=256, n_layer=6, n_head=6,
                                             d_model=384)).cuda().eval()
    prompt = torch.randint(90, (n_prompts, length), device='cuda')
    noise = torch.rand(n_prompts * G, 2 * n_new, device='cuda')

    def write(prompt, noise):
        return model.write(prompt, n_new, 1, fixed=False, n_rollouts=G, noise=noise)

    ways = {'eager': write, 'one CUDA graph': recorded(write), 'the same, kernels fused': recorded(write, fuse=True)}
    for way in ways.values():
        way(prompt, noise)
    return speeds({name: lambda way=way: way(prompt, noise) for name, way in ways.items()}, n_prompts * G * n_new)


def speed_trl(n_prompts=64, G=32):
    """
    Steps of GRPO by TRL: 64 questions x 32 rollouts of two tokens, a model of two layers of 64 dimensions, one thread
    of a CPU; beside ours of the same size.
    """
    import datasets
    import transformers
    import trl
    from tokenizers import Tokenizer, models, pre_tokenizers
    torch.set_num_threads(1)
    os.environ['OMP_NUM_THREADS'] = '1'     # of ours, which follows, as well
    words = {**{str(i): i for i in range(100)}, **{f'think{i}': 100 + i for i in range(10)}, '<end>': 110}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token='<end>'))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token='<end>', pad_token='<end>')
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=111, n_positions=8, n_embd=64, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=110,
        pad_token_id=110))
    clock = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            clock.append(time.perf_counter())

    trl.GRPOTrainer(
        model=model, processing_class=tokenizer, callbacks=[Clock()],
        reward_funcs=lambda completions, **_: [float(len(text) % 2) for text in completions],
        train_dataset=datasets.Dataset.from_dict({'prompt': [f'{a} {b}' for a in range(100) for b in range(100)]}),
        args=trl.GRPOConfig(output_dir=ROOT / 'out/bench/speed/trl', per_device_train_batch_size=n_prompts * G,
                            num_generations=G, max_completion_length=2, max_steps=12, report_to=[], use_cpu=True,
                            beta=0., save_strategy='no', disable_tqdm=True, bf16=False, learning_rate=0.)).train()
    seconds = [after - before for before, after in itertools.pairwise(clock)]
    return {f'TRL {trl.__version__}': {'seconds': seconds, 'tokens_per_second': n_prompts * G / median(seconds)}}


BLIND = '--search=False --advantage=grpo --batch_size=64 --group_size=32 --n_layer=2 --n_head=4'
FIVE = f'{BLIND} --input_max=500 --think_len=3 --d_model=32'
TWICE = {'eager': '', 'one CUDA graph': '--compile=True', 'the same, kernels fused': '--compile=True --fuse=True'}
GPT2_124M = ('--data=data/shakespeare --think_len=0 --n_layer=12 --n_head=12 --d_model=768 --text_len=1024 '
             '--batch_size=128 --dtype=bfloat16 --compile=True --eval_sequences=1')
EVERYWHERE = ('--thought_kind=token --think_len=4 --at_once=1 --n_layer=6 '
              '--n_head=6 --d_model=384 --text_len=256 --batch_size=96 --dtype=bfloat16 --eval_sequences=1')
BY_TWO = {'one GPU': '--nproc_per_node=1|', 'two GPUs': '--nproc_per_node=2|'}
SPEED = {   # row: (device, what is timed, what a token is, function)
    'think-512': ('cuda', 'thoughts, GPT-2 124M, 512 prompts of 64 tokens, 32 thoughts each', 'tokens',
                  lambda: speed_think(512)),
    'think-1': ('cuda', 'the same, one prompt', 'tokens', lambda: speed_think(1)),
    'attention': ('cuda', 'attention of single tokens and their copy into the cache: 12 layers of GPT-2 124M, 512 rows '
                  'of 80 tokens', 'GB', speed_attention),
    'train': ('cuda', 'five training steps, GPT-2 124M, 32 sequences of 1024 tokens', 'tokens', speed_train),
    'everywhere': ('cuda', 'an update, four thoughts at each of 256 positions, 8 sequences, 6 layers of 384',
                   'thoughts', speed_everywhere),
    'write': ('cuda', '128 rollouts of 64 characters with up to one thought before each, 6 layers of 384', 'characters',
              speed_write),
    'two': ('cuda', f'a step of supervised_rollout_think.py {GPT2_124M}', 'tokens', lambda: speed_script(
        'supervised_rollout_think', {name: how + GPT2_124M for name, how in BY_TWO.items()}, 128 * 1024, 5)),
    'two-thoughts': ('cuda', f'a step of supervised_rollout_think.py {EVERYWHERE}', 'thoughts', lambda: speed_script(
        'supervised_rollout_think', {name: how + EVERYWHERE for name, how in BY_TWO.items()}, 96 * 4 * 256 * 4, 5)),
    'blind': ('cuda', f'a step of add_think_blind.py {FIVE}', 'rollouts',
              lambda: speed_plain(500, 3, 32) | speed_blind(FIVE, TWICE)),
    'blind-default': ('cuda', 'a step of add_think_blind.py', 'questions', lambda: speed_blind('', TWICE, 512)),
    'blind-cpu': ('cpu', f'a step of add_think_blind.py {FIVE}', 'rollouts',
                  lambda: speed_plain(500, 3, 32) | speed_blind(FIVE, {'rollouts that are alike read once': ''})),
    'trl': ('cpu', f'a step of add_think_blind.py {BLIND} --split=False --d_model=64, one thread', 'rollouts',
            lambda: speed_trl() | speed_blind(f'{BLIND} --split=False --d_model=64', {'ours': ''})),
}


def measure_speed(rows):
    """Time rows, one after another; write assets/results/speed-<row>.json for each."""
    for row in rows:
        device, what, unit, function = SPEED[row]
        command = f'python bench.py --suite=speed --only={row}'
        result = {'command': command, 'hardware': device_name(device), 'torch': torch.__version__,
                  'commit': git_commit(), 'what': what, 'unit': unit, 'runs': function()}
        keep(f'speed-{row}', result)


def speed_table():
    """What was measured of speed, in Markdown."""
    lines = []
    for row in SPEED:
        if result := stored(f'speed-{row}'):
            what, on = result['what'], f'{result["hardware"]}, torch {result["torch"]}'
            for name, run in result['runs'].items():
                milliseconds = [1000 * s for s in run['seconds']]
                row = (what, name, f'{median(milliseconds):.2f} ({min(milliseconds):.2f} to {max(milliseconds):.2f})',
                       f'{run["tokens_per_second"]:,.0f} {result["unit"]}', run.get('peak_memory_mb', ''),
                       f'{run["mfu"]:.3f}' if 'mfu' in run else '', on)
                lines.append(row)
                what = on = ''
    return markdown(['what', 'way', 'milliseconds', 'per second', 'memory, MB', 'MFU', 'on'], lines)


def profile_table():
    """Where the time of what speed measured goes on a GPU, in Markdown."""
    lines = []
    for row in ('think-512', 'think-1', 'train', 'blind'):
        result = stored(f'speed-{row}') or {'runs': {}}
        for name, run in result['runs'].items():
            if 'profile' in run:
                whole = 1000 * median(run['seconds'])
                parts = [*run['profile'].values(), max(0., whole - sum(run['profile'].values()))]
                shares = [f'{100 * part / max(whole, sum(parts)):.0f}%' for part in parts]
                what = '' if name != next(iter(result['runs'])) else result['what']
                lines.append([what, name, f'{whole:.1f}', *shares])
    return markdown(['what', 'way', 'milliseconds', *KINDS, 'waits'], lines)


# ---- what a step costs as things grow -------------------------------------------------------------------------------

BASE = {'think_len (T)': 2, 'd_thought_vocab (L)': 10, 'input_max (M)': 100, 'group_size (G)': 16, 'text_len (S)': 64}
GROW = {'think_len (T)': (1, 2, 4, 8, 16), 'd_thought_vocab (L)': (10, 100, 1000, 10000),
        'input_max (M)': (100, 1000, 10000), 'group_size (G)': (4, 16, 64, 256),
        'text_len (S)': (32, 64, 128, 256, 512)}


def text_step(S, T=4, n_rows=4):
    """An update by four thoughts at each of S positions of four sequences, two layers of 64: a function of tokens."""
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    model = GPT2Thinking(ThinkingModelConfig(d_normal_vocab=65, d_thought_vocab=64, block_size=S + T, n_layer=2,
                                             n_head=4, d_model=64)).to(device)
    noise = torch.rand(n_rows, S, T, device=device)

    def step(tokens):
        _, log_probs, _, _, last = model.think_everywhere(tokens, noise)
        (log_probs.mean() + model.logits(last, range(65)).mean()).backward()
    return step, torch.randint(65, (n_rows, S), device=device)


def measure_scaling():
    """Milliseconds of a step as one thing grows and the others stay as in BASE."""
    device, found = 'cuda' if torch.cuda.is_available() else 'cpu', {}
    for name, values in GROW.items():
        found[name] = {}
        for value in values:
            T, L, M, G, S = (BASE | {name: value}).values()
            step, given = text_step(S) if 'text' in name else policy_step(M, T, 64, L, G=G)
            step = recorded(step)
            step(given)
            seconds = timed(lambda step=step, given=given: step(given), repeats=10)
            found[name][value] = [round(1000 * s, 3) for s in (median(seconds), min(seconds), max(seconds))]
            print(name, value, found[name][value], flush=True)
            del step
    result = {'command': 'python bench.py --suite=scaling', 'hardware': device_name(device),
              'torch': torch.__version__, 'commit': git_commit(), 'milliseconds': found}
    keep(f'scaling-{device}', result)


def scaling_results():
    """What was measured of scaling, on a CPU and on a GPU."""
    return [result for device in ('cpu', 'cuda') if (result := stored(f'scaling-{device}'))]


def scaling_picture():
    """A figure of these results."""
    subplots = need('plotly.subplots', 'to draw pictures')
    figure = subplots.make_subplots(1, len(GROW), subplot_titles=list(GROW), shared_yaxes=True)
    for colour, result in zip(('firebrick', 'teal'), scaling_results()):
        for column, times in enumerate(result['milliseconds'].values(), 1):
            figure.add_scatter(x=list(map(int, times)), y=[median for median, *_ in times.values()], row=1, col=column,
                               name=result['hardware'], line_color=colour, showlegend=column == 1)
    for column, values in enumerate(GROW.values(), 1):
        figure.update_xaxes(type='log', tickvals=values, ticktext=[f'{value:,}' for value in values], col=column)
    figure.update_yaxes(type='log', tickvals=[1, 3, 10, 30, 100, 300, 1000], gridcolor='#dddddd')
    figure.update_yaxes(title='milliseconds a step', row=1, col=1)
    figure.update_layout(width=1200, height=400, plot_bgcolor='white', margin={'t': 40, 'b': 20, 'l': 70, 'r': 20},
                         legend={'orientation': 'h', 'y': -.12}, showlegend=True)
    return figure


def scaling_table():
    """What was measured of scaling, in Markdown."""
    lines = []
    for result in scaling_results():
        on = f'{result["hardware"]}, torch {result["torch"]}'
        for name, times in result['milliseconds'].items():
            lines.append([name, ', '.join(f'{value}: {t[0]:.3g}' for value, t in times.items()), on])
            on = ''
    return markdown(['what grows', 'milliseconds a step', 'on'], lines)


# ---- weightings -----------------------------------------------------------------------------------------------------

ESTIMATORS = {      # name: (kind, tau)
    **{kind: (kind, 1.) for kind in ('raw', 'reinforce', 'rloo', 'dr_grpo', 'grpo', 'batch_std', 'quantile',
                                     'quantile_batch')},
    'softmax, tau 1': ('softmax', 1.), 'softmax, tau 1, less 1/G': ('softmax_centred', 1.),
    'softmax, tau .1': ('softmax', .1), 'softmax, tau .1, less 1/G': ('softmax_centred', .1),
    'softmax_quantile, tau 1': ('softmax_quantile', 1.), 'best': ('best', 1.)}
GROUPS = (2, 4, 8, 16, 32, 64)
STATES = {'untrained': 0., 'quarter': .25, 'most': .75}     # row: share of rollouts that are right when training ends

one_at_a_time = threading.Lock()


class Enumerated:
    """
    A thinking policy of which everything can be worked out: 64 questions a, b < 8, all 64 codes of two thoughts, and
    what each code is worth for each question, (64, 64): 'sparse' 1 for the one right code, a random one for each
    answer, else 0; 'dense' log p(answer | code) of a reader that favours answers by how many thoughts are theirs.
    level: teach the policy the right codes, by cross-entropy, until this share of its rollouts is right.
    """

    def __init__(self, seed, level=0., M=8, L=8, T=2):
        with one_at_a_time:     # threads share the random numbers
            torch.manual_seed(seed)
            self.model = GPT2Thinking(ThinkingModelConfig(
                block_size=T + 1, n_layer=1, n_head=4, d_model=32, init='unit', tie_weights=False, d_normal_vocab=M,
                d_thought_vocab=L, output_kind='thought'))
            right = torch.randperm(L ** T)[:M]                                                      # (M,)
        self.question = torch.cartesian_prod(torch.arange(M), torch.arange(M))                      # (Q, 2)
        self.codes = self.model.spell(torch.arange(L ** T), T)                                      # (C, T)
        answer = self.question.sum(1) % M                                                           # (Q,)
        alike = (self.codes[:, None] == self.codes[right]).sum(-1)                                  # (C, M) thoughts
        self.rewards = {'sparse': (torch.arange(L ** T) == right[answer][:, None]).float(),
                        'dense': (2. * alike).log_softmax(1).T[answer]}
        self.steps = 0
        self.climb(lambda log_pi: (log_pi * self.rewards['sparse']).sum(1), 300, level)

    def climb(self, aim, n_steps, level=2.):
        """Up to n_steps of Adam up the mean of aim(log pi), until a share `level` of rollouts is right."""
        optimizer = torch.optim.Adam(self.model.parameters(), 3e-3)
        for _ in range(n_steps):
            log_pi = self.log_pi(self.question)
            if (log_pi.exp() * self.rewards['sparse']).sum(1).mean() >= level:
                break
            (-aim(log_pi).mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
            self.steps += 1

    def log_pi(self, question):
        """Log-probabilities (n, C) of all codes after questions (n, 2), with gradient."""
        many = question.repeat_interleave(len(self.codes), dim=0)
        return self.model.thought_log_probs(many, self.codes.repeat(len(question), 1))[0].sum(1).view(len(question), -1)

    def value(self, reward):
        """The expected reward of a rollout, with gradient."""
        return (self.log_pi(self.question).exp() * self.rewards[reward]).sum(1).mean()

    def jacobian(self):
        """The gradient of every log pi(code | question), (Q C, parameters)."""
        weights, rows = list(self.model.parameters()), []
        for question in self.question:
            log_pi = self.log_pi(question[None])[0]
            parts = torch.autograd.grad(log_pi, weights, torch.eye(len(log_pi)), is_grads_batched=True,
                                        materialize_grads=True)
            rows.append(torch.cat([part.flatten(1) for part in parts], dim=1))
        return torch.cat(rows)

    def exact(self, pi, reward):
        """The gradient of the expected reward as weights (Q C,) of the rows of the Jacobian."""
        return (pi * self.rewards[reward]).flatten() / len(pi)


def weigh(rewards, name, baseline):
    """The weights of an estimator for many batches of groups, both (n, groups, G)."""
    kind, tau = ESTIMATORS[name]
    if kind in ('batch_std', 'quantile_batch'):
        return torch.stack([advantages(batch, kind) for batch in rewards])
    return advantages(rewards.flatten(0, 1), kind, tau, baseline).view(rewards.shape)


def compare(weights, which, gram, exact, blocks=20):
    """
    Estimates of the gradient, each the sum of rows `which` (n, S) of the Jacobian by weights, {name: (n, S)}, beside
    the exact one, the sum of all rows by exact (R,). All that is asked for are lengths and angles, and gram (R, R), the
    products of rows, knows those. The squared length of the mean estimate is that of products of different blocks of
    estimates, which noise does not lengthen; standard errors of the mean are by leaving out one block after another.

    Returns {name: numbers}: cosine of one estimate with the exact gradient (mean, standard error), its relative length,
    cosine of the mean estimate (value, standard error), relative error of the mean estimate, and the variance of one
    (trace of the covariance) relative to the squared length of the mean.
    """
    n, along = len(which), gram @ exact
    length = (exact @ along).sqrt()
    all_weights = torch.stack(list(weights.values()), dim=1)                                        # (n, K, S)
    square = torch.cat([(all_weights[part] @ gram[which[part, :, None], which[part, None]] * all_weights[part]).sum(-1)
                        for part in torch.arange(n).split(200)])                                    # (n, K)
    inner, found = (all_weights * along[which][:, None]).sum(-1), {}                                # (n, K)
    for k, (name, weight) in enumerate(weights.items()):
        mean_of = torch.zeros(blocks, len(gram)).scatter_add_(
            1, which.view(blocks, -1), weight.reshape(blocks, -1) * blocks / n)                     # (blocks, R)
        products, to_exact = mean_of @ gram @ mean_of.T, mean_of @ along

        def of_mean(left, products=products, to_exact=to_exact):
            m = len(left)
            between = (products[left][:, left].sum() - products[left, left].sum()) / (m * (m - 1))
            return to_exact[left].mean() / (between.clamp(min=1e-30).sqrt() * length), between
        direction, between = of_mean(torch.arange(blocks))
        without = torch.stack([of_mean(torch.arange(blocks - 1) + (torch.arange(blocks - 1) >= b))[0]
                               for b in range(blocks)])
        error = between - 2 * to_exact.mean() + length**2
        each = inner[:, k] / (square[:, k].sqrt() * length).clamp(min=1e-30)     # an estimate of length 0 has cosine 0
        numbers = {'cosine': each.mean(), 'cosine_error': each.std() / n**.5,
                   'length': square[:, k].sqrt().mean() / length, 'mean_cosine': direction,
                   'mean_cosine_error': (without.var(correction=0) * (blocks - 1)).sqrt(),
                   'bias': error.clamp(min=0).sqrt() / length,
                   'variance': (square[:, k].mean() - between) / between.clamp(min=1e-30)}
        found[name] = {key: float(f'{value.item():.5g}') for key, value in numbers.items()}
    return found


def gradient(suite, row, seed, samples=256, n=1000):
    """Every estimator at every group size beside the exact gradient, from as many rollouts each; see compare."""
    small = Enumerated(seed, STATES[row])
    with torch.no_grad():
        pi = small.log_pi(small.question).exp()                                                     # (Q, C)
    jacobian = small.jacobian()
    gram = jacobian @ jacobian.T
    values = {reward: (pi * worth).sum(1).mean().item() for reward, worth in small.rewards.items()}
    result = {'seed': seed, 'steps': small.steps, 'groups': GROUPS, 'value': values, 'sparse': {}, 'dense': {}}
    generator = torch.Generator().manual_seed(seed)
    for G in GROUPS:
        at = torch.randint(len(pi), (n * samples // G,), generator=generator)           # of a group
        code = pi[at].multinomial(G, replacement=True, generator=generator)                         # (n groups, G)
        which = (at[:, None] * pi.shape[1] + code).view(n, samples)
        for reward, worth in small.rewards.items():
            got = worth[at[:, None], code].view(n, -1, G)
            weights = {name: weigh(got, name, values[reward]).view(n, samples) * G / samples for name in ESTIMATORS}
            for name, numbers in compare(weights, which, gram, small.exact(pi, reward)).items():
                for key, number in numbers.items():
                    result[reward].setdefault(name, {}).setdefault(key, []).append(number)
    if row == 'untrained':      # where the exact gradient itself leads to
        small.climb(lambda log_pi: (log_pi.exp() * small.rewards['sparse']).sum(1), 100)
        with torch.no_grad():
            pi = small.log_pi(small.question).exp()
        result['climbed'] = {'value': (pi * small.rewards['sparse']).sum(1).mean().item(),
                             'share_of_one_code': pi.mean(0).max().item()}
    print(row, seed, small.steps, values, flush=True)
    return result


def over_models(runs, reward, name, G, key):
    """Mean of a number over models, and the half width of its 95% confidence interval (Student's t)."""
    values = [run[reward][name][key][GROUPS.index(G)] for run in runs]
    t = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}.get(len(values), 1.96)
    return mean(values), t * stdev(values) / len(values)**.5 if len(values) > 1 else math.nan


def gradient_table():
    """What the gradient suite found, in Markdown: an estimator a row."""
    found = {row: result for row in SUITES['gradient'] if (result := stored(f'gradient-{row}'))}
    if not found:
        return ''
    one, cells = next(iter(found.values())), [(reward, row) for reward in ('sparse', 'dense') for row in found]
    said = [f'{len(one["runs"])} models, on {one["hardware"]}, torch {one["torch"]}.']

    def show(title, text):
        heads = [f'{reward}, {SUITES["gradient"][row][3]}' for reward, row in cells]
        lines = [[name, *(text(found[row]['runs'], reward, name) for reward, row in cells)] for name in ESTIMATORS]
        said.append(f'{title}\n\n{markdown(["", *heads], lines)}')
    show('Cosine of one estimate with the exact gradient, for groups of 2 / 8 / 64:', lambda *which: ' / '.join(
        f'{over_models(*which, G, "cosine")[0]:.2f}' for G in (2, 8, 64)))
    show('Cosine of the mean of many estimates with it, that is, bias of direction, for groups of 2 / 8 / 64:',
         lambda *which: ' / '.join(f'{over_models(*which, G, "mean_cosine")[0]:.2f}' for G in (2, 8, 64)))
    show('Groups of 8: relative error of the mean estimate, its length included; variance of one relative to the '
         "mean's squared length:", lambda *which: '; '.join(
             f'{over_models(*which, 8, key)[0]:.{n}f}' for key, n in (('bias', 2), ('variance', 1))))
    return '\n\n'.join(said)


def gradient_picture():
    """What the gradient suite found, a figure: bands are 95% confidence intervals over models."""
    graph, subplots = (need(f'plotly.{name}', 'to draw pictures') for name in ('graph_objects', 'subplots'))
    panels = [(reward, row) for reward in ('sparse', 'dense') for row in ('untrained', 'quarter')]
    measures = {'cosine': 'one estimate of 256 rollouts', 'mean_cosine': 'the mean of many (bias)',
                'variance': 'variance / squared mean'}
    lines = {'rloo': ('#000000', 'solid'), 'reinforce': ('#000000', 'dot'), 'grpo': ('#0072B2', 'solid'),
             'quantile': ('#56B4E9', 'solid'), 'quantile_batch': ('#56B4E9', 'dot'), 'best': ('#CC79A7', 'solid'),
             'softmax, tau .1': ('#D55E00', 'solid'), 'softmax, tau .1, less 1/G': ('#D55E00', 'dot'),
             'softmax, tau 1': ('#009E73', 'solid'), 'softmax, tau 1, less 1/G': ('#009E73', 'dot')}
    figure = subplots.make_subplots(
        3, 4, shared_xaxes=True, vertical_spacing=.035, horizontal_spacing=.035, column_titles=[
            f'<b>{"right or wrong: 1 or 0" if reward == "sparse" else "log p(answer)"}</b><br>'
            f'{SUITES["gradient"][row][3]}' for reward, row in panels])
    for column, (reward, row) in enumerate(panels, 1):
        runs = stored(f'gradient-{row}')['runs']
        for line, key in enumerate(measures, 1):
            for name, (colour, dash) in lines.items():
                middle, half = zip(*(over_models(runs, reward, name, G, key) for G in GROUPS))
                if key != 'variance':
                    figure.add_scatter(
                        x=[*GROUPS, *GROUPS[::-1]], fill='toself', fillcolor=colour, opacity=.08, line_width=0,
                        mode='lines', showlegend=False, hoverinfo='skip', row=line, col=column,
                        y=[m + h for m, h in zip(middle, half)] + [m - h for m, h in zip(middle, half)][::-1])
                figure.add_scatter(x=GROUPS, y=middle, name=name, mode='lines+markers', line={'color': colour,
                                   'dash': dash, 'width': 2}, marker={'size': 6, 'color': colour},
                                   showlegend=line == column == 1, row=line, col=column)
    figure.update_xaxes(type='log', tickvals=GROUPS, ticktext=GROUPS, gridcolor='#dddddd', linecolor='#444444')
    figure.update_yaxes(gridcolor='#dddddd', zerolinecolor='#888888', linecolor='#444444')
    figure.update_xaxes(title='group size G', row=3)
    for line, (key, title) in enumerate(measures.items(), 1):
        figure.update_yaxes(row=line, **({'type': 'log', 'range': [-.2, 3]} if key == 'variance' else
                                         {'range': [-.45, 1.12] if line == 2 else [-.15, .8]}))
        figure.update_yaxes(title=title if key == 'variance' else f'cosine to exact gradient:<br>{title}', row=line,
                            col=1)
    figure.update_layout(title={'text': 'Estimates of a policy gradient beside the exact one, from 256 rollouts each: '
                                        'mean and 95% interval over models', 'x': .5, 'y': .98},
                         width=1500, height=1080, plot_bgcolor='white', font={'size': 15, 'color': '#222222'},
                         margin={'l': 90, 'r': 20, 't': 110, 'b': 130},
                         legend={'orientation': 'h', 'y': -.09, 'x': .5, 'xanchor': 'center', 'font': {'size': 15}})
    return figure


def sampled_groups(suite, row, seed, N=512, G=16):
    """
    Rewards of N groups of G rollouts, by (state of the model, depth of the questions): 'sparse' 1 for the right
    hand-made thoughts (blind) or for thoughts after which the right answer is the most likely, else 0; 'dense' log
    p(answer). The models are those of the row's command, and the same untrained; both suites share those of sparsity.
    """
    found, still = {}, ['--max_steps=1', '--learning_rate=0', *['--learning_rate_answer=0'] * (row == 'blind')]
    for state, more in {'untrained': still, 'half-trained': []}.items():
        folder = ROOT / f'out/bench/sparsity-{row}/{seed}-{state}'
        if suite == 'sparsity' or not (folder / 'ckpt.pt').exists():
            run('sparsity', row, seed, folder.name, *more)
        checkpoint = torch.load(folder / 'ckpt.pt', weights_only=True)
        models = {name: unpack(packed) for name, packed in checkpoint['models'].items()}
        knob, generator = checkpoint['knobs'], torch.Generator().manual_seed(seed)
        for depth in (1,) if row == 'blind' else (2, 3, 4, 6):
            with torch.no_grad():
                if row == 'blind':
                    M, L, T = (knob[name] for name in ('input_max', 'd_thought_vocab', 'think_len'))
                    question = torch.randint(M, (N, 2), generator=generator)
                    answer = question.sum(1).repeat_interleave(G) % M                               # (N G,)
                    thoughts = models['thinking'].think(question, T, n_rollouts=G, noise=torch.rand(
                        N * G, T, generator=generator)).tokens                                      # (N G, T)
                    log_q = models['answering'].answer(thoughts).log_softmax(-1)                    # (N G, M)
                    right = ((thoughts - M) == digits(answer, T, L)).all(1)
                else:
                    task = SerialTask(knob['task'], knob['input_max'], n_letters=knob['n_letters'], seed=seed)
                    question, states = task.draw(N, depth, generator)
                    answer, model = states[:, -1].repeat_interleave(G), models['model']
                    places = torch.arange(question.shape[1])
                    places[-1] = 0      # recount
                    thoughts = model.think(question, depth - 1, positions=places, n_rollouts=G, noise=torch.rand(
                        N * G, depth - 1, generator=generator)).tokens
                    log_q = torch.cat([model.think_and_answer(*part, positions=places)[2]
                                       for part in zip(question.repeat_interleave(G, dim=0).split(1024),
                                                       thoughts.split(1024))])[:, :task.n_states].log_softmax(-1)
                    right = log_q.argmax(-1) == answer
            found[state, depth] = {'sparse': right.float().view(N, G),
                                   'dense': log_q.gather(1, answer[:, None]).view(N, G)}
    return found


def rounded(numbers):
    """Numbers of a dict with five digits each."""
    return {key: float(f'{value:.5g}') for key, value in numbers.items()}


def sparsity(suite, row, seed):
    """How often groups have something to learn from, and how large linear advantages are then."""
    result = {}
    for (state, depth), rewards in sampled_groups(suite, row, seed).items():
        right, dense = rewards['sparse'].sum(1), rewards['dense']
        low, middle, high = dense.flatten().quantile(torch.tensor([.1, .5, .9])).tolist()
        result[f'{state}, depth {depth}'] = rounded({
            'right_of_16': right.mean().item(), 'none': (right == 0).float().mean().item(),
            'all': (right == dense.shape[1]).float().mean().item(), 'dense_10': low, 'dense_50': middle,
            'dense_90': high, 'dense_std_in_group': dense.std(1, correction=0).mean().item(),
            **{f'{kind}_{reward}': dense.shape[1] * advantages(got, kind).abs().mean().item()
               for reward, got in rewards.items() for kind in ('dr_grpo', 'grpo')}})
    print(row, seed, json.dumps(result), flush=True)
    return result


def weights(suite, row, seed):
    """
    Where estimators put their weight, for the same groups: on the right rollouts, as a share of all that is positive,
    in the whole batch; then in groups with right and wrong ones: largest share, entropy, effective number.
    """
    result = {}
    for (state, depth), rewards in sampled_groups(suite, row, seed).items():
        right = rewards['sparse'] == 1
        mixed = right.any(1) & ~right.all(1)
        for reward, got in rewards.items():
            for name, (kind, tau) in ESTIMATORS.items():
                if 'less' in name:
                    continue
                weight = advantages(got, kind, tau, got.mean())
                positive = weight.clamp(min=0)
                share = weight[mixed].abs() / weight[mixed].abs().sum(1, keepdim=True).clamp(min=1e-9)
                result.setdefault(f'{state}, depth {depth}, {reward}', {})[name] = rounded({
                    'on_right': (positive[right].sum() / positive.sum().clamp(min=1e-9)).item(),
                    'entropy': -torch.special.xlogy(share, share).sum(1).mean().item(),
                    **concentration(weight[mixed])}) if mixed.any() else None
    print(row, seed, json.dumps(result), flush=True)
    return result


EARLY = (10, 20, 30, 100, 300, 1000)


def steadiness(row, log):
    """
    Of a training's log: the share of right answers at early steps, variance and decay of the gradient's norm, effective
    number of rollouts, and whether it collapsed: thoughts without entropy (.05 nats) and less than half right.
    """
    success = {line['step']: line['accuracy'] for line in log if 'accuracy' in line}
    norms, few, entropy = ([line[key] for line in log if key in line]
                           for key in ('gradient_norm', 'effective_n', 'entropy'))
    quarter = len(norms) // 4 or 1
    return {'task': row.partition('-')[0], 'early': {step: success[step] for step in EARLY if step in success},
            'norm_variance': variance(norms) / max(mean(norms), 1e-12)**2 if len(norms) > 1 else 0.,
            'norm_decay': mean(norms[-quarter:]) / max(mean(norms[:quarter]), 1e-12),
            'effective_n': mean(few) if few else None,
            'collapsed': bool(entropy) and mean(entropy[-3:]) < .05 and success[max(success)] < .5}


def verdict(runs):
    """
    Better or worse than rloo, for reasons that hold for all seeds, each beside the same seed of rloo: succeeds more or
    less at the end (by .01), is ahead at step 10, 20 or 30 (by .01), has steadier gradients (variance of the norm,
    relative to its mean, a fifth less); or gradients vanish (to 1% while under .9 are right), or effective n is below
    1.5. Reasons on both sides: success decides. None, or only some seeds: inconclusive.
    """
    others = stored(f'weighting-{runs[0]["task"]}-rloo') or {'runs': []}
    others = {run['changed'].get('seed', 0): run for run in others['runs']}
    pairs = [(run, others[seed]) for run in runs if (seed := run['changed'].get('seed', 0)) in others]
    if not pairs or all(run == other for run, other in pairs):
        return ''
    gain = [run['accuracy'] - other['accuracy'] for run, other in pairs]
    ahead = [[run['early'][step] - other['early'][step] for run, other in pairs] for step in ('10', '20', '30')
             if all(step in one['early'] for pair in pairs for one in pair)]
    better = {'succeeds more': min(gain) > .01, 'faster early': any(min(gains) > .01 for gains in ahead),
              'steadier gradients': all(run['norm_variance'] < .8 * other['norm_variance'] for run, other in pairs)}
    worse = {'succeeds less': max(gain) < -.01,
             'gradients vanish': all(run['norm_decay'] < .01 and run['accuracy'] < .9 for run, _ in pairs),
             'effective n near 1': all((run['effective_n'] or 9) < 1.5 for run, _ in pairs)}
    word = 'inconclusive'
    if any(better.values()) != any(worse.values()):
        word = 'better' if any(better.values()) else 'worse'
    elif better['succeeds more'] or worse['succeeds less']:
        word = 'better' if better['succeeds more'] else 'worse'
    return ': '.join([word, *[', '.join(why for why, holds in (better | worse).items() if holds)]]).removesuffix(': ')


COUNTS = {  # what a question counts of which a share p of rollouts is right, for rewards of 1 or 0
    'rloo': 'p (1 - p)', 'dr_grpo': 'the same', 'grpo': 'its root', 'softmax-sharp': '1 - p, where none is right 1',
    'softmax_centred-sharp': '1 - p, where none is right 0', 'best': 'as softmax, tau .1',
    'softmax': 'nearly 1, always'}


def weighting_summary():
    """The share of right answers at the end, means over seeds: a weighting a row, a task a column, in Markdown."""
    lines = []
    for row, (how, _) in (WEIGHTINGS | {'reinforce': ('--advantage=reinforce', '')}).items():
        found = [stored(f'weighting-{task}-{row}') for task in WEIGHED]
        lines.append([as_code(how), COUNTS.get(row, ''), *(
            f'{mean(run["accuracy"] for run in result["runs"]):.2f}' if result else '' for result in found)])
    return markdown(['', 'what a question counts', *WEIGHED], lines)


def sparsity_table():
    """What the sparsity suite found, in Markdown: a task, state and depth a row."""
    lines, heads = [], ('right of 16', 'groups with none', 'with all right', 'log p(answer), 10% / 50% / 90%',
                        'its std in a group', 'mean size of dr_grpo, sparse / dense', 'of grpo')
    for row in SUITES['sparsity']:
        if result := stored(f'sparsity-{row}'):
            for case in result['runs'][0]:
                runs = [one[case] for one in result['runs']]
                said = [f'{mean(one[key] for one in runs):.2f}' for key in ('right_of_16', 'none', 'all')]
                said.append(' / '.join(f'{mean(one[f"dense_{q}"] for one in runs):.2f}' for q in (10, 50, 90)))
                said.append(f'{mean(one["dense_std_in_group"] for one in runs):.2f}')
                said += [' / '.join(f'{mean(one[f"{kind}_{reward}"] for one in runs):.2f}'
                                    for reward in ('sparse', 'dense')) for kind in ('dr_grpo', 'grpo')]
                lines.append([row, case, *said])
                on = f'{len(result["runs"])} seeds, on {result["hardware"]}, torch {result["torch"]}.'
    if not lines:
        return ''
    above = ''.join(f'`{row}` is `python {script}.py {arguments}`. '
                    for row, (_, script, arguments, _) in SUITES['sparsity'].items())
    return f'{above}{on}\n\n{markdown(["task", "model, questions", *heads], lines)}'


def weights_table():
    """What the weights suite found for half-trained models, in Markdown: an estimator a row."""
    cells = {'blind': ('half-trained, depth 1, sparse', 'half-trained, depth 1, dense'),
             'perm': ('half-trained, depth 2, sparse', 'half-trained, depth 2, dense'),
             's5': ('half-trained, depth 2, sparse', 'half-trained, depth 2, dense')}
    found = [(f'{row}, {case}', [run[case] for run in result['runs'] if run[case]])
             for row, cases in cells.items() if (result := stored(f'weights-{row}')) for case in cases]
    found = [(head, runs) for head, runs in found if runs]
    if not found:
        return ''
    lines = []
    for name in found[0][1][0]:
        lines.append([name, *(' / '.join(f'{mean(run[name][key] for run in runs):.{n}f}' for key, n in (
            ('on_right', 2), ('max_weight', 2), ('entropy', 2), ('effective_n', 1))) for _, runs in found)])
    return ('On the right rollouts / largest share / entropy / effective number of 16:\n\n'
            + markdown(['', *(head for head, _ in found)], lines))


# ---- tables ---------------------------------------------------------------------------------------------------------

def spread(values, n_digits):
    """Mean and range of some numbers, one number where they are all the same."""
    low, high = (f'{v:.{n_digits}f}' for v in (min(values), max(values)))
    return low if low == high else f'{mean(values):.{n_digits}f} ({low} to {high})'


def curve(runs, name, n_digits):
    """A number at the evaluations of some runs, their mean, at six of the steps."""
    steps = runs[0]['curve']['step']
    shown = sorted({round(i * (len(steps) - 1) / 5) for i in range(6)})
    return ', '.join(f'{steps[i]}: {mean(run["curve"][name][i] for run in runs):.{n_digits}f}' for i in shown)


def columns(suite, runs):
    """What a suite's table says of the runs of a row: {heading: text}."""
    kinds = ('shuffled', 'random', 'constant', 'none')      # of other thoughts

    def of(key, n_digits):
        return spread([run[key] for run in runs], n_digits)

    def when(key, n_digits=0):      # of those that got there
        reached = [run[key] for run in runs if run[key] is not None]
        return f'{spread(reached, n_digits)}, {len(reached)} of {len(runs)}' if reached else 'never'

    if suite == 'origin':
        return {f'another {name}': of(key, 2) for key, name in (
            ('noise', 'draw of questions and noise'), ('thinking', 'thinking policy'),
            ('answering', 'answering policy'))}
    if suite == 'reach':
        reached = [run for run in runs if run['step_of_99'] is not None]
        return {'reach .99': f'{len(reached)} of {len(runs)}',
                'seconds until then': spread([run['seconds_of_99'] for run in reached], 1) if reached else '',
                'questions until then': spread([run['step_of_99'] * run['batch_size'] for run in reached], 0)
                if reached else '', 'seconds in all': of('seconds', 1)}
    if suite == 'lengths':
        return {'thoughts': spread([run.get('thoughts', run['changed'].get('think_len', 2)) for run in runs], 1),
                'seconds': of('seconds', 1)}
    if suite in ('code', 'capacity', 'dealt', 'paid'):
        unit = 'step' if suite in ('dealt', 'paid') else 'seconds'
        return {'accuracy': of('accuracy', 3), 'codes': of('codes', 0),
                f'all right at {unit}': when(f'{unit}_to_all', int(unit == 'seconds')),
                'seconds': of('seconds', 1)}
    if suite == 'free':
        depths = [str(depth) for depth in runs[0]['accuracy_at_depth']]
        return {f'{what} at depth {depths[0]} to {depths[-1]}': ' / '.join(
                    f'{mean(run[key][depth] for run in runs):.{n_digits}f}' for depth in depths)
                for what, key, n_digits in (('accuracy', 'accuracy_at_depth', 3), ('thoughts', 'thoughts_at_depth', 2))}
    if suite in ('thinking', 'needs', 's5', 'buys'):
        said = {'held out': of('heldout_accuracy', 3)}
        if suite != 'needs':
            used = [run['ablation'] for run in runs if 'ablation' in run]
            said[' / '.join(kinds)] = ' / '.join(f'{mean(run[kind] for run in used):.3f}' for kind in kinds if used)
        if suite == 's5':
            for depth in ('16', '32', '64'):
                tried = [run['accuracy_at_depth'][depth] for run in runs if depth in run.get('accuracy_at_depth', {})]
                said[f'at depth {depth}'] = spread(tried, 3) if tried else ''
        return {**said, 'depth': of('depth', 1), 'step of .99': when('step_of_99'), 'seconds': of('seconds', 0)}
    if suite == 'math':
        names = {'accuracy': 'val_accuracy', **{f'at level {level}': f'val_accuracy_at_{level}' for level in
                                                runs[0]['accuracy_at_level']}, 'format': 'val_format'}
        said = {f'{name}, before → after': f'{mean(run["curve"][key][0] for run in runs):.3f} → '
                f'{spread([run["curve"][key][-1] for run in runs], 3)}' for name, key in names.items()}
        for name, key in (('mixed groups', 'mixed'), ('norm of the gradient', 'gradient_norm'),
                          ('effective n', 'effective_n')):      # of all steps
            said[name] = spread([mean(run['curve'][key]) for run in runs], 2)
        return {**said, 'accuracy by step': curve(runs, 'val_accuracy', 3), 'seconds': of('seconds', 0)}
    if suite in ROLLOUTS:
        said = {}
        for name, key, n_digits in (('perplexity', 'perplexity', 2), ('distinct-4', 'distinct_4', 3),
                                    ('repeated 8-grams', 'repeated_8', 4), ('thoughts a token', 'thoughts', 3)):
            said[name] = of(key, n_digits) if key in runs[0] else ''
            if key in ('perplexity', 'distinct_4'):
                said[f'{name} by step'] = curve(runs, key, n_digits - 1) if 'curve' in runs[0] else ''
        swapped = [{kind: math.exp(loss) for kind, loss in run['ablation'].items() if kind != 'own'} for run in runs]
        said['perplexity with thoughts that are shuffled / random / constant / none'] = ' / '.join(
            f'{mean(run[kind] for run in swapped if kind in run):.2f}' if any(kind in run for run in swapped) else '–'
            for kind in kinds) if swapped[0] else ''
        return {**said, 'seconds': of('seconds', 0)}
    if suite in ('text', *TEXTS):
        return {'val loss': of('val_loss', 4), **({'its best': of('best_val_loss', 4)} if suite == 'text' else {}),
                'more with thoughts that are shuffled / random / constant / none': ' / '.join(
                    f'{mean(run["above_own"][kind][0] for run in runs):.4f}' if kind in runs[0]['above_own'] else '–'
                    for kind in kinds if runs[0]['above_own']),
                'seconds': of('seconds', 0)}
    if suite in ('weighting', 'temperature'):
        few = [run['effective_n'] for run in runs if run['effective_n']]
        return {f'right at step {", ".join(runs[0]["early"])}': ', '.join(
                    f'{mean(run["early"][step] for run in runs):.2f}' for step in runs[0]['early']),
                'at the end': of('accuracy', 3), 'held out': of('heldout_accuracy', 3),
                'variance of gradient norm / squared mean': of('norm_variance', 2),
                'effective n': spread(few, 1) if few else '', 'collapsed': str(sum(run['collapsed'] for run in runs)),
                'beside rloo': verdict(runs), 'seconds': of('seconds', 0)}
    said = {'training': of('accuracy', 4), 'held out': of('heldout_accuracy', 4)}
    if suite == 'learning':
        said[' / '.join(kinds)] = ' / '.join(f'{mean(run["ablation"][kind] for run in runs):.3f}' for kind in kinds
                                             ) if 'ablation' in runs[0] else ''
        said['seconds'] = of('seconds', 0)
    if suite == 'ablation':
        said['codes written'] = of('codes', 0)
    if suite == 'thousand':
        said['steps'] = of('steps', 0)
    if suite in ('variants', 'thousand'):
        said |= {'codes written': of('codes', 0), 'bits': of('bits', 1), 'step of .99': when('step_of_99'),
                 'seconds': of('seconds', 0)}
    return said


def table(suite):
    """A suite's table in Markdown, from the result files there are. What all rows have in common is said above it."""
    rows, said, prefix = [], [], ''
    short = {f'python {script}.py {base}': task for task, (script, base) in WEIGHED.items()}
    for row, (_, script, _, what) in SUITES[suite].items():
        common = f'python {script}.py {COMMON.get(suite, "")}'.strip()
        if result := stored(f'{suite}-{row}'):
            at_once = f', {result["parallel"]} at once' if result.get('parallel', 1) > 1 else ''
            command = result['command'].replace(common, '…') if suite in COMMON else result['command']
            prefix = common if command.startswith('…') else prefix
            if suite in ('weighting', 'temperature'):
                for text, task in short.items():
                    command = command.replace(text, f'{task} …')
            rows.append({'command': as_code(result['command'], command), '': what,
                         **columns(suite, result['runs']), 'seeds': str(len(result['runs'])),
                         'on': f'{result["hardware"]}, torch {result["torch"]}{at_once}'})
    if not rows:
        return ''
    if suite in COMMON:
        said.append(f'`…` is `{prefix}`.')
    if suite in ('weighting', 'temperature'):
        said += [f'`{task} …` is `{text}`.' for text, task in short.items()
                 if any(row['command'].startswith(f'`{task} …') for row in rows)]
    if len({row['on'] for row in rows}) == 1:
        said.append(f'All on {[row.pop("on") for row in rows][0]}.')
    return ''.join(f'{line}\n\n' for line in said) + markdown(rows[0], [row.values() for row in rows])


TABLES = {'speed': speed_table, 'profile': profile_table, 'scaling': scaling_table, 'gradient': gradient_table,
          'sparsity': sparsity_table, 'weights': weights_table, 'summary': weighting_summary}


def write_tables():
    """Put the tables into the README, between their marks."""
    text = (ROOT / 'README.md').read_text()
    for suite in dict.fromkeys((*SUITES, *TABLES)):
        begin, end = f'<!-- {suite} -->\n', f'<!-- end of {suite} -->'
        if begin not in text or end not in text:
            fail(f'README.md has no marks {begin.strip()} and {end}')
        shown = TABLES[suite]() if suite in TABLES else table(suite)
        text = text[:text.index(begin)] + begin + shown + '\n' + text[text.index(end):]
    write_atomic(ROOT / 'README.md', lambda path: path.write_text(text))


# ---- run ------------------------------------------------------------------------------------------------------------
if suite not in (*SUITES, 'speed', 'scaling', 'tables'):
    fail(f'--suite={suite} must be one of {", ".join(SUITES)}, speed, scaling, tables')
if suite == 'math' and not pretrained:
    fail('--suite=math needs --pretrained=<the model to start from>')
if suite == 'scaling':
    measure_scaling()
elif suite != 'tables':
    every = SPEED if suite == 'speed' else SUITES[suite]
    for row in only.split(',') if only else ():
        if row not in every:
            fail(f'--only={row} must be one of {", ".join(every)}')
    here = 'cuda' if torch.cuda.is_available() else 'cpu'
    gone = [row for row, (_, *what, _) in every.items() if GONE.search(' '.join(what))]
    if only and (wrong := [row for row in only.split(',') if row in gone]):
        fail(f'{", ".join(wrong)} of the {suite} suite can only be measured at commit 6bf880c: a knob is gone')
    rows = [row for row, (device, *_) in every.items()
            if (row in only.split(',') if only else device == here and row not in gone)]
    if here == 'cpu' and (wrong := [row for row in rows if every[row][0] == 'cuda']):
        fail(f'{", ".join(wrong)} of the {suite} suite must be measured on a GPU')
    if not rows:
        fail(f'no row of the {suite} suite belongs on a machine with {here}')
    if suite == 'speed':
        measure_speed(rows)
        print(speed_table())
    else:
        measure(suite, rows)
        print(TABLES[suite]() if suite in TABLES else table(suite))
write_tables()
if pictures:
    with user_errors():
        Path(pictures).mkdir(parents=True, exist_ok=True)
        for name, draw in (('gradient', gradient_picture), ('scaling', scaling_picture)):
            write_atomic(Path(pictures) / f'{name}.html',
                         lambda path, draw=draw: draw().write_html(path, config={'displayModeBar': False}))

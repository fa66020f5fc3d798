"""
Every number in the README: this script measures it, keeps the raw results in assets/results/ and writes the tables.

    python bench.py                                 # all runs of the first table that belong on this machine
    python bench.py --only=digits --seeds=3         # those of one row
    python bench.py --suite=ablation --seeds=3      # another table
    python bench.py --suite=variants --parallel=12  # twelve runs at once: quicker in all, each of them slower
    python bench.py --suite=tables                  # no runs: the README's tables from assets/results/

A result file names the command, the hardware, the version of torch and the commit (null where git is not at hand), and
holds the last line of every run. A row is measured on a CPU or on a GPU, whichever it belongs on.
"""
import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

import torch

from model import unpack
from utils import device_name, fail, git_commit, read_knobs, write_atomic

# ---- knobs ----------------------------------------------------------------------------------------------------------
suite = 'learning'              # which table: a name of SUITES below; tables: no runs, only the README
only = ''                       # names of rows, with commas between; empty: all
seeds = 5                       # runs of each row, with seeds 0, 1, ...
parallel = 1                    # runs at once

knobs = read_knobs(__file__, globals())

# ---- what is run ----------------------------------------------------------------------------------------------------

def by_reward(max_steps, group_size=256):
    """Knobs of autoencoder_think for learning by reward."""
    more = f' --group_size={group_size}' if group_size != 256 else ''
    return f'--method=reinforce --learning_rate=5e-4 --max_steps={max_steps}{more} --eval_every=100 --log_every=20'


DIGITS = '--encoding=digits --input_max=1000 --max_steps=1000'
EXPLORE = '--epsilon=.2 --epsilon_steps=500 --entropy_weight=.01'
ENTROPY = '--entropy_weight=.03'
LARGE = f'--group_size=32 {ENTROPY}'
SMALL = '--input_max=64 --d_thought_vocab=8 --d_model=64 --n_head=16 --group_size=4 --max_steps=1000 --eval_every=50'
THOUSAND = ('--input_max=1000 --think_len=3 --batch_size=8192 --d_model=256 --n_head=64 --weight_decay=1 '
            '--learning_rate=2e-3 --log_every=50')
LENGTHS = '--search=False --input_max=64 --d_model=64 --n_head=16 --group_size=4 --max_steps=300 --eval_every=300'
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
    'frozen-thinking': ('--frozen=thinking --search=False --answer_on=written',
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
    'super-clean': ('--super=True --clean=True --search=False --advantage=clean',
                    'paid 1 for the right digits, else 0: of 2048 rollouts of a step, 32 are right at first'),
    'super-clean-explore': (f'--super=True --clean=True --search=False --advantage=clean {EXPLORE}',
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
PLUS = '--ops=+ --k=1 --input_max=31 --weight_decay=1 --batch_size=128'
HOP = '--task=hop --input_max=10 --k=8 --k_test=16 --n_layer=2 --positions=rotary'
FREE = '--fixed=False --hardest=.2 --learning_rate=5e-4 --group_size=16 --max_steps=2500 --enough=2'
LESS = '--max_steps=4000 --enough=2'
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
    'continuous': ('--thought=continuous --gate=none --think_len=1 --at_once=1', 'the state itself instead of tokens'),
}
ON = '--learning_rate=5e-4 --entropy_weight=0 --max_steps=2000'
ON_ROWS = {     # what goes on from straight
    'straight-on': (ON, 'straight, and on by gradient'),
    'paid': (f'--thought=token --temperature=1 {ON}', 'straight, and on by reward'),
    'unpaid': (f'--thought=token --temperature=1 --policy_weight=0 {ON}', 'straight, and on, thoughts not trained'),
    'unpaid-1': (f'--thought=token --temperature=1 --policy_weight=0 --group_size=1 {ON}',
                 'straight, and on, thoughts not trained, one rollout'),
}
THINKING = {    # row: (knobs, what it shows)
    'add': ('', 'the main case'),
    'add-none': ('--thoughts=none --max_steps=12000', 'none, three times the steps'),
    'add-none-learned': ('--thoughts=none --positions=learned --recount=False --max_steps=12000',
                         'none, positions as usual'),
    'add-none-direct': ('--thoughts=none --positions=learned --recount=False --advance_at=0 --max_steps=12000',
                        'none, positions as usual, full depth at once'),
    'add-filler': (f'--thoughts=filler {LESS}', 'the same thought again and again'),
    'add-random': (f'--thoughts=random {LESS}', 'random thoughts'),
    'add-chain': (f'--thoughts=chain {LESS}', 'supervised: the true states'),
    'perm': ('--task=perm --input_max=10', 'permutations of ten things'),
    'perm-none': ('--task=perm --input_max=10 --thoughts=none --max_steps=12000', 'none, three times the steps'),
    'perm-none-learned': ('--task=perm --input_max=10 --thoughts=none --positions=learned --recount=False '
                          '--max_steps=12000', 'none, positions as usual'),
}
NEEDS = {
    'recount': ('--recount=False', 'thoughts are numbered on'),
    'end': ('--answer_at=end', 'the answer is read at an end_thought'),
    'learned': ('--positions=learned', 'an embedding for every position'),
    'rotary': ('--positions=rotary', 'rotary positions'),
    'price': ('--code_price=0', 'codes without a price'),
    'entropy': ('--entropy_weight=.1 --entropy_end=.1', 'a larger bonus for entropy, which stays'),
    'certain': ('--entropy_end=0', 'a bonus that falls to nothing'),
    'hardest': ('--hardest=1', 'no easier questions in between'),
    'batch': ('--baseline=batch', 'compared with the mean reward of all questions'),
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
        'totals': ('cpu', 'add_think', '--ops=+', 'only additions, which can all be done at once'),
        'totals-none': ('cpu', 'add_think', '--ops=+ --thoughts=none', 'no thoughts'),
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
        'none': ('cpu', 'supervised_rollout_think', '--think_len=0', 'four layers'),
        'own': ('cpu', 'supervised_rollout_think', '', 'four layers, with thoughts'),
        'large': ('cuda', 'supervised_rollout_think', '--think_len=0 --n_layer=6 --n_head=6 --d_model=384 '
                  '--text_len=256 --batch_size=64 --dropout=.2 --max_steps=5000 --learning_rate=1e-3 '
                  '--dtype=bfloat16', 'six layers'),
    },
    **{suite: {row: (where, 'supervised_rollout_think', ' '.join([common, *knobs.split()] + (
                     [] if row in ON_ROWS else [f'--max_steps={steps * (1 + (row == "none-twice"))}'])), what)
               for row, (knobs, what) in (TEXT_ROWS | (ON_ROWS if suite == 'novels' else {})).items()}
       for suite, (where, common, steps) in TEXTS.items()},
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
}
COMMON = {'variants': SMALL, 'thousand': THOUSAND, 'lengths': LENGTHS, 'origin': FORMING, 'code': '', 'capacity': '',
          'dealt': DEALT, 'paid': PAID, **dict.fromkeys(('thinking', 'needs', 'buys'), ''), 's5': S5,
          'free': FREE, 'text': '', **{suite: common for suite, (_, common, _) in TEXTS.items()}}     # of all rows
STARTS = {('novels', row): ('novels', 'straight') for row in ON_ROWS}     # what they go on from, with the same seed
STARTS |= {('free', row): ('thinking', 'add') for row in SUITES['free']}
ROOT = Path(__file__).parent
RESULTS = ROOT / 'assets' / 'results'
turn = itertools.count()         # of GPUs
running = {}                    # row: futures of its runs, by seed


def run(suite, row, seed, folder, *more):
    """Run a row's command with a seed in out/bench/<suite>-<row>/<folder>. Returns that folder and the last line."""
    device, script, arguments, _ = SUITES[suite][row]
    if device == 'cuda':        # GPUs take turns
        device = f'cuda:{next(turn) % torch.cuda.device_count()}'
    folder = ROOT / f'out/bench/{suite}-{row}/{folder}'
    threads = {'OMP_NUM_THREADS': str(max(1, os.cpu_count() // parallel))}
    run = subprocess.run([sys.executable, f'{script}.py', *arguments.split(), f'--seed={seed}', f'--device={device}',
                          f'--out_dir={folder}', *more], stdout=subprocess.PIPE, text=True, cwd=ROOT,
                         env=os.environ | threads)
    if run.returncode:
        raise ChildProcessError(f'{script}.py {arguments} --seed={seed} ended with exit code {run.returncode}')
    return folder, json.loads(run.stdout.splitlines()[-1])


def learn(suite, row, seed):
    """
    The last line of a run, and the step at which 99% of held-out questions were first right; where none is held out,
    the step and the seconds at which all answers were.
    """
    more = []
    if start := STARTS.get((suite, row)):
        first = ROOT / f'out/bench/{"-".join(start)}/{seed}/ckpt.pt'
        if start[0] == suite and start[1] in running:
            running[start[1]][seed].result()
        elif not first.exists():
            run(*start, seed, seed)
        more = [f'--init_from={first}']
    folder, result = run(suite, row, seed, seed, *more)
    log = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    if 'val_loss' in result:
        pass
    elif 'heldout_accuracy' in result:
        result['step_of_99'] = next((line['step'] for line in log if line.get('heldout_accuracy', 0) >= .99), None)
    else:
        first = next((line for line in log if line.get('accuracy') == 1), {})
        result |= {f'{unit}_to_all': first.get(unit) for unit in ('step', 'seconds')}
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
    RESULTS.mkdir(parents=True, exist_ok=True)
    failed, commit = [], git_commit()
    with ThreadPoolExecutor(parallel) as pool:
        one = origin if suite == 'origin' else learn
        for row in rows:
            running[row] = [pool.submit(one, suite, row, seed) for seed in range(seeds)]
        for row in rows:
            device, script, arguments, _ = SUITES[suite][row]
            result = {'command': f'python {script}.py {arguments}'.strip(), 'hardware': device_name(device),
                      'torch': torch.__version__, 'commit': commit, 'parallel': parallel}
            if device == 'cuda' and torch.cuda.device_count() > 1:
                result['hardware'] = f'{torch.cuda.device_count()} {result["hardware"]}'
            if start := STARTS.get((suite, row)):
                result['command'] += f' --init_from=out/bench/{"-".join(start)}/<seed>/ckpt.pt'
            try:
                result['runs'] = [future.result() for future in running[row]]
            except ChildProcessError as error:
                failed.append(str(error))
                continue
            write_atomic(RESULTS / f'{suite}-{row}.json',
                         lambda path, result=result: path.write_text(json.dumps(result, indent=1) + '\n'))
    if failed:
        fail('; '.join(failed))


# ---- tables ---------------------------------------------------------------------------------------------------------

def spread(values, n_digits):
    """Mean and range of some numbers, one number where they are all the same."""
    low, high = (f'{v:.{n_digits}f}' for v in (min(values), max(values)))
    return low if low == high else f'{mean(values):.{n_digits}f} ({low} to {high})'


def columns(suite, runs):
    """What a suite's table says of the runs of a row: {heading: text}."""
    if suite == 'origin':
        return {f'another {name}': spread([run[key] for run in runs], 2) for key, name in (
            ('noise', 'draw of questions and noise'), ('thinking', 'thinking policy'),
            ('answering', 'answering policy'))}
    if suite == 'lengths':
        return {'thoughts': spread([run.get('thoughts', run['changed'].get('think_len', 2)) for run in runs], 1),
                'seconds': spread([run['seconds'] for run in runs], 1)}
    if suite in ('code', 'capacity', 'dealt', 'paid'):
        unit = 'step' if suite in ('dealt', 'paid') else 'seconds'
        reached = [run[f'{unit}_to_all'] for run in runs if run[f'{unit}_to_all'] is not None]
        when = spread(reached, 1 if unit == 'seconds' else 0) if reached else ''
        return {'accuracy': spread([run['accuracy'] for run in runs], 3),
                'codes': spread([run['codes'] for run in runs], 0),
                f'all right at {unit}': f'{when}, {len(reached)} of {len(runs)}' if reached else 'never',
                'seconds': spread([run['seconds'] for run in runs], 1)}
    if suite == 'free':
        depths = [str(depth) for depth in runs[0]['accuracy_at_depth']]
        return {f'{what} at depth {depths[0]} to {depths[-1]}': ' / '.join(
                    f'{mean(run[key][depth] for run in runs):.{n_digits}f}' for depth in depths)
                for what, key, n_digits in (('accuracy', 'accuracy_at_depth', 3), ('thoughts', 'thoughts_at_depth', 2))}
    if suite in ('thinking', 'needs', 's5', 'buys'):
        kinds = ('shuffled', 'random', 'constant', 'none')
        said = {'held out': spread([run['heldout_accuracy'] for run in runs], 3)}
        if suite != 'needs':
            used = [run['ablation'] for run in runs if 'ablation' in run]
            said[' / '.join(kinds)] = ' / '.join(f'{mean(run[kind] for run in used):.3f}' for kind in kinds if used)
        if suite == 's5':
            for depth in ('16', '32', '64'):
                tried = [run['accuracy_at_depth'][depth] for run in runs if depth in run.get('accuracy_at_depth', {})]
                said[f'at depth {depth}'] = spread(tried, 3) if tried else ''
        reached = [run['step_of_99'] for run in runs if run['step_of_99']]
        return {**said, 'depth': spread([run['depth'] for run in runs], 1),
                'step of .99': f'{spread(reached, 0)}, {len(reached)} of {len(runs)}' if reached else 'never',
                'seconds': spread([run['seconds'] for run in runs], 0)}
    if suite in ('text', *TEXTS):
        kinds = ('shuffled', 'random', 'constant', 'none') if runs[0]['above_own'] else ()
        return {'val loss': spread([run['val_loss'] for run in runs], 4),
                **({'its best': spread([run['best_val_loss'] for run in runs], 4)} if suite == 'text' else {}),
                'more with thoughts that are shuffled / random / constant / none': ' / '.join(
                    f'{mean(run["above_own"][kind][0] for run in runs):.4f}' if kind in runs[0]['above_own'] else '–'
                    for kind in kinds),
                'seconds': spread([run['seconds'] for run in runs], 0)}
    said = {'training': spread([run['accuracy'] for run in runs], 4),
            'held out': spread([run['heldout_accuracy'] for run in runs], 4)}
    if suite == 'learning':
        kinds = ('shuffled', 'random', 'constant', 'none')
        said[' / '.join(kinds)] = ' / '.join(f'{mean(run["ablation"][kind] for run in runs):.3f}' for kind in kinds
                                             ) if 'ablation' in runs[0] else ''
        said['seconds'] = spread([run['seconds'] for run in runs], 0)
    if suite == 'ablation':
        said['codes written'] = spread([run['codes'] for run in runs], 0)
    if suite == 'thousand':
        said['steps'] = spread([run['steps'] for run in runs], 0)
    if suite in ('variants', 'thousand'):
        reached = [run['step_of_99'] for run in runs if run['step_of_99']]
        said |= {'codes written': spread([run['codes'] for run in runs], 0),
                 'bits': spread([run['bits'] for run in runs], 1),
                 'step of .99': f'{spread(reached, 0)}, {len(reached)} of {len(runs)}' if reached else 'never',
                 'seconds': spread([run['seconds'] for run in runs], 0)}
    return said


def table(suite):
    """A suite's table in Markdown, from the result files there are. What all rows have in common is said above it."""
    rows, said = [], []
    for row, (_, script, _, what) in SUITES[suite].items():
        common = f'python {script}.py {COMMON.get(suite, "")}'.strip()
        if (path := RESULTS / f'{suite}-{row}.json').exists():
            result = json.loads(path.read_text())
            at_once = f', {result["parallel"]} at once' if result.get('parallel', 1) > 1 else ''
            command = result['command'].replace(common, '…') if suite in COMMON else result['command']
            rows.append({'command': f'`{command}`', '': what,
                         **columns(suite, result['runs']), 'seeds': str(len(result['runs'])),
                         'on': f'{result["hardware"]}, torch {result["torch"]}{at_once}'})
    if not rows:
        return ''
    if suite in COMMON:
        said.append(f'`…` is `{common}`.')
    if len({row['on'] for row in rows}) == 1:
        said.append(f'All on {[row.pop("on") for row in rows][0]}.')
    lines = [rows[0], ['---'] * len(rows[0]), *(row.values() for row in rows)]
    return ''.join(f'{line}\n\n' for line in said) + '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def write_tables():
    """Put the tables into the README, between their marks."""
    text = (ROOT / 'README.md').read_text()
    for suite in SUITES:
        begin, end = f'<!-- {suite} -->\n', f'<!-- end of {suite} -->'
        if begin not in text or end not in text:
            fail(f'README.md has no marks {begin.strip()} and {end}')
        text = text[:text.index(begin)] + begin + table(suite) + '\n' + text[text.index(end):]
    write_atomic(ROOT / 'README.md', lambda path: path.write_text(text))


# ---- run ------------------------------------------------------------------------------------------------------------
if suite not in (*SUITES, 'tables'):
    fail(f'--suite={suite} must be one of {", ".join(SUITES)}, tables')
if suite != 'tables':
    for row in only.split(',') if only else ():
        if row not in SUITES[suite]:
            fail(f'--only={row} must be one of {", ".join(SUITES[suite])}')
    here = 'cuda' if torch.cuda.is_available() else 'cpu'
    rows = [row for row, (device, *_) in SUITES[suite].items()
            if (row in only.split(',') if only else device == here)]
    if here == 'cpu' and (wrong := [row for row in rows if SUITES[suite][row][0] == 'cuda']):
        fail(f'{", ".join(wrong)} of the {suite} suite must be measured on a GPU')
    if not rows:
        fail(f'no row of the {suite} suite belongs on a machine with {here}')
    measure(suite, rows)
    print(table(suite))
write_tables()

"""Trial: fewer or cheaper steps of add_think_blind.py, one thread each, many at once. Usage: grid_blind.py OUT P LIMIT"""
import json, os, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from statistics import mean

out, parallel, limit = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
begun = time.time()
GRID = {'base': ''}
for n in (1200, 1000, 800):
    GRID[f'{n}'] = f'--max_steps={n}'
for n in (1200, 1000, 800):
    for rate in (4e-3, 5e-3):
        GRID[f'{n} lr{rate}'] = f'--max_steps={n} --learning_rate={rate}'
for answer in (3e-3, 4e-3):
    GRID[f'1000 lr4e-3 answer{answer}'] = f'--max_steps=1000 --learning_rate=4e-3 --learning_rate_answer={answer}'
for decay in (2, 4):
    GRID[f'1000 lr4e-3 wd{decay}'] = f'--max_steps=1000 --learning_rate=4e-3 --weight_decay={decay}'
for batch in (256, 384):
    for n in (1500, 1200, 1000):
        GRID[f'batch{batch} {n} lr4e-3'] = f'--batch_size={batch} --max_steps={n} --learning_rate=4e-3'
for heads in (8, 16):
    GRID[f'1000 lr4e-3 heads{heads}'] = f'--max_steps=1000 --learning_rate=4e-3 --n_head={heads}'
for width in (64, 96):
    GRID[f'1200 lr4e-3 width{width}'] = f'--max_steps=1200 --learning_rate=4e-3 --d_model={width}'
for tau in (.05, .2):
    GRID[f'1000 lr4e-3 tau{tau}'] = f'--max_steps=1000 --learning_rate=4e-3 --tau={tau}'
seeds = range(10, 14)


def run(job):
    name, seed = job
    if time.time() - begun > limit:
        return
    folder = f'/tmp/grid/{name.replace(" ", "_")}/{seed}'
    begin = time.time()
    ran = subprocess.run([sys.executable, 'add_think_blind.py', *GRID[name].split(), f'--seed={seed}', '--device=cpu',
                          '--eval_every=100', f'--out_dir={folder}'], capture_output=True, text=True,
                         env=os.environ | {'OMP_NUM_THREADS': '1'})
    if ran.returncode:
        return name, seed, {'error': ran.stderr[-200:]}
    last = json.loads(ran.stdout.splitlines()[-1])
    log = [json.loads(line) for line in open(f'{folder}/metrics.jsonl')]
    curve = [line['heldout_accuracy'] for line in log if 'heldout_accuracy' in line]
    return name, seed, {'accuracy': last['accuracy'], 'heldout': last['heldout_accuracy'], 'seconds': last['seconds'],
                        'steps': last['steps'], 'curve': curve, 'wall': time.time() - begin}


jobs = [(name, seed) for seed in seeds for name in GRID]
with ThreadPoolExecutor(parallel) as pool, open(out, 'w') as file:
    found = {}
    for done in pool.map(run, jobs):
        if done:
            name, seed, numbers = done
            found.setdefault(name, []).append(numbers)
            print(json.dumps({'name': name, 'seed': seed, **numbers}), file=file, flush=True)
for name, rows in found.items():
    if all('error' not in row for row in rows):
        print(f'{name:32} n={len(rows)} train {mean(r["accuracy"] for r in rows):.4f} min {min(r["accuracy"] for r in rows):.4f}'
              f' held {mean(r["heldout"] for r in rows):.4f} min {min(r["heldout"] for r in rows):.4f}'
              f' s {mean(r["seconds"] for r in rows):.0f}')
    else:
        print(name, rows[0])

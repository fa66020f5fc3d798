"""Trial: variants of local_expectation.py, P at once on each GPU.

    python trials/leg_all.py [OUT_DIR] [P] [LIMIT_SECONDS] [SEEDS like 0,1,2] [VARIANTS like leg,info] [--steps=...]
"""
import json, os, subprocess, sys, threading, time
sys.path.insert(0, os.getcwd()); sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import torch
from leg_variants import VARIANTS

plain = [a for a in sys.argv[1:] if not a.startswith('--')]
more = [a for a in sys.argv[1:] if a.startswith('--')]
out, parallel, limit, seeds, names = plain + ['out/leg', '4', '540', '10', ','.join(VARIANTS)][len(plain):]
limit, begun, n_gpu, lock = float(limit), time.time(), torch.cuda.device_count(), threading.Lock()
jobs = [(name, seed) for seed in seeds.split(',') for name in names.split(',')]
if unknown := set(names.split(',')) - VARIANTS.keys():
    raise SystemExit(f'no variants {unknown}')
os.makedirs(out, exist_ok=True)
found, failed, running, queue = [], [], {}, list(jobs)


def work(gpu):
    while True:
        with lock:
            if not queue or time.time() - begun > limit:
                return
            name, seed = job = queue.pop(0)
            path = f'{out}/{name}_{seed}.json'
            with open(f'{out}/{name}_{seed}.log', 'w') as log:
                running[job] = process = subprocess.Popen(
                    [sys.executable, 'trials/local_expectation.py', f'--variant={name}', f'--seed={seed}',
                     f'--device={"cuda:0" if n_gpu else "cpu"}', f'--out={path}', *more],
                    stdout=log, stderr=subprocess.STDOUT,
                    env=os.environ | {'CUDA_VISIBLE_DEVICES': str(gpu), 'OMP_NUM_THREADS': '1'})
        code = process.wait()
        with lock:
            running.pop(job)
            if code:
                failed.append((job, code, open(f'{out}/{name}_{seed}.log').read()[-300:]))
                continue
            line = open(path).read().strip()
            found.append(json.loads(line))
            with open(f'{out}/leg.jsonl', 'a') as file:
                file.write(line + '\n')
            print(f'{time.time() - begun:.0f} s {name} {seed} {found[-1]["val_loss"]:.4f}', flush=True)


gpus = os.environ.get('CUDA_VISIBLE_DEVICES', '').split(',') if os.environ.get('CUDA_VISIBLE_DEVICES') else range(n_gpu)
threads = [threading.Thread(target=work, args=(gpu,)) for _ in range(int(parallel)) for gpu in (gpus if n_gpu else [''])]
for thread in threads:
    thread.start()
while any(thread.is_alive() for thread in threads):
    time.sleep(.5)
    if time.time() - begun > limit:
        with lock:
            for process in running.values():
                process.kill()
for (name, seed), code, text in failed:
    print(f'{name} {seed} ended with {code}: {text}')
print('not begun:', ' '.join(f'{name}_{seed}' for name, seed in queue) or 'none')
number = lambda row, key, form: format(row[key], form) if key in row else '-'
columns = [('val_loss', '.4f'), ('se', '.4f'), ('shuffled', '.4f'), ('random', '.4f'), ('sampled', '.4f'), ('none', '.4f'),
           ('std_a', '.4f'), ('entropy_pi', '.2f'), ('greedy', '.2f'), ('cos_halves', '.2f'), ('norm_policy', '.1e'),
           ('norm_answer', '.1e'), ('cos_policy_straight', '.2f'), ('seconds', '.0f'), ('ms_a_step', '.1f')]
print(f'{"variant":22}{"seed":>4}', *(f'{key[:10]:>10}' for key, _ in columns))
for row in sorted(found, key=lambda row: row['val_loss']):
    row |= {'greedy': sum(row['entropy_greedy']) / len(row['entropy_greedy'])} if 'entropy_greedy' in row else {}
    print(f'{row["variant"]:22}{row["seed"]:>4}', *(f'{number(row, key, form):>10}' for key, form in columns))

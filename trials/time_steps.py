"""Trial: where the time of a script's steps goes. Usage: time_steps.py SCRIPT NAMES [--knob=value ...]
NAMES: functions of the script, separated by commas, whose time is taken, with the GPU waited for ('-': none)."""
import runpy, sys, time, json, os
from statistics import median
sys.path.insert(0, os.getcwd())
script, names, *arguments = sys.argv[1:]
sys.argv = [script, *arguments]
import utils
import torch
spent, ends = {}, []


def timed(name, function):
    def run(*args, **kw):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        result = function(*args, **kw)
        torch.cuda.synchronize()
        spent.setdefault(name, []).append(1000 * (time.perf_counter() - begin))
        return result
    return run


first = utils.Run.steps
def steps(self, n):
    script_globals = sys._getframe(1).f_globals
    if names != '-':
        for name in names.split(','):
            script_globals[name] = timed(name, script_globals[name])
        torch.Tensor.backward = timed('backward', torch.Tensor.backward)
    for step in first(self, n):
        torch.cuda.synchronize()
        ends.append(1000 * time.perf_counter())
        yield step
utils.Run.steps = steps
sys.stdout, kept = open(os.devnull, 'w'), sys.stdout
runpy.run_path(script)
sys.stdout = kept
gaps = [b - a for a, b in zip(ends, ends[1:])]
half = gaps[len(gaps) // 2:]
print(f'{script} {" ".join(arguments)[-150:]}\n  step {median(half):.1f} ms ({min(half):.1f} to {max(half):.1f}; {len(half)} steps)',
      {name: f'{median(x[len(x) // 2:]):.1f} x{len(x) / max(1, len(gaps)):.1f}' for name, x in spent.items()},
      f'{torch.cuda.max_memory_allocated() / 2**20:.0f} MB', flush=True)

"""A training step of GPT-2 124M, 32 x 1024, bfloat16, with well-kept libraries, one process per way.

    python trials/fast_train.py all <seconds per way>     # on every GPU here, a table at the end
    python trials/fast_train.py <way>                     # parts of a way are joined by +

parts: fa4 (flash-attn-4 behind scaled_dot_product_attention), mlp (quack's GELU in the products' epilogues),
lin (quack's products everywhere), ce (quack's fused loss), chunked (quack's, logits chunk by chunk), liger (its
fused loss), graph (the compiled step as one CUDA graph), tuned (quack tunes its products), nano, ours, profile."""
import functools
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
WAYS = os.environ.get('WAYS', 'ours nano ours+fa4 ours+ce ours+mlp ours+liger ours+chunked ours+graph '
                              'ours+fa4+ce+mlp ours+fa4+ce+mlp+graph').split()


def one(way):
    parts = way.split('+')
    import torch
    import torch.nn.functional as F
    import model as m
    from utils import make_optimizer
    torch.manual_seed(0)
    tokens, targets = torch.randint(50257, (2, 32, 1024), device='cuda')
    torch.set_float32_matmul_precision('high')
    tuned = 'tuned' in parts
    if 'nano' in parts:
        import importlib.util
        spec = importlib.util.spec_from_file_location('nanogpt', ROOT / '.gpu/nanogpt.py')
        module = importlib.util.module_from_spec(spec)
        sys.modules['nanogpt'] = module
        spec.loader.exec_module(module)
        model = module.GPT(module.GPTConfig(vocab_size=50304, bias=True, block_size=1024)).cuda()
        optimizer = model.configure_optimizers(.1, 1e-4, (.9, .95), 'cuda')
        compiled = torch.compile(model)
        loss = lambda x, y: compiled(x, y)[1]
    else:
        if 'fa4' in parts:
            import flash_attn.cute.interface as fa
            forward = fa._flash_attn_fwd    # returns more than torch 2.11 expects
            fa._flash_attn_fwd = functools.wraps(forward)(lambda *args, **kw: forward(*args, **kw)[:2])
            torch.nn.attention.activate_flash_attention_impl('FA4')
            torch.backends.cuda.enable_cudnn_sdp(False)
            torch.backends.cuda.enable_mem_efficient_sdp(False)
            torch.backends.cuda.enable_math_sdp(False)
        if 'mlp' in parts:
            from quack.mlp import mlp_func
            m.MLP.forward = lambda self, x: mlp_func(
                x, self.c_fc.weight, self.c_proj.weight, 'gelu_tanh_approx', bias1=self.c_fc.bias,
                bias2=self.c_proj.bias, tuned=tuned)
        if 'ce' in parts or 'chunked' in parts:
            from quack.linear_cross_entropy import chunked_linear_cross_entropy
            size, scaled = 16384 if 'c16' in parts else 8192 if 'c8' in parts else 4096, 'ce' in parts

            def fused(self, tokens, targets, positions=None):
                return chunked_linear_cross_entropy(
                    self.hidden(tokens, None, positions).flatten(0, 1), self.lm_head.weight, targets.flatten(),
                    chunk_size=size, use_scaled_exp=scaled, tuned=tuned)
            m.GPT2.loss = fused
        if 'liger' in parts:
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
            liger = LigerFusedLinearCrossEntropyLoss()
            m.GPT2.loss = lambda self, tokens, targets, positions=None: liger(
                self.lm_head.weight.to(torch.bfloat16), self.hidden(tokens, None, positions).flatten(0, 1),
                targets.flatten())
        model = m.GPT2(m.ModelConfig(d_vocab=50304)).cuda()
        optimizer = make_optimizer(model, 1e-4, .1, recorded='graph' in parts)
        if 'lin' in parts:
            from quack.linear import linear_func
            for module in model.modules():
                if isinstance(module, torch.nn.Linear) and module is not model.lm_head:
                    module.forward = lambda x, module=module: linear_func(
                        x, module.weight, module.bias, tuned=tuned)
        loss = torch.compile(model.loss)
    values = []

    def step():
        with torch.autocast('cuda', torch.bfloat16):
            value = loss(tokens, targets)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        optimizer.step()
        optimizer.zero_grad()
        return value.detach()

    run, began = step, time.time()
    values.append(step().item())
    print(way, 'first step', round(time.time() - began, 1), 'seconds, loss', values[0], flush=True)
    if 'graph' in parts:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = step()
        run = lambda: (graph.replay(), result)[1]
    torch.cuda.reset_peak_memory_stats()
    times = []
    for i in range(6):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(5):
            value = run()
        torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
        values.append(value.item())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    rows = sorted((e for e in profiler.key_averages()), key=lambda e: -e.self_device_time_total)
    for e in rows[:22]:
        print(f'    {e.self_device_time_total / 1000:7.2f} ms {e.count:5d} {e.key[:100]}')
    print('    gpu', sum(e.self_device_time_total for e in rows) / 1000)
    print('RESULT', json.dumps({
        'way': way, 'tokens_per_second': round(5 * 32768 / median(times[1:]) * 1000), 'milliseconds': times[1:],
        'losses': values, 'memory': torch.cuda.max_memory_allocated() >> 20}), flush=True)


def all_ways(limit):
    import torch
    free, out = Queue(), Path(os.environ.get('OUT', '/tmp'))
    for i in range(torch.cuda.device_count()):
        free.put(i)

    def job(way):
        gpu = free.get()
        try:
            with open(out / f'{way.replace("+", "_")}.txt', 'w') as file:
                subprocess.run([sys.executable, __file__, way], stdout=file, stderr=subprocess.STDOUT, timeout=limit,
                               env=os.environ | {'CUDA_VISIBLE_DEVICES': str(gpu), 'TORCHINDUCTOR_CACHE_DIR': f'/tmp/{way}'})
        except subprocess.TimeoutExpired:
            print(way, 'did not end')
        finally:
            free.put(gpu)
        lines = (out / f'{way.replace("+", "_")}.txt').read_text().splitlines()
        last = [line for line in lines if line.startswith('RESULT')] or lines[-3:]
        print(way, *last, flush=True)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(job, WAYS))


if __name__ == '__main__':
    all_ways(float(sys.argv[2])) if sys.argv[1] == 'all' else one(sys.argv[1])

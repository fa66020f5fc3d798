"""Trial: a training step of GPT-2 124M, 32 x 1024, bfloat16, by what might make it faster, against nanoGPT's."""
import os, sys, time, json, importlib.util
sys.path.insert(0, os.getcwd())
from statistics import median
import model as ours
from utils import make_optimizer
import torch, torch.nn.functional as F
from torch.nn.attention import sdpa_kernel, SDPBackend
import torch._inductor.config as ic
torch.set_float32_matmul_precision('high')
B, S = 32, 1024
only = sys.argv[1:]


def padded_loss(model):
    def loss(tokens, targets):
        states = model.hidden(tokens)
        weight = F.pad(model.lm_head.weight, (0, 0, 0, -50257 % 64))
        logits = F.linear(states, weight)[..., :50257]
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
    return loss


def masked_loss(model):
    bias = torch.zeros(50304, device='cuda'); bias[50257:] = -torch.inf
    def loss(tokens, targets):
        states = model.hidden(tokens)
        weight = F.pad(model.lm_head.weight, (0, 0, 0, -50257 % 64))
        logits = F.linear(states, weight).float() + bias
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    return loss


def liger_loss(model):
    sys.path.append('.gpu/site')
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss
    fused = LigerFusedLinearCrossEntropyLoss()
    def loss(tokens, targets):
        states = model.hidden(tokens)
        return fused(model.lm_head.weight.to(states.dtype), states.flatten(0, 1), targets.flatten())
    return loss


def run(name, make_loss=lambda m: m.loss, backends=None, options=None, mode=None, whole=False, capture=False, set_=None):
    torch._dynamo.reset(); torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats(); torch.manual_seed(0)
    tokens, targets = torch.randint(50257, (2, B, S), device='cuda')
    model = ours.GPT2(ours.ModelConfig()).cuda()
    optimizer = make_optimizer(model, 1e-4, .1)
    begun = time.time()
    try:
        loss = torch.compile(make_loss(model), options=options, mode=mode)
        def step():
            with torch.autocast('cuda', torch.bfloat16):
                value = loss(tokens, targets)
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
            optimizer.step()
            optimizer.zero_grad()
            return value
        context = sdpa_kernel(backends, set_priority=True) if backends else torch.enable_grad()
        with context:
            for _ in range(3): first = step()
            torch.cuda.synchronize(); compiled = time.time() - begun
            times = []
            for _ in range(6):
                t = time.perf_counter()
                for _ in range(5): value = step()
                torch.cuda.synchronize(); times.append((time.perf_counter() - t) / 5)
        times = times[1:]
        print(f'{name:40} {B * S / median(times):9,.0f} tokens/s ({B*S/max(times):,.0f} to {B*S/min(times):,.0f})  {1000 * median(times):.1f} ms'
              f'  {torch.cuda.max_memory_allocated() / 2**20:.0f} MB  compile {compiled:.0f} s  loss {value.item():.4f}', flush=True)
        if name in ('plain', 'all'):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as p:
                with (sdpa_kernel(backends, set_priority=True) if backends else torch.enable_grad()):
                    for _ in range(3): step()
                torch.cuda.synchronize()
            for e in sorted(p.key_averages(), key=lambda e: -e.device_time_total)[:22]:
                print(f'    {e.device_time_total / 3000:7.2f} ms x{e.count / 3:.0f} {e.key[:90]}', flush=True)
    except Exception as error:
        print(f'{name:40} failed: {str(error)[:150]}', flush=True)
    del model, optimizer


CUDNN = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
tune = {'max_autotune': True, 'coordinate_descent_tuning': True}
VARIANTS = {
    'plain': {}, 'padded': dict(make_loss=padded_loss), 'masked': dict(make_loss=masked_loss), 'cudnn': dict(backends=CUDNN),
    'padded cudnn': dict(make_loss=padded_loss, backends=CUDNN),
    'padded cudnn descent': dict(make_loss=padded_loss, backends=CUDNN, options={'coordinate_descent_tuning': True}),
    'padded cudnn graph': dict(make_loss=padded_loss, backends=CUDNN, mode='reduce-overhead'),
    'liger cudnn': dict(make_loss=liger_loss, backends=CUDNN),
    'all': dict(make_loss=padded_loss, backends=CUDNN, options={'coordinate_descent_tuning': True, 'epilogue_fusion': True, 'max_autotune': True}),
}
print(torch.__version__, torch.cuda.get_device_name())
if hasattr(torch.nn.attention, 'list_flash_attention_impls'):
    print('flash impls', torch.nn.attention.list_flash_attention_impls())
for name, how in VARIANTS.items():
    if not only or name in only:
        run(name, **how)
spec = importlib.util.find_spec('liger_kernel')
print('liger', spec)

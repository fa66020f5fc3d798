"""
Token reversal (see bench.py: reverse) for many seeds at once: a question of H bits is to be written in reverse
order, paid 1 if all of it is right, else 0. 100 questions a step, 8 rollouts each, 2,000 steps. The models of
all seeds are one batch of matrices, and a step is one CUDA graph.

    python trials/reversal_curve.py --out=results.jsonl 10-tpo-1 10-tpo-4 16-kept-4 ...

A run is H-method-updates[-option...]: options of tpo: plain (no standardisation), flat (no anchor); of grpo:
clip (PPO's, .2 per token), kl (.04, to the policy that wrote). As in `reverse`, a seed is not updated by a batch
without a right answer, and counts as solved (and stopped) when at most .2% of its last 100 batches are wrong.
"""
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from model import GPT2, ModelConfig  # noqa: E402
from utils import advantages  # noqa: E402

options = dict(x[2:].split('=') for x in sys.argv[1:] if x.startswith('--'))
S, n_steps, first = (int(options.get(name, value)) for name, value in
                     (('seeds', 20), ('steps', 2000), ('first_seed', 0)))
limit = float(options.get('seconds', 1e9))
lr, B, G, C, heads = 1e-3, 100, 8, 64, 4
device = 'cuda' if torch.cuda.is_available() else 'cpu'
torch.backends.cuda.matmul.allow_tf32 = True
began_all = time.time()


class Models:
    """S models of GPT2(config) in one matrix (S, P); linear layers are products of batches."""

    def __init__(self, H):
        self.config = ModelConfig(d_vocab=2, block_size=2 * H, n_layer=2, n_head=heads, d_model=C,
                                  tie_weights=False, init='unit')
        rows = []
        for seed in range(first, first + S):
            torch.manual_seed(seed)
            model = GPT2(self.config)
            self.shapes = {name: p.shape for name, p in model.named_parameters()}
            rows.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        self.one = model
        self.flat = torch.stack(rows).to(device).requires_grad_()

    def named(self):
        parts = self.flat.split([shape.numel() for shape in self.shapes.values()], dim=1)
        return {name: part.view(S, *shape) for (name, shape), part in zip(self.shapes.items(), parts)}

    def states(self, p, tokens, start=0, cache=None):
        """Logits (S, N, T, 2) at tokens (S, N, T)."""
        N, T = tokens.shape[1:]
        wide = tokens[..., None]
        x = torch.where(wide == 0, p['wte.weight'][:, None, None, 0], p['wte.weight'][:, None, None, 1])
        x = x + p['wpe.weight'][:, None, start:start + T]

        def linear(x, name):
            y = torch.bmm(x.reshape(S, N * T, -1), p[name + '.weight'].transpose(1, 2))
            y = y + p[name + '.bias'][:, None] if name + '.bias' in p else y
            return y.view(S, N, T, -1)

        def norm(x, name):
            x = F.layer_norm(x, (C,))
            return x * p[name + '.weight'][:, None, None] + p[name + '.bias'][:, None, None]

        for i in range(2):
            qkv = linear(norm(x, f'h.{i}.ln_1'), f'h.{i}.attn.c_attn')
            q, k, v = (y.view(S * N, T, heads, C // heads).transpose(1, 2) for y in qkv.split(C, dim=-1))
            if cache is not None:
                k, v = (torch.cat([old, new], dim=2) for old, new in zip(cache[i], (k, v))) if cache[i] else (k, v)
                cache[i] = (k, v)
            if T == 1:
                y = ((q * (C // heads) ** -.5) @ k.transpose(2, 3)).softmax(-1) @ v
            else:
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + linear(y.transpose(1, 2).reshape(S, N, T, C), f'h.{i}.attn.c_proj')
            y = F.gelu(linear(norm(x, f'h.{i}.ln_2'), f'h.{i}.mlp.c_fc'), approximate='tanh')
            x = x + linear(y, f'h.{i}.mlp.c_proj')
        return linear(norm(x, 'ln_f'), 'lm_head')


def learn(name):
    H, method, updates, *how = (int(x) if x.isdigit() else x for x in name.split('-'))
    models = Models(H)
    flat, m, v, t = models.flat, torch.zeros_like(models.flat), torch.zeros_like(models.flat), torch.zeros(S, 1, device=device)
    kept, n_kept = torch.zeros(S, 4097, H, dtype=torch.long, device=device), torch.zeros(S, 1, dtype=torch.long, device=device)
    error = torch.zeros(S, device=device)
    keys = slice(C, 2 * C)          # no gradient for the bias of keys, as in model.Attention
    mask = torch.ones(flat.shape[1], device=device)
    at = 0
    for key, shape in models.shapes.items():
        if key.endswith('c_attn.bias'):
            mask[at:at + shape.numel()][keys] = 0
        at += shape.numel()

    def log_probs(question, answer):
        logits = models.states(models.named(), torch.cat([question, answer], dim=2)[..., :-1])[:, :, H - 1:]
        return logits.log_softmax(-1)

    @torch.no_grad()
    def rollouts(prompt):
        p, cache = models.named(), [None, None]
        logits = models.states(p, prompt, 0, cache)[:, :, -1].repeat_interleave(G, dim=1)
        cache = [tuple(y.view(S, B, *y.shape[1:]).repeat_interleave(G, dim=1).flatten(0, 1) for y in kv) for kv in cache]
        bits = []
        for i in range(H):
            bit = (torch.rand(S, B * G, device=device) < logits.softmax(-1)[..., 1]).long()
            bits.append(bit)
            if i < H - 1:
                logits = models.states(p, bit[..., None], H + i, cache)[:, :, -1]
        return torch.stack(bits, dim=-1)

    def update(loss, any_right):
        grad, = torch.autograd.grad(loss, flat)
        with torch.no_grad():
            grad = grad * mask
            t.add_(any_right)
            m.copy_(torch.where(any_right > 0, .9 * m + .1 * grad, m))
            v.copy_(torch.where(any_right > 0, .98 * v + .02 * grad * grad, v))
            step = (m / (1 - .9 ** t)) / ((v / (1 - .98 ** t)).sqrt() + 1e-8)
            flat.sub_(torch.where(any_right > 0, lr * step, torch.zeros_like(step)))

    def step():
        prompt = torch.randint(2, (S, B, H), device=device)
        question, answer = prompt.repeat_interleave(G, dim=1), rollouts(prompt)
        right = (answer == question.flip(2)).all(2).float().view(S, B, G)
        error.copy_(1 - right.mean((1, 2)))
        any_right = (right.sum((1, 2)) > 0).float()[:, None]
        if method == 'kept':
            solved = right.any(2)                                        # (S, B)
            place = torch.where(solved, (n_kept + solved.cumsum(1) - 1) % 4096, 4096)
            kept.scatter_(1, place[..., None].expand(-1, -1, H), prompt)
            n_kept.add_(solved.sum(1, keepdim=True))
        old = None
        for _ in range(updates):
            if method == 'kept':
                index = (torch.rand(S, 256, device=device) * n_kept.clamp(1, 4096)).long()
                known = kept.gather(1, index[..., None].expand(-1, -1, H))
                log_p = log_probs(known, known.flip(2))                  # (S, 256, H, 2)
                smooth = (12.8 / (32 + n_kept.float()))[..., None]       # (S, 1, 1)
                chosen = log_p.gather(-1, known.flip(2)[..., None])[..., 0]
                loss = -((1 - smooth) * chosen + smooth * log_p.mean(-1)).sum(2).mean(1).sum()
            else:
                token = log_probs(question, answer).gather(-1, answer[..., None])[..., 0]  # (S, B G, H)
                log_pi = token.sum(2).view(S, B, G)
                old = token.detach() if old is None else old
                was = old.sum(2).view(S, B, G)
                if method == 'tpo':
                    u = right - right.mean(2, keepdim=True)
                    u = right if 'plain' in how else u / (u.square().mean(2, keepdim=True).sqrt() + 1e-6)
                    q = ((0. if 'flat' in how else was.log_softmax(2)) + u).softmax(2)
                    if 'flat' in how:       # else groups of equal rewards would be drawn towards uniform
                        q = torch.where(right.std(2, keepdim=True) > 0, q, log_pi.detach().softmax(2))
                    loss = -(q * log_pi.log_softmax(2)).sum(2).mean(1).sum()
                elif 'clip' in how:
                    A = (advantages(right.flatten(0, 1), method) * G).view(S, B * G, 1)
                    ratio = (token - old).exp()
                    gain = torch.minimum(ratio * A, ratio.clamp(.8, 1.2) * A)
                    kl = ratio * (token - old) - (ratio - 1)
                    loss = -(gain - (.04 if 'kl' in how else 0.) * kl).mean(2).mean(1).sum()
                else:
                    weights = advantages(right.flatten(0, 1), method, .1).view(S, B, G)
                    loss = -(weights * log_pi).sum(2).mean(1).sum()
            update(loss, any_right)

    if device == 'cuda':
        torch.cuda.manual_seed(1000 + first)
        whole = (flat, m, v, t, kept, n_kept)
        before = [x.detach().clone() for x in whole]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        with torch.no_grad():
            for x, value in zip(whole, before):
                x.copy_(value)
        replay = graph.replay
    else:
        torch.manual_seed(1000 + first)
        replay = step
    errors, began = torch.zeros(n_steps, S, device=device), time.time()
    for i in range(n_steps):
        replay()
        errors[i] = error
        if i % 100 == 99:
            mean = errors[:i + 1].cumsum(0)
            if ((mean[99:] - F.pad(mean, (0, 0, 1, 0))[:-100][:len(mean) - 99]) <= .2).any(0).all():
                break
    errors = errors[:i + 1].cpu()
    windows = errors.unfold(0, 100, 1).mean(-1) if len(errors) >= 100 else torch.ones(1, S)
    runs = []
    for seed in range(S):
        done = (windows[:, seed] <= .002).nonzero()
        steps = done[0].item() + 100 if len(done) else len(errors)
        mine = errors[:steps, seed]
        runs.append({'seed': first + seed, 'steps': steps, 'error': round(mine[-50:].mean().item(), 5), 'solved': len(done) > 0,
                     'curve': [round(x.mean().item(), 4) for x in mine.split(100)]})
    error_now = torch.tensor([run['error'] for run in runs])
    print(f'{name:24} error {error_now.mean():.4f} ({error_now.min():.4f} to {error_now.max():.4f}) median '
          f'{error_now.median():.4f} solved {sum(r["solved"] for r in runs)} steps {sum(r["steps"] for r in runs) / S:.0f} '
          f'{time.time() - began:.0f} s', flush=True)
    if 'out' in options:
        with open(options['out'], 'a') as file:
            file.write(json.dumps({'row': name, 'seconds': time.time() - began, 'runs': runs}) + '\n')


def check():
    models = Models(5)
    tokens = torch.randint(2, (S, 7, 9), device=device)
    mine = models.states(models.named(), tokens)
    assert torch.allclose(mine[-1].cpu(), models.one(tokens[-1].cpu()), atol=2e-2 if device == 'cuda' else 1e-4)
    cache = [None, None]
    part = [models.states(models.named(), tokens[..., :5], 0, cache)] + [models.states(models.named(), tokens[..., i:i + 1], i, cache) for i in range(5, 9)]
    assert torch.allclose(torch.cat(part, dim=2), mine, atol=2e-2 if device == 'cuda' else 1e-4)


check()
for name in sys.argv[1:]:
    if not name.startswith('--') and time.time() - began_all < limit:
        learn(name)

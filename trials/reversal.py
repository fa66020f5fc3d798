"""
A question of H bits is to be written in reverse order, paid only if all of it is right (the benchmark of Target
Policy Optimization, Kaddour 2026, arXiv 2604.06159): 100 questions per step, 8 rollouts each, 2,000 steps.

    python trials/reversal.py --length 10 --method tpo --epochs 4 --seeds 20

All seeds are trained at once, as one batch of models (torch.func). Prints JSON: error of each seed, that is,
1 - share of rollouts that are right at temperature 1, mean over the last 50 steps, and a curve.
"""
import argparse
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.attention

sys.path.insert(0, str(Path(__file__).parent))
from model import GPT2, ModelConfig  # noqa: E402
from utils import advantages  # noqa: E402

parser = argparse.ArgumentParser()
for name, default in dict(length=10, epochs=1, seeds=20, first_seed=0, steps=2000, batch=100, group=8, memory=0, every=50).items():
    parser.add_argument(f'--{name}', type=int, default=default)
for name, default in dict(lr=1e-3, kl=0., clip=0., tau=1., entropy=0.).items():
    parser.add_argument(f'--{name}', type=float, default=default)
parser.add_argument('--method', default='tpo')
parser.add_argument('--anchor', type=int, default=1)
parser.add_argument('--standardise', type=int, default=1)
parser.add_argument('--out', default='')
parser.add_argument('--name', default='')
o = parser.parse_args()
H, S, B, G = o.length, o.seeds, o.batch, o.group
device = 'cuda' if torch.cuda.is_available() else 'cpu'
config = ModelConfig(d_vocab=2, block_size=2 * H, n_layer=2, n_head=4, d_model=64, tie_weights=False, init='unit')
models = []
for seed in range(o.first_seed, o.first_seed + S):
    torch.manual_seed(seed)
    models.append(GPT2(config).to(device))
params, _ = torch.func.stack_module_state(models)
params = {name: p.detach().requires_grad_() for name, p in params.items()}
base = GPT2(config).to('meta')
optimizer = torch.optim.AdamW(params.values(), lr=o.lr, betas=(.9, .98), weight_decay=0., fused=device == 'cuda')
generator = torch.Generator(device).manual_seed(1000 + o.first_seed)


def logits(tokens):
    """(S, N, T, 2) after tokens (S, N, T), each seed by its own model."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):        # it can be batched
        return torch.func.vmap(lambda p, x: torch.func.functional_call(base, p, (x,)))(params, tokens)


@torch.no_grad()
def rollouts(question):
    """Answers (S, N, H) to questions (S, N, H)."""
    tokens = question
    for _ in range(H):
        p = logits(tokens)[:, :, -1].float().softmax(-1)[..., 1]
        bit = torch.rand(p.shape, device=device, generator=generator) < p
        tokens = torch.cat([tokens, bit.long()[..., None]], -1)
    return tokens[..., H:]


def log_probs(question, answer):
    """(S, N, H), and entropies, with gradient."""
    log_p = logits(torch.cat([question, answer], -1)[..., :-1])[:, :, H - 1:].float().log_softmax(-1)
    return log_p.gather(-1, answer[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)


def standardised(R):
    return (R - R.mean(-1, keepdim=True)) / (R.std(-1, correction=0, keepdim=True) + 1e-6)


kept = torch.zeros(S, o.memory, 2 * H, dtype=torch.long, device=device)
n_kept = torch.zeros(S, dtype=torch.long, device=device)
curve, errors, begun = [], [], time.time()
for step in range(o.steps):
    prompt = torch.randint(2, (S, B, H), device=device, generator=generator)
    question = prompt.repeat_interleave(G, 1)                               # (S, B G, H)
    answer = rollouts(question)
    right = (answer == question.flip(-1)).all(-1)                           # (S, B G)
    R = right.float().view(S, B, G)
    errors.append(1 - R.mean((1, 2)))
    if step % o.every == o.every - 1:
        curve.append(torch.stack(errors[-o.every:]).mean(0).tolist())
    any_right = right.any(1)
    if o.memory:
        for s in any_right.nonzero()[:, 0].tolist():
            new = torch.cat([question[s], answer[s]], -1)[right[s]].unique(dim=0)[:o.memory]
            at = (n_kept[s] + torch.arange(len(new), device=device)) % o.memory
            kept[s, at] = new
            n_kept[s] += len(new)
    old = None
    for epoch in range(o.epochs):
        loss = 0.
        before = [(p, p.detach().clone(), {k: v.clone() for k, v in optimizer.state[p].items()} if optimizer.state[p] else None)
                  for p in params.values()] if o.method == 'memory' else ()
        if o.method == 'memory':        # imitate right rollouts, only when there are new ones
            if not any_right.any():
                break
            at = (torch.rand(S, 256, device=device, generator=generator) * n_kept.clamp(1, o.memory)[:, None]).long()
            batch = kept.gather(1, at[..., None].expand(-1, -1, 2 * H))
            log_p, entropy = log_probs(batch[..., :H], batch[..., H:])
            loss = -log_p.sum(-1).mean(1).sum() - o.entropy * entropy.sum(-1).mean(1).sum()
        else:
            token, entropy = log_probs(question, answer)                    # (S, B G, H)
            log_pi = token.sum(-1).view(S, B, G)
            old = token.detach() if old is None else old
            if o.method == 'tpo':
                u = standardised(R) if o.standardise else R
                p_old = old.sum(-1).view(S, B, G).log_softmax(-1) if o.anchor else 0.
                q = (p_old + u / o.tau).softmax(-1)
                loss = -(q * log_pi.log_softmax(-1)).sum(-1).mean(1).sum()
            elif o.clip:                # PPO's clipped ratio per token, advantages of the group
                A = (advantages(R.flatten(0, 1), o.method, o.tau) * G).view(S, B * G, 1)
                ratio = (token - old).exp()
                gain = torch.minimum(ratio * A, ratio.clamp(1 - o.clip, 1 + o.clip) * A)
                kl = (old - token).exp() - (old - token) - 1        # k3, to the policy that wrote
                # reverse KL to the snapshot: E_theta[log theta - log old] by samples of old
                kl = ratio * (token - old) - (ratio - 1)
                loss = -(gain - o.kl * kl).mean(-1).mean(1).sum()
            else:
                weights = advantages(R.flatten(0, 1), o.method, o.tau).view(S, B, G)
                if epoch:
                    weights = weights * (log_pi - old.sum(-1).view(S, B, G)).exp().clamp(max=2).detach()
                loss = -(weights * log_pi).sum(-1).mean(1).sum()
            loss = loss - o.entropy * entropy.sum(-1).mean(1).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if o.method == 'memory':
            with torch.no_grad():
                for p, value, state in before:
                    keep = any_right.view(-1, *[1] * (p.dim() - 1))
                    p.copy_(torch.where(keep, p, value))
                    for k, v in (state or {}).items():
                        if v.dim():
                            optimizer.state[p][k].copy_(torch.where(keep, optimizer.state[p][k], v))
last = torch.stack(errors[-50:]).mean(0)
result = {'name': o.name, 'command': ' '.join(sys.argv[1:]), 'error': last.mean().item(), 'se': (last.std() / S ** .5).item() if S > 1 else None,
          'median': last.median().item(), 'errors': last.tolist(), 'curve': [sum(c) / S for c in curve], 'seconds': time.time() - begun}
print(o.name, o.method, f'H={H} error {result["error"]:.4f} +- {result["se"] or 0:.4f} median {result["median"]:.4f} {result["seconds"]:.0f} s', flush=True)
if o.out:
    with open(o.out, 'a') as file:
        file.write(json.dumps(result) + '\n')

"""For local_expectation.py: what its last line tells of a network, and its self-test."""
from local_expectation import DEFAULTS, Options, cut, draw, local_expectation, make
import numpy as np
import torch
import torch.nn.functional as F


@torch.no_grad()
def test(net, val, o):
    """Losses on val with own greedy thoughts, sampled, shuffled, random and without, and how they vary."""
    generator, found, said, soft = torch.Generator(o.device).manual_seed(0), {}, [], []
    for rows in np.array_split(np.linspace(0, len(val) - 1, o.eval_sequences).astype(int), max(1, o.eval_sequences // 64)):
        x, y = cut(val[rows], o.device)
        plain, k, v = net.plain(x)
        kinds = {'none': -net.log_p(plain[:, :, None], y)}
        if o.method != 'none':
            logits = net.choices(plain, x if o.method == 'frozen_net' else None)
            z = logits.argmax(-1) * (o.method != 'filler')
            noise = torch.rand(z.shape, generator=generator, device=o.device)
            order = torch.randperm(z[..., 0].numel(), generator=generator, device=o.device)
            sets = {'own': z, 'sampled': draw(logits, noise) * (o.method != 'filler'),
                    'shuffled': z.flatten(0, 1)[order].view(z.shape), 'random': (noise * net.A).long()}
            log_p = net.log_p(net.read(plain, k, v, net.hear(torch.stack(list(sets.values()), 2))), y)
            kinds |= {name: -log_p[:, :, i:i + 1] for i, name in enumerate(sets)}
            said.append(F.one_hot(z, net.A).float().mean((0, 1)))
            soft.append(-(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean())
        for name, loss in kinds.items():
            found.setdefault(name, []).append(loss.mean((1, 2)))
    found = {name: torch.cat(parts).double() for name, parts in found.items()}
    own = found.setdefault('own', found['none'])
    error = lambda x: (x.std() / len(x) ** .5).item()
    result = {'val_loss': own.mean().item(), 'se': error(own)}
    result |= {name: loss.mean().item() for name, loss in found.items() if name != 'own'}
    result['above_own'] = {name: [(x - own).mean().item(), error(x - own)] for name, x in found.items() if name != 'own'}
    if said:
        share = torch.stack(said).mean(0)
        result['entropy_greedy'] = (-(share * share.clamp(min=1e-9).log()).sum(-1)).tolist()
        result['entropy_pi'] = torch.stack(soft).mean().item()
    return result


def diagnose(net, train, o):
    """Where the signal is lost: effect of alternatives, gradients of reward, answer and straight-through."""
    if o.method in ('none', 'filler'):
        return {}
    weights, rng = [p for p in net.parameters()], np.random.default_rng(12345)
    generator = torch.Generator(o.device).manual_seed(1)
    grad = lambda out, grads=None: [g if g is not None else torch.zeros_like(p) for g, p in zip(
        torch.autograd.grad(out, weights, grads, retain_graph=True, allow_unused=True), weights)]
    paid = not o.method.startswith('frozen')
    sums, std, size = {}, 0., 2 * o.diagnose_batches
    for i in range(size):
        x, y = cut(train[rng.integers(len(train), size=o.batch)], o.device)
        plain, k, v = net.plain(x)
        logits = net.choices(plain, x if o.method == 'frozen_net' else None)
        pi, z = logits.softmax(-1), draw(logits, torch.rand(*x.shape, net.T, generator=generator, device=o.device))
        log_p = net.log_p(net.read(plain, k, v, net.alternatives(z)), y).unflatten(-1, (net.T, net.A))
        std += log_p.detach().std(-1, correction=0).mean().item() / size
        parts = {'answer': grad(-(pi.detach() * log_p).sum(-1).mean())}
        if paid:
            parts[f'reward{i % 2}'] = grad(-local_expectation(pi, log_p).mean())
            hard, leaf = net.hear(z[:, :, None]).detach(), pi.detach().requires_grad_()
            soft = net.hear(leaf[:, :, None])
            loss = -net.log_p(net.read(plain, k, v, hard + soft - soft.detach()), y).mean()
            parts['straight'] = grad(pi, torch.autograd.grad(loss, leaf, retain_graph=True)[0])
        for name, part in parts.items():
            sums[name] = [a + b / size for a, b in zip(sums[name], part)] if name in sums else [b / size for b in part]
    flat = {name: torch.cat([g.flatten() for g in part]) for name, part in sums.items()}
    cos = lambda a, b: F.cosine_similarity(a, b, dim=0).item()
    result = {'std_a': std, 'norm_answer': flat['answer'].norm().item()}
    if paid:
        at = next(i for i, p in enumerate(weights) if p is net.model.lm_head.weight)
        head = [sums[f'reward{i}'][at][net.first:].flatten() for i in range(2)]
        reward = flat['reward0'] + flat['reward1']
        result |= {'norm_policy': reward.norm().item(), 'cos_halves': cos(flat['reward0'], flat['reward1']),
                   'cos_halves_head': cos(*head), 'cos_policy_answer': cos(reward, flat['answer']),
                   'cos_policy_straight': cos(reward, flat['straight']), 'norm_straight': flat['straight'].norm().item()}
    return result


def self_test():
    """Readings equal those of model.py; the gradient is that of the enumerated expected reward."""
    for init, gate in (('gpt2', 'open'), ('unit', 'none'), ('unit', 'open')):
        o = Options(DEFAULTS | dict(init=init, gate=gate, device='cpu', text_len=6, d_model=16))
        T, A, B, S = 2, 3, 2, 6
        net = make(5, o, T, A).double()
        x, y = torch.randint(5, (2, B, S), generator=torch.Generator().manual_seed(1))
        every = torch.cartesian_prod(torch.arange(A), torch.arange(A))          # (A A, T)
        plain, k, v = net.plain(x)
        states = net.read(plain, k, v, net.hear(every.expand(B, S, -1, -1)))
        offset = net.first + A * torch.arange(T)
        given = (every + offset)[None, :, None].expand(B, -1, S, -1).flatten(0, 1)      # (B A A, S, T)
        *_, plain_, last = net.model.think_everywhere(x, torch.rand(given.shape), at_once=T, given=given)
        last = last.unflatten(0, (B, -1)).transpose(1, 2)
        worst = [(plain - plain_).abs().max().item(), (states - last).abs().max().item()]
        log_p, pi = net.log_p(states, y), net.choices(plain).softmax(-1)
        together = pi[:, :, 0, every[:, 0]] * pi[:, :, 1, every[:, 1]]          # (B, S, A A)
        exact = (together * log_p.detach()).sum(-1).mean()
        mine = answer = 0.
        for j, z in enumerate(every):
            z = z.expand(B, S, T)
            others = net.log_p(net.read(plain, k, v, net.alternatives(z)), y).unflatten(-1, (T, A))
            spelled = z[:, :, None, None].expand(B, S, T, A, T).clone()
            for i in range(T):
                spelled[:, :, i, :, i] = torch.arange(A)
            again = net.log_p(net.read(plain, k, v, net.hear(spelled.flatten(2, 3))), y).unflatten(-1, (T, A))
            worst.append((others - again).abs().max().item())
            weight = together[..., j].detach()
            mine = mine + (weight * local_expectation(pi, others)).mean()
            answer = answer + (weight[..., None] * (pi * others).sum(-1)).sum((0, 1)) / (B * S)
        weights = [p for p in net.parameters()]
        a, b = (torch.cat([g.flatten() for g in torch.autograd.grad(
            f, weights, retain_graph=True, allow_unused=True) if g is not None]) for f in (exact, mine))
        worst += [(answer - exact).abs().max().item(), (a - b).abs().max().item() / a.abs().max().item()]
        print(init, gate, 'worst errors', max(worst), 'largest gradient', a.abs().max().item())
        assert max(worst) < 1e-9 and a.abs().max() > 1e-6, worst
    print('self-test passed')

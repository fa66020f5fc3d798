"""Trial: thoughts before every character learned by reward alone, with the local expectation gradient.

Every position writes T = 8 thoughts at once, each one of A = 8 tokens, from its plain state, and reads their
sum in one pass, which no other position sees. For each thought all A alternatives are read with the others as
sampled, so that its credit is exact given the others (Titsias & Lazaro-Gredilla 2015).

    python trials/local_expectation.py --self_test
    python trials/local_expectation.py --variant=leg --seed=0 --steps=3000 --device=cuda:0 --out=leg.json
Any option of DEFAULTS may follow as --name=value. The last line is one JSON object. trials/leg_all.py runs all.
"""
import ast, copy, json, os, sys, time
sys.path.insert(0, os.getcwd())
from model import GPT2, GPT2Thinking, ModelConfig
from leg_variants import VARIANTS
from utils import Knobs, load_text, make_optimizer, sample, schedule
import numpy as np
import torch
import torch.nn.functional as F

DEFAULTS = dict(
    variant='leg', seed=0, steps=3000, device='auto', out='', data='data/shakespeare_char', self_test=False,
    eval_sequences=800, diagnose_batches=8, compile=False, text_len=64, batch=16, d_model=128,
    method='leg',           # none | filler | frozen | frozen_net | straight | reinforce | leg
    init='gpt2',            # gpt2 | unit
    spread=3.,              # size of the thoughts' embeddings at first, as a multiple of the text's
    untie=False,            # thoughts are written and read by different numbers; with init=unit always
    gate='open',            # open: plain state + gate * thinking state | none: thinking state
    policy_weight=1.,
    normalise=False,        # centred log p over its rms over the batch; the price is then in this unit
    price=0.,               # on tokens used more than their fair share
    entropy=0., info=0.,    # weights of bonuses, falling linearly to 0 ...
    until=.5,               # ... at this share of the steps
    detach=False,           # only the head of thoughts learns by reward
    warm=0,                 # steps by straight-through, with sampled thoughts, before the method
    others='sampled',       # sampled | greedy: values of the other thoughts (leg)
    group=8)                # rollouts (reinforce)


class Net(torch.nn.Module):
    """GPT2Thinking with one layer, whose positions read many sets of thoughts at once."""

    def __init__(self, model, T, A):
        super().__init__()
        self.model, self.T, self.A, self.first = model, T, A, model.config.d_normal_vocab
        self.frozen = [None]    # in a list: no submodule

    def heads(self, x):         # (..., d) -> queries, keys, values (..., H, D)
        return self.model.h[0].attn.c_attn(x).unflatten(-1, (3, self.model.config.n_head, -1)).unbind(-3)

    def plain(self, x):
        """States (B, S, d) of text x (B, S), and keys and values (B, H, S, D)."""
        model, block, S = self.model, self.model.h[0], x.shape[1]
        e = model.wte(x) + model.wpe.weight[:S]
        q, k, v = (part.transpose(1, 2) for part in self.heads(block.ln_1(e)))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        e = e + block.attn.c_proj(y.transpose(1, 2).flatten(-2))
        return model.ln_f(e + block.mlp(block.ln_2(e))), k, v

    def read(self, plain, k, v, x):
        """States (B, S, M, d) that predict, after thoughts that are embedded as x (B, S, M, d)."""
        (B, S, M, _), model, block = x.shape, self.model, self.model.h[0]
        x = x + model.wpe.weight[1:S + 1, None]
        q, k1, v1 = (part.permute(0, 3, 1, 2, 4) for part in self.heads(block.ln_1(x)))     # (B, H, S, M, D)
        future = torch.ones(S, S, dtype=torch.bool, device=x.device).triu(1)[:, None]
        text = (q.flatten(2, 3) @ k.transpose(-1, -2)).unflatten(2, (S, M)).masked_fill(future, -torch.inf)
        p = (torch.cat([text, (q * k1).sum(-1, keepdim=True)], -1) * q.shape[-1] ** -.5).softmax(-1)
        y = (p[..., :-1].flatten(2, 3) @ v).unflatten(2, (S, M)) + p[..., -1:] * v1
        x = x + block.attn.c_proj(y.permute(0, 2, 3, 1, 4).flatten(-2))
        state = model.ln_f(x + block.mlp(block.ln_2(x)))
        return state if model.config.gate is None else plain[:, :, None] + model.gate * state

    def log_p(self, states, y):
        """log p (B, S, M) of next tokens y (B, S) at states (B, S, M, d)."""
        logits = F.linear(states, self.model.lm_head.weight[:self.first])
        y = y[..., None].expand(logits.shape[:-1])
        return -F.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction='none').view(y.shape)

    @property
    def rows(self):             # (T, A, d), embeddings of thoughts
        return self.model.wte.weight[self.first:self.first + self.T * self.A].unflatten(0, (self.T, self.A))

    def choices(self, plain, x=None):
        """Logits (B, S, T, A) of thoughts."""
        frozen = self.frozen[0]
        if frozen is not None:
            with torch.no_grad():
                plain = plain.detach() if x is None else frozen.plain(x)[0]
                return frozen.choices(plain)
        weight = self.model.lm_head.weight[self.first:self.first + self.T * self.A]
        return F.linear(plain, weight).unflatten(-1, (self.T, self.A))

    def hear(self, z):
        """Sums of embeddings (B, S, M, d) of thoughts z (B, S, M, T) or their weights (B, S, M, T, A)."""
        z = z if z.is_floating_point() else F.one_hot(z, self.A).to(self.rows.dtype)
        return z.flatten(-2) @ self.rows.flatten(0, 1) * self.T ** -.5

    def alternatives(self, z):
        """Sums (B, S, T A, d): thought i of z (B, S, T) replaced by a, for all i and a."""
        said = torch.einsum('bsia,iad->bsid', F.one_hot(z, self.A).to(self.rows.dtype), self.rows)
        x = (said.sum(2, keepdim=True) - said)[:, :, :, None] + self.rows       # (B, S, T, A, d)
        return x.flatten(2, 3) * self.T ** -.5


def cut(rows, device):
    rows = torch.from_numpy(rows.astype(np.int64)).to(device)
    return rows[:, :-1], rows[:, 1:]


def draw(logits, noise):
    return sample(logits.detach().flatten(0, -2), noise.flatten()).view(noise.shape)


def local_expectation(pi, rewards):
    """Expected reward (B, S), summed over thoughts, of pi (B, S, T, A); rewards of alternatives as pi."""
    return (pi * rewards.detach()).sum((-1, -2))


def losses(net, x, y, noise, frequency, falling, o, method):
    """Answer loss, the policy's loss, shares (T, A) of tokens. noise: (B, S, group, T)."""
    plain, k, v = net.plain(x)
    zero = plain.new_zeros(())
    if method == 'none':
        return -net.log_p(plain[:, :, None], y).mean(), zero, frequency
    logits = net.choices(plain.detach() if o.detach else plain, x if method == 'frozen_net' else None)
    pi = logits.softmax(-1)
    used = pi.detach().mean((0, 1))
    if method in ('filler', 'frozen', 'frozen_net', 'straight'):
        # greedy as in supervised_rollout_think.py; sampled when it warms up for reward
        z = logits.argmax(-1) if not (o.warm and method == 'straight') else draw(logits, noise[:, :, 0])
        heard = net.hear((z * (method != 'filler'))[:, :, None])
        if method == 'straight':
            soft = net.hear(pi[:, :, None])
            heard = heard.detach() + soft - soft.detach()
        return -net.log_p(net.read(plain, k, v, heard), y).mean(), zero, used
    if method == 'reinforce':
        z = draw(logits[:, :, None].expand(-1, -1, o.group, -1, -1), noise)     # (B, S, G, T)
        log_p = net.log_p(net.read(plain, k, v, net.hear(z)), y)
        log_pi = logits.log_softmax(-1)[:, :, None].expand(*z.shape, -1).gather(-1, z[..., None]).sum((-1, -2))
        gain = (log_p - log_p.mean(-1, keepdim=True)).detach()
        gain = gain / (gain.square().mean().sqrt() + 1e-8) if o.normalise else gain
        answer, policy = -log_p.mean(), -(gain * log_pi).mean()
    else:
        z = logits.argmax(-1) if o.others == 'greedy' else draw(logits, noise[:, :, 0])
        log_p = net.log_p(net.read(plain, k, v, net.alternatives(z)), y).unflatten(-1, (net.T, net.A))
        answer = -(pi.detach() * log_p).sum(-1).mean()
        gain = (log_p - (pi * log_p).sum(-1, keepdim=True)).detach()
        if o.normalise:
            gain = gain / ((pi.detach() * gain.square()).sum(-1).mean().sqrt() + 1e-8)
        excess = (frequency * net.A / 1.2).clamp(min=1).log()   # a fifth more is chance
        policy = -local_expectation(pi, gain - o.price * excess).mean()
    policy = o.policy_weight * policy
    if o.entropy or o.info:
        mean = pi.mean((0, 1))
        given = -(pi * logits.log_softmax(-1)).sum(-1).mean((0, 1)).sum()       # over parts
        whole = -(mean * mean.clamp(min=1e-9).log()).sum()
        policy = policy - falling * (o.entropy * given + o.info * (whole - given))
    return answer, policy, used


# ---- training ----

def make(d_vocab, o, T=8, A=8):
    torch.manual_seed(o.seed)
    tied = o.init == 'gpt2' and not o.untie
    model = GPT2(ModelConfig(d_vocab, o.text_len, 1, 4, o.d_model, tie_weights=tied, init=o.init))
    model = GPT2Thinking.from_normal(model, T * A, o.spread, 1. if o.gate == 'open' else None, o.text_len + T)
    net = Net(model.to(o.device), T, A)
    if o.method.startswith('frozen'):
        net.frozen[0] = copy.deepcopy(net)
    return net


def train(o):
    from leg_diagnose import diagnose, test
    knobs = Knobs(init_from='scratch')
    knobs.checkpoint = None
    text, val, d_vocab, _ = load_text(o.data, knobs)
    text, val = (np.lib.stride_tricks.sliding_window_view(t, o.text_len + 1) for t in (text, val))
    torch.set_float32_matmul_precision('high')
    net = make(d_vocab, o)
    optimizer = make_optimizer(net, 2e-3, .1, betas=(.9, .99))
    learn = torch.compile(losses, dynamic=False) if o.compile else losses
    frequency = torch.full((net.T, net.A), 1 / net.A, device=o.device)
    generator = torch.Generator(o.device).manual_seed(o.seed)
    curve, in_training, begun = [], 0., time.time()
    looks = {round(o.steps * i / 3) for i in range(4)}
    group = o.group if o.method == 'reinforce' else 1
    for step in range(o.steps + 1):
        if step in looks:
            if 'cuda' in o.device:
                torch.cuda.synchronize()
            in_training += time.time() - begun
            curve.append({'step': step, **test(net, val, o), **diagnose(net, text, o)})
            print(json.dumps({name: x for name, x in curve[-1].items() if isinstance(x, (int, float))}), flush=True)
            begun = time.time()
        if step == o.steps:
            break
        schedule(optimizer, 2e-3, step, o.steps, 100, cosine=True)
        x, y = cut(text[np.random.default_rng([o.seed, step]).integers(len(text), size=o.batch)], o.device)
        noise = torch.rand(*x.shape, group, net.T, generator=generator, device=o.device)
        falling = torch.full((), max(0., 1 - step / (o.until * o.steps)), device=o.device)
        answer, policy, used = learn(net, x, y, noise, frequency, falling, o, 'straight' if step < o.warm else o.method)
        frequency = frequency.lerp(used, .1)
        (answer + policy).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.)
        optimizer.step()
        optimizer.zero_grad()
    options = {name: x for name, x in o.items() if x != DEFAULTS[name] and name not in ('out', 'device')}
    return {'variant': o.variant, 'seed': o.seed, 'steps': o.steps, 'seconds': round(in_training, 1),
            'ms_a_step': round(1000 * in_training / o.steps, 2), **curve[-1], 'options': options, 'curve': curve}


class Options(dict):
    __getattr__ = dict.__getitem__


def parse(arguments):
    given = dict((a.lstrip('-').split('=', 1) + ['True'])[:2] for a in arguments)
    if unknown := given.keys() - DEFAULTS.keys():
        raise SystemExit(f'unknown: {unknown}')
    given = {k: v if isinstance(DEFAULTS[k], str) else type(DEFAULTS[k])(ast.literal_eval(v)) for k, v in given.items()}
    o = Options(DEFAULTS | VARIANTS[given.get('variant', 'leg')] | given)
    o['device'] = o.device if o.device != 'auto' else 'cuda' if torch.cuda.is_available() else 'cpu'
    return o


if __name__ == '__main__':
    sys.modules['local_expectation'] = sys.modules['__main__']
    o = parse(sys.argv[1:])
    if o.self_test:
        from leg_diagnose import self_test
        self_test()
        raise SystemExit
    line = json.dumps(train(o))
    if o.out:
        with open(o.out, 'w') as file:
            file.write(line + '\n')
    print(line)

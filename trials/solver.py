"""One arm. python trial.py out=FILE arm=own|none|filler|random|chain key=value ..."""
import json, lzma, sys, time, types
import numpy as np, torch, torch.nn.functional as F
T0 = time.time()
K = dict(arm='own', out='log.jsonl', dir='out/trial', tiny=0, steps=3000, max_seconds=500., B=48, G=8, T=9, extra=0, codes=64,
         data='data.pt', mix='', power=1.5, grow=0, stage1=0, m1=.75, prof=0, polmask=0, kmax=9, aux=0., advance=0., hardest=.5, adv='grpo', eps=.01, lr_out=1e-4, hash=0., chain_last=1, seed=0, lr=1e-4, lr_new=2e-3, warm=50, decay=.3, clip=1.,
         price=3., fair=32., ent=.05, ent_end=.01, ent_steps=2000, policy='free', reader='free', masked=.5, unmask_at=1.,
         out_std=.0, in_std=1., eval_every=200, n_eval=200, n_train=0, rl_weight=1., clamp=-8., beta2=.95, micro=0, save='', res16=0)
for a in sys.argv[1:]:
    k, v = a.split('=', 1); assert k in K, k; K[k] = type(K[k])(v)
k = types.SimpleNamespace(**K)
dev = 'cuda' if torch.cuda.is_available() else 'cpu'
torch.manual_seed(k.seed); torch.set_num_threads(1)
d = torch.load(f'{k.dir}/{k.data}')
keep = d['level'] <= k.kmax
for n in ('q', 'sent', 'a', 'tot', 'level', 'val'): d[n] = d[n][keep]
q, sent, ans, tot = (d[n].to(dev) for n in ('q', 'sent', 'a', 'tot')); q, sent, ans, tot = q.long(), sent.long(), ans.long(), tot.long()
S, A = q.shape[1], ans.shape[1]
level, val = d['level'], d['val']
NL = int(level.max()); ops = (tot > 0).sum(1).cpu()
n_th = (ops + k.extra).to(dev) if k.arm != 'none' else torch.zeros(len(q), dtype=torch.long, device=dev)
if k.arm != 'none': n_th = n_th.clamp(max=k.T)
T = 0 if k.arm == 'none' else int(n_th.max())
G = k.G if k.arm in ('own', 'random') else 1
L, H, KV, D, C, FF = 30, 9, 3, 64, 576, 1536
P = {}
def load():
    raw = lzma.open(f'{k.dir}/model.xz').read(); n = len(raw) // 20
    sc = np.frombuffer(raw[:n * 4], np.uint8).reshape(4, n).T.copy().view(np.float16).astype(np.float32)
    nib = np.frombuffer(raw[n * 4:], np.uint8).reshape(n, 16)
    x = np.concatenate([nib & 15, nib >> 4], 1) * sc[:, :1] + sc[:, 1:]
    w = torch.from_numpy(x).view(-1); shapes = [(576, C), (192, C), (192, C), (C, C), (FF, C), (FF, C), (C, FF)]
    per = sum(a * b for a, b in shapes); w = w.view(L, per); parts, o = [], 0
    for a, b in shapes: parts.append(w[:, o:o + a * b].reshape(L, a, b)); o += a * b
    return parts
if k.tiny:
    L = 2; parts = [torch.randn(L, a, b) * .04 for a, b in [(576, C), (192, C), (192, C), (C, C), (FF, C), (FF, C), (C, FF)]]
else: parts = load()
P['qkv'] = torch.cat(parts[:3], 1); P['o'] = parts[3]; P['gu'] = torch.cat(parts[4:6], 1); P['down'] = parts[6]
P['norms'] = d['norms'][:L]; P['norm'] = d['norm']; P['emb'] = d['emb'].float()
P['th_in'] = d['emb_mean'] + k.in_std * d['emb_std'] * torch.randn(k.codes + 1, C)      # the last: start of thoughts
P['th_out'] = k.out_std * torch.randn(k.codes, C)
P = {n: x.to(dev).clone().requires_grad_() for n, x in P.items()}
V = len(P['emb'])
bf = torch.bfloat16 if dev == 'cuda' else torch.float32
inv = 1e5 ** (-torch.arange(0, D, 2, device=dev).float() / D)

def weights():
    return [P[n].to(bf).unbind(0) for n in ('qkv', 'o', 'gu', 'down', 'norms')]
def embed(ids):     # normal tokens, then thoughts, then start
    return F.embedding(ids, torch.cat([P['emb'], P['th_in']]))
def forward(W, x, pos, bias, cache=None, keep=False):
    """x (B, N, C) float32; bias (B, 1, N, M) additive; cache: list of (k, v) before x."""
    B, N, _ = x.shape
    f = pos[..., None].float() * inv; cos, sin = (torch.cat([g, g], -1)[:, None].to(bf) for g in (f.cos(), f.sin()))
    rot = lambda y: y * cos + torch.cat([-y[..., D // 2:], y[..., :D // 2]], -1) * sin
    new = []
    for l in range(L):
        h = F.rms_norm(x.to(bf), (C,), W[4][l][0], 1e-5)
        y = (h @ W[0][l].T).view(B, N, H + 2 * KV, D).transpose(1, 2)
        y = torch.cat([rot(y[:, :H + KV]), y[:, H + KV:]], 1); qq, kk, vv = y.split([H, KV, KV], 1)
        if cache: kk, vv = torch.cat([cache[l][0], kk], 2), torch.cat([cache[l][1], vv], 2)
        if keep: new.append((kk, vv))
        y = F.scaled_dot_product_attention(qq, kk.repeat_interleave(3, 1), vv.repeat_interleave(3, 1), attn_mask=bias)
        x = x + (y.transpose(1, 2).reshape(B, N, C) @ W[1][l].T)
        h = F.rms_norm(x.to(bf), (C,), W[4][l][1], 1e-5)
        g, u = (h @ W[2][l].T).chunk(2, -1)
        x = x + (F.silu(g) * u) @ W[3][l].T
    return F.rms_norm(x, (C,), P['norm'], 1e-5), new
def to_bias(see):   # (B, N, M) -> additive, padded so that rows are aligned
    b = torch.zeros(see.shape, device=dev, dtype=bf).masked_fill(~see, -1e4)
    M = b.shape[-1]; b = F.pad(b, (0, -M % 8))[..., :M] if dev == 'cuda' else b
    return b[:, None]

# layout of a row: question S | G x (policy slots: start, t1..t_{T-1} | reader: start, t1..tT, a1..a_{A-1})
def layout(i, masked, G, see_th=True):
    """Attributes for problems i (B,); masked (B,): bool. Returns positions, visibility (B, N, N)."""
    B = len(i); se, valid = sent[i], sent[i] >= 0
    posq = (valid.long().cumsum(1) - 1).clamp(min=0); n_q = valid.sum(1); nt = n_th[i]
    s = torch.arange(T, device=dev); r = torch.arange(T + A, device=dev)     # r: start, T thoughts, A-1 answer tokens
    after = (r > T)[None]
    pol_ok = s < nt[:, None].clamp(min=1) if T else valid[:, :0]
    read_ok = after | (r == 0) | (r <= nt[:, None])
    order_r = torch.where(after, r - T + nt[:, None], r.expand(B, -1))
    pos = torch.cat([posq] + [torch.cat([n_q[:, None] + s, n_q[:, None] + order_r], 1)] * G, 1)
    nr = 2 * T + A; N = S + G * nr
    seg = torch.cat([torch.full((S,), -1, device=dev), torch.arange(G, device=dev).repeat_interleave(nr)])
    kind = torch.cat([torch.zeros(S, device=dev), torch.cat([torch.ones(T, device=dev), torch.full((T + A,), 2., device=dev)]).repeat(G)]).long()
    idx = torch.arange(N, device=dev)
    ok = torch.cat([valid] + [torch.cat([pol_ok, read_ok], 1)] * G, 1)
    causal = idx[:, None] >= idx
    qq = (kind == 0)[None] & (kind == 0)[:, None] & causal
    own = (seg[:, None] == seg) & (kind[:, None] == kind) & causal & (kind > 0)
    toq = (kind > 0)[:, None] & (kind == 0)[None]
    see = (qq | own | toq)[None] & ok[:, None]
    m = masked[:, None, None]; sq = F.pad(se, (0, N - S), value=0)[:, None]       # (B, 1, N)
    if T:
        slot = torch.cat([torch.zeros(S, device=dev).long(), torch.cat([s, r * 0]).repeat(G)])[None, :, None]
        pol, rd = (kind == 1)[None, :, None], (kind == 2)[None, :, None]; isq = (kind == 0)[None, None]
        if k.policy != 'free':
            far = sq > slot + 2
            if k.policy == 'forget': far = far | ((sq >= 1) & (sq < slot + 2) & (slot > 0))
            mp = m | (k.polmask > 0)
            see = see & ~(mp & pol & isq & far)
            if k.policy == 'forget': see = see & ~(mp & pol & (~isq) & (idx[:, None] != idx)[None])
        if k.reader == 'one':       # answers see the last thought alone
            rr = torch.cat([torch.full((S,), -1, device=dev), torch.cat([s - 9, r]).repeat(G)])
            ans_row = rd & (rr[None, :, None] >= nt[:, None, None])
            see = see & ~(m & rd & isq) & ~(m & ans_row & (rr[None, None] >= 0) & (rr[None, None] < nt[:, None, None]))
            see = see & ~(m & rd & ~ans_row & ~isq & (idx[:, None] != idx)[None])
        if k.reader == 'hide': see = see & ~(m & rd & isq)
        if k.reader == 'last': see = see & ~(m & rd & isq & (sq >= 1) & (sq < nt[:, None, None] + 1 - k.extra))
    return pos, see | torch.eye(N, device=dev, dtype=torch.bool)

START = V + k.codes
def think(W, i, masked, G, noise=None):
    """Codes (B, G, T): sampled with noise, else greedy."""
    B, nr = len(i), 2 * T + A
    pos, see = layout(i, masked, G)
    cols = (S + torch.arange(G, device=dev)[:, None] * nr + torch.arange(T, device=dev))     # (G, T)
    _, cache = forward(W, embed(q[i]), pos[:, :S], to_bias(see[:, :S, :S]), keep=True)
    tok, codes = torch.full((B, G), START, device=dev), []
    for t in range(T):
        rows = cols[:, t]; keys = torch.cat([torch.arange(S, device=dev), cols[:, :t + 1].T.reshape(-1)])
        h, cache = forward(W, embed(tok), pos[:, rows], to_bias(see[:, rows][:, :, keys]), cache, True)
        lg = (h @ P['th_out'].T).float()
        if noise is not None: lg = lg - (-noise[:, :, t].clamp(1e-9, 1 - 1e-7).log()).log()
        c = lg.argmax(-1); codes.append(c); tok = V + c
    return torch.stack(codes, 2)
def read(W, i, codes, masked, G):
    """log pi (B, G, T) and entropy of codes; answer log p (B, G, A), argmax right (B, G, A). codes (B, G, T)."""
    B, a = len(i), ans[i]
    st = torch.full((B, G, 1), START, device=dev); th = V + codes
    x = torch.cat([st, th[..., :-1]] if T else [st[..., :0]], 2)
    x = torch.cat([x, st, th, a[:, None, :-1].clamp(min=0).expand(B, G, A - 1)], 2).flatten(1)
    pos, see = layout(i, masked, G)
    h, _ = forward(W, embed(torch.cat([q[i], x], 1)), pos, to_bias(see))
    h = h[:, S:].view(B, G, 2 * T + A, C)
    pol = (h[:, :, :T] @ P['th_out'].T).float().log_softmax(-1)
    ok = (torch.arange(T, device=dev) < n_th[i][:, None])[:, None]
    log_pi = pol.gather(-1, codes[..., None])[..., 0].masked_fill(~ok, 0.)
    entropy = -(pol.exp() * pol).sum(-1).masked_fill(~ok, 0.)
    # answer token j is predicted from: last valid thought (j=0), then answer tokens
    first = h[:, :, T:].gather(2, n_th[i][:, None, None, None].expand(B, G, 1, C))
    ha = torch.cat([first, h[:, :, 2 * T + 1:]], 2)
    lp = (ha @ P['emb'].T).float().log_softmax(-1)
    pad = a < 0; tgt = a.clamp(min=0)[:, None, :, None].expand(B, G, A, 1)
    lpa = lp.gather(-1, tgt)[..., 0].masked_fill(pad[:, None], 0.)
    right = (lp.argmax(-1) == tgt[..., 0]) | pad[:, None]
    if not k.aux or not T: return log_pi, entropy, lpa, right
    last = h.gather(2, (n_th[i] - 1).clamp(min=0)[:, None, None, None].expand(B, G, 1, C))[:, :, 0]     # where the last thought is predicted
    read.aux = (last @ P['emb'].T).float().log_softmax(-1).gather(-1, a[:, None, 4:5].expand(B, G, 1)).mean()
    return log_pi, entropy, lpa, right

freq = torch.full((max(T, 1), k.codes), 1 / k.fair, device=dev)
hot = dict(i=torch.zeros(k.B, dtype=torch.long, device=dev), masked=torch.zeros(k.B, dtype=torch.bool, device=dev),
           ent=torch.tensor(k.ent, device=dev), top=torch.tensor(1, device=dev), lr=torch.tensor(0., device=dev))
seen = torch.zeros(10, device=dev); ema = torch.zeros((), device=dev); ops_d = ops.to(dev); cur = [1, 0]
def chain_codes(i): return (tot[i] % k.codes)[:, None, :T]
def losses():
    i, masked = hot['i'], hot['masked']; W = weights(); B = k.B
    if k.arm == 'own':
        with torch.no_grad(): codes = think([[w.detach() for w in ws] for ws in W], i, masked, G, torch.rand(B, G, T, k.codes, device=dev))
    elif k.arm == 'random': codes = torch.randint(k.codes, (B, G, T), device=dev)
    elif k.arm == 'chain': codes = chain_codes(i)
    else: codes = torch.zeros(B, G, T, dtype=torch.long, device=dev)
    log_pi, entropy, lpa, right = read(W, i, codes, masked, G)
    lp = lpa.sum(-1)
    loss = -lp.mean()
    if k.aux and T: loss = loss - k.aux * read.aux
    if T:
        sel = ((masked | (k.masked == 0)) & (ops_d[i] == hot['top'])).float(); n = sel.sum()
        acc = (right.all(-1).float().mean(1) * sel).sum() / n.clamp(min=1)
        ema.copy_(torch.where(n > 0, ema.lerp(acc, .1), ema))
    if k.arm == 'chain': loss = loss - log_pi.sum(-1).mean()
    if k.arm == 'own':
        ok = (torch.arange(T, device=dev) < n_th[i][:, None])[:, None].expand(B, G, T)
        one = F.one_hot(codes, k.codes).float() * ok[..., None]
        used = one.sum((0, 1)) / ok.sum((0, 1)).clamp(min=1)[:, None]
        freq.lerp_(used, .1)
        share = freq[torch.arange(T, device=dev), codes]
        over = ((share * k.fair / 1.2).clamp(min=1).log() * ok).sum(-1)
        r = lp.detach().clamp(min=k.clamp) - k.price * over
        w = (r - r.mean(1, keepdim=True)) / G
        if k.adv == 'grpo': w = w / (r.std(1, keepdim=True) + k.eps)
        loss = loss - k.rl_weight * (w * log_pi.sum(-1)).sum(1).mean() - hot['ent'] * entropy.sum(-1).mean()
        s = torch.stack([loss, lp.mean(), lp[masked].mean() if dev == 'cpu' else (lp * masked[:, None]).sum() / masked.sum().clamp(min=1) / G,
                         right.all(-1).float().mean(), entropy.sum() / ok.sum(), over.mean(), lp.std(1).mean(), (used > .2 / k.fair).sum().float(), lp.mean(), lp.mean()])
    else: s = torch.stack([loss, lp.mean(), lp.mean(), right.all(-1).float().mean()] + [lp.mean()] * 6)
    seen.copy_(s.detach())
    return loss

body = [P[n] for n in ('qkv', 'o', 'gu', 'down', 'norms', 'norm', 'emb')]; 
opt = [torch.optim.AdamW(g, lr=torch.tensor(1e-9, device=dev), betas=(.9, k.beta2), weight_decay=0., fused=dev == 'cuda', capturable=dev == 'cuda') for g in (body, [P['th_in']], [P['th_out']])]
def step():
    loss = losses()
    for p in P.values(): p.grad = None
    loss.backward()
    for p in P.values():
        if p.grad is None: p.grad = torch.zeros_like(p)
    torch.nn.utils.clip_grad_norm_(list(P.values()), k.clip, foreach=True)
    for o, m in zip(opt, (1., k.lr_new / k.lr, k.lr_out / k.lr)):
        o.param_groups[0]['lr'].copy_(hot['lr'] * m); o.step()

rng = np.random.default_rng([k.seed, 7])
pool = {l: torch.nonzero((level == l) & ~val)[:, 0].numpy() for l in range(1, NL + 1)}
if k.n_train: pool = {l: np.random.default_rng(1).permutation(x)[:k.n_train] for l, x in pool.items()}
test_i = torch.cat([torch.nonzero((level == l) & val)[:, 0][torch.linspace(0, int(((level == l) & val).sum()) - 1, k.n_eval).long()] for l in range(1, NL + 1)]).to(dev)
mix = np.array([float(x) for x in k.mix.split(',')]) if k.mix else np.arange(1., NL + 1) ** -k.power; mix /= mix.sum()
log = open(k.out, 'w'); log.write(json.dumps(K) + '\n'); log.flush()

@torch.no_grad()
def evaluate(n, full=True):
    W = weights(); ls = level[test_i.cpu()]; B = len(test_i); gen = torch.Generator(dev).manual_seed(1)
    free = torch.zeros(B, dtype=torch.bool, device=dev)
    def acc(codes, masked=free):
        right = torch.cat([read(W, ii, c, mm, 1)[3].all(-1)[:, 0] for ii, c, mm in zip(test_i.split(200), codes.split(200), masked.split(200))]).float().cpu()
        return [round(right[ls == l].mean().item(), 3) for l in range(1, NL + 1)]
    z = torch.zeros(B, 1, T, dtype=torch.long, device=dev); rnd = torch.randint(k.codes, (B, 1, T), device=dev, generator=gen)
    out = {'step': n, 's': round(time.time() - T0, 1)}
    if k.arm in ('own', 'chain'):
        own = torch.cat([think(W, ii, mm, 1) for ii, mm in zip(test_i.split(200), free.split(200))])
        out['own'] = acc(own)
        perm = torch.cat([torch.roll(torch.arange(B, device=dev)[ls.to(dev) == l], 1 + k.n_eval // 3) for l in range(1, NL + 1)])
        out['shuf'] = acc(own[perm]); 
        if full: out['rnd'] = acc(rnd); out['fill'] = acc(z)
        global n_th
        if full:
            mode = own.flatten(0, 1).mode(0).values.expand(B, 1, T); out['mode'] = acc(mode)
            keep = n_th; n_th = torch.zeros_like(keep); out['none'] = acc(z); n_th = keep
        if k.policy != 'free' or k.reader != 'free':
            m = torch.cat([think(W, ii, mm, 1) for ii, mm in zip(test_i.split(200), (~free).split(200))])
            out['masked'] = acc(m, ~free); out['pol_masked'] = acc(m); out['masked_shuf'] = acc(m[perm], ~free)
            if full: out['masked_rnd'] = acc(rnd, ~free); out['pol_masked_shuf'] = acc(m[perm]); out['masked_codes'] = [len(m[(n_th[test_i] > t), 0, t].unique()) for t in range(T)]
        elif k.arm == 'own': m = own
        out['codes'] = [len(own[(n_th[test_i] > t), 0, t].unique()) for t in range(T)]
        rr = tot[test_i]; out['purity'] = []
        for t in range(T):      # how well codes tell running totals: sum over codes of the most frequent total
            o = (n_th[test_i] > t); c, v = own[o, 0, t], rr[o, t]
            table = torch.zeros(k.codes, 200, device=dev).index_put_((c, v), torch.ones(len(c), device=dev), accumulate=True)
            out['purity'].append(round((table.max(1).values.sum() / len(c)).item(), 3))
    else: out['own'] = acc(rnd if k.arm == 'random' else z)
    out['top'] = cur[:]; out['ema'] = round(ema.item(), 3); out['mean'] = round(sum(out['own']) / NL, 3)
    s = seen.tolist(); out |= dict(zip(('loss', 'lp', 'lp_masked', 'train', 'entropy', 'over', 'lp_std', 'used'), [round(x, 3) for x in s]))
    log.write(json.dumps(out) + '\n'); log.flush()
    return out

def feed(n):
    top = NL if not k.grow else min(NL, 1 + max(0, n - k.stage1) // k.grow)
    p = mix[:top] / mix[:top].sum(); p = np.ones(1) if n < k.stage1 else p
    if k.advance:       # deeper once the deepest so far is answered from thoughts alone
        if n % 20 == 0 and cur[0] < NL and ema.item() > k.advance: cur[0] += 1; cur[1] = n; ema.zero_(); hot['top'].fill_(cur[0])
        top = cur[0]; p = mix[:top] / mix[:top].sum()
        if top > 1: p = p * (1 - k.hardest); p[-1] += k.hardest
    l = rng.choice(len(p), size=k.B, p=p) + 1
    hot['i'].copy_(torch.tensor([pool[x][rng.integers(len(pool[x]))] for x in l]))
    share = k.m1 if n < k.stage1 or k.advance and cur[0] == 1 else k.masked if n < k.unmask_at * k.steps else 0.
    hot['masked'].copy_(torch.from_numpy(rng.random(k.B) < share))
    hot['lr'].fill_(k.lr * min(1, (n + 1) / k.warm) * min(1, (k.steps - n) / max(1, k.decay * k.steps)))
    hot['ent'].fill_(k.ent + (k.ent_end - k.ent) * min(1, n / k.ent_steps))
def main():
    graph = None
    if dev == 'cuda':
        feed(0); hot['lr'].fill_(0.); side = torch.cuda.Stream(); side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3): step()
        torch.cuda.current_stream().wait_stream(side)
        for o in opt:       # forget the warm-up
            for st in o.state.values():
                for x in st.values(): x.zero_()
        freq.fill_(1 / k.fair); graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph): step()
        freq.fill_(1 / k.fair)
    n = 0
    while n < k.steps and time.time() - T0 < k.max_seconds:
        if n % k.eval_every == 0: evaluate(n, False)
        feed(n); graph.replay() if graph else step()
        n += 1
        if k.prof and n == 20:
            torch.cuda.synchronize(); t1 = time.time()
            for _ in range(20): graph.replay()
            torch.cuda.synchronize(); print('ms per step', (time.time() - t1) * 50, flush=True)
            from torch.profiler import profile, ProfilerActivity
            with profile(activities=[ProfilerActivity.CUDA]) as pr:
                graph.replay(); torch.cuda.synchronize()
            print(pr.key_averages().table(sort_by='cuda_time_total', row_limit=14, max_name_column_width=70)[:5000], flush=True); return
    out = evaluate(n)
    if k.save: torch.save({x: y.detach().half().cpu() for x, y in P.items()}, k.save)
    print(json.dumps(dict(name=k.out.split('/')[-1], mem=round(torch.cuda.max_memory_allocated() / 2**30, 1) if dev == 'cuda' else 0) | out), flush=True)
if __name__ == '__main__': main()

"""Problems that cannot be added up in parallel: cups (swaps), dial (affine mod 7), times (small + - *): out/trial/<name>.pt.xz."""
import random, lzma, io, sys, torch, gguf
from gguf.quants import dequantize
from transformers import AutoTokenizer
tok = AutoTokenizer.from_pretrained('smollm2', gguf_file='SmolLM2-135M-Instruct.Q4_1.gguf')
raw = {t.name: t for t in gguf.GGUFReader('smollm2/SmolLM2-135M-Instruct.Q4_1.gguf').tensors}['token_embd.weight']
E = torch.from_numpy(dequantize(raw.data, raw.tensor_type)); old = torch.load('out/trial/data.pt'); cache = {}
def enc(s):
    if s not in cache: cache[s] = tok(s, add_special_tokens=False)['input_ids']
    return cache[s]
HEAD, TAIL = enc('<|im_start|>user\n'), enc('<|im_end|>\n<|im_start|>assistant\n')
def cups(r, k, M=8):
    t = r.randint(1, M); parts, calc, tot = [f'The ball is under cup {t}.'], [t], []
    for _ in range(k):
        a = t if r.random() < .7 else r.randint(1, M); b = r.choice([x for x in range(1, M + 1) if x != a])
        if r.random() < .5: a, b = b, a
        parts.append(f'Swap cups {a} and {b}.'); t = b if t == a else a if t == b else t; tot.append(t); calc.append((a, b))
    return parts + ['Under which cup is the ball?'], tot, calc
def dial(r, k, M=7):
    t = r.randrange(M); parts, calc, tot = [f'The dial has {M} numbers and is at {t}.'], [t], []
    for _ in range(k):
        op = r.choice('+*'); n = r.randint(1, M - 1) if op == '+' else r.randint(2, M - 1)
        parts.append(f'Add {n}.' if op == '+' else f'Multiply by {n}.'); t = (t + n if op == '+' else t * n) % M; tot.append(t); calc.append((op, n))
    return parts + ['Where is the dial?'], [x + M * (x == 0) for x in tot], calc
PEOPLE = 'Anna Ben Carla David Emma Felix Grace Hugo Ivy Jack Kate Leo Mia Noah Olga Paul Rosa Sam Tina Will'
THINGS = 'apples books cards coins flowers marbles pencils shells stamps stickers'
STEPS = {'+': ['{a} buys {n} more {things}.', '{a} finds {n} more {things}.', '{b} gives {a} {n} {things}.'],
         '-': ['{a} gives {n} {things} to {b}.', '{a} loses {n} {things}.', '{a} sells {n} {things}.'], '*': ['{b} has {n} times as many {things} as {a} has now.']}
def times(r, k):
    people = r.sample(PEOPLE.split(), 12); who, things = people.pop(), r.choice(THINGS.split())
    t = r.randint(2, 10); parts, calc, tot = [f'{who} has {t} {things}.'], str(t), []
    for _ in range(k):
        op = r.choice([o for o in '+-**' if (o == '+' and t <= 20) or (o == '-' and t >= 4) or (o == '*' and t <= 15)])
        m = {'+': lambda: r.randint(2, 10), '-': lambda: r.randint(2, min(15, t - 2)), '*': lambda: r.randint(2, max(2, min(4, 30 // t)))}[op](); o = people.pop()
        parts.append(r.choice(STEPS[op]).format(a=who, b=o, n=m, things=things)); calc += op + str(m); who = o if op == '*' else who
        t = {'+': t + m, '-': t - m, '*': t * m}[op]; tot.append(t)
    return parts + [f'How many {things} does {who} have now?'], tot, calc
for name, make, K in (('cups', cups, 6), ('dial', dial, 5), ('times', times, 4)):
    r, rows, have = random.Random(0), [], set()
    for k in range(1, K + 1):
        for _ in range(12000):
            parts, tot, calc = make(r, k); text = ' '.join(parts)
            ids, sent = list(HEAD), [0] * len(HEAD)
            for i, s in enumerate(parts):
                e = enc((' ' if i else '') + s); ids += e; sent += [i + 1 if i < k + 1 else 99] * len(e)
            ids += TAIL; sent += [99] * len(TAIL)
            v = random.Random(f'0 {calc}').random() < (.1 if k > 1 or name == 'times' else 0)
            if _ < 300 and k == 1 and name != 'times': v = True     # depth 1: a table, seen whole
            if k == 1 or text not in have: rows.append((v, k, ids, sent, enc('\\boxed{' + str(tot[-1] % 7 if name == 'dial' else tot[-1]) + '}<|im_end|>'), tot))
            have.add(text)
        print(name, k, text, tot, len(rows))
    vocab = sorted({t for x in rows for t in x[2] + x[4]}); new = {t: i for i, t in enumerate(vocab)}
    S, A, n = max(len(x[2]) for x in rows), max(len(x[4]) for x in rows), len(rows)
    q = torch.zeros(n, S, dtype=torch.int16); sent = torch.full((n, S), -1, dtype=torch.int8)
    a = torch.full((n, A), -1, dtype=torch.int16); tot = torch.zeros(n, K, dtype=torch.int16)
    for i, (v, l, ids, st, an, rr) in enumerate(rows):
        q[i, S - len(ids):] = torch.tensor([new[t] for t in ids]); sent[i, S - len(ids):] = torch.tensor(st)
        a[i, :len(an)] = torch.tensor([new[t] for t in an]); tot[i, :len(rr)] = torch.tensor(rr)
    out = dict(q=q, sent=sent, a=a, tot=tot, val=torch.tensor([x[0] for x in rows]), level=torch.tensor([x[1] for x in rows]),
               emb=E[vocab].half(), emb_mean=old['emb_mean'], emb_std=old['emb_std'], norms=old['norms'], norm=old['norm'])
    print(name, 'S', S, 'A', A, 'V', len(vocab), n, 'answers', [len(tot[out['level'] == k][:, k - 1].unique()) for k in range(1, K + 1)])
    b = io.BytesIO(); torch.save(out, b); open(f'out/trial/{name}.pt.xz', 'wb').write(lzma.compress(b.getvalue(), preset=3)); open(f'out/trial/{name}.pt', 'wb').write(b.getvalue())

"""Makes out/trial/{model.xz,data.pt}: the model's Q4_1 body as it is in the gguf, rows of used tokens, problems."""
import json, lzma, re, sys, io, numpy as np, torch, gguf
from transformers import AutoModelForCausalLM, AutoTokenizer
from gguf.quants import dequantize
D, N = 'smollm2', 'SmolLM2-135M-Instruct.Q4_1.gguf'
tok = AutoTokenizer.from_pretrained(D, gguf_file=N)
def enc(s): return tok(s, add_special_tokens=False)['input_ids']
rows, used = [], {}
def totals(parts):
    n = [int(re.search(r'\d+', p)[0]) for p in parts]
    t, out = n[0], []
    for p, m in zip(parts[1:], n[1:]):
        t = t * m if 'times' in p else t - m if re.search(r'loses|sells|gives \d+ \w+ to', p) else t + m
        out.append(t)
    return out
HEAD, TAIL = enc('<|im_start|>user\n'), enc('<|im_end|>\n<|im_start|>assistant\n')
for split in ('train', 'val'):
    for line in open(f'data/problems/{split}.jsonl'):
        p = json.loads(line)
        if p['level'] > 3: continue
        parts = re.split(r'(?<=\.) ', p['question'])
        r = totals(parts[:-1]); assert str(r[-1]) == p['answer'], p
        ids, sent = list(HEAD), [0] * len(HEAD)
        for i, s in enumerate(parts):
            e = enc((' ' if i else '') + s); ids += e
            sent += [i + 1 if i < len(parts) - 1 else 99] * len(e)
        ids += TAIL; sent += [99] * len(TAIL)
        if len(rows) % 5000 == 0: assert ids == enc(f'<|im_start|>user\n{p["question"]}<|im_end|>\n<|im_start|>assistant\n')
        a = enc('\\boxed{' + p['answer'] + '}<|im_end|>')
        rows.append((split == 'val', p['level'], ids, sent, a, r))
S, A = max(len(r[2]) for r in rows), max(len(r[4]) for r in rows)
vocab = sorted({t for r in rows for t in r[2] + r[4]})
new = {t: i for i, t in enumerate(vocab)}
n = len(rows); q = torch.zeros(n, S, dtype=torch.int16); sent = torch.full((n, S), -1, dtype=torch.int8)
a = torch.full((n, A), -1, dtype=torch.int16); tot = torch.zeros(n, 2, dtype=torch.int16)
for i, (v, l, ids, st, an, r) in enumerate(rows):
    q[i, S - len(ids):] = torch.tensor([new[t] for t in ids]); sent[i, S - len(ids):] = torch.tensor(st)
    a[i, :len(an)] = torch.tensor([new[t] for t in an]); tot[i, :len(r)] = torch.tensor(r)
data = dict(q=q, sent=sent, a=a, tot=tot, val=torch.tensor([r[0] for r in rows]), level=torch.tensor([r[1] for r in rows]),
            names=[tok.decode([t]) for t in vocab])
print('S', S, 'A', A, 'vocab', len(vocab), 'n', n, [tok.decode([t]) for t in rows[-1][4]], 'max total', tot.max())
model = AutoModelForCausalLM.from_pretrained(D, gguf_file=N, dtype=torch.float32); sd = model.state_dict(); c = model.config
print(c)
E = sd['model.embed_tokens.weight']; data |= dict(emb=E[vocab].half(), emb_mean=E.mean(0), emb_std=E.std(0))
raw = {t.name: t for t in gguf.GGUFReader(f'{D}/{N}').tensors}
names = {'attn_q': 'self_attn.q_proj', 'attn_k': 'self_attn.k_proj', 'attn_v': 'self_attn.v_proj', 'attn_output': 'self_attn.o_proj',
         'ffn_gate': 'mlp.gate_proj', 'ffn_up': 'mlp.up_proj', 'ffn_down': 'mlp.down_proj'}
blob, index = [], {}
for i in range(c.num_hidden_layers):
    for g, h in names.items():
        t = raw[f'blk.{i}.{g}.weight']; w = np.asarray(t.data); assert t.tensor_type.name == 'Q4_1'
        if g in ('attn_q', 'attn_k'):
            heads = c.num_attention_heads if g == 'attn_q' else c.num_key_value_heads
            w = w.reshape(heads, 32, 2, -1).swapaxes(1, 2).reshape(len(w), -1)
        b = np.ascontiguousarray(w).reshape(-1, 20)
        d, m = b[:, :2].copy().view(np.float16).astype(np.float32), b[:, 2:4].copy().view(np.float16).astype(np.float32)
        x = np.concatenate([b[:, 4:] & 15, b[:, 4:] >> 4], 1) * d + m
        ref = sd[f'model.layers.{i}.{h}.weight']
        assert np.abs(x.reshape(ref.shape) - ref.numpy()).max() < 1e-6, (i, g)
        blob.append(b)
b = np.concatenate(blob)
data['norms'] = torch.stack([torch.stack([sd[f'model.layers.{i}.input_layernorm.weight'], sd[f'model.layers.{i}.post_attention_layernorm.weight']]) for i in range(30)])
data['norm'] = sd['model.norm.weight']
out = 'out/trial/'
torch.save(data, out + 'data.pt')
# planes: scales apart from nibbles
open('out/trial/planes', 'wb').write(b[:, :4].T.tobytes() + b[:, 4:].tobytes())
# reference logits for tests
ids = torch.tensor([rows[-1][2] + rows[-1][4]])
with torch.no_grad(): torch.save((q[-1], a[-1], model(ids).logits[0][:, vocab]), 'out/trial/ref.pt')

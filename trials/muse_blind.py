"""Blind addition with continuous thoughts: T states of the thinking policy are read by the answering policy.
    python muse_blind.py input_max think_len steps seed"""
import json, sys, time
import torch
import torch.nn.functional as F
from model import KVCache, ThinkingModelConfig, make_model
from utils import addition_questions, make_optimizer, schedule
M, T, steps, seed = map(int, sys.argv[1:5])
device = 'cuda' if torch.cuda.is_available() else 'cpu'
torch.manual_seed(seed)
shape = dict(block_size=T + 2, n_layer=1, n_head=32, d_model=128, init='unit', tie_weights=False, d_normal_vocab=M, d_thought_vocab=2)
thinking, answering = (make_model(ThinkingModelConfig(**shape)).to(device) for _ in range(2))
train, test = (x.to(device) for x in addition_questions(0, M, .2, seed, 2))
optimizers = make_optimizer(thinking, 3e-3, 3.), make_optimizer(answering, 2e-3, 0.)
g = torch.Generator(device).manual_seed(seed)
begun = time.time()
def muse(question):
    cache = KVCache(); state = thinking.hidden(question, cache)[:, -1:]; out = [state]
    mark = thinking.embed(question.new_full((1, 1), M))
    for t in range(T - 1):
        state = thinking.layers(state + mark, cache); out.append(state)
    return torch.cat(out, 1)
def answer(states):
    end = answering.embed(torch.full((len(states), 1), answering.config.end_thought, device=device))
    return answering.logits(answering.layers(torch.cat([states, end], 1))[:, -1], range(M))
def accuracy(q, order=None):
    with torch.no_grad():
        right = q.sum(1) % M; s = muse(q)
        return (answer(s if order is None else s[order]).argmax(-1) == right).float().mean().item()
log, of99 = [], None
for step in range(steps + 1):
    if step % 50 == 0 or step == steps:
        log.append((step, accuracy(test[:5000])))
        if log[-1][1] >= .99 and of99 is None: of99 = step, time.time() - begun
    for o, r in zip(optimizers, (3e-3, 2e-3)): schedule(o, r, step, steps + 1)
    q = train[torch.randint(len(train), (512,), generator=g, device=device)]
    F.cross_entropy(answer(muse(q)), q.sum(1) % M).backward()
    for o in optimizers: o.step(); o.zero_grad()
q = test[:5000]
print(json.dumps({'M': M, 'T': T, 'seed': seed, 'heldout': accuracy(q), 'training': accuracy(train[:5000]), 'shuffled': accuracy(q, torch.randperm(len(q), generator=torch.Generator().manual_seed(0)).to(device)), 'of99': of99, 'seconds': time.time() - begun}))

"""EGG (facebookresearch/EGG, MIT, commit 54eb11c6) baseline: autoencoder game over M one-hot inputs,
message of exactly T symbols out of L.  Uses EGG's own core classes, unmodified; only egg/core/__init__.py
is a stub.

Fixed length, exact capacity: EGG's vocabulary has symbol 0 = end symbol, so vocab_size = L+1 and
max_len = T.  The sender's output layer (sender.hidden_to_output) is replaced with a Linear whose logit
for symbol 0 is set to -1e9, so the sender always writes T symbols from 1..L (probability of 0 is
exactly 0.0 in float32).  EGG itself then appends one constant 0 (end) as position T+1, which
carries no information; the receiver reads T symbols plus that constant, and (gs) the loss is the one
at that last position (all earlier eos weights are exactly 0).
"""
import os, sys, json, time, argparse
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import torch, torch.nn as nn, torch.nn.functional as F
torch.set_num_threads(1)
torch.distributions.Distribution.set_default_validate_args(False)
from egg.core.reinforce_wrappers import (RnnSenderReinforce, RnnReceiverDeterministic,
                                         SenderReceiverRnnReinforce)
from egg.core.gs_wrappers import RnnSenderGS, RnnReceiverGS, SenderReceiverRnnGS
from egg.core.baselines import MeanBaseline, BuiltInBaseline


class NoEosLinear(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return torch.cat([torch.full_like(y[:, :1], -1e9), y[:, 1:]], dim=1)


class SenderAgent(nn.Module):
    def __init__(self, M, H):
        super().__init__()
        self.fc = nn.Linear(M, H)

    def forward(self, x, aux_input=None):
        return self.fc(x)


class ReceiverAgent(nn.Module):
    def __init__(self, M, H):
        super().__init__()
        self.fc = nn.Linear(H, M)

    def forward(self, h, _input=None, _aux_input=None):
        return self.fc(h)


def loss_fn(_sender_input, _message, _receiver_input, receiver_output, labels, _aux_input):
    acc = (receiver_output.argmax(1) == labels).float()
    return F.cross_entropy(receiver_output, labels, reduction="none"), {"acc": acc}


p = argparse.ArgumentParser()
p.add_argument("--M", type=int, required=True)
p.add_argument("--L", type=int, required=True)
p.add_argument("--T", type=int, required=True)
p.add_argument("--method", choices=["reinforce", "gs"], required=True)
p.add_argument("--seconds", type=float, default=480)
p.add_argument("--seed", type=int, default=0)
p.add_argument("--out", default="results.jsonl")
p.add_argument("--hidden", type=int, default=128)
p.add_argument("--embed", type=int, default=32)
p.add_argument("--cell", default="gru")
p.add_argument("--lr", type=float, default=1e-3)
p.add_argument("--rows", type=int, default=512)
p.add_argument("--entropy", type=float, default=0.1, help="sender_entropy_coeff (reinforce)")
p.add_argument("--baseline", choices=["mean", "builtin"], default="mean", help="EGG baseline_type (reinforce)")
p.add_argument("--temperature", type=float, default=1.0, help="gs")
p.add_argument("--eval_every", type=int, default=100)
p.add_argument("--verbose", action="store_true")
a = p.parse_args()
torch.manual_seed(a.seed)
V, M, H = a.L + 1, a.M, a.hidden

if a.method == "reinforce":
    sender = RnnSenderReinforce(SenderAgent(M, H), V, a.embed, H, max_len=a.T, cell=a.cell)
    receiver = RnnReceiverDeterministic(ReceiverAgent(M, H), V, a.embed, H, cell=a.cell)
    sender.hidden_to_output = NoEosLinear(H, V)
    game = SenderReceiverRnnReinforce(sender, receiver, loss_fn, sender_entropy_coeff=a.entropy,
                                      baseline_type=MeanBaseline if a.baseline == "mean" else BuiltInBaseline)
    settings = {"entropy": a.entropy, "baseline": a.baseline}
else:
    sender = RnnSenderGS(SenderAgent(M, H), V, a.embed, H, max_len=a.T, temperature=a.temperature,
                         cell=a.cell, straight_through=True)
    receiver = RnnReceiverGS(ReceiverAgent(M, H), V, a.embed, H, cell=a.cell)
    sender.hidden_to_output = NoEosLinear(H, V)
    game = SenderReceiverRnnGS(sender, receiver, loss_fn)
    settings = {"temperature": a.temperature, "straight_through": True}

reps = max(1, round(a.rows / M))
eye, ids = torch.eye(M), torch.arange(M)
X, Y = eye.repeat(reps, 1), ids.repeat(reps)
settings.update(hidden=H, embed=a.embed, cell=a.cell, lr=a.lr, rows=len(Y))
opt = torch.optim.Adam(game.parameters(), lr=a.lr)


@torch.no_grad()
def evaluate():
    game.eval()
    _, it = game(eye, ids)
    game.train()
    out, msg = it.receiver_output, it.message
    if a.method == "gs":
        out, msg = out[:, -1], msg.argmax(-1)
    msg = msg[:, :a.T]
    assert int(msg.min()) >= 1 and int(msg.max()) <= a.L and msg.shape == (M, a.T)
    return (out.argmax(1) == ids).float().mean().item(), (msg - 1).tolist()


game.train()
t0, step, acc, best, msgs = time.time(), 0, 0.0, 0.0, None
while True:
    loss, _ = game(X, Y)
    opt.zero_grad()
    loss.backward()
    opt.step()
    step += 1
    over = time.time() - t0 > a.seconds
    if step % a.eval_every == 0 or over:
        acc, msgs = evaluate()
        best = max(best, acc)
        if a.verbose and step % (5 * a.eval_every) == 0:
            print(step, round(time.time() - t0, 1), round(loss.item(), 3), round(acc, 4), file=sys.stderr, flush=True)
        if over or acc == 1.0:
            break

# accuracy: greedy accuracy at the end; codes: number of different messages; messages: code per input, 0..L-1
r = dict(M=M, L=a.L, T=a.T, method=a.method, settings=settings, seed=a.seed,
         seconds=round(time.time() - t0, 1), steps=step, accuracy=acc, best_accuracy=best,
         codes=len(set(map(tuple, msgs))), messages=msgs)
with open(a.out, "a") as f:
    f.write(json.dumps(r) + "\n")
del r["messages"]
print(json.dumps(r), flush=True)

import sys, torch
sys.path.insert(0,'.')
import model as M
from utils import SerialTask
ck = torch.load(sys.argv[1], weights_only=True, map_location='cpu'); seed=int(sys.argv[2]); n=int(sys.argv[3]); depth=int(sys.argv[4])
pk = ck['models']['model']; pk['config']['block_size']=4096
m = M.unpack(pk).eval()
task = SerialTask('s5', 120, 10, seed); base=len(task.names)
g = torch.Generator().manual_seed(7)
saved=[]
plain=M.attention
def rec(q,k,v,mask,dropout):
    w=(q@k.transpose(-1,-2)/q.shape[-1]**.5 + (mask if mask.dtype!=torch.bool else torch.zeros_like(mask).float().masked_fill(~mask,-torch.inf))).softmax(-1)
    saved.append(w); return w@v
with torch.no_grad():
    q, st = task.draw(n, depth, g)
    pos = torch.arange(q.shape[1]); pos[-1]=0
    th = torch.cat([m.think(part, depth-1, positions=pos, temperature=0).tokens for part in q.split(100)])
    code = th-base
    true = st[:, :-1]
    said=[]
    P=M.count_on(pos, q.shape[1], depth-1, 'cpu')
    for a in range(0,n,50):
        h=m.hidden(torch.cat([q[a:a+50],th[a:a+50]],1),None,P)[:, q.shape[1]-1:]
        said.append(m.logits(h, range(120)).argmax(-1))
    said=torch.cat(said); wrong=(said!=st)     # (n, depth): the state after each operation, as it would be answered
    print('accuracy', (~wrong[:,-1]).float().mean().item(), 'any wrong', wrong.any(1).float().mean().item())
    counts=torch.zeros(257,120); counts.index_put_((code.flatten(),said[:,:-1].flatten()),torch.tensor(1.),accumulate=True)
    first=torch.where(wrong.any(1), wrong.int().argmax(1), depth)
    print('questions with a wrong thought', (first<depth).float().mean().item())
    for a,b in ((0,16),(16,32),(32,64),(64,128),(128,256)):
        if a>=depth: break
        alive=(torch.minimum(first,torch.tensor(b))-torch.minimum(first,torch.tensor(a))).sum()+((first>=a)&(first<b)).sum()
        e=((first>=a)&(first<b)).sum()
        print(f'operations {a+1}..{b}: {e.item()} errors in {alive.item()} steps, {e.item()/max(1,alive.item()):.2e}')
    # are errors bound to (previous thought, operation)?
    op=q[:,1:1+depth]-120
    f=(first<depth).nonzero()[:,0]; f=f[first[f]>0]
    pairs={}
    for i in f.tolist():
        t=first[i].item(); pairs.setdefault((code[i,t-1].item(), op[i,t].item()),[]).append((i,t))
    # how often is the same pair right elsewhere, before any error
    tot=0
    for (c,o),where in sorted(pairs.items(), key=lambda x:-len(x[1]))[:12]:
        same=(code[:,:-1]==c)&(op[:,1:-1]==o)
        t=torch.arange(1,depth-1)
        same=same&(t[None]<=first[:,None])
        ok=same & ~wrong[:,1:-1]
        print('thought',c,'(written for it before:',int(counts[c].sum()),') letter',o,'wrong',len(where),'right',int(ok.sum()), 'next codes', sorted({code[i,t].item() for i,t in where}))
    rare=counts.sum(1); used=(rare>0).sum().item(); print('codes used',used)
    err=torch.tensor([rare[code[i,first[i]-1]].item() for i in f.tolist()]); print('median count of the thought before an error', err.median().item(), 'of all', rare[code[:,:12]].median().item())
    # attention of failing thoughts
    M.attention=rec
    def shares(i,t):
        saved.clear()
        m.think_and_answer(q[i:i+1], th[i:i+1,:t], True, pos)
        S=q.shape[1]; out=[]
        # the state that writes thought t sits at thought t-1 (index S-1+t), should read operation t (index 1+t) and itself
        for w in saved:
            row=w[0,:,S-1+t]   # (H, Sk)
            out.append((row[:,1+t], row[:,S-1+t], 1-row[:,1+t]-row[:,S-1+t]))
        return torch.stack([torch.stack(o) for o in out])   # (layers,3,H)
    import random
    random.seed(0)
    bad=[shares(i,first[i].item()) for i in f.tolist()[:40]]
    good=[shares(i,max(1,first[i].item()-1)) for i in f.tolist()[:40]]
    for name,x in (('failing',bad),('the one before',good)):
        if x: print(name,'attention on its operation / previous thought / the rest, per layer and head', [[ [round(v,2) for v in head] for head in layer.T.tolist()] for layer in torch.stack(x).mean(0)])

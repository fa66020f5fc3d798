import sys; sys.path.insert(0, 'trials')
import torch
from model import GPT2, ModelConfig
from utils import make_optimizer
torch.set_num_threads(1)
H=int(sys.argv[1]); enc=sys.argv[2]; init=sys.argv[3]; lr=float(sys.argv[4]); wd=float(sys.argv[5]); L=int(sys.argv[6]); d=int(sys.argv[7])
for N in (8,16,32,64,128):
    torch.manual_seed(0)
    m=GPT2(ModelConfig(d_vocab=2,block_size=2*H,n_layer=L,n_head=4,d_model=d,tie_weights=False,init=init,position_encoding=enc))
    o=make_optimizer(m,lr,wd)
    x=torch.randint(0,2,(N,H)); y=x.flip(1); t=torch.cat([x,y],1)
    xv=torch.randint(0,2,(500,H)); tv=torch.cat([xv,xv.flip(1)],1)
    out=[]
    for s in range(1001):
        lg=m(t[:,:-1])[:,H-1:]
        loss=torch.nn.functional.cross_entropy(lg.flatten(0,1),y.flatten())
        loss.backward(); o.step(); o.zero_grad()
        if s in (50,100,200,500,1000):
            with torch.no_grad():
                p=m(tv[:,:-1])[:,H-1:].log_softmax(-1).gather(-1,xv.flip(1)[...,None])[...,0]
                out.append((s,round(loss.item(),3),'acc %.2f'%(p>-.6931).float().mean().item(),'P(all) %.5f'%p.sum(1).exp().mean().item()))
    print(N,out,flush=True)

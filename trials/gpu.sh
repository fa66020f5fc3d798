# Trial: what four GPUs and their cores do at once. $OUT: where results go
export HERE=$PWD; export TORCHINDUCTOR_COMPILE_THREADS=4 PYTHONUNBUFFERED=1 TIKTOKEN_CACHE_DIR=$PWD/.gpu/tiktoken
python prepare_data.py --path=.gpu/text/input.txt > /dev/null 2>> $OUT/err.txt
prepare="python prepare_data.py --dataset=text --path=.gpu/text/english_novels_train.txt.xz --val_path=.gpu/text/english_novels_val.txt.xz"
(export CUDA_VISIBLE_DEVICES=2,3
 L=filler,straight,leg,p100,norm,info_norm,p10,info,norm_greedy,entropy_norm,norm_price,warm_norm,unit_norm,filler_unit,reinforce,info_norm_greedy
 python trials/leg_all.py $OUT 4 290 10 $L > $OUT/leg.txt 2>&1
 best=$(python - <<'P'
import json, os
rows = [json.loads(line) for line in open(os.environ['OUT'] + '/leg.jsonl')]
rows = [r for r in rows if not r['variant'].startswith(('filler', 'straight', 'warm', 'unit', 'none', 'frozen'))]
print(','.join(r['variant'] for r in sorted(rows, key=lambda r: r['val_loss'])[:2]))
P
 )
 echo best $best >> $OUT/leg.txt
 python trials/leg_all.py $OUT 4 $((545 - SECONDS)) 0,1,2 $best,filler,straight,none >> $OUT/leg.txt 2>&1) &
(export CUDA_VISIBLE_DEVICES=1
 $prepare --out_dir=data/novels > /dev/null 2>> $OUT/err.txt; echo prepared $SECONDS >> $OUT/words.txt
 timeout $((550 - SECONDS)) python bench.py --suite=words-long --only=none,straight --seeds=3 --parallel=6 >> $OUT/words.txt 2>> $OUT/err.txt
 for d in out/bench/words-long-*/*/; do echo $d; grep val_loss $d/metrics.jsonl; done >> $OUT/words.txt) &
(export CUDA_VISIBLE_DEVICES=0 OMP_NUM_THREADS=4
 timeout 330 python bench.py --suite=speed --only=train,think-1,think-512 --nanogpt=.gpu/nano > $OUT/speed.txt 2>> $OUT/err0.txt; echo speed $SECONDS >> $OUT/steps.txt
 $prepare --tokenizer=char --out_dir=data/novels_char > /dev/null 2>> $OUT/err.txt
 six="--data=data/novels_char --n_layer=6 --n_head=6 --d_model=384 --text_len=128 --batch_size=64"
 python supervised_rollout_think.py $six --think_len=0 --max_steps=30 --eval_sequences=20 --out_dir=/tmp/start > /dev/null 2>> $OUT/err0.txt
 roll="--data=$PWD/data/novels_char --batch_size=16 --prefix_len=64 --text_len=64 --eval_every=1000 --eval_prefixes=16 --max_steps=30 --init_from=/tmp/start/ckpt.pt --reference=/tmp/start/ckpt.pt --out_dir=/tmp/roll --compile=True"
 sup="--data=$PWD/data/novels_char --n_layer=6 --n_head=6 --d_model=384 --text_len=128 --batch_size=64 --max_steps=60 --eval_every=1000 --eval_sequences=20 --out_dir=/tmp/s"
 for where in .gpu/base . ; do
   (cd $where; echo $where >> $OUT/steps.txt; T=$HERE/trials/time_steps.py
    timeout 60 python $T rollout_think.py - $roll >> $OUT/steps.txt 2>> $OUT/err0.txt
    timeout 60 python $T supervised_rollout_think.py - $sup >> $OUT/steps.txt 2>> $OUT/err0.txt)
 done
 timeout 60 python bench.py --suite=learning --only=blind-gpu --seeds=5 --parallel=5 2>> $OUT/err0.txt | cut -c1-400 >> $OUT/steps.txt
 [ $SECONDS -lt 470 ] && timeout 80 python -m pytest -q -p no:benchmark tests/test_model.py tests/test_scripts.py -k "cuda or graph" 2>&1 | tail -15 >> $OUT/steps.txt
) &
wait
cp assets/results/words-long.jsonl $OUT/; cp assets/results/speed.jsonl $OUT/
cat $OUT/speed.txt | cut -c1-300; cat $OUT/steps.txt; cut -c1-150 $OUT/words.txt; tail -c 500 $OUT/err.txt; tail -c 800 $OUT/err0.txt; cat $OUT/leg.txt
mkdir -p /tmp/keep; mv $OUT/*.json $OUT/*.log $OUT/err* /tmp/keep/ 2>/dev/null; rm -f $OUT/*.log; ls -la $OUT

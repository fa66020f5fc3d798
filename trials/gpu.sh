# Trial: what four GPUs and their cores do at once. $OUT: where results go
export TORCHINDUCTOR_COMPILE_THREADS=4 PYTHONUNBUFFERED=1 TIKTOKEN_CACHE_DIR=$PWD/.gpu/tiktoken
prepare="python prepare_data.py --dataset=text --path=.gpu/text/english_novels_train.txt.xz --val_path=.gpu/text/english_novels_val.txt.xz"
$prepare --tokenizer=char --out_dir=data/novels_char > /dev/null 2> $OUT/prepare.log
nohup python trials/grid_blind.py $OUT/grid.jsonl 36 330 > $OUT/grid.txt 2>&1 &
(export CUDA_VISIBLE_DEVICES=1,2,3
 timeout 540 python bench.py --suite=novels --only=loop --seeds=3 --parallel=3 > $OUT/novels.log 2>> $OUT/err.log &
 $prepare --out_dir=data/novels > /dev/null 2>> $OUT/prepare.log
 timeout 500 python bench.py --suite=words-long --seeds=3 --parallel=12 > $OUT/words.log 2>> $OUT/err.log
 wait) &
(export CUDA_VISIBLE_DEVICES=0 OMP_NUM_THREADS=4
 timeout 330 python trials/train_variants.py > $OUT/train.txt 2>> $OUT/err0.log
 six="--data=data/novels_char --n_layer=6 --n_head=6 --d_model=384 --text_len=128 --batch_size=64"
 python supervised_rollout_think.py $six --think_len=0 --max_steps=30 --eval_sequences=20 --out_dir=/tmp/start > /dev/null 2>> $OUT/err0.log
 roll="--data=data/novels_char --batch_size=16 --prefix_len=64 --text_len=64 --eval_every=1000 --eval_prefixes=16 --max_steps=24 --init_from=/tmp/start/ckpt.pt --reference=/tmp/start/ckpt.pt --out_dir=/tmp/roll"
 for more in "" "--compile=True" "--compile=True --dtype=bfloat16" "--compile=True --think_len=0"; do
   timeout 100 python trials/time_steps.py rollout_think.py write,read,pay $roll $more >> $OUT/steps.txt 2>> $OUT/err0.log
 done
 TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 timeout 100 python trials/time_steps.py rollout_think.py write,read,pay $roll --compile=True >> $OUT/steps.txt 2>> $OUT/err0.log
 for more in "" "--dtype=bfloat16"; do
   timeout 60 python trials/time_steps.py supervised_rollout_think.py - $six --max_steps=60 --eval_every=1000 --eval_sequences=20 --out_dir=/tmp/s $more >> $OUT/steps.txt 2>> $OUT/err0.log
 done
 timeout 60 python trials/time_steps.py supervised_rollout_think.py - $six --max_steps=60 --eval_every=1000 --eval_sequences=20 --out_dir=/tmp/s --compile=True --dtype=bfloat16 >> $OUT/steps.txt 2>> $OUT/err0.log
) &
wait
cp assets/results/words-long.jsonl assets/results/novels.jsonl $OUT/
(cd out/bench; tar czf $OUT/logs.tgz words-long-*/*/metrics.jsonl)
cat $OUT/grid.txt; cat $OUT/train.txt; cat $OUT/steps.txt; tail -c 500 $OUT/err.log; tail -c 800 $OUT/err0.log; cut -c1-100 $OUT/words.log; rm -f $OUT/prepare.log $OUT/err0.log

# Trial: what four GPUs and their cores do at once. $OUT: where results go
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=2
python prepare_data.py --path=.gpu/text/input.txt > /dev/null 2>> $OUT/err.txt
(CUDA_VISIBLE_DEVICES=0,1 timeout 185 python trials/leg_all.py $OUT 6 175 3,4,5,6,7,8 leg,filler,reinforce,none > $OUT/leg.txt 2>&1) &
(CUDA_VISIBLE_DEVICES=2,3 timeout 185 python bench.py --suite=reward --seeds=3 --parallel=21 > $OUT/reward.txt 2>> $OUT/err.txt) &
wait
cp assets/results/reward.jsonl $OUT/; tail -n 12 $OUT/reward.txt | cut -c1-300; tail -c 300 $OUT/err.txt; cat $OUT/leg.txt; mkdir -p /tmp/keep; mv $OUT/*.json $OUT/*.log /tmp/keep/

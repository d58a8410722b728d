# Janus-Pro-7B with JS, by the recipe of arXiv 2606.21498's released code: 384 pixels, guided, 1,600 steps.
#   8 prompts x 4 samples x 576 tokens = 18,432 tokens per step, on any number of GPUs (the paper: 2 on each).
# Memory per GPU for 6.59 billion parameters, calculated, not measured on a GPU:
#   all weights (--lora_rank=0)                              adapters of rank 64 (common/lora.py)
#     policy, gradient, AdamW, bf16 copy          118.7 GB     134 million x 18 bytes           2.4 GB
#     reference                                    14.0 GB     policy and reference in one     14.0 GB
#     rewards in fp16, tokenizer                    3.1 GB     the same                         3.1 GB
#     sampling: keys and values of 8 images x 2     4.5 GB     the same                         4.5 GB
#     in all                                        140 GB     in all                            24 GB
#   So the default is adapters: 7B fits one GPU of 40 or 80 GB. Janus-Pro-1B (--gpt_ckpt=Janus-Pro-1B) takes
#   9 GB with adapters, which fits a GPU of 24 GB, and 35 GB without. Training all weights of 7B takes 60 GB
#   on each of eight GPUs:
#     torchrun --nproc_per_node=8 train.py configs/janus_js.py --shard --lora_rank=0 --learning_rate=1e-6
# Departures from the released script:
#  1. The loss uses the guided distribution, which sampled. The script uses --score_cfg=1.0 (full/janus.py).
#  2. Adapters are trained, not all weights, with 10 times the learning rate (1e-6 in the script; not tuned).
#  3. The reward is HPSv2.1 alone. In the script it is one of several rewards.
#  4. The prompts of a batch are padded on the left.
#  5. The second beta of AdamW is .95, not .999.
#  6. The prompts are our own.
#  7. There are no critical tokens and no dynamic weights. Neither has an effect in the script for Janus.
like = "configs/llamagen_js.py"     # same precision, rewards, divergence, schedules, evaluation
world = "janus"
out_dir = "out/janus_js"
gpt_ckpt = "Janus-Pro-7B"   # the policy, the tokenizer of images, and the tokenizer of texts
# ---- rollout
prompts_per_step = 8
group_size = 4
sample_batch = 8            # at most, per process; with 4 or more processes, all are sampled at once
cfg_scale = 5.0
# ---- loss
beta = 0.01                 # as released, for all three divergences; a KL then pulls four times as hard
micro_batch = 4             # logits of logit_chunk = 64: 2 x 4 x 64 tokens x 16,384 codes, 34 MB in fp32
# ---- length, optimizer
max_steps = 1600
lora_rank = 64
learning_rate = 1e-5

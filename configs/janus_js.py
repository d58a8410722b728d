# Janus-Pro-7B with JS, by the recipe of arXiv 2606.21498's released code: 384 pixels, guided, 1,600 steps.
#   8 prompts x 4 pictures x 576 tokens = 18,432 tokens a step, on any number of GPUs; the paper: 2 on each.
# Memory on each GPU, counted by llamagen.memory_plan (printed first), 6.59 billion parameters:
#   all weights (--lora_rank=0)                              adapters of rank 64 (lora.py)
#     policy, gradient, AdamW, bf16 copy          118.7 GB     134 million x 18 bytes           2.4 GB
#     reference                                    14.0 GB     policy and reference in one     14.0 GB
#     rewards in fp16, tokenizer                    3.1 GB     the same                         3.1 GB
#     sampling: keys and values of 8 pictures x 2   4.5 GB     the same                         4.5 GB
#     in all                                        140 GB     in all                            24 GB
#   So adapters it is: 7B on one card of 40 or 80 GB. Janus-Pro-1B (--gpt_ckpt=Janus-Pro-1B) takes 9 GB with
#   adapters, for one 24 GB card, and 35 GB without. All weights of 7B on eight cards, 60 GB on each:
#     torchrun --nproc_per_node=8 train.py configs/janus_js.py --shard --lora_rank=0 --learning_rate=1e-6
# Departures from the released script:
#  1. The loss is about the guided distribution, which sampled. --score_cfg=1.0 is theirs: janus.py, point 5.
#  2. Adapters, not all weights, and for them ten times the learning rate (1e-6 there; not tuned).
#  3. The reward is HPSv2.1 alone; there it is one of several.
#  4. Prompts of a batch are padded on the left. 5. AdamW's second beta .95 in place of .999.
#  6. Captions of our own. 7. No critical tokens, no dynamic weight: in their Janus script neither has effect.
like = "configs/llamagen_js.py"     # precision, rewards, divergence, schedules and evaluation are the same
world = "janus"
out_dir = "out/janus_js"
gpt_ckpt = "Janus-Pro-7B"   # policy, tokenizer of images and tokenizer of texts
# ---- rollout
prompts_per_step = 8
group_size = 4
sample_batch = 8            # of each process, at most: with 4 of them or more, that is all at once
cfg_scale = 5.0
# ---- loss
beta = 0.01                 # as released, for all three divergences; a KL then pulls four times as hard
micro_batch = 4             # and chunk = 64: logits of 2 x 4 x 64 tokens x 16,384 codes in fp32, 34 MB each
# ---- length, optimiser
max_steps = 1600
lora_rank = 64
learning_rate = 1e-5

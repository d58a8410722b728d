# LlamaGen-XL (775M) with JS, by the recipe of arXiv 2606.21498's released code: 256 pixels, HPSv2.1.
#   16 prompts x 8 pictures x 256 tokens = 32,768 tokens a step, on any number of GPUs; the paper: 4 x 80 GB.
#   On one GPU 32 pictures are drawn at once: about 20 GB (the plan that is printed first counts the parts).
# Departures from the released script:
#  1. Critical tokens and dynamic advantage weight are off (llamagen_js_as_released.py turns them on).
#  2. T5 sees the attention mask in training as in the rollout; T5 gets captions cleaned, HPS as written.
#  3. HPS as published (longest side 224, padded), not a plain 224 x 224 resize.
#  4. No EOS mask: images have one length. 5. AdamW's second beta .95, not .999. 6. Captions of our own.
world = "llamagen"
out_dir = "out/llamagen_js"
dtype = "bfloat16"
# ---- rollout
prompts_per_step = 16
group_size = 8
sample_batch = 32           # of each process, at most: with 4 of them or more, that is all at once
cfg_scale = 1.0             # none, as in the paper; it evaluates with 7.5: evaluate.py --cfg_scale=7.5
# ---- reward
reward = "hps"
heldout_reward = "clipscore"
# ---- loss
divergence = "js"
estimator = "sampled"       # the paper's form
beta = 0.04                 # as released, for all three divergences; llamagen_js_matched.py has 4 times that
micro_batch = 16
logit_chunk = 64                  # logits of 16 x 64 tokens x 16,384 codes in fp32: 67 MB each
recompute = True
# ---- length, optimiser
max_steps = 900
learning_rate = 1e-5
warmup = 0.1
min_lr_ratio = 0.1
# ---- evaluation: 16 captions kept from training, 8 pictures each
eval_interval = 100
eval_prompts = 16
eval_draws = 8

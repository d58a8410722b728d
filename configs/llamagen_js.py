# LlamaGen-XL (775M) with JS, by the recipe of the released code of arXiv 2606.21498: 256 pixels, HPSv2.1.
#   16 prompts x 8 samples x 256 tokens = 32,768 tokens per step, on any number of GPUs (paper: 4 x 80 GB).
#   On one GPU, 32 images are sampled at once. That needs about 20 GB, calculated, not measured on a GPU.
# Departures from the released script:
#  1. Critical tokens and dynamic advantage weights are off. llamagen_js_as_released.py turns them on.
#  2. T5 gets the attention mask in training too. T5 reads cleaned prompts, HPS reads prompts as written.
#  3. HPS is used as published (longest side 224, padded), not with a plain resize to 224 x 224.
#  4. There is no EOS mask, because all images have the same number of tokens.
#  5. The second beta of AdamW is .95, not .999.
#  6. The prompts are our own.
world = "llamagen"
out_dir = "out/llamagen_js"
dtype = "bfloat16"
# ---- rollout
prompts_per_step = 16
group_size = 8
sample_batch = 32           # at most, per process; with 4 or more processes, all are sampled at once
cfg_scale = 1.0             # no guidance, as in the paper. It evaluates with 7.5: evaluate.py --cfg_scale=7.5
# ---- reward
reward = "hps"
heldout_reward = "clipscore"
# ---- loss
divergence = "js"
estimator = "sampled"       # the form of the paper
beta = 0.04                 # as released, for all three divergences; llamagen_js_matched.py has 4 x .04
micro_batch = 16
logit_chunk = 64                  # each tensor of logits, 16 x 64 tokens x 16,384 codes in fp32, takes 67 MB
recompute = True
# ---- length, optimizer
max_steps = 900
learning_rate = 1e-5
warmup = 0.1
min_lr_ratio = 0.1
# ---- evaluation: 16 prompts held back from training, 8 samples of each
eval_interval = 100
eval_prompts = 16
eval_draws = 8

# Best-of-n fine-tuning of LlamaGen-XL (775M) on HPSv2.1: sample 12,800 images once, imitate the best 1,600.
#   The pool is written to out/llamagen_best_of_n/pool, a file of about 140 KB for each of its 100 steps. If
#   the run is stopped, --resume samples only what is missing.
#   Memory: as configs/llamagen_js.py, but without the reference's forward pass and without logit_chunk.
#   Logits of 8 images x 256 tokens x 16,384 codes in fp32 take 134 MB, and about four such tensors exist.
#   Not measured on a GPU.
world = "llamagen"
algorithm = "rejection"
out_dir = "out/llamagen_best_of_n"
dtype = "bfloat16"
# ---- the pool: 100 steps of 16 prompts x 8 samples
pool = 100
prompts_per_step = 16
group_size = 8
sample_batch = 32           # at most, per process
cfg_scale = 1.0             # no guidance, as in configs/llamagen_js.py
reward = "hps"
heldout_reward = "clipscore"
# ---- imitation: 64 images in an update, so every image is seen 8 times on average
tau = 0.0                   # only the best of each group
groups = 64
micro_batch = 8
recompute = True
max_steps = 200
learning_rate = 1e-5
warmup = 0.1
min_lr_ratio = 0.1
# ---- evaluation: 16 prompts held back from training, 8 samples of each
eval_interval = 100
eval_prompts = 16
eval_draws = 8

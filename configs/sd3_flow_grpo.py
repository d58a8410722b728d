# Flow-GRPO on SD3.5-medium by the recipe of arXiv 2505.05470 and its code. Reward: PickScore. 512 pixels.
#   24 prompts x 24 samples x 9 noisy steps = 5,184 actions per step, on any number of GPUs.
#   Smaller: --prompts_per_step=8 --group_size=8. The authors warn that the reward may then rise slowly.
#   Sana-600M has 4 times fewer parameters, and is free: --world=sana --gpt_ckpt=Sana_600M_512px_diffusers
#   SD3.5-medium is gated: accept the license on the page of the model, then run `huggingface-cli login`.
# Memory on one GPU, calculated, not measured on a GPU. With more GPUs, the rollout needs less on each.
#   policy and reference, one set of matrices in bf16, positions in fp32         5.4 GB
#   adapters of rank 32: 18.8 million x 16 bytes                                 0.3 GB
#   VAE in fp32, rewards in fp16 (PickScore and CLIPScore)                       3.2 GB
#   the larger of these two:                                                    10.2 GB
#     rollout: 576 images x (11 states + 9 means) x 65,536 numbers, for a moment twice, 6.0 GB, features of
#     prompts, one copy per image, 3.2 GB, and the activations of 16 images, 1 GB
#     update of 4 samples x 3 steps, with 2 branches of guidance: states 1.7 GB, pixels 1.8 GB, the inputs of
#     24 blocks for 24 rows of 1,357 tokens x 1,536 numbers in bf16, 2.4 GB, and all activations of one block
#     in one branch, about 0.2 GB per row, 2.4 GB
#   in all                                                                        19 GB
#   Before this, the text encoders take 11 GB. Then 1,586 prompts take 4.3 GB of the CPU's memory.
# Departures from the released recipe:
#  1. Each step samples 24 prompts and takes one update. The script samples 48 prompts and takes two updates,
#     each on one half. So updates have the same size. Here pi_old = pi, so the clip never acts.
#  2. The KL is exact, between transitions with the variance s^2 |dt|. The script's KL has s^2, without |dt|.
#     |dt| is 0.11 on average, so beta is a tenth of the script's .01. Late steps have a larger |dt|.
#  3. Adapters have alpha = rank (the script: twice the rank), and A has standard deviation 1/sqrt(inputs).
#  4. Matrix products are in bf16, not fp16. Frozen weights are stored in bf16.
#  5. The standard deviation of advantages is of the group, as in the paper. The script takes that of the
#     whole step. Advantages are not clamped to +-5.
#  6. There is no moving average of the weights. The second beta of AdamW is .95, not .999.
#  7. T5 reads 256 tokens, the default of diffusers. The script has 128.
#  8. The prompts are our own.
world = "sd3"
out_dir = "out/sd3_flow_grpo"
gpt_ckpt = "stable-diffusion-3.5-medium"    # a folder of diffusers, with everything
dtype = "bfloat16"
lora_rank = 32
# ---- flow matching
denoise_steps = 10
noisy_steps = 9             # all but the last, which diffusers' grid makes tiny
eval_steps = 40
grid = "diffusers"
shift = 3.0                 # as released
sampler = "sde"
noise = 0.7
cfg_scale = 4.5
# ---- rollout
prompts_per_step = 24
group_size = 24
sample_batch = 16           # at most, per process
# ---- reward
reward = "pickscore"
heldout_reward = "clipscore"
# ---- loss
divergence = "reverse_kl"
estimator = "exact"
beta = 0.001
clip_eps = 0.0256           # ratios per component are clipped to 1 +- this/sqrt(65,536) = 1 +- 1e-4
micro_batch = 4
action_batch = 3
recompute = True
# ---- length, optimizer
max_steps = 2000
learning_rate = 3e-4
warmup = 0.0
min_lr_ratio = 1.0          # constant
weight_decay = 1e-4
grad_clip = 1.0
# ---- evaluation: 16 prompts held back from training, 8 samples of each
eval_interval = 100
eval_prompts = 16
eval_draws = 8

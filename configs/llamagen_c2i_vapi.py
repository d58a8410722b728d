# VA-pi (vapi.py) on class-conditional LlamaGen: 384 pixels, with the numbers of arXiv 2512.19680's launcher.
#   python train.py configs/llamagen_c2i_vapi.py --data=/data/imagenet/train      one folder per class
#   128 images x 8 samples x 576 tokens = 589,824 tokens per step. The policy reads 128 x 576 = 73,728 tokens.
#   100 steps use 12,800 images, 1 % of ImageNet. Any number of GPUs works. The authors had 8, each with 16.
# This is GPT-L (343M), which needs about 12 GB, calculated, not measured on a GPU. The paper's GPT-XXL (1.4B)
# needs 35 GB, calculated too: --gpt_ckpt=c2i_XXL_384.pt
# Departures from the launcher, besides those in vapi.py:
#  1. The second beta of AdamW is .95, not .999, and norms have weight decay too.
#  2. The weights are in fp32. The launcher has them in bf16.
#  3. The policy term has no dropout and leaves out no classes, where the launcher leaves out 10 %.
#     --prior_dropout=True brings both back for the cross-entropy.
#  4. The images of a step differ from each other, but an image may return in a later step.
world = "llamagen"
algorithm = "vapi"
out_dir = "out/llamagen_c2i_vapi"
gpt_ckpt = "c2i_L_384.pt"
vq_ckpt = "vq_ds16_c2i.pt"
dtype = "bfloat16"
# ---- images and samples
prompts_per_step = 128      # images
group_size = 8              # samples of each image
context_noise = 0.0         # xi, as in the launcher; for captions, the paper's best is .5
# ---- distance (both weights are 1) and prior
prior_weight = 0.1
# ---- rewards, both only reported. CLIPScore reads the names of the folders, so it needs names that are words
reward = "aesthetic"
heldout_reward = "clipscore"
# ---- loss
divergence = "none"         # as in the launcher, where the cross-entropy keeps the policy near the reference
beta = 0.0
micro_batch = 64            # samples of 8 images; logits of 8 x 576 tokens x 16,384 codes in fp32 take 302 MB
recompute = True
# ---- length, optimizer, with a constant learning rate
max_steps = 100
learning_rate = 1e-6
warmup = 0.0
min_lr_ratio = 1.0
weight_decay = 1e-4
# ---- evaluation: 16 classes of held-back images, 8 samples of each. sample.py --npz makes samples for FID
eval_interval = 25
eval_prompts = 16
eval_draws = 8

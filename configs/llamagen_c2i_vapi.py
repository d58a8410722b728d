# VA-pi (vapi.py) on class-conditional LlamaGen: 384 pixels, the numbers of arXiv 2512.19680's launcher.
#   python train.py configs/llamagen_c2i_vapi.py --data=/data/imagenet/train      a folder for each class
#   128 pictures x 8 samples x 576 tokens = 589,824 tokens a step; the policy reads 128 x 576 = 73,728.
#   100 steps: 12,800 pictures, 1 % of ImageNet. On any number of GPUs; the authors had eight, with 16 each.
# This is GPT-L (343M), about 12 GB by the plan that is printed first. The paper's is GPT-XXL (1.4B), 35 GB:
#   --gpt_ckpt=c2i_XXL_384.pt
# Departures from the launcher, besides those in vapi.py:
#  1. AdamW's second beta .95, not .999, and weight decay on norms too. 2. Weights in fp32; there in bf16.
#  3. No dropout in the policy term, nor (there: 10 %) classes that are left out. --prior_dropout=True brings
#     both back for the cross-entropy.
#  4. A step's pictures differ from each other, but a picture may come again in a later one.
world = "llamagen"
algorithm = "vapi"
out_dir = "out/llamagen_c2i_vapi"
gpt_ckpt = "c2i_L_384.pt"
vq_ckpt = "vq_ds16_c2i.pt"
dtype = "bfloat16"
# ---- pictures and samples
prompts_per_step = 128      # pictures
group_size = 8              # samples of each
context_noise = 0.0         # xi, as launched; the paper's best for captions is .5
# ---- distance (weights 1, 1) and prior
prior_weight = 0.1
# ---- rewards: only watched. CLIPScore reads the names of the folders: it means something if they are words
reward = "aesthetic"
heldout_reward = "clipscore"
# ---- loss
divergence = "none"         # as launched: the cross-entropy keeps the policy in place
beta = 0.0
micro_batch = 64            # 8 pictures: logits of 8 x 576 tokens x 16,384 codes in fp32: 302 MB each
recompute = True
# ---- length, optimiser: a constant rate
max_steps = 100
learning_rate = 1e-6
warmup = 0.0
min_lr_ratio = 1.0
weight_decay = 1e-4
# ---- evaluation: 16 classes of pictures kept from training, 8 samples each. For FID: sample.py --npz
eval_interval = 25
eval_prompts = 16
eval_draws = 8

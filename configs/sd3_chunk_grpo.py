# Chunk-GRPO on SD3.5-medium, by the recipe of arXiv 2510.21583 and its code, which train another model.
#   16 prompts x 12 samples x 16 noisy steps in 4 chunks. A sample trains 2 of its 4 chunks in a step.
#   Sana: --world=sana --gpt_ckpt=Sana_600M_512px_diffusers
# Memory on one GPU, calculated as in sd3_flow_grpo.py, not measured on a GPU: 16 GB. A chunk is never cut, so
#   2 samples x 7 steps x 2 branches share a backward pass. 192 images have 18 states each, 0.9 GB.
# Departures from the released recipe, beside numbers 3 to 8 of sd3_flow_grpo.py:
#  1. The model is SD3.5-medium with adapters and guidance. The paper trains all weights of FLUX.1-dev. So the
#     learning rate is Flow-GRPO's for adapters, not 1e-5. It is not tuned.
#  2. Images have 512 pixels, not 720. The published clip of 5e-5 at 129,600 components is c = .018.
#  3. A rollout is used twice as a whole. The script makes two updates, each on one half. Only from the second
#     update on, the ratio of a chunk matters (grpo.policy_loss).
#  4. The samples of a group start from different noise. The script gives a group the same noise.
#  5. The reward rates the image. The script rates the prediction of the image in the last step.
#  6. The trained policy draws whole images. In the paper's evaluation, the base takes the last 20 of 50
#     steps.
like = "configs/sd3_flow_grpo.py"
out_dir = "out/sd3_chunk_grpo"
# ---- flow matching
denoise_steps = 17
noisy_steps = 16
eval_steps = 50
grid = "linear"
chunks = (2, 3, 4, 7)       # from noise to image
chunk_share = 0.5
chunk_draw = "uniform"      # "change" is the paper's weighted sampling: better HPSv3, lower GenEval
# ---- rollout
prompts_per_step = 16
group_size = 12
# ---- loss
divergence = "none"         # as in the code
clip_eps = 0.018
inner_epochs = 2
micro_batch = 2
action_batch = 7
# ---- length, optimizer
max_steps = 150
grad_clip = 0.01
eval_interval = 50

# Flow-GRPO in the tiny world: GRPO on a flow-matching policy (flow.py).
#   8 prompts x 16 images x 5 noisy steps = 640 actions per step, each a latent of 512 numbers.
world = "tiny_flow"
out_dir = "out/tiny_flow"
# ---- flow matching: noise only in the first 5 of 8 steps, where an image's content is decided
noise = 0.5                 # with more noise, less of the gain appears in images of the ODE (LOG.md)
shift = 2.0
step_weights = "noise"      # d log pi / dv scales as abs(c_v)/std. The weight cancels this factor
# ---- rollout, loss
group_size = 16
divergence = "reverse_kl"
estimator = "exact"
beta = 0.05
clip_eps = 0.0256           # ratios per component are clipped to 1 +- this/sqrt(512). With one update, never
# ---- length, optimizer
max_steps = 80
eval_interval = 80
learning_rate = 1e-3

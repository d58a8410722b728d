# Flow-GRPO in the tiny world: GRPO on a flow-matching policy (flow.py).
#   8 prompts x 8 images x 5 noisy steps = 320 actions per step, each a latent of 512 numbers.
world = "tiny_flow"
out_dir = "out/tiny_flow"
# ---- flow matching: noise only in the first 5 of 8 steps, where an image's content is decided
step_weights = "noise"      # a log-density changes with v as abs(c_v)/std. The weight cancels this factor
# ---- loss
divergence = "reverse_kl"
estimator = "exact"
beta = 0.2
clip_eps = 0.0256           # c: the ratio per component is clipped to 1 +- c/sqrt(512)
# ---- length, optimizer
learning_rate = 2e-4        # .375 -> .465 for the reader with seed 0; 6e-4 gave .453

# GRPO with JS divergence in the tiny world: the main run, about 90 seconds on 2 CPU cores.
#   8 prompts x 8 images x 64 tokens = 4,096 tokens per step; 120 steps = 491,520 tokens
out_dir = "out/tiny_js"
divergence = "js"
estimator = "sampled"       # the paper's estimator
beta = 0.4                  # as strong as a KL at beta .1: at pi = rho JS has 1/4 of its curvature f''(1)

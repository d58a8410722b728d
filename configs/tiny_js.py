# JS divergence in the tiny world: the main job. Under 3 minutes on 2 CPU cores.
#   8 prompts x 8 pictures x 64 tokens = 4,096 tokens a step; x 120 steps = 491,520 tokens
out_dir = "out/tiny_js"
divergence = "js"
estimator = "sampled"       # the paper's form
beta = 0.4                  # pulls like .1 of a KL: at pi = ref the curvature of JS is 1/4 of theirs

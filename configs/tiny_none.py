# tiny_js.py without a divergence penalty, the baseline: it shows what the reward alone does.
out_dir = "out/tiny_none"
divergence = "none"
beta = 0.0

# tiny_js.py without a divergence: what reward alone does, to hold the others against.
out_dir = "out/tiny_none"
divergence = "none"
beta = 0.0

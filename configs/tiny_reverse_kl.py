# tiny_js.py with reverse KL instead of JS: same prompts, same seeds, same strength.
#   beta = .4 / 4 = .1: near the reference a KL is four times as strong as JS at the same beta, because its
#   curvature f''(1) is 1 and that of JS is 1/4. At equal beta, JS would win reward only because it is weaker.
out_dir = "out/tiny_reverse_kl"
divergence = "reverse_kl"
estimator = "sampled"
beta = 0.1

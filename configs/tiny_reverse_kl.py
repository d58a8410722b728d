# tiny_js.py with reverse KL in place of JS: same prompts, same seeds, same strength.
#   beta = .4 / 4 = .1, because near the reference a KL pulls four times as hard as JS at the same beta
#   (second derivatives f''(1): 1 against 1/4). At one beta for all, JS would win reward only by being weaker.
out_dir = "out/tiny_reverse_kl"
divergence = "reverse_kl"
estimator = "sampled"
beta = 0.1

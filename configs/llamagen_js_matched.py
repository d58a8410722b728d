# llamagen_js.py at the strength of the KLs. Near the reference, beta = 4 x .04 of JS pulls like .04 of a KL,
# because f''(1) of JS is 1/4 (divergences.py). Compare it with llamagen_forward_kl.py and _reverse_kl.py.
like = "configs/llamagen_js.py"
out_dir = "out/llamagen_js_matched"
beta = 0.16

# llamagen_js.py at the strength of the KLs: beta = 4 x .04, which pulls like .04 of a KL near the reference,
# because f''(1) of JS is 1/4 (divergences.py). Hold it against llamagen_forward_kl.py and _reverse_kl.py.
like = "configs/llamagen_js.py"
out_dir = "out/llamagen_js_matched"
beta = 0.16

# llamagen_js.py with reverse KL in place of JS, at the one beta of the released scripts. Near the reference a
# KL then pulls four times as hard as JS; to compare at equal strength hold it against llamagen_js_matched.py.
like = "configs/llamagen_js.py"
out_dir = "out/llamagen_reverse_kl"
divergence = "reverse_kl"

# llamagen_js.py with reverse KL instead of JS. The released scripts use one beta for all three divergences.
# Near the reference, a KL then pulls four times as hard as JS. llamagen_js_matched.py has equal strength.
like = "configs/llamagen_js.py"
out_dir = "out/llamagen_reverse_kl"
divergence = "reverse_kl"

# janus_js.py with reverse KL instead of JS. The released scripts use one beta for all three divergences.
# Near the reference, a KL then pulls four times as hard as JS. At equal strength, JS has --beta=0.04.
like = "configs/janus_js.py"
out_dir = "out/janus_reverse_kl"
divergence = "reverse_kl"

# tiny_flow.py with JS instead of a KL, at equal strength: near the reference, JS is a quarter of a KL.
like = "configs/tiny_flow.py"
out_dir = "out/tiny_flow_js"
divergence = "js"
beta = 0.2

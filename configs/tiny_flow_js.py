# tiny_flow.py with JS instead of a KL. Near the reference, JS is a quarter of a KL, so .2 would be as strong.
# But per image the means move by several standard deviations, where JS flattens (it cannot exceed log 2). At
# .2 the judge was hacked: reader .36 after training, .37 before. At .8 it is .45 (results/chunks.md).
like = "configs/tiny_flow.py"
out_dir = "out/tiny_flow_js"
divergence = "js"
beta = 0.8

# VA-pi in the tiny world: learn from pictures, by how near samples come to them. Under 2 minutes on 2 cores.
#   8 pictures x 8 samples x 64 tokens = 4,096 tokens a step, but 8 x 64 that the policy has to read
algorithm = "vapi"
out_dir = "out/tiny_vapi"
divergence = "none"         # the cross-entropy keeps the policy in place
beta = 0.0

# DPO in the tiny world, on the same images as configs/tiny_best_of_n.py: the best of each group against its
# worst.
like = "configs/tiny_best_of_n.py"
out_dir = "out/tiny_dpo"
loss = "dpo"
tau = 1.0                   # DPO's beta. With .1 and a rate of 3e-4 the policy left the reference (LOG.md)
learning_rate = 1e-4

# DPO in the tiny world, on the same images as configs/tiny_best_of_n.py: the best of each group against its
# worst.
like = "configs/tiny_best_of_n.py"
out_dir = "out/tiny_dpo"
loss = "dpo"
dpo_beta = 0.1
learning_rate = 3e-4

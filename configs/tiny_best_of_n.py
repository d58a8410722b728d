# Best-of-n fine-tuning in the tiny world: sample 7,680 images once, as many as configs/tiny_js.py, and
# imitate the best of each group of 8 by the judge: 960 images.
algorithm = "rejection"
out_dir = "out/tiny_best_of_n"
pool = 120                  # x 8 prompts x 8 images
tau = 0.0                   # only the best
groups = 64                 # so 64 images in an update
max_steps = 120             # every image is seen 8 times on average
learning_rate = 1e-3

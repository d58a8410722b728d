# Weighted imitation in the tiny world, online with replay (AWR): 8 prompts x 8 images in each of 120 steps,
# as many as configs/tiny_js.py.
algorithm = "rejection"
out_dir = "out/tiny_awr"
tau = 0.05                  # rewards of the judge vary by about .25 within a group
replay = 40
groups = 16                 # of the 320 groups that are kept; each is used about twice
max_steps = 120
learning_rate = 1e-3

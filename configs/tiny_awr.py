# Weighted imitation in the tiny world, online with replay (AWR): 8 prompts x 8 images in each of 120 steps,
# as many as configs/tiny_js.py.
algorithm = "rejection"
out_dir = "out/tiny_awr"
tau = 0.05                  # rewards of a group have a standard deviation of about .25: 3 of 8 images count
replay = 40
groups = 16                 # of up to 320 groups that are kept; each is used about twice, the first ones more
max_steps = 120
learning_rate = 1e-3

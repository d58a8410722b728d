# Chunk-GRPO in the tiny world: tiny_flow.py with ratios of chunks of steps, and two updates on each rollout
# of half as many images. With one update, chunks would only weigh the steps (grpo.policy_loss).
# The step weights of tiny_flow stay, so steps are weighted twice: equal ones were worse here (LOG.md).
like = "configs/tiny_flow.py"
out_dir = "out/tiny_chunk"
chunks = (1, 2, 2)
group_size = 8
inner_epochs = 2
learning_rate = 5e-4

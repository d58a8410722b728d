# Chunk-GRPO in the tiny world: tiny_flow.py with ratios of chunks of steps, and three updates on each
# rollout. With one update, chunks would only weigh the steps (grpo.policy_loss).
like = "configs/tiny_flow.py"
out_dir = "out/tiny_chunk"
chunks = (1, 2, 2)
inner_epochs = 3

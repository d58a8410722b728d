# llamagen_js.py with the two extras that the released script turns on (critical.py).
like = "configs/llamagen_js.py"
out_dir = "out/llamagen_js_as_released"
critical_tokens = True      # the loss is the average over 75 of the 256 tokens
dynamic_weight = True
micro_batch = 8             # each tensor of logits, 8 x 256 tokens x 16,384 codes in fp32, takes 134 MB
logit_chunk = 0                   # dynamic_weight needs whole sequences

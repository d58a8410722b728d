"""Solution 10.

generate recorded log pi_old under guidance. Teacher forcing at the same cfg_scale computes the same logits,
so the ratio is 1 except for rounding. (Guidance multiplies cond - uncond by s, and so enlarges the rounding.)
Without guidance, pi is another distribution, and the ratio measures the difference. A mean could hide a few
tokens. The maximum cannot.
"""
import torch


@torch.no_grad()
def ratio_error(gpt, tokens, logp, cond, mask, cfg_scale):
    logits = gpt(tokens, cond, mask, cfg_scale=cfg_scale)                                        # [B,T,V]
    again = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]                         # [B,T]
    return ((again - logp).exp() - 1).abs().max().item()


def conditional_only_error(gpt, tokens, logp, cond, mask, cfg_scale):
    return ratio_error(gpt, tokens, logp, cond, mask, 1.0)

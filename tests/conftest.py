"""Shared by all tests: the project's files on the path, one thread, and a base small enough to be made on
the spot."""
import os
import sys

if not os.environ.get("FULL_SIZE_DEVICE"):     # bit for bit is a promise on a CPU: a GPU stays out of sight
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch


ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests", "helpers"), os.path.join(ROOT, "tests", "full")]
torch.set_num_threads(1)      # results do not depend on the cores of the machine, and nothing waits for them


@pytest.fixture(scope="session")
def mini_base(tmp_path_factory):
    """A base with random weights in the tiny world's interfaces: quick where a test is about plumbing, not
    pictures."""
    from common import files as checkpoint
    from tiny.judge import Judge
    from tiny import text
    from model import GPT, GPTConfig
    from vqgan import VQGAN, VQConfig
    torch.manual_seed(0)
    vq = VQConfig(codebook_size=32, ch=8, ch_mult=(1, 1, 1, 1), num_res_blocks=1, z_channels=8, num_groups=4)
    gpt = GPTConfig(dim=32, n_layer=2, n_head=2, multiple_of=16, vocab_size=32, block_size=16,
                    cls_token_num=text.LENGTH, caption_dim=text.DIM)
    policy = GPT(gpt)
    torch.nn.init.normal_(policy.output.weight, std=.3)
    path = tmp_path_factory.mktemp("base") / "mini_base.pt"
    checkpoint.save({"gpt": checkpoint.pack(policy, gpt), "vqgan": checkpoint.pack(VQGAN(vq), vq),
                     "judge": checkpoint.pack(Judge(), None)}, str(path))
    return str(path)

"""Shared by all tests: the import path, one thread, and a base that is made on the spot."""
import os
import sys

if not os.environ.get("FULL_SIZE_DEVICE"):     # "bit for bit" holds on a CPU, so the tests do not see a GPU
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests", "helpers"), os.path.join(ROOT, "tests", "full")]
torch.set_num_threads(1)        # results do not depend on the number of cores then, and tests run in parallel


@pytest.fixture(scope="session")
def mini_base(tmp_path_factory):
    """Return the path of a small base with random weights. It has the interfaces of the tiny world, so it is
    enough, and quick, where a test does not look at the images."""
    from common import files
    from model import GPT, GPTConfig
    from tiny import text
    from tiny.judge import Judge
    from vqgan import VQGAN, VQConfig
    torch.manual_seed(0)
    vq = VQConfig(codebook_size=32, ch=8, ch_mult=(1, 1, 1, 1), num_res_blocks=1, z_channels=8, num_groups=4)
    gpt = GPTConfig(dim=32, n_layer=2, n_head=2, multiple_of=16, vocab_size=32, block_size=16,
                    cls_token_num=text.LENGTH, caption_dim=text.DIM)
    policy = GPT(gpt)
    torch.nn.init.normal_(policy.output.weight, std=.3)
    path = tmp_path_factory.mktemp("base") / "mini_base.pt"
    files.save({"gpt": files.pack(policy, gpt), "vqgan": files.pack(VQGAN(vq), vq),
                "judge": files.pack(Judge(), None)}, str(path))
    return str(path)


@pytest.fixture(scope="session")
def mini_flow_base(mini_base):
    """Return the path of a small flow base with random weights, for the tokenizer of `mini_base`."""
    from common import files
    from common.sit import SiTConfig
    from flow import SiTPolicy
    from tiny import text
    from tiny.world import Latents
    torch.manual_seed(0)
    config = SiTConfig(depth=1, dim=32, heads=2, channels=8, side=4, caption_dim=text.DIM)
    policy = SiTPolicy(config)
    for p in policy.parameters():
        torch.nn.init.normal_(p, std=.1)
    path = os.path.join(os.path.dirname(mini_base), "mini_flow_base.pt")
    files.save({"flow": files.pack(policy, config), "latents": files.pack(Latents(), None)}, path)
    return path

"""python -m pytest tests/full/test_janus_runs.py      (and -m slow: learning, FSDP2: about 3 minutes)

Runs of Janus-Pro through train.py and sample.py, on small files in the released layout
(tests/helpers/janus_files.py).
"""
import json
import os
import random
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import evaluate
import full_size
import janus_files
import sample
import train
from common import config, files
from common.config import UserError, locate
from common.device import freeze
from common.interfaces import Conditions
from full import clip, janus
from full.janus import Janus, JanusConfig
from tiny import shapes
from tiny import world as tiny
from tiny.world import load_models


QUICK = ["configs/janus_js.py", "--gpt_ckpt=Janus-Pro-1B", "--max_steps=2", "--prompts_per_step=2",
         "--group_size=4", "--sample_batch=4", "--eval_prompts=2", "--eval_draws=8", "--micro_batch=4",
         "--device=cpu", "--block_size=16", "--lora_rank=0", "--learning_rate=0.003", "--dtype=float32"]


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """Make a folder of weights with a Janus, HPS and CLIP, and prompts."""
    path = tmp_path_factory.mktemp("weights")
    janus_files.make(str(path / "Janus-Pro-1B"), janus_files.transformers_model(), "official")
    clip.HEADS[160] = 2
    full_size.make_rewards(str(path), hps=full_size.small(160, 2))
    (path / "prompts.txt").write_text("\n".join(f"a {c} {thing}" for c in ("red", "green", "very small blue")
                                                for thing in ("cat", "dog")))
    yield path
    del clip.HEADS[160]


def go(released, out, *more):
    train.main([*QUICK, f"--weights={released}", f"--prompts={released / 'prompts.txt'}", f"--out_dir={out}",
                *more])
    lines = [json.loads(line) for line in open(out / "metrics.jsonl")]
    return [{k: v for k, v in line.items() if not k.startswith("t_")} for line in lines]


@pytest.fixture(scope="module")
def plain(released, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "plain"
    return out, go(released, out, "--recompute=False", "--logit_chunk=0", "--micro_batch=8",
                   "--sample_batch=0")


def test_it_learns_from_images_too(released, tmp_path):
    """In VA-pi (vapi.py) the prompts of a Janus are the names of the folders."""
    full_size.make_lpips(str(released))
    full_size.make_pictures(str(tmp_path / "images"), of_each=5)
    quick = [option for option in QUICK[1:] if "sample_batch" not in option]
    train.main(["configs/llamagen_t2i_vapi.py", "--world=janus", *quick, f"--weights={released}",
                f"--data={tmp_path / 'images'}", f"--out_dir={tmp_path / 'run'}"])
    lines = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    assert lines[0]["kl_reverse"] == 0 < lines[1]["kl_reverse"] and lines[0]["max_ratio_error"] < 1e-4
    assert lines[0]["reward"] < 0 < lines[0]["prior"]


def test_a_run_from_released_files_to_images(released, plain, tmp_path, capsys):
    """Rollout and loss are guided at 5. The way a step is cut changes nothing."""
    out, lines = plain
    assert [line["step"] for line in lines] == [0, 1] and lines[0]["kl_reverse"] == 0 < lines[1]["kl_reverse"]
    assert all(line["max_ratio_error"] < 1e-3 and line["reward_std"] > 0 for line in lines)
    assert {"before_after.png", "curves.png", "table.md", "ckpt.pt"} <= set(os.listdir(out))
    for a, b in zip(lines, go(released, tmp_path / "cut", "--logit_chunk=5", "--micro_batch=3")):
        assert a == pytest.approx(b, rel=5e-3, abs=1e-4)
    capsys.readouterr()
    hashes = []
    for source in ([f"--ckpt={out}"], ["--gpt_ckpt=Janus-Pro-1B", "--world=janus", "--block_size=16"]):
        sample.main([*source, f"--weights={released}", "--n=2", "--prompt=a red cat; a dog", "--device=cpu",
                     f"--out={tmp_path / 's.png'}"])
        hashes.append(re.search("64 tokens, .* hash (.*)", capsys.readouterr().out)[1])
    assert hashes[0] != hashes[1]


def test_a_loss_on_the_conditional_branch_alone_is_about_another_distribution(released, plain, tmp_path):
    """--score_cfg=1, as in the paper's code: the same images, another loss. The log tells how far the loss's
    distribution is from the sampler's."""
    guided, paper = plain[1][0], go(released, tmp_path / "paper", "--max_steps=1", "--score_cfg=1.0")[0]
    print("max_ratio_error: guided", guided["max_ratio_error"], "paper's", paper["max_ratio_error"])
    assert paper["reward"] == pytest.approx(guided["reward"], abs=1e-6)
    assert guided["max_ratio_error"] < 1e-3 and paper["max_ratio_error"] > 1
    assert abs(paper["grad_norm"] / guided["grad_norm"] - 1) > .2 and paper["clip_share"] == 0
    with pytest.raises(UserError, match="score_cfg must be at least 1"):
        go(released, tmp_path / "no", "--score_cfg=0.5")


def test_a_run_with_adapters_trains_nothing_else(released, tmp_path):
    """The run is in bf16, where the shared weights are stored rounded."""
    lines = go(released, tmp_path / "run", "--lora_rank=4", "--learning_rate=0.03", "--dtype=bfloat16")
    assert lines[0]["kl_reverse"] == 0 < lines[1]["kl_reverse"] and lines[0]["grad_norm"] > 0
    state = files.load(str(tmp_path / "run" / "ckpt.pt"))["model"]
    base = janus.load(str(released / "Janus-Pro-1B"))[0].state_dict()
    for key, value in state.items():
        if not key.endswith((".a", ".b")):
            old = base[key.replace(".base", "")]
            assert torch.equal(value, old.to(value.dtype)), key
    moved = [k for k, v in state.items() if k.endswith(".b") and v.abs().max() > 0]
    assert len(moved) == 5 * 2                                     # five matrices in each of two layers
    sample.main([f"--ckpt={tmp_path / 'run'}", f"--weights={released}", "--prompt=a dog", "--n=1",
                 "--device=cpu", f"--out={tmp_path / 's.png'}"])


@pytest.mark.parametrize("options, message", [
    (["--reward=judge"], "this world has no reward 'judge'"), (["--gpt_ckpt=nothing"], "nothing"),
    (["--block_size=15"], "must be a square"), (["--n_head=5"], "n_head"),
    (["--lora_rank=-1"], "lora_rank must"), (["--lora_rank=4", "--shard"], "use one of them")])
def test_errors_name_the_cause_and_leave_nothing(released, tmp_path, options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        go(released, tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()


def test_the_configs_are_the_papers_recipe():
    for name in ("js", "forward_kl", "reverse_kl"):
        o, _ = config.load(evaluate.options, [f"configs/janus_{name}.py"])
        assert (o.divergence, o.beta, o.max_steps, o.group_size, o.cfg_scale, o.temperature, o.gpt_ckpt) == (
            name, .01, 1600, 4, 5, 1, "Janus-Pro-7B") and o.out_dir == f"out/janus_{name}"


# ---- a tiny Janus learns -------------------------------------------------------------------------------
WORDS = sorted({w for caption in shapes.CAPTIONS for w in caption.split()})
TINY = JanusConfig(dim=96, n_layer=3, n_head=4, multiple_of=32, vocab_size=256, head_dim=96, block_size=64,
                   words=len(WORDS) + 3, pad_id=0)


def prompt_ids(prompts):
    """Return begin-of-sentence 1, the words, begin-of-image 2, padded on the left with 0: ids and mask."""
    rows = [[1, *(3 + WORDS.index(w) for w in prompt.split()), 2] for prompt in prompts]
    L = max(map(len, rows))
    ids = torch.tensor([[0] * (L - len(row)) + row for row in rows])
    return ids, ids > 0


class World(tiny.World):
    """Four prompts of the tiny world. There is nothing to measure beside the rewards."""

    def __init__(self, *args):
        super().__init__(*args)
        self.pools, self.columns = [shapes.captions("single")[:4]], []

    def fixed_prompts(self, n):
        return self.pools[0][:n]

    def measure(self, *args):
        return {}

    def picture(self, *args):
        pass


class Pipeline(tiny.Pipeline):
    def encode(self, prompts):
        return Conditions(*prompt_ids(prompts))


def open_world(options, device, with_images=False):
    """A Janus in the tiny world, with the world's tokenizer, judge and reader. It replaces
    tiny.world.open_world."""
    _, vqgan, judge, _ = load_models(locate(options.init_from), device)
    policy = Janus(TINY).eval()
    policy.load_state_dict(torch.load(os.path.join(os.path.dirname(options.out_dir), "tiny_janus.pt")))
    return World(options, freeze(judge), device), Pipeline(policy, vqgan, device, options.dtype)


def pretrained(steps, scenes):
    """Train a Janus on images of the tiny world and their captions, by maximum likelihood."""
    torch.manual_seed(0)
    pool = [x for x in shapes.random_scenes(5 * scenes, random.Random(0)) if x[0].category == "single"]
    _, vqgan, _, _ = load_models(locate("assets/tiny_base.pt"), "cpu")
    tokens = torch.cat([vqgan.encode(images) for images in shapes.render([s for _, s in pool]).split(250)])
    policy = Janus(TINY)
    for name, p in policy.named_parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=1. if "words" in name else .06)
    layers = [p for p in policy.layers.parameters() if p.dim() == 2]
    rest = [p for p in policy.parameters() if all(p is not q for q in layers)]
    optimizers = [torch.optim.Muon(layers, 1e-2, weight_decay=0), torch.optim.AdamW(rest, 2e-3)]
    for step in range(steps):
        for optimizer, peak in zip(optimizers, (1e-2, 2e-3)):
            optimizer.param_groups[0]["lr"] = peak * min(1, (step + 1) / 20, 2 * (1 - step / steps))
        i = torch.randint(len(pool), (16,))
        logits = policy(tokens[i], *prompt_ids([pool[j][0].text for j in i]))
        F.cross_entropy(logits.flatten(0, 1), tokens[i].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return policy


CHILD = """
import sys; sys.path[:0] = [".", "tests/helpers", "tests/full"]
import test_janus_runs
from tiny import world as tiny
import train
tiny.open_world = test_janus_runs.open_world
train.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_two_processes_with_half_of_each_weight_make_the_run_of_one(tmp_path):
    """FSDP2 over gloo, in fp32. tests/common/test_parallel.py does the same for LlamaGen's model, and
    resumes."""
    torch.manual_seed(0)
    torch.save(Janus(TINY).state_dict(), tmp_path / "tiny_janus.pt")
    metrics = []
    for size in (1, 2):
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(28000 + os.getpid() % 900),
                 "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(size), "PYTHONPATH": locate(".")}
        processes = [subprocess.Popen(
            [sys.executable, "-c", CHILD, f"--out_dir={tmp_path / str(size)}", "--device=cpu", "--shard",
             "--max_steps=2", "--eval_prompts=1", "--eval_draws=64",
             "--prompts_per_step=3", "--group_size=4", "--micro_batch=3", "--cfg_scale=3.0",
             "--learning_rate=0.01", "--recompute", "--logit_chunk=24"],
            env=os.environ | where | {"RANK": str(r), "LOCAL_RANK": str(r)}, cwd=locate("."),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for r in range(size)]
        outputs = [p.communicate(timeout=300)[0] for p in processes]
        assert [p.returncode for p in processes] == [0] * size, outputs
        metrics.append([{k: v for k, v in json.loads(line).items() if not k.startswith("t_")}
                        for line in open(tmp_path / str(size) / "metrics.jsonl")])
    for one, two in zip(*metrics, strict=True):
        assert one == pytest.approx(two, rel=1e-5, abs=2e-6)       # max_ratio_error is rounding, near 1e-6
    one, two = (files.load(str(tmp_path / n / "ckpt.pt"))["model"] for n in ("1", "2"))
    assert one.keys() == two.keys() and max((one[k] - two[k]).abs().max() for k in one) < 5e-5


@pytest.mark.slow
def test_a_tiny_janus_learns_in_the_tiny_world(tmp_path, monkeypatch):
    """300 steps of maximum likelihood, then 30 steps of GRPO on the judge by train.py. The mean reward of 256
    images of four prompts has a standard error of about .015."""
    torch.save(pretrained(300, 1230).state_dict(), tmp_path / "tiny_janus.pt")
    monkeypatch.setattr(tiny, "open_world", open_world)
    train.main([f"--out_dir={tmp_path / 'run'}", "--device=cpu", "--max_steps=30", "--eval_interval=30",
                "--eval_prompts=4", "--eval_draws=64", "--prompts_per_step=4", "--group_size=32",
                "--micro_batch=128", "--learning_rate=0.0002", "--divergence=none"])
    lines, (before, after) = ([json.loads(line) for line in open(tmp_path / "run" / name)]
                              for name in ("metrics.jsonl", "evaluations.jsonl"))
    first, last = (sum(line["reward"] for line in part) / 8 for part in (lines[:8], lines[-8:]))
    print(f"judge: {before['reward']:.3f} -> {after['reward']:.3f}; mean of the first and last 8 steps: "
          f"{first:.3f}, {last:.3f}")
    assert max(line["max_ratio_error"] for line in lines) < 1e-3
    assert after["reward"] > before["reward"] + .02 and last > first + .03

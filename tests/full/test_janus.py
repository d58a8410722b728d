"""python -m pytest tests/full/test_janus.py     (and -m slow: a tiny Janus learns, and FSDP2, about 3 minutes)

Janus-Pro against transformers' JanusForConditionalGeneration, and through train.py.
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
from common import config, files, lora
from common.config import UserError, locate
from common.device import freeze
from common.interfaces import Conditions
from full import clip, janus, weights
from full.janus import Janus, JanusConfig, Prompts
from tiny import shapes
from tiny import world as tiny
from tiny.world import load_models
from vqgan import VQGAN

CAPTIONS = ["a red cat", "a photo of a dog on a blue cat", "dog"]


@pytest.fixture(scope="module")
def theirs():
    return janus_files.transformers_model()


@pytest.fixture(scope="module", params=["official", "hf"])
def folder(request, theirs, tmp_path_factory):
    path = str(tmp_path_factory.mktemp(request.param) / "Janus-Pro-1B")
    janus_files.make(path, theirs, request.param)
    return path


@pytest.fixture(scope="module")
def ours(folder):
    return janus.load(folder, block_size=16)


def uncond(ids, mask):
    """The ids of the unconditional branch, as in generation_inference.py: tokens[1:-1] = pad, row by row."""
    out = ids.clone()
    for row, seen in zip(out, mask):
        start = int(seen.float().argmax())
        row[start + 1:-1] = 261
    return out


@torch.no_grad()
def their_logits(theirs, ids, mask, tokens):
    """Teacher forcing by transformers' modules: the state at the last prompt token predicts token 0."""
    inputs = torch.cat([theirs.get_input_embeddings()(ids),
                        theirs.prepare_embeddings_for_image_generation(tokens[:, :-1])], 1)
    mask = torch.cat([mask.long(), torch.ones_like(tokens[:, :-1])], 1)
    position = (mask.cumsum(1) - 1).clamp_min(0)
    hidden = theirs.model.language_model(inputs_embeds=inputs, attention_mask=mask,
                                         position_ids=position).last_hidden_state
    return theirs.model.generation_head(hidden[:, ids.shape[1] - 1:])


# ---- against transformers ------------------------------------------------------------------------------
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_logits_are_those_of_transformers(theirs, ours, folder, scale):
    policy, (ids, mask) = ours[0], Prompts(folder).encode(CAPTIONS)
    assert len(set(mask.sum(1).tolist())) == 3 and not mask[0, 0]   # unequal lengths, padded on the left
    tokens = torch.randint(40, (3, 16), generator=torch.Generator().manual_seed(1))
    expected = their_logits(theirs, ids, mask, tokens)
    if scale > 1:
        free = their_logits(theirs, uncond(ids, mask), mask, tokens)
        expected = free + scale * (expected - free)
    with torch.no_grad():
        logits = policy(tokens, ids, mask, cfg_scale=scale)
    assert expected.std() > .3 and (logits - expected).abs().max() < 1e-5 * scale
    alone = [policy(tokens[i:i + 1], *Prompts(folder).encode([c]), cfg_scale=scale)
             for i, c in enumerate(CAPTIONS)]
    assert (torch.cat(alone) - expected).abs().max() < 1e-5 * scale        # so padding changes nothing


@torch.no_grad()
def test_greedy_pictures_are_those_of_the_official_loop(theirs, ours, folder):
    """Once more as in generation_inference.py: one prompt, no padding, no cache, a token at a time; and by
    transformers' own generate, for the batch."""
    policy, text = ours[0], Prompts(folder)
    ids, mask = text.encode(CAPTIONS)
    drawn = policy.generate(ids, mask, cfg_scale=5.0, temperature=0)
    for b, caption in enumerate(CAPTIONS):
        row = [256] + text.tokenizer.encode(f"<|User|>: {caption}\n\n<|Assistant|>:").ids + [260]
        both = torch.tensor([row, row[:1] + [261] * (len(row) - 2) + row[-1:]])
        x, tokens = theirs.get_input_embeddings()(both), []
        for _ in range(16):
            hidden = theirs.model.language_model(inputs_embeds=x).last_hidden_state
            cond, free = theirs.model.generation_head(hidden[:, -1])
            tokens.append(int((free + 5 * (cond - free)).argmax()))
            new = theirs.prepare_embeddings_for_image_generation(torch.tensor([[tokens[-1]]] * 2))
            x = torch.cat([x, new], 1)
        assert drawn[b].tolist() == tokens
    assert len(set(drawn.flatten().tolist())) > 5
    config = theirs.generation_config
    config.bos_token_id, config.pad_token_id, config.generation_kwargs = 256, 261, {"boi_token_id": 260}
    assert torch.equal(drawn, theirs.generate(ids, attention_mask=mask.long(), generation_mode="image",
                                              do_sample=False, guidance_scale=5.0))


@torch.no_grad()
def test_tokenizer_is_that_of_transformers(theirs, ours):
    tokens = torch.arange(32).view(2, 16)
    assert (ours[1].decode(tokens) - theirs.model.vqmodel.decode(tokens)).abs().max() < 5e-5
    assert isinstance(ours[1], VQGAN)


@torch.no_grad()
def test_the_first_image_token_is_predicted_at_begin_of_image(theirs, ours, folder):
    """The off-by-one of facts/vapi.md, item 7: row t of the logits must not have seen token t."""
    policy, (ids, mask) = ours[0], Prompts(folder).encode(CAPTIONS[:1])
    prompt = theirs.model.language_model(input_ids=ids).last_hidden_state[:, -1]
    tokens = torch.randint(40, (1, 16))
    logits = policy(tokens, ids, mask)
    assert (logits[:, 0] - theirs.model.generation_head(prompt)).abs().max() < 1e-5
    for t in range(16):
        other = tokens.clone()
        other[:, t] = (other[:, t] + 7) % 40
        moved = (policy(other, ids, mask) - logits).abs().amax((0, 2))                            # [T]
        assert (moved[:t + 1] == 0).all() and (moved[t + 1:] > 1e-4).all()
    for place in range(ids.shape[1]):                                      # and every prompt token matters
        other = ids.clone()
        other[:, place] = (other[:, place] + 7) % 256
        assert (policy(tokens, other, mask)[:, 0] - logits[:, 0]).abs().max() > 1e-4


# ---- one policy, many ways to run it -------------------------------------------------------------------
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_sampling_is_teacher_forcing_and_sharing_changes_nothing(ours, folder, scale):
    policy, (ids, mask) = ours[0], Prompts(folder).encode(CAPTIONS)
    prompt = torch.tensor([0, 0, 0, 1, 2, 2])
    sampling = dict(cfg_scale=scale, temperature=.9)

    def draw(*batch, part=(0, 1)):
        return policy.generate(*batch, generator=torch.Generator().manual_seed(3), return_logp=True,
                               part=part, **sampling)
    tokens, logp = draw(ids, mask, prompt)
    forced = policy(tokens, ids, mask, prompt, **sampling).log_softmax(-1)
    forced = forced.gather(2, tokens[..., None])[..., 0]
    assert (forced - logp).abs().max() < 1e-4 and logp.std() > .3 and len(tokens.unique(dim=0)) == 6
    apart = draw(ids[prompt], mask[prompt])
    assert torch.equal(apart[0], tokens) and (apart[1] - logp).abs().max() < 1e-4
    halves = [draw(ids, mask, prompt[i:i + 3], part=(i // 3, 2)) for i in (0, 3)]
    assert torch.equal(torch.cat([t for t, _ in halves]), tokens)


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_gradients_do_not_depend_on_recomputing_nor_on_sharing(ours, folder, scale):
    policy, (ids, mask) = ours[0], Prompts(folder).encode(CAPTIONS)
    prompt, tokens = torch.tensor([0, 0, 2, 1]), torch.randint(40, (4, 16))

    def gradients(*batch):
        policy.zero_grad()
        policy(tokens, *batch, cfg_scale=scale).log_softmax(-1)[..., 0].sum().backward()
        return {k: p.grad.clone() for k, p in policy.named_parameters()}
    plain, apart = gradients(ids, mask, prompt), gradients(ids[prompt], mask[prompt])
    policy.recompute = True
    again = gradients(ids, mask, prompt)
    policy.recompute = False
    policy.zero_grad()
    for key, g in plain.items():
        assert g.abs().max() > 0 and torch.equal(again[key], g), key
        assert (apart[key] - g).abs().max() <= 1e-4 * g.abs().max(), key


@pytest.mark.parametrize("change, message", [
    (dict(cond=torch.zeros(1, 5)), "prompt ids"), (dict(cond=torch.zeros(1, 5, 3).long()), "prompt ids"),
    (dict(cond_mask=torch.ones(1, 4)), r"cond_mask must be \[1,5\]"), (dict(cfg_scale=.5), "cfg_scale"),
    (dict(prompt=torch.zeros(1)), "prompt must be indices"),
    (dict(tokens=torch.zeros(2, 16).long()), "tokens")])
def test_wrong_arguments(change, message):
    policy = Janus(JanusConfig(dim=16, n_layer=1, n_head=2, vocab_size=8, head_dim=8, block_size=16, words=9,
                               pad_id=0))
    good = dict(tokens=torch.zeros(1, 16).long(), cond=torch.zeros(1, 5).long(), cond_mask=torch.ones(1, 5))
    with pytest.raises(ValueError, match=message):
        policy(**good | change)
    with pytest.raises(ValueError, match="must be a square"):
        Janus(JanusConfig(block_size=15))


# ---- files ---------------------------------------------------------------------------------------------
def test_layouts_shards_and_precisions_hold_the_same(theirs, tmp_path, capsys):
    states = []
    for i, (layout, shards) in enumerate((("official", 1), ("official", 3), ("hf", 1), ("hf", 2))):
        path = str(tmp_path / str(i))
        janus_files.make(path, theirs, layout, shards)
        policy, vqgan = janus.load(path)
        assert policy.config.block_size == (576 if layout == "official" else 16) and not policy.training
        assert policy.config.pad_id == 261 and policy.config.n_head == 4 and policy.config.norm_eps == 1e-6
        states.append(policy.state_dict() | {f"vq.{k}": v for k, v in vqgan.state_dict().items()})
        assert "left out" in capsys.readouterr().out
    assert len([n for n in (tmp_path / "3").iterdir() if n.suffix == ".safetensors"]) > 1
    for other in states[1:]:
        assert other.keys() == states[0].keys()
        assert all(torch.equal(other[k], v) for k, v in states[0].items())
    half = Janus.from_pretrained(str(tmp_path / "0"), dtype="bfloat16")
    assert all(torch.equal(p, states[0][k].bfloat16()) for k, p in half.named_parameters())


def test_the_pad_token_is_that_of_the_tokenizer(theirs, tmp_path):
    """Its id differs between 1B and 7B."""
    special = janus_files.SPECIAL[-1:] + janus_files.SPECIAL[:-1]
    janus_files.make(str(tmp_path), theirs, "official", special=special)
    assert janus.load(str(tmp_path))[0].config.pad_id == 256 == Prompts(str(tmp_path)).pad


def test_prompts_say_what_the_chat_template_says(folder):
    text = Prompts(folder)
    ids, mask = text.encode(["  a red cat ", "a photo of a dog: {x}"])
    said = [text.tokenizer.decode(row[seen].tolist(), skip_special_tokens=False)
            for row, seen in zip(ids, mask)]
    assert said == [janus_files.START + f"<|User|>: {c}\n\n<|Assistant|>:" + janus_files.IMAGE
                    for c in ("a red cat", "a photo of a dog: {x}")]
    assert (ids[~mask] == 261).all() and mask[1].all()
    assert mask[0].tolist() == [False] * 12 + [True] * (ids.shape[1] - 12)
    assert ids[0, 12] == 256 and (ids[:, -1] == 260).all()


def damage(path, how):
    if how == "tensor gone":
        state = torch.load(path / "pytorch_model.bin")
        del state["language_model.model.layers.1.self_attn.k_proj.weight"]
        torch.save(state, path / "pytorch_model.bin")
    elif how == "heads":
        (path / "config.json").write_text('{"language_config": {"num_attention_heads": 7}}')
    elif how == "other model":
        torch.save({"tok_embeddings.weight": torch.zeros(2, 2)}, path / "pytorch_model.bin")
    elif how == "other tokenizer":
        janus_files.tokenizer(special=("<s>",)).save(str(path / "tokenizer.json"))
    elif how == "torn tokenizer":
        (path / "tokenizer.json").write_text("{")
    else:
        (path / how).unlink()


@pytest.mark.parametrize("how, message", [
    ("tensor gone", "'layers.1.attention.wqkv.weight' should be"), ("heads", "n_head"),
    ("other model", "does not look like a file for JanusConfig"), ("other tokenizer", "is not Janus-Pro's"),
    ("torn tokenizer", "is no tokenizer"), ("tokenizer.json", "no file"),
    ("pytorch_model.bin", "no weights at")])
def test_errors_are_one_line(theirs, tmp_path, how, message):
    janus_files.make(str(tmp_path), theirs, "official")
    damage(tmp_path, how)
    with pytest.raises(UserError, match=message) as error:
        janus.load(str(tmp_path))
    assert "\n" not in str(error.value)


def test_sizes_of_the_released_models():
    """Parameters of both as transformers counts them, with a matrix of its own for the words' logits; and of
    the parts that we load."""
    import transformers as t
    for name, c in (("Janus-Pro-1B", JanusConfig()),
                    ("Janus-Pro-7B", JanusConfig(dim=4096, n_layer=30, n_head=32, head_dim=4096))):
        inner = {2048: 5632, 4096: 11008}[c.dim]
        with torch.device("meta"):
            theirs = t.JanusForConditionalGeneration(t.JanusConfig(
                text_config=t.LlamaConfig(vocab_size=102400, hidden_size=c.dim, intermediate_size=inner,
                                          num_hidden_layers=c.n_layer, num_attention_heads=c.n_head),
                vision_config=t.JanusVisionConfig(projection_dim=c.dim),
                vq_config=t.JanusVQVAEConfig(projection_dim=c.dim, image_token_embed_dim=c.dim)))
        count = sum(p.numel() for p in theirs.parameters()) + theirs.lm_head.weight.numel()
        assert weights.RELEASED[name][0] == 2 * count
        part = [theirs.model.language_model, theirs.model.generation_embeddings,
                theirs.model.generation_aligner, theirs.model.generation_head]
        with torch.device("meta"):
            ours = Janus(c)
        assert sum(t.numel() for t in ours.state_dict().values()) == sum(
            p.numel() for m in part for p in m.parameters())


# ---- through train.py ----------------------------------------------------------------------------------
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
    for source in (f"--ckpt={out}", "--gpt_ckpt=Janus-Pro-1B"):
        sample.main([source, "--world=janus", "--block_size=16", f"--weights={released}", "--n=2",
                     "--prompt=a red cat; a dog", "--device=cpu", f"--out={tmp_path / 's.png'}"])
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


def test_adapters_share_the_weights_and_start_as_the_base(ours, folder):
    base, (ids, mask) = Janus.from_pretrained(folder), Prompts(folder).encode(CAPTIONS)
    policy, tokens = lora.adapt(base, 4), torch.randint(40, (3, 16))
    assert torch.equal(policy(tokens, ids, mask), base(tokens, ids, mask))
    own = {id(p) for p in policy.parameters()} - {id(p) for p in base.parameters()}
    trained = {id(p) for p in policy.parameters() if p.requires_grad}
    assert own == trained and len(own) == 2 * 5 * 2 and not any(p.requires_grad for p in base.parameters())
    # Compare W + (alpha / rank) B A with a Janus whose W is replaced by this sum.
    merged = Janus.from_pretrained(folder)
    with torch.no_grad():
        for (name, module), seed in zip(policy.named_modules(), range(1000)):
            if isinstance(module, lora.LowRank):
                module.b.normal_(0, .1, generator=torch.Generator().manual_seed(seed))
                merged.get_submodule(name).weight += 32 / 4 * module.b @ module.a
                assert torch.allclose(module.weight, merged.get_submodule(name).weight)
        moved = policy(tokens, ids, mask)
        assert (moved - merged(tokens, ids, mask)).abs().max() < 1e-4
        assert (moved - base(tokens, ids, mask)).abs().max() > 1e-2


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
import test_janus
from tiny import world as tiny
import train
tiny.open_world = test_janus.open_world
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
        assert one == pytest.approx(two, rel=1e-6, abs=1e-9)
    one, two = (files.load(str(tmp_path / n / "ckpt.pt"))["model"] for n in ("1", "2"))
    assert one.keys() == two.keys() and max((one[k] - two[k]).abs().max() for k in one) < 1e-9


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

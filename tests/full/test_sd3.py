"""python -m pytest tests/full/test_sd3.py

SD3.5 and Sana as policies, on tiny networks in the layout of the released folders, with random weights. Every
number is compared with diffusers' own pipelines. The tests are skipped without the package diffusers.
"""
import copy
import gc
import inspect
import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch

import flow
import full_size
import grpo
import sample
import train
from common import files, lora
from common.config import UserError
from flow import time_grid
from full import sd3, weights

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
safetensors = pytest.importorskip("safetensors.torch")

CPU = torch.device("cpu")
PROMPTS = ["a red cat", "a blue dog on the cat", "the photo"]
OPTIONS = flow.Options(denoise_steps=4, noisy_steps=3, eval_steps=4, grid="diffusers", chunks=(1, 2))
WORLDS = {"sd3": sd3.Pipeline, "sana": sd3.SanaPipeline}


def tokenizer(length):
    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *" ".join(PROMPTS).split()])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="</s>",
                                                unk_token="<unk>", model_max_length=length)


def make_sd3(folder):
    def clip():
        return transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(
            hidden_size=16, intermediate_size=16, projection_dim=8, num_hidden_layers=2, vocab_size=32,
            num_attention_heads=2, max_position_embeddings=16, bos_token_id=2, eos_token_id=1,
            pad_token_id=0))
    t5 = transformers.T5EncoderModel(transformers.T5Config(
        d_model=32, d_ff=16, d_kv=8, num_heads=2, num_layers=1, vocab_size=32))
    network = diffusers.SD3Transformer2DModel(      # SD3.5 has dual attention in some blocks, and qk_norm
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=16,
        pos_embed_max_size=16, dual_attention_layers=(0,), qk_norm="rms_norm")
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4,), layers_per_block=1, latent_channels=4, norm_num_groups=1,
        use_quant_conv=False, use_post_quant_conv=False, shift_factor=.0609, scaling_factor=1.5035)
    diffusers.StableDiffusion3Pipeline(
        network, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), vae, clip(), tokenizer(16), clip(),
        tokenizer(16), t5, tokenizer(64)).save_pretrained(folder)


def make_sana(folder):
    gemma = transformers.Gemma2Model(transformers.Gemma2Config(
        hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=8,
        num_key_value_heads=1, vocab_size=32))
    network = diffusers.SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, sample_size=4,
        attention_head_dim=4, num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8,
        caption_channels=8)
    vae = diffusers.AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "ResBlock"),
        decoder_block_types=("ResBlock", "ResBlock"), encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), downsample_block_type="conv",
        upsample_block_type="interpolate", decoder_norm_types="rms_norm", decoder_act_fns="silu",
        scaling_factor=.41407)
    diffusers.SanaPipeline(tokenizer(400), gemma, vae, network,
                           diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)).save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    make_sd3(path / "sd3")
    make_sana(path / "sana")
    return path


def options(**more):
    return SimpleNamespace(**vars(OPTIONS) | dict(gpt_ckpt="it", block_size=16, lora_rank=0) | more)


@pytest.fixture(scope="module")
def encoded(folders):
    return {name: kind.text_encoder(options(), {"it": str(folders / name)}, CPU, PROMPTS)
            for name, kind in WORLDS.items()}


@pytest.fixture(scope="module")
def texts(encoded):
    """Keep only 20 rows of each prompt's features, to save time: SD3's last ones, Sana's first ones."""
    short = copy.deepcopy(encoded)
    for name, text in short.items():
        text.rows = {prompt: tuple(y[-20:] if name == "sd3" else y[:20] for y in rows)
                     for prompt, rows in text.rows.items()}
    return short


@pytest.fixture
def build(folders, texts):
    def build(name, dtype="float32", train=True, **more):
        return WORLDS[name](options(**more), {"it": str(folders / name)}, texts[name], CPU, dtype, train)
    return build


@pytest.fixture(params=WORLDS)
def name(request):
    return request.param


def noise(pipeline, b=2):
    return torch.randn(b, *pipeline.policy.shape, generator=torch.Generator().manual_seed(1))


def theirs(folders, name, dtype=torch.float32):
    pipe = getattr(diffusers, WORLDS[name].make.classes[0]).from_pretrained(folders / name, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe, name, pipeline, x, prompts=PROMPTS[:2], **more):
    """Call diffusers' pipeline with our features of the prompts."""
    (cond, mask), (empty, empty_mask) = (pipeline.text.encode(texts, CPU) for texts in
                                         (prompts, [""] * len(prompts)))
    if name == "sana":
        features = dict(prompt_embeds=cond, negative_prompt_embeds=empty, prompt_attention_mask=mask,
                        negative_prompt_attention_mask=empty_mask, negative_prompt=None,
                        use_resolution_binning=False, height=32, width=32)
    else:
        features = dict(prompt_embeds=cond[:, :-1], pooled_prompt_embeds=cond[:, -1, :16],
                        negative_prompt_embeds=empty[:, :-1], negative_pooled_prompt_embeds=empty[:, -1, :16],
                        height=8, width=8)
    return pipe(latents=x, num_inference_steps=4, **features, **more)[0]


def test_the_grid_is_that_of_the_scheduler():
    for steps, shift in ((4, 3.0), (10, 3.0), (28, 3.0), (40, 3.0), (10, 1.0)):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(steps)
        assert torch.equal(time_grid(steps, shift, .001).float(), scheduler.sigmas)


@pytest.mark.parametrize("cfg_scale", [1.0, 4.5])
def test_our_loop_draws_what_the_pipeline_draws(folders, build, name, cfg_scale):
    """With guidance, diffusers computes both branches in one batch, so the last bits differ."""
    pipeline, pipe = build(name, train=False), theirs(folders, name)
    conditions, x = pipeline.encode(PROMPTS[:2]), noise(pipeline)
    ours = pipeline.policy.generate(conditions.cond, conditions.mask, torch.arange(2), cfg_scale=cfg_scale,
                                    noise=x)
    latents, pixels = (call(pipe, name, pipeline, x, guidance_scale=cfg_scale, output_type=kind)
                       for kind in ("latent", "pt"))
    tolerance = 0 if cfg_scale == 1 else 1e-5
    assert (ours[:, 0] - latents).abs().max() <= tolerance
    assert (pipeline.decode(ours) / 2 + .5).clamp(0, 1).sub(pixels).abs().max() < 1e-6
    assert (pixels[0] - pixels[1]).abs().max() > .01


def test_guidance_moves_from_the_empty_prompt_to_the_prompt(build, name):
    pipeline = build(name, train=False)
    conditions, x, t = pipeline.encode(PROMPTS[:2]), noise(pipeline), torch.tensor([.9, .3])
    empty = pipeline.text.encode(["", ""], CPU)
    v, u = (pipeline.policy.predict(x, t, *features) for features in
            ((conditions.cond, conditions.mask), empty))
    guided = pipeline.policy.velocity(x, t, conditions.cond, conditions.mask, cfg_scale=4.5)
    assert torch.equal(guided, u + 4.5 * (v - u)) and (v - u).abs().max() > 1e-3


@torch.no_grad()
def test_prompts_are_encoded_as_by_the_pipeline_and_the_encoders_are_freed(folders, encoded, name):
    gc.collect()
    kinds = transformers.T5EncoderModel, transformers.CLIPTextModelWithProjection, transformers.Gemma2Model
    assert not any(type(thing) in kinds for thing in gc.get_objects())
    pipe = theirs(folders, name, torch.bfloat16)
    cond, mask = (y[0] for y in encoded[name].encode([PROMPTS[0]], CPU))
    empty, empty_mask = (y[0] for y in encoded[name].encode([""], CPU))
    if name == "sd3":
        want, want_empty, pooled, pooled_empty = pipe.encode_prompt(PROMPTS, None, None)
        assert torch.equal(cond[-1, :16], pooled[0].float()) and not cond[-1, 16:].any()
        assert torch.equal(empty[-1, :16], pooled_empty[0].float())
        cond, empty = cond[:-1], empty[:-1]
    else:
        want, want_mask, want_empty, want_empty_mask = pipe.encode_prompt(
            PROMPTS, complex_human_instruction=inspect.signature(pipe.__call__).parameters[
                "complex_human_instruction"].default)
        assert torch.equal(mask, want_mask[0].float()) and torch.equal(empty_mask, want_empty_mask[0].float())
    assert torch.equal(cond, want[0].float()) and torch.equal(empty, want_empty[0].float())


def test_adapters_are_in_the_published_matrices_only(build):
    def adapted(name):
        return {key.removeprefix("network.transformer_blocks.0.") for key, module in
                build(name, lora_rank=4).policy.named_modules() if isinstance(module, lora.LowRank)
                and ".0.a" in key}
    of_attention = {"to_q", "to_k", "to_v", "to_out.0"}
    assert adapted("sd3") == {f"attn.{n}" for n in of_attention | {
        "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}}                   # and none in attn2
    assert adapted("sana") == {f"{part}.{n}" for part in ("attn1", "attn2") for n in of_attention}


def test_adapters_of_rank_32_at_full_size():
    """Flow-GRPO trains 18.8 million numbers of SD3.5-medium."""
    with torch.device("meta"):
        network = diffusers.SD3Transformer2DModel(
            sample_size=16, num_layers=24, num_attention_heads=24, caption_projection_dim=1536,
            pos_embed_max_size=16, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm")
    policy = lora.adapt(sd3.SD3Policy(network, 64, OPTIONS), 32, sd3.SD3Policy.adapted)
    assert sum(p.numel() for p in policy.parameters() if p.requires_grad) == 18_776_064
    assert sum(p.numel() for p in policy.parameters() if not p.requires_grad) == 2_243_171_520


def learn(pipeline, cfg_scale=1.0, parts=((0, 1), (1, 3))):
    """Sample and take a gradient step, as train.py does -> statistics of each part, the rollout, conditions.
    Divergence: KL. Rewards: arbitrary."""
    conditions, rows = pipeline.encode(PROMPTS[:2]), torch.tensor([0, 0, 1, 1])
    rollout = pipeline.policy.rollout(conditions, rows, cfg_scale=cfg_scale,
                                      generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.AdamW([p for p in pipeline.policy.parameters() if p.requires_grad], .01)
    seen = []
    for start, stop in parts:
        pi, rho = (policy.distribution(rollout, conditions, torch.arange(4), cfg_scale=cfg_scale)
                   for policy in (pipeline.policy, pipeline.reference))
        loss, stats = grpo.loss(pi.at(start, stop), rho.at(start, stop), rollout.actions,
                                rollout.logp[:, start:stop], torch.tensor([1., -1, -1, 1]), 12,
                                divergence="reverse_kl", estimator="exact",
                                beta=.1, per=pipeline.per, clip_eps=.0256)
        loss.backward()
        seen.append(stats)
    grad = torch.cat([p.grad.flatten() for p in pipeline.policy.parameters() if p.grad is not None])
    optimizer.step()
    return seen, rollout, conditions, grad


@pytest.mark.parametrize("rank", [0, 4])
def test_a_step_moves_the_policy_and_not_the_reference(build, name, rank):
    pipeline = build(name, lora_rank=rank)
    x, t = noise(pipeline), torch.tensor([.9, .3])
    conditions = pipeline.encode(PROMPTS[:2])

    def velocities():
        with torch.no_grad():
            return [policy.velocity(x, t, conditions.cond, conditions.mask, cfg_scale=4.5)
                    for policy in (pipeline.policy, pipeline.reference)]
    before, frozen = velocities()
    # Untrained adapters change nothing. With --lora_rank=0 the reference is a copy, and its tensors lie at
    # other addresses than those of the loaded file. Then the CPU may add up in another order.
    assert (before - frozen).abs().max() <= (0 if rank else 1e-5)
    learn(pipeline, cfg_scale=4.5)
    after, still = velocities()
    assert torch.equal(still, frozen) and (after - before).abs().max() > 1e-3
    assert (pipeline.tokens, pipeline.chunks, pipeline.per) == (16, (1, 2), x[0].numel())


def test_the_ratio_is_1_right_after_the_rollout(build, name):
    """In fp32 exactly, if loss and sampler compute equal batches: one step in a pass."""
    seen, *_ = learn(build(name, lora_rank=4), 4.5, parts=((0, 1), (1, 2), (2, 3)))
    assert [stats["max_ratio_error"].item() for stats in seen] == [0, 0, 0]
    assert sum(stats["kl_reverse"] for stats in seen) == 0
    seen, *_ = learn(build(name, lora_rank=4), 4.5)
    assert max(stats["max_ratio_error"] for stats in seen) < 1e-3
    seen, *_ = learn(build(name, "bfloat16", lora_rank=4), 4.5, parts=((0, 1), (1, 2), (2, 3)))
    assert [stats["max_ratio_error"].item() for stats in seen] == [0, 0, 0]
    assert sum(stats["kl_reverse"] for stats in seen) == 0


def test_recomputed_activations_give_the_same_gradient(build, name):
    plain, saving = build(name, lora_rank=4), build(name, lora_rank=4)
    saving.policy.recompute = True
    assert torch.equal(learn(plain)[3], learn(saving)[3])
    assert saving.policy.network.gradient_checkpointing


def test_diffusers_loads_an_exported_lora(folders, build, name, tmp_path, capsys):
    pytest.importorskip("peft")
    pipeline = build(name, lora_rank=4)
    _, _, conditions, _ = learn(pipeline)
    files.save({"model": pipeline.policy.state_dict(), "config": {"world": name}}, str(tmp_path / "ckpt.pt"))
    weights.main([f"--export={tmp_path}", f"--to={tmp_path / 'lora'}"])
    assert "pytorch_lora_weights.safetensors" in capsys.readouterr().out
    pipe, x = theirs(folders, name), noise(pipeline)
    base = call(pipe, name, pipeline, x, guidance_scale=1, output_type="latent")
    pipe.load_lora_weights(tmp_path / "lora")
    found = call(pipe, name, pipeline, x, guidance_scale=1, output_type="latent")
    ours = pipeline.policy.generate(conditions.cond, conditions.mask, torch.arange(2), noise=x)[:, 0]
    assert (found - ours).abs().max() < 1e-5 < 1e-2 < (found - base).abs().max()
    with pytest.raises(UserError, match="no adapters"):
        lora.export(pipeline.reference.state_dict(), str(tmp_path))


def test_folders_of_diffusers(folders, build, tmp_path):
    """A missing file, a missing tensor and other weights are noticed. The number of patches is a square."""
    folder = tmp_path / "sana"
    shutil.copytree(folders / "sana", folder)
    part = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    mark = files.fingerprint(str(folder))
    assert weights._is_there(str(folder)) and files.fingerprint(str(folders / "sana")) == mark
    state = safetensors.load_file(part)
    safetensors.save_file({key: y + 1 for key, y in state.items()}, part)
    assert files.fingerprint(str(folder)) != mark
    state.pop("proj_out.weight")
    safetensors.save_file(state, part)
    with pytest.raises(UserError, match="lacks proj_out.weight"):
        sd3.load("SanaTransformer2DModel", str(folder), "transformer")
    os.remove(part)
    assert not weights._is_there(str(folder))
    with pytest.raises(UserError, match="diffusers cannot load SanaTransformer2DModel"):
        sd3.load("SanaTransformer2DModel", str(folder), "transformer")
    with pytest.raises(UserError, match="block_size must be a square"):
        build("sd3", block_size=15)


# ---- runs --------------------------------------------------------------------------------------------------
QUICK = ["--dtype=float32", "--denoise_steps=3", "--noisy_steps=2", "--eval_steps=2", "--recompute=False"]


@pytest.mark.slow                       # 3 minutes, nearly all of them for bf16 on a CPU
@pytest.mark.parametrize("name, config, more", [("sana", "sd3_flow_grpo", QUICK), *(
    (world, config, ["--eval_steps=4"]) for world in WORLDS
    for config in ("sd3_flow_grpo", "sd3_chunk_grpo"))])
def test_a_run_from_a_config_to_images(folders, tmp_path, name, config, more):
    """Train two steps and resume for one. Draw from the run and from the folder. Export the adapters."""
    full_size.make_rewards(str(folders), hps=full_size.small(160, 2))
    (tmp_path / "prompts.txt").write_text("\n".join([*PROMPTS, "a green dog", "a small cat", "a red photo"]))
    where = [f"--weights={folders}", "--device=cpu"]
    run = [f"configs/{config}.py", f"--world={name}", f"--gpt_ckpt={name}", *where, "--block_size=16",
           f"--prompts={tmp_path / 'prompts.txt'}", f"--out_dir={tmp_path / 'run'}", "--prompts_per_step=2",
           "--group_size=2", "--sample_batch=2", "--eval_prompts=2", "--eval_draws=8", "--max_steps=3",
           "--lora_rank=2", "--reward=aesthetic", "--heldout_reward=clipscore", *more]
    train.main([*run, "--stop_after=2"])
    train.main([f"--out_dir={tmp_path / 'run'}", "--resume"])
    lines = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    assert len(lines) == 3 and lines[0]["kl_reverse"] == 0 < lines[2]["kl_reverse"]
    assert all(line["max_ratio_error"] < .05 and line["grad_norm"] > 0 for line in lines)
    released = [f"--world={name}", f"--gpt_ckpt={name}", "--block_size=16"]
    for source in ([f"--ckpt={tmp_path / 'run'}"], released):
        sample.main([*source, f"--weights={folders}", "--device=cpu", "--prompt=a red cat; the dog", "--n=2",
                     f"--out={tmp_path / 'sample.png'}"])
    weights.main([f"--export={tmp_path / 'run'}", f"--to={tmp_path / 'lora'}"])
    assert (tmp_path / "lora" / "pytorch_lora_weights.safetensors").exists()

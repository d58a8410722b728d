"""python -m pytest tests/full/test_sd3.py

SD3.5 and Sana as policies, on tiny networks in the layout of the released folders, with random weights. Every
number is compared with diffusers' own pipelines. The tests are skipped without the package diffusers.
"""
import copy
import gc
import json
import os
from types import SimpleNamespace

import pytest
import torch

import flow
import grpo
from common import files, lora
from common.config import UserError
from flow import time_grid
from full import sd3, weights

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

CPU = torch.device("cpu")
PROMPTS = ["a red cat", "a blue dog on the cat", "the photo"]
OPTIONS = flow.Options(denoise_steps=4, noisy_steps=3, eval_steps=4, grid="diffusers", chunks=(1, 2))
WORLDS = {"sd3": sd3.Pipeline, "sana": sd3.SanaPipeline}
torch_seeded = torch.Generator


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
            hidden_size=16, intermediate_size=16, projection_dim=8, num_hidden_layers=2, num_attention_heads=2,
            vocab_size=32, max_position_embeddings=16, bos_token_id=2, eos_token_id=1, pad_token_id=0))
    t5 = transformers.T5EncoderModel(transformers.T5Config(d_model=32, d_ff=16, d_kv=8, num_heads=2, num_layers=1,
                                                           vocab_size=32))
    network = diffusers.SD3Transformer2DModel(      # SD3.5 has dual attention in its first blocks, and qk_norm
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
        hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, vocab_size=32))
    network = diffusers.SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=4,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8,
        sample_size=4)
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
def texts(folders):
    return {name: kind.text_encoder(options(), {"it": str(folders / name)}, CPU, PROMPTS)
            for name, kind in WORLDS.items()}


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


def theirs(folders, name):
    kind = getattr(diffusers, WORLDS[name].make.classes[0])
    pipe = kind.from_pretrained(folders / name)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe, name, pipeline, prompts, x, **more):
    """Call diffusers' pipeline with our features of prompts."""
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
        assert (time_grid(steps, shift, .001).float() - scheduler.sigmas).abs().max() <= 2e-7
    print((time_grid(10, 3, .001).float() - scheduler.sigmas).abs().max())


@pytest.mark.parametrize("cfg_scale", [1.0, 4.5])
def test_our_loop_draws_what_the_pipeline_draws(folders, build, name, cfg_scale):
    pipeline, pipe = build(name, train=False), theirs(folders, name)
    conditions, x = pipeline.encode(PROMPTS[:2]), noise(pipeline)
    ours = pipeline.policy.generate(conditions.cond, conditions.mask, torch.arange(2), cfg_scale=cfg_scale,
                                    noise=x)
    want = call(pipe, name, pipeline, PROMPTS[:2], x, guidance_scale=cfg_scale, output_type="latent")
    print("diff", (ours[:, 0] - want).abs().max())
    pixels = call(pipe, name, pipeline, PROMPTS[:2], x, guidance_scale=cfg_scale, output_type="pt")
    print("pix", (pipeline.decode(ours) / 2 + .5).clamp(0, 1).sub(pixels).abs().max())

"""Write folders in the two layouts of Janus-Pro, from a small random model of transformers.

tests/full/test_janus.py reads them, because the released files cannot be downloaded where the tests run.

    python tests/helpers/janus_files.py /tmp/weights     random Janus-Pro-1B, official layout (3.1 GB)
"""
import json
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests", "full")]
import torch

START, END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
PAD, IMAGE = "<｜▁pad▁｜>", "<begin_of_image>"
SPECIAL = (START, END, "<|User|>", "<|Assistant|>", IMAGE, PAD)


def tokenizer(special=SPECIAL):
    """Return a byte-level BPE tokenizer without merges: 256 bytes, then the special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    out = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    out.pre_tokenizer, out.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    out.add_special_tokens(list(special))
    return out


def transformers_model(std=.15, seed=0):
    """Return a JanusForConditionalGeneration: two layers of four heads, 40 codes, 4 x 4 image tokens."""
    import transformers as t
    torch.manual_seed(seed)
    model = t.JanusForConditionalGeneration(t.JanusConfig(
        text_config=t.LlamaConfig(vocab_size=264, hidden_size=64, intermediate_size=176, num_hidden_layers=2,
                                  num_attention_heads=4, num_key_value_heads=4),
        vision_config=t.JanusVisionConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                          image_size=64, projection_dim=64, num_image_tokens=16),
        vq_config=t.JanusVQVAEConfig(num_embeddings=40, base_channels=32, channel_multiplier=(1, 1, 1, 1, 2),
                                     num_res_blocks=1, latent_channels=32, projection_dim=64,
                                     image_token_embed_dim=64))).eval()
    for name, p in model.named_parameters():               # logits of some size, and norms that are not all 1
        if "vqmodel" not in name:
            torch.nn.init.normal_(p, mean=1. if p.dim() == 1 and "norm" in name else 0., std=std)
    return model


def official(state):
    """Rename from transformers to deepseek-ai/Janus (janus/models), whose VQ part has LlamaGen's names."""
    out = {}
    for key, value in state.items():
        name = "language_model." + key if key.startswith("lm_head") else key.removeprefix("model.")
        for theirs, new in (
                ("language_model.layers", "language_model.model.layers"),
                ("language_model.norm", "language_model.model.norm"),
                ("language_model.embed_tokens", "language_model.model.embed_tokens"),
                ("generation_embeddings", "gen_embed"), ("generation_aligner.fc1", "gen_aligner.layers.0"),
                ("generation_aligner.hidden_layers.0", "gen_aligner.layers.2"),
                ("generation_head.proj_out", "gen_head.output_mlp_projector"),
                ("generation_head", "gen_head"), ("vqmodel", "gen_vision_model"),
                ("encoder.down", "encoder.conv_blocks"),
                ("decoder.up.", "decoder.conv_blocks."), (".block.", ".res."), ("mid.block_1", "mid.0"),
                ("mid.attn_1", "mid.1"), ("mid.block_2", "mid.2")):
            name = name.replace(theirs, new)
        out[name] = value.clone()
    out["gen_vision_model.quantize.codebook_used"] = torch.zeros(9)
    return out


def make(folder, model, layout, shards=1, special=SPECIAL):
    """Write `model` in the layout "hf" (safetensors) or "official" (pytorch_model.bin, in `shards` files)."""
    os.makedirs(folder, exist_ok=True)
    tokenizer(special).save(os.path.join(folder, "tokenizer.json"))
    if layout == "hf":
        return model.save_pretrained(folder, max_shard_size="100KB" if shards > 1 else "1GB")
    c = model.config.text_config
    json.dump({"language_config": {"hidden_size": c.hidden_size, "num_attention_heads": c.num_attention_heads,
                                   "model_type": "llama"}}, open(os.path.join(folder, "config.json"), "w"))
    items = list(official(model.state_dict()).items())
    for i in range(shards):
        name = "pytorch_model.bin" if shards == 1 else f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        torch.save(dict(items[i::shards]), os.path.join(folder, name))


def make_full_size(folder):
    """Write Janus-Pro-1B's generation half in bf16 with random weights, named as in the released file."""
    import full_size
    from full import janus
    from vqgan import VQConfig
    os.makedirs(folder, exist_ok=True)
    tokenizer().save(os.path.join(folder, "tokenizer.json"))
    told = {"language_config": {"num_attention_heads": 16}}
    json.dump(told, open(os.path.join(folder, "config.json"), "w"))
    c, state, generator = janus.JanusConfig(), {}, torch.Generator().manual_seed(0)
    D, F = c.dim, 5632
    shapes = {"language_model.model.embed_tokens.weight": (c.words, D),
              "language_model.model.norm.weight": (D,), "gen_embed.weight": (c.vocab_size, 8),
              "gen_aligner.layers.0.weight": (D, 8), "gen_aligner.layers.0.bias": (D,),
              "gen_aligner.layers.2.weight": (D, D), "gen_aligner.layers.2.bias": (D,),
              "gen_head.output_mlp_projector.weight": (D, D), "gen_head.output_mlp_projector.bias": (D,),
              "gen_head.vision_head.weight": (c.vocab_size, D), "gen_head.vision_head.bias": (c.vocab_size,)}
    for i in range(c.n_layer):
        for name, shape in {"self_attn.q_proj": (D, D), "self_attn.k_proj": (D, D),
                            "self_attn.v_proj": (D, D), "self_attn.o_proj": (D, D),
                            "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D),
                            "mlp.down_proj": (D, F), "input_layernorm": (D,),
                            "post_attention_layernorm": (D,)}.items():
            shapes[f"language_model.model.layers.{i}.{name}.weight"] = shape
    shapes |= {"gen_vision_model." + k: shape for k, shape in full_size.key_table(VQConfig()).items()}
    for key, shape in shapes.items():
        tensor = torch.full(shape, float(key.endswith("weight")), dtype=torch.bfloat16)
        state[key] = tensor if len(shape) == 1 else tensor.normal_(0, .02, generator=generator)
    torch.save(state, os.path.join(folder, "pytorch_model.bin"))


if __name__ == "__main__":
    make_full_size(os.path.join(sys.argv[1], "Janus-Pro-1B"))

"""What the tensors of a released file tell about the model that they belong to.

A weight file is a dict from names to tensors, and nothing in it says which config it has. The shapes do: the
token table [V,D] gives V and D, the highest layer number gives the depth, and so on. model.py and vqgan.py
read LlamaGen's layout this way, full/janus.py its own. files.build then compares every name and shape.
"""
import dataclasses
import os
import re

from common import files
from common.config import UserError

# Names of buffers that are computed anew here, and of what only the training of the tokenizer needs.
UNUSED = (r"freqs_cis$|causal_mask$|layers\.\d+\.attention\.kv_cache\.|.*rotary_emb\.inv_freq$|"
          r"discriminator\.|optimizer_disc\.|quantize\.codebook_used$")


def fields(make_config, shapes, state, told, overrides, path):
    """Return the fields of the dataclass `make_config`: from shapes(state), then dicts told and overrides.
    Raises UserError if an override is no field, or if the file at `path` belongs to another model."""
    names = [field.name for field in dataclasses.fields(make_config)]
    if unknown := [name for name in overrides if name not in names]:
        raise UserError(f"there is no option {unknown[0]!r} of {make_config.__name__}. Allowed: dtype, "
                        f"{', '.join(names)}.")
    with files.explain(f"{path} does not look like a file for {make_config.__name__}",
                       f". The first of its {len(state)} entries are {', '.join(list(state)[:3])}."):
        return {**shapes(state), **told, **overrides}


def layer_shapes(state, dim):
    """Return the fields that the layers in `state` tell, for a Llama of width `dim`."""
    width = len(state["layers.0.feed_forward.w1.weight"])
    # Any multiple that rounds 2/3 * 4 dim up to this width gives the same model. `width` itself always does.
    return dict(dim=dim, n_layer=len({key.split(".")[1] for key in state if key.startswith("layers.")}),
                multiple_of=256 if -(-int(2 * 4 * dim / 3) // 256) * 256 == width else width)


def gpt_shapes(state):
    """Return the fields of GPTConfig that the shapes of LlamaGen's transformer tell."""
    vocab_size, dim = state["tok_embeddings.weight"].shape
    told = dict(vocab_size=vocab_size, **layer_shapes(state, dim))
    if (labels := state.get("cls_embedding.embedding_table.weight")) is not None:   # the last is "no class"
        return dict(told, model_type="c2i", cls_token_num=1, num_classes=len(labels) - 1)
    cls_token_num, caption_dim = state["cls_embedding.uncond_embedding"].shape
    return dict(told, model_type="t2i", cls_token_num=cls_token_num, caption_dim=caption_dim)


def tokens_by_name(path):
    """Return the number of image tokens that the name of a file or folder tells, or None. A name with _256
    means 256 pixels, so 16 x 16 tokens of VQ-16."""
    pixels = re.findall(r"_(256|384|512)(?!\d)", os.path.basename(os.path.abspath(path)))
    return (int(pixels[-1]) // 16) ** 2 if pixels else None


def add_heads_and_tokens(told, presets, path):
    """Add n_head and block_size to the fields `told` of a GPTConfig where they are missing. n_head comes
    from presets {name: (n_layer, n_head, dim)}, block_size from the file's name. With a wrong block_size
    everything loads, and images look zoomed or torn. Raises UserError if a source does not help."""
    heads = {(n_layer, dim): n_head for n_layer, n_head, dim in presets.values()}
    if told.setdefault("n_head", heads.get((told["n_layer"], told["dim"]))) is None:
        raise UserError(f"{path}: no tensor tells the number of heads, and {told['n_layer']} layers of width "
                        f"{told['dim']} are no published size. Give n_head=.")
    if "block_size" not in told:
        told["block_size"] = tokens = tokens_by_name(path)
        if tokens is None:
            raise UserError(f"{path}: neither a tensor nor the name tells the number of image tokens. Give "
                            f"block_size=, which is 256, 576, 1024 for images of 256, 384, 512 pixels.")
        print(f"{path}: {tokens} image tokens, as its name says {16 * int(tokens ** .5)} pixels")


def vq_shapes(state):
    """Return the fields of VQConfig that the shapes of LlamaGen's tokenizer tell."""
    codebook_size, width = state["quantize.embedding.weight"].shape
    ch = len(state["encoder.conv_in.weight"])
    levels, blocks = (len({key.split(".")[part] for key in state if key.startswith(start)})
                      for part, start in ((2, "encoder.conv_blocks."), (4, "encoder.conv_blocks.0.res.")))
    widths = [len(state[f"encoder.conv_blocks.{i}.res.0.conv1.weight"]) for i in range(levels)]
    return dict(ch=ch, ch_mult=tuple(w // ch for w in widths), num_res_blocks=blocks,
                codebook_size=codebook_size, codebook_embed_dim=width,
                z_channels=len(state["encoder.conv_out.weight"]))

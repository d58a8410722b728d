"""The second policy, Janus-Pro: a language model that has learned to write images as well (arXiv 2501.17811).

    prompt ids [P,L] -> words [P,L,D]  |  tokens 0 .. T-2 -> 8 numbers each -> two-layer MLP [B,T-1,D]
    a Llama: layers of RMSNorm, causal attention with 1-D RoPE, RMSNorm, SwiGLU -> two-layer MLP [B,T,V]

    B sequences   P prompts   L prompt tokens   T image tokens   V codes   D width   hd width of a head
    R rows: B, or 2B under guidance, first the conditional ones, then the unconditional ones

    python train.py configs/janus_js.py                                     the paper's second experiment
    python sample.py --world=janus --gpt_ckpt=Janus-Pro-1B --prompt="a red fox in the snow"

Janus and LlamaGen's GPT are ImageTransformers (model.py): teacher forcing, guidance, cache and sampler are
written once. They differ in `read_prompts`, that is, in what an image token gets of its prompt. LlamaGen
reduces a prompt to one token per layer. Janus keeps the keys and values of all L prompt tokens. These are
computed once per prompt, too, and all images of the prompt share them. Five rules are particular to Janus:
 1. The prompt is a turn of a chat that ends with the token begin-of-image. The state *there* predicts image
    token 0. (A public trainer pairs token t with the state that has read token t. This is off by one, so the
    model sees the answer. tests/full/test_janus.py checks that ours does not.)
 2. The unconditional branch of guidance is the same prompt, with the pad token in every place between the
    first and the last. So this branch still tells the length of the prompt, and image tokens attend to these
    pads. They do not attend to the pads on the left, which make the prompts of a batch equally long. The id
    of the pad token is 100002 in the 1B model and 100015 in the 7B model, so it is read from tokenizer.json.
 3. RoPE depends on differences of positions only. So we count from the image: prompt tokens have positions
    -L .. -1, and image tokens 0 and up. Then padding moves nothing.
 4. Hugging Face's Llama rotates number j of a head with number j + hd/2, and `rotate` rotates neighbors. An
    attention score is a sum over all pairs, so the rows of the query and key matrices may be reordered.
    `load` makes the members of a pair neighbors.
 5. Janus's own sampler guides at 5, and so does the rollout. The paper's code then evaluates the samples by
    the conditional branch alone, which is not the distribution that sampled. Here the loss is of the guided
    distribution, unless --score_cfg=1 asks for the paper's. The logged max_ratio_error shows the difference.

The understanding half of the model (SigLIP, its aligner, the logits of words) is not loaded. Sources:
github.com/deepseek-ai/Janus (generation_inference.py, janus/models), and transformers' port, with which the
tests compare every logit. For 7B on one card, or 1B on a card of 24 GB, see common/lora.py.
"""
import os
import re
from dataclasses import dataclass

import torch
import torch.nn as nn

from common import files, llama, released
from common.config import UserError
from common.llama import Block, FeedForward, RMSNorm
from full import llamagen, weights
from model import ImageTransformer
from vqgan import VQGAN, VQConfig


@dataclass
class JanusConfig:                       # the defaults are Janus-Pro-1B
    dim: int = 2048                      # D; 4096 in 7B
    n_layer: int = 24                    # 30 in 7B
    n_head: int = 16                     # 32 in 7B
    multiple_of: int = 256               # the SwiGLU width is 2/3 * 4D, rounded up to a multiple of this
    norm_eps: float = 1e-6
    rope_base: float = 10000
    vocab_size: int = 16384              # V, image codes
    code_dim: int = 8                    # numbers in the embedding of an image code
    head_dim: int = 2048                 # hidden width of the MLP to the logits; 4096 in 7B
    block_size: int = 576                # T: 24 x 24 tokens are 384 pixels
    words: int = 102400                  # ids of the text tokenizer
    pad_id: int = 100002                 # rule 2
    model_type: str = "janus"


class PromptAttention(llama.Attention):
    def forward_prompt(self, x, rotation, bias):
        """Let prompt rows x [P,L,D] attend to each other. Return their output [P,L,D], and their keys and
        values for the image rows, two of [P,heads,L,hd]."""
        q, k, v = self.qkv(x, rotation)
        return self.attend(q, k, v, bias), (k, v)


class Janus(ImageTransformer):
    """Janus-Pro without its understanding half. `cond` is the prompts' ids [P,L], padded on the left, as
    `Prompts.encode` makes them. Raises ValueError if the config is impossible."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.side = int(c.block_size ** .5)
        if self.side ** 2 != c.block_size or c.dim % (2 * c.n_head) or c.pad_id >= c.words:
            raise ValueError(f"block_size must be a square, dim a multiple of 2 * n_head, pad_id a word, "
                             f"got {c}")
        self.words = nn.Embedding(c.words, c.dim)
        self.tok_embeddings = nn.Sequential(nn.Embedding(c.vocab_size, c.code_dim),
                                            nn.Linear(c.code_dim, c.dim), nn.GELU(), nn.Linear(c.dim, c.dim))
        self.layers = nn.ModuleList(Block(
            PromptAttention(c.dim, c.n_head), FeedForward(c.dim, c.multiple_of), c.dim, c.norm_eps)
            for _ in range(c.n_layer))
        self.norm = RMSNorm(c.dim, c.norm_eps)
        self.output = nn.Sequential(nn.Linear(c.dim, c.head_dim), nn.GELU(),
                                    nn.Linear(c.head_dim, c.vocab_size))

    def check_prompt(self, cond):
        if cond.dim() != 2 or cond.is_floating_point():
            raise ValueError(f"cond must be prompt ids [P,L], got {cond.dtype} {tuple(cond.shape)}")

    def rotations(self, x, start=0, stop=None):
        """Return the rotations of positions start .. stop-1, by default of all image tokens: [..,hd/2].
        They have the precision of x, but at least fp32."""
        c, hd = self.config, self.config.dim // self.config.n_head
        # angle = position * base^(-2j / hd),  j = 0 .. hd/2 - 1
        freq = c.rope_base ** (-torch.arange(0, hd, 2).double() / hd)
        angle = torch.outer(torch.arange(start, c.block_size if stop is None else stop).double(), freq)
        dtype = torch.promote_types(x.dtype, torch.complex64)
        return torch.polar(torch.ones_like(angle), angle).to(x.device, dtype)

    def read_prompts(self, cond, cond_mask, prompt, cfg_scale):
        """Run the prompt tokens, once per prompt. A cache holds all of them (p = L), and the bias is 0, or
        -inf in the padding. ImageTransformer describes what is returned."""
        P, L = cond.shape
        visible = torch.ones_like(cond).bool() if cond_mask is None else cond_mask.bool()         # [P,L]
        row = torch.arange(P, device=cond.device) if prompt is None else prompt                   # [B]
        if cfg_scale > 1:                                                  # rule 2
            ends = visible & (visible.cumsum(1) == 1)                      # the first, begin-of-sentence
            ends[:, -1] = True                                             # and begin-of-image
            cond = torch.cat([cond, torch.where(ends, cond, self.config.pad_id)])
            visible, row = visible.repeat(2, 1), torch.cat([row, row + P])
        x = self.words(cond)                                               # [P or 2P,L,D]
        rotation = self.rotations(x, -L, 0)                                # rule 3
        itself = torch.eye(L, dtype=torch.bool, device=x.device)           # no row may be empty

        def bias(seen):
            return torch.where(seen, 0., -torch.inf).to(rotation.real.dtype)
        causal, caches = bias((visible[:, None] | itself).tril())[:, None], []               # [..,1,L,L]
        for layer in self.layers:
            x, keys_values = self.run_layer(layer.forward_prompt, x, rotation, causal)
            caches.append([y[row] for y in keys_values])
        return x[row, -1:], caches, bias(visible)[row][:, None, None]


# ---- released files ------------------------------------------------------------------------------------
UNUSED = re.compile(r"(model\.)?(vision_model|aligner)\.|(.*\.)?lm_head\.|.*rotary_emb\.inv_freq$|"
                    r".*codebook_used$")
VQ = "gen_vision_model."
NAMES = [  # (theirs, ours), applied in this order: first from the -HF layout to the official one
    (r"^model\.", ""), (r"^generation_embeddings", "gen_embed"), (r"^vqmodel", "gen_vision_model"),
    (r"^generation_aligner\.fc1", "gen_aligner.layers.0"),
    (r"^generation_aligner\.hidden_layers\.0", "gen_aligner.layers.2"),
    (r"^generation_head\.proj_out", "gen_head.output_mlp_projector"), (r"^generation_head", "gen_head"),
    (r"^(gen_vision_model\.(?:en|de)coder)\.(?:down|up)\.", r"\1.conv_blocks."),
    (r"^(gen_vision_model\..*\.)block\.", r"\1res."), (r"\.mid\.block_1\.", ".mid.0."),
    (r"\.mid\.attn_1\.", ".mid.1."), (r"\.mid\.block_2\.", ".mid.2."),
    # and then from the official layout to our modules
    (r"^language_model\.(model\.)?", ""), (r"^embed_tokens", "words"), (r"^gen_embed", "tok_embeddings.0"),
    (r"^gen_aligner\.layers\.0", "tok_embeddings.1"), (r"^gen_aligner\.layers\.2", "tok_embeddings.3"),
    (r"^gen_head\.output_mlp_projector", "output.0"), (r"^gen_head\.vision_head", "output.2"),
    *((re.escape(theirs), ours) for theirs, ours in weights.PORT_LAYERS.items())]


def _state(path, n_head):
    """Return the policy's tensors by our names and the tokenizer's by LlamaGen's, from either layout."""
    state, beside = weights.gather(path)
    state = files.select(state, path, UNUSED, beside)
    for theirs, ours in NAMES:
        state = {re.sub(theirs, ours, key): value for key, value in state.items()}
    # Row (half, j) of a head becomes row (j, half): rule 4.
    weights.join_qkv(state, lambda w: w.view(n_head, 2, -1, w.shape[1]).transpose(1, 2).reshape(w.shape))
    return state, {key.removeprefix(VQ): state.pop(key) for key in list(state) if key.startswith(VQ)}


def load(path, dtype=torch.float32, **overrides):
    """Return the (Janus, VQGAN) of a folder of released files, on the CPU and in eval mode. path:
    Janus-Pro-1B or -7B as downloaded, or a port to transformers' layout: config.json, tokenizer.json, and
    safetensors or pytorch_model.bin in one or several files. dtype: of the policy. overrides: fields of
    JanusConfig. Raises UserError for files that are missing, damaged or of another model."""
    def shapes(state):
        (V, code_dim), (words, D) = (state[k + ".weight"].shape for k in ("tok_embeddings.0", "words"))
        return dict(vocab_size=V, code_dim=code_dim, words=words, head_dim=len(state["output.0.weight"]),
                    **released.layer_shapes(state, D))
    # What config.json leaves out is a default of transformers' Llama. The official one tells no block_size.
    config = weights.config_beside(path)
    text = config.get("language_config") or config.get("text_config") or {}
    theta = (text.get("rope_parameters") or text).get("rope_theta", 10000.0)
    told = dict(block_size=(config.get("vq_config") or {}).get("num_patches", 24) ** 2,
                n_head=text.get("num_attention_heads", 32), norm_eps=text.get("rms_norm_eps", 1e-6),
                rope_base=theta, pad_id=Prompts(path).pad)
    with files.explain(f"{path}: query and key matrices do not fit to n_head", ". Is n_head right?"):
        state, vq_state = _state(path, overrides.get("n_head", told["n_head"]))
    fields = released.fields(JanusConfig, shapes, state, told, overrides, path)
    vq_fields = released.fields(VQConfig, released.vq_shapes, vq_state, {}, {}, path)
    return (files.build(Janus, JanusConfig(**fields), state, dtype, path),
            files.build(VQGAN, VQConfig(**vq_fields), vq_state, torch.float32, path))


# ---- prompts -------------------------------------------------------------------------------------------
START, PAD, IMAGE = "<｜begin▁of▁sentence｜>", "<｜▁pad▁｜>", "<begin_of_image>"


class Prompts:
    """Turns prompts into ids, by the tokenizer.json in a folder. Raises UserError if this file, one of the
    three special tokens, or the package `tokenizers` is missing."""

    def __init__(self, folder):
        path = os.path.join(folder, "tokenizer.json")
        with files.explain(f"{path} is no tokenizer", ". It is released with the weights: fetch it again."):
            from tokenizers import Tokenizer
            self.tokenizer = Tokenizer.from_file(path)
        self.start, self.pad, self.image = map(self.tokenizer.token_to_id, (START, PAD, IMAGE))
        if None in (self.start, self.pad, self.image):
            raise UserError(f"{path} is not Janus-Pro's: it lacks one of {START}, {PAD}, {IMAGE}.")

    def encode(self, prompts, device="cpu"):
        """Return the ids [P,L] of P prompts, and a mask [P,L] that is True at a prompt's tokens. Prompts are
        padded on the left to the longest of these."""
        # The user asks, and the assistant answers with an image. The special tokens are added here, because
        # not every tokenizer.json adds the first one.
        texts = [f"<|User|>: {prompt.strip()}\n\n<|Assistant|>:" for prompt in prompts]
        rows = [[self.start, *self.tokenizer.encode(text, add_special_tokens=False).ids, self.image]
                for text in texts]
        L = max(map(len, rows))
        ids = torch.tensor([[self.pad] * (L - len(row)) + row for row in rows], device=device)
        length = torch.tensor([len(row) for row in rows], device=device)
        return ids, torch.arange(L, device=device) >= L - length[:, None]


# ---- the pipeline ------------------------------------------------------------------------------------------
class Pipeline(llamagen.Pipeline):
    """LlamaGen's pipeline with Janus for policy, tokenizer and prompts, which are all in one folder."""

    model_files = text_files = ("gpt_ckpt",)

    @staticmethod
    def text_encoder(o, found, device, prompts):
        return Prompts(found[o.gpt_ckpt])

    @staticmethod
    def load_models(o, found, known):
        return load(found[o.gpt_ckpt], **known)

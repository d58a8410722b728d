"""The second policy, Janus-Pro: a language model that has learned to write images as well (arXiv 2501.17811).

    prompt ids [P,L] -> words [P,L,D]  |  image tokens 0 .. T-2 -> 8 numbers each -> two-layer MLP [B,T-1,D]
    a Llama: n_layer x (RMSNorm, causal attention with 1-D RoPE, RMSNorm, SwiGLU) -> two-layer MLP [B,T,V]

    python train.py configs/janus_js.py                                     the paper's second experiment
    python sample.py --world=janus --gpt_ckpt=Janus-Pro-1B --prompt="a red fox in the snow"

LlamaGen is a Llama as well, so Janus *is* model.py's GPT: blocks, guidance, cache, sampler and teacher
forcing are written once, and train.py cannot tell the two apart. Only `_read` differs, what image tokens get
of their caption. LlamaGen's is one token a layer; here it is the keys and values of all L prompt tokens,
which are computed once a prompt as well and shared by its G images. What is particular:
 1. The prompt is a turn of a chat that ends with the token begin-of-image, and the state *there* predicts
    image token 0. (A public trainer pairs token t with the state that has read token t: off by one, and the
    answer is in sight. tests/test_janus.py looks whether it is in ours.)
 2. The unconditional branch of CFG is the same prompt with the pad token in every place between the first and
    the last. So it still tells how long the caption is. The id of that token is 100002 in the 1B model and
    100015 in the 7B model, which is why it is read from tokenizer.json. These pads are attended to. Those on
    the left, which make prompts of a batch equally long, are not.
 3. RoPE compares positions by their difference only, so we count from the image: the prompt has -L .. -1,
    image tokens 0 and up. Then padding moves nothing.
 4. Hugging Face's Llama turns number j of a head together with number j + hd/2, model.py turns neighbours.
    Scores are sums over all pairs, so the order of the rows of the query and key matrices is free: `load`
    makes pairs neighbours, and `rotate` is shared too.
 5. Its own sampler guides at 5, and so does the rollout. The paper's code then scores the samples by the
    conditional branch alone: another distribution than the one that sampled. Ours is the guided one in both,
    unless --score_cfg=1 asks for the paper's; max_ratio_error in the log then shows how far apart they are.

The understanding half of the model (SigLIP, its aligner, the word logits) has no part in this and is not
loaded. Sources: github.com/deepseek-ai/Janus (generation_inference.py, janus/models), and transformers' port,
which the tests hold every logit against. For 7B on one card, or 1B on one of 24 GB: lora.py.
"""
import os
import re
from dataclasses import dataclass

import torch
import torch.nn as nn

from full import llamagen
import model
from full.prompts import need
from full import weights
from common.config import UserError
from model import GPT, Block, RMSNorm
from vqgan import VQConfig


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
    pad_id: int = 100002                 # point 2
    model_type: str = "janus"
    # What model.py asks for besides; no fields, as a Llama has no dropout.
    token_dropout_p = resid_dropout_p = ffn_dropout_p = 0.0


class Attention(model.Attention):
    def read(self, x, table, bias):
        """Prompt rows x [P,L,D] -> their output [P,L,D], and (k, v) [P,heads,L,hd] for the image tokens."""
        q, k, v = self.qkv(x, table)
        return self.attend(q, k, v, bias), (k, v)


class Janus(GPT):
    """Janus-Pro without its understanding half; what is not here is in GPT. For `cond` it takes the prompts'
    ids [P,L], padded on the left, as `Prompts.encode` makes them."""

    def __init__(self, config):
        nn.Module.__init__(self)                                           # of GPT's parts only some are ours
        self.config = c = config
        self.side = int(c.block_size ** .5)
        if self.side ** 2 != c.block_size or c.dim % (2 * c.n_head) or c.pad_id >= c.words:
            raise ValueError(f"block_size must be a square, dim a multiple of 2 * n_head, pad_id a word: {c}")
        self.words = nn.Embedding(c.words, c.dim)
        self.tok_embeddings = nn.Sequential(nn.Embedding(c.vocab_size, c.code_dim),
                                            nn.Linear(c.code_dim, c.dim), nn.GELU(), nn.Linear(c.dim, c.dim))
        self.layers = nn.ModuleList(Block(c, Attention) for _ in range(c.n_layer))
        self.norm = RMSNorm(c.dim, c.norm_eps)
        self.output = nn.Sequential(nn.Linear(c.dim, c.head_dim), nn.GELU(),
                                    nn.Linear(c.head_dim, c.vocab_size))
        self.recompute = False

    @classmethod
    def from_pretrained(cls, path, **overrides):
        """The policy in a folder of released files, in eval mode; arguments and errors as `load`."""
        return load(path, **overrides)[0]

    def _check(self, cond, *args):
        if cond.dim() != 2 or cond.is_floating_point():
            raise ValueError(f"cond must be prompt ids [P,L], not {cond.dtype} {tuple(cond.shape)}")
        super()._check(cond, *args)

    def _table(self, x, start=0, stop=None):
        """The rotations of positions start .. stop-1 (or of all image tokens), [S,hd/2], on x's device and in
        its precision, but never below fp32."""
        c, hd = self.config, self.config.dim // self.config.n_head
        # angle = position * base^(-2j / hd),  j = 0 .. hd/2 - 1
        freq = c.rope_base ** (-torch.arange(0, hd, 2).double() / hd)
        angle = torch.outer(torch.arange(start, c.block_size if stop is None else stop).double(), freq)
        dtype = torch.promote_types(x.dtype, torch.complex64)
        return torch.polar(torch.ones_like(angle), angle).to(x.device, dtype)

    def _read(self, cond, cond_mask, prompt, cfg_scale):
        """As GPT's -> (hidden state [R,1,D] at begin-of-image, which predicts token 0; a list of the keys and
        values of the prompt in each layer, (k, v) [R,heads,L,hd]; 0 or, in the padding, -inf [R,1,1,L])."""
        P, L = cond.shape
        visible = torch.ones_like(cond).bool() if cond_mask is None else cond_mask.bool()         # [P,L]
        row = torch.arange(P, device=cond.device) if prompt is None else prompt                   # [B]
        if cfg_scale > 1:                                                  # point 2
            ends = visible & (visible.cumsum(1) == 1)                      # the first, begin-of-sentence
            ends[:, -1] = True                                             # and begin-of-image
            cond = torch.cat([cond, torch.where(ends, cond, self.config.pad_id)])
            visible, row = visible.repeat(2, 1), torch.cat([row, row + P])
        x = self.words(cond)                                               # [P or 2P,L,D]
        table = self._table(x, -L, 0)                                      # point 3
        own = torch.eye(L, dtype=torch.bool, device=x.device)              # no row may be empty

        def bias(sees):
            zero = torch.zeros(sees.shape, device=x.device, dtype=table.real.dtype)
            return zero.masked_fill(~sees, -torch.inf)
        sees, prompts = bias((visible[:, None] | own).tril())[:, None], []                   # [..,1,L,L]
        for layer in self.layers:
            x, keys_values = self._run(layer.read, x, table, sees)
            prompts.append([part[row] for part in keys_values])
        return x[row, -1:], prompts, bias(visible)[row][:, None, None]


weights.MODELS[JanusConfig] = Janus                         # so that weights.py can build one


# ---- released files ------------------------------------------------------------------------------------
UNUSED = re.compile(r"(model\.)?(vision_model|aligner)\.|(.*\.)?lm_head\.|.*rotary_emb\.inv_freq$|"
                    r".*codebook_used$")
VQ = "gen_vision_model."
NAMES = [  # (theirs, ours), one after the other; first what the -HF layout says otherwise
    (r"^model\.", ""), (r"^generation_embeddings", "gen_embed"), (r"^vqmodel", "gen_vision_model"),
    (r"^generation_aligner\.fc1", "gen_aligner.layers.0"),
    (r"^generation_aligner\.hidden_layers\.0", "gen_aligner.layers.2"),
    (r"^generation_head\.proj_out", "gen_head.output_mlp_projector"), (r"^generation_head", "gen_head"),
    (r"^(gen_vision_model\.(?:en|de)coder)\.(?:down|up)\.", r"\1.conv_blocks."),
    (r"^(gen_vision_model\..*\.)block\.", r"\1res."), (r"\.mid\.block_1\.", ".mid.0."),
    (r"\.mid\.attn_1\.", ".mid.1."), (r"\.mid\.block_2\.", ".mid.2."),
    # then from the official layout to our modules
    (r"^language_model\.(model\.)?", ""), (r"^embed_tokens", "words"), (r"^gen_embed", "tok_embeddings.0"),
    (r"^gen_aligner\.layers\.0", "tok_embeddings.1"), (r"^gen_aligner\.layers\.2", "tok_embeddings.3"),
    (r"^gen_head\.output_mlp_projector", "output.0"), (r"^gen_head\.vision_head", "output.2"),
    *((re.escape(theirs), ours) for theirs, ours in weights.PORT_LAYERS.items())]


def _state(path, n_head):
    """(tensors by our names, those of the tokenizer by LlamaGen's) of released files in either layout."""
    (state, dropped), ours = weights.gather(path), {}
    weights.refuse_others(path, state, UNUSED)
    state = weights.sift(path, state, dropped, UNUSED)
    for key in list(state):
        name = key
        for theirs, new in NAMES:
            name = re.sub(theirs, new, name)
        ours[name] = state.pop(key)
    for key in [k for k in ours if k.endswith("self_attn.q_proj.weight")]:
        qkv = [key.replace("q_proj", f"{part}_proj") for part in "qkv"]
        if all(k in ours for k in qkv):                    # else weights.build says which one is missing
            q, k, v = (ours.pop(name) for name in qkv)
            # Row (half, j) of a head becomes row (j, half): point 4.
            q, k = (w.view(n_head, 2, -1, w.shape[1]).transpose(1, 2).reshape(w.shape) for w in (q, k))
            ours[key.replace("self_attn.q_proj", "attention.wqkv")] = torch.cat([q, k, v])
    return ours, {key.removeprefix(VQ): ours.pop(key) for key in list(ours) if key.startswith(VQ)}


def _shapes(state):
    (V, code_dim), (words, D) = (state[k + ".weight"].shape for k in ("tok_embeddings.0", "words"))
    return dict(vocab_size=V, code_dim=code_dim, words=words, head_dim=len(state["output.0.weight"]),
                **weights.layer_shapes(state, D))


def load(path, dtype=torch.float32, **overrides):
    """A folder of released files -> (Janus, VQGAN) on the CPU, in eval mode, parameters in `dtype`.

    path: deepseek-ai/Janus-Pro-1B or -7B as downloaded, or a port to transformers' layout: safetensors or
    pytorch_model.bin, in one file or several, config.json, tokenizer.json. overrides: fields of JanusConfig,
    whatever the files tell. UserError for files that are missing, damaged or of another model."""
    # What config.json leaves out is a default of transformers' Llama; the official one tells no block_size.
    _, told = weights.config_beside(path)
    llama = told.get("language_config") or told.get("text_config") or {}
    theta = (llama.get("rope_parameters") or llama).get("rope_theta", 10000.0)
    told = dict(block_size=(told.get("vq_config") or {}).get("num_patches", 24) ** 2,
                n_head=llama.get("num_attention_heads", 32), norm_eps=llama.get("rms_norm_eps", 1e-6),
                rope_base=theta, pad_id=Prompts(path).pad)
    try:
        parts = _state(path, overrides.get("n_head", told["n_head"]))
    except RuntimeError as error:                          # of `view`
        raise UserError(f"{path}: {error}: n_head?") from None
    state, cfg = weights.examine(JanusConfig, _shapes, path, overrides, lambda _: (parts[0], told))
    vq_state, vq = weights.examine(VQConfig, weights.vq_shapes, path, {}, lambda _: (parts[1], {}))
    return (weights.build(JanusConfig(**cfg), state, dtype, path),
            weights.build(VQConfig(**vq), vq_state, torch.float32, path))


# ---- prompts -------------------------------------------------------------------------------------------
START, PAD, IMAGE = "<｜begin▁of▁sentence｜>", "<｜▁pad▁｜>", "<begin_of_image>"


class Prompts:
    """Captions to prompt ids, by the tokenizer.json in a folder. UserError if it, or one of the three special
    tokens, or the package `tokenizers` is missing."""

    def __init__(self, folder):
        path = os.path.join(folder, "tokenizer.json")
        tokenizers = need("tokenizers")
        if not os.path.isfile(path):
            raise UserError(f"no file {path}: it comes with the weights")
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(path)
        except Exception as error:                         # tokenizers raises nothing more special
            raise UserError(f"{path} is no tokenizer ({str(error)[:80]}): fetch it again") from None
        self.start, self.pad, self.image = map(self.tokenizer.token_to_id, (START, PAD, IMAGE))
        if None in (self.start, self.pad, self.image):
            raise UserError(f"{path} is not Janus-Pro's: it lacks one of {START}, {PAD}, {IMAGE}")

    def prepare(self, captions):
        """Nothing: there are no features to compute beforehand, as t5.py has to."""

    def encode(self, captions, device="cpu"):
        """P captions -> ids [P,L] and mask [P,L], True at the prompt's tokens, padded on the left to the
        longest of these."""
        # One turn of the user, and the assistant answers with an image. The special tokens are put there by
        # hand: whether tokenizer.json adds the first one depends on who wrote it.
        texts = [f"<|User|>: {caption.strip()}\n\n<|Assistant|>:" for caption in captions]
        rows = [[self.start, *self.tokenizer.encode(text, add_special_tokens=False).ids, self.image]
                for text in texts]
        L = max(map(len, rows))
        ids = torch.tensor([[self.pad] * (L - len(row)) + row for row in rows], device=device)
        length = torch.tensor([len(row) for row in rows], device=device)
        return ids, torch.arange(L, device=device) >= L - length[:, None]


# ---- the world -----------------------------------------------------------------------------------------
class World(llamagen.World):
    """llamagen.py's world, its captions and its rewards, with Janus for policy and tokenizer."""

    @staticmethod
    def model_files(o):
        return [o.gpt_ckpt]                                # the tokenizer and the text are in there as well

    text_files = model_files

    @staticmethod
    def load_models(o, files, device):
        known = {k: v for k, v in (("n_head", o.n_head), ("block_size", o.block_size)) if v}
        policy, vqgan = load(files[o.gpt_ckpt], **known)
        return policy.to(device), vqgan.to(device)

    @staticmethod
    def captions_of(o, files, device):
        return Prompts(files[o.gpt_ckpt])

    def encode(self, captions):
        return self.text.encode(captions, self.device)

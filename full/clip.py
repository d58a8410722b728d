"""The rewards of the full-size run: four published judges of pictures, all of them built on CLIP.

  hps        HPSv2.1, arXiv 2306.09341: cosine of picture and caption under a CLIP ViT-H/14 tuned on what
             people preferred. On its own benchmark SD 1.4 gets .2535 on average, SDXL .3063.
  pickscore  PickScore v1, arXiv 2305.01569: the same with other people, as exp(logit_scale) * cosine.
  clipscore  any CLIP, arXiv 2104.08718: 100 max(cosine, 0). Does the picture show what the caption says?
  aesthetic  LAION's aesthetic predictor v2: a head on CLIP ViT-L/14's image vector. It sees no caption.

CLIP, arXiv 2103.00020, is two transformers into one space: a picture's vector is read at a class token, a
caption's at its end-of-text token, and both are scaled to length 1. transformers has it; what is left is what
moves a score without any error: how a picture becomes 224 x 224, and which weight goes where.

    score = clip.build("hps", {"model": "HPS_v2.1_compressed.pt", "tokenizer": "CLIP-ViT-H-14"})
    score(images, captions)            # images [B,3,H,W] in about [-1,1], B captions -> [B]

Departures from the official code:
 1. Pictures come from a decoder as floats. They are clamped, but not rounded to 8 bits.
 2. Captions are not repaired by ftfy and html.unescape, as in open_clip. Plain text is the same.
 3. HPS does not pad a picture whose longest side is 224 already; here it is padded too.
 4. HPS runs under autocast. Here the towers run in `dtype`; unit vectors, cosines and the head are fp32.
 5. CLIPScore's paper has 2.5 for our 100, and prepends "A photo depicts" to the caption.
"""
import contextlib
import math
import os

import torch
import torch.nn.functional as F

from common import files as checkpoint
from common.config import UserError

CLIP_L = "clip-vit-large-patch14"
FILES = {                    # of each reward; HPS and PickScore share the tokenizer of OpenAI's CLIP
    "hps": {"model": "HPS_v2.1_compressed.pt", "tokenizer": CLIP_L},
    "pickscore": {"model": "PickScore_v1", "tokenizer": CLIP_L},
    "clipscore": {"model": CLIP_L, "tokenizer": CLIP_L},
    "aesthetic": {"model": CLIP_L, "tokenizer": CLIP_L, "head": "sac+logos+ava1-l14-linearMSE.pth"}}
NAMES = ("hps", "pickscore", "clipscore", "aesthetic")
MEAN = torch.tensor([.48145466, .4578275, .40821073])[:, None, None]       # of CLIP's own training pictures
STD = torch.tensor([.26862954, .26130258, .27577711])[:, None, None]


def pad_square(images, size, antialias=True):
    """HPS: [B,3,H,W] in [0,1] -> [B,3,size,size], the whole picture in the middle of black (zeros).

    An odd line of padding goes right or below. antialias: True is the official ResizeMaxSize with torchvision
    >= 0.17: Pillow's cubic (a = -.5), wide enough to cover all pixels that become one. With older versions it
    was False: 4 x 4 pixels decide (a = -.75). As there, the cubic may overshoot [0,1] a little.
    """
    h, w = (round(side * (size / max(images.shape[2:]))) for side in images.shape[2:])
    images = F.interpolate(images, (h, w), mode="bicubic", antialias=antialias)
    top, left = (size - h) // 2, (size - w) // 2
    return F.pad(images, (left, size - w - left, top, size - h - top))


def crop_square(images, size, antialias=True):
    """The other three: [B,3,H,W] in [0,1] -> [B,3,size,size] in [0,1], the middle at shortest side `size`.
    Clamped, because CLIP's own code resizes 8-bit pictures, which cannot overshoot."""
    h, w = (size * side // min(images.shape[2:]) for side in images.shape[2:])
    images = F.interpolate(images, (h, w), mode="bicubic", antialias=antialias)
    top, left = (h - size) // 2, (w - size) // 2
    return images[:, :, top:top + size, left:left + size].clamp(0, 1)


HEADS = {1280: 16}            # of a vision tower, by its width: ViT-H has heads of 80, its text tower of 64
STARTS = (                    # open_clip's start of a name, and CLIPModel's (pre_layrnorm is its spelling)
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.conv1.", "vision_model.embeddings.patch_embedding."),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("visual.ln_pre.", "vision_model.pre_layrnorm."), ("visual.ln_post.", "vision_model.post_layernorm."),
    ("visual.transformer.resblocks.", "vision_model.encoder.layers."),
    ("visual.proj", "visual_projection.weight"), ("text_projection", "text_projection.weight"),
    ("token_embedding.", "text_model.embeddings.token_embedding."),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("transformer.resblocks.", "text_model.encoder.layers."), ("ln_final.", "text_model.final_layer_norm."))
INSIDE = ((".ln_1.", ".layer_norm1."), (".ln_2.", ".layer_norm2."), (".mlp.c_fc.", ".mlp.fc1."),
          (".mlp.c_proj.", ".mlp.fc2."), (".attn.out_proj.", ".self_attn.out_proj."))


def from_open_clip(state):
    """{name: tensor} in open_clip's layout -> the same in CLIPModel's. Names of neither stay as they are."""
    out = {}
    for key, value in state.items():
        start, name = next(((a, b) for a, b in STARTS if key.startswith(a)), ("", ""))
        name += key[len(start):]
        for a, b in INSIDE:
            name = name.replace(a, b)
        if ".attn.in_proj_" in name:                       # query, key and value below one another
            for part, third in zip("qkv", value.chunk(3)):
                out[name.replace(".attn.in_proj_", f".self_attn.{part}_proj.")] = third
        else:                                              # x @ proj there, Linear's x @ weight.T here
            out[name] = value.T if key in ("visual.proj", "text_projection") else value
    return out


def open_clip_config(state, heads=None):
    """The CLIPConfig of weights in open_clip's layout: every size from the shapes of the tensors, but `heads`
    of the vision tower, which no shape tells. Without it HEADS must know the width, else ValueError."""
    from transformers import CLIPConfig
    width, _, patch, _ = state["visual.conv1.weight"].shape
    vocab, words = state["token_embedding.weight"].shape
    heads = heads or HEADS.get(width)
    if heads is None or words % 64:
        raise ValueError(f"unknown number of heads in towers of width {width} and {words}; "
                         f"ViT-H/14's are 1280 and 1024 wide")

    def tower(blocks, width, heads, **sizes):
        return dict(sizes, hidden_size=width, num_attention_heads=heads, hidden_act="gelu",
                    num_hidden_layers=sum(k.startswith(blocks) and k.endswith(".ln_1.weight") for k in state),
                    intermediate_size=len(state[blocks + "0.mlp.c_fc.weight"]))
    side = math.isqrt(len(state["visual.positional_embedding"]) - 1)       # in patches; 1 is the class token
    vision = tower("visual.transformer.resblocks.", width, heads, patch_size=patch, image_size=side * patch)
    text = tower("transformer.resblocks.", words, words // 64, vocab_size=vocab, bos_token_id=vocab - 2,
                 eos_token_id=vocab - 1, max_position_embeddings=len(state["positional_embedding"]))
    return CLIPConfig(vision_config=vision, text_config=text, projection_dim=state["visual.proj"].shape[1])


@contextlib.contextmanager
def _blame(what):
    """Whatever goes wrong inside is said in one line: torch, json, safetensors each raise their own kinds."""
    try:
        yield
    except UserError:
        raise
    except ModuleNotFoundError as error:
        raise UserError(f"a package is missing: pip install -r requirements-full.txt ({error})") from None
    except Exception as error:
        raise UserError(f"{what} ({type(error).__name__}: {' '.join(str(error).split())[:200]})") from None


def _fits(clip_config, size):
    """ValueError if a CLIPModel needs more than the `size` bytes on the disk: transformers would make up the
    rest, and a config can ask for any amount of memory."""
    from transformers import CLIPModel
    layers = max(tower.num_hidden_layers for tower in (clip_config.vision_config, clip_config.text_config))
    with torch.device("meta"):
        if layers > 1000 or 2 * sum(p.numel() for p in CLIPModel(clip_config).parameters()) > size:
            raise ValueError(f"its config asks for more than its {size:,} bytes hold")


def load_clip(path, heads=None):
    """The CLIPModel in a folder of the Hugging Face hub, or in a .pt file like HPS_v2.1_compressed.pt.
    UserError if it is missing or damaged, or if names or shapes of weights do not fit."""
    with _blame(f"{path} is neither a folder of a CLIPModel nor a file in open_clip's layout"):
        import safetensors
        import transformers
        transformers.logging.set_verbosity_error()         # it would print a page where we raise one line
        source, options, files = path, {}, [path]
        if os.path.isdir(path):
            files = [os.path.join(path, name) for name in os.listdir(path)]
            options = {"config": transformers.CLIPConfig.from_pretrained(path, local_files_only=True)}
            for file in files:
                if file.endswith(".bin"):
                    checkpoint.verify(file)
                if file.endswith(".safetensors"):          # integers would become floats without a word
                    with safetensors.safe_open(file, "pt") as opened:
                        kinds = {key: opened.get_slice(key).get_dtype() for key in opened.keys()}
                    if wrong := [k for k in kinds if "F" not in kinds[k] and not k.endswith("position_ids")]:
                        raise UserError(f"{file}: {wrong[0]!r:.99} is {kinds[wrong[0]]}, no floats")
        else:
            source, state = None, checkpoint.load(path)["state_dict"]
            if strange := [k for k, v in state.items() if not k.isprintable() or not v.is_floating_point()]:
                raise UserError(f"{path}: {strange[0]!r:.99} is {state[strange[0]].dtype}, no floats")
            options = {"config": open_clip_config(state, heads), "state_dict": from_open_clip(state)}
        size = sum(map(os.path.getsize, files))
        _fits(options["config"], size)
        model, info = transformers.CLIPModel.from_pretrained(
            source, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    # transformers only warns of what does not fit and leaves it random, which would be a reward of noise.
    wrong = [f"{kind} {key}" for kind in ("missing", "mismatched", "unexpected")
             for key in sorted(map(str, info[f"{kind}_keys"])) if not key.endswith("position_ids")]
    if wrong:
        raise UserError(f"{path}: {len(wrong)} weights do not fit, such as: {'; '.join(wrong[:3])}")
    checkpoint.examine(model.state_dict(), path, size)
    return model


def load_head(path, width):
    """The aesthetic head -> weight [1,width] and bias [1]. Raises UserError.
    Its five layers have no nonlinearity between them, so that together they are one affine function."""
    with _blame(f"{path} is no aesthetic head for image vectors of {width} numbers"):
        state, weight, bias = checkpoint.load(path), torch.ones(1, 1), torch.zeros(1)
        for i in (7, 6, 4, 2, 0):                          # 1, 3 and 5 were dropout
            w, b = state[f"layers.{i}.weight"], state[f"layers.{i}.bias"]
            if not (w.is_floating_point() and b.is_floating_point()):
                raise ValueError(f"layers.{i} is {w.dtype}, {b.dtype}, not of floating point numbers")
            weight, bias = weight @ w.float(), weight @ b.float() + bias     # weight (w x + b) + bias
        if weight.shape != (1, width) or bias.shape != (1,):
            raise ValueError(f"it maps {tuple(weight.shape)[1:]} numbers")
        return weight, bias                                # from the end, as this is one row all the time


class Reward:
    """Callable: (images [B,3,H,W] in about [-1,1], B captions) -> scores [B], fp32 on `device`."""

    def __init__(self, name, files, device, dtype, antialias, batch):
        model = load_clip(files["model"])
        self.scale = model.logit_scale.float().exp().item()        # before the cast: bf16 would make 100 99
        self.model = model.to(device, dtype).eval().requires_grad_(False)
        self.name, self.device, self.dtype, self.antialias, self.batch = name, device, dtype, antialias, batch
        if name == "aesthetic":
            self.head = [v.to(device) for v in load_head(files["head"], model.config.projection_dim)]
            return
        with _blame(f"{files['tokenizer']} is no folder of a tokenizer"):
            from transformers import AutoTokenizer
            self.tokenizer = AutoTokenizer.from_pretrained(files["tokenizer"], local_files_only=True)
        # CLIPModel reads a caption at its first end of text. Where an old config wrongly says that this is
        # token 2, it takes the largest instead, as the end of text is the last of the vocabulary.
        text = model.config.text_config
        end = text.vocab_size - 1 if text.eos_token_id == 2 else text.eos_token_id
        if self._ids(["a photo"])[0, -1] != end:
            raise UserError(f"{files['tokenizer']} does not end captions with token {end}, as it must")

    def _ids(self, captions):
        """B captions -> token ids [B,L], L <= 77, the context; shorter ones repeat their end of text.
        Any token would do there, so the tokenizer's pad token does not matter: attention is causal, and the
        first end of text, which is read, sees only what is before it."""
        limit = self.model.config.text_config.max_position_embeddings
        rows = self.tokenizer(captions, truncation=True, max_length=limit).input_ids
        return torch.tensor([row + row[-1:] * (max(map(len, rows)) - len(row)) for row in rows])

    def _unit(self, features):                             # [B,d], from transformers 5 on inside an object
        return F.normalize(getattr(features, "pooler_output", features).float(), dim=1)

    @torch.no_grad()
    def embed_images(self, images):
        """images [B,3,H,W] in about [-1,1] -> unit vectors [B,d], fp32; diversity is measured on them too."""
        square, out = pad_square if self.name == "hps" else crop_square, []
        for part in images.split(self.batch):
            x = (part.to(self.device).float().clamp(-1, 1) + 1) / 2
            x = square(x, self.model.config.vision_config.image_size, self.antialias)
            pixels = (x - MEAN.to(self.device)) / STD.to(self.device)  # last: the padding is black, not grey
            out.append(self._unit(self.model.get_image_features(pixel_values=pixels.to(self.dtype))))
        return torch.cat(out)

    @torch.no_grad()
    def embed_captions(self, captions):
        """B captions -> unit vectors [B,d], fp32."""
        ids = [self._ids(captions[i:i + self.batch]) for i in range(0, len(captions), self.batch)]
        return torch.cat([self._unit(self.model.get_text_features(input_ids=x.to(self.device))) for x in ids])

    @torch.no_grad()
    def __call__(self, images, captions):
        if len(images) != len(captions):
            raise ValueError(f"{len(images)} images, but {len(captions)} captions")
        vectors = self.embed_images(images)
        if self.name == "aesthetic":
            return F.linear(vectors, *self.head)[:, 0]
        # The G images of a group share their caption: each one is encoded once.
        place = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
        cosine = (vectors * self.embed_captions(list(place))[[place[c] for c in captions]]).sum(1)
        if self.name == "pickscore":                       # Flow-GRPO divides this by 26, GCPO by 100
            return self.scale * cosine
        return 100 * cosine.clamp(min=0) if self.name == "clipscore" else cosine


def build(name, files, device="cpu", dtype=torch.float32, antialias=True, batch=64):
    """The reward called `name`, frozen, from local files: {"model": ..., "tokenizer": ...} (see `load_clip`).
    The tokenizer is a folder; aesthetic wants "head" instead, a .pth file. dtype: of the towers' weights.
    antialias: see `pad_square`. batch: pictures or captions at a time. Raises UserError for bad files."""
    if name not in NAMES:
        raise UserError(f"unknown reward {name!r}; there are: {', '.join(NAMES)}")
    for part in ("model", "head" if name == "aesthetic" else "tokenizer"):
        if not files.get(part):
            raise UserError(f"reward {name!r} wants the path of a {part}")
    return Reward(name, files, device, dtype, antialias, batch)

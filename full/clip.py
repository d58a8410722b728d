"""The rewards of the full-size world: four published models that judge images, all of them built on CLIP.

  hps        HPSv2.1, arXiv 2306.09341: cosine of image and prompt under a CLIP ViT-H/14 that was tuned on
             people's preferences. On its own benchmark SD 1.4 gets .2535 on average, and SDXL .3063.
  pickscore  PickScore v1, arXiv 2305.01569: the same with other preferences, as exp(logit_scale) * cosine.
  clipscore  any CLIP, arXiv 2104.08718: 100 max(cosine, 0). Does the image show what the prompt says?
  aesthetic  LAION's aesthetic predictor v2: a head on CLIP ViT-L/14's image vector. It sees no prompt.

CLIP (arXiv 2103.00020) has two transformers, its towers, which map images and texts into one space. An image
vector is read at a class token, a text vector at an end-of-text token. Vectors are scaled to length 1.
The package transformers implements CLIP. This file adds what can change a reward without raising an error:
how an image becomes 224 x 224 pixels, and which weight of a file belongs where.

    reward = clip.Reward("hps", {"model": "HPS_v2.1_compressed.pt", "tokenizer": "clip-vit-large-patch14"})
    reward(images, prompts)            # images [B,3,H,W] in about [-1,1], B prompts -> rewards [B]

Departures from the official code:
 1. Images come from a decoder as floats. They are clamped, but not rounded to 8 bits.
 2. Prompts are not repaired by ftfy and html.unescape, as in open_clip. For plain text nothing changes.
 3. HPS does not pad an image whose longest side is already 224 pixels. Here it is padded too.
 4. HPS runs under autocast. Here the towers run in `dtype`. Unit vectors, cosines and the head are in fp32.
 5. CLIPScore's paper uses the factor 2.5 instead of 100, and prepends "A photo depicts" to the text.
"""
import glob
import math
import os

import torch
import torch.nn.functional as F

from common import files
from common.config import UserError
from common.device import batched

CLIP = "clip-vit-large-patch14"     # OpenAI's; HPS and PickScore use its tokenizer
FILES = {                           # names in full/weights.py of the files that each reward needs
    "hps": {"model": "HPS_v2.1_compressed.pt", "tokenizer": CLIP},
    "pickscore": {"model": "PickScore_v1", "tokenizer": CLIP},
    "clipscore": {"model": CLIP, "tokenizer": CLIP},
    "aesthetic": {"model": CLIP, "head": "sac+logos+ava1-l14-linearMSE.pth"}}
MEAN = torch.tensor([.48145466, .4578275, .40821073])[:, None, None]       # of CLIP's own training images
STD = torch.tensor([.26862954, .26130258, .27577711])[:, None, None]


def pad_square(images, size):
    """Fit whole images into a black square, as HPS does: [B,3,H,W] in [0,1] -> [B,3,size,size].
    An odd line of padding goes right or below. This is the official ResizeMaxSize with torchvision >= 0.17:
    Pillow's cubic (a = -.5), wide enough for all pixels that become one. It may leave [0,1] a little."""
    h, w = (round(side * (size / max(images.shape[2:]))) for side in images.shape[2:])
    images = F.interpolate(images, (h, w), mode="bicubic", antialias=True)
    top, left = (size - h) // 2, (size - w) // 2
    return F.pad(images, (left, size - w - left, top, size - h - top))


def crop_square(images, size):
    """Scale the shortest side to `size` and crop the middle, for the other three rewards: [B,3,H,W] in [0,1]
    -> [B,3,size,size] in [0,1]. Clamped, because CLIP's code resizes 8-bit images, which stay in range."""
    h, w = (size * side // min(images.shape[2:]) for side in images.shape[2:])
    images = F.interpolate(images, (h, w), mode="bicubic", antialias=True)
    top, left = (h - size) // 2, (w - size) // 2
    return images[:, :, top:top + size, left:left + size].clamp(0, 1)


NAMES = (                     # open_clip's and CLIPModel's (which does spell pre_layrnorm), in this order
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.conv1.", "vision_model.embeddings.patch_embedding."),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("visual.ln_pre.", "vision_model.pre_layrnorm."), ("visual.ln_post.", "vision_model.post_layernorm."),
    ("visual.transformer.resblocks.", "vision_model.encoder.layers."),
    ("visual.proj", "visual_projection.weight"), ("text_projection", "text_projection.weight"),
    ("token_embedding.", "text_model.embeddings.token_embedding."),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("transformer.resblocks.", "text_model.encoder.layers."), ("ln_final.", "text_model.final_layer_norm."),
    (".ln_1.", ".layer_norm1."), (".ln_2.", ".layer_norm2."), (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."), (".attn.out_proj.", ".self_attn.out_proj."))
HEADS = {1280: 16}            # heads of an image tower, by width: ViT-H has heads of 80, its text tower of 64


def from_open_clip(state):
    """Rename {name: tensor} from the layout of open_clip to that of CLIPModel. Unknown names stay."""
    out = {}
    for key, value in state.items():
        name = key
        for theirs, ours in NAMES:
            name = name.replace(theirs, ours)
        if ".attn.in_proj_" in name:                       # stacked rows of query, key and value
            for part, third in zip("qkv", value.chunk(3)):
                out[name.replace(".attn.in_proj_", f".self_attn.{part}_proj.")] = third
        else:                                              # open_clip has x @ proj, a Linear x @ weight.T
            out[name] = value.T if key in ("visual.proj", "text_projection") else value
    return out


def open_clip_config(state):
    """Return the CLIPConfig of weights in open_clip's layout. Shapes tell all but the number of heads of the
    image tower. Raises ValueError if HEADS lacks its width."""
    from transformers import CLIPConfig
    width, _, patch, _ = state["visual.conv1.weight"].shape
    vocab, words = state["token_embedding.weight"].shape
    if width not in HEADS or words % 64:
        raise ValueError(f"unknown number of heads at widths {width} and {words}; ViT-H/14 has 1280 and 1024")

    def tower(blocks, width, heads, **sizes):
        return dict(sizes, hidden_size=width, num_attention_heads=heads, hidden_act="gelu",
                    num_hidden_layers=sum(k.startswith(blocks) and k.endswith(".ln_1.weight") for k in state),
                    intermediate_size=len(state[blocks + "0.mlp.c_fc.weight"]))
    side = math.isqrt(len(state["visual.positional_embedding"]) - 1)       # in patches; 1 is the class token
    vision = tower("visual.transformer.resblocks.", width, HEADS[width], patch_size=patch,
                   image_size=side * patch)
    text = tower("transformer.resblocks.", words, words // 64, vocab_size=vocab, bos_token_id=vocab - 2,
                 eos_token_id=vocab - 1, max_position_embeddings=len(state["positional_embedding"]))
    return CLIPConfig(vision_config=vision, text_config=text, projection_dim=state["visual.proj"].shape[1])


def load_clip(path):
    """Load the CLIPModel in a folder of the Hugging Face Hub, or in a file of open_clip, as HPS is. Raises
    UserError if it is missing or damaged, or if names or shapes of weights do not fit."""
    with files.explain(f"{path} is neither a folder of a CLIPModel nor a file in open_clip's layout"):
        import safetensors
        import transformers
        transformers.logging.set_verbosity_error()         # it would print a page where we raise one line
        source, options = path, {}
        if not os.path.isdir(path):
            source, state = None, files.select(files.load(path)["state_dict"], path)
            options = {"config": open_clip_config(state), "state_dict": from_open_clip(state)}
        for file in glob.glob(f"{glob.escape(path)}/*.bin"):
            files.verify(file)
        for file in glob.glob(f"{glob.escape(path)}/*.safetensors"):
            with safetensors.safe_open(file, "pt") as opened:
                kinds = {key: opened.get_slice(key).get_dtype() for key in opened.keys()}
            # transformers converts integers to floats silently.
            if wrong := [k for k in kinds if "F" not in kinds[k] and not k.endswith("position_ids")]:
                raise UserError(f"{file}: {wrong[0]!r:.99} must hold floats, got {kinds[wrong[0]]}")
        model, info = transformers.CLIPModel.from_pretrained(
            source, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    # transformers only warns of weights that do not fit, and leaves them random. The reward would be noise.
    if wrong := [f"{kind} {key}" for kind in ("missing", "mismatched", "unexpected")
                 for key in sorted(map(str, info[f"{kind}_keys"])) if not key.endswith("position_ids")]:
        raise UserError(f"{path}: {len(wrong)} weights do not fit, such as: {'; '.join(wrong[:3])}")
    files.examine(model.state_dict(), path)
    return model


def load_head(path, width):
    """Load the aesthetic head as weight [1,width] and bias [1]. Raises UserError.
    Its five layers have no nonlinearity between them, so together they are one affine function."""
    with files.explain(f"{path} is no aesthetic head for image vectors of {width} numbers"):
        state, weight, bias = files.select(files.load(path), path), torch.ones(1, 1), torch.zeros(1)
        for i in (7, 6, 4, 2, 0):      # the last first, so `weight` stays one row; 1, 3 and 5 were dropout
            w, b = state[f"layers.{i}.weight"].float(), state[f"layers.{i}.bias"].float()
            weight, bias = weight @ w, weight @ b + bias   # weight (w x + b) + bias
        if weight.shape != (1, width) or bias.shape != (1,):
            raise ValueError(f"it maps {tuple(weight.shape)[1:]} numbers")
        return weight, bias


class Reward:
    """The frozen reward `name`: images [B,3,H,W] in about [-1,1] and B prompts -> rewards [B] in fp32.
    paths: {part: path}, with the parts of FILES[name]. The tokenizer is a folder, the head a .pth file, and
    `load_clip` describes the model. dtype: of the towers. batch: images or prompts at once. Raises UserError
    for bad files."""

    def __init__(self, name, paths, device="cpu", dtype=torch.float32, batch=64):
        model = load_clip(paths["model"])
        self.scale = model.logit_scale.float().exp().item()        # before the cast: bf16 would make 100 99
        self.model = model.to(device, dtype).eval().requires_grad_(False)
        self.name, self.device, self.dtype, self.batch = name, device, dtype, batch
        if name == "aesthetic":
            self.head = [v.to(device) for v in load_head(paths["head"], model.config.projection_dim)]
            return
        with files.explain(f"{paths['tokenizer']} is no folder of a tokenizer"):
            from transformers import AutoTokenizer
            self.tokenizer = AutoTokenizer.from_pretrained(paths["tokenizer"], local_files_only=True)
        # CLIPModel reads a text at its first end-of-text token. Old configs wrongly say that this is token 2.
        # Then CLIPModel takes the largest token instead, because end of text is the last of the vocabulary.
        text = model.config.text_config
        end = text.vocab_size - 1 if text.eos_token_id == 2 else text.eos_token_id
        if self._ids(["a photo"])[0, -1] != end:
            raise UserError(f"{paths['tokenizer']} must end texts with token {end}: use its CLIP's tokenizer")

    def _ids(self, prompts):
        """Return token ids [B,L] of B prompts, L <= 77. Shorter rows repeat their end of text, but any token
        would do: attention is causal, and CLIP reads the first end of text."""
        limit = self.model.config.text_config.max_position_embeddings
        rows = self.tokenizer(prompts, truncation=True, max_length=limit).input_ids
        return torch.tensor([row + row[-1:] * (max(map(len, rows)) - len(row)) for row in rows])

    def _unit(self, features):                             # [B,d]; since transformers 5, inside an object
        return F.normalize(getattr(features, "pooler_output", features).float(), dim=1)

    def embed_images(self, images):
        """Return unit vectors [B,d], fp32, of images [B,3,H,W] in about [-1,1]. Diversity uses them too."""
        square = pad_square if self.name == "hps" else crop_square

        def vectors(images):
            x = (images.to(self.device).float().clamp(-1, 1) + 1) / 2
            x = square(x, self.model.config.vision_config.image_size)
            pixels = (x - MEAN.to(self.device)) / STD.to(self.device)  # last, so that the padding is black
            return self._unit(self.model.get_image_features(pixel_values=pixels.to(self.dtype)))
        return batched(vectors, images, self.batch)

    def embed_prompts(self, prompts):
        """Return unit vectors [B,d], fp32, of B prompts."""
        return batched(lambda some: self._unit(self.model.get_text_features(
            input_ids=self._ids(some).to(self.device))), prompts, self.batch)

    @torch.no_grad()
    def __call__(self, images, prompts):
        if len(images) != len(prompts):
            raise ValueError(f"each image needs a prompt, got {len(images)} images, {len(prompts)} prompts")
        vectors = self.embed_images(images)
        if self.name == "aesthetic":
            return F.linear(vectors, *self.head)[:, 0]
        # The G images of a group share their prompt, so each prompt is encoded once.
        place = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        cosine = (vectors * self.embed_prompts(list(place))[[place[p] for p in prompts]]).sum(1)
        if self.name == "pickscore":                       # Flow-GRPO divides this by 26, GCPO by 100
            return self.scale * cosine
        return 100 * cosine.clamp(min=0) if self.name == "clipscore" else cosine

"""Make folders of weight files in the released layouts, with random numbers, at any size.

The tests of the full-size run use them, because the released files cannot be downloaded where tests run.

    python tests/helpers/full_size.py /tmp/weights              LlamaGen-XL and VQ-16 at full size (3.4 GB)
    python tests/helpers/full_size.py /tmp/weights --rewards    ... and the CLIPs (9.1 GB), to time the phases

All other files are small.
"""
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests", "full")]
import torch
from PIL import Image

from common import files
from full import lpips, weights
from model import GPT, GPTConfig
from vqgan import VQGAN

WORDS = "a red blue cat dog on the photo of and small green".split()


def key_table(cfg):
    """Return {name: shape} of the tensors of a GPTConfig or VQConfig, in the order of the file."""
    with torch.device("meta"):                             # names and shapes without memory
        module = (GPT if isinstance(cfg, GPTConfig) else VQGAN)(cfg)
    return {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}


def make_random(cfg, path, seed=0, dtype=torch.float32, std=0.02):
    """Write a file of a GPTConfig or VQConfig in the released layout.

    Norms are 1, biases 0, and all other numbers normal with standard deviation `std`. output.weight, which is
    0 in a fresh model, is normal as well, so logits have the standard deviation std * sqrt(D).
    """
    generator, state = torch.Generator().manual_seed(seed), {}
    for key, shape in key_table(cfg).items():
        state[key] = (torch.full(shape, float(key.endswith("weight")), dtype=dtype) if len(shape) == 1
                      else torch.empty(shape).normal_(0, std, generator=generator).to(dtype))
    weights.export(state, path, dtype)


def save_tokenizer(folder, words, start, end, unknown):
    """Save a tokenizer with one token per word. `end` follows a text, `start` (if any) precedes it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    vocabulary = {w: i for i, w in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [(w, vocabulary[w]) for w in (start, end) if w]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start or ''} $A {end}".strip(), special_tokens=special)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=words[0], eos_token=end, unk_token=unknown,
                            bos_token=start).save_pretrained(folder)


def save_t5(folder, d_model):
    import transformers
    words = ["<pad>", "</s>", "<unk>", *WORDS]
    transformers.T5EncoderModel(transformers.T5Config(
        vocab_size=len(words), d_model=d_model, d_kv=8, d_ff=64, num_layers=1, num_heads=4,
        feed_forward_proj="gated-gelu")).save_pretrained(folder)
    save_tokenizer(folder, words, None, "</s>", "<unk>")


# The image tower and the text tower, each (width, heads, layers, width of the MLP). Then the side of an image
# in pixels and the width of the projection.
FULL = {"hps": ((1280, 16, 32, 5120), (1024, 16, 24, 4096), 224, 1024),
        "clip": ((1024, 16, 24, 4096), (768, 12, 12, 3072), 224, 768)}


def small(width, heads):
    return (width, heads, 1, 2 * width), (64, 1, 1, 96), 28, 32


def make_clip(vision, text, image_size, projection):
    import transformers
    vision, text = (dict(hidden_size=w, num_attention_heads=h, num_hidden_layers=n, intermediate_size=mlp,
                         hidden_act="gelu") for w, h, n, mlp in (vision, text))
    text |= dict(vocab_size=len(WORDS) + 3, max_position_embeddings=16, bos_token_id=len(WORDS) + 1,
                 eos_token_id=len(WORDS) + 2)
    return transformers.CLIPModel(transformers.CLIPConfig(
        vision_config=vision | dict(patch_size=14, image_size=image_size), text_config=text,
        projection_dim=projection))


def make(folder, gpt, vq, gpt_name, **sizes):
    """Make all files of a run in `folder`. gpt, vq: GPTConfig and VQConfig. sizes: as in make_rewards."""
    os.makedirs(folder, exist_ok=True)
    torch.manual_seed(0)
    make_random(gpt, os.path.join(folder, gpt_name), std=.02)
    make_random(vq, os.path.join(folder, "vq_ds16_t2i.pt"), seed=1, std=.05)
    save_t5(os.path.join(folder, "flan-t5-xl"), gpt.caption_dim)
    make_rewards(folder, **sizes)


def make_rewards(folder, hps=small(1280, 16), clip=small(32, 2)):
    """Make HPS, CLIP and the aesthetic head. hps and clip are as in FULL. clip.HEADS must have the width of
    HPS's image tower."""
    from test_clip import to_open_clip
    files.save({"state_dict": to_open_clip(make_clip(*hps))},
               os.path.join(folder, "HPS_v2.1_compressed.pt"))
    width, model = clip[-1], make_clip(*clip)
    clip = os.path.join(folder, "clip-vit-large-patch14")
    model.save_pretrained(clip)
    save_tokenizer(clip, ["<unk>", *WORDS, "<start>", "<end>"], "<start>", "<end>", "<unk>")
    head = {}
    for i, a, b in zip((0, 2, 4, 6, 7), (width, 8, 6, 4, 2), (8, 6, 4, 2, 1)):
        head |= {f"layers.{i}.weight": torch.randn(b, a), f"layers.{i}.bias": torch.randn(b)}
    files.save(head, os.path.join(folder, "sac+logos+ava1-l14-linearMSE.pth"))


def make_lpips(folder):
    """Make VGG16 in torchvision's layout, with a part of the classifier, and LPIPS's positive heads."""
    torch.manual_seed(0)
    state, i, width = {"classifier.6.bias": torch.zeros(1000)}, 0, 3
    for n, count in lpips.BLOCKS:
        for _ in range(count):
            state[f"features.{i}.weight"] = torch.randn(n, width, 3, 3) * (2 / 9 / width) ** .5
            state[f"features.{i}.bias"] = torch.randn(n) * .1
            i, width = i + 2, n
        i += 1                                             # a pooling layer
    files.save(state, os.path.join(folder, lpips.VGG_FILE))
    heads = {f"lin{k}.model.1.weight": torch.rand(1, n, 1, 1) for k, (n, _) in enumerate(lpips.BLOCKS)}
    files.save(heads, os.path.join(folder, lpips.HEADS_FILE))


def make_pictures(folder, classes=4, of_each=8, size=(90, 70), seed=0):
    """Make a folder of images for each class. Each shows a gradient between two colors and a square, whose
    size tells the class."""
    generator = torch.Generator().manual_seed(seed)
    for label in range(classes):
        os.makedirs(os.path.join(folder, f"class {label}"))
        for i in range(of_each):
            a, b = torch.randint(256, (2, 3), generator=generator).float()
            x = torch.linspace(0, 1, size[0])[None, :, None].expand(size[1], -1, -1)             # [H,W,1]
            pixels = a + (b - a) * x
            pixels[:20 + 10 * label, :20 + 10 * label] = b
            Image.fromarray(pixels.byte().numpy()).save(os.path.join(folder, f"class {label}", f"{i}.png"))


if __name__ == "__main__":
    name = "t2i_XL_stage1_256.pt"
    make(sys.argv[1], weights.RELEASED[name][0], weights.RELEASED["vq_ds16_t2i.pt"][0], name,
         **FULL if sys.argv[2:] == ["--rewards"] else {})

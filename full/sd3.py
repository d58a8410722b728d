"""Released flow-matching models as policies: SD3.5-medium and Sana, through the library diffusers.

    python train.py configs/sd3_flow_grpo.py                       Flow-GRPO on SD3.5-medium
    python train.py configs/sd3_flow_grpo.py --world=sana --gpt_ckpt=Sana_600M_512px_diffusers
    python -m full.weights --export=out/sd3_flow_grpo --to=out/lora     write the adapters for diffusers

The networks, the VAE and the text encoders are those of diffusers. Everything else is ours: sampler and
probabilities (flow.py), loss (grpo.py), adapters (common/lora.py). A policy of flow.py needs three things:
the velocity at (x, t, prompt), the features of the empty prompt for guidance, and the shape of x. So the
class for a model of diffusers is short. FLUX.1-dev is not adapted: it has 11.9 billion parameters.

Symbols: B states, P prompts, L prompt tokens, C width of their features, K denoising steps.

    SD3.5-medium   x [16,64,64] at 512 pixels   L = 333 + 1   C = 4096   2.24 billion parameters
    Sana-600M      x [32,16,16] at 512 pixels   L = 300       C = 2304   592 million parameters

Four points are particular to these models:
 1. SD3 also reads one vector [2048] of the whole prompt. It is the last row of a prompt's features, with
    zeros up to the width C. SD3 has no mask, so it attends to the padding of a prompt.
 2. The network reads 1000 t, unrounded, because t has no integer steps in training.
 3. The published adapters are in the joint attention (`attn`). 13 blocks of SD3.5-medium have a second
    self-attention, `attn2`. The authors' list of names does not match `attn2`, so it stays frozen, here too.
 4. Text encoders take 11 of the 16 GB of SD3.5-medium. They encode every prompt once and are freed before
    the other models are loaded. A prompt of SD3.5-medium then takes 2.7 MB of the CPU's memory in bf16.

Sources: arXiv 2403.03206 (SD3), 2410.10629 (Sana), 2505.05470 (Flow-GRPO), and diffusers 0.42.1, with whose
pipelines the tests compare every number.
"""
import copy
import gc
import inspect
import math
import os

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import flow
from common import files, lora
from common.config import UserError
from common.device import batched, freeze
from common.interfaces import Conditions

RELEASED = flow.Options(eval_steps=40, grid="diffusers")       # how sample.py draws from a released pipeline


# ---- the policies ------------------------------------------------------------------------------------------
class Policy(flow.FlowPolicy, nn.Module):
    """A transformer of diffusers as a flow policy. side: height and width of x. o: flow.Options.

    A subclass names diffusers' classes of the pipeline, the network and the VAE, the matrices that adapters
    change, and the default number of patches. It has `predict`, and `embed`, which computes the features of
    prompts by diffusers' own pipeline."""
    recompute = False

    def __init__(self, network, side, o):
        super().__init__()
        self.network, self.shape, self.empty = network, (network.config.in_channels, side, side), None
        network.enable_gradient_checkpointing()
        self.set_sampler(o)

    def without(self, cond, mask):
        """Return the features of the empty prompt for each row. Pipeline.encode has set them."""
        return tuple(y.expand(len(cond), *y.shape[1:]) for y in self.empty)

    def run(self, x, t, cond, **more):
        self.network.gradient_checkpointing = self.recompute
        return self.network(x, encoder_hidden_states=cond, timestep=1000 * t, return_dict=False, **more)[0]


class SD3Policy(Policy):
    classes = "StableDiffusion3Pipeline", "SD3Transformer2DModel", "AutoencoderKL"
    adapted = r".*\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)$"
    patches = 1024                                         # of 512 pixels; the file's default is 1024 pixels

    def predict(self, x, t, cond, mask):
        pooled = cond[:, -1, :self.network.config.pooled_projection_dim]
        return self.run(x, t, cond[:, :-1], pooled_projections=pooled)

    @staticmethod
    def embed(pipe, prompts):
        cond, _, pooled, _ = pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
        pooled = F.pad(pooled, (0, cond.shape[2] - pooled.shape[1]))
        return torch.cat([cond, pooled[:, None]], 1), cond.new_ones(len(cond), cond.shape[1] + 1)


class SanaPolicy(Policy):
    classes = "SanaPipeline", "SanaTransformer2DModel", "AutoencoderDC"
    adapted = r".*\.attn[12]\.(to_[qkv]|to_out\.0)$"       # among patches, and from the prompt
    patches = 0                                            # as in the file

    def predict(self, x, t, cond, mask):
        return self.run(x, t * self.network.config.timestep_scale, cond, encoder_attention_mask=mask)

    @staticmethod
    def embed(pipe, prompts):
        # Sana's pipeline puts an instruction to its language model before a prompt, but not before "".
        instruction = inspect.signature(pipe.__call__).parameters["complex_human_instruction"].default
        return pipe.encode_prompt(prompts, do_classifier_free_guidance=False,
                                  complex_human_instruction=instruction if any(prompts) else None)[:2]


# ---- the pipeline ------------------------------------------------------------------------------------------
def load(name, folder, part="", **options):
    """Return the model or pipeline `name` of diffusers from a folder of released files. Nothing is fetched.
    Raises UserError if the folder lacks weights. diffusers would leave them random."""
    with files.explain(f"diffusers cannot load {name} from {os.path.join(folder, part)}"):
        import diffusers
        diffusers.logging.set_verbosity_error()
        options |= dict(local_files_only=True, use_safetensors=True)
        if not part:
            return getattr(diffusers, name).from_pretrained(folder, **options)
        model, info = getattr(diffusers, name).from_pretrained(
            folder, subfolder=part, output_loading_info=True, **options)
    if info["missing_keys"]:
        raise UserError(f"{os.path.join(folder, part)} lacks {min(info['missing_keys'])}: fetch it again")
    files.examine(model.state_dict(), os.path.join(folder, part))
    return model.eval()


class Prompts:
    """Features of prompts, computed once by the text encoders in `folder`, which are freed then. `encode`
    knows these prompts and the empty prompt. make: a subclass of Policy. Raises UserError."""

    @torch.no_grad()
    def __init__(self, make, folder, prompts, device, dtype=torch.bfloat16, batch=16):
        pipe = load(make.classes[0], folder, transformer=None, vae=None, dtype=dtype).to(device)
        prompts, self.rows = [p for p in dict.fromkeys(prompts) if p], {}
        parts = [[""], *(prompts[i:i + batch] for i in range(0, len(prompts), batch))]
        for some in tqdm(parts, desc="encoding prompts", dynamic_ncols=True, leave=False):
            cond, mask = make.embed(pipe, some)
            self.rows |= zip(some, zip(cond.cpu(), mask.cpu()))
        del pipe
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()

    def encode(self, prompts, device):
        """Return features [P,L,C] and mask [P,L] in fp32 of P prompts."""
        return tuple(torch.stack(rows).to(device).float() for rows in zip(*(self.rows[p] for p in prompts)))


class Pipeline:
    """SD3.5-medium. o: options of a run, or full.world.Options. found: {name: path} of its files. text: a
    Prompts. With --lora_rank the policy shares the weights of the reference. Raises UserError."""

    model_files = text_files = ("gpt_ckpt",)               # one folder has everything
    make, kind = SD3Policy, "sd3"
    codebook, generates_actions = None, False              # `generate` follows the ODE, which has no density

    @classmethod
    def text_encoder(cls, o, found, device, prompts):
        return Prompts(cls.make, found[o.gpt_ckpt], prompts, device)

    def __init__(self, o, found, text, device, dtype="float32", train=True):
        if getattr(o, "shard", False):
            raise UserError("--shard does not know the models of diffusers: use --lora_rank")
        self.text, self.device, self.options = text, device, o if hasattr(o, "denoise_steps") else RELEASED
        _, network, vae = self.make.classes
        network = load(network, found[o.gpt_ckpt], "transformer", dtype=torch.float32)
        self.vae = freeze(load(vae, found[o.gpt_ckpt], "vae", dtype=torch.float32).to(device))
        patch, size = network.config.patch_size, network.config.sample_size
        self.tokens = o.block_size or self.make.patches or (size // patch) ** 2
        if math.isqrt(self.tokens) ** 2 != self.tokens:
            raise UserError(f"--block_size must be a square, such as 1024, got {self.tokens}")
        self.policy = self.make(network, math.isqrt(self.tokens) * patch, self.options).to(device)
        self.policy.bf16 = dtype == "bfloat16"
        if o.lora_rank:
            self.reference = freeze(self.policy, dtype)
            self.policy = lora.adapt(self.reference, o.lora_rank, self.make.adapted)
        else:                                              # sample.py needs no reference
            self.reference = freeze(copy.deepcopy(self.policy), dtype) if train else self.policy
        self.per = math.prod(self.policy.shape) if self.options.logp_per_dim else 1
        some = self.encode([p for p in text.rows if p][:8]) if train else None
        self.chunks = flow.sizes(self.options, self.reference, some) if train else ()
        self.shared = self.options.chunk_ratio

    def encode(self, prompts):
        """Return the Conditions of prompts. Both policies get the features of the empty prompt."""
        self.policy.empty = self.reference.empty = self.text.encode([""], self.device)
        return Conditions(*self.text.encode(prompts, self.device))

    def decode(self, states):
        """states [b,K+1,C,H,W], of which the last is the image -> images [b,3,H,W], about [-1,1]."""
        known = self.vae.config
        return batched(lambda x: self.vae.decode(
            x / known.scaling_factor + (known.get("shift_factor") or 0), return_dict=False)[0], states[:, -1])

    def weights(self, rollout, rows, B, generator):
        return flow.action_weights(self.options, self.policy, self.chunks, rollout, rows, B, generator)


class SanaPipeline(Pipeline):
    """Sana, in the same interface."""
    make, kind = SanaPolicy, "sana"

"""VA-pi: post-training toward pixels. No captions are scored and nobody's taste is learned: the reward of a
picture is how near it comes to a real one. What it samples, how it scores and what it descends; the loop is
train.py's, the same that runs GRPO.

    python train.py configs/tiny_vapi.py              the tiny world, 75 seconds on 2 CPU cores
    python train.py configs/llamagen_c2i_vapi.py --data=imagenet/train      classes: a folder of folders
    python train.py configs/llamagen_t2i_vapi.py --data=pictures.tsv        captions: a list (data.py)

Source: VA-pi, arXiv 2512.19680. The objective is that of its public code, as its text could not be read
where this was written; the derivation is ours. x picture, c condition, z = E(x) its tokens, D the decoder,
T tokens a picture, B = P pictures x G samples.

Why. A policy is trained to predict tokens, and nobody looks at tokens. A wrong token may change a hair or
break an edge: the likelihood counts both alike, and the decoder was trained on tokens of real pictures, never
on the policy's. So ask for pixels:

 1. How likely is a picture? Say that a sequence a of tokens is drawn from p(a|c), and the picture around what
    it decodes to: log p(x|a) = -d(x, D(a)) + const, where d is a distance of pictures (squared error is a
    Gaussian; a perceptual one works as well).
        log p(x|c) = log sum_a p(a|c) p(x|a)                                         a sum of V^T terms
 2. For every distribution q(a), by Jensen, the log of a mean being at least the mean of the log:
        log p(x|c) = log E_q[ p(a|c) p(x|a) / q(a) ]
                  >= E_q[ log p(x|a) ]  -  KL(q || p(.|c))                           the ELBO
                   = E_q[ -d(x, D(a)) ] -  KL(q || p(.|c)) + const     [test_the_elbo_bounds_the_likelihood]
 3. The policy itself is q, with the real picture before its eyes. z~ is z with a share of its tokens replaced
    by random ones, and each token is drawn given the *real* ones before it:
        q(a|x,c) = prod_t pi(a_t | c, z~_<t)
    This is teacher forcing. One forward pass gives all T distributions, and the tokens are independent given
    x, so G samples cost G table look-ups, not G * T passes.
 4. First term: R = -d(x, D(a)) is a reward, and its gradient that of any expected reward,
        grad E_q[R] = E_q[ R grad log q(a) ]    [test_the_policy_term_descends_the_expected_distance]
    with the other samples of the same picture for a baseline: GRPO (grpo.py), whose prompts are pictures.
    What the tokenizer loses is in every sample's R and leaves with the baseline.
 5. Second term: q must stay what the language model says. Alone it needs p(.|c) of sequences that were never
    drawn; the code takes the cross-entropy to the tokens of the picture itself,
        CE = -(1/T) sum_t log pi(z_t | c, z~_<t),
    the KL the other way round, from the tokens that real pictures have to q (up to their own entropy, which
    is constant). Without it the policy leaves the tokens that pictures are made of for those that score well
    in one place (the paper's table, and ours in README.md).
 6. Noise in the context. When the policy draws on its own, the tokens before are its own, mistakes included.
    A real prefix has none. With a share xi of them random, each token learns to be right after wrong ones.
        loss = policy loss(A)  +  prior_weight * CE  +  beta * D(pi || reference)    the last one is optional

Departures from the code:
 1. One forward pass for each picture serves its G samples, forward and backward: their context is the same.
    The code runs it G times; loss and gradient are equal, as nothing else depends on the sample.
 2. The policy term sees the policy without dropout, the one that sampled (there only the samples come from
    it, so the ratio is off from the first pass on). prior_dropout brings it back for the cross-entropy, with
    a forward pass of its own.
 3. No cut (top-k, top-p) of what is sampled: the loss is about the whole distribution.
 4. The divergence to the reference may be any of divergences.py, in any estimator; there it is k3's. With
    beta = 0 the reference still runs once a picture, so that the log can tell how far the policy is.
 5. The advantage is not clamped to +-5: a member of a group of 8 cannot get beyond 7 / sqrt(8) = 2.5.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import grpo
from grpo import weigh  # noqa: F401  (phase 3)
from common import parallel
from common.device import batched

MEASURED = 4                    # samples of each held-back picture that `reconstruction` looks at


# ---- pure tensor functions ---------------------------------------------------------------------------------
def corrupt(tokens, xi, vocab_size, generator):
    """tokens [P,T] -> the same with each replaced, with probability xi, by a uniform one of all codes."""
    hit = torch.rand(tokens.shape, generator=generator, device=tokens.device) < xi
    other = torch.randint(vocab_size, tokens.shape, generator=generator, device=tokens.device)
    return torch.where(hit, other, tokens)


def draw(probabilities, uniform):
    """G samples of every position from one table: probabilities [T,V], uniform [G,T] in [0,1) -> [G,T]."""
    # a = the first token with  p_0 + ... + p_a > u:  a number in [0,1) falls into the piece of a token as
    # often as the piece is long. One sum serves all samples; each then takes log2(V) comparisons.
    ends = probabilities.cumsum(1)                                                               # [T,V]
    last = ends[:, -1:]                                          # 1, but for rounding; nothing may lie beyond
    numbers = torch.minimum(uniform.T * last, torch.nextafter(last, torch.zeros_like(last)))     # [T,G]
    return torch.searchsorted(ends, numbers.contiguous(), right=True).T


def distance(images, originals, features, mse_weight=1.0, perceptual_weight=1.0):
    """d of images [b,3,H,W] to as many originals, or all to one [1,3,H,W] -> [b]: mean squared error on
    [-1,1], and a perceptual distance by `features`, a function of the two. images are as decoded, not clipped
    to that range."""
    mse = (images - originals).square().mean((1, 2, 3))
    return mse_weight * mse + (perceptual_weight * features(images, originals) if perceptual_weight else 0)


def lpips_of(layers, images, originals):
    """LPIPS, arXiv 1801.03924 eq. 1, with all weights 1: activations of some layers (a function images ->
    list of [b,C,h,w]), as unit vectors at every place; their squared distance, mean over places, summed, [b].

    In the tiny world the layers are the judge's three convolutions. They were trained to tell captions apart,
    so they see shape, colour and number, at the precision of a few pixels, and hardly the noise within a
    plain area, which squared error counts. At full size it is LPIPS proper: layers of VGG, and weights that
    people's eyes chose (data.py)."""
    pairs = zip(layers(images), layers(originals))
    return sum((F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1).mean((1, 2)) for a, b in pairs)


def prior_loss(logits, targets):
    """logits [U,T,V] at temperature 1, targets [U,T] -> cross-entropy [U,T], nat."""
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")


# ---- the phases of a step, as train.py calls them ----------------------------------------------------------
@dataclass
class Batch(grpo.Batch):
    """`prompt` is the picture of each sequence; a process holds the pictures that its own sequences need."""
    originals: torch.Tensor = None  # [P,3,H,W], zeros where another process has it
    targets: torch.Tensor = None    # [P,T], z, likewise
    context: torch.Tensor = None    # [P,T], z~: one draw of the noise, for all samples and the update


def logits_of(model, batch, used, temperature=1.0):
    """What a model says of every token of some pictures, given the noisy tokens before -> [U,T,V]."""
    return model(batch.context[used], batch.cond[used], batch.mask[used], temperature=temperature)


@torch.no_grad()
def sample(cfg, world, generator):
    """Phase 1: G samples, by teacher forcing, of each of some pictures -> Batch."""
    captions, items = zip(*world.draw_pictures(cfg.prompts_per_step))
    batch = Batch.of(cfg, list(captions), *world.encode(captions))
    P, device, T = len(captions), batch.prompt.device, world.policy.config.block_size
    needed = batch.prompt.unique()
    shown = world.load([items[i] for i in needed.tolist()])                                      # [..,3,H,W]
    batch.originals = shown.new_zeros(P, *shown.shape[1:]).index_copy_(0, needed, shown)
    batch.targets = torch.zeros(P, T, dtype=torch.long, device=device).index_copy_(
        0, needed, batched(world.vqgan.encode, shown))
    # Noise is drawn for the whole step by every process, so that a run does not depend on their number.
    batch.context = corrupt(batch.targets, cfg.context_noise, world.policy.config.vocab_size, generator)
    uniform = torch.rand(P * cfg.group_size, T, generator=generator, device=device)[batch.mine]  # [b,T]
    drawn, old = [], []
    for rows in grpo.pieces(cfg, batch):
        used, own = batch.prompt[rows].unique(return_inverse=True)
        with world.autocast:
            logp = logits_of(world.policy, batch, used, cfg.temperature).log_softmax(-1)         # [U,T,V]
        for u in range(len(used)):
            drawn.append(draw(logp[u].exp(), uniform[rows][own == u]))                           # [G,T]
            old.append(logp[u].gather(1, drawn[-1].T).T)
    batch.tokens, batch.logp_old = torch.cat(drawn), torch.cat(old)                              # [b,T]
    return batch


def score(cfg, world, batch, images):
    """Phase 2: minus the distance of each sample to its original, and the held-out reward -> two [B]."""
    trained = torch.cat([-distance(images[batch.prompt == u], batch.originals[u:u + 1], world.perceptual,
                                   cfg.mse_weight, cfg.perceptual_weight) for u in batch.prompt.unique()])
    captions = [batch.captions[i] for i in batch.prompt.tolist()]
    return parallel.gather(trained), parallel.gather(world.rewards["heldout_reward"](images, captions))


def loss_of(cfg, world, batch, rows, adv, selected, beta):
    """Phase 4: the loss of some rows of mine, as their share of the step's, and its statistics."""
    N, (used, own) = grpo.n_tokens(cfg, batch), batch.prompt[rows].unique(return_inverse=True)

    def cool(logits):                                            # (a division by 1 would be a copy)
        return logits if cfg.temperature == 1 else logits / cfg.temperature
    with world.autocast:
        logits = logits_of(world.policy, batch, used)                                            # [U,T,V]
        with torch.no_grad():
            ref_logits = logits_of(world.reference, batch, used)
        loss, stats = grpo.grpo_loss(
            cool(logits), cool(ref_logits), batch.tokens[rows], batch.logp_old[rows], adv[batch.mine][rows],
            N, selected[rows], own=own, beta=beta, divergence=cfg.divergence, estimator=cfg.estimator,
            clip_eps=cfg.clip_eps)
        if cfg.prior_dropout:
            world.policy.train()
            logits = logits_of(world.policy, batch, used)
            world.policy.eval()
        prior = prior_loss(logits, batch.targets[used])[own].sum() / N       # a picture counts once a sample
    return loss + cfg.prior_weight * prior, stats | {"prior": prior.detach()}


# ---- evaluation --------------------------------------------------------------------------------------------
@torch.no_grad()
def reconstruction(world, policy, temperature):
    """Minus the mean distance (both weights 1) of samples to the world's held-back pictures, in a clean
    context, without guidance, and always with the same random numbers. 0 would be the picture itself, but the
    tokenizer loses something."""
    captions, originals = world.held_back_pictures()
    generator, scores = torch.Generator(originals.device).manual_seed(0), []
    for i in range(0, len(captions), 16):
        shown, (cond, mask) = originals[i:i + 16], world.encode(captions[i:i + 16])
        z = world.vqgan.encode(shown)
        with world.autocast:
            p = policy(z, cond, mask, temperature=temperature).softmax(-1)
        for one, original in zip(p, shown):
            tokens = draw(one, torch.rand(MEASURED, z.shape[1], generator=generator, device=z.device))
            scores.append(-distance(world.decode(tokens), original[None], world.perceptual))
    return torch.cat(scores).mean().item()

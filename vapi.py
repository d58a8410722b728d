"""VA-pi: post-training with a reward measured on pixels: how near does an image come to a real one?

    python train.py configs/tiny_vapi.py              the tiny world, 75 seconds on 2 CPU cores
    python train.py configs/llamagen_c2i_vapi.py --data=imagenet/train      classes: a folder of folders
    python train.py configs/llamagen_t2i_vapi.py --data=images.tsv          captions: a list (full/data.py)

Source: VA-pi, arXiv 2512.19680. We had the public code and the published tables, but not the text of the
paper. The objective is that of the code, and the derivation is ours.

Symbols: x an image, c its condition (a caption or a class), z = E(x) its tokens, decode(a) the image of
tokens a, d a distance of images, pi the policy, T tokens of an image, V codes. A step has P images and B = P
* G samples. A micro-batch has samples of U different images.

Why. A policy is trained to predict tokens, but people look at images. A wrong token may change a hair or
break an edge. The likelihood counts both alike. The decoder was trained on tokens of real images, never on
tokens of the policy. So the objective should be about pixels:

 1. How likely is an image? Let p(a|c) be the policy that samples freely: each token depends on the sampled
    tokens before it. Say that the image x lies around what a decodes to: log p(x|a) = -d(x, decode(a)) +
    const. Squared error as d is a Gaussian. A perceptual distance works as well. Then
        log p(x|c) = log sum_a p(a|c) p(x|a)                                         a sum of V^T terms
 2. For every distribution q(a), by Jensen's inequality (the log of a mean is at least the mean of the log):
        log p(x|c) = log E_q[ p(a|c) p(x|a) / q(a) ]
                  >= E_q[ log p(x|a) ]  -  KL(q || p(.|c))                                the ELBO
                   = E_q[ -d(x, decode(a)) ] -  KL(q || p(.|c)) + const  [test_the_elbo_bounds_the_likelihood]
 3. As q we take the same policy, but reading the real image. z~ is z with a share of its tokens replaced by
    random ones. Each token is drawn given the *real* tokens before it:
        q(a|x,c) = prod_t pi(a_t | c, z~_<t)
    This is teacher forcing. One forward pass gives all T distributions. The tokens are independent given x,
    so G samples cost G table look-ups, not G * T passes.
 4. The first term: R = -d(x, decode(a)) is a reward, and its gradient is that of any expected reward,
        grad E_q[R] = E_q[ R grad log q(a) ]    [test_the_policy_term_descends_the_expected_distance]
    The other samples of the same image serve as the baseline. This is GRPO (grpo.py) with images for prompts.
    Even the best tokens do not rebuild the image exactly. This error is about the same for all samples of an
    image, so it cancels with the baseline.
 5. The second term: q must stay near p(.|c). But p(a|c) conditions each token on the sample's own earlier
    tokens, while q used the real ones. It would need a forward pass for each sample. The code takes the
    cross-entropy to the tokens of the image itself:
        CE = -(1/T) sum_t log pi(z_t | c, z~_<t)
    This is the KL in the other direction, from the tokens of real images to q, up to their own entropy, which
    is constant. Without it the policy drifts to tokens that earn reward at one position but do not occur in
    real images (the published table, and ours in docs/vapi.md).
 6. Noise in the context. When the policy samples freely, the tokens before are its own, mistakes included. A
    real prefix has no mistakes. With a share xi of random tokens, each token learns to be right after wrong
    ones.
        loss = policy loss(A)  +  prior_weight * CE  +  beta * divergence(pi, reference)
    The last term is optional.

Departures from the authors' code:
 1. One forward pass for each image serves its G samples, forward and backward, because their context is the
    same. Their code runs it G times. Loss and gradient are equal, as nothing else depends on the sample.
 2. The policy term uses the policy without dropout, which is the one that sampled. Their loss uses dropout,
    so the ratio is not 1 even in the first pass. --prior_dropout brings dropout back for the cross-entropy.
    Each image then has a forward pass and a random seed of its own. So the numbers that are dropped depend
    neither on micro-batches nor on the world size.
 3. The sampled distribution is not cut (top-k, top-p): the loss is about the whole distribution.
 4. The divergence may be any of divergences.py, in any estimator. Theirs is k3. With beta = 0 the reference
    still runs once per image, so that the log can tell how far the policy has moved.
 5. The advantage is not clamped to +-5. In a group of 8 no advantage exceeds 7 / sqrt(8) = 2.5.
 6. The advantage is divided by the standard deviation + 1e-4, as in grpo.py. Their code adds 1e-8.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import grpo
import metrics
from common import parallel
from common.config import UserError, option
from common.device import batched
from common.interfaces import Rollout
from common.run import schedule
from divergences import Categorical

MEASURED = 4                    # samples of each fixed image in `reconstruction`


@dataclass(frozen=True)
class Options:
    """---- VA-pi: learn from images"""
    mse_weight: float = option(1.0, "weight of the squared error in the distance", low=0)
    perceptual_weight: float = option(1.0, "weight of the perceptual distance; both 0: no policy term", low=0)
    context_noise: float = option(0.5, "xi, share of random tokens in the context", low=0, high=1)
    prior_weight: float = option(0.1, "weight of the cross-entropy to the image's own tokens", low=0)
    prior_dropout: bool = option(False, "dropout in the cross-entropy; one more forward pass per image")

    def check(cfg):
        if cfg.prior_dropout and cfg.shard:
            raise UserError("--prior_dropout runs the policy once for each image, and --shard needs equally "
                            "many passes on all processes: use one of them")


# ---- pure tensor functions ---------------------------------------------------------------------------------
def corrupt(tokens, xi, vocab_size, generator):
    """tokens [P,T] -> the same with each replaced, with probability xi, by a uniform one of all codes."""
    hit = torch.rand(tokens.shape, generator=generator, device=tokens.device) < xi
    other = torch.randint(vocab_size, tokens.shape, generator=generator, device=tokens.device)
    return torch.where(hit, other, tokens)


def sample_table(probabilities, uniform):
    """G samples of every position from one table: probabilities [T,V], uniform [G,T] in [0,1) -> [G,T]."""
    # a = the first token with  p_0 + ... + p_a > u.  So u lies in the interval of token a with probability
    # p_a, its length. One cumulative sum serves all samples. Each sample then takes log2(V) comparisons.
    ends = probabilities.cumsum(1)                                                               # [T,V]
    last = ends[:, -1:]                                    # 1, up to rounding; no number may lie beyond it
    numbers = torch.minimum(uniform.T * last, torch.nextafter(last, torch.zeros_like(last)))     # [T,G]
    return torch.searchsorted(ends, numbers.contiguous(), right=True).T


def distance(images, originals, perceptual, mse_weight=1.0, perceptual_weight=1.0):
    """The distance of images [b,3,H,W] to as many originals, or of all to one original [1,3,H,W] -> [b].

    Mean squared error on [-1,1], plus a perceptual distance, a function (images, originals) -> [b]. The
    images are as decoded, not clipped to [-1,1].
    """
    mse = (images - originals).square().mean((1, 2, 3))
    return mse_weight * mse + (perceptual_weight * perceptual(images, originals) if perceptual_weight else 0)


def prior_loss(logits, targets):
    """logits [U,T,V] at temperature 1, targets [U,T] -> cross-entropy [U,T], nat."""
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")


def tempered(pi, temperature, rows):
    """Return the samples' distribution at a temperature. rows [b]: the row of pi that a sample has."""
    # A division by 1 would be a copy.
    return Categorical(pi.logits if temperature == 1 else pi.logits / temperature, rows=rows)


# ---- the loop ----------------------------------------------------------------------------------------------
def vapi_loop(cfg, run, world, pipeline):
    """Train pipeline.policy by VA-pi, on the images of the world. Arguments as in train.py's grpo_loop."""
    policy, reference, G, T = pipeline.policy, pipeline.reference, cfg.group_size, pipeline.tokens
    P, device = cfg.prompts_per_step, run.device
    B = P * G
    mine = run.rows(B)                                                             # [b], of the B samples
    codes = len(pipeline.codebook)
    for step in run.steps():
        # 1. sample: G samples, by teacher forcing, of each of P images
        captions, items = zip(*world.images.draw(P))
        conditions, image_of = pipeline.encode(list(captions)), mine // G                        # [b]
        needed = image_of.unique()                   # a process holds the images that its own samples need
        shown = world.images.load([items[i] for i in needed.tolist()])
        originals = shown.new_zeros(P, *shown.shape[1:]).index_copy_(0, needed, shown)           # [P,3,H,W]
        targets = torch.zeros(P, T, dtype=torch.long, device=device).index_copy_(
            0, needed, batched(pipeline.encode_images, shown))                                   # z [P,T]
        # Every process draws the noise of the whole step, so that a run does not depend on the world size.
        noisy = corrupt(targets, cfg.context_noise, codes, run.generator)                        # z~ [P,T]
        uniform = torch.rand(B, T, generator=run.generator, device=device)[mine]                 # [b,T]
        context = Rollout(noisy, None, torch.arange(P, device=device))
        rollout = sample(cfg, policy, context, conditions, image_of, uniform)
        run.phase("sample")

        # 2. reward: minus the distance of each sample to its original
        with torch.no_grad():
            pixels = pipeline.decode(rollout.actions)                                            # [b,3,H,W]
            rewards = parallel.gather(torch.cat([
                -distance(pixels[image_of == u], originals[u:u + 1], world.images.perceptual,
                          cfg.mse_weight, cfg.perceptual_weight) for u in needed]))              # [B]
            heldout = parallel.gather(world.heldout(pixels, [captions[i] for i in image_of.tolist()]))
            features = parallel.gather(world.embed(pixels)).unflatten(0, (-1, G))                # [P,G,d]
        run.phase("reward")

        # 3. advantage: each sample against the other samples of its image
        all_advantages, zero_spread = grpo.advantages(rewards, G)                                # [B]
        advantages = all_advantages[mine]                                                        # [b]
        run.phase("advantage")

        # 4. update: one forward pass for each image serves all of its samples
        beta = schedule(cfg.beta_schedule, cfg.beta, cfg.beta_end, step / cfg.max_steps)
        epochs = []
        for _ in range(cfg.inner_epochs):
            epochs.append({})
            seeds = None
            if cfg.prior_dropout:
                seeds = torch.randint(2 ** 31, (P,), generator=run.generator, device=device).tolist()
            for rows in torch.arange(len(mine), device=device).split(cfg.micro_batch):
                loss, stats = loss_of(
                    cfg, policy, reference, context, conditions, targets, image_of[rows],
                    rollout.actions[rows], rollout.logp[rows], advantages[rows], B * T, beta, seeds)
                loss.backward()
                grpo.accumulate(epochs[-1], stats)
            run.optimizer_step(step)
        run.phase("update")

        # 5. log
        stats = epochs[0] | {"clip_share": epochs[-1]["clip_share"]}
        run.log(step, {"reward": rewards.mean().item(), "heldout_reward": heldout.mean().item(),
                       "reward_std": rewards.view(-1, G).std(1).mean().item(), "zero_spread": zero_spread,
                       "diversity": metrics.pairwise(features), "beta": beta}, stats)


@torch.no_grad()
def sample(cfg, policy, context, conditions, image_of, uniform):
    """Sample G times for each image, given its noisy tokens. uniform [b,T]: numbers in [0,1)."""
    tokens, logps = [], []
    for rows in torch.arange(len(image_of), device=image_of.device).split(cfg.micro_batch):
        used, own = image_of[rows].unique(return_inverse=True)
        logp = policy.distribution(context, conditions, used, temperature=cfg.temperature).logp   # [U,T,V]
        for u in range(len(used)):
            tokens.append(sample_table(logp[u].exp(), uniform[rows][own == u]))                   # [G,T]
            logps.append(logp[u].gather(1, tokens[-1].T).T)
    return Rollout(torch.cat(tokens), torch.cat(logps), image_of)


def loss_of(cfg, policy, reference, context, conditions, targets, image_of, tokens, logp_old, adv, n_tokens,
            beta=0.0, seeds=None):
    """The loss of some samples, as their part of the step's mean, and its statistics (see grpo.loss).

    context: a Rollout with the noisy tokens of P images. targets [P,T]: their own tokens. image_of [b]: the
    image of each sample. tokens, logp_old [b,T], adv [b]: of the samples. n_tokens: B * T of the whole step.
    seeds: for dropout in the cross-entropy, a random seed of each of the P images. None: no dropout.
    """
    used, row = image_of.unique(return_inverse=True)                 # [U] images, [b] row of each sample
    pi = policy.distribution(context, conditions, used)              # at temperature 1
    with torch.no_grad():
        rho = reference.distribution(context, conditions, used)
    loss, stats = grpo.loss(
        tempered(pi, cfg.temperature, row), tempered(rho, cfg.temperature, row), tokens, logp_old, adv,
        n_tokens, divergence=cfg.divergence, estimator=cfg.estimator, beta=beta, clip_eps=cfg.clip_eps)
    logits = pi.logits if seeds is None else logits_with_dropout(policy, context, conditions, used, seeds)
    prior = prior_loss(logits, targets[used])[row].sum() / n_tokens              # an image counts G times
    return loss + cfg.prior_weight * prior, stats | {"prior": prior.detach()}


def logits_with_dropout(policy, context, conditions, used, seeds):
    """Return the logits [U,T,V] of images in train mode. Arguments as in `loss_of`."""
    logits = []
    policy.train()
    for image in used.split(1):
        torch.manual_seed(seeds[image])          # dropout has no generator, and nothing else uses this stream
        logits.append(policy.distribution(context, conditions, image).logits)
    policy.eval()
    return torch.cat(logits)


# ---- evaluation --------------------------------------------------------------------------------------------
@torch.no_grad()
def reconstruction(world, pipeline, policy, temperature):
    """Return minus the mean distance (both weights 1) of samples to the world's fixed images.

    The context has no noise, there is no guidance, and the random numbers are always the same. 0 means a
    perfect copy. It cannot be reached, because the tokenizer itself makes errors.
    """
    captions, originals = world.images.fixed_images()
    generator, rewards = torch.Generator(originals.device).manual_seed(0), []
    for i in range(0, len(captions), 16):
        shown, conditions = originals[i:i + 16], pipeline.encode(captions[i:i + 16])
        z = pipeline.encode_images(shown)                                                        # [n,T]
        every = torch.arange(len(z), device=z.device)
        pi = policy.distribution(Rollout(z, None, every), conditions, every, temperature=temperature)
        for table, original in zip(pi.logits.softmax(-1), shown):
            uniform = torch.rand(MEASURED, z.shape[1], generator=generator, device=z.device)
            images = pipeline.decode(sample_table(table, uniform))
            rewards.append(-distance(images, original[None], world.images.perceptual))
    return torch.cat(rewards).mean().item()

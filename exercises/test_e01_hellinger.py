"""python -m pytest exercises/test_e01_hellinger.py"""
import pytest
import torch

from divergences import DIVERGENCES


def policies(vocab=50, seed=0, scale=1.5):
    """Return the logits of pi, with gradient, and log rho, [V] each, in float64."""
    g = torch.Generator().manual_seed(seed)
    z, logq = (torch.randn(vocab, generator=g, dtype=torch.float64) * scale for _ in range(2))
    return z.requires_grad_(), logq.log_softmax(0)


def test_values(exercise):
    x = torch.tensor([4., 1 / 4, 1.], dtype=torch.float64).log()
    assert exercise.f(x).tolist() == pytest.approx([1, 1 / 4, 0], abs=1e-12), (
        "f(w) = (1 - sqrt w)^2 at w = 4, 1/4, 1 is 1, 1/4, 0. Did you take x for w? x is log w.")
    z, logq = policies()
    logp = z.detach().log_softmax(0)
    value = exercise.exact(logp, logq)
    assert value.shape == (), f"exact sums over the last axis: [V] -> a scalar, not {tuple(value.shape)}"
    mean = (logp.exp() * exercise.f(logq - logp)).sum()
    assert value.item() == pytest.approx(mean.item(), rel=1e-10), (
        f"exact and E_pi[f(w)] must be the same number, but exact gives {value:.6f} and the mean of your f "
        f"{mean:.6f}. (A factor of 2 means that one function has the 1/2 of the other convention.)")
    assert value.item() == pytest.approx(exercise.exact(logq, logp).item(), rel=1e-10), (
        "squared Hellinger is symmetric, but exact(pi, rho) and exact(rho, pi) differ")
    many = torch.stack([logp, logq]), torch.stack([logq, logq])
    assert exercise.exact(*many).tolist() == pytest.approx([value.item(), 0], abs=1e-9), (
        "exact sums over the last axis alone: [2,V] -> [2], one value for each token of a batch")
    apart = exercise.exact(torch.tensor([0., -80.]).log_softmax(0), torch.tensor([-80., 0.]).log_softmax(0))
    assert apart.item() == pytest.approx(2, rel=1e-5), (
        f"policies that share no code have D = 2; exact gives {apart:.4f}")


def test_c_is_the_gradient_of_sampled(exercise):
    logp = torch.linspace(-12, 12, 401, dtype=torch.float64, requires_grad=True)            # rho = 1
    (auto,) = torch.autograd.grad(exercise.HELLINGER.sampled(logp, torch.zeros_like(logp)).sum(), logp)
    yours = exercise.HELLINGER.weight(-logp.detach())
    worst = ((yours - auto).abs() / (1 + auto.abs())).argmax()
    assert torch.allclose(yours, auto, rtol=1e-9, atol=1e-12), (
        f"your c(w) is not -w f'(w): at log w = {-logp[worst]:.2f} autograd through f gives "
        f"{auto[worst]:.6f}, you give {yours[worst]:.6f}. dw/dlog pi = -w, "
        "so grad f(w) = f'(w) (-w) grad log pi.")


def test_mean_of_unbiased_is_the_gradient_of_exact(exercise):
    for seed in range(3):
        z, logq = policies(seed=seed)
        logp, d = z.log_softmax(0), exercise.HELLINGER
        mean = (logp.detach().exp() * d.unbiased(logp, logq)).sum()
        (mean,) = torch.autograd.grad(mean, z, retain_graph=True)
        (exact,) = torch.autograd.grad(d.exact(logp, logq), z)
        assert (mean - exact).abs().max() < 1e-8, (
            f"E_pi[unbiased] and exact must have the same gradient, but they differ by "
            f"{(mean - exact).abs().max():.1e}. "
            "`unbiased` uses only your f, so your f and your exact belong to different divergences.")


def test_beta_factor(exercise):
    factor = exercise.beta_factor()
    _, logq = policies()
    step = torch.randn(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 1e-4
    logp = (logq + step).log_softmax(0)
    ratio = (DIVERGENCES["reverse_kl"].exact(logp, logq) / exercise.exact(logp, logq)).item()
    assert factor == pytest.approx(ratio, rel=1e-3), (
        f"close to rho, KL / Hellinger is {ratio:.4f}, and this is the factor; you give {factor}. "
        "(JS has f''(1) = 1/4 and the factor 4. What is your f''(1)?)")

"""Do the tests notice errors? Put one error at a time into a copy of this project, and run its tests there.

    python tests/helpers/mutants.py                            all mutants, and results/mutants.md; 25 minutes
    python tests/helpers/mutants.py metrics-pairs lora-scale   two of them, and no file

A mutant is one error: in one file, one text becomes another. It is *killed* if the test files that cover it
fail, and it *survives* if they pass. A survivor is a hole in the tests, or it is equivalent: no test can tell
it from the original. Replace an equivalent mutant by another one. The old text must occur exactly once in its
file. Otherwise the script ends with the list of all mutants that have to be written anew.

Tests run one at a time in a copy of the tree, in one thread, until the first failure. A time-out is
60 seconds of CPU time, or 5 minutes. It counts as killed, and the table says so. If no test can run, because
the mutant cannot be imported, then the mutant does not count as killed. The exit code is 1 if less than 95 %
are killed.
"""
import ast
import datetime
import os
import resource
import shutil
import signal
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
CPU_SECONDS, SECONDS, GOAL = 60, 300, .95
CORE, FULL, TINY, COMMON = (f"tests/{folder}/test_" for folder in ("core", "full", "tiny", "common"))
LOOP = f"{CORE}step_by_hand.py {CORE}train.py"
EVALUATE = f"{CORE}evaluation_by_hand.py {CORE}evaluate.py"
# These files without their longest test, which takes most of the 60 seconds.
VAPI = f"{CORE}vapi.py --deselect={CORE}vapi.py::test_it_learns_to_reconstruct"
WEIGHTS = f"{FULL}weights.py --deselect={FULL}weights.py::test_a_load_peaks_at_the_size_of_the_file"

GROUPS = [        # (file, tests that cover it: words behind `python -m pytest`, {name: (old text, new text)})
    ("train.py", LOOP, {
        "train-beta-swapped": ("cfg.beta, cfg.beta_end", "cfg.beta_end, cfg.beta"),
        "train-beta-zero": ("beta=beta", "beta=0.0"),
        "train-beta-never-moves": ("step / cfg.max_steps", "0.0"),
        "train-estimator": ("estimator=cfg.estimator", 'estimator="sampled"'),
        "train-divergence": ("divergence=cfg.divergence", 'divergence="js"'),
        "train-clip": ("clip_eps=cfg.clip_eps", "clip_eps=0.2"),
        "train-dynamic": ("dynamic=cfg.dynamic_weight", "dynamic=False"),
        "train-uncond-grad": ("uncond_grad=cfg.uncond_grad", "uncond_grad=True"),
        "train-score-cfg": ("cfg.score_cfg or cfg.cfg_scale", "cfg.cfg_scale"),
        "train-entropy": ("pi.entropy()", "pi.entropy().flip(1)"),
        "train-weights-mean": ("picked / picked.float().mean()", "picked.float()"),
        "train-reference": ("rho = reference.", "rho = policy."),
        "train-advantage-rows": ("advantages[rows]", "advantages[:len(rows)]"),
        "train-logp-rows": ("rollout.logp[rows, slice", "rollout.logp[:len(rows), slice"),
        "train-groups": ("mine // G", "mine % cfg.prompts_per_step"),
        "train-inner-epochs": ("range(cfg.inner_epochs)", "range(1)"),
        "train-clip-share": ('epochs[-1][key] for', 'epochs[0][key] for'),
        "train-heldout": ("world.heldout(", "world.reward("),
        "train-temperature": (
            "dict(cfg_scale=cfg.cfg_scale, temperature=cfg.temperature)",
            "dict(cfg_scale=cfg.cfg_scale, temperature=1.0)")}),
    ("grpo.py", f"{CORE}grpo.py {CORE}step_by_hand.py", {
        "grpo-eps": ("(std + eps)", "(std + 1)"),
        "grpo-std": ("groups.std(1, keepdim=True)", "groups.std(1, keepdim=True, correction=0)"),
        "grpo-spread": ("(adv * spread[:, None])", "adv"),
        "grpo-pessimist": ("torch.minimum(", "torch.maximum("),
        "grpo-clip-above": ("ratio.clamp(1 - clip_eps, 1 + clip_eps)", "ratio.clamp(1 - clip_eps)"),
        "grpo-sampled-swapped": (".sampled(logp, logp_ref)", ".sampled(logp_ref, logp)"),
        "grpo-unbiased-old": (".unbiased(logp, logp_ref, logp_old)", ".unbiased(logp, logp_ref)"),
        "grpo-mean-of-part": ("per_action.sum() / n_actions, stats", "per_action.mean(), stats"),
        "grpo-dynamic-detached": (
            "dynamic_weight(logp, logp_ref)",
            "dynamic_weight(logp, logp_ref).detach()"),
        "grpo-max-added": ('key.startswith("max_")', "False"),
        "grpo-clip-share": (
            "((ratio - 1) * adv[:, None].sign() > clip_eps)",
            "((ratio - 1).abs() > clip_eps)"),
        "grpo-chunk-weights": ("weights[:, start:stop]", "weights[:, :stop - start]")}),
    ("divergences.py", CORE + "divergences.py", {
        "forward-kl-f": ("x.exp() * x - x.exp() + 1", "x.exp() * x"),
        "js-f": ("(LOG2 - F.softplus(x) +", "(F.softplus(x) - LOG2 +"),
        "reverse-kl-c": ("c=lambda x: 1 - x.exp()", "c=lambda x: -x.exp()"),
        "reverse-kl-exact": ("(logp.exp() * (logp - logq)).sum(-1)", "(logq.exp() * (logq - logp)).sum(-1)"),
        "clamp": ("CLAMP = 20.0", "CLAMP = 2.0"),
        "unbiased-old": ("if logp_old is None else logp_old", "if True else logp_old"),
        "js-strength": ('"js": 4}', '"js": 2}')}),
    ("divergences.py", CORE + "grpo.py", {
        "entropy-mean": ("(self.logp.exp() * self.logp).sum(-1)", "(self.logp.exp() * self.logp).mean(-1)")}),
    ("divergences.py", CORE + "gaussians.py", {
        "gaussian-js-backward": ("(x.sigmoid() ** 2 * density)", "(x.sigmoid() * density)"),
        "gaussian-js-shift": ("-(q[..., None] / 2 + q", "-(q[..., None] + q"),
        "gaussian-kl": ("else q / 2", "else q"),
        "gaussian-std": ("- self.std.log() - math", "- math"),
        "gaussian-entropy": ("math.log(2 * math.pi * math.e) / 2", "math.log(2 * math.pi) / 2")}),
    ("grpo.py", CORE + "chunks.py", {
        "chunk-mean": ("part.mean(1) for part in log_ratio", "part.sum(1) for part in log_ratio"),
        "chunk-weight": ("(T / (J * sizes))", "(1 / (J * sizes))"),
        "chunk-whole": ("whole or (logp.shape[1], len(chunks))", "(logp.shape[1], len(chunks))"),
        "chunk-cut": ("stop + size - start > actions", "stop - start > actions"),
        "per-component": ("(logp - logp_old) / per", "(logp - logp_old) / per ** .5")}),
    ("flow.py", CORE + "flow.py", {
        "flow-first-std": ("torch.where(t == 1, end, t)", "torch.where(t == 1, t, t) + 1e-3"),
        "flow-drift": ("1 + s2 / (2 * t) * dt", "1 + s2 / t * dt"),
        "flow-std": ("(s2 * -dt).sqrt()", "(s2 * -dt)"),
        "flow-cps": ("(end ** 2 - std ** 2)", "(end ** 2 + std ** 2)"),
        "flow-guidance": ("without + cfg_scale *", "without - cfg_scale *"),
        "flow-part": ("[part[0] * b:][:b]", "[:b]"),
        "flow-elbo-std": ("self.times[:N] / 2 ** .5", "self.times[:N]"),
        "flow-target": ("list(range(1, N + 1))", "list(range(N))"),
        "flow-change": ("/ states[:, 1:].abs()", "/ states[:, :-1].abs()"),
        "flow-draw": ("(len(chunks) / k)", "(k / len(chunks))"),
        "flow-prefer": ("(-u.log() / preferred)", "(-u.log() * preferred)"),
        "flow-at": ("self.start + start)", "start + 0)")}),
    ("common/sit.py", CORE + "flow.py", {
        "sit-time": ("1 - t if c.reverse_time else t", "t if c.reverse_time else 1 - t"),
        "sit-negated": ("= -state[name][rows]", "= state[name][rows]"),
        "sit-gate": ("x + gate1 * self", "x + gate2 * self"),
        "sit-patches": (".permute(0, 5, 1, 3, 2, 4)", ".permute(0, 5, 1, 4, 2, 3)")}),
    ("divergences.py", VAPI, {
        "chunk-rows": (
            "self.hidden[:, start:stop], self.head, self.rows",
            "self.hidden[:, start:stop], self.head")}),
    ("metrics.py", CORE + "metrics.py", {
        "metrics-pairs": ("(n * (n - 1))", "(n * n)"),
        "metrics-vendi": (
            "if len(f) > f.shape[1] else f @ f.T) / len(f)",
            "if len(f) > f.shape[1] else f @ f.T) / f.shape[1]"),
        "metrics-frechet": ("- 2 * middle", "- middle"),
        "metrics-neighbor": ("kthvalue(k + 1)", "kthvalue(k)"),
        "metrics-recall": (
            "return within(sampled, real), within(real, sampled)",
            "return within(real, sampled), within(sampled, real)"),
        "metrics-lpips": (".sum(1).mean((1, 2))", ".mean((1, 2, 3))")}),
    ("critical.py", CORE + "critical.py", {
        "critical-flat": ("_pick(-entropy_gradient", "_pick(entropy_gradient"),
        "critical-middle": ("first | ~middle", "first"),
        "critical-self": (".sum(2) - group_size)", ".sum(2) - 1)"),
        "critical-border": ("(0, 0), (0, 1), (0, 2))", "(0, 0), (0, 1))"),
        "critical-weight-clip": ("clamp(-clip, clip)", "clamp(-clip)")}),
    ("model.py", CORE + "model.py", {
        "model-guidance": ("logits = uncond + cfg_scale *", "logits = cond + cfg_scale *"),
        "model-log-n": (".log()[:, :, None, None]", ".log1p()[:, :, None, None]"),
        "model-prefix-order": ("(visible | itself).tril()", "(visible | itself)"),
        "model-future": (".triu(1)", ".triu(2)"),
        "model-same-noise": ("noise[part[0] * B:][:B]", "noise[:B]"),
        "model-sharper": ("logp_all.exp() / -noise", "logp_all.exp() ** 2 / -noise"),
        "model-pieces": ("generator.set_state(state)", "pass"),
        "model-uncond-grad": ("uncond.detach()", "uncond"),
        "model-rotation": ("rotations[t:t + 1]", "rotations[t + 1:t + 2]"),
        "model-temperature": ("logits / temperature if", "logits * temperature if"),
        "model-padding": ("cond = cond * cond_mask[..., None].to(cond.dtype)", "pass")}),
    ("common/llama.py", CORE + "model.py", {
        "llama-top-p": ("mass[:, :-1] >= top_p", "mass[:, 1:] >= top_p"),
        "llama-axes": (
            "torch.cat([angle[:, None].expand(-1, side, -1), angle.expand(side, -1, -1)], 2)",
            "torch.cat([angle.expand(side, -1, -1), angle[:, None].expand(-1, side, -1)], 2)")}),
    ("vqgan.py", f"{CORE}vqgan_by_hand.py {CORE}vqgan.py", {
        "vqgan-padding": ("(0, 1, 0, 1)", "(1, 0, 1, 0)"),
        "vqgan-commit": ("F.mse_loss(unit, code.detach())", "F.mse_loss(unit.detach(), code)"),
        "vqgan-straight": ("unit + (code - unit).detach()", "code"),
        "vqgan-nearest": ("cosine.argmax(2)", "cosine.abs().argmax(2)"),
        "vqgan-entropy": ("+ (mean * (mean", "- (mean * (mean"),
        "vqgan-collage": ("tokens[:B], tokens[:B].flip(0)", "tokens[:B], tokens[:B]"),
        "vqgan-residual": ("return x + self.proj_out(h)", "return self.proj_out(h)")}),
    ("vapi.py", VAPI, {
        "vapi-noise": ("device=tokens.device) < xi", "device=tokens.device) > xi"),
        "vapi-sign": ("-distance(pixels", "distance(pixels"),
        "vapi-mse": ("mse_weight * mse +", "mse +"),
        "vapi-prior-row": ("targets[used])[row]", "targets[used])[0 * row]"),
        "vapi-seeds": ("seeds[image]", "seeds[0]"),
        "vapi-prior-weight": ("cfg.prior_weight * prior", "prior"),
        "vapi-reference-temperature": ("tempered(rho, cfg.temperature", "tempered(rho, 1"),
        "vapi-context": ("Rollout(noisy, None,", "Rollout(targets, None,"),
        "vapi-beta": ("estimator=cfg.estimator, beta=beta", "estimator=cfg.estimator, beta=0.0"),
        "vapi-estimator": ("estimator=cfg.estimator", 'estimator="sampled"')}),
    ("reward.py", f"{CORE}reward.py {COMMON}config.py", {
        "reward-default": ("float(weight or 1)", "float(weight or 0)"),
        "reward-weights": ("sum(w * r for", "sum(r for"),
        "reward-shape": ("found.shape != (len(prompts),)", "False"),
        "reward-copy": ("images.clone()", "images"),
        "reward-heldout": ("& set(parse(cfg.reward, known))", "& set()")}),
    ("evaluate.py", EVALUATE, {
        "evaluate-forward-kl": ("prompts, base.actions", "prompts, actions"),
        "evaluate-forward-swapped": (
            "pipeline, pipeline.reference, policy, prompts",
            "pipeline, policy, pipeline.reference, prompts"),
        "evaluate-kl-per-token": ("kl / len(actions)", "kl / n"),
        "evaluate-kept": ("base and base.results", "None"),
        "evaluate-best": (".view(P, -1, BEST_OF).max(2)", ".view(P, -1, BEST_OF).min(2)"),
        "evaluate-best-heldout": ('rewards["heldout_reward"].view(', 'rewards["reward"].view(')}),
    ("tiny/world.py", EVALUATE, {
        "world-kept": ('base["open_entropy_of"] if base else per_prompt', "per_prompt"),
        "world-counted": ("usable[:COUNTED]", "usable"),
        "world-entropy": ("math.log(n / len(values))", "math.log(n)"),
        "world-category": ("r[rows].mean()", "r.mean()"),
        "world-unseen": ("unseen=True", "unseen=False"),
        "world-unreadable": ("in measured) / len(scenes)", "in measured) / len(prompts)")}),
    ("tiny/world.py", VAPI, {
        "world-captions": ("random() < self.wrong_captions", "random() > self.wrong_captions")}),
    ("tiny/shapes.py", TINY + "shapes.py", {
        "shapes-left": ("lambda a, b: b.x - a.x", "lambda a, b: a.x - b.x"),
        "shapes-relation": ("(*chosen) >= RELATION_MARGIN", "(*chosen) >= -99"),
        "shapes-count": (
            "len(scene.objects) != len(caption.slots)",
            "len(scene.objects) < len(caption.slots)"),
        "shapes-unseen": ("and names_unseen(c) == unseen", ""),
        "shapes-stray": ("stray.float().mean((1, 2)) < .1", "stray.float().mean((1, 2)) < 2."),
        "shapes-fit": ("ERROR_LIMIT = .35", "ERROR_LIMIT = 3.5"),
        "shapes-open": ("if color is None:", "if True:"),
        "shapes-order": ("len(chosen) == 2 and not caption.relation", "False")}),
    ("tiny/judge.py", TINY + "judge.py", {
        "judge-bias": ("captions).T + self.bias", "captions).T"),
        "judge-clamp": ("self.image(images.clamp(-1, 1))", "self.image(images)"),
        "judge-mask": ("* mask[..., None]", "")}),
    ("tiny/text.py", TINY + "text.py", {
        "text-before": ("[len(before) - 1] + ids[:-1]", "ids"),
        "text-padding": ("features[b, -times * len(once):]", "features[b, :times * len(once)]")}),
    ("common/run.py", LOOP, {
        "run-grad-clip": ("self.cfg.grad_clip or math.inf", "math.inf"),
        "run-warmup": ("(step + 1) / n", "step / n"),
        "run-zero-grad": ("optimizer.zero_grad(set_to_none=True)", "pass"),
        "run-cosine": ("math.cos(math.pi * progress)", "math.cos(math.pi / 2 * progress)"),
        "run-betas": ("betas=(.9, .95)", "betas=(.9, .999)"),
        "run-decay": ("weight_decay=cfg.weight_decay", "weight_decay=0.0"),
        "run-random": ('files.set_rng_state(saved["rng"], self.generator)', "pass"),
        "run-due": ("self.done % self.cfg.eval_interval == 0", "self.done % self.cfg.eval_interval == 1"),
        "run-dropout": ("policy.eval()", "policy.train()")}),
    ("common/run.py", COMMON + "runs.py -k finite", {
        "run-not-finite": ("if norm.isfinite():", "if True:")}),
    ("common/files.py", COMMON + "files.py", {
        "files-keep": ("[:-keep]", "[:-keep - 1]"),
        "files-python-stream": ("random.setstate((version, tuple(values), gauss))", "pass"),
        "files-pickle": ("weights_only=True, mmap", "weights_only=False, mmap"),
        "files-log-start": ('["step"] < start', '["step"] <= start')}),
    ("common/files.py", COMMON + "trust.py -k base", {
        "files-made-from": ('saved["made_from"][name] != fingerprint(path)', "False")}),
    ("common/files.py", COMMON + "hostile.py -k flipped_weight", {
        "files-checksum": ("if part := is_zip and", "if part := False and")}),
    ("common/files.py", COMMON + "hostile.py -k NaN", {
        "files-finite": (".isfinite().all()", ".isfinite().any()")}),
    ("common/config.py", COMMON + "config.py", {
        "config-low": ('value < limits["low"]', 'value <= limits["low"]'),
        "config-last-word": ("cls(**values | chosen)", "cls(**chosen | values)"),
        "config-type": ("type(value) is kind", "isinstance(value, kind)")}),
    ("common/config.py", f"{COMMON}config.py {COMMON}old_runs.py", {
        "config-renamed": ("{RENAMED.get(str(key), str(key)): value", "{str(key): value")}),
    ("common/parallel.py", COMMON + "parallel.py", {
        "parallel-gradients": ("dist.all_reduce(p.grad)", "pass"),
        "parallel-sum": ("else values[:, i].sum())", "else values[:, i].mean())")}),
    ("common/lora.py", FULL + "janus.py", {
        "lora-scale": ("self.base(x) + self.scale *", "self.base(x) +"),
        "lora-start": ("self.a.new_zeros(", "self.a.new_ones("),
        "lora-frozen": ("requires_grad_(False)", "requires_grad_(True)")}),
    ("common/lora.py", WEIGHTS, {
        "lora-last": ("linear.b[-n:]", "linear.b[:n]"),
        "lora-merge": ("ALPHA / len(a) * b @ a", "b @ a")}),
    ("full/clip.py", FULL + "clip.py", {
        "clip-pad": ("(size - h) // 2, (size - w) // 2", "(size - h + 1) // 2, (size - w + 1) // 2"),
        "clip-range": (".clamp(-1, 1) + 1) / 2", ".clamp(-1, 1) + 1)"),
        "clip-qkv": ('zip("qkv",', 'zip("kqv",'),
        "clip-negative": ("100 * cosine.clamp(min=0)", "100 * cosine"),
        "clip-transposed": ("value.T if key in", "value if key in"),
        "clip-head": ("weight @ b + bias", "b.mean() + bias")}),
    ("full/weights.py", WEIGHTS, {
        "weights-examine": ("files.examine(state, path)", "pass"),
        "weights-gate": ('"mlp.gate_proj": "feed_forward.w1"', '"mlp.gate_proj": "feed_forward.w3"'),
        "weights-qkv": ("[order(q), order(k), v]", "[order(k), order(q), v]"),
        "weights-ema": ('WRAPPERS = ("model",', 'WRAPPERS = ("ema", "model",')})]
MUTANTS = {name: (path, *texts, tests) for path, tests, group in GROUPS for name, texts in group.items()}


def mutated(name, text=None):
    """Return the text of the mutant's file, or raise ValueError if its old text is not there exactly once."""
    path, old, new, _ = MUTANTS[name]
    if text is None:
        with open(os.path.join(ROOT, path), encoding="utf-8") as file:
            text = file.read()
    if text.count(old) != 1:
        raise ValueError(f"{name}: {path} has {old!r} {text.count(old)} times, and it must have it once")
    return text.replace(old, new)


def run_tests(folder, words):
    """Run pytest in `folder`, in a forked process -> (killed, survived, time-out, or did not run; output)."""
    output = os.path.join(folder, "output.txt")
    sys.stdout.flush()
    if not (child := os.fork()):
        import pytest
        os.setsid()
        os.chdir(folder)
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        signal.alarm(SECONDS)
        os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", f"--rootdir={folder}", *words.split()]))
    _, status = os.waitpid(child, 0)
    try:
        os.killpg(child, signal.SIGKILL)                   # what the tests had started
    except ProcessLookupError:
        pass
    verdict = "time-out" if os.WIFSIGNALED(status) else {0: "survived", 1: "killed"}.get(
        os.WEXITSTATUS(status), "did not run")
    with open(output, encoding="utf-8", errors="replace") as file:
        return verdict, file.read()


def report(verdicts, words):
    """Return the share of killed mutants, and the text of results/mutants.md. verdicts: {name: verdict}."""
    found = list(verdicts.values())
    killed, late = found.count("killed"), found.count("time-out")
    share = (killed + late) / len(found)
    lines = [
        "# Mutants", "",
        f"`python tests/helpers/mutants.py{''.join(' ' + word for word in words)}`, "
        f"{datetime.date.today()}. Its docstring says what a mutant is.", "",
        f"**{killed + late} of {len(found)} mutants are killed: {share:.1%}.** "
        f"{late} of these ended in a time-out.", "",
        "The first run, at commit 0e96a5a, killed 113 of 145 (78 %). Each survivor led to a test.", "",
        "| mutant | file | old text | new text | verdict |", "|---|---|---|---|---|"]
    for name, verdict in verdicts.items():
        path, old, new, _ = MUTANTS[name]
        old, new = (text.replace("|", "\\|") or "(nothing)" for text in (old, new))
        lines.append(f"| {name} | {path} | `{old}` | `{new}` | {verdict} |")
    return share, "\n".join(lines) + "\n"


def main(words):
    """Run the named mutants, or all -> {name: verdict}. SystemExit: a mutant or the tests are bad."""
    import torch                                           # so that the forked processes need not import it
    torch.set_num_threads(1)
    if unknown := set(words) - set(MUTANTS):
        raise SystemExit(f"no mutant {', '.join(sorted(unknown))}; there are: {', '.join(MUTANTS)}")
    wrong, verdicts = [], {}
    for name in MUTANTS:
        try:
            ast.parse(mutated(name))
        except (OSError, ValueError) as error:
            wrong.append(str(error))
        except SyntaxError as error:
            wrong.append(f"{name}: its new text is no Python: {error}")
    if wrong:
        raise SystemExit("\n".join(wrong))
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True             # a mutant may have the size and the second of the file before
    with tempfile.TemporaryDirectory() as temporary:
        folder = os.path.join(temporary, "copy")
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", "__pycache__", "out", "weights"))
        for tests in dict.fromkeys(MUTANTS[name][3] for name in words or MUTANTS):
            start = time.time()
            verdict, output = run_tests(folder, tests)
            if verdict != "survived":
                raise SystemExit(f"{output}\nwithout a mutant, these tests do not pass: {tests} ({verdict})")
            print(f"{'no mutant':28s} {'passes':12s} {time.time() - start:4.0f} s  {tests}", flush=True)
        for name in words or MUTANTS:
            start, path = time.time(), os.path.join(folder, MUTANTS[name][0])
            with open(path, encoding="utf-8") as file:
                original = file.read()
            with open(path, "w", encoding="utf-8") as file:
                file.write(mutated(name, original))
            verdicts[name], output = run_tests(folder, MUTANTS[name][3])
            with open(path, "w", encoding="utf-8") as file:
                file.write(original)
            print(f"{name:28s} {verdicts[name]:12s} {time.time() - start:4.0f} s", flush=True)
            if verdicts[name] == "did not run":
                print(output[-1500:])
    return verdicts


if __name__ == "__main__":
    share, text = report(main(sys.argv[1:]), sys.argv[1:])
    print(text)
    if not sys.argv[1:]:
        with open(os.path.join(ROOT, "results", "mutants.md"), "w", encoding="utf-8") as file:
            file.write(text)
    raise SystemExit(share < GOAL)

"""python -m pytest tests/full/test_janus.py

These tests compare Janus-Pro with transformers' JanusForConditionalGeneration.
"""
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import janus_files
from common import lora
from common.config import UserError
from full import janus, weights
from full.janus import Janus, JanusConfig, Prompts
from vqgan import VQGAN

CAPTIONS = ["a red cat", "a photo of a dog on a blue cat", "dog"]


@pytest.fixture(scope="module")
def theirs():
    return janus_files.transformers_model()


@pytest.fixture(scope="module", params=["official", "hf"])
def folder(request, theirs, tmp_path_factory):
    path = str(tmp_path_factory.mktemp(request.param) / "Janus-Pro-1B")
    janus_files.make(path, theirs, request.param)
    return path


@pytest.fixture(scope="module")
def ours(folder):
    return janus.load(folder, block_size=16)


def uncond(ids, mask):
    """Return the ids of the unconditional branch, as in generation_inference.py: tokens[1:-1] = pad."""
    out = ids.clone()
    for row, seen in zip(out, mask):
        start = int(seen.float().argmax())
        row[start + 1:-1] = 261
    return out


@torch.no_grad()
def their_logits(theirs, ids, mask, tokens):
    """Return logits by teacher forcing with transformers' modules. The last prompt token predicts token 0."""
    inputs = torch.cat([theirs.get_input_embeddings()(ids),
                        theirs.prepare_embeddings_for_image_generation(tokens[:, :-1])], 1)
    mask = torch.cat([mask.long(), torch.ones_like(tokens[:, :-1])], 1)
    position = (mask.cumsum(1) - 1).clamp_min(0)
    hidden = theirs.model.language_model(inputs_embeds=inputs, attention_mask=mask,
                                         position_ids=position).last_hidden_state
    return theirs.model.generation_head(hidden[:, ids.shape[1] - 1:])


# ---- against transformers ------------------------------------------------------------------------------
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_logits_are_those_of_transformers(theirs, ours, folder, scale):
    policy, (ids, mask) = ours[0], Prompts(folder).encode(CAPTIONS)
    assert len(set(mask.sum(1).tolist())) == 3 and not mask[0, 0]   # unequal lengths, padded on the left
    tokens = torch.randint(40, (3, 16), generator=torch.Generator().manual_seed(1))
    expected = their_logits(theirs, ids, mask, tokens)
    if scale > 1:
        free = their_logits(theirs, uncond(ids, mask), mask, tokens)
        expected = free + scale * (expected - free)
    with torch.no_grad():
        logits = policy(tokens, ids, mask, cfg_scale=scale)
    assert expected.std() > .3 and (logits - expected).abs().max() < 1e-5 * scale
    alone = [policy(tokens[i:i + 1], *Prompts(folder).encode([c]), cfg_scale=scale)
             for i, c in enumerate(CAPTIONS)]
    assert (torch.cat(alone) - expected).abs().max() < 1e-5 * scale        # so padding changes nothing


@torch.no_grad()
def test_greedy_images_are_those_of_the_official_loop(theirs, ours, folder):
    """The loop of generation_inference.py has one prompt, no padding, no cache, and one token at a time. The
    batch is compared with transformers' own generate."""
    policy, text = ours[0], Prompts(folder)
    ids, mask = text.encode(CAPTIONS)
    drawn = policy.generate(ids, mask, cfg_scale=5.0, temperature=0)
    for b, caption in enumerate(CAPTIONS):
        row = [256] + text.tokenizer.encode(f"<|User|>: {caption}\n\n<|Assistant|>:").ids + [260]
        both = torch.tensor([row, row[:1] + [261] * (len(row) - 2) + row[-1:]])
        x, tokens = theirs.get_input_embeddings()(both), []
        for _ in range(16):
            hidden = theirs.model.language_model(inputs_embeds=x).last_hidden_state
            cond, free = theirs.model.generation_head(hidden[:, -1])
            tokens.append(int((free + 5 * (cond - free)).argmax()))
            new = theirs.prepare_embeddings_for_image_generation(torch.tensor([[tokens[-1]]] * 2))
            x = torch.cat([x, new], 1)
        assert drawn[b].tolist() == tokens
    assert len(set(drawn.flatten().tolist())) > 5
    config = theirs.generation_config
    config.bos_token_id, config.pad_token_id, config.generation_kwargs = 256, 261, {"boi_token_id": 260}
    assert torch.equal(drawn, theirs.generate(ids, attention_mask=mask.long(), generation_mode="image",
                                              do_sample=False, guidance_scale=5.0))


@torch.no_grad()
def test_tokenizer_is_that_of_transformers(theirs, ours):
    tokens = torch.arange(32).view(2, 16)
    assert (ours[1].decode(tokens) - theirs.model.vqmodel.decode(tokens)).abs().max() < 5e-5
    assert isinstance(ours[1], VQGAN)


@torch.no_grad()
def test_the_first_image_token_is_predicted_at_begin_of_image(theirs, ours, folder):
    """Row t of the logits must not depend on token t. A public trainer has this off by one."""
    policy, (ids, mask) = ours[0], Prompts(folder).encode(CAPTIONS[:1])
    prompt = theirs.model.language_model(input_ids=ids).last_hidden_state[:, -1]
    tokens = torch.randint(40, (1, 16))
    logits = policy(tokens, ids, mask)
    assert (logits[:, 0] - theirs.model.generation_head(prompt)).abs().max() < 1e-5
    for t in range(16):
        other = tokens.clone()
        other[:, t] = (other[:, t] + 7) % 40
        moved = (policy(other, ids, mask) - logits).abs().amax((0, 2))                            # [T]
        assert (moved[:t + 1] == 0).all() and (moved[t + 1:] > 1e-4).all()
    for place in range(ids.shape[1]):                                      # and every prompt token matters
        other = ids.clone()
        other[:, place] = (other[:, place] + 7) % 256
        assert (policy(tokens, other, mask)[:, 0] - logits[:, 0]).abs().max() > 1e-4


# ---- one policy, many ways to run it -------------------------------------------------------------------
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_sampling_is_teacher_forcing_and_sharing_changes_nothing(ours, folder, scale):
    policy, (ids, mask) = ours[0], Prompts(folder).encode(CAPTIONS)
    prompt = torch.tensor([0, 0, 0, 1, 2, 2])
    sampling = dict(cfg_scale=scale, temperature=.9)

    def draw(*batch, part=(0, 1)):
        return policy.generate(*batch, generator=torch.Generator().manual_seed(3), return_logp=True,
                               part=part, **sampling)
    tokens, logp = draw(ids, mask, prompt)
    forced = policy(tokens, ids, mask, prompt, **sampling).log_softmax(-1)
    forced = forced.gather(2, tokens[..., None])[..., 0]
    assert (forced - logp).abs().max() < 1e-4 and logp.std() > .3 and len(tokens.unique(dim=0)) == 6
    apart = draw(ids[prompt], mask[prompt])
    assert torch.equal(apart[0], tokens) and (apart[1] - logp).abs().max() < 1e-4
    halves = [draw(ids, mask, prompt[i:i + 3], part=(i // 3, 2)) for i in (0, 3)]
    assert torch.equal(torch.cat([t for t, _ in halves]), tokens)


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_gradients_do_not_depend_on_recomputing_nor_on_sharing(ours, folder, scale):
    policy, (ids, mask) = ours[0], Prompts(folder).encode(CAPTIONS)
    prompt, tokens = torch.tensor([0, 0, 2, 1]), torch.randint(40, (4, 16))

    def gradients(*batch):
        policy.zero_grad()
        policy(tokens, *batch, cfg_scale=scale).log_softmax(-1)[..., 0].sum().backward()
        return {k: p.grad.clone() for k, p in policy.named_parameters()}
    plain, apart = gradients(ids, mask, prompt), gradients(ids[prompt], mask[prompt])
    policy.recompute = True
    again = gradients(ids, mask, prompt)
    policy.recompute = False
    policy.zero_grad()
    for key, g in plain.items():
        assert g.abs().max() > 0 and torch.equal(again[key], g), key
        assert (apart[key] - g).abs().max() <= 1e-4 * g.abs().max(), key


@pytest.mark.parametrize("change, message", [
    (dict(cond=torch.zeros(1, 5)), "prompt ids"), (dict(cond=torch.zeros(1, 5, 3).long()), "prompt ids"),
    (dict(cond_mask=torch.ones(1, 4)), r"cond_mask must be \[1,5\]"), (dict(cfg_scale=.5), "cfg_scale"),
    (dict(prompt=torch.zeros(1)), "prompt must be indices"),
    (dict(tokens=torch.zeros(2, 16).long()), "tokens")])
def test_wrong_arguments(change, message):
    policy = Janus(JanusConfig(dim=16, n_layer=1, n_head=2, vocab_size=8, head_dim=8, block_size=16, words=9,
                               pad_id=0))
    good = dict(tokens=torch.zeros(1, 16).long(), cond=torch.zeros(1, 5).long(), cond_mask=torch.ones(1, 5))
    with pytest.raises(ValueError, match=message):
        policy(**good | change)
    with pytest.raises(ValueError, match="must be a square"):
        Janus(JanusConfig(block_size=15))


# ---- files ---------------------------------------------------------------------------------------------
def test_layouts_shards_and_precisions_hold_the_same(theirs, tmp_path, capsys):
    states = []
    for i, (layout, shards) in enumerate((("official", 1), ("official", 3), ("hf", 1), ("hf", 2))):
        path = str(tmp_path / str(i))
        janus_files.make(path, theirs, layout, shards)
        policy, vqgan = janus.load(path)
        assert policy.config.block_size == (576 if layout == "official" else 16) and not policy.training
        assert policy.config.pad_id == 261 and policy.config.n_head == 4 and policy.config.norm_eps == 1e-6
        states.append(policy.state_dict() | {f"vq.{k}": v for k, v in vqgan.state_dict().items()})
        assert "left out" in capsys.readouterr().out
    assert len([n for n in (tmp_path / "3").iterdir() if n.suffix == ".safetensors"]) > 1
    for other in states[1:]:
        assert other.keys() == states[0].keys()
        assert all(torch.equal(other[k], v) for k, v in states[0].items())
    half = janus.load(str(tmp_path / "0"), dtype="bfloat16")[0]
    assert all(torch.equal(p, states[0][k].bfloat16()) for k, p in half.named_parameters())


def test_the_pad_token_is_that_of_the_tokenizer(theirs, tmp_path):
    """The id differs between 1B and 7B."""
    special = janus_files.SPECIAL[-1:] + janus_files.SPECIAL[:-1]
    janus_files.make(str(tmp_path), theirs, "official", special=special)
    assert janus.load(str(tmp_path))[0].config.pad_id == 256 == Prompts(str(tmp_path)).pad


def test_prompts_say_what_the_chat_template_says(folder):
    text = Prompts(folder)
    ids, mask = text.encode(["  a red cat ", "a photo of a dog: {x}"])
    said = [text.tokenizer.decode(row[seen].tolist(), skip_special_tokens=False)
            for row, seen in zip(ids, mask)]
    assert said == [janus_files.START + f"<|User|>: {c}\n\n<|Assistant|>:" + janus_files.IMAGE
                    for c in ("a red cat", "a photo of a dog: {x}")]
    assert (ids[~mask] == 261).all() and mask[1].all()
    assert mask[0].tolist() == [False] * 12 + [True] * (ids.shape[1] - 12)
    assert ids[0, 12] == 256 and (ids[:, -1] == 260).all()


def damage(path, how):
    if how == "tensor gone":
        state = torch.load(path / "pytorch_model.bin")
        del state["language_model.model.layers.1.self_attn.k_proj.weight"]
        torch.save(state, path / "pytorch_model.bin")
    elif how == "heads":
        (path / "config.json").write_text('{"language_config": {"num_attention_heads": 7}}')
    elif how == "other model":
        torch.save({"tok_embeddings.weight": torch.zeros(2, 2)}, path / "pytorch_model.bin")
    elif how == "other tokenizer":
        janus_files.tokenizer(special=("<s>",)).save(str(path / "tokenizer.json"))
    elif how == "torn tokenizer":
        (path / "tokenizer.json").write_text("{")
    else:
        (path / how).unlink()


@pytest.mark.parametrize("how, message", [
    ("tensor gone", "'layers.1.attention.wqkv.weight' should be"), ("heads", "n_head"),
    ("other model", "does not look like a file for JanusConfig"), ("other tokenizer", "is not Janus-Pro's"),
    ("torn tokenizer", "is no tokenizer"), ("tokenizer.json", "json is no tokenizer .*No such file"),
    ("pytorch_model.bin", "no weights at")])
def test_errors_are_one_line(theirs, tmp_path, how, message):
    janus_files.make(str(tmp_path), theirs, "official")
    damage(tmp_path, how)
    with pytest.raises(UserError, match=message) as error:
        janus.load(str(tmp_path))
    assert "\n" not in str(error.value)


def test_sizes_of_the_released_models():
    """Count the parameters of both models by transformers, with a separate matrix for the logits of words.
    Count the parts that we load as well."""
    import transformers as t
    for name, c in (("Janus-Pro-1B", JanusConfig()),
                    ("Janus-Pro-7B", JanusConfig(dim=4096, n_layer=30, n_head=32, head_dim=4096))):
        inner = {2048: 5632, 4096: 11008}[c.dim]
        with torch.device("meta"):
            theirs = t.JanusForConditionalGeneration(t.JanusConfig(
                text_config=t.LlamaConfig(vocab_size=102400, hidden_size=c.dim, intermediate_size=inner,
                                          num_hidden_layers=c.n_layer, num_attention_heads=c.n_head),
                vision_config=t.JanusVisionConfig(projection_dim=c.dim),
                vq_config=t.JanusVQVAEConfig(projection_dim=c.dim, image_token_embed_dim=c.dim)))
        count = sum(p.numel() for p in theirs.parameters()) + theirs.lm_head.weight.numel()
        assert weights.RELEASED[name][0] == 2 * count
        part = [theirs.model.language_model, theirs.model.generation_embeddings,
                theirs.model.generation_aligner, theirs.model.generation_head]
        with torch.device("meta"):
            ours = Janus(c)
        assert sum(t.numel() for t in ours.state_dict().values()) == sum(
            p.numel() for m in part for p in m.parameters())


# ---- adapters ------------------------------------------------------------------------------------------
def test_adapters_share_the_weights_and_start_as_the_base(ours, folder):
    base, (ids, mask) = janus.load(folder)[0], Prompts(folder).encode(CAPTIONS)
    policy, tokens = lora.adapt(base, 4), torch.randint(40, (3, 16))
    assert torch.equal(policy(tokens, ids, mask), base(tokens, ids, mask))
    own = {id(p) for p in policy.parameters()} - {id(p) for p in base.parameters()}
    trained = {id(p) for p in policy.parameters() if p.requires_grad}
    assert own == trained and len(own) == 2 * 5 * 2 and not any(p.requires_grad for p in base.parameters())
    # Compare W + (alpha / rank) B A with a Janus whose W is replaced by this sum.
    merged = janus.load(folder)[0]
    with torch.no_grad():
        for (name, module), seed in zip(policy.named_modules(), range(1000)):
            if isinstance(module, lora.LowRank):
                module.b.normal_(0, .1, generator=torch.Generator().manual_seed(seed))
                merged.get_submodule(name).weight += 32 / 4 * module.b @ module.a
        moved = policy(tokens, ids, mask)
        assert (moved - merged(tokens, ids, mask)).abs().max() < 1e-4
        assert (moved - base(tokens, ids, mask)).abs().max() > 1e-2

"""Decoders of Hugging Face whose cache carries the experts' state: the tokens of no cache."""

import copy

import pytest
import torch

from segmoe_kernels import replace_ffn
from segmoe_kernels.models.cached import enable_cache

transformers = pytest.importorskip("transformers")

NEW = {"max_new_tokens": 10, "pad_token_id": 0}
MODES = {
    "greedy": {},
    "sampled": {"do_sample": True},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "prompt_in_chunks": {"prefill_chunk_size": 3},
}


def decoder(kind="Llama", **options):
    """A decoder with causal experts; wide initial weights, so that texts vary."""
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.5, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    options = {"segment_sizes": "4,3", "top_k": 2, "shared_expert": "token", **options}
    with pytest.warns(UserWarning, match=r"segmoe_kernels.models.cached.enable_cache"):
        replace_ffn(model, num_experts=4, causal=True, **options)
    return model


def generate(model, ids, **options):
    torch.manual_seed(1)
    return model.generate(ids, **{"do_sample": False, **NEW, **options})


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 60, (3, 7), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Mistral"])
def test_cached_text_is_that_of_no_cache(kind, ids):
    model = decoder(kind)
    modes = MODES if kind == "Llama" else {"greedy": {}}
    whole = [{k: v for k, v in o.items() if k != "prefill_chunk_size"} for o in modes.values()]
    expected = [generate(model, ids, **options) for options in whole]
    calls = []
    enable_cache(model)
    model.model.layers[0].mlp.register_forward_pre_hook(lambda _, x: calls.append(x[0].shape[1]))
    for options, text in zip(modes.values(), expected, strict=True):
        calls.clear()
        assert torch.equal(generate(model, ids, **options), text)
        assert calls[-9:] == [1] * 9
    assert torch.equal(generate(copy.deepcopy(model), ids), expected[0])
    assert len(text[0].unique()) > 6


@pytest.mark.parametrize("use_cache", [True, False])
def test_padded_batch_gives_each_text_what_it_has_alone(use_cache, ids):
    model = decoder()
    alone = [generate(model, ids[i : i + 1, 2 * i :]) for i in range(3)]
    enable_cache(model)
    mask = torch.arange(7) >= torch.tensor([[0], [2], [4]])
    text = generate(model, ids * mask, attention_mask=mask.long(), use_cache=use_cache)
    for i, own in enumerate(alone):
        assert torch.equal(text[i : i + 1, 2 * i :], own)


@torch.no_grad()
def test_caches_go_on_in_turns_and_change_with_their_batch(ids):
    model = decoder()
    whole = model(ids).logits
    enable_cache(model)
    enable_cache(model)  # once more changes nothing
    first, other = model(ids[:, :5]), model(ids[:1, :2], use_cache=True)
    kept = copy.deepcopy(first.cache)
    for cache, rows, start in ((first.cache, 3, 5), (kept, 3, 5), (other.cache, 1, 2)):
        logits = model(ids[:rows, start:], cache=cache).logits
        torch.testing.assert_close(logits, whole[:rows, start:], rtol=1e-4, atol=1e-5)
    cache = model(ids[:, :5]).cache
    cache.batch_select_indices(torch.tensor([2, 1]))
    cache.batch_repeat_interleave(2)
    logits = model(ids[[2, 2, 1, 1], 5:], cache=cache).logits
    torch.testing.assert_close(logits, whole[[2, 2, 1, 1], 5:], rtol=1e-4, atol=1e-5)
    cache.reset()
    torch.testing.assert_close(model(ids[:2], cache=cache).logits, whole[:2], rtol=1e-4, atol=1e-5)


def test_training_is_as_before(ids):
    model = decoder(aux_loss_weight=0.1).train()
    loss = model(ids, labels=ids).loss
    enable_cache(model)
    mask = torch.ones_like(ids)
    for options in ({}, {"attention_mask": mask}, {"use_cache": False}):
        assert torch.equal(model(ids, labels=ids, **options).loss, loss)


@torch.no_grad()
def test_what_would_lose_a_state_is_refused(ids):
    model = decoder()
    enable_cache(model)
    cache = model(ids).cache
    cache.crop(-2)
    with pytest.raises(ValueError, match=r"expected cache to hold the tokens .* got 5 tokens"):
        model(ids[:, 5:], cache=cache)
    with pytest.raises(ValueError, match=r"expected attention_mask to have shape \(B, T\)"):
        generate(model, ids, cache_implementation="static")
    # A call that broke leaves no half of a state.
    cache, layer = model(ids[:, :4]).cache, model.model.layers[1].mlp
    layer.top_k = 9
    with pytest.raises(ValueError, match="topk_weights"):
        model(ids[:, 4:], cache=cache)
    layer.top_k = 2
    with pytest.raises(ValueError, match=r"got 7 tokens, of which 4 were seen"):
        model(ids[:, 4:], cache=cache)
    torch.testing.assert_close(model(ids).logits, model(ids, use_cache=False).logits)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_decoders_run_without_a_cache(ids):
    model = decoder()
    enable_cache(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids).logits)
    with pytest.raises(Exception, match="expected cache to be None in compiled code"):
        compiled(ids, cache=transformers.DynamicCache(config=model.config))

"""`replace_ffn` in models of Hugging Face: what is left, needs a word, or is switched off."""

import copy

import pytest
import torch
from test_swap import F_, D, T
from test_swap_refusals import SIZES, unchanged

from segmoe_kernels import replace_ffn


def llama(layers=1):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=D, intermediate_size=F_, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=2, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def test_shared_expert_of_qwen_is_left():
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2MoeConfig(
        hidden_size=D, intermediate_size=32, moe_intermediate_size=8, num_hidden_layers=1,
        shared_expert_intermediate_size=16, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=20, num_experts=4, num_experts_per_tok=2, eos_token_id=0,
    )  # fmt: skip
    model = transformers.Qwen2MoeModel(config)
    message = unchanged(model, replace_ffn, causal=True, **SIZES)
    assert "'layers.0.mlp.shared_expert' (Qwen2MoeMLP): is inside the mixture" in message


def test_decoder_needs_a_word_on_causality():
    model = llama()
    ids = torch.randint(1, 50, (2, T))
    message = unchanged(model, replace_ffn, **SIZES)
    assert (
        "expected causal to be True or False for the decoder around 'model.layers.0.mlp'" in message
    )
    message = unchanged(model, replace_ffn, causal=False, example_inputs=(ids,), **SIZES)
    assert "causality, got experts at 'model.layers.0.mlp'" in message
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with pytest.warns(UserWarning, match="use_cache"):
        assert replace_ffn(model, causal=True, example_inputs=inputs, **SIZES)
    token_wise = llama()
    assert replace_ffn(token_wise, segment_sizes=1, num_experts=2)  # nothing to leak
    assert token_wise.config.use_cache


def test_only_the_decoder_of_two_stacks_must_not_look_ahead():
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=20, d_model=D, d_ff=F_, d_kv=8, num_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    model = transformers.T5Model(config)
    parts = {"up": "wi_1", "gate": "wi_0", "down": "wo", "activation": "act", "dropout": "dropout"}
    message = unchanged(model, replace_ffn, parts=parts, **SIZES)
    assert "for the decoder around 'decoder.block.0" in message
    with pytest.warns(UserWarning, match="switched use_cache off"):
        names = replace_ffn(model, parts=parts, match="encoder.*Dense.*", **SIZES)
    assert names == ["encoder.block.0.layer.1.DenseReluDense"]


@pytest.mark.parametrize("size", [1, 4])
def test_cache_is_switched_off_and_none_let_in(size):
    model = llama(2).eval()
    with pytest.warns(UserWarning, match="switched use_cache off in config and generation_config"):
        replace_ffn(model, **{**SIZES, "segment_sizes": size}, causal=True)
    assert model.config.use_cache is model.generation_config.use_cache is False
    ids = torch.randint(1, 50, (1, 6))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    text = model.generate(ids, **options)
    for _ in range(6):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(text, ids)
    for caller in (model, model.model, copy.deepcopy(model)):
        with pytest.raises(ValueError, match="expected use_cache to be False, as segments begin"):
            caller(ids, use_cache=True)
        with pytest.raises(ValueError, match="expected past_key_values to be None"):
            caller(ids[:, -1:], past_key_values=object())
    with pytest.raises(ValueError, match="expected use_cache to be False"):
        model.generate(ids, use_cache=True, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"use_cls_token": True}, {"loss": "nll"}])
def test_patchtst_keeps_its_properties(options, dtype):
    """Also where a fresh model's outputs depend on the order of steps by a few 1e-4 only."""
    transformers = pytest.importorskip("transformers")
    config = transformers.PatchTSTConfig(
        num_input_channels=3, context_length=64, patch_length=8, patch_stride=8, d_model=D,
        ffn_dim=F_, num_hidden_layers=2, num_attention_heads=2, prediction_length=8, **options,
    )  # fmt: skip
    model = transformers.PatchTSTForPrediction(config).to(dtype)
    before = {w: w.data_ptr() for w in model.parameters()}
    inputs = {"past_values": torch.randn(3, 64, 3).to(dtype)}
    names = replace_ffn(model, example_inputs=inputs, **SIZES)
    assert names == [f"model.encoder.layers.{i}.ff" for i in range(2)]
    after = list(model.parameters())
    assert {w.dtype for w in after} == {dtype}
    assert all(before.get(w, w.data_ptr()) == w.data_ptr() for w in after)

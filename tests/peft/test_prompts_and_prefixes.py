"""Virtual tokens and prefixes: their start, their place in padded and mixed batches, generation with a cache."""

from __future__ import annotations

import pytest
import torch

from qlora_kernels import peft
from qlora_kernels.peft import PeftModel, get_peft_model
from qlora_kernels.peft.attention.prompt_layout import PromptLayout
from tests.peft.models import batch, heads, logits, make, randomize
from tests.support.tolerances import assert_same_function, model_error


def test_prompt_inits():
    embeddings = make("llama").model.embed_tokens.weight

    def prompt(**options):
        config = peft.PromptTuningConfig(num_virtual_tokens=5, **options)
        return get_peft_model(make("llama"), config).injector.adapters["default"][0].prompt()

    assert prompt().abs().max() <= 0.5
    sampled = prompt(prompt_tuning_init="SAMPLE_VOCAB", sample_vocab_size=7)
    assert all((row == embeddings[:7]).all(1).any() for row in sampled)
    text = prompt(prompt_tuning_init="TEXT", init_token_ids=[3, [4, 6]])
    mean = (embeddings[4] + embeddings[6]) / 2
    assert_same_function(text, torch.stack([embeddings[3], mean, embeddings[3], mean, embeddings[3]]), products=1)
    config = peft.PromptTuningConfig.from_text("a b", lambda text: {"input_ids": [len(w) for w in text.split()]})
    assert (config.num_virtual_tokens, config.init_token_ids) == (2, [1, 1])
    with pytest.raises(ValueError, match="from_text"):
        prompt(prompt_tuning_init="TEXT")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_lstm_of_p_tuning_computes_without_autocast(dtype):
    """oneDNN's LSTM takes no fp16 on a CPU, and bf16 only with AVX-512."""
    config = peft.PTuningConfig(num_virtual_tokens=5, encoder_reparameterization_type="LSTM")
    encoder = get_peft_model(make("llama"), config).injector.adapters["default"][0].module
    seen = []
    encoder.lstm.register_forward_hook(lambda _module, _x, outputs: seen.append(outputs[0]))
    plain = encoder()
    with torch.autocast("cpu", dtype=dtype):
        prompt = encoder()
    prompt.float().sum().backward()
    assert [h.dtype for h in seen] == [torch.float32, torch.float32]
    assert_same_function(seen[1], seen[0], products=1)
    assert prompt.shape == plain.shape
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in encoder.parameters())


def test_prompt_layout():
    long, short = torch.ones(3, 2), 2 * torch.ones(1, 2)
    x = torch.arange(1.0, 5)[None, :, None].expand(3, 4, 2)
    for side, rows in (
        ("left", [[1, 1, 1, 1, 2, 3, 4], [0, 0, 2, 1, 2, 3, 4], [0, 0, 0, 1, 2, 3, 4]]),
        ("right", [[1, 1, 1, 1, 2, 3, 4], [2, 1, 2, 3, 4, 0, 0], [1, 2, 3, 4, 0, 0, 0]]),
    ):
        layout = PromptLayout.of([[long], [short], []], side)
        joined = layout.join(layout.front, x)
        assert joined[..., 0].tolist() == rows
        assert torch.equal(layout.tokens(joined), x)
        assert torch.equal(layout.mask(None, 4).bool(), joined[..., 0] != 0)


def test_placeholders_determine_positions_of_virtual_tokens():
    config = peft.PTuningConfig(num_virtual_tokens=2, placeholder_token_id=3)
    model = get_peft_model(make("llama"), config).eval()
    ids = torch.tensor([[3, 7, 3, 9], [8, 3, 3, 9]])
    prompt = model.injector.adapters["default"][0].prompt()
    embeds = model.get_input_embeddings()(ids).detach().clone()
    for row, places in enumerate(((0, 2), (1, 2))):
        embeds[row, list(places)] = prompt
    assert_same_function(model(ids).logits, model.base_model(inputs_embeds=embeds).logits)
    generated = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(generated[:, :4], ids)
    assert torch.equal(generated[:, 4], model(ids).logits[:, -1].argmax(-1))
    with pytest.raises(ValueError, match=r"must have 2 placeholders, got \[1, 2\]"):
        model(torch.tensor([[3, 7], [3, 3]]))


def test_prompts_of_several_tasks_generate_in_one_batch():
    """Rows of different prompt length, one with LoRA and one of the base, equal separate calls, also with beams."""
    model = PeftModel(make("llama")).eval()
    configs = {
        "long": peft.PromptTuningConfig(num_virtual_tokens=6),
        "short": peft.PTuningConfig(num_virtual_tokens=2),
        "lora": peft.LoraConfig(),
        "prefix": peft.PTuningV2Config(num_virtual_tokens=3),
    }
    for i, (name, config) in enumerate(configs.items()):
        model.add_adapter(name, config)
        model.set_adapter(name)
        randomize(model, seed=i)
    names = [*configs, "__base__"]
    inputs = batch("llama", rows=len(names))
    for beams in (1, 2):
        options = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams}
        mixed = model.generate(**inputs, adapter_names=names, **options)
        for i, name in enumerate(configs):
            model.set_adapter(name)
            alone = model.generate(**{k: v[i : i + 1] for k, v in inputs.items()}, **options)
            assert torch.equal(mixed[i : i + 1], alone), name


def test_manual_decode_loop_applies_prompt_once():
    inputs = batch("llama", rows=2)
    for config in (peft.PromptTuningConfig(num_virtual_tokens=3), peft.PTuningV2Config(num_virtual_tokens=3)):
        model = get_peft_model(make("llama"), config).eval()
        ids = inputs["input_ids"]
        whole = model(ids).logits
        first = model(ids[:, :4], use_cache=True)
        rest = model(ids[:, 4:], attention_mask=torch.ones_like(ids), past_key_values=first.past_key_values)
        assert_same_function(torch.cat([first.logits, rest.logits], 1), whole)


def test_padded_batches():
    """Padding to the right of a row, or to its left in generation, does not change outputs."""
    for config in (peft.PromptTuningConfig(num_virtual_tokens=3), peft.PTuningV2Config(num_virtual_tokens=3)):
        model = get_peft_model(make("llama"), config).eval()
        ids = batch("llama", rows=2)["input_ids"]
        mask = torch.ones_like(ids)
        mask[1, 4:] = 0
        alone = model(ids[1:, :4]).logits
        assert_same_function(model(ids, attention_mask=mask).logits[1:, :4], alone)
        left, left_mask = torch.roll(ids, 3, 1), torch.roll(mask, 3, 1)
        padded = model.generate(left, attention_mask=left_mask, max_new_tokens=4, do_sample=False)[1:, 7:]
        single = model.generate(ids[1:, :4], max_new_tokens=4, do_sample=False)[:, 4:]
        assert torch.equal(padded, single)


def test_prefixes_reach_encoder_decoder_and_cross_attention():
    inputs = batch("t5")
    base = make("t5")
    encoder = base.encoder(inputs["input_ids"]).last_hidden_state
    for site in ("encoder", "decoder", "cross"):
        model = get_peft_model(make("t5"), peft.PTuningV2Config(num_virtual_tokens=3, sites=[site])).eval()
        states = model.base_model.encoder(inputs["input_ids"]).last_hidden_state
        assert ((states - encoder).abs().max() < model_error() * encoder.abs().max()) == (site != "encoder")
        assert not torch.allclose(logits(model, inputs), logits(base, inputs), atol=1e-3)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_prefixes_from_words_equal_reading_the_words(kind):
    """At the start, a decoder computes what it computes after reading the words, with the same positions."""
    base, ids = make(kind), batch(kind)["input_ids"]
    words = torch.tensor([[5, 9, 2, 5]])
    with torch.no_grad():
        expected = base(torch.cat([words.expand(3, -1), ids], 1)).logits[:, 4:]
    config = peft.PTuningV2Config.from_text("a b c a", lambda text: {"input_ids": words[0].tolist()})
    model = get_peft_model(base.train(), config)
    assert base.training
    assert_same_function(model.eval()(ids).logits, expected)
    assert model.peft_config["default"].num_virtual_tokens == 4


def test_prefixes_from_words_repeat_and_are_checked():
    model = get_peft_model(make("bert"), peft.PTuningV2Config(num_virtual_tokens=3, init_token_ids=[7, 7]))
    (encoder,) = model.injector.adapters["default"][0].prefixes.values()
    keys, values = encoder(0)
    embeddings = make("bert").bert.embeddings(torch.tensor([[7, 7, 7]]))
    attention = make("bert").bert.encoder.layer[0].attention.self
    assert_same_function(keys, heads(attention.key(embeddings))[0], products=4)
    assert_same_function(values, heads(attention.value(embeddings))[0], products=4)
    with pytest.raises(ValueError, match="prefix_projection must be False"):
        peft.PrefixTuningConfig(init_token_ids=[7])
    for kind in ("t5", "torch"):
        with pytest.raises(ValueError, match="init_token_ids: the model must be"):
            get_peft_model(make(kind), peft.PTuningV2Config(init_token_ids=[7]))


def test_eager_attention_has_prefixes_too():
    inputs = batch("llama")
    outputs = []
    for implementation in ("sdpa", "eager"):
        base = make("llama")
        base.set_attn_implementation(implementation)
        model = get_peft_model(base, peft.PTuningV2Config(num_virtual_tokens=3)).eval()
        outputs.append(logits(model, inputs))
        model.unload()
        assert base.config._attn_implementation == implementation
        torch.manual_seed(0)
    assert_same_function(*outputs)

"""Tied embeddings and heads: flags, files and weights are consistent in every order of operations."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import qlora_kernels as qk
from qlora_kernels.peft import FullFTConfig, LoraConfig, PeftModel, get_peft_model
from tests.peft.models import HIDDEN, VOCAB, batch, logits, randomize
from tests.support.tolerances import assert_same_function

pytestmark = pytest.mark.filterwarnings("ignore:.*(was tied to another layer|embeddings have)")

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PARTS = {
    "head": {"modules_to_save": ["lm_head"]},
    "embedding": {"modules_to_save": ["embed_tokens"]},
    "both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "lora on the head": {"target_modules": ["q_proj", "lm_head"]},
    "lora on the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "lora on both": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "neither": {},
}


def tied(seed=0):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 32, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, tie_word_embeddings=True)).eval()


def adapted(options, config=LoraConfig):
    model = get_peft_model(tied(), config(**{"target_modules": ["q_proj"], "r": 2, **options})).eval()
    randomize(model)
    return model


def ours_and_theirs(hf_peft):
    return PeftModel.from_pretrained, hf_peft.PeftModel.from_pretrained


@pytest.mark.parametrize("order", ["save", "quantize, save", "tie, save", "resize, save", "quantize first"])
@pytest.mark.parametrize("part", PARTS)
def test_a_merged_model_reloads(tmp_path, part, order):
    from transformers import AutoModelForCausalLM

    base = tied()
    if order == "quantize first":
        qk.replace_linear(base, targets=["v_proj"])
    model = get_peft_model(base, LoraConfig(**{"target_modules": ["q_proj"], "r": 2, **PARTS[part]})).eval()
    randomize(model)
    inputs = batch("llama")
    expected = logits(model, inputs)
    merged = model.merge_and_unload()
    assert_same_function(logits(merged, inputs), expected)
    same = merged.lm_head.weight is merged.model.embed_tokens.weight
    assert same == (part in ("both", "neither"))
    assert merged.config.tie_word_embeddings == same
    if order == "quantize, save":
        report = qk.replace_linear(merged, skip=())
        assert ("lm_head" in report.replaced) != same
        quantized = logits(merged, inputs)
        merged.tie_weights()
        assert_same_function(logits(merged, inputs), quantized)
        return
    if order == "quantize first":
        merged.tie_weights()
        assert_same_function(logits(merged, inputs), expected)
        return
    if order == "tie, save":
        merged.tie_weights()
    if order == "resize, save":
        merged.resize_token_embeddings(VOCAB + 2)
    merged.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert_same_function(logits(again, inputs)[..., :VOCAB], expected)


def test_unload_keeps_tied_weights():
    for part in PARTS.values():
        base = adapted(part).unload()
        assert base.lm_head.weight is base.model.embed_tokens.weight
        assert base.config.tie_word_embeddings
        assert base.all_tied_weights_keys


@pytest.mark.parametrize("part", ["head", "embedding", "both"])
def test_our_files_in_both(hf_peft, tmp_path, part):
    model, inputs = adapted(PARTS[part]), batch("llama")
    model.save_pretrained(tmp_path)
    for load in ours_and_theirs(hf_peft):
        assert_same_function(logits(load(tied(), tmp_path).eval(), inputs), logits(model, inputs))


@pytest.mark.parametrize("ensure", [False, True])
@pytest.mark.parametrize("part", PARTS)
def test_their_files_in_both(hf_peft, tmp_path, part, ensure):
    """PEFT trains two copies of tied modules, which may differ, unless ensure_weight_tying is set."""
    options = {"target_modules": ["q_proj"], "r": 2, **copy.deepcopy(PARTS[part])}  # PEFT changes the lists
    if ensure and part == "lora on the head":
        pytest.skip("PEFT ties heads to embeddings only")
    theirs = hf_peft.get_peft_model(tied(), hf_peft.LoraConfig(**options, ensure_weight_tying=ensure)).eval()
    randomize(theirs)
    inputs = batch("llama")
    expected = logits(theirs, inputs).detach()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = PeftModel.from_pretrained(tied(), tmp_path / "theirs")
    assert_same_function(logits(ours, inputs), expected)
    ours.save_pretrained(tmp_path / "ours")
    for load in ours_and_theirs(hf_peft):
        assert_same_function(logits(load(tied(), tmp_path / "ours").eval(), inputs), expected)
    assert_same_function(logits(ours.merge_and_unload(), inputs), expected)


@pytest.mark.parametrize("part", ["head", "embedding", "both"])
def test_ensure_weight_tying_trains_both_ends_as_one(hf_peft, tmp_path, part):
    model, inputs = adapted({**PARTS[part], "ensure_weight_tying": True}), batch("llama")
    with_copy = model.injector.adapters["default"][0].overrides.copies
    assert with_copy[EMBED] is with_copy[HEAD]
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path)
    assert {f"base_model.model.{key}" for key in (EMBED, HEAD)} <= load_file(
        tmp_path / "adapter_model.safetensors"
    ).keys()
    for load in ours_and_theirs(hf_peft):
        assert_same_function(logits(load(tied(), tmp_path).eval(), inputs), expected)
    merged = model.merge_and_unload()
    assert merged.config.tie_word_embeddings
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert_same_function(logits(merged, inputs), expected)


@pytest.mark.parametrize("part", ["lora on the head", "lora on the embedding", "lora on both"])
def test_ensure_weight_tying_trains_one_lora(hf_peft, tmp_path, part):
    model, inputs = adapted({**PARTS[part], "ensure_weight_tying": True}), batch("llama")
    trained = dict(model.adapters["default"].named_parameters())
    assert [name for name in trained if "q_proj" not in name] == [
        "0.model.embed_tokens.lora_embedding_A",
        "0.model.embed_tokens.lora_embedding_B",
    ]
    expected = logits(model, inputs)
    update = model.injector.adapters["default"][0].deltas["model.embed_tokens"]
    lora_A, lora_B, scaling = update.lowrank()
    tied_weight = model.base_model.lm_head.base_layer.weight + scaling * (lora_B @ lora_A).T
    reference = tied()
    with torch.no_grad():
        reference.lm_head.weight.copy_(tied_weight)
        q_proj, q = reference.model.layers[0].self_attn.q_proj, model.injector.adapters["default"][0].deltas
        q_proj.weight += q["model.layers.0.self_attn.q_proj"].merged(q_proj.weight, q_proj) - q_proj.weight
    assert_same_function(expected, logits(reference, inputs))
    model.save_pretrained(tmp_path / "ours")
    for load in ours_and_theirs(hf_peft):
        loaded = load(tied(), tmp_path / "ours").eval()
        assert_same_function(logits(loaded, inputs), expected)
    for again in (copy.deepcopy(model), PeftModel.from_pretrained(tied(), tmp_path / "ours", is_trainable=True)):
        again.load_state_dict(model.state_dict())
        assert_same_function(logits(again.eval(), inputs), expected)
        again(**inputs, labels=inputs["input_ids"]).loss.backward()
        own = again.injector.adapters["default"][0].deltas
        assert own["lm_head"].lora_embedding_A is own["model.embed_tokens"].lora_embedding_A
        assert own["lm_head"].lora_embedding_A.grad.abs().sum(0).count_nonzero() == VOCAB
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert merged.config.tie_word_embeddings
    assert_same_function(logits(merged, inputs), expected)


def test_one_lora_for_all_ends_of_t5():
    """Its `shared` is never called; both stacks and the head have the table."""
    from tests.peft.models import make

    base = make("t5")
    base.config.tie_word_embeddings = True
    base.tie_weights()
    config = LoraConfig(r=2, target_modules=["encoder.embed_tokens"], ensure_weight_tying=True)
    model = get_peft_model(base, config)
    ends = ["encoder.embed_tokens", "decoder.embed_tokens", "lm_head"]
    assert sorted(model.injector.adapters["default"][0].deltas) == sorted(ends)
    assert len(list(model.adapters["default"].parameters())) == 2


def test_tied_lora_requires_equal_ranks():
    with pytest.raises(ValueError, match="must have one rank with ensure_weight_tying, got 4 for lm_head and 2"):
        adapted({**PARTS["lora on both"], "ensure_weight_tying": True, "rank_pattern": {"lm_head": 4}})


def test_full_fine_tuning_keeps_the_tie(tmp_path):
    """Its own file stores the shared tensor once."""
    model, inputs = get_peft_model(tied(), FullFTConfig()).eval(), batch("llama")
    randomize(model)
    model.save_pretrained(tmp_path)
    assert (
        sum("embed_tokens" in key or "lm_head" in key for key in load_file(tmp_path / "adapter_model.safetensors")) == 1
    )
    again = PeftModel.from_pretrained(tied(), tmp_path)
    assert_same_function(logits(again, inputs), logits(model, inputs))
    assert again.merge_and_unload().config.tie_word_embeddings


def test_an_encoder_decoder_keeps_its_flag(tmp_path):
    """T5 scales its logits if the flag of its configuration is set."""
    from transformers import AutoModelForSeq2SeqLM

    from tests.peft.models import t5

    torch.manual_seed(0)
    model = get_peft_model(t5(1).eval(), LoraConfig(target_modules=["q"], modules_to_save=["lm_head"])).eval()
    randomize(model)
    inputs = batch("t5")
    expected = logits(model, inputs)
    with pytest.warns(UserWarning, match="lm_head.weight is tied to other weights no more"):
        merged = model.merge_and_unload()
    assert_same_function(logits(merged, inputs), expected)
    merged.save_pretrained(tmp_path)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    assert_same_function(logits(again, inputs), expected)


class TestResizedVocabulary:
    @staticmethod
    def resized(seed, base=tied, rows=VOCAB + 3):
        model = base()
        torch.manual_seed(seed)  # for the new rows
        model.resize_token_embeddings(rows)
        return model

    @pytest.mark.parametrize("options", [{}, {"target_modules": ["q_proj", "embed_tokens"]}, PARTS["head"]], ids=str)
    @pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
    def test_new_rows_are_saved_with_the_adapter(self, hf_peft, tmp_path, options, is_tied):
        def base():
            model = tied()
            if not is_tied:
                model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
                model.config.tie_word_embeddings = False
            return model.eval()

        model = get_peft_model(self.resized(1, base), LoraConfig(**{"target_modules": ["q_proj"], "r": 2, **options}))
        randomize(model.eval())
        inputs = {"input_ids": torch.tensor([[1, VOCAB + 1, VOCAB + 2, 5]])}
        expected = logits(model, inputs)
        with pytest.warns(UserWarning, match=f"embeddings have {VOCAB + 3} rows"):
            model.save_pretrained(tmp_path)
        for load in ours_and_theirs(hf_peft):
            assert_same_function(logits(load(self.resized(2, base), tmp_path).eval(), inputs), expected)
        again = PeftModel.from_pretrained(self.resized(2, base), tmp_path, is_trainable=True)
        assert not any("embed_tokens.overrides" in n for n, p in again.named_parameters() if p.requires_grad)
        again.save_pretrained(tmp_path / "again")
        assert_same_function(
            logits(PeftModel.from_pretrained(self.resized(3, base), tmp_path / "again"), inputs), expected
        )
        with pytest.raises(ValueError, match=r"call resize_token_embeddings on the base first|of another shape"):
            PeftModel.from_pretrained(base(), tmp_path)

    def test_rows_by_the_configuration_of_the_base(self, tmp_path):
        """A case in which no module has the original number of rows."""
        tied().save_pretrained(tmp_path / "base")
        base = self.resized(1)
        base.model.vocab_size = VOCAB + 3
        for known in (False, True):
            base.config._name_or_path = base.name_or_path = str(tmp_path / "base") if known else ""
            model = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                model.save_pretrained(tmp_path / "adapter")
            assert any("saved with the adapter" in str(warning.message) for warning in caught) == known
            base = model.unload()

    def test_another_base_is_refused(self, tmp_path):
        model = get_peft_model(self.resized(1), LoraConfig(target_modules=["q_proj"]))
        model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="must be the base model's own weight, got other values"):
            PeftModel.from_pretrained(self.resized(1, lambda: tied(seed=5)), tmp_path)

    def test_vocabulary_of_original_size_is_not_saved(self, tmp_path):
        adapted({}).save_pretrained(tmp_path)
        assert all("lora" in key for key in load_file(tmp_path / "adapter_model.safetensors"))


@pytest.mark.parametrize("kind", ["bart", "whisper"])
def test_encoder_decoder_with_output_independent_of_tie_flag(tmp_path, kind):
    import transformers

    torch.manual_seed(0)
    ends = {f"{end}_{what}": n for end in ("encoder", "decoder") for what, n in (("layers", 1), ("attention_heads", 2))}
    sizes = {"vocab_size": 32, "d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, **ends}
    ids = torch.arange(3, 13).view(2, 5)
    if kind == "bart":
        model = transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes, max_position_embeddings=32))
        head, inputs = "lm_head", {"input_ids": ids}
    else:
        special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 1)
        lengths = {"max_source_positions": 8, "max_target_positions": 16, "num_mel_bins": 4}
        config = transformers.WhisperConfig(**sizes, **lengths, **special, begin_suppress_tokens=None)
        model = transformers.WhisperForConditionalGeneration(config)
        head, inputs = "proj_out", {"input_features": torch.randn(2, 4, 16), "decoder_input_ids": ids}
    adapted_model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=[head])).eval()
    randomize(adapted_model)
    expected = logits(adapted_model, inputs)
    merged = adapted_model.merge_and_unload()
    assert not merged.config.tie_word_embeddings
    merged.save_pretrained(tmp_path)
    for each in (merged, type(merged).from_pretrained(tmp_path).eval()):
        each.tie_weights()
        assert_same_function(logits(each, inputs), expected)

"""The same numbers in every mode of training: packed, checkpointed, compiled, in low precision."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tests.conftest import EARLY_FUSION, mixed_ids, tiny_lm_config, tiny_model
from tests.model.test_backbones import family_model
from torch._dynamo.testing import CompileCounter
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from smoltolk import SmolTolkForCausalLM

FAMILIES = ("llama", "gemma3_text, mixed", "gpt_neox", "granite", "mistral, window", "olmo3", "qwen2, window")
every_family = pytest.mark.parametrize("family", FAMILIES)


def gradients(model, ids, **inputs):
    model.zero_grad()
    output = model(ids, labels=ids, **inputs)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_equal_gradients(first, second, atol=1e-5):
    for name, gradient in first.items():
        assert torch.allclose(second[name], gradient, atol=atol, rtol=1e-3), name


@every_family
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_equal_separate_ones(family, attention):
    model = family_model(family, attention)
    unit = model.ids.speech_offset
    documents = [mixed_ids(seed=s, ids=model.ids, batch=1, seq=n) for s, n in enumerate((13, 7, 20))]
    documents[0][0, -2:] = torch.tensor([unit + 1, unit + 2])  # speech at the end of one document
    documents[1][0, :3] = torch.tensor([unit + 3, unit + 1, unit + 1])  # and at the beginning of the next
    packed = torch.cat(documents, 1)
    positions = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
    with torch.no_grad():
        found = model(packed, position_ids=positions, labels=packed, return_logits=True, return_token_losses=True)
        alone = [model(d, labels=d, return_logits=True, return_token_losses=True) for d in documents]
    torch.testing.assert_close(found.logits, torch.cat([a.logits for a in alone], 1), atol=1e-4, rtol=1e-4)
    losses = torch.cat([a.token_losses for a in alone], 1)
    torch.testing.assert_close(found.token_losses, losses, atol=1e-4, rtol=1e-4)
    num_labels = (losses > 0).sum()
    torch.testing.assert_close(found.loss, losses.sum() / num_labels, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("inputs", [{"attention_mask": torch.ones(1, 6)}, {"use_cache": True}])
def test_packed_documents_with_a_mask_or_a_cache_are_refused(model, inputs):
    ids, positions = torch.arange(1, 7)[None], torch.tensor([[0, 1, 2, 0, 1, 2]])
    with pytest.raises(ValueError, match="position_ids restart within a row, which packs documents"):
        model(ids, position_ids=positions, **inputs)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@every_family
def test_gradient_checkpointing_changes_nothing(family):
    model = family_model(family).train()
    ids = mixed_ids(ids=model.ids)
    _, expected = gradients(model, ids)
    model.gradient_checkpointing_enable()
    layers = (*model.body.layers, *model.input_adapter.layers, *model.output_adapter.layers)
    assert all(layer.gradient_checkpointing for layer in layers)
    _, found = gradients(model, ids)
    assert_equal_gradients(expected, found)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's own
@pytest.mark.parametrize("settings", [{}, EARLY_FUSION], ids=["smoltolk", "early fusion"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiled_layers_have_no_graph_breaks_and_change_nothing(settings, checkpointed):
    torch.compiler.reset()
    model = tiny_model(**settings).train()
    ids = mixed_ids(ids=model.ids)
    expected, expected_gradients = gradients(model, ids)
    if checkpointed:
        model.gradient_checkpointing_enable()
    graphs = CompileCounter()
    model.compile_layers(backend=graphs, fullgraph=True)
    found, found_gradients = gradients(model, ids)
    assert 1 <= graphs.frame_count <= 4  # not one for each of the layers, but for each kind of input
    torch.testing.assert_close(found.loss, expected.loss)
    assert_equal_gradients(expected_gradients, found_gradients)


def test_a_compiled_model_is_saved_under_the_same_names(tmp_path):
    model = tiny_model()
    ids = mixed_ids(ids=model.ids)
    with torch.no_grad():
        expected = model(ids).logits
    model.compile_layers(backend="eager")
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(SmolTolkForCausalLM.from_pretrained(tmp_path).eval()(ids).logits, expected)


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile:UserWarning")
def test_flex_attention_is_sdpa_also_on_packed_documents_and_in_generation(model):
    ids = mixed_ids(ids=model.ids)
    packed = {"input_ids": ids[:1, :10], "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])}
    found = {}
    for kind in ("sdpa", "flex_attention"):
        model.set_attn_implementation(kind)
        assert model.body.config._attn_implementation == model.output_adapter.config._attn_implementation == kind
        assert model.input_adapter.config._attn_implementation == "sdpa"
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            found[kind] = model(ids).logits, model(**packed).logits
            found[kind] += (
                model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False),
            )
    for expected, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(other, expected, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="takes no flex attention: set sdpa"):
        model.generate(ids, cache_implementation="static")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_and_attention_reach_the_adapters_when_loading(tmp_path, dtype):
    tiny_model().save_pretrained(tmp_path)
    model = SmolTolkForCausalLM.from_pretrained(tmp_path, dtype=dtype, attn_implementation="eager")
    assert {p.dtype for p in model.parameters()} == {dtype}
    for adapter in (model.input_adapter, model.output_adapter):
        assert adapter.config._attn_implementation == "eager"
        assert all(layer.self_attn.config is adapter.config for layer in adapter.layers)
    model.set_attn_implementation("sdpa")
    assert model.input_adapter.config._attn_implementation == "sdpa"
    assert model.output_adapter.config._attn_implementation == "sdpa"
    with torch.no_grad():
        logits = model(mixed_ids(ids=model.ids)).logits
    assert logits.dtype == dtype
    assert not logits.isnan().any()


def test_a_longer_context_and_another_rope_theta_are_saved_and_work(tmp_path):
    backbone = AutoModelForCausalLM.from_config(tiny_lm_config(max_position_embeddings=32))
    backbone.save_pretrained(tmp_path / "backbone")
    settings = {"rope_theta": 5e5, "max_position_embeddings": 64, "num_units": 20}
    model = SmolTolkForCausalLM.from_backbone(str(tmp_path / "backbone"), **settings).eval()
    model.save_pretrained(tmp_path / "model")
    loaded = SmolTolkForCausalLM.from_pretrained(tmp_path / "model").eval()
    plain = SmolTolkForCausalLM.from_backbone(str(tmp_path / "backbone"), num_units=20).eval()
    missing = plain.load_state_dict(model.state_dict())
    assert not missing.missing_keys
    for one in (model, loaded):
        assert one.config.max_position_embeddings == 64
        assert one.config.lm_config.rope_parameters["rope_theta"] == 5e5
        assert one.output_adapter.config.rope_parameters["rope_theta"] == 5e5
    ids = mixed_ids(ids=model.ids, seq=64)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        assert not torch.allclose(model(ids[:, :30]).logits, plain(ids[:, :30]).logits)
    with pytest.raises(ValueError, match="64 tokens, more than the backbone's max_position_embeddings of 32"):
        plain(ids)


def test_the_trainer_of_transformers_trains_it_with_the_loss_of_all_micro_batches(tmp_path):
    model = tiny_model().train()
    ids = mixed_ids(ids=model.ids, batch=4)
    labels = ids.clone()
    labels[0, 4:] = -100  # unequal numbers of labels
    start = copy.deepcopy(model.state_dict())
    rows = [{"input_ids": i, "labels": y} for i, y in zip(ids, labels, strict=True)]
    trained = []
    for micro_batch in (4, 1):
        model.load_state_dict(start)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=4 // micro_batch,
            max_steps=1,
            learning_rate=0.1,
            optim="sgd",
            lr_scheduler_type="constant",
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        assert trainer.evaluate()["eval_loss"] > 0
        trained.append({name: p.detach().clone() for name, p in model.named_parameters()})
    assert not torch.equal(trained[0]["unit_embeddings.weight"], start["unit_embeddings.weight"])
    for name, parameter in trained[0].items():
        torch.testing.assert_close(trained[1][name], parameter, atol=1e-5, rtol=1e-4)


def test_a_mask_with_a_hole_is_refused(model):
    ids = mixed_ids(ids=model.ids)
    mask = torch.ones_like(ids)
    mask[1, 5] = 0
    with pytest.raises(ValueError, match="attention_mask has a hole in row 1"):
        model(ids, attention_mask=mask)


def test_labels_of_no_id_are_refused(model):
    ids = mixed_ids(ids=model.ids)
    labels = ids.clone()
    labels[0, 3] = model.ids.vocab_size
    with pytest.raises(ValueError, match=r"labels hold .* id space"):
        model(ids, labels=labels)


def test_padding_neither_predicts_nor_is_predicted(model):
    ids = mixed_ids(ids=model.ids, batch=1, seq=20)
    padded = torch.nn.functional.pad(ids, (6, 3), value=1)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (6, 3))
    with torch.no_grad():
        expected, found = model(ids, labels=ids), model(padded, attention_mask=mask, labels=padded)
    torch.testing.assert_close(found.loss, expected.loss, atol=1e-5, rtol=1e-5)


def test_padding_does_not_count_as_length():
    model = tiny_model(lm_config=tiny_lm_config(max_position_embeddings=20))
    ids = mixed_ids(ids=model.ids, batch=1, seq=20)
    padded = torch.nn.functional.pad(ids, (7, 0), value=1)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (7, 0))
    with torch.no_grad():
        logits = model(padded, attention_mask=mask).logits
        torch.testing.assert_close(logits[:, 7:], model(ids).logits, atol=1e-4, rtol=1e-4)


def test_tuples_attentions_and_hidden_states_come_when_asked_for():
    model = tiny_model()
    model.set_attn_implementation("eager")
    ids = mixed_ids(ids=model.ids)
    with torch.no_grad():
        output = model(ids, output_attentions=True, output_hidden_states=True)
        assert torch.equal(model(ids, return_dict=False)[0], output.logits)
    assert [a.shape for a in output.attentions] == [(2, 4, 40, 40)] * 3
    assert len(output.hidden_states) == 4


def test_a_selector_that_is_certain_has_a_gradient(model):
    model = tiny_model(selector_entropy_weight=0.01).train()
    with torch.no_grad():
        model.layer_selector.projection.bias[0] = 200
    ids = mixed_ids(ids=model.ids)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_moved_and_copied_arguments_reach_the_layers(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    parts = {name: "cpu" for name, _ in tiny_model().named_children()} | {"output_adapter": "disk"}
    model = SmolTolkForCausalLM.from_pretrained(tmp_path / "model", device_map=parts, offload_folder=tmp_path)
    ids = mixed_ids(ids=model.ids)
    with torch.no_grad():
        expected = SmolTolkForCausalLM.from_pretrained(tmp_path / "model")(ids).logits
        torch.testing.assert_close(model(ids).logits, expected)


@pytest.mark.parametrize("kind", ["mixed", "text", "long and short"])
def test_every_rank_calls_the_input_adapter_once_whatever_its_batch_holds(model, monkeypatch, kind):
    ids = mixed_ids(ids=model.ids, seq=120)
    if kind == "text":
        ids = ids.clamp(max=5)
    if kind == "long and short":
        ids[0, :100] = model.ids.speech_offset + 1
    calls = []
    model.input_adapter.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        expected = model(ids).logits
        alone = len(calls)
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert alone == {"mixed": 1, "text": 0, "long and short": 2}[kind]
    assert len(calls) - alone == 1


def varlen_probe(calls):
    """What transformers calls flash attention with, computed with SDPA: segments by `cu_seq_lens_q`."""

    def attend(
        module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, position_ids=None, **kwargs
    ):
        rows, length = len(query), query.shape[2]
        document = torch.zeros(rows, length, dtype=torch.long)
        if cu_seq_lens_q is not None:
            assert rows == 1
            assert cu_seq_lens_q.dtype == torch.int32
            assert torch.equal(cu_seq_lens_q, kwargs["cu_seq_lens_k"])
            assert kwargs["max_length_q"] == kwargs["max_length_k"] == int(cu_seq_lens_q.diff().max())
            assert cu_seq_lens_q[-1] == length
            document[0, cu_seq_lens_q[1:-1].long()] = 1
            calls.append(cu_seq_lens_q.tolist())
        elif position_ids is not None and rows == 1:  # as transformers finds packed rows
            document[:, 1:] = position_ids[:, 1:] <= position_ids[:, :-1]
        document = document.cumsum(1)
        mask = (document[:, :, None] == document[:, None]) & torch.ones(length, length, dtype=torch.bool).tril()
        if attention_mask is not None:
            mask &= attention_mask[:, None].bool()
        attended = F.scaled_dot_product_attention(
            query, key, value, mask[:, None] | torch.eye(length, dtype=torch.bool), scale=scaling, enable_gqa=True
        )
        return attended.transpose(1, 2).contiguous(), None

    return attend


@pytest.fixture
def flash_calls(monkeypatch):
    """Registers a kind of attention that is called like flash attention; the segments it was called with."""
    calls = []
    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", lambda *_, **__: None)
    AttentionInterface.register("flash_probe", varlen_probe(calls))
    AttentionMaskInterface.register("flash_probe", flash_attention_mask)
    yield calls
    del ALL_ATTENTION_FUNCTIONS._global_mapping["flash_probe"]
    del ALL_MASK_ATTENTION_FUNCTIONS._global_mapping["flash_probe"]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_segments_go_to_flash_attention_in_one_row_without_padding(flash_calls, family):
    model = family_model(family).train()
    ids = mixed_ids(ids=model.ids)
    expected, expected_gradients = gradients(model, ids)
    model.set_attn_implementation("flash_probe")
    found, found_gradients = gradients(model, ids)
    torch.testing.assert_close(found.loss, expected.loss)
    assert_equal_gradients(expected_gradients, found_gradients)
    is_speech = ids >= model.ids.speech_offset
    begins = is_speech & ~F.pad(is_speech, (1, 0))[:, :-1]
    assert len(flash_calls) == len(model.input_adapter.layers)
    assert len(flash_calls[0]) == int(begins.sum()) + 1
    assert flash_calls[0][-1] == int(is_speech.sum())


def test_packed_documents_part_segments_in_flash_attention(flash_calls, model):
    ids = torch.full((1, 10), model.ids.speech_offset + 2)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    with torch.no_grad():
        expected = model(ids, position_ids=positions).logits
        model.set_attn_implementation("flash_probe")
        found = model(ids, position_ids=positions).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert flash_calls[0] == [0, 4, 10]


def test_text_alone_gives_the_input_adapter_a_gradient_of_zero_with_flash_attention(flash_calls, model):
    model.train().set_attn_implementation("flash_probe")
    text = torch.ones(2, 5, dtype=torch.long)
    model(text, labels=text).loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.input_adapter.parameters())


def test_a_cache_takes_masked_attention_in_the_input_adapter(flash_calls, model):
    model.set_attn_implementation("flash_probe")
    model(mixed_ids(ids=model.ids)[:1], use_cache=True)
    assert flash_calls == []
    assert model.input_adapter.config._attn_implementation == "sdpa"

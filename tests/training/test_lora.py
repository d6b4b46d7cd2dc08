"""LoRA on the text LM: what learns, exact resume, and a merged model."""

import os
import signal
import sys

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import EARLY_FUSION, TEXT_VOCAB, mixed_ids, tiny_lm_config, tiny_model, tiny_recipe
from tests.training.test_distributed import finish, torchrun
from transformers import GPTNeoXConfig, Qwen3Config

from smoltolk import SmolTolkForCausalLM
from smoltolk.training.checkpoints import list_checkpoints, load_state
from smoltolk.training.config import LoraSettings, make_recipe
from smoltolk.training.lora import add_lora, is_lora, lora_layers, lora_size, merged, use_lora
from smoltolk.training.optim import make_optimizer
from smoltolk.training.stopping import TrainingStopped
from smoltolk.training.trainer import Trainer
from smoltolk.training.watching import MEASURED, read_metrics

SMALL = {"rank": 4, "alpha": 8}
SHARED = {"vocab_size": TEXT_VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
SHARED |= {"num_attention_heads": 4, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 0}
BACKBONES = {
    "llama": tiny_lm_config(),
    "qwen3": Qwen3Config(**SHARED, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True),
    "gpt_neox": GPTNeoXConfig(**SHARED, tie_word_embeddings=False),  # one matrix for queries, keys and values
}


def lora_recipe(tiny_world, output, **changes):
    """The speech parts first, then LoRA."""
    settings = tiny_recipe(tiny_world, output, **changes)
    settings["stages"][1] |= {"train": "lora", "lora": SMALL, "text_learning_rate": 1e-2}
    return settings


def run(settings, **arguments):
    return Trainer(make_recipe(settings), progress=False, **arguments).run()


def curve(folder):
    lines = read_metrics(folder / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]


@pytest.fixture(scope="module")
def whole_run(tiny_world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run(lora_recipe(tiny_world, folder))
    return folder


def model_with_lora(seed=0, **settings):
    """A random model whose LoRA matrices are not zero."""
    model = tiny_model(seed, **settings)
    add_lora(model, LoraSettings(**SMALL))
    with torch.no_grad():
        for layer in lora_layers(model):
            layer.lora_B["default"].weight.normal_(std=0.2)
    return model


@pytest.mark.parametrize("family", BACKBONES)
def test_merged_weights_give_the_same_logits(family):
    model = model_with_lora(lm_config=BACKBONES[family])
    ids = mixed_ids(ids=model.ids)
    plain = tiny_model(1, lm_config=BACKBONES[family])
    plain.load_state_dict(merged(model, model.state_dict()))
    with torch.no_grad():
        ours, theirs = plain(ids).logits, model(ids).logits
        use_lora(model, is_on=False)
        without = model(ids).logits
    finite = theirs.isfinite()
    torch.testing.assert_close(ours[finite], theirs[finite], atol=1e-5, rtol=1e-5)
    assert (without - theirs)[finite].abs().max() > 0.1  # else this would say little


@pytest.mark.parametrize("family", BACKBONES)
def test_lora_is_in_all_linear_layers_of_the_text_lm_and_nowhere_else(family):
    model = tiny_model(lm_config=BACKBONES[family])
    before = {name: p.clone() for name, p in model.named_parameters()}
    linear = sum(isinstance(module, torch.nn.Linear) for module in model.body.layers.modules())
    ids = mixed_ids(ids=model.ids)
    with torch.no_grad():
        expected = model(ids).logits
        add_lora(model, LoraSettings(**SMALL))
        assert torch.equal(model(ids).logits, expected)  # B is zero
    assert len(list(lora_layers(model))) == len(list(lora_layers(model.body.layers))) == linear
    after = {name.replace(".base_layer", ""): p for name, p in model.named_parameters() if not is_lora(name)}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_names_choose_the_layers_and_a_wrong_one_is_refused():
    model = tiny_model()
    add_lora(model, LoraSettings(rank=3, target_modules=["q_proj", "down_proj"]))
    assert len(list(lora_layers(model))) == 6
    assert lora_size(model) == 3 * 3 * ((32 + 32) + (48 + 32))
    with pytest.raises(
        ValueError, match=r"lora.target_modules has 'query': the backbone's linear layers are down_proj,"
    ):
        add_lora(tiny_model(), LoraSettings(target_modules=["q_proj", "query"]))


def test_groups_hold_speech_parts_and_lora_with_their_rates(tiny_world, tmp_path):
    stage = make_recipe(lora_recipe(tiny_world, tmp_path)).stages[1]
    model = model_with_lora()
    optimizer = make_optimizer(model, stage)
    rates = {"speech": 1e-3, "text": 1e-2}
    names = {id(p): name for name, p in model.named_parameters()}
    found = {}
    for group in optimizer.param_groups:
        assert group["peak_lr"] == rates[group["part"]]
        found |= {names[id(p)]: group["part"] for p in group["params"]}
    assert found == {n: "speech" for n, _ in model.speech_parameters()} | {
        n: "text" for n, _ in model.text_parameters() if is_lora(n)
    }
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(found)


def test_the_text_lm_stays_and_the_folder_holds_it_with_lora_merged(tiny_world, tmp_path):
    trainer = Trainer(make_recipe(lora_recipe(tiny_world, tmp_path)), progress=False)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    model = SmolTolkForCausalLM.from_pretrained(trainer.run()).eval()
    trained = dict(trainer.model.named_parameters())
    same = {name for name in before if torch.equal(before[name], trained[name])}
    assert same == {name for name in before if name.startswith("lm.") and not is_lora(name)}
    assert not any("lora" in name or "base_layer" in name for name in load_file(tmp_path / "model/model.safetensors"))
    ids = mixed_ids(ids=model.ids)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, trainer.model.eval()(ids).logits, atol=1e-5, rtol=1e-5)
    last = curve(tmp_path)[-1]
    assert last["text_grad_norm"] > 0
    assert last["text_forgetting"] != pytest.approx(0, abs=1e-4)


def test_before_its_stage_lora_changes_nothing(tiny_world, tmp_path, whole_run):
    settings = tiny_recipe(tiny_world, tmp_path)
    run(settings)
    assert curve(whole_run)[:4] == curve(tmp_path)[:4]  # to the last bit, FLOPs too
    assert curve(whole_run)[-1]["flops"] < curve(tmp_path)[-1]["flops"]


@pytest.mark.parametrize("stop_at", [2, 4, 6])
def test_a_stopped_run_goes_on_to_the_very_same_end(tiny_world, tmp_path, whole_run, stop_at):
    settings = lora_recipe(tiny_world, tmp_path)

    def interrupt(metrics):
        if metrics["step"] == stop_at:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(TrainingStopped):
        run(settings, on_step=interrupt)
    assert load_state(list_checkpoints(tmp_path / "checkpoints")[-1]).step == stop_at
    run(settings)
    assert curve(tmp_path) == curve(whole_run)
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (tmp_path, whole_run))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_lora_stays_on_in_a_stage_of_speech_after_it(tiny_world, tmp_path):
    settings = lora_recipe(tiny_world, tmp_path)
    settings["stages"].append(settings["stages"][0] | {"steps": 2})
    run(settings)
    forgetting = [line["text_forgetting"] for line in curve(tmp_path) if "text_forgetting" in line]
    assert abs(forgetting[-2]) > 1e-4
    assert forgetting[-1] == pytest.approx(forgetting[-2], abs=1e-6)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's own
def test_layers_with_lora_compile_into_whole_graphs():
    model = model_with_lora(**EARLY_FUSION).train()
    ids = mixed_ids(ids=model.ids)
    expected = model(ids, labels=ids).loss
    torch.compiler.reset()
    model.compile_layers(backend="aot_eager", fullgraph=True)
    found = model(ids, labels=ids).loss
    found.backward()
    assert found.item() == pytest.approx(expected.item(), abs=1e-5)
    assert all(layer.lora_A["default"].weight.grad.abs().max() > 0 for layer in lora_layers(model))


def test_gradient_checkpointing_changes_nothing_but_rounding(tiny_world, tmp_path, whole_run):
    run(lora_recipe(tiny_world, tmp_path, gradient_checkpointing=True))
    for ours, theirs in zip(curve(tmp_path), curve(whole_run), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-3)


def test_two_ranks_train_what_one_trains(tiny_world, tmp_path, whole_run):
    finish(torchrun(lora_recipe(tiny_world, tmp_path), tmp_path, 2))
    for ours, theirs in zip(curve(tmp_path), curve(whole_run), strict=True):
        assert ours["flops"] == theirs["flops"]
        for name in ("loss", "grad_norm", "text_grad_norm", "speech_grad_norm"):
            if name in theirs:
                assert ours[name] == pytest.approx(theirs[name], abs=1e-5, rel=1e-5), (ours["step"], name)
    one, two = (load_file(folder / "model" / "model.safetensors") for folder in (whole_run, tmp_path))
    assert one.keys() == two.keys()
    for name, expected in one.items():
        torch.testing.assert_close(two[name], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([{"lora": SMALL}, {}], r"stage 1: lora is given, but train is speech: set train to lora"),
        ([{"train": "everything"}, {}], "one stage trains lora and another everything: choose one"),
        ([{"train": "lora"}, {}], "stages have different lora settings"),
        ([{}, {"lora": {"rank": 0}}], r"stages\.1\.lora\.rank: 0 is refused"),
        ([{}, {"lora": {"rnk": 4}}], r"stages\.1\.lora\.rnk: unknown key; did you mean rank"),
        ([{}, {"lora": {"target_modules": []}}], r"stages\.1\.lora\.target_modules: \[\] is refused"),
    ],
)
def test_a_wrong_setting_is_refused(tmp_path, changes, message):
    settings = lora_recipe(tmp_path, tmp_path)
    for stage, change in zip(settings["stages"], changes, strict=True):
        stage |= change
    with pytest.raises(ValueError, match=message):
        make_recipe(settings)


def test_lora_is_part_of_the_fingerprint_only_where_it_is_used(tmp_path):
    plain, lora = tiny_recipe(tmp_path, tmp_path), lora_recipe(tmp_path, tmp_path)
    assert all("lora" not in stage for stage in make_recipe(plain).model_dump()["stages"])
    assert make_recipe(make_recipe(lora).model_dump()) == make_recipe(lora)
    before = make_recipe(lora).fingerprint
    lora["stages"][1]["lora"] = SMALL | {"alpha": 9}
    assert make_recipe(lora).fingerprint != before
    del lora["stages"][1]["lora"]
    assert make_recipe(lora).lora == LoraSettings()


def test_peft_is_named_where_it_is_missing(tiny_world, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"LoRA needs PEFT, .* pip install 'smoltolk\[lora\]'"):
        run(lora_recipe(tiny_world, tmp_path))

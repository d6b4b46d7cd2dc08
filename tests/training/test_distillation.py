"""Distillation: what is taught where, by known answers, and in runs."""

import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.conftest import EARLY_FUSION, tiny_lm_config, tiny_model, tiny_recipe
from tests.training.test_distributed import finish, free_port, settings_for, torchrun
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from smoltolk.data.dataset import Batch, Transcripts
from smoltolk.training import distillation
from smoltolk.training.config import DistillationSettings, make_recipe
from smoltolk.training.distillation import Places, StepLessons, Teacher
from smoltolk.training.distributed import Ranks, join_ranks
from smoltolk.training.optim import distillation_flops
from smoltolk.training.trainer import Trainer
from smoltolk.training.watching import MEASURED, read_metrics

ALONE = Ranks(0, 1, torch.device("cpu"))
ALL = {"hidden_states": 1.0, "next_token": 1.0, "switch": 1.0, "word": 1.0}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbone")
    torch.manual_seed(7)
    LlamaForCausalLM(tiny_lm_config()).save_pretrained(folder)
    return folder


def make_batch(ids):
    """Two rows: text 5 6, a switch, a word 9 of two units, a word 10 11 of one; and text alone."""
    s = ids.speech_offset
    rows = [[5, 6, ids.switch_id, s, s + 1, s + 2, ids.end_of_speech_id], [7, 8, 7, 8, 7, 8, 7]]
    transcripts = Transcripts(
        text_ids=torch.tensor([[5, 6, 9, 10, 11], [0] * 5]),
        places=torch.tensor([[-1, -1, 1, -1, 2, 4, -1], [-1] * 7]),
        word_ids=torch.tensor([[-100, -100, -100, 9, -100, -100, -100], [-100] * 7]),
    )
    input_ids = torch.tensor(rows)
    return Batch(input_ids, input_ids.clone(), ["interleaved", "text"], [[], []], transcripts)


def taught(backbone, model, batch, **weights):
    settings = DistillationSettings(**weights)
    lessons = StepLessons(Teacher(str(backbone), torch.float32, ALONE), settings, batch, model.ids, ALONE)
    plain = model(batch.input_ids, labels=batch.labels).loss
    loss = model(batch.input_ids, labels=batch.labels, more_loss=lessons.lesson(batch)).loss
    return (loss - plain).item(), lessons


@pytest.fixture
def expected(backbone):
    """Each term by hand, from the two models' outputs."""
    model, teacher = tiny_model(), AutoModelForCausalLM.from_pretrained(backbone).eval()
    batch = make_batch(model.ids)
    with torch.no_grad():
        ours = model(batch.input_ids, output_hidden_states=True)
        theirs = teacher(batch.transcripts.text_ids[:1], output_hidden_states=True)
    vocab = model.ids.text_vocab_size

    def divergence(place, said):
        log_ours = ours.logits[0, place, :vocab].log_softmax(-1)
        log_theirs = theirs.logits[0, said].log_softmax(-1)
        return (log_theirs.exp() * (log_theirs - log_ours)).sum().item()

    ends = ((4, 2), (5, 4))  # place in the row, place in its transcript
    cosines = [
        F.cosine_similarity(a[0, place], b[0, said], dim=0).item()
        for a, b in zip(ours.hidden_states[1:], theirs.hidden_states[1:], strict=True)
        for place, said in ends
    ]
    return {
        "hidden_states": 1 - float(np.mean(cosines)),
        "next_token": float(np.mean([divergence(*end) for end in ends])),
        "switch": divergence(2, 1),
        "word": -ours.logits[0, 3, :vocab].log_softmax(-1)[9].item(),
    }


@pytest.mark.parametrize("term", ALL)
def test_each_term_is_what_the_two_models_outputs_say(term, backbone, expected):
    model = tiny_model()
    added, lessons = taught(backbone, model, make_batch(model.ids), **{term: 2.0})
    assert added == pytest.approx(2 * expected[term], rel=1e-4)
    assert lessons.terms() == {term: pytest.approx(expected[term], rel=1e-4)}


def test_the_terms_add_up_and_micro_batches_change_nothing(backbone, expected):
    model = tiny_model()
    batch = make_batch(model.ids)
    added, lessons = taught(backbone, model, batch, **ALL)
    assert added == pytest.approx(sum(expected.values()), rel=1e-4)
    parts = StepLessons(lessons.teacher, lessons.settings, batch, model.ids, ALONE)
    for row in range(2):
        part = batch.select(slice(row, row + 1))
        model(part.input_ids, labels=part.labels, more_loss=parts.lesson(part))
    assert parts.terms() == pytest.approx(expected, rel=1e-4)


def test_many_places_in_chunks_give_the_same_loss_and_gradient(backbone, monkeypatch):
    def gradients():
        model = tiny_model()
        batch = make_batch(model.ids)
        settings = DistillationSettings(**ALL)
        lessons = StepLessons(Teacher(str(backbone), torch.float32, ALONE), settings, batch, model.ids, ALONE)
        loss = model(batch.input_ids, labels=batch.labels, more_loss=lessons.lesson(batch)).loss
        loss.backward()
        return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    loss, whole = gradients()
    monkeypatch.setattr(distillation, "LOGITS_PER_CHUNK", 1)  # one place at a time
    chunked_loss, chunked = gradients()
    assert chunked_loss == pytest.approx(loss, rel=1e-6)
    for name, gradient in whole.items():
        torch.testing.assert_close(chunked[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_student_that_holds_what_the_teacher_holds_learns_nothing_from_it(backbone):
    """A student that reads text alone is its own backbone, so its terms are 0 where text is compared with text."""
    model = tiny_model()
    model.lm.load_state_dict(AutoModelForCausalLM.from_pretrained(backbone).state_dict())
    batch = make_batch(model.ids)
    text = torch.tensor([[5, 6, 9, 10, 11, 3, 3]])
    transcripts = batch.transcripts.select(slice(0, 1))
    same = Batch(text, text, ["interleaved"], [[]], transcripts)
    same.transcripts.places[:] = torch.tensor([[0, 1, 2, 3, 4, -1, -1]])
    added, _ = taught(backbone, model, same, switch=1.0)  # places that are no speech count as switches
    assert added == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("is_backbone_trained", [True, False])
@pytest.mark.parametrize("weights", [ALL, {"hidden_states": 1.0}, {"word": 1.0}])
def test_the_account_is_what_the_matrix_products_of_the_lesson_come_to(backbone, weights, is_backbone_trained):
    model = tiny_model(**EARLY_FUSION).train()
    for _, parameter in model.text_parameters():
        parameter.requires_grad = is_backbone_trained
    batch = make_batch(model.ids)
    teacher = Teacher(str(backbone), torch.float32, ALONE)

    def products(more):
        with FlopCounterMode(display=False) as counter:
            lesson = None
            if more:
                lessons = StepLessons(teacher, DistillationSettings(**weights), batch, model.ids, ALONE)
                lesson = lessons.lesson(batch)
            model(batch.input_ids, labels=batch.labels, more_loss=lesson).loss.backward()
        counts = counter.get_flop_counts()["Global"]
        return sum(count for operator, count in counts.items() if "scaled_dot_product" not in str(operator))

    found = distillation_flops(
        model.config,
        weights=DistillationSettings(**weights).weights,
        counts=Places.of(batch.input_ids, batch.transcripts, model.ids).counts(),
        num_read=5,
        num_read_squared=25,
        is_backbone_trained=is_backbone_trained,
    )
    lm = model.config.lm_config
    attention = lm.num_hidden_layers * 2 * lm.hidden_size * 25
    assert found - attention == products(more=True) - products(more=False)


def test_a_run_learns_what_it_is_taught_and_resumes_exactly(tiny_world, tmp_path):
    def settings(name, **weights):
        recipe = tiny_recipe(tiny_world, tmp_path / name)
        stages = [stage | ({"distillation": weights} if weights else {}) for stage in recipe["stages"]]
        return recipe | {"stages": stages}

    def stop_at_5(metrics):
        if metrics["step"] == 5:
            raise KeyboardInterrupt

    Trainer(make_recipe(settings("plain")), progress=False).run()
    Trainer(make_recipe(settings("taught", **ALL)), progress=False).run()
    with pytest.raises(KeyboardInterrupt):
        Trainer(make_recipe(settings("stopped", **ALL)), progress=False, on_step=stop_at_5).run()
    Trainer(make_recipe(settings("stopped", **ALL)), progress=False).run()
    plain, ours, stopped = (read_metrics(tmp_path / n / "metrics.jsonl") for n in ("plain", "taught", "stopped"))
    for line in (*ours, *stopped):
        for name in MEASURED:
            line.pop(name, None)
    assert stopped == ours
    assert [line["speech_labels"] for line in ours] == [line["speech_labels"] for line in plain]
    assert ours[0]["speech_loss"] == plain[0]["speech_loss"]  # the same rows and the same model to begin with
    assert ours[-1]["flops"] > plain[-1]["flops"]
    assert not any(key.startswith("distilled") for key in plain[-1])
    assert all(f"distilled_{term}" in line for line in ours for term in ALL)


def test_a_frozen_text_lm_learns_to_hold_in_mind_what_the_written_words_would_put_there(tiny_world, tmp_path):
    recipe = tiny_recipe(tiny_world, tmp_path, validation={"rows": 0}, checkpoint={"every_steps": 100})
    stage = recipe["stages"][0] | {"steps": 40, "distillation": {"hidden_states": 3}}
    Trainer(make_recipe(recipe | {"stages": [stage]}), progress=False).run()
    terms = [line["distilled_hidden_states"] for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert np.mean(terms[-10:]) < 0.9 * np.mean(terms[:5])


def test_distillation_without_weights_or_without_words_is_refused(tiny_world, tmp_path):
    recipe = tiny_recipe(tiny_world, tmp_path)
    recipe["stages"][0]["distillation"] = {"word": 0}
    with pytest.raises(ValueError, match="all weights are 0: give hidden_states, next_token, switch, word a weight"):
        make_recipe(recipe)
    recipe["stages"][0] |= {"distillation": {"word": 1}, "mixture": {"text": 1}}
    with pytest.raises(ValueError, match="distillation needs rows of interleaved or speech"):
        make_recipe(recipe)


@pytest.mark.slow
def test_two_ranks_are_taught_what_one_is(tiny_world, tmp_path):
    curves = []
    for ranks in (1, 2):
        folder = tmp_path / f"ranks{ranks}"
        settings = settings_for(tiny_world, folder)
        stages = [stage | {"steps": 3, "decay_steps": 0, "distillation": ALL} for stage in settings["stages"]]
        finish(torchrun(settings | {"stages": stages, "validation": {"rows": 0}}, folder, ranks))
        curves.append(read_metrics(folder / "metrics.jsonl"))
    for one, two in zip(*curves, strict=True):
        assert two["flops"] == one["flops"]
        for name in ("loss", "grad_norm", *(f"distilled_{term}" for term in ALL)):
            assert two[name] == pytest.approx(one[name], abs=1e-5, rel=1e-5), (one["step"], name)


def share_of_teacher(rank, port, backbone, found):
    """A rank of two; writes down which weights of the teacher's layers are spread after it has read something."""
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()})
    ranks = join_ranks("cpu")
    teacher = Teacher(backbone, torch.float32, ranks)
    teacher.lm.base_model(torch.tensor([[1, 2, 3]]))
    spread = {isinstance(weight, DTensor) for weight in teacher.lm.base_model.layers.parameters()}
    found.write_text(str(spread))
    ranks.leave()


@pytest.mark.slow
def test_each_rank_keeps_its_share_of_the_teachers_layers(processes, backbone, tmp_path):
    port = free_port()
    started = [
        processes.Process(target=share_of_teacher, args=(rank, port, str(backbone), tmp_path / f"{rank}.txt"))
        for rank in (0, 1)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)] == ["{True}", "{True}"]

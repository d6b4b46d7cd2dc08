"""Generation: the cache is exact, modalities are kept, prompts are checked."""

import shutil

import numpy as np
import pytest
import torch
from tests.conftest import (
    EARLY_FUSION,
    NUM_UNITS,
    SPEECH_CARD,
    mixed_ids,
    tiny_lm_config,
    tiny_model,
    tiny_text_tokenizer,
)
from tests.speech.models import tiny_hubert_tokenizer

from smoltolk.generation.pipeline import SmolTolkPipeline
from smoltolk.generation.sampling import RunLengths, continue_ids, next_is_speech
from smoltolk.speech.audio import AudioError
from smoltolk.speech.mel import MelTokenizer
from smoltolk.speech.units import SpeechTokenizer, Units


class ToneTokenizer(SpeechTokenizer):
    """Hears one unit per 10 ms block: how loud it is."""

    kind, sample_rate_hz, unit_rate_hz, num_units = "tone", 16000, 100.0, NUM_UNITS
    fingerprint = SPEECH_CARD["fingerprint"]

    def encode_batch(self, audios):
        blocks = [np.abs(a[: len(a) // 160 * 160].reshape(-1, 160)).max(1) for a in audios]
        return [Units.from_frames((b * (NUM_UNITS - 1)).astype(int)) for b in blocks]

    def encode_stream(self, blocks):
        return self.encode(np.concatenate(list(blocks)))

    def save(self, path):
        raise NotImplementedError


def tone(seconds=0.3):
    return np.linspace(0.1, 0.9, int(16000 * seconds), dtype=np.float32)


@pytest.fixture
def pipeline():
    return SmolTolkPipeline(tiny_model(speech_tokenizer=SPEECH_CARD), tiny_text_tokenizer(), ToneTokenizer())


def prompt_that_ends_in(end, ids, seed=0, length=20):
    row = mixed_ids(seed=seed, ids=ids, batch=1, seq=length)[0].tolist()
    if row[-1] == ids.switch_id:
        row.pop()
    if end == "switch":
        return [*row, ids.switch_id]
    changes = (row[-1] >= ids.speech_offset) != (end == "speech")
    return row + [ids.switch_id] * changes + [ids.speech_offset + 2 if end == "speech" else 5]


def left_padded(rows):
    length = max(map(len, rows))
    mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor([[0] * (length - len(row)) + row for row in rows]), torch.tensor(mask)


@pytest.mark.parametrize("settings", [{}, EARLY_FUSION], ids=["smoltolk", "early fusion"])
@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("end", ["text", "speech", "switch"])
def test_cached_generation_equals_uncached_in_batches_with_left_padding(settings, temperature, end):
    model = tiny_model(**settings)
    ids, mask = left_padded([prompt_that_ends_in(end, model.ids, row, n) for row, n in enumerate((23, 15, 9))])
    sampling = {"max_new_tokens": 20, "min_new_tokens": 20, "temperature": temperature, "seed": 3}
    cached = continue_ids(model, ids, mask, **sampling)
    assert cached == continue_ids(model, ids, mask, **sampling, use_cache=False)
    for row, new in zip(ids, cached, strict=True):
        wants_speech = bool(next_is_speech(row[None], model.ids))
        assert len(new) == 20
        assert all((token >= model.ids.speech_offset) == wants_speech for token in new)
        assert model.ids.end_of_speech_id not in new


def test_the_end_token_ends_a_row_and_is_left_out():
    model = tiny_model(lm_config=tiny_lm_config(tie_word_embeddings=False))
    with torch.no_grad():
        model.lm.lm_head.weight[1:] = 0  # the end of text is the best or the worst, by the sign of its logit
        prompts = torch.arange(1, 30)[:, None]
        ends_at_once = model(prompts).logits[:, -1, model.ids.end_of_text_id] > 0
    found = [continue_ids(model, prompt[None], max_new_tokens=3, temperature=0)[0] for prompt in prompts]
    assert [len(new) == 0 for new in found] == ends_at_once.tolist()
    assert 0 < sum(ends_at_once) < len(prompts)


def test_sampling_leaves_the_generator_of_torch_alone_and_does_not_hear_other_threads(pipeline):
    expected = pipeline("w1", to="text", max_new_tokens=20, min_new_tokens=20, seed=5).text
    torch.manual_seed(0)
    first = torch.rand(1)
    torch.manual_seed(0)
    stream = pipeline.stream("w1", to="text", max_new_tokens=20, min_new_tokens=20, seed=5)
    heard = next(stream).text
    assert torch.rand(1) == first
    assert heard + "".join(piece.text for piece in stream) == expected


def test_samples_follow_the_probabilities(model):
    prompt = torch.tensor([[5]] * 600)
    with torch.no_grad():
        probabilities = (model(prompt[:1]).logits[0, -1, : model.ids.text_vocab_size] / 3).softmax(0)
    for settings, kept in (({}, 50), ({"top_k": 3}, 3)):
        new = continue_ids(model, prompt, max_new_tokens=1, min_new_tokens=1, temperature=3.0, seed=1, **settings)
        counts = torch.bincount(torch.tensor(new).flatten(), minlength=model.ids.text_vocab_size)
        expected = probabilities.clone()
        expected[model.ids.end_of_text_id] = 0
        expected[expected < expected.topk(kept).values[-1]] = 0
        expected /= expected.sum()
        assert (counts[expected == 0] == 0).all()
        deviation = (counts / 600 - expected).abs() / (expected * (1 - expected) / 600 + 1e-9).sqrt()
        assert deviation.max() < 4.5


def test_seeds_decide_what_is_sampled(pipeline):
    def say(seed):
        return pipeline("w1 w2 w3", to="text", max_new_tokens=12, min_new_tokens=12, seed=seed).text

    assert say(1) == say(1)
    assert len({say(seed) for seed in range(5)}) > 1


def test_prompts_mix_text_and_audio_with_a_switch_at_each_change(pipeline):
    ids, model = pipeline.prompt_ids(["w1", "w2", tone(), "w3"], to="speech"), pipeline.model
    units = (pipeline.speech_tokenizer.encode(tone()).units + model.ids.speech_offset).tolist()
    assert ids == [3, 4, model.ids.switch_id, *units, model.ids.switch_id, 5, model.ids.switch_id]
    assert pipeline.prompt_ids(tone(), to="speech") == units


def test_speech_comes_back_as_units(pipeline):
    units = pipeline(["w1", tone()], to="speech", max_new_tokens=9, min_new_tokens=9).units
    assert len(units) == 9
    assert units.min() >= 0
    assert units.max() < NUM_UNITS


@pytest.mark.parametrize("prompt", [[], "", ["w1", ""]])
def test_an_empty_prompt_is_refused(pipeline, prompt):
    with pytest.raises(ValueError, match="is empty"):
        pipeline(prompt, to="text")


def test_a_negative_temperature_and_no_new_tokens_are_refused(pipeline):
    with pytest.raises(ValueError, match=r"temperature is -1: give 0"):
        pipeline("w1", to="text", temperature=-1)
    with pytest.raises(ValueError, match="max_new_tokens is 0: give 1 or more"):
        pipeline("w1", to="text", max_new_tokens=0)


def test_an_unknown_modality_is_refused(pipeline):
    with pytest.raises(ValueError, match="to is 'image'"):
        pipeline("w1", to="image")


def test_a_prompt_without_room_for_an_answer_is_refused(pipeline):
    with pytest.raises(ValueError, match=r"256 tokens and leaves no room in the model's 256 positions"):
        pipeline("w1 " * 256, to="text")


def test_broken_audio_is_refused(pipeline, tmp_path):
    with pytest.raises(AudioError, match="silent"):
        pipeline(np.zeros(8000, np.float32), to="text")
    with pytest.raises(AudioError, match=r"none\.wav"):
        pipeline(tmp_path / "none.wav", to="text")


def test_audio_needs_a_speech_tokenizer():
    pipeline = SmolTolkPipeline(tiny_model(), tiny_text_tokenizer())
    with pytest.raises(ValueError, match="kept without a speech tokenizer"):
        pipeline(tone(), to="text")


def test_a_speech_tokenizer_the_model_does_not_know_is_refused():
    model = tiny_model(speech_tokenizer=SPEECH_CARD | {"fingerprint": "speech-1"})
    with pytest.raises(ValueError, match=r"fingerprint is speech-0, but the model knows the units of speech-1"):
        SmolTolkPipeline(model, tiny_text_tokenizer(), ToneTokenizer())


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        SmolTolkPipeline.from_pretrained(tmp_path)


class LoudVocoder:
    """Says each unit as ten samples of its number."""

    sample_rate_hz = 1000

    def decode(self, units):
        return np.repeat(units, 10).astype(np.float32) / NUM_UNITS

    def decode_stream(self, units, *, chunk_units):
        chunk = []
        for unit in units:
            chunk.append(unit)
            if len(chunk) == chunk_units:
                yield np.array(chunk), self.decode(np.array(chunk))
                chunk = []
        if chunk:
            yield np.array(chunk), self.decode(np.array(chunk))


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"seed": 4}])
def test_pieces_of_a_stream_add_up_to_what_a_call_gives(pipeline, settings):
    settings |= {"max_new_tokens": 17}
    texts = [piece.text for piece in pipeline.stream("w1 w2", to="text", min_new_tokens=9, **settings)]
    assert "".join(texts) == pipeline("w1 w2", to="text", min_new_tokens=9, **settings).text
    assert len(texts) > 5
    without_vocoder = list(pipeline.stream(["w1", tone()], to="speech", **settings))
    pipeline.vocoder = LoudVocoder()
    whole = pipeline(["w1", tone()], to="speech", **settings)
    pieces = list(pipeline.stream(["w1", tone()], to="speech", chunk_units=4, **settings))
    assert np.array_equal(np.concatenate([p.units for p in pieces]), whole.units)
    assert np.array_equal(np.concatenate([p.audio for p in pieces]), whole.audio)
    assert np.array_equal(np.concatenate([p.units for p in without_vocoder]), whole.units)


def test_a_stream_gives_pieces_before_the_end_and_can_be_closed(pipeline, monkeypatch):
    calls = []
    forward = type(pipeline.model).forward
    monkeypatch.setattr(type(pipeline.model), "forward", lambda *args, **kw: (calls.append(1), forward(*args, **kw))[1])
    stream = pipeline.stream("w1", to="text", max_new_tokens=200, min_new_tokens=200)
    next(stream)
    stream.close()
    made = len(calls)
    assert 0 < made < 200
    assert len(calls) == made  # nothing goes on behind our back


def test_what_fails_in_the_background_is_raised_in_front(pipeline):
    with pytest.raises(ValueError, match="min_new_tokens"):
        list(pipeline.stream("w1", to="text", min_new_tokens=9, lengths=RunLengths(text=(0, 4))))


def test_a_model_that_switches_gives_its_parts_in_order():
    model = tiny_model(predict_switch=True, speech_tokenizer=SPEECH_CARD)
    pipeline = SmolTolkPipeline(model, tiny_text_tokenizer(), ToneTokenizer(), LoudVocoder())
    lengths = RunLengths(text=(2, 3), speech=(2, 5))
    said = pipeline("w1", to=None, max_new_tokens=30, min_new_tokens=30, lengths=lengths)
    kinds = [part.text is not None for part in said.parts]
    assert kinds == [i % 2 == 0 for i in range(len(kinds))]
    assert len(kinds) > 4
    assert said.text == " ".join(part.text for part in said.parts if part.text is not None)
    assert len(said.audio) == 10 * len(said.units) == sum(len(p.audio) for p in said.parts if p.audio is not None)


def test_a_model_that_never_learnt_to_switch_cannot_decide(pipeline):
    with pytest.raises(ValueError, match="does not predict the switch"):
        pipeline("w1", to=None)


def test_a_stream_without_a_modality_is_refused(pipeline):
    with pytest.raises(ValueError, match="to is None: a stream has one modality"):
        next(pipeline.stream("w1", to=None))


def test_the_speech_tokenizer_computes_where_the_model_does(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    tiny_text_tokenizer().save_pretrained(tmp_path)
    tiny_hubert_tokenizer().save(tmp_path / "speech_tokenizer")
    pipeline = SmolTolkPipeline.from_pretrained(tmp_path, device="meta")  # which is there on every machine
    assert pipeline.model.device.type == pipeline.speech_tokenizer.device.type == "meta"
    mel = MelTokenizer.fit([tone(1.0)], num_units=2)
    shutil.rmtree(tmp_path / "speech_tokenizer")
    mel.save(tmp_path / "speech_tokenizer")  # it has no network, and nothing warns of that
    assert SmolTolkPipeline.from_pretrained(tmp_path, device="meta").speech_tokenizer.fingerprint == mel.fingerprint


def test_a_tokenizer_beside_the_model_serves_in_place_of_one_kept_with_it(tmp_path):
    model, mel = tiny_model(), MelTokenizer.fit([tone(1.0)], num_units=2)
    model.save_pretrained(tmp_path / "model")
    tiny_text_tokenizer().save_pretrained(tmp_path / "model")
    mel.save(tmp_path / "mel")
    folder = str(tmp_path / "model")
    assert SmolTolkPipeline.from_pretrained(folder).speech_tokenizer is None
    given = SmolTolkPipeline.from_pretrained(folder, "auto", speech_tokenizer=tmp_path / "mel")
    assert given.speech_tokenizer.fingerprint == mel.fingerprint
    assert given.vocoder is None


def test_a_model_of_the_hub_is_taken_by_its_name(tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path)
    tiny_text_tokenizer().save_pretrained(tmp_path)
    asked = []

    def download(name):
        asked.append(name)
        if name != "somebody/speaks":
            raise FileNotFoundError("no such repository\nmore")
        return str(tmp_path)

    monkeypatch.setattr("smoltolk.model.export.snapshot_download", download)
    assert SmolTolkPipeline.from_pretrained("somebody/speaks").model.config.num_units == tiny_model().config.num_units
    with pytest.raises(ValueError, match=r"nobody/speaks is no folder, and .* downloaded \(no such repository\)"):
        SmolTolkPipeline.from_pretrained("nobody/speaks")
    assert asked == ["somebody/speaks", "nobody/speaks"]

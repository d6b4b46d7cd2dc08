import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from tests.speech.models import noise, tiny_hubert, tiny_hubert_tokenizer, tiny_mimi
from transformers import (
    HubertConfig,
    HubertForCTC,
    HubertModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMModel,
)

from smoltolk.speech import clustering
from smoltolk.speech import hubert as hubert_module
from smoltolk.speech.hubert import HubertSettings, HubertTokenizer, load_hubert
from smoltolk.speech.kinds import load_speech_tokenizer

PRE_NORM = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
LIKE_HUBERT = [
    (HubertModel, HubertConfig, {}),
    (HubertModel, HubertConfig, PRE_NORM),
    (Wav2Vec2Model, Wav2Vec2Config, {}),
    (Wav2Vec2Model, Wav2Vec2Config, PRE_NORM),
    (WavLMModel, WavLMConfig, {}),
]


@pytest.fixture(scope="module")
def tokenizer() -> HubertTokenizer:
    return tiny_hubert_tokenizer()


@pytest.fixture(scope="module")
def audios() -> list[np.ndarray]:
    """Less than a frame's hop to many windows, and twins of the same length."""
    lengths_s = (0.1, 0.7, 1.3, 1.3, 2.0, 3.37, 4.2, 6.01)
    return [noise(seconds, seed=seed) for seed, seconds in enumerate(lengths_s)]


@pytest.mark.parametrize(("model_class", "config_class", "settings"), LIKE_HUBERT)
@pytest.mark.parametrize("layer", [1, 3])
def test_a_short_file_has_the_units_of_transformers_hidden_states(
    model_class: type, config_class: type, settings: dict, layer: int
) -> None:
    model = tiny_hubert(model_class, config_class, **settings)
    tokenizer = tiny_hubert_tokenizer(model, layer=layer)
    audio = noise(1.2, seed=5)
    with torch.no_grad():
        hidden = model(torch.from_numpy(audio)[None], output_hidden_states=True).hidden_states[layer][0].numpy()
    distances = np.square(hidden[:, None] - tokenizer.centroids).sum(axis=2)
    np.testing.assert_array_equal(tokenizer.encode(audio).frames(), distances.argmin(axis=1))
    assert len(tokenizer.encode(audio).units) > 3


def test_a_normalised_file_has_the_units_of_transformers_own_feature_extractor() -> None:
    model = tiny_hubert(**PRE_NORM)
    tokenizer = tiny_hubert_tokenizer(model, is_normalized=True)
    audio = 0.3 + 4 * noise(1.2, seed=5)
    values = Wav2Vec2FeatureExtractor(do_normalize=True)(audio, sampling_rate=16_000, return_tensors="pt").input_values
    with torch.no_grad():
        hidden = model(values, output_hidden_states=True).hidden_states[2][0].numpy()
    distances = np.square(hidden[:, None] - tokenizer.centroids).sum(axis=2)
    np.testing.assert_array_equal(tokenizer.encode(audio).frames(), distances.argmin(axis=1))
    assert not np.array_equal(tokenizer.encode(audio).frames(), tiny_hubert_tokenizer(model).encode(audio).frames())


@pytest.mark.parametrize(("stride", "rate_hz"), [((5, 4, 4, 4), 50.0), ((5, 4, 4, 8), 25.0)])
def test_the_unit_rate_is_that_of_the_convolutions(stride: tuple[int, ...], rate_hz: float) -> None:
    tokenizer = tiny_hubert_tokenizer(tiny_hubert(conv_stride=stride, conv_kernel=(10, 8, 8, 8)))
    assert tokenizer.unit_rate_hz == tokenizer.card()["unit_rate_hz"] == rate_hz
    assert abs(tokenizer.encode(noise(4)).durations.sum() - 4 * rate_hz) <= 2


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(("model_class", "config_class", "settings"), LIKE_HUBERT)
def test_units_of_a_file_do_not_depend_on_its_batch_or_on_its_neighbours(
    model_class: type, config_class: type, settings: dict, batch_size: int, audios: list[np.ndarray]
) -> None:
    tokenizer = tiny_hubert_tokenizer(
        tiny_hubert(model_class, config_class, **settings), batch_size=batch_size, is_normalized=bool(settings)
    )
    alone = [tokenizer.encode(audio).frames() for audio in audios]
    for order in (range(8), range(7, -1, -1), (5, 2, 6), (6, 7)):
        for i, units in zip(order, tokenizer.encode_batch([audios[i] for i in order]), strict=True):
            np.testing.assert_array_equal(units.frames(), alone[i])
    assert len({tuple(frames) for frames in alone}) == 8


def test_batches_of_another_size_give_the_same_units_here(audios: list[np.ndarray]) -> None:
    for batch_size in (2, 5):
        tokenizer, one_by_one = tiny_hubert_tokenizer(batch_size=batch_size), tiny_hubert_tokenizer()
        for audio in audios:
            np.testing.assert_array_equal(tokenizer.encode(audio).frames(), one_by_one.encode(audio).frames())


def test_frames_in_windows_are_those_of_the_whole_file_but_for_a_few_at_the_seams() -> None:
    model, audio = tiny_hubert(**PRE_NORM), noise(5)
    with torch.no_grad():
        centroids = model(torch.from_numpy(audio)[None], output_hidden_states=True).hidden_states[1][0, ::12].numpy()
    frames = [
        HubertTokenizer(model, centroids, HubertSettings(1, False, window_s=window_s, context_s=0.3)).encode(audio)
        for window_s in (1.0, 100.0)
    ]
    assert len(frames[0].frames()) == len(frames[1].frames())
    assert np.mean(frames[0].frames() == frames[1].frames()) > 0.9


def test_half_precision_gives_nearly_the_same_units_and_the_same_fingerprint(
    tokenizer: HubertTokenizer, tmp_path: Path
) -> None:
    tokenizer.save(tmp_path)
    for dtype in ("bfloat16", "float16"):
        half = load_speech_tokenizer(tmp_path, dtype=dtype)
        assert half.fingerprint == tokenizer.fingerprint
        assert np.mean(half.encode(noise(4)).frames() == tokenizer.encode(noise(4)).frames()) > 0.9
        half.save(tmp_path / dtype)
        assert load_speech_tokenizer(tmp_path / dtype).fingerprint == tokenizer.fingerprint


def test_a_saved_tokenizer_comes_back_from_its_folder_alone(tokenizer: HubertTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer")
    tokenizer.save(tmp_path / "tokenizer")  # over itself
    loaded = load_speech_tokenizer((tmp_path / "tokenizer").rename(tmp_path / "moved"))
    assert loaded.card() == tokenizer.card()
    np.testing.assert_array_equal(loaded.encode(noise(3)).frames(), tokenizer.encode(noise(3)).frames())
    assert sorted(p.relative_to(tmp_path / "moved").as_posix() for p in (tmp_path / "moved").rglob("*.*")) == [
        "kmeans.safetensors",
        "model/config.json",
        "model/model.safetensors",
        "tokenizer.json",
    ]


def test_layers_that_are_not_needed_are_not_kept_and_do_not_count(tokenizer: HubertTokenizer) -> None:
    model = tiny_hubert()
    with torch.no_grad():
        model.encoder.layers[2].final_layer_norm.weight.fill_(7)
        model.masked_spec_embed.fill_(7)
    assert tiny_hubert_tokenizer(model).fingerprint == tokenizer.fingerprint
    assert len(tokenizer.model.encoder.layers) == tokenizer.model.config.num_hidden_layers == 2
    assert len(model.encoder.layers) == 3
    with torch.no_grad():
        model.encoder.layers[1].final_layer_norm.weight.fill_(7)
    assert tiny_hubert_tokenizer(model).fingerprint != tokenizer.fingerprint


def test_settings_and_centroids_make_another_fingerprint(tokenizer: HubertTokenizer) -> None:
    others = [
        tiny_hubert_tokenizer(layer=3),
        tiny_hubert_tokenizer(is_normalized=True),
        tiny_hubert_tokenizer(window_s=2.0),
        tiny_hubert_tokenizer(context_s=0.1),
        tiny_hubert_tokenizer(tiny_hubert(hidden_act="relu")),
        HubertTokenizer(tiny_hubert(), tokenizer.centroids[:-1], tokenizer.settings),
    ]
    assert len({other.fingerprint for other in [*others, tokenizer]}) == 7


def test_a_tokenizer_can_be_sent_to_a_worker(tokenizer: HubertTokenizer) -> None:
    state = torch.random.get_rng_state()
    sent = pickle.loads(pickle.dumps(tokenizer))  # noqa: S301
    assert torch.equal(torch.random.get_rng_state(), state)
    assert sent.fingerprint == tokenizer.fingerprint
    np.testing.assert_array_equal(sent.encode(noise(3)).frames(), tokenizer.encode(noise(3)).frames())


def test_changed_weights_settings_and_centroids_are_refused(tokenizer: HubertTokenizer, tmp_path: Path) -> None:
    def change_weight() -> None:
        file = tmp_path / "model" / "model.safetensors"
        weights = safetensors.numpy.load_file(file)
        weights["feature_projection.projection.weight"][0, 0] += 1
        safetensors.numpy.save_file(weights, file, metadata={"format": "pt"})

    def lose_weight() -> None:
        file = tmp_path / "model" / "model.safetensors"
        weights = safetensors.numpy.load_file(file)
        del weights["encoder.layers.0.layer_norm.weight"], weights["feature_projection.projection.weight"]
        safetensors.numpy.save_file(weights, file, metadata={"format": "pt"})

    def change_centroid() -> None:
        file = tmp_path / "kmeans.safetensors"
        safetensors.numpy.save_file({"centroids": tokenizer.centroids + 1}, file)

    def change_setting() -> None:
        file = tmp_path / "tokenizer.json"
        card = json.loads(file.read_text())
        card["settings"]["context_s"] = 0.1
        file.write_text(json.dumps(card))

    for change in (change_weight, lose_weight, change_centroid, change_setting):
        tokenizer.save(tmp_path)
        change()
        with pytest.raises(ValueError, match=r"fingerprint .* changed"):
            HubertTokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", None, "holds no speech tokenizer"),
        ("tokenizer.json", b'{"kind": "mel", "fingerprint": "", "settings": {}}', "'mel' tokenizer, not 'hubert'"),
        ("tokenizer.json", b'{"kind": "hubert", "fingerprint": "", "settings": {"hops": 1}}', "not a whole tokenizer"),
        ("kmeans.safetensors", None, "not a whole tokenizer"),
        ("kmeans.safetensors", b"damaged", "not a whole tokenizer"),
        ("model/config.json", None, "not a whole tokenizer"),
        ("model/config.json", b"{", "not a whole tokenizer"),
        ("model/model.safetensors", None, "not a whole tokenizer"),
        ("model/model.safetensors", b"damaged", "not a whole tokenizer"),
    ],
)
def test_a_damaged_folder_is_refused(
    tokenizer: HubertTokenizer, tmp_path: Path, file: str, content: bytes | None, message: str
) -> None:
    tokenizer.save(tmp_path)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        HubertTokenizer.load(tmp_path)


def test_a_model_and_a_kmeans_file_make_a_tokenizer(tokenizer: HubertTokenizer, tmp_path: Path) -> None:
    tiny_hubert().save_pretrained(tmp_path / "model")
    np.save(tmp_path / "kmeans.npy", tokenizer.centroids)
    made = HubertTokenizer.from_pretrained(
        tmp_path / "model", layer=2, kmeans=tmp_path / "kmeans.npy", is_normalized=False
    )
    assert made.settings == HubertSettings(2, False)
    assert tokenizer.settings == HubertSettings(2, False, window_s=1.0, context_s=0.2)
    audio = noise(1.2)  # one window for both
    np.testing.assert_array_equal(made.encode(audio).frames(), tokenizer.encode(audio).frames())


@pytest.mark.parametrize("do_normalize", [True, False])
def test_whether_audio_is_normalised_is_read_beside_the_model(tmp_path: Path, do_normalize: bool) -> None:
    tiny_hubert().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"no preprocessor_config\.json with do_normalize: give is_normalized \(--normalize or"
    ):
        load_hubert(tmp_path, layer=1)
    Wav2Vec2FeatureExtractor(do_normalize=do_normalize, sampling_rate=8000).save_pretrained(tmp_path)
    assert load_hubert(tmp_path, layer=1)[1] == HubertSettings(1, do_normalize, sample_rate_hz=8000)
    assert load_hubert(tmp_path, layer=1, is_normalized=True)[1].is_normalized


def test_a_model_with_a_head_is_read_without_it(tokenizer: HubertTokenizer, tmp_path: Path) -> None:
    with_head = tiny_hubert(HubertForCTC)
    with_head.hubert.load_state_dict(tiny_hubert().state_dict())
    with_head.save_pretrained(tmp_path)
    model, _ = load_hubert(tmp_path, layer=2, is_normalized=False)
    assert tiny_hubert_tokenizer(model).fingerprint == tokenizer.fingerprint


def test_fitting_learns_centroids_from_arrays_and_from_blocks_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    audios = [noise(seconds, seed=seed) for seed, seconds in enumerate((0.6, 2.9, 3.3))]
    settings = HubertSettings(2, False, window_s=1.0, context_s=0.2)
    fitted = HubertTokenizer.fit(audios, tiny_hubert(), settings, num_units=8)
    in_blocks = HubertTokenizer.fit((np.array_split(a, 7) for a in audios), tiny_hubert(), settings, num_units=8)
    assert fitted.fingerprint == in_blocks.fingerprint
    assert fitted.num_units == 8
    assert len(set(fitted.encode(audios[2]).units)) > 4
    assert HubertTokenizer.fit(audios, tiny_hubert(), settings, num_units=8, seed=1).fingerprint != fitted.fingerprint
    monkeypatch.setattr(hubert_module, "FIT_FRAMES", 40)
    sampled = HubertTokenizer.fit(audios, tiny_hubert(), settings, num_units=8)
    assert sampled.fingerprint != fitted.fingerprint


def test_frames_of_the_sample_are_drawn_from_the_whole_stream_alike() -> None:
    counts = np.zeros(1000)
    for seed in range(200):
        sample = clustering.FrameSample(100, np.random.default_rng(seed))
        for block in np.array_split(np.arange(1000, dtype=np.float32)[:, None], 23):
            sample.add(block)
        frames = sample.frames()[:, 0].astype(int)
        assert len(frames) == len(set(frames)) == 100
        counts[frames] += 1
    assert counts.sum() == 200 * 100
    assert np.abs(counts.reshape(10, 100).sum(axis=1) - 2000).max() < 200  # 4.7 standard deviations
    assert sample.num_seen == 1000


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer": 0}, "layer is 0"),
        ({"layer": 4}, "layer is 4, but the model has 3 layers"),
        ({"window_s": 0}, "window_s is 0"),
        ({"window_s": 0.02}, "core_frames is 1"),
        ({"context_s": 0.6}, "the context is 30 and 30 frames"),
        ({"context_s": -0.1}, "the context is -5"),
    ],
)
def test_a_setting_out_of_range_is_refused(tokenizer: HubertTokenizer, settings: dict, message: str) -> None:
    chosen = {"layer": 2, "is_normalized": False, "window_s": 1.0, "context_s": 0.2} | settings
    with pytest.raises(ValueError, match=message):
        HubertTokenizer(tiny_hubert(), tokenizer.centroids, HubertSettings(**chosen))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "gpu"}, "device is 'gpu'"),
        ({"dtype": "int8"}, "dtype is 'int8': choose one of float32"),
        ({"dtype": torch.float64}, "dtype is 'torch.float64'"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_a_setting_of_the_run_out_of_range_is_refused(tokenizer: HubertTokenizer, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HubertTokenizer(tiny_hubert(), tokenizer.centroids, tokenizer.settings, **settings)


def test_centroids_and_models_that_do_not_fit_are_refused(tokenizer: HubertTokenizer) -> None:
    for centroids, message in (
        (tokenizer.centroids[:, :-1], "15 dimensions, but the model 16"),
        (tokenizer.centroids[:1], "fewer than 2 centroids"),
        (tokenizer.centroids * np.nan, "not finite"),
        (tokenizer.centroids[0], r"float32 \(16,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            HubertTokenizer(tiny_hubert(), centroids, tokenizer.settings)
    with pytest.raises(ValueError, match="type 'mimi', which is not HuBERT-like"):
        HubertTokenizer(tiny_mimi(), tokenizer.centroids, tokenizer.settings)


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (np.zeros(0, np.float32), "0 samples, less than one frame"),
        (np.zeros(424, np.float32), "424 samples, less than one frame of 425"),
        (np.zeros((2, 1600), np.float32), "one channel"),
        (np.full(1600, np.nan, np.float32), "NaN"),
    ],
)
def test_audio_that_cannot_be_encoded_is_refused(tokenizer: HubertTokenizer, audio: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenizer.encode(audio)


def test_one_frame_is_enough_and_an_empty_batch_has_no_units(tokenizer: HubertTokenizer) -> None:
    assert tokenizer.encode(noise(1)[:425]).durations.tolist() == [1]
    assert tokenizer.encode_batch([]) == []


def test_read_only_audio_is_encoded_and_left_alone(tokenizer: HubertTokenizer) -> None:
    audio = noise(3)
    audio.flags.writeable = False
    assert len(tokenizer.encode(audio).units) > 1


def test_the_preset_is_the_papers_tokenizer_and_refuses_another_kmeans(
    tokenizer: HubertTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "kmeans.npy", tokenizer.centroids)
    with pytest.raises(ValueError, match=r"kmeans\.npy has sha256 .* published k-means 03cc04a9"):
        HubertTokenizer.mhubert_25hz(tmp_path / "kmeans.npy")

    asked = {}

    def from_pretrained(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return "tokenizer"

    def download(url: str, path: str, **options: object) -> None:
        assert url.endswith("fisher_L11_km500.bin")
        Path(path).write_bytes(tokenizer.centroids.tobytes())

    monkeypatch.setattr(HubertTokenizer, "from_pretrained", from_pretrained)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(ValueError, match=r"has sha256"):  # what was downloaded is checked, too
        HubertTokenizer.mhubert_25hz()
    found = next((tmp_path / "hub" / "smoltolk").iterdir())
    sha256 = hubert_module.hashlib.sha256(found.read_bytes()).hexdigest()
    monkeypatch.setattr(hubert_module, "_MHUBERT_25HZ_KMEANS_SHA256", sha256)
    assert HubertTokenizer.mhubert_25hz(dtype="bfloat16") == "tokenizer"
    assert asked["name"] == "slprl/mhubert-base-25hz"
    assert (asked["layer"], asked["is_normalized"], asked["kmeans"], asked["dtype"]) == (11, False, found, "bfloat16")


def test_a_damaged_download_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> None:
        raise RuntimeError("invalid hash value")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(OSError, match=r"damaged \(invalid hash value\): start again"):
        HubertTokenizer.mhubert_25hz()

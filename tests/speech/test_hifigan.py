"""The published format of unit HiFi-GANs, with tiny random weights."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from smoltolk.speech.hifigan import UnitHifiGan, import_unit_hifigan
from smoltolk.speech.kinds import load_vocoder
from smoltolk.speech.mel import MelSettings, MelTokenizer

CONFIG: dict[str, Any] = {  # keys and their order of magnitude as published; sizes made tiny
    "resblock": "1",
    "batch_size": 16,
    "upsample_rates": [5, 4],
    "upsample_kernel_sizes": [11, 8],
    "upsample_initial_channel": 16,
    "resblock_kernel_sizes": [3, 5],
    "resblock_dilation_sizes": [[1, 3, 5], [1, 2, 3]],
    "num_embeddings": 12,
    "embedding_dim": 8,
    "model_in_dim": 8,
    "code_hop_size": 20,
    "f0": False,
    "dur_prediction_weight": 1.0,
    "dur_predictor_params": {
        "encoder_embed_dim": 8,
        "var_pred_hidden_dim": 6,
        "var_pred_kernel_size": 3,
        "var_pred_dropout": 0.5,
    },
    "sampling_rate": 2000,
}
NUM_SPEAKERS, NUM_STYLES = 3, 2


def published_weights(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random weights under the names of `CodeGenerator`, with weight normalisation."""
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def normed(name: str, *shape: int, bias: int) -> None:
        weights[f"{name}.bias"] = 0.1 * draw(bias)
        weights[f"{name}.weight_g"] = 1 + 0.3 * draw(shape[0], 1, 1).abs()
        weights[f"{name}.weight_v"] = draw(*shape)

    dim, channels = config["embedding_dim"], config["upsample_initial_channel"]
    weights["dict.weight"] = draw(config["num_embeddings"], dim)
    if config.get("multispkr"):
        weights["spkr.weight"] = draw(NUM_SPEAKERS, dim)
    if config.get("multistyle"):
        weights["style.weight"] = draw(NUM_STYLES, dim)
    normed("conv_pre", channels, config["model_in_dim"], 7, bias=channels)
    blocks = list(zip(config["resblock_kernel_sizes"], config["resblock_dilation_sizes"], strict=True))
    for i, kernel in enumerate(config["upsample_kernel_sizes"]):
        normed(f"ups.{i}", channels, channels // 2, kernel, bias=channels // 2)
        channels //= 2
        for j, (size, dilations) in enumerate(blocks):
            for m in range(len(dilations)):
                for part in ("convs1", "convs2"):
                    name = f"resblocks.{i * len(blocks) + j}.{part}.{m}"
                    normed(name, channels, channels, size, bias=channels)
    normed("conv_post", 1, channels, 7, bias=1)
    if durations := config.get("dur_predictor_params"):
        hidden = durations["var_pred_hidden_dim"]
        for layer, before in (("1", dim), ("2", hidden)):
            weights[f"dur_predictor.conv{layer}.0.weight"] = 0.5 * draw(hidden, before, 3)
            weights[f"dur_predictor.conv{layer}.0.bias"] = 0.1 * draw(hidden)
            weights[f"dur_predictor.ln{layer}.weight"] = 1 + 0.1 * draw(hidden)
            weights[f"dur_predictor.ln{layer}.bias"] = 0.1 * draw(hidden)
        weights["dur_predictor.proj.weight"] = 0.3 * draw(1, hidden)
        weights["dur_predictor.proj.bias"] = torch.tensor([1.1])
    return weights


def reference_durations(weights: dict[str, Tensor], units: np.ndarray) -> list[int]:
    hidden = weights["dict.weight"][torch.from_numpy(units)].T[None]
    for layer in "12":
        conv = f"dur_predictor.conv{layer}.0"
        hidden = F.conv1d(hidden, weights[f"{conv}.weight"], weights[f"{conv}.bias"], padding=1).relu()
        norm = f"dur_predictor.ln{layer}"
        hidden = F.layer_norm(hidden.mT, hidden.shape[1:2], weights[f"{norm}.weight"], weights[f"{norm}.bias"]).mT
    logs = F.linear(hidden[0].T, weights["dur_predictor.proj.weight"], weights["dur_predictor.proj.bias"])
    return [max(1, round(float(log.exp() - 1))) for log in logs[:, 0]]


def reference_waveform(
    config: dict[str, Any], weights: dict[str, Tensor], frames: np.ndarray, condition: Tensor
) -> np.ndarray:
    """HiFi-GAN (arXiv 2010.05646, section 2.2) straight from the published names."""

    def weight(name: str) -> Tensor:
        v, g = weights[f"{name}.weight_v"], weights[f"{name}.weight_g"]
        return g * v / v.square().sum(dim=(1, 2), keepdim=True).sqrt()

    def conv(name: str, hidden: Tensor, dilation: int = 1) -> Tensor:
        kernel = weight(name)
        padding = dilation * (kernel.shape[2] - 1) // 2
        return F.conv1d(hidden, kernel, weights[f"{name}.bias"], padding=padding, dilation=dilation)

    embedded = weights["dict.weight"][torch.from_numpy(frames)]
    hidden = conv("conv_pre", torch.cat([embedded, condition.expand(len(frames), -1)], dim=1).T[None])
    dilations = config["resblock_dilation_sizes"]
    for i, rate in enumerate(config["upsample_rates"]):
        kernel = weight(f"ups.{i}")
        padding = (kernel.shape[2] - rate) // 2
        hidden = F.leaky_relu(hidden, 0.1)
        hidden = F.conv_transpose1d(hidden, kernel, weights[f"ups.{i}.bias"], stride=rate, padding=padding)
        outputs = []
        for j in range(len(dilations)):
            block, name = hidden, f"resblocks.{i * len(dilations) + j}"
            for m, dilation in enumerate(dilations[j]):
                inner = conv(f"{name}.convs1.{m}", F.leaky_relu(block, 0.1), dilation)
                block = block + conv(f"{name}.convs2.{m}", F.leaky_relu(inner, 0.1))
            outputs.append(block)
        hidden = torch.stack(outputs).mean(dim=0)
    return conv("conv_post", F.leaky_relu(hidden, 0.01)).tanh().flatten().numpy()


class Files:
    """A published vocoder in a folder."""

    def __init__(self, folder: Path, weights: dict[str, Tensor] | None = None, **changes: Any) -> None:
        self.config = {key: value for key, value in (CONFIG | changes).items() if value is not None}
        self.weights = published_weights(self.config) if weights is None else weights
        self.config_file, self.checkpoint_file = folder / "config.json", folder / "g_00500000"
        self.config_file.write_text(json.dumps(self.config))
        torch.save({"generator": self.weights}, self.checkpoint_file)

    def imported(self, tokenizer: MelTokenizer, **arguments: int) -> UnitHifiGan:
        return import_unit_hifigan(self.config_file, self.checkpoint_file, tokenizer, **arguments)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@pytest.fixture
def vocoder(files: Files, tokenizer: MelTokenizer) -> UnitHifiGan:
    return files.imported(tokenizer)


def some_units(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(12, size=count)


def test_an_imported_vocoder_says_what_the_published_weights_say(
    files: Files, vocoder: UnitHifiGan, tokenizer: MelTokenizer
) -> None:
    units = some_units(30)
    durations = vocoder.predict_durations(units)
    assert durations.tolist() == reference_durations(files.weights, units)
    assert len(set(durations.tolist())) > 1
    audio = vocoder.decode(units)
    expected = reference_waveform(files.config, files.weights, np.repeat(units, durations), torch.zeros(0))
    np.testing.assert_allclose(audio, expected, atol=2e-5)
    assert audio.dtype == np.float32
    assert np.abs(audio).max() > 0.3
    given = np.arange(30) % 3 + 1
    assert len(vocoder.decode(units, given)) == 20 * given.sum()
    assert (vocoder.num_units, vocoder.sample_rate_hz) == (12, 2000)
    assert vocoder.tokenizer_fingerprint == tokenizer.fingerprint


def test_the_context_is_as_far_as_frames_reach(vocoder: UnitHifiGan) -> None:
    reach = vocoder.settings.context_frames
    frames = some_units(4 * reach)
    changed = frames.copy()
    middle = 2 * reach
    changed[middle] = (changed[middle] + 1) % 12
    ones = np.ones(len(frames), np.int64)
    difference = np.abs(vocoder.decode(frames, ones) - vocoder.decode(changed, ones)).reshape(-1, 20).max(axis=1)
    touched = np.flatnonzero(difference > 1e-6)
    assert middle - reach <= touched[0]
    assert touched[-1] <= middle + reach
    assert touched[-1] - touched[0] >= reach  # the bound is not far off


def test_long_speech_is_decoded_in_blocks_without_seams(
    vocoder: UnitHifiGan, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = some_units(80)
    whole = vocoder.decode(units)
    monkeypatch.setattr("smoltolk.speech.hifigan._BLOCK_FRAMES", 17)
    np.testing.assert_allclose(vocoder.decode(units), whole, atol=1e-5)


@pytest.mark.parametrize("chunk_units", [1, 7, 24, 1000])
def test_a_stream_says_the_same_in_chunks(vocoder: UnitHifiGan, chunk_units: int) -> None:
    units = some_units(90)
    heard: list[int] = []

    def come() -> Iterator[int]:
        for unit in units:
            heard.append(int(unit))
            yield int(unit)

    pieces, spoken = [], []
    for some, piece in vocoder.decode_stream(come(), chunk_units=chunk_units):
        if not pieces and chunk_units < len(units):
            assert len(heard) < len(units)
        assert len(some) <= chunk_units
        pieces.append(piece)
        spoken += some.tolist()
    assert heard == spoken == units.tolist()
    np.testing.assert_allclose(np.concatenate(pieces), vocoder.decode(units), atol=1e-5)


def test_a_stream_shorter_than_the_context_is_spoken_whole(vocoder: UnitHifiGan) -> None:
    (piece,) = vocoder.decode_stream([3, 4])
    assert piece[0].tolist() == [3, 4]
    np.testing.assert_array_equal(piece[1], vocoder.decode(np.array([3, 4])))
    assert list(vocoder.decode_stream([])) == []
    with pytest.raises(ValueError, match="chunk_units is 0"):
        next(vocoder.decode_stream([1], chunk_units=0))
    with pytest.raises(ValueError, match="knows 0 to 11"):
        list(vocoder.decode_stream([1, 12, 3]))


def test_a_saved_vocoder_comes_back(vocoder: UnitHifiGan, tokenizer: MelTokenizer, tmp_path: Path) -> None:
    vocoder.save(tmp_path / "vocoder")
    loaded = load_vocoder(tmp_path / "vocoder", tokenizer)
    assert isinstance(loaded, UnitHifiGan)
    assert loaded.settings == vocoder.settings
    np.testing.assert_array_equal(loaded.decode(some_units(9)), vocoder.decode(some_units(9)))
    assert sorted(p.name for p in (tmp_path / "vocoder").iterdir()) == ["vocoder.json", "vocoder.safetensors"]


@pytest.mark.parametrize("file", ["vocoder.json", "vocoder.safetensors"])
def test_a_damaged_folder_is_refused(vocoder: UnitHifiGan, tmp_path: Path, file: str) -> None:
    vocoder.save(tmp_path / "v")
    content = (tmp_path / "v" / file).read_bytes()
    (tmp_path / "v" / file).write_bytes(content.replace(b"embedding", b"embading"))
    with pytest.raises(ValueError, match="not a whole vocoder"):
        load_vocoder(tmp_path / "v")
    (tmp_path / "v" / file).unlink()
    with pytest.raises(ValueError, match="not a whole vocoder"):
        load_vocoder(tmp_path / "v")


def test_without_a_duration_predictor_each_unit_lasts_a_frame(tokenizer: MelTokenizer, tmp_path: Path) -> None:
    vocoder = Files(tmp_path, dur_predictor_params=None).imported(tokenizer)
    assert vocoder.predict_durations(some_units(5)).tolist() == [1] * 5
    assert len(vocoder.decode(some_units(5))) == 100


def test_one_voice_and_style_of_several_is_chosen(tokenizer: MelTokenizer, tmp_path: Path) -> None:
    files = Files(tmp_path, multispkr="from_input_file", multistyle="from_input_file", model_in_dim=24)
    vocoder = files.imported(tokenizer, speaker=2, style=1)
    units, ones = some_units(20), np.ones(20, np.int64)
    condition = torch.cat([files.weights["spkr.weight"][2], files.weights["style.weight"][1]])
    expected = reference_waveform(files.config, files.weights, units, condition)
    np.testing.assert_allclose(vocoder.decode(units, ones), expected, atol=2e-5)
    assert np.abs(files.imported(tokenizer, speaker=1, style=1).decode(units, ones) - expected).max() > 0.01
    vocoder.save(tmp_path / "v")
    np.testing.assert_array_equal(load_vocoder(tmp_path / "v").decode(units), vocoder.decode(units))
    with pytest.raises(ValueError, match="speaker is None: multispkr is on, choose one of 0 to 2"):
        files.imported(tokenizer, style=0)
    with pytest.raises(ValueError, match="style is 2: multistyle is on, choose one of 0 to 1"):
        files.imported(tokenizer, speaker=0, style=2)


def test_weights_without_weight_normalisation_are_the_same_vocoder(
    files: Files, vocoder: UnitHifiGan, tokenizer: MelTokenizer, tmp_path: Path
) -> None:
    plain = {name: weight for name, weight in files.weights.items() if not name.endswith(("_g", "_v"))}
    for name, v in files.weights.items():
        if name.endswith("_v"):
            plain[name[:-2]] = torch._weight_norm(v, files.weights[name[:-1] + "g"], 0)
    same = Files(tmp_path, weights=plain).imported(tokenizer)
    np.testing.assert_allclose(same.decode(some_units(20)), vocoder.decode(some_units(20)), atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"f0": True}, "f0 is True: vocoders with pitch"),
        ({"embedder_params": {"dim": 1}, "multispkr": True}, "embedder_params .* another network"),
        ({"resblock": "2"}, "resblock is '2'"),
        ({"model_in_dim": 9}, "model_in_dim is 9"),
        ({"upsample_rates": None}, "has no 'upsample_rates'"),
        ({"embedding_dim": None}, "embedding_dim is None"),
        ({"upsample_kernel_sizes": [10, 8]}, "upsample_kernel_sizes has 10 for the upsample_rates 5"),
        ({"upsample_kernel_sizes": [11]}, "upsample_kernel_sizes has 1 entries"),
        ({"resblock_dilation_sizes": [[1, 3, 5]]}, "resblock_dilation_sizes has 1 entries"),
        ({"resblock_kernel_sizes": [3, 4]}, "resblock_kernel_sizes has 4"),
        ({"num_embeddings": 11}, "num_embeddings is 11, but the tokenizer has 12"),
        ({"sampling_rate": 1000}, "50 frames per second, but the tokenizer 100"),
        ({"dur_predictor_params": {"var_pred_hidden_dim": 6}}, "dur_predictor_params: encoder_embed_dim is None"),
        ({"dur_predictor_params": CONFIG["dur_predictor_params"] | {"var_pred_kernel_size": 5}}, "only 3"),
        ({"dur_predictor_params": None}, r"also holds duration_predictor\."),
        ({"upsample_initial_channel": 32}, r"generator.conv_pre\S+ has shape \(16"),
        ({"multispkr": True}, r"holds no spkr.weight"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_key(
    tokenizer: MelTokenizer, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    files = Files(tmp_path, weights=published_weights(CONFIG), **changes)
    with pytest.raises(ValueError, match=message):
        files.imported(tokenizer)


def test_missing_weights_and_a_speaker_too_many_are_refused(
    files: Files, tokenizer: MelTokenizer, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="speaker is 1, but multispkr is off"):
        files.imported(tokenizer, speaker=1)
    weights = published_weights(CONFIG)
    del weights["ups.1.bias"]
    with pytest.raises(ValueError, match=r"lacks generator.upsampler.1.bias"):
        Files(tmp_path, weights=weights).imported(tokenizer)
    del weights["ups.1.weight_v"]
    with pytest.raises(ValueError, match=r"ups.1.weight_g without ups.1.weight_v"):
        Files(tmp_path, weights=weights).imported(tokenizer)


class _Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("code was run",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"nothing", "cannot be read"),
        ({"model": {}}, r"no weights under the key 'generator' \(it holds model\)"),
        ([1], "it holds list"),
        ({"generator": _Harmful()}, "cannot be read"),
    ],
)
def test_other_checkpoints_are_refused_and_run_no_code(
    files: Files, tokenizer: MelTokenizer, capsys: pytest.CaptureFixture[str], content: Any, message: str
) -> None:
    if isinstance(content, bytes):
        files.checkpoint_file.write_bytes(content)
    else:
        torch.save(content, files.checkpoint_file)
    with pytest.raises(ValueError, match=message):
        files.imported(tokenizer)
    assert "code was run" not in capsys.readouterr().out
    files.checkpoint_file.unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        files.imported(tokenizer)


@pytest.mark.parametrize("content", [None, b"{", b"[]"])
def test_a_config_that_is_none_is_refused(files: Files, tokenizer: MelTokenizer, content: bytes | None) -> None:
    files.config_file.unlink() if content is None else files.config_file.write_bytes(content)
    with pytest.raises(ValueError, match=r"give the vocoder's config\.json"):
        files.imported(tokenizer)


def test_units_at_25_hz_fit_a_hop_of_40_ms(audios: list[np.ndarray], tmp_path: Path) -> None:
    tokenizer = MelTokenizer.fit(audios, num_units=12, settings=MelSettings(hop_samples=640))
    changes = {"upsample_rates": [5, 4, 4, 4, 2], "upsample_kernel_sizes": [11, 8, 8, 8, 4], "sampling_rate": 16_000}
    vocoder = Files(tmp_path, upsample_initial_channel=32, **changes).imported(tokenizer)
    units = tokenizer.encode(audios[0])
    assert len(vocoder.decode(units.units, units.durations)) == 640 * units.durations.sum()

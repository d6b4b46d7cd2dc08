"""Sizes, settings and the id space of a SmolTolk model."""

import copy
from dataclasses import dataclass
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

LAYER_MIXINGS = ("last", "static", "selected")


@dataclass(frozen=True)
class IdSpace:
    """The one id space of text, control tokens and speech.

        [ 0 … V_text−1 | bop, eop, switch | units 0 … K−1 | end-of-speech | reserved ]

    The modality is a property of the id: `ids >= speech_offset` are speech, all others are not.

    Args:
        text_vocab_size: number of text tokens, `V_text`.
        num_units: number of speech units, `K`.
        end_of_text_id: the text token that ends a text.
        num_reserved_speech_tokens: rows after end-of-speech that are never used in data (imported
            checkpoints carry a padding row there).
    """

    text_vocab_size: int
    num_units: int
    end_of_text_id: int
    num_reserved_speech_tokens: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.end_of_text_id < self.text_vocab_size:
            raise ValueError(
                f"end_of_text_id is {self.end_of_text_id}, outside of the text vocabulary "
                f"0 … {self.text_vocab_size - 1}: give the id of the token that ends a text"
            )

    @property
    def bop_id(self) -> int:
        """Begin-of-prompt control id."""
        return self.text_vocab_size

    @property
    def eop_id(self) -> int:
        """End-of-prompt control id."""
        return self.text_vocab_size + 1

    @property
    def switch_id(self) -> int:
        """The control id between two modalities, the same in both directions."""
        return self.text_vocab_size + 2

    @property
    def speech_offset(self) -> int:
        """Id of unit 0; every id from here on is speech."""
        return self.text_vocab_size + 3

    @property
    def end_of_speech_id(self) -> int:
        """Id that ends an utterance in speech."""
        return self.speech_offset + self.num_units

    @property
    def num_speech_tokens(self) -> int:
        """Size of the speech block: units, end-of-speech, reserved rows."""
        return self.num_units + 1 + self.num_reserved_speech_tokens

    @property
    def vocab_size(self) -> int:
        """Size of the whole id space."""
        return self.speech_offset + self.num_speech_tokens

    def end_id(self, is_speech: bool) -> int:
        """The id that ends an utterance in the given modality."""
        return self.end_of_speech_id if is_speech else self.end_of_text_id


@strict
class SmolTolkConfig(PreTrainedConfig):
    """Configuration of `SmolTolkForCausalLM`.

    The defaults are the paper's: two input and two output adapter layers, speech read from all levels
    through the layer selector, raw residual, unit head tied to the unit embeddings. Early fusion and
    early fission, the paper's baseline, is `num_input_adapter_layers=0, num_output_adapter_layers=0,
    layer_mixing="last", speech_residual=False`.

    Args:
        lm_config: configuration of the text backbone, any supported decoder-only Hugging Face LM.
        num_units: number of speech units, without end-of-speech.
        num_input_adapter_layers: decoder layers that compose units before the backbone (late fusion).
        num_output_adapter_layers: decoder layers between the layer mix and the unit head (late fission).
        layer_mixing: what the speech side reads: "last" level only, a "static" learned average of all
            levels, or levels "selected" per position by the layer selector (multi-level fission).
        selector_input: what the layer selector looks at: the "static" average, the "last" level, the index of
            a backbone layer (0 is the first layer's output), or all "levels", projected and side by side.
        selector_hidden_size: width of a hidden layer in the layer selector, None for a linear one (the paper's).
        selector_level_size: what each level is projected to for `selector_input="levels"`, else None.
        selector_level_hidden_size: width of a hidden layer in that projection, None for a linear one.
        speech_residual: whether the raw input embedding is added to the layer mix.
        tie_speech_embeddings: whether the unit head shares its weights with the unit embeddings.
        output_adapter_norm: whether a final norm follows the output adapter (the paper has none).
        selector_entropy_weight: weight of the mean entropy of the selector, subtracted from the loss.
        predict_switch: whether the switch id is predicted too, so that the model decides when to change modality.
        num_reserved_speech_tokens: rows after end-of-speech, only for imported checkpoints.
        speech_tokenizer: card of the speech tokenizer whose units the model knows
            (`fingerprint`, `unit_rate_hz`, `num_units`), None when unknown.
        text_tokenizer_fingerprint: fingerprint of the text tokenizer, None when unknown.
        initializer_range: standard deviation of newly made speech parameters, None for the backbone's own.

    Raises:
        ValueError: a setting is out of its range.
    """

    model_type = "smoltolk"
    sub_configs = {"lm_config": AutoConfig}  # noqa: RUF012
    keys_to_ignore_at_inference = [  # noqa: RUF012
        "past_key_values",
        "layer_weights",
        "text_loss",
        "speech_loss",
        "token_losses",
        "token_is_best",
    ]

    lm_config: Any = None  # a PreTrainedConfig once made; a dict of its settings is taken too
    num_units: int = 500
    num_input_adapter_layers: int = 2
    num_output_adapter_layers: int = 2
    layer_mixing: str = "selected"
    selector_input: str | int = "static"
    selector_hidden_size: int | None = None
    selector_level_size: int | None = None
    selector_level_hidden_size: int | None = None
    speech_residual: bool = True
    tie_speech_embeddings: bool = True
    output_adapter_norm: bool = False
    selector_entropy_weight: float = 0.0
    predict_switch: bool = False
    num_reserved_speech_tokens: int = 0
    speech_tokenizer: dict | None = None
    text_tokenizer_fingerprint: str | None = None
    tie_word_embeddings: bool = False
    initializer_range: float | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.lm_config, dict):
            settings = dict(self.lm_config)
            model_type = settings.pop("model_type", "llama")
            self.lm_config = AutoConfig.for_model(model_type, **settings)
        elif self.lm_config is None:
            self.lm_config = AutoConfig.for_model("llama")
        self._check()
        kwargs.setdefault("bos_token_id", getattr(self.lm_config, "bos_token_id", None))
        kwargs.setdefault("eos_token_id", [self.ids.end_of_text_id, self.ids.end_of_speech_id])
        kwargs.setdefault("pad_token_id", self.ids.end_of_text_id)
        if self.initializer_range is None:
            self.initializer_range = getattr(self.lm_config, "initializer_range", 0.02)
        super().__post_init__(**kwargs)

    def _check(self) -> None:
        if self.num_units < 1:
            raise ValueError(f"num_units is {self.num_units}: a speech vocabulary has at least one unit")
        for name in ("num_input_adapter_layers", "num_output_adapter_layers", "num_reserved_speech_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: give 0 or more")
        if self.layer_mixing not in LAYER_MIXINGS:
            raise ValueError(f"layer_mixing is {self.layer_mixing!r}: choose one of {', '.join(LAYER_MIXINGS)}")
        num_layers = self.lm_config.num_hidden_layers
        if self.selector_input not in ("static", "last", "levels") and not (
            isinstance(self.selector_input, int) and 0 <= self.selector_input < num_layers
        ):
            raise ValueError(
                f"selector_input is {self.selector_input!r}: choose 'static', 'last', 'levels' or "
                f"a layer index from 0 to {num_layers - 1}"
            )
        for name in ("selector_hidden_size", "selector_level_size", "selector_level_hidden_size"):
            size = getattr(self, name)
            if size is not None and (size < 1 or self.layer_mixing != "selected"):
                raise ValueError(
                    f"{name} is {size} and layer_mixing is {self.layer_mixing!r}: give a positive size with "
                    "'selected', which alone has a selector, or None"
                )
        if (self.selector_input == "levels") != (self.selector_level_size is not None):
            raise ValueError(
                f"selector_input is {self.selector_input!r} and selector_level_size is {self.selector_level_size}: "
                "give 'levels' and a size, or neither"
            )
        if self.selector_level_hidden_size is not None and self.selector_level_size is None:
            raise ValueError(
                f"selector_level_hidden_size is {self.selector_level_hidden_size} without a selector_level_size: "
                "give both, or None"
            )
        if self.selector_entropy_weight < 0:
            raise ValueError(f"selector_entropy_weight is {self.selector_entropy_weight}: give 0 or more")
        if self.selector_input != "static" and self.layer_mixing != "selected":
            raise ValueError(
                f"selector_input is {self.selector_input!r}, but layer_mixing is {self.layer_mixing!r}: only "
                "'selected' has a selector; leave selector_input at 'static'"
            )
        if self.selector_entropy_weight and self.layer_mixing != "selected":
            raise ValueError(
                f"selector_entropy_weight is {self.selector_entropy_weight}, but layer_mixing is "
                f"{self.layer_mixing!r}: only 'selected' has a selector; set the weight to 0"
            )

    @property
    def ids(self) -> IdSpace:
        """The id space of this model."""
        end_of_text = self.lm_config.eos_token_id
        if isinstance(end_of_text, list | tuple):
            end_of_text = end_of_text[0]
        if end_of_text is None:
            raise ValueError("lm_config has no eos_token_id: give the id of the token that ends a text")
        return IdSpace(
            text_vocab_size=self.lm_config.vocab_size,
            num_units=self.num_units,
            end_of_text_id=end_of_text,
            num_reserved_speech_tokens=self.num_reserved_speech_tokens,
        )

    @property
    def vocab_size(self) -> int:
        """Size of the whole id space."""
        return self.ids.vocab_size

    @property
    def hidden_size(self) -> int:
        """Width of the backbone and of the adapters."""
        return self.lm_config.hidden_size

    @property
    def max_position_embeddings(self) -> int:
        """Longest sequence the backbone has positions for."""
        return self.lm_config.max_position_embeddings

    @property
    def num_hidden_layers(self) -> int:
        """Layers of all three stacks: backbone, output adapter, input adapter (their order in a cache)."""
        return self.lm_config.num_hidden_layers + self.num_output_adapter_layers + self.num_input_adapter_layers

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The backbone's configuration stretched over everything a cache holds; `generate` sizes its cache by it.

        Its layers are the backbone's, the output adapter's, the input adapter's, and one more that keeps
        which of the seen tokens are speech. Those that are not the backbone's attend to everything, also
        where the backbone's look no further than a window.
        """
        config = copy.deepcopy(self.lm_config)
        num_more = self.num_hidden_layers + 1 - config.num_hidden_layers
        config.num_hidden_layers += num_more
        config.vocab_size = self.vocab_size
        layer_types = getattr(config, "layer_types", None)
        if layer_types is None and getattr(config, "sliding_window", None) is not None:
            layer_types = ["sliding_attention"] * self.lm_config.num_hidden_layers
        if layer_types is not None:
            config.layer_types = [*layer_types, *["full_attention"] * num_more]
        if getattr(config, "no_rope_layers", None) is not None:
            config.no_rope_layers = [*config.no_rope_layers, *[1] * num_more]  # 1: with rotary positions
        return config

    def adapter_config(self) -> PreTrainedConfig:
        """What adapter layers are built from: `get_text_config`, without a window for families that have only one."""
        config = self.get_text_config()
        if getattr(self.lm_config, "layer_types", None) is None and getattr(config, "sliding_window", None):
            config.sliding_window = None
        return config

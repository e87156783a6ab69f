"""config.json as transformers sees it, with the version that it describes."""

from __future__ import annotations

from transformers import PreTrainedConfig

from baichuan.config import VERSIONS, ModelConfig, Version, require_choice, require_no_rope_with_alibi
from baichuan.errors import ConfigError
from baichuan.weights.hub.rope import ROPE_KEYS, read_rope
from baichuan.weights.hub.version import LENGTH_KEYS, config_evidence, decide_version, fitting_versions


class BaichuanConfig(PreTrainedConfig):
    """The hub's config.json, plus `model_version`, which is taken from the file where only one version fits it."""

    model_type = "baichuan"
    attribute_map = {"model_max_length": "max_position_embeddings"}

    def __init__(
        self,
        model_version: str | None = None,
        vocab_size: int = 64000,
        hidden_size: int = 4096,
        intermediate_size: int = 11008,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 32,
        max_position_embeddings: int | None = None,
        model_max_length: int | None = None,
        hidden_act: str = "silu",
        rms_norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        **kwargs,
    ):
        require_choice("hidden_act", hidden_act, ("silu",))
        self.rope_theta, self.rope_factor = read_rope("config.json", {key: kwargs.pop(key, None) for key in ROPE_KEYS})
        lengths = dict(zip(LENGTH_KEYS, (max_position_embeddings, model_max_length), strict=True))
        evidence = {"hidden_size": hidden_size, "vocab_size": vocab_size, "model_version": model_version, **lengths}
        self._evidence = evidence | {"architectures": kwargs.get("architectures")}
        self.model_version = model_version
        if model_version is None and kwargs.get("architectures"):
            fitting = fitting_versions(config_evidence(self._evidence))
            self.model_version = fitting[0] if len(fitting) == 1 else None
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.max_position_embeddings = max_position_embeddings or model_max_length or 4096
        self.hidden_act = hidden_act
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        kwargs.pop("auto_map", None)  # it points at the hub's code
        ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        super().__init__(**{"tie_word_embeddings": False, **ids, **kwargs})

    @classmethod
    def of(cls, model: ModelConfig) -> BaichuanConfig:
        """The configuration of the same model."""
        return cls(
            model_version=model.model_version,
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            intermediate_size=model.intermediate_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_heads,
            max_position_embeddings=model.max_positions,
            hidden_act=model.hidden_act,
            rms_norm_eps=model.rms_norm_eps,
            rope_theta=model.rope_theta,
            rope_scaling={"type": "linear", "factor": model.rope_factor},
            dtype=model.dtype,
        )

    @property
    def version(self) -> Version:
        """Raises ConfigError when the version is unknown, or config.json contradicts it."""
        if self.model_version is None:
            fitting = fitting_versions(config_evidence(self._evidence))
            raise ConfigError(
                f"this config.json fits {' and '.join(fitting) or 'no version'}; give the model_version, "
                "as in from_pretrained(folder, model_version=...)"
            )
        if self._evidence["architectures"]:
            decide_version("config.json", self.model_version, config_evidence(self._evidence))
        require_no_rope_with_alibi(self.model_version, self.rope_theta, self.rope_factor)
        return VERSIONS[self.model_version]

    def to_dict(self) -> dict:
        """As in the hub's config.json: the version's class name and its keys for the length."""
        values = super().to_dict()
        values.pop("_evidence", None)
        if (factor := values.pop("rope_factor", 1.0)) != 1.0:
            values["rope_scaling"] = {"type": "linear", "factor": factor}
        if self.model_version in VERSIONS:
            version, length = VERSIONS[self.model_version], values.pop("max_position_embeddings")
            values |= {"architectures": [version.architecture], **dict.fromkeys(version.length_keys, length)}
        return values


def model_config(config: BaichuanConfig) -> ModelConfig:
    """The same model, but for the dtype.  Raises ConfigError where the configuration does not say which version it is.

    Not a method: transformers sets every key of a config.json as an attribute, whatever it is called.
    """
    [version] = [name for name, each in VERSIONS.items() if each == config.version]
    return ModelConfig(
        model_version=version,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        max_positions=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=config.rope_theta,
        rope_factor=config.rope_factor,
    )

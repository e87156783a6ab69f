"""What a model, a quantisation, a build and a generation are: frozen records, checked when made."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import asdict, dataclass
from numbers import Integral, Real
from typing import Any, get_type_hints

from baichuan.errors import ConfigError

DTYPES = ("float16", "bfloat16", "float32")
WEIGHT_TYPES = ("none", "int8", "int4", "smooth_quant", "fp8")  # described in weights/types.py
BACKEND_NAMES = ("torch", "tensorrt", "tensorrt_rtx")  # implemented by the entries of executors/registry.py
STORAGE_TYPES = ("fp32", "fp16")  # a binary folder's types of weights; weights/binary/layout.py says what they mean
DEVICES = ("auto", "cpu", "cuda")  # executors/device.py resolves auto
SEEDS = 1 << 63  # random seeds are 0 to SEEDS - 1
BYTES_PER_ELEMENT = {"float16": 2, "bfloat16": 2, "float32": 4}


def require_choice(name: str, value, choices) -> None:
    """Raise ConfigError unless `value` is one of `choices`."""
    if not isinstance(value, Hashable) or value not in choices:
        raise ConfigError(f"{name} {value!r} is not known; use one of {', '.join(str(c) for c in choices)}")


def require_range(name: str, value, low, high) -> None:
    """Raise ConfigError unless value is a number and low <= value <= high; NaN never is."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not low <= value <= high:
        raise ConfigError(f"{name} {value!r} is {'out of range' if number else 'no number'}; use {low} to {high}")


def require_integer(name: str, value: Any, wanted: str = "one") -> int:
    """The value as Python's own integer.  Raises ConfigError for what is none, of NumPy's either.

    wanted: what the message asks for
    """
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise ConfigError(f"{name} {value!r} is no integer; give {wanted}")
    return int(value)


@dataclass(frozen=True)
class Version:
    """How the four released model versions differ, other than in size."""

    rotary: bool  # RoPE, else ALiBi
    norm_head: bool  # the rows of lm_head are normalised to length 1
    architecture: str  # class name in the hub's config.json
    length_keys: tuple[str, ...]  # keys of the hub's config.json that hold the context length


VERSIONS = {
    "v1_7b": Version(True, False, "BaiChuanForCausalLM", ("max_position_embeddings",)),
    "v1_13b": Version(False, False, "BaichuanForCausalLM", ("model_max_length",)),
    "v2_7b": Version(True, True, "BaichuanForCausalLM", ("max_position_embeddings", "model_max_length")),
    "v2_13b": Version(False, True, "BaichuanForCausalLM", ("model_max_length",)),
}


def require_no_rope_with_alibi(model_version: str, theta: float, factor: float) -> None:
    """Raise ConfigError when RoPE's settings are other than the defaults in a version that has ALiBi."""
    if not VERSIONS[model_version].rotary and (theta, factor) != (ModelConfig.rope_theta, ModelConfig.rope_factor):
        raise ConfigError(
            f"rope_theta {theta:g} with scaling factor {factor:g} is of RoPE and {model_version} has ALiBi; remove it"
        )


@dataclass(frozen=True)
class ModelConfig:
    """One Baichuan model's shape.  `dtype` is that of its activations and dense weights."""

    model_version: str
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    vocab_size: int
    max_positions: int = 4096  # context length the checkpoint was trained for; tables extend beyond it
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    dtype: str = "float16"
    rope_theta: float = 10000.0  # RoPE: base of the angles
    rope_factor: float = 1.0  # RoPE: what positions are divided by, for texts longer than those of the training

    def __post_init__(self):
        require_choice("model_version", self.model_version, VERSIONS)
        require_choice("dtype", self.dtype, DTYPES)
        require_choice("hidden_act", self.hidden_act, ("silu",))
        require_range("num_layers", self.num_layers, 1, 1024)
        for name in ("hidden_size", "num_heads", "intermediate_size", "vocab_size", "max_positions"):
            require_range(name, getattr(self, name), 1, 1 << 24)
        require_range("rms_norm_eps", self.rms_norm_eps, 0.0, 1.0)
        require_range("rope_theta", self.rope_theta, 1.0, 1e12)
        require_range("rope_factor", self.rope_factor, 1.0, 1e4)
        require_no_rope_with_alibi(self.model_version, self.rope_theta, self.rope_factor)
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}; "
                "every head has the same number of dimensions"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim {self.head_dim} is odd; RoPE rotates pairs of dimensions")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def version(self) -> Version:
        return VERSIONS[self.model_version]

    def check_tensor_parallel(self, tp_size: int) -> None:
        """Raise ConfigError unless heads and MLP columns divide by `tp_size` (the vocabulary is padded)."""
        require_range("tp_size", tp_size, 1, 1024)
        for name in ("num_heads", "intermediate_size"):
            if getattr(self, name) % tp_size:
                raise ConfigError(
                    f"{name} {getattr(self, name)} is not divisible by tp_size {tp_size}; use a tp_size that divides it"
                )


_7B: dict[str, Any] = dict(hidden_size=4096, num_layers=32, num_heads=32, intermediate_size=11008)
_13B: dict[str, Any] = dict(hidden_size=5120, num_layers=40, num_heads=40, intermediate_size=13696)
PRESETS = {
    "v1_7b": ModelConfig("v1_7b", vocab_size=64000, **_7B),
    "v1_13b": ModelConfig("v1_13b", vocab_size=64000, **_13B),
    "v2_7b": ModelConfig("v2_7b", vocab_size=125696, **_7B),
    "v2_13b": ModelConfig("v2_13b", vocab_size=125696, **_13B),
}


@dataclass(frozen=True)
class QuantConfig:
    """How weights, activations and the KV cache are quantised.  By default nothing is."""

    weights: str = "none"  # one of WEIGHT_TYPES
    group_size: int = 0  # int4: input channels that share a scale; 0 = the whole row
    zero_points: bool = False  # int4: each scale has a zero beside it, as imported and calibrated weights may have
    quantize_lm_head: bool = False  # int8 and int4 only; the embedding always stays in the dtype
    per_token: bool = False  # smooth_quant and fp8: one activation scale per token, else one per tensor
    per_channel: bool = False  # smooth_quant and fp8: one weight scale per output channel, else one per tensor
    kv_cache: str = "none"  # none | int8 | fp8

    def __post_init__(self):
        require_choice("weights", self.weights, WEIGHT_TYPES)
        require_choice("kv_cache", self.kv_cache, ("none", "int8", "fp8"))
        require_choice("group_size", self.group_size, (0, 32, 64, 128))
        if self.group_size and self.weights != "int4":
            raise ConfigError(f"group_size {self.group_size} needs int4 weights; leave it 0 for {self.weights}")
        if self.zero_points and self.weights != "int4":
            raise ConfigError(f"zero_points needs int4 weights; leave it False for {self.weights}")
        if (self.per_token or self.per_channel) and self.weights not in ("smooth_quant", "fp8"):
            raise ConfigError(
                "per_token and per_channel belong to SmoothQuant and FP8; add --use_smooth_quant or --enable_fp8"
            )
        if self.quantize_lm_head and self.weights not in ("int8", "int4"):
            raise ConfigError("quantize_lm_head needs int8 or int4 weight-only quantisation; add --use_weight_only")


@dataclass(frozen=True)
class WeightOnly:
    """Weight-only integers that calibration finds, and a binary folder holds beside its weights."""

    precision: str  # int8 or int4, as in QuantConfig.weights
    group_size: int = 0  # int4: input channels that share a scale; 0 = the whole row
    symmetric: bool = False  # int4: no zero beside each scale

    def __post_init__(self):
        require_choice("weight_only_precision", self.precision, ("int8", "int4"))
        QuantConfig(self.precision, self.group_size)  # raises where they do not fit together

    @property
    def bits(self) -> int:
        return {"int8": 8, "int4": 4}[self.precision]

    @property
    def zero_points(self) -> bool:
        """As in QuantConfig."""
        return self.precision == "int4" and not self.symmetric


@dataclass(frozen=True)
class BuildConfig:
    """What an engine is built for: its parallelism, its limits, its backend and its switches."""

    world_size: int = 1
    max_batch_size: int = 1
    max_input_len: int = 1024
    max_output_len: int = 1024
    max_beam_width: int = 1
    max_num_tokens: int = 0  # most tokens of one packed step, at least max_rows; 0 = max_batch_size * max_input_len
    logits_dtype: str = "float32"
    backend: str = "torch"  # one of BACKEND_NAMES
    gpt_attention_plugin: bool = True  # our fused attention kernels, else the library's own attention
    gemm_plugin: bool = True  # our GEMM kernels where they are faster, else the library's own
    multi_block_mode: bool = True  # decode attention splits long caches over several blocks
    tokens_per_block: int = 64  # tokens of a block of the paged KV cache; not used by backends without one

    def __post_init__(self):
        require_range("world_size", self.world_size, 1, 1024)
        require_range("max_batch_size", self.max_batch_size, 1, 65536)
        require_range("max_input_len", self.max_input_len, 1, 1 << 20)
        require_range("max_output_len", self.max_output_len, 1, 1 << 20)
        require_range("max_beam_width", self.max_beam_width, 1, 64)
        require_range("max_num_tokens", self.max_num_tokens, 0, 1 << 26)
        require_choice("logits_dtype", self.logits_dtype, ("float16", "float32"))
        require_choice("backend", self.backend, BACKEND_NAMES)
        require_choice("tokens_per_block", self.tokens_per_block, (16, 32, 64, 128))
        if 0 < self.max_num_tokens < self.max_rows:
            raise ConfigError(
                f"max_num_tokens {self.max_num_tokens} is below the {self.max_rows} rows of max_batch_size and "
                "max_beam_width, each of which gets one token per step; raise it, or leave it 0"
            )

    @property
    def max_seq_len(self) -> int:
        """Tokens of one sequence, prompt and continuation together."""
        return self.max_input_len + self.max_output_len

    @property
    def max_rows(self) -> int:
        """Rows of the KV cache: every beam of every sequence."""
        return self.max_batch_size * self.max_beam_width


@dataclass(frozen=True)
class EngineSpec:
    """Everything that decides what an engine computes, except its weights."""

    model: ModelConfig
    quant: QuantConfig
    build: BuildConfig


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen.  Applied in this order: penalty, temperature, top-k, top-p."""

    num_beams: int = 1
    top_k: int = 5  # 1 = greedy; 0 = all tokens
    top_p: float = 0.85  # 0 or 1 = all tokens
    temperature: float = 0.3  # 0 = greedy
    repetition_penalty: float = 1.1
    length_penalty: float = 1.0
    random_seed: int = 0
    eos_id: int = 2
    pad_id: int = 0
    stop_ids: tuple[int, ...] = ()  # more token ids that end a sequence, such as a chat's role ids

    def __post_init__(self):
        for name in ("num_beams", "top_k", "random_seed", "eos_id", "pad_id"):
            object.__setattr__(self, name, require_integer(name, getattr(self, name)))  # NumPy's become Python's
        if not isinstance(self.stop_ids, (tuple, list)):
            raise ConfigError(f"stop_ids {self.stop_ids!r:.60} is no list of token ids; give one, such as (5, 6)")
        stop_ids = tuple(require_integer("the stop id", token, "token ids") for token in self.stop_ids)
        object.__setattr__(self, "stop_ids", stop_ids)
        require_range("num_beams", self.num_beams, 1, 64)
        require_range("top_k", self.top_k, 0, 1 << 24)
        require_range("top_p", self.top_p, 0.0, 1.0)
        require_range("temperature", self.temperature, 0.0, 100.0)
        if self.temperature != 0:
            require_range("temperature", self.temperature, 1e-3, 100.0)
        elif self.num_beams > 1:
            raise ConfigError(
                f"temperature 0 means greedy decoding and num_beams {self.num_beams} is a search; leave one of them out"
            )
        require_range("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        require_range("length_penalty", self.length_penalty, -10.0, 10.0)
        require_range("random_seed", self.random_seed, 0, SEEDS - 1)
        for name in ("top_p", "temperature", "repetition_penalty", "length_penalty"):
            object.__setattr__(self, name, float(getattr(self, name)))

    @property
    def greedy(self) -> bool:
        return self.num_beams == 1 and (self.top_k == 1 or self.temperature == 0)


def to_json(record) -> dict:
    """A record as plain JSON values; `from_json` inverts it."""
    return asdict(record)


def from_json(cls, values: dict):
    """A record of type `cls`; raises ConfigError for missing, unknown or wrongly typed fields."""
    types = get_type_hints(cls)
    if not isinstance(values, dict):
        raise ConfigError(f"{cls.__name__} is a {type(values).__name__} instead of an object; the file is damaged")
    if unknown := sorted(set(values) - set(types)):
        raise ConfigError(f"{cls.__name__} has no field {unknown[0]}; the file was written by another version")
    kinds: dict[Any, Any] = {int: int, float: (int, float), str: str, bool: bool}
    for name, value in values.items():
        kind = kinds.get(types[name], object)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ConfigError(f"{cls.__name__}.{name} is {value!r}, not of type {types[name].__name__}")
    try:
        return cls(**values)
    except TypeError as error:
        raise ConfigError(f"{cls.__name__} is incomplete: {error}") from None

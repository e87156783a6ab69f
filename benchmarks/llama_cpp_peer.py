"""llama.cpp beside the engine: the same weights as a GGUF file, run by llama-cpp-python.

Both packages are extras of the benchmark: pip install llama-cpp-python gguf.  llama-cpp-python compiles llama.cpp for
the processor at hand.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from numpy.ctypeslib import as_array
from torch import Tensor

from baichuan.config import ModelConfig

GGUF_TYPES = {"float32": "F32", "float16": "F16", "int8": "Q8_0", "int4": "Q4_0"}
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def installed() -> bool:
    return all(importlib.util.find_spec(name) for name in ("llama_cpp", "gguf"))


def write_gguf(path: Path, model: ModelConfig, tensors: Mapping[str, Tensor], precision: str) -> None:
    """A checkpoint's tensors, as read by weights.hub (v2's lm_head normalised), in llama.cpp's format.

    Norms stay float32 and embeddings float16; every matrix, lm_head too, has the precision's type.
    """
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(model.max_positions)
    writer.add_embedding_length(model.hidden_size)
    writer.add_block_count(model.num_layers)
    writer.add_feed_forward_length(model.intermediate_size)
    writer.add_head_count(model.num_heads)
    writer.add_head_count_kv(model.num_heads)
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_rope_freq_base(model.rope_theta)
    writer.add_layer_norm_rms_eps(model.rms_norm_eps)
    writer.add_vocab_size(model.vocab_size)
    writer.add_tokenizer_model("none")
    for name, tensor in tensors.items():
        for part, values in gguf_tensors(name, tensor.float(), model):
            kind = GGUF_TYPES[precision]
            if values.dim() == 1 or precision == "float32":
                kind = "F32"
            elif part.startswith("token_embd"):
                kind = "F16"
            stored = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(part, gguf.quants.quantize(values.numpy(), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_tensors(name: str, tensor: Tensor, model: ModelConfig):
    """(llama.cpp's name, tensor) for one of the hub's.  W_pack becomes three, q and k with rows in RoPE's pairs."""
    if name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        yield {"e": "token_embd", "n": "output_norm"}.get(name[6], "output") + ".weight", tensor
        return
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    if rest == "self_attn.W_pack.weight":
        for part, values in zip("qkv", tensor.chunk(3), strict=True):
            if part != "v" and model.version.rotary:
                heads = values.unflatten(0, (model.num_heads, 2, model.head_dim // 2))
                values = heads.transpose(1, 2).reshape(values.shape)
            yield f"blk.{layer}.attn_{part}.weight", values.contiguous()
        return
    if rest.endswith("rotary_emb.inv_freq"):
        return
    yield f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight", tensor


class LlamaCpp:
    """One sequence by llama.cpp."""

    def __init__(self, path: Path, context: int):
        from llama_cpp import Llama

        threads = torch.get_num_threads()
        self._llama = Llama(
            str(path), n_ctx=context, n_threads=threads, n_threads_batch=threads, n_batch=512, verbose=False
        )

    def times(self, prompt: Sequence[int], steps: int) -> tuple[float, float]:
        """Seconds of the prompt and of one decode step, greedy."""
        self._llama.reset()
        start = time.perf_counter()
        self._llama.eval(prompt)
        prefill = time.perf_counter() - start
        start = time.perf_counter()
        for _ in range(steps):
            self._llama.eval([int(self._last_logits().argmax())])
        return prefill, (time.perf_counter() - start) / steps

    def chunk(self, ids: Sequence[int]) -> float:
        """Seconds of these tokens after what was evaluated, all at once."""
        start = time.perf_counter()
        self._llama.eval(ids)
        return time.perf_counter() - start

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Logits after the last of the ids, [vocab_size]."""
        self._llama.reset()
        self._llama.eval(ids)
        return self._last_logits().clone()

    def _last_logits(self) -> Tensor:
        from llama_cpp import llama_get_logits

        return torch.from_numpy(as_array(llama_get_logits(self._llama.ctx), (self._llama.n_vocab(),)))

    def close(self) -> None:
        self._llama.close()

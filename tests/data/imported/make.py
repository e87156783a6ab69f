"""Checkpoints that other tools quantised, each with what the tool itself computes: python tests/data/imported/make.py

Needs gptqmodel 7.7, autoawq 0.2.9, compressed-tensors 0.20 and bitsandbytes 0.50; runs on a CPU.  A folder holds
config.json, model.safetensors with one layer of a tiny v1_7b model, and outputs.safetensors: for each quantised matrix
W, by the tool's own dequantisation, x and x @ Wᵀ in float32.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

HERE = Path(__file__).parent
HIDDEN, INTERMEDIATE, HEADS, VOCAB = 128, 192, 4, 48
MATRICES = {
    "self_attn.W_pack": (3 * HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
CONFIG = {
    "architectures": ["BaiChuanForCausalLM"],
    "model_type": "baichuan",
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "max_position_embeddings": 256,
    "num_attention_heads": HEADS,
    "num_hidden_layers": 1,
    "rms_norm_eps": 1e-6,
    "torch_dtype": "float16",
    "vocab_size": VOCAB,
}


def linears(seed: int = 0) -> dict[str, nn.Linear]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, (rows, columns) in MATRICES.items():
        linear = nn.Linear(columns, rows, bias=False, dtype=torch.float16)
        scale = torch.rand(rows, 1, generator=generator) + 0.5
        linear.weight.data = (torch.randn(rows, columns, generator=generator) * scale / columns**0.5 + 0.02).half()
        linear.weight.data[::5].abs_()  # rows whose zero is 0
        found[name] = linear
    return found


def others() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    norms = ("model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm", "model.norm")
    tensors = {f"{name}.weight": (1 + 0.1 * torch.randn(HIDDEN, generator=generator)).half() for name in norms}
    for name in ("model.embed_tokens", "lm_head"):
        tensors[f"{name}.weight"] = torch.randn(VOCAB, HIDDEN, generator=generator).half()
    return tensors


def write(name: str, settings: dict, matrices: dict[str, tuple[dict[str, torch.Tensor], torch.Tensor]]) -> None:
    """matrices: each one's tensors by the ends of their names, and the dense [out, in] by the tool."""
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    tensors, outputs = others(), {}
    generator = torch.Generator().manual_seed(2)
    for module, (parts, dense) in matrices.items():
        tensors |= {f"model.layers.0.{module}.{end}": part.contiguous() for end, part in parts.items()}
        x = torch.randn(3, dense.shape[1], generator=generator)
        outputs |= {f"{module}.x": x, f"{module}.y": x @ dense.float().t()}
    save_file(tensors, folder / "model.safetensors")
    save_file(outputs, folder / "outputs.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": settings}, indent=1))


def round_to_nearest(weight: torch.Tensor, bits: int, size: int, symmetric: bool, order: torch.Tensor | None = None):
    """Scales and zeros [out, groups], and each input channel's group."""
    rows, columns = weight.shape
    size = columns if size == -1 else size
    groups = torch.arange(columns) // size
    if order is not None:
        groups = groups[torch.argsort(order)]
    scales, zeros = torch.empty(rows, math.ceil(columns / size)), torch.empty(rows, math.ceil(columns / size))
    for group in range(scales.shape[1]):
        part, top = weight[:, groups == group].float(), 2**bits - 1
        if symmetric:
            scales[:, group], zeros[:, group] = part.abs().amax(1) / (top // 2), 2 ** (bits - 1)
        else:
            low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
            scales[:, group] = (high - low) / top
            zeros[:, group] = (-low / scales[:, group]).round()
    return scales, zeros, groups.int()


def gptq(name: str, bits: int, size: int, symmetric: bool, version: str, ordered: bool = False) -> None:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    settings = QuantizeConfig(bits=bits, group_size=size, sym=symmetric, desc_act=ordered)
    matrices = {}
    for module, linear in linears().items():
        rows, columns = linear.weight.shape
        order = torch.randperm(columns, generator=torch.Generator().manual_seed(columns)) if ordered else None
        scales, zeros, groups = round_to_nearest(linear.weight, bits, size, symmetric, order)
        packed = TorchLinear(bits, size, symmetric, ordered, columns, rows, bias=False)
        packed.pack_original(linear, scales, zeros, groups)
        packed.post_init()
        dense = packed.dequantize_weight().t()
        if version == "gptq":
            convert_gptq_v2_to_v1_format_module(packed, settings)
        matrices[module] = (
            {end: getattr(packed, end).clone() for end in ("qweight", "qzeros", "scales", "g_idx")},
            dense,
        )
    write(name, {"quant_method": "gptq", "bits": bits, "group_size": size, "sym": symmetric, "desc_act": ordered,
                 "checkpoint_format": version, "pack_dtype": "int32", "lm_head": False}, matrices)  # fmt: skip


def awq(name: str, size: int) -> None:
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    matrices = {}
    for module, linear in linears().items():
        scales, zeros, _ = round_to_nearest(linear.weight, 4, size, False)
        packed = WQLinear_GEMM.from_linear(linear, 4, size, scales=scales.t(), zeros=zeros.t())
        parts = {end: getattr(packed, end) for end in ("qweight", "qzeros", "scales")}
        dense = dequantize_gemm(parts["qweight"], parts["qzeros"], parts["scales"], 4, size).t()
        matrices[module] = parts, dense
    write(name, {"quant_method": "awq", "bits": 4, "group_size": size, "version": "gemm", "zero_point": True,
                 "modules_to_not_convert": None}, matrices)  # fmt: skip


def compressed(name: str, bits: int, size: int | None, symmetric: bool) -> None:
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    strategy = "group" if size else "channel"
    arguments = QuantizationArgs(num_bits=bits, group_size=size, strategy=strategy, symmetric=symmetric)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    matrices = {}
    for module, linear in linears().items():
        scales, zeros, _ = round_to_nearest(linear.weight, bits, size or -1, symmetric)
        state = {"weight": linear.weight.data, "weight_scale": scales.half()}
        if not symmetric:
            state["weight_zero_point"] = (zeros - 2 ** (bits - 1)).to(torch.int8)
        parts = PackedQuantizationCompressor.compress(state, scheme)
        dense = PackedQuantizationCompressor.decompress(dict(parts), scheme)["weight"]
        matrices[module] = {end: part for end, part in parts.items() if part is not None}, dense
    group = {"targets": ["Linear"], "weights": json.loads(arguments.model_dump_json()), "input_activations": None}
    write(name, {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group},
                 "ignore": ["lm_head"], "kv_cache_scheme": None, "quantization_status": "compressed"},
          matrices)  # fmt: skip


def bitsandbytes(name: str, bits: int) -> None:
    import bitsandbytes as bnb

    matrices = {}
    for module, linear in linears().items():
        rows, columns = linear.weight.shape
        if bits == 4:
            data, state = bnb.functional.quantize_4bit(linear.weight.data, quant_type="nf4", compress_statistics=True)
            parts = {"weight": data} | {f"weight.{end}": part for end, part in state.as_dict(packed=True).items()}
            dense = bnb.functional.dequantize_4bit(data, state)
        else:
            data, scale, _ = bnb.functional.int8_vectorwise_quant(linear.weight.data)
            parts = {"weight": data, "SCB": scale, "weight_format": torch.tensor(0, dtype=torch.uint8)}
            dense = bnb.functional.int8_vectorwise_dequant(data, scale)
        matrices[module] = parts, dense
    settings = {"load_in_4bit": bits == 4, "load_in_8bit": bits == 8, "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": True, "llm_int8_threshold": 6.0}  # fmt: skip
    write(name, {"quant_method": "bitsandbytes"} | settings, matrices)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    gptq("gptq_v1_sym", 4, 32, True, "gptq")
    gptq("gptq_v1_zeros", 4, 64, False, "gptq")
    gptq("gptq_v2_zeros", 4, 32, False, "gptq_v2")
    gptq("gptq_ordered", 4, 32, True, "gptq", ordered=True)
    gptq("gptq_int8_rows", 8, -1, True, "gptq")
    awq("awq", 64)
    compressed("compressed_sym", 4, 32, True)
    compressed("compressed_zeros", 4, 64, False)
    compressed("compressed_int8_rows", 8, None, True)
    bitsandbytes("bitsandbytes_nf4", 4)
    bitsandbytes("bitsandbytes_int8", 8)

"""FP8 scales in the old example's .npz format, as another program writes it, and damaged."""

import numpy as np
import pytest
import torch
from binary_models import ROTARY, make_checkpoint, make_tensors

from baichuan.config import QuantConfig
from baichuan.errors import CheckpointError
from baichuan.weights.binary.fp8_scales import LayerScales, read_fp8_scales, write_fp8_scales
from baichuan.weights.calibrated import from_fp8_scales
from baichuan.weights.rank_tensors import from_checkpoint, in_memory

MODULES = ["attention:qkv:q", "attention:qkv:k", "attention:qkv:v", "attention:dense", "mlp:fc", "mlp:gate", "mlp:proj"]


def old_file(layers=2) -> dict[str, np.ndarray]:
    """The arrays of a file that the old example's quantisation script exports: whole weights beside the scales."""
    values = {}
    for layer in range(layers):
        for number, module in enumerate(MODULES, start=1):
            prefix = f"_np:layers:{layer}:{module}"
            values[f"{prefix}:activation_scaling_factor"] = np.array([0.01 * number + layer], np.float32)
            values[f"{prefix}:weights_scaling_factor"] = np.array([0.001 * number + layer], np.float32)
            values[f"{prefix}:weight"] = np.zeros((64, 64), np.float16)
    return values


def test_the_old_format_is_read(tmp_path):
    np.savez(tmp_path / "old.npz", **old_file())
    layers = read_fp8_scales(tmp_path / "old.npz", 2)
    assert layers[1].activation["attention:dense"] == pytest.approx(1.04)
    assert layers[0].weights["mlp:proj"] == pytest.approx(0.007)
    assert layers[0].input_scale("qkv") == pytest.approx(0.03), "q, k and v share their input: the largest"
    assert layers[0].kv == {"k_scale": 1.0, "v_scale": 1.0}


def test_ours_is_read_back(tmp_path):
    scales = dict(zip(MODULES, np.float32(np.arange(1, 8)).tolist(), strict=True))
    layers = [LayerScales(scales, {key: value / 4 for key, value in scales.items()}, {"k_scale": 0.5, "v_scale": 2.0})]
    write_fp8_scales(tmp_path / "ours.npz", layers * 2)
    assert read_fp8_scales(tmp_path / "ours.npz", 2) == layers * 2


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("_np:layers:1:mlp:fc:weights_scaling_factor", None, "has no _np:layers:1:mlp:fc:weights_scaling_factor"),
        ("_np:layers:0:mlp:fc:weights_scaling_factor", np.array([np.nan], "f4"), "not a positive number"),
        ("_np:layers:0:mlp:fc:weights_scaling_factor", np.array([0], "f4"), "not a positive number"),
        ("_np:layers:0:mlp:fc:weights_scaling_factor", np.array([1]), "not a positive number"),
        ("_np:layers:0:mlp:fc:weights_scaling_factor", np.zeros(10_000, "f4"), "more than one number"),
        ("_np:layers:0:mlp:fc:weights_scaling_factor", np.array([{}], object), "not a readable .npz"),
    ],
)
def test_damage_is_one_sentence(tmp_path, key, value, message):
    values = {name: array for name, array in old_file().items() if name != key}
    np.savez(tmp_path / "bad.npz", **values, **({} if value is None else {key: value}))
    with pytest.raises(CheckpointError, match=message):
        read_fp8_scales(tmp_path / "bad.npz", 2)


def test_no_archive_is_one_sentence(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_fp8_scales(tmp_path / "missing.npz", 1)
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(CheckpointError, match="not a readable .npz"):
        read_fp8_scales(tmp_path / "text.npz", 1)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_each_module_keeps_its_own_weight_scale_at_every_tp_size(tmp_path, tp_size):
    np.savez(tmp_path / "old.npz", **old_file())
    scales = read_fp8_scales(tmp_path / "old.npz", 2)
    ranks = [
        in_memory(from_fp8_scales(make_checkpoint(ROTARY), ROTARY, QuantConfig("fp8"), scales, rank, tp_size))
        for rank in range(tp_size)
    ]
    tensors, hidden, inter = make_tensors(ROTARY), ROTARY.hidden_size, ROTARY.intermediate_size

    def whole(name, parts):  # the ranks' rows back in the hub's order
        shares = [rank[name].float().unflatten(0, (parts, -1)) for rank in ranks]
        return torch.cat(shares, 1).flatten(0, 1)

    for name, hubs, module_scales in (
        ("qkv", ["self_attn.W_pack"], [0.001, 0.002, 0.003]),
        ("gate_up", ["mlp.gate_proj", "mlp.up_proj"], [0.005, 0.006]),
    ):
        parts = len(module_scales)
        w = torch.from_numpy(np.concatenate([tensors[f"model.layers.0.{hub}.weight"] for hub in hubs]))
        scale = whole(f"layers.0.{name}.scale", parts)
        expected = torch.tensor(module_scales).repeat_interleave(hidden if parts == 3 else inter)
        torch.testing.assert_close(scale, expected)
        # PyTorch's own cast, of values inside e4m3's range
        inside = (w / expected[:, None]).abs() <= 448
        q = whole(f"layers.0.{name}.weight", parts)
        assert torch.equal(q[inside], (w / expected[:, None]).to(torch.float8_e4m3fn).float()[inside])
        assert inside.float().mean() > 0.3 and (q.abs() <= 448).all()
    assert all(torch.equal(rank["layers.1.down_proj.input_scale"], torch.tensor([1.07])) for rank in ranks)


@pytest.mark.parametrize("tp_size", [1, 2])
def test_channels_have_scales_of_their_own_and_need_no_file(tp_size):
    quant = QuantConfig("fp8", per_token=True, per_channel=True)
    ranks = [
        in_memory(from_checkpoint(make_checkpoint(ROTARY), ROTARY, quant, rank, tp_size)) for rank in range(tp_size)
    ]
    assert not any(name.endswith("input_scale") for name in ranks[0])
    w = torch.from_numpy(make_tensors(ROTARY)["model.layers.1.mlp.down_proj.weight"]).double()
    scale = ranks[0]["layers.1.down_proj.scale"].double()
    assert all(torch.equal(rank["layers.1.down_proj.scale"].double(), scale) for rank in ranks), "of whole rows"
    stored = torch.cat([rank["layers.1.down_proj.weight"].float() for rank in ranks], 1).double()
    error = (stored * scale[:, None] - w).abs()
    assert (error <= w.abs() * 2**-4 + scale[:, None] * 2**-10).all(), "half a step of three bits of mantissa"
    assert not (error <= w.abs() * 2**-5).all(), "the control: a bit more"
    plain = w.abs().amax(1, keepdim=True).float() / 448
    rounded = (w.float() / plain).to(torch.float8_e4m3fn).double() * plain.double()
    squares, plain_squares = error.square().sum(1), (rounded - w).square().sum(1)
    assert (squares <= 1.000001 * plain_squares).all() and squares.sum() < 0.97 * plain_squares.sum()

"""Activation ranges against forward hooks on the transformers model, which shares no code with the calibration."""

import hub_folders
import pytest
import torch
from binary_models import ALIBI, ROTARY, make_checkpoint, make_samples, make_tensors

from baichuan.calibration import layers as calibration
from baichuan.calibration.calibrate import calibrate
from baichuan.hf_model.modeling import BaichuanConfig, BaichuanForCausalLM
from baichuan.weights.hub.checkpoint import open_checkpoint

HUB_LINEARS = {
    "qkv": ["self_attn.W_pack"],
    "o_proj": ["self_attn.o_proj"],
    "gate_up": ["mlp.gate_proj", "mlp.up_proj"],
    "down_proj": ["mlp.down_proj"],
}


def hooked_ranges(model, samples):
    """max|x| and max|y| of each linear by the hub's names, and each layer's qkv outputs of every token."""
    hf = BaichuanForCausalLM(BaichuanConfig.of(model)).eval()
    hf.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in make_tensors(model).items()})
    found, qkv = {}, {}

    def watch(name):
        def hook(_, inputs, output):
            both = [each.detach().flatten(0, -2).abs().amax(0) for each in (inputs[0], output)]
            found[name] = [torch.maximum(*pair) for pair in zip(found.get(name, both), both, strict=True)]
            if name.endswith("W_pack"):
                qkv.setdefault(name, []).append(output.detach().flatten(0, -2))

        return hook

    for name, module in hf.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(watch(name))
    with torch.inference_mode():
        for sample in samples:
            hf(torch.tensor([sample]))
    return found, {name: torch.cat(outputs) for name, outputs in qkv.items()}


@pytest.mark.parametrize("model", [ROTARY, ALIBI], ids=lambda model: model.model_version)
def test_ranges_are_what_hooks_on_the_transformers_model_see(model, tmp_path, monkeypatch):
    monkeypatch.setitem(calibration.TOKENS_PER_STEP, "cpu", 50)  # several steps, of two or three samples each
    samples = make_samples(model)
    ranges = calibrate(make_checkpoint(model), model, samples, tmp_path, "cpu")
    expected, qkv = hooked_ranges(model, samples)
    assert len(ranges) == model.num_layers
    for layer, seen in enumerate(ranges):
        for name, hubs in HUB_LINEARS.items():
            hooks = [expected[f"model.layers.{layer}.{hub}"] for hub in hubs]
            # both in float32, sums in another order
            torch.testing.assert_close(seen.linears[name].x, hooks[0][0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(seen.linears[name].y, torch.cat([y for _, y in hooks]), rtol=1e-4, atol=1e-5)
        outputs = qkv[f"model.layers.{layer}.self_attn.W_pack"].unflatten(-1, (3, model.num_heads, model.head_dim))
        k = outputs[:, 1]
        if model.version.rotary:
            k = k.unflatten(-1, (2, -1)).norm(dim=-2)  # the pair that RoPE turns: its length bounds both
        assert seen.k == pytest.approx(k.abs().max().item(), rel=1e-4)
        assert seen.v == pytest.approx(outputs[:, 2].abs().max().item(), rel=1e-4)
    assert list(tmp_path.iterdir()) == [], "the hidden states are deleted"


def test_the_same_texts_give_the_same_ranges(tmp_path):
    def run(samples):
        return calibrate(make_checkpoint(ROTARY), ROTARY, samples, tmp_path, "cpu")

    samples = make_samples(ROTARY)
    for one, other in zip(run(samples), run(samples), strict=True):
        assert (one.k, one.v) == (other.k, other.v)
        for name in one.linears:
            assert torch.equal(one.linears[name].x, other.linears[name].x)
    different = run(make_samples(ROTARY, seed=1))
    assert not torch.allclose(different[0].linears["qkv"].x, run(samples)[0].linears["qkv"].x), "the negative control"


@pytest.mark.parametrize("form", hub_folders.SINGLE)
@pytest.mark.parametrize("model", [ROTARY, ALIBI], ids=lambda model: model.model_version)
def test_files_and_memory_give_the_same_ranges(model, form, tmp_path):
    samples = make_samples(model)
    from_memory = calibrate(make_checkpoint(model), model, samples, tmp_path, "cpu")
    assert_close(from_memory, calibrate(checkpoint_in_files(model, form, tmp_path), model, samples, tmp_path, "cpu"))
    with pytest.raises(AssertionError):  # the negative control: another checkpoint
        assert_close(from_memory, calibrate(make_checkpoint(model, seed=1), model, samples, tmp_path, "cpu"))


@pytest.mark.cuda
@pytest.mark.parametrize("form", hub_folders.SINGLE)
@pytest.mark.parametrize("model", [ROTARY, ALIBI], ids=lambda model: model.model_version)
def test_the_gpu_sees_what_the_cpu_sees(model, form, tmp_path):
    checkpoint = checkpoint_in_files(model, form, tmp_path)
    assert_close(*(calibrate(checkpoint, model, make_samples(model), tmp_path, device) for device in ("cpu", "cuda")))


def checkpoint_in_files(model, form, folder):
    """The model's checkpoint, read from two shards, since readers of files hand out other tensors than memory does."""
    tensors = {name: torch.from_numpy(tensor) for name, tensor in make_tensors(model).items()}
    hub_folders.write_weights(folder, tensors, form, shards=2)
    return open_checkpoint(folder, model)


def assert_close(one_side, other_side):
    """Both in float32, sums in another order."""
    for one, other in zip(one_side, other_side, strict=True):
        assert (one.k, one.v) == (pytest.approx(other.k, rel=1e-4), pytest.approx(other.v, rel=1e-4))
        for name, seen in one.linears.items():
            torch.testing.assert_close(seen.x, other.linears[name].x, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(seen.y, other.linears[name].y, rtol=1e-4, atol=1e-5)

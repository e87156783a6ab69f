"""`-sq auto`: what it leaves on texts that it has not seen, and what its folder holds."""

from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
import torch
from binary_models import ALIBI, ROTARY, make_samples, make_tensors

from baichuan.calibration import layers, strengths
from baichuan.calibration.calibrate import calibrate
from baichuan.calibration.convert import convert
from baichuan.calibration.layers import layer_passes
from baichuan.calibration.ops import RepeatingOps
from baichuan.calibration.request import ConvertRequest
from baichuan.config import QuantConfig
from baichuan.errors import CheckpointError
from baichuan.executors.cpu.reference import ReferenceExecutor, ReferenceOps
from baichuan.quant.smoothquant import MODES, Mode
from baichuan.records import DenseWeight, Step
from baichuan.util.progress import Progress
from baichuan.weights.assemble import assemble
from baichuan.weights.binary.folder import open_binary
from baichuan.weights.calibrated import from_binary
from baichuan.weights.rank_tensors import from_checkpoint, in_memory
from baichuan.weights.shard import LINEARS
from baichuan.weights.source import known

MODELS = pytest.mark.parametrize("model", [ROTARY, ALIBI], ids=lambda model: model.model_version)
ALL_MODES = pytest.mark.parametrize(
    "mode", MODES, ids=lambda mode: f"token={mode.per_token}-channel={mode.per_channel}"
)


@pytest.fixture(autouse=True)
def one_thread():
    """Thousands of products of 64 channels: threads that wait for each other on a busy machine take minutes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def checkpoint_with_outliers(model):
    """binary_models' checkpoint with a few channels far larger than the others, as trained models have them."""
    tensors = {name: torch.from_numpy(tensor) for name, tensor in make_tensors(model).items()}
    for name, tensor in tensors.items():
        if "layernorm" in name:
            tensor[3], tensor[17] = 40, 12
        if "up_proj" in name:
            tensor[5] *= 20
    return {name: known(tensor) for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """folder_of(model, alpha, tp_size): a converted folder, made once."""
    made = {}

    def convert_once(model, alpha, tp_size=1):
        key = (model.model_version, alpha, tp_size)
        if key not in made:
            out = tmp_path_factory.mktemp("strengths")
            request = ConvertRequest(out, model, partial(checkpoint_with_outliers, model), tp_size, 1, alpha)
            made[key] = convert(request, make_samples(model, 60, 64), {})
        return made[key]

    return convert_once


def smooth(mode: Mode) -> QuantConfig:
    return QuantConfig("smooth_quant", per_token=mode.per_token, per_channel=mode.per_channel)


def tensors_of(folder, model, mode, tp_size=1, rank=0, device="cpu"):
    opened = open_binary(folder, model, tp_size, torch.device(device))
    return in_memory(from_binary(opened, smooth(mode), rank))


def log_probabilities(model, quant, tensors):
    """After every token of 120 texts that no folder was calibrated on."""
    texts = [text for seed in range(5, 9) for text in make_samples(model, 30, 40, seed)]
    executor = ReferenceExecutor(model, quant, assemble(tensors, model, quant))
    executor.reset(len(texts), 40)
    return executor.forward(Step.of(texts, all_outputs=True)).double().log_softmax(-1)


@cache
def exact(model):
    plain = QuantConfig()
    checkpoint = checkpoint_with_outliers(model)
    return log_probabilities(model, plain, in_memory(from_checkpoint(checkpoint, model, plain, 0, 1)))


def divergence(model, mode, folder):
    """KL of an engine in the mode to the float model, in nats."""
    ours = log_probabilities(model, smooth(mode), tensors_of(folder, model, mode))
    return float((exact(model).exp() * (exact(model) - ours)).sum(-1).mean())


@MODELS
def test_no_mode_is_worse_than_one_strength_for_all_on_other_texts(folder_of, model, tmp_path):
    swapped = tmp_path / "swapped"  # the negative control: each mode gets another one's smoothers and scales
    swapped.mkdir()
    for path in folder_of(model, "auto").iterdir():
        values = path.read_bytes()
        if ".smoothing." in path.name:
            values = np.frombuffer(values, "<f4").reshape(len(MODES), -1)[::-1].tobytes()
        (swapped / path.name).write_bytes(values)
    own, others = [], []
    for mode in MODES:
        best = min(divergence(model, mode, folder_of(model, alpha)) for alpha in strengths.FIXED)
        own.append(divergence(model, mode, folder_of(model, "auto")) / best)
        others.append(divergence(model, mode, swapped) / best)
    assert max(own) < 1.02, "the folder of one strength rounds the same products in another order"
    assert min(own) < 0.9, "where it matters, a linear's own strength is closer"
    assert max(others) > 1.2, "the negative control"


@pytest.fixture(scope="module")
def of_one_strength(folder_of, tmp_path_factory):
    """of_one_strength(tp_size): the folders of `-sq auto`, with 0.5 alone to choose from, and of `-sq 0.5`."""

    @cache
    def make(tp_size):
        request = ConvertRequest(
            tmp_path_factory.mktemp("half"), ROTARY, partial(checkpoint_with_outliers, ROTARY), tp_size, 1, "auto"
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(strengths, "FIXED", (0.5,))
            patch.setattr(strengths, "ALPHAS", (0.5,))
            return convert(request, make_samples(ROTARY, 60, 64), {}), folder_of(ROTARY, 0.5, tp_size)

    return make


@ALL_MODES
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_with_one_strength_it_is_the_folder_of_that_strength(of_one_strength, mode, tp_size):
    for rank in range(tp_size):
        ours, theirs = (tensors_of(each, ROTARY, mode, tp_size, rank) for each in of_one_strength(tp_size))
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert tensor.dtype == theirs[name].dtype and tensor.shape == theirs[name].shape, name
            if tensor.dtype == torch.int8:  # a product that lies between two integers may fall to either
                differences = (tensor.int() - theirs[name].int()).abs()
                assert differences.max() <= 1 and differences.float().mean() < 1e-3, name
            else:
                torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=0, msg=name)


def test_the_weights_beside_the_smoothers_are_the_checkpoint_s(folder_of):
    folder = open_binary(folder_of(ROTARY, "auto", 2), ROTARY, 2)
    for name, source in checkpoint_with_outliers(ROTARY).items():
        assert torch.equal(folder.checkpoint()[name].read(0, source.shape[0]), source.read(0, source.shape[0])), name


def test_a_folder_without_its_smoothers_is_refused(folder_of, tmp_path):
    for path in folder_of(ROTARY, "auto").iterdir():
        if ".1.mlp.proj.smoothing.smoother" not in path.name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError, match="lacks 1 of .*mlp.proj.smoothing.smoother.bin"):
        tensors_of(tmp_path, ROTARY, MODES[0])
    in_memory(from_binary(open_binary(tmp_path, ROTARY, 1), QuantConfig("int8"), 0))  # which needs none


@MODELS
def test_a_pass_repeats_what_comes_before_the_exchanged_weight(model, tmp_path, monkeypatch):
    products, linear = [], ReferenceOps.linear
    monkeypatch.setattr(ReferenceOps, "linear", lambda ops, x, w: products.append(w) or linear(ops, x, w))
    samples, made = make_samples(model), {}
    with (
        layer_passes(checkpoint_with_outliers(model), model, samples, tmp_path, "cpu") as passes,
        Progress("", 1, "token") as progress,
    ):
        _, layer = next(passes.layers())
        repeating, plain = passes.ops(RepeatingOps), passes.ops(ReferenceOps)
        for left, name in zip((4, 4, 3, 2), LINEARS, strict=True):  # from the linear exchanged before on
            for scale in (2, 3):
                weights = replace(layer, **made, **{name: DenseWeight(getattr(layer, name).weight * scale)})
                products.clear()
                repeating.restart()
                ours = passes.output(repeating, weights, progress)
                assert len(products) == (left if scale == 2 else 4 - list(LINEARS).index(name)), (name, scale)
                assert torch.equal(ours, passes.output(plain, weights, progress)), (name, scale)
            made[name] = DenseWeight(getattr(layer, name).weight * 2)
        assert not torch.equal(ours, passes.output(plain, layer, progress)), "the negative control"


@MODELS
def test_divergences_are_those_of_whole_logits(model, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 7, model.hidden_size, generator=generator)
    hidden[2] = hidden[0]
    head = 2 * torch.randn(model.vocab_size, model.hidden_size, generator=generator)
    rows = head.double() / head.double().norm(dim=1, keepdim=True) if model.version.norm_head else head.double()
    log_p, log_q, _ = (hidden.double() @ rows.T).log_softmax(-1)
    monkeypatch.setattr(strengths, "HEAD_BYTES", 7 * 4 * model.hidden_size)  # blocks that do not divide the vocabulary
    found = strengths.divergences(hidden, known(head), model.version.norm_head)
    assert found[0].item() == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-4)
    assert found[0] > 0.1 and abs(found[1].item()) < 1e-6


@pytest.mark.parametrize("lengths", [[3], [5000], [10, 20, 30], [512] * 128, [100] * 7])
def test_texts_are_from_all_over_the_samples(lengths):
    samples = [[number] * length for number, length in enumerate(lengths)]
    chosen = strengths.spread(samples)
    assert len(chosen) == min(len(samples), max(2, 2 * strengths.TOKENS * len(samples) // sum(lengths)))
    assert chosen == sorted(set(chosen)) and chosen[0] == 0
    assert chosen[-1] >= len(samples) * (1 - 1 / len(chosen)) - 1


def test_the_ranges_are_those_of_all_texts(tmp_path):
    samples = make_samples(ROTARY, 40, 400)  # the search takes only some of them
    checkpoint = checkpoint_with_outliers(ROTARY)
    assert len(strengths.spread(samples)) < len(samples) / 3
    found = strengths.calibrate_by_mode(checkpoint, ROTARY, samples, tmp_path, "cpu")
    for ours, theirs in zip(found, calibrate(checkpoint, ROTARY, samples, tmp_path, "cpu"), strict=True):
        assert (ours.k, ours.v) == pytest.approx((theirs.k, theirs.v), rel=1e-5)
        for name, seen in theirs.linears.items():
            torch.testing.assert_close(ours.linears[name].x, seen.x, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(ours.linears[name].y, seen.y, rtol=1e-5, atol=1e-6)
            assert set(ours.linears[name].alphas) == set(MODES)


@pytest.mark.parametrize("lengths", [(40, 400), (4, 1500), (6, 20)])
def test_the_search_s_hidden_states_take_what_the_disk_is_asked_for(tmp_path, monkeypatch, lengths):
    taken, hidden_states = [], layers._hidden_states

    def noted(path, tokens, hidden_size, device):
        taken.append(4 * tokens * hidden_size)
        return hidden_states(path, tokens, hidden_size, device)

    monkeypatch.setattr(layers, "_hidden_states", noted)
    monkeypatch.setattr(strengths, "ALPHAS", (0.5,))
    model, samples = replace(ROTARY, num_layers=1), make_samples(ROTARY, *lengths)
    strengths.calibrate_by_mode(checkpoint_with_outliers(model), model, samples, tmp_path, "cpu")
    texts = 4 * sum(map(len, samples)) * model.hidden_size
    assert texts < sum(taken) <= texts + strengths.hidden_bytes(model, samples)
    assert list(tmp_path.iterdir()) == [], "they are deleted"


@pytest.mark.cuda
@MODELS
def test_the_gpu_finds_and_builds_the_same(folder_of, model, tmp_path, monkeypatch):
    if model is ALIBI:
        monkeypatch.setattr(layers, "GPU_SHARE", 0)  # the hidden states are in files
    request = ConvertRequest(
        tmp_path, model, partial(checkpoint_with_outliers, model), processes=1, alpha="auto", device="cuda"
    )
    folder = convert(request, make_samples(model, 60, 64), {})
    for mode in MODES:
        on_gpu, on_cpu = (tensors_of(folder, model, mode, device=device) for device in ("cuda", "cpu"))
        for name, tensor in on_cpu.items():
            torch.testing.assert_close(on_gpu[name].cpu().float(), tensor.float(), rtol=1e-5, atol=1, msg=name)
        ours, theirs = (divergence(model, mode, each) for each in (folder, folder_of(model, "auto")))
        assert ours < 1.2 * theirs, "products in another order may decide between two strengths that are alike"

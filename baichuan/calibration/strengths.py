"""`-sq auto`: SmoothQuant's strength for each linear, and for each mode that an engine may be built in.

Some of the calibration texts go through the model as it is, and in each mode with the layers quantised so far.  On the
first of them a linear takes the strength with which its layer's output comes closest to the float model's.  One
strength for all linears goes the same way beside it, and is taken instead if the logits after the other texts are then
closer: strengths of each linear's own can fit the first texts by chance.  The ranges that the search smooths and scales
by are of texts that it does not look at, as an engine's are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from baichuan.calibration.calibrate import Observer
from baichuan.calibration.layers import LayerPasses, layer_passes
from baichuan.calibration.ops import DenseOps, RepeatingOps
from baichuan.config import ModelConfig
from baichuan.executors.cpu.reference import ReferenceOps
from baichuan.quant.ranges import LayerRanges, joined
from baichuan.quant.smoothquant import MODES, Mode, smooth_weight, smoother
from baichuan.records import LayerWeights, SmoothQuantWeight
from baichuan.util.progress import Progress
from baichuan.util.tensor_cores import tensor_cores
from baichuan.weights.rank_tensors import NORM_HEAD_EPS
from baichuan.weights.shard import LINEARS
from baichuan.weights.source import Checkpoint, TensorSource

FIXED = (0.5, 0.8)  # strengths tried for all linears alike
ALPHAS = (*FIXED, 0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.9, 1.0)  # strengths tried for one linear; of equals the first
TOKENS = 1024  # about so many tokens of texts find strengths, and as many others judge them
MARGIN = 1.05  # the factor by which strengths of each linear's own have to be closer than one for all
HEAD_BYTES = 16 << 20  # bytes of lm_head's rows that are read at a time, in float32
TINY = 1e-30  # so that a token of zeros gives no NaN

Strengths = Mapping[str, float]  # by shard.LINEARS' names


def calibrate_by_mode(
    checkpoint: Checkpoint, model: ModelConfig, samples: Sequence[Sequence[int]], scratch: Path, device: str
) -> list[LayerRanges]:
    """calibrate.calibrate()'s ranges, and every linear's strength in each mode.

    samples: token ids of each text; scratch: a folder for hidden states, those of the search as hidden_bytes() says;
    device: "cpu" or "cuda"
    """
    tried = spread(samples)
    some, rest = ([s for n, s in enumerate(samples) if (n in tried) == chosen] for chosen in (True, False))
    apart = sum(map(len, rest)) > sum(map(len, some))
    seen, ranges = [rest, some] if apart else [samples], []
    with ExitStack() as stack:
        passes = [stack.enter_context(layer_passes(checkpoint, model, seen[0], scratch, device))]
        passes += [stack.enter_context(passes[0].of_others(each, scratch / "hidden_others")) for each in seen[1:]]
        floats = passes[0].of_others([text[:TOKENS] for text in some], scratch / "hidden_floats", TOKENS)
        search = _Search(stack.enter_context(floats), checkpoint, scratch, stack)
        tokens = sum(each.tokens for each in passes) + search.tokens
        progress = stack.enter_context(Progress("calibrating", model.num_layers * tokens, "token"))
        observers = [Observer(each, progress) for each in passes]
        for index, layer in passes[0].layers():
            found = [observer.run(layer) for observer in observers]
            search.advance(index, layer, found[0], progress)
            ranges.append(reduce(joined, found))
        return [_with_strengths(*each) for each in zip(ranges, search.strengths(), strict=True)]


def hidden_bytes(model: ModelConfig, samples: Sequence[Sequence[int]]) -> int:
    """What the hidden states of the search take beside those of the calibration."""
    tokens = sum(len(samples[number][:TOKENS]) for number in spread(samples))
    return 4 * tokens * model.hidden_size * (1 + len(MODES) * (1 + len(FIXED)))


def spread(samples: Sequence[Sequence[int]]) -> list[int]:
    """Numbers of samples from all over their order, which have about 2 TOKENS together."""
    mean = sum(map(len, samples)) / len(samples)
    count = min(len(samples), max(2, int(2 * TOKENS / mean)))
    return [number * len(samples) // count for number in range(count)]


@dataclass(frozen=True)
class _Layer:
    """A layer of the float model, and what becomes of the texts there."""

    weights: LayerWeights
    x_absmax: Mapping[str, Tensor]  # max|x| of each linear's input channels
    columns: Mapping[str, Tensor]  # max|W| of each linear's input channels
    norm: Tensor  # [hidden_size] float32, the weight of the norm that its output goes into
    normed: Tensor  # [tokens, hidden_size] float32, what that norm makes of its output

    def error(self, hidden: Tensor) -> Tensor:
        """The sum of |y - y'|² over the first tokens, y and y' being what the norm makes of hidden and of the float
        model's: a float64 number.  hidden: [some tokens, hidden_size]"""
        return (_normed(hidden, self.norm) - self.normed[: len(hidden)]).square().sum(dtype=torch.float64)

    def smoothed(self, name: str, alpha: float, mode: Mode) -> SmoothQuantWeight:
        """One of the linears as integers of the mode."""
        weight, linear, x_absmax = getattr(self.weights, name).weight, LINEARS[name], self.x_absmax[name]
        factor = smoother(x_absmax, self.columns[name], alpha)
        return smooth_weight(weight, x_absmax, factor, mode, linear.projections * len(linear.modules))


class _Search:
    """The texts through the float model, and each way to quantise it beside it."""

    def __init__(self, floats: LayerPasses, checkpoint: Checkpoint, scratch: Path, stack: ExitStack):
        self.floats, self.checkpoint = floats, checkpoint
        self.ways: list[_Way] = []
        for mode in MODES:
            for fixed in (None, *FIXED):
                passes = stack.enter_context(floats.apart(scratch / f"hidden_{len(self.ways)}"))
                self.ways.append(_Way(mode, fixed, passes))

    @property
    def tokens(self) -> int:
        """That go through each layer, of all passes."""
        tried = len(MODES) * len(LINEARS) * len(ALPHAS)
        return self.floats.tokens * (1 + len(self.ways)) + len(self.floats.steps[0][1].tokens) * tried

    def advance(self, index: int, weights: LayerWeights, ranges: LayerRanges, progress: Progress) -> None:
        """Through the next layer.  ranges: to smooth and to scale by"""
        with tensor_cores():
            self.floats.run(self.floats.ops(DenseOps), weights, progress)
            device = weights.input_norm.device
            norm = _norm_after(self.checkpoint, self.floats.model, index).to(device)
            x_absmax = {name: ranges.linears[name].x.to(device) for name in LINEARS}
            columns = {name: getattr(weights, name).weight.abs().amax(0) for name in LINEARS}
            layer = _Layer(weights, x_absmax, columns, norm, _normed(self.floats.hidden.to(device), norm))
            for way in self.ways:
                way.advance(layer, progress)

    def strengths(self) -> list[dict[Mode, Strengths]]:
        """Every layer's strengths in each mode, after the last one."""
        steps, layers = self.floats.steps, range(self.floats.model.num_layers)
        best = _best(self.ways, self.floats, steps[1][0] if len(steps) > 1 else 0, self.checkpoint)
        return [{mode: way.chosen[index] for mode, way in best.items()} for index in layers]


@dataclass(frozen=True)
class _Way:
    """The texts through the model in one mode, each layer quantised before the next one is looked at."""

    mode: Mode
    fixed: float | None  # the strength of all linears; None = each has its own
    passes: LayerPasses
    chosen: list[Strengths] = field(default_factory=list)  # the strengths of each layer so far

    def advance(self, layer: _Layer, progress: Progress) -> None:
        """Through the next layer."""
        strengths = self._search(layer, progress) if self.fixed is None else dict.fromkeys(LINEARS, self.fixed)
        weights: dict[str, Any] = {name: layer.smoothed(name, alpha, self.mode) for name, alpha in strengths.items()}
        self.chosen.append(strengths)
        self.passes.run(self.passes.ops(ReferenceOps), replace(layer.weights, **weights), progress)

    def _search(self, layer: _Layer, progress: Progress) -> Strengths:
        """Each linear's best strength, one linear after another, those before it quantised."""
        first, ops = replace(self.passes, steps=self.passes.steps[:1]), self.passes.ops(RepeatingOps)
        weights, chosen = layer.weights, {}
        for name in LINEARS:
            errors = []
            for alpha in ALPHAS:
                tried: dict[str, Any] = {name: layer.smoothed(name, alpha, self.mode)}
                ops.restart()
                errors.append(layer.error(first.output(ops, replace(weights, **tried), progress)))
            left = torch.stack(errors).tolist()
            chosen[name] = ALPHAS[left.index(min(left))]
            best: dict[str, Any] = {name: layer.smoothed(name, chosen[name], self.mode)}
            weights = replace(weights, **best)
        return chosen


def _norm_after(checkpoint: Checkpoint, model: ModelConfig, layer: int) -> Tensor:
    """The weight of the norm that the layer's output goes into, [hidden_size] float32."""
    last = layer + 1 == model.num_layers
    source = checkpoint["model.norm.weight" if last else f"model.layers.{layer + 1}.input_layernorm.weight"]
    return source.read(0, source.shape[0]).float()


def _normed(hidden: Tensor, norm: Tensor) -> Tensor:
    return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + TINY) * norm


def _best(ways: Sequence[_Way], floats: LayerPasses, first: int, checkpoint: Checkpoint) -> dict[Mode, _Way]:
    """Each mode's way whose logits are closest to the float model's.  first: token to begin with"""
    model, all_passes = floats.model, [floats, *(way.passes for way in ways)]
    hidden = torch.stack([each.hidden[first:].to(floats.device) for each in all_passes])
    norm = _norm_after(checkpoint, model, model.num_layers - 1).to(floats.device)
    found = divergences(_normed(hidden, norm), checkpoint["lm_head.weight"], model.version.norm_head).tolist()
    best: dict[Mode, tuple[float, _Way]] = {}
    for kl, way in zip(found, ways, strict=True):
        kl *= MARGIN if way.fixed is None else 1
        if way.mode not in best or kl < best[way.mode][0]:
            best[way.mode] = kl, way
    return {mode: way for mode, (_, way) in best.items()}


def divergences(hidden: Tensor, head: TensorSource, norm_head: bool) -> Tensor:
    """KL(first || each of the others) of the next-token distributions, the mean over the tokens in nats: [models - 1].

    hidden: [models, tokens, hidden_size], after the last norm; head: lm_head, [vocab_size, hidden_size], read in blocks
    """

    def logits() -> Iterator[Tensor]:
        for start, stop in head.blocks(HEAD_BYTES):
            rows = head.read(start, stop).to(hidden.device).float()
            yield hidden @ (F.normalize(rows, dim=-1, eps=NORM_HEAD_EPS) if norm_head else rows).t()

    log_sum = torch.full(hidden.shape[:2], -torch.inf, device=hidden.device)
    for block in logits():
        log_sum = torch.logaddexp(log_sum, block.logsumexp(-1))
    kl = torch.zeros(len(hidden) - 1, dtype=torch.float64, device=hidden.device)
    for block in logits():
        exact, *others = block - log_sum[..., None]
        kl += torch.stack([((exact - each) * exact.exp()).sum(-1).mean(dtype=torch.float64) for each in others])
    return kl


def _with_strengths(ranges: LayerRanges, chosen: Mapping[Mode, Strengths]) -> LayerRanges:
    def of(name: str) -> dict[Mode, float]:
        return {mode: strengths[name] for mode, strengths in chosen.items()}

    linears = {name: replace(seen, alphas=of(name)) for name, seen in ranges.linears.items()}
    return replace(ranges, linears=linears)

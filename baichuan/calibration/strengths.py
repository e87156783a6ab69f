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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from baichuan.calibration.calibrate import calibrate
from baichuan.calibration.layers import DenseOps, LayerPasses, layer_passes
from baichuan.config import ModelConfig
from baichuan.executors.cpu.reference import ReferenceOps
from baichuan.parallel.comm import Solo
from baichuan.quant.ranges import LayerRanges, joined
from baichuan.quant.smoothquant import MODES, Mode, smooth_weight
from baichuan.records import LayerWeights
from baichuan.util.progress import Progress
from baichuan.weights.rank_tensors import NORM_HEAD_EPS
from baichuan.weights.shard import LINEARS
from baichuan.weights.source import Checkpoint, TensorSource

FIXED = (0.5, 0.8)  # for all linears
ALPHAS = (*FIXED, 0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.9, 1.0)  # for one linear; of equal ones the first
TOKENS = 1024  # of the texts that strengths are found on, and of those that they are judged by
MARGIN = 1.05  # by which strengths of each linear's own have to be closer than one for all
HEAD_BYTES = 16 << 20  # of lm_head's rows, in float32, at a time
TINY = 1e-30  # so that a token of zeros gives no NaN

Strengths = Mapping[str, float]  # by shard.LINEARS' names


def calibrate_by_mode(
    checkpoint: Checkpoint, model: ModelConfig, samples: Sequence[Sequence[int]], scratch: Path, device: str
) -> list[LayerRanges]:
    """calibrate.calibrate()'s ranges, and every linear's strength in each mode.

    samples: token ids of each text; scratch: a folder for hidden states; device: "cpu" or "cuda"
    """
    tried = spread(samples)
    some, rest = ([s for n, s in enumerate(samples) if (n in tried) == chosen] for chosen in (True, False))
    if sum(map(len, rest)) > sum(map(len, some)):
        without = calibrate(checkpoint, model, rest, scratch, device)
        ranges = [*map(joined, without, calibrate(checkpoint, model, some, scratch, device))]
    else:
        without = ranges = calibrate(checkpoint, model, samples, scratch, device)
    strengths = choose_strengths(checkpoint, model, [text[:TOKENS] for text in some], without, scratch, device)
    return [_with_strengths(*each) for each in zip(ranges, strengths, strict=True)]


def choose_strengths(
    checkpoint: Checkpoint,
    model: ModelConfig,
    samples: Sequence[Sequence[int]],
    ranges: Sequence[LayerRanges],
    scratch: Path,
    device: str,
) -> list[dict[Mode, Strengths]]:
    """Every layer's strengths in each mode.

    samples: token ids of the texts; ranges: of each layer, to smooth and to scale by; the rest as above
    """
    with layer_passes(checkpoint, model, samples, scratch, device, TOKENS) as floats, ExitStack() as stack:
        searched = len(floats.steps[0][1].tokens)
        runs = floats.tokens * (1 + len(MODES) * (1 + len(FIXED))) + searched * len(MODES) * len(LINEARS) * len(ALPHAS)
        progress = stack.enter_context(Progress("smoothing", model.num_layers * runs, "token"))
        plain, ops = (kind(floats.spec, Solo(), floats.longest, device) for kind in (DenseOps, ReferenceOps))
        ways: list[_Way] = []
        for mode in MODES:
            for fixed in (None, *FIXED):
                apart = floats.apart(scratch / f"hidden_{len(ways)}")
                ways.append(_Way(mode, fixed, stack.enter_context(apart), ops, progress))
        for index, layer in floats.layers():
            floats.run(plain, layer, progress)
            exact = _Exact(floats.hidden, _norm_after(checkpoint, model, index).to(device))
            for way in ways:
                way.advance(layer, ranges[index], exact)
        best = _best(ways, floats.hidden, searched if len(floats.steps) > 1 else 0, checkpoint, model)
    return [{mode: way.chosen[index] for mode, way in best.items()} for index in range(model.num_layers)]


def spread(samples: Sequence[Sequence[int]]) -> list[int]:
    """Numbers of samples from all over their order, which have about 2 TOKENS together."""
    mean = sum(map(len, samples)) / len(samples)
    count = min(len(samples), max(2, int(2 * TOKENS / mean)))
    return [number * len(samples) // count for number in range(count)]


@dataclass(frozen=True)
class _Exact:
    """What a layer of the float model gives."""

    hidden: Tensor  # [tokens, hidden_size] float32
    norm: Tensor  # [hidden_size] float32, the weight of the norm that it goes into

    def error(self, hidden: Tensor) -> float:
        """The sum of |y - y'|² over the first tokens, y and y' being what the norm makes of hidden and of self.hidden.

        hidden: [some tokens, hidden_size]
        """
        exact = _normed(self.hidden[: len(hidden)], self.norm)
        return (_normed(hidden, self.norm) - exact).square().sum(dtype=torch.float64).item()


@dataclass(frozen=True)
class _Way:
    """The texts through the model in one mode, each layer quantised before the next one is looked at."""

    mode: Mode
    fixed: float | None  # the strength of all linears; None = each has its own
    passes: LayerPasses
    ops: ReferenceOps
    progress: Progress
    chosen: list[Strengths] = field(default_factory=list)  # of the layers so far

    def advance(self, layer: LayerWeights, ranges: LayerRanges, exact: _Exact) -> None:
        """Through the next layer."""
        strengths = self._search(layer, ranges, exact) if self.fixed is None else dict.fromkeys(LINEARS, self.fixed)
        self.chosen.append(strengths)
        self.passes.run(self.ops, self._smoothed(layer, ranges, strengths), self.progress)

    def _search(self, layer: LayerWeights, ranges: LayerRanges, exact: _Exact) -> Strengths:
        """Each linear's best strength, one linear after another, those before it quantised."""
        first, chosen = replace(self.passes, steps=self.passes.steps[:1]), {}
        for name in LINEARS:
            errors = {}
            for alpha in ALPHAS:
                tried = self._smoothed(layer, ranges, {name: alpha})
                errors[alpha] = exact.error(first.output(self.ops, tried, self.progress))
            chosen[name] = min(errors, key=errors.__getitem__)
            layer = self._smoothed(layer, ranges, {name: chosen[name]})
        return chosen

    def _smoothed(self, layer: LayerWeights, ranges: LayerRanges, strengths: Strengths) -> LayerWeights:
        """The layer with these linears as integers of the mode."""
        weights: dict[str, Any] = {}
        for name, alpha in strengths.items():
            weight, linear = getattr(layer, name).weight, LINEARS[name]
            x_absmax = ranges.linears[name].x.to(weight.device)
            weights[name] = smooth_weight(weight, x_absmax, alpha, self.mode, linear.projections * len(linear.modules))
        return replace(layer, **weights)


def _norm_after(checkpoint: Checkpoint, model: ModelConfig, layer: int) -> Tensor:
    """The weight of the norm that the layer's output goes into, [hidden_size] float32."""
    last = layer + 1 == model.num_layers
    source = checkpoint["model.norm.weight" if last else f"model.layers.{layer + 1}.input_layernorm.weight"]
    return source.read(0, source.shape[0]).float()


def _normed(hidden: Tensor, norm: Tensor) -> Tensor:
    return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + TINY) * norm


def _best(
    ways: Sequence[_Way], exact: Tensor, first: int, checkpoint: Checkpoint, model: ModelConfig
) -> dict[Mode, _Way]:
    """Each mode's way whose logits are closest to the float model's.

    exact: [tokens, hidden_size], the float model's hidden states after the last layer; first: token to begin with
    """
    hidden = torch.stack([each[first:] for each in (exact, *(way.passes.hidden for way in ways))])
    norm = _norm_after(checkpoint, model, model.num_layers - 1).to(exact.device)
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

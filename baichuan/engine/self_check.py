"""After a build: does the engine compute what the checkpoint means?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from baichuan.config import ModelConfig
from baichuan.engine.folder import Engine
from baichuan.errors import EngineError
from baichuan.executors.base import Executor
from baichuan.hf_model.float_model import FloatModel
from baichuan.parallel.comm import Communicator, run_ranks
from baichuan.records import Step

MAX_KL = 2.0  # nats; 8-bit engines stay under 0.01 and usable 4-bit ones under 0.2, an engine of noise has far more


@dataclass(frozen=True)
class Agreement:
    """How two models' next-token distributions compare on the same tokens."""

    kl: float  # mean KL(reference || other) in nats
    top1: float  # share of positions where both have the same likeliest token

    @staticmethod
    def of(reference: Tensor, other: Tensor) -> Agreement:
        """reference, other: logits [positions, vocab_size]"""
        p, q = (logits.double().log_softmax(-1) for logits in (reference, other))
        kl = (p.exp() * (p - q)).sum(-1).mean().item()
        return Agreement(kl, (p.argmax(-1) == q.argmax(-1)).double().mean().item())


def all_logits(executor: Executor, ids: Sequence[int]) -> Tensor:
    """Logits after each of the ids, [len(ids), vocab_size] float32."""
    executor.reset(1, len(ids))
    return executor.forward(Step.of([ids], all_outputs=True, device=executor.device)).cpu().clone()


def float_logits(float_model: FloatModel, ids: Sequence[int]) -> Tensor:
    """What check_engine expects, from the checkpoint's model in float32, on any device."""
    with torch.inference_mode():
        return float_model(torch.tensor([ids], device=float_model.lm_head.weight.device))[0].cpu()


def check_engine(engine: Engine, open_rank, expected: Tensor, ids: Sequence[int]) -> Agreement:
    """Compare the engine's logits with float_logits on one prompt.

    open_rank(communicator) -> Executor gives one rank of the engine; the ranks run as threads.
    Raises EngineError when the two disagree by more than MAX_KL.
    """

    def run(comm: Communicator) -> Tensor:
        return all_logits(open_rank(comm), ids)

    agreement = Agreement.of(expected, run_ranks(engine.build.world_size, run)[0])
    if not agreement.kl <= MAX_KL:  # NaN fails as well
        raise EngineError(
            f"the engine's logits differ from the checkpoint's by a mean KL of {agreement.kl:.3g} nats and at most "
            f"{MAX_KL:g} is accepted; choose a finer quantisation, or keep the engine with --no_self_check"
        )
    return agreement


def float32_bytes(model: ModelConfig) -> int:
    """Memory that the model's weights take in float32."""
    layer = 4 * model.hidden_size**2 + 3 * model.hidden_size * model.intermediate_size + 2 * model.hidden_size
    return 4 * (model.num_layers * layer + (2 * model.vocab_size + 1) * model.hidden_size)


def default_ids(vocab_size: int, length: int = 24) -> list[int]:
    """A prompt for a checkpoint without a tokenizer: seeded ids."""
    return torch.randint(vocab_size, (length,), generator=torch.Generator().manual_seed(0)).tolist()

"""The sides of a comparison: engines and the Hugging Face model, behind one interface."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from baichuan.api.llm import LLM, WARM_UP_TOKENS
from baichuan.config import BYTES_PER_ELEMENT, QuantConfig, SamplingConfig, to_json
from baichuan.engine.folder import Engine
from baichuan.engine.self_check import float32_bytes
from baichuan.errors import ConfigError, UnsupportedError
from baichuan.generation.decoding import Generation
from baichuan.generation.sampling import Sampler, numbered_seeds
from baichuan.util.machine import cpu_cache_bytes, cpu_name
from baichuan.weights.types import TYPES


class Side(Protocol):
    """Something that continues prompts and scores text."""

    key: str  # its name in files: engine (of several: engine_1, engine_2, ...), hf
    label: str  # its name for people
    facts: dict[str, Any]  # JSON values: bytes and number of its weights, device_facts(), and what it was built from

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, max_new_tokens: int
    ) -> list[Generation]:
        """Each prompt's continuation, on the host; no work is left on the device."""

    def warm_up(self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, max_new_tokens: int) -> None:
        """Do now what the first generate() of prompts like these, or smaller ones, would otherwise do once."""

    def score(self, ids: Sequence[int]) -> Tensor:
        """Logits after each of the ids, [len(ids), vocab_size] float32."""


class EngineSide:
    """An engine.  Under mpirun rank 0 has it, within llm.lead."""

    def __init__(self, llm: LLM, key: str = "engine"):
        self._llm, self.key, engine = llm, key, llm.engine
        self.label = engine_label(engine)
        self.facts = {
            "engine_dir": str(engine.folder),
            "bytes": sum(file["bytes"] for file in engine.files.values()),
            "parameters": float32_bytes(engine.model) // BYTES_PER_ELEMENT["float32"],
            **device_facts(llm.load()[1]),
            "model": to_json(engine.model),
            "quant": to_json(engine.quant),
            "build": to_json(engine.build),
        }

    def generate(self, prompts, sampling, max_new_tokens) -> list[Generation]:
        made = self._llm.generate(prompts, sampling, max_new_tokens)
        return [Generation(each.checked().ids, each.finish_reason) for each in made]

    def warm_up(self, prompts, sampling, max_new_tokens) -> None:
        self._llm.warm_up(prompts, sampling, max_new_tokens)

    def score(self, ids) -> Tensor:
        return self._llm.logits(ids)


@contextmanager
def enough_memory() -> Iterator[None]:
    """Raise UnsupportedError where the transformers model runs out of a GPU's memory."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise UnsupportedError(
            "the GPU's memory is too small for the transformers model beside what it already holds; "
            "use a smaller --batch_size, --hf_device cpu, or one run for each side"
        ) from None


@dataclass
class HfSide:
    """A transformers model on one device, in batches padded on the left.

    Tokens are chosen by the sampling.Sampler that engines use, so that penalty, temperature, top-k, top-p and seed mean
    the same on both sides; beam search is transformers' own.
    """

    model: Any  # transformers.PreTrainedModel, from hf.load_hf_model
    model_dir: str
    key: str = "hf"

    def __post_init__(self):
        from transformers import GenerationConfig

        # generate() takes from here what a request leaves open: defaults, not the checkpoint's own settings.
        self.model.generation_config = GenerationConfig()
        dtype = str(self.model.dtype).removeprefix("torch.")
        self.label = f"Hugging Face, {dtype}"
        self.facts = {
            "model_dir": self.model_dir,
            "bytes": sum(p.numel() * p.element_size() for p in self.model.parameters()),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            **device_facts(self.model.device),
            "dtype": dtype,
        }

    def warm_up(self, prompts, sampling, max_new_tokens) -> None:
        self.generate(prompts, sampling, min(WARM_UP_TOKENS, max_new_tokens))

    @enough_memory()
    @torch.inference_mode()
    def generate(self, prompts, sampling, max_new_tokens) -> list[Generation]:
        from transformers import GenerationConfig, LogitsProcessorList

        device, longest = self.model.device, max(map(len, prompts))
        ids = torch.full((len(prompts), longest), sampling.pad_id)  # [batch_size, longest], padded on the left
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        if sampling.num_beams > 1:
            choose: _Temperature | _Choice = _Temperature(sampling.temperature)
        else:
            configs = numbered_seeds(sampling, len(prompts))
            choose = _Choice(Sampler.of(configs, prompts, self.model.config.vocab_size, max_new_tokens, device))
        ends = [sampling.eos_id, *sampling.stop_ids]
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=sampling.num_beams,
            length_penalty=sampling.length_penalty,
            early_stopping=False,
            eos_token_id=ends,
            pad_token_id=sampling.pad_id,
        )
        output = self.model.generate(
            ids.to(device),
            attention_mask=mask.to(device),
            generation_config=config,
            logits_processor=LogitsProcessorList([choose]),
        )
        return [_until_end(row, ends) for row in output[:, longest:].tolist()]

    @enough_memory()
    @torch.inference_mode()
    def score(self, ids) -> Tensor:
        return self.model(torch.tensor([ids], device=self.model.device)).logits[0].float()


def check_hf_sampling(sampling: SamplingConfig) -> None:
    """Raise ConfigError for settings that transformers treats differently from an engine."""
    if sampling.num_beams > 1 and sampling.repetition_penalty != 1.0:
        raise ConfigError(
            f"repetition_penalty {sampling.repetition_penalty} with num_beams {sampling.num_beams}: transformers "
            "penalises log probabilities where the engine penalises logits; leave one out, or --test_hf"
        )


class _Choice:
    """A logits processor that makes every token but the sampler's choice impossible."""

    def __init__(self, sampler: Sampler):
        self._sampler = sampler

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens = self._sampler(scores.float())
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)


class _Temperature:
    """A logits processor for beam search, whose input and output are log probabilities."""

    def __init__(self, temperature: float):
        self._temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores if self._temperature == 1.0 else (scores / self._temperature).log_softmax(-1)


def _until_end(ids: list[int], ends: Sequence[int]) -> Generation:
    for index, token in enumerate(ids):
        if token in ends:
            return Generation(ids[:index], "stop")
    return Generation(ids, "length")


def engine_label(engine: Engine) -> str:
    """An engine's label: dtype, quantisation and number of ranks."""
    parts = ["engine", engine.model.dtype, *_quantisation(engine.quant)]
    if engine.build.world_size > 1:
        parts.append(f"{engine.build.world_size} ranks")
    if engine.dummy:
        parts.append("dummy weights")
    return ", ".join(parts)


def _quantisation(quant: QuantConfig) -> Iterator[str]:
    if quant.weights != "none":
        yield TYPES[quant.weights].label
    if quant.weights == "int4":
        yield f"groups of {quant.group_size}" if quant.group_size else "per channel"
    if quant.zero_points:
        yield "zero points"
    yield from (name for name in ("per token", "per channel") if getattr(quant, name.replace(" ", "_")))
    if quant.quantize_lm_head:
        yield "lm_head too"
    if quant.kv_cache != "none":
        yield f"{quant.kv_cache.upper()} KV cache"


def device_facts(device: torch.device) -> dict[str, Any]:
    """device: its name; cache_bytes: size of its largest cache, 0 = unknown; on a CPU also threads: their number."""
    if device.type == "cuda":
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
        return {"device": torch.cuda.get_device_name(device), "cache_bytes": cache}
    return {"device": cpu_name(), "cache_bytes": cpu_cache_bytes(), "threads": torch.get_num_threads()}

"""A checkpoint in the hub's format: a folder with config.json and weights in one of two formats, sharded or not."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from baichuan.config import ModelConfig
from baichuan.errors import CheckpointError
from baichuan.util.files import stand_in
from baichuan.util.library_logs import through_our_log
from baichuan.weights.hub.bin_reader import open_bin
from baichuan.weights.hub.config_json import MAX_CONFIG_BYTES, read_format, read_json_object, read_model_config
from baichuan.weights.hub.safetensors_reader import open_safetensors
from baichuan.weights.imported.formats import dequantised
from baichuan.weights.mistaken_path import recognise
from baichuan.weights.shard import hub_shapes
from baichuan.weights.source import Checkpoint, TensorSource

__all__ = ["open_checkpoint", "read_model_config", "resolve_folder"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Format:
    """One way in which the hub stores weights."""

    single: str  # file that holds them all
    index: str  # JSON whose weight_map says which shard holds which tensor
    patterns: tuple[str, ...]  # names of the files to download
    open: Callable[[Path], Mapping[str, TensorSource]]

    def files(self, folder: Path) -> list[str]:
        return [name for name in (self.single, self.index) if (folder / name).is_file()]


FORMATS = (  # the first that a folder holds is read
    Format("model.safetensors", "model.safetensors.index.json", ("model*.safetensors",), open_safetensors),
    Format("pytorch_model.bin", "pytorch_model.bin.index.json", ("pytorch_model*.bin",), open_bin),
)
DOWNLOADED = ("config.json", "generation_config.json", "tokenizer.model")  # besides the weights; never code

MAX_NAME = 200  # characters of a shard's name
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
IGNORED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")  # computed; v1_7b checkpoints may carry it
NO_MODEL = re.compile(r"(adapter|training_args|optimizer|scheduler|rng_state|scaler)")  # what trainers save beside one
QUANTISED = {  # parts of a tensor's name, and the tools that write such names
    r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\b.*)$": "bitsandbytes in 4 bits",
    r"\.(SCB|CB|weight_format)$": "bitsandbytes in 8 bits",
    r"\.(qweight|qzeros|g_idx)$": "GPTQ or AWQ",
    r"\.(weight_scale|weight_scale_inv|weight_packed|input_scale)$": "compressed-tensors or FP8",
}
GPTQ_SETTINGS = "quantize_config.json"  # where AutoGPTQ wrote them before config.json had a place


def resolve_folder(name: str) -> Path:
    """The folder `name`, or a download of the hub's checkpoint `name`: its config, weights and tokenizer, no code.

    Raises CheckpointError when it is neither, or cannot be downloaded.
    """
    folder = Path(name)
    if is_hub_id(name):
        folder = _download_weights(name)
    if name and (mistake := recognise(folder, "checkpoint")):
        raise CheckpointError(f"{name} {mistake}")
    if not name or not folder.is_dir():
        raise CheckpointError(
            f"{name} is neither a folder nor a hub id; give the folder of a checkpoint, or ORGANISATION/MODEL"
        )
    found = [form.files(folder) for form in FORMATS if form.files(folder)]
    if len(found) > 1:
        logger.info("%s holds both %s and %s; reading %s", name, found[0][0], found[1][0], found[0][0])
    return folder


def resolve_tokenizer(name: str) -> Path:
    """Where a tokenizer is: the path `name`, or a download of the hub's model without its weights.

    Raises CheckpointError when it cannot be downloaded.
    """
    return download(name) if is_hub_id(name) else Path(name)


def open_checkpoint(folder: Path, config: ModelConfig) -> Checkpoint:
    """The tensors that `config` asks for, unread; from safetensors files where there are both kinds.

    Raises CheckpointError for a tensor that is missing, unexpected, there twice, of another shape, not of floats or
    quantised in another way than config.json says, and for a file that is missing, truncated or outside the folder.
    """
    form = next((each for each in FORMATS if each.files(folder)), None)
    if form is None:
        raise _no_weights(folder)
    if len(form.files(folder)) > 1:
        raise CheckpointError(f"{folder} holds both {form.single} and {form.index}; remove the one that is out of date")
    sharded = form.files(folder) == [form.index]
    tensors = _open_shards(folder, form) if sharded else _open_file(folder / form.single, form)
    if not config.version.rotary and (rotary := [name for name in tensors if IGNORED.search(name)]):
        raise CheckpointError(
            f"{folder} holds {_some(rotary)}, which 7B models alone have, and a {config.model_version} model has no "
            "rotary positions; check config.json and --model_version"
        )
    tensors = {name: source for name, source in tensors.items() if not IGNORED.search(name)}
    if quantised := read_format(folder):
        tensors = dequantised(tensors, quantised, hub_shapes(config))
    _refuse_quantised(folder, tensors)
    _require_names(folder, tensors, config)
    for name, shape in hub_shapes(config).items():
        _require_tensor(folder, name, tensors[name], shape)
    return tensors


def _no_weights(folder: Path) -> CheckpointError:
    for form in FORMATS:
        if shards := sorted(path.name for pattern in form.patterns for path in folder.glob(pattern)):
            return CheckpointError(
                f"{folder} holds {shards[0]} without {form.index}, which says where each tensor is; download that too"
            )
    for form in FORMATS:
        others = [path.name for path in folder.glob(f"*{Path(form.single).suffix}") if not NO_MODEL.match(path.name)]
        if len(others) == 1:
            return CheckpointError(
                f"{folder} holds {others[0]}, which is no name of the hub's; rename it to {form.single} if it is the "
                "whole model"
            )
    names = ", ".join(name for form in FORMATS for name in (form.single, form.index))
    return CheckpointError(f"{folder} holds none of {names}; give the folder of a checkpoint in the hub's format")


def is_hub_id(name: str) -> bool:
    return not Path(name).exists() and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def _download_weights(name: str) -> Path:
    """The hub's model with weights of the first format that it has."""
    for form in FORMATS:
        folder = download(name, (form.index, *form.patterns))
        if form.files(folder):
            break
    return folder


def download(name: str, patterns: tuple[str, ...] = ()) -> Path:
    """The hub's files of this model: DOWNLOADED, and those that match the patterns.  Raises CheckpointError."""
    from huggingface_hub import snapshot_download  # takes half a second, and folders do without

    through_our_log("huggingface_hub")
    try:
        return Path(snapshot_download(name, allow_patterns=[*DOWNLOADED, *patterns]))
    except Exception as error:  # the hub's client lets the errors of its HTTP library through
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{name} is no folder here and cannot be downloaded from the hub ({reason}); check the name and the "
            "connection, or give a folder"
        ) from None


def _open_file(path: Path, form: Format) -> Mapping[str, TensorSource]:
    try:
        if left := stand_in(path):
            raise CheckpointError(f"{path} {left}")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); download it again") from None
    return form.open(path)


def _open_shards(folder: Path, form: Format) -> dict[str, TensorSource]:
    path = folder / form.index
    where = read_json_object(path, MAX_CONFIG_BYTES).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(shard, str) for shard in where.values()):
        raise CheckpointError(f"{path} has no weight_map from tensor names to files; download it again")
    tensors: dict[str, TensorSource] = {}
    homes: dict[str, str] = {}  # the shard of each tensor
    for shard in sorted(set(where.values())):
        if shard != Path(shard).name or shard in ("", "..") or "\\" in shard or "\0" in shard or len(shard) > MAX_NAME:
            raise CheckpointError(f"{path} points at {shard!r}; a shard is a file of the same folder")
        if not (folder / shard).is_file():
            raise CheckpointError(f"{path} points at {shard}, which is missing; download it again")
        for name, source in _open_file(folder / shard, form).items():
            if name in tensors and not IGNORED.search(name):
                raise CheckpointError(f"{folder} holds {name} twice, in {homes[name]} and in {shard}; remove one")
            tensors[name], homes[name] = source, shard
    for name, shard in where.items():
        if homes.get(name) != shard and not IGNORED.search(name):
            raise CheckpointError(
                f"{path} says that {shard} holds {name} and {homes.get(name, 'no file')} does; download both again"
            )
    return tensors


def _refuse_quantised(folder: Path, tensors: Mapping[str, TensorSource]) -> None:
    for name in tensors:
        for pattern, writer in QUANTISED.items():
            if re.search(pattern, name):
                remedy = "take the float checkpoint that it was made from and let build.py quantise it"
                if (folder / GPTQ_SETTINGS).is_file():
                    remedy = (
                        f"copy the settings of {GPTQ_SETTINGS} into config.json as its quantization_config, with "
                        '"quant_method": "gptq"'
                    )
                raise CheckpointError(f"{folder} is quantised by {writer} (it holds {name}); {remedy}")


def _require_names(folder: Path, tensors: Mapping[str, TensorSource], config: ModelConfig) -> None:
    expected = hub_shapes(config)
    missing = [name for name in expected if name not in tensors]
    unexpected = [name for name in tensors if name not in expected]
    if missing and unexpected:
        raise CheckpointError(
            f"{folder} lacks {_some(missing)} and holds {_some(unexpected)}, which a {config.model_version} model does "
            "not have; save it under the names that the released checkpoints have"
        )
    if missing == ["lm_head.weight"]:
        raise CheckpointError(
            f"{folder} lacks {missing[0]}; download it again, or save it with an lm_head of its own where it was tied "
            "to the embedding"
        )
    if missing:
        raise CheckpointError(f"{folder} lacks {_some(missing)}; download it again")
    if unexpected:
        raise CheckpointError(
            f"{folder} holds {_some(unexpected)}, which a {config.model_version} model with {config.num_layers} layers "
            "does not have; check config.json and --model_version"
        )


def _require_tensor(folder: Path, name: str, source: TensorSource, shape: tuple[int, ...]) -> None:
    if source.dtype not in FLOATS:
        raise CheckpointError(
            f"{name} in {folder} is {str(source.dtype).removeprefix('torch.')}; weights are "
            f"{', '.join(str(dtype).removeprefix('torch.') for dtype in FLOATS)}, take the float checkpoint"
        )
    if source.shape != shape:
        raise CheckpointError(
            f"{name} in {folder} has shape {source.shape} instead of {shape}; check config.json and --model_version"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

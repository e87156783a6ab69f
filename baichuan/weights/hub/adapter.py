"""LoRA adapters by PEFT, merged into a checkpoint while it is read: W + scale * B A, block of rows by block of rows.

Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, eq. 3; the files are those of PEFT's
save_pretrained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from baichuan.config import ModelConfig
from baichuan.errors import CheckpointError
from baichuan.weights.hub.adapter_config import NAME, LoraSettings, read_lora_settings
from baichuan.weights.hub.bin_reader import open_bin
from baichuan.weights.hub.checkpoint import FLOATS, download, is_hub_id, open_checkpoint
from baichuan.weights.hub.safetensors_reader import open_safetensors
from baichuan.weights.shard import hub_shapes
from baichuan.weights.source import Checkpoint, TensorSource, on_device

FILES = {"adapter_model.safetensors": open_safetensors, "adapter_model.bin": open_bin}  # the first there is is read
PREFIX = "base_model.model."  # the beginning of every name that PEFT writes
EMBEDDING = "model.embed_tokens"
PARTS = {  # ends of names: which part of a module's change the tensor is
    ".lora_A.weight": "right",
    ".lora_B.weight": "left",
    ".lora_embedding_A": "left",
    ".lora_embedding_B": "right",
    ".base_layer.weight": "whole",  # written where the embedding is a target
    ".modules_to_save.weight": "whole",
    ".weight": "whole",  # a module of modules_to_save
}


@dataclass(frozen=True)
class Change:
    """What an adapter adds to one matrix: scale * left @ right, or scale * leftᵀ @ rightᵀ for the embedding."""

    left: TensorSource  # [rows, rank]; the embedding's [rank, rows]
    right: TensorSource  # [rank, columns]; the embedding's [columns, rank]
    scale: float
    transposed: bool  # the embedding's

    def of_rows(self, start: int, stop: int) -> Tensor:
        """[stop - start, columns] float64, so that it is the same for any block of rows once it is rounded."""
        right = self.right.read(0, self.right.shape[0]).double()
        if self.transposed:
            return self.scale * (self.left.columns(start, stop).double().t() @ right.t())
        return self.scale * (self.left.read(start, stop).double() @ right)

    def added_to(self, base: TensorSource) -> TensorSource:
        def read(start: int, stop: int) -> Tensor:
            return (base.read(start, stop).double() + self.of_rows(start, stop)).float()

        return TensorSource(base.shape, torch.float32, read)


@dataclass(frozen=True)
class Adapter:
    """One adapter, by the names of the checkpoint's tensors."""

    folder: Path
    whole: Mapping[str, TensorSource]  # they replace the checkpoint's
    changes: Mapping[str, Change]

    def merged_into(self, checkpoint: Checkpoint) -> Checkpoint:
        tensors = {**checkpoint, **self.whole}
        return tensors | {name: change.added_to(tensors[name]) for name, change in self.changes.items()}


def open_merged(
    folder: Path, model: ModelConfig, adapters: Sequence[Path] = (), device: torch.device | str = "cpu"
) -> Checkpoint:
    """The checkpoint in `folder` with the adapters merged in their order, in float32 where they change it.

    device: where rows are read to, and merged.  Raises CheckpointError for a folder that is damaged or is no LoRA of
    this model, and for an adapter that would throw away what one before it changed.
    """
    where = torch.device(device)
    checkpoint = on_device(open_checkpoint(folder, model), where)
    changed: dict[str, Path] = {}
    for each in adapters:
        adapter = open_adapter(each, model, where)
        for name in adapter.whole:
            if name in changed:
                raise CheckpointError(
                    f"{each} replaces {name}, which {changed[name]} has changed already; give only one of the two"
                )
        changed |= dict.fromkeys((*adapter.whole, *adapter.changes), each)
        checkpoint = adapter.merged_into(checkpoint)
    return checkpoint


def resolve_adapter(name: str) -> Path:
    """The folder `name`, or a download of the hub's adapter `name`."""
    folder = Path(name)
    if is_hub_id(name):
        folder = download(name, (NAME, *FILES))
    if not (folder / NAME).is_file():
        raise CheckpointError(f"{name} has no {NAME}; give the folder that PEFT's save_pretrained wrote, or its hub id")
    return folder


def open_adapter(folder: Path, model: ModelConfig, device: torch.device | str = "cpu") -> Adapter:
    """Raises CheckpointError for an adapter of another model, with tensors missing, or with any that is not merged."""
    settings = read_lora_settings(folder)
    file = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if file is None:
        raise CheckpointError(f"{folder} has none of {', '.join(FILES)}; give the folder of a complete adapter")
    shapes = hub_shapes(model)
    parts: dict[str, dict[str, TensorSource]] = {}  # each module's tensors by part: right, left or whole
    for name, source in on_device(FILES[file.name](file), torch.device(device)).items():
        module, part = _place(file, name, shapes)
        if source.dtype not in FLOATS:
            raise CheckpointError(f"{file} holds {name} as {source.dtype}, which is no float type that is merged")
        if part in parts.setdefault(module, {}):
            raise CheckpointError(f"{file} holds a part of {module} twice, once as {name}; save the adapter again")
        parts[module][part] = source
    if not parts:
        raise CheckpointError(f"{file} holds no tensors; save the adapter again")
    whole = {f"{module}.weight": part["whole"] for module, part in parts.items() if "whole" in part}
    for name, source in whole.items():
        _require_shape(file, name, source, shapes[name])
    changes = {
        f"{module}.weight": _change(file, module, part, settings, shapes[f"{module}.weight"])
        for module, part in parts.items()
        if part.keys() - {"whole"}
    }
    _require_targets(file, settings, changes, whole, model)
    return Adapter(folder, whole, changes)


def _place(file: Path, name: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, str]:
    """Module and part of the tensor `name`."""
    for end, part in PARTS.items():
        module = name.removeprefix(PREFIX).removesuffix(end)
        fits = part == "whole" or ("embedding" in end) == (module == EMBEDDING)
        if fits and name.startswith(PREFIX) and name.endswith(end) and f"{module}.weight" in shapes:
            return module, part
    raise CheckpointError(
        f"{file} holds {name[:100]}, which is no part of a plain LoRA of this model; check that it was trained on this "
        "base model, or merge it with PEFT's merge_and_unload"
    )


def _change(
    file: Path, module: str, parts: Mapping[str, TensorSource], settings: LoraSettings, shape: tuple[int, ...]
) -> Change:
    if missing := {"left", "right"} - parts.keys():
        letter = "A" if ("right" in missing) != (module == EMBEDDING) else "B"
        raise CheckpointError(f"{file} lacks {module}'s lora_{letter}; save the adapter again")
    if len(shape) != 2:
        raise CheckpointError(f"{file} changes {module}, which is no matrix; save the adapter again")
    transposed, rank = module == EMBEDDING, settings.rank_of(module)
    rows, columns = shape
    expected = ((rank, rows), (columns, rank)) if transposed else ((rows, rank), (rank, columns))
    for part, wanted in zip(("left", "right"), expected, strict=True):
        _require_shape(file, f"{module}'s lora matrix", parts[part], wanted)
    return Change(parts["left"], parts["right"], settings.scale_of(module), transposed)


def _require_shape(file: Path, name: str, source: TensorSource, shape: tuple[int, ...]) -> None:
    if source.shape != shape:
        raise CheckpointError(
            f"{file} holds {name} of shape {source.shape} instead of {shape}; the adapter belongs to another base "
            f"model, or its {NAME} was changed"
        )


def _require_targets(file: Path, settings: LoraSettings, changes, whole, model: ModelConfig) -> None:
    """Raise CheckpointError unless the file changes just what the settings say, and it can be merged."""
    if model.version.norm_head and "lm_head.weight" in changes:
        raise CheckpointError(
            f"{file} changes lm_head by LoRA and {model.model_version} normalises lm_head's rows, to which the change "
            "cannot be added; train lm_head whole (modules_to_save), or leave it out"
        )
    if settings.targets is None:
        return
    matrices = [name.removesuffix(".weight") for name, shape in hub_shapes(model).items() if len(shape) == 2]
    said, found = settings.targeted(matrices), {name.removesuffix(".weight") for name in changes}
    said -= {name.removesuffix(".weight") for name in whole if name not in changes}
    if said != found:
        odd = min(said ^ found)
        raise CheckpointError(
            f"{file} {'lacks' if odd in said else 'holds'} a change of {odd}, and {NAME}'s target_modules "
            f"{'say that it is there' if odd in said else 'do not name it'}; take both files from the same place again"
        )

"""Did you mean: a flag that no script has, and the one that was most likely meant."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from difflib import get_close_matches

LIKENESS = 0.75  # difflib's ratio: a misspelling is above it, another word below
ELSEWHERE = {  # other programs' name of a flag, and ours
    "--checkpoint": "--model_dir",
    "--checkpoint_dir": "--model_dir",
    "--model": "--model_dir",
    "--model_path": "--model_dir",
    "--beam_width": "--num_beams",
    "--max_length": "--max_output_len",
    "--max_new_tokens": "--max_output_len",
    "--max_tokens": "--max_output_len",
    "--prompt": "--input_text",
    "--seed": "--random_seed",
    "--tensor_parallel_size": "--world_size",
    "--tp_size": "--world_size",
}


def unknown_flag(argv: Sequence[str], known: Collection[str]) -> str | None:
    """The message for the first long flag in argv that is not in `known`; None where there is none."""
    for word in argv:
        if word == "--":
            return None
        name = word.split("=")[0]
        if name.startswith("--") and " " not in name and name not in known:
            meant = ELSEWHERE.get(name.replace("-", "_").replace("__", "--", 1))
            close = [meant] if meant in known else get_close_matches(name, sorted(known), 1, LIKENESS)
            return f"unrecognized arguments: {name}" + (f", did you mean {close[0]}?" if close else "")
    return None

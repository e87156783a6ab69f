"""Damage to a folder: a file's content, or what stands in its place."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path
from random import Random

from tests.fuzz.mutate_formats import mutated

MAX_BYTES = 256 << 20  # size of the largest file that is changed once more
OUTSIDE = "outside"  # a folder beside the inputs, which no file of theirs may lead to


def mutate_folder(chance: Random, folder: Path, names: list[str]) -> str:
    """Change one of the files `names` in `folder`, seldom two.  Returns what was done."""
    done = []
    for _ in range(chance.choice((1, 1, 1, 1, 2))):
        path = folder / chance.choice(names)
        if chance.randrange(12) or not path.is_file():
            done.append(_change(chance, path))
        else:
            done.append(_replace(chance, path, folder, names))
    return "; ".join(done)


def make_devices(folder: Path) -> None:
    """Devices of our own, where a fault in a script that root runs could replace the system's."""
    if os.geteuid() == 0:
        for name, minor in (("null", 3), ("zero", 5)):
            os.mknod(folder / name, 0o666 | stat.S_IFCHR, os.makedev(1, minor))


def _change(chance: Random, path: Path) -> str:
    if not path.is_file() or path.stat().st_size > MAX_BYTES:
        return f"{path.name} is gone already"
    content = path.read_bytes()
    changed = mutated(chance, path.name, content)
    path.unlink()
    path.write_bytes(changed)
    return f"{path.name}: {len(content)} -> {len(changed)} bytes"


def _replace(chance: Random, path: Path, folder: Path, names: list[str]) -> str:
    """Something that is no such file in the file's place."""
    outside, other = folder.parent / OUTSIDE, folder / chance.choice(names)
    kind = chance.choice(
        ("nothing", "folder", "pipe", "zero", "null", "loop", "outside", "dangling", "swap", "sparse", "long")
    )
    if kind == "swap":
        if other != path and other.is_file():
            content = path.read_bytes()
            shutil.copyfile(other, path)
            other.write_bytes(content)
        return f"{path.name} and {other.name} exchanged"
    path.unlink()
    match kind:
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "zero" | "null":
            path.symlink_to(folder.parent / kind if os.geteuid() == 0 else f"/dev/{kind}")
        case "loop":
            path.symlink_to(path.name)
        case "outside":
            path.symlink_to(outside / chance.choice(sorted(each.name for each in outside.iterdir())))
        case "dangling":
            path.symlink_to(folder / "nowhere")
        case "sparse":
            with open(path, "wb") as file:
                file.truncate(chance.choice((1 << 20, 100 << 20, 3 << 30)))
        case "long":
            path.with_name("x" * 200 + path.suffix).write_bytes(b"")
    return f"{path.name}: {kind}"

"""Random flags: those of a script, with values of every kind."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from random import Random
from unittest.mock import patch

from tests.fuzz import mutate_bytes as damage

# Flags that would start processes or threads, which stay for the cases after, or load a library that takes seconds.
LEFT_OUT = {"--threads", "--help", "-h", "--version", "--parallel_build", "--processes", "-p"}
# A flag that leads out of the folder is the user's own word, unlike a name in a file.
TEXTS = [text for text in damage.TEXTS if not text.startswith(("../", "/"))]
SMALL = ["0", "1", "2", "3", "4", "7", "-1", "0.5", "1.0"]


def actions_of(main: Callable) -> list[argparse.Action]:
    """The script's flags, from the parser that its main makes."""
    caught: list[argparse.ArgumentParser] = []

    def catch(parser, *_, **__):
        caught.append(parser)
        return 0

    with patch.object(sys.modules[main.__module__], "run_script", catch):
        main([])
    return [each for each in caught[0]._actions if not LEFT_OUT & set(each.option_strings)]


def random_flags(chance: Random, main: Callable, argv: list[str]) -> list[str]:
    """argv with one to four flags added, changed, left out or spelled wrongly."""
    actions = actions_of(main)
    for _ in range(chance.choice((1, 1, 2, 3, 4))):
        match chance.randrange(12):
            case 0 if argv:
                del argv[chance.randrange(len(argv))]
            case 1 if argv:
                place = chance.randrange(len(argv))
                argv[place] = chance.choice((_text(chance), argv[place][:-1], argv[place] + "s"))
            case 2:
                argv.insert(chance.randrange(len(argv) + 1), _text(chance))
            case _:
                argv += _flag(chance, chance.choice(actions), argv)
    return [each.replace("\0", "") for each in argv]  # no program can be given a NUL


def _flag(chance: Random, action: argparse.Action, argv: list[str]) -> list[str]:
    flag = chance.choice(action.option_strings)
    if action.nargs == 0:
        return [flag] if chance.randrange(8) else [f"{flag}=1"]
    count = chance.choice((1, 1, 2, 3)) if action.nargs == "+" else 1
    values = [_value(chance, action, argv) for _ in range(count)]
    return [f"{flag}={values[0]}"] if not chance.randrange(8) else [flag, *values]


def _value(chance: Random, action: argparse.Action, argv: list[str]) -> str:
    if action.choices and chance.randrange(6):
        return str(chance.choice(list(action.choices)))
    if action.type in (int, float) and chance.randrange(8):
        return chance.choice((chance.choice(SMALL), chance.choice(damage.NUMBERS)))
    paths = ["{in}", "{in}/engine", "{out}", "{out}/x.npy", "{out}/x.csv", "{in}/p.csv"]
    paths += ["{in}/config.json", "{in}/a.jsonl", "{in}/nowhere", ".", "no/hub", *argv]
    return chance.choice((chance.choice(paths), chance.choice(paths), _text(chance)))


def _text(chance: Random) -> str:
    text = chance.choice((chance.choice(TEXTS), chance.choice(damage.NUMBERS)))
    return text.encode("utf-8", "surrogateescape" if "\ud800" not in text else "replace").decode("utf-8", "replace")

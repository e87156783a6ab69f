"""Files of prompts: text lines, JSON lines, CSV with a header, parquet.

Columns, which a JSON object has as fields: `prompt` (text), `messages` (a chat's) or `prompt_ids` (token ids), one of
them; `id` (text or an integer, unique; default: the line's number); and settings of the line's own (SETTINGS).  A text
file has one prompt a line and skips blank lines.  In CSV and parquet an empty cell is a column left out, and CSV writes
messages and ids as JSON.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baichuan.api.arguments import said_of
from baichuan.config import SamplingConfig
from baichuan.errors import ConfigError
from baichuan.text.chat import check_messages
from baichuan.text.parquet import parquet_rows
from baichuan.text.rows import csv_rows, lines
from baichuan.util.files import open_regular
from baichuan.util.strict_json import strict_json

SETTINGS: dict[str, tuple[type, ...]] = {
    "max_output_len": (int,),
    "num_beams": (int,),
    "top_k": (int,),
    "top_p": (float, int),
    "temperature": (float, int),
    "repetition_penalty": (float, int),
    "length_penalty": (float, int),
    "random_seed": (int,),
}
PROMPTS: dict[str, type] = {"prompt": str, "messages": list, "prompt_ids": list}
COLUMNS = ("id", *PROMPTS, *SETTINGS)
KINDS: dict[tuple[type, ...], str] = {  # what messages call them
    (str,): "text",
    (int,): "an integer",
    (str, int): "text or an integer",
    (float, int): "a number",
    (list,): "a list",
}


@dataclass(frozen=True)
class PromptLine:
    """One prompt of a file."""

    place: str  # for messages: the file and the line's number, from 1
    key: str
    prompt: str | list  # text, ids or messages
    settings: Mapping[str, Any]  # some of SETTINGS

    def sampling(self, defaults: SamplingConfig) -> Mapping[str, Any]:
        """The line's settings that SamplingConfig has."""
        return {name: value for name, value in self.settings.items() if hasattr(defaults, name)}


def read_prompt_file(path: Path) -> Iterator[PromptLine]:
    """Raises ConfigError for a file that cannot be read, and with its number for a line that cannot be used."""
    if path.suffix not in READERS:
        kinds = ", ".join(READERS)
        raise ConfigError(f"prompt_file {path} ends in {path.suffix or 'nothing'}; give one of {kinds}")
    if not path.is_file():
        raise ConfigError(f"prompt_file {path} is no file; check the path")
    places: dict[str, str] = {}
    try:
        for place, row in READERS[path.suffix](path):
            line = _line(place, row, default_key=place.rpartition(" ")[2])
            if earlier := places.get(line.key):
                raise ConfigError(f"{place} has the id {line.key}, as {earlier} does; give each line an id of its own")
            places[line.key] = place
            yield line
    except OSError as error:
        raise ConfigError(f"prompt_file {path} cannot be read ({error.strerror or error}); check the path") from None
    except (ValueError, csv.Error) as error:  # what csv and pyarrow raise for files that are damaged
        raise ConfigError(f"prompt_file {path} cannot be read ({error}); repair the file") from None
    if not places:
        raise ConfigError(f"prompt_file {path} holds no prompt; give one in each line")


def _line(place: str, row: Mapping[str, Any], default_key: str) -> PromptLine:
    given = {name: value for name, value in row.items() if value is not None}
    if unknown := [name for name in given if name not in COLUMNS]:
        raise ConfigError(f"{place} has {unknown[0]!r}, which is not known; use {', '.join(COLUMNS)}")
    prompts = [name for name in PROMPTS if name in given]
    if len(prompts) != 1:
        found = " and ".join(prompts) or "no prompt"
        raise ConfigError(f"{place} has {found}; give one of {', '.join(PROMPTS)}")
    [name] = prompts
    _require_type(place, name, given[name], (PROMPTS[name],))
    if name == "prompt_ids":
        for token in given[name]:
            _require_type(place, "a prompt_id", token, (int,))
    if name == "messages":
        with said_of(place):
            check_messages(given[name])
    for setting in SETTINGS:
        if setting in given:
            _require_type(place, setting, given[setting], SETTINGS[setting])
    key = given.get("id", default_key)
    _require_type(place, "id", key, (str, int))
    try:
        str(key).encode()
    except UnicodeEncodeError as error:  # half a surrogate pair, as JSON may hold
        raise ConfigError(f"{place} has an id that is not valid UTF-8 at character {error.start}; change it") from None
    return PromptLine(place, str(key), given[name], {name: given[name] for name in SETTINGS if name in given})


def _require_type(place: str, name: str, value: Any, kinds: tuple[type, ...]) -> None:
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise ConfigError(f"{place} has {name} {value!r:.60}, which must be {KINDS[kinds]}")


Row = tuple[str, Mapping[str, Any]]  # (its place, for messages; its columns)


def _read_text(path: Path) -> Iterator[Row]:
    with open_regular(path) as file:
        yield from ((place, {"prompt": text.rstrip("\r\n")}) for place, text in lines(path, file))


def _read_json_lines(path: Path) -> Iterator[Row]:
    with open_regular(path) as file:
        for place, text in lines(path, file):
            row = _json(place, text)
            if not isinstance(row, dict):
                raise ConfigError(f"{place} is a JSON {type(row).__name__}; give an object with a prompt")
            yield place, row


def _json(place: str, text: str) -> Any:
    try:
        return strict_json(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place} is not JSON ({error}); correct it") from None


def _read_csv(path: Path) -> Iterator[Row]:
    """Cells of several lines are text too, so that rows are counted, from 1, without the header."""
    with open_regular(path) as file:
        rows = csv_rows(path, file, strict=True)
        _, header = next(rows, ("", []))
        if len(set(header)) < len(header):
            raise ConfigError(f"{path} names a column twice in its header; remove one of them")
        for number, (_, cells) in enumerate(rows, start=1):
            place = f"{path} row {number}"
            if not cells:
                continue
            if len(cells) != len(header):
                raise ConfigError(f"{place} has {len(cells)} cells and the header {len(header)}; quote commas in texts")
            yield place, {name: _cell(place, name, cell) for name, cell in zip(header, cells, strict=True) if cell}


def _cell(place: str, name: str, cell: str) -> Any:
    if name in ("id", "prompt") or name not in COLUMNS:
        return cell
    return _json(f"{place}, {name},", cell)


def _read_parquet(path: Path) -> Iterator[Row]:
    rows = parquet_rows(path, lambda schema: schema.names)
    yield from ((f"{path} row {number}", row) for number, row in enumerate(rows, start=1))


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".txt": _read_text,
    ".jsonl": _read_json_lines,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}

"""What beam search and sampling do not have in common, for flags and for the lines of a file of prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from baichuan.errors import ConfigError

OF_SAMPLING = ("top_k", "top_p", "random_seed")


def check_beam_settings(given: Mapping[str, Any], num_beams: int, mark: str = "") -> None:
    """Raise ConfigError for a setting that changes nothing with this number of beams, or without any.

    given: the settings that the user gave, defaults and what is inherited left out.
    mark: what stands before a setting's name where it is given, such as -- of flags.
    """
    if num_beams > 1:
        for name in OF_SAMPLING:
            if name in given:
                raise ConfigError(f"num_beams {num_beams} searches and does not sample; leave {mark}{name} out")
    elif "length_penalty" in given:
        raise ConfigError(
            f"length_penalty {given['length_penalty']} belongs to beam search; "
            f"give {mark}num_beams above 1, or leave it out"
        )

"""What can go wrong for a user: one sentence with the value, the rule and the remedy."""


class BaichuanError(Exception):
    """A user's error.  The scripts print its one sentence and exit with code 2."""


class ConfigError(BaichuanError):
    """A flag or a setting that cannot be used."""


class CheckpointError(BaichuanError):
    """A checkpoint, tokenizer or binary folder that cannot be read as what it claims to be."""


class EngineError(BaichuanError):
    """An engine folder that is damaged, edited, or built for another model version or number of ranks."""


class UnsupportedError(BaichuanError):
    """A combination that is valid in itself but that this backend or machine cannot run."""


def counted(number: int, noun: str) -> str:
    """For messages: "1 rank", "2 ranks"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}{'es' if noun.endswith('s') else 's'}"

"""Which runs of pytest need GPUs."""

from collections import defaultdict

GPU_MARKS = ("cuda", "multi_gpu")


def asks_for_gpus(expression: str) -> bool:
    """Whether a marker expression (pytest -m) selects tests that need a GPU, apart from slow ones where all slow tests
    are selected: those see the same machine everywhere, as the quick ones do."""

    def selects(*marks: str) -> bool:
        if not expression.strip():
            return True
        try:
            return bool(eval(expression.strip(), {}, defaultdict(bool, dict.fromkeys(marks, True))))
        except (SyntaxError, TypeError):
            return False  # pytest says what is wrong with it

    return any(selects(gpu) or (selects(gpu, "slow") and not selects("slow")) for gpu in GPU_MARKS)

"""Which rows and columns of the checkpoint's matrices a rank holds."""

from __future__ import annotations

from dataclasses import dataclass

from baichuan.config import ModelConfig
from baichuan.weights.source import Range


@dataclass(frozen=True)
class Linear:
    """One linear layer of a decoder layer: which of the hub's matrices it merges and where a rank cuts them."""

    modules: tuple[str, ...]  # the hub's names within the layer, without .weight; their rows are concatenated
    projections: int  # equal row blocks of each matrix that are cut separately: q, k and v of W_pack
    axis: int  # 0: the ranks share out the rows (output channels); 1: the columns (input channels)
    of_heads: bool  # the ranks' shares are whole heads, all alike; else any whole groups of channels

    def cut(self, shape: tuple[int, ...], rank: int, tp_size: int, group_size: int = 0) -> tuple[list[Range], Range]:
        """The row ranges, one per projection, and the column range of a matrix of this shape that rank `rank` holds.

        group_size: of channels that share a scale, which no cut divides where the shares may differ; 0 = none do.
        """
        unit = 1 if self.of_heads else group_size or 1
        if self.axis == 0:
            return rank_ranges(shape[0], self.projections, rank, tp_size, unit), (0, shape[1])
        return [(0, shape[0])], rank_ranges(shape[1], 1, rank, tp_size, unit)[0]


LINEARS = {
    "qkv": Linear(("self_attn.W_pack",), 3, 0, True),
    "o_proj": Linear(("self_attn.o_proj",), 1, 1, True),
    "gate_up": Linear(("mlp.gate_proj", "mlp.up_proj"), 1, 0, False),
    "down_proj": Linear(("mlp.down_proj",), 1, 1, False),
}
NORM_BEFORE = {"qkv": "input_layernorm", "gate_up": "post_attention_layernorm"}  # it makes the linear's inputs
ROWS_BEFORE = {"o_proj": "qkv", "down_proj": "gate_up"}  # its last rows, v or up, make the linear's inputs, in order
NORMS = {"input_norm": "input_layernorm", "post_norm": "post_attention_layernorm"}


def hub_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint in the hub's format, by name."""
    hidden, inter, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    in_layer: dict[str, tuple[int, ...]] = {
        "self_attn.W_pack": (3 * hidden, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inter, hidden),
        "mlp.up_proj": (inter, hidden),
        "mlp.down_proj": (hidden, inter),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config.num_layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in in_layer.items()}
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def rank_ranges(size: int, projections: int, rank: int, tp_size: int, unit: int = 1) -> list[Range]:
    """The ranges of `size` rows or columns that a rank holds when each of the projections is cut into whole units, as
    equally as they allow; into single rows or columns where units do not fill a projection."""
    each = size // projections
    unit = unit if each % unit == 0 else 1
    start, stop = (each // unit * number // tp_size * unit for number in (rank, rank + 1))
    return [(p * each + start, p * each + stop) for p in range(projections)]


def padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    """The smallest multiple of tp_size that holds the vocabulary."""
    return -(-vocab_size // tp_size) * tp_size

"""A network as a picture: an SVG file for any browser, one row per layer, data flowing downwards."""

from __future__ import annotations

from html import escape
from pathlib import Path

from baichuan.executors.tensorrt.network import Graph

ROW, LEFT, WIDTH = 20, 320, 1280  # pixels
COLOURS = {
    "input": "#d9ead3",
    "CONSTANT": "#eeeeee",
    "MATRIX_MULTIPLY": "#c9daf8",
    "ATTENTION_OUTPUT": "#ead1dc",
    "DIST_COLLECTIVE": "#fff2cc",
}


def write_svg(graph: Graph, path: Path) -> None:
    """Every input and layer of the network with its type and shape, and a curve from each to those that read it."""
    network, rows = graph.network, {}
    lines: list[str] = []
    curves: list[str] = []

    def add_row(kind: str, name: str, tensor) -> int:
        row = len(lines)
        text = escape(f"{kind.lower()}  {name}  {tensor.dtype.name if tensor else ''} {_shape(tensor)}")
        colour, y = COLOURS.get(kind, "#ffffff"), row * ROW
        lines.append(
            f'<rect x="{LEFT}" y="{y + 1}" width="{WIDTH - LEFT}" height="{ROW - 3}" fill="{colour}" stroke="#999"/>'
            f'<text x="{LEFT + 6}" y="{y + 14}">{text}</text>'
        )
        return row

    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        rows[tensor.name] = add_row("input", tensor.name, tensor)
    outputs = {network.get_output(index).name for index in range(network.num_outputs)}
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        kind, made = graph.trt.ILayer.type.fget(layer).name, layer.get_output(0)
        name = f"{layer.name} -> output {made.name}" if made.name in outputs else layer.name
        row = rows[made.name] = add_row(kind, name, made)
        read = [layer.get_input(number) for number in range(layer.num_inputs)]
        curves += [_curve(rows[each.name], row) for each in read if each is not None]
    height = len(lines) * ROW
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="monospace" '
        f'font-size="11">\n<g fill="none" stroke="#3366aa" stroke-width="0.7">\n{chr(10).join(curves)}\n</g>\n'
        f"{chr(10).join(lines)}\n</svg>\n",
        encoding="utf-8",
    )


def _curve(source: int, target: int) -> str:
    start, end = source * ROW + ROW // 2, target * ROW + ROW // 2
    reach = LEFT - min(LEFT - 4, 10 + 6 * (target - source))
    return f'<path d="M{LEFT} {start} C{reach} {start} {reach} {end} {LEFT} {end}"/>'


def _shape(tensor) -> str:
    return str([("?" if size < 0 else size) for size in tensor.shape]) if tensor and len(tensor.shape) >= 0 else ""

"""Draws the pictures of docs/method.md: what a memory keeps, what a chunk reads, what each costs. Run by ``make docs``.

    schemes, and the paper's cost model (model/planning.py) -> SVG -> docs/pictures/*.svg

Every picture brings its own background in a light and a dark form, has a title and a description for those who hear it,
and needs no font or file from elsewhere.
"""

import math
from collections.abc import Callable
from pathlib import Path
from xml.sax.saxutils import escape

from model.planning import compute_costs, compute_storage, find_break_even, paper_shape, scale_bytes

FOLDER = Path(__file__).parent / "pictures"

STYLE = """
  text { font: 14px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328 }
  .small { font-size: 12px; fill: #59636e }
  .strong { font-weight: 600 }
  .middle { text-anchor: middle } .end { text-anchor: end }
  .panel { fill: #ffffff; stroke: #d1d9e0 }
  .cell { fill: #eef1f4; stroke: #d1d9e0 }
  .kept { fill: #0969da } .value { fill: #8250df } .text { fill: #9a6700 }
  .chunk { fill: #ddf4ff; stroke: #0969da } .now { fill: #b6e3ff; stroke: #0969da; stroke-width: 2 }
  .off { fill: #f6f8fa; stroke: #d1d9e0; stroke-dasharray: 4 3 }
  .line { fill: none; stroke: #59636e } .guide { fill: none; stroke: #d1d9e0 }
  .curve { fill: none; stroke-width: 2.5 } .k { stroke: #0969da } .v { stroke: #8250df } .t { stroke: #9a6700 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .small { fill: #9198a1 }
    .panel { fill: #0d1117; stroke: #3d444d }
    .cell { fill: #212830; stroke: #3d444d }
    .kept { fill: #4493f8 } .value { fill: #ab7df8 } .text { fill: #d29922 }
    .chunk { fill: #10243e; stroke: #4493f8 } .now { fill: #1c3d66; stroke: #4493f8 }
    .off { fill: #151b23; stroke: #3d444d }
    .line { stroke: #9198a1 } .guide { stroke: #3d444d }
    .k { stroke: #4493f8 } .v { stroke: #ab7df8 } .t { stroke: #d29922 }
  }
"""


def write_text(x: float, y: float, text: str, kind: str = "") -> str:
    """Returns a line of text whose left end, middle or right end is at a point."""
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(text)}</text>'


def draw_box(x: float, y: float, width: float, height: float, kind: str) -> str:
    """Returns a rectangle."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="2" class="{kind}"/>'


def draw_path(points: list[tuple[float, float]], kind: str, *, arrow: bool = False) -> str:
    """Returns a line through points."""
    path = " ".join(f"{'L' if number else 'M'}{x:g} {y:g}" for number, (x, y) in enumerate(points))
    return f'<path d="{path}" class="{kind}"{" marker-end=" + chr(34) + "url(#arrow)" + chr(34) if arrow else ""}/>'


def make_picture(title: str, description: str, width: int, height: int, parts: list[str]) -> str:
    """Returns a whole picture."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-labelledby="title description">\n<title id="title">{escape(title)}</title>\n'
        f'<desc id="description">{escape(description)}</desc>\n<style>{STYLE}</style>\n'
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 1 L7 4 L0 7" class="line"/></marker></defs>'
    )
    panel = f'<rect x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8" class="panel"/>'
    return "\n".join([head, panel, *parts, "</svg>\n"])


def draw_memory() -> str:
    """Draws what a memory keeps: for each layer and head the keys and values of a few tokens."""
    num_tokens, size, left, top = 32, 13, 150, 52
    parts = [write_text(left, 30, "a reference: at most 128 tokens, each a column", "strong")]
    rows = [("layer 1", "head 1"), ("", "head 2"), ("layer 2", "head 1"), ("", "head 2"), ("layer 22", "head 8")]
    for row, (layer, head) in enumerate(rows):
        y = top + row * (size + 6) + (16 if row == len(rows) - 1 else 0)
        parts += [write_text(20, y + 12, layer, "small"), write_text(80, y + 12, head, "small")]
        # A scheme: each head keeps two of the 32 columns here, eight of 128 in the paper, and each others.
        kept = {(5 * row + 3) % num_tokens, (7 * row + 17) % num_tokens}
        parts += [
            draw_box(left + column * size, y, size - 2, size, "kept" if column in kept else "cell")
            for column in range(num_tokens)
        ]
    dots = top + 4 * (size + 6) + 8
    parts.append(write_text(left + num_tokens * size / 2, dots, "· · ·", "small middle"))
    y = dots + 62
    parts += [
        draw_box(20, y, 560, 24, "off"),
        write_text(300, y + 17, "layers 23 to 44 are never run for a reference", "small middle"),
        draw_box(20, y + 40, 12, 14, "kept"),
        write_text(40, y + 52, "kept: key and value of this token at this head"),
        draw_box(430, y + 40, 12, 14, "cell"),
        write_text(450, y + 52, "dropped"),
        write_text(20, y + 80, "22 layers x 8 heads x 8 tokens x 2 x 80 numbers = 450,560 bytes in bfloat16", "small"),
    ]
    return make_picture(
        "What a memory keeps of a reference",
        "A grid: a row for each key-value head of each memory layer, a column for each token. In every row a few cells "
        "are kept, and in each row others. The layers of the upper half are not run at all.",
        600,
        int(y + 98),
        parts,
    )


def draw_reading() -> str:
    """Draws which memories the chunks of a context read."""
    parts = [write_text(20, 30, "a context in chunks of 64 tokens; each reads five memories of its own", "strong")]
    width, gap, left, top = 128, 12, 20, 130
    names = ["chunk 1", "chunk 2", "chunk 3", "generated"]
    for number, name in enumerate(names):
        x = left + number * (width + gap)
        parts.append(draw_box(x, top, width, 34, "now" if number == 3 else "chunk"))
        parts.append(write_text(x + width / 2, top + 22, name, "middle"))
        for memory in range(5):
            parts.append(draw_box(x + 12 + memory * 22, 60, 16, 26, "kept"))
        parts.append(draw_path([(x + width / 2, 90), (x + width / 2, top - 4)], "line", arrow=True))
    parts.append(write_text(left, 50, "retrieved with the chunk before it", "small"))
    y = top + 74
    parts += [
        write_text(20, y, "what the last token attends to at a memory layer, in one softmax", "strong"),
        draw_box(20, y + 16, 60, 30, "off"),
        write_text(50, y + 36, "prefix", "small middle"),
    ]
    for memory in range(5):
        parts.append(draw_box(88 + memory * 34, y + 16, 28, 30, "kept"))
    parts += [
        draw_box(266, y + 16, 314, 30, "chunk"),
        write_text(423, y + 36, "the context up to and including itself", "small middle"),
        write_text(20, y + 66, "first", "small"),
        write_text(88, y + 66, "all in the same 128 positions", "small"),
        write_text(266, y + 66, "in the positions after them", "small"),
    ]
    return make_picture(
        "What a chunk reads",
        "Four chunks of 64 tokens in a row. Above each stand five memories, which it retrieved with the chunk before "
        "it. Below, what one token attends to at a memory layer: the prefix, five memories that share one interval of "
        "positions, and the context before it.",
        600,
        y + 84,
        parts,
    )


def draw_costs() -> str:
    """Draws the whole cost of a piece of knowledge over how often it is used, in each of the three formats."""
    costs = compute_costs(paper_shape())
    first, last = find_break_even(costs)
    rounded = float(f"{last:.3g}")
    lines: list[tuple[str, str, Callable[[float], float]]] = [
        ("text", "t", lambda uses: costs.write_text + uses * costs.read_text),
        ("explicit memory", "k", lambda uses: costs.write_memory + uses * costs.read_memory),
        ("parameters", "v", lambda uses: costs.write_parameters + uses * costs.read_parameters),
    ]
    left, top, width, height = 70, 50, 400, 230
    least, most = -2.0, 6.0

    def place(uses: float, flops: float) -> tuple[float, float]:
        share = (math.log10(flops / 1e12) + 2) / 4
        return left + (uses - least) / (most - least) * width, top + height - share * height

    parts = [write_text(20, 28, "TFLOPs to write once and to read n times, for the paper's 2.4B model", "strong")]
    for power in range(-2, 3):
        y = place(least, 10.0**power * 1e12)[1]
        parts += [
            draw_path([(left, y), (left + width, y)], "guide"),
            write_text(left - 8, y + 4, f"{10.0**power:g}", "small end"),
        ]
    for power in range(-2, 7, 2):
        x = place(power, 1e12)[0]
        parts += [
            draw_path([(x, top), (x, top + height)], "guide"),
            write_text(x, top + height + 18, f"{10**power:,}" if power >= 0 else f"{10.0**power:g}", "small middle"),
        ]
    parts.append(write_text(left + width, top + height + 36, "n, uses", "small end"))
    for name, kind, cost in lines:
        exponents = [least + step * (most - least) / 160 for step in range(161)]
        points = [place(power, cost(10.0**power)) for power in exponents if 1e10 <= cost(10.0**power) <= 1e14]
        parts.append(draw_path([(round(x, 1), round(y, 1)) for x, y in points], f"curve {kind}"))
        x, y = points[-1]
        parts.append(write_text(x + 8, y + (14 if kind == "v" else 4), name))
    for uses, name in ((first, f"n = {first:.3g}"), (last, f"n = {rounded:,.0f}")):
        x, y = place(math.log10(uses), costs.write_memory + uses * costs.read_memory)
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" class="kept"/>',
            write_text(x + 8, y + 18, name, "small"),
        ]
    return make_picture(
        "What knowledge costs in three formats",
        "Total cost over the number of uses, both axes logarithmic. Text costs nothing to write and rises at once. "
        "Explicit memory is flat for a long time. Parameters are flat and highest at first. Text is cheapest below "
        f"{first:.3g} uses, memory up to {rounded:,.0f}, parameters beyond.",
        600,
        top + height + 52,
        parts,
    )


def draw_storage() -> str:
    """Draws how the memories of the paper's corpus become small enough to store, step by step."""
    steps = compute_storage(paper_shape())
    names = [
        "all key-values",
        "memory layers only: 22 of 44",
        "key-value heads only: 8 of 40",
        "8 of 128 tokens",
        "codes",
    ]
    parts = [write_text(20, 28, "key-values of 112 million references, on a logarithmic scale", "strong")]
    top, left, width = 48, 210, 300
    for number, (name, step) in enumerate(zip(names, steps, strict=True)):
        y = top + number * 34
        length = (math.log10(step.total_bytes) - 12) / 4 * width
        value, unit = scale_bytes(step.total_bytes)
        parts += [
            write_text(20, y + 16, name, "small"),
            draw_box(left, y, round(length, 1), 22, "value" if number == len(names) - 1 else "kept"),
            write_text(left + length + 8, y + 16, f"{value:.3g} {unit}"),
        ]
    return make_picture(
        "From petabytes to terabytes",
        "Five bars, each shorter than the one before: "
        + ", ".join(
            f"{name} {scale_bytes(step.total_bytes)[0]:.3g} {scale_bytes(step.total_bytes)[1]}"
            for name, step in zip(names, steps, strict=True)
        ),
        600,
        top + len(names) * 34 + 12,
        parts,
    )


PICTURES = {
    "memory.svg": draw_memory,
    "reading.svg": draw_reading,
    "costs.svg": draw_costs,
    "storage.svg": draw_storage,
}


def main() -> None:
    """Draws all pictures."""
    for name, draw in PICTURES.items():
        (FOLDER / name).write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()

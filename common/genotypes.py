"""The generators that autorecon.py searches among, as text: published ones in a short notation, files, a picture.

A genotype is a dict of edge -> operation. `edges` is a dict of edge -> (source, target, kind), where nodes are such as "B1-N2",
`candidates` a dict of kind -> operations.
"""

import json
from pathlib import Path

from common import InputError

LETTERS = {"n": "nearest", "b": "bilinear", "-": "none", "i": "identity"}
LETTERS |= {"k1": "conv1x1", "k3": "conv3x3", "k5": "conv5x5", "d3": "dilated3x3", "d5": "dilated5x5"}
PUBLISHED = {  # up edges; normal edges of each block, N2 N3 into N4, N2 N3 N4 into N5; cross edges into each block, likewise
    "resnet20-cifar10": "n n n n b n | d5 - d5 d3 k5 | d5 d5 k3 d3 d5 | d5 d5 k1 k5 d3 | - - b - - n | n n n b b b",
    "resnet20-cifar100": "b n n n n n | d5 d5 d5 - k5 | d5 k5 k1 d3 d5 | d5 d3 k5 k5 d5 | - b n - - n | - b n n b b",
    "resnet18-imagenet": "b b b b b b | d5 d5 d5 d5 d5 | d5 d5 d5 d5 d3 | d5 d5 k5 d3 d3 | n b n b b n | b b n n b n",
    "resnet50-imagenet": "b b b b b b | d5 d5 d5 d5 d5 | d5 d5 k3 k1 k1 | d3 d5 d5 k5 d3 | b b b n n b | n n n n b b",
    "mobilenet_v2-imagenet": "b b b b n b | d5 d5 k5 d5 d5 | k5 d5 k1 k1 k1 | k3 d5 k5 d5 d3 | b b n b b b | b n b b b n",
}
COLOURS = {"nearest": "#1f77b4", "bilinear": "#17becf", "identity": "#7f7f7f", "conv1x1": "#ff9896", "conv3x3": "#ff7f0e"}
COLOURS |= {"conv5x5": "#d62728", "dilated3x3": "#98df8a", "dilated5x5": "#2ca02c"}
SPOTS = {"1": (0, 150), "2": (150, 60), "3": (150, 240), "4": (230, 150), "5": (310, 150)}  # of the nodes of a block


def _in_order(edges):
    """Names of the edges in the order of PUBLISHED, a list for each of its parts."""
    parts = [("up", "123"), ("normal", "1"), ("normal", "2"), ("normal", "3"), ("cross", "2"), ("cross", "3")]
    return [[n for n, (_, target, kind) in edges.items() if kind == part and target[1] in blocks] for part, blocks in parts]


def from_short(text, edges):
    """A genotype from the notation of PUBLISHED."""
    return dict(zip(sum(_in_order(edges), []), (LETTERS[letter] for letter in text.replace("|", "").split())))


def to_short(genotype, edges):
    """A genotype in the notation of PUBLISHED."""
    letters = {op: letter for letter, op in LETTERS.items()}
    return " | ".join(" ".join(letters[genotype[name]] for name in names) for names in _in_order(edges))


def read(name, edges, candidates, flag, others=()):
    """The genotype of "published:NAME", of a genotype.json, or of a folder with one; `flag` is what errors call it, and
    `others` is what else that flag takes.

    Raises:
        InputError: no such genotype, or an unusable one; the edge is named.
    """
    if name.startswith("published:"):
        if (short := PUBLISHED.get(name.removeprefix("published:"))) is None:
            raise InputError(f"{flag} {name} is not known; published are {', '.join(PUBLISHED)}")
        return from_short(short, edges)
    path = Path(name) / "genotype.json" if Path(name).is_dir() else Path(name)
    if not path.is_file():
        known = ", ".join(("a genotype.json", "its folder", "published:NAME", *others))
        raise InputError(f"{flag} {name} is not a file; give one of {known}")
    try:
        genotype = dict(json.loads(path.read_text())["edges"])
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{flag} {path} holds no genotype; give a genotype.json that a search wrote") from None
    for edge in [*genotype, *edges]:
        choices = candidates[edges[edge].kind] if edge in edges else ()
        if genotype.get(edge) not in choices:
            remedy = f"give it one of {', '.join(choices)}" if choices else "remove it, it is not in the search space"
            raise InputError(f"{flag} {path} has {genotype.get(edge, 'nothing')} for the edge '{edge}'; {remedy}")
    for node in {edge.target: None for edge in edges.values()}:
        names = [name for name, edge in edges.items() if edge.target == node]
        if all(genotype[name] == "none" for name in names):
            raise InputError(f"{flag} {path} sends nothing to {node}; give '{names[0]}' an operation other than none")
    return genotype


def draw(genotype, edges):
    """SVG text: blocks from left to right, edges in the colours of their operations, but for "none"."""
    place = {f"B{b}-N{n}": (40 + 310 * (b - 1) + x, y) for b in (1, 2, 3) for n, (x, y) in SPOTS.items()}
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1060 400" font-family="sans-serif" font-size="12">']
    parts.append('<rect width="1060" height="400" fill="white"/>')
    for name, (source, target, kind) in edges.items():
        if colour := COLOURS.get(genotype[name]):
            (x0, y0), (x1, y1) = place[source], place[target]
            bend = (y0 + y1) / 2 + {"cross": 130 if y0 > 100 else -110}.get(kind, -40 if y0 == y1 else 0)
            curve = f"M{x0},{y0} Q{(x0 + x1) / 2},{bend} {x1},{y1}"
            dashes = ' stroke-dasharray="6 4"' if kind == "cross" else ""
            parts.append(f'<path d="{curve}" fill="none" stroke="{colour}" stroke-width="2.5"{dashes}>')
            parts.append(f"<title>{name.replace('>', '&gt;')}: {genotype[name]}</title></path>")
    for node, (x, y) in place.items():
        if node == "B1-N1" or not node.endswith("N1"):  # N1 of a later block is N5 of the one before
            parts.append(f'<circle cx="{x}" cy="{y}" r="19" fill="white" stroke="black"/>')
            parts.append(f'<text x="{x}" y="{y + 4}" text-anchor="middle">{node}</text>')
    for index, (op, colour) in enumerate(COLOURS.items()):
        parts.append(f'<text x="{40 + 125 * index}" y="385" fill="{colour}">&#9644; {op}</text>')
    return "\n".join([*parts, "</svg>\n"])

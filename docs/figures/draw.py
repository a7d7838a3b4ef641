"""The drawings of the operators' pages, from small calls of the reference: `python docs/figures/draw.py`.

A square is a number: blue above zero, orange below, the stronger the larger; grey where a mask hides it. The colors
follow the reader's light or dark scheme.
"""

import math
from pathlib import Path
from xml.sax.saxutils import escape

import torch
from torch import Tensor

from recattn import reference

FOLDER = Path(__file__).parent
STYLE = """
    svg { --ink: #24292f; --faint: #57606a; --up: #0b7285; --down: #d9480f; --hidden: #d0d7de; --sink: #9c36b5 }
    @media (prefers-color-scheme: dark) {
      svg { --ink: #e6edf3; --faint: #9da7b1; --up: #4dd0e1; --down: #ff9a5c; --hidden: #4a515b; --sink: #e599f7 }
    }
    text { font: 13px system-ui, -apple-system, "Segoe UI", sans-serif; fill: var(--ink); text-anchor: middle }
    text.note { font-size: 11px; fill: var(--faint) }
    text.big { font-size: 20px }
    text.start { text-anchor: start }
    .up { fill: var(--up) } .down { fill: var(--down) } .hidden { fill: var(--hidden); fill-opacity: .35 }
    .sink { fill: var(--sink) }
    .frame { fill: none; stroke: var(--faint) } .dashed { stroke-dasharray: 4 3 }
    .line { stroke: var(--ink); fill: none } .up-line { stroke: var(--up); fill: none }
    .sink-line { stroke: var(--sink); fill: none; stroke-width: 2 }
    marker path { fill: var(--ink) }
"""
HEAD = (
    '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    '<path d="M0 0L8 4L0 8z"/></marker>'
)


class Drawing:
    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.shapes: list[str] = []

    def text(self, x: float, y: float, text: str, kind: str = "") -> None:
        self.shapes.append(f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(text)}</text>')

    def matrix(
        self,
        x: float,
        y: float,
        values: Tensor,
        name: str,
        note: str = "",
        *,
        cell: int = 15,
        hidden: Tensor | None = None,
        stored: bool = True,
    ) -> None:
        """A matrix with its upper left corner at (x, y), its name above and a note below."""
        rows, columns = values.shape
        hidden = torch.zeros(rows, columns, dtype=torch.bool) if hidden is None else hidden
        largest = values.masked_fill(hidden, 0).abs().max().item() or 1
        for i in range(rows):
            for j in range(columns):
                share = round(values[i, j].item() / largest, 2) if not hidden[i, j] else 1
                if share == 0:
                    continue
                kind = "hidden" if hidden[i, j] else "up" if share > 0 else "down"
                opacity = "" if hidden[i, j] else f' fill-opacity="{abs(share):.2f}"'
                corner = f'x="{x + j * cell:g}" y="{y + i * cell:g}"'
                self.shapes.append(f'<rect {corner} width="{cell - 1}" height="{cell - 1}" class="{kind}"{opacity}/>')
        self.box(x - 1, y - 1, columns * cell + 1, rows * cell + 1, dashed=not stored)
        self.text(x + columns * cell / 2, y - 9, name)
        if note:
            self.text(x + columns * cell / 2, y + rows * cell + 16, note, "note")

    def mark_sinks(self, x: float, y: float, sinks: list[int], size: int, cell: int = 15) -> None:
        """Marks of the sinks' rows and columns, left of and above a matrix at (x, y)."""
        for sink in sinks:
            self.shapes.append(
                f'<rect x="{x - 7:g}" y="{y + sink * cell:g}" width="4" height="{cell - 1}" class="sink"/>'
            )
            self.shapes.append(
                f'<rect x="{x + sink * cell:g}" y="{y - 7:g}" width="{cell - 1}" height="4" class="sink"/>'
            )

    def box(self, x: float, y: float, width: float, height: float, dashed: bool = False) -> None:
        kind = "frame dashed" if dashed else "frame"
        self.shapes.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" class="{kind}"/>')

    def arrow(self, x1: float, y1: float, x2: float, y2: float, label: str = "") -> None:
        self.shapes.append(f'<path d="M{x1:g} {y1:g}L{x2:g} {y2:g}" class="line" marker-end="url(#head)"/>')
        if label:
            self.text((x1 + x2) / 2, (y1 + y2) / 2 - 7, label, "note")

    def svg(self) -> str:
        size = f'viewBox="0 0 {self.width} {self.height}" width="{self.width}" height="{self.height}"'
        parts = [
            f"<title>{escape(self.title)}</title>",
            f"<style>{STYLE}</style>",
            f"<defs>{HEAD}</defs>",
            *self.shapes,
        ]
        body = "\n".join(f"  {part}" for part in parts)
        return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">\n{body}\n</svg>\n'


def numbers(*shape: int, seed: float) -> Tensor:
    """Numbers in [-1, 1] that look random and are the same everywhere."""
    count = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(count * (seed + 12.9898) + seed * count.square()).reshape(shape)


def causal_mask(size: int) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool).triu(1)


def sink_attention() -> Drawing:
    length, sinks = 12, [3, 7, 11]
    q, k = numbers(length, 4, seed=1.3), numbers(length, 4, seed=0.7)
    bias = 2 * numbers(3, 3, seed=2.1)
    positions = torch.tensor([sinks])
    weights = reference.sink_attention(
        q[None, None], k[None, None], torch.eye(length).double()[None, None], positions, bias[None, None], causal=True
    )[0, 0]
    scattered = torch.zeros(length, length, dtype=torch.float64)
    scattered[positions[0][:, None], positions[0]] = bias
    hidden, size = causal_mask(length), length * 15
    drawing = Drawing(800, 330, "Scores, plus the bias at pairs of sinks, give the attention weights")
    left, middle, right, top = 40, 300, 580, 110
    drawing.matrix(left, top, q @ k.T / 2, "", "N × N, never in memory", hidden=hidden, stored=False)
    drawing.text(left + size / 2, top - 18, "scale · Q Kᵀ + mask")
    drawing.text((left + size + middle) / 2 - 2, top + size / 2, "+", "big")
    drawing.matrix(middle, top, scattered, "", "β: zero but for pairs of sinks", hidden=hidden, stored=False)
    drawing.matrix(middle + 67, 32, bias, "inter_sink_bias, M × M")
    drawing.arrow(middle + 90, 80, middle + 90, top - 10)
    drawing.arrow(middle + size + 12, top + size / 2, right - 14, top + size / 2, "softmax of rows")
    drawing.matrix(right, top, weights, "", "N × N, never in memory", hidden=hidden, stored=False)
    drawing.text(right + size / 2, top - 18, "weights, times V")
    for x in (left, middle, right):
        drawing.mark_sinks(x, top, sinks, length)
    drawing.text(left, 40, "▮ a sink: a token between two behaviours", "note start")
    return drawing


def inter_sink_bias() -> Drawing:
    length, heads, count, sinks = 16, 3, 4, [3, 7, 11, 15]
    hidden_states = numbers(length, 5, seed=0.37)
    q, k = numbers(1, heads, count, 4, seed=1.9) * 2, numbers(1, heads, count, 4, seed=0.53) * 2
    valid = torch.tensor([[True, True, True, False]])
    per_head = [reference.inter_sink_bias(q[:, h, None], k[:, h, None], sink_mask=valid)[0, 0] for h in range(heads)]
    mean = reference.inter_sink_bias(q, k, sink_mask=valid)[0, 0]
    drawing = Drawing(800, 320, "Attention among the sinks, averaged over heads, is the bias")
    padded = torch.zeros(length, 5, dtype=torch.bool)
    padded[12:] = True
    drawing.matrix(40, 40, hidden_states, "H of the layer", "N × d; the end is padding", hidden=padded)
    for sink in sinks:
        drawing.shapes.append(f'<rect x="33" y="{40 + sink * 15}" width="4" height="14" class="sink"/>')
    drawing.arrow(122, 150, 252, 150, "LayerNorm, W_Q, W_K")
    unseen = ~(valid[0][:, None] & valid[0])
    for h in range(heads):
        y = 40 + 82 * h
        drawing.matrix(262, y, q[0, h], "q_s of the sinks" if h == 0 else "")
        drawing.matrix(342, y, k[0, h], "k_s" if h == 0 else "")
        drawing.matrix(502, y, per_head[h], "a head each" if h == 0 else "", hidden=unseen)
        drawing.arrow(412, y + 30, 488, y + 30, "softmax")
    drawing.text(332, 292, "[H, M, D]", "note")
    drawing.text(532, 292, "no padded sink is seen", "note")
    drawing.arrow(576, 150, 688, 150, "mean · bias_scale")
    drawing.matrix(702, 120, mean, "B", "M × M, to sink_attention", hidden=unseen)
    return drawing


def refined_attention() -> Drawing:
    length, rank = 12, 4
    q, k = numbers(length, 4, seed=1.3), numbers(length, 4, seed=0.7)
    w_q, w_k = numbers(length, rank, seed=0.21), numbers(length, rank, seed=0.83)
    hidden = causal_mask(length)
    scores = (q @ k.T / 2).masked_fill(hidden, 0)
    x_q, x_k = scores @ w_q, scores @ w_k
    m = x_q @ x_k.T / math.sqrt(rank)
    eye = torch.eye(length).double()
    weights = reference.refined_attention(*(x[None, None] for x in (q, k, eye)), w_q, w_k)[0, 0]
    drawing = Drawing(800, 330, "The scores A are projected to Q' and K', whose product M replaces them")
    top, size = 40, length * 15
    drawing.matrix(30, top, scores, "A = scale · Q Kᵀ", "0 where the mask hides", hidden=hidden)
    drawing.arrow(220, top + 60, 286, top + 40, "W_q")
    drawing.arrow(220, top + 120, 286, top + 190, "W_k")
    drawing.matrix(296, top, x_q, "Q' = A W_q", cell=10)
    drawing.matrix(296, top + 150, x_k, "K' = A W_k", "N × R", cell=10)
    drawing.arrow(346, top + 60, 392, top + 80)
    drawing.arrow(346, top + 200, 392, top + 130)
    drawing.matrix(402, top, m, "M = Q' K'ᵀ / √R", "“simple”: a second attention over A", hidden=hidden, stored=False)
    drawing.arrow(592, top + size / 2, 596 + 10, top + size / 2)
    drawing.matrix(614, top, weights, "softmax(mask(M)), times V", "", hidden=hidden, stored=False)
    return drawing


def wasserstein_attention() -> Drawing:
    means = torch.tensor([[60, 210], [120, 70], [210, 190], [300, 60], [335, 165], [205, 95]]).double()
    roots = torch.tensor([[34, 16], [14, 30], [20, 22], [36, 15], [13, 30], [24, 24]]).double()
    mean, cov = means[None, None] / 60, (roots[None, None] / 60).square()
    eye = torch.eye(len(means)).double()[None, None]
    weights = reference.wasserstein_attention(mean, cov, mean, cov, eye, eye)[0][0, 0]
    gaps = (means[:, None] - means).square().sum(-1) + (roots[:, None] - roots).square().sum(-1)
    hidden = causal_mask(len(means))
    drawing = Drawing(800, 290, "Tokens are Gaussians; close ones attend to each other")
    last = len(means) - 1
    for j, ((x, y), (a, b)) in enumerate(zip(means.tolist(), roots.tolist(), strict=True)):
        x, y = x + 20, y + 10
        if j != last:
            start = f"M{means[last][0] + 20:g} {means[last][1] + 10:g}L{x:g} {y:g}"
            drawing.shapes.append(f'<path d="{start}" class="up-line" stroke-width="{1 + 14 * weights[last, j]:.1f}"/>')
        kind = "sink-line" if j == last else "line"
        drawing.shapes.append(f'<ellipse cx="{x:g}" cy="{y:g}" rx="{a:g}" ry="{b:g}" class="{kind}"/>')
        drawing.text(x, y - b - 6 if j == last else y + b + 14, f"{'query' if j == last else 'key'} {j}", "note")
    drawing.matrix(450, 60, gaps / gaps.max(), "W², distances", "", cell=22, hidden=hidden, stored=False)
    drawing.arrow(594, 126, 646, 126, "softmax(−)")
    drawing.matrix(656, 60, weights, "P", "mean = P μ_v", cell=22, hidden=hidden, stored=False)
    drawing.text(656 + 66, 60 + 132 + 32, "cov = (P∘P) Σ_v", "note")
    drawing.text(450 + 66, 208, "‖μ_i − μ_j‖² + ‖√Σ_i − √Σ_j‖²", "note")
    drawing.text(210, 280, "a line is as thick as the weight of that key for the last query", "note")
    return drawing


def lrea_attention() -> Drawing:
    length, dim, rank = 24, 6, 4
    history, w_comp = numbers(length, dim, seed=0.61), numbers(length, rank, seed=1.7)
    w_decomp = numbers(rank, length, seed=0.29)
    compressed = reference.lrea_compress(history[None], w_comp)[0]
    target = numbers(1, dim, seed=2.3)
    scores = target @ compressed.T
    restored = torch.nn.functional.leaky_relu(scores @ w_decomp, 0.1)
    out = restored @ w_decomp.T @ compressed
    drawing = Drawing(800, 300, "A history is compressed to r rows, and a target attends to it restored")
    drawing.text(30, 24, "lrea_compress", "start")
    drawing.matrix(30, 110, w_comp.T, "W_compᵀ", "r × L", cell=10)
    drawing.text(285, 135, "·", "big")
    drawing.matrix(300, 40, history, "E, a history", "L × d", cell=10)
    drawing.text(375, 135, "=", "big")
    drawing.matrix(390, 110, compressed, "C", "r × d", cell=10)
    drawing.text(480, 24, "lrea_attention", "start")
    drawing.arrow(455, 130, 476, 130)
    drawing.matrix(490, 66, scores, "q Kᵀ", "", cell=10)
    drawing.text(548, 76, "· W_decomp", "note start")
    drawing.arrow(560, 84, 560, 112, "")
    drawing.text(568, 102, "φ, a leaky ReLU", "note start")
    drawing.matrix(
        490, 140, restored, "a score of each behaviour", "in tiles, never in memory: T × L", cell=10, stored=False
    )
    drawing.arrow(560, 180, 560, 210)
    drawing.text(568, 200, "· W_decompᵀ V", "note start")
    drawing.matrix(530, 236, out, "h", "1 × d of each target", cell=10)
    return drawing


def lrea_absorbed_attention() -> Drawing:
    users, rank, dim = 5, 4, 6
    keys, values = numbers(users, 1, rank, dim, seed=0.47), numbers(users, 1, rank, dim, seed=1.1)
    target = numbers(1, 1, dim, seed=2.3)
    user = 2
    scores = torch.nn.functional.leaky_relu(target[0] @ keys[user, 0].T, 0.1)
    out = reference.lrea_absorbed_attention(target, keys, values, torch.tensor([user]), torch.tensor([0, 1]))[0]
    drawing = Drawing(800, 320, "Each user has two small matrices in a table, and a target reads them in place")
    drawing.text(150, 22, "the table of states: a row is a user")
    for u in range(users):
        y = 50 + 52 * u
        drawing.matrix(60, y, keys[u, 0], "keys, r × d" if u == 0 else "", cell=10)
        drawing.matrix(180, y, values[u, 0], "values, r × dv" if u == 0 else "", cell=10)
        drawing.text(40, y + 25, str(u), "note")
    y = 50 + 52 * user
    drawing.shapes.append(f'<rect x="52" y="{y - 6}" width="196" height="51" class="sink-line"/>')
    drawing.text(330, y - 10, "slots[u] = 2", "note")
    drawing.arrow(300, y + 20, 256, y + 20)
    drawing.text(334, y + 25, "user u")
    drawing.matrix(440, 70, target[0], "q, a target", "1 × d", cell=14)
    drawing.arrow(532, 77, 592, 77, "· keysᵀ")
    drawing.matrix(602, 70, scores, "φ(q keysᵀ)", "1 × r", cell=14)
    drawing.arrow(630, 112, 630, 168, "")
    drawing.text(640, 146, "· values", "note start")
    drawing.matrix(588, 194, out, "h", "1 × dv", cell=14)
    drawing.text(600, 262, "O(r·d) per target: L does not appear", "note")
    drawing.text(600, 280, "the states are read where they lie", "note")
    return drawing


DRAWINGS = (
    sink_attention,
    inter_sink_bias,
    refined_attention,
    wasserstein_attention,
    lrea_attention,
    lrea_absorbed_attention,
)

if __name__ == "__main__":
    for draw in DRAWINGS:
        (FOLDER / f"{draw.__name__}.svg").write_text(draw().svg())

"""SVG as text, with integers only, so that the bytes are the same on every machine."""

from __future__ import annotations

from xml.sax.saxutils import escape

WIDTH = 480
STYLE = """
text { font: 16px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: #1f2937 }
.head { font-size: 19px; font-weight: 650 }
.code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: 15px }
.soft { fill: #5b6472 }
.panel { fill: #ffffff; stroke: #d5d9e0 }
.frozen { fill: #d9dde4 }
.cropped { fill: none; stroke: #9aa3b0; stroke-dasharray: 2 2 }
.mark { fill: none; stroke: #111827; stroke-width: 3 }
.line { fill: none; stroke: #5b6472; stroke-width: 2 }
.tip { fill: #5b6472 }
@media (prefers-color-scheme: dark) {
  text { fill: #e5e7eb }
  .soft, .tip { fill: #aab2bf }
  .panel { fill: #1a1d24; stroke: #363b46 }
  .frozen { fill: #565d6b }
  .cropped { stroke: #7b8492 }
  .mark { stroke: #ffffff }
  .line { stroke: #aab2bf }
}
"""
"""Each drawing has its own background, so it is legible in any theme."""


class Canvas:
    """A drawing that is being made."""

    def __init__(self, height: int, title: str) -> None:
        self._height, self._title = height, title
        self._parts: list[str] = []

    def rect(
        self, x: int, y: int, width: int, height: int, *, kind: str = "", fill: str = ""
    ) -> None:
        """Draw a rectangle, with a class of the style or a colour."""
        paint = f'class="{kind}"' if kind else f'fill="{fill}"'
        self._add(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="2" {paint}/>')

    def text(
        self, x: int, y: int, words: str, kind: str = "", *, anchor: str = "start", turn: int = 0
    ) -> None:
        """Write words with their baseline at y; `anchor` is start, middle or end."""
        turned = f' transform="rotate({turn} {x} {y})"' if turn else ""
        styled = f' class="{kind}"' if kind else ""
        at = f'x="{x}" y="{y}" text-anchor="{anchor}"'
        self._add(f"<text {at}{styled}{turned}>{escape(words)}</text>")

    def line(self, *points: tuple[int, int]) -> None:
        """Draw a line through points."""
        path = "M" + "L".join(f"{x} {y}" for x, y in points)
        self._add(f'<path class="line" d="{path}"/>')

    def arrow(self, *points: tuple[int, int]) -> None:
        """Draw an arrow, whose last part is horizontal or vertical."""
        (x0, y0), (x, y) = points[-2:]
        right, down = (x > x0) - (x < x0), (y > y0) - (y < y0)
        back = (x - 9 * right, y - 9 * down)
        self.line(*points[:-1], back)
        left, other = ((back[0] + side * 5 * down, back[1] + side * 5 * right) for side in (1, -1))
        corners = " ".join(f"{a},{b}" for a, b in ((x, y), left, other))
        self._add(f'<polygon class="tip" points="{corners}"/>')

    def svg(self) -> str:
        """Return the drawing."""
        size = f'viewBox="0 0 {WIDTH} {self._height}" width="{WIDTH}" height="{self._height}"'
        ground = (
            f'<rect class="panel" x="1" y="1" width="{WIDTH - 2}" '
            f'height="{self._height - 2}" rx="10"/>'
        )
        head = [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">',
            f"<title>{escape(self._title)}</title>",
            f"<style>{STYLE}</style>",
            ground,
        ]
        return "\n".join([*head, *self._parts, "</svg>", ""])

    def _add(self, part: str) -> None:
        self._parts.append(part)

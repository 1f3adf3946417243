"""The drawing of an effective weight: what a product does with it, and what all else does."""

from __future__ import annotations

from docs.drawings.canvas import WIDTH, Canvas

MIDDLE = WIDTH // 2
LEFT, RIGHT = 126, WIDTH - 126
"""The middles of the two columns."""


def effective_weight() -> str:
    """Draw what happens when an adapted weight is read."""
    canvas = Canvas(630, "An effective weight: read, multiplied, and computed")
    _box(canvas, MIDDLE, 20, 260, 62, "layer.weight", "the model's code reads it")
    canvas.arrow((MIDDLE, 82), (MIDDLE, 112))
    _box(canvas, MIDDLE, 112, 424, 104, "an effective weight", "stands for W + s dW")
    canvas.text(MIDDLE, 184, "holds W itself, the small blocks D, and s;", "soft", anchor="middle")
    canvas.text(MIDDLE, 204, "nothing is computed or copied yet", "soft", anchor="middle")
    for x, head, operations in (
        (LEFT, "multiplied", "F.linear, @, conv, lookup"),
        (RIGHT, "otherwise", "einsum, norm, print ..."),
    ):
        canvas.arrow((x, 216), (x, 262))
        canvas.text(x + 12, 244, head)
        _box(canvas, x, 262, 216, 132, operations, "", code=False)
    _two_parts(canvas)
    _dense(canvas)
    _rest(canvas)
    return canvas.svg()


def _two_parts(canvas: Canvas) -> None:
    canvas.text(LEFT, 322, "x W.T + s S(x) D", "code", anchor="middle")
    canvas.text(LEFT, 352, "two products;", "soft", anchor="middle")
    canvas.text(LEFT, 373, "dW is never formed", "soft", anchor="middle")


def _dense(canvas: Canvas) -> None:
    canvas.text(RIGHT, 322, "W + s dW", "code", anchor="middle")
    canvas.text(RIGHT, 352, "computed first, dense,", "soft", anchor="middle")
    canvas.text(RIGHT, 373, "with its gradient", "soft", anchor="middle")


def _rest(canvas: Canvas) -> None:
    """Write what needs no computation."""
    canvas.text(28, 436, "And what needs no arithmetic:", "head")
    for place, (what, answer) in enumerate(
        (
            ("shape, dtype, device", "those of W"),
            ("W.T, W[a:b], chunk", "again an effective weight"),
            ("W.mul_(2), W[0] = 1", "W itself is written"),
            ("state_dict, AdamW", "see W and D, by name"),
        )
    ):
        y = 474 + 40 * place
        canvas.text(28, y, what, "code")
        canvas.text(238, y, answer, "soft")


def _box(
    canvas: Canvas, x: int, y: int, width: int, height: int, head: str, line: str, code: bool = True
) -> None:
    """Draw a box around a middle, with a head and a line in it."""
    left = x - width // 2
    canvas.rect(left, y, width, height, kind="cropped")
    canvas.text(x, y + 27, head, "code" if code and "." in head else "", anchor="middle")
    canvas.text(x, y + 50, line, "soft", anchor="middle")

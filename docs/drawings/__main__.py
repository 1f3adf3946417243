"""Write all drawings to docs/assets."""

from pathlib import Path

from docs.drawings.figures import FIGURES

ASSETS = Path(__file__).parents[1] / "assets"

if __name__ == "__main__":
    for name, figure in FIGURES.items():
        (ASSETS / name).write_text(figure(), encoding="utf-8", newline="\n")

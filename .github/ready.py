"""`make build`, then `python .github/ready.py TAG`: may the wheel be published under it?"""

import re
import sys
import zipfile
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path

ROOT = Path(__file__).parent.parent


def metadata(wheel: Path) -> Message:
    """Return the fields that the package page shows; the payload is its text."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return HeaderParser().parsestr(archive.read(name).decode())


def reasons_against(tag: str, wheel: Path, changes: str) -> list[str]:
    """Return what is wrong with a wheel; `changes` is the text of the changelog."""
    fields = metadata(wheel)
    version = fields["Version"]
    reasons = []
    if tag != f"v{version}":
        reasons.append(f"the tag is {tag}, and the version is {version}")
    if not re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", changes, re.MULTILINE):
        reasons.append(f"CHANGELOG.md has no section for {version} with a date")
    if "Author-email" not in fields or "Project-URL" not in fields:
        reasons.append("setup.py names no one: fill in EMAIL and ADDRESS")
    return [*reasons, *(f"a link leads nowhere: {link}" for link in dead_links(fields))]


def dead_links(fields: Message) -> list[str]:
    """Return the links of the package page that are relative, or lead to no file of ours."""
    links = re.findall(r"\]\(([^)]+)\)", fields.get_payload())
    address = fields.get("Project-URL", ", ").partition(", ")[2]
    ours = re.compile(rf"{re.escape(address)}/(?:blob|raw)/v[^/]+/([^#]+)")
    paths = {link: found[1] for link in links if address and (found := ours.match(link))}
    gone = [link for link, path in paths.items() if not (ROOT / path).exists()]
    return [link for link in links if not link.startswith("https://")] + gone


def main() -> int:
    """Print what is wrong with the wheel in `dist/`; return 1 if anything is."""
    (wheel,) = (ROOT / "dist").glob("*.whl")
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    reasons = reasons_against(sys.argv[1], wheel, changes)
    print("\n".join(reasons) or f"{wheel.name} may be published")
    return bool(reasons)


if __name__ == "__main__":
    sys.exit(main())

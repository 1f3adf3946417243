"""What of the metadata is computed; pyproject.toml has the rest."""

import re
from pathlib import Path

from setuptools import setup

AUTHOR = "The disha maintainers"  # LICENSE and CITATION.cff name it too
EMAIL = ""  # who gets reports of vulnerabilities, and questions
ADDRESS = ""  # of the repository, such as https://github.com/NAME/disha, without a slash at the end
SITE = ""  # of the built pages, such as https://NAME.github.io/disha/
"""Until a person fills in the first two, the release workflow refuses to publish."""

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "disha/version.py").read_text()).group(1)


def described() -> str:
    """Return the README with links that work on the package page.

    There, a relative link leads nowhere: it becomes one into the repository at this version. While
    the repository has no address, the text of the link stays, and a picture goes.
    """
    text = (HERE / "README.md").read_text(encoding="utf-8")
    link = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:)([^)]+)\)")
    if not ADDRESS:
        return link.sub(lambda found: "" if found[1] else found[2], text)
    at = {"!": f"{ADDRESS}/raw/v{VERSION}", "": f"{ADDRESS}/blob/v{VERSION}"}
    return link.sub(lambda found: f"{found[1]}[{found[2]}]({at[found[1]]}/{found[3]})", text)


URLS = {
    "Repository": ADDRESS,
    "Issues": f"{ADDRESS}/issues",
    "Changelog": f"{ADDRESS}/blob/main/CHANGELOG.md",
    "Documentation": SITE,
}

setup(
    version=VERSION,
    author=AUTHOR,
    author_email=EMAIL,
    project_urls={name: url for name, url in URLS.items() if ADDRESS and url},
    long_description=described(),
    long_description_content_type="text/markdown",
)

"""Metadata of the distribution. pyproject.toml has the settings of the build and of the tools."""

import re
from pathlib import Path

from setuptools import find_packages, setup

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


QUANT = [
    "bitsandbytes>=0.49",
    "torchao>=0.18",
]
TRANSFORMERS = [
    "accelerate>=1.4",
    "transformers>=5.2",
]
TRL = [
    *TRANSFORMERS,
    "trl>=1.11",
]
FINETUNE = [
    *TRL,
    "datasets>=4.7",
    "gguf>=0.17",
    "matplotlib>=3.9",
    "numpy>=2",
    "pyyaml>=6.0",
    "transformers>=5.17",  # reads GGUF files into plain weights
]
PEERS = [
    *TRL,
    "diffusers>=0.41",
    "loralib>=0.1.2",
    "lycoris-lora>=4.1",
    "peft>=0.21",
    "pytorch-lightning>=2.4",
]
DOCS = [
    "latex2mathml>=3.77",
    "mkdocs>=1.6,<2",
    "mkdocs-material>=9.6",
    "mkdocstrings-python>=2",
    "ruff>=0.12",
]
DEV = [
    *DOCS,
    *FINETUNE,
    *PEERS,
    *QUANT,
    "build>=1.2",
    "deepspeed>=0.17; sys_platform == 'linux'",
    "hypothesis>=6.100",
    "mutmut>=3.8; sys_platform != 'win32'",
    "mypy>=1.15",
    "onnx>=1.17",
    "onnxruntime>=1.20",
    "onnxscript>=0.5",
    "pre-commit>=4",
    "pyright[nodejs]>=1.1.390",
    "pytest>=8",
    "pytest-cov>=7",
    "pytest-xdist>=3.6",
    "scikit-learn>=1.5",
    "selenium>=4.20",
    "setuptools>=77",
    "tensorboard>=2.16",
    "timm>=1.0.13",
    "torch-geometric>=2.6",
    "torchvision>=0.21",
    "twine>=6.1",
    "types-PyYAML>=6.0",
    "uv>=0.9",
]

ZOO = [
    "diffusers>=0.35",
    "timm>=1.0.13",
    "torchvision>=0.21",
    "transformers>=5.2",
]

setup(
    name="disha-torch",
    version=VERSION,
    description="Fine-tune any PyTorch model with small adapters: MiSS, tile, BAT (DiSHA)",
    author=AUTHOR,
    author_email=EMAIL,
    project_urls={"Repository": ADDRESS} if ADDRESS else {},
    long_description=described(),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=[
        *("MiSS", "adapters", "Bone", "BAT", "DiSHA", "fine-tuning", "LoRA"),
        *("low-rank adaptation", "parameter-efficient fine-tuning", "PEFT", "PyTorch"),
    ],
    packages=find_packages(include=["disha", "disha.*"]),
    package_data={"disha": ["py.typed"]},
    python_requires=">=3.11",
    install_requires=["torch>=2.8", "safetensors[torch]>=0.4.3", "einops>=0.7"],
    extras_require={
        "deepspeed": ["deepspeed>=0.17"],
        "finetune": FINETUNE,
        "hub": ["huggingface_hub>=1"],
        "quant": QUANT,
        "transformers": TRANSFORMERS,
        "trl": TRL,
        "dev": DEV,
        "docs": DOCS,
        "zoo": ZOO,
        "llamacpp": [*FINETUNE, "hypothesis>=6.100", "llama-cpp-python>=0.3.30", "pytest>=8"],
    },
    entry_points={"console_scripts": ["disha = disha.cli:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Programming Language :: Python :: 3.14",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)

"""Packaging of macs and its engine adapters, megatron_macs and deepspeed_macs."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = (HERE / "macs" / "version.py").read_text().split('"')[-2]

# Upper bounds are the releases the tests run on: engines change their insides with every minor
# release, and so does transformers.
MEGATRON = ["megatron-core>=0.16.1,<0.20"]
DEEPSPEED = ["deepspeed>=0.19.8,<0.20"]
VLLM = ["vllm>=0.32,<0.34"]
TRANSFORMER_ENGINE = ["transformer-engine[pytorch]>=2.6,<3"]
TOOLS = ["jinja2>=3.1", "matplotlib>=3.8", "rich>=13", "rich-argparse>=1.5"]
METRICS = ["prometheus-client>=0.20"]
# Only to fit the figures of tools/hardware anew, which are in the package.
HARDWARE = ["aiconfigurator-core>=0.12,<0.13"]
DOCS = ["mkdocs-material>=9.5,<10", "mkdocstrings[python]>=0.26"]
EXAMPLES = [
    *TOOLS,
    "easy-vqa>=1.0,<2",
    "pillow>=10",
    "scikit-image>=0.24,<1",
    "scikit-learn>=1.5,<2",
    "tqdm>=4.66",
    "transformers>=5.17,<5.25",
]
TEST = [
    "accelerate>=1.10",
    "hypothesis>=6.100",
    "mypy>=1.11",
    "peft>=0.18",
    "pytest>=8",
    "pytest-cov>=5",
    "pytest-xdist>=3.6",
    "ruff>=0.8",
    "types-PyYAML",
]

PACKAGES = "macs", "megatron_macs", "deepspeed_macs", "vllm_macs", "macs_tools"

setup(
    name="macs-moe",
    version=VERSION,
    description="Modality-aware capacity scaling: balanced expert parallelism for multimodal MoE inference",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=[
        *find_packages(include=["macs", "macs.*", "megatron_macs", "deepspeed_macs", "vllm_macs"]),
        *("macs_tools" + name.removeprefix("tools") for name in find_packages(include=["tools", "tools.*"])),
    ],
    package_dir={"macs_tools": "tools"},
    package_data={
        **{name: ["py.typed"] for name in PACKAGES},
        "macs_tools.report": ["page.html"],
        "macs_tools.hardware": ["figures.json"],
    },
    entry_points={
        "console_scripts": ["macs = macs_tools.cli:main"],
        "vllm.general_plugins": ["macs = vllm_macs:register"],
    },
    python_requires=">=3.10",
    install_requires=["torch>=2.6,<2.14", "numpy", "safetensors>=0.4", "pyyaml>=6"],
    extras_require={
        "megatron": MEGATRON,
        "deepspeed": DEEPSPEED,
        "vllm": VLLM,
        "te": TRANSFORMER_ENGINE,
        "metrics": METRICS,
        "tools": TOOLS,
        "examples": EXAMPLES,
        "docs": DOCS,
        "hardware": HARDWARE,
        "test": TEST + METRICS + EXAMPLES,
        "all": MEGATRON + DEEPSPEED + METRICS + EXAMPLES + TEST + DOCS,
    },
)

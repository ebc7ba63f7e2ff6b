"""Packaging: the one place that names, versions and lists the requirements of the project."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
INIT = (ROOT / "segmoe_kernels" / "__init__.py").read_text(encoding="utf-8")

setup(
    name="segmoe-kernels",
    version=re.search(r'^__version__ = "(.+)"$', INIT, re.MULTILINE).group(1),
    description="Triton kernels for segment-wise mixture-of-experts layers",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["segmoe_kernels", "segmoe_kernels.*"]),
    package_data={"segmoe_kernels": ["py.typed"]},
    python_requires=">=3.10",
    install_requires=[
        "einops>=0.8",
        "numpy>=1.26",
        "torch>=2.9",
        "triton>=3.5; platform_system == 'Linux'",
    ],
    extras_require={
        # torch and triton are pinned to the pair that torch itself ships together.
        "dev": [
            "accelerate>=1",
            "build>=1",
            "torch==2.13.0",
            "triton==3.7.1; platform_system == 'Linux'",
            "hypothesis>=6.100",
            "matplotlib>=3.8",
            "mypy==2.4.1",
            "onnxruntime>=1.20",
            "onnxscript>=0.5",
            "pdoc>=15",
            "peft>=0.18",
            "pre-commit>=4",
            "pytest>=8",
            "pytest-benchmark>=5",
            "pytest-xdist>=3.6",
            "ruff==0.17.6",
            "scipy>=1.11",
            "tensorboard>=2.16",
            "tqdm>=4.66",
            "transformers>=5",
        ],
        "plots": ["matplotlib>=3.8"],
        "tensorboard": ["tensorboard>=2.16"],
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)

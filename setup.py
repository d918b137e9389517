"""Packaging of moe-runtime. Torch is a range: requirements/install.sh picks the machine's build."""

from pathlib import Path

from setuptools import setup

CUDA_OR_ROCM = "platform_system == 'Linux'"

setup(
    name="moe-runtime",
    version="0.1.0.dev0",
    description="Mixture-of-Experts models that start from dense checkpoints, on a kernel-backed runtime",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        "moe_runtime_kernels",
        "moe_runtime_kernels._native",
        "moe_runtime_kernels._triton",
        "moe_runtime",
        "moe_runtime.hf",
        "moe_runtime.demo",
        "moe_runtime.distributed",
        "moe_runtime.flan",
        "moe_runtime.profile",
        "moe_runtime.evaluation",
        "moe_runtime.stats",
        "moe_runtime.train",
        "moe_runtime.train.data",
        "upcycle",
        "upcycle.sources",
        "upcycle.routers",
        "upcycle.upit",
    ],
    package_dir={"moe_runtime_kernels": "kernels/moe_runtime_kernels"},
    package_data={
        "moe_runtime_kernels": ["py.typed"],
        "moe_runtime_kernels._native": ["*.c"],
        "moe_runtime": ["py.typed"],
        "moe_runtime.flan": ["example.yaml"],
        "moe_runtime.train": ["example.yaml"],
        "upcycle": ["py.typed", "recipes/*.yaml"],
        "upcycle.upit": ["example.yaml"],
    },
    install_requires=[
        "numpy>=1.26",
        "pyyaml>=6",
        "rich>=13",
        "safetensors>=0.5",
        "torch>=2.11",
        "transformers>=5.17,<6",
        "typer>=0.15",
    ],
    extras_require={
        "bench": ["matplotlib>=3.9", "pytest>=8.3", "pytest-benchmark>=5.1", "pytest-timeout>=2.3"],
        "demo": ["gguf>=0.17", "matplotlib>=3.9"],
        "dev": [
            "hypothesis>=6",
            "mypy>=1.15",
            "pytest>=8.3",
            "pytest-benchmark>=5.1",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.11",
            "types-PyYAML",
        ],
        "flash-attn": ["flash-attn>=2.8"],
        "gguf": ["gguf>=0.17"],
        "gpu": [f"triton>=3.6; {CUDA_OR_ROCM}"],
        "peers": ["liger-kernel>=0.8.5", "moe-ops>=0.1.0"],
        "train": ["accelerate>=1.10", "datasets>=4", "peft>=0.18", "trl>=1"],
    },
    entry_points={"console_scripts": ["moe-runtime=moe_runtime.cli:main"]},
)

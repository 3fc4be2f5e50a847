"""What pyproject.toml cannot say: configs/ at the top of the repository is installed as research/configs, data and all."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["research", "research.*", "pallas_kernels", "pallas_kernels.*"]), "research.configs"],
    package_dir={"research.configs": "configs"},
    package_data={
        "": ["py.typed", "*.html", "*.css", "*.js", "*.json", "*.toml", "*.txt"],
        "research.configs": ["**/*.py", "**/*.toml", "**/*.json", "**/*.jsonl"],
    },
)

"""For tools that ask for it; what the project is stands in pyproject.toml."""

from setuptools import setup

setup()

"""pip install -e .

The top-level folders are sub-packages of srlm_mega, through the links srlm_mega/kernels -> ../kernels and so on.
They are never installed under their own names: `kernels` and `tools` would collide with other projects.
"""

from setuptools import find_namespace_packages, setup

setup(
    packages=find_namespace_packages(include=["srlm_mega*"], exclude=["*.__pycache__*", "srlm_mega.tools.scripts*"]),
    scripts=["launch/srlm"],
    package_data={"": ["*"]},  # every file next to a module is part of its package: a list would forget one
)

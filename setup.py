"""What setup.cfg cannot say: the parts in C, which are left out where they cannot be compiled."""

from setuptools import Extension, setup


def library(package: str, name: str) -> Extension:
    """A library in C. No module of Python's, and without Python.h: ctypes loads it. It needs a compiler alone."""
    return Extension(
        f"wsi_pipe.{package}._{name}",
        ["wsi_pipe/" + package.replace(".", "/") + f"/_{name}.c"],
        extra_compile_args=["-O3", "-std=gnu11", "-fvisibility=hidden"],
        optional=True,
    )


setup(ext_modules=[library("slides.codecs", "jpeg"), library("tiles", "paste"), library("tiles", "resample")])

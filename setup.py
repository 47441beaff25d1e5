"""What setup.cfg cannot say: the parts in C, which are left out where they cannot be compiled.

WSI_PIPE_COMPILED=required makes that an error, as for wheels that are handed on.
"""

from __future__ import annotations

import os
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

FLAGS = {"msvc": ["/O2"], "": ["-O3", "-std=gnu11", "-fvisibility=hidden"]}
"""By kind of compiler; "" is all that understand what GCC and Clang do."""


class Library(Extension):
    """A library in C. No module of Python's, and without Python.h: ctypes loads it. It needs a compiler alone."""


def library(package: str, name: str) -> Library:
    source = "wsi_pipe/" + package.replace(".", "/") + f"/_{name}.c"
    return Library(f"wsi_pipe.{package}._{name}", [source], optional=os.environ.get("WSI_PIPE_COMPILED") != "required")


class BuildLibraries(build_ext):
    """Names libraries as no version of Python's: one build serves all of them."""

    def get_ext_filename(self, fullname: str) -> str:
        ending = ".pyd" if os.name == "nt" else ".so"
        return os.path.join(*fullname.split(".")) + ending

    def get_export_symbols(self, ext: Any) -> list[str]:
        # Else Windows' linker looks for the function with which Python starts a module.
        return list(ext.export_symbols or [])

    def build_extension(self, ext: Any) -> None:
        ext.extra_compile_args = FLAGS.get(self.compiler.compiler_type, FLAGS[""])
        try:
            super().build_extension(ext)
        except Exception:
            # setuptools warns too, but does not say what it costs.
            if ext.optional:
                self.warn(f"{ext.name} is left out: wsi-pipe does the same without it, more slowly")
            raise


class AnyPython(bdist_wheel):
    """A wheel of one platform and of any Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[library("slides.codecs", "jpeg"), library("tiles", "paste"), library("tiles", "resample")],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": AnyPython},
)

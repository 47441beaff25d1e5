"""What setup.cfg cannot say: the JPEG decoder in C, which is left out where it cannot be compiled."""

from setuptools import Extension, setup

# No module of Python's, and without Python.h: ctypes loads it. So it needs a C compiler and nothing else.
JPEG = Extension(
    "wsi_pipe.slides._jpeg",
    ["wsi_pipe/slides/_jpeg.c"],
    extra_compile_args=["-O3", "-std=gnu11", "-fvisibility=hidden"],
    optional=True,
)

setup(ext_modules=[JPEG])

"""Slides and a student of random weights for ``gpu_all.sh``: a folder with slide0.svs and so on, and student/."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from file_to_answer import LR, make_model, write_slide

from wsi_pipe.seen import NOBODY


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--times", type=int, nargs=2, default=(4, 4), help="Sections side by side in a slide.")
    parser.add_argument("--block-px", type=int, default=4096)
    parser.add_argument("--student", default="mobilenetv4_conv_small")
    parser.add_argument("--student-px", type=int, default=128)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    first = args.out / "slide0.svs"
    write_slide(first, tuple(args.times), args.block_px)
    for number in range(1, args.count):
        shutil.copyfile(first, args.out / f"slide{number}.svs")
    make_model(args.out, "student", args.student, args.student_px, LR, NOBODY)


if __name__ == "__main__":
    main()

"""An image folder in which a few photographs stand many times, by symbolic links: for trying a
large batch.

    python benchmarks/repeat_folder.py SOURCE TARGET --images 98304

SOURCE holds one folder per class; TARGET gets train/<class>/<copy> -> SOURCE/<class>, at least
``images`` files in all, and val/<class>. This is no training set: it lets a step at a real global
batch run where the real images are not.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS


def repeat(source: Path, target: Path, images: int) -> int:
    """Make the links; returns how many images TARGET/train has."""
    classes = sorted(folder.resolve() for folder in source.iterdir() if folder.is_dir())
    files = [path for folder in classes for path in folder.rglob("*")]
    found = sum(path.suffix.lower() in IMG_EXTENSIONS for path in files)
    if not found:
        raise SystemExit(f"{source} has no class folder with images.")
    copies = -(-images // found)
    for folder in classes:
        (target / "train" / folder.name).mkdir(parents=True)
        for number in range(copies):
            (target / "train" / folder.name / f"{number:05}").symlink_to(folder)
        (target / "val").mkdir(exist_ok=True)
        (target / "val" / folder.name).symlink_to(folder)
    return copies * found


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--images", type=int, required=True, help="at least, in TARGET/train")
    args = parser.parse_args()
    print(f"{args.target}: {repeat(args.source, args.target, args.images)} images")


if __name__ == "__main__":
    main()

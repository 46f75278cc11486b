"""Lays an image of buildah's store out as one folder, called by images.sh.

    buildah inspect --type image IMAGE | rootfs.py CACHE IMAGE

Files are hard links to those of the layers, so that nothing is copied: the folder must lie on the store's filesystem,
and is for reading only. Prints the image's name, the folder, and the image's settings as options of load-image.
"""

import json
import os
import shutil
import stat
import sys
from pathlib import Path

KEPT = 3
"""Folders of an image that stay, for the pods that still use them."""


def layer_folders(storage: Path, top: str) -> list[Path]:
    """Folders of an image's layers, the lowest first. `top` is the identity of the uppermost layer."""
    layers = {layer["id"]: layer for layer in json.loads((storage / "overlay-layers/layers.json").read_text())}
    chain: list[Path] = []
    layer: str | None = top
    while layer:
        chain.insert(0, storage / "overlay" / layer / "diff")
        layer = layers[layer].get("parent")
    return chain


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def add_layer(layer: Path, target: Path) -> None:
    """Puts `layer` over `target`. A character device 0:0 marks what a layer takes away, as overlayfs has it."""
    for folder, folders, files in os.walk(layer):
        here = target / Path(folder).relative_to(layer)
        if here.is_symlink() or not here.is_dir():
            remove(here)
            here.mkdir()
        if "trusted.overlay.opaque" in os.listxattr(folder):
            for below in here.iterdir():
                remove(below)
        shutil.copystat(folder, here)
        status = os.stat(folder)
        os.chown(here, status.st_uid, status.st_gid)
        os.chmod(here, stat.S_IMODE(status.st_mode))
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in files + links:
            source, wanted = os.path.join(folder, name), here / name
            status = os.lstat(source)
            if stat.S_ISCHR(status.st_mode) and status.st_rdev == 0:
                remove(wanted)
                continue
            try:
                os.link(source, wanted, follow_symlinks=False)
            except FileExistsError:
                remove(wanted)
                os.link(source, wanted, follow_symlinks=False)


def load_options(config: dict[str, object]) -> list[str]:
    environment = config.get("Env") or []
    assert isinstance(environment, list)
    return [
        *(word for pair in environment for word in ("--env", pair)),
        *("--user", str(config.get("User", "")), "--workdir", str(config.get("WorkingDir") or "/")),
    ]


def main() -> None:
    cache, image = Path(sys.argv[1]), sys.argv[2]
    inspected = json.load(sys.stdin)
    images = json.loads((cache / "storage/overlay-images/images.json").read_text())
    identity = inspected["FromImageID"]
    name = image.split("/")[-1].replace(":", "-")
    folder = cache / "rootfs" / f"{name}-{identity[:12]}"
    if not folder.exists():
        unfinished = folder.with_suffix(".new")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        top = next(entry["layer"] for entry in images if entry["id"] == identity)
        for layer in layer_folders(cache / "storage", top):
            add_layer(layer, unfinished)
        unfinished.rename(folder)
    os.utime(folder)
    same = sorted(folder.parent.glob(f"{name}-" + "[0-9a-f]" * 12), key=lambda path: path.stat().st_mtime)
    for old in same[:-KEPT]:
        shutil.rmtree(old)
    print(image, folder, *load_options(inspected["OCIv1"]["config"]))


if __name__ == "__main__":
    main()

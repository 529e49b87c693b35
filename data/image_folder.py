"""ImageNet-style folders: one folder per class under train/ and val/."""

from pathlib import Path

from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS


def open_image_folder(root: str, split: str) -> ImageFolder:
    """The images of one split, (RGB image, label) by index; classes are the folder names in order.

    Raises:
        FileNotFoundError: the folder, its split, or images in a class are missing.
    """
    folder = Path(root) / split
    if not root:
        raise FileNotFoundError("DATA.DATA_PATH is empty: name the folder that holds train/ and val/ with --data-path")
    if not folder.is_dir():
        raise FileNotFoundError(
            f"DATA.DATA_PATH {root!r}: no folder {folder}; it must hold train/ and val/, each with a folder per class"
        )
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir())
    if not classes:
        raise FileNotFoundError(
            f"{folder}: no class folders in it; put the images of each class in a folder of its own"
        )
    for entry in classes:
        if not any(path.suffix.lower() in IMG_EXTENSIONS for path in entry.rglob("*")):
            raise FileNotFoundError(
                f"{entry}: a class folder without images ({', '.join(IMG_EXTENSIONS)}); add some or remove the folder"
            )
    return ImageFolder(folder)

"""image_folder: a folder a class with images at any depth below it, or one folder of unlabelled images.

    IMAGES/cat/1.png                IMAGES/1.png        IMAGES/train/cat/1.png      or  IMAGES/train/1.png
    IMAGES/cat/holiday/2.jpg        IMAGES/2.jpg        IMAGES/test/cat/2.jpg           IMAGES/test/2.jpg
    IMAGES/dog/3.webp
    labelled: cat 0, dog 1          unlabelled          labelled, in two pools          unlabelled, in two pools

The classes are the sorted names of the folders that hold images. Files are images by their suffix; other files,
whatever starts with a dot, and the folders that systems make for themselves (`data_prep.files.folders`) are passed
over. Links to folders are followed.

Where all folders are called after splits (`data_prep.sources._splits`: train, training, test, eval, val, valid, ...)
they are no classes: the first is the pool "train"; the second, or where there is none the third, or what
`--option test=test` or `test=validation` says, is the pool "test"; its classes are those of the training images.
A folder that is itself called so is that pool alone. Otherwise it is not said whether its images are for training or
for testing: both pools are all of them, so that a folder of test images is built with --split test.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.files.folders import Identity, files_below, identity, is_file, is_folder, refuse_lost, visible
from data_prep.sources import Item, Pool
from data_prep.sources._splits import is_plain, split_of_folder, split_of_word, test_split, unlike
from igpt_ds.errors import UserError
from igpt_ds.images import MAX_BYTES

_JPEG, _PNM = (".jpg", ".jpeg", ".jpe", ".jfif"), (".ppm", ".pgm", ".pbm", ".pnm")
SUFFIXES = (*_JPEG, *_PNM, ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class ImageFolder:
    """Images below `root`; see `data_prep.sources.ListedSource`.

    Attributes:
        pools: (pool, its folder below the root) of all pools; the folder is "" where it is the root.
    """

    root: Path
    classes: list[str] | None
    pools: tuple[tuple[Pool, str], ...] = (("train", ""), ("test", ""))
    name: str = "image_folder"

    def items(self, pool: Pool) -> list[Item]:
        """All images of a pool, sorted by id within a class."""
        folder = dict(self.pools).get(pool)
        if folder is None:
            return []
        top, prefix = self.root / folder, f"{folder}/" if folder else ""
        folders = _folders(top)
        images = {name: sorted(_images(top / name, folders)) for name in folders.values()}
        classes = [name for name, found in images.items() if found]
        if bool(classes) != (self.classes is not None):
            which = f"class folders such as {classes[0]}" if classes else "no class folders"
            raise UserError(f"{top}: {which}, unlike the training images: give each by itself")
        _refuse_loose(top, folders)
        labels = {name: label for label, name in enumerate(self.classes or ())}
        if unknown := sorted(set(classes) - set(labels)):
            raise UserError(f"{top / unknown[0]}: no class of the training images: mend its name or move it away")
        items = [Item(f"{prefix}{name}/{i}", labels[name]) for name in classes for i in images[name]]
        if not classes:
            items = [Item(prefix + i, None) for i in sorted(_images(top, folders))]
        if not items:
            raise UserError(f"{top}: no images: give a folder of images or of class folders")
        _refuse_splits(self.root, prefix, (item.id for item in items))
        return items

    def read(self, item_id: str) -> bytes:
        """The file's bytes."""
        with (self.root / item_id).open("rb") as file:
            return file.read(MAX_BYTES + 1)

    def files(self, item_id: str) -> list[Path]:
        """Its own."""
        return [self.root / item_id]


def open_source(paths: list[str], *, test: str | None = None) -> ImageFolder:
    """Look at the top of the folder: are there classes, or splits?

    Args:
        test: which split is the pool "test": "test" or "validation".
    """
    if len(paths) != 1:
        raise UserError(f"{' '.join(paths[1:])}: image_folder reads one folder: give one")
    path = paths[0]
    root = Path(path)
    if not root.is_dir():
        what = "not a folder" if root.exists() else "no such folder"
        raise UserError(f"{path}: {what}: give a folder of images or of class folders")
    classes = _classes(root)
    splits = _splits(root, classes or [])
    wanted = test_split(splits, test)
    if not splits:
        if test:
            raise UserError(f"--option test={test}: {path} holds no folders of splits: leave it out")
        # A folder that is itself called after a split holds that one and no other.
        told = split_of_folder(path)
        alone: dict[str | None, Pool] = {"train": "train", "validation": "test", "test": "test"}
        return ImageFolder(root, classes, ((alone[told], ""),)) if told else ImageFolder(root, classes)
    of_pools: tuple[tuple[Pool, str], ...] = (("train", "train"), ("test", wanted))
    pools = tuple((pool, splits[split]) for pool, split in of_pools if split in splits)
    if not pools:
        raise UserError(f"{path}: holds neither training images nor {wanted} ones: give one of its folders")
    return ImageFolder(root, _classes(root / pools[0][1]), pools)


def _splits(root: Path, folders: list[str]) -> dict[str, str]:
    """The folder of each split; empty where the folders are classes."""
    splits = {name: split for name in folders if (split := split_of_word(name))}
    if len(splits) == len(folders):
        by_split = {split: name for name, split in splits.items()}
        if len(by_split) < len(folders):
            raise UserError(f"{root}: {' and '.join(folders)} are not one folder a split: give one of them")
        return by_split
    # A class may be called train, it is one of CIFAR-100 and of VOC, if it has images and no classes of its own.
    if told := [name for name, split in splits.items() if split != "train" or _classes(root / name)]:
        other = next(name for name in folders if name not in splits)
        raise UserError(f"{root / told[0]}: looks like a split, and {other} beside it like a class: move one away")
    if found := unlike(folders):
        raise UserError(
            f"{root}: {found[0]} and {found[1]} look like splits: call them train and test, or give one of them; "
            "if they are classes, call one otherwise"
        )
    return {}


def _classes(root: Path) -> list[str] | None:
    """The sorted names of the folders that hold images; None where images lie in `root` itself, or nowhere."""
    folders = _folders(root)
    _refuse_loose(root, folders)
    return [name for name in folders.values() if any(_images(root / name, folders))] or None


def _folders(root: Path) -> dict[Identity, str]:
    """The names of the folders in `root`, sorted, but for links to folders around it."""
    around = {identity(folder) for folder in (root, *root.resolve().parents)}
    found: dict[Identity, str] = {}
    for entry in visible(root):
        if not is_folder(entry):
            refuse_lost(entry)
        elif (this := identity(entry.path)) not in around and found.setdefault(this, entry.name) != entry.name:
            raise UserError(f"{entry.path}: the same folder as {found[this]}: remove the link")
    return found


def _refuse_loose(root: Path, folders: dict[Identity, str]) -> None:
    if folders and (loose := [entry.name for entry in visible(root) if _is_image(entry.name) and is_file(entry)]):
        raise UserError(
            f"{root}: images such as {loose[0]} beside folders such as {next(iter(folders.values()))}: "
            "move all images into class folders, or all out of them"
        )


def _images(top: Path, others: Collection[Identity]) -> Iterator[str]:
    """The paths of the images below a folder; links from there to other folders of classes are not followed."""
    for name, entry in files_below(str(top), SUFFIXES, others):
        if not is_file(entry):
            raise UserError(f"{entry.path}: a pipe or a device, no image: remove it")
        yield name


def _refuse_splits(root: Path, prefix: str, ids: Iterable[str]) -> None:
    """Test images in folders of their own must not be taken for training images, nor folders of classes for a class."""
    inside: defaultdict[str, set[str]] = defaultdict(set)  # the folders in each folder
    holding = {i.rpartition("/")[0] for i in ids}
    for parts in (folder.split("/") for folder in holding):
        for depth, name in enumerate(parts):
            inside["/".join(parts[:depth])].add(name)
    for around, names in sorted(inside.items()):
        if found := unlike(names):
            raise UserError(
                f"{root / around}: holds {found[0]} and {found[1]}, which look like splits: give this folder, with its "
                "splits called train and test, or one of them, or move them"
            )
    # Folders of classes lie in the root, or in that of a split; what is deeper has no meaning but this.
    top = prefix.rstrip("/")
    deep = [f"{around}/{name}" for around, names in inside.items() if around != top for name in names if around]
    if found := unlike(deep):
        raise UserError(
            f"{root}: {found[0]} and {found[1]} look like splits: call them train and test with the "
            "classes inside, or move them"
        )
    own = split_of_word(top)
    if other := next(
        (path for path in sorted(deep) if own and split_of_word(path.rpartition("/")[2]) not in {None, own}), None
    ):
        raise UserError(f"{root / other}: looks like a split inside {top}: move it out of there")
    classes = sorted(inside[top])
    if len(classes) == 1 and is_plain(classes[0]):
        alone = f"{prefix}{classes[0]}"
        if alone not in holding and (inner := sorted(inside[alone])):
            remedy = f"move its folders to {root / top}" if top else f"give {root / alone}"
            raise UserError(
                f"{root / alone}: the one class would be {classes[0]}, of folders such as {inner[0]}: {remedy}"
            )


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)

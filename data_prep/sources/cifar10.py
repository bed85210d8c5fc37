"""cifar10: CIFAR-10 as published, in the layout for Python or the binary one, as a folder or as the archive.

    cifar-10-batches-py/                     cifar-10-batches-bin/
        data_batch_1 ... data_batch_5            data_batch_1.bin ... data_batch_5.bin
        test_batch                               test_batch.bin
        batches.meta                             batches.meta.txt
    or cifar-10-python.tar.gz                or cifar-10-binary.tar.gz

The path is one of these or the folder around one. The pool "train" has the 50 000 training images, "test" the
10 000 test images. The pickles of the layout for Python are read without running them (`data_prep.files.unpickle`).
"""

from data_prep.sources._cifar import Cifar, Layout, open_cifar

_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
LAYOUTS = (
    Layout(
        "cifar-10-batches-py, cifar-10-python.tar.gz",
        {"train": _BATCHES, "test": ("test_batch",)},
        ("batches.meta", b"label_names"),
        b"labels",
    ),
    Layout(
        "cifar-10-batches-bin, cifar-10-binary.tar.gz",
        {"train": tuple(f"{name}.bin" for name in _BATCHES), "test": ("test_batch.bin",)},
        ("batches.meta.txt", None),
        0,
        header=1,
    ),
)


def open_source(paths: list[str]) -> Cifar:
    """Look at what lies at the path."""
    return open_cifar(paths, "cifar10", LAYOUTS)

"""cifar100: CIFAR-100 as published, in the layout for Python or the binary one, as a folder or as the archive.

    cifar-100-python/                cifar-100-binary/
        train, test                      train.bin, test.bin
        meta                             fine_label_names.txt, coarse_label_names.txt
    or cifar-100-python.tar.gz       or cifar-100-binary.tar.gz

The path is one of these or the folder around one. The pool "train" has the 50 000 training images, "test" the
10 000 test images. Labels are the 100 fine ones, or with `--option labels=coarse` the 20 coarse ones. The pickles
of the layout for Python are read without running them (`data_prep.files.unpickle`).
"""

from data_prep.sources._cifar import Cifar, Layout, open_cifar
from igpt_ds.errors import UserError


def open_source(paths: list[str], *, labels: str | None = None) -> Cifar:
    """Look at what lies at the path.

    Args:
        labels: "fine" (as without it) or "coarse".
    """
    kind = labels or "fine"
    if kind not in {"fine", "coarse"}:
        raise UserError(f"--option labels={labels}: no such labels: choose fine or coarse")
    layouts = (
        Layout(
            "cifar-100-python, cifar-100-python.tar.gz",
            {"train": ("train",), "test": ("test",)},
            ("meta", f"{kind}_label_names".encode()),
            f"{kind}_labels".encode(),
        ),
        Layout(
            "cifar-100-binary, cifar-100-binary.tar.gz",
            {"train": ("train.bin",), "test": ("test.bin",)},
            (f"{kind}_label_names.txt", None),
            ["coarse", "fine"].index(kind),
            header=2,
        ),
    )
    return open_cifar(paths, "cifar100", layouts)

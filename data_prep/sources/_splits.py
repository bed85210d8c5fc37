"""Which split a file or folder belongs to, by its name, as Hugging Face's hub has it.

A split's name is one of the words below in any case, anywhere in the name between other characters than letters:
`cifar10-test.parquet`, `my_test_file.tar`, `Test-1.parquet` and `val2017/0.tar`, not `contest.tar`. A capital letter
begins a word, and `set`, `data`, `file` and the like may follow one: `cifarTest.parquet`, `trainset.parquet`. The
file's name decides, or else the nearest folder that says so.

Source: https://huggingface.co/docs/hub/datasets-file-names-and-splits
"""

import re
from collections.abc import Iterable

from data_prep.sources import Pool
from igpt_ds.errors import UserError

_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT = {word: split for split, words in _SPLITS.items() for word in words}
_WORD = re.compile(rf"({'|'.join(_SPLIT)})(?:sets?|data|files?|images?|imgs?)?")


def split_of_word(word: str) -> str | None:
    """ "train", "validation" or "test" where the whole of a name says so."""
    match = _WORD.fullmatch(word.lower())
    return _SPLIT[match[1]] if match else None


def splits_named(part: str) -> list[str]:
    """Those that a folder's or file's name names, each once."""
    words = re.findall(r"[^\W\d_]+", re.sub("(?<=[a-z])(?=[A-Z])", " ", part))
    return list(dict.fromkeys(split for word in words if (split := split_of_word(word))))


def split_named(name: str) -> str | None:
    """ "train", "validation" or "test", of a path's last part that names one; None where none does."""
    for part in reversed(name.split("/")):
        if len(found := splits_named(part)) > 1:
            raise UserError(f"{name}: names both {' and '.join(found)}: rename it, or say which with --option pool")
        if found:
            return found[0]
    return None


def files_of(pool: Pool, places: dict[str, str], given: str | None, test: str | None = None) -> list[str]:
    """The names of the files that belong to a pool, in their order.

    Args:
        places: where each file is, by its name.
        given: the pool that all are in, where the user says so.
        test: the split that is the pool "test"; as without it, "test" where there are such files, else "validation".

    Raises:
        UserError: some names tell a split, and others do not.
    """
    if given:
        return list(places) if pool == given else []
    splits = {name: _split_of_file(name, url) for name, url in places.items()}
    untold = [name for name, split in splits.items() if split is None]
    if untold and len(untold) < len(splits):
        other = next(name for name, split in splits.items() if split)
        raise UserError(
            f"{places[untold[0]]}: its name tells no split, as that of {other} does: rename it to train, validation or "
            "test, or give the files of one pool and --option pool=train or pool=test"
        )
    wanted = "train" if pool == "train" else test_split(splits.values(), test)
    return [name for name, split in splits.items() if (split or "train") == wanted]


def test_split(splits: Iterable[str | None], test: str | None) -> str:
    """The split that is the pool "test": "test" or, where there is none, "validation", if `test` says nothing else."""
    if test not in {None, "test", "validation"}:
        raise UserError(f"--option test={test}: no such split: choose test or validation")
    return test or ("test" if "test" in splits else "validation")


def check_pool(pool: str | None) -> None:
    """Refuse another value of the option `pool` than there are pools."""
    if pool not in {None, "train", "test"}:
        raise UserError(f"--option pool={pool}: no such pool: choose train or test")


def _split_of_file(name: str, url: str) -> str | None:
    """By its name, or else that of the folder that the user gave."""
    split = split_named(name)
    for folder in name.split("/")[:-1]:
        if split and (other := split_of_word(folder)) and other != split:
            raise UserError(f"{url}: is called {split} in a folder {folder}: say which with --option pool")
    return split or split_of_word(url.removesuffix(name).rstrip("/").rpartition("/")[2])

"""Which split a file or folder belongs to, by its name, as Hugging Face's hub has it.

A split's name is one of the words below in any case, anywhere in the name between other characters than letters:
`cifar10-test.parquet`, `my_test_file.tar`, `Test-1.parquet` and `val2017/0.tar`, not `contest.tar`. A capital letter
begins a word, and `set`, `data`, `file` and the like may follow one: `cifarTest.parquet`, `trainset.parquet`. The
file's name decides, or else the nearest folder that says so, below the path that was given, or that path's own folder:
as it is written, and as links lead; one of a name that says nothing (`data`, `shards`, `000`) goes by that around it.

Source: https://huggingface.co/docs/hub/datasets-file-names-and-splits
"""

import os
import re
from collections.abc import Callable, Iterable
from functools import cache

from data_prep.files.remote import scheme
from data_prep.sources import Pool
from igpt_ds.errors import UserError

_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT = {word: split for split, words in _SPLITS.items() for word in words}
_WORD = re.compile(rf"({'|'.join(_SPLIT)})(?:sets?|data|files?|images?|imgs?)?")
_PLAIN = re.compile(
    "(?:data)?sets?|data|files?|images?|imgs?|pictures?|photos?|shards?|tars?|webdataset|parquet|parts?|[a-z]"
)


def split_of_word(word: str) -> str | None:
    """ "train", "validation" or "test" where the whole of a name says so."""
    match = _WORD.fullmatch(word.lower())
    return _SPLIT[match[1]] if match else None


def splits_named(part: str) -> list[str]:
    """Those that a folder's or file's name names, each once."""
    return list(dict.fromkeys(split for word in _words(part) if (split := split_of_word(word))))


def is_plain(name: str) -> bool:
    """Does a folder's name say nothing about what is in it, as `images`, `data` and `000` do?"""
    return all(_PLAIN.fullmatch(word.lower()) for word in _words(name))


def split_of_folder(path: str) -> str | None:
    """ "train", "validation" or "test", as a folder that was given is called, or where its links lead is."""
    found = {_split_around(folder): None for folder in (os.path.abspath(path), os.path.realpath(path))}  # noqa: PTH100
    return _one(path, [split for split in found if split])


def unlike(names: Iterable[str]) -> tuple[str, str] | None:
    """Two names, or paths, that sound like different splits, if there are such."""
    named = {name: found for name in sorted(names) if (found := splits_named(name.rpartition("/")[2]))}
    if len(named) < 2 or len(set().union(*named.values())) < 2:
        return None
    first, *others = named
    return first, next((name for name in others if named[name] != named[first]), others[0])


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
    of_folder = cache(split_of_folder)
    splits = {name: _split_of_file(name, url, of_folder) for name, url in places.items()}
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


def _split_of_file(name: str, url: str, of_folder: Callable[[str], str | None]) -> str | None:
    """By its name, or else that of the folder that the user gave, or of the place where it really is."""
    split = split_named(name)
    for folder in name.split("/")[:-1]:
        if split and (other := split_of_word(folder)) and other != split:
            raise UserError(f"{url}: is called {split} in a folder {folder}: say which with --option pool")
    if split:
        return split
    if url.startswith("pipe:"):
        url = next((word for word in reversed(url.split()) if word.endswith(name)), name)
    elif not scheme(url):
        told = [of_folder(folder) for folder in (url.removesuffix(name), os.path.dirname(url))]  # noqa: PTH120
        if os.path.islink(url):  # noqa: PTH114
            real = os.path.realpath(url)
            told += [split_named(os.path.basename(real)) or of_folder(os.path.dirname(real))]  # noqa: PTH119, PTH120
        return _one(url, [split for split in told if split])
    return _split_around(url.removesuffix(name))


def _split_around(folder: str) -> str | None:
    """By the folder's name, or while that says nothing by the next one around it."""
    parts = [part for part in folder.split("/") if part]
    for part in reversed(parts):
        if not is_plain(part):
            # The last word: a test_run is none. ~/dev/data is a place to work at, not images for validation.
            last = [word for word in _words(part) if not _PLAIN.fullmatch(word.lower())][-1]
            return None if last.lower() == "dev" and part != parts[-1] else split_of_word(last)
    return None


def _one(path: str, found: list[str]) -> str | None:
    if len(set(found)) > 1:
        raise UserError(
            f"{path}: is called {found[0]} and leads to {found[-1]}: give the place itself, or mend the link"
        )
    return found[0] if found else None


def _words(part: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", re.sub("(?<=[a-z])(?=[A-Z])", " ", part))

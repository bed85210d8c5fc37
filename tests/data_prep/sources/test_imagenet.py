"""imagenet: every published layout gives the same ids, labels and bytes, and its odd files come through."""

import gzip
import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from igpt_ds.images.transforms import evaluation
from tests.helpers.source_fixtures import decoded, link, listed, png, refusal, tar_bytes

# Sorted, as labels are; the devkit numbers them otherwise.
SYNSETS = ["n01440764", "n01443537", "n01484850", "n02105855"]
ILSVRC_IDS = {"n02105855": 1, "n01440764": 2, "n01484850": 3, "n01443537": 4}
VALIDATION = [2, 0, 3, 1, 1, 2]  # labels
PER_CLASS = 3


def odd_jpegs() -> dict[str, tuple[bytes, np.ndarray]]:
    """ImageNet's known oddities, with the pixels that they must give; smooth, since JPEG keeps smooth images."""
    y, x = np.mgrid[:64, :64] * 3
    photo = np.stack([x, y, 255 - (x + y) // 2], 2).astype(np.uint8)
    image = Image.fromarray(photo)

    def saved(picture: Image.Image, kind: str, **options: object) -> bytes:
        out = io.BytesIO()
        picture.save(out, kind, **options)
        return out.getvalue()

    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 90 degrees clockwise
    return {
        "cmyk": (saved(image.convert("CMYK"), "JPEG", quality=95), photo),
        "png": (saved(image, "PNG"), photo),
        "exif": (saved(image, "JPEG", quality=95, exif=turned), np.rot90(photo, -1)),
        "grey": (saved(image.convert("L"), "JPEG"), np.asarray(image.convert("L").convert("RGB"))),
    }


def training() -> dict[str, bytes]:
    files = {f"{s}/{s}_{i}.JPEG": png(10 * n + i) for n, s in enumerate(SYNSETS) for i in range(PER_CLASS)}
    return {**files, **{f"n02105855/n02105855_{kind}.JPEG": data for kind, (data, _) in odd_jpegs().items()}}


def validation() -> dict[str, bytes]:
    return {f"ILSVRC2012_val_{i:08d}.JPEG": png(500 + i) for i in range(1, len(VALIDATION) + 1)}


def devkit_files() -> dict[str, bytes]:
    truth = "".join(f"{ILSVRC_IDS[SYNSETS[label]]}\n" for label in VALIDATION)
    names = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height"]
    rows = [(number, synset, "tench, Tinca", "a fish", 0, np.zeros(1), 0) for synset, number in ILSVRC_IDS.items()]
    rows.append((5, "n00001740", "entity", "all", 2, np.array([1, 2]), 3))  # an inner node: no class
    synsets = np.array(rows, dtype=[(name, "O") for name in names]).reshape(-1, 1)
    mat = io.BytesIO()
    savemat(mat, {"synsets": synsets})
    return {"data/ILSVRC2012_validation_ground_truth.txt": truth.encode(), "data/meta.mat": mat.getvalue()}


def write(root: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def lay_out(root: Path, train: str, val: str, devkit: str) -> Path:
    root.mkdir(exist_ok=True)
    if train == "folders":
        write(root / "train", training())
    elif train == "tar":
        inner = {
            s: tar_bytes([(n.partition("/")[2], d) for n, d in training().items() if n.startswith(s)]) for s in SYNSETS
        }
        shuffled = [(f"{s}.tar", inner[s]) for s in reversed(SYNSETS)]
        (root / "ILSVRC2012_img_train.tar").write_bytes(tar_bytes(shuffled))
    if val == "flat":
        write(root / "val", validation())
    elif val == "tar":
        (root / "ILSVRC2012_img_val.tar").write_bytes(tar_bytes(reversed(validation().items())))
    elif val == "class folders":
        labelled = zip(validation().items(), VALIDATION, strict=True)
        write(root / "val", {f"{SYNSETS[label]}/{name}": data for (name, data), label in labelled})
    if devkit == "folder":
        write(root / "ILSVRC2012_devkit_t12", devkit_files())
    elif devkit == "archive":
        tar = tar_bytes([(f"ILSVRC2012_devkit_t12/{name}", data) for name, data in devkit_files().items()])
        (root / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(gzip.compress(tar))
    return root


def check(source: object) -> None:
    """Names, counts, labels and bytes of both pools."""
    assert source.classes == SYNSETS  # type: ignore[attr-defined]
    for pool, files, labels in (
        ("train", training(), {n: SYNSETS.index(n.partition("/")[0]) for n in training()}),
        ("test", validation(), dict(zip(validation(), VALIDATION, strict=True))),
    ):
        items = source.items(pool)  # type: ignore[attr-defined]
        assert [(item.id, item.label) for item in items] == sorted(labels.items())
        assert {item.id: source.read(item.id) for item in items} == files  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("train", "val", "devkit"),
    [
        ("folders", "flat", "folder"),
        ("folders", "flat", "archive"),
        ("folders", "class folders", "none"),
        ("tar", "tar", "archive"),
        ("tar", "flat", "archive"),
        ("tar", "class folders", "none"),
    ],
)
def test_layouts_agree(train: str, val: str, devkit: str, tmp_path: Path) -> None:
    source = listed("imagenet", lay_out(tmp_path / "i", train, val, devkit))
    assert source.name == "imagenet"
    check(source)
    check(source)  # and from the cached index


def test_parts_given_one_by_one(tmp_path: Path) -> None:
    root = lay_out(tmp_path / "i", "tar", "tar", "archive")
    check(listed("imagenet", *root.iterdir()))
    lay_out(tmp_path / "i", "folders", "none", "none")
    assert "is there, too" in refusal(lambda: listed("imagenet", root))
    for one in (root / "train", root / "ILSVRC2012_img_train.tar"):
        check(listed("imagenet", one, root))


def test_one_pool_alone(tmp_path: Path) -> None:
    train = listed("imagenet", lay_out(tmp_path / "t", "tar", "none", "none"))
    assert len(train.items("train")) == len(training())
    assert train.items("test") == []
    val = listed("imagenet", lay_out(tmp_path / "v", "none", "tar", "folder"))
    assert (val.classes, val.items("train")) == (SYNSETS, [])
    assert [item.label for item in val.items("test")] == VALIDATION
    val = listed("imagenet", lay_out(tmp_path / "c", "none", "class folders", "none"))
    assert (val.classes, [item.label for item in val.items("test")]) == (SYNSETS, VALIDATION)


def test_files_of_classes(tmp_path: Path) -> None:
    root = lay_out(tmp_path / "i", "folders", "flat", "none")
    assert "--option truth=FILE" in refusal(lambda: listed("imagenet", root).items("test"))
    truth = tmp_path / "truth.txt"
    names = sorted(validation())

    def labels(text: str, **options: str) -> list[int | None]:
        truth.write_text(text)
        return [item.label for item in listed("imagenet", root, truth=str(truth), **options).items("test")]

    from_one, from_zero = ("".join(f"{label + first}\n" for label in VALIDATION) for first in (1, 0))
    assert labels(from_one, order="synset") == labels(from_zero, order="synset") == VALIDATION
    assert labels("".join(f"{SYNSETS[label]}\n" for label in VALIDATION)) == VALIDATION
    pairs = [f"val/{name} {label}\n" for name, label in zip(names, VALIDATION, strict=True)]
    assert labels("".join(reversed(pairs)), order="synset") == VALIDATION
    ilsvrc = devkit_files()["data/ILSVRC2012_validation_ground_truth.txt"].decode()
    assert "meta.mat: no such file" in refusal(lambda: labels(ilsvrc, order="ilsvrc"))
    (tmp_path / "meta.mat").write_bytes(devkit_files()["data/meta.mat"])
    assert labels(ilsvrc, order="ilsvrc") == VALIDATION
    # The two orders are told apart by what the user says, never guessed.
    assert labels(ilsvrc, order="synset") != VALIDATION
    assert "of which order is not said" in refusal(lambda: labels(ilsvrc))
    assert "5 lines for 6" in refusal(lambda: labels(from_one[2:], order="synset"))
    assert "not those of the 4 synsets" in refusal(lambda: labels("1\n" * 6, order="synset"))
    assert "not those of the 4 synsets" in refusal(lambda: labels(from_one.replace("4", "7"), order="synset"))
    assert "ILSVRC id 5 is not in" in refusal(lambda: labels(ilsvrc.replace("4", "5"), order="ilsvrc"))
    assert "neither numbers nor synsets" in refusal(lambda: labels("cat\n" * 6, order="synset"))
    assert "not one class a line" in refusal(lambda: labels("1 2 3\n" * 6, order="synset"))
    assert "no line for" in refusal(lambda: labels("".join([*pairs[1:], "x.JPEG 1\n"]), order="synset"))
    assert "none of the 4 classes" in refusal(lambda: labels("n09999999\n" * 6))
    assert "choose ilsvrc or synset" in refusal(lambda: labels(ilsvrc, order="sorted"))


def test_other_forms_of_the_classes(tmp_path: Path) -> None:
    root = lay_out(tmp_path / "i", "folders", "flat", "none")
    names = sorted(validation())

    def labels(file: str, content: bytes, **options: str) -> list[int | None]:
        (tmp_path / file).write_bytes(content)
        source = listed("imagenet", root, truth=str(tmp_path / file), **options)
        return [item.label for item in source.items("test")]

    rows = [
        f"{name[:-5]},{SYNSETS[label]} 1 2 3 4 {SYNSETS[0]} 5 6 7 8\r\n"
        for name, label in zip(names, VALIDATION, strict=True)
    ]
    kaggle = "".join(["\ufeffImageId,PredictionString\r\n", *reversed(rows)]).encode()
    for file in ("LOC_val_solution.csv", "csv.txt", "no_suffix"):
        assert labels(file, kaggle) == VALIDATION
    assert labels("no_title.csv", kaggle.partition(b"\r\n")[2]) == VALIDATION
    named = "".join(row.replace(",", " ").partition(" 1 ")[0] + "\n" for row in reversed(rows))
    assert labels("names.txt", named.encode()) == VALIDATION
    pairs = [row.partition(" 1 ")[0].split(",") for row in rows]
    for begin, line in (
        ("name\tclass\n", "{}\t{}\n"),
        ("name;class\n", "{};{};\n"),
        ("", '"{}","{}"\n'),
        ("a b\n", "{} {}\n"),
    ):
        assert labels("form", (begin + "".join(line.format(*pair) for pair in reversed(pairs))).encode()) == VALIDATION
    assert labels("title", "".join(["class\n", *(f"{pair[1]}\n" for pair in pairs)]).encode()) == VALIDATION
    assert "UTF-16 maybe: write one class a line" in refusal(lambda: labels("16", named.encode("utf-16")))
    assert "or write one class a line" in refusal(lambda: labels("none", b"x"))
    assert "5 lines for 6" in refusal(lambda: labels("short.csv", kaggle.rpartition(b"ILSVRC")[0]))
    plain = "".join(f"{SYNSETS[label]}\r\n" for label in VALIDATION)
    assert labels("bom", ("\ufeff" + plain).encode()) == VALIDATION
    tar = tar_bytes([(f"ILSVRC2012_devkit_t12/{name}", data) for name, data in devkit_files().items()])
    for file, content in (("kit", tar), ("kit.txt", gzip.compress(tar)), ("kit.tgz", gzip.compress(tar))):
        assert labels(file, content) == VALIDATION
    assert "neither numbers nor synsets" in refusal(lambda: labels("x.gz", b"cat\n" * 6))


def test_links_and_folders_around(tmp_path: Path) -> None:
    """train as a link to a folder of another name, and the validation tar packed with its folder."""
    store = lay_out(tmp_path / "store", "folders", "none", "folder")
    (store / "train").rename(store / "imagenet_training")
    root = tmp_path / "i"
    root.mkdir()
    (root / "train").symlink_to(store / "imagenet_training")
    packed = [("./val/._x.JPEG", b""), *((f"./val/{name}", data) for name, data in validation().items())]
    (root / "ILSVRC2012_img_val.tar").write_bytes(tar_bytes(packed))
    devkit = store / "ILSVRC2012_devkit_t12"
    check(listed("imagenet", root, devkit))
    check(listed("imagenet", root / "train", root, devkit))
    (root / "train/n01440764/n01440764_99.JPEG").symlink_to("nowhere")
    source = listed("imagenet", root, devkit)
    assert len(source.items("train")) == len(training()) + 1
    with pytest.raises(OSError, match="No such file"):
        source.read("n01440764/n01440764_99.JPEG")


def test_damaged_devkits(tmp_path: Path) -> None:
    root = lay_out(tmp_path / "i", "folders", "flat", "folder")
    assert "leave out --option order" in refusal(lambda: listed("imagenet", root, order="synset").items("test"))
    data = root / "ILSVRC2012_devkit_t12/data"
    whole = (data / "meta.mat").read_bytes()
    for bad in (whole[: len(whole) // 2], b"", b"MATLAB 5.0" + bytes(500)):
        (data / "meta.mat").write_bytes(bad)
        assert "no readable meta.mat" in refusal(lambda: listed("imagenet", root).items("test"))
    (data / "ILSVRC2012_validation_ground_truth.txt").unlink()
    assert "holds no ILSVRC2012_validation" in refusal(lambda: listed("imagenet", root).items("test"))


def test_odd_files_come_through(tmp_path: Path) -> None:
    for layout in ("folders", "tar"):
        source = listed("imagenet", lay_out(tmp_path / layout, layout, "none", "none"))
        for kind, (_, photo) in odd_jpegs().items():
            found = evaluation(None, crop=False).pixels(source.read(f"n02105855/n02105855_{kind}.JPEG"), "", 0)
            difference = np.abs(found.astype(int) - photo)
            assert found.shape == photo.shape
            assert difference.mean() < 3, kind
            assert difference.max() < 30, kind
        assert np.array_equal(decoded(source.read("n01440764/n01440764_0.JPEG")), decoded(png(0)))


def test_the_index_follows_the_tar(tmp_path: Path) -> None:
    """Another tar in its place has another index; a damaged index is made again."""
    import os

    from data_prep.files.tar_index import tar_index

    root = lay_out(tmp_path / "i", "tar", "none", "none")
    cache = Path(os.environ["XDG_CACHE_HOME"]) / "igpt-ds"
    before = set(cache.glob("tar-1-*"))
    assert len(listed("imagenet", root).items("train")) == len(training())
    (made,) = set(cache.glob("tar-1-*")) - before
    made.write_bytes(made.read_bytes()[:200])
    tar_index.cache_clear()
    assert len(listed("imagenet", root).items("train")) == len(training())
    inner = tar_bytes([("n01440764_9.JPEG", b"x")])
    (root / "ILSVRC2012_img_train.tar").write_bytes(tar_bytes([("n01440764.tar", inner)]))
    tar_index.cache_clear()
    (item,) = listed("imagenet", root).items("train")
    assert listed("imagenet", root).read(item.id) == b"x"
    with pytest.raises(FileNotFoundError):
        listed("imagenet", root).read("n01440764/n01440764_8.JPEG")


def test_faults(tmp_path: Path) -> None:
    assert "no such file or folder" in refusal(lambda: listed("imagenet", tmp_path / "none"))
    (tmp_path / "e").mkdir()
    assert "no ImageNet" in refusal(lambda: listed("imagenet", tmp_path / "e"))
    root = lay_out(tmp_path / "v", "none", "flat", "none")
    assert "which classes there are is not known" in refusal(lambda: listed("imagenet", root))
    write(root / "val", {"n01440764/x.JPEG": b"x"})
    assert "images such as" in refusal(lambda: listed("imagenet", root))
    root = lay_out(tmp_path / "c", "none", "class folders", "none")
    shutil.copy(root / "val/n01484850/ILSVRC2012_val_00000001.JPEG", root / "val/n01440764")
    assert "remove one" in refusal(lambda: listed("imagenet", root))
    root = lay_out(tmp_path / "f", "folders", "none", "none")
    (root / "train/lost+found").mkdir()
    assert "no class folder" in refusal(lambda: listed("imagenet", root))


def test_faults_of_the_training_tar(tmp_path: Path) -> None:
    root = lay_out(tmp_path / "i", "tar", "none", "none")
    tar = root / "ILSVRC2012_img_train.tar"
    whole = tar.read_bytes()
    first = tar_bytes([("n01440764_1.JPEG", b"x")])
    cases = [
        (whole[: len(whole) // 2], "cut short"),
        (tar_bytes([("n01440764_1.JPEG", b"x")]), "not the training images' tar"),
        (tar_bytes([(link("n01440764.tar", "/etc/passwd"), b"")]), "a symbolic link"),
        (tar_bytes([("n01440764.tar", tar_bytes([(link("1.JPEG", "/etc/passwd"), b"")]))]), "a symbolic link"),
        (tar_bytes([("n01440764.tar", first[:700])]), "n01440764.tar: "),
        (tar_bytes([("n01440764.tar", first), ("n01440764.tar", first)]), "twice"),
    ]
    for i, (data, told) in enumerate(cases):
        other = tmp_path / str(i)
        other.mkdir()
        (other / tar.name).write_bytes(data)
        assert told in refusal(lambda other=other: listed("imagenet", other).items("train"))

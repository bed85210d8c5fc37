"""webdataset and img2dataset: names, labels and bytes whatever the members' order, and what is left out, by reason."""

import hashlib
import json
import pickle
import random
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from data_prep.cli import cli
from data_prep.files import patterns, remote
from data_prep.shards.job import begin
from data_prep.shards.plan import Settings, belongs
from data_prep.sources import UnusableError, recorded
from data_prep.sources._opt_out import opted_out
from igpt_ds.dataset.palette import Palette
from tests.helpers.places import build_here
from tests.helpers.source_fixtures import (
    decoded,
    everything,
    link,
    png,
    random_pixels,
    reason,
    refusal,
    streamed,
    tar_bytes,
)


def write(path: Path, members: list[tuple[str | tarfile.TarInfo, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(members))


def test_tars_of_images(tmp_path: Path) -> None:
    write(
        tmp_path / "w/b.tar", [("deep/2.PNG", png(2)), ("readme.txt", b"-"), (".hidden.png", b"-"), ("3.png", png(3))]
    )
    write(tmp_path / "w/a.tar", [("1.png", png(1)), ("1.json", b"{}"), ("1.cls", b"7")])
    write(tmp_path / "w/c.tar", [])
    source = streamed("webdataset", tmp_path / "w")
    assert (source.name, source.classes) == ("webdataset", None)
    assert source.parts("train") == ["a.tar", "b.tar", "c.tar"]
    assert source.parts("test") == []
    found = everything(source)
    assert [tuple(each.item) for each in found] == [
        ("a.tar/1.png", None),
        ("b.tar/deep/2.PNG", None),
        ("b.tar/3.png", None),
    ]
    for each, seed in zip(found, (1, 2, 3), strict=True):
        assert np.array_equal(decoded(each.data), random_pixels(seed))
    as_test = streamed("webdataset", tmp_path / "w/{a,b}.tar", pool="test")
    assert (as_test.parts("train"), as_test.parts("test")) == ([], ["a.tar", "b.tar"])
    assert everything(as_test, "test") == found


def test_stock_webdataset_finds_the_same_samples(tmp_path: Path) -> None:
    wds = pytest.importorskip("webdataset")
    with wds.TarWriter(str(tmp_path / "0.tar")) as writer:
        for i in range(5):
            writer.write({"__key__": f"dir/{i:04d}", "png": png(i), "cls": i % 3})
    (tmp_path / "names").write_text("x\ny\nz\n")
    ours = everything(streamed("webdataset", tmp_path, classes=str(tmp_path / "names")))
    theirs = list(wds.WebDataset(str(tmp_path / "0.tar"), shardshuffle=False))
    assert [each.item.id for each in ours] == [f"0.tar/{sample['__key__']}.png" for sample in theirs]
    assert [each.data for each in ours] == [sample["png"] for sample in theirs]
    assert [each.item.label for each in ours] == [int(sample["cls"]) for sample in theirs]


def test_labels_in_any_order(tmp_path: Path) -> None:
    (tmp_path / "names").write_text("cat\ndog\ncow\n")
    members = [(f"s/{i:02d}.png", png(i)) for i in range(9)] + [(f"s/{i:02d}.cls", b"%d\n" % (i % 3)) for i in range(9)]
    members += [("two.left.png", png(20)), ("two.right.png", png(21)), ("two.cls", b"1")]
    for seed in range(4):
        random.Random(seed).shuffle(members)
        write(tmp_path / f"{seed}.tar", [*members])
        source = streamed("webdataset", tmp_path / f"{seed}.tar", classes=str(tmp_path / "names"))
        assert source.classes == ["cat", "dog", "cow"]
        labels = {each.item.id.partition("/")[2]: each.item.label for each in everything(source)}
        expected = {f"s/{i:02d}.png": i % 3 for i in range(9)} | {"two.left.png": 1, "two.right.png": 1}
        assert labels == expected
        order = [name for name, _ in members if str(name).endswith(".png")]
        assert list(labels) == order


def test_what_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "names").write_text("cat\ndog\n")
    bad = ["", "2", "-1", "cat", "1.0", "1" * 63, "\xb2", "0 1"]
    members: list[tuple[str | tarfile.TarInfo, bytes]] = [("good.png", png(0)), ("good.cls", b" 1 ")]
    for i, text in enumerate(bad):
        members += [(f"bad{i}.png", png(i)), (f"bad{i}.cls", text.encode("latin1"))]
    members += [("alone.png", png(1)), ("good.png", png(2)), (link("link.png", "/etc/passwd"), b""), ("link.cls", b"0")]
    members += [
        ("both.png", png(3)),
        ("both.cls", b"0"),
        ("both.cls", b"1"),
        ("x" * 3000 + ".png", b""),
        ("\n.png", b""),
    ]
    write(tmp_path / "0.tar", members)
    labelled = everything(streamed("webdataset", tmp_path, classes=str(tmp_path / "names")))
    reasons = [reason(each) for each in labelled]
    assert reasons == [
        None,
        *["no valid class"] * (len(bad) + 1),
        "twice in the archive",
        "not a regular file",
        *["no valid class"] * 3,
    ]
    assert {each.item.label for each, why in zip(labelled, reasons, strict=True) if why == "no valid class"} == {None}
    unlabelled = everything(streamed("webdataset", tmp_path))
    assert [why for why in map(reason, unlabelled) if why] == ["twice in the archive", "not a regular file"]
    kept = [each.item.id for each in unlabelled if not reason(each)]
    assert len(set(kept)) == len(kept) == len(unlabelled) - 2
    assert all(len(name) < 300 and name.isprintable() for name in kept)


def test_pools_by_the_names_of_tars(tmp_path: Path) -> None:
    names = ["imagenet1k-train-0000.tar", "imagenet1k-train-0001.tar", "imagenet1k-validation-00.tar"]
    for seed, name in enumerate(names):
        write(tmp_path / "w" / name, [("1.png", png(seed))])
    source = streamed("webdataset", tmp_path / "w")
    assert (source.parts("train"), source.parts("test")) == (names[:2], names[2:])
    given = streamed("webdataset", tmp_path / "w", pool="train")
    assert (given.parts("train"), given.parts("test")) == (names, [])
    write(tmp_path / "w/more.tar", [])
    for pool in ("train", "test"):
        assert "more.tar: its name tells no split" in refusal(
            lambda pool=pool: streamed("webdataset", tmp_path / "w").parts(pool)
        )


def test_the_pool_does_not_depend_on_how_a_folder_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, pool in (("a/test", "test"), ("a/test/shards", "test"), ("a/val2017", "test"), ("a/my_train", "train")):
        for i in range(2):
            write(tmp_path / folder / f"{i}.tar", [("1.png", png(i))])
        link = tmp_path / f"{len(folder)}_evl"
        link.symlink_to(tmp_path / folder)
        monkeypatch.chdir(tmp_path / folder)
        spelled = (".", "*.tar", "{0..1}.tar", "./", "./[01].tar", tmp_path / folder, f"{tmp_path / folder}/.", link)
        for given in spelled:
            source = streamed("webdataset", given)
            other = "test" if pool == "train" else "train"
            assert (source.parts(pool), source.parts(other)) == (["0.tar", "1.tar"], []), given  # type: ignore[arg-type]
            assert streamed("webdataset", given, pool="train").parts("train") == ["0.tar", "1.tar"]
        assert streamed("webdataset", "0.tar", "1.tar").parts(pool) == ["0.tar", "1.tar"]  # type: ignore[arg-type]
        assert streamed("webdataset", f"pipe:cat {tmp_path / folder}/0.tar | cat", allow_pipe="true").parts("test") == (
            ["0.tar"] if pool == "test" else []
        )
    (tmp_path / "b").mkdir()
    (tmp_path / "b/0.tar").symlink_to(tmp_path / "a/test/0.tar")
    assert streamed("webdataset", tmp_path / "b").parts("test") == ["0.tar"]
    (tmp_path / "eval").symlink_to(tmp_path / "c")
    write(tmp_path / "c/0.tar", [])
    assert streamed("webdataset", tmp_path / "eval").parts("test") == ["0.tar"]
    (tmp_path / "train").symlink_to(tmp_path / "a/test")
    assert "is called train and leads to test" in refusal(
        lambda: streamed("webdataset", tmp_path / "train").parts("train")
    )
    for folder in ("test_run", "dev/data", "c"):
        write(tmp_path / folder / "0.tar", [])
        assert streamed("webdataset", tmp_path / folder).parts("train") == ["0.tar"], folder


def test_the_images_of_a_sample_lie_in_one_split(tmp_path: Path) -> None:
    members = [(f"s/{i:04d}.{kind}", png(i)) for i in range(40) for kind in ("jpg", "thumb.jpg", "seg.png")]
    alone = [(f"alone/{i}.png", png(i)) for i in range(40)]
    random.Random(0).shuffle(members)
    write(tmp_path / "0.tar", [*members, *alone])
    found = everything(streamed("webdataset", tmp_path))
    held_out = belongs("val", 0.3)
    samples: dict[str, set[bool]] = {}
    for each in found:
        samples.setdefault(each.item.id.rpartition("/")[2].partition(".")[0], set()).add(
            held_out(each.sample or each.item.id)
        )
    assert [len(where) for where in samples.values()] == [1] * 80
    assert {True, False} == set().union(*samples.values())
    # Where a sample is one image its own name decides, as ever.
    assert all(each.sample in {None, each.item.id} for each in found if "alone" in each.item.id)


def test_a_sample_is_held_out_whatever_is_chosen_of_it(tmp_path: Path) -> None:
    kinds = ("jpg", "depth.png", "raw", "mask")
    write(tmp_path / "0.tar", [(f"s/{i}.{kind}", png(i)) for i in range(9) for kind in kinds])
    write(tmp_path / "1.tar", [(f"s/{i}.{kind}", png(i)) for i in range(9) for kind in ("raw", "mask")])

    def samples(**options: str) -> dict[str, set[str | None]]:
        found: dict[str, set[str | None]] = {}
        for each in everything(streamed("webdataset", tmp_path, **options)):
            found.setdefault(each.item.id.partition(".tar")[0] + each.item.id.partition("s/")[2][0], set()).add(
                each.sample
            )
        return found

    every = samples(image="jpg;depth.png;raw;mask")
    assert {len(each) for each in every.values()} == {1}
    for chosen in ("jpg", "depth.png;jpg", "depth.png", "raw", "raw;mask"):
        assert samples(image=chosen).items() <= every.items()
    assert samples().items() <= every.items()


def test_names_of_one_place_are_one(tmp_path: Path) -> None:
    names = [
        "a/1.jpg",
        "./a/1.thumb.jpg",
        "./2.jpg",
        "2.jpg",
        "a//3.jpg",
        "a/3.jpg",
        "/4.jpg",
        "b/../4.jpg",
        ".//5.jpg",
    ]
    labels: list[tuple[str | tarfile.TarInfo, bytes]] = [(f"{i}.cls", b"1") for i in ("./a/1", "2", "./a/3", "4", "5")]
    write(tmp_path / "0.tar", [*labels, *((name, png(i)) for i, name in enumerate(names))])
    (tmp_path / "names").write_text("cat\ndog\n")
    found = everything(streamed("webdataset", tmp_path, classes=str(tmp_path / "names")))
    assert [each.item.id for each in found] == [f"0.tar/{name}" for name in names], "ids are names as they are written"
    twice = "twice in the archive"
    assert [reason(each) for each in found] == [None, None, None, twice, None, twice, None, twice, None]
    assert {each.item.label for each in found if not reason(each)} == {1}
    assert found[0].sample == found[1].sample
    shard(tmp_path / "w", 0, [*sample("1", 1), *((f"./{name}", data) for name, data in sample("1", 2))])
    assert [reason(each) for each in everything(streamed("img2dataset", tmp_path / "w"))] == [None, twice]


def test_a_choice_of_members(tmp_path: Path) -> None:
    names = ["a/1.jpg", "a/1.seg.png", "a/1.depth.png", "a.b/2.JPG", "3.png", "4.tiff", ".h/5.jpg", "__MACOSX/6.jpg"]
    write(tmp_path / "0.tar", [(f"./{name}", png(1)) for name in names])

    def ids(**options: str) -> list[str]:
        return [
            each.item.id.removeprefix("0.tar/./") for each in everything(streamed("webdataset", tmp_path, **options))
        ]

    assert ids() == names[:6]
    assert ids(image="jpg") == ["a/1.jpg", "a.b/2.JPG"]
    assert ids(image="jpg;.png") == ["a/1.jpg", "a.b/2.JPG", "3.png"]
    assert ids(image="seg.png") == ["a/1.seg.png"]
    assert "an empty name" in refusal(lambda: ids(image="jpg;"))
    palette = Palette(np.zeros((2, 3), np.float32))
    settings = Settings(8, 0, 1, crop=False, seed=0, rows_per_shard=9, augment=False)
    for options, told in (
        ({"image": "webp"}, "mend --option image=webp, or the path"),
        ({}, f"in {tmp_path}/e/1.tar: mend"),
    ):
        write(tmp_path / "e/1.tar", [("1.txt", b"")])
        job = begin(
            streamed("webdataset", tmp_path / "e", **options), tmp_path / "out", palette, settings, options=options
        )
        assert told in refusal(lambda job=job: build_here(job))


def test_numbers_of_classes(tmp_path: Path) -> None:
    (tmp_path / "names").write_bytes(b"\xef\xbb\xbfairplane\r\nbird\r\n")
    write(tmp_path / "0.tar", [("1.png", png(1)), ("1.CLS", b"1"), ("2.png", png(2)), ("2.cls", b"0" * 64 + b"1")])
    source = streamed("webdataset", tmp_path, classes=str(tmp_path / "names"))
    assert source.classes == ["airplane", "bird"]
    found = everything(source)
    assert [(each.item.label, reason(each)) for each in found] == [(1, None), (None, "no valid class")]


def test_a_file_of_classes_is_the_same_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(
        tmp_path / "w/0.tar",
        [(f"{i}.{kind}", png(i) if kind == "png" else b"1") for i in range(4) for kind in ("png", "cls")],
    )
    (tmp_path / "cls.txt").write_text("a\nb\n")
    Palette(np.random.default_rng(0).uniform(-1, 1, (8, 3)).astype(np.float32)).save(tmp_path / "p.npy")
    monkeypatch.chdir(tmp_path)

    def build(classes: object) -> str:
        command = [
            "shards",
            "webdataset",
            "w",
            "--palette",
            "p.npy",
            "--no-crop",
            "--resolution",
            "8",
            "--holdout",
            "0",
        ]
        result = CliRunner().invoke(cli, [*command, "--out", "out", "--option", f"classes={classes}"])
        assert result.exit_code == 0, result.output
        return result.output

    assert "4 images (2 classes)" in build("cls.txt")
    assert "complete already" in build(tmp_path / "cls.txt")
    assert recorded("imagenet", {"truth": "val.txt", "order": "synset"}) == {"order": "synset"}


def test_damaged_tars_stop_before_their_first_image(tmp_path: Path) -> None:
    write(tmp_path / "0.tar", [(f"{i}.png", png(i)) for i in range(20)])
    data = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(data[:-11_000])
    source = streamed("webdataset", tmp_path)
    assert "cut short" in refusal(lambda: next(iter(source.stream("0.tar"))))
    for name in ("0.tar.gz", "0.tgz"):
        (tmp_path / name).write_bytes(b"")
        assert "unpack it" in refusal(lambda name=name: streamed("webdataset", tmp_path / name))
    assert "1.tar: no such file" in refusal(lambda: streamed("webdataset", tmp_path / "{0..1}.tar").parts("train"))
    assert "choose train or test" in refusal(lambda: streamed("webdataset", tmp_path, pool="val"))


def test_why_an_image_is_rejected_survives_the_way_from_a_worker() -> None:
    error = pickle.loads(pickle.dumps(UnusableError("opted out", "noai=1")))
    assert (error.reason, error.detail, str(error)) == ("opted out", "noai=1", "opted out (noai=1)")
    assert isinstance(error, OSError)


def test_pipes(tmp_path: Path) -> None:
    write(tmp_path / "0.tar", [("1.png", png(1))])
    pipe = f"pipe:cat {tmp_path}/0.tar"
    assert "allow_pipe=true" in refusal(lambda: streamed("webdataset", pipe))
    assert "neither true nor false" in refusal(lambda: streamed("webdataset", pipe, allow_pipe="yes"))
    (found,) = everything(streamed("webdataset", pipe, allow_pipe="true"))
    assert tuple(found.item) == ("0.tar/1.png", None)
    assert found.data == png(1)


# --- img2dataset


def sample(key: str, seed: int, suffix: str = "jpg", **metadata: object) -> list[tuple[str, bytes]]:
    """A sample as img2dataset writes it."""
    described = {"url": f"http://h/{key}", "key": key, "status": "success", "error_message": None, **metadata}
    text = json.dumps(described, indent=4).encode()
    return [(f"{key}.{suffix}", png(seed)), (f"{key}.json", text), (f"{key}.txt", b"a caption")]


def shard(root: Path, number: int, members: list, successes: int | None = None, stats: bool = True) -> None:
    write(root / f"{number:05d}.tar", members)
    images = sum(not str(getattr(name, "name", name)).endswith((".json", ".txt")) for name, _ in members)
    if stats:
        written = {
            "count": images + 3,
            "successes": images if successes is None else successes,
            "failed_to_download": 3,
        }
        (root / f"{number:05d}_stats.json").write_text(json.dumps(written, indent=4))
    (root / f"{number:05d}.parquet").write_bytes(b"not read")


HASH = "0123456789abcdef" * 4


def test_shards_of_img2dataset(tmp_path: Path) -> None:
    tmp_path = tmp_path / "around" / "in"  # what other tests leave beside it is no part of this one
    shard(tmp_path, 7, sample("000070001", 3, "webp", sha256=HASH))
    shard(tmp_path, 0, sample("000000000", 1) + sample("000000004", 2, "png", sha256="nonsense"))
    shard(tmp_path, 3, sample("000030000", 4), stats=False)
    shard(tmp_path, 5, [])
    source = streamed("img2dataset", tmp_path)
    assert (source.name, source.classes) == ("img2dataset", None)
    assert source.parts("train") == ["00000", "00005", "00007"]
    assert source.parts("test") == []
    found = everything(source)
    marks = [hashlib.sha256(png(seed)).hexdigest()[:16] for seed in (1, 2)]
    ids = [f"00000/000000000-{marks[0]}", f"00000/000000004-{marks[1]}", f"00007/000070001-{HASH[:16]}"]
    assert [tuple(each.item) for each in found] == [(i, None) for i in ids]
    for each, seed in zip(found, (1, 2, 3), strict=True):
        assert np.array_equal(decoded(each.data), random_pixels(seed))
    (tmp_path / "more").symlink_to(tmp_path.parent / "web/val2017")
    for name in ("val2017", "my_test"):
        shard(tmp_path.parent / "web" / name, 0, [])
        assert "not to be trained on" in refusal(
            lambda: streamed("img2dataset", tmp_path.parent / "web").parts("train")
        )
        if name == "val2017":
            assert "in a folder more" in refusal(lambda: streamed("img2dataset", tmp_path).parts("train"))
        shutil.rmtree(tmp_path.parent / "web")
    (tmp_path / "more").unlink()
    for name in ("val", "Test"):
        shard(tmp_path.parent / "web" / name, 0, [])
        assert "not to be trained on" in refusal(
            lambda: streamed("img2dataset", tmp_path.parent / "web").parts("train")
        )
        assert streamed("img2dataset", tmp_path.parent / "web" / name).parts("train") == ["00000"]
        shutil.rmtree(tmp_path.parent / "web")
    pattern = streamed("img2dataset", tmp_path / "{00000..00009}.tar")
    assert pattern.parts("train") == source.parts("train")
    assert everything(pattern) == found
    around = streamed("img2dataset", tmp_path.parent)
    assert around.parts("train") == [f"{tmp_path.name}/{name}" for name in ("00000", "00005", "00007")]


def test_members_in_any_order(tmp_path: Path) -> None:
    members = [m for i in range(6) for m in sample(f"{i:09d}", i, opt_out=i == 4)]
    for seed in range(4):
        random.Random(seed).shuffle(members)
        shard(tmp_path / str(seed), 0, members)
        found = everything(streamed("img2dataset", tmp_path / str(seed)))
        order = [name[:9] for name, _ in members if name.endswith("jpg")]
        assert [each.item.id[6:15] for each in found] == order
        assert {each.item.id[6:15]: reason(each) for each in found if reason(each)} == {"000000004": "opted out"}


def test_what_img2dataset_rejects(tmp_path: Path) -> None:
    members = sample("1", 1) + sample("2", 2, noai="1")
    members += sample("3", 3)[:1]
    members += [("4.jpg", png(4)), ("4.json", b"{"), ("5.jpg", png(5)), ("5.json", b"[]")]
    members += [("6.jpg", png(6)), ("6.json", b'{"a":' * 100_000), *sample("1", 9)]
    members += [(link("7.jpg", "/etc/passwd"), b""), ("7.json", b"{}")]
    members += sample("8", 8, price=float("nan"))  # a table's empty field
    shard(tmp_path, 0, members)
    found = everything(streamed("img2dataset", tmp_path))
    expected = [None, "opted out", *["no metadata"] * 4, "twice in the archive", "not a regular file", None]
    assert [reason(each) for each in found] == expected
    assert "noai=1" in str(found[1].data)


def test_shards_that_do_not_count(tmp_path: Path) -> None:
    shard(tmp_path, 0, sample("0", 0), stats=False)
    assert "no tar with its _stats.json" in refusal(lambda: streamed("img2dataset", tmp_path).parts("train"))
    shard(tmp_path, 0, sample("0", 0), successes=2)
    source = streamed("img2dataset", tmp_path)
    assert "holds 1 images, its _stats.json says 2" in refusal(lambda: next(iter(source.stream("00000"))))
    for text in ("", "{", "[]", "{}", '{"successes": "1"}', '{"successes": true}', '{"successes":' * 100_000):
        (tmp_path / "00000_stats.json").write_text(text)
        assert "not the statistics" in refusal(lambda: next(iter(source.stream("00000"))))
    shard(tmp_path, 0, sample("0", 0))
    tar = tmp_path / "00000.tar"
    tar.write_bytes(tar.read_bytes()[:600])
    assert "cut short" in refusal(lambda: next(iter(source.stream("00000"))))
    assert "webdataset" in refusal(lambda: streamed("img2dataset", "pipe:cat 0.tar"))


OUT = [
    {"opt_out": True},
    {"OPTED_OUT": 1},
    {"optout": "yes"},
    {"noai": "true"},
    {"NoImageAI": 1.0},
    {"tdm-reservation": "1"},
    {"noindex": True},
    {"x-robots-tag": "noai"},
    {"X-Robots-Tag": "otherbot: noimageai, nofollow"},
    {"robots": ["all", "NOML"]},
    {"headers": {"X-Robots-Tag": "noindex"}},
    {"page": {"tdm_reservation": 1}},
]
IN = [
    {},
    {"opt_out": False},
    {"opt_out": None},
    {"opt_out": "false"},
    {"opt_out": float("nan")},
    {"noai": "0"},
    {"tdm_reservation": 0},
    {"x-robots-tag": ""},
    {"x-robots-tag": None},
    {"robots": "all, max-image-preview:large"},
    {"caption": "noai"},
    {"url": "http://h/noai.jpg?opt_out=1"},
    {"headers": {"content-type": "image/jpeg"}},
]


@pytest.mark.parametrize("metadata", OUT, ids=str)
def test_opt_out_flags(metadata: dict[str, object]) -> None:
    field = opted_out({"url": "u", **metadata})
    assert field is not None
    assert "=" in field


def test_fields_nested_as_deep_as_json_may_be() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    assert opted_out({"robots": deep, "x-robots-tag": [deep]}) is None
    assert opted_out({"noai": deep}) == "noai=..."


@pytest.mark.parametrize("metadata", IN, ids=str)
def test_no_opt_out(metadata: dict[str, object]) -> None:
    assert opted_out({"url": "u", **metadata}) is None


def test_remote_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec = pytest.importorskip("fsspec")
    shard(tmp_path / "web", 0, sample("000000000", 1))
    shard(tmp_path / "web", 2, sample("000020000", 2))
    shard(tmp_path / "web", 3, sample("000030000", 3), stats=False)
    monkeypatch.setattr(patterns, "PROTOCOLS", (*remote.PROTOCOLS, "memory"))
    store = fsspec.filesystem("memory")
    for path in (tmp_path / "web").iterdir():
        store.pipe(f"/bucket/web/{path.name}", path.read_bytes())
    try:
        local = everything(streamed("img2dataset", tmp_path / "web"))
        for given in ("memory://bucket/web", "memory://bucket/web/{00000..00003}.tar"):
            source = streamed("img2dataset", given)
            assert source.parts("train") == ["00000", "00002"]
            assert everything(source) == local
        tars = everything(streamed("webdataset", "memory://bucket/web"))
        assert [each.data for each in tars] == [png(1), png(2), png(3)]
    finally:
        store.rm("/bucket", recursive=True)

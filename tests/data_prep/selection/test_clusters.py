"""The steps of a selection on vectors that the test makes, against brute force."""

import tarfile
from pathlib import Path

import numpy as np
import pytest

from data_prep.files.npz import publish_arrays, read_arrays
from data_prep.images.pieces import pieces_of
from data_prep.images.rejects import Tally
from data_prep.selection import clusters, embed
from data_prep.selection.clusters import HitTask, Model, ScoreTask
from data_prep.selection.collections import Collection
from data_prep.selection.embed import Chunk, EmbedTask
from data_prep.selection.file import Selection
from data_prep.selection.job import Job, Settings
from data_prep.sources import Item, open_source
from data_prep.workers.run import Done, Here
from tests.helpers.selections import MeanColour, stages
from tests.helpers.streams import Folders


def chunk(path: Path, rng: np.random.Generator, rows: int, dimension: int = 12) -> tuple[Chunk, np.ndarray, np.ndarray]:
    """A chunk on disk, its vectors as they were before they were rounded, and its hashes."""
    vectors = rng.standard_normal((rows, dimension))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    hashes = rng.integers(0, 2**64, rows, dtype=np.uint64)
    publish_arrays(path, vectors=vectors.astype(np.float16), hash=hashes)
    return Chunk("part", path, rows), vectors, hashes


@pytest.fixture
def model(tmp_path: Path) -> Model:
    rng = np.random.default_rng(1)
    # Of quite different lengths: the largest product is not the nearest.
    centres = (rng.standard_normal((9, 12)) * rng.uniform(0.1, 2, (9, 1))).astype(np.float32)
    centroids = rng.standard_normal((5, 12))
    centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    return Model(centres, rng.random(9) < 0.5, centroids.astype(np.float32))


def nearest(vectors: np.ndarray, centres: np.ndarray) -> np.ndarray:
    return ((vectors[:, None] - centres[None]) ** 2).sum(-1).argmin(1)


def test_scores_are_those_of_brute_force(tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "_ROWS", 64)
    its, vectors, hashes = chunk(tmp_path / "c.npz", np.random.default_rng(0), 300)
    model.save(tmp_path / "model.npz")
    publish_arrays(tmp_path / "evaluation.npz", hashes=hashes[5:8] ^ np.uint64(0b111))
    task = ScoreTask(its, tmp_path / "scores.npz", tmp_path / "model.npz", tmp_path / "evaluation.npz", 3)
    clusters.score(task)
    outside, close, similarity = read_arrays(task.out, "outside", "close", "similarity")
    assert (outside == ~model.hit[nearest(vectors, model.centres)]).mean() > 0.99  # float16 moves one that is between
    assert np.flatnonzero(close).tolist() == [5, 6, 7]
    assert similarity.dtype == np.float32
    assert np.allclose(similarity, (vectors @ model.centroids.T).max(1), atol=1e-3)
    assert not np.signbit(similarity[similarity == 0]).any()
    before = task.out.stat().st_mtime_ns
    clusters.score(task)
    assert task.out.stat().st_mtime_ns == before


def test_without_evaluations_none_is_close(tmp_path: Path, model: Model) -> None:
    its, _, _ = chunk(tmp_path / "c.npz", np.random.default_rng(0), 20)
    model.save(tmp_path / "model.npz")
    clusters.score(ScoreTask(its, tmp_path / "scores.npz", tmp_path / "model.npz", None, 3))
    assert not read_arrays(tmp_path / "scores.npz", "close")[0].any()


def test_hits_count_the_nearest(tmp_path: Path, model: Model) -> None:
    its, vectors, _ = chunk(tmp_path / "c.npz", np.random.default_rng(2), 500)
    publish_arrays(tmp_path / "centres.npz", centres=model.centres)
    found = clusters.hits(HitTask(its, tmp_path / "centres.npz"))
    expected = np.bincount(nearest(vectors, model.centres), minlength=9)
    assert found.sum() == 500
    assert np.abs(found - expected).sum() <= 4


@pytest.mark.parametrize("number", [1, 7, 40, 100, 1000])
def test_a_sample_is_at_equal_steps(tmp_path: Path, number: int) -> None:
    rng = np.random.default_rng(3)
    made = [chunk(tmp_path / f"{i}.npz", rng, rows) for i, rows in enumerate((30, 1, 69))]
    every = np.concatenate([vectors for _, vectors, _ in made])
    starts = set()
    for seed in range(20):
        found = clusters.sample([its for its, _, _ in made], number, seed)
        assert len(found) == min(number, 100)
        assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
        places = (every @ found.T).argmax(0)
        assert (every @ found.T).max(0).min() > 0.999
        assert set(np.diff(places)) <= {100 // len(found), 100 // len(found) + 1}
        starts.add(int(places[0]))
    assert len(starts) > 5 or number >= 40


@pytest.mark.parametrize("library", ["scikit-learn", "faiss"])
def test_k_means_finds_what_lies_apart(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if library == "faiss":
        pytest.importorskip("faiss")
    monkeypatch.setattr(clusters, "library", lambda: library)
    rng = np.random.default_rng(4)
    truth = np.eye(6, dtype=np.float32) * 3
    points = (truth[rng.integers(0, 6, 600)] + rng.normal(0, 0.01, (600, 6))).astype(np.float32)
    found = clusters.k_means(points, 6, seed=1)
    assert found.dtype == np.float32
    assert np.allclose(found[np.argsort(-found.argmax(1))][::-1], truth, atol=0.02)
    assert (clusters.k_means(points, 6, seed=1) == found).all()
    directions = clusters.centroids(points, 6, seed=1)
    assert np.allclose(np.linalg.norm(directions, axis=1), 1, atol=1e-6)
    assert clusters.library_version().count(".") >= 1


def test_the_numbers_of_clusters() -> None:
    assert [clusters.clusters_for(n) for n in (1, 640, 10**8)] == [1, 10, 10_000]
    assert [clusters.centroids_for(n) for n in (1, 160, 1_281_167)] == [1, 10, 4096]


def test_a_piece_that_is_done_is_not_read_again(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Folders(photos)
    piece = pieces_of(source, "train", 9)[0]
    task = EmbedTask(tmp_path, source, piece, MeanColour())
    assert embed.embed(task) == Done(Tally(24))
    first = embed.committed(tmp_path, piece)
    assert first is not None
    ids, vectors, rows, thumbnails = first.chunks[0].read("ids", "vectors", "thumbnail_rows", "thumbnails")
    assert ids.tolist() == [f"china/{i:02d}.jpg".encode() for i in range(24)]
    assert vectors.dtype == np.float16
    assert np.allclose(np.linalg.norm(vectors.astype(float), axis=1), 1, atol=2e-3)
    assert rows.tolist() == list(range(24))
    assert thumbnails.shape == (24, 64, 64, 3)
    monkeypatch.setattr(embed, "stream", None)
    assert embed.embed(task) == Done(Tally(24), 24)
    first.chunks[0].path.unlink()
    with pytest.raises(TypeError):
        embed.embed(task)


def test_thumbnails_are_a_fixed_sample(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed, "_THUMBNAILS", 5)
    source = Folders(photos)
    piece = pieces_of(source, "train", 9)[0]
    embed.embed(EmbedTask(tmp_path, source, piece, MeanColour()))
    found = embed.committed(tmp_path, piece)
    assert found is not None
    its = found.chunks[0]
    digests, rows, thumbnails = its.read("sha256", "thumbnail_rows", "thumbnails")
    lowest = sorted(range(24), key=lambda row: digests[row].tobytes())[:5]
    assert rows.tolist() == sorted(lowest)
    assert len(thumbnails) == 5


def test_an_id_that_no_selection_can_hold_is_told() -> None:
    with pytest.raises(embed.UserError, match="ends in a null byte"):
        embed._id(Item("a\0", None).id)


def test_a_file_that_changed_is_read_again(photos: Path, tmp_path: Path) -> None:
    def pack(*numbers: int) -> None:
        with tarfile.open(tmp_path / "pool.tar", "w") as tar:
            for number in numbers:
                tar.add(photos / "china" / f"{number:02d}.jpg", f"{number}.jpg")

    def select() -> list[bytes]:
        pool, like = ("webdataset", tmp_path / "pool.tar"), ("image_folder", photos)
        collections = [Collection(open_source(name, [str(path)]), "train", str(path)) for name, path in (pool, like)]
        made = Job(collections[0], [collections[1]], [], MeanColour(), Settings(9, clusters=1), tmp_path / "work")
        assert made.run(tmp_path / "out.npz", Here(), stages)
        return sorted(Selection.open(tmp_path / "out.npz").kept("pool.tar"))

    pack(0, 1, 2, 3)
    assert select() == [f"pool.tar/{number}.jpg".encode() for number in range(4)]
    pack(1, 2, 3, 4)
    assert select() == [f"pool.tar/{number}.jpg".encode() for number in range(1, 5)]

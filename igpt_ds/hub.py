"""Models on Hugging Face's hub: `hf://user/repo`, or one of the paper's authors' by its bare name.

    openai/imagegpt-small   openai/imagegpt-medium   openai/imagegpt-large
    hf://user/repo          hf://user/repo@revision

What is asked for lies afterwards in the standard cache (HF_HOME), where it is found without a network. Only what
describes and holds the network is fetched: safetensors where there are any, else the older pickles, which are read
without being executed. HF_ENDPOINT names another server.
"""

import os
import re
from pathlib import Path

from igpt_ds.atomic import publish_text, sha256_file
from igpt_ds.errors import RunError, UserError

RELEASED = {f"openai/imagegpt-{size}" for size in ("small", "medium", "large")}
_NAMED = re.compile(r"hf:/{1,2}([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")  # a path has one / where two were written
_DESCRIPTION = {"config.json", "preprocessor_config.json"}
_ANSWER = 15.0  # seconds that a server may take to begin to answer
_DIGEST = re.compile(r"[0-9a-f]{64}")  # what the cache calls a large file by


def repository(path: Path | str) -> tuple[str, str | None] | None:
    """Name and revision of the repository that is meant; None: it is a path."""
    text = str(path)
    if found := _NAMED.fullmatch(text):
        return found[1], found[2]
    if text.startswith("hf:/"):
        raise UserError(f"{text}: is not of the form hf://user/repo or hf://user/repo@revision: mend it")
    return (text, None) if text in RELEASED and not os.path.lexists(text) else None


def local(path: Path, only: str | None = None) -> Path:
    """Where the model lies on this machine: downloaded, if it is the hub's and not there yet; any other path itself.

    Of a cache's folder (models--user--repo) its newest snapshot is meant.

    Args:
        only: a file that is enough; None: all that describes and holds the network.

    Raises:
        UserError: there is no such repository, or it holds no weights; or no network, and nothing in the cache.
        RunError: a file is not what the server said it would be.
    """
    if named := repository(path):
        return _downloaded(path, *named, only)
    return _cached(path) or path


def _cached(folder: Path, revision: str | None = None) -> Path | None:
    """The snapshot in a folder of the cache, if it is one and holds that revision."""
    note = folder / "refs" / (revision or "main")
    try:
        commit = note.read_text(encoding="ascii").strip() if note.is_file() else revision
        snapshot = folder / "snapshots" / (commit or "")
        return snapshot if commit and snapshot.is_dir() else None
    except OSError:  # a name that is too long for a file's
        return None


def _downloaded(path: Path, name: str, revision: str | None, only: str | None) -> Path:
    try:
        from huggingface_hub import HfApi, constants, snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ImportError:
        raise UserError(f'{path}: huggingface_hub is not installed: pip install "igpt-ds[hub]"') from None
    shown, endpoint = f"hf://{name}" + (f"@{revision}" if revision else ""), os.environ.get("HF_ENDPOINT")
    try:
        if os.environ.get("HF_HUB_OFFLINE") in ("1", "true", "True"):
            raise ConnectionError("HF_HUB_OFFLINE is set")
        info = HfApi(endpoint).model_info(name, revision=revision, timeout=_ANSWER)
        files = _wanted(shown, [each.rfilename for each in info.siblings or []], only)
        folder = snapshot_download(
            name, revision=info.sha, allow_patterns=files, etag_timeout=_ANSWER, endpoint=endpoint
        )
        if revision != info.sha:
            _remember(Path(folder), revision)
    except HFValidationError as error:
        raise UserError(f"{shown}: {str(error).splitlines()[0]}: mend the name") from None
    except HfHubHTTPError as error:
        why = str(error).splitlines()[0]
        raise UserError(f"{shown}: the hub refuses it ({why}): mend the name, or log in by hf auth login") from None
    except UserError:
        raise
    except Exception as error:  # no network: whatever the client's own library raises then
        cache = Path(constants.HF_HUB_CACHE, "models--" + name.replace("/", "--"))
        if (found := _cached(cache, revision)) is not None:
            return found
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{shown}: the hub does not answer ({why}), and it is not in the cache: mend the network, or name a folder"
        ) from None
    for file in files:
        _verify(Path(folder) / file, shown)
    return Path(folder)


def _wanted(shown: str, files: list[str], only: str | None) -> list[str]:
    """The description, and the weights in their best form; or one file."""
    if only:
        if only not in files:
            raise UserError(f"{shown}: holds no {only}: name another model, or a file")
        return [only]
    for form in ("model.safetensors", "pytorch_model.bin"):
        stem, _, ending = form.rpartition(".")
        part = re.compile(rf"{stem}(-\d{{5}}-of-\d{{5}})?\.{ending}|{re.escape(form)}\.index\.json")
        if found := [file for file in files if part.fullmatch(file)]:
            return sorted({*found, *_DESCRIPTION & set(files)})
    raise UserError(f"{shown}: holds neither model.safetensors nor pytorch_model.bin: it is no model of transformers")


def _remember(folder: Path, revision: str | None) -> None:
    """Let what was asked for by a branch be found without a network: the hub's client notes commits alone then."""
    note = folder.parent.parent / "refs" / (revision or "main")
    note.parent.mkdir(parents=True, exist_ok=True)
    publish_text(note, folder.name)


def _verify(file: Path, shown: str) -> None:
    """Hold a large file against its hash, by which the cache calls it."""
    blob = file.resolve()
    if _DIGEST.fullmatch(blob.name) and sha256_file(blob) != blob.name:
        blob.unlink()
        raise RunError(f"{shown}: {file.name} arrived damaged and is removed: try again")

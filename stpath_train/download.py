"""Public data sets from the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from stpath_runtime.errors import DownloadError, OptionError, first_line
from stpath_runtime.files import require_writable
from stpath_runtime.machine import network_setting_at_fault
from stpath_runtime.slides.vocabulary import nearest_names

HUB = "https://huggingface.co"


@dataclass(frozen=True)
class DataSet:
    """A data set of the Hub, and its files that `stpath features` and `stpath data prepare` read."""

    repo: str
    tables: tuple[str, ...]  # patterns of files of the whole set
    slides: tuple[str, ...]  # patterns of a slide's files, its id at {}
    access: str = "open to all"


DATA_SETS = {
    "hest": DataSet(
        "MahmoodLab/hest",
        tables=("HEST_v*.csv",),
        slides=("st/{}.h5ad", "patches/{}.h5"),
        access="after you accept its terms on its page",
    ),
    "hest-bench": DataSet(
        "MahmoodLab/hest-bench",
        tables=("*/splits/*.csv", "*/var_50genes.json"),
        slides=("*/adata/{}.h5ad", "*/patches/{}.h5"),
    ),
    "stimage": DataSet(
        "jiawennnn/STimage-1K4M",
        tables=("meta/*",),
        slides=("*/gene_exp/{}_count.csv", "*/coord/{}_coord.csv", "annotation/{}_anno.csv"),
    ),
}


def download(name: str, out: str | Path, *, slides: Sequence[str] = (), patterns: Sequence[str] = ()) -> Path:
    """Download a data set, or a part of it, into a folder; files that are there already are not fetched again.

    Parameters
    ----------
    name
        Of `DATA_SETS`.
    slides
        Ids of the slides to fetch; none for all.
    patterns
        Files to fetch instead of those that the other commands read, such as "wsis/TENX99.tif".

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    InputError
        If the set is unknown, access to it is not granted, the Hub cannot be reached, or no file is as asked.
    """
    from huggingface_hub import snapshot_download

    out = Path(out)
    if name not in DATA_SETS:
        raise DownloadError(f"unknown data set {name!r}{nearest_names(name, DATA_SETS)}; known: {', '.join(DATA_SETS)}")
    if slides and patterns:
        raise OptionError("--slides and --pattern both say which files to fetch; give one of them")
    asked = [slide for slide in slides if any(sign in slide for sign in "*?[/")]
    if asked:
        raise OptionError(f"--slides: {asked[0]!r} is not a slide's id; give patterns of files with --pattern")
    data_set = DATA_SETS[name]
    require_writable(out)
    of_slides = {slide: [pattern.format(slide) for pattern in data_set.slides] for slide in slides or ["*"]}
    wanted = list(patterns) or [*data_set.tables, *(file for files in of_slides.values() for file in files)]
    with hub_errors(data_set.repo, f"{HUB}/datasets/{data_set.repo}"):
        snapshot_download(data_set.repo, repo_type="dataset", local_dir=out, allow_patterns=wanted)
    found = [path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()]
    for what, files in ({"--pattern": list(patterns)} if patterns else of_slides).items():
        if not any(fnmatch(path, file) for path in found for file in files):
            raise DownloadError(
                f"{data_set.repo} has no file {' or '.join(files)} ({what}); see {HUB}/datasets/{data_set.repo}"
            )
    return out


@contextmanager
def hub_errors(repo: str, page: str) -> Iterator[None]:
    """Say in one line what to do where the Hub does not give what was asked of it.

    Raises
    ------
    InputError
        Instead of any error of the Hub or of the connection to it.
    """
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise DownloadError(
            f"{repo}: access is not granted; accept its terms on {page}, then run: hf auth login"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise DownloadError(
            f"{repo}: not found, or not to be seen without a login; see {page}, then run: hf auth login"
        ) from error
    except errors.LocalTokenNotFoundError as error:
        raise DownloadError(f"{repo}: no login; accept the terms on {page}, then run: hf auth login") from error
    except errors.HfHubHTTPError as error:
        raise DownloadError(f"{repo}: the Hub refused ({first_line(error)}); see {page}") from error
    except Exception as error:  # of the connection, or of what it is set up with
        unreachable = (errors.LocalEntryNotFoundError, errors.HTTPError, ConnectionError, TimeoutError)  # type: ignore[attr-defined]
        setting = network_setting_at_fault(error)
        if setting is None and not isinstance(error, unreachable):
            raise
        fix = (
            setting
            or "check the connection, HF_ENDPOINT and HF_HUB_OFFLINE, and run again: it continues where it stopped"
        )
        raise DownloadError(f"{repo}: the Hub cannot be reached and the files are not in the cache; {fix}") from error

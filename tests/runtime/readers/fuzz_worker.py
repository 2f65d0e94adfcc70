"""Reads mutated files, a line before and after each, so that its parent can tell which one it died of.

    python fuzz_worker.py ORIGINALS SCRATCH FIRST STEP LAST

reads the cases FIRST, FIRST + STEP, ... below LAST. A case is all in its number: the kind of file, the mutations and
their places; the first of each kind is not mutated. To repeat one:
`python fuzz_worker.py ORIGINALS SCRATCH 123 1 124`, with the originals of `test_fuzz.write_originals`.
"""

from __future__ import annotations

import faulthandler
import json
import random
import resource
import shutil
import sys
import time
import traceback
import warnings
import zipfile
from contextlib import suppress
from pathlib import Path

import h5py
import numpy as np
from readers_helpers import BARCODES, COORDS, FEATURES, HDF5_FAULTS

from stpath_runtime import InputError, InputWarning, Slide, read_slide
from stpath_runtime.machine import memory_of_process
from stpath_runtime.manifest import Manifest
from stpath_runtime.readers import read_context
from stpath_runtime.results.reading import open_prediction
from stpath_runtime.slides.vocabulary import GeneVocabulary

GIB = 2**30
ADDRESS_SPACE = 8 * GIB  # stops what runs away; what is judged is the memory that was used
NASTY = (
    *(None, True, 0, -1, 1, 7, 2**31, 2**40, 2**63, 10**30, 0.5, float("nan"), float("inf"), "", "pickle", "|O", "<f4"),
    *("string", "float64", "x" * 1000, "\n", "\x00", "../..", "None", "bytes", "vlen-utf8", "array", "dataframe"),
    *("csr_matrix", "categorical", "anndata", "_index", [], {}, [0], [2**40], [-1, 8], [5, 2**33], [[1, 2], [3]]),
    {"a": {}},
)
NOT_OF_HDF5 = (None, 10**30, "\x00", {}, {"a": {}}, [[1, 2], [3]])

SLIDE = Slide(COORDS, FEATURES, BARCODES)  # of which the context is
GENES = GeneVocabulary([f"ENSG{i}" for i in range(8)], [str(i) for i in range(8)], [()] * 8)


def mutate_bytes(rng: random.Random, raw: bytes) -> bytes:
    """Cut, flip, overwrite, insert or repeat a piece."""
    if not raw:
        return rng.randbytes(8)
    data, at, length = bytearray(raw), rng.randrange(len(raw)), rng.choice((1, 2, 4, 8, 64))
    match rng.choice(("cut", "flip", "flip", "flip", "overwrite", "fill", "insert", "repeat")):
        case "cut":
            del data[at:]
        case "flip":
            for _ in range(rng.choice((1, 1, 2, 8, 64))):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case "overwrite":
            data[at : at + length] = rng.randbytes(length)
        case "fill":
            data[at : at + length] = rng.choice((b"\x00", b"\xff", b"\x7f")) * length
        case "insert":
            data[at:at] = rng.randbytes(length)
        case "repeat":
            data[at:at] = data[at : at + length]
    return bytes(data)


def mutate_json(rng: random.Random, raw: bytes) -> bytes:
    """Replace, take out or double one value, however deep."""
    try:
        found = json.loads(raw)
    except ValueError:  # mutated before
        return mutate_bytes(rng, raw)
    node, places = found, []
    while isinstance(node, dict | list) and node:
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        places.append((node, key))
        node = node[key]
    if not places:
        return raw
    node, key = rng.choice(places)
    match rng.choice(("replace", "replace", "replace", "take out", "double")):
        case "replace":
            node[key] = rng.choice(NASTY)
        case "take out":
            del node[key]
        case "double":
            node[key] = [node[key], node[key]]
    return json.dumps(found).encode()


def mutate_hdf5(rng: random.Random, path: Path) -> None:
    """Put another element, or another attribute, in the place of one."""
    with h5py.File(path, "a") as file:
        keys: list[str] = []
        file.visit(keys.append)
        key = rng.choice(keys)
        group, name = file[key].parent, key.rpartition("/")[2]
        match rng.choice(("fault", "type", "attribute", "attribute", "attribute", "take out", "swap")):
            case "fault":
                del group[name]
                HDF5_FAULTS[rng.choice(sorted(HDF5_FAULTS))](group, name)
            case "type":
                attributes = dict(group[name].attrs)
                del group[name]
                values = [np.float16(1.5), b"text", True, -1, np.nan, 1e308, np.uint8(3), 2**62, 1j, np.longdouble(2)]
                shape = rng.choice([(), (0,), (5,), (5, 2), (5, 8), (1, 5, 8), (8, 5), (3,)])
                group[name] = np.full(shape, rng.choice(values))
                group[name].attrs.update(attributes if rng.random() < 0.5 else {})
            case "attribute":
                attributes = file[key].attrs if rng.random() < 0.8 else file.attrs
                value = rng.choice(NASTY)
                value = (
                    value if isinstance(value, str | int | float | bool) and value not in (10**30, "\x00") else [7, 8]
                )
                attributes[rng.choice([*attributes, "patch_size", "encoding-type"])] = value
            case "take out":
                del group[name]
            case "swap":
                other = file[rng.choice(keys)]
                del group[name]
                group[name] = other


def mutate_store(rng: random.Random, folder: Path) -> None:
    """Mutate a file of a zarr folder: mostly its metadata, as a value or as bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    metadata = [path for path in files if path.suffix == ".json" or path.name.startswith(".z")]
    match rng.choice(("metadata", "metadata", "metadata", "bytes", "bytes", "take out", "link", "swap")):
        case "metadata":
            path = rng.choice(metadata)
            path.write_bytes(mutate_json(rng, path.read_bytes()))
        case "bytes":
            path = rng.choice(files)
            path.write_bytes(mutate_bytes(rng, path.read_bytes()))
        case "take out":
            rng.choice(files).unlink()
        case "link":
            path = rng.choice(files)
            path.unlink()
            path.symlink_to(rng.choice(["/etc/hostname", "/", "/dev/zero", ".", path.name, "nowhere", files[0]]))
        case "swap":
            rng.choice(files).write_bytes(rng.choice(files).read_bytes())


def mutate_archive(rng: random.Random, path: Path) -> None:
    """Mutate an archive, or add a bomb or an entry that leaves it."""
    choice = rng.choice(("bytes", "bytes", "bomb", "name", "entry", "entry"))
    if choice == "bytes":
        path.write_bytes(mutate_bytes(rng, path.read_bytes()))
        return
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(sorted(entries))
    if choice == "bomb":
        entries[rng.choice([name, "X/c/7/7", "zarr.json", ".zattrs"])] = bytes(rng.choice((80, 120)) * 2**20)
    elif choice == "name":
        entries[rng.choice(["../x", "/x", "a\\..\\x", "X/../../x", "./x", "X//x", "\n"])] = entries[name]
    elif name.endswith((".json", ".zarray", ".zattrs")) and rng.random() < 0.5:
        entries[name] = mutate_json(rng, entries[name])
    else:
        entries[name] = mutate_bytes(rng, entries[name])
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if choice == "bomb" else zipfile.ZIP_STORED) as archive:
        for entry, content in entries.items():
            archive.writestr(entry, content)


def mutate(rng: random.Random, original: Path, folder: Path) -> Path:
    """A mutated copy of an original."""
    path = folder / original.name
    if original.is_dir():
        shutil.copytree(original, path, symlinks=True)
        for _ in range(rng.choice((1, 1, 1, 2))):
            mutate_store(rng, path)
        return path
    shutil.copy(original, path)
    if path.suffix in (".h5", ".h5ad") and rng.random() < 0.5:
        mutate_hdf5(rng, path)
        if rng.random() < 0.3:
            with suppress(Exception):  # what the first left may not be there to be mutated
                mutate_hdf5(rng, path)
    elif path.suffix == ".json" and rng.random() < 0.7:
        path.write_bytes(mutate_json(rng, path.read_bytes()))
    elif path.suffix == ".zip":
        mutate_archive(rng, path)
    else:
        path.write_bytes(mutate_bytes(rng, path.read_bytes()))
    return path


def read(path: Path, rng: random.Random, mutated: bool) -> None:
    """Read a file as its name asks, and check that what is read can be."""
    if path.name.startswith("context"):
        rows = read_context(path).resolve(SLIDE, GENES)
        assert rows.log_counts.shape == (len(rows.spots), len(rows.tokens))
    elif path.name.startswith("prediction"):
        with open_prediction(path) as (adata, x):
            adata.X = x[:]
        assert isinstance(adata.uns["stpath"], dict)
        assert len(adata.obsm["spatial"]) == adata.n_obs > 0
    elif path.name == "engine.json":
        Manifest.read(path.parent)
    elif path.name.startswith("genes"):
        vocabulary = GeneVocabulary.read(path)
        assert len(vocabulary.symbols) == len(vocabulary) > 0
    else:
        key = rng.choice([None, None, None, "uni", "embeddings"]) if mutated else None
        slide = read_slide(path, features_key=key)
        spots = len(slide)
        assert slide.coords.shape == (spots, 2)
        assert slide.features.shape[0] == len(slide.obs_names) == spots > 0
        assert np.isfinite(slide.normalized_coords()).all()
        assert np.isfinite(slide.features).all()
        assert slide.patch is None or slide.patch.microns > 0


def run(case: int, original: Path, scratch: Path, mutated: bool) -> str:
    """Mutate and read; returns what came of it."""
    rng = random.Random(case)
    folder = scratch / str(case)
    folder.mkdir()
    try:
        path = mutate(rng, original, folder) if mutated else original
        read(path, rng, mutated)
    except InputError as error:
        line = str(error)
        if "\n" in line or len(line) > 2000:
            return f"fault: not one line: {line!r:.300}"
        return f"refused: {line}"
    except Exception:
        return f"fault: {' | '.join(traceback.format_exc().strip().splitlines()[-8:])}"
    finally:
        shutil.rmtree(folder)
    return "read"


def report(*fields: object) -> None:
    """One line, at once: the next file may be the last."""
    sys.stdout.write("\t".join(map(str, fields)) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Run the cases that the command line asks for."""
    originals, scratch = Path(sys.argv[1]), Path(sys.argv[2])
    first, step, last = map(int, sys.argv[3:])
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    warnings.simplefilter("ignore")
    warnings.simplefilter("ignore", InputWarning)
    kinds = sorted(originals.iterdir())
    for case in range(first, last, step):
        original = kinds[(case + case // len(kinds)) % len(kinds)]  # each worker meets every kind
        report("begin", case, original.name)
        start = time.monotonic()
        outcome = run(case, original, scratch, mutated=case >= len(kinds))
        report("end", case, f"{time.monotonic() - start:.3f}", memory_of_process(), outcome)


if __name__ == "__main__":
    main()

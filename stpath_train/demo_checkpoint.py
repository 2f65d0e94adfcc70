"""Train the checkpoint that `stpath demo` shows, on a simulated cohort: `make demo-checkpoint`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from stpath_runtime.progress import progress_bar
from stpath_runtime.slides.sample import load_sample
from stpath_runtime.slides.slide import Slide

from .cohort import NOTE, World, simulate_slide, simulate_tissue
from .store import Record, Store, highly_variable, measured

Features = npt.NDArray[np.float32]
SEED, SLIDES, HELD_OUT = 0, 80, 1_000_000  # HELD_OUT: the seed of the slide that no training sees
VALIDATION = tuple(f"simulated_{i}" for i in range(76, 80))
CHECKPOINT = "demo_checkpoint.safetensors"
PACKAGED = Path(__file__).parent / "data" / CHECKPOINT  # what the package carries
# Trained, and then with a tenth of the learning rate: fine-tuning is a run that begins with a checkpoint.
CONFIGS = {
    "train.yaml": """\
# The demo's checkpoint: a small model on a simulated cohort of 80 slides, 500 genes.
data: {store: cohort, validation: [simulated_76, simulated_77, simulated_78, simulated_79], workers: 1}
model: {d_model: 128, n_heads: 4, n_layers: 2, d_mlp: 256}
optimizer: {learning_rate: 1e-3, warmup_steps: 100}
run: {out: train, epochs: 80, accelerator: cpu}
""",
    "tune.yaml": """\
data: {store: cohort, validation: [simulated_76, simulated_77, simulated_78, simulated_79], workers: 1}
model: {checkpoint: train/model.safetensors}
optimizer: {learning_rate: 1e-4}
run: {out: tune, epochs: 15, accelerator: cpu, seed: 1}
""",
}


def simulate_cohort(
    world: World, slides: int | None = None
) -> Iterator[tuple[str, npt.NDArray[np.int64], Features, npt.NDArray[np.int64]]]:
    """Name, coordinates [N, 2], features [N, F] and counts [N, G] of each slide; the last are for validation."""
    for i in range(slides or SLIDES):
        rng = np.random.default_rng([SEED, i])
        coords, fractions = simulate_tissue(rng)
        yield f"simulated_{i:02}", coords, *simulate_slide(world, coords, fractions, rng)


def held_out_slide(world: World) -> tuple[Slide, npt.NDArray[np.int64]]:
    """The slide that the demo predicts: real layout and fractions, simulated features and counts [N, G]."""
    sample = load_sample()
    features, counts = simulate_slide(world, sample.coords, sample.fractions, np.random.default_rng([SEED, HELD_OUT]))
    return Slide(sample.coords, features, sample.barcodes, "Breast", "Visium", "held-out slide"), counts


def make_store(path: Path, slides: int | None = None) -> Store:
    """Write the simulated cohort, or so many slides of it, as a training store."""
    world = World.create(SEED)
    store = Store.create(path, world.vocabulary)
    with progress_bar("simulate a cohort") as on_slide:
        for name, coords, features, counts in simulate_cohort(world, slides):
            adata = measured(counts, world.vocabulary.symbols, world.vocabulary, name)
            adata.obsm["spatial"], adata.obsm["features"] = coords, features
            adata.var["highly_variable"] = highly_variable(adata, 200, adata.X.log1p())
            store.add(Record(name, "Breast", "Visium", "Homo sapiens", source=NOTE), adata)
            if on_slide:
                on_slide(len(store.records), slides or SLIDES)
    return store


def main(out: Path) -> None:
    """Simulate the cohort, train, and write the checkpoint in float16."""
    from .checkpoint import load_checkpoint, save_checkpoint
    from .config import read_config
    from .training import train

    out.mkdir(parents=True, exist_ok=True)
    if not (out / "cohort").exists():
        make_store(out / "cohort")
    for name, config in CONFIGS.items():
        (out / name).write_text(config)
        trained = train(read_config(out / name))
    save_checkpoint(load_checkpoint(trained).half(), out / CHECKPOINT)
    print(out / CHECKPOINT)  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""The demo's checkpoint can be made anew, on a smaller cohort."""

from __future__ import annotations

from stpath_train import demo_checkpoint
from stpath_train.checkpoint import load_checkpoint
from stpath_train.cohort import World
from stpath_train.store import Store


def test_the_checkpoint_is_trained_and_tuned_on_the_cohort(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_checkpoint, "SLIDES", 3)
    small = {
        name: config.replace("simulated_76, simulated_77, simulated_78, simulated_79", "simulated_02")
        .replace("epochs: 80", "epochs: 1")
        .replace("epochs: 15", "epochs: 1")
        for name, config in demo_checkpoint.CONFIGS.items()
    }
    monkeypatch.setattr(demo_checkpoint, "CONFIGS", small)
    demo_checkpoint.main(tmp_path)
    made, packaged = load_checkpoint(tmp_path / demo_checkpoint.CHECKPOINT), load_checkpoint(demo_checkpoint.PACKAGED)
    assert made.config == packaged.config
    assert (tmp_path / demo_checkpoint.CHECKPOINT).stat().st_size == demo_checkpoint.PACKAGED.stat().st_size
    records = Store.open(tmp_path / "cohort").records
    assert len(records) == 3
    assert all("simulated" in record.source for record in records.values())


def test_the_held_out_slide_is_repeated_and_of_no_training_patient():
    world = World.create(demo_checkpoint.SEED)
    slide, counts = demo_checkpoint.held_out_slide(world)
    assert counts.shape == (3798, 500)
    again, same = demo_checkpoint.held_out_slide(world)
    assert (counts == same).all()
    assert (slide.features == again.features).all()
    _, _, _, of_training = next(demo_checkpoint.simulate_cohort(world))
    assert abs(of_training.mean(axis=0) - counts.mean(axis=0)).max() > 1

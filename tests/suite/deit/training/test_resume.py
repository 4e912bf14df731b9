"""What a run may change when it is given again: every rule of the table, and what they protect."""

import hashlib
import json
import shutil
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path

import numpy as np
import pytest
import standing
import torch
import training
from training import same

from deit import fused_vit
from deit.commands.cli import main
from deit.data.sampling import Plan
from deit.fused_vit.calls import calls_of
from deit.kernels.engine import device_key, native, verdicts
from deit.training import assemble, resume
from deit.training.learner import Learner
from deit.training.resume import FACTS, RULES
from deit.training.runs import RunFolder
from deit.training.trainer import Trainer, train

pytestmark = pytest.mark.usefixtures("one_thread")


def names_of(options, prefix=""):
    for field in fields(options):
        value = getattr(options, field.name)
        if is_dataclass(value):
            yield from names_of(value, f"{field.name}.")
        else:
            yield prefix + field.name


def about(tmp_path, **facts):
    options = training.options(tmp_path / "data", tmp_path / "out")
    made = {"classes": ["a", "b"], "mean": [0.5] * 3, "std": [0.2] * 3, "images": 48}
    made |= {"held_out_images": 24, "images_digest": "0", "options": asdict(options), **facts}
    return json.loads(json.dumps(made, default=str))


def test_every_option_has_a_rule(tmp_path):
    assert set(names_of(training.options(tmp_path, tmp_path))) == set(RULES)
    assert set(RULES.values()) | set(FACTS.values()) == {"refused", "said", "allowed"}


@pytest.mark.parametrize("name", [*RULES, *FACTS])
def test_the_rule_of_each_option_is_kept(name, tmp_path):
    before, now = about(tmp_path), about(tmp_path)
    *groups, last = name.split(".")
    place = now["options"] if name in RULES else now
    for group in groups:
        place = place[group]
    place[last] = ["other"] if last != "ema" else 0.5
    said = []
    found = resume.changes(before, now)
    assert [change.name for change in found] == [name]
    if (rule := (RULES | FACTS)[name]) == "refused":
        with pytest.raises(ValueError, match=rf"out: .*out holds a run with {last} .*; got other"):
            resume.check(found, tmp_path / "out", said.append)
        assert not said
        return
    resume.check(found, tmp_path / "out", said.append)
    words = last if last != "images_digest" else "other images or labels"
    assert len(said) == (rule == "said")
    assert all(f"going on with {words}" in line and "it was" in line for line in said)


def test_nothing_is_a_change_to_itself_nor_what_an_older_version_did_not_keep(tmp_path):
    now = about(tmp_path)
    assert resume.changes(now, now) == []
    older = json.loads(json.dumps(now))
    del older["images"], older["options"]["fuse"], older["options"]["recipe"]["crop"]
    assert resume.changes(older, now) == []
    for damaged in ({}, {"options": []}, {"options": {"recipe": 3}}):
        with pytest.raises(ValueError, match=r"run.json: options.*: expected an object"):
            resume.changes(damaged, now)


@pytest.mark.parametrize("before", [None, 0.5])
def test_an_average_is_neither_begun_nor_given_up(before, tmp_path):
    was, now = about(tmp_path), about(tmp_path)
    was["options"]["recipe"]["ema"], now["options"]["recipe"]["ema"] = before, None
    now["options"]["recipe"]["ema"] = 0.9 if before is None else None
    with pytest.raises(ValueError, match="holds a run with ema"):
        resume.check(resume.changes(was, now), tmp_path, print)


@pytest.mark.parametrize(
    ("position", "old", "new", "expected"),
    [
        (6, Plan(48, 16), Plan(48, 8), 12),
        (6, Plan(48, 8), Plan(48, 16), 3),
        (7, Plan(48, 8), Plan(48, 16), 3),  # half an update is made once more
        (5, Plan(50, 16), Plan(50, 15), 5),
        (4, Plan(100, 10), Plan(100, 10, pieces=5), 4),
        (29, Plan(100, 10), Plan(100, 30), 9),  # 90 samples of an epoch are three updates of 30
        (5, Plan(8, 16), Plan(8, 4), 10),
    ],
)
def test_an_epoch_goes_on_at_the_same_share_of_it(position, old, new, expected):
    assert resume.position(resume.place(old, position), new) == expected


# ---- whole runs


def small(data, out, **changes):
    """Two updates an epoch, of 24 images; no average, nothing mixed."""
    plain = {"recipe_ema": None, "recipe_mixup": 0.0, "recipe_cutmix": 0.0, "recipe_repeats": 1}
    plain |= {"recipe_batch_size": 24, "recipe_epochs": 2, "recipe_warmup_epochs": 0.0}
    return training.options(data, out, **plain | changes)


@pytest.fixture(scope="module")
def made(data, tmp_path_factory):
    """A finished run of four updates."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("made") / "run"
    train(small(data, out))
    torch.set_num_threads(threads)
    return out


@pytest.fixture
def run(made, tmp_path):
    """Its copy. The options name the original's data."""
    return Path(shutil.copytree(made, tmp_path / "run"))


@pytest.fixture
def steps(monkeypatch):
    """Every update's number in its plan, and its epoch."""
    found, step = [], Trainer.step

    def watched(self, parts, pace):
        found.append((self.update, parts[0].draws[0].epoch))
        return step(self, parts, pace)

    monkeypatch.setattr(Trainer, "step", watched)
    return found


def snapshot(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


REFUSED = [
    {"train_only": "classifier"},
    {"recipe_optimizer": "lamb"},
    {"recipe_layer_scale": 1e-4},
    {"recipe_ema": 0.9},
    {"seed": 3},
    {"limit_train": 24},
    {"weights": "RUN"},
    {"img_size": 32},
    {"recipe_epochs": 1},
    {"track": ("excel",)},
]


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: next(iter(change)))
@pytest.mark.parametrize("epochs", [2, 3])
def test_what_is_refused_leaves_the_run_as_it_was(change, epochs, run, data, steps):
    before = snapshot(run)
    change = {k: str(run) if v == "RUN" else v for k, v in change.items()}
    if "track" in change:
        epochs = 3  # a finished run has nothing to track
    with pytest.raises(
        ValueError, match=r"out: .* holds a run with|epochs: expected at|track: exp"
    ):
        train(small(data, run, **{"recipe_epochs": epochs, **change}))
    assert snapshot(run) == before
    assert not steps


SAID = [
    {"augment_on": "device"},
    {"fuse": False},
    {"limit_val": 9},
    {"max_unreadable": 0.5},
    {"dtype": "fp16"},
    {"accumulate": 2},
    {"recipe_loss": "bce"},
    {"recipe_betas": (0.5, 0.6)},
]


@pytest.mark.parametrize("change", SAID, ids=lambda change: next(iter(change)))
def test_what_is_said_is_taken(change, run, data, steps, capfd):
    train(small(data, run, recipe_epochs=3, **change))
    ((name, value),) = change.items()
    value = ", ".join(map(str, value)) if isinstance(value, tuple) else value
    assert (
        f"going on with {name.removeprefix('recipe_')} {value}; it was " in capfd.readouterr().err
    )
    assert steps == [(4, 2), (5, 2)]


def test_a_run_in_fp16_goes_on_in_fp32(data, tmp_path, steps):
    train(small(data, tmp_path, dtype="fp16", recipe_epochs=1))
    assert train(small(data, tmp_path, dtype="fp32"))["finished"]
    assert len(steps) == 4


def test_the_optimiser_goes_on_by_todays_settings(run, data, monkeypatch):
    seen, apply = [], Learner.apply

    def watched(self, made):
        seen.extend((g["betas"], g["eps"], g["weight_decay"]) for g in self.optimizer.param_groups)
        moments = next(iter(self.optimizer.state.values()))
        assert moments["exp_avg"].any()
        apply(self, made)

    monkeypatch.setattr(Learner, "apply", watched)
    changes = {"recipe_betas": (0.5, 0.6), "recipe_eps": 1e-3, "recipe_weight_decay": 0.7}
    train(small(data, run, recipe_epochs=3, **changes))
    assert sorted(set(seen)) == [((0.5, 0.6), 1e-3, 0.0), ((0.5, 0.6), 1e-3, 0.7)]


def test_another_batch_size_goes_on_in_the_same_epoch_and_counts_on(run, data, steps):
    for epochs, batch in ((4, 12), (5, 48)):
        train(small(data, run, recipe_epochs=epochs, recipe_batch_size=batch))
    assert steps == [*((n, n // 4) for n in range(8, 16)), (4, 4)]
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [e["update"] for e in log if "model" in e] == [2, 4, 8, 12, 13]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["00000012", "00000013"]


# ---- the data


def changed(data, tmp_path, how):
    """A copy of the data, changed; the run's options are made to name it."""
    other = Path(shutil.copytree(data, tmp_path / "data"))
    for split in ("train", "val"):
        if how == "renamed":
            (other / split / "red").rename(other / split / "amber")
        elif how == "a class more":
            shutil.copytree(other / split / "red", other / split / "amber")
    if how == "half gone":
        for path in (other / "train").glob("*/1*.png"):
            path.unlink()
    elif how == "others":
        for path in (other / "train").glob("*/1*.png"):
            path.rename(path.with_name("2" + path.name))
    return other


def given(out, data):
    """The run, as if it had been trained on `data`."""
    document = json.loads((out / "run.json").read_text())
    document["options"]["data"] = str(data)
    (out / "run.json").write_text(json.dumps(document))
    return out


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("renamed", "classes blue, green, red; got amber, blue, green"),
        ("a class more", "classes blue, green, red; got amber, blue, green, red"),
        ("half gone", "images 48; got 27"),
    ],
)
def test_other_data_is_refused_where_something_is_left_to_learn(how, message, run, data, tmp_path):
    other = changed(data, tmp_path, how)
    given(run, other)
    before = snapshot(run)
    with pytest.raises(ValueError, match=f"holds a run with {message}"):
        train(small(other, run, recipe_epochs=3))
    assert snapshot(run) == before


@pytest.mark.parametrize("how", ["renamed", "a class more", "half gone"])
def test_a_finished_run_stays_as_it_was_whatever_became_of_its_data(
    how, run, data, tmp_path, capfd, steps
):
    other = changed(data, tmp_path, how)
    given(run, other)
    before, first = snapshot(run), json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    result = train(small(other, run))
    assert result["finished"]
    assert (result["update"], result["model"]) == (4, first["model"])
    assert snapshot(run) == before
    assert not steps
    said = capfd.readouterr().err
    assert "is finished; nothing is left to do" in said
    assert ("images" if how == "half gone" else "classes") + " changed since" in said
    photo = str(data / "val" / "red" / "0.png")
    assert main(["predict", photo, "--weights", str(run), "--topk", "3"]) == 0
    assert "amber" not in capfd.readouterr().out


def test_other_images_in_the_same_number_are_said(run, data, tmp_path, capfd):
    other = changed(data, tmp_path, "others")
    train(small(other, given(run, other), recipe_epochs=3))
    assert "going on with other images or labels" in capfd.readouterr().err


# ---- what a crash leaves


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def killed_at(monkeypatch, update, before="save"):
    """The process dies before its checkpoint after `update`, or right after it."""
    save = RunFolder.save

    def dying(self, state):
        if state.update == update and before == "save":
            raise KeyboardInterrupt
        save(self, state)
        if state.update == update:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "save", dying)


def test_where_no_checkpoint_is_whole_the_new_ones_are_kept(made, run, data, monkeypatch, capfd):
    for path in (run / "checkpoints").iterdir():
        flip(path / "model.safetensors")
    with monkeypatch.context() as patch:
        killed_at(patch, 2, before="log")
        with pytest.raises(KeyboardInterrupt):
            train(small(data, run))
    assert "no checkpoint is whole: beginning again" in capfd.readouterr().err
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["00000002"]
    assert train(small(data, run))["finished"]
    assert "going on after update 2" in capfd.readouterr().err
    assert same(training.weights(made), training.weights(run)) == []


@pytest.mark.parametrize("track", [(), ("tensorboard",)], ids=["log", "tensorboard"])
@pytest.mark.parametrize("update", [1, 2, 3])
def test_updates_stand_once_in_the_log_after_a_death_before_a_checkpoint(
    update, track, data, tmp_path, monkeypatch
):
    broken = Path(shutil.copytree(data, tmp_path / "data"))
    for i in (3, 5, 7):
        (broken / "train" / "red" / f"{i}.png").write_bytes(b"no image")
    if track:
        pytest.importorskip("tensorboard", reason="needs the package tensorboard")
    options = small(
        broken,
        tmp_path / "run",
        recipe_batch_size=48,
        recipe_epochs=3,
        max_unreadable=0.1,
        track=track,
    )
    with monkeypatch.context() as patch:
        killed_at(patch, update)
        with pytest.raises(KeyboardInterrupt):
            train(options)
    with open(options.out / "log.jsonl", "a") as file:
        file.write('{"update": 4, "lo')
    train(options)
    entries = RunFolder(options.out).entries()
    assert [e["update"] for e in entries if "loss" in e] == [1, 2, 3]
    assert [e["update"] for e in entries if "model" in e] == [1, 2, 3]
    named = [e["unreadable"] for e in entries if "unreadable" in e]
    assert len(named) == len(set(named)) == 3
    if track:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(options.out / "tensorboard"))
        events.Reload()
        for name in ("loss", "model/loss"):
            assert [event.step for event in events.Scalars(name)] == [1, 2, 3]


def test_digests_tell_names_and_labels_apart(data):
    from deit.data.sources import open_source

    source = open_source(str(data), "train")
    first = resume.digest(source)
    assert first == resume.digest(open_source(str(data), "train"))
    source.labels = np.roll(source.labels, 1)
    assert resume.digest(source) != first


# ---- the measurements that a run computes by


@pytest.fixture
def measured(tmp_path):
    """A machine where whatever implementation is named was found to be the fastest."""

    def as_found(winner):
        standing.forget()
        network = assemble.network(small("", tmp_path), 3).train()
        fused_vit.fuse(network, measure="never")
        problems = [
            each
            for training_too in (True, False)
            for each in calls_of(network, (8, 3, 16, 16), torch.float32, training=training_too)
        ]
        key = device_key.device_key(standing.CPU)
        verdicts.store(key, [standing.found(each, winner) for each in problems])
        standing.forget()

    with standing.unknown_machine(tmp_path / "cache", "never"):
        yield as_found


@pytest.mark.skipif(bool(native.why_not("cpu")), reason="no C++ library")
def test_a_resumed_run_computes_by_the_measurements_it_began_with(
    measured, data, tmp_path, monkeypatch, capfd
):
    outs = [tmp_path / name for name in ("whole", "resumed", "other")]
    measured("cpu")
    train(small(data, outs[0]))
    with monkeypatch.context() as patch:
        killed_at(patch, 2, before="log")
        with pytest.raises(KeyboardInterrupt):
            train(small(data, outs[1]))
    kept = json.loads((outs[1] / "verdicts.json").read_text())
    assert {one["winner"] for one in kept["verdicts"]} == {"cpu"}
    measured("reference")
    train(small(data, outs[2]))
    assert train(small(data, outs[1]))["finished"]
    assert same(training.weights(outs[0]), training.weights(outs[1])) == []
    assert same(training.weights(outs[0]), training.weights(outs[2])) != []
    assert json.loads((outs[1] / "verdicts.json").read_text()) == kept
    here = verdicts.in_force(standing.CPU)  # the run's are its own affair
    assert {one.winner for one in here} == {"reference"}
    assert "chosen anew" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda kept: kept | {"device": "a Zen 9"}, "verdicts.json is of a Zen 9, this is Acme"),
        (lambda kept: kept | {"verdicts": 3}, "verdicts.json: verdicts: expected"),
        (lambda kept: [], "verdicts.json: expected"),
    ],
)
def test_measurements_that_are_not_this_machines_are_said(
    change, message, measured, data, tmp_path, monkeypatch, capfd
):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        killed_at(patch, 2, before="log")
        with pytest.raises(KeyboardInterrupt):
            train(small(data, out))
    path = out / "verdicts.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    assert train(small(data, out))["finished"]
    assert message in capfd.readouterr().err

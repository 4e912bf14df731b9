"""Which sample comes when."""

import itertools

import pytest

from deit.data.sampling import Batches, Plan


def drawn(plan, epochs=2, **options):
    return list(Batches(plan, epochs, **options))


def test_an_epoch_takes_every_image_once_without_repeats():
    plan = Plan(images=100, batch=10)
    first = [draw for batch in drawn(plan, 1) for draw in batch]
    assert sorted(draw.image for draw in first) == list(range(100))
    second = plan.epoch(1)
    assert [d.image for b in second for d in b] != [d.image for d in first]


def test_starting_late_gives_what_was_left():
    plan = Plan(images=50, batch=8, views=3, seed=4)
    whole = drawn(plan, 3)
    for start in (1, 6, 7, 17):
        assert drawn(plan, 3, start=start) == whole[start:]
    assert len(Batches(plan, 3, start=5)) == len(whole) - 5


def test_seeds_and_epochs_differ_and_repeat():
    assert drawn(Plan(40, 8, seed=1)) == drawn(Plan(40, 8, seed=1))
    assert drawn(Plan(40, 8, seed=1)) != drawn(Plan(40, 8, seed=2))


# The official sampler floors to multiples of 256, and trains on nothing below that.
@pytest.mark.parametrize("images", [1, 5, 100, 255, 256, 1000])
def test_small_data_sets_are_not_dropped(images):
    plan = Plan(images=images, batch=64, views=3)
    batches = plan.epoch(0)
    assert batches
    assert all(batches)
    assert len(batches) == max(1, images // 64)


def test_repeats_are_different_views_of_a_third_of_the_images():
    plan = Plan(images=300, batch=60, views=3)
    draws = [draw for batch in plan.epoch(0) for draw in batch]
    assert len(draws) == 300
    assert len({draw.image for draw in draws}) == 100
    assert len({(draw.image, draw.view) for draw in draws}) == 300


def test_neighbours_that_get_mixed_are_different_images():
    for batch in Plan(images=600, batch=64, views=3).epoch(0):
        for left, right in zip(batch[::2], batch[1::2], strict=True):
            assert left.image != right.image
            assert right.position == left.position + 1 == left.position ^ 1


def test_processes_and_parts_share_an_update_between_them():
    whole = drawn(Plan(images=128, batch=32, seed=3))
    cut = Plan(images=128, batch=32, seed=3, pieces=4)
    ranks = [drawn(cut, rank=rank, processes=2) for rank in range(2)]
    for update, batch in enumerate(whole):
        pieces = [
            ranks[rank][2 * update + part] for rank, part in itertools.product(range(2), range(2))
        ]
        assert [draw for piece in pieces for draw in piece] == batch
        assert {len(piece) for piece in pieces} == {8}
        assert all(piece[0].position % 2 == 0 for piece in pieces)  # pairs stay together


def test_batches_that_cannot_be_shared_are_refused():
    with pytest.raises(ValueError, match="batch_size: expected a multiple of 4"):
        Plan(images=100, batch=10, pieces=2)
    with pytest.raises(ValueError, match="data: expected at least 8 images"):
        Plan(images=3, batch=8, pieces=4)
    with pytest.raises(ValueError, match="images: expected at least 1"):
        Plan(images=0, batch=8)

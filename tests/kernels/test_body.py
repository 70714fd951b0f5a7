"""The CUDA kernel's body, run on the CPU for every thread of every block: no GPU needed."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace

import pytest
import torch

from tests.helpers.kernels import (
    F32,
    F64,
    HYPERS,
    TRIPLES,
    Access,
    Bordered,
    Group,
    Packed,
    Triple,
    Update,
    accesses,
    assert_same,
    assert_stepped,
    every_grid,
    every_triple,
    kernel_on_host,
    make,
    needs_fma,
    step,
)

pytestmark = needs_fma


@every_triple
@pytest.mark.parametrize("fresh", [False, True], ids=["past momentum", "fresh momentum"])
@pytest.mark.parametrize("group", [pytest.param(g, id=name) for name, g in HYPERS.items()])
def test_every_variant_equals_stock(group: Group, fresh: bool, triple: Triple) -> None:
    torch.manual_seed(0)
    sizes = (1, triple.tile - 1, triple.tile, 5 * triple.tile + 3)
    updates = [make(n, triple, fresh=fresh, with_momentum=group.momentum != 0) for n in sizes]
    assert len(step(updates, [group], triple)) == 1
    assert_stepped(updates, [group], triple)


@every_triple
@every_grid
def test_every_size_around_vectors_and_tiles(resident: int, triple: Triple) -> None:
    torch.manual_seed(0)
    edges = (0, triple.vector, 2 * triple.vector, triple.tile, 4 * triple.tile, 9 * triple.tile)
    sizes = [edge + d for edge in edges for d in (-1, 0, 1) if edge + d >= 0]
    groups = [Group(weight_decay=0.01)]
    updates = [make(n, triple) for n in sizes]
    step(updates, groups, triple, resident)
    assert_stepped(updates, groups, triple)


@every_triple
@pytest.mark.parametrize("which", [0, 1, 2], ids=["parameter", "gradient", "momentum"])
def test_every_byte_offset_of_one_array(which: int, triple: Triple) -> None:
    torch.manual_seed(0)
    groups = [Group(weight_decay=0.01)]
    updates = []
    for offset in range(0, 128, triple[which].itemsize):
        offsets = [0, 0, 0]
        offsets[which] = offset
        updates.append(make(6 * triple.tile + 5, triple, offsets=offsets))
    step(updates, groups, triple)
    assert_stepped(updates, groups, triple)


@every_triple
def test_every_combination_of_offsets_in_a_vector(triple: Triple) -> None:
    torch.manual_seed(0)
    groups = [Group(weight_decay=0.01)]
    places = [range(0, 16, dtype.itemsize) for dtype in triple]
    updates = [
        make(numel, triple, offsets=(param, grad, momentum))
        for param in places[0]
        for grad in places[1]
        for momentum in places[2]
        for numel in (3 * triple.tile + (param + 3 * grad + 5 * momentum) % triple.tile,)
    ]
    step(updates, groups, triple)
    assert_stepped(updates, groups, triple)


@every_triple
@pytest.mark.parametrize("grad_offset", [0, 2], ids=["aligned", "misaligned gradients"])
@pytest.mark.parametrize("left", range(0, 12, 3), ids="{} elements left over".format)
def test_a_short_last_tile_is_not_read_past(left: int, grad_offset: int, triple: Triple) -> None:
    offset = grad_offset * triple.grad.itemsize // 2
    numel = 2 * triple.tile + left
    touched = accesses([(1 << 20, (2 << 20) + offset, 3 << 20, numel, 0, 0, False)], triple)
    assert_covered(touched, 1 << 20, numel * triple.param.itemsize)
    end = (2 << 20) + offset + numel * triple.grad.itemsize
    reads = [a for a in touched if not a.store and 2 << 20 <= a.address < 3 << 20]
    assert min(a.address for a in reads) == (2 << 20) + offset
    assert max(a.address + a.bytes for a in reads) == end


@every_triple
@pytest.mark.parametrize("backwards", [False, True], ids=["in order", "last thread first"])
def test_one_huge_and_many_tiny_tensors(backwards: bool, triple: Triple) -> None:
    torch.manual_seed(0)
    rng = random.Random(0)
    groups = [Group(weight_decay=0.01), Group(momentum=0), Group(nesterov=True)]
    updates = [make(rng.randrange(0, 5), triple, group=i // 100) for i in range(300)]
    updates.insert(150, make(40 * triple.tile + 1, triple, group=1))
    launches = step(updates, groups, triple, resident=11, backwards=backwards)
    assert len(launches) == 1
    assert_stepped(updates, groups, triple)


@every_triple
def test_a_table_is_filled_to_its_capacity_and_chained_beyond(triple: Triple) -> None:
    torch.manual_seed(0)
    groups = [Group()]
    tiers = kernel_on_host.capacities(triple.names, 1, stochastic=triple.stochastic)
    for tier, (size, capacity) in enumerate(tiers):
        for count in (capacity - 1, capacity, capacity + 1):
            updates = [make(1 + i % 3, triple) for i in range(count)]
            launches = step(updates, groups, triple, resident=3)
            if count <= capacity:
                assert [(a.parameter_bytes, a.tensors) for a in launches] == [(size, count)]
            elif tier + 1 < len(tiers):
                assert [a.parameter_bytes for a in launches] == [tiers[tier + 1][0]]
            else:
                assert [(a.parameter_bytes, a.tensors) for a in launches] == [
                    (size, capacity),
                    (tiers[0][0], 1),
                ]
            assert_stepped(updates, groups, triple)


@every_triple
def test_empty_tensors_take_no_room(triple: Triple) -> None:
    groups = [Group()]
    assert step([make(0, triple) for _ in range(5)], groups, triple) == []
    updates = [make(n, triple) for n in (0, 3, 0, 0, 4, 0)]
    assert [launch.tensors for launch in step(updates, groups, triple)] == [2]
    assert_stepped(updates, groups, triple)


@every_triple
@pytest.mark.parametrize("count", [161, 400, 900], ids="{} groups of one tensor".format)
def test_many_groups(count: int, triple: Triple) -> None:
    torch.manual_seed(0)
    groups = [Group(lr=1 / (i + 1), momentum=0.9 * (i % 3 > 0)) for i in range(count)]
    updates = [make(2, triple, group=i, with_momentum=i % 3 > 0) for i in range(count)]
    launches = step(updates, groups, triple)
    assert len(launches) == 1 or count > 161
    assert sum(launch.groups for launch in launches) == count
    assert_stepped(updates, groups, triple)


def test_groups_out_of_order_still_pair_with_their_tensors() -> None:
    triple = TRIPLES["fp32"]
    groups = [Group(lr=0.1), Group(lr=0.2), Group(lr=0.3)]
    updates = [make(9, triple, group=i % 3) for i in range(30)]
    step(updates, groups, triple)
    assert_stepped(updates, groups, triple)


@every_triple
@pytest.mark.parametrize("lr_dtype", [F32, F64], ids=["fp32 lr", "fp64 lr"])
def test_a_learning_rate_on_the_device(lr_dtype: torch.dtype, triple: Triple) -> None:
    lr = torch.tensor(0.037, dtype=lr_dtype)
    groups = [Group(lr=math.nan, device_lr=lr), Group(lr=0.5)]
    updates = [make(2 * triple.tile + 1, triple, group=i) for i in range(2)]
    step(updates, groups, triple)
    assert_stepped(updates, groups, triple)


SCALES = {
    "a power of two": 65536.0,
    "a small power of two": 2.0**-20,
    "1": 1.0,
    "three": 3.0,
    "1e30": 1e30,
}


@every_triple
@pytest.mark.parametrize("grad_offset", [0, 1], ids=["aligned", "gradients one element off"])
@pytest.mark.parametrize("scale", [pytest.param(s, id=f"scale {n}") for n, s in SCALES.items()])
def test_gradients_are_unscaled_and_left_so(scale: float, grad_offset: int, triple: Triple) -> None:
    torch.manual_seed(0)
    groups = [Group(weight_decay=0.01)]
    offsets = (0, grad_offset * triple.grad.itemsize, 0)
    updates = [make(n, triple, offsets=offsets) for n in (1, 3 * triple.tile + 1)]
    on_device = torch.tensor(scale)
    step(updates, groups, triple, grad_scale=on_device, found_inf=torch.tensor(0.0))
    assert_stepped(updates, groups, triple, float(on_device))


@every_triple
@pytest.mark.parametrize("found", [1.0, 2.0, math.nan], ids="found_inf {}".format)
def test_an_overflow_changes_nothing(found: float, triple: Triple) -> None:
    groups = [Group(dampening=0.5)]
    updates = [make(3 * triple.tile, triple, fresh=fresh) for fresh in (False, True)]
    step(
        updates,
        groups,
        triple,
        grad_scale=torch.tensor(2.0),
        found_inf=torch.tensor(found),
    )
    for update in updates:
        assert update.momentum is not None
        for array in (update.param, update.grad, update.momentum):
            array.assert_border_untouched()
            assert_same(array.view, array.values, "an array after an overflow")


@every_triple
def test_special_values_equal_stock(triple: Triple) -> None:
    values = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, -1e-40, 1.0])
    grid = torch.cartesian_prod(values, values, values)
    for group in HYPERS.values():
        update = Update(
            *(Bordered(grid[:, i].contiguous().to(dtype)) for i, dtype in enumerate(triple))  # type: ignore[arg-type]
        )
        if group.momentum == 0:
            update.momentum = None
        step([update], [group], triple)
        assert_stepped([update], [group], triple)


def test_random_sets_of_tensors() -> None:
    """What the named cases might have missed."""
    rng = random.Random(0)
    torch.manual_seed(0)
    for _ in range(60):
        triple = rng.choice(list(TRIPLES.values()))
        groups = [replace(rng.choice(list(HYPERS.values())), lr=rng.random()) for _ in range(4)]
        updates = []
        for _ in range(rng.choice([1, 3, 40])):
            group = rng.randrange(4)
            offsets = [rng.choice([0, rng.randrange(0, 32)]) * dtype.itemsize for dtype in triple]
            numel = rng.choice([rng.randrange(10), rng.randrange(700), rng.randrange(9000)])
            fresh = rng.random() < 0.3
            has_momentum = groups[group].momentum != 0
            updates.append(make(numel, triple, group, fresh, offsets, has_momentum))
        scale = rng.choice([None, 1024.0, 3.0])
        step(
            updates,
            groups,
            triple,
            resident=rng.randrange(1, 200),
            grad_scale=None if scale is None else torch.tensor(scale),
            backwards=rng.random() < 0.5,
        )
        assert_stepped(updates, groups, triple, scale or 1.0)


def assert_covered(touched: Iterable[Access], start: int, size: int) -> None:
    """The stores into [start, start + size) make it up exactly, each byte once."""
    at = start
    for run in sorted(a for a in touched if a.store and start <= a.address < start + size):
        assert run.address == at, (
            f"byte {at - start} is stored {'twice' if run.address < at else 'never'}"
        )
        at += run.bytes
    assert at == start + size


@every_triple
@every_grid
def test_every_byte_is_stored_once(resident: int, triple: Triple) -> None:
    rng = random.Random(0)
    sizes = [rng.choice([1, 2, 7, 100, 1000, 30000]) for _ in range(80)]
    updates: list[Packed] = []
    for i, numel in enumerate(sizes):
        base = (i + 1) << 24
        offsets = [rng.randrange(0, 16) * dtype.itemsize for dtype in triple]
        param, grad, momentum = (base + (k << 20) + offset for k, offset in enumerate(offsets))
        updates.append((param, grad, momentum, numel, 0, 0, False))
    touched = accesses(updates, triple, resident, grad_scale=torch.tensor(2.0))
    for param, grad, momentum, numel, *_ in updates:
        for start, dtype in zip((param, grad, momentum), triple, strict=True):
            assert_covered(touched, start, numel * dtype.itemsize)
    assert sum(a.bytes for a in touched if a.store) == sum(
        n * dtype.itemsize for n in sizes for dtype in triple
    )


@every_triple
@pytest.mark.parametrize("power", [31, 32, 33], ids="2**{} elements".format)
def test_indexing_beyond_2_to_the_31(power: int, triple: Triple) -> None:
    numel = (1 << power) + 12345
    starts = (1 << 40, 2 << 40, 3 << 40)
    blocks = 1 << 19
    updates = [(*starts, numel, 0, 0, False)]
    near = int(2**31 / numel * blocks)
    chosen = [0, 1, near - 1, near, near + 1, blocks // 2, blocks - 2, blocks - 1]
    chosen = sorted({block for block in chosen if 0 <= block < blocks})
    for param, dtype in zip(starts[:1], triple[:1], strict=True):
        tiles = -(-numel // triple.tile)
        for block in chosen:
            # The share of a block, worked out apart from the kernel.
            first, last = (
                b * (tiles // blocks) + min(b, tiles % blocks) for b in (block, block + 1)
            )
            touched = accesses(updates, triple, blocks, [block])
            begin = first * triple.tile
            end = min(last * triple.tile, numel)
            assert_covered(touched, param + begin * dtype.itemsize, (end - begin) * dtype.itemsize)
            assert sum(a.bytes for a in touched if a.store) == (end - begin) * (
                dtype.itemsize + triple.momentum.itemsize
            )


def share_in_vectors(touched: Iterable[Access], start: int, size: int, store: bool) -> float:
    """The share of an array's bytes that moves in full-width accesses."""
    runs = [a for a in touched if a.store == store and start - 16 <= a.address < start + size]
    widest = max(a.width for a in runs)
    return sum(a.bytes for a in runs if a.width == widest) / sum(a.bytes for a in runs)


OFFSETS = {
    "aligned": (0, 0, 0),
    "all one element off": (1, 1, 1),
    "gradient one element off": (0, 1, 0),
    "parameter and momentum one element off": (1, 0, 1),
}


@every_triple
@pytest.mark.parametrize("offsets", [pytest.param(o, id=name) for name, o in OFFSETS.items()])
def test_all_but_the_ends_moves_in_vectors(offsets: Sequence[int], triple: Triple) -> None:
    numel = 1000 * triple.tile + 17
    starts = [
        ((i + 1) << 30) + offset * dtype.itemsize
        for i, (offset, dtype) in enumerate(zip(offsets, triple, strict=True))
    ]
    touched = accesses([(starts[0], starts[1], starts[2], numel, 0, 0, False)], triple)
    for i, dtype in enumerate(triple):
        bytes_per_access = triple.vector * dtype.itemsize
        for store in (False, True) if i != 1 else (False,):
            widths = {
                a.width
                for a in touched
                if a.store == store and starts[i] - 16 <= a.address < starts[i] + (1 << 29)
            }
            assert max(widths) == bytes_per_access
            assert share_in_vectors(touched, starts[i], numel * dtype.itemsize, store) > 0.995


def test_errors_name_what_is_wrong() -> None:
    update = make(4, TRIPLES["fp32"])
    with pytest.raises(ValueError, match="no dtype int32"):
        kernel_on_host.step([update.packed()], [Group().packed()], ("int32",) * 3, 1)
    with pytest.raises(TypeError, match="no kernel for these dtypes"):
        kernel_on_host.step(
            [update.packed()], [Group().packed()], ("float32", "float64", "float32"), 1
        )
    with pytest.raises(IndexError, match="no block 9 of 1"):
        accesses([update.packed()], TRIPLES["fp32"], chosen=[9])

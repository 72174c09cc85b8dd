"""Batches of uint8 images, from rows by number or from a stream, and what a checkpoint keeps of where they stood.

A batch is a pure function of (seed, step, process), so a run can start at any step without reading what it skips.
"""

import atexit
import multiprocessing
import signal
import weakref
from functools import lru_cache, partial
from itertools import islice
from typing import NamedTuple

import fsspec.asyn
import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from flags import UserError, reading
from loading import images
from loading.files import named
from loading.images import Met, bad_row, crops, mark, stacked

ORDER, CROP, VIEW, SPLIT = range(4)  # what a generator is for: keeps the streams of draws apart
BLOCK = 1000  # rows of a stream that are shuffled together, at least


def generator(*key: int) -> torch.Generator:
    """A CPU generator that depends on these numbers alone."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed))


def _shuffled(n, *key):
    return torch.randperm(n, generator=generator(*key))


@lru_cache(2)  # many batches ask for it
def epoch_order(n: int, seed: int, epoch: int) -> torch.Tensor:
    """The order of n rows in an epoch."""
    return _shuffled(n, seed, ORDER, epoch)


class Batches(torch.utils.data.Dataset):
    """Batch i of this process, of the `parts` batches into which each step's global batch is cut.

    Every part is another slice of one global batch, so the images of a step do not depend on the number of processes.
    """

    def __init__(self, source, recipes, *, batch_size, part_size, rank, world, seed):
        self.source, self.recipes, self.seed = source, recipes, seed
        self.batch_size, self.part_size, self.rank, self.world = batch_size, part_size, rank, world
        self.accumulate = batch_size // (part_size * world)
        self.steps_per_epoch = len(source.rows) // batch_size

    def rows(self, i):
        """The rows of batch i of this process."""
        step, micro = divmod(i, self.accumulate)
        start = (micro * self.world + self.rank) * self.part_size
        return self.step_rows(step)[start : start + self.part_size]

    def step_rows(self, step):
        """The rows of the whole batch of a step, over all processes and parts."""
        epoch, step = divmod(step, self.steps_per_epoch)
        order = epoch_order(len(self.source.rows), self.seed, epoch)
        return self.source.rows[order[step * self.batch_size : (step + 1) * self.batch_size]]

    def __getitem__(self, i):
        try:
            draws = generator(self.seed, CROP, i, self.rank)
            a, b, met = self.source.train.pair(self.rows(i), self.recipes, draws, self.source.rows)
            return a, b, *met
        except UserError as error:
            return error  # raised in a worker, it would arrive as a traceback


class Place(NamedTuple):
    """Where the reader of a stream stands: where its block of rows begins, and how many rows of the block are used."""

    epoch: int = 0
    shard: int = 0
    row: int = 0
    used: int = 0


class StreamBatches(IterableDataset):
    """The same from a stream, whose rows cannot be told by number.

    Each process has `readers`, one in each worker, which take turns to make its batches. A reader has shards of its
    own, in another order each epoch, and shuffles their rows by blocks. From its place in `places` it continues without
    the shards that came before; in its shard it passes over rows undecoded.
    """

    def __init__(self, source, recipes, *, part_size, rank, world, readers, seed, skip_bad, start=0, places=None):
        self.source, self.recipes, self.part_size, self.seed = source, recipes, part_size, seed
        self.rank, self.world, self.readers, self.skip_bad, self.start = rank, world, readers, skip_bad, start
        self.places = places or [Place()] * readers

    def blocks(self, reader, place):
        """(place, undecoded images) for one block after another, for ever; where there is no row at all, it ends."""
        stream, size = self.source.train, max(BLOCK, 4 * self.part_size)
        shards = stream.num_shards
        if shards < self.world:  # each process then reads all of them, and takes a row in `world`
            first, stride, phase, step = 0, 1, self.rank, self.world
        else:
            first, stride, phase, step = self.rank * self.readers + reader, self.world * self.readers, 0, 1
        while True:
            order = _shuffled(shards, self.seed, ORDER, place.epoch)[first::stride].tolist()
            place, block, empty = place._replace(used=0), [], place[1:3] == (0, 0)
            row = place.row
            for shard, number in islice(enumerate(order), place.shard, None):
                # In batches of one: `datasets` would split the shard once more among the workers otherwise.
                for record in stream.shard(shards, number, contiguous=False).skip(row).iter(1):
                    row += 1
                    if row % step == phase:
                        block.append(record["image"][0])
                    if len(block) == size:
                        yield place, block
                        place, block, empty = Place(place.epoch, shard, row), [], False
                row = 0
            if block:
                yield place, block
            elif empty:
                return
            place = Place(place.epoch + 1)

    def __iter__(self):
        try:
            with reading("--dataset: the stream"):
                yield from self._made()
        except UserError as error:  # raised in a worker, it would arrive as a traceback
            yield error

    def _made(self):
        info = get_worker_info()
        worker = info.id if info else 0
        reader, i = (self.start + worker) % self.readers, self.start + worker
        place, draws = self.places[reader], generator(self.seed, CROP, i, self.rank)
        images, met, used, last_good = [], Met([], None, []), place.used, place.epoch
        pixel_range = self.source.way.pixel_range
        for block_place, block in self.blocks(reader, place):
            if block_place.epoch > last_good + 1:
                raise UserError("the stream has no image that can be read")
            place = block_place._replace(used=used)
            order = _shuffled(len(block), self.seed, ORDER, *block_place, self.rank, reader).tolist()
            for j in order[used:]:
                place = place._replace(used=place.used + 1)
                try:
                    images.append(crops(block[j], self.recipes, draws, pixel_range, met.clipped))
                except ValueError as error:
                    if not self.skip_bad:
                        row = f"{j} after row {place.row} of a shard"
                        raise bad_row(row, "the stream", error, block[j]) from None
                    path = block[j]["path"] if block[j] else None
                    met.bad.append(named(path) if path else f"an image without a file, checksum {mark(block[j])}")
                    continue
                last_good = place.epoch
                if len(images) == self.part_size:
                    yield *stacked(images), *met, reader, place
                    images, met, i = [], Met([], None, []), i + self.readers
                    draws = generator(self.seed, CROP, i, self.rank)
            used = 0
        raise UserError("the stream has no rows for this process; use fewer processes or workers")


def places_of(saved: list | None, rank: int, world: int, readers: int):
    """(this process's places, whether they go on where `saved`, the places of all processes, ends).

    With another number of processes or readers they cannot; then they are at the beginning of the next epoch.
    """
    if saved is None:
        return None, True
    if [len(places) for places in saved] == [readers] * world:
        return [Place(*place) for place in saved[rank]], True
    return [Place(1 + max(place[0] for places in saved for place in places))] * readers, False


def _begin_worker(pixels, worker):
    """Signals are for the loop to answer, and workers end with it; fsspec's lock may have been held at the fork.

    pixels: the limit of an image, as a worker that is not forked begins with the default.
    """
    images.limit(pixels)
    fsspec.asyn.reset_lock()
    for kind in (signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGINT)):
        signal.signal(kind, signal.SIG_IGN)


WORKERS: weakref.WeakSet = (
    weakref.WeakSet()
)  # not a handler for each iterator: it would hold finished workers and their pipes


@atexit.register
def _kill():
    """They would not hear a SIGTERM."""
    for process in list(WORKERS):
        if process.is_alive():
            process.kill()


def iterate(dataset, **options):
    """An iterator over a DataLoader whose workers leave signals to the main process, and end with it."""
    before = set(multiprocessing.active_children())
    made = iter(DataLoader(dataset, worker_init_fn=partial(_begin_worker, images.PIXELS), **options))
    WORKERS.update(set(multiprocessing.active_children()) - before)
    return made


class Feed:
    """An iterator over this process's pairs of uint8 batches, which `workers` processes, or this one, make.

    `bad` are the unreadable images that were left out, `rows` those that the last batch was made of, `clipped` how many
    images had values beyond the pixel range, `places` where a stream's readers stand, `ahead` how many batches wait at
    most. Raises UserError where an image cannot be read.
    """

    def __init__(self, batches: Batches | StreamBatches, start: int, stop: int, workers: int, pin: bool):
        options: dict = dict(batch_size=None, num_workers=workers, pin_memory=pin)
        self.places = list(batches.places) if isinstance(batches, StreamBatches) else None
        options |= {} if self.places else dict(sampler=range(start, stop))
        self.made, self.bad = iterate(batches, **options), set(batches.source.bad)
        self.ahead = 2 * workers  # DataLoader's prefetch_factor
        self.rows, self.clipped = None, 0

    def __iter__(self):
        return self

    def __next__(self):
        made = next(self.made)
        if isinstance(made, UserError):
            self.made = iter(())  # ends the workers now, not when the traceback that holds them goes
            made.everywhere = False
            raise made
        a, b, bad, rows, clipped, *place = made
        self.bad.update(bad)
        self.rows = None if rows is None else torch.tensor(rows)
        self.clipped += len(clipped)
        if place:
            self.places[place[0]] = place[1]
        return a, b


class _Made(torch.utils.data.Dataset):
    def __init__(self, make):
        self.make = make

    def __getitem__(self, i):
        try:
            return self.make(i)
        except UserError as error:
            return error  # raised in a worker, it would arrive as a traceback


def _as_it_is(item):
    """For the DataLoader: arrays stay arrays, as every tensor that a worker sends takes an open file."""
    return item


def made(make, numbers, workers):
    """make(i) for each i of `numbers`, by worker processes, in order. Raises UserError where `make` does."""
    options = dict(batch_size=None, sampler=numbers, num_workers=workers)
    for item in iterate(_Made(make), collate_fn=_as_it_is, **options):
        if isinstance(item, UserError):
            item.everywhere = False
            raise item
        yield item


def _whole(images, parts, size, i):
    return images.whole(parts[i], size)


def whole_images(images, rows, size, *, workers=0, chunk=256):
    """(uint8 batch, clipped values or -1 where bad) of the images at `rows`, whole or centrally cropped, in order."""
    parts = rows.split(chunk)
    # A worker for one part saves nothing, and a fork beside a run's other threads can hang.
    workers = min(workers, len(parts)) if images.in_workers and len(parts) > 1 else 0
    return made(partial(_whole, images, parts, size), range(len(parts)), workers)

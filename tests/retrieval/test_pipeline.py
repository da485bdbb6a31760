"""An index run's stages beside one another: that they overlap, keep their order, and say which one bounds the run."""

import threading
import time
from dataclasses import asdict

import numpy as np
import pytest
from PIL import Image

from indexes.errors import StoreError
from indexes.store import Store
from indexes.writer import Writer
from retrieval import indexing
from retrieval.indexing import IndexReport, Stages
from retrieval.library import Library
from retrieval.pipeline import Behind, Stopwatch, map_ahead
from tests.fakes import ColourEncoder

PATIENCE = 30  # seconds until what should have happened at once is taken for missing


@pytest.fixture
def folder(tmp_path):
    """60 pictures, every one another colour."""
    for i in range(60):
        Image.new("RGB", (8, 8), (4 * i, 255 - 4 * i, i)).save(tmp_path / f"{i:02}.png")
    return tmp_path


class Waiting(ColourEncoder):
    """Does not answer before something else has happened."""

    def __init__(self, happened):
        super().__init__()
        self.happened = happened

    def encode_images(self, images):
        assert self.happened.wait(PATIENCE)
        return super().encode_images(images)


def test_pictures_are_decoded_while_the_model_is_at_work(folder, monkeypatch):
    """The first batch is not done before a picture behind it has been decoded."""
    ahead = threading.Event()
    read_photo = indexing.read_photo
    counted = []

    def counting(*arguments):
        counted.append(None)
        if len(counted) > indexing._BATCH:
            ahead.set()
        return read_photo(*arguments)

    monkeypatch.setattr(indexing, "read_photo", counting)
    assert Library.create(folder, encoder=Waiting(ahead)).index().added == 60


def test_rows_are_written_while_the_model_is_at_work(folder, monkeypatch):
    """The first row is not written before the model has begun with a second batch."""
    second = threading.Event()
    add = Writer.add

    class Telling(ColourEncoder):
        def encode_images(self, images):
            if self.encoded:
                second.set()
            return super().encode_images(images)

    def waiting(self, row, vector):
        assert second.wait(PATIENCE)
        return add(self, row, vector)

    monkeypatch.setattr(Writer, "add", waiting)
    library = Library.create(folder, encoder=Telling())
    assert library.index().added == 60
    assert library.store.paths() == [f"{i:02}.png" for i in range(60)]  # in their order all the same


def test_vectors_belong_to_their_pictures(folder):
    library = Library.create(folder, encoder=ColourEncoder())
    library.index()
    for i in (0, 17, 59):
        with Image.open(folder / f"{i:02}.png") as image:
            expected = ColourEncoder().encode_images([image])[0]
        position = library.store.paths().index(f"{i:02}.png")
        np.testing.assert_allclose(library.store.snapshot.halves(position), expected, atol=1e-3)


def test_a_write_that_fails_ends_the_run_with_its_own_error(folder, monkeypatch):
    def full(self):
        raise StoreError("no room")

    library = Library.create(folder, encoder=ColourEncoder())
    with monkeypatch.context() as patch:
        patch.setattr(Writer, "commit", full)
        patch.setattr("indexes.writer._BUFFERED", 10)
        with pytest.raises(StoreError, match="no room"):
            library.index()
    assert Library.open(folder, encoder=ColourEncoder()).index().added == 60


def slow(function, seconds):
    def slowed(*arguments, **options):
        time.sleep(seconds)
        return function(*arguments, **options)

    return slowed


@pytest.mark.parametrize(
    ("stage", "owner", "name", "seconds"),
    [
        ("scan", indexing, "scan_columns", 1.0),
        ("decode", indexing, "read_photo", 0.05),
        ("encode", ColourEncoder, "encode_images", 0.3),
        ("write", Writer, "add", 0.02),
    ],
)
def test_the_slowest_stage_is_named(folder, monkeypatch, stage, owner, name, seconds):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr(owner, name, slow(getattr(owner, name), seconds))
    report = Library.create(folder, encoder=ColourEncoder()).index()
    assert report.bounded_by == stage
    assert all(0 <= spent <= report.elapsed for spent in asdict(report.seconds).values())


def test_reports_are_equal_whatever_they_took():
    assert IndexReport(added=1, seconds=Stages(1, 2, 3, 4), elapsed=9.0) == IndexReport(added=1)


def test_a_run_with_nothing_to_do_needs_no_model_and_no_thread(folder, monkeypatch):
    Library.create(folder, encoder=ColourEncoder()).index()
    library = Library(Store.open(folder / ".diptych"))  # of a model that cannot be loaded
    monkeypatch.setattr(threading.Thread, "start", None)
    report = library.index()
    assert (report.skipped, report.bounded_by) == (60, "scan")


# --- the parts ---


def test_tasks_are_done_in_order_and_all_of_them():
    done = []
    with Behind() as behind:
        for i in range(100):
            behind.do(lambda i=i: done.append((i, threading.current_thread().name)))
    assert done == [(i, "write") for i in range(100)]


def test_no_more_than_a_few_tasks_wait():
    go, handed = threading.Event(), []
    with Behind() as behind:

        def hand_over():
            for i in range(50):
                behind.do(lambda: go.wait(PATIENCE))
                handed.append(i)

        other = threading.Thread(target=hand_over)
        other.start()
        while len(handed) < 5:  # one in hand, four that wait
            time.sleep(0.001)
        time.sleep(0.05)
        assert len(handed) == 5
        go.set()
        other.join()
    assert len(handed) == 50


def all_done(*tasks, then=lambda behind: None):
    with Behind() as behind:
        then(behind)
        for task in tasks:
            behind.do(task)


def fail(error):
    raise error


def test_a_task_that_fails_is_heard_of_and_nothing_is_done_behind_it():
    done = []
    with pytest.raises(KeyError, match="task"):
        all_done(lambda: fail(KeyError("task")), *[lambda: done.append(None)] * 1000)
    assert done == []
    with pytest.raises(KeyError, match="task"):
        all_done(lambda: fail(KeyError("task")))  # the last one
    with pytest.raises(KeyError, match="block"):
        all_done(then=lambda behind: (behind.do(lambda: fail(KeyError("task"))), fail(KeyError("block"))))


def test_an_interrupt_while_the_last_tasks_are_done_waits_for_the_one_in_hand(monkeypatch):
    """The second Ctrl-C: what has begun is finished, what has not is left out, and nobody is at work any more."""
    begun, go, done = threading.Event(), threading.Event(), []

    def long():
        begun.set()
        assert go.wait(PATIENCE)
        done.append("long")

    join = threading.Thread.join
    interrupts = iter([KeyboardInterrupt(), KeyboardInterrupt()])

    def interrupted(self, timeout=None):
        assert begun.wait(PATIENCE)
        if error := next(interrupts, None):
            raise error
        go.set()
        join(self, timeout)

    threads = []

    def patched(behind):
        threads.append(behind._thread)
        monkeypatch.setattr(behind._thread, "join", interrupted.__get__(behind._thread))

    with pytest.raises(KeyboardInterrupt):
        all_done(long, lambda: done.append("next"), then=patched)
    assert done == ["long"]
    assert not threads[0].is_alive()


def test_items_come_in_order_and_leaving_early_cancels(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    begun = []

    def square(i):
        begun.append(i)
        return i * i

    assert list(map_ahead(square, range(100))) == [(i, i * i) for i in range(100)]
    begun.clear()
    for i, _ in map_ahead(square, range(1000)):
        if i == 3:
            break
    assert len(begun) <= 3 + 1 + 3 * 8


def test_as_many_are_computed_ahead_as_are_taken_at_once(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    begun, all_begun = [], threading.Event()

    def count(i):
        begun.append(i)
        if len(begun) == 100:
            all_begun.set()

    results = map_ahead(count, range(1000), batch=100)
    next(results)
    assert all_begun.wait(10)  # while the caller does something else
    time.sleep(0.05)
    assert len(begun) == 100
    results.close()


def test_a_stopwatch_adds_up_its_threads():
    watch = Stopwatch()

    def work():
        with watch.running():
            time.sleep(0.05)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert watch.seconds >= 0.19
    with pytest.raises(KeyError), watch.running():
        raise KeyError

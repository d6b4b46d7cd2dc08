"""Engines, parts and kills: the store is the same byte for byte."""

import multiprocessing
import os
import random
import signal
import time

import pytest
from tests.data.conftest import contents, mixed_manifest, spoken_row, write_manifest

from smoltolk.data import engines
from smoltolk.data.prepare import prepare
from smoltolk.data.store import Store
from smoltolk.data.work_folder import WorkFolder


@pytest.fixture
def prepared(tmp_path, tokenizers):
    """A source and the store that one process makes of it."""
    source = mixed_manifest(tmp_path / "in", count=13)
    settings = tokenizers | {"rows_per_shard": 2}
    summary = prepare(source, tmp_path / "whole", **settings)
    return source, settings, summary


def test_parts_in_one_folder_make_the_store_of_one_machine(tmp_path, prepared):
    source, settings, whole = prepared
    out = tmp_path / "out"
    made = [prepare(source, out, **settings, part=(part, 3)) for part in (3, 1)]
    assert made == [None, None]
    with pytest.raises(ValueError, match="is not a store"):
        Store(out)
    assert prepare(source, out, **settings, part=(3, 3)) is None
    assert prepare(source, out, **settings, part=(2, 3)) == whole
    assert contents(out) == contents(tmp_path / "whole")
    assert prepare(source, out, **settings, part=(1, 3)) == whole


def test_parts_in_folders_of_their_own_are_joined(tmp_path, prepared):
    source, settings, whole = prepared
    parts = [tmp_path / f"part-{part}" for part in (1, 2, 3)]
    for number, folder in enumerate(parts, start=1):
        assert prepare(source, folder, **settings, part=(number, 3)) is None
        assert not list(folder.glob("*.parquet"))
    assert prepare(source, tmp_path / "out", **settings, join=parts) == whole
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_what_joined_parts_lack_is_done(tmp_path, prepared, monkeypatch):
    source, settings, whole = prepared
    prepare(source, tmp_path / "part", **settings, part=(2, 3))
    done = []
    do = engines.Job.do
    monkeypatch.setattr(engines.Job, "do", lambda job, number, *rest: (done.append(number), do(job, number, *rest)))
    assert prepare(source, tmp_path / "out", **settings, join=[tmp_path / "part"]) == whole
    assert done == [0, 2, 3, 5, 6]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_part_of_another_preparation_is_not_joined(tmp_path, prepared):
    source, settings, _ = prepared
    prepare(source, tmp_path / "part", **settings | {"rows_per_shard": 3}, part=(1, 2))
    with pytest.raises(ValueError, match=r"part .*/part was begun with other settings.*rows_per_shard was 3, is 2"):
        prepare(source, tmp_path / "out", **settings, join=[tmp_path / "part"])
    with pytest.raises(ValueError, match="whole is a whole store already"):
        prepare(source, tmp_path / "out", **settings, join=[tmp_path / "whole"])


def test_the_same_part_twice_at_once_is_refused_and_so_is_the_whole(tmp_path, prepared):
    source, settings, _ = prepared
    with WorkFolder(tmp_path / "out").lock(1, 2):
        for part in ((1, 2), (1, 1)):
            with pytest.raises(ValueError, match="is being written by another process"):
                prepare(source, tmp_path / "out", **settings, part=part)
        assert prepare(source, tmp_path / "out", **settings, part=(2, 2)) is None
    with WorkFolder(tmp_path / "out").lock(1, 1), pytest.raises(ValueError, match="as a whole or as part 1/2"):
        prepare(source, tmp_path / "out", **settings, part=(1, 2))


def test_a_part_that_ends_while_another_still_writes_leaves_the_end_to_it(tmp_path, prepared):
    source, settings, whole = prepared
    prepare(source, tmp_path / "out", **settings, part=(1, 2))
    with WorkFolder(tmp_path / "out").lock(1, 2):
        assert prepare(source, tmp_path / "out", **settings, part=(2, 2)) is None
    assert prepare(source, tmp_path / "out", **settings, part=(1, 2)) == whole


def test_a_block_that_was_lost_is_made_again(tmp_path, prepared):
    source, settings, _ = prepared
    prepare(source, tmp_path / "out", **settings, part=(1, 2))
    (tmp_path / "out" / "blocks" / "00000" / "shard-00000.parquet").write_bytes(b"short")
    (tmp_path / "out" / "blocks" / "00002" / "00000.json").unlink()
    prepare(source, tmp_path / "out", **settings)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_shard_lost_while_the_store_was_put_together_is_said(tmp_path, prepared, monkeypatch):
    source, settings, _ = prepared
    with monkeypatch.context() as patched:
        patched.setattr("smoltolk.data.work_folder.write_manifest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(source, tmp_path / "out", **settings)
    (tmp_path / "out" / "shard-00003.parquet").unlink()
    with pytest.raises(ValueError, match=r"shard-00003.parquet is missing or changed: delete"):
        prepare(source, tmp_path / "out", **settings)


def test_pieces_of_several_blocks_go_on_inside(tmp_path, prepared, monkeypatch):
    """As those of a stream do, whose number of rows is not known."""
    source, settings, whole = prepared
    from smoltolk.data.sources import RowSource, manifest_source

    class Stream(RowSource):
        def pieces(self, rows_per_piece):
            return super().pieces(6)

        def scan(self, rows_per_piece):
            return super().scan(6)

    stream = Stream("stream", manifest_source(source)._read, source.parent)
    prepare_block, calls = engines.Preparer.prepare, []

    def stop_at_the_third(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return prepare_block(*arguments, **options)

    monkeypatch.setattr(engines.Preparer, "prepare", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        prepare(stream, tmp_path / "out", **settings)
    assert prepare(stream, tmp_path / "out", **settings) == whole
    assert len(calls) == 3 + 5
    ours, theirs = contents(tmp_path / "out"), contents(tmp_path / "whole")
    assert {name: ours[name] for name in ours if name != "prepare.json"} == {
        name: theirs[name] for name in theirs if name != "prepare.json"
    }


def prepare_until_killed(source, output, settings, kill_at_write):
    """Target of a process; with `kill_at_write`, dies before that write to the folder, a half-written file beside."""
    replace, writes = os.replace, []

    def replace_or_die(*paths):
        writes.append(paths)
        if len(writes) == kill_at_write:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)

    os.replace = replace_or_die
    prepare(source, output, **settings)


@pytest.fixture(scope="module")
def start_process():
    """Starts processes that have their imports already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "smoltolk.data.prepare", "smoltolk.speech.mel", "transformers"])

    def start(*arguments):
        process = context.Process(target=prepare_until_killed, args=arguments)
        process.start()
        return process

    return start


def test_a_kill_before_any_write_changes_nothing(tmp_path, tokenizers, start_process):
    settings = tokenizers | {"rows_per_shard": 2}
    source = mixed_manifest(tmp_path / "in", count=8)
    prepare(source, tmp_path / "whole", **settings)
    for write in range(1, 100):
        out = tmp_path / f"out-{write}"
        process = start_process(source, out, settings, write)
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        prepare(source, out, **settings)
        assert contents(out) == contents(tmp_path / "whole")
    # settings; shard, record and end of 4 pieces; quarantine, summary, begin of moving; 4 moves; manifest
    assert write - 1 == 1 + 4 * 3 + 3 + 4 + 1


def test_kills_at_random_moments_change_nothing(tmp_path, tokenizers, start_process):
    settings = tokenizers | {"rows_per_shard": 3}
    rows = [spoken_row(tmp_path / "in", number % 10, id=f"row-{number}") for number in range(150)]
    source = write_manifest(tmp_path / "in", rows)
    prepare(source, tmp_path / "whole", **settings)
    rng, kills = random.Random(0), 0
    for _ in range(4):
        process = start_process(source, tmp_path / "out", settings, 0)
        process.join(rng.uniform(0.02, 0.15))
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
    assert kills > 0
    prepare(source, tmp_path / "out", **settings)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_worker_killed_while_it_starts_ends_the_work_with_a_message(tmp_path, prepared, monkeypatch):
    source, settings, _ = prepared
    start = multiprocessing.process.BaseProcess.start

    def start_and_kill(process):
        start(process)
        os.kill(process.pid, signal.SIGKILL)

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", start_and_kill)
    begun = time.monotonic()
    with pytest.raises(ChildProcessError, match=r"exit code -9.*finished blocks are kept"):
        prepare(source, tmp_path / "out", **settings, workers=2)
    assert time.monotonic() - begun < 20
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_local_processes_make_the_same_store_and_a_killed_one_is_said(tmp_path, prepared, monkeypatch):
    source, settings, whole = prepared
    workers = []
    start = multiprocessing.process.BaseProcess.start
    monkeypatch.setattr(
        multiprocessing.process.BaseProcess, "start", lambda process: (start(process), workers.append(process.pid))
    )
    wait, told = engines.wait, []

    def kill_one(connections):
        ready = wait(connections)
        told.append(len(ready))
        if len(told) == 4:  # two have started, and the first blocks are there
            os.kill(workers[0], signal.SIGKILL)
        return ready

    monkeypatch.setattr(engines, "wait", kill_one)
    with pytest.raises(ChildProcessError):
        prepare(source, tmp_path / "out", **settings, workers=2)
    monkeypatch.undo()
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert prepare(source, tmp_path / "out", **settings, workers=2) == whole
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:::ray")  # raised inside Ray, not by how we call it
def test_ray_makes_the_same_store(tmp_path, prepared, monkeypatch):
    source, settings, whole = prepared
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray keeps a token there
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert prepare(source, tmp_path / "out", **settings, workers=2, engine="ray") == whole
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")

import itertools
import multiprocessing
import time

from light_tts.server.tts_llm.gpu_turn import GpuTurn

FORK = multiprocessing.get_context("fork")


def work(directory, name, steps, record, begin) -> None:
    turn = GpuTurn(directory, steps=3)
    begin.wait()
    for _ in range(steps):
        turn.take()
        record.append(name)
        time.sleep(0.01)
    turn.close()


def test_processes_alternate_every_few_steps(tmp_path):
    with FORK.Manager() as shared:
        record, begin = shared.list(), FORK.Barrier(2)
        processes = [FORK.Process(target=work, args=(tmp_path, name, 12, record, begin)) for name in "ab"]
        for process in processes:
            process.start()
        for process in processes:
            process.join(20)
        order = "".join(record)
    turns = [len(list(turn)) for _, turn in itertools.groupby(order)]
    # the second process may be late, and is then left alone in the end
    assert len(order) == 24 and len(turns) >= 6 and set(turns[1:-1]) == {3}


def hold(directory, held) -> None:
    GpuTurn(directory, steps=1000).take()
    held.set()
    time.sleep(60)


def test_the_turn_of_a_killed_process_is_free(tmp_path):
    held = FORK.Event()
    holder = FORK.Process(target=hold, args=(tmp_path, held))
    holder.start()
    assert held.wait(20)
    holder.kill()
    holder.join()
    started = time.monotonic()
    turn = GpuTurn(tmp_path, steps=1)
    turn.take()
    turn.close()
    turn.close()
    assert time.monotonic() - started < 5


def test_an_idle_process_leaves_the_turn_to_others(tmp_path):
    first, second = GpuTurn(tmp_path, steps=1000), GpuTurn(tmp_path, steps=1000)
    first.take()
    first.release()
    second.take()
    for turn in (first, second):
        turn.close()


def test_a_turn_counts_steps_and_is_given_up_only_when_their_work_is_done(tmp_path):
    finished = []
    turn = GpuTurn(tmp_path, steps=10, finish=lambda: finished.append(True))
    turn.take()  # the first one gives up nothing that has begun
    finished.clear()
    for _ in range(2):
        turn.take(8)
    assert not finished
    turn.take(8)
    assert len(finished) == 1
    turn.close()

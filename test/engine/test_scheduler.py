"""The scheduler with sequences that only count."""

from dataclasses import dataclass

import pytest

from light_tts.engine.llm.scheduler import Limits, Plan, Scheduler


@dataclass(eq=False)
class Request:
    """A sequence of `prompt` ids that produces `output` tokens."""

    job: str
    prompt: int = 10
    output: int | None = 20
    limit: int = 100
    part: int = 0
    cached: int = 0
    arrival: int = 0
    asleep: bool = False
    finished: bool = False
    ahead: int = 0

    def __post_init__(self):
        self.inputs = [0] * self.prompt
        self.outputs = []

    @property
    def max_outputs(self):
        return self.output

    @property
    def longest_rest(self):
        return (self.limit - len(self.inputs)) if self.output is None else self.output - len(self.outputs)

    @property
    def pending(self):
        return len(self.inputs) - self.cached

    @property
    def on_device(self):
        return bool(self.outputs) and self.pending + self.ahead == 1

    @property
    def free_steps(self):
        return self.longest_rest - self.ahead

    @property
    def ready(self):
        return not self.finished and not self.asleep and self.pending + self.ahead > 0

    @property
    def runnable(self):
        return self.ready and (not self.on_device or self.free_steps > 0)


def scheduler(**changes) -> Scheduler:
    limits = {
        "slots": 100,
        "prefill_tokens": 50,
        "prefill_requests": 8,
        "running": 8,
        "alive": 8,
        "steps_between_admissions": 4,
        "busy_ratio": 0.0,
        "assumed_output": 10,
    }
    return Scheduler(Limits(**{**limits, **changes}))


def step(scheduler: Scheduler) -> Plan:
    """One iteration of the stage, with requests that produce a token whenever they can."""
    scheduler.admit()
    plan = scheduler.plan()
    for request in plan.evicted:
        request.cached = 0
    for request, tokens in plan.work:
        request.cached += tokens
        assert request in scheduler.running
    assert scheduler.used_slots <= scheduler._limits.slots
    for request, _ in plan.work:
        if request.pending == 0:
            request.outputs.append(0)
            request.inputs.append(0)
            if len(request.outputs) == request.output:
                request.finished = True
                scheduler.end(request)
    return plan


def names(requests) -> str:
    return "".join(request.job for request in requests)


@pytest.mark.parametrize(
    ("requests", "peak"),
    [
        ([], 0),
        ([(10, 20)], 30),
        ([(10, 20), (10, 20)], 60),
        ([(10, 20), (50, 5)], 10 + 50 + 10),  # when the short one ends, both have grown by 5
        ([(10, 40), (10, 5)], 50),  # the long one outlives the short one's slots
        ([(5, 3), (7, 2), (9, 1)], 5 + 7 + 9 + 3),
    ],
)
def test_peak_is_the_most_slots_held_at_a_time(requests, peak):
    assert scheduler().peak([Request("a", prompt, output) for prompt, output in requests]) == peak


@pytest.mark.parametrize(
    ("busy_ratio", "produced", "expected"),
    [
        (0.0, 0, 10 + 90),  # always busy: the longest possible output
        (0.5, 0, 10 + 30),  # not busy: the assumed one
        (0.5, 40, 10 + 40 + 4),  # beyond the assumed one: a tenth more than produced
    ],
)
def test_outputs_are_assumed_shorter_while_the_pool_is_not_busy(busy_ratio, produced, expected):
    request = Request("a", 10, 90)
    request.outputs = [0] * produced
    request.inputs += request.outputs
    assert scheduler(busy_ratio=busy_ratio, assumed_output=30).peak([request]) == expected


def test_requests_are_admitted_in_order_as_far_as_their_peak_fits():
    s = scheduler()
    for name, output in (("a", 30), ("b", 30), ("c", 60), ("d", 5)):
        s.submit(Request(name, 10, output))
    assert names(s.admit()) == "ab"  # c does not fit, and d must not overtake it
    assert names(s.waiting) == "cd"


def test_admission_is_tried_every_few_steps_and_whenever_nothing_runs():
    s = scheduler(steps_between_admissions=3)
    s.submit(Request("a", 10, 20))
    assert names(r for r, _ in step(s).work) == "a"
    s.submit(Request("b", 10, 20))
    assert [names(r for r, _ in step(s).work) for _ in range(4)] == ["a", "a", "a", "b"]
    assert names(s.running) == "ab"


def test_a_long_prefill_is_done_in_pieces_between_which_others_go_on():
    s = scheduler(prefill_tokens=8, steps_between_admissions=1)
    s.submit(Request("a", 5, 20))
    step(s)
    step(s)
    s.submit(Request("b", 20, 20))
    plans = [[(r.job, n) for r, n in step(s).work] for _ in range(7)]
    one = [("a", 1)]
    assert plans[:6] == [[("b", 8)], one, [("b", 8)], one, [("b", 4)], [("a", 1), ("b", 1)]]


def test_prefills_share_a_batch_up_to_its_tokens():
    s = scheduler(prefill_tokens=25)
    for name in "abc":
        s.submit(Request(name, 10, 5))
    assert [(r.job, n) for r, n in step(s).work] == [("a", 10), ("b", 10)]
    assert names(s.waiting) == "c"


def test_prefills_share_a_batch_up_to_its_requests():
    s = scheduler(prefill_requests=2, slots=200)
    for name in "abc":
        s.submit(Request(name, 10, 5))
    assert [(r.job, n) for r, n in step(s).work] == [("a", 10), ("b", 10)]
    assert names(s.waiting) == "c"
    s.abort("b")
    s.running[0].inputs += [0] * 3  # it needs a prefill, as after a pause
    s.submit(Request("d", 10, 5))
    s.running += [s.waiting.pop(0) for _ in "cd"]
    assert [(r.job, n) for r, n in s.plan().work] == [("a", 4), ("c", 10)]


@pytest.mark.parametrize(("limit", "value"), [("running", 2), ("alive", 2)])
def test_no_more_requests_than_allowed_are_under_way(limit, value):
    s = scheduler(**{limit: value})
    for name in "abc":
        s.submit(Request(name, 5, 5))
    assert names(s.admit()) == "ab"


def test_youngest_is_paused_when_slots_run_out_and_all_finish():
    s = scheduler(busy_ratio=1.0, assumed_output=1)  # an expectation that is much too low
    requests = [Request(name, 10, 60) for name in "abc"]
    for request in requests:
        s.submit(request)
    paused = set()
    for _ in range(500):
        paused |= {r.job for r in step(s).evicted}
        if not s.has_work:
            break
    assert all(r.finished and len(r.outputs) == 60 for r in requests)
    assert paused and "a" not in paused
    assert not (s.running or s.paused or s.waiting)


def test_parts_of_a_job_run_one_after_another_before_younger_jobs():
    s = scheduler(slots=30, steps_between_admissions=1)
    first, second, other = Request("a", 10, 20), Request("a", 10, 20, part=1), Request("b", 10, 20)
    for request in (first, second, other):
        s.submit(request)
    order = []
    while s.has_work:
        for request, _ in step(s).work:
            if request not in order:
                order.append(request)
    assert order == [first, second, other]


def test_abort_frees_everything_at_once():
    s = scheduler()
    requests = [Request("a", 10, 20), Request("a", 10, 20, part=1), Request("b", 10, 20)]
    for request in requests:
        s.submit(request)
    step(s)
    assert s.used_slots == 20
    assert s.abort("a") == requests[:2]
    assert s.used_slots == 10 and s.queued == 0
    assert s.abort("a") == []
    assert names(r for r, _ in step(s).work) == "b"


def test_a_request_that_waits_for_text_takes_no_step_and_gives_way():
    s = scheduler(running=2, alive=2)
    idle = Request("i", 10, None)
    s.submit(idle)
    step(s)
    idle.asleep = True
    assert not s.has_work
    for name in "ab":
        s.submit(Request(name, 10, 20))
    plan = step(s)
    assert names(r for r, _ in plan.work) == "ab" and names(plan.evicted) == "i"
    idle.asleep = False
    while s.has_work and idle not in s.running:
        step(s)
    assert idle in s.running


def test_many_that_slept_and_woke_together_all_get_their_turn():
    s = scheduler(running=2, alive=2)
    sleepers = [Request(str(i), 10, 5) for i in range(6)]
    for request in sleepers:
        s.submit(request)
        step(s)
        request.asleep = True
    for request in sleepers:
        request.asleep = False
    for _ in range(100):
        step(s)
    assert all(request.finished for request in sleepers)


def test_a_part_whose_tokens_were_all_there_is_admitted_though_nothing_is_left_to_do():
    s = scheduler()
    done = Request("a", finished=True)
    s.submit(done)
    assert s.has_work and s.admit() == [done]
    s.end(done)
    assert not s.has_work


def decoding(s: Scheduler, *requests: Request) -> None:
    """Admit the requests and complete their prefill."""
    for request in requests:
        s.submit(request)
    s.admit()
    s.plan()
    for request in requests:
        request.cached = request.prompt
        request.inputs.append(0)
        request.outputs.append(0)


def round_of(s: Scheduler, most_steps: int | None = None) -> list[tuple[str, int]]:
    return [(request.job, steps) for request, steps in s.plan(most_steps).work]


def test_a_round_has_as_many_steps_as_each_request_may_take():
    s = scheduler(round_steps=8, steps_between_admissions=8)
    a, b = Request("a", 10, 20), Request("b", 10, 4)
    decoding(s, a, b)
    assert round_of(s) == [("a", 8), ("b", 3)]
    for request, steps in ((a, 8), (b, 3)):  # begun, and not looked at
        request.cached += steps
        request.ahead += steps
    assert round_of(s) == [("a", 1)]  # b may have all its tokens; an admission is due
    s.admit()
    assert round_of(s) == [("a", 8)]


def test_a_round_is_shorter_where_slots_are_short():
    s = scheduler(round_steps=8, steps_between_admissions=8, slots=30, busy_ratio=1.0, assumed_output=1)
    decoding(s, Request("a", 10, 20), Request("b", 10, 20))
    assert round_of(s) == [("a", 5), ("b", 5)]


def test_a_round_is_as_short_as_it_is_asked_to_be():
    s = scheduler(round_steps=8, steps_between_admissions=8)
    decoding(s, Request("a", 10, 20), Request("b", 10, 3))
    assert round_of(s, 5) == [("a", 5), ("b", 2)]


def test_nothing_is_paused_while_steps_are_under_way():
    s = scheduler(round_steps=8, steps_between_admissions=8, slots=20, busy_ratio=1.0, assumed_output=1)
    requests = [Request("a", 9, 20), Request("b", 9, 20)]
    decoding(s, *requests)
    assert round_of(s) == [("a", 1), ("b", 1)]
    for request in requests:
        request.cached += 1
        request.ahead += 1
    plan = s.plan()
    assert plan.work == [] and plan.evicted == []
    for request in requests:
        request.ahead = 0
        request.inputs.append(0)
        request.outputs.append(0)
    plan = s.plan()
    assert names(plan.evicted) == "b" and [(r.job, n) for r, n in plan.work] == [("a", 1)]

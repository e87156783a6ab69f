"""Blocks and schedules, checked by a model of the cache: what a step reads through the tables is what was written."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baichuan.config import SamplingConfig
from baichuan.generation.blocks import BlockPool, names_of
from baichuan.generation.requests import Request
from baichuan.generation.scheduler import Budget, Job, Scheduler
from baichuan.generation.tables import BlockTables

END = 5  # a token that ends a sequence
ROWS = 6


def next_token(tokens, row=0):
    """The model of these tests: the next token depends on every token so far."""
    state = row
    for token in tokens:
        state = (state * 31 + token + 1) % 1009
    return state % (END + 1)


def next_parents(rows):
    """The beam search of these tests: which rows go on depends on every row."""
    return [next_token(tokens, row) % len(rows) for row, tokens in enumerate(rows)]


def reference(request: Request) -> list[list[int]]:
    """The rows that a request ends with, computed alone and with no cache."""
    rows, width = [list(request.prompt)], request.sampling.num_beams
    for step in range(request.max_new_tokens):
        if width > 1:
            parents = next_parents(rows) if step else [0] * width
            rows = [[*rows[parent], next_token(rows[parent], row)] for row, parent in enumerate(parents)]
        else:
            rows[0].append(next_token(rows[0]))
            if rows[0][-1] == END:
                break
    return rows


@dataclass
class Model:
    """A scheduler with a cache of plain lists.  The host knows the tokens `lag` steps late, as of a GPU."""

    scheduler: Scheduler
    lag: int
    cache: dict[int, list] = field(default_factory=dict)
    rows: dict[Job, list[list[int]]] = field(default_factory=dict)  # every row's tokens, those unknown to the host too
    results: dict[int, list[list[int]]] = field(default_factory=dict)
    unread: list[list[tuple[Job, int]]] = field(default_factory=list)

    def step(self) -> bool:
        plan = self.scheduler.plan()
        for job in plan.admitted if plan else ():
            self.rows[job] = [list(job.ids)]
        for source, target in plan.copies if plan else ():
            self.cache[target] = list(self.block(source))
        chosen = []
        for piece in plan.pieces if plan else ():
            self.compute(piece.job, piece.start, piece.start + piece.length)
            if piece.chooses:
                chosen += self.choose(piece.job)
        self.unread.append(chosen)
        while len(self.unread) > (self.lag if plan else 0):
            for job, token in self.unread.pop(0):
                self.hear(job, token)
        return bool(plan)

    def block(self, number: int) -> list:
        return self.cache.setdefault(number, [None] * self.scheduler.pool.tokens_per_block)

    def compute(self, job: Job, start: int, end: int) -> None:
        pool, size = self.scheduler.pool, self.scheduler.pool.tokens_per_block
        assert len(job.tables.rows) == len(self.rows[job])
        for table, tokens in zip(job.tables.rows, self.rows[job], strict=True):
            assert end <= len(tokens), "a token is computed before it is chosen"
            for place in range(start, end):
                assert pool.references(table[place // size]) == 1, "a shared block is written"
                self.block(table[place // size])[place % size] = hash(tuple(tokens[: place + 1]))
        for table, tokens in zip(job.tables.rows, self.rows[job], strict=True):
            seen = [self.block(table[place // size])[place % size] for place in range(end)]
            expected = [hash(tuple(tokens[: place + 1])) for place in range(end)]  # keys depend on the past as well
            assert seen == expected, "the cache holds other tokens than the sequence"

    def choose(self, job: Job) -> list[tuple[Job, int]]:
        rows, request = self.rows[job], job.request
        width = request.sampling.num_beams
        if width == 1:
            rows[0].append(next_token(rows[0]))
            return [(job, rows[0][-1])]
        parents = next_parents(rows) if len(rows) > 1 else [0] * width
        self.rows[job] = [[*rows[parent], next_token(rows[parent], row)] for row, parent in enumerate(parents)]
        if len(self.rows[job][0]) == len(request.prompt) + request.max_new_tokens:
            self.end(job, self.rows[job])
        else:
            self.scheduler.fork(job, parents)
        return []

    def hear(self, job: Job, token: int) -> None:
        if job.request.key in self.results:
            return  # it has ended, or was cancelled, while the step ran
        self.scheduler.extend(job, token)
        if token == END or len(job.ids) == len(job.request.prompt) + job.request.max_new_tokens:
            self.end(job, [list(job.ids)])

    def end(self, job: Job, rows: list[list[int]]) -> None:
        self.results[job.request.key] = rows
        self.scheduler.finish(job)

    def cancel(self, key: int) -> None:
        jobs = (*self.scheduler.running, *self.scheduler.waiting)
        if job := next((job for job in jobs if job.request.key == key), None):
            self.end(job, [])


prompts = st.builds(
    lambda shared, own: (*[1, 2, 3, 4, 1, 2, 3, 4][:shared], *own),
    st.integers(0, 8),
    st.lists(st.integers(0, END - 1), min_size=1, max_size=9),
)
requests = st.builds(
    lambda prompt, beams, new: (prompt, beams, new), prompts, st.sampled_from([1, 1, 1, 2, 3]), st.integers(1, 12)
)
events = st.lists(st.one_of(requests, st.integers(0, 20), st.none()), min_size=1, max_size=40)


@settings(max_examples=300, deadline=None)
@given(
    events=events,
    size=st.sampled_from([1, 2, 4]),
    spare=st.integers(0, 12),
    tokens=st.integers(ROWS, 20),
    chunk=st.sampled_from([None, 1, 5]),
    lag=st.integers(0, 1),
    caching=st.booleans(),
)
def test_requests_end_as_alone_and_leave_nothing_behind(events, size, spare, tokens, chunk, lag, caching):
    """Whatever arrives, is cancelled or put back: the cache holds each row's own tokens and all blocks return."""
    blocks = 3 * -(-29 // size) // 2 + spare  # beams of the longest prompt do not always fit
    scheduler = Scheduler(BlockPool(blocks, size, caching), Budget(ROWS, tokens, chunk))
    model, added, cancelled = Model(scheduler, lag), [], set()
    for event in events:
        if event is None:
            model.step()
        elif isinstance(event, int):
            if event < len(added) and event not in model.results:
                model.cancel(event)
                cancelled.add(event)
        else:
            prompt, beams, new = event
            request = Request(len(added), prompt, SamplingConfig(num_beams=beams, eos_id=END), new)
            if scheduler.blocks_of(request) <= blocks:
                added.append(request)
                scheduler.add(request)
    for _ in range(3000):
        if not model.step() and not scheduler.unfinished:
            break
    assert not scheduler.unfinished
    for request in added:
        if request.key not in cancelled:
            assert model.results[request.key] == reference(request)
    assert scheduler.pool.free == blocks, "a block is lost"
    assert sorted(scheduler._slots) == list(range(ROWS)), "a slot is lost"


def request(key, prompt, new=4, **sampling):
    return Request(key, tuple(prompt), SamplingConfig(eos_id=END, **sampling), new)


def run(model, *requests):
    """Serve the requests to their ends, but no longer than 100 steps."""
    for each in requests:
        model.scheduler.add(each)
    for _ in range(100):
        if not model.step() and not model.scheduler.unfinished:
            break


def endless(key, new):
    """A request that does not end before `new` tokens."""
    prompts = ([key, 1, place] for place in range(100))
    return next(r for r in (request(key, p, new) for p in prompts) if len(reference(r)[0]) == 3 + new)


def test_equal_prefixes_share_full_blocks_and_the_oldest_are_overwritten():
    scheduler = Scheduler(BlockPool(4, 2), Budget(2, 100))
    model = Model(scheduler, lag=0)
    run(model, request(0, [1, 1, 2, 2, 3], 1))
    assert scheduler.shared_tokens == 0
    run(model, request(1, [1, 1, 2, 2, 4], 1))
    assert scheduler.shared_tokens == 4
    run(model, request(2, [1, 1, 2, 2], 1))
    assert scheduler.shared_tokens == 4 + 2, "the last token is always computed: its logits are wanted"
    run(model, request(3, [0, 0, 0, 0, 0, 0], 1))  # takes the empty blocks and the second of 1 1 | 2 2
    run(model, request(4, [1, 1, 2, 2, 3], 1))
    assert scheduler.shared_tokens == 6 + 2
    assert scheduler.pool.free == 4


def test_names_tell_whole_prefixes_apart():
    assert names_of([1, 2, 3, 4, 5], 2) == names_of([1, 2, 3, 4], 2) != names_of([9, 2, 3, 4], 2)
    assert names_of([1, 2, 3, 4], 2)[1] != names_of([9, 9, 3, 4], 2)[1], "a name depends on what comes before"
    assert names_of([1, 2, 3, 4, 5, 6], 2, names_of([1, 2], 2)) == names_of([1, 2, 3, 4, 5, 6], 2)


def test_beams_share_blocks_until_one_writes():
    pool = BlockPool(8, 4)
    tables = BlockTables(pool)
    tables.make_room(0, 6)
    first, last = tables.rows[0]
    tables.fork([0, 0, 0])
    assert (pool.references(first), pool.references(last), pool.free) == (3, 3, 6)
    assert tables.needed(6, 7) == 2
    copies = tables.make_room(6, 7)
    assert [source for source, _ in copies] == [last, last]
    assert len({row[1] for row in tables.rows}) == 3 and tables.rows[2][1] == last
    assert pool.free == 4 and tables.needed(7, 8) == 0 and tables.needed(8, 9) == 3
    tables.fork([1, 1, 1])
    assert pool.free == 6
    tables.release()
    assert pool.free == 8


def test_running_requests_never_wait_for_a_long_prompt():
    scheduler = Scheduler(BlockPool(100, 4), Budget(4, 50, chunk=8))
    first = scheduler.add(request(0, [1, 2, 3], 60))
    scheduler.plan()
    scheduler.add(request(1, [1] * 100))
    for step in range(1, 14):
        plan = scheduler.plan()
        assert plan.pieces[0].job is first and plan.pieces[0].decodes
        assert plan.pieces[1].length == (8 if step < 13 else 4)
        assert plan.pieces[1].chooses == (step == 13)


def test_without_a_chunk_running_requests_wait_until_no_prompt_is_left():
    scheduler = Scheduler(BlockPool(100, 4), Budget(4, 6))
    for key in range(3):
        scheduler.add(request(key, [1] * 5))
    counts = [[(piece.job.request.key, piece.length) for piece in scheduler.plan().pieces] for _ in range(4)]
    assert counts == [[(0, 5), (1, 1)], [(1, 4), (2, 2)], [(2, 3)], [(0, 1), (1, 1), (2, 1)]]


def test_the_youngest_gives_up_its_blocks_and_goes_on_later():
    scheduler = Scheduler(BlockPool(6, 2), Budget(2, 100, chunk=10))
    both, model = [endless(key, 8) for key in range(2)], Model(scheduler, lag=1)
    run(model, *both)
    assert scheduler.preemptions > 0
    assert [model.results[key] for key in range(2)] == [reference(each) for each in both]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("nothing is copied", "a shared block is written"),
        ("names ignore the past", "the cache holds other tokens"),
        ("nothing is released", "a block is lost"),
    ],
)
def test_the_model_notices_what_is_broken(monkeypatch, broken, message):
    """Negative control of the property above."""
    if broken == "nothing is copied":
        monkeypatch.setattr(BlockTables, "_written", lambda self, start: Counter())
    elif broken == "names ignore the past":
        import baichuan.generation.scheduler as module

        monkeypatch.setattr(
            module, "names_of", lambda ids, size, known=(): [bytes(ids[i : i + size]) for i in range(0, len(ids), size)]
        )
    else:
        monkeypatch.setattr(BlockPool, "release", lambda self, blocks: None)
    scheduler = Scheduler(BlockPool(40, 2), Budget(ROWS, 100, chunk=10))
    model, beams = Model(scheduler, lag=0), 2 if "copied" in broken else 1
    with pytest.raises(AssertionError, match=message):
        for key, prompt in enumerate(([1, 2, 3, 4, 1], [3, 4, 1, 2, 1])):
            run(model, request(key, prompt, 3, num_beams=beams))
        assert scheduler.pool.free == 40, "a block is lost"

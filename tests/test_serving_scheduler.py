"""Many requests at once: each answer is the one that its prompt gets alone, and nothing stays behind."""

from __future__ import annotations

import gc
import random
import threading
from itertools import pairwise
from types import SimpleNamespace

import psutil
import pytest
import torch
from family_models import FAMILIES, family_model
from serving_helpers import CONFIGS, alone, picture, random_request, read, shipped
from tiny_checkpoints import ANYRES, tiny_config, tiny_model, tiny_tokenizer, write_original
from tiny_stock import write_stock

from llava.inference import GenerationOptions, LoadedModel, LoadOptions, Turn, open_checkpoint
from llava.pruning import Method, prune, varlen
from llava.pruning.attention import attend_one
from llava.serving import (
    ClosingError,
    Failure,
    Limits,
    Piece,
    QueueFullError,
    Report,
    Request,
    RequestTimeoutError,
    Scheduler,
    WorkerDeadError,
)
from llava.serving.pool import Slab
from llava.serving.text import AnswerText
from llava.utils import UserError


def model_state(model) -> list:
    hooks = [(name, len(part._forward_pre_hooks), len(part._forward_hooks)) for name, part in model.named_modules()]
    return [hooks, "generate" in vars(model), model.config._attn_implementation]


def assert_empty(scheduler: Scheduler) -> None:
    load = scheduler.load
    assert (load.running, load.waiting, load.kv_used_bytes, load.kv_held_bytes) == (0, 0, 0, 0)


# -- equal to alone --------------------------------------------------------------------------------------------------


def test_300_requests_that_come_and_go_at_random_are_answered_as_alone():
    source = random.Random(0)
    kinds = [random_request(source, longest=8) for _ in range(60)]
    requests = [source.choice(kinds) for _ in range(300)]
    leaving = {number for number in range(300) if source.random() < 0.1}
    wrong, before = [], model_state(shipped().model)
    with Scheduler(shipped(), Limits(max_running=12, prefill_rows=400)) as scheduler:
        numbers = iter(range(300))
        lock = threading.Lock()

        def person() -> None:
            while True:
                with lock:
                    number = next(numbers, None)
                if number is None:
                    return
                events = scheduler.stream(scheduler.submit(requests[number]))
                if number in leaving:
                    next(events)
                    events.close()
                    continue
                answers[number] = read(events)

        answers: dict = {}
        people = [threading.Thread(target=person) for _ in range(16)]
        for one in people:
            one.start()
        for one in people:
            one.join()
        scheduler.close()
        assert_empty(scheduler)
    assert model_state(shipped().model) == before
    assert len(answers) == 300 - len(leaving)
    by_kind = {id(kind): alone(kind) for kind in kinds}
    for number, ((ids,), (text,), report) in answers.items():
        expected = by_kind[id(requests[number])]
        if (ids, text) != (expected.ids, expected.text) or report.kept_visual_tokens != expected.kept:
            wrong.append((number, text, expected.text))
        assert report.flops_saved == expected.flops_saved
    assert not wrong


@pytest.mark.parametrize(
    "given", CONFIGS[1:], ids=lambda config: "shipped" if config == "shipped" else config["method"]
)
def test_every_kind_of_config_beside_dense_ones(given):
    source = random.Random(1)
    requests = [random_request(source, 5, config) for config in (given, None, given)]
    with Scheduler(shipped()) as scheduler:
        tickets = [scheduler.submit(request) for request in requests]
        for request, ticket in zip(requests, tickets, strict=True):
            (ids,), _, report = read(scheduler.stream(ticket))
            expected = alone(request)
            assert ids == expected.ids
            assert report.trace.rows_per_layer == expected.rows_per_layer


class FamilyAsLoaded:
    """A tiny family's model with the few things the scheduler asks of a `LoadedModel`. Prompts are ready inputs."""

    def __init__(self, name: str) -> None:
        self.model = family_model(name)
        self.tokenizer = tiny_tokenizer()
        self.end_ids, self.stop_strings = [], []
        self.checkpoint = SimpleNamespace(context_len=512)
        self.shape = LoadedModel.shape.func(self)  # type: ignore[attr-defined]

    def inputs_for(self, prompts):
        (prompt,) = prompts
        return prompt.inputs


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name):
    family, model = FAMILIES[name], family_model(name)
    method = Method.from_any(
        {"method": "schedule", "shallow_mid_layer": 2, "select_layer": 4, "keep": 5, "exit_layer": 7}
    )
    prompts = [(5, "image", 6), (4, "image", 3, "image", 5), (9,), (2, "image", 8)]
    if family.has_video:
        prompts.append((3, "video", 4))
    requests = []
    for number, prompt in enumerate(prompts):
        inputs = family.inputs(prompt)
        rows = inputs["input_ids"].shape[1]
        as_prompt = SimpleNamespace(inputs=inputs, num_rows=rows, num_visual=0, question=None)
        requests.append(Request(as_prompt, method if number % 2 == 0 else None, GenerationOptions(9 - number)))
    with Scheduler(FamilyAsLoaded(name), Limits(prefill_rows=1)) as scheduler:
        tickets = [scheduler.submit(request) for request in requests]
        answers = [read(scheduler.stream(ticket))[0][0] for ticket in tickets]
    for request, answer in zip(requests, answers, strict=True):
        inputs = request.prompt.inputs
        with prune(model, request.config):
            alone = model.generate(**inputs, max_new_tokens=request.options.max_new_tokens, do_sample=False)
        assert list(answer) == alone[0, inputs["input_ids"].shape[1] :].tolist()


def test_a_stock_checkpoint_with_its_own_processor(tmp_path):
    checkpoint = open_checkpoint(write_stock(tmp_path / "stock"))
    model = LoadedModel(checkpoint, LoadOptions(device="cpu"))
    config = checkpoint.pruning_config({"method": "fastv", "layer": 2, "keep": 0.25})
    pictures = [checkpoint.read_picture(picture(number).image) for number in range(2)]
    turns = [
        [Turn("what is this", pictures[:1])],
        [Turn("what is this", said="a red cat"), Turn("is this blue", pictures)],
        [Turn("what is red")],
    ]
    requests = [
        Request(checkpoint.encode(each), pruned, GenerationOptions(max_new_tokens=7))
        for each in turns
        for pruned in (config, None)
    ]
    with Scheduler(model) as scheduler:
        tickets = [scheduler.submit(request) for request in requests]
        for request, ticket in zip(requests, tickets, strict=True):
            (ids,), _, _ = read(scheduler.stream(ticket))
            assert ids == model.answer(request.prompt, request.config, request.options).ids


def test_an_anyres_checkpoint_whose_pictures_have_different_numbers_of_tiles(tmp_path):
    folder = write_original(tmp_path / "tiny-v1.6", tiny_model(tiny_config(num_hidden_layers=8, **ANYRES)))
    checkpoint = open_checkpoint(folder)
    model = LoadedModel(checkpoint, LoadOptions(device="cpu"))
    configs = [
        None,
        {"method": "fastv", "layer": 2, "keep": 0.3},
        {"method": "divprune", "keep": 0.4},
        {"method": "vtw", "layer": 3},
    ]
    requests = []
    for number, config in enumerate(configs):
        sizes = [(30 + 25 * number, 40), (50, 90 - 20 * number)][: 1 + number % 2]
        pictures = [checkpoint.read_picture(picture(number).image.resize(size)) for size in sizes]
        prompt = checkpoint.encode([Turn("what is this red cat", pictures)])
        method = config and checkpoint.pruning_config(config)
        requests.append(Request(prompt, method, GenerationOptions(max_new_tokens=6)))
    assert len({request.prompt.num_visual for request in requests}) > 2
    with Scheduler(model) as scheduler:
        tickets = [scheduler.submit(request) for request in requests]
        for request, ticket in zip(requests, tickets, strict=True):
            (ids,), _, _ = read(scheduler.stream(ticket))
            assert ids == model.answer(request.prompt, request.config, request.options).ids


# -- drawing ---------------------------------------------------------------------------------------------------------


def sampled(seed: int | None, copies: int = 1) -> Request:
    prompt = shipped().checkpoint.encode([Turn("Describe the picture.", [picture(0)])])
    return Request(prompt, None, GenerationOptions(12, temperature=1.5, top_p=0.95), seed=seed, copies=copies)


def test_a_seed_draws_the_same_whoever_else_is_there():
    with Scheduler(shipped()) as scheduler:
        (first,), _, _ = read(scheduler.stream(scheduler.submit(sampled(7))))
        others = [scheduler.submit(random_request(random.Random(2))) for _ in range(5)]
        (second,), _, _ = read(scheduler.stream(scheduler.submit(sampled(7))))
        (third,), _, _ = read(scheduler.stream(scheduler.submit(sampled(8))))
        for ticket in others:
            read(scheduler.stream(ticket))
    assert first == second != third


def test_copies_share_a_prefill_and_are_drawn_apart():
    with Scheduler(shipped()) as scheduler:
        answers, _, report = read(scheduler.stream(scheduler.submit(sampled(7, copies=4))))
        (alone_ids,), _, _ = read(scheduler.stream(scheduler.submit(sampled(9))))
        scheduler.close()
        assert_empty(scheduler)
    assert len(answers) == 4 and len(set(answers)) > 1
    assert answers[2] == alone_ids  # seed + 2
    assert report.new_tokens == sum(map(len, answers))


def test_a_repetition_penalty_of_the_checkpoint_counts_as_alone(monkeypatch):
    monkeypatch.setattr(shipped().model.generation_config, "repetition_penalty", 1.7)
    source = random.Random(3)
    requests = [random_request(source) for _ in range(6)]
    with Scheduler(shipped()) as scheduler:
        tickets = [scheduler.submit(request) for request in requests]
        for request, ticket in zip(requests, tickets, strict=True):
            assert read(scheduler.stream(ticket))[0][0] == alone(request).ids


# -- text ------------------------------------------------------------------------------------------------------------


def answer_text(ids: list[int], stops: list[str], tokenizer) -> tuple[list[str], AnswerText]:
    text = AnswerText(tokenizer, stops)
    pieces = []
    for token in ids:
        pieces.append(text.push(token))
        if text.stopped:
            break
    return [*pieces, text.finish()], text


class Letters:
    """A tokenizer of single characters, and of one character in two halves."""

    def decode(self, ids, skip_special_tokens=True):
        text = "".join(chr(id) for id in ids).replace("\x01\x02", "é")
        return text.replace("\x01", "\ufffd").replace("\x02", "\ufffd")


@pytest.mark.parametrize(
    ("written", "stops", "expected", "stopped"),
    [
        ("  one two ", [], "one two", False),
        ("one STOP two", ["STOP"], "one", True),
        ("one STO two", ["STOP"], "one STO two", False),
        ("one ST", ["STOP"], "one ST", False),
        ("\n\none\n\ntwo", ["\n\n"], "", True),
        ("one\n\ntwo", ["two", "\n\n"], "one", True),
        ("caf\x01\x02 au lait", [], "café au lait", False),
        ("caf\x01", [], "caf\ufffd", False),
        ("aaab", ["aab"], "a", True),
        ("", ["x"], "", False),
    ],
)
def test_pieces_are_never_taken_back(written, stops, expected, stopped):
    pieces, text = answer_text([ord(char) for char in written], stops, Letters())
    assert "".join(pieces) == expected
    assert text.stopped is stopped


def test_text_in_pieces_is_the_text_decoded_at_once():
    tokenizer = shipped().tokenizer
    for words in ("A red circle, a blue square.", "two  spaces and\na line", "naïve café 🙂 日本語"):
        ids = tokenizer(words, add_special_tokens=False).input_ids
        pieces, _ = answer_text(ids, [], tokenizer)
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_stop_strings_end_an_answer_and_are_no_part_of_it():
    request = random_request(random.Random(5), longest=1)
    prompt = request.prompt
    with Scheduler(shipped()) as scheduler:
        _, (whole,), _ = read(scheduler.stream(scheduler.submit(Request(prompt, None, GenerationOptions(30)))))
        stop = whole[1:3]
        events = list(scheduler.stream(scheduler.submit(Request(prompt, None, GenerationOptions(30), stop=(stop,)))))
    assert "".join(event.text for event in events[:-1]) == whole.split(stop)[0].strip()
    assert events[-2].finish == "stop"


# -- memory ----------------------------------------------------------------------------------------------------------


def rows_of(value: float, count: int) -> torch.Tensor:
    return torch.full((2, count, 4), value)


def test_a_slab_keeps_rows_where_they_are_until_no_gap_is_large_enough():
    slab = Slab(torch.empty(1, 2, 0, 4))
    segments = [slab.take(rows_of(number, 10), rows_of(-number, 10), 300, 0, 1 << 30) for number in range(3)]
    places = [segment.start for segment in segments]
    slab.give_back(segments[1])
    again = slab.take(rows_of(7, 5), rows_of(-7, 5), 200, 0, 1 << 30)
    assert again.start == places[1] and segments[2].start == places[2]
    large = slab.take(rows_of(8, 900), rows_of(-8, 900), 1000, 0, 1 << 30)
    for segment, value in ((segments[0], 0), (again, 7), (segments[2], 2), (large, 8)):
        rows = slice(segment.start, segment.start + segment.filled)
        assert (slab.keys[rows] == value).all() and (slab.values[rows] == -value).all()
    assert slab.rows == 300 + 200 + 300 + 1000
    taken = sorted((segment.start, segment.start + segment.room) for segment in slab.segments)
    assert all(end <= start for (_, end), (start, _) in pairwise(taken))


def test_a_slab_moves_a_row_a_bounded_number_of_times():
    slab, sizes = Slab(torch.empty(1, 2, 0, 4)), set()
    for _ in range(200):
        slab.take(rows_of(1, 10), rows_of(1, 10), 100, 0, 1 << 30)
        sizes.add(len(slab.keys))
    assert len(sizes) <= 6
    tight = Slab(torch.empty(1, 2, 0, 4))
    for _ in range(20):
        tight.take(rows_of(1, 10), rows_of(1, 10), 100, 0, 0)
    assert len(tight.keys) == 2000  # without permission it grows by what it needs


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch's variable-length kernel needs a GPU")
def test_the_ragged_kernel_takes_segments_in_any_order():
    lengths, starts = [5, 130, 1, 40], [600, 10, 400, 200]
    query = torch.randn(4, 8, 1, 64, device="cuda", dtype=torch.bfloat16)
    keys, values = (torch.randn(700, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    offsets = torch.tensor([*starts, starts[-1] + lengths[-1]], dtype=torch.int32, device="cuda")
    used = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    segments = varlen.Segments(offsets, max(lengths))
    together = varlen.attend_last(query, keys.transpose(0, 1), values.transpose(0, 1), segments, used, 0.125)
    for number, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        own = (part[start : start + length].transpose(0, 1)[None] for part in (keys, values))
        alone = attend_one(query[number : number + 1], *own, 0.125)
        torch.testing.assert_close(together[number, 0], alone[0, :, 0], atol=2e-2, rtol=2e-2)


def test_requests_wait_for_memory_and_all_are_answered():
    source = random.Random(6)
    requests = [random_request(source, longest=8) for _ in range(12)]
    per_row = 2 * shipped().model.config.num_key_value_heads * shipped().model.config.hidden_size
    per_row *= 4 * shipped().model.config.num_hidden_layers // shipped().model.config.num_attention_heads
    budget = int(2.2 * per_row * max(request.prompt.num_rows + 8 for request in requests))
    used = []
    with Scheduler(shipped(), Limits(kv_bytes=budget)) as scheduler:
        engine, plain = scheduler._engine, scheduler._engine.step

        def step(answers):
            used.append((len(answers), engine.pool.used_bytes))
            return plain(answers)

        engine.step = step
        tickets = [scheduler.submit(request) for request in requests]
        for request, ticket in zip(requests, tickets, strict=True):
            assert read(scheduler.stream(ticket))[0][0] == alone(request).ids
        scheduler.close()
        assert_empty(scheduler)
    assert max(bytes for _, bytes in used) <= budget
    assert max(answers for answers, _ in used) > 1


def test_what_can_never_fit_is_refused_with_both_numbers():
    request = random_request(random.Random(7), longest=1)
    with Scheduler(shipped(), Limits(kv_bytes=1000)) as scheduler:
        with pytest.raises(UserError, match=r"needs at least .* MiB"):
            scheduler.submit(request)
        assert_empty(scheduler)


def test_what_turns_out_not_to_fit_fails_alone():
    prompt = shipped().checkpoint.encode([Turn("What is this?", [picture(0), picture(1)])])
    leave = Method.from_any({"method": "vtw", "layer": 1})
    dense, small = (Request(prompt, config, GenerationOptions(4)) for config in (None, leave))
    layers, width = shipped().model.config.num_hidden_layers, shipped().model.config.hidden_size
    kv_heads, heads = shipped().model.config.num_key_value_heads, shipped().model.config.num_attention_heads
    text = prompt.num_rows - prompt.num_visual
    budget = 2 * 4 * width * kv_heads // heads * (layers * (text + 4) + 2 * prompt.num_visual)
    with Scheduler(shipped(), Limits(kv_bytes=budget)) as scheduler:
        tickets = [scheduler.submit(request) for request in (small, dense, small)]
        assert read(scheduler.stream(tickets[0]))[0][0] == alone(small).ids
        with pytest.raises(UserError, match="prune more"):
            read(scheduler.stream(tickets[1]))
        assert read(scheduler.stream(tickets[2]))[0][0] == alone(small).ids
        scheduler.close()
        assert_empty(scheduler)


@pytest.mark.slow
def test_memory_does_not_grow_over_1000_requests():
    source, process = random.Random(8), psutil.Process()
    sizes = []
    with Scheduler(shipped(), Limits(max_running=16)) as scheduler:
        for _ in range(10):
            tickets = [scheduler.submit(random_request(source, longest=16)) for _ in range(100)]
            for ticket in tickets:
                read(scheduler.stream(ticket))
            del tickets
            gc.collect()
            sizes.append(process.memory_info().rss)
        scheduler.close()
        assert_empty(scheduler)
    # The first rounds fill caches of torch's and of the allocator.
    assert sizes[-1] < sizes[2] + 32 * 2**20, [size >> 20 for size in sizes]


# -- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.fixture
def long_request() -> Request:
    return Request(random_request(random.Random(9), config=None).prompt, None, GenerationOptions(200))


@pytest.fixture
def endless(monkeypatch):
    """Answers that only their limits end."""
    monkeypatch.setattr(shipped(), "end_ids", [])
    monkeypatch.setattr(shipped(), "stop_strings", [])


def test_an_error_in_one_prompt_of_a_prefill_fails_that_request_alone(monkeypatch):
    source = random.Random(10)
    requests = [random_request(source) for _ in range(6)]
    expected = [alone(request).ids for request in requests]
    plain = shipped().inputs_for

    def inputs_for(prompts):
        if any(prompt is requests[2].prompt for prompt in prompts):
            raise RuntimeError("no such picture")
        return plain(prompts)

    monkeypatch.setattr(shipped(), "inputs_for", inputs_for)
    with Scheduler(shipped()) as scheduler:
        tickets = [scheduler.submit(request) for request in requests]
        for number, ticket in enumerate(tickets):
            if number == 2:
                with pytest.raises(RuntimeError, match="no such picture"):
                    read(scheduler.stream(ticket))
            else:
                assert read(scheduler.stream(ticket))[0][0] == expected[number]
                assert scheduler.load.is_alive
        scheduler.close()
        assert_empty(scheduler)


def test_an_error_in_one_answer_of_a_step_fails_that_request_alone(endless):
    source = random.Random(11)
    requests = [Request(random_request(source).prompt, None, GenerationOptions(10)) for _ in range(5)]
    with Scheduler(shipped()) as scheduler:
        engine, plain = scheduler._engine, scheduler._engine.step

        def step(answers):
            if any(answer.request is requests[3] and len(answer.ids) == 4 for answer in answers):
                raise RuntimeError("NaN")
            return plain(answers)

        engine.step = step
        tickets = [scheduler.submit(request) for request in requests]
        for number, ticket in enumerate(tickets):
            if number == 3:
                with pytest.raises(RuntimeError, match="NaN"):
                    read(scheduler.stream(ticket))
            else:
                expected = alone(requests[number]).ids  # which its end token may end
                assert read(scheduler.stream(ticket))[0][0][: len(expected)] == expected
        scheduler.close()
        assert_empty(scheduler)


def test_a_listener_that_fails_ends_its_request_alone(long_request):
    def listener(event) -> None:
        raise RuntimeError("event loop is closed")

    with Scheduler(shipped()) as scheduler:
        ticket = scheduler.submit(long_request, listener)
        request = random_request(random.Random(12))
        assert read(scheduler.stream(scheduler.submit(request)))[0][0] == alone(request).ids
        scheduler.close()
        assert ticket.is_cancelled
        assert_empty(scheduler)


def test_time_limits(endless, long_request):
    late = Request(long_request.prompt, None, GenerationOptions(100_000), timeout=0.05)
    with Scheduler(shipped(), Limits(max_running=1)) as scheduler:
        tickets = [scheduler.submit(late) for _ in range(3)]  # one runs, the others wait
        for ticket in tickets:
            with pytest.raises(RequestTimeoutError, match=r"within 0\.05 seconds"):
                read(scheduler.stream(ticket))
        scheduler.close()
        assert_empty(scheduler)


def test_a_full_queue_and_too_many_answers_are_refused(endless, long_request):
    with Scheduler(shipped(), Limits(max_running=1, max_waiting=2)) as scheduler:
        running = scheduler.submit(long_request)
        events = scheduler.stream(running)
        next(events)
        waiting = [scheduler.submit(long_request) for _ in range(2)]
        with pytest.raises(QueueFullError, match="2 requests are waiting"):
            scheduler.submit(long_request)
        with pytest.raises(UserError, match="2 answers were asked for at once; 1 may run"):
            scheduler.submit(Request(long_request.prompt, copies=2))
        for ticket in (running, *waiting):
            scheduler.cancel(ticket)
        scheduler.close()
        assert_empty(scheduler)


def test_closing_lets_running_answers_end_and_refuses_waiting_ones(endless, long_request):
    scheduler = Scheduler(shipped(), Limits(max_running=1))
    running = scheduler.submit(long_request)
    events = scheduler.stream(running)
    next(events)
    waiting = scheduler.submit(long_request)
    scheduler.drain()
    with pytest.raises(ClosingError):
        scheduler.submit(long_request)
    assert isinstance(list(events)[-1], Report)
    with pytest.raises(ClosingError, match="not begun"):
        read(scheduler.stream(waiting))
    scheduler.close()
    assert_empty(scheduler)
    assert not scheduler.load.is_alive


def test_closing_with_a_time_limit_cancels_what_takes_longer(endless, long_request):
    scheduler = Scheduler(shipped())
    ticket = scheduler.submit(Request(long_request.prompt, None, GenerationOptions(100_000)))
    events = scheduler.stream(ticket)
    next(events)
    scheduler.close(timeout=0.01)
    with pytest.raises(ClosingError, match="not ready"):
        list(events)
    assert_empty(scheduler)


def test_the_end_of_the_thread_is_told_to_everybody(monkeypatch, long_request, endless):
    scheduler = Scheduler(shipped(), Limits(max_running=1))
    running, waiting = scheduler.submit(long_request), scheduler.submit(long_request)
    next(scheduler.stream(running))
    monkeypatch.setattr(scheduler, "_turn", lambda: (_ for _ in ()).throw(SystemError("bad")))
    with pytest.raises(WorkerDeadError):
        read(scheduler.stream(waiting))
    scheduler._thread.join()
    assert not scheduler.load.is_alive
    with pytest.raises(WorkerDeadError):
        scheduler.submit(long_request)
    assert_empty(scheduler)
    assert model_state(shipped().model)[1] is False
    shipped().answer(long_request.prompt, None, GenerationOptions(1))  # the model is free again


@pytest.mark.skipif(not hasattr(torch, "AcceleratorError"), reason="this torch does not tell errors of a device")
@pytest.mark.parametrize("call", ["prefill", "step"])
def test_a_lost_device_ends_the_thread(monkeypatch, endless, long_request, call):
    def lost(*args):
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    with Scheduler(shipped(), Limits(max_running=2)) as scheduler:
        monkeypatch.setattr(scheduler._engine, call, lost)
        with scheduler._condition:  # all of them are there before the thread sees the first
            tickets = [scheduler.submit(long_request) for _ in range(4)]
        for ticket in tickets:
            with pytest.raises(WorkerDeadError):
                read(scheduler.stream(ticket))
        scheduler._thread.join()
        assert not scheduler.load.is_alive
        assert_empty(scheduler)


def test_others_may_use_the_model_between_requests():
    request = random_request(random.Random(13))
    with Scheduler(shipped()) as scheduler:
        read(scheduler.stream(scheduler.submit(request)))
        expected = alone(request)
        assert read(scheduler.stream(scheduler.submit(request)))[0][0] == expected.ids


def test_bad_limits_and_requests_are_refused():
    with pytest.raises(UserError, match="prefill_rows is 0"):
        Limits(prefill_rows=0)
    prompt = random_request(random.Random(14)).prompt
    with pytest.raises(UserError, match="num_beams is 2"):
        Request(prompt, options=GenerationOptions(num_beams=2))
    with pytest.raises(UserError, match="copies is 0"):
        Request(prompt, copies=0)


def test_a_prefill_batch_holds_no_more_rows_than_its_budget(monkeypatch):
    source = random.Random(15)
    requests = [random_request(source) for _ in range(20)]
    batches = []
    with Scheduler(shipped(), Limits(prefill_rows=300)) as scheduler:
        plain = scheduler._engine.prefill

        def prefill(batch):
            batches.append([request.prompt.num_rows for request in batch])
            return plain(batch)

        scheduler._engine.prefill = prefill
        for ticket in [scheduler.submit(request) for request in requests]:
            read(scheduler.stream(ticket))
    assert sum(map(len, batches)) == len(requests)
    assert all(len(batch) == 1 or sum(batch) <= 300 for batch in batches)
    assert any(len(batch) > 1 for batch in batches)


def test_a_running_answer_waits_for_no_more_than_one_prefill_batch(endless):
    source = random.Random(16)
    calls = []
    with Scheduler(shipped(), Limits(prefill_rows=1)) as scheduler:
        engine = scheduler._engine
        prefill, step = engine.prefill, engine.step
        engine.prefill = lambda requests: calls.append("prefill") or prefill(requests)
        engine.step = lambda answers: calls.append("step") or step(answers)
        prompts = [random_request(source, config=None).prompt for _ in range(6)]
        tickets = [scheduler.submit(Request(prompt, None, GenerationOptions(8))) for prompt in prompts]
        for ticket in tickets:
            read(scheduler.stream(ticket))
    assert calls.count("prefill") == 6
    assert ("prefill", "prefill") not in set(pairwise(calls))


def test_pieces_and_failures_are_what_a_listener_gets(long_request, endless):
    got: list = []
    over = threading.Event()

    def listener(event) -> None:
        got.append(event)
        if not isinstance(event, Piece):
            over.set()

    with Scheduler(shipped()) as scheduler:
        scheduler.submit(Request(long_request.prompt, None, GenerationOptions(3)), listener)
        assert over.wait(500)
    assert [type(event) for event in got] == [Piece, Piece, Piece, Report]
    assert not any(isinstance(event, Failure) for event in got)

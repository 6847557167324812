"""The engine: requests that join and leave, cancelled ones, shared prefixes, mounted states, pieces, other threads."""

import asyncio
import copy
import threading
import time
from pathlib import Path

import pytest
import torch

from rookery.adapters import AdapterConfig, adapter_tensors, attach
from rookery.errors import UserError
from rookery.formats import AdapterFile, load, write_pth
from rookery.infer import (
    Busy,
    Closed,
    Engine,
    Handle,
    PackedForm,
    PlainForm,
    Request,
    Sampling,
    form_of,
    generate,
    read,
)
from rookery.models import State

GREEDY = Sampling(temperature=0, alpha_presence=0, alpha_frequency=0, max_tokens=24)


def with_(sampling: Sampling, **changes) -> Sampling:
    return Sampling(**{**vars(sampling), **changes})


def finish(engine: Engine, *handles: Handle) -> list:
    """Turn the engine until all these have ended."""
    while not all(handle.finish for handle in handles):
        assert engine.turn()
    return [handle.result() for handle in handles]


def ids(answer) -> list[int]:
    return [token.id for token in answer.tokens]


def alone(model, world, prompt, sampling=GREEDY, state=None) -> list[int]:
    generation = generate(form_of(model), world, prompt, sampling, state)
    "".join(generation)
    return generation.sequence.tokens


PROMPTS = [
    "Hi",
    "User: 三加四=?\n\nAssistant:",
    "Hello world",
    "a",
    "b",
    "User: x+1=2, x=?\n\nAssistant:",
    "zz top" * 60,
]


@pytest.mark.parametrize("form", [PlainForm, PackedForm, form_of])
def test_requests_that_join_at_any_time_get_the_answer_they_get_alone(model, world, form) -> None:
    """The likeliest token is ahead of the next by far more than rounding here, so it holds for every form; the packed
    one gives the same bits (test_forms)."""
    prompts = [world.encode(text) for text in PROMPTS]
    expected = [alone(model, world, prompt) for prompt in prompts]
    engine = Engine(model, world, form=form(model), slots=3)
    handles = []
    for prompt in prompts:
        handles.append(engine.submit(Request(prompt, GREEDY)))
        engine.turn()
        engine.turn()
    answers = finish(engine, *handles)
    assert [ids(answer) for answer in answers] == expected
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.text == world.decode_bytes(ids(answer)).decode("utf-8", "replace")
        assert answer.finish == "length"
        assert (answer.usage.prompt, answer.usage.completion) == (len(prompt), 24)
    assert engine.load.active == engine.load.waiting == 0
    assert engine.load.completion_tokens == 24 * len(prompts)


def test_no_answer_waits_for_a_long_prompt(model, world) -> None:
    """Between two of its tokens no more of a long prompt is read than a piece."""
    engine = Engine(model, world)
    first = engine.submit(Request(world.encode("Hi"), with_(GREEDY, max_tokens=1000)))
    engine.turn()
    long = engine.submit(Request(world.encode("one two three " * 300), with_(GREEDY, max_tokens=1)))
    turns = 0
    while not long.finish:
        engine.turn()
        turns += 1
    assert turns >= len(long.request.prompt) / 64
    assert len(list_now(first)) >= turns / 2
    short = engine.submit(Request(world.encode("x"), with_(GREEDY, max_tokens=1)))
    engine.turn()
    assert short.finish == "length"


def list_now(handle: Handle) -> list:
    """The pieces that are there already."""
    handle.end("cancelled")
    return list(handle)


def test_a_short_prompt_does_not_wait_for_a_long_one_before_it(model, world) -> None:
    engine = Engine(model, world)
    long = engine.submit(Request(world.encode("one two three " * 2000), GREEDY))
    short = engine.submit(Request(world.encode("x"), with_(GREEDY, max_tokens=1)))
    engine.turn()
    engine.turn()
    assert short.finish
    assert not long.finish


def test_a_cancelled_request_frees_its_slot(model, world) -> None:
    engine = Engine(model, world, slots=1)
    running, waiting, last = (engine.submit(Request(world.encode(text), GREEDY)) for text in "abc")
    for _turn in range(5):
        engine.turn()
    assert not waiting.finish
    running.cancel()
    waiting.cancel()
    [answer] = finish(engine, last)
    assert running.finish == waiting.finish == "cancelled"
    assert ids(answer) == alone(model, world, world.encode("c"))
    for piece in running:
        assert piece.tokens


def test_a_full_queue_refuses_and_accepts_again(model, world) -> None:
    engine = Engine(model, world, slots=1, waiting=2)
    handles = [engine.submit(Request(world.encode("a"), GREEDY)) for _n in range(3)]
    with pytest.raises(Busy):
        engine.submit(Request(world.encode("a"), GREEDY))
    engine.turn()
    handles[1].cancel()
    engine.turn()
    handles.append(engine.submit(Request(world.encode("a"), GREEDY)))
    finish(engine, *handles)


def test_shared_beginnings_are_read_once(model, world) -> None:
    engine = Engine(model, world)
    system = world.encode("System: You are a helpful assistant who answers in short sentences, politely.\n\n")
    prompts = [system + world.encode(f"User: {text}\n\nAssistant:") for text in ("one", "two", "three")]
    answers = [finish(engine, engine.submit(Request(prompt, GREEDY)))[0] for prompt in prompts]
    shared = next(i for i, (a, b) in enumerate(zip(prompts[0], prompts[1], strict=False)) if a != b)
    # The second parts from the first there, the third finds what the second left.
    assert [answer.usage.cached for answer in answers] == [0, 0, shared]
    for prompt, answer in zip(prompts, answers, strict=True):
        assert ids(answer) == alone(model, world, prompt)
    # A conversation goes on from where its last answer ended.
    longer = prompts[0] + ids(answers[0]) + world.encode("\n\nUser: go on\n\nAssistant:")
    [answer] = finish(engine, engine.submit(Request(longer, GREEDY)))
    assert answer.usage.cached == len(prompts[0]) + 23
    assert ids(answer) == alone(model, world, longer)
    [fresh] = finish(engine, engine.submit(Request(longer, GREEDY, reuse=False)))
    assert fresh.usage.cached == 0
    assert ids(fresh) == ids(answer)


def test_the_cache_keeps_within_its_bytes_and_drops_the_oldest(model, world) -> None:
    size = Engine(model, world)
    finish(size, size.submit(Request(world.encode("a b c d"), with_(GREEDY, max_tokens=1))))
    each = size.load.cache_bytes
    engine = Engine(model, world, cache_bytes=3 * each + each // 2)
    prompts = [world.encode(f"{word} b c d") for word in ("a", "e", "i", "o", "u")]
    for prompt in prompts:
        finish(engine, engine.submit(Request(prompt, with_(GREEDY, max_tokens=1))))
        assert engine.load.cache_bytes <= 3 * each + each // 2
    assert engine.load.cache_entries == 3
    cached = []
    for prompt in prompts[::-1]:
        [answer] = finish(engine, engine.submit(Request([*prompt, 300], with_(GREEDY, max_tokens=1), reuse=True)))
        cached.append(answer.usage.cached)
    assert cached[:2] == [len(prompts[4]), len(prompts[3])]
    assert cached[-1] == 0


def random_state(model, seed) -> State:
    state = State.zeros(model.shape, 1, "cpu", torch.float32)
    state.wkv = torch.randn(state.wkv.shape, generator=torch.Generator().manual_seed(seed))
    return state


def test_each_request_starts_from_its_state(model, world) -> None:
    prompt = world.encode("a long enough prompt that would be shared if it were not for the state")
    states = {name: random_state(model, seed) for seed, name in enumerate(("poet", "clerk"))}
    engine = Engine(model, world)
    for name, state in states.items():
        engine.mount_state(name, state)
    assert engine.states == ["clerk", "poet"]
    handles = [engine.submit(Request(prompt, GREEDY, state=name)) for name in ("", "poet", "clerk", "poet")]
    answers = finish(engine, *handles)
    expected = [alone(model, world, prompt, state=state) for state in (None, *states.values())]
    assert [ids(answer) for answer in answers] == [*expected, expected[1]]
    assert len({tuple(e) for e in expected}) == 3
    # Another state under the same name does not find what the old one left in the cache.
    engine.mount_state("poet", states["clerk"])
    [answer] = finish(engine, engine.submit(Request(prompt, GREEDY, state="poet")))
    assert ids(answer) == expected[2]
    engine.unmount_state("poet")
    with pytest.raises(UserError, match="No state called poet"):
        engine.submit(Request(prompt, GREEDY, state="poet"))
    with pytest.raises(UserError, match="No state called poet"):
        engine.unmount_state("poet")


def adapter_file(model, seed: int) -> AdapterFile:
    """A trained-looking LoRA for `model`."""
    config = AdapterConfig("lora", r=4, alpha=8)
    trained = copy.deepcopy(model)
    attach(trained, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.5, generator=generator)
    return AdapterFile(Path("trained.safetensors"), config, adapter_tensors(trained))


@pytest.mark.parametrize("form", [PlainForm, PackedForm, form_of])
def test_each_request_is_answered_with_its_adapter(model, world, form) -> None:
    model = copy.deepcopy(model)
    prompt = world.encode("a long enough prompt that would be shared if it were not for the adapter")
    files = {name: adapter_file(model, seed) for seed, name in enumerate(("poet", "clerk"), 1)}
    expected = {"": alone(model, world, prompt)}
    for name, file in files.items():
        changed = copy.deepcopy(model)
        attach(changed, file.config, tensors=file.tensors)
        expected[name] = alone(changed, world, prompt)
    assert len({tuple(tokens) for tokens in expected.values()}) == 3

    with Engine(model, world, form=form(model)) as engine:
        for name, file in files.items():
            engine.mount_adapter(name, file)
        assert engine.adapters == ["clerk", "poet"]
        order = ["poet", "", "clerk", "poet", "", "clerk"]
        handles = [engine.submit(Request(prompt, GREEDY, adapter=name)) for name in order]
        assert [ids(handle.result()) for handle in handles] == [expected[name] for name in order]
        # What is unmounted is used to the end by those that use it; one of that name has nothing of it.
        handle = engine.submit(Request(prompt, GREEDY, adapter="poet"))
        engine.unmount_adapter("poet")
        with pytest.raises(UserError, match="No adapter called poet"):
            engine.submit(Request(prompt, GREEDY, adapter="poet"))
        engine.mount_adapter("poet", files["clerk"])
        assert ids(engine.submit(Request(prompt, GREEDY, adapter="poet")).result()) == expected["clerk"]
        assert ids(handle.result()) == expected["poet"]
        engine.unmount_adapter("poet")
        engine.unmount_adapter("clerk")
        wait_until(lambda: not any(".adapters." in name for name, _parameter in model.named_parameters()))


def test_a_mounted_adapter_answers_as_one_loaded_with_a_bf16_model(model, world, tmp_path) -> None:
    """To the bit: neither is rounded before it meets the weights."""
    file, prompt = adapter_file(model, 1), world.encode("Hello")
    write_pth(tmp_path / "model.pth", {name: tensor.bfloat16() for name, tensor in model.state_dict().items()})
    together = load(tmp_path / "model.pth", device="cpu", dtype=torch.bfloat16, adapter=file)
    base = load(tmp_path / "model.pth", device="cpu", dtype=torch.bfloat16)
    engine = Engine(base, world)
    engine.mount_adapter("poet", file)
    [mounted] = finish(engine, engine.submit(Request(prompt, GREEDY, adapter="poet", logprobs=5)))
    loaded = Engine(together, world)
    [whole] = finish(loaded, loaded.submit(Request(prompt, GREEDY, logprobs=5)))
    assert mounted.tokens == whole.tokens


def test_an_adapter_of_another_model_is_refused(model, world) -> None:
    file = adapter_file(model, 1)
    wrong = {name: tensor[:-1] for name, tensor in file.tensors.items()}
    with Engine(model, world) as engine:
        with pytest.raises(UserError, match="adapter"):
            engine.mount_adapter("wrong", AdapterFile(file.path, file.config, wrong))
        assert engine.adapters == []
        assert engine.submit(Request([5], GREEDY)).result().finish == "length"


def test_a_request_goes_on_from_a_state_given(model, world) -> None:
    _logits, state = read(model, [world.encode("What came before. ")])
    engine = Engine(model, world)
    before = state.wkv.clone()
    [answer] = finish(engine, engine.submit(Request(world.encode("And now"), GREEDY, state=state)))
    assert ids(answer) == alone(model, world, world.encode("And now"), state=state)
    assert torch.equal(state.wkv, before)


def test_seeds_reproduce_beside_others(model, world) -> None:
    sampling = Sampling(temperature=1.5, top_p=0.9, seed=7, max_tokens=12)
    prompt = world.encode("Hi")
    engine = Engine(model, world)
    handles = [engine.submit(Request(prompt, with_(sampling, seed=seed))) for seed in (7, 8, 7, None)]
    answers = [ids(answer) for answer in finish(engine, *handles)]
    assert answers[0] == answers[2] != answers[1]
    assert answers[0] == alone(model, world, prompt, sampling)


def test_pieces_carry_their_tokens_and_log_probabilities(model, world) -> None:
    prompt = world.encode("Hello")
    free = alone(model, world, prompt)
    text = world.decode_bytes(free).decode("utf-8", "replace")
    stop = text[10:12]
    engine = Engine(model, world)
    request = Request(prompt, with_(GREEDY, stop=(stop,)), logprobs=3)
    [answer] = finish(engine, engine.submit(request))
    assert answer.finish == "stop"
    assert answer.text == text.partition(stop)[0]
    data = b"".join(token.data for token in answer.tokens)
    assert data.decode("utf-8", "replace").startswith(answer.text)
    assert ids(answer) == free[: len(answer.tokens)]
    last = answer.tokens[-1].data
    assert len(data) - len(last) < len(answer.text.encode()), "no token that only served the stop text"
    tokens = prompt + free
    with torch.inference_mode():
        logprobs = model(torch.tensor([tokens]))[0][0].log_softmax(-1)
    for i, token in enumerate(answer.tokens):
        row = logprobs[len(prompt) + i - 1]
        assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-4)
        assert len(token.top) == 3
        assert token.top[0] == (token.id, pytest.approx(token.logprob))
        assert [value for _id, value in token.top] == sorted((v for _i, v in token.top), reverse=True)


def test_the_tokens_of_all_pieces_are_the_answer(model, world) -> None:
    engine = Engine(model, world)
    for seed in range(4):
        sampling = Sampling(temperature=3.0, top_p=1.0, seed=seed, max_tokens=30, stop=("\n\n", "zebra"))
        handle = engine.submit(Request(world.encode("Hello"), sampling))
        [answer] = finish(engine, handle)
        expected = alone(model, world, world.encode("Hello"), sampling)
        if answer.finish == "stop":
            expected = expected[: len(answer.tokens)]
            assert len(world.decode_bytes(expected[:-1]).decode("utf-8", "replace")) < len(answer.text)
        assert ids(answer) == expected
        assert answer.text == world.decode_bytes(expected).decode("utf-8", "replace")[: len(answer.text)]


def test_a_bias_and_min_p_are_obeyed(model, world) -> None:
    engine = Engine(model, world)
    biased = with_(GREEDY, logit_bias=((300, 1000.0),), max_tokens=3)
    narrow = Sampling(temperature=5.0, top_p=1.0, min_p=1.0, alpha_presence=0, alpha_frequency=0, max_tokens=24)
    prompt = world.encode("Hello")
    one, two = finish(engine, engine.submit(Request(prompt, biased)), engine.submit(Request(prompt, narrow)))
    assert ids(one) == [300] * 3
    assert ids(two) == alone(model, world, prompt)


def test_embeddings_are_mean_vectors_of_length_one(model, world) -> None:
    engine = Engine(model, world)
    texts = ["Hello", "one two three " * 200]
    handles = [engine.submit(Request(world.encode(text), embed=True)) for text in texts]
    finish(engine, *handles)
    for text, handle in zip(texts, handles, strict=True):
        with torch.inference_mode():
            mean = model.hidden(torch.tensor([world.encode(text)]))[0][0].mean(0)
        expected = mean / mean.norm()
        torch.testing.assert_close(torch.tensor(handle.embedding), expected, rtol=1e-4, atol=1e-5)
        assert handle.usage.completion == 0


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([]), "no tokens"),
        (Request([65536]), "outside the vocabulary"),
        (Request([1], Sampling(logit_bias=((-1, 1.0),))), "outside the vocabulary"),
        (Request([1], adapter="absent"), "No adapter called absent"),
        (Request([1], state=State(torch.zeros(1), torch.zeros(1), torch.zeros(1))), "another model"),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(model, world, request_, message) -> None:
    with pytest.raises(UserError, match=message):
        Engine(model, world).submit(request_)


def test_threads_and_an_event_loop_share_an_engine(model, world) -> None:
    prompts = [world.encode(text) for text in PROMPTS[:6]]
    expected = [alone(model, world, prompt) for prompt in prompts]

    async def one(engine, prompt) -> list[int]:
        return [token.id async for piece in engine.submit(Request(prompt, GREEDY)) for token in piece.tokens]

    async def all_of_them(engine) -> list:
        return await asyncio.gather(*(one(engine, prompt) for prompt in prompts))

    with Engine(model, world, slots=4) as engine:
        got: dict[int, list[int]] = {}

        def ask(i: int) -> None:
            got[i] = ids(engine.submit(Request(prompts[i], GREEDY)).result())

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        assert asyncio.run(all_of_them(engine)) == expected
        for thread in threads:
            thread.join()
        assert [got[i] for i in range(6)] == expected


def test_leaving_a_loop_early_cancels(model, world) -> None:
    endless = with_(GREEDY, max_tokens=10**6)

    async def a_little(engine) -> Handle:
        handle = engine.submit(Request(world.encode("a"), endless))
        pieces = aiter(handle)
        await anext(pieces)
        await pieces.aclose()
        return handle

    with Engine(model, world, slots=1) as engine:
        for handle in (asyncio.run(a_little(engine)), engine.submit(Request(world.encode("b"), endless))):
            for _piece in handle:
                break
            wait_until(lambda handle=handle: handle.finish == "cancelled")
        wait_until(lambda: engine.load.active == 0)


def wait_until(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_closing_drains_or_cancels(model, world) -> None:
    engine = Engine(model, world, slots=1).start()
    handles = [engine.submit(Request(world.encode("a"), GREEDY)) for _n in range(3)]
    engine.close()
    assert [handle.finish for handle in handles] == ["length"] * 3
    with pytest.raises(Closed):
        engine.submit(Request(world.encode("a"), GREEDY))
    engine = Engine(model, world, slots=1).start()
    handles = [engine.submit(Request(world.encode("a"), with_(GREEDY, max_tokens=10**6))) for _n in range(3)]
    engine.close(seconds=0.05)
    assert [handle.finish for handle in handles] == ["cancelled"] * 3


def test_a_failure_ends_the_answers_it_hit_and_no_others(model, world) -> None:
    engine = Engine(model, world, form=PlainForm(model))
    handle = engine.submit(Request(world.encode("a"), GREEDY))
    engine.turn()
    kept = model.head.weight
    model.head.weight = torch.nn.Parameter(torch.zeros(4, 4))
    try:
        engine.turn()
    finally:
        model.head.weight = kept
    assert handle.finish == "error"
    with pytest.raises(RuntimeError):
        handle.result()
    [answer] = finish(engine, engine.submit(Request(world.encode("a"), GREEDY)))
    assert ids(answer) == alone(model, world, world.encode("a"))

"""Thoughts and answers apart, whole and streamed, over HTTP and in a terminal."""

from __future__ import annotations

import http.client
import json
import threading

import pytest

pytest.importorskip("trl")
pytest.importorskip("datasets")

from deepseek_arch.r1.serving import Reasoner, Splitter, TokenReader, make_server
from deepseek_arch.r1.stages import Policy


@pytest.mark.parametrize(
    ("text", "thinking", "reasoning", "content"),
    [
        ("<think> so </think>\n\n4", False, "so ", "4"),
        ("so </think> 4", True, "so ", "4"),
        ("4 it is", False, "", "4 it is"),
        ("<think> and so", False, "and so", ""),
        ("4 <think> no </think>", False, "", "4 <think> no </think>"),
        ("<think>a<think>b</think>c</think>d", False, "a<think>b", "c</think>d"),
        ("a < b <thin", False, "", "a < b <thin"),
        ("x </thin", True, "x </thin", ""),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 100])
def test_a_text_is_split_the_same_in_whatever_pieces_it_comes(text, thinking, reasoning, content, size):
    emitted = {"reasoning_content": "", "content": ""}
    splitter = Splitter(lambda kind, piece: emitted.__setitem__(kind, emitted[kind] + piece), thinking)
    for start in range(0, len(text), size):
        splitter.add(text[start : start + size])
    splitter.add("", final=True)
    assert emitted == splitter.parts == {"reasoning_content": reasoning, "content": content}


@pytest.mark.parametrize("text", ["a b c", "ein Käse für 5 €", "思考 42 🎉 ok", "x\ufffd", "é"])
def test_tokens_are_read_as_they_come(text):
    """Tokens are bytes here, and the first space of a text is dropped, as SentencePiece does."""
    decoded = []

    def decode(ids):
        decoded.append(len(ids))
        return bytes(ids).decode(errors="replace").removeprefix(" ")

    ids = list(text.encode())
    reader = TokenReader(decode)
    pieces = [reader.add([i]) for i in ids]
    assert "".join(pieces) + reader.rest() == decode(ids) and reader.count == len(ids)
    assert all("\ufffd" not in piece for piece in pieces)
    decoded.clear()
    for i in b" word" * 100:
        reader.add([i])
    assert max(decoded) < 16, "a token costs the same however long the text is"


def test_a_cut_character_is_shown_at_the_end():
    reader = TokenReader(lambda ids: bytes(ids).decode(errors="replace"))
    assert reader.add(list("né".encode()[:2])) == "" and reader.rest() == "n\ufffd"


@pytest.fixture(scope="module")
def reasoner(policy_folder, tag_tokenizer):
    folder = policy_folder(num_nextn_predict_layers=1)
    policy = Policy.load(folder)
    policy.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}<think>"
    return Reasoner(policy, max_new_tokens=8)


@pytest.mark.parametrize("depth", [0, 1])
def test_pieces_add_up_to_the_reply(reasoner, depth):
    reasoner.mtp_depth = depth
    pieces = []
    reply = reasoner.respond([{"role": "user", "content": "w1 w2"}], lambda *piece: pieces.append(piece), seed=3)
    reasoner.mtp_depth = 0
    assert "".join(text for kind, text in pieces if kind == "reasoning_content") == reply.reasoning_content
    assert reply.prompt_tokens == 3 and 0 < reply.completion_tokens <= 8
    assert reply.finish_reason == ("length" if reply.completion_tokens == 8 else "stop")
    assert len(pieces) > 1 and reply.reasoning_content and not reply.content


def test_seeds_repeat_a_reply(reasoner):
    def once(seed):
        return reasoner.respond([{"role": "user", "content": "w1 w2"}], seed=seed)

    assert once(1) == once(1)
    assert len({once(seed).reasoning_content for seed in range(5)}) > 1


@pytest.mark.parametrize(
    "messages",
    [[], "w1", [{"role": "user"}], [{"role": "assistant", "content": "w1"}], [{"content": "w1"}], None, ["w1"]],
)
def test_bad_conversations_are_refused(reasoner, messages):
    with pytest.raises(ValueError, match="expected"):
        reasoner.respond(messages)


def test_long_conversations_and_bare_tokenizers_are_refused(reasoner, policy_folder):
    with pytest.raises(ValueError, match=r"prompts and completions of at most \d+ tokens"):
        reasoner.respond([{"role": "user", "content": "w1"}], max_new_tokens=10**6)
    with pytest.raises(ValueError, match="with a chat template"):
        Reasoner(Policy.load(policy_folder(num_nextn_predict_layers=1)))


@pytest.fixture(scope="module")
def port(reasoner):
    server = make_server(reasoner, port=0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()
    thread.join()


def ask(port, method="POST", path="/v1/chat/completions", body=None, raw=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    data = raw if raw is not None else json.dumps(body) if body is not None else None
    connection.request(method, path, data, {"Content-Type": "application/json"})
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, response.headers["Content-Type"], text


QUESTION = {"model": "deepseek-reasoner", "messages": [{"role": "user", "content": "w1 w2"}], "seed": 5}


def test_whole_and_streamed_replies_are_the_same(port):
    status, kind, text = ask(port, body=QUESTION)
    whole = json.loads(text)
    assert status == 200 and kind == "application/json" and whole["object"] == "chat.completion"
    message = whole["choices"][0]["message"]
    assert message["reasoning_content"] and message["content"] == "" and message["role"] == "assistant"
    assert whole["usage"]["total_tokens"] == whole["usage"]["prompt_tokens"] + whole["usage"]["completion_tokens"]

    status, kind, text = ask(port, body=QUESTION | {"stream": True})
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert status == 200 and kind == "text/event-stream" and events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0]["role"] == "assistant"
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == message["reasoning_content"]
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert chunks[-1]["usage"] == whole["usage"]


def test_the_model_is_listed(port):
    status, _, text = ask(port, "GET", "/v1/models")
    assert status == 200 and [model["id"] for model in json.loads(text)["data"]] == ["deepseek-reasoner"]


@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        ({"body": QUESTION | {"model": "other"}}, 400, "'deepseek-reasoner', got 'other'"),
        ({"body": QUESTION | {"messages": []}}, 400, "expected messages"),
        ({"body": QUESTION | {"messages": [], "stream": True}}, 400, "expected messages"),
        ({"body": QUESTION | {"n": 2}}, 400, "one choice"),
        ({"body": QUESTION | {"temperature": "hot"}}, 400, "temperature that is a number"),
        ({"body": QUESTION | {"max_tokens": True}}, 400, "max_tokens that is a number"),
        ({"body": [1]}, 400, "an object, got list"),
        ({"raw": "{"}, 400, "expected JSON"),
        ({"raw": ""}, 400, "a body of at most"),
        ({"path": "/v1/completions", "body": QUESTION}, 404, "/v1/chat/completions"),
        ({"method": "GET", "path": "/"}, 404, "/v1/models"),
    ],
)
def test_bad_requests_get_an_error_that_says_what_was_expected(port, request_, status, message):
    found, _, text = ask(port, **request_)
    assert found == status and message in json.loads(text)["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_errors_of_templates_and_of_the_model_reach_the_client(port, reasoner, monkeypatch, stream):
    body = QUESTION | {"stream": stream}
    with monkeypatch.context() as patch:
        patch.setattr(reasoner.policy.tokenizer, "chat_template", "{{ raise_exception('only one turn') }}")
        status, _, text = ask(port, body=body)
        assert status == 400 and "only one turn" in json.loads(text)["error"]["message"]
        patch.setattr(reasoner.policy.tokenizer, "chat_template", "{{ messages[0].content + 1 }}")
        assert ask(port, body=body)[0] == 400
    with monkeypatch.context() as patch:
        patch.setattr(reasoner.policy, "stream", lambda *arguments: {}["memory"])
        status, _, text = ask(port, body=body)
        assert status == 500 and json.loads(text)["error"]["message"] == "KeyError: 'memory'"
    assert ask(port, body=body)[0] == 200


def test_an_error_behind_the_first_words_ends_the_stream(port, reasoner, monkeypatch):
    def stream(prompt, sampling, take):
        take([5])
        raise RuntimeError("gone")

    monkeypatch.setattr(reasoner.policy, "stream", stream)
    status, _, text = ask(port, body=QUESTION | {"stream": True})
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert status == 200 and events[-1] == "[DONE]"
    assert json.loads(events[-2])["error"] == {"message": "RuntimeError: gone", "type": "server_error", "code": None}


def test_clients_of_openai_are_served(port):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
    reply = client.chat.completions.create(**QUESTION)
    assert reply.choices[0].message.reasoning_content
    pieces = client.chat.completions.create(**QUESTION, stream=True)
    text = "".join(getattr(piece.choices[0].delta, "reasoning_content", None) or "" for piece in pieces)
    assert text == reply.choices[0].message.reasoning_content
